"""
Too weak and too strong a pull to the reference: true reward against beta, for DPO and for PPO.

The sentences of the documents (003): "Too-high beta pins the policy to the reference and it barely
improves (under-optimization); too-low beta lets it drift into reward-hacked, degenerate, or
repetitive outputs that game the proxy while real quality drops"; and of DPO, whose beta is "the
implicit KL strength": "smaller beta lets pi_theta diverge further from pi_ref". If both hold, the
true reward is an inverted U over beta, and the KL falls along it. For each seed from the SFT model:

  DPO   beta 0.05, 0.25, 1, 4, 16: on 8,000 pairs, each seen once
  PPO   beta 0, 0.1, 0.4, 1.6, 6.4, which stays where it is (--kl_target 0): against the reward
        model of the base

    python experiments/beta_sweep.py             # results/beta_sweep.png and .md
    python experiments/beta_sweep.py --quick     # one seed, a tenth of the steps

True reward, accuracy and wins are of greedy answers to unseen prompts, the KL of sampled ones.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import train_dpo
import train_ppo
from experiments.alignment_methods import cell
from experiments.base import base_models, examined, keep, run, save
from plumbing.options import command_line

SCRIPTS = {"DPO": train_dpo, "PPO": train_ppo}
OPTIONS = {
    "DPO": {"method": "dpo", "n_pairs": 8000, "steps": 500, "batch_size": 16, "lr": 1e-4},
    "PPO": {"steps": 40, "lr": 1.5e-4, "kl_target": 0.0},
}
# From one to the next a factor of 4 or 5; 1 and 0.4 are the lifecycle's own.
BETAS = {"DPO": (0.05, 0.25, 1.0, 4.0, 16.0), "PPO": (0.0, 0.1, 0.4, 1.6, 6.4)}
# {column: (name of the figure, its format)}
COLUMNS = {"true reward": ("true_reward", ".3f"), "KL": ("kl", ".2f"),
           "wins over SFT": ("win_rate", ".1%"), "accuracy over SFT's": ("accuracy_gain", "+.1%")}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models, batches and samples
    out: str = "out/beta_sweep"       # folder for the models
    figure: str = "results/beta_sweep.png"        # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of the steps, marked in the picture


def options(method: str, beta: float, seed: str, base: Path, quick: bool) -> dict:
    """Of the run with this beta, all but its folder."""
    found = {"init": str(base / "sft"), "seed": int(seed), "beta": beta} | OPTIONS[method]
    if method == "DPO":
        found["data"] = f"world:{seed}"
    else:
        found |= {"reward": str(base / "rm"), "prompts": f"world:{seed}"}
    if quick:
        found["steps"] //= 10
    return found


def hump(rewards: list[float]) -> tuple[int, float, float]:
    """The place of the highest true reward, and how far below it are those of the smallest and the
    largest beta. Of an inverted U neither is 0.

    [0.5, 0.75, 0.625] -> 1, 0.25, 0.125
    """
    best = int(np.argmax(rewards))
    return best, rewards[best] - rewards[0], rewards[best] - rewards[-1]


def values(exams: list[dict], name: str) -> list[float]:
    return [exam[name] for exam in exams]


def draw(found: dict[str, dict[str, list[dict]]], sft: dict[str, dict], file: Path,
         mark: str) -> None:
    """A panel for each method: true reward on the left axis, KL on the right, a color a seed."""
    figure, axes = plt.subplots(1, len(found), figsize=(13, 4.8), layout="constrained")
    for axis, (method, of_seeds) in zip(axes, found.items()):
        other = axis.twinx()
        # The betas at equal distances, because a logarithm has no place for 0.
        places = range(len(BETAS[method]))
        for number, (seed, exams) in enumerate(of_seeds.items()):
            color = f"C{number}"
            axis.plot(places, values(exams, "true_reward"), color=color, marker="o",
                      label=f"seed {seed}")
            axis.axhline(sft[seed]["true_reward"], color=color, linestyle=":", linewidth=1)
            other.plot(places, values(exams, "kl"), color=color, marker=".", linestyle="--",
                       alpha=0.6)
        axis.set(title=f"{method}{mark}", xlabel="beta",
                 ylabel="true reward: solid; of the SFT model: dotted")
        axis.set_xticks(places, [f"{beta:g}" for beta in BETAS[method]])
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right")
        other.set_yscale("symlog", linthresh=1)
        other.set(ylabel="dashed: KL to the SFT model, nats per response", ylim=(0, None))
    save(figure, file)


def row(name: str, exams: list[dict]) -> str:
    """A line of the table; exams: one of each seed."""
    cells = [cell(values(exams, figure), form) for figure, form in COLUMNS.values()]
    return f"| {' | '.join([name, *cells])} |"


def table(found: dict[str, dict[str, list[dict]]], sft: dict[str, dict], cfg: Config) -> str:
    """results/beta_sweep.md; found: {method: {seed: an exam of each beta}}, sft: {seed: exam}."""
    lines = ["# The true reward against beta", "",
             f"`python experiments/beta_sweep.py`, seeds {cfg.seeds}: the mean, and from the "
             "lowest to the highest. Greedy answers to unseen prompts; KL in nats per response.",
             "", f"| {' | '.join(['', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|",
             row("SFT", list(sft.values()))]
    for method, of_seeds in found.items():
        for number, beta in enumerate(BETAS[method]):
            exams = [of_seed[number] for of_seed in of_seeds.values()]
            lines.append(row(f"{method}, beta {beta:g}", exams))
    lines += ["", "An inverted U is high at neither end:", "",
              "| | best beta | above the smallest | above the largest |", "|---|---|---|---|"]
    for method, of_seeds in found.items():
        for seed, exams in of_seeds.items():
            best, left, right = hump(values(exams, "true_reward"))
            lines.append(f"| {method}, seed {seed} | {BETAS[method][best]:g} | {left:.3f} | "
                         f"{right:.3f} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
    n = 50 if cfg.quick else 500                       # prompts of an exam
    found = {method: {} for method in BETAS}
    sft = {}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = Path(cfg.out) / (f"{seed}_quick" if cfg.quick else seed)
        sft[seed] = examined(base / "sft", int(seed), base, n)
        for method, betas in BETAS.items():
            found[method][seed] = []
            for beta in betas:
                folder = out / f"{method}_{beta}"
                run(SCRIPTS[method], out=str(folder),
                    **options(method, beta, seed, base, cfg.quick))
                found[method][seed].append(examined(folder, int(seed), base, n))
    file = Path(cfg.figure)
    draw(found, sft, file, " (quick)" if cfg.quick else "")
    keep(file.with_suffix(".md"), table(found, sft, cfg))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    command_line(main, Config, __doc__)
