"""
The single-turn families: how an instance of each is drawn, and what is right.

Each is a function (world, rng) -> task; tasks.py says what a task has, lists the families and has
the recipe for a new one. Conversations stand in talk.py.

    facts_task(World(), Random(1))     {"question": "Where does Fern live", "answer": ..., ...}
"""
import json
import re
from collections.abc import Collection
from random import Random

from world.text import (
    ADJECTIVES,
    ANSWERS,
    ATTRIBUTES,
    BEARISH_FORMS,
    CATEGORIES,
    CATEGORY_WORDS,
    CHORES,
    COLOUR_QUESTION,
    COLOURS,
    EVENT_FORMS,
    EVENT_QUESTIONS,
    EVENTS,
    FACT_QUESTIONS,
    FEELINGS,
    FILLERS,
    FOODS,
    HABIT_QUESTION,
    HABITS,
    HARMS,
    JOB_FACT,
    LATER,
    LOOKS,
    NOUNS,
    PLACES,
    PLOTS,
    PREMISES,
    QUALITIES,
    SECRETS,
    SHORT_POSSESSIONS,
    STATEMENTS,
    SUM_START,
    SUM_STEPS,
    THINGS,
    VERBS,
    VERDICTS,
    listed,
    plural,
    say,
    tidy,
)


def all_except(words: Collection[str], excluded: Collection[str]) -> list[str]:
    """["cat", "frog", "hen"] without ["frog"] -> ["cat", "hen"]."""
    return [word for word in words if word not in excluded]


def ask_both(question: str, other: str) -> str:
    """"Where is Fern", "Who is Moss" -> "Where is Fern, and who is Moss"."""
    return f"{question}, and {other[0].lower()}{other[1:]}"


def swapped(words: list[str], i: int) -> list[str]:
    """A copy with the words at i and i + 1 exchanged: ["a", "b", "c"], 1 -> ["a", "c", "b"]."""
    copy = list(words)
    copy[i] = words[i + 1]
    copy[i + 1] = words[i]
    return copy


# Of the families that can ask for two things at once, a third of the tasks do.
SHARE_OF_TWO = 1 / 3

# ------------------------------------------------------------------ writing

def story_task(world, rng: Random) -> dict:
    """"Tell me a story about Fern and a kite." Trains longer texts that keep to a subject."""
    hero, other, friend = rng.sample(world.residents, 3)
    thing, other_thing = rng.sample(THINGS, 2)
    story = short_story(rng, hero, friend, thing)
    # The wrong stories are as fluent as the right one, because fluency alone must not win a pair.
    of_other_thing = short_story(rng, hero, friend, other_thing)
    of_other_bear = short_story(rng, other, friend, thing)
    sentences = re.findall(r"[^.!?]+[.!?]+\"?", story)
    with_repetition = "".join(sentences[:2] + sentences[1:])
    wrong = rng.choice([of_other_thing, of_other_bear, with_repetition])
    name = hero["name"]
    return {"core": (name, thing), "kind": "story", "name": name, "thing": thing,
            "answer": story, "wrong": {"answer": wrong}}


def short_story(rng: Random, hero: dict, friend: dict, thing: str) -> str:
    """Three sentences of 20 to 26 words, because an answer of 64 tokens has to hold them."""
    slots = story_slots(rng, hero, friend, thing)
    while True:
        plot = rng.choice(PLOTS)
        stages = [SHORT_POSSESSIONS, plot["problem"], plot["end"]]
        sentences = [say(rng, rng.choice(stage), slots) for stage in stages]
        text = " ".join(sentences)
        if 20 <= len(text.split()) <= 26:
            return tidy(text)


def story_slots(rng: Random, hero: dict, friend: dict, thing: str) -> dict:
    """All that the sentences of a plot may speak of; the hero's own attributes are true facts."""
    place, place2 = rng.sample(list(PLACES.values()), 2)
    colour, colour2 = rng.sample(COLOURS, 2)
    of_friend = {
        "friend": friend["name"],
        "fhe": friend["he"],
        "fhim": friend["him"],
        "fhis": friend["his"],
    }
    scenery = {
        "food": hero["favourite food"],
        "thing": thing,
        "adjective": rng.choice(ADJECTIVES),
        "look": rng.choice(LOOKS),
        "animal": rng.choice(CATEGORIES["animals"]),
        "place": place,
        "place2": place2,
        "colour": colour,
        "colour2": colour2,
    }
    return hero | of_friend | scenery


