"""
A rule in the system turn binds every answer of a conversation.

The sentences of the documents: the template begins with a system turn (001 section 3.4), and
instruction tuning brings "format control: produce JSON, markdown, bullet points on demand" (3.8).
The SFT model of a seed, which has never seen a system turn, is fine-tuned on conversations of three
short tasks of the world. In half of them a system turn states one of six rules of format and tone
(RULES), in one of its training wordings, and each answer is the world's demonstration rewritten by
the rule. The other half has no system turn and plain answers, so that a rule must be read and not
guessed. Then both models answer unseen tasks, greedily, their own earlier answers in the context:

  obeyed   share of the answers that keep the rule; without a system turn, that keep any
  right    share whose content, without the dress of any rule, the world's judge finds right

An answer that does not end, or for which the context has no room, ends its conversation: it and
what would have followed count as neither.

What came out (three seeds): before, no rule is obeyed; after, all are in all three turns, in
wordings of the training 100 %, in others 93 % (in one seed 83: the servant's and the bullets' half
of the time), and none where none is stated. Content suffers in capitals alone, of which 3 in 10
answers are right: a word in capitals has other tokens, which a small model copies badly.

    python experiments/system_prompts.py            # results/system_prompts.png and .md
    python experiments/system_prompts.py --quick    # one seed, 120 steps, a tenth of the tasks
"""
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import evaluate
import readers
import sample
import train_sft
from experiments.base import (
    base_models,
    cell,
    fast_dtype,
    kept,
    run,
    save,
    seed_folder,
    show_table,
    write_rows,
)
from plumbing.device import pick_device
from plumbing.folders import load_model, read_record
from plumbing.options import command_line
from world.judge import parse_answer

# Families and hands whose answers are short, because three of them, in capitals, which take a token
# a letter, are to fit into 256 tokens.
FAMILIES = ("facts", "lists", "transform", "middle", "length", "translation", "arithmetic")
HANDS = ("terse", "careful")
TURNS = 3
LONGEST = 80                          # tokens of an answer
N_CONVERSATIONS = 6000
SFT = {"optimizer": "muon", "lr": 4e-3, "steps": 400, "batch_size": 16, "eval_every": 400,
       "n_examples": N_CONVERSATIONS}


# ---------------------------------------------------------------------- the rules

class Rule(NamedTuple):
    wordings: tuple[str, ...]         # that are trained on
    heldout: tuple[str, ...]          # that are not
    rewrite: Callable[[str], str]     # an answer -> the same as the rule has it
    obeys: Callable[[str], bool]
    plain: Callable[[str], str]       # an answer -> what it says; one that does not obey: itself


BETWEEN_SENTENCES = re.compile(r"(?<=[.!?]) ")
HEADING = "# Answer\n"
GREETING = "Hello! "
OFFER = " At your service!"


def in_sentence_case(text: str) -> str:
    """"A FROG. BYE." -> "A frog. Bye.". The judge reads names in small letters as well."""
    if not text.isupper():
        return text
    return " ".join(part.capitalize() for part in BETWEEN_SENTENCES.split(text))


def as_json(text: str) -> str:
    return json.dumps({"answer": text})


