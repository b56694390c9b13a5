"""
What a reward model learns from: how many pairs, which kind of judgement, and three models beside
one.

The sentences of the documents: p(y_w > y_l | x) = sigma(r(x, y_w) - r(x, y_l)) (001 section 4.3);
diagnostics are "accuracy on held-out preference pairs" and "calibration: p(correct) ~
sigma(|r(y_w) - r(y_l)|)" (4.4); "reward model ensembles - use conservative estimate r(x, y) =
min_k r_psi_k(x, y)" (4.12). Runs of train_rm.py for each seed from the SFT model, all examined on
the same held-out pairs of the world:

  size       Bradley-Terry on 500, 2,000, 8,000 and 32,000 pairs, of which 1,500 steps read 24,000;
             calibration curves of the smallest and the largest
  judgement  8,000 pairs (bt), pairs that say how much better (margin), rankings of four answers
             (plackett_luce), rated answers (pointwise): 16,000, 16,000, 32,000 and 8,000 answers.
             The answers of rankings are drawn in another way than those of pairs, of which the exam
             is
  ensemble   three models of 8,000 pairs each, which differ in pairs, order and head: one of them,
             their mean, their minimum, and how far they disagree about a pair

What came out (three seeds): 500 pairs rank 75.2 % of the held-out pairs right (at worst 72.9),
2,000 83.1, 8,000 86.9, 32,000 89.2; how sure the model is agrees with how often it is right, the
better the more pairs there are (ECE .048 to .018). Margins add nothing. Rankings and ratings rank
the same pairs worse, 74.8 and 78.6 %, though they hold as many answers or twice as many: their
answers differ in other ways than those of the pairs. The mean of three models is .7 points better
than one, the minimum .5; where the mean is wrong the three disagree by 1.3 times its margin, and by
.2 times where it is right: that is what the conservative estimate of 4.12 lives on.

    python experiments/reward_model.py                 # results/reward_model.png and .md
    python experiments/reward_model.py --quick         # one seed, a tenth of steps and pairs
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import diagnostics
import readers
import train_rm
from data import PreferencePairs
from evaluate import calibration_error
from experiments.base import (
    base_models,
    cell,
    fast_dtype,
    kept,
    run,
    save,
    seed_folder,
    show_table,
)
from plumbing.device import pick_device
from plumbing.folders import load_reward_model, read_record
from plumbing.options import command_line
from rewards import combined
from scoring import ranked_right

SAME = {"optimizer": "muon", "lr": 1e-3, "batch_size": 16, "label_noise": 0.0, "eval_pairs": 200}
SIZES = {500: 60, 2000: 150, 8000: 500, 32_000: 1500}      # pairs: steps
ITEMS = 8000                           # pairs, ratings or rankings of the other models
# {--loss: what it learns from}
LOSSES = {"bt": "pairs", "margin": "pairs, margins", "plackett_luce": "rankings of 4",
          "pointwise": "ratings"}
# {member of the ensemble: what is added to its seed}; the first is the model of SIZES
MEMBERS = {f"bt_{ITEMS}": 0, f"bt_{ITEMS}_100": 100, f"bt_{ITEMS}_200": 200}
N_HELDOUT = 2000                       # pairs of the exam; an accuracy's standard error: .8 points
UNITS = ("in nats, mean", "over the mean margin's size, median")   # of disagreement()


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/reward_model"     # folder for the models
    figure: str = "results/reward_model.png"       # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of steps and pairs, marked in the picture


# ---------------------------------------------------------------------- the runs

def plan(seed: int, part: int) -> dict[str, dict]:
    """{model: its options}; part: 10 for a tenth of pairs and steps under the same names."""
    models = {}
    for n, steps in SIZES.items():
        models[f"bt_{n}"] = {"loss": "bt", "n_pairs": n, "steps": steps, "seed": seed}
    for loss in LOSSES:
        models[f"{loss}_{ITEMS}"] = models[f"bt_{ITEMS}"] | {"loss": loss}
    for name, added in MEMBERS.items():
        models[name] = models[f"bt_{ITEMS}"] | {"seed": seed + added}
    for options in models.values():
        options["n_pairs"] //= part
        options["steps"] //= part
        # not 30, the default, because the shortest run has 60 steps
        options["warmup"] = min(30, options["steps"] // 4)
        options["eval_every"] = options["steps"]
    return models


def scores_of(folder: Path, seed: int, n: int) -> list[list[float]]:
    """r(x, y_w) and r(x, y_l) of n held-out pairs of the world, (n, 2)."""
    model, tokenizer = load_reward_model(folder, pick_device("auto"), fast_dtype())
    rows = readers.read_preferences(f"world:{seed}", n=n, split="heldout", seed=seed)
    pairs = PreferencePairs(rows, tokenizer, model.trunk.config.context_length, seed)
    rewards, _ = diagnostics.scored(model, pairs)
    return rewards.tolist()


def scores_of_all(seed: int, cfg: Config) -> dict[str, Tensor]:
    """{model: (n, 2)} of one seed; what is trained and scored already is not again."""
    base = base_models(seed)
    out = seed_folder(cfg, seed)
    part = 10 if cfg.quick else 1
    n = N_HELDOUT // part
    found = {}
    for name, options in plan(seed, part).items():
        folder = out / name
        run(train_rm, init=str(base / "sft"), out=str(folder), data=f"world:{seed}",
            **SAME | options)
        of = {"model": read_record(folder)["sha256"], "n": n}
        make = partial(scores_of, folder, seed, n)
        found[name] = torch.tensor(kept(out / f"{name}_scores.json", of, make))
    return found


# ---------------------------------------------------------------------- figures

def margins(rewards: Tensor) -> Tensor:
    """(n, 2) -> (n,): the reward of the better answer minus that of the worse one."""
    return rewards[:, 0] - rewards[:, 1]


def figures(rewards: Tensor) -> dict[str, float]:
    margin = margins(rewards)
    return {"accuracy": ranked_right(margin).item(), "ece": calibration_error(margin)}


def of_three(scores: dict[str, Tensor], combine: str) -> Tensor:
    """The rewards of the ensemble, (n, 2): of each answer the three models' mean or min."""
    members = torch.stack([scores[name] for name in MEMBERS], 2)               # (n, 2, 3)
    return combined(members.flatten(0, 1), combine).view(-1, 2)


