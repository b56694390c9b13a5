"""A tiny run of every stage, whole, stopped and killed, in this process or on two ranks.

    python tests/stages.py FOLDER STAGE...

Each stage leaves STAGE_straight, STAGE_stopped and STAGE_killed in FOLDER, the latter two resumed
to the end. Two ranks are started, by torchrun, in which this script runs the stages.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import folder_of, tiny_model, write_rows
from tiny_runs import make_runs_quick, same_run, under_torchrun, write_corpus

import train_classifier
import train_denoise
import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from plumbing.options import build
from plumbing.run import Run

SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2}
EVERY_STAGE = {"steps": 6, "log_every": 3, "save_every": 2, "device": "cpu", "dtype": "float32"}
SAMPLED = {"max_new_tokens": 6, "batch_size": 4}
CORPUS = {"data": "corpus.txt", "tokenizer": "bytes", "context_length": 32, "batch_size": 2,
          "warmup": 2, "eval_every": 4, "eval_windows": 4, **SIZES}
EXAMPLES = {"init": "sft", "data": "examples.jsonl", "batch_size": 2, "grad_accum": 2, "warmup": 2,
            "eval_every": 4, "eval_examples": 4}
LABELS = {"init": "sft", "batch_size": 2, "warmup": 2, "eval_every": 4}
PAIRS = {"init": "sft", "data": "pairs.jsonl", "batch_size": 2, "warmup": 2, "eval_every": 4}
STAGES = {
    "pretrain": (train_pretrain, CORPUS | {"grad_accum": 2}),
    "experts": (train_pretrain, CORPUS | {"n_experts": 4, "balance": "bias", "router_noise": True,
                                          "optimizer": "muon", "copy_steps": 1}),
    "denoise": (train_denoise, CORPUS | {"data": "documents.jsonl", "objective": "mlm",
                                         "next_sentence": True}),
    "t5": (train_denoise, CORPUS | {"objective": "span"}),
    "sft": (train_sft, EXAMPLES),
    "seq2seq": (train_sft, EXAMPLES | {"init": "two_stacks"}),
    "lora": (train_sft, EXAMPLES | {"peft": "lora", "lora_rank": 2}),
    "adapter": (train_sft, EXAMPLES | {"peft": "adapter", "bottleneck": 2, "template": True}),
    "class": (train_classifier, LABELS | {"data": "texts.jsonl"}),
    "tokens": (train_classifier, LABELS | {"data": "words.jsonl", "task": "tokens",
                                           "train": "last_k", "last_k": 1}),
    "span": (train_classifier, LABELS | {"data": "spans.jsonl", "task": "span", "optimizer": "muon",
                                         "unfreeze": "gradual", "unfreeze_every": 2}),
    "rm": (train_rm, PAIRS | {"max_new_tokens": 6, "n_shift": 4}),
    "dpo": (train_dpo, PAIRS),
    "kto": (train_dpo, PAIRS | {"method": "kto", "data": "labels.jsonl"}),
    "ppo": (train_ppo, SAMPLED | {"init": "sft", "reward": "rm", "prompts": "examples.jsonl",
                                  "minibatch_size": 2}),
    "grpo": (train_grpo, SAMPLED | {"init": "sft", "reward": "rm", "prompts": "examples.jsonl",
                                    "batch_size": 2, "group": 2, "minibatch_size": 2}),
    "reinforce": (train_grpo, SAMPLED | {"init": "sft", "reward": "rm", "batch_size": 2,
                                         "prompts": "examples.jsonl", "group": 2,
                                         "method": "reinforce"})}
INPUTS = ("init", "data", "prompts", "reward")                # options that name a file or folder


def write_inputs(folder: Path) -> Path:
    """A corpus, conversations, pairs, and model folders for the stages after pretraining."""
    write_corpus(folder)
    examples = []
    pairs = []
    labels = []
    documents = []
    texts = []
    words = []
    spans = []
    for i in range(60):
        question = f"what is {i} and one?"
        examples.append({"prompt": question, "response": f"{i + 1}"})
        pairs.append({"prompt": question, "chosen": f"it is {i + 1}", "rejected": f"{i} is odd"})
        labels.append({"prompt": question, "completion": f"it is {i + 1}", "label": i % 2})
        documents.append({"text": f"Bear {i} woke up. It ate {i} berries. Then it slept."})
        texts.append({"text": f"is {i} odd?", "label": i % 2})
        words.append({"tokens": ["bear", f"{i}"], "labels": ["B-bear", "O"]})
        spans.append({"question": "which?", "context": f"bear {i} ate", "answer": f"{i}"})
    write_rows(folder / "documents.jsonl", documents)
    write_rows(folder / "examples.jsonl", examples)
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "labels.jsonl", labels)
    write_rows(folder / "texts.jsonl", texts)
    write_rows(folder / "words.jsonl", words)
    write_rows(folder / "spans.jsonl", spans)
    sizes = SIZES | {"context_length": 64}
    folder_of(tiny_model(**sizes), folder / "sft")
    folder_of(tiny_model(architecture="encoder_decoder", **sizes), folder / "two_stacks")
    folder_of(tiny_model(seed=1, head="scalar", **sizes), folder / "rm")
    return folder


def run(folder: Path, stage: str, out: str, **more) -> None:
    script, options = STAGES[stage]
    options = EVERY_STAGE | options | more | {"out": str(folder / out)}
    for name in INPUTS:
        if name in options:
            options[name] = str(folder / options[name])
    script.main(build(script.Config, options))


class Killed(BaseException):
    """Nothing catches it: what is on the disk is what a kill leaves."""


def interrupted(how: str, step: int):
    """A Run.log after which, at `step`, rank 0 is told to stop or every rank dies."""
    log = Run.log

    def interrupting(self, current, **figures):
        log(self, current, **figures)
        if current == step and how == "killed":
            self.wait_for_checkpoint()         # a thread of this process, which goes on living
            raise Killed
        if current == step and self.rank == 0:
            signal.raise_signal(signal.SIGTERM)
    return interrupting


def run_until(how: str, step: int, folder: Path, stage: str, out: str) -> None:
    log = Run.log
    Run.log = interrupted(how, step)
    try:
        run(folder, stage, out)
    except (SystemExit, Killed):
        assert not (folder / out / "config.json").exists()
    else:
        raise AssertionError(f"{stage} was not {how}")
    finally:
        Run.log = log


def straight_stopped_and_killed(folder: Path, stage: str) -> None:
    run(folder, stage, f"{stage}_straight")
    for how, step in (("stopped", 2), ("killed", 4)):          # 4: a step after the checkpoint
        run_until(how, step, folder, stage, f"{stage}_{how}")
        run(folder, stage, f"{stage}_{how}", resume=True)


def assert_same_end(folder: Path, stage: str) -> None:
    straight = folder / f"{stage}_straight"
    for how in ("stopped", "killed"):
        assert same_run(folder / f"{stage}_{how}", straight), (stage, how)
        for file in straight.glob("adapter.*"):                # LoRA's own weights
            assert (folder / f"{stage}_{how}" / file.name).read_bytes() == file.read_bytes()


def on_two_ranks(folder: Path, names: list[str]) -> None:
    write_inputs(folder)
    under_torchrun(2, __file__, str(folder), *names)


if __name__ == "__main__":
    if "RANK" in os.environ:
        make_runs_quick()
        for stage in sys.argv[2:]:
            straight_stopped_and_killed(Path(sys.argv[1]), stage)
    else:
        on_two_ranks(Path(sys.argv[1]).resolve(), sys.argv[2:])
