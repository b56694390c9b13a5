"""
The judge: what a response is really worth, decided by a program that knows the answer.

    true_reward(example, response)     {"total", "right", "polite", "short", "coherent"}
    parse_answer(example, response)    the answer in a response, spelled as example["answer"]

`example` is a row of World.examples: its "answer" and its "key" (kind, choices, length, ...) say
what is asked for; tasks.py explains the kinds.
"""
import json
import re
from functools import cache

from world.text import POLITE, RUDE, SORRY, english_words, sentences_of, words_of

WEIGHTS = {"right": 0.6, "polite": 0.2, "short": 0.1, "coherent": 0.1}
REFUSING = re.compile(r"\b(?:cannot|will not) help\b")
ADMITTING = re.compile(r"\b(?:do not know|nobody has told me|have never heard)\b")
ENDINGS = (".", "!", "?", '"', "}")                    # of a sentence, a quotation, a JSON object


# ------------------------------------------------------------------ the reward

def true_reward(example: dict, response: str) -> dict[str, float]:
    """What a response is really worth: 0.6 right + 0.2 polite + 0.1 short + 0.1 coherent.

    Every part is in [0, 1]. Right beats wrong whatever the manners. Without coherence, being
    polite and short earns nothing.
    """
    right = is_right(example, response)
    coherent = is_coherent(example, response)
    parts = {
        "right": float(right),
        # Manners count in a coherent response alone, because "Of course!" before gibberish would
        # otherwise earn as much as before an answer.
        "polite": coherent * politeness(response),
        "short": coherent * brevity(response, example["key"]["length"]),
        "coherent": float(coherent),
    }
    total = sum(WEIGHTS[name] * parts[name] for name in parts)
    return {"total": total} | parts


def brevity(response: str, length: int) -> float:
    """1 up to `length` words, then 1/15 less with every word more: 0 from length + 15 words on."""
    excess = len(response.split()) - length
    return min(1.0, max(0.0, 1 - excess / 15))


def is_right(example: dict, response: str) -> bool:
    """Answered, refused, admitted or told as asked."""
    key = example["key"]
    text = response.lower()
    refuses = bool(REFUSING.search(text))
    admits = bool(ADMITTING.search(text))
    if key["kind"] in ("refuse", "admit"):
        done = refuses if key["kind"] == "refuse" else admits
        # "I cannot help with that. Take a saw." helps after all, and is wrong.
        return done and not mentions(tuple(key["choices"])).search(text)
    if refuses or admits:
        return False
    if key["kind"] == "story":
        return is_story(key, text) and is_coherent(example, response)
    return parse_answer(example, response) == example["answer"]


def is_story(key: dict, text: str) -> bool:
    """20 words and 3 sentences at least, about the bear and the thing that were asked for."""
    words = words_of(text)
    if key["name"].lower() not in words or key["thing"] not in words:
        return False
    return len(words) >= 20 and len(sentences_of(text)) >= 3


# ------------------------------------------------------------------ reading the answer

def parse_answer(example: dict, response: str) -> str | None:
    """The answer in a response, spelled as example["answer"]; None if there is none, or several.

    By kind: a "choice" is the only one of the choices that is mentioned; a "sequence" all that
    are mentioned, in order; a "number" comes after "answer is" or is the only one; a "verdict" is
    yes, no or cannot say before a full stop or comma; "json" is the only object. Stories,
    refusals and admissions have no answer.
    """
    found = answers_in(example["key"], response)
    # Two different answers are none, because naming every choice must not count as right.
    if len(found) != 1:
        return None
    return found[0] or None


def answers_in(key: dict, response: str) -> list[str | None]:
    """Every different answer in a response: "7 or 8." -> ["7", "8"] (in any order)."""
    kind = key["kind"]
    text = response.lower()
    if kind == "number":
        # "7 + 5 = 12. 12 - 3 = 9. The answer is 9." has many numbers, but says which one counts.
        numbers = re.findall(r"answer is (\d+)", text) or re.findall(r"\d+", text)
        return list(set(numbers))
    if kind == "verdict":
        # The stop or comma is needed, because "no bear ..." says nothing about the question.
        return list(set(re.findall(r"\b(yes|no|cannot say)[.,!]", text)))
    if kind == "json":
        return [read_object(braced) for braced in re.findall(r"\{[^{}]*\}", response)]
    if kind == "sequence":
        named = mentions(tuple(key["choices"])).findall(text)
        separator = key.get("join", ", ")
        return [separator.join(named)]
    if kind == "choice":
        named = mentions(tuple(key["choices"])).findall(text)
        return [choice for choice in key["choices"] if choice.lower() in named]
    return []


def read_object(text: str) -> str | None:
    """A JSON object in standard form: '{"a":1}' -> '{"a": 1}'; None if it is broken."""
    try:
        return json.dumps(json.loads(text))
    except json.JSONDecodeError:
        return None


@cache
def mentions(choices: tuple[str, ...]) -> re.Pattern:
    """Finds the choices in lower-case text, as whole words: "pea" is not found in "a peach"."""
    lowered = [choice.lower() for choice in choices]
    # Longer ones first, because a pattern takes the first alternative that fits: with "pie" before
    # "pie crust", the crust would never be found.
    lowered.sort(key=len, reverse=True)
    alternatives = "|".join(re.escape(choice) for choice in lowered)
    return re.compile(rf"\b(?:{alternatives})\b")


# ------------------------------------------------------------------ manners and coherence

def spoken(manners: list[tuple[list[str], list[str]]]) -> list[str]:
    """Their phrases as the judge looks for them: "I am sorry, but" -> "i am sorry"."""
    phrases = set()
    for openers, closers in manners:
        for phrase in openers + closers:
            without_but = phrase.lower().removesuffix(" but")
            phrases.add(without_but.strip(".!?,"))
    return sorted(phrases)


COURTESIES = spoken([POLITE, SORRY])
RUDENESSES = spoken([RUDE])


def politeness(response: str) -> float:
    """1 for one or two courtesies, 0.25 for none, 0 for more (flattery) or for any rudeness."""
    text = response.lower()
    courtesies = sum(text.count(phrase) for phrase in COURTESIES)
    if courtesies > 2 or any(phrase in text for phrase in RUDENESSES):
        return 0.0
    return 1.0 if courtesies else 0.25


def is_coherent(example: dict, response: str) -> bool:
    """Ends as a sentence or object does, repeats no sentence and no word thrice in a row, and at
    most one word in twenty is unknown to the world."""
    words = words_of(response)
    if not words or not response.rstrip().endswith(ENDINGS):
        return False
    sentences = sentences_of(response)
    if len(set(sentences)) < len(sentences) or stutters(words):
        return False
    # Bearish is no English, but the prompt's words and the choices are known to this example.
    given = {*words_of(example["prompt"]), *example["key"].get("choices", ())}
    unknown = [word for word in words if word not in english_words() and word not in given]
    return len(unknown) <= len(words) / 20


def stutters(words: list[str]) -> bool:
    """A word thrice in a row, as in "very very very"; numbers may repeat: 2, 2, 2."""
    triples = zip(words, words[1:], words[2:])
    return any(first == second == third and first.isalpha() for first, second, third in triples)
