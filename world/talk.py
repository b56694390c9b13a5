"""
Conversations: small talk, and second and third turns that refer to the first.

A task of a later turn has "before", the turns that came before it, in which the assistant was right
and careful. Its prompt is a list of turns, of which text_of (text.py) makes a text:

    "Where does Fern live?"  "Fern lives in the old mill."  "And Moss?"
"""
from random import Random

from world.families import all_except, draw_list, fact
from world.text import ATTRIBUTES, CATEGORIES, PROMPTS, SMALLTALK, THINGS, listed, tidy


def smalltalk_task(world, rng: Random) -> dict:
    """"Hello!" "Hello, my friend!" Trains to be spoken to; judged by a phrase of the answer."""
    intent, other = rng.sample(list(SMALLTALK), 2)
    phrases = [phrase for phrase, _ in SMALLTALK.values()]
    phrase, full = SMALLTALK[intent]
    _, wrong = SMALLTALK[other]
    # No core: there are too few intents to hold some out, so that phrasings are.
    return {"core": None, "ask": f"smalltalk.{intent}", "kind": "choice", "choices": phrases,
            "name": rng.choice(world.names), "full": full, "answer": phrase,
            "wrong": {"full": wrong}}


def followup_task(world, rng: Random) -> dict:
    """"And Moss?" after "Where does Fern live?" Trains to look back at earlier turns."""
    draw = rng.choice((attribute_followup, bear_followup, words_followup, lists_followup))
    return draw(world, rng)


def exchange(rng: Random, ask: str, slots: dict, answer: str) -> list[dict]:
    """A user's turn in a training phrasing of `ask`, and the assistant's answer."""
    template = rng.choice(PROMPTS[ask][:-2])
    question = tidy(template.format_map(slots))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def fact_exchange(rng: Random, bear: dict, attribute: str, ask: str = "facts") -> list[dict]:
    """A question about a bear with its answer, as a first turn or a later one."""
    slots = fact(rng, bear, attribute, bear[attribute])
    return exchange(rng, ask, bear | slots, slots["full"])


def asked_fact(rng: Random, bear: dict, attribute: str) -> dict:
    """What a task needs of the fact that its last turn asks for."""
    right = bear[attribute]
    wrong = rng.choice(all_except(ATTRIBUTES[attribute], [right]))
    return {**fact(rng, bear, attribute, right),
            "wrong": fact(rng, bear, attribute, wrong)}


def attribute_followup(world, rng: Random) -> dict:
    """"And what is her pet?": the same bear, another attribute."""
    bear = rng.choice(world.residents)
    told, asked = rng.sample(list(ATTRIBUTES), 2)
    return {"core": (bear["name"], told, asked), "ask": "followup.attribute", "his": bear["his"],
            "before": fact_exchange(rng, bear, told), **asked_fact(rng, bear, asked)}


def bear_followup(world, rng: Random) -> dict:
    """"And Moss?": the attribute that was asked for last, of another bear."""
    bear, other = rng.sample(world.residents, 2)
    told, asked = rng.sample(list(ATTRIBUTES), 2)
    # In half of them the third turn, because the attribute then is not that of the first.
    if rng.random() < 0.5:
        before = fact_exchange(rng, bear, told)
        before += fact_exchange(rng, bear, asked, "followup.attribute")
    else:
        before = fact_exchange(rng, bear, asked)
    return {"core": (bear["name"], other["name"], asked), "ask": "followup.bear",
            "other": other["name"], "before": before, **asked_fact(rng, other, asked)}


def words_followup(world, rng: Random) -> dict:
    """"And the first of my words?", after they were said backwards."""
    words = rng.sample(THINGS, rng.randint(3, 4))
    which = rng.choice(("first", "last"))
    right = words[0] if which == "first" else words[-1]
    wrong = rng.choice(all_except(words, [right]))
    backwards = f"Backwards they are {listed(words[::-1])}."
    before = exchange(rng, "transform.reverse", {"words": listed(words)}, backwards)
    return {"core": (which, *words), "ask": "followup.words", "kind": "sequence",
            "choices": THINGS, "which": which, "before": before, "answer": right,
            "full": f"The {which} is {right}.", "wrong": {"full": f"The {which} is {wrong}."}}


def lists_followup(world, rng: Random) -> dict:
    """"And the animals?", after the fruits of the same list."""
    category, words, members = draw_list(rng)
    others = all_except(words, members)
    # Any word that was not named decides which category is asked for next.
    wanted = rng.choice(others)
    next_category = next(name for name, known in CATEGORIES.items() if wanted in known)
    right = [word for word in others if word in CATEGORIES[next_category]]
    wrong = [rng.choice(all_except(words, right))]
    told = f"The {category} are {listed(members, ' and ')}."
    before = exchange(rng, "lists", {"category": category, "words": listed(words)}, told)
    return {"core": (category, next_category, *words), "ask": "followup.lists",
            "kind": "sequence", "choices": CATEGORIES[next_category] + members,
            "category": next_category, "before": before, "answer": listed(right),
            "full": f"The {next_category} are {listed(right, ' and ')}.",
            "wrong": {"full": f"The {next_category} are {listed(wrong, ' and ')}."}}