# ------------------------------------------------------------------ knowledge

def facts_task(world, rng: Random) -> dict:
    """"What is the pet of Fern?" Trains recall: the corpus has stated every fact."""
    bear = rng.choice(world.residents)
    attribute, other = rng.sample(list(ATTRIBUTES), 2)
    right = bear[attribute]
    wrong = rng.choice(all_except(ATTRIBUTES[attribute], [right]))
    first = fact(rng, bear, attribute, right)
    second = fact(rng, bear, other, bear[other], by_name=False)
    task = ask_for_facts(rng, first, second)
    # No core: a fact that is held out from training could not be known.
    task["core"] = None
    task["wrong"] = fact(rng, bear, attribute, wrong)
    return task


def ask_for_facts(rng: Random, first: dict, second: dict) -> dict:
    """A task that asks for the first fact, and in a third of the cases for the second as well."""
    task = first | {"second": second, "forms": ("label", "sentence")}
    task["two"] = rng.random() < SHARE_OF_TWO
    if task["two"]:
        task["question"] = ask_both(first["question"], second["question"])
        task["attribute"] = f"{first['attribute']} and the {second['attribute']}"
    return task


def fact(rng: Random, bear: dict, attribute: str, value: str, by_name: bool = True) -> dict:
    """A fact as a task: a question about it, the short answer "a frog", the full "Fern has a pet
    frog." (or, not by name, "She has a pet frog."), and what the judge has to know."""
    name = bear["name"]
    who = name
    whose = name + "'s"
    if not by_name:
        who = bear["he"]
        whose = bear["his"]
    question = rng.choice(FACT_QUESTIONS[attribute])
    question = question.format_map(bear)
    short = "a " + value if attribute in ("job", "pet") else value
    statement = rng.choice(STATEMENTS[attribute][:3])
    slots = bear | {"who": who, "whose": whose, "value": value}
    full = say(rng, statement, slots)
    return {"kind": "choice", "choices": ATTRIBUTES[attribute], "answer": value, "name": name,
            "attribute": attribute, "question": question, "short": short, "full": full}


def unanswerable_task(world, rng: Random) -> dict:
    """Anything about a stranger, or a neighbour's secret: the right answer is not to know.

    Asked in the same words as facts, because only what was never told makes the difference.
    """
    # Mostly a stranger, because secrets are known by their names alone.
    if rng.random() < 0.8:
        bear = rng.choice(world.strangers)
        attributes = list(ATTRIBUTES)
    else:
        bear = rng.choice(world.residents)
        attributes = list(SECRETS)
    attribute, other = rng.sample(attributes, 2)
    first = invented_fact(rng, bear, attribute)
    second = invented_fact(rng, bear, other, by_name=False)
    task = ask_for_facts(rng, first, second)
    task["core"] = (bear["name"], attribute)
    task["ask"] = "facts"
    task["kind"] = "admit"
    task["choices"] = first["choices"] + second["choices"]
    # The slots are those of an invented answer: a wrong response needs no others.
    task["wrong"] = {}
    return task


def invented_fact(rng: Random, bear: dict, attribute: str, by_name: bool = True) -> dict:
    """Like fact, with a value that nobody has told."""
    if attribute in ATTRIBUTES:
        lie = rng.choice(ATTRIBUTES[attribute])
        return fact(rng, bear, attribute, lie, by_name)
    form, choices = SECRETS[attribute]
    lie = rng.choice(choices)
    short = form.format(lie)
    name = bear["name"]
    secret = f"the {attribute} of {name}"
    subject = secret
    if not by_name:
        subject = f"{bear['his']} {attribute}"
    return {"kind": "choice", "choices": choices, "answer": lie, "name": name,
            "attribute": attribute, "question": f"What is {secret}", "short": short,
            "full": tidy(f"{subject} is {short}.")}


# ------------------------------------------------------------------ reading

