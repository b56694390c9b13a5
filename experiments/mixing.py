"""
Two corpora, one of them small: what do their shares and their order in training decide? The
embedded world speaks English without end, and Bearish, of which only 600 short texts exist.

  together    p_i ~ n_i^alpha (004): at alpha 1 the model hardly meets Bearish, at 0 it reads it
              over and over and English half as often
  later       an English model goes on with Bearish (continued pretraining, 003): warmed up again to
              the same learning rate or to a quarter of it, with or without a share of English to
              replay. What it learns, and what it forgets
  at the end  annealing (003): a tenth of all text is Bearish, either all along or as half of the
              last fifth, while the learning rate falls to 0

    python experiments/mixing.py               # 15 minutes on two cores; results/mixing.png
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_pretrain
import training

ALPHAS = 1.0, 0.5, 0.3, 0.0
LATER = {"same rate, no replay": (1.0, "1,0"), "a quarter, no replay": (0.25, "1,0"),
         "same rate, 20 % replay": (1.0, "0.8,0.2"), "a quarter, 20 % replay": (0.25, "0.8,0.2")}
AT_THE_END = {"a tenth, all along": {"shares": "0.9,0.1"},
              "half of the last fifth": {"shares": "1,0", "anneal_data": "world,bearish",
                                         "alpha": 0.0}}
LR = train_pretrain.Config.lr


@dataclass
class Config:
    steps: int = 600                  # of each run on both corpora
    out: str = "out/mixing"           # folder for the models
    figure: str = "results/mixing.png"   # the picture


def train(out: Path, **options) -> dict:
    """A run from scratch, in place of any before."""
    cfg = train_pretrain.Config(out=str(out), save_every=0, overwrite=True, **options)
    result = train_pretrain.main(cfg)
    print(f"{out.name:24s} English {result['val_loss/world']:.3f}, Bearish "
          f"{result['val_loss/bearish']:.3f} nats per token", flush=True)
    return result


def draw(together: dict[float, dict], later: dict[str, list[dict]],
         at_the_end: dict[str, list[dict]], file: Path) -> None:
    figure, (left, right, last) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, label in (("world", "English (5.3M tokens)"), ("bearish", "Bearish (small)")):
        left.plot(list(together), [found[f"val_loss/{name}"] for found in together.values()],
                  marker="o", label=label)
    left.set(title="together: shares n^alpha", xlabel="alpha", ylabel="validation loss (nats per "
             "token)")
    left.invert_xaxis()
    for name, rows in later.items():
        points = [(row["val_loss/bearish"], row["val_loss/world"]) for row in rows
                  if "val_loss/world" in row]
        right.plot(*zip(*points), marker=".", label=name)
    right.set(title="later: what is learned and what is forgotten",
              xlabel="Bearish, nats per token (training goes to the left)",
              ylabel="English, nats per token")
    for color, (name, rows) in zip(("C0", "C1"), at_the_end.items()):
        measured = [row for row in rows if "val_loss/world" in row]
        for corpus, label, style in (("bearish", f"Bearish, {name}", "-"),
                                     ("world", f"English, {name}", "--")):
            last.plot([row["step"] + 1 for row in measured],
                      [row[f"val_loss/{corpus}"] for row in measured], style, color=color,
                      label=label)
    last.set(title="at the end: a tenth Bearish, now or last", xlabel="step",
             ylabel="validation loss (nats per token)", yscale="log")
    for axis in (left, right, last):
        axis.grid(alpha=0.3)
        axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(cfg: Config) -> None:
    out, steps = Path(cfg.out), cfg.steps
    together = {alpha: train(out / f"alpha_{alpha}", data="world,bearish", alpha=alpha, steps=steps)
                for alpha in ALPHAS}
    train(out / "english", data="world,bearish", shares="1,0", steps=steps)
    later = {}
    for name, (rate, shares) in LATER.items():
        folder = out / name.replace(" ", "_").replace(",", "").replace("%", "percent")
        train(folder, init=str(out / "english"), data="bearish,world", shares=shares,
              lr=rate * LR, steps=steps // 3, eval_every=steps // 24)
        later[name] = training.read_metrics(folder)
    at_the_end = {}
    for name, options in AT_THE_END.items():
        folder = out / name.replace(" ", "_").replace(",", "")
        train(folder, data="world,bearish", schedule="wsd", decay=0.2, steps=steps,
              eval_every=steps // 30, **options)
        at_the_end[name] = training.read_metrics(folder)
    draw(together, later, at_the_end, Path(cfg.figure))


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
