"""
KTO needs no pairs: answers with a thumb up or down, however many of the thumbs are up.

The sentences of the documents (001 section 4.8.2): KTO "eliminates the need for paired preferences
- works with pointwise feedback (thumbs up / thumbs down)"; "w(b) applies loss aversion weighting
(lambda_loss > lambda_gain, reflecting human loss aversion)". Its paper has lambdas of 1; where one
kind is rare it raises that kind's lambda until lambda_good n_good / (lambda_bad n_bad) lies in
[1, 4/3] (Ethayarajh et al. 2024). Runs of train_dpo.py for each seed from the SFT model:

  50 % good                 8,000 rated answers, half of them good, both lambdas 1
  10 % good                 as many answers, few of them good
  90 % good                 or few of them bad
  10 % good, corrected      the same answers with lambda_good 9
  90 % good, corrected      the same answers with lambda_bad 6.75
  lambda_bad 1.5            loss aversion, half of the answers good
  lambda_bad 2              more of it
  DPO on pairs              8,000 pairs, which are twice as many answers

What came out, three seeds: half of the answers good, KTO wins 64 to 68 % against SFT, and loss
aversion changes nothing (63 to 69 %). Where one answer in ten is good, equal lambdas push
everything down until nothing is left (wins 0 %, 200 nats away); lambda_good 9 brings it back to 58
to 63 %, at a price in accuracy. Where nine in ten are good neither is needed.

    python experiments/kto_unpaired.py                 # results/kto_unpaired.png and .md
    python experiments/kto_unpaired.py --quick         # one seed, a tenth of steps and answers
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import readers
import train_dpo
from experiments.base import base_models, cell, examined, keep, run, save, seed_folder, show_table
from plumbing.options import command_line

SAME = {"optimizer": "adamw", "batch_size": 16, "warmup": 20, "eval_pairs": 500}
KTO = SAME | {"method": "kto", "beta": 0.2, "lr": 3e-4}
DPO = SAME | {"method": "dpo", "beta": 1.0, "lr": 1e-4}

# {variant: (share of good answers, whether the rarer kind weighs more, lambda_bad otherwise)}
VARIANTS = {
    "10 % good": (0.1, False, 1.0),
    "50 % good": (0.5, False, 1.0),
    "90 % good": (0.9, False, 1.0),
    "10 % good, corrected": (0.1, True, 1.0),
    "90 % good, corrected": (0.9, True, 1.0),
    "lambda_bad 1.5": (0.5, False, 1.5),
    "lambda_bad 2": (0.5, False, 2.0),
}
PAIRS = "DPO on pairs"
# The lines of the picture, {where a point stands: variant}; at 50 % nothing is to be corrected.
EQUAL = {0.1: "10 % good", 0.5: "50 % good", 0.9: "90 % good"}
CORRECTED = {0.1: "10 % good, corrected", 0.5: "50 % good", 0.9: "90 % good, corrected"}
AVERSE = {1.0: "50 % good", 1.5: "lambda_bad 1.5", 2.0: "lambda_bad 2"}
# {column: (figure of examined(), its format)}
COLUMNS = {"true reward": ("true_reward", ".3f"), "wins over SFT": ("win_rate", ".1%"),
           "accuracy over SFT's": ("accuracy_gain", "+.1%"), "KL": ("kl", ".2f")}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    n: int = 8000                     # rated answers, or pairs, of each run, >= 100
    steps: int = 500                  # of each run, >= 1
    out: str = "out/kto_unpaired"     # folder for answers and models
    figure: str = "results/kto_unpaired.png"       # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of steps and answers, marked so


# ---------------------------------------------------------------------- the answers

def of_share(rows: list[dict], share: float, n: int) -> list[dict]:
    """n of the rows, round(share n) of them good: the first of each kind, so that two shares have
    as many rows in common as they can. Raises ValueError where there are too few."""
    n_good = round(share * n)
    good = [row for row in rows if row["label"]][:n_good]
    bad = [row for row in rows if not row["label"]][:n - n_good]
    if len(good) + len(bad) < n:
        raise ValueError(f"{len(rows)} rows have too few good or bad ones for {share:.0%} good "
                         f"of {n}")
    return good + bad


def answers_file(out: Path, share: float) -> Path:
    return out / f"good_{round(100 * share)}.jsonl"


def write_answers(rows: list[dict], share: float, n: int, file: Path) -> None:
    """A file of which train_dpo.py trains on n answers, this share of them good. It holds out a
    tenth of the prompts, by a hash: n // 16 more answers of the same share are for that."""
    trained = [row for row in rows if not readers.held_out(readers.user_text(row))]
    heldout = [row for row in rows if readers.held_out(readers.user_text(row))]
    lines = []
    for row in of_share(trained, share, n) + of_share(heldout, share, n // 16):
        lines.append(json.dumps({"prompt": row["prompt"], "completion": row["response"],
                                 "label": row["label"]}) + "\n")
    keep(file, "".join(lines))


def corrected(n_good: int, n_bad: int) -> tuple[float, float]:
    """lambda_good and lambda_bad: 1, but for the rarer kind, if it must weigh more for
    lambda_good n_good / (lambda_bad n_bad) to lie in [1, 4/3].

    800 of 8,000 good -> (9, 1); 7,200 good -> (1, 6.75)
    """
    return max(1.0, n_bad / n_good), max(1.0, n_good / n_bad * 3 / 4)


# ---------------------------------------------------------------------- the runs

def options_of(variant: str, seed: int, n: int, out: Path) -> dict:
    """What a variant's run is told beside what all are told; its n answers lie in `out`."""
    if variant == PAIRS:
        return DPO | {"data": f"world:{seed}"}
    share, is_corrected, lambda_bad = VARIANTS[variant]
    n_good = round(share * n)
    lambda_good = 1.0
    if is_corrected:
        lambda_good, lambda_bad = corrected(n_good, n - n_good)
    return KTO | {"data": str(answers_file(out, share)), "lambda_good": lambda_good,
                  "lambda_bad": lambda_bad}


def exams_of(seed: int, cfg: Config) -> dict[str, dict]:
    """{variant: its figures} of one seed; what is trained and examined already is not again."""
    base = base_models(seed)
    out = seed_folder(cfg, seed)
    # 5/2 times as many, because 47 % are good and 90 % may have to be
    rows = readers.read_labelled(f"world:{seed}", n=5 * cfg.n // 2, split="train", seed=seed)
    for share in EQUAL:
        write_answers(rows, share, cfg.n, answers_file(out, share))
    exams = {}
    for variant in (*VARIANTS, PAIRS):
        folder = out / variant.replace(" %", "").replace(",", "").replace(" ", "_")
        run(train_dpo, init=str(base / "sft"), out=str(folder), seed=seed, n_pairs=cfg.n,
            steps=cfg.steps, eval_every=cfg.steps, **options_of(variant, seed, cfg.n, out))
        exams[variant] = examined(folder, seed, base, 50 if cfg.quick else 500)
    return exams


# ---------------------------------------------------------------------- table and picture

def values(found: dict[str, dict], variant: str, figure: str) -> list[float]:
    """A figure of each seed; found: {seed: {variant: figures}}."""
    return [exams[variant][figure] for exams in found.values()]


def table(found: dict[str, dict], cfg: Config) -> str:
    """results/kto_unpaired.md."""
    head = ["", *COLUMNS]
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# KTO on unpaired answers{mark}", "",
             f"`python experiments/kto_unpaired.py`, seeds {cfg.seeds}, {cfg.n:,} rated answers or "
             f"pairs, {cfg.steps} steps: the mean, and from the lowest to the highest; KL in nats "
             "per response.", "",
             f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant in (*VARIANTS, PAIRS):
        cells = [variant]
        for figure, form in COLUMNS.values():
            cells.append(cell(values(found, variant, figure), form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_line(axis, found: dict[str, dict], places: dict[float, str], color: str,
              label: str) -> None:
    """The mean of the wins at each place, and a point for each seed."""
    means = []
    for place, variant in places.items():
        wins = values(found, variant, "win_rate")
        axis.plot([place] * len(wins), wins, "o", color=color, alpha=0.5)
        means.append(np.mean(wins))
    axis.plot(list(places), means, color=color, label=label)
    axis.set_xticks(list(places))


def draw(found: dict[str, dict], file: Path, mark: str) -> None:
    """Wins over SFT by the share of good answers, and by loss aversion; DPO on pairs beside it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    draw_line(left, found, EQUAL, "C0", "both lambdas 1")
    draw_line(left, found, CORRECTED, "C1", "the rarer kind weighs more")
    left.set(title=f"imbalance{mark}", xlabel="share of good answers",
             ylabel="wins over SFT, by true reward")
    draw_line(right, found, AVERSE, "C0", "half of the answers good")
    right.set(title=f"loss aversion{mark}", xlabel="lambda_bad, beside lambda_good 1")
    for axis in (left, right):
        axis.axhline(np.mean(values(found, PAIRS, "win_rate")), color="gray", linestyle="--",
                     label=PAIRS)
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, file)


def main(cfg: Config) -> dict:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        cfg.steps //= 10
        cfg.n //= 10
    found = {seed: exams_of(int(seed), cfg) for seed in cfg.seeds.split(",")}
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))
    return found


if __name__ == "__main__":
    command_line(main, Config, __doc__)