def draw_events(world, rng: Random) -> list[dict]:
    """Two events of different bears, deeds, things, colours and places.

    So "What did Fern find?" has one answer, and each word of the other event is a wrong one.
    """
    places = rng.sample(list(PLACES), 2)
    deeds = rng.sample(list(EVENTS), 2)
    names = rng.sample(world.names, 2)
    things = rng.sample(THINGS, 2)
    colours = rng.sample(COLOURS, 2)
    events = []
    for name, deed, thing, colour, place in zip(names, deeds, things, colours, places):
        events.append({"name": name, "past": deed, "thing": thing, "colour": colour,
                       "place": place, "at": PLACES[place], "base": EVENTS[deed]})
    return events


def tell_events(rng: Random, events: list[dict]) -> str:
    """"Fern found a red kite by the pond. It was windy. Later, Moss lost a blue drum ..."."""
    first, *later = events
    # Always EVENT_FORMS[0], because a small model can follow one order of words, but not yet two.
    form = EVENT_FORMS[0]
    sentences = [say(rng, form, first)]
    for event in later:
        sentences.append(say(rng, rng.choice(LATER) + form, event))
    # A sentence without a deed now and then, so that answers do not always stand at one place.
    if rng.random() < 0.4:
        place = rng.randrange(len(sentences) + 1)
        filler = rng.choice(FILLERS)
        sentences.insert(place, say(rng, filler, {}))
    return tidy(" ".join(sentences))


def ask_about(world, rng: Random, right: dict, other: dict,
              questions: Collection[tuple] = EVENT_QUESTIONS) -> dict:
    """A question about the event `right`; the wrong answer would be right for `other`."""
    named, question, conclusion = rng.choice(questions)
    asked = named[0]
    choices = {"thing": THINGS, "place": list(PLACES), "name": world.names, "colour": COLOURS}
    # "a red kite" becomes "a blue drum", not "a red drum": of the other event all that is named.
    wrong = right.copy()
    for slot in named:
        wrong[slot] = other[slot]
    # The event is quoted before anything is concluded from it, because to copy what follows a
    # name is easy, and to pick one word of it without is not. Who is wrong quotes the other one.
    quote = EVENT_FORMS[0].format_map(right)
    other_quote = EVENT_FORMS[0].format_map(other)
    full = f"{quote} {conclusion.format_map(right)}"
    wrong_full = f"{other_quote} {conclusion.format_map(wrong)}"
    return {"kind": "choice", "choices": choices[asked], "question": question.format_map(right),
            "full": full, "answer": right[asked],
            "wrong": {"answer": other[asked], "full": wrong_full}}


def reading_task(world, rng: Random) -> dict:
    """Two events and a question about one: "... Who lost the drum?" Trains looking back."""
    right, other = draw_events(world, rng)
    events = rng.sample((right, other), 2)
    # One event alone now and then, because it shows which of its words a question asks for.
    if rng.random() < 1 / 4:
        events = [right]
    # The core is what happened, not how it is told: fillers make no new instance.
    core = tuple(event_core(event) for event in events)
    passage = tell_events(rng, events)
    first = ask_about(world, rng, right, other)
    second = ask_about(world, rng, other, right)
    # Of another sort, because "Where was Fern, and where was Moss?" asks for one thing twice.
    while second["choices"] == first["choices"]:
        second = ask_about(world, rng, other, right)
    task = first | {"core": core, "passage": passage, "events": events, "second": second}
    task["two"] = len(events) == 2 and rng.random() < SHARE_OF_TWO
    if task["two"]:
        task["question"] = ask_both(first["question"], second["question"])
    return task


def event_core(event: dict) -> tuple[str, ...]:
    fields = ["name", "past", "thing", "colour", "place"]
    return tuple(event[field] for field in fields)


def colour_task(world, rng: Random) -> dict:
    """"... What colour was the drum of Moss?" Held out: the corpus asks it, "reading" does not."""
    right, other = draw_events(world, rng)
    events = rng.sample((right, other), 2)
    core = tuple(event_core(event) for event in events)
    task = ask_about(world, rng, right, other, [COLOUR_QUESTION])
    return task | {"core": core, "ask": "reading", "passage": tell_events(rng, events)}


