"""
Six ways to fine-tune a few numbers beside all of them: what each costs, reaches and forgets.

The table of the documents (001 section 2.4.5) gives trainable parameters, memory, inference
overhead and composability of full fine-tuning, LoRA, QLoRA, adapters and prefix tuning. Here it is
measured, with parallel adapters (004) and prompt tuning (003). Each method teaches the SFT model
of a seed the two families of tasks that it was never tuned on, in as many steps as the others, by
AdamW, at the best of three learning rates, which is chosen in each seed: of those within a point
of the most right answers to new tasks the one with the most to old tasks.

  trained     numbers that learn, of all: here, and of a Llama with 6.7 billion (computed)
  bytes       of what must be kept for each task: the adapter, or the model
  step        seconds of an update of 16 rows, over full fine-tuning's
  token       seconds of a generated token, over the base's (LoRA: merged)
  swap        seconds to put another task's adapter on the base
  new         right answers to unseen tasks of the two families
  old         to unseen tasks of the families that the SFT model was tuned on
  forgotten   nats per token more than the SFT model on the world's held-out documents, which have
              no virtual tokens: of prefix and prompt it is 0

What came out (three seeds): LoRA learns the new tasks as well as full fine-tuning, 98.9 and 98.8 %
of them (.1 points less at worst), QLoRA too; before, 90 % were right. Adapters lack 3 points.
Virtual tokens do harm here: behind a prompt 88 % are right, behind a prefix 76, in one seed 53. At
its best rate full fine-tuning forgets no more than LoRA: 81.0 and 81.2 % of the old tasks are left
of 95.0. At 1e-3 it keeps 43 to 64 %, LoRA at 1e-2 15 to 20. Virtual tokens leave the model as it
is, but behind them the old tasks suffer all the same, because they were trained on the new ones
alone. In an earlier world a base that had never seen a conversation had too much to learn for r =
16 (76.8 %, full 90.9, in 500 steps; 84.0 at r = 64, 87.9 by Muon in 1,500).

    python experiments/peft_comparison.py            # results/peft_comparison.png and .md
    python experiments/peft_comparison.py --quick    # one seed, one learning rate, a tenth of steps
"""
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

import evaluate
import lora
import sample
from experiments.base import (
    base_models,
    cell,
    documents,
    fast_dtype,
    kept,
    run_apart,
    save,
    seed_folder,
    show_table,
    write_families,
)
from model import ModelConfig, Transformer, parameter_count
from plumbing.curves import read_metrics
from plumbing.device import pick_device
from plumbing.folders import load_model, read_record
from plumbing.optimizers import adamw
from plumbing.options import command_line
from world.tasks import HELDOUT_FAMILIES

ALL = "wq,wk,wv,wo,w13,w2"
# {method: (its options, three learning rates)}
METHODS = {
    "full": ({}, (2.5e-4, 5e-4, 1e-3)),
    "LoRA": ({"peft": "lora", "lora_targets": ALL}, (1e-3, 3e-3, 1e-2)),
    "QLoRA": ({"peft": "qlora", "lora_targets": ALL}, (1e-3, 3e-3, 1e-2)),
    "adapter": ({"peft": "adapter"}, (3e-3, 1e-2, 3e-2)),
    "parallel adapter": ({"peft": "parallel_adapter"}, (3e-3, 1e-2, 3e-2)),
    "prefix": ({"peft": "prefix"}, (1e-2, 3e-2, 1e-1)),
    "prompt": ({"peft": "prompt"}, (1e-2, 3e-2, 1e-1)),
}
SFT = {"steps": 300, "batch_size": 8, "optimizer": "adamw", "eval_every": 300}
LLAMA_7B = ModelConfig(vocab_size=32_000, context_length=2048, d_model=4096, n_layers=32,
                       n_heads=32, n_kv_heads=32, d_ff=11_008, tied=False)
# What is chosen at that size; the other defaults are as here.
AT_7B = {"adapter": {"bottleneck": 256}, "parallel adapter": {"bottleneck": 256}}
# {column: (name of the figure, its format)}
COLUMNS = {"trained": ("share", ".2%"), "at 7B": ("share_7b", ".4%"), "bytes": ("bytes", ",.0f"),
           "MB": ("peak_mb", ",.0f"), "step": ("step", ".2f"), "token": ("token", ".2f"),
           "swap": ("swap", ".4f"), "new": ("new", ".1%"), "old": ("old", ".1%"),
           "forgotten": ("forgotten", "+.3f")}
