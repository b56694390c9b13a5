"""
What annotators' errors do to the policy: labels that are wrong, and labels that go by length.

The sentences of the documents (003): DPO "is sensitive to the reference model and to
noisy/length-biased preferences", and "variants (IPO, KTO, online DPO) target DPO's overfitting";
(001 section 4.8.1) IPO's fixed margin "rather than pushing the margin to infinity" is an "implicit
regularization". For a seed from the SFT model, on 8,000 pairs that are each seen once:

  (a) wrong labels, 0, 20 % and 40 % of them:
      DPO                --beta 1
      IPO                --method ipo --beta 3
      conservative DPO   --beta 1 --label_smoothing as large as the noise; without noise it is DPO
  (b) annotators of whom no one, or every second, goes by length alone:
      DPO                on their pairs, --beta 1
      PPO                against a reward model of their pairs, --beta 0.4 --kl_target 0

    python experiments/noise_robustness.py           # results/noise_robustness.png and .md
    python experiments/noise_robustness.py --quick   # one seed, two noises, a tenth of the steps

Figures are of greedy answers to unseen prompts, judged without noise and bias.

What came out (three seeds): 40 % wrong labels take .102 of true reward from DPO, .121 from
conservative DPO and .085 from IPO, which has less to lose (.922 without noise, DPO .946): with each
pair read once nothing is overfitted that a fixed margin or smoothed labels could keep out. Where
every second annotator goes by length, answers grow from 9 words to 15 (DPO and PPO), true reward
falls by .074 and .075, and SFT's answers win 61 and 64 % of the comparisons.
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
import train_ppo
import train_rm
from experiments.base import base_models, cell, examined, keep, run, save, seed_folder, show_table
from plumbing.options import command_line

NOISES = (0.0, 0.2, 0.4)
BIASES = (0.0, 0.5)
DPO = {"n_pairs": 8000, "steps": 500, "batch_size": 16, "lr": 1e-4}
LOSSES = {"DPO": {"method": "dpo", "beta": 1.0}, "IPO": {"method": "ipo", "beta": 3.0},
          "conservative DPO": {"method": "dpo", "beta": 1.0}}
RM = {"n_pairs": 8000, "steps": 500, "batch_size": 16, "optimizer": "muon", "lr": 1e-3}
PPO = {"steps": 40, "lr": 1.5e-4, "beta": 0.4, "kl_target": 0.0}
# {column: (name of the figure, its format)}
NOISE_COLUMNS = {"true reward": ("true_reward", ".3f"),
                 "over its own without noise": ("change", "+.3f"),
                 "accuracy over SFT's": ("accuracy_gain", "+.1%"),
                 "held-out pairs ranked right": ("val_accuracy", ".1%")}
BIAS_COLUMNS = {"words": ("words", ".1f"), "true reward": ("true_reward", ".3f"),
                "wins over SFT": ("win_rate", ".1%"),
                "of equal length": ("length_controlled", ".1%")}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models, annotators, batches and samples
    out: str = "out/noise_robustness"             # folder for pairs and models
    figure: str = "results/noise_robustness.png"  # the picture; the table beside it, as .md
    quick: bool = False               # one seed, two noises, a tenth of steps and pairs, marked


# ---------------------------------------------------------------------- the runs of a seed

def shortened(options: dict, quick: bool) -> dict:
    """The options, or with --quick a tenth of their steps and pairs."""
    tenths = {name: options[name] // 10 for name in ("steps", "n_pairs") if name in options}
    return options | tenths if quick else options


def noisy(loss: str, noise: float, seed: str, base: Path, out: Path, quick: bool) -> dict:
    """The figures of a policy whose pairs have this share of wrong labels."""
    options = shortened(DPO | LOSSES[loss], quick) | {"label_noise": noise}
    if loss == "conservative DPO" and noise:
        options["label_smoothing"] = noise
    # Without noise it has nothing to smooth: the run is DPO's own.
    name = loss if noise else loss.removeprefix("conservative ")
    folder = out / f"{name.replace(' ', '_')}_{noise}"
    result = run(train_dpo, init=str(base / "sft"), out=str(folder), data=f"world:{seed}",
                 seed=int(seed), **options)
    exam = examined(folder, int(seed), base, 50 if quick else 500)
    return exam | {"val_accuracy": result["val_accuracy"]}


def biased(method: str, bias: float, seed: str, base: Path, out: Path, quick: bool) -> dict:
    """The figures of a policy that this share of annotators has taught to be long."""
    folder = out / f"{method}_bias_{bias}"
    common = {"init": str(base / "sft"), "seed": int(seed)}
    if method == "DPO":
        options = shortened(DPO | LOSSES["DPO"], quick)
        file = out / f"pairs_bias_{bias}.jsonl"
        if not file.exists():
            # An eighth more than are read, because a tenth of a file's prompts is held out.
            keep(file, pairs_of(seed, bias, options["n_pairs"] * 9 // 8))
        run(train_dpo, out=str(folder), data=str(file), **common, **options)
    else:
        rm = out / f"rm_bias_{bias}"
        run(train_rm, out=str(rm), data=f"world:{seed}", length_bias=bias, **common,
            **shortened(RM, quick))
        run(train_ppo, out=str(folder), reward=str(rm), prompts=f"world:{seed}", **common,
            **shortened(PPO, quick))
    return examined(folder, int(seed), base, 50 if quick else 500)


def pairs_of(seed: str, bias: float, n: int) -> str:
    """n pairs of the world as lines of JSON; the same pairs whatever the bias, other labels."""
    pairs = readers.read_preferences(f"world:{seed}", split="train", n=n, seed=int(seed), bias=bias)
    lines = []
    for pair in pairs:
        lines.append(json.dumps({name: pair[name] for name in ("prompt", "chosen", "rejected")}))
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- table and picture

def values(of_seeds: dict[str, dict], name: str) -> list[float]:
    return [figures[name] for figures in of_seeds.values()]


def rows(found: dict[str, dict[float, dict]], dial: str, columns: dict) -> list[str]:
    """The lines of a table: a method at a setting of the dial each."""
    lines = [f"| {' | '.join(['', dial, *columns])} |", "|---" * (len(columns) + 2) + "|"]
    for method, of_dial in found.items():
        for setting, of_seeds in of_dial.items():
            cells = [cell(values(of_seeds, name), form) for name, form in columns.values()]
            lines.append(f"| {' | '.join([method, f'{setting:g}', *cells])} |")
    return lines


def table(noise: dict, bias: dict, cfg: Config) -> str:
    """results/noise_robustness.md; noise and bias: {method: {setting: {seed: figures}}}."""
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# What annotators' errors do to the policy{mark}", "",
             f"`python experiments/noise_robustness.py`, seeds {cfg.seeds}: the mean, and from the "
             "lowest to the highest. Greedy answers to unseen prompts.", "",
             "(a) Wrong labels, a share of all:", "", *rows(noise, "noise", NOISE_COLUMNS), "",
             "(b) Annotators who go by length alone, a share of all; words per answer:", "",
             *rows(bias, "bias", BIAS_COLUMNS)]
    return "\n".join(lines) + "\n"


def draw_against(axis, found: dict[str, dict[float, dict]], name: str) -> None:
    """A figure against the dial: the mean of the seeds, and a dot for each."""
    for number, (method, of_dial) in enumerate(found.items()):
        means = [np.mean(values(of_seeds, name)) for of_seeds in of_dial.values()]
        axis.plot(list(of_dial), means, color=f"C{number}", label=method)
        for setting, of_seeds in of_dial.items():
            dots = values(of_seeds, name)
            axis.plot([setting] * len(dots), dots, "o", color=f"C{number}", alpha=0.5)
    axis.grid(alpha=0.3)
    axis.legend()


def draw(noise: dict, bias: dict, file: Path, mark: str) -> None:
    """Two panels on noise, two on length."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.5), layout="constrained")
    draw_against(axes[0], noise, "true_reward")
    draw_against(axes[1], noise, "accuracy_gain")
    draw_against(axes[2], bias, "words")
    draw_against(axes[3], bias, "true_reward")
    titles = ("(a) true reward", "(a) accuracy over SFT's", "(b) words per answer",
              "(b) true reward")
    dials = ["share of wrong labels"] * 2 + ["share of annotators who go by length"] * 2
    for axis, title, dial in zip(axes, titles, dials):
        axis.set(title=title + mark, xlabel=dial)
    save(figure, file)


def main(cfg: Config) -> None:
    noises = NOISES
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        noises = NOISES[::2]
    noise = {loss: {share: {} for share in noises} for loss in LOSSES}
    bias = {method: {share: {} for share in BIASES} for method in ("DPO", "PPO")}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
        for loss in LOSSES:
            for share in noises:
                figures = noisy(loss, share, seed, base, out, cfg.quick)
                without = noise[loss][0.0].get(seed, figures)          # itself, at first
                change = figures["true_reward"] - without["true_reward"]
                noise[loss][share][seed] = figures | {"change": change}
        for method in bias:
            for share in BIASES:
                bias[method][share][seed] = biased(method, share, seed, base, out, cfg.quick)
    draw(noise, bias, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(noise, bias, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
