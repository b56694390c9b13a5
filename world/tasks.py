"""
The tasks: which families there are, what a task has, and how one becomes a prompt.

A family is a function (world, rng) -> task that draws one instance as a dict. `world` is a World
(world.py); its bears, residents, strangers, names and lexicon are there to draw from. Most stand in
families.py, those of conversations in talk.py. A task has

    core       the numbers, words or passage that make the instance; a stable hash of it decides
               the split, "train" or "heldout"; None: in both, only phrasings are held out
    kind       how the judge reads an answer: "choice", "sequence", "number", "verdict", "json"
               (parse_answer in judge.py), or "story", "refuse", "admit", which have no answer
    choices    the words that could be an answer (choice, sequence), or that may not stand beside
               a refusal or an admission
    answer     the right one, spelled as parse_answer returns it
    wrong      the slots that a plausible wrong response has in place of the task's own
    ask        the entry of PROMPTS, where this is not the family's name: "transform.first"
    chain      the written-out steps, where there are any: "7 + 5 = 12. 12 - 3 = 9."
    join       what stands between the words of a sequence, where this is not ", "
    second     another thing that could be asked for: {"kind", "choices", "answer", "full"}
    two        whether it is asked for: the prompt has two parts
    forms      of FORMS: what the prompt may say about the form of the answer
    before     the turns before the prompt, where it is not the first of a conversation

and everything else fills the slots of the family's PROMPTS and ANSWERS (text.py).

TO ADD A FAMILY that is trained on like all others, write three things:

1. in text.py how it is asked, into the table PROMPTS, and how it is answered, into ANSWERS:

        "second": "Which word is second in {words}? / What is the second word here: {words}? /"
                  " Tell me the second word of {words}. / Name the second word here: {words}. /"
                  " Read {words}. Which is second? / Say only the second word of {words}.",

        "second": "The second is {answer}.",

   The last two prompts are held out from training; the last answer is a whole sentence;

2. at the end of families.py a function that draws an instance:

        def second_task(world, rng: Random) -> dict:
            words = rng.sample(THINGS, 3)
            wrong = rng.choice([words[0], words[2]])
            return {"core": words, "kind": "choice", "choices": THINGS, "words": listed(words),
                    "answer": words[1], "wrong": {"answer": wrong}}

3. in the table FAMILIES its cluster and its function:

            "second": ("words", families.second_task),

TRAINED_FAMILIES takes every family of that table, so that World.examples, and with it train_sft.py,
draws the new one as often as any other. Its demonstrations are careful, unless MAIN_HANDS
(world.py) names another hand. TO HOLD IT OUT of training instead, add its name to HELDOUT_FAMILIES:

        HELDOUT_FAMILIES = ("tally", "colour", "second")

Then evaluate.py alone asks for it (its `unseen_families`). A held-out family shares its cluster,
its wording and the form of its answers with trained ones, because it is to show whether skills
carry over to a new task; a wording that nobody was ever trained to answer would show nothing.
`python -m world.world` shows an example of every family; tests/test_world.py examines them all.
"""
import zlib
from collections import ChainMap
from random import Random

from world import families, talk
from world.text import ANSWERS, FORMS, PROMPTS, say, tidy, typed_quickly, whole_sentences

# ------------------------------------------------------------------ all families

FAMILIES = {                                                     # name: (cluster, function)
    "story": ("writing", families.story_task),
    "facts": ("knowledge", families.facts_task),
    "unanswerable": ("knowledge", families.unanswerable_task),
    "reading": ("reading", families.reading_task),
    "colour": ("reading", families.colour_task),
    "sentiment": ("reading", families.sentiment_task),
    "arithmetic": ("reasoning", families.arithmetic_task),
    "inference": ("reasoning", families.inference_task),
    "lists": ("words", families.lists_task),
    "transform": ("words", families.transform_task),
    "middle": ("words", families.middle_task),
    "length": ("words", families.length_task),
    "counting": ("words", families.counting_task),
    "tally": ("words", families.tally_task),
    "translation": ("language", families.translation_task),
    "json": ("format", families.json_task),
    "advice": ("safety", families.advice_task),
    "unsafe": ("safety", families.unsafe_task),
    "smalltalk": ("talk", talk.smalltalk_task),
    "followup": ("talk", talk.followup_task),
}
HELDOUT_FAMILIES = ("tally", "colour")              # their clusters are trained, they are not
TRAINED_FAMILIES = tuple(families.all_except(FAMILIES, HELDOUT_FAMILIES))
# In no mixture and no exam: drawn where they are asked for by name alone (train_sft.py --families).
APART_FAMILIES = {"summary": ("reading", families.summary_task)}
KNOWN_FAMILIES = ChainMap(APART_FAMILIES, FAMILIES)             # a view of both, not a copy


