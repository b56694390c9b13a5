"""
Two corpora, one of them small: what do their shares and their order in training decide? The
embedded world speaks English without end, and Bearish, of which only 600 short texts exist.

  together    004: q_i = p_i^alpha / sum_j p_j^alpha, "setting alpha = 0.3 upweights lower-resource
              languages": at alpha 1 the model hardly meets Bearish, at 0 it reads it over and over
              and English half as often
  later       003: continued pretraining, "mixing in a slice of the original distribution, e.g.
              5-30 % replay", with "a peak LR well below the original". An English model goes on
              with Bearish: warmed up again to the same learning rate or to a quarter of it, with
              or without a share of English to replay. What it learns, and what it forgets
  at the end  003: "a high-quality 'annealing' phase late in training": a tenth of all text is of a
              kind of its own, either all along or as half of the last fifth, while the learning
              rate falls to 0. Once it is Bearish among English; once it is clean English among
              English of which every fourth word is wrong

    python experiments/mixing.py               # half an hour on one core; results/mixing.png

What came out, in nats per token after 600 steps (AMD EPYC with AVX512-BF16, seed 0):

  together    Bearish goes from 2.25 at alpha 1 to 1.48 at 0.3, which costs English 0.04; at alpha 0
              it is read over and over and overfits (2.38)
  later       Bearish without replay costs English nearly all it had (1.06 -> 11.3; at a quarter of
              the learning rate 3.4); with 20 % replay and a quarter of the rate little (1.13)
  at the end  clean text spread over the run ends at 1.38, kept for the decay of the learning rate
              at 1.26. A new language should not be kept: Bearish spread ends at 1.49, kept for the
              end at 1.78

All runs have Muon and token shift, and those from scratch 250 steps of copying, at most a sixth of
the run (copy_first.py). The same with data of one's own:

    python train_pretrain.py --data world,bearish --alpha 0.3 --out out/mixed
    python train_pretrain.py --schedule wsd --decay 0.2 --anneal_data best.jsonl ...
    python train_pretrain.py --init out/pretrain --data new.jsonl,world --shares 0.8,0.2 --lr 1e-3

With --new_words 300 the last one also extends the vocabulary by words of the new corpus, whose
embeddings start from those of their pieces.
"""
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_pretrain
from plumbing.curves import read_metrics
from plumbing.options import build, command_line
from world.world import World

LR = 4e-3
TRAINING = {"optimizer": "muon", "token_shift": True, "copy_steps": 250, "lr": LR}
ALPHAS = 1.0, 0.5, 0.3, 0.0
# name: (share of the first run's learning rate, shares of Bearish and English)
LATER = {"same rate, no replay": (1.0, "1,0"), "a quarter, no replay": (0.25, "1,0"),
         "same rate, 20 % replay": (1.0, "0.8,0.2"), "a quarter, 20 % replay": (0.25, "0.8,0.2")}
# Both read a tenth of the second corpus: 0.1 of the run, or half of the last fifth (alpha 0).
WHEN = {"all along": {"shares": "0.9,0.1"}, "at the end": {"shares": "1,0", "alpha": 0.0}}


@dataclass
class Config:
    steps: int = 600                  # of each run on both corpora
    out: str = "out/mixing"           # folder for the models
    figure: str = "results/mixing.png"   # the picture


# ---------------------------------------------------------------------- the runs

def train(out: Path, data: str, **options) -> dict:
    """A run, in place of any before; from scratch unless `options` have init."""
    common = {"out": str(out), "data": data, "save_every": 0, "overwrite": True}
    cfg = build(train_pretrain.Config, TRAINING | common | options)
    result = train_pretrain.main(cfg)
    losses = []
    for name in data.split(","):
        loss = result[f"val_loss/{name}"]
        losses.append(f"{Path(name).stem} {loss:.3f}")
    print(f"{out.name:28s} {', '.join(losses)} nats per token", flush=True)
    return result


def train_together(out: Path, steps: int) -> dict[float, dict]:
    """The result of a run for each alpha."""
    results = {}                                           # by alpha, from large to small
    for alpha in ALPHAS:
        folder = out / f"alpha_{alpha}"
        results[alpha] = train(folder, data="world,bearish", alpha=alpha, steps=steps)
    return results


