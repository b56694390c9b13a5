"""
Too weak and too strong a pull to the reference: true reward against beta, for DPO and for PPO.

The sentences of the documents (003): "Too-high beta pins the policy to the reference and it barely
improves (under-optimization); too-low beta lets it drift into reward-hacked, degenerate, or
repetitive outputs that game the proxy while real quality drops"; and of DPO, whose beta is "the
implicit KL strength": "smaller beta lets pi_theta diverge further from pi_ref". If both hold, the
true reward is an inverted U over beta, and the KL falls along it. For a seed from the SFT model:

  DPO   beta 0.05, 0.25, 1, 4, 16: on 8,000 pairs, each seen once
  PPO   beta 0, 0.1, 0.4, 1.6, 6.4, which stays where it is (--kl_target 0): against the reward
        model of the base

What came out: both are inverted Us, in each of three seeds. DPO: true reward .58 at beta .05 (26
nats away), .95 at 1, .90 at 16; PPO: .90 without a penalty, .95 at .4, .89 at 6.4; SFT's is .82.
Accuracy falls first: PPO at .1 wins as often as at its best and has lost 4 points of it, DPO at .25
still wins 72 % and has lost 7.

    python experiments/beta_sweep.py             # results/beta_sweep.png and .md
    python experiments/beta_sweep.py --quick     # one seed, three betas, a tenth of steps and pairs

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
from experiments.base import base_models, cell, examined, run, save, seed_folder, show_table
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
    quick: bool = False               # one seed, three betas, a tenth of steps and pairs, marked


def options(method: str, beta: float, seed: str, base: Path, quick: bool) -> dict:
    """Of the run with this beta, all but its folder."""
    found = {"init": str(base / "sft"), "seed": int(seed), "beta": beta} | OPTIONS[method]
    if method == "DPO":
        found["data"] = f"world:{seed}"
    else:
        found |= {"reward": str(base / "rm"), "prompts": f"world:{seed}"}
    if quick:
        tenths = {name: found[name] // 10 for name in ("steps", "n_pairs") if name in found}
        found |= tenths
    return found


def hump(rewards: list[float]) -> tuple[int, float, float]:
    """The place of the highest true reward, and how far below it are those of the smallest and the
    largest beta. Of an inverted U neither is 0.

    [0.5, 0.75, 0.625] -> 1, 0.25, 0.125
    """
    best = int(np.argmax(rewards))
    return best, rewards[best] - rewards[0], rewards[best] - rewards[-1]


def curve(of_betas: dict[float, dict], seed: str, name: str) -> list[float]:
    """A figure of this seed's runs, by beta."""
    return [of_seeds[seed][name] for of_seeds in of_betas.values()]


def draw(found: dict[str, dict[float, dict]], sft: dict[str, dict], file: Path, mark: str) -> None:
    """A panel for each method: true reward on the left axis, KL on the right, a color a seed."""
    figure, axes = plt.subplots(1, len(found), figsize=(13, 5), layout="constrained", sharey=True)
    for axis, (method, of_betas) in zip(axes, found.items()):
        other = axis.twinx()
        # The betas at equal distances, because a logarithm has no place for 0.
        places = range(len(of_betas))
        for number, seed in enumerate(sft):
            color = f"C{number}"
            axis.plot(places, curve(of_betas, seed, "true_reward"), color=color, marker="o",
                      label=f"seed {seed}")
            axis.axhline(sft[seed]["true_reward"], color=color, linestyle=":")
            other.plot(places, curve(of_betas, seed, "kl"), color=color, marker=".",
                       linestyle="--", alpha=0.6)
        axis.set(title=f"{method}{mark}", xlabel="beta",
                 ylabel="true reward: solid; of the SFT model: dotted")
        axis.set_xticks(places, [f"{beta:g}" for beta in of_betas])
        axis.grid(alpha=0.3)
        # The KL falls by 100 from the smallest beta to the largest, and its estimate may be < 0.
        other.set_yscale("symlog", linthresh=1)
        other.set_yticks([0, 0.5, 1, 3, 10, 30, 100], ["0", ".5", "1", "3", "10", "30", "100"])
        highest = max(max(curve(of_betas, seed, "kl")) for seed in sft)
        other.set(ylabel="dashed: KL to the SFT model, nats per response",
                  ylim=(-0.1, 1.2 * max(1, highest)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sft))
    save(figure, file)


def row(name: str, of_seeds: dict[str, dict]) -> str:
    """A line of the table."""
    cells = [name]
    for figure, form in COLUMNS.values():
        cells.append(cell([exam[figure] for exam in of_seeds.values()], form))
    return f"| {' | '.join(cells)} |"


def table(found: dict[str, dict[float, dict]], sft: dict[str, dict], cfg: Config) -> str:
    """results/beta_sweep.md; found: {method: {beta: {seed: exam}}}, sft: {seed: exam}."""
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# The true reward against beta{mark}", "",
             f"`python experiments/beta_sweep.py`, seeds {cfg.seeds}: the mean, and from the "
             "lowest to the highest. Greedy answers to unseen prompts; KL in nats per response.",
             "", f"| {' | '.join(['', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|",
             row("SFT", sft)]
    for method, of_betas in found.items():
        for beta, of_seeds in of_betas.items():
            lines.append(row(f"{method}, beta {beta:g}", of_seeds))
    lines += ["", "How far the best true reward is above those of the smallest and the largest "
              "beta; of an inverted U neither is 0:", "",
              "| | best beta | above the smallest | above the largest |", "|---|---|---|---|"]
    for method, of_betas in found.items():
        for seed in sft:
            best, left, right = hump(curve(of_betas, seed, "true_reward"))
            lines.append(f"| {method}, seed {seed} | {list(of_betas)[best]:g} | {left:.3f} | "
                         f"{right:.3f} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    betas = BETAS
    n = 500                                            # prompts of an exam
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        betas = {method: of_method[::2] for method, of_method in BETAS.items()}
        n = 50
    found = {method: {beta: {} for beta in of_method} for method, of_method in betas.items()}
    sft = {}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
        sft[seed] = examined(base / "sft", int(seed), base, n)
        for method, of_method in betas.items():
            for beta in of_method:
                folder = out / f"{method}_{beta}"
                run(SCRIPTS[method], out=str(folder),
                    **options(method, beta, seed, base, cfg.quick))
                found[method][beta][seed] = examined(folder, int(seed), base, n)
    draw(found, sft, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, sft, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