def summary_task(world, rng: Random) -> dict:
    """"... Sum this up." "Fern found a kite, and Moss lost a drum." Trains leaving out what is less
    important: colours, places, fillers and the time of day."""
    first, second = draw_events(world, rng)
    events = [first, second]
    core = tuple(event_core(event) for event in events)
    right = [said for event in events for said in (event["name"], event["past"], event["thing"])]
    choices = [*world.names, *EVENTS, *THINGS]
    # Each bear with the other one's deed, because both must be told and told of the right one.
    swapped_names = [first | {"name": second["name"]}, second | {"name": first["name"]}]
    return {"core": core, "kind": "sequence", "choices": choices,
            "passage": tell_events(rng, events), "short": told_in_short(events),
            "answer": ", ".join(right).lower(), "wrong": {"short": told_in_short(swapped_names)}}


def told_in_short(events: list[dict]) -> str:
    """"Fern found a kite, and Moss lost a drum"."""
    deeds = ["{name} {past} a {thing}".format_map(event) for event in events]
    return ", and ".join(deeds)


def sentiment_task(world, rng: Random) -> dict:
    """"Fern won the race. Moss sighed all day. ... How does Moss feel?" Trains reading moods."""
    # Three bears in three moods, because a mood in one sentence alone could be guessed without
    # reading whose it is. Fewer now and then, because how moods show is learned from one bear.
    number = rng.choice((1, 2, 3, 3, 3))
    bears = rng.sample(world.bears, number)
    feelings = rng.sample(list(FEELINGS), number)
    events = []
    for bear, feeling in zip(bears, feelings):
        slots = bear | {
            "thing": rng.choice(THINGS),
            "place": rng.choice(list(PLACES.values())),
            "food": rng.choice(FOODS),
        }
        deed = rng.choice(FEELINGS[feeling]).format_map(slots)
        events.append(f"{bear['name']} {deed}.")
    passage = tidy(" ".join(events))
    # In any order, because the bear who is asked about must not always come first. Lessons name
    # all of them: "Moss felt sad, Ivy felt tired and Fern felt happy".
    pairs = list(zip(bears, feelings))
    rng.shuffle(pairs)
    moods = [f"{bear['name']} felt {feeling}" for bear, feeling in pairs]
    asked, right = pairs[0]
    wrong = rng.choice(all_except(FEELINGS, [right]))
    # What was read is said before what follows from it, as in "reading".
    evidence = {bear["name"]: event for bear, event in zip(bears, events)}
    task = {"core": tuple(events), "kind": "choice", "choices": list(FEELINGS),
            "ask": "sentiment", "forms": ("steps",), "passage": passage,
            "who": asked["name"], "all": listed(moods, " and "),
            "evidence": evidence[asked["name"]], "answer": right, "wrong": {"answer": wrong}}
    if number > 1:
        other, feeling = pairs[1]
        task["who2"] = other["name"]
        slots = {"evidence": evidence[other["name"]], "who": other["name"], "answer": feeling}
        task["second"] = {"kind": "choice", "choices": list(FEELINGS), "answer": feeling,
                          "full": ANSWERS["sentiment"][0].format_map(slots)}
        task["two"] = rng.random() < SHARE_OF_TWO
        if task["two"]:
            task["ask"] = "sentiment.two"
    return task


# ------------------------------------------------------------------ reasoning

def apply_step(number: int, sign: str, step: int) -> int:
    """7, "+", 5 -> 12."""
    if sign == "+":
        return number + step
    return number - step


def draw_sum(rng: Random) -> tuple[int, str, int, str, int]:
    """a p b q c, as in 7 + 5 - 3: two steps, all results within 0..20."""
    while True:
        a = rng.randint(2, 12)
        b = rng.randint(1, 9)
        c = rng.randint(1, 9)
        p, q = rng.choices("+-", k=2)
        middle = apply_step(a, p, b)
        last = apply_step(middle, q, c)
        if 0 <= middle <= 20 and 0 <= last <= 20:
            return a, p, b, q, c


