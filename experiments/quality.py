"""
Diversity, complexity, correctness, format: what a fine-tuning loses where each is damaged.

The formula of the documents (001 section 3.3.3): Quality(D) = f(Diversity, Complexity, Correctness,
Format Consistency). The base model of a seed learns 5,000 careful demonstrations of the world's
tasks, and as many with one dimension damaged, as many steps:

  clean             right, whole, in one format
  few prompts       diversity: 250 of the rows, each 20 times
  few tasks         diversity: 4 of the 18 task families
  simple            complexity: the shortest quarter of each family, no reasoning before the answer
  half wrong        correctness: every second answer is a wrong one
  half misshapen    format: every second answer in one of four wrappers, or without its end

data_quality.py measures the six sets, and the models are examined on unseen tasks: accuracy in
trained wordings, in wordings and families never trained on, and on sums of two steps; the true
reward of greedy answers and of answers drawn at temperature 1; whether the form that a prompt asks
for is kept to, and how many of the drawn answers are in one format.

What came out (seed 0, bf16): each damage shows where it was done, and diversity costs most. Of 250
prompts, each learned 20 times, 18 % of unseen tasks come out right, and not 82; of four tasks 36,
and 2 % in families that nothing was trained on (74). Without reasoning 10 % of the sums are right
(94), with half of the answers wrong 37. Where half are misshapen as many tasks are right, but of
the drawn answers 54 % are in one format (91), and their true reward falls from .86 to .72.

    python experiments/quality.py            # results/quality.png and .md
    python experiments/quality.py --quick    # one seed, a tenth of the steps and rows
"""
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import data_quality
from experiments.base import (
    base_models,
    careful,
    cell,
    demonstrations,
    save,
    seed_folder,
    show_table,
    tuned_on,
)
from plumbing.options import command_line
from world.world import respond

N = 5000                               # rows of each set
REPEATS = 20                           # of each prompt, where there are few
FEW_TASKS = ("story", "facts", "arithmetic", "lists")
SIMPLEST = 4                           # one row in so many is kept
DAMAGED = 0.5                          # share of the answers that are wrong, or misshapen
WRAPPERS = ("Answer: {}", "**{}**", "### Response:\n{}", "- {}", "cut off")
SFT = {"steps": 400, "batch_size": 16, "eval_every": 400}
# What stands for each dimension in the table: {name: (dimension, measure, format)}.
MEASURES = {"tasks": ("diversity", "effective_tasks", ".1f"),
            "new prompts": ("diversity", "distinct", ".2f"),
            "reasoning": ("complexity", "reasoning", ".1%"),
            "words": ("complexity", "answer_words", ".1f"),
            "right": ("correctness", "right", ".1%"),
            "one format": ("format", "consistent", ".1%")}
# {figure: (its name, its format)}
COLUMNS = {"accuracy": ("accuracy, unseen tasks", ".1%"),
           "wordings": ("unseen wordings", ".1%"),
           "unseen_families": ("unseen families", ".1%"),
           "arithmetic": ("sums of two steps", ".1%"),
           "true_reward": ("true reward", ".3f"),
           "drawn_reward": ("true reward, drawn", ".3f"),
           "form": ("form asked for, kept", ".1%"),
           "consistent": ("answers in one format", ".1%")}


@dataclass
class Config:
    seeds: str = "0"                  # of world, models and batches, with commas
    out: str = "out/quality"          # folder for the models and their data
    figure: str = "results/quality.png"           # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of the steps and rows, marked


# ---------------------------------------------------------------------- the sets

def without_chain(rng: Random, task: dict) -> str:
    return careful(rng, task).replace(f"{task.get('chain')} ", "")


def half_wrong(rng: Random, task: dict) -> str:
    return respond(rng, task, "wrong") if rng.random() < DAMAGED else careful(rng, task)


def half_misshapen(rng: Random, task: dict) -> str:
    answer = careful(rng, task)
    if rng.random() >= DAMAGED:
        return answer
    wrapper = rng.choice(WRAPPERS)
    # The mark alone is cut off, because the answer itself must stay right.
    return answer[:-1] if wrapper == "cut off" else wrapper.format(answer)


