"""
What LoRA's rank buys: a manner and new knowledge at r = 1 to 64; how many directions full
fine-tuning really uses.

The claims of the documents: the change of a weight matrix in fine-tuning lies in a subspace of low
rank (001 section 2.4.1); a style or format needs r = 4 to 16, new knowledge gains by more (003).
For each seed:

  (a) the SFT model learns, by LoRA on all matrices at constant alpha / r = 2,
        a manner      every answer is set between "Dear friend: " and " Yours, the bear."
        knowledge     facts about the residents of another world; held out are questions that
                      were not asked in these words
      at r = 1, 4, 16, 64, and by full fine-tuning
  (b) from Delta W = W_SFT - W_base of each matrix: its singular values, and the accuracy of the SFT
      model whose matrices are W_base + the best part of rank r of Delta W (all else stays SFT's)

What came out (three seeds): knowledge gains with every rank, .298 nats at r = 1 to .179 at 64,
where it meets full fine-tuning's .182. A manner has most of what LoRA gives it at r = 4 (.233 to
.195; .181 at 64), and full fine-tuning still does better (.148). And the change from a base to an
SFT model is of no low rank here: its singular values fall slowly; of each matrix rank 16 answers
8 % right, 64 answers 85, and 128, which is all of it, 96. It has learned more than one task.

    python experiments/lora_rank.py            # results/lora_rank.png and .md
    python experiments/lora_rank.py --quick    # one seed, two ranks, a tenth of the steps
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import evaluate
import lora
import readers
import train_sft
from experiments.base import (
    base_models,
    cell,
    fast_dtype,
    kept,
    run,
    save,
    seed_folder,
    show_table,
    write_rows,
)
from plumbing.curves import read_metrics
from plumbing.device import pick_device
from plumbing.folders import load_model, read_record
from plumbing.options import command_line

ALL = "wq,wk,wv,wo,w13,w2"
RANKS = (1, 4, 16, 64)
SFT = {"batch_size": 8, "steps": 300, "optimizer": "adamw", "eval_every": 300}
LORA_RATE = 2e-3
FULL_RATE = 1e-3
TASKS = ("manner", "knowledge")
KEPT_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)     # of Delta W


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/lora_rank"        # folder for the models and their data
    figure: str = "results/lora_rank.png"         # the picture; the table beside it, as .md
    quick: bool = False               # one seed, two ranks, a tenth of the steps, marked


# ---------------------------------------------------------------------- (a) what is learned

def write_data(seed: int, out: Path, n: int = 3000) -> dict[str, Path]:
    """{task: a file of prompts and responses}."""
    rows = {"manner": []}
    for row in readers.read_examples(f"world:{seed}", split="train", n=n, seed=seed):
        *prompt, answer = row["messages"]
        text = f"Dear friend: {answer['content']} Yours, the bear."
        rows["manner"].append(row | {"messages": [*prompt, answer | {"content": text}]})
    # another world has the same names and places, and other facts about them
    rows["knowledge"] = readers.read_examples(f"world:{seed + 100}", split="train", n=n,
                                              seed=seed, families=("facts",))
    return {task: write_rows(out / f"{task}.jsonl", of_task) for task, of_task in rows.items()}


def learned(task: str, rank: int, seed: int, base: Path, out: Path, file: Path,
            quick: bool) -> float:
    """Nats per held-out response token after training; rank 0: full fine-tuning."""
    options = SFT | {"data": str(file), "seed": seed, "lr": FULL_RATE}
    if rank:
        options |= {"peft": "lora", "lora_rank": rank, "lora_alpha": 2.0 * rank,
                    "lora_targets": ALL, "lr": LORA_RATE}
    if quick:
        options |= {"steps": SFT["steps"] // 10}
    folder = out / f"{task}_{rank}"
    run(train_sft, init=str(base / "sft"), out=str(folder), **options)
    return read_metrics(folder)[-1]["val_loss"]


# ---------------------------------------------------------------------- (b) what full tuning does

def best_part(change: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank: the largest singular values (Eckart and Young 1936)."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def spectra(base: Path) -> dict[str, list[float]]:
    """{kind of matrix: its singular values over the largest, the mean over layers}."""
    before, _ = load_model(base / "pretrain")
    after, _ = load_model(base / "sft")
    found = {}
    pairs = zip(lora.linears(before.blocks), lora.linears(after.blocks))
    for (_, name, old), (_, _, new) in pairs:
        values = torch.linalg.svdvals((new.weight - old.weight).detach())
        found.setdefault(name, []).append(values / values[0])
    return {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}


@torch.no_grad()
def truncated_accuracy(base: Path, seed: int, rank: int, n: int) -> dict:
    """Accuracy on n unseen tasks of the SFT model with this rank of each Delta W."""
    device = pick_device("auto")
    before, _ = load_model(base / "pretrain", device)
    model, tokenizer = load_model(base / "sft", device, fast_dtype())
    pairs = zip(lora.linears(before.blocks), lora.linears(model.blocks))
    for (_, _, old), (_, _, new) in pairs:
        change = best_part(new.weight - old.weight, rank)
        new.weight.copy_(old.weight + change)
    return evaluate.quiz_accuracy(model, tokenizer,
                                  {"accuracy": evaluate.exam(f"world:{seed}", n)})


# ---------------------------------------------------------------------- what is shown

def draw(losses: dict[str, dict[int, list[float]]], values: dict[str, list[float]],
         accuracies: dict[int, list[float]], file: Path, mark: str) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, (task, of_ranks) in enumerate(losses.items()):
        ranks = [rank for rank in of_ranks if rank]
        means = [float(np.mean(of_ranks[rank])) for rank in ranks]
        left.plot(ranks, means, marker="o", color=f"C{number}", label=task)
        left.axhline(float(np.mean(of_ranks[0])), color=f"C{number}", linestyle=":")
    left.set(title=f"LoRA; full fine-tuning dotted{mark}", xlabel="rank r", xscale="log",
             ylabel="nats per held-out response token")
    left.legend()
    for name, of_name in values.items():
        middle.plot(range(1, len(of_name) + 1), of_name, label=name)
    middle.set(title="Singular values of full fine-tuning's change", xlabel="number",
               ylabel="over the largest", xscale="log")
    middle.legend()
    right.plot(list(accuracies), [float(np.mean(a)) for a in accuracies.values()], marker="o")
    right.set(title="With the best part of rank r of each change", xlabel="rank r", xscale="log",
              ylabel="accuracy, unseen tasks", ylim=(0, 1))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    save(figure, file)


def table(losses: dict[str, dict[int, list[float]]], accuracies: dict[int, list[float]],
          cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# LoRA's rank{mark}", "",
             f"`python experiments/lora_rank.py`, seeds {cfg.seeds}: the mean, and from the lowest "
             "to the highest. Nats per held-out response token:", "",
             "| | " + " | ".join(f"r = {rank}" if rank else "full" for rank in losses["manner"])
             + " |", "|---" * (len(losses["manner"]) + 1) + "|"]
    for task, of_ranks in losses.items():
        cells = [cell(values, ".3f") for values in of_ranks.values()]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    lines += ["", "Accuracy of the SFT model with the best part of rank r of each matrix's change:",
              "", f"| {' | '.join(f'r = {rank}' for rank in accuracies)} |",
              "|---" * len(accuracies) + "|",
              f"| {' | '.join(cell(values, '.1%') for values in accuracies.values())} |"]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    ranks = (0, *RANKS)
    kept_ranks = KEPT_RANKS
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        ranks = (0, 1, 16)
        kept_ranks = (1, 16, 128)
    seeds = [int(seed) for seed in cfg.seeds.split(",")]
    n = 100 if cfg.quick else 500
    losses = {task: {rank: [] for rank in ranks} for task in TASKS}
    accuracies = {rank: [] for rank in kept_ranks}
    bases = {seed: base_models(seed) for seed in seeds}
    for seed, base in bases.items():
        out = seed_folder(cfg, seed)
        for task, file in write_data(seed, out).items():
            for rank in ranks:
                loss = learned(task, rank, seed, base, out, file, cfg.quick)
                losses[task][rank].append(loss)
        of = {"models": [read_record(base / name)["sha256"] for name in ("pretrain", "sft")],
              "n": n}
        for rank in kept_ranks:
            exam = partial(truncated_accuracy, base, seed, rank, n)
            found = kept(out / f"rank_{rank}.json", of, exam)
            accuracies[rank].append(found["accuracy"])
    values = spectra(bases[seeds[0]])
    draw(losses, values, accuracies, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(losses, accuracies, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
