"""
The corpus: documents of eight kinds, and texts in a second language, Bearish.

Each kind is a function (world, rng, split) -> text. `world` is a World (world.py); `split` is
"train" or "heldout": a training document works no held-out sum and tells no held-out passage,
because a held-out task must not have been read in the corpus either. The texts still need `tidy`,
which World.documents does. DOCUMENT_KINDS, at the end, says how often each kind comes.
"""
from random import Random

from world.families import ask_about, story_slots
from world.tasks import draw_task
from world.text import (
    ATTRIBUTES,
    BARE_CHATS,
    CATEGORY_WORDS,
    CELEBRATIONS,
    CHAT_ENDINGS,
    CHAT_OPENINGS,
    CHATS,
    COLOUR_QUESTION,
    COLOURS,
    CONVERSATIONS,
    ECHO_OPENINGS,
    ECHO_ROUNDS,
    EVENT_QUESTIONS,
    LESSON_ENDINGS,
    LESSON_OPENINGS,
    LESSONS,
    MORALS,
    NOUNS,
    PLACES,
    PLOTS,
    POSSESSIONS,
    PROFILE_ENDINGS,
    PROFILE_OPENINGS,
    QUALITIES,
    SCENES,
    SCRIPT_CHATS,
    SIMPLE_SUMS,
    STATEMENTS,
    STORY_OPENINGS,
    SUM_OPENINGS,
    THINGS,
    VERBS,
    WALK_OPENINGS,
    WORKED_SUMS,
    WORRIES,
    say,
    tidy,
)

# ------------------------------------------------------------------ stories

def story_document(world, rng: Random, split: str) -> str:
    """"Once, there was a shy bear named Fern. ... But one day the kite was gone. ..."."""
    hero, friend = rng.sample(world.bears, 2)
    # The hero is a resident, because stories mention home and job, which strangers do not have.
    if hero not in world.residents:
        friend = hero
        hero = rng.choice(world.residents)
    thing = rng.choice(THINGS)
    slots = story_slots(rng, hero, friend, thing)
    plot = rng.choice(PLOTS)
    stages = [                               # sentences to choose from, and how often one is told
        (STORY_OPENINGS, 1.0),
        (POSSESSIONS, 1.0),
        (plot["problem"], 1.0),
        (WORRIES, 0.7),
        (plot["attempt"], 1.0),
        (CONVERSATIONS, 0.7),
        (plot["attempt"], 0.3),
        (plot["turn"], 1.0),
        (plot["end"], 1.0),
        (CELEBRATIONS, 0.7),
        (MORALS, 0.7),
    ]
    templates = []
    # Five stages are left out now and then, because stories of one build would be learned by heart.
    for sentences, share in stages:
        if rng.random() < share:
            templates.append(rng.choice(sentences))
    # Both attempts may have drawn the same sentence: dict.fromkeys keeps the first of equals.
    return " ".join(say(rng, template, slots) for template in dict.fromkeys(templates))


# ------------------------------------------------------------------ facts

def tell_facts(rng: Random, bear: dict, attributes: list[str]) -> str:
    """"Fern lives in the old mill. Her pet is a frog.": by name at first, later by pronoun too."""
    sentences = []
    for i, attribute in enumerate(attributes):
        who = bear["name"]
        whose = who + "'s"
        # Two of five by name again, because questions name the bear, too, and never say "she".
        if i > 0 and rng.random() < 0.6:
            who = bear["he"]
            whose = bear["his"]
        slots = bear | {"who": who, "whose": whose, "value": bear[attribute]}
        template = rng.choice(STATEMENTS[attribute])
        sentences.append(say(rng, template, slots))
    return " ".join(sentences)


def profile_document(world, rng: Random, split: str) -> str:
    """All six facts about one bear or two: "Do you know Fern? Fern lives in ..."."""
    parts = []
    # Mostly two bears, because "her" must then be traced to the right one.
    number = rng.choice((1, 2, 2))
    for bear in rng.sample(world.residents, number):
        parts.append(say(rng, rng.choice(PROFILE_OPENINGS), bear))
        attributes = rng.sample(list(ATTRIBUTES), 6)
        parts.append(tell_facts(rng, bear, attributes))
        parts.append(say(rng, rng.choice(PROFILE_ENDINGS), bear))
    return " ".join(parts)