def disagreement(scores: dict[str, Tensor]) -> list[list[float]]:
    """For each of UNITS the standard deviation of the three models' margins, [of the pairs that
    their mean ranks right, of those that it ranks wrong]. The second unit is there because larger
    margins differ by more, whether they are right or not."""
    of_models = torch.stack([margins(scores[name]) for name in MEMBERS], 1)    # (n, 3)
    deviation = of_models.std(1, correction=0)
    mean = of_models.mean(1)
    sides = (mean > 0, mean <= 0)
    return [[deviation[side].mean().item() for side in sides],
            [(deviation / mean.abs())[side].median().item() for side in sides]]


def rows_of(scores: dict[str, Tensor], part: int) -> dict[str, dict[str, float]]:
    """{row of the table: its figures} of one seed."""
    rows = {}
    for n in SIZES:
        rows[f"bt: {n // part:,} pairs"] = figures(scores[f"bt_{n}"])
    for loss, items in LOSSES.items():
        rows[f"{loss}: {ITEMS // part:,} {items}"] = figures(scores[f"{loss}_{ITEMS}"])
    alone = [figures(scores[name]) for name in MEMBERS]
    rows["one of three, on average"] = {
        name: float(np.mean([member[name] for member in alone])) for name in ("accuracy", "ece")}
    rows["mean of three"] = figures(of_three(scores, "mean"))
    rows["minimum of three"] = figures(of_three(scores, "min"))
    return rows


# ---------------------------------------------------------------------- table and picture