def is_heldout(core: object) -> bool:
    """True for the tenth of all cores that is never trained on; the same on every machine."""
    # crc32, because Python's own hash of a string changes from process to process.
    return zlib.crc32(repr(core).encode()) % 997 < 100


def check_split(split: str) -> None:
    """Raises ValueError for any other name."""
    if split not in ("train", "heldout"):
        raise ValueError(f'split is {split!r}; it must be "train" or "heldout"')


def draw_task(world, rng: Random, family: str, split: str) -> dict:
    """Draw a task until its core belongs to the split; a core of None belongs to both.

    The task's "ask" and "form" are set in any case; "answers" holds the templates of its answers.
    Raises ValueError for an unknown family or split, and for a family with too few cores.
    """
    check_split(split)
    if family not in KNOWN_FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(KNOWN_FAMILIES)}")
    _, draw = KNOWN_FAMILIES[family]
    wants_heldout = split == "heldout"
    for _ in range(1000):
        task = draw(world, rng)
        core = task["core"]
        if core is None or is_heldout(core) == wants_heldout:
            ask = task.setdefault("ask", family)
            answered_as = ask.split(".")[0]          # "transform.first" is answered as "transform"
            return task | {"answers": ANSWERS[answered_as], "form": draw_form(rng, task)}
    raise ValueError(f"family {family!r}: 1,000 draws and none for split {split!r}; its cores "
                     "are too few")


def draw_form(rng: Random, task: dict) -> str | None:
    """The form that the prompt asks for: of half of the tasks that allow one and ask one thing."""
    if "forms" not in task or task.get("two") or rng.random() < 0.5:
        return None
    return rng.choice(task["forms"])


SHARE_OF_QUICK = 0.1                                # of the prompts


def write_prompt(rng: Random, task: dict, template: str) -> str | list[dict]:
    """The prompt's text, or the turns of the conversation that it ends."""
    text = tidy(template.format_map(task))
    if task["form"]:
        text += " " + rng.choice(FORMS[task["form"]])
    # As many people type, because an assistant should not need a capital to say hello.
    if rng.random() < SHARE_OF_QUICK:
        text = typed_quickly(text)
    if "before" in task:
        return [*task["before"], {"role": "user", "content": text}]
    return text


def prompt_templates(task: dict, split: str, phrasings: str | None) -> list[str]:
    """The prompts of a task: "train" phrasings, or the two that are "heldout".

    None: a computed task is new by its core, and is asked in training phrasings, so that one thing
    is new at a time. A fact has no core, and is asked in held-out phrasings in the held-out split.
    """
    if phrasings is None:
        is_fact = task["core"] is None
        phrasings = split if is_fact else "train"
    prompts = PROMPTS[task["ask"]]
    by_phrasing = {"train": prompts[:-2], "heldout": prompts[-2:]}
    return by_phrasing[phrasings]


def judge_key(rng: Random, task: dict) -> dict:
    """All that the judge has to know beside the answer: kind, choices, ..., and how many sentences
    and words a full answer has."""
    key = {}
    for name in ("kind", "choices", "join", "name", "thing"):
        if name in task:
            key[name] = task[name]
    if task["form"]:
        key["form"] = task["form"]
    longest = 12                                     # words; of refusals and admissions
    sentences = 1
    if task["kind"] not in ("refuse", "admit"):
        answers = [say(rng, template, task) for template in task["answers"]]
        longest = max(len(answer.split()) for answer in answers)
        sentences = max(len(whole_sentences(answer)) for answer in answers)
        if task.get("two"):
            second = task["second"]
            key["second"] = {name: second[name] for name in ("kind", "choices", "answer")}
            key["second"]["sentences"] = len(whole_sentences(second["full"]))
            longest += len(second["full"].split())
    # A story may have any number of sentences.
    if task["kind"] != "story":
        key["sentences"] = sentences                 # of its first part, where there are two
    key["length"] = longest + 8                      # words; room for two courtesies
    return key
