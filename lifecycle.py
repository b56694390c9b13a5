"""
The whole life of a language model in one command: pretraining -> supervised fine-tuning -> reward
model -> DPO and, beside it, PPO, on the embedded world, and a report of what each stage changed.

    python lifecycle.py                    # minutes on two CPU cores; a GPU is used if there
    python lifecycle.py --preset smoke     # every stage, real but short: under a minute
    python sample.py --init out/dpo        # then talk to it
    python lifecycle.py --base out/smollm2 --sft_data F --pairs F --prompts F     # own_life.py

Writes out/{pretrain,sft,rm,chosen,dpo,ppo}/, out/report.md, out/report.json, pictures, and
out/blind.md for readers who are to judge without knowing which model wrote. Run again, it skips
what is finished with the same settings and goes on with what was interrupted; a stage whose
settings have changed runs afresh, its earlier folder is kept as out/STAGE.1, .2, ...
"""
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
import own_life
import readers
import sample
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from model import parameter_count
from plumbing import claim
from plumbing.checkpoints import newest_checkpoint, read_meta
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model, parents, read_record
from plumbing.inputs import differences, read_by
from plumbing.options import build, command_line, flat
from report import (
    ALIGNED,
    POLICIES,
    REPORT_FILES,
    beyond_defaults,
    stage_rows,
    summarize,
    write_blind,
    write_report,
)
from world.tasks import TRAINED_FAMILIES
from world.text import text_of

STAGES = {"pretrain": train_pretrain, "sft": train_sft, "rm": train_rm, "chosen": train_sft,
          "dpo": train_dpo, "ppo": train_ppo}
# Of the 20 prompts whose answers people read: two of what is known and what is unknown.
READ_TWICE = ("facts", "unanswerable")

# Only what differs from the scripts' own defaults; "exam": how many tasks and prompts.
PRESETS = {
    "tiny": {
        "pretrain": {"optimizer": "muon", "common": 3.0, "n_heads": 2, "rope_theta": 1000.0},
        "sft": {"optimizer": "muon", "lr": 4e-3, "steps": 900, "eval_every": 300,
                "eval_examples": 500},
        "rm": {"optimizer": "muon", "lr": 1e-3, "n_pairs": 16_000, "steps": 1000,
               "eval_every": 500},
        "chosen": {"n_examples": 8000, "steps": 100, "lr": 5e-4},
        "dpo": {"beta": 1.0, "lr": 1e-4},
        "ppo": {"steps": 45, "lr": 1.5e-4, "beta": 0.4, "kl_target": 0.0},
    },
    "smoke": {
        "pretrain": {"max_bytes": 1_000_000, "steps": 80, "warmup": 10, "eval_windows": 16},
        "sft": {"n_examples": 2000, "steps": 50, "warmup": 5, "eval_examples": 40},
        "rm": {"n_pairs": 800, "steps": 50, "warmup": 5, "eval_pairs": 100, "n_shift": 20},
        "chosen": {"n_examples": 1000, "steps": 10, "warmup": 2, "eval_examples": 40},
        "dpo": {"n_pairs": 1000, "steps": 60, "beta": 0.1, "lr": 1e-4, "warmup": 5,
                "eval_pairs": 100},
        "ppo": {"n_prompts": 200, "steps": 3, "batch_size": 16, "minibatch_size": 8},
        "exam": {"n_tasks": 40, "n": 30},
    },
    "gpu": {
        "pretrain": {"max_bytes": 200_000_000, "vocab_size": 4096, "d_model": 512, "n_layers": 8,
                     "n_heads": 8, "batch_size": 64, "steps": 4000, "lr": 1e-3, "compile": True},
        "sft": {"n_examples": 60_000, "steps": 1500, "batch_size": 32, "lr": 3e-4},
        "rm": {"n_pairs": 60_000, "steps": 1500, "batch_size": 64, "lr": 2e-4},
        "chosen": {"n_examples": 30_000, "steps": 200, "batch_size": 32, "lr": 1e-4},
        "dpo": {"n_pairs": 30_000, "steps": 600, "batch_size": 64, "lr": 5e-5},
        "ppo": {"steps": 150, "batch_size": 256, "minibatch_size": 128, "lr": 5e-5,
                "critic_lr": 1e-4},
        "exam": {},
    },
}


