"""
Two corpora, one of them small: what do their shares and their order in training decide? The
embedded world speaks English without end, and Bearish, of which only 600 short texts exist.

  together    p_i ~ n_i^alpha (004): at alpha 1 the model hardly meets Bearish, at 0 it reads it
              over and over and English half as often
  later       an English model goes on with Bearish (continued pretraining, 003): warmed up again to
              the same learning rate or to a quarter of it, with or without a share of English to
              replay. What it learns, and what it forgets
  at the end  annealing (003): a tenth of all text is of a kind of its own, either all along or as
              half of the last fifth, while the learning rate falls to 0. Once it is Bearish among
              English; once it is clean English among English of which every fourth word is wrong

    python experiments/mixing.py               # half an hour on one core; results/mixing.png
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_pretrain
from world.world import World
from plumbing.curves import read_metrics
from plumbing.options import command_line

ALPHAS = 1.0, 0.5, 0.3, 0.0
LATER = {"same rate, no replay": (1.0, "1,0"), "a quarter, no replay": (0.25, "1,0"),
         "same rate, 20 % replay": (1.0, "0.8,0.2"), "a quarter, 20 % replay": (0.25, "0.8,0.2")}
LR = train_pretrain.Config.lr


@dataclass
class Config:
    steps: int = 600                  # of each run on both corpora
    out: str = "out/mixing"           # folder for the models
    figure: str = "results/mixing.png"   # the picture


def train(out: Path, data: str, **options) -> dict:
    """A run from scratch, in place of any before."""
    cfg = train_pretrain.Config(out=str(out), data=data, save_every=0, overwrite=True, **options)
    result = train_pretrain.main(cfg)
    losses = ", ".join(f"{Path(name).stem} {result[f'val_loss/{name}']:.3f}"
                       for name in data.split(","))
    print(f"{out.name:28s} {losses} nats per token", flush=True)
    return result


def wrong_and_clean(out: Path, n_bytes: int = 6_000_000) -> str:
    """English of which every fourth word is another one of its text, and a tenth as much that is
    clean, as --data."""
    rng, documents, files = Random(0), World().documents(), []
    for name, size in (("wrong", n_bytes), ("clean", n_bytes // 10)):
        rows = []
        while size > 0:
            words = next(documents).split(" ")
            if name == "wrong":
                words = [rng.choice(words) if rng.random() < 0.25 else word for word in words]
            rows.append(json.dumps({"text": " ".join(words)}) + "\n")
            size -= len(rows[-1])
        files.append(out / f"{name}.jsonl")
        files[-1].write_text("".join(rows))
    return ",".join(map(str, files))


def draw(together: dict[float, dict], later: dict[str, list[dict]],
         at_the_end: dict[str, list[tuple]], file: Path) -> None:
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
    for i, (name, points) in enumerate(at_the_end.items()):
        last.plot(*zip(*points), "-" if "along" in name else "--", color=f"C{i // 2}",
                  label=f"{name}: {points[-1][1]:.2f}")
    last.set(title="at the end: what is learned of a tenth", xlabel="step", ylim=(1, 4),
             ylabel="validation loss (nats per token)")
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
        later[name] = read_metrics(folder)
    at_the_end = {}
    for name, both in (("Bearish", "world,bearish"), ("clean", wrong_and_clean(out))):
        for when, options in (("all along", {"shares": "0.9,0.1"}),
                              ("at the end", {"shares": "1,0", "anneal_data": both, "alpha": 0.0})):
            folder = out / f"{name}_{when}".replace(" ", "_")
            train(folder, data=both, schedule="wsd", decay=0.2, steps=steps,
                  eval_every=steps // 30, **options)
            tenth = f"val_loss/{both.split(',')[1]}"
            at_the_end[f"{name}, {when}"] = [
                (row["step"] + 1, row[tenth]) for row in read_metrics(folder)
                if tenth in row]
    draw(together, later, at_the_end, Path(cfg.figure))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
