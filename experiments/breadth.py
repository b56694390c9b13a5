"""
One task or many: what breadth gives to tasks that were never trained on, at as many steps.

The sentences of the documents (001 section 3.2, the table): the task scope of standard SFT is a
"single task or narrow task family", its target the "in-distribution test set"; instruction tuning
has "hundreds to thousands of tasks" and "zero-shot performance on unseen tasks". The base model of
a seed learns 1, 2, 4, 8 and all but five families of the world's tasks, as many steps each:

  trained    right answers to unseen instances of the families trained on
  unseen     right answers in five families that no run trains on, each of another cluster

Which families are trained on is drawn, three orders for each seed, in which the first 1, 2, 4 and 8
are taken; all are one run for each seed. A single family is one draw out of fifteen: the spread
over draws is in the picture and in the table.

What came out (seed 0, bf16, careful demonstrations): a single family is learned (97 %) and brings
nothing else (5 % in the five unseen ones). Fifteen in as many steps are learned less well (84 %),
and unseen ones are answered in 28 %: tallies (58) and colours (80), which are near to trained ones,
no advice, no word of another language and no conclusion. Between one and eight nothing changes.

    python experiments/breadth.py            # results/breadth.png and .md
    python experiments/breadth.py --quick    # one seed, one order, a third of the steps
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from experiments.base import (
    base_models,
    cell,
    rights,
    save,
    seed_folder,
    show_table,
    tuned,
    write_families,
)
from plumbing.options import command_line
from world.tasks import FAMILIES

UNSEEN = ("tally", "colour", "translation", "inference", "advice")
TRAINED = tuple(family for family in FAMILIES if family not in UNSEEN)
SIZES = (1, 2, 4, 8, len(TRAINED))
SFT = {"steps": 300, "batch_size": 8, "optimizer": "muon", "lr": 4e-3, "eval_every": 300}
# {name: its color}
FIGURES = {"trained": "C0", "unseen": "C1"}


@dataclass
class Config:
    seeds: str = "0"                  # of world, models, batches and orders, with commas
    orders: int = 3                   # of the families, for each seed
    out: str = "out/breadth"          # folder for the models and their data
    figure: str = "results/breadth.png"           # the picture; the table beside it, as .md
    quick: bool = False               # one seed, one order, a third of the steps, marked


def drawn(seed: int, order: int, size: int) -> tuple[str, ...]:
    """So many of the families; those of a smaller size are among those of a larger one."""
    return tuple(Random(f"breadth {seed} {order}").sample(TRAINED, len(TRAINED))[:size])


def mean_of(exam: dict, families: tuple[str, ...]) -> float:
    return float(np.mean([exam[family] for family in families]))


def draw(found: dict[int, list[dict]], file: Path, mark: str) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, color in FIGURES.items():
        for size, exams in found.items():
            axis.plot([size] * len(exams), [exam[name] for exam in exams], "o", color=color,
                      alpha=0.4)
        means = [float(np.mean([exam[name] for exam in exams])) for exams in found.values()]
        axis.plot(list(found), means, color=color, label=f"{name} families")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(found), list(found))
    axis.set(title=f"One task or many{mark}", xlabel="families trained on", ylabel="right answers",
             ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, file)


def table(found: dict[int, list[dict]], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# One task or many{mark}", "",
             f"`python experiments/breadth.py`, seeds {cfg.seeds}, orders of the families each: "
             f"{cfg.orders}. Right answers to unseen tasks; the mean, and from the lowest to the "
             "highest run.", "",
             f"| families | runs | trained | unseen | {' | '.join(UNSEEN)} |",
             "|---" * (len(UNSEEN) + 4) + "|"]
    for size, exams in found.items():
        cells = [cell([exam[name] for exam in exams], ".1%") for name in FIGURES]
        cells += [f"{np.mean([exam[family] for exam in exams]):.0%}" for family in UNSEEN]
        lines.append(f"| {size} | {len(exams)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    options = dict(SFT)
    n = 100
    n_rows = 8000
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        cfg.orders = 1
        options["steps"] = SFT["steps"] // 3
        n = 20
        n_rows = 3000
    found = {size: [] for size in SIZES}
    for seed in map(int, cfg.seeds.split(",")):
        base = base_models(seed)
        out = seed_folder(cfg, seed)
        for size in SIZES:
            # all of them are the same families in every order
            for order in range(cfg.orders if size < len(TRAINED) else 1):
                families = drawn(seed, order, size)
                folder = out / f"{size}_families_{order}"
                file = write_families(folder.with_suffix(".jsonl"), seed, families, n_rows)
                exam = tuned(folder, seed, base, families + UNSEEN, n, rights, data=str(file),
                             **options)
                found[size].append(exam | {"trained": mean_of(exam, families),
                                           "unseen": mean_of(exam, UNSEEN)})
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