# Those of which the table shows every seed's.
LEARNED = ("new", "old", "forgotten")


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models and batches
    out: str = "out/peft_comparison"  # folder for the models
    figure: str = "results/peft_comparison.png"   # the picture; the table beside it, as .md
    quick: bool = False               # one seed, one learning rate, a tenth of the steps, marked


# ---------------------------------------------------------------------- what is computed

def share_of(peft: dict, config: ModelConfig) -> float:
    """Numbers that learn, over those of the base; nothing is made in memory."""
    with torch.device("meta"):
        model = Transformer(config)
        n = parameter_count(model)
        # in 4 bits or not, the same numbers learn; and meta tensors have none to be rounded
        options = lora.Options(**peft | {"peft": peft["peft"].replace("qlora", "lora")})
        lora.attach(model, options)
    return parameter_count(model, trainable=True) / n


# ---------------------------------------------------------------------- what is measured

def median_seconds(call: Callable, n: int = 16) -> float:
    times = []
    for _ in range(n):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))                 # the first one warms up


def update(model: Transformer, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss = -model.logps(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def speeds(base: Path, folders: dict[str, Path]) -> dict[str, dict]:
    """{method: seconds of a "step", of a generated "token" and of a "swap"}, one after another."""
    found = {}
    for method in ("full", *METHODS):                  # once more, because the first is slower
        peft, _ = METHODS[method]
        model, tokenizer = load_model(base / "sft", pick_device("auto"), fast_dtype())
        seconds = {"swap": 0.0}
        if peft:
            lora.load_adapter(model, folders[method])
            seconds["swap"] = median_seconds(partial(lora.load_adapter, model, folders[method]), 4)
        shape = 16, model.config.context_length
        tokens = torch.randint(model.config.vocab_size, shape, device=model.device)
        optimizer = adamw(model, 1e-4)
        seconds["step"] = median_seconds(partial(update, model, tokens, optimizer))
        if method == "LoRA":
            lora.merge(model)
        prompt = [tokenizer.prompt([{"role": "user", "content": "Who lives here?"}])]
        answer = partial(sample.generate, model.eval(), prompt, 48, ())
        seconds["token"] = median_seconds(answer) / 48
        found[method] = seconds
    return found


def examine(folder: Path, seed: int, base: Path, n: int) -> dict:
    """Accuracy on n unseen tasks of the two families ("new") and of the others ("old"), and loss on
    documents over that of the SFT model."""
    device = pick_device("auto")
    model, tokenizer = load_model(folder, device, fast_dtype())
    world = f"world:{seed}"
    quizzes = {"new": evaluate.exam(world, n, HELDOUT_FAMILIES), "old": evaluate.exam(world, n)}
    found = evaluate.quiz_accuracy(model, tokenizer, quizzes)
    windows = documents(base, seed)
    before, _ = load_model(base / "sft", device, fast_dtype())
    losses = [evaluate.validation_loss(each, windows, 64, 16) for each in (model, before)]
    return found | {"forgotten": losses[0] - losses[1]}


def examined(folder: Path, file: Path, seed: int, base: Path, quick: bool) -> dict:
    """examine(), once for a model; the figures are kept in the file."""
    of = {"model": read_record(folder)["sha256"], "quick": quick}
    return kept(file, of, partial(examine, folder, seed, base, 100 if quick else 1000))


def trained(method: str, lr: float, seed: int, base: Path, out: Path, quick: bool) -> dict:
    """The figures of one run, which is made if it is not there."""
    peft, _ = METHODS[method]
    folder = out / f"{method.replace(' ', '_')}_{lr:g}"
    data = write_families(out / "new.jsonl", seed, HELDOUT_FAMILIES, 4000)
    options = SFT | peft | {"lr": lr, "seed": seed, "data": str(data)}
    if quick:
        options |= {"steps": SFT["steps"] // 10}
    # in a process of its own, whose memory is its own
    run_apart("train_sft", init=str(base / "sft"), out=str(folder), **options)
    figures = examined(folder, out / f"{folder.name}_exam.json", seed, base, quick)
    name = "adapter.safetensors" if peft else "model.safetensors"
    return figures | {"folder": str(folder), "bytes": (folder / name).stat().st_size, "lr": lr}


def best(runs: list[dict]) -> dict:
    """Of the runs within a point of the best in the new tasks, the best in the old ones."""
    enough = max(exam["new"] for exam in runs) - 0.01
    return max((exam for exam in runs if exam["new"] >= enough), key=lambda exam: exam["old"])


# ---------------------------------------------------------------------- what is shown

def draw(found: dict[str, list[dict]], before: list[dict], file: Path, mark: str) -> None:
    """What was learned against what is still known, a point for each seed."""
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    old = [exam["old"] for exam in before]
    new = [exam["new"] for exam in before]
    axis.scatter(old, new, color="k", marker="x", s=60, label="before")
    for number, (method, of_seeds) in enumerate(found.items()):
        old = [exam["old"] for exam in of_seeds]
        new = [exam["new"] for exam in of_seeds]
        share = of_seeds[0]["share"]
        axis.scatter(old, new, color=f"C{number}", s=60, label=f"{method}: {share:.2%} trained")
    axis.set(title=f"What is learned, and what is forgotten{mark}",
             xlabel="right, tasks that the SFT model was tuned on",
             ylabel="right, tasks of the two new families")
    axis.xaxis.set_major_formatter("{x:.1%}")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, file)


def table(found: dict[str, list[dict]], before: list[dict], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# Parameter-efficient fine-tuning beside full fine-tuning{mark}", "",
             f"`python experiments/peft_comparison.py`, seeds {cfg.seeds}: the mean, and from "
             "the lowest to the highest. Step and token over full fine-tuning's and the SFT "
             "model's; swap in seconds.", "",
             f"| {' | '.join(['', 'lr', *COLUMNS])} |", "|---" * (len(COLUMNS) + 2) + "|"]
    blank = [""] * (len(COLUMNS) - len(LEARNED) + 1)
    values = [cell([exam[name] for exam in before], COLUMNS[name][1]) for name in LEARNED]
    lines.append(f"| {' | '.join(['before', *blank, *values])} |")
    for method, of_seeds in found.items():
        rates = sorted({exam["lr"] for exam in of_seeds})
        cells = [method, ", ".join(f"{lr:g}" for lr in rates)]
        for name, form in COLUMNS.values():
            measured = of_seeds if name in LEARNED else of_seeds[:1]
            cells.append(cell([exam[name] for exam in measured], form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
    seeds = [int(seed) for seed in cfg.seeds.split(",")]
    found = {method: [] for method in METHODS}
    before = []
    bases = {seed: base_models(seed) for seed in seeds}
    for seed, base in bases.items():
        out = seed_folder(cfg, seed)
        before.append(examined(base / "sft", out / "before_exam.json", seed, base, cfg.quick))
        for method, (_, rates) in METHODS.items():
            if cfg.quick:
                rates = rates[1:2]
            runs = [trained(method, lr, seed, base, out, cfg.quick) for lr in rates]
            found[method].append(best(runs))
    base = bases[seeds[0]]
    config = load_model(base / "sft")[0].config
    folders = {method: Path(of_seeds[0]["folder"]) for method, of_seeds in found.items()}
    seconds = speeds(base, folders)
    for method, of_seeds in found.items():
        peft, _ = METHODS[method]
        own = seconds[method]
        of_seeds[0] |= {"step": own["step"] / seconds["full"]["step"], "swap": own["swap"],
                        "token": own["token"] / seconds["full"]["token"],
                        "share": 1.0, "share_7b": 1.0}
        if peft:
            of_seeds[0]["share"] = share_of(peft, config)
            of_seeds[0]["share_7b"] = share_of(peft | AT_7B.get(method, {}), LLAMA_7B)
        rows = read_metrics(of_seeds[0]["folder"])
        of_seeds[0]["peak_mb"] = 1e3 * max(row["memory_gb"] for row in rows)
    draw(found, before, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, before, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
