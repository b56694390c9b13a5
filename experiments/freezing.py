"""
What to freeze, by how much data there are: held-out accuracy of four ways to train a classifier.

The sentences of the documents (004): "Small Target Data: Freeze all pre-trained hidden layers;
train only the weights of the newly initialized output classification layer. Medium Target Data:
Freeze early layers; train weights on the last few abstraction layers + the output layer. Large
Target Data: Fine-tune all layers across the entire network". If they hold, the best way moves down
this list as the data grow. Runs of train_classifier.py for each seed from the base model, on 50,
200, 1,000 and 5,000 examples of what follows from premises (yes, no, cannot say):

  head           --train head, at ten times the learning rate of the others
  last 2 blocks  --train last_k --last_k 2
  all            --train all
  gradual        --train all --unfreeze gradual: one more layer every 50 of 600 steps

What came out (three seeds, bf16): they hold in part. To freeze the early layers is best from 200
examples on (91 % of a thousand, all layers 83), and still is with 5,000, where in 600 steps all
layers get no further than the first word of a text tells. But with 50 the output layer alone is
the worst and not the best (40 %, all layers 68): what this base has read says little about what
follows from what before some of its layers have moved.

    python experiments/freezing.py             # results/freezing.png and .md
    python experiments/freezing.py --quick     # one seed, 50 and 1,000 examples, 100 steps

The same number of steps everywhere: 50 examples are read 192 times, 5,000 twice. Accuracy: at the
end, on 1,000 texts. The first word of a text alone is right on 83 %: "some", "every" or "no".
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import train_classifier
from experiments.base import base_models, cell, run, save, seed_folder, show_table
from plumbing.options import command_line

STEPS = 600
SIZES = (50, 200, 1000, 5000)
COMMON = {"task": "class", "family": "inference", "pool": "last", "optimizer": "adamw",
          "batch_size": 16, "warmup": 30, "weight_decay": 0.0, "eval_examples": 1000,
          "eval_every": 0}
WAYS = {"head": {"train": "head", "lr": 1e-2},
        "last 2 blocks": {"train": "last_k", "last_k": 2, "lr": 1e-3},
        "all": {"train": "all", "lr": 1e-3},
        "gradual": {"train": "all", "lr": 1e-3, "unfreeze": "gradual", "unfreeze_every": 50}}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/freezing"         # folder for the models
    figure: str = "results/freezing.png"          # the picture; the table beside it, as .md
    quick: bool = False               # one seed, two sizes, a sixth of the steps, marked


def options(way: str, size: int, seed: str, base: Path, quick: bool) -> dict:
    """Of one run, all but its folder."""
    found = COMMON | WAYS[way] | {"init": str(base / "pretrain"), "data": f"world:{seed}",
                                  "n_examples": size, "seed": int(seed), "steps": STEPS}
    if quick:
        found["steps"] = STEPS // 6
        if way == "gradual":
            found["unfreeze_every"] = WAYS[way]["unfreeze_every"] // 6
    return found


def best(found: dict[str, dict[int, list[float]]]) -> dict[int, str]:
    """The way with the highest mean accuracy over the seeds, for each size."""
    sizes = next(iter(found.values()))
    return {size: max(found, key=lambda way: np.mean(found[way][size])) for size in sizes}


def draw(found: dict[str, dict[int, list[float]]], majority: float, file: Path, mark: str) -> None:
    """Accuracy over the number of examples: a line for each way, its seeds as dots."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (way, of_sizes) in enumerate(found.items()):
        sizes = list(of_sizes)
        color = f"C{number}"
        axis.plot(sizes, [np.mean(of_sizes[size]) for size in sizes], color=color, label=way)
        for size in sizes:
            axis.plot([size] * len(of_sizes[size]), of_sizes[size], ".", color=color, alpha=0.5)
    axis.axhline(majority, color="gray", linestyle=":", label="the most frequent class")
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xticks([], minor=True)
    axis.set(title=f"what to freeze{mark}", xlabel="examples", ylabel="held-out accuracy")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, file)


def table(found: dict[str, dict[int, list[float]]], majority: float, cfg: Config) -> str:
    """results/freezing.md; found: {way: {size: the accuracy of each seed}}."""
    mark = " (quick)" if cfg.quick else ""
    best_ways = best(found)
    header = [f"{size:,} examples" for size in best_ways]
    lines = [f"# What to freeze{mark}", "",
             f"`python experiments/freezing.py`, seeds {cfg.seeds}: held-out accuracy, the mean "
             f"and from the lowest to the highest. Always the most frequent class: {majority:.1%}.",
             "", f"| {' | '.join(['', *header])} |", "|---" * (len(header) + 1) + "|"]
    for way, of_sizes in found.items():
        cells = [cell(accuracies, ".1%") for accuracies in of_sizes.values()]
        lines.append(f"| {' | '.join([way, *cells])} |")
    lines.append(f"| {' | '.join(['the best', *best_ways.values()])} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    sizes = SIZES
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        sizes = SIZES[::2]
    found = {way: {size: [] for size in sizes} for way in WAYS}
    majorities = []
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
        for way in WAYS:
            for size in sizes:
                folder = out / f"{way.replace(' ', '_')}_{size}"
                result = run(train_classifier, out=str(folder),
                             **options(way, size, seed, base, cfg.quick))
                found[way][size].append(result["accuracy"])
                majorities.append(result["majority"])
    majority = float(np.mean(majorities))
    draw(found, majority, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, majority, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
