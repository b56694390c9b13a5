"""
What do experts buy at the same price? A Mixture of Experts has more parameters than a dense model,
but a token visits so few of them that it costs as many FLOPs. Pretraining runs on the embedded
world that differ in the feed-forwards only:

  dense                       one of width F
  8 experts, 2 per token      each of width F / 2: as many FLOPs, 4 times the parameters
  32 experts, 2 per token     16 times
  8 experts, no balance       without the balance loss (002): do all experts get work?
  dense, 4 F                  as many parameters as the 8 experts, of which a token costs all: made
                              as a single expert, whose gate is 1

    python experiments/experts.py              # half an hour on one core; results/experts.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_pretrain
from model import active_parameter_count, load_model, parameter_count
from plumbing.curves import read_metrics
from plumbing.options import command_line

F = 352                                                # of the default width
VARIANTS = {"dense": {}, "8 experts, 2 per token": {"n_experts": 8},
            "32 experts, 2 per token": {"n_experts": 32},
            "8 experts, no balance": {"n_experts": 8, "balance": "none"},
            "dense, 4 F": {"n_experts": 1, "top_k": 1, "d_expert": 4 * F, "balance": "none"}}


@dataclass
class Config:
    steps: int = 800                  # optimizer steps of each run
    out: str = "out/experts"          # folder for the models
    figure: str = "results/experts.png"   # the picture


def draw(folders: dict[str, Path], labels: dict[str, str], file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, folder in folders.items():
        rows = read_metrics(folder)
        measured = [row for row in rows if "val_loss" in row]
        line, = left.plot([row["step"] + 1 for row in measured],
                          [row["val_loss"] for row in measured], marker="o", label=labels[name])
        if rows[-1].get("busiest_expert", 1) > 1:
            right.plot([row["step"] + 1 for row in rows], [row["busiest_expert"] for row in rows],
                       label=name, color=line.get_color())
    left.set(title="at the same FLOPs a token, but for 4 F", xlabel="step",
             ylabel="validation loss (nats per token)", ylim=(0.8, 2))
    right.axhline(1, color="gray", ls=":", label="even")
    right.set(title="the busiest expert of any block", xlabel="step",
              ylabel="its tokens, over an even share", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(cfg: Config) -> None:
    folders = {name: Path(cfg.out) / name.replace(",", "").replace(" ", "_") for name in VARIANTS}
    labels = {}
    for name, change in VARIANTS.items():
        result = train_pretrain.main(train_pretrain.Config(
            out=str(folders[name]), steps=cfg.steps, eval_every=cfg.steps // 10, save_every=0,
            overwrite=True, **change))
        model, _ = load_model(folders[name])
        labels[name] = f"{name}: {result['val_loss']:.3f}"
        print(f"{name:24s} {parameter_count(model) / 1e6:5.2f}M parameters, "
              f"{active_parameter_count(model) / 1e6:.2f}M at work on a token, "
              f"validation loss {result['val_loss']:.3f} nats per token, "
              f"{result['minutes']:.1f} minutes", flush=True)
    draw(folders, labels, Path(cfg.figure))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
