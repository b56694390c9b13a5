"""
Fifteen ways to align one SFT model, by the same measures: the table of 001 section 4.11,
measured.

That table says what each method needs: PPO "4 (actor, critic, ref, RM)" models and no stability
("Low (unstable)"), DPO "2 (policy, ref)" and a "High" one, IPO a "Higher than DPO", KTO no pairs,
ORPO "1 (policy only)", best-of-N no training. Here stands beside it what each gains, and what that
costs. All begin with one SFT model (ORPO with the base model before it) in one world, and read the
pairs, or the reward model, that its judge has made. They are not given equal time or data, which
stand in the table. ORPO, which has its tasks to learn as well, reads as many tokens as SFT and DPO
together in one row, and four times as many in another. Learning rates and betas were chosen on seed
0 first, and changed where another seed lost more than 3 points of accuracy or won less than 75 %.

    python experiments/alignment_methods.py            # results/alignment_methods.md and .png
    python experiments/alignment_methods.py --quick    # one seed, a tenth of the steps
    python experiments/alignment_methods.py --methods DPO,GRPO --seeds 3

What came out (AMD EPYC with AVX512-BF16, bf16, three seeds, from the lowest to the highest): all
but SPIN win against SFT. DPO wins 76 to 84 %, those that learn from the reward model's scores of
their own answers 73 to 82 %, the means of all of them within 3 points; IPO 70 to 74 %, as careful
as it is, KTO 64 to 70. Imitating the chosen answers wins 74 to 79 %, hardly less than any of them.
Best of 16 loses 7 to 11 points of accuracy, because the reward model is taken at its word; the
others keep within 3 of SFT, but for ORPO of equal tokens and SPIN. SPIN imitates demonstrations
that are no better than the model: it gets worse (24 to 43 %).

ORPO, in as many tokens as SFT and DPO together, has not learned its tasks, 11 to 13 points of
accuracy less; in four times as many it wins 76 to 83 %, as DPO does, and has .5 to 2.2 points less.
What is missing are sums (right 66 to 81 %, after SFT 94 to 98): they are 2.5 % of the pairs, and
5.6 % of the demonstrations. results/orpo.md has these two beside DPO alone.

Dials: with beta 0.2 and twice the rate KTO lost 3 and 5 points (two seeds). PPO in 40 steps and
groups in 100 won 74 % in seed 2, which their present lengths raise to 75; GRPO, longer, lost 5
points in seed 0 until its beta was .35. Less beta for RLOO, .35, changed nothing. ORPO's lam is a
quarter of what it was: at 0.2 it won as much (76 to 83 %) and lacked 2 to 5 points, 10 to 15 in
equal tokens; at 0.1, in seed 1, 3.5.

Each run is a process of its own, so that its memory is its own, and what is finished is kept in
out/alignment_methods/SEED. Greedy answers to 500 unseen prompts are compared with the SFT model's.
"""
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

import evaluate
from experiments.base import (
    base_models,
    cell,
    examine,
    keep,
    kept,
    made_by,
    run_apart,
    save,
    seed_folder,
)
from plumbing.curves import read_metrics
from plumbing.options import command_line
from readers import checked_turns
from rewards import Reward
from sample import best_of_n
from scoring import best_of_n_kl

N = 16                                 # answers of which best-of-N and rejection sampling take one
ROOT = Path(__file__).resolve().parents[1]


class Method(NamedTuple):
    script: str                        # that trains; "": nothing is trained
    models: str                        # what is in memory while it trains
    data: str
    signal: str                        # what tells a better answer from a worse one
    options: dict