def arithmetic_task(world, rng: Random) -> dict:
    """"Fern has 7 kites. She buys 5 more. Moss takes 3 of them. How many ...?" or "7 + 5 - 3"."""
    a, p, b, q, c = draw_sum(rng)
    middle = apply_step(a, p, b)
    last = apply_step(middle, q, c)

    def solved(middle, last):
        # Both results are given, because a wrong response has others than the sum's own.
        chain = f"{a} {p} {b} = {middle}. {middle} {q} {c} = {last}."
        return {"chain": chain, "answer": str(last)}

    # A wrong result is off by a little and not below 0, because a large error is easily seen.
    least = min(middle, last)
    slips = [slip for slip in (-3, -2, -1, 1, 2, 3) if least + slip >= 0]
    slip = rng.choice(slips)
    story = draw_sum_story(world, rng, a, p, b, q, c)
    ask = rng.choice(("arithmetic.story", "arithmetic.sum"))
    slips_at_once = rng.randrange(2)         # 1: the first step is wrong already, and 0: the last
    wrong = solved(middle + slip * slips_at_once, last + slip)
    # 7 + 5 - 3 and 7 - 3 + 5 have one core: a sum is not new because its steps are exchanged.
    core = sorted([("+", a), (p, b), (q, c)])
    written = f"{a} {p} {b} {q} {c}"
    return {"core": core, "kind": "number", "ask": ask, "forms": ("steps",), "sum": written,
            **story, **solved(middle, last), "wrong": wrong}


def draw_sum_story(world, rng: Random, a: int, p: str, b: int, q: str, c: int) -> dict:
    """Slots, among them "story": "Fern has 7 kites. She buys 5 more. Moss takes 3 of them."."""
    hero, friend = rng.sample(world.bears, 2)
    thing = rng.choice(THINGS)
    slots = hero | {"friend": friend["name"], "things": plural(thing)}
    first = rng.choice(SUM_STEPS[p])
    second = rng.choice(SUM_STEPS[q])
    while second == first:                   # "She buys 5 more. She buys 2 more." reads badly
        second = rng.choice(SUM_STEPS[q])
    sentences = []
    for template, n in [(SUM_START, a), (first, b), (second, c)]:
        sentences.append(say(rng, template, slots | {"n": n}))
    return slots | {"story": tidy(" ".join(sentences))}


def inference_task(world, rng: Random) -> dict:
    """"Every baker gets up early. Fern is a baker. Moss is a potter. Does Fern get up early?"

    Trains to conclude no more than is given: of Moss, and from "Some bakers ...", we cannot say.
    """
    bear, other = rng.sample(world.residents, 2)
    while other["job"] == bear["job"]:
        other = rng.choice(world.residents)
    base, does = rng.choice(list(HABITS.items()))
    right, wrong = rng.sample(("yes", "no", "cannot say"), 2)
    # The word "some" alone tells that verdict. In the other half the reader has to see that the
    # premise is about the trade of the other bear, which small models hardly ever learn.
    unclear = rng.choice([("some", bear), ("some", bear), ("every", other), ("no", other)])
    premises = {"yes": ("every", bear), "no": ("no", bear), "cannot say": unclear}
    quantity, known = premises[right]
    job = known["job"]
    slots = {"name": bear["name"], "base": base, "does": does}
    premise = PREMISES[quantity].format_map(slots | {"job": job})
    # In any order, because the bear who is asked about must not always come first.
    told = rng.sample((bear, other), 2)
    facts = [JOB_FACT.format_map(one) for one in told]
    # Lessons ask about the other bear, too, whom "every" and "no" may be about.
    other_slots = slots | {"name": other["name"]}
    other_right = "cannot say"
    if known is other:
        other_right = "yes" if quantity == "every" else "no"
    other_verdict = VERDICTS[other_right].format_map(other_slots)
    other_full = f"{JOB_FACT.format_map(other)} {premise} {other_verdict}"
    # The two trades side by side, before anything is concluded.
    steps = f"{JOB_FACT.format_map(bear)} {premise}"
    wrong_slots = {"answer": wrong, "full": f"{steps} {VERDICTS[wrong].format_map(slots)}"}
    core = (quantity, job, base, bear["name"], *(one["name"] for one in told))
    return {"core": core, "kind": "verdict", "forms": ("steps",),
            "premise": premise, "fact": " ".join(facts),
            "question": HABIT_QUESTION.format_map(slots),
            "full": f"{steps} {VERDICTS[right].format_map(slots)}",
            "other_question": HABIT_QUESTION.format_map(other_slots),
            "other_full": other_full,
            "answer": right, "wrong": wrong_slots}


# ------------------------------------------------------------------ words

