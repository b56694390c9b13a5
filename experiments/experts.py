"""
What do experts buy at the same price?

The sentence of the documents: "a MoE model should achieve the same quality as its dense counterpart
much faster during pretraining" (002). A Mixture of Experts has more parameters than a dense model,
but a token visits so few of them that it costs as many FLOPs. Pretraining runs on the embedded
world that differ in the feed-forwards only:

  dense                       one of width F
  8 experts, 2 per token      each of width F / 2: as many FLOPs, 4 times the parameters
  32 experts, 2 per token     16 times
  8 experts, no balance       without the balance loss (002): do all experts get work?
  dense, 4 F                  as many parameters as the 8 experts, of which a token costs all: made
                              as a single expert, whose gate is 1

    python experiments/experts.py              # half an hour on one core; results/experts.png

What came out, in nats per token after 800 steps (AMD EPYC with AVX512-BF16, seed 0): dense 0.955; 8
experts 0.876, 32 experts 0.847; four times the dense width, at 2.3 times the FLOPs, 0.891. Without
the balance loss one expert in a block does nearly three times its share, and 8 end at 0.891.

All runs have Muon, token shift and 250 steps of copying (copy_first.py).

More to try, each with the FLOPs of the dense model unless --d_expert sets another width:

    python train_pretrain.py --n_experts 8 --top_k 2 --out out/moe
    python train_pretrain.py --n_experts 8 --top_k 2 --balance bias ...    # balanced without a loss
    python train_pretrain.py --n_experts 16 --top_k 1 --n_shared_experts 1 ...
    python train_pretrain.py --n_experts 8 --capacity_factor 1.25 ...   # full experts drop tokens
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_pretrain
from model import active_parameter_count, parameter_count
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from plumbing.options import build, command_line

F = 352                                                # of the default width
DENSE = {"optimizer": "muon", "token_shift": True, "copy_steps": 250, "lr": 4e-3, "n_experts": 0}
EIGHT = DENSE | {"n_experts": 8, "top_k": 2, "balance": "loss"}
VARIANTS = {
    "dense": DENSE,
    "8 experts, 2 per token": EIGHT,
    "32 experts, 2 per token": EIGHT | {"n_experts": 32},
    "8 experts, no balance": EIGHT | {"balance": "none"},
    "dense, 4 F": DENSE | {"n_experts": 1, "top_k": 1, "d_expert": 4 * F, "balance": "none"},
}


@dataclass
class Config:
    steps: int = 800                  # optimizer steps of each run
    out: str = "out/experts"          # folder for the models
    figure: str = "results/experts.png"   # the picture


def draw(folders: dict[str, Path], labels: dict[str, str], file: Path) -> None:
    """Validation loss of each run, and how much more than its share the busiest expert does."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, folder in folders.items():
        rows = read_metrics(folder)
        validated = [row for row in rows if "val_loss" in row]
        steps = [row["step"] + 1 for row in validated]     # + 1: the loss after the step
        losses = [row["val_loss"] for row in validated]
        [line] = left.plot(steps, losses, marker="o", label=labels[name])
        # A single expert is left out, because it always does exactly its share.
        if rows[-1].get("busiest_expert", 1) > 1:
            steps = [row["step"] + 1 for row in rows]
            shares = [row["busiest_expert"] for row in rows]
            right.plot(steps, shares, label=name, color=line.get_color())
    # Up to 2 nats only, because the first losses would press the ends together.
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
    folders = {}
    labels = {}
    for name, variant in VARIANTS.items():
        folder = Path(cfg.out) / name.replace(",", "").replace(" ", "_")
        folders[name] = folder
        # No checkpoints, because a run of minutes is quicker begun again.
        options = {"out": str(folder), "steps": cfg.steps, "eval_every": cfg.steps // 10,
                   "save_every": 0, "overwrite": True}
        config = build(train_pretrain.Config, options | variant)
        result = train_pretrain.main(config)
        loss = result["val_loss"]
        labels[name] = f"{name}: {loss:.3f}"
        model, _ = load_model(folder)                      # to count its parameters
        millions = parameter_count(model) / 1e6
        active_millions = active_parameter_count(model) / 1e6
        print(f"{name:24s} {millions:5.2f}M parameters, "
              f"{active_millions:.2f}M at work on a token, "
              f"validation loss {loss:.3f} nats per token, "
              f"{result['minutes']:.1f} minutes", flush=True)
    draw(folders, labels, Path(cfg.figure))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
