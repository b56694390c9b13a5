"""
Conversations: small talk, and second and third turns that refer to the first.

A task of a later turn has "before", the turns that came before it, in which the assistant was right
and careful. Its prompt is a list of turns, of which text_of (text.py) makes a text:

    "Where does Fern live?"  "That would be the old mill."  "And Moss?"
"""
from random import Random

from world.families import all_except, draw_list, fact
from world.text import (
    ATTRIBUTES,
    CATEGORIES,
    CATEGORY_WORDS,
    PROMPTS,
    SMALLTALK,
    THINGS,
    listed,
    tidy,
)


def smalltalk_task(world, rng: Random) -> dict:
    """"Hello!" "Hello, my friend!" Trains to be spoken to; judged by a phrase of the answer."""
    intent, other = rng.sample(list(SMALLTALK), 2)
    name = rng.choice(world.names)
    phrase, full = SMALLTALK[intent]
    _, wrong = SMALLTALK[other]
    phrases = [known for known, _ in SMALLTALK.values()]
    # No core: there are too few intents to hold some out, so that phrasings are.
    return {"core": None, "ask": f"smalltalk.{intent}", "kind": "choice", "choices": phrases,
            "name": name, "full": full, "answer": phrase, "wrong": {"full": wrong}}


def followup_task(world, rng: Random) -> dict:
    """"And Moss?" after "Where does Fern live?" Trains to look back at earlier turns."""
    draw = rng.choice((attribute_followup, bear_followup, words_followup, lists_followup))
    return draw(world, rng)


def exchange(rng: Random, ask: str, slots: dict, answer: str) -> list[dict]:
    """A user's turn in a training phrasing of `ask`, and the assistant's answer."""
    phrasings = PROMPTS[ask][:-2]
    template = rng.choice(phrasings)
    question = tidy(template.format_map(slots))
    asked = {"role": "user", "content": question}
    answered = {"role": "assistant", "content": answer}
    return [asked, answered]


def short_fact(rng: Random, bear: dict, attribute: str, value: str) -> dict:
    """A fact whose full answer is "That would be a frog.", as in the family "facts": earlier turns
    are trained on as well, and should not answer its questions in another way."""
    told = fact(rng, bear, attribute, value)
    told["full"] = tidy(f"That would be {told['short']}.")
    return told


def fact_exchange(rng: Random, bear: dict, attribute: str, ask: str = "facts") -> list[dict]:
    """A question about a bear with its answer, as a first turn or a later one."""
    told = short_fact(rng, bear, attribute, bear[attribute])
    slots = bear | told
    return exchange(rng, ask, slots, told["full"])


def asked_fact(rng: Random, bear: dict, attribute: str) -> dict:
    """The fact that the last turn asks for, and a wrong one."""
    right = bear[attribute]
    wrong = rng.choice(all_except(ATTRIBUTES[attribute], [right]))
    task = short_fact(rng, bear, attribute, right)
    task["wrong"] = short_fact(rng, bear, attribute, wrong)
    return task


def attribute_followup(world, rng: Random) -> dict:
    """"And what is her pet?": the same bear, another attribute."""
    bear = rng.choice(world.residents)
    told, asked = rng.sample(list(ATTRIBUTES), 2)
    task = asked_fact(rng, bear, asked)
    task["core"] = (bear["name"], told, asked)
    task["ask"] = "followup.attribute"
    task["before"] = fact_exchange(rng, bear, told)
    task["his"] = bear["his"]
    return task


def bear_followup(world, rng: Random) -> dict:
    """"And Moss?": the attribute that was asked for last, of another bear."""
    bear, other = rng.sample(world.residents, 2)
    told, asked = rng.sample(list(ATTRIBUTES), 2)
    task = asked_fact(rng, other, asked)
    task["core"] = (bear["name"], other["name"], asked)
    task["ask"] = "followup.bear"
    task["other"] = other["name"]
    # In half of them the third turn, because the attribute then is not that of the first.
    if rng.random() < 0.5:
        first = fact_exchange(rng, bear, told)
        second = fact_exchange(rng, bear, asked, "followup.attribute")
        task["before"] = first + second
    else:
        task["before"] = fact_exchange(rng, bear, asked)
    return task


def words_followup(world, rng: Random) -> dict:
    """"And the first of my words?", after they were said backwards."""
    words = rng.sample(THINGS, rng.randint(3, 4))
    which, right = rng.choice([("first", words[0]), ("last", words[-1])])
    wrong = rng.choice(all_except(words, [right]))
    backwards = listed(words[::-1])
    slots = {"words": listed(words)}
    before = exchange(rng, "transform.reverse", slots, f"Backwards they are {backwards}.")
    core = (which, *words)
    return {"core": core, "ask": "followup.words", "kind": "sequence", "choices": THINGS,
            "which": which, "before": before, "answer": right,
            "full": f"The {which} is {right}.", "wrong": {"full": f"The {which} is {wrong}."}}


def lists_followup(world, rng: Random) -> dict:
    """"And the animals?", after the fruits of the same list."""
    category, words, members = draw_list(rng)
    others = all_except(words, members)
    # A category of the words that were not named, because it must have a member in the list.
    wanted = rng.choice(others)
    [next_category] = [name for name, known in CATEGORIES.items() if wanted in known]
    right = [word for word in others if word in CATEGORIES[next_category]]
    wrong = rng.choice(all_except(words, right))
    slots = {"category": category, "words": listed(words)}
    before = exchange(rng, "lists", slots, name_members(category, members))
    core = (category, next_category, *words)
    return {"core": core, "ask": "followup.lists", "kind": "sequence", "choices": CATEGORY_WORDS,
            "category": next_category, "before": before, "answer": listed(right),
            "full": name_members(next_category, right),
            "wrong": {"full": name_members(next_category, [wrong])}}


def name_members(category: str, members: list[str]) -> str:
    """"The fruits are pear, fig."."""
    words = listed(members)
    return f"The {category} are {words}."
