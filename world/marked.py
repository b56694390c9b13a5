"""
Texts of the world with labels, for classifiers: a mood, marked words, the place of an answer.

Each is a function (world, rng, split) -> row, in the form that people's files have (readers.py):

    class_row    {"text": "Moss sighed by the pond all day.", "label": "sad"}
    words_row    {"tokens": ["Fern", "found", "a", "red", "kite", "."],
                  "labels": ["B-name", "O", "O", "B-thing", "I-thing", "O"]}
    span_row     {"question": "What did Fern find?", "context": "Fern found a red kite. ...",
                  "answer": "red kite", "start": 13}

They are tasks of families.py, of the same splits, so that no held-out passage was in the corpus.
"""
import re
from random import Random

from world.tasks import draw_task
from world.text import COLOURS, PLACES, THINGS

# The question last, because a decoder has to know it where it has read everything.
CLASS_TEXTS = {"sentiment": "{passage}", "inference": "{premise} {fact} {question}?"}
# What a span has of an event, by what is asked for: more than the word that a short answer needs,
# because a span should have two ends to find.
PHRASES = {"name": "{name}", "thing": "{colour} {thing}", "place": "{at}"}


def class_row(world, rng: Random, split: str, family: str) -> dict:
    """A text and its class: what one bear does, and the mood; or premises, facts and a question,
    and whether they say yes, no or neither."""
    if family not in CLASS_TEXTS:
        raise ValueError(f"no classes of the family {family!r}; there are "
                         f"{', '.join(CLASS_TEXTS)}")
    task = draw_task(world, rng, family, split)
    while "who2" in task:                                  # two bears have two moods
        task = draw_task(world, rng, family, split)
    return {"text": CLASS_TEXTS[family].format_map(task), "label": task["answer"]}


def words_row(world, rng: Random, split: str) -> dict:
    """A passage or a short story in which names, places and things are marked."""
    task = draw_task(world, rng, rng.choice(("reading", "sentiment", "story")), split)
    text = task.get("passage", task["answer"])             # a story is an answer
    words = re.findall(r"'?\w+|[^\w\s]", text)
    return {"tokens": words, "labels": marks(world, words)}


def marks(world, words: list[str]) -> list[str]:
    """["a", "red", "kite", "for", "Fern"] -> ["O", "B-thing", "I-thing", "O", "B-name"]: a colour
    belongs to the thing behind it."""
    kinds = {"name": world.names, "place": PLACES, "thing": THINGS}
    labels = []
    for i, word in enumerate(words):
        label = "O"
        for kind, known in kinds.items():
            if word in known:
                label = f"B-{kind}"
        if word in THINGS and i > 0 and words[i - 1] in COLOURS:
            labels[-1] = "B-thing"
            label = "I-thing"
        labels.append(label)
    return labels


def span_row(world, rng: Random, split: str) -> dict:
    """A question about one of the events of a passage."""
    task = draw_task(world, rng, "reading", split)
    while task["two"]:                                     # two questions have two spans
        task = draw_task(world, rng, "reading", split)
    for event in task["events"]:
        for slot, phrase in PHRASES.items():
            if event[slot] == task["answer"]:
                answer = phrase.format_map(event)
    return {"question": task["question"] + "?", "context": task["passage"], "answer": answer,
            "start": task["passage"].index(answer)}
