"""
What transfers: a cluster of tasks that was never trained on, after training on all others.

The sentences of the documents: instruction tuning gives a model "the meta-capability of following
arbitrary instructions at inference time, including tasks unseen during tuning" (001 section 3.1),
and 3.7 evaluates "on held-out tasks NOT in {D_1, ..., D_K}". 004, leave one cluster out: "the model
is fully fine-tuned on all other clusters and tested exclusively on the withheld cluster". The base
model of a seed learns the world's families of tasks, as many rows and steps in each run:

  cluster left out     all clusters but one, for each cluster
  family left out      all families but one, for each that has others in its cluster
  part left out        all but one kind of prompt of a family: sums in figures where sums in stories
                       stay, a label before Bearish where Bearish without one stays (PARTS)
  only words, ...      one cluster alone, the three that differ most: lists of words, passages to
                       read, sums and conclusions. Never the cluster that is left out
  everything           all families: what there is to reach

An answer counts if it is an exact match, or a refusal, an admission or a story where these are
right, and has all that was asked for, in the form asked for. The gain of what is left out is
counted above the base model and above the best of the models of one cluster, seed by seed. Prompts
come without another task before them, and no family is trained on whose rows show the prompts of
one that is left out (SHOWS). Demonstrations are the world's careful ones: those of all its hands
teach nobody to refuse, to keep a form or to answer two questions, and here that is to transfer.

What came out (seed 0, bf16): "everything" is learned to 73 to 100 %, and what transfers is near. No
whole cluster does. Of families three do, each after the other two: tallies are made (72 %), things
counted (67) and picked from lists (44). Parts gain in six of nine clusters. A form goes from one
cluster to another: Bearish gets its label from who has labelled lists (79 %), moods and sums are
told by steps when these are asked for (96 and 32; they have steps unasked, too), and "Answer:"
stands before facts, which then are wrong (15). Records are written whose sentence begins with the
place (69). Third turns follow from second ones (95), and from no conversation at all (70).

Which parts there are is a choice: moods and sums by steps were added after others had failed, and
labelled facts stand just on the bar. Families alone do not reach it.

What has to be put together from two things is not: who tells the first and the last word of a list,
and one mood at a time, tells one where both are asked for. And what was never shown becomes a rule.
Who has subtracted in each step but never in both writes "7 - 2 = 5. 5 + 2 = 7."; who has refused
six harms advises six others to "take a broom"; and while strangers, of whom nothing is known, were
asked about with a label and bears without, a label meant "I do not know" (0 % of labelled facts).

Neither less forgetting helps nor more parameters: with eight families left out at once they have 0
to 13 % each after 400 steps, with 30 % of the rows replayed, and on a base of 5M parameters
(--d_model 256 --n_layers 6), which knows 97 % of the facts, not 77.

    python experiments/leave_one_cluster_out.py            # results/leave_one_cluster_out.png, .md
    python experiments/leave_one_cluster_out.py --quick    # one seed, two clusters, fewer steps

    python experiments/leave_one_cluster_out.py --init out/smollm2 --ways part \
        --figure results/leave_one_cluster_out_smollm2.png  # a pretrained chat model, by LoRA

In 40 steps of 1,536 tokens SmolLM2 (135M) showed no more than the small one (seed 0, demonstrations
by all hands, and of two things only the first was judged): two moods are told after one (50 %, the
base 10), and of six chores, left out, the tools are named that it knew before (30 %, the base 2);
both ends of a list are found as well (48), but not 15 points above a model of reasoning alone.
Whole clusters gain no more: reading left out 35 %, the base 30, and words alone teach to tell a
colour in 68 %, all other clusters in 35.

Clusters of a file of any tasks are left out by t0_transfer.py.
"""
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import evaluate
import own_life
from experiments.base import (
    base_models,
    cell,
    continued,
    cut_texts,
    kept,
    rights,
    save,
    seed_folder,
    show_table,
    tuned,
    turns_of,
    unseen_tasks,
    write_families,
)
from plumbing.folders import read_record
from plumbing.options import command_line
from world.tasks import FAMILIES
from world.text import ATTRIBUTES, CATEGORY_WORDS, CHORES, HARMS