@dataclass
class Config:
    preset: str = "tiny"              # tiny (two CPU cores) | smoke (a quick try) | gpu
    seed: int = 0                     # of the world, weights, batches and samples, in [0, 4e9]
    out: str = "out"                  # where the six model folders and the report go
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    base: str = ""                    # a model from elsewhere (convert.py), and its data:
    sft_data: str = ""                # with --base: demonstrations, as for train_sft.py
    pairs: str = ""                   # with --base: preferences, as for train_dpo.py
    prompts: str = ""                 # with --base: prompts, as for train_ppo.py


# ---------------------------------------------------------------------- the stages

def stages(cfg: Config) -> dict[str, tuple[Callable, object]]:
    """Each stage's main and its config: one model folder in, one out."""
    folders = {name: str(Path(cfg.out) / name) for name in STAGES}
    world = f"world:{cfg.seed}"
    inputs = {
        "pretrain": {"data": world},
        "sft": {"init": folders["pretrain"], "data": world},
        "rm": {"init": folders["sft"], "data": world},
        # The pairs that DPO reads, of which it sees the chosen answers alone.
        "chosen": {"init": folders["sft"], "data": world, "chosen": True},
        "dpo": {"init": folders["sft"], "data": world},
        "ppo": {"init": folders["sft"], "reward": folders["rm"], "prompts": world},
    }
    plan = {}
    for name, script in STAGES.items():
        options = {"out": folders[name], "seed": cfg.seed, "device": cfg.device,
                   "dtype": cfg.dtype}
        options |= inputs[name]
        # The preset comes last, so that it may change any option.
        options |= PRESETS[cfg.preset].get(name, {})
        plan[name] = (script.main, build(script.Config, options))
    return plan


def run_stage(main: Callable, cfg) -> dict:
    """Skip a stage that is finished with this config and these parents, go on with one that was
    interrupted, and run anything else afresh. Returns the stage's result."""
    out = Path(cfg.out)
    record_file = out / "config.json"                      # written last: there when finished
    goes_on = False
    if record_file.exists():
        record = read_record(out)
        if is_same_run(record, cfg):
            print(f"{record['stage']}: finished before, skipped ({cfg.out})", file=sys.stderr)
            return record["result"]
    else:
        checkpoint = newest_checkpoint(out)                # None before the first
        if checkpoint is not None:
            record = read_meta(checkpoint)
            goes_on = is_same_run(record, cfg)
    # Set aside and not overwritten, because it may have taken someone's hours.
    if out.is_dir() and not goes_on:
        set_aside(out)
    return main(dataclasses.replace(cfg, resume=goes_on))


def is_same_run(record: dict, cfg) -> bool:
    """Whether a record, of a finished stage or of a checkpoint, is of this config and has the
    parents and the inputs of now."""
    # --resume and the like say what to do with a folder, and nothing about what comes out.
    ignored = {"resume": False, "insist": False, "overwrite": False}
    # an option that has come since has done nothing in that run, which is what its default does
    recorded = flat(type(cfg)()) | record.get("config", {}) | ignored
    wanted = flat(cfg) | ignored
    # Checksums of the parents' weights too, because a folder may have been trained again.
    if recorded != wanted or record.get("parents") != parents(cfg):
        return False
    # And of data, because a file may have been written again, or the world's code changed. "out" is
    # what a stage has made itself.
    began = {option: files for option, files in record.get("inputs", {}).items() if option != "out"}
    return not differences(began, read_by(cfg, [], began))


def set_aside(out: Path) -> None:
    """Rename a folder to the first of out.1, out.2, ... that is free. Raises ValueError while
    another run writes there."""
    claim.lock(out)
    claim.unlock(out)                  # the stage will hold that of the new folder
    kept = claim.number(out)
    print(f"{out} is of other settings: kept as {kept}", file=sys.stderr)


# ---------------------------------------------------------------------- the exam