def train_later(out: Path, steps: int) -> dict[str, list[dict]]:
    """metrics.jsonl of an English model that goes on with Bearish, for each way of LATER."""
    english = out / "english"
    # Bearish with share 0: not read, but part of the vocabulary, and measured.
    train(english, data="world,bearish", shares="1,0", steps=steps)
    metrics = {}
    for name, (share_of_lr, shares) in LATER.items():
        folder = out / name.replace(" ", "_").replace(",", "").replace("%", "percent")
        train(folder, init=str(english), data="bearish,world", shares=shares,
              lr=share_of_lr * LR, steps=steps // 3, eval_every=steps // 24)
        # The curve and not the end alone, because forgetting comes before learning.
        metrics[name] = read_metrics(folder)
    return metrics


def train_at_the_end(out: Path, steps: int) -> dict[str, list[tuple[int, float]]]:
    """(step, validation loss on the tenth) of each run: of Bearish, and of clean English."""
    curves = {}
    for name, both in (("Bearish", "world,bearish"), ("clean", wrong_and_clean(out))):
        tenth = both.split(",")[1]                         # the corpus of which a tenth is read
        for when, options in WHEN.items():
            folder = out / f"{name}_{when}".replace(" ", "_")
            if when == "at the end":
                options = options | {"anneal_data": both}
            # The same schedule for both, so that only the order of the text differs.
            train(folder, data=both, schedule="wsd", decay=0.2, steps=steps,
                  eval_every=steps // 30, **options)
            points = []                                    # not every step is validated
            for row in read_metrics(folder):
                if f"val_loss/{tenth}" in row:
                    points.append((row["step"] + 1, row[f"val_loss/{tenth}"]))
            curves[f"{name}, {when}"] = points
    return curves


# ---------------------------------------------------------------------- text with wrong words

def wrong_and_clean(out: Path, n_bytes: int = 6_000_000) -> str:
    """English of which every fourth word is another one of its text, and a tenth as much that is
    clean, as --data."""
    rng = Random(0)
    # One stream of documents for both files, so that the clean ones are other documents.
    documents = World().documents()
    wrong = out / "wrong.jsonl"
    wrong.write_text("".join(text_rows(documents, n_bytes, rng)))
    clean = out / "clean.jsonl"
    clean.write_text("".join(text_rows(documents, n_bytes // 10)))
    return f"{wrong},{clean}"


def text_rows(documents: Iterator[str], n_bytes: int, rng: Random | None = None) -> list[str]:
    """n_bytes of JSONL, made of the next documents; with rng, every fourth word is replaced."""
    rows = []
    bytes_left = n_bytes
    while bytes_left > 0:
        words = next(documents).split(" ")
        if rng is not None:
            words = with_wrong_words(words, rng)
        row = json.dumps({"text": " ".join(words)}) + "\n"
        rows.append(row)
        bytes_left -= len(row)                             # json writes ASCII: a byte a character
    return rows


def with_wrong_words(words: list[str], rng: Random) -> list[str]:
    wrong = []
    for word in words:
        if rng.random() < 0.25:
            word = rng.choice(words)                       # of the same text, so that none is rare
        wrong.append(word)
    return wrong


# ---------------------------------------------------------------------- the picture

def draw(together: dict[float, dict], later: dict[str, list[dict]],
         at_the_end: dict[str, list[tuple]], file: Path) -> None:
    """One panel each; the arguments are what the train_* functions return."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    draw_together(left, together)
    draw_later(middle, later)
    draw_at_the_end(right, at_the_end)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def draw_together(axis, together: dict[float, dict]) -> None:
    alphas = list(together)
    for name, label in (("world", "English (5.3M tokens)"), ("bearish", "Bearish (small)")):
        losses = [result[f"val_loss/{name}"] for result in together.values()]
        axis.plot(alphas, losses, marker="o", label=label)
    axis.set(title="together: shares n^alpha", xlabel="alpha",
             ylabel="validation loss (nats per token)")
    axis.invert_xaxis()                                    # the small corpus grows to the right


def draw_later(axis, later: dict[str, list[dict]]) -> None:
    for name, rows in later.items():
        # English against Bearish, because a way is good that stays low and goes left.
        validated = [row for row in rows if "val_loss/world" in row]
        bearish = [row["val_loss/bearish"] for row in validated]
        english = [row["val_loss/world"] for row in validated]
        axis.plot(bearish, english, marker=".", label=name)
    axis.set(title="later: what is learned and what is forgotten",
             xlabel="Bearish, nats per token (training goes to the left)",
             ylabel="English, nats per token")


def draw_at_the_end(axis, at_the_end: dict[str, list[tuple]]) -> None:
    for i, (name, points) in enumerate(at_the_end.items()):
        steps = [step for step, _ in points]
        losses = [loss for _, loss in points]
        # Two curves a corpus, one solid and one dashed, share a colour.
        style = "-" if "along" in name else "--"
        axis.plot(steps, losses, style, color=f"C{i // 2}", label=f"{name}: {losses[-1]:.2f}")
    axis.set(title="at the end: what is learned of a tenth", xlabel="step", ylim=(1, 4),
             ylabel="validation loss (nats per token)")


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    together = train_together(out, cfg.steps)
    later = train_later(out, cfg.steps)
    at_the_end = train_at_the_end(out, cfg.steps)
    draw(together, later, at_the_end, Path(cfg.figure))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