def table(found: dict[str, dict[str, Tensor]], cfg: Config) -> str:
    """results/reward_model.md; found: {seed: {model: (n, 2) rewards}}."""
    rows_of_seeds = [rows_of(scores, 10 if cfg.quick else 1) for scores in found.values()]
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# What a reward model learns from{mark}", "",
             f"`python experiments/reward_model.py`, seeds {cfg.seeds}: the mean, and from the "
             "lowest to the highest, on held-out pairs. ECE: of sigma(r_w - r_l) as a probability, "
             "which differences of ratings are not.", "",
             "|  | accuracy | ECE |", "|---|---|---|"]
    for row in rows_of_seeds[0]:
        accuracy = cell([rows[row]["accuracy"] for rows in rows_of_seeds], ".1%")
        ece = cell([rows[row]["ece"] for rows in rows_of_seeds], ".3f")
        lines.append(f"| {row} | {accuracy} | {ece} |")
    lines += ["", "How far the three models disagree: the standard deviation of their margins.", "",
              "|  | ranked right | ranked wrong |", "|---|---|---|"]
    apart = np.array([disagreement(scores) for scores in found.values()])      # (seeds, 2, 2)
    for unit, (right, wrong) in zip(UNITS, apart.transpose(1, 2, 0)):
        lines.append(f"| {unit} | {cell(right, '.2f')} | {cell(wrong, '.2f')} |")
    return "\n".join(lines) + "\n"


def of_seeds(found: dict[str, dict[str, Tensor]], model: str, name: str) -> list[float]:
    return [figures(scores[model])[name] for scores in found.values()]


def draw_points(axis, places: list, of_places: list[list[float]], color: str, label: str,
                line: str = "-") -> None:
    """A point for each seed, and a line through the means."""
    for place, values in zip(places, of_places):
        axis.plot([place] * len(values), values, "o", color=color, alpha=0.5)
    axis.plot(places, np.mean(of_places, 1), line, color=color, label=label, markersize=20)


def draw_size(axis, found: dict[str, dict[str, Tensor]], part: int) -> None:
    sizes = [n // part for n in SIZES]
    sides = {"accuracy": (axis, "C0", "left"), "ece": (axis.twinx(), "C1", "right")}
    for name, (side, color, place) in sides.items():
        of_sizes = [of_seeds(found, f"bt_{n}", name) for n in SIZES]
        draw_points(side, sizes, of_sizes, color, f"{name} ({place} axis)")
        side.legend(loc=f"center {place}")
    axis.set(xlabel="pairs", xscale="log")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])


def draw(found: dict[str, dict[str, Tensor]], file: Path, part: int, mark: str) -> None:
    """Four panels: accuracy and ECE by size, accuracy by judgement, disagreement, calibration."""
    figure, ((size, judgement), (ensemble, curve)) = plt.subplots(2, 2, figsize=(11, 8.5),
                                                                  layout="constrained")
    draw_size(size, found, part)
    size.set(title=f"size{mark}")

    places = list(range(len(LOSSES)))
    of_losses = [of_seeds(found, f"{loss}_{ITEMS}", "accuracy") for loss in LOSSES]
    draw_points(judgement, places, of_losses, "C0", f"{ITEMS // part:,} items each", "_")
    judgement.set_xticks(places, [f"{loss}:\n{items}" for loss, items in LOSSES.items()])
    judgement.set(title=f"judgement{mark}", xlim=(-0.5, 3.5), ylabel="accuracy on pairs")

    apart = np.array([disagreement(scores) for scores in found.values()])      # (seeds, 2, 2)
    for number, unit in enumerate(UNITS):
        draw_points(ensemble, [0, 1], apart[:, number].T, f"C{number}", unit)
    ensemble.set_xticks([0, 1], ["ranked right", "ranked wrong"])
    ensemble.set(title=f"ensemble: where three models disagree{mark}", xlim=(-0.5, 1.5),
                 ylabel="standard deviation of their margins")

    curve.plot([0.5, 1], [0.5, 1], color="gray", linestyle=":", label="calibrated")
    for n in (min(SIZES), max(SIZES)):
        margin = torch.cat([margins(scores[f"bt_{n}"]) for scores in found.values()])
        confidence, share, _ = zip(*diagnostics.calibration(margin))
        curve.plot(confidence, share, marker="o", label=f"{n // part:,} pairs")
    curve.set(title=f"calibration{mark}", xlabel="confidence, sigma(|r_w - r_l|)",
              ylabel="share ranked right")
    for axis in (judgement, ensemble, curve):
        axis.legend()
    for axis in (size, judgement, ensemble, curve):
        axis.grid(alpha=0.3)
    save(figure, file)


def main(cfg: Config) -> dict:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
    found = {seed: scores_of_all(int(seed), cfg) for seed in cfg.seeds.split(",")}
    draw(found, Path(cfg.figure), 10 if cfg.quick else 1, " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))
    return found


if __name__ == "__main__":
    command_line(main, Config, __doc__)
