"""
DPO makes what people chose less likely: log pi(y_w|x) on held-out pairs, step by step.

The sentence of the documents (003): "DPO often achieves the margin by decreasing the chosen logprob
slightly while crashing the rejected logprob much more"; mitigations: "tune beta, add an SFT/NLL
anchor on y_w, or length-normalize". Five runs of train_dpo.py for each seed from the SFT model:

  beta 0.1           a weak pull to the reference
  beta 2             a strong one
  NLL anchor         beta 0.1 and --nll_coef 1
  length-normalised  --mean_logps, with a beta as large in effect at the start, 0.1 times the mean
                     length of an answer, 15 tokens; and with the 10 that SimPO's authors use

What came out (AMD EPYC with AVX512-BF16, bf16, three seeds): with beta 0.1 the chosen answers lose
13 to 14 nats, the rejected ones 45, and 31 points of accuracy go, too. Beta 2 leaves the chosen
ones where they are (-0.1 to +0.2), the anchor above 0. Length normalisation alone does not help: at
equal strength they lose 19 to 21 nats. It is the larger beta that comes with it, 10, which leaves
-1 to -2.

    python experiments/dpo_chosen_falls.py             # results/dpo_chosen_falls.png and .md
    python experiments/dpo_chosen_falls.py --quick     # one seed, a fifth of the steps
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
from experiments.base import base_models, examined, run, save, seed_folder, show_table
from plumbing.curves import read_metrics
from plumbing.options import command_line

DPO = {"method": "dpo", "n_pairs": 8000, "lr": 2e-4, "beta": 0.1}
VARIANTS = {
    "beta 0.1": {},
    "beta 2": {"beta": 2.0},
    "NLL anchor": {"nll_coef": 1.0},
    "length-normalised": {"mean_logps": True, "beta": 1.5},
    "length-normalised, beta 10": {"mean_logps": True, "beta": 10.0},
}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    steps: int = 500                  # of each run, >= 1
    eval_every: int = 50              # steps between looks at the held-out pairs, >= 1
    out: str = "out/dpo_chosen_falls"             # folder for the models
    figure: str = "results/dpo_chosen_falls.png"  # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a fifth of the steps, marked in the picture


def curve(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and a figure of the held-out pairs at them; at 0 the policy is the reference."""
    steps = [0]
    values = [0.0]
    for row in read_metrics(folder):
        if name in row:
            steps.append(row["step"] + 1)
            values.append(row[name])
    return np.array(steps), np.array(values)


def draw(folders: dict[str, dict[str, Path]], file: Path, mark: str) -> None:
    """A panel for each variant: chosen and rejected answers, a line for each seed."""
    figure, axes = plt.subplots(1, len(folders), figsize=(18, 4), sharey=True, layout="constrained")
    for axis, (variant, of_seeds) in zip(axes, folders.items()):
        for number, folder in enumerate(of_seeds.values()):
            for side, color in (("chosen", "C0"), ("rejected", "C1")):
                label = side if number == 0 else None
                axis.plot(*curve(folder, f"val_logratio_{side}"), color=color, label=label)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(title=variant + mark, xlabel="step")
        axis.set_yscale("symlog", linthresh=1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("log pi / pi_ref on held-out pairs, nats per response")
    axes[0].legend()
    save(figure, file)


def table(folders: dict[str, dict[str, Path]], exams: dict, cfg: Config) -> str:
    """results/dpo_chosen_falls.md."""
    seeds = cfg.seeds.split(",")
    head = ["", *(f"chosen, seed {seed}" for seed in seeds), "rejected, mean", "true reward, worst",
            "accuracy over SFT's, worst"]
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# DPO makes the chosen answers less likely{mark}", "",
             f"`python experiments/dpo_chosen_falls.py`, {cfg.steps} steps: log pi / pi_ref of "
             "held-out chosen and rejected answers at the end, in nats per response.", "",
             f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant, of_seeds in folders.items():
        chosen = [curve(folder, "val_logratio_chosen")[1][-1] for folder in of_seeds.values()]
        rejected = [curve(folder, "val_logratio_rejected")[1][-1] for folder in of_seeds.values()]
        reward = min(exam["true_reward"] for exam in exams[variant])
        accuracy = min(exam["accuracy_gain"] for exam in exams[variant])
        cells = [variant, *(f"{value:.2f}" for value in chosen), f"{np.mean(rejected):.1f}",
                 f"{reward:.3f}", f"{accuracy:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        cfg.steps //= 5
        cfg.eval_every //= 5
    folders = {variant: {} for variant in VARIANTS}
    exams = {variant: [] for variant in VARIANTS}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
        for variant, changes in VARIANTS.items():
            folder = out / variant.replace(",", "").replace(" ", "_")
            run(train_dpo, init=str(base / "sft"), out=str(folder), data=f"world:{seed}",
                seed=int(seed), steps=cfg.steps, eval_every=cfg.eval_every, **DPO | changes)
            folders[variant][seed] = folder
            exams[variant].append(examined(folder, int(seed), base))
    draw(folders, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(folders, exams, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
