"""
What the experiments on alignment share: where they start, how a policy is examined, what is kept.
They start from the lifecycle's own base model, SFT model and reward model, one of each for a seed,
in out/exp_base/SEED, made once for all experiments.

    python experiments/base.py --seeds 0,1,2               # a quarter of an hour each, on two cores
"""
import importlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib import pyplot as plt

import corpus
import data_quality
import evaluate
import lifecycle
import readers
import sample
import train_pretrain
import train_sft
from data import TokenStream
from model import Transformer
from plumbing.claim import write_whole
from plumbing.curves import read_metrics
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model, read_record
from plumbing.options import build, command_line
from world.tasks import HELDOUT_FAMILIES, TRAINED_FAMILIES
from world.text import whole_sentences
from world.world import World, demonstrate

BASE = Path("out/exp_base")
MADE = ("pretrain", "sft", "rm")


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, weights and batches


def base_models(seed: int) -> Path:
    """The folder with the models of a seed, pretrain, sft and rm, which are made if they are not
    there."""
    out = BASE / str(seed)
    plan = lifecycle.stages(lifecycle.Config(seed=seed, out=str(out)))
    for name in MADE:
        lifecycle.run_stage(*plan[name])
    return out


def made_by(base: Path) -> dict[str, dict]:
    """The checksums of the base's models: other models make other figures."""
    return {name: read_record(base / name)["sha256"] for name in MADE}


def run_apart(name: str, **options) -> None:
    """run() of the script with this name, in a process of its own: its memory is its own. Rounds of
    DPO go on by themselves, and synthesize.py writes a file and no folder."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(run_by_name, name, options).result()


def run_by_name(name: str, options: dict) -> None:
    script = importlib.import_module(name)
    if options.get("rounds", 1) > 1:
        options["resume"] = Path(f"{options['out']}_rounds").exists()
    elif name != "synthesize":
        run(script, **options)
        return
    script.main(build(script.Config, options))


def run(script, **options) -> dict:
    """A stage of an experiment: skipped if it is finished, gone on with if it was stopped."""
    return lifecycle.run_stage(script.main, build(script.Config, options))


# ---------------------------------------------------------------------- what a policy is worth

def length_controlled(wins: np.ndarray, longer: np.ndarray) -> float:
    """The share of wins that is to be expected of answers of equal length (Dubois et al. 2024).

    wins: (n,) 1 won, 1/2 tied, 0 lost; longer: (n,) how many words our answer has more. Fits
    p(win) = sigma(a + b tanh(longer / its deviation)) and returns sigma(a).
    """
    x = np.tanh(longer / max(longer.std(), 1e-9))
    features = np.stack([np.ones_like(x), x], 1)                               # (n, 2)
    ab = np.zeros(2)
    for _ in range(20):                        # Newton's steps; the function is concave
        p = 1 / (1 + np.exp(-features @ ab))
        slope = features.T @ (wins - p) - 1e-3 * ab            # because all may be won: a -> inf
        curvature = (features * (p * (1 - p))[:, None]).T @ features + 1e-3 * np.eye(2)
        ab += np.linalg.solve(curvature, slope)
    return float(1 / (1 + np.exp(-ab[0])))


def compare(found: dict, sft: dict) -> dict:
    """A method's figures in the columns of the table."""
    words = np.array([len(text.split()) for text in found["texts"]])
    sft_words = np.array([len(text.split()) for text in sft["texts"]])
    wins = evaluate.wins_of(found["rewards"], sft["rewards"])
    against = evaluate.wins_over(found, sft)
    return {"true_reward": found["true_reward"], "win_rate": against["win_rate"],
            "length_controlled": length_controlled(wins, words - sft_words),
            "plain_win_rate": against["plain_win_rate"], "accuracy": found["accuracy"],
            "accuracy_gain": found["accuracy"] - sft["accuracy"],
            "distinct_3": evaluate.fluency(found["texts"], [])["distinct"],
            "words": float(words.mean())}