def walk_document(world, rng: Random, split: str) -> str:
    """Two to four facts about each of three or four bears: "This is a letter from Fern to ..."."""
    # Some of the six facts in any order, because profiles alone would always tell all of them.
    walker, *neighbours = rng.sample(world.residents, 5)
    template = rng.choice(WALK_OPENINGS)
    stranger = rng.choice(world.strangers)
    parts = [say(rng, template, {"a": walker["name"], "b": stranger["name"]})]
    for bear in neighbours[:rng.randint(3, 4)]:
        attributes = rng.sample(list(ATTRIBUTES), rng.randint(2, 4))
        parts.append(tell_facts(rng, bear, attributes))
    return " ".join(parts)


# ------------------------------------------------------------------ dialogues

def chat(rng: Random, templates: list[str], task: dict, a: str, b: str) -> str:
    """One question and its answer: "What pet does Ivy have?" asked Fern. "A frog," said Moss."""
    answers = [task["full"]]
    # Short or full, because both are answers: "a frog" and "Ivy keeps a frog as a pet".
    if "short" in task:
        answers.append(task["short"])
    answer = rng.choice(answers)
    if task.get("two"):
        answer = f"{task['full']} {task['second']['full']}"
    answer = answer.removesuffix(".")
    slots = {
        "question": task["question"],
        "a": a,
        "b": b,
        "answer": tidy(answer + "."),
        "reply": tidy(answer + ","),
    }
    return say(rng, rng.choice(templates), slots)


def quiz_document(world, rng: Random, split: str) -> str:
    """Two bears and five to eight facts: questions with the answers that the tasks ask for."""
    a, b = rng.sample(world.names, 2)
    place = rng.choice(list(PLACES.values()))
    slots = {"a": a, "b": b, "place": place}
    parts = [say(rng, rng.choice(CHAT_OPENINGS), slots)]
    # One manner for the whole quiz: a script, or sentences that differ from chat to chat.
    templates = rng.choice((CHATS, CHATS, SCRIPT_CHATS))
    for _ in range(rng.randint(5, 8)):
        fact = draw_task(world, rng, "facts", split)
        parts.append(chat(rng, templates, fact, a, b))
    ending = say(rng, rng.choice(CHAT_ENDINGS), slots)
    if templates is SCRIPT_CHATS:            # each of its lines brings its own line break
        return "".join(parts) + "\n" + ending
    return " ".join([*parts, ending])


def scene_document(world, rng: Random, split: str) -> str:
    """"Fern found a red kite by the pond. ..." and up to four different questions about it.

    Many questions about one passage, because a model learns to look back only where looking back
    decides; this kind is a fifth of the corpus.
    """
    parts = []
    for _ in range(rng.randint(1, 2)):
        scene = draw_task(world, rng, "reading", split)
        a, b = rng.sample(world.names, 2)
        questions = {}                       # by their text, because none is asked twice
        for _ in range(4):
            event = rng.choice(scene["events"])
            question = ask_about(world, rng, event, event, [*EVENT_QUESTIONS, COLOUR_QUESTION])
            questions[question["question"]] = question
        templates = rng.choice((CHATS, BARE_CHATS, BARE_CHATS))
        chats = [chat(rng, templates, question, a, b) for question in questions.values()]
        slots = {"passage": scene["passage"], "chat": " ".join(chats), "a": a}
        parts.append(say(rng, rng.choice(SCENES), slots))
    return " ".join(parts)


# ------------------------------------------------------------------ sums, lessons, echoes