PAIRS = "8,000 pairs"
SCORE = "reward model's score"
DPO = {"n_pairs": 8000, "steps": 500, "lr": 1e-4}
GROUPS = {"steps": 150, "batch_size": 8, "group": 8, "lr": 1.5e-4}
ORPO = {"method": "orpo", "lam": 0.05, "batch_size": 32, "optimizer": "muon", "lr": 4e-3}
METHODS = {
    "base model": Method("", "policy", "documents", "imitation", {}),
    "SFT": Method("", "policy", "demonstrations", "imitation", {}),
    "SFT on chosen": Method(
        "train_sft", "policy", "8,000 chosen answers", "imitation",
        {"chosen": True, "n_examples": 8000, "steps": 100, "lr": 5e-4}),
    "best of 16": Method("", "policy, reward model, at every answer", "none", SCORE, {}),
    "rejection sampling": Method(
        "train_sft", "policy, reward model", "16,000 own answers, best of 16", SCORE,
        {"n_examples": 1000, "steps": 40, "lr": 5e-4}),
    "PPO": Method(
        "train_ppo", "policy, critic, reference, reward model", "3,840 own answers", SCORE,
        {"steps": 60, "lr": 1.5e-4, "beta": 0.4, "kl_target": 0.0}),
    "REINFORCE": Method(
        "train_grpo", "policy, reference, reward model", "9,600 own answers", SCORE,
        GROUPS | {"method": "reinforce", "beta": 0.5}),
    "RLOO": Method(
        "train_grpo", "policy, reference, reward model", "9,600 own answers", SCORE,
        GROUPS | {"method": "rloo", "beta": 0.5}),
    "GRPO": Method(
        "train_grpo", "policy, reference, reward model", "9,600 own answers", SCORE,
        GROUPS | {"method": "grpo", "beta": 0.35}),
    "Dr. GRPO": Method(
        "train_grpo", "policy, reference, reward model", "9,600 own answers", SCORE,
        GROUPS | {"method": "dr_grpo", "beta": 0.6}),
    "DPO": Method("train_dpo", "policy, reference once", PAIRS, "pairs", DPO | {"beta": 1.0}),
    "IPO": Method(
        "train_dpo", "policy, reference once", PAIRS, "pairs",
        DPO | {"method": "ipo", "beta": 3.0}),
    "KTO": Method(
        "train_dpo", "policy, reference once", "8,000 answers", "thumbs up or down",
        DPO | {"method": "kto", "beta": 0.5}),
    "ORPO": Method("train_dpo", "policy", "160,000 pairs", "pairs",
                   ORPO | {"n_pairs": 160_000, "steps": 4800}),
    "ORPO of equal tokens": Method("train_dpo", "policy", "40,000 pairs", "pairs",
                                   ORPO | {"n_pairs": 40_000, "steps": 1200}),
    "SimPO": Method("train_dpo", "policy", PAIRS, "pairs", DPO | {"method": "simpo", "lr": 2e-5}),
    "online DPO": Method(
        "train_dpo", "policy, reference, reward model", "19,200 own answers", SCORE,
        {"rounds": 3, "steps": 300, "beta": 2.0, "lr": 1e-4}),
    "SPIN": Method(
        "train_dpo", "policy, reference once", "demonstrations, 4,800 own answers",
        "not to be told from them", {"spin": True, "rounds": 3, "steps": 300, "lr": 1e-4}),
}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models, batches and samples
    methods: str = ""                 # some of the table's rows, with commas; empty: all
    out: str = "out/alignment_methods"             # folder for models and figures
    figure: str = "results/alignment_methods.png"  # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of the steps, marked in the picture


# ---------------------------------------------------------------------- a run

def train(name: str, seed: int, base: Path, out: Path, quick: bool) -> None:
    """Write the method's model folder, `out`; what was stopped goes on."""
    method = METHODS[name]
    options = {"init": str(base / "sft"), "out": str(out), "seed": seed} | method.options
    if quick:
        options["steps"] //= 10
    if options.get("method") == "orpo":                    # one stage, of SFT and preferences
        options["init"] = str(base / "pretrain")
    if method.script in ("train_ppo", "train_grpo"):
        options |= {"reward": str(base / "rm"), "prompts": f"world:{seed}"}
    elif name == "online DPO":
        options |= {"reward": str(base / "rm"), "prompts": f"world:{seed}", "data": "world"}
    elif name == "rejection sampling":
        options["data"] = str(best_answers(seed, base, out, options["n_examples"], quick))
    else:
        options["data"] = f"world:{seed}"
    run_apart(method.script, **options)


