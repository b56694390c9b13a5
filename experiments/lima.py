"""
A thousand careful demonstrations against ten thousand careless ones.

The sentence of the documents (001 section 3.3.3): "Only ~1,000 carefully curated high-quality
examples can suffice for strong instruction-following - data quality dominates data quantity" (LIMA,
Zhou et al. 2023). The base model of a seed learns 1,000 or 10,000 demonstrations, as many steps:

  clean    by the world's careful hand alone, all of them right
  noisy    by its three careless hands, equally often (terse, rambling, inventive; world.py), and of
           their answers 30 % wrong

and is examined on unseen tasks: accuracy, in unseen wordings and unseen families, too; the true
reward of greedy answers and of answers drawn at temperature 1. LIMA's model had 65 billion
parameters; this one has a million, and has to learn the tasks from its demonstrations as well.

What came out (three seeds, bf16): for the true reward of drawn answers a thousand clean
demonstrations are worth ten thousand noisy ones, .678 and .679. Not for accuracy, 46 and 81 %,
because here the tasks have to be learned as well, and a greedy model follows the 68 % that are
right. At equal numbers clean ones are ahead in everything: by 8 points and .22 at ten thousand.

    python experiments/lima.py            # results/lima.png and .md
    python experiments/lima.py --quick    # one seed, a tenth of the steps and rows
"""
import sys
from dataclasses import dataclass
from itertools import product
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
from world.world import HANDS, demonstrate, respond

SIZES = (1000, 10_000)                 # demonstrations
WRONG = 0.3                            # share of the noisy ones
CARELESS = [hand for hand in HANDS if hand != "careful"]
# How a careless hand dresses a wrong answer: as all of its others.
MANNERS = {"terse": "plain", "rambling": "rambling", "inventive": "inventing"}
SFT = {"steps": 400, "batch_size": 16, "eval_every": 400}
# {figure: (its name, its format)}
COLUMNS = {"right": ("demonstrations right", ".1%"),
           "accuracy": ("accuracy, unseen tasks", ".1%"),
           "wordings": ("unseen wordings", ".1%"),
           "unseen_families": ("unseen families", ".1%"),
           "true_reward": ("true reward", ".3f"),
           "drawn_reward": ("true reward, drawn", ".3f")}
DRAWN = ("accuracy", "true_reward", "drawn_reward")    # the panels of the picture


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/lima"             # folder for the models and their data
    figure: str = "results/lima.png"  # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of the steps and rows, marked


def noisy(rng: Random, task: dict) -> str:
    hand = rng.choice(CARELESS)
    if rng.random() < WRONG:
        return respond(rng, task, "wrong", MANNERS[hand])
    return demonstrate(rng, task, hand)


QUALITIES = {"clean": careful, "noisy": noisy}


def draw(found: dict[tuple[str, int], list[dict]], file: Path, mark: str) -> None:
    figure, axes = plt.subplots(1, len(DRAWN), figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, DRAWN):
        for color, quality in zip(("C0", "C3"), QUALITIES):
            of_sizes = {n: [exam[name] for exam in exams]
                        for (of, n), exams in found.items() if of == quality}
            means = [float(np.mean(values)) for values in of_sizes.values()]
            axis.plot(list(of_sizes), means, color=color, label=quality)
            for n, values in of_sizes.items():
                axis.plot([n] * len(values), values, "o", color=color)
        axis.set(title=COLUMNS[name][0] + mark, xscale="log", xlabel="demonstrations")
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, file)


def table(found: dict[tuple[str, int], list[dict]], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# A thousand clean demonstrations, ten thousand noisy ones{mark}", "",
             f"`python experiments/lima.py`, seeds {cfg.seeds}: the mean, and from the lowest to "
             f"the highest. Noisy: careless hands, {WRONG:.0%} wrong. \"Drawn\": answers at "
             "temperature 1, all else of greedy ones.", "",
             f"| demonstrations | {' | '.join(label for label, _ in COLUMNS.values())} |",
             "|---" * (len(COLUMNS) + 1) + "|"]
    for (quality, n), exams in found.items():
        cells = [cell([exam[name] for exam in exams], form)
                 for name, (_, form) in COLUMNS.items()]
        lines.append(f"| {n:,} {quality} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    options = dict(SFT)
    sizes = SIZES
    n_exam = 500
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        options |= {"steps": SFT["steps"] // 10, "eval_every": SFT["steps"] // 10}
        sizes = [n // 10 for n in SIZES]
        n_exam = 50
    found = {corner: [] for corner in product(QUALITIES, sizes)}
    for seed in map(int, cfg.seeds.split(",")):
        base = base_models(seed)
        out = seed_folder(cfg, seed)
        # Clean and the same for all, because they are no part of what is compared.
        heldout = demonstrations(seed, sizes[0] // 10, "heldout", careful)
        for (quality, n), exams in found.items():
            rows = demonstrations(seed, n, "train", QUALITIES[quality])
            exam = tuned_on(rows + heldout, out / f"{quality}_{n}", seed, base, n_exam, **options)
            right = data_quality.correctness(rows)["right"]["value"]
            exams.append(exam | {"right": right})
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