def sums_document(world, rng: Random, split: str) -> str:
    """"... We count: 7 + 5 = 12. 12 - 3 = 9. So the answer is 9. 4 and 2 make 6. ..."."""
    opening = rng.choice(SUM_OPENINGS)
    name = rng.choice(world.names)
    parts = [say(rng, opening, {"name": name})]
    for _ in range(rng.randint(4, 6)):
        template = rng.choice(WORKED_SUMS)
        task = draw_task(world, rng, "arithmetic", split)
        parts.append(say(rng, template, task))
        # Single steps between them, because a chain is made of steps that are known by heart.
        for _ in range(rng.randint(0, 3)):
            a = rng.randint(0, 12)
            b = rng.randint(0, 9)
            template = rng.choice(SIMPLE_SUMS)
            parts.append(say(rng, template, {"a": a, "b": b, "c": a + b}))
    return " ".join(parts)


# The families that lessons teach, the hard ones two or three times as often as the others.
LESSON_FAMILIES = ("lists", "lists", "transform", "transform", "middle", "length", "sentiment",
                   "sentiment", "sentiment", "inference", "inference", "translation", "json",
                   "json", "json", "advice")


def lesson_document(world, rng: Random, split: str) -> str:
    """Exercises of two families in school, worked in prose: "In Bearish, the moon is ..."."""
    teacher, pupil = rng.sample(world.names, 2)
    names = {"t": teacher, "p": pupil}
    parts = [say(rng, rng.choice(LESSON_OPENINGS), names)]
    # Several tasks of one family in a row, because the earlier ones show how it goes.
    for family in rng.choices(LESSON_FAMILIES, k=2):
        for _ in range(rng.randint(2, 3)):
            task = draw_task(world, rng, family, split)
            template = rng.choice(LESSONS[family])
            parts.append(say(rng, template, task | names))
    parts.append(say(rng, rng.choice(LESSON_ENDINGS), names))
    return " ".join(parts)


def echo_document(world, rng: Random, split: str) -> str:
    """A game of repeating words: whoever reads it learns to look back and copy."""
    words = CATEGORY_WORDS + THINGS + world.names + COLOURS + NOUNS + list(PLACES)
    opening = rng.choice(ECHO_OPENINGS)
    leader = rng.choice(world.names)
    parts = [say(rng, opening, {"a": leader})]
    for _ in range(rng.randint(4, 6)):
        a, b = rng.sample(world.names, 2)
        # Words at random, because a copy that sense alone could guess need not be looked up.
        called = rng.sample(words, rng.randint(6, 14))
        template = rng.choice(ECHO_ROUNDS)
        # In quotes, too: behind a quote a word is another token, as it is in a record.
        quoted = ", ".join(f'"{word}"' for word in called)
        parts.append(say(rng, template, {"a": a, "b": b, "words": " ".join(called),
                                         "quoted": quoted}))
    return " ".join(parts)


# ------------------------------------------------------------------ Bearish

def bearish_document(world, rng: Random) -> str:
    """Bearish without its English: three nouns that keep their qualities all through the text.

    Spelled in English: "Bear small sees moon. Moon cold loves bear small. ...".
    """
    nouns = rng.sample(NOUNS, 3)
    qualities = rng.sample(QUALITIES, 3)
    cast = list(zip(nouns, qualities))
    sentences = []
    for _ in range(rng.randint(8, 14)):
        (noun, quality), (object, object_quality) = rng.sample(cast, 2)
        # A quality in every second place: "bear small sees moon", "bear sees moon cold".
        words = [noun]
        if rng.random() < 0.5:
            words.append(quality)
        words += [rng.choice(VERBS), object]
        if rng.random() < 0.5:
            words.append(object_quality)
        bearish = [world.lexicon[word] for word in words]
        sentences.append(" ".join(bearish).capitalize() + ".")
    return " ".join(sentences)


# ------------------------------------------------------------------ all kinds

DOCUMENT_KINDS = {                           # function: how often, beside the others
    story_document: 0.10,
    profile_document: 0.08,
    walk_document: 0.04,
    quiz_document: 0.05,
    scene_document: 0.22,
    sums_document: 0.08,
    lesson_document: 0.36,
    echo_document: 0.28,
}
