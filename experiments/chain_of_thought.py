"""
Reasoning before the answer: sums of two steps, learned with chains, without, and mixed.

The sentences of the documents (001 section 3.6): instruction tuning "is significantly enhanced by
including Chain-of-Thought (CoT) exemplars"; "both direct-answer and CoT variants", "with a mixing
ratio of approximately 50:50". The base model of a seed learns the world's arithmetic, "7 + 5 - 3"
and stories of such sums, with --cot_ratio 0, 0.25, 0.5, 0.75 and 1 of the chains before the
answers ("7 + 5 = 12. 12 - 3 = 9."). The answer alone is compared.

What came out (three seeds): 49 % right without chains, 99 % with, at least 45 points more in each.
A quarter of chains is worse than none, and half is no good mixture where no question says which
answer is wanted: in an earlier world, at .25 and .5 12 and 44 % of the answers came with a chain,
of which 96 to 98 % were right; of the others, which fewer examples had taught than at 0, 15 % (200
sums of seed 0, looked at apart).

    python experiments/chain_of_thought.py            # results/chain_of_thought.png and .md
    python experiments/chain_of_thought.py --quick    # one seed, three ratios, a tenth of the steps
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import readers
from experiments.base import (
    base_models,
    cell,
    save,
    seed_folder,
    show_table,
    tuned,
    write_rows,
)
from plumbing.options import command_line

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
FAMILY = "arithmetic"
SFT = {"steps": 300, "batch_size": 8, "eval_every": 300}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/chain_of_thought"             # folder for the models and their data
    figure: str = "results/chain_of_thought.png"  # the picture; the table beside it, as .md
    quick: bool = False               # one seed, three ratios, a tenth of the steps, marked


def write_data(seed: int, file: Path) -> Path:
    """Sums of the world's training split, of which train_sft.py holds out a tenth; the exam has
    sums of the other split."""
    rows = readers.read_examples(f"world:{seed}", split="train", n=5000, seed=seed,
                                 families=(FAMILY,))
    return write_rows(file, rows)


def draw(found: dict[float, list[float]], file: Path, mark: str) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for ratio, accuracies in found.items():
        axis.plot([ratio] * len(accuracies), accuracies, "o", color="C0")
    means = [float(np.mean(accuracies)) for accuracies in found.values()]
    axis.plot(list(found), means, color="C0")
    axis.set(title=f"Sums of two steps{mark}", xlabel="share of the examples with a chain",
             ylabel="accuracy, unseen sums", ylim=(0, 1))
    axis.grid(alpha=0.3)
    save(figure, file)


def table(found: dict[float, list[float]], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# Chains of thought{mark}", "",
             f"`python experiments/chain_of_thought.py`, seeds {cfg.seeds}: accuracy on unseen "
             "sums of two steps; the mean, and from the lowest to the highest.", "",
             "| share of chains | accuracy |", "|---|---|"]
    lines += [f"| {ratio:g} | {cell(values, '.1%')} |" for ratio, values in found.items()]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    ratios = RATIOS
    options = dict(SFT)
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        ratios = RATIOS[::2]
        options["steps"] = SFT["steps"] // 10
    seeds = [int(seed) for seed in cfg.seeds.split(",")]
    found = {ratio: [] for ratio in ratios}
    for seed in seeds:
        base = base_models(seed)
        out = seed_folder(cfg, seed)
        file = write_data(seed, out / "sums.jsonl")
        for ratio in ratios:
            exam = tuned(out / f"cot_{ratio}", seed, base, (FAMILY,), 100 if cfg.quick else 500,
                         data=str(file), cot_ratio=ratio, **options)
            found[ratio].append(exam["all"])
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
