"""
What does a model of a million parameters need, to learn much from a million and a half tokens? Four
pretraining runs on the embedded world that differ in one thing each:

  all three            Muon, token shift and copying first: the defaults of train_pretrain.py
  AdamW                instead of Muon
  no token shift       a token does not see its predecessor's embedding
  no copying first     text from the first step

    python experiments/copy_first.py           # 5 minutes on two cores; results/copy_first.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_pretrain
from plumbing.curves import read_metrics
from plumbing.options import command_line

VARIANTS = {"all three": {}, "AdamW": {"optimizer": "adamw"},
            "no token shift": {"token_shift": False}, "no copying first": {"copy_steps": 0}}


@dataclass
class Config:
    steps: int = 800                  # optimizer steps of each run
    out: str = "out/copy_first"       # folder for the four models
    figure: str = "results/copy_first.png"   # the picture


def draw(folders: dict[str, Path], file: Path) -> None:
    """Validation loss of each run against the step."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, folder in folders.items():
        rows = [row for row in read_metrics(folder) if "val_loss" in row]
        axis.plot([row["step"] + 1 for row in rows], [row["val_loss"] for row in rows],
                  marker="o", label=f"{name}: {rows[-1]['val_loss']:.3f}")
    axis.set(title="pretraining, with one thing left out", xlabel="step", ylim=(0.8, 3),
             ylabel="validation loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(cfg: Config) -> None:
    folders = {name: Path(cfg.out) / name.replace(" ", "_") for name in VARIANTS}
    for name, change in VARIANTS.items():
        result = train_pretrain.main(train_pretrain.Config(
            out=str(folders[name]), steps=cfg.steps, eval_every=cfg.steps // 10, overwrite=True,
            **change))
        print(f"{name:18s} validation loss {result['val_loss']:.3f} nats per token, "
              f"{result['minutes']:.1f} minutes", flush=True)
    draw(folders, Path(cfg.figure))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