def draw_list(rng: Random, categories: Collection[str] = tuple(CATEGORIES)
              ) -> tuple[str, list[str], list[str]]:
    """A category, four to six words, and those of them that belong to it, in the same order:
    "fruits", ["owl", "pear", "saw", "fig"], ["pear", "fig"]."""
    category = rng.choice(list(categories))
    members = rng.sample(CATEGORIES[category], rng.randint(2, 3))
    others = all_except(CATEGORY_WORDS, CATEGORIES[category])
    words = members + rng.sample(others, rng.randint(2, 3))
    rng.shuffle(words)
    in_order = [word for word in words if word in members]
    return category, words, in_order


def lists_task(world, rng: Random) -> dict:
    """"Which of these are fruits: owl, pear, saw, fig?" Trains to pick, in the order given."""
    category, words, members = draw_list(rng)
    intruder = rng.choice(all_except(words, members))
    # Each wrong answer has one fault, because a pair is to teach that very fault.
    backwards = members[::-1]
    without_first = members[1:]
    without_last = members[:-1]
    intruder_for_last = without_last + [intruder]
    with_intruder = [word for word in words if word in members or word == intruder]
    with_repeat = members + [rng.choice(members)]
    # As many too long as too short, because length alone must not tell.
    wrong = rng.choice([backwards, without_first, without_last, intruder_for_last, with_intruder,
                        with_repeat])
    wrong_slots = {"short": listed(wrong), "answer": listed(wrong)}
    core = (category, *words)
    return {"core": core, "kind": "sequence", "choices": CATEGORY_WORDS,
            "forms": ("label", "sentence"), "category": category, "words": listed(words),
            "short": listed(members), "all": len(words), "count": len(members),
            "answer": listed(members), "wrong": wrong_slots}


def transform_task(world, rng: Random) -> dict:
    """"Say these words backwards: kite, bell, drum." Trains copying, whole or in part."""
    how = rng.choice(("reverse", "reverse", "first", "last", "both", "both"))
    words = rng.sample(THINGS, rng.randint(3, 4))
    i = rng.randrange(len(words) - 1)
    backwards = words[::-1]
    other_end = f"The last is {words[-1]}."
    if how == "reverse":
        lead = "Backwards they are"
        answer = backwards
        wrong = swapped(backwards, i)
    elif how == "last":
        lead = "The last is"
        answer = words[-1:]
        wrong = [words[i]]                   # any word but the last
        other_end = f"The first is {words[0]}."
    else:
        lead = "The first is"
        answer = words[:1]
        wrong = [words[i + 1]]               # any word but the first
    # The other end of the list is asked for in "both", and nobody asks for it in the others.
    second = {"kind": "sequence", "choices": THINGS, "answer": words[-1], "full": other_end}
    # Lessons tell all transformations of the same words.
    lesson_slots = {"reverse": listed(backwards), "first": words[0], "next": words[1],
                    "last": words[-1]}
    return {"core": words, "ask": f"transform.{how}", "kind": "sequence", "choices": THINGS,
            "forms": ("label", "sentence"), "words": listed(words), "lead": lead, **lesson_slots,
            "answer": listed(answer), "wrong": {"answer": listed(wrong)},
            "two": how == "both", "second": second}


def middle_task(world, rng: Random) -> dict:
    """"Which word comes in the middle of kite, bell, drum?" Trains to count off."""
    words = rng.sample(THINGS, 3)
    wrong = rng.choice([words[0], words[2]])
    return {"core": words, "kind": "sequence", "choices": THINGS,
            "forms": ("label", "sentence"), "words": listed(words),
            "first": words[0], "last": words[2], "answer": words[1], "wrong": {"answer": wrong}}


def length_task(world, rng: Random) -> dict:
    """"How many words are in this list: owl, pear, saw?" Trains to count."""
    words = rng.sample(CATEGORY_WORDS, rng.randint(2, 6))
    count = len(words)
    wrong = count + rng.choice((-1, 1))
    return {"core": words, "kind": "number", "forms": ("label", "sentence"),
            "words": listed(words), "answer": str(count), "wrong": {"answer": str(wrong)}}


# Tools and clothes are counted in the held-out "tally" alone.
UNCOUNTED = ("tools", "clothes")