def best_answers(seed: int, base: Path, out: Path, n_prompts: int, quick: bool) -> Path:
    """The file with the best of N answers to each prompt, which rejection sampling imitates."""
    # named by the models that made it, because others would make another
    sums = [made_by(base)[name]["model.safetensors"][:8] for name in ("sft", "rm")]
    file = out.with_name(f"best_of_{N}_{'_'.join(sums)}.jsonl")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        run_apart("synthesize", init=str(base / "sft"), reward=str(base / "rm"), out=str(file),
                  prompts=f"world:{seed}", seed=seed, n=N,
                  n_prompts=n_prompts // 10 if quick else n_prompts)
    return file


def timed(name: str, seed: int, base: Path, out: Path, quick: bool) -> dict:
    """train(), and the minutes that it took from here to its end."""
    begun = time.perf_counter()
    if METHODS[name].script:
        train(name, seed, base, out, quick)
    return {"minutes": (time.perf_counter() - begun) / 60}


# ---------------------------------------------------------------------- its figures

def best_of_16(base: Path, model, tokenizer, examples: list[dict]) -> list[str]:
    """Of 16 answers to each example the one that the reward model likes best."""
    reward = Reward(str(base / "rm"), "min", tokenizer, model.device, model.dtype)
    rows = []
    for example in examples:
        turns = checked_turns(example["prompt"], "prompt", "user")
        rows.append({"messages": turns, "example": example})
    texts = []
    for first in range(0, len(rows), 64):
        generator = torch.Generator(model.device).manual_seed(first)
        texts += best_of_n(model, tokenizer, rows[first:first + 64], N, reward,
                           evaluate.MAX_ANSWER, generator=generator)
    return texts


def figures_of(name: str, folder: Path, seed: int, base: Path, n: int) -> dict:
    """A cell of each column but the minutes, of one seed."""
    answer = partial(best_of_16, base) if name == "best of 16" else evaluate.greedy_texts
    is_trained = METHODS[name].script != ""
    if not is_trained:
        folder = base / ("pretrain" if name == "base model" else "sft")
    figures = examine(folder, seed, base, n, answer)
    if name == "best of 16":
        figures["kl"] = best_of_n_kl(N)                        # at most
    if is_trained:
        rows = read_metrics(folder)
        figures["peak_gb"] = max(row["memory_gb"] for row in rows if "memory_gb" in row)
    return figures


def measured(name: str, seed: int, base: Path, out: Path, quick: bool) -> dict:
    """A row of one seed; what was trained and examined before, of the same models and with the same
    options, is read from its files."""
    folder = out / name.replace(" ", "_").replace(".", "").lower()
    n = 50 if quick else 500
    of = {"options": METHODS[name].options, "models": made_by(base), "n": n, "N": N}
    minutes = kept(out / f"{name}_minutes.json", of,
                   partial(timed, name, seed, base, folder, quick))
    figures = kept(out / f"{name}.json", of, partial(figures_of, name, folder, seed, base, n))
    return figures | minutes


# ---------------------------------------------------------------------- table and picture

# {column: (name of the figure, its format)}
COLUMNS = {
    "true reward": ("true_reward", ".3f"), "wins over SFT": ("win_rate", ".1%"),
    "of equal length": ("length_controlled", ".1%"),
    "without courtesies": ("plain_win_rate", ".1%"),
    "accuracy over SFT's": ("accuracy_gain", "+.1%"),
    "KL": ("kl", ".2f"), "distinct 3-grams": ("distinct_3", ".2f"), "words": ("words", ".1f"),
    "loss on documents": ("base_loss", ".3f"), "minutes": ("minutes", ".1f"),
    "peak GB": ("peak_gb", ".2f"),
}


def mark_of(cfg: Config) -> str:
    """What title and heading say of a run that is not the whole."""
    return " (quick)" * cfg.quick + " (some methods)" * bool(cfg.methods)


def table(found: dict[str, dict[str, dict]], cfg: Config) -> str:
    """results/alignment_methods.md; found: {method: {seed: figures}}."""
    head = ["method", "models in memory", "data", "signal", "lines", *COLUMNS]
    some = f' --methods "{cfg.methods}"' if cfg.methods else ""
    lines = [f"# Alignment methods, measured{mark_of(cfg)}", "",
             f"`python experiments/alignment_methods.py{some}`, seeds {cfg.seeds}: the mean, and "
             "from the lowest to the highest. KL in nats per response; loss on held-out documents "
             "in nats per token; minutes and peak memory of the training process, threads: "
             f"{torch.get_num_threads()}; lines of the script that trains. The KL of best of 16 is "
             "its upper bound, log 16 - 15/16.", "",
             f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, of_seeds in found.items():
        method = METHODS[name]
        n_lines = ""
        if method.script:
            n_lines = str(len((ROOT / f"{method.script}.py").read_text().splitlines()))
        cells = [name, method.models, method.data, method.signal, n_lines]
        for figure, form in COLUMNS.values():
            values = [figures[figure] for figures in of_seeds.values() if figure in figures]
            cells.append(cell(values, form) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[str, dict]], file: Path, mark: str) -> None:
    """What is won, and what it costs: a row a method, a dot a seed, a bar at their mean."""
    panels = {"win_rate": "wins over SFT", "length_controlled": "wins of equal length",
              "accuracy_gain": "accuracy over SFT's", "kl": "KL to SFT, nats per response",
              "base_loss": "loss on documents, nats per token"}
    # the base model has no place here, because it is 95 points and 270 nats away
    aligned = {method: of_seeds for method, of_seeds in found.items() if method != "base model"}
    figure, axes = plt.subplots(1, len(panels), figsize=(17, 6), layout="constrained", sharey=True)
    for axis, (name, label) in zip(axes, panels.items()):
        for place, of_seeds in enumerate(aligned.values()):
            values = [figures[name] for figures in of_seeds.values()]
            axis.plot(values, [place] * len(values), "o", color=f"C{place % 10}", alpha=0.6)
            axis.plot(np.mean(values), place, "|", color="black", markersize=14)
        axis.set(xlabel=label)
        axis.locator_params(axis="x", nbins=5)             # more would not fit beside each other
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(aligned)), list(aligned))
    axes[0].invert_yaxis()                     # the first of the table on top
    figure.suptitle(f"Ways to align one SFT model{mark}")
    save(figure, file)


def main(cfg: Config) -> dict:
    names = cfg.methods.split(",") if cfg.methods else list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {cfg.methods}: {unknown[0]!r} is none of "
                         f"{', '.join(METHODS)}")
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
    found = {name: {} for name in names}
    file = Path(cfg.figure)
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
        for name in names:
            figures = measured(name, int(seed), base, out, cfg.quick)
            found[name][seed] = figures
            print(f"seed {seed}, {name}: wins {figures['win_rate']:.1%}, KL {figures['kl']:.2f}, "
                  f"accuracy {figures['accuracy_gain']:+.1%}", flush=True)
    draw(found, file, mark_of(cfg))
    keep(file.with_suffix(".md"), table(found, cfg))
    return found


if __name__ == "__main__":
    command_line(main, Config, __doc__)
