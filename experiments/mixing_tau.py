"""
Tasks of unequal size: what a temperature gives the small ones, and takes from the large ones.

The sentences of the documents (001 section 3.5): "naive proportional sampling over-represents large
datasets"; p_k ~ N_k^(1/tau), "optimal: tau in [2, 5]"; a cap, N_k <- min(N_k, M), "prevents any
single task from consuming more than M examples". The base model of a seed learns six families of
the world's tasks, three with 4,000 examples each and three with 40, at tau 1, 2, 5, infinity, and
at tau 1 with a cap of 400; as many steps each.

What came out (three seeds): at tau 1 the small families learn next to nothing, 9 % on unseen tasks.
tau 2 brings them to 27 % (20 at worst) and costs the large ones nothing, 87 % where they had 86;
tau 5 and infinity bring no more, and cost 1 and 7 points, all of it in copying lists, which is
learned late. A cap of 400 does as much, 28 and 85 %. More than a third is not to be had of 40
examples in the families that need a vocabulary or a format: translation ends at 2 %, JSON at 32 to
36, length at 42 to 47.

    python experiments/mixing_tau.py            # results/mixing_tau.png and .md
    python experiments/mixing_tau.py --quick    # one seed, two temperatures, a tenth of the steps
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import readers
from experiments.base import (
    base_models,
    cell,
    save,
    seed_folder,
    show_table,
    tuned,
    write_rows,
)
from plumbing.options import command_line

LARGE = ("facts", "lists", "inference")
SMALL = ("translation", "json", "length")
SIZES = {4000: LARGE, 40: SMALL}
# {name: options of train_sft.py}
MIXTURES = {"tau 1": {}, "tau 2": {"tau": 2.0}, "tau 5": {"tau": 5.0}, "uniform": {"tau": math.inf},
            "cap 400": {"cap": 400}}
SFT = {"steps": 500, "batch_size": 8, "eval_every": 500}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/mixing_tau"       # folder for the models and their data
    figure: str = "results/mixing_tau.png"        # the picture; the table beside it, as .md
    quick: bool = False               # one seed, two mixtures, a tenth of the steps, marked


def write_data(seed: int, file: Path) -> Path:
    """Each family is a task of its own, of the world's training split; train_sft.py holds out a
    tenth of each, and the exam has tasks of the other split."""
    rows = []
    for n, families in SIZES.items():
        for family in families:
            drawn = readers.read_examples(f"world:{seed}", split="train", seed=seed, n=n,
                                          families=(family,))
            rows += [row | {"task": family} for row in drawn]
    return write_rows(file, rows)


def mean_of(exam: dict, families: tuple[str, ...]) -> float:
    return float(np.mean([exam[family] for family in families]))


def draw(found: dict[str, list[dict]], file: Path, mark: str) -> None:
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, families) in enumerate((("4,000 examples", LARGE), ("40 examples", SMALL))):
        for place, exams in enumerate(found.values()):
            values = [mean_of(exam, families) for exam in exams]
            label = f"families with {name}" if place == 0 else None
            axis.bar(place + 0.4 * number, float(np.mean(values)), 0.38, color=f"C{number}",
                     alpha=0.5, label=label)
            axis.plot([place + 0.4 * number] * len(values), values, "o", color=f"C{number}")
    axis.set_xticks([place + 0.2 for place in range(len(found))], found)
    axis.set(title=f"Small tasks beside large ones{mark}", ylabel="accuracy, unseen tasks",
             ylim=(0, 1.12))
    axis.legend()
    save(figure, file)


def table(found: dict[str, list[dict]], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    families = LARGE + SMALL
    lines = [f"# Tasks of unequal size{mark}", "",
             f"`python experiments/mixing_tau.py`, seeds {cfg.seeds}: accuracy on unseen tasks; "
             "the mean, and from the lowest to the highest. The last three families have 40 "
             "examples, the others 4,000.", "",
             f"| | 4,000 | 40 | {' | '.join(families)} |", "|---" * (len(families) + 3) + "|"]
    for name, exams in found.items():
        cells = [cell([mean_of(exam, group) for exam in exams], ".1%") for group in (LARGE, SMALL)]
        cells += [f"{np.mean([exam[family] for exam in exams]):.0%}" for family in families]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    names = list(MIXTURES)
    options = dict(SFT)
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        names = ["tau 1", "tau 5"]
        options["steps"] = SFT["steps"] // 10
    seeds = [int(seed) for seed in cfg.seeds.split(",")]
    found = {name: [] for name in names}
    for seed in seeds:
        base = base_models(seed)
        out = seed_folder(cfg, seed)
        file = write_data(seed, out / "tasks.jsonl")
        for name in names:
            exam = tuned(out / name.replace(" ", "_"), seed, base, LARGE + SMALL,
                         20 if cfg.quick else 200, data=str(file), **options, **MIXTURES[name])
            found[name].append(exam)
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