def examine(configs: dict, cfg: Config) -> tuple[dict, dict]:
    """Greedy answers of the models of POLICIES to the same held-out exam.

    Returns the figures of each model and the answers to 20 prompts.
    """
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    # The world that the stages were trained on, whose held-out part none of them has read.
    world = f"world:{cfg.seed}"
    size = {"n_tasks": 1000, "n": 1000} | PRESETS[cfg.preset].get("exam", {})
    to_read = []
    for family in TRAINED_FAMILIES:
        number = 2 if family in READ_TWICE else 1
        to_read += evaluate.exam(world, number, (family,))
    figures = {}
    shown = {"families": [example["family"] for example in to_read],
             "prompts": [text_of(example["prompt"]) for example in to_read]}
    for name in POLICIES:
        model, tokenizer = load_model(configs[name].out, device, dtype)
        n_tasks = size["n_tasks"]
        n = size["n"]
        if name == "pretrain":
            # A fifth, because the base model knows no end: it is slow, and hardly ever right.
            n_tasks //= 5
            n //= 5
        figures[name] = evaluate.evaluate_policy(model, tokenizer, world, n_tasks, n)
        figures[name]["parameters"] = parameter_count(model)
        if name == "pretrain":
            figures[name] |= examine_language(model, tokenizer, configs[name])
            # Bare text, because the roles' tokens are still untrained at this stage.
            responses = continuations(model, tokenizer, to_read)
        else:
            responses = evaluate.answers(model, tokenizer, to_read)
        shown[name] = [tokenizer.decode(ids) for ids in responses]
        if name == "sft":
            sft = model                                    # kept, because the KL is to this model
        elif name in ALIGNED:
            figures[name] |= evaluate.wins_over(figures[name], figures["sft"])
            prompts = evaluate.reward_prompts(world, size["n"])
            figures[name]["kl"] = evaluate.kl_to(model, sft, tokenizer, prompts, cfg.seed)
    return figures, shown


def continuations(model, tokenizer, examples: list[dict]) -> list[list[int]]:
    """40 tokens after each bare prompt, for a base model that has never seen a conversation."""
    prompts = [tokenizer.encode(text_of(example["prompt"])) for example in examples]
    return sample.generate(model, prompts, 40, (tokenizer.endoftext,))


def examine_language(model, tokenizer, cfg: train_pretrain.Config, n: int = 32) -> dict:
    """Fluency of documents sampled from the base model, beside held-out documents of the corpus."""
    # 2 MB of the training text, enough to find a copy of a template and quick to count.
    training_texts = list(readers.read_documents(cfg.data, split="train", max_bytes=2_000_000))
    heldout = readers.read_documents(cfg.data, split="heldout", max_bytes=1_000_000)
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    # 160 tokens hold six in ten documents of the corpus from beginning to end.
    length = min(160, model.config.context_length - 1)
    starts = [[tokenizer.endoftext]] * n                   # a document follows the end of another
    sampled = sample.generate(model, starts, length, (tokenizer.endoftext,), 0.8,
                              generator=generator)
    stories = [tokenizer.decode(ids) for ids in sampled]
    # Held-out documents are cut to the stories' lengths, because longer texts repeat more words.
    real = []
    for story, text in zip(stories, heldout):
        n_words = len(story.split())
        words = text.split()[:n_words]
        real.append(" ".join(words))
    return {"stories": stories[:3], "fluency": evaluate.fluency(stories, training_texts),
            "fluency_corpus": evaluate.fluency(real, training_texts)}


def main(cfg: Config) -> dict:
    own_life.check(cfg)
    if cfg.base:
        return own_life.live(cfg, run_stage)
    plan = stages(cfg)
    # Here already, because the first stage would find it wrong after an earlier run has made room.
    pick_dtype(cfg.dtype, pick_device(cfg.device))
    out = Path(cfg.out)
    claim.lock(out)
    claim.refuse_foreign(out, REPORT_FILES)            # before the hours and not after them
    configs = {}
    results = {}
    for name, (train, config) in plan.items():
        configs[name] = config
        results[name] = run_stage(train, config)
    started = time.perf_counter()
    figures, shown = examine(configs, cfg)
    minutes = (time.perf_counter() - started) / 60
    # Of skipped stages too: what the whole takes, and not what is left of it.
    minutes += sum(result["minutes"] for result in results.values())
    report = summarize(results, figures, minutes)
    report["beyond_defaults"] = beyond_defaults(configs)
    claim.add(out, *REPORT_FILES)
    write_report(report, figures, shown, configs, out)
    write_blind(shown, cfg.seed, out)
    claim.unlock(out)
    for name, measure, change in stage_rows(report):
        stage_minutes = report["stages"][name]["minutes"]
        print(f"{name:9s} {stage_minutes:5.1f} min   {measure}: {change}")
    print(f"{report['minutes']:.1f} minutes; read {out}/report.md, or talk to it:\n"
          f"    python sample.py --init {out}/dpo")
    return report


if __name__ == "__main__":
    command_line(main, Config, __doc__)