@cache
def documents(base: Path, seed: int) -> TokenStream:
    """Held-out documents of the world, as windows of the base's tokens."""
    model, tokenizer = load_model(base / "sft")
    cfg = build(train_pretrain.Config, {"data": f"world:{seed}"})
    texts = corpus.read_texts(cfg)
    streams = corpus.concatenate(corpus.tokenize(texts, tokenizer), texts, tokenizer)
    windows = corpus.cut(streams, cfg, model.config.context_length, tokenizer.endoftext)
    return windows[cfg.data, "heldout"]


@cache
def sft_figures(base: Path, seed: int, n: int) -> dict:
    model, tokenizer = load_model(base / "sft", pick_device("auto"), fast_dtype())
    return evaluate.evaluate_policy(model, tokenizer, f"world:{seed}", 2 * n, n)


def examine(folder: Path, seed: int, base: Path, n: int = 500,
            answer: Callable = evaluate.greedy_texts) -> dict:
    """A policy beside the SFT model of its base: answers to n unseen prompts, accuracy on 2 n
    tasks, KL, and loss on documents."""
    device = pick_device("auto")
    world = f"world:{seed}"
    model, tokenizer = load_model(folder, device, fast_dtype())
    figures = evaluate.evaluate_policy(model, tokenizer, world, 2 * n, n, answer)
    figures = compare(figures, sft_figures(base, seed, n))
    sft, _ = load_model(base / "sft", device, fast_dtype())
    prompts = evaluate.reward_prompts(world, n)
    figures["kl"] = evaluate.kl_to(model, sft, tokenizer, prompts, seed)
    # what pretraining taught, in nats per token, and alignment may have made it forget
    figures["base_loss"] = evaluate.validation_loss(model, documents(base, seed), 64, 16)
    return figures


def examined(folder: Path, seed: int, base: Path, n: int = 500) -> dict:
    """examine(), once for a model."""
    of = {"model": read_record(folder)["sha256"], "n": n}
    return kept(folder.with_name(f"{folder.name}_exam.json"), of,
                partial(examine, folder, seed, base, n))


# ---------------------------------------------------------------------- what a fine-tuning reaches

def accuracies(folder: Path, seed: int, families: tuple[str, ...], n: int) -> dict:
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype())
    tasks = []
    for family in families:
        tasks += evaluate.exam(f"world:{seed}", n, (family,))
    return evaluate.accuracy_by_family(tasks, evaluate.greedy_texts(model, tokenizer, tasks))


def tuned(folder: Path, seed: int, base: Path, families: tuple[str, ...], n: int,
          exam: Callable = accuracies, **options) -> dict:
    """The base model of a seed, fine-tuned with these options of train_sft.py: {family: accuracy on
    n unseen tasks of it, "all": of all of them}, or what another exam says, and the last figures of
    the run."""
    defaults = {"init": str(base / "pretrain"), "optimizer": "muon", "lr": 4e-3}
    run(train_sft, out=str(folder), seed=seed, **defaults | options)
    of = {"model": read_record(folder)["sha256"], "families": list(families), "n": n}
    found = kept(folder.with_name(f"{folder.name}_exam.json"), of,
                 partial(exam, folder, seed, families, n))
    return read_metrics(folder)[-1] | found


def unseen_tasks(family: str, seed: int, n: int) -> list[dict]:
    return evaluate.exam(f"world:{seed}", n, (family,))


def rights(folder: Path, seed: int, families: tuple[str, ...], n: int,
           answer: Callable = evaluate.greedy_texts, tasks_of: Callable = unseen_tasks,
           judged: tuple[str, ...] = ("right",)) -> dict[str, float]:
    """{family: share of the answers to n unseen tasks of it that the judge calls right}.

    That is the exact match of the parsed answer; in families without one a refusal, an admission or
    a story, as is right there. Each task is asked by itself, without another one before it. answer:
    (model, tokenizer, tasks) -> texts; tasks_of: what else than families may be asked for; judged:
    the parts of evaluate.judgements() that an answer must have, all of them.
    """
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype())
    shares = {}
    for family in families:
        tasks = [asked_alone(task) for task in tasks_of(family, seed, n)]
        texts = answer(model, tokenizer, tasks)
        judgements = evaluate.judgements(tasks, texts)
        shares[family] = float(np.min([judgements[part] for part in judged], 0).mean())
    return shares