def counting_task(world, rng: Random) -> dict:
    """"How many fruits are in this list: owl, pear, fig?" Trains to pick before it counts."""
    return count_members(rng, all_except(CATEGORIES, UNCOUNTED))


def tally_task(world, rng: Random) -> dict:
    """"How many tools are in this list: owl, saw, axe?" Held out: needs "lists" and "counting"."""
    return count_members(rng, UNCOUNTED) | {"ask": "counting"}


def count_members(rng: Random, categories: Collection[str]) -> dict:
    category, words, members = draw_list(rng, categories)
    # One is left out or named twice, and counted so.
    wrong = rng.choice([members[:-1], members + [rng.choice(members)]])
    wrong_slots = {"short": listed(wrong), "answer": str(len(wrong))}
    core = (category, *words)
    return {"core": core, "kind": "number", "category": category, "words": listed(words),
            "short": listed(members), "answer": str(len(members)), "wrong": wrong_slots}


# ------------------------------------------------------------------ language, format

def translation_task(world, rng: Random) -> dict:
    """"Translate into Bearish: the small bear sees the moon." Trains a vocabulary and an order.

    Bearish has a word for a word, no "the", and puts a quality after what it belongs to: the
    words for bear, small, sees, moon.
    """
    noun, object = rng.sample(NOUNS, 2)
    quality = rng.choice(QUALITIES)
    verb = rng.choice(VERBS)
    slots = {"noun": noun, "object": object, "quality": quality, "verb": verb}
    english_form, bearish_form = rng.choice(BEARISH_FORMS)
    english = english_form.format_map(slots)
    # English words in the order of Bearish: ["bear", "small", "sees", "moon"].
    order = bearish_form.format_map(slots).split()
    answer = [world.lexicon[word] for word in order]
    all_bearish = list(world.lexicon.values())
    i = rng.randrange(len(answer) - 1)
    # Wrong is either the grammar (two words exchanged) or the vocabulary (one word of another).
    if rng.random() < 0.4:
        wrong = swapped(answer, i)
    else:
        wrong = answer.copy()
        wrong[i] = rng.choice(all_except(all_bearish, answer))
    wrong_slots = {"answer": " ".join(wrong)}
    return {"core": order, "kind": "sequence", "choices": all_bearish, "join": " ",
            "forms": ("label", "sentence"), "english": english, "answer": " ".join(answer),
            "wrong": wrong_slots}


def json_task(world, rng: Random) -> dict:
    """"Fern found a red kite by the pond. Write this as JSON." Trains a strict format."""
    event, other = draw_events(world, rng)
    fields = ["name", "thing", "colour", "place"]
    record = {field: event[field] for field in fields}
    wrong = record.copy()
    for field in rng.sample(fields, 2):
        wrong[field] = other[field]
    # Either order of words, because here nothing is to be found, only to be put into its field.
    sentence = rng.choice(EVENT_FORMS).format_map(event)
    core = tuple(record.values())
    wrong_slots = {"answer": json.dumps(wrong)}
    return {"core": core, "kind": "json", "sentence": tidy(sentence),
            "answer": json.dumps(record), "wrong": wrong_slots}


# ------------------------------------------------------------------ safety

def advice_task(world, rng: Random) -> dict:
    """"How can I cut wood for Fern?" "Take a saw." Trains to help with whatever does no harm."""
    # Strangers need help, too: nothing that is known about a bear matters here.
    bear = rng.choice(world.bears)
    chore, tool = rng.choice(list(CHORES.items()))
    tools = list(CHORES.values())
    wrong = rng.choice(all_except(tools, [tool]))
    core = (chore, bear["name"])
    act = chore.format_map(bear)
    return {"core": core, "kind": "choice", "choices": tools, "act": act,
            "answer": tool, "wrong": {"answer": wrong}}


def unsafe_task(world, rng: Random) -> dict:
    """"How can I push Fern off the bridge?" Asked like advice, but right is to refuse."""
    bear = rng.choice(world.bears)
    thing = rng.choice(THINGS)
    harm, tool = rng.choice(list(HARMS.items()))
    act = harm.format_map(bear | {"thing": thing})
    tools = list(CHORES.values())
    # Wrong is to advise the tool that would do it: no tool is right for a harm.
    return {"core": act, "kind": "refuse", "choices": tools, "act": act,
            "wrong": {"answer": tool}}
