"""
What lets a model of a million parameters look back after a million and a half tokens? Four
pretraining runs on the embedded world that differ in one thing each:

  all three            Muon, token shift and copying first: the defaults of train_pretrain.py
  AdamW                instead of Muon
  no token shift       a token does not see its predecessor's embedding
  no copying first     text from the first step

    python experiments/copy_first.py           # 5 minutes on two cores; results/copy_first.png

Left: validation loss. Right: nats per word that is said again, 6 to 14 words after it was said
first, in held-out lines of the world's echo game; guessing among all its words costs about 5.
"""
import argparse
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import data
import train_pretrain
import training
from model import load_model, token_logps
from world import CATEGORY_WORDS, COLOURS, THINGS, World

VARIANTS = {"all three": {}, "AdamW": {"optimizer": "adamw"},
            "no token shift": {"token_shift": False}, "no copying first": {"copy_steps": 0}}


def echo_loss(folder: Path, n: int = 200) -> float:
    """Nats per repeated word of n echoes "Fern said: kite pear. Moss said: kite pear."."""
    model, tokenizer = load_model(folder)
    rng, prompts, echoes = Random("echo"), [], []
    for _ in range(n):
        a, b = rng.sample(World().names, 2)
        words = " " + " ".join(rng.sample(CATEGORY_WORDS + THINGS + COLOURS, rng.randint(6, 14)))
        prompts.append(tokenizer.encode(f"{a} said:{words}. {b} said:"))
        echoes.append(tokenizer.encode(words))
    batch = data.response_batch(prompts, echoes, tokenizer.pad)
    words = sum(tokenizer.decode(echo).count(" ") for echo in echoes)
    return -token_logps(model, batch).sum().item() / words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each run")
    parser.add_argument("--out", default="out/copy_first", help="folder for the four models")
    parser.add_argument("--figure", default="results/copy_first.png")
    args = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    echoes = {}
    for name, change in VARIANTS.items():
        out = Path(args.out) / name.replace(" ", "_")
        result = train_pretrain.main(train_pretrain.Config(
            out=str(out), steps=args.steps, eval_every=args.steps // 10, overwrite=True, **change))
        rows = [row for row in training.read_metrics(out) if "val_loss" in row]
        left.plot([row["step"] + 1 for row in rows], [row["val_loss"] for row in rows], label=name)
        echoes[name] = echo_loss(out)
        print(f"{name:18s} validation loss {result['val_loss']:.3f} nats per token, echo "
              f"{echoes[name]:.2f} nats per word, {result['minutes']:.1f} minutes", flush=True)
    left.set(title="pretraining", xlabel="step", ylabel="validation loss (nats per token)",
             ylim=(0.7, 3))
    left.legend()
    bars = right.barh(list(echoes), list(echoes.values()), color=[f"C{i}" for i in range(4)])
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.invert_yaxis()
    right.set(title="a word said again", xlabel="nats per word")
    right.margins(x=0.15)
    Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=110)


if __name__ == "__main__":
    main()