def turns_of(example: dict) -> list[dict]:
    return readers.checked_turns(example["prompt"], "prompt", "user")


def continued(model: Transformer, tokenizer, examples: list[dict]) -> list[str]:
    """What a base model writes behind each prompt, a text without roles; of it as many sentences as
    the answer may have."""
    prompts = [tokenizer.encode(" ".join(turn["content"] for turn in turns_of(example)))
               for example in examples]
    stop_tokens = (tokenizer.end, tokenizer.endoftext)
    answers = sample.generate(model, prompts, evaluate.MAX_ANSWER, stop_tokens)
    texts = []
    for example, ids in zip(examples, answers):
        sentences = whole_sentences(tokenizer.decode(ids))
        texts.append(" ".join(sentences[:example["key"].get("sentences")]))
    return texts


def cut_texts(model: Transformer, tokenizer, examples: list[dict]) -> list[str]:
    """Greedy answers, cut off where the limit is: a model from elsewhere says more than that has
    room for, and it is the first sentences that are judged."""
    return [tokenizer.decode(ids) for ids in evaluate.answers(model, tokenizer, examples)]


def asked_alone(task: dict) -> dict:
    """A task without the turns about something else before it; a followup needs those it has."""
    prompt = task["prompt"]
    if isinstance(prompt, str) or task["family"] == "followup":
        return task
    return task | {"prompt": prompt[-1]["content"]}


def careful(rng: Random, task: dict) -> str:
    """A right response, whole and in the form asked for; for demonstrations()."""
    return demonstrate(rng, task, "careful")


def write_families(file: Path, seed: int, families: tuple[str, ...], n: int,
                   stays: Callable[[dict], bool] | None = None) -> Path:
    """n careful demonstrations of these families for --data, or fewer: those that stay. They are of
    the world's training split, from which train_sft.py holds out a tenth; the exams are of the
    other split."""
    rows = demonstrations(seed, n, "train", careful, families)
    if stays:
        rows = list(filter(stays, rows))
    for row in rows:
        # because the turns before would show families that are not among these
        if row["example"]["family"] != "followup":
            row["messages"] = row["messages"][-2:]
    return write_rows(file, rows)


def demonstrations(seed: int, n: int, split: str, answer: Callable[[Random, dict], str],
                   families: tuple[str, ...] = TRAINED_FAMILIES) -> list[dict]:
    """n rows of readers.read_examples() from a world, answered by answer(rng, task) (world.py:
    demonstrate, respond) and not by whom World.examples() draws. The prompts are the same whatever
    the answers; a file of them is split again into what it was drawn for."""
    world = World(seed)
    prompts = Random(f"demonstrations {seed} {split}")
    answers = Random(f"answers {seed} {split}")
    rows = []
    while len(rows) < n:
        example, task = world.draw(prompts, prompts.choice(families), split)
        example["response"] = answer(answers, task)
        # Chains are learned from this column, too: one that the answer leaves out would come back.
        if example["chain"] not in example["response"]:
            example["chain"] = ""
        row = readers.parse_example(example)
        if readers.in_split(readers.user_text(row), split):
            rows.append(row)
    return rows