def few_prompts(seed: int, n: int) -> list[dict]:
    return demonstrations(seed, n // REPEATS, "train", careful) * REPEATS


def simple(seed: int, n: int) -> list[dict]:
    """The shortest of each family, by the words of prompt and answer."""
    pool = demonstrations(seed, SIMPLEST * n, "train", without_chain)
    pool.sort(key=lambda row: sum(len(turn["content"].split()) for turn in row["messages"]))
    # By its place in its own family, because the shortest of all would be of few families.
    n_before = Counter()
    places = []
    for i, row in enumerate(pool):
        family = row["example"]["family"]
        places.append((n_before[family], i))
        n_before[family] += 1
    return [pool[i] for _, i in sorted(places)[:n]]


def answered(answer: Callable, **options) -> Callable[[int, int], list[dict]]:
    return lambda seed, n: demonstrations(seed, n, "train", answer, **options)


# {name: rows(seed, n)}
SETS = {"clean": answered(careful), "few prompts": few_prompts,
        "few tasks": answered(careful, families=FEW_TASKS), "simple": simple,
        "half wrong": answered(half_wrong), "half misshapen": answered(half_misshapen)}


def measured(rows: list[dict], seed: int) -> dict[str, float]:
    """The numbers of MEASURES."""
    found = data_quality.quality(rows, seed)
    return {name: found[dimension][measure]["value"]
            for name, (dimension, measure, _) in MEASURES.items()}


# ---------------------------------------------------------------------- table and picture

def draw(found: dict[str, list[dict]], file: Path, mark: str) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(18, 7), layout="constrained")
    for axis, (name, (label, _)) in zip(axes.flat, COLUMNS.items()):
        for place, exams in enumerate(found.values()):
            values = [exam[name] for exam in exams]
            axis.bar(place, float(np.mean(values)), 0.6, alpha=0.5)
            axis.plot([place] * len(values), values, "ko", markersize=4)
        axis.axhline(float(np.mean([exam[name] for exam in found["clean"]])), color="0.5", lw=0.8)
        axis.set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found])
        axis.set_title(f"{label}{mark}")
    save(figure, file)


def rows_of_table(found: dict[str, list[dict]], columns: dict[str, tuple[str, str]]) -> list[str]:
    """columns: {figure: (its name, its format)}."""
    lines = [f"| | {' | '.join(label for label, _ in columns.values())} |",
             "|---" * (len(columns) + 1) + "|"]
    for name, exams in found.items():
        cells = [cell([exam[figure] for exam in exams], form)
                 for figure, (_, form) in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table(found: dict[str, list[dict]], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    of_data = {name: (name, form) for name, (_, _, form) in MEASURES.items()}
    lines = [f"# Diversity, complexity, correctness, format{mark}", "",
             f"`python experiments/quality.py`, seeds {cfg.seeds}: the mean, and from the lowest "
             "to the highest.", "",
             "The sets, by data_quality.py: effective tasks, share of different prompts, answers "
             "with reasoning, words of an answer, answers that are right, in one format:", "",
             *rows_of_table(found, of_data), "",
             "What was learned from them; \"drawn\" and the format are of answers at temperature "
             "1, all else of greedy ones:", "", *rows_of_table(found, COLUMNS)]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    options = dict(SFT)
    n = N
    n_exam = 500
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        options |= {"steps": SFT["steps"] // 10, "eval_every": SFT["steps"] // 10}
        n = N // 10
        n_exam = 50
    found = {name: [] for name in SETS}
    for seed in map(int, cfg.seeds.split(",")):
        base = base_models(seed)
        out = seed_folder(cfg, seed)
        heldout = demonstrations(seed, n // 10, "heldout", careful)        # the same for all
        for name, draw_rows in SETS.items():
            rows = draw_rows(seed, n)
            exam = tuned_on(rows + heldout, out / name.replace(" ", "_"), seed, base, n_exam,
                            **options)
            found[name].append(exam | measured(rows, seed))
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