ALONE = ("words", "reading", "reasoning")
LIKES = ("favourite food", "favourite colour", "hobby")
FIRST_TOOLS = tuple(CHORES.values())[:6]
LAST_HARMS = tuple(harm.split("{")[0] for harm in HARMS)[6:]       # "set fire to the house of "
# {family: others whose prompts stand in its rows}: a followup has them in its earlier turns, and
# unanswerable asks about strangers in the words of facts. If facts were left out and these were
# not, their wording alone would tell the model to answer "I do not know".
SHOWS = {"followup": ("facts", "lists", "transform"), "unanswerable": ("facts",)}
QUICK = ("reading", "format")
SFT = {"steps": 1200, "batch_size": 8, "optimizer": "muon", "lr": 4e-3, "eval_every": 1200}
# Of a model from elsewhere, which is larger and can do much already.
LORA = own_life.LORA | {"steps": 40, "batch_size": 4, "optimizer": "adamw", "lr": 5e-4,
                        "warmup": 4, "eval_every": 40, "context_length": 384, "n_examples": 400}
WAYS = ("cluster", "family", "part")             # what is left out
JUDGED = ("right", "whole")                      # all that was asked for, in the form asked for
POINTS = 0.15                                    # by which a left-out family has to gain
CLUSTERS = 5                                     # in so many clusters


@dataclass
class Config:
    seeds: str = "0"                  # of world, models and batches, with commas
    init: str = ""                    # a chat model's folder, instead of the world's base
    ways: str = "cluster,family,part"  # what is left out, with commas; each run is some minutes
    out: str = "out/leave_one_cluster_out"             # folder for the models and their data
    figure: str = "results/leave_one_cluster_out.png"  # the picture; the table beside it, as .md
    quick: bool = False               # one seed, two clusters, a tenth of the steps, marked


# ---------------------------------------------------------------------- parts of families

def asked(example: dict) -> str:
    """The text of the last turn."""
    return turns_of(example)[-1]["content"]


def asks_for_likes(example: dict) -> bool:
    key = example["key"]
    choices = [ATTRIBUTES[name] for name in LIKES]
    return key["choices"] in choices or key.get("second", key)["choices"] in choices


def asks_for_two(example: dict) -> bool:
    return "second" in example["key"]


def asks_for_label(example: dict) -> bool:
    """"Put "Answer:" before it."""
    return example["key"].get("form") == "label"


def asks_for_steps(example: dict) -> bool:
    """"Step by step, please."."""
    return example["key"].get("form") == "steps"


def asks_for_more(example: dict) -> bool:
    """"And the animals?" after the fruits of a list."""
    return example["key"]["choices"] == CATEGORY_WORDS


# {name: (family, whether an example is of the part)}
PARTS = {
    "favourites": ("facts", asks_for_likes),
    "two facts": ("facts", asks_for_two),
    "labelled facts": ("facts", asks_for_label),
    "two moods": ("sentiment", asks_for_two),
    "moods by steps": ("sentiment", asks_for_steps),
    "figures": ("arithmetic", lambda example: re.search(r"\d [+-] \d", asked(example))),
    "minus twice": ("arithmetic", lambda example: example["chain"].count(" - ") == 2),
    "sums by steps": ("arithmetic", asks_for_steps),
    "both ends": ("transform", lambda example: "first and" in asked(example)),
    "sentences": ("translation", lambda example: len(example["answer"].split()) >= 3),
    "labelled Bearish": ("translation", asks_for_label),
    "place first": ("json", lambda example: re.search(r" the \w+, [A-Z]", asked(example))),
    "six chores": ("advice", lambda example: example["answer"] in FIRST_TOOLS),
    "six harms": ("unsafe", lambda example: any(harm in asked(example) for harm in LAST_HARMS)),
    "third turns": ("followup", lambda example: len(turns_of(example)) == 5),
    "more of a list": ("followup", asks_for_more),
}


def family_of(name: str) -> str:
    """The family itself, or that of a part."""
    return PARTS[name][0] if name in PARTS else name


def tasks_of(name: str, seed: int, n: int) -> list[dict]:
    """n unseen tasks of a family or a part."""
    if name not in PARTS:
        return unseen_tasks(name, seed, n)
    family, is_of = PARTS[name]
    # more than enough: the rarest part is a ninth of its family
    return [task for task in unseen_tasks(family, seed, 16 * n) if is_of(task)][:n]


def rows_without(name: str) -> Callable[[dict], bool]:
    """Whether a row may stay where this part is left out."""
    family, is_of = PARTS[name]
    return lambda row: row["example"]["family"] != family or not is_of(row["example"])


# ---------------------------------------------------------------------- which runs there are

def families_of(cluster: str) -> tuple[str, ...]:
    return tuple(family for family, (its, _) in FAMILIES.items() if its == cluster)


def all_without(left_out: tuple[str, ...]) -> tuple[str, ...]:
    """The families in whose rows none of these is asked or answered."""
    return tuple(family for family in FAMILIES
                 if not {family, *SHOWS.get(family, ())} & {*left_out})