def tuned_on(rows: list[dict], folder: Path, seed: int, base: Path, n: int, **options) -> dict:
    """Like tuned(), on these rows and no others, examined as a policy: the figures of
    policy_figures(), and the accuracy on "unseen_families" and on "arithmetic" (n // 5 of each
    family), which alone has written-out chains."""
    file = write_rows(folder.with_suffix(".jsonl"), rows)
    families = (*HELDOUT_FAMILIES, "arithmetic")
    exam = tuned(folder, seed, base, families, n // 5, data=str(file), **options)
    of = {"model": read_record(folder)["sha256"], "n": n}
    figures = kept(folder.with_name(f"{folder.name}_policy.json"), of,
                   partial(policy_figures, folder, seed, n))
    unseen = float(np.mean([exam[family] for family in HELDOUT_FAMILIES]))
    return figures | {"unseen_families": unseen, "arithmetic": exam["arithmetic"]}


def policy_figures(folder: Path, seed: int, n: int) -> dict[str, float]:
    """Of the greedy answers to unseen tasks of trained families "accuracy" (2 n tasks), "wordings"
    (n, in unseen wordings), "true_reward" (n) and "form": how often what the prompt says about the
    answer's form is kept to. Drawn at temperature 1, where a fault of fewer than half of the
    demonstrations shows, "drawn_reward" and "consistent" (data_quality.py) of n answers."""
    model, tokenizer = load_model(folder, pick_device("auto"), fast_dtype())
    world = f"world:{seed}"
    found = evaluate.evaluate_policy(model, tokenizer, world, 2 * n, n)
    worded = World(seed).examples(n, "heldout", seed=1, phrasings="heldout")
    wordings = evaluate.accuracy_by_family(worded, evaluate.greedy_texts(model, tokenizer, worded))
    prompts = evaluate.reward_prompts(world, n)
    asks_for_form = np.array(["form" in prompt["key"] for prompt in prompts])
    generator = torch.Generator(model.device).manual_seed(seed)
    responses = evaluate.answers(model, tokenizer, prompts, 1.0, generator)
    texts = evaluate.complete_texts(tokenizer, responses)
    return {"accuracy": found["accuracy"], "wordings": wordings["all"],
            "true_reward": found["true_reward"],
            "form": evaluate.mean_where(asks_for_form, found["whole"]),
            "drawn_reward": float(evaluate.true_rewards(prompts, texts).mean()),
            "consistent": consistent_share(prompts, texts)}


def consistent_share(prompts: list[dict], texts: list[str]) -> float:
    """The share of answers in one format, that of most; an answer that never ended is in none."""
    rows = [readers.parse_example(prompt | {"response": text})
            for prompt, text in zip(prompts, texts) if text.strip()]
    if not rows:
        return 0.0
    hits = data_quality.format_consistency(rows)["consistent"]["value"] * len(rows)
    return hits / len(texts)


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Conversations of readers.read_examples() as a file for --data."""
    kept_columns = ("messages", "task", "chain")
    lines = [json.dumps({name: row[name] for name in kept_columns}) + "\n" for row in rows]
    keep(file, "".join(lines))
    return file


def fast_dtype() -> torch.dtype:
    return pick_dtype("auto", pick_device("auto"))


# ---------------------------------------------------------------------- what is kept and shown

def kept(file: Path, of: dict, make: Callable[[], dict]) -> dict:
    """What make() returns; what it returned before is read from the file, if it was of the same."""
    if file.exists():
        found = json.loads(file.read_text())
        if found["of"] == of:
            return found["figures"]
    figures = make()
    keep(file, json.dumps({"of": of, "figures": figures}, indent=2) + "\n")
    return figures


def cell(values: list[float], form: str) -> str:
    """The mean of the seeds, and from the lowest to the highest."""
    mean = format(float(np.mean(values)), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def keep(file: Path, text: str) -> None:
    """Write a table or figures, in the place of what the experiment wrote there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda temporary: temporary.write_text(text))


def show_table(cfg, text: str) -> None:
    """Write the table beside the picture, --figure, and print it."""
    keep(Path(cfg.figure).with_suffix(".md"), text)
    print(text)


def seed_folder(cfg, seed: int | str) -> Path:
    """Where the models of a seed lie in --out; those of a --quick run apart."""
    return Path(cfg.out) / (f"{seed}_quick" if cfg.quick else str(seed))


def save(figure, file: Path) -> None:
    """The same for a picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)                                  # because pyplot keeps every open figure


def main(cfg: Config) -> None:
    for seed in cfg.seeds.split(","):
        print(base_models(int(seed)))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