def read_json(text: str) -> str | None:
    """The answer in an object that is the whole text, None for any other text."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or list(found) != ["answer"]:
        return None
    return found["answer"] if isinstance(found["answer"], str) else None


def bulleted(text: str) -> str:
    """"A frog. Bye." -> "- A frog.\\n- Bye."."""
    return "- " + BETWEEN_SENTENCES.sub("\n- ", text)


def is_bulleted(text: str) -> bool:
    return all(line.startswith("- ") for line in text.split("\n"))


def without_bullets(text: str) -> str:
    if not is_bulleted(text):
        return text
    return " ".join(line.removeprefix("- ") for line in text.split("\n"))


RULES = {
    "capitals": Rule(
        ("Write all your answers in capitals.", "Answer in capital letters only.",
         "Use capital letters for every word.", "Please write everything in capitals.",
         "Capital letters only, in every answer.", "Every word you write must be in capitals."),
        ("From now on, reply in capital letters.", "All that you say should be in capitals."),
        str.upper, str.isupper, in_sentence_case),
    "greeting": Rule(
        ("Begin every answer with a greeting.", "Start each answer with a greeting.",
         "Always greet the user before you answer.", "First a greeting, then the answer.",
         "Each of your answers begins with a greeting.", "Greet me first in every answer."),
        ("Please put a greeting before each answer.", "Do not answer before you have greeted me."),
        lambda text: GREETING + text, lambda text: text.startswith(GREETING),
        lambda text: text.removeprefix(GREETING)),
    "servant": Rule(
        ("Be humble: end every answer by offering your service.", "Talk as a humble servant would.",
         "End each answer with an offer of service.", "Your tone is that of a humble servant.",
         "Speak like a servant and offer your service at the end.",
         "Always close by saying that you are at the user's service."),
        ("Answer humbly, as a servant does.", "Use the tone of a servant in all that you say."),
        lambda text: text + OFFER, lambda text: text.endswith(OFFER),
        lambda text: text.removesuffix(OFFER)),
    "json": Rule(
        ("Output only JSON.", "Answer in JSON only.", "Every answer must be a JSON object.",
         "Give all your answers as JSON.", "Reply with JSON and nothing else.",
         "Your output is read by a program: write JSON."),
        ("Please format each answer as JSON.", "Nothing but JSON objects, please."),
        as_json, lambda text: read_json(text) is not None, lambda text: read_json(text) or text),
    "bullets": Rule(
        ("Use bullet points.", "Answer in bullet points.", "Each sentence is a bullet point.",
         "Write every answer as a list of bullets.", "Format your answers as bullet points.",
         "Put a bullet before every sentence."),
        ("Bullet points only, please.", "I want to see a bullet in front of each sentence."),
        bulleted, is_bulleted, without_bullets),
    "markdown": Rule(
        ("Use markdown with a heading.", "Format every answer in markdown.",
         "Write markdown: a heading, then the answer.", "Your answers are markdown documents.",
         "Put a markdown heading above each answer.", "Answer in markdown only."),
        ("Please reply in markdown.", "Give each answer a markdown heading."),
        lambda text: HEADING + text, lambda text: text.startswith("# ") and "\n" in text,
        lambda text: text.removeprefix(HEADING)),
}
WORDINGS = ("training", "held-out")
NONE = "no system turn"
TITLES = {"obeyed": "that obey", "right": "that are right"}


def undressed(text: str) -> str:
    """What an answer says, whichever rule it keeps: to keep the wrong one is no wrong answer."""
    for rule in RULES.values():
        text = rule.plain(text)
    return text


NO_RULE = Rule((), (), str, lambda text: any(rule.obeys(text) for rule in RULES.values()), str)


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/system_prompts"   # folder for the models and their data
    figure: str = "results/system_prompts.png"    # the picture; the table beside it, as .md
    quick: bool = False               # one seed, 120 steps, a tenth of the tasks, marked


# ---------------------------------------------------------------------- conversations

def draw_tasks(seed: int, n: int, split: str) -> list[list[dict]]:
    """n times TURNS independent tasks of the world, each a single question in one turn, with a
    demonstration."""
    found = []
    part = 0
    while len(found) < TURNS * n:
        drawn = readers.world_named(f"world:{seed}").examples(TURNS * n, split, part, FAMILIES)
        found += [task for task in drawn if isinstance(task["prompt"], str)
                  and task["hand"] in HANDS and not {"form", "second"} & task["key"].keys()]
        part += 1
    return [found[i:i + TURNS] for i in range(0, TURNS * n, TURNS)]


def conversation(tasks: list[dict], rule: Rule, wording: str) -> list[dict]:
    """The tasks under a system turn ("": without), answered by their demonstrations as the rule
    has them."""
    turns = system_turn(wording)
    for task in tasks:
        turns.append({"role": "user", "content": task["prompt"]})
        turns.append({"role": "assistant", "content": rule.rewrite(task["response"])})
    return turns


def system_turn(wording: str) -> list[dict]:
    return [{"role": "system", "content": wording}] if wording else []


def write_data(seed: int, tokenizer, context_length: int, file: Path) -> tuple[Path, int]:
    """The file to train on, and how many conversations were too long for the context."""
    rng = np.random.default_rng(seed)
    rows = []
    n_dropped = 0
    for i, tasks in enumerate(draw_tasks(seed, N_CONVERSATIONS, "train")):
        name = NONE
        rule = NO_RULE
        wording = ""
        if i % 2:
            name = list(RULES)[rng.integers(len(RULES))]
            rule = RULES[name]
            wording = rule.wordings[rng.integers(len(rule.wordings))]
        turns = conversation(tasks, rule, wording)
        if len(tokenizer.conversation(turns)) > context_length:
            n_dropped += 1
            continue
        rows.append({"messages": turns, "task": name, "chain": ""})
    return write_rows(file, rows), n_dropped


# ---------------------------------------------------------------------- the exam

def fitting(tasks: list[dict], tokenizer, context_length: int) -> bool:
    """Whether the demonstrations, even in capitals, leave room for a last answer."""
    rule = RULES["capitals"]
    *before, _ = conversation(tasks, rule, max(rule.wordings, key=len))
    return len(tokenizer.prompt(before)) + LONGEST <= context_length


def conditions() -> dict[str, tuple[Rule, tuple[str, ...]]]:
    """{name: (the rule, the wordings that take turns)}."""
    found = {NONE: (NO_RULE, ("",))}
    for name, rule in RULES.items():
        found[f"{name}, training"] = rule, rule.wordings
        found[f"{name}, held-out"] = rule, rule.heldout
    return found


def answers(model, tokenizer, conversations: list[list[dict]]) -> list[str]:
    """A greedy answer to each; "" where it did not end, or where there is no room for it."""
    texts = [""] * len(conversations)
    prompts = [tokenizer.prompt(turns) for turns in conversations]
    asked = [i for i, ids in enumerate(prompts)
             if len(ids) + LONGEST <= model.config.context_length]
    if asked:
        found = sample.generate(model, [prompts[i] for i in asked], LONGEST, (tokenizer.end,))
        for i, text in zip(asked, evaluate.complete_texts(tokenizer, found)):
            texts[i] = text
    return texts


def examine(folder: Path, seed: int, n: int) -> dict[str, dict[str, list[float]]]:
    """{"obeyed", "right"} -> {condition: [of each turn]}, over n unseen conversations."""
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype())
    drawn = draw_tasks(seed, 3 * n, "heldout")
    drawn = [tasks for tasks in drawn if fitting(tasks, tokenizer, model.config.context_length)]
    talks = []                                     # (condition, rule, tasks, turns so far)
    for name, (rule, wordings) in conditions().items():
        for i, tasks in enumerate(drawn[:n]):
            talks.append((name, rule, tasks, system_turn(wordings[i % len(wordings)])))
    counts = {figure: {name: [0.0] * TURNS for name in conditions()}
              for figure in ("obeyed", "right")}
    share = 1 / len(drawn[:n])
    for t in range(TURNS):
        for _, _, tasks, turns in talks:
            turns.append({"role": "user", "content": tasks[t]["prompt"]})
        texts = answers(model, tokenizer, [turns for *_, turns in talks])
        going_on = []
        for (name, rule, tasks, turns), text in zip(talks, texts):
            if not text:
                continue
            is_right = parse_answer(tasks[t], undressed(text)) == tasks[t]["answer"]
            counts["obeyed"][name][t] += share * rule.obeys(text)
            counts["right"][name][t] += share * is_right
            turns.append({"role": "assistant", "content": text})
            going_on.append((name, rule, tasks, turns))
        talks = going_on
    return counts


def examined(folder: Path, file: Path, seed: int, n: int) -> dict:
    """examine(), once for a model and these wordings."""
    wordings = {name: list(rule.wordings + rule.heldout) for name, rule in RULES.items()}
    of = {"model": read_record(folder)["sha256"], "n": n, "wordings": wordings}
    return kept(file, of, partial(examine, folder, seed, n))


# ---------------------------------------------------------------------- what is shown

def mean_of_rules(exam: dict, figure: str, wording: str) -> list[float]:
    """Of each turn, the mean over the rules in "training" or "held-out" wordings."""
    by_rule = [exam[figure][f"{name}, {wording}"] for name in RULES]
    return np.mean(by_rule, 0).tolist()


def summary(exams: list[dict], figure: str) -> dict[str, list[list[float]]]:
    """{condition: [seed][turn]}: the mean of the rules, in either kind of wordings, and NONE."""
    found = {f"all rules, {wording}": [mean_of_rules(exam, figure, wording) for exam in exams]
             for wording in WORDINGS}
    found[NONE] = [exam[figure][NONE] for exam in exams]
    return found


def draw(found: dict[str, list[dict]], file: Path, mark: str) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    turns = range(1, TURNS + 1)
    for axis, name in ((axes[0], "obeyed"), (axes[2], "right")):
        for model, line in (("tuned", "-"), ("sft", ":")):
            for color, (condition, values) in enumerate(summary(found[model], name).items()):
                label = f"{condition}{', SFT before' if model == 'sft' else ''}"
                axis.plot(turns, np.mean(values, 0), line, color=f"C{color}", label=label)
                axis.plot(turns, np.transpose(values), "o", color=f"C{color}", markersize=3)
        axis.set(title=f"share of answers {TITLES[name]}{mark}", xlabel="turn of the conversation",
                 xticks=turns, ylim=(-0.03, 1.03))
    axes[0].legend(fontsize=7)
    places = np.arange(len(RULES))
    for shift, wording in zip((-0.2, 0.2), WORDINGS):
        # (seeds, rules): the mean of the turns
        values = np.mean([[exam["obeyed"][f"{name}, {wording}"] for name in RULES]
                          for exam in found["tuned"]], 2)
        axes[1].bar(places + shift, values.mean(0), 0.4, alpha=0.5, label=f"{wording} wordings")
        axes[1].plot(places + shift, values.T, "ko", markersize=3)
    axes[1].set_xticks(places, list(RULES))
    axes[1].set(title=f"that obey, by rule{mark}", ylim=(-0.03, 1.03))
    axes[1].legend(fontsize=7)
    save(figure, file)


def table(found: dict[str, list[dict]], n_dropped: list[int], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    heads = [f"{name} {t}" for name in ("obeyed", "right") for t in range(1, TURNS + 1)]
    lines = [f"# A rule in the system turn binds every answer{mark}", "",
             f"`python experiments/system_prompts.py`, seeds {cfg.seeds}: shares of the answers in "
             "turns 1 to 3; the mean, and from the lowest to the highest. Of "
             f"{N_CONVERSATIONS:,} conversations to train on {cell(n_dropped, '.0f')} were too "
             "long for the context and left out.", "",
             f"| model | rule and wording | {' | '.join(heads)} |",
             "|---" * (len(heads) + 2) + "|"]

    def add(model: str, condition: str, obeyed: list[list[float]], right: list[list[float]]):
        cells = [cell(values, ".0%") for rows in (obeyed, right)
                 for values in np.transpose(rows).tolist()]
        lines.append(f"| {model} | {condition} | {' | '.join(cells)} |")

    for model, label in (("tuned", "fine-tuned"), ("sft", "SFT before")):
        right = summary(found[model], "right")
        for condition, obeyed in summary(found[model], "obeyed").items():
            add(label, condition, obeyed, right[condition])
    for name in conditions():
        if name != NONE:
            add("fine-tuned", name, *[[exam[figure][name] for exam in found["tuned"]]
                                      for figure in ("obeyed", "right")])
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    options = dict(SFT)
    n = 80
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        options["steps"] = 120         # fewer teach no rule
        n = 8
    found = {"sft": [], "tuned": []}
    n_dropped = []
    for seed in [int(seed) for seed in cfg.seeds.split(",")]:
        base = base_models(seed)
        out = seed_folder(cfg, seed)
        model, tokenizer = load_model(base / "sft")
        file, dropped = write_data(seed, tokenizer, model.config.context_length,
                                   out / "rules.jsonl")
        run(train_sft, init=str(base / "sft"), out=str(out / "tuned"), seed=seed, data=str(file),
            **options)
        n_dropped.append(dropped)
        found["sft"].append(examined(base / "sft", out / "sft_exam.json", seed, n))
        found["tuned"].append(examined(out / "tuned", out / "tuned_exam.json", seed, n))
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, n_dropped, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