def runs_for(clusters: list[str]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{run: (families it trains on, families and parts it is examined in)} to leave these clusters
    out, and parts of them."""
    names = (*FAMILIES, *PARTS)
    runs = {"everything": (tuple(FAMILIES), names)}
    for cluster in ALONE:
        families = families_of(cluster)
        others = tuple(name for name in names if family_of(name) not in families)
        runs[f"only {cluster}"] = families, others
    for cluster in clusters:
        families = families_of(cluster)
        runs[f"without cluster {cluster}"] = all_without(families), with_parts(families)
        if len(families) > 1:
            for family in families:
                runs[f"without family {family}"] = all_without((family,)), with_parts((family,))
        for name in parts_of(families):
            # the earlier turns of other families show the part as well
            trained = [other for other in FAMILIES if family_of(name) not in SHOWS.get(other, ())]
            runs[f"without part {name}"] = tuple(trained), (name,)
    return runs


def parts_of(families: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in PARTS if family_of(name) in families)


def with_parts(families: tuple[str, ...]) -> tuple[str, ...]:
    return families + parts_of(families)


def names_in(clusters: list[str]) -> tuple[str, ...]:
    """All families of these clusters, and behind them their parts."""
    return with_parts(tuple(family for cluster in clusters for family in families_of(cluster)))


# ---------------------------------------------------------------------- what they show

def run_without(name: str, way: str) -> str:
    """The run that leaves out this family or part, its family or its cluster."""
    family = family_of(name)
    cluster, _ = FAMILIES[family]
    left_out = {"cluster": cluster, "family": family, "part": name}
    return f"without {way} {left_out[way]}"


def other_clusters(name: str) -> list[str]:
    """The runs of one cluster to which this family or part does not belong."""
    cluster, _ = FAMILIES[family_of(name)]
    return [f"only {alone}" for alone in ALONE if alone != cluster]


def gains(found: dict[str, list[dict]], name: str, way: str) -> list[float]:
    """By how much a left-out family or part is answered better than by the base model, and than by
    the best model of one other cluster: of each seed; [] if it was not left out so."""
    others = ["base", *other_clusters(name)]
    return [exam[name] - max(found[other][i][name] for other in others)
            for i, exam in enumerate(found.get(run_without(name, way), []))]


def gaining(found: dict[str, list[dict]], clusters: list[str], way: str, of_seeds) -> list[str]:
    """The clusters with a family, or a part of one, that gains enough; of_seeds: np.mean, or min
    for every seed."""
    enough = []
    for cluster in clusters:
        names = families_of(cluster)
        if way == "part":
            names = parts_of(names)
        all_gains = [gains(found, name, way) for name in names]
        if any(of_seeds(values) >= POINTS for values in all_gains if values):
            enough.append(cluster)
    return enough


def draw(found: dict[str, list[dict]], clusters: list[str], file: Path, mark: str) -> None:
    figure, axis = plt.subplots(figsize=(15, 6), layout="constrained")
    names = names_in(clusters)
    named = set()                                          # in the legend, each once
    for place, name in enumerate(names):
        bars = [(f"{way} left out", [run_without(name, way)], f"C{number}")
                for number, way in enumerate(WAYS)]
        bars += [("everything", ["everything"], "lightgrey"),
                 ("best of one other cluster", other_clusters(name), "C3"),
                 ("base model", ["base"], "k")]
        for number, (label, runs, color) in enumerate(bars):
            exams = [found[run_name] for run_name in runs if run_name in found]
            if not exams:                                  # the only family of its cluster
                continue
            values = np.max([[exam[name] for exam in seeds] for seeds in exams], 0)
            x = place + 0.14 * (number - 2.5)
            axis.bar(x, values.mean(), 0.13, color=color, label=None if label in named else label)
            named.add(label)
            axis.plot([x] * len(values), values, "k.", markersize=3)
    axis.set_xticks(range(len(names)), [f"{name} ({whole_of(name)})" for name in names],
                    rotation=90)
    axis.set(title=f"Families that were not trained on{mark}", ylabel="right, unseen tasks",
             ylim=(0, 1.12))                               # room for the legend
    axis.legend(ncols=6)
    save(figure, file)


def whole_of(name: str) -> str:
    """The cluster of a family, the family of a part."""
    return PARTS[name][0] if name in PARTS else FAMILIES[name][0]


def table(found: dict[str, list[dict]], clusters: list[str], cfg: Config) -> str:
    mark = " (quick)" if cfg.quick else ""
    alone = [f"only {name}" for name in ALONE]
    columns = ["base", *alone, *(f"{way} left out" for way in WAYS), "everything"]
    command = "python experiments/leave_one_cluster_out.py"
    if cfg.init:
        command += f" --init {cfg.init}"
    if cfg.ways != Config.ways:
        command += f" --ways {cfg.ways}"
    lines = [f"# Leave one cluster out{mark}", "",
             f"`{command}`, seeds {cfg.seeds}: answers to unseen tasks that are right and have all "
             "that was asked for, in the form asked for; the mean, and from the lowest to the "
             "highest. Gain: above the base and the best model of one other cluster. Empty: "
             "trained on, or all of its cluster.", "",
             f"| of | asked | {' | '.join(columns)} | "
             f"{' | '.join(f'gain, {way} out' for way in WAYS)} |",
             "|---" * (len(columns) + len(WAYS) + 2) + "|"]
    for name in names_in(clusters):
        cells = []
        for run_name in ["base", *alone, *(run_without(name, way) for way in WAYS), "everything"]:
            values = [exam[name] for exam in found.get(run_name, []) if name in exam]
            cells.append(cell(values, ".0%") if values else "")
        for way in WAYS:
            values = [100 * gain for gain in gains(found, name, way)]
            cells.append(cell(values, "+.0f") if values else "")
        lines.append(f"| {whole_of(name)} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdict(found, clusters)]) + "\n"


def verdict(found: dict[str, list[dict]], clusters: list[str]) -> list[str]:
    """What was to come out, and whether it does."""
    ways = [way for way in WAYS if any(run.startswith(f"without {way}") for run in found)]
    on_average = {way: gaining(found, clusters, way, np.mean) for way in ways}
    in_every_seed = {way: gaining(found, clusters, way, min) for way in ways}
    what = {"whole families": [way for way in ways if way != "part"], "families or parts": ways}
    if ways == ["part"]:
        what = {"parts of families": ways}
    words = [f"In {CLUSTERS} clusters at least, what is left out is to be {100 * POINTS:.0f} "
             "points above the base and above every model of one other cluster."]
    for name, its_ways in what.items():
        number = len({cluster for way in its_ways for cluster in on_average[way]})
        shown = "shown" if number >= CLUSTERS else "NOT shown"
        words.append(f"Of {name}: in {number} of {len(clusters)}, {shown}.")
    lines = [f"- {way} left out: {', '.join(on_average[way]) or 'none'}; "
             f"in every seed: {', '.join(in_every_seed[way]) or 'none'}" for way in ways]
    return [" ".join(words), "", *lines]


def main(cfg: Config) -> None:
    unknown = {*cfg.ways.split(",")} - {*WAYS}
    if unknown:
        raise ValueError(f"--ways {cfg.ways}: {unknown.pop()!r} is none of {', '.join(WAYS)}")
    clusters = list(dict.fromkeys(cluster for cluster, _ in FAMILIES.values()))
    options = dict(SFT)
    n = 100                                            # tasks of a family or a part
    n_rows = 20_000
    # The base has never seen a conversation: to one it would answer nothing, though it knows much.
    base_answers = continued
    answers = evaluate.greedy_texts
    if cfg.init:
        options = dict(LORA)
        n = 40
        base_answers = answers = cut_texts
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        clusters = list(QUICK)
        options["steps"] //= 10
        n = 20
        n_rows = 3000
    left_out = tuple(f"without {way}" for way in cfg.ways.split(","))
    runs = {name: of for name, of in runs_for(clusters).items()
            if name.startswith(("everything", "only", *left_out))}
    found = {name: [] for name in ("base", *runs)}
    for seed in map(int, cfg.seeds.split(",")):
        base = Path(cfg.init) if cfg.init else base_models(seed) / "pretrain"
        out = seed_folder(cfg, seed) / Path(cfg.init).name   # apart from the world's own
        options["init"] = str(base)
        names = (*FAMILIES, *PARTS)
        of = {"model": read_record(base)["sha256"], "n": n, "names": [*names], "judged": [*JUDGED]}
        exam = partial(rights, base, seed, names, n, base_answers, tasks_of, JUDGED)
        found["base"].append(kept(out / "base_continues.json", of, exam))
        for name, (trained, examined) in runs.items():
            folder = out / name.replace(" ", "_")
            part = name.removeprefix("without part ")
            rows = rows_without(part) if part in PARTS else None
            file = write_families(folder.with_suffix(".jsonl"), seed, trained, n_rows, rows)
            found[name].append(tuned(folder, seed, base, examined, n,
                                     partial(rights, answer=answers, tasks_of=tasks_of,
                                             judged=JUDGED),
                                     data=str(file), **options))
    draw(found, clusters, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, clusters, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
