"""The runs that test_parallel.py looks at, on two ranks, on four, and on one.

    python tests/parallel_runs.py FOLDER [NAME...]

FOLDER/NAME is one process's; NAME_none and NAME_fsdp are two ranks'; NAME_divided is of ranks that
divide each matrix, NAME_both of two groups of two such ranks (of the NAMEs given, else of "even").
Ranks themselves are started as: torchrun tests/parallel_runs.py --runs JSON
"""
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import END, folder_of, tiny_model, write_rows
from tiny_runs import make_runs_quick, under_torchrun, write_corpus

import sample
import train_denoise
import train_grpo
import train_pretrain
from parallel import local
from plumbing.options import build
from plumbing.run import Run

MODELS = {                                  # what equals one process
    "muon": {}, "adamw": {"optimizer": "adamw", "token_shift": False, "tied": False},
    "accumulated": {"grad_accum": 2, "gradient_checkpointing": True}}
OTHERS = {                                  # what equals DDP: routers are balanced on each rank
    "experts": {"n_experts": 4, "balance": "bias", "gradient_checkpointing": True},
    "bert": {"objective": "mlm"}}           # its figures are of hidden states
EVEN = {"n_kv_heads": 2}                    # what two ranks can divide
DIVIDED = {                                 # what equals one process on ranks with the same tokens
    "even": {}, "even_adamw": {"optimizer": "adamw", "tied": False, "gradient_checkpointing": True},
    "even_experts": {"n_experts": 4, "n_shared_experts": 1, "balance": "bias", "d_expert": 16},
    "t5": {"objective": "span", "eval_windows": 1}, "even_bert": {"objective": "mlm"}}
GRPO = ("reinforce", "grpo")                # with a baseline of all ranks, and without
FOUR = {"d_model": 24, "n_heads": 4, "n_kv_heads": 4}                  # what four can
BOTH = {                                    # what two groups of two ranks equal
    "even": "even", "even_adamw": "even_adamw",                    # one process
    "even_experts": "even_experts_none", "t5": "t5_none"}          # two ranks under DDP
GROUPS = {"shard": "fsdp", "tensor_parallel": 2}


# ---------------------------------------------------------------------- on each rank

def stopping(run, step, **figures):
    """A Run.log after which the runs named stopped are told to stop, a step after a row."""
    log(run, step, **figures)
    if run.out.name.startswith("stopped") and step == 4:
        signal.raise_signal(signal.SIGTERM)


def counted(run, model, *args):
    """A Run.finish before which the rank writes how many numbers it holds, and of how many."""
    held = list(model.parameters())
    for state in run.parts["optimizer"].state.values():
        held += [tensor for tensor in state.values() if getattr(tensor, "ndim", 0)]
    file = run.out / f"held_{run.rank}_of_{run.world_size}.json"
    file.write_text(json.dumps([sum(local(t).numel() for t in held), sum(t.numel() for t in held)]))
    return finish(run, model, *args)


def broken(*args):
    """Log-probs of which rank 1's third are NaN."""
    calls.append(1)
    return logps(*args) * (math.nan if os.environ["RANK"] == "1" and len(calls) == 3 else 1)


def full(descriptor):
    raise OSError(28, "No space left on device")


log = Run.log
finish = Run.finish
logps = train_pretrain.token_logps
fsync = os.fsync
calls = []


def on_a_rank(runs: list[dict]) -> None:
    """All of the runs, one after the other; what a full disk says goes to a file OUT + rank."""
    Run.log = stopping
    Run.finish = counted
    for options in runs:
        out = options["out"]
        train_pretrain.token_logps = broken if out.endswith("skips") else logps
        os.fsync = full if out.endswith("full") and os.environ["RANK"] == "1" else fsync
        try:
            alone(options)
        except SystemExit as end:
            assert end.code == 0
        except OSError as error:
            Path(out + os.environ["RANK"]).write_text(str(error))


def alone(options: dict) -> None:
    """One run in this process."""
    if "group" in options:
        sample.generate = scripted             # because each rank draws random numbers of its own
        train_grpo.main(build(train_grpo.Config, options))
        return
    script = train_denoise if "objective" in options else train_pretrain
    script.main(build(script.Config, options))


def scripted(model, prompts, max_new_tokens, *args, group, **options) -> list[list[int]]:
    """A sample.generate whose answers follow from the prompts alone."""
    return [[65 + (sum(ids) + 7 * j) % 26] * (j + 1) + [END] for ids in prompts
            for j in range(group)]


# ---------------------------------------------------------------------- all of them

def main(out: Path, groups: list[str]) -> None:
    """groups: which of BOTH."""
    corpus = write_corpus(out)

    def options(name, batch_size, **more) -> dict:
        return {"out": str(out / name), "data": str(corpus), "tokenizer": "bytes",
                "d_model": 20, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1,
                "context_length": 32, "token_shift": True, "optimizer": "muon", "steps": 8,
                "batch_size": batch_size, "warmup": 3, "log_every": 3, "eval_every": 4,
                "eval_windows": 4, "save_every": 0,
                "device": "cpu", "dtype": "float32"} | more

    two = []
    for name, model in (MODELS | OTHERS).items():
        two += [options(f"{name}_{shard}", 2, shard=shard, **model) for shard in ("none", "fsdp")]
    for name, model in DIVIDED.items():
        two.append(options(f"{name}_divided", 4, tensor_parallel=2, **EVEN, **model))
    for name in groups:
        if BOTH[name].endswith("_none"):
            two.append(options(BOTH[name], 2, **EVEN, **DIVIDED[name]))
    two.append(options("stopped_divided", 4, tensor_parallel=2, **EVEN))
    two.append(options("stopped", 2, shard="fsdp"))
    two.append(options("skips", 2, shard="fsdp"))
    two.append(options("full", 2, shard="fsdp", steps=2))
    two += [options("stopped_2", 2, shard="fsdp", resume=resume) for resume in (False, True)]
    folder_of(tiny_model(), out / "sft")
    folder_of(tiny_model(4, head="scalar"), out / "rm")
    write_rows(out / "prompts.jsonl", [{"prompt": "why" + "?" * i} for i in range(12)])
    grpo = {"init": str(out / "sft"), "reward": str(out / "rm"), "group": 3, "minibatch_size": 4,
            "prompts": str(out / "prompts.jsonl"), "max_new_tokens": 4, "steps": 4, "lr": 1e-2,
            "log_every": 1, "save_every": 0, "device": "cpu", "dtype": "float32"}
    for method in GRPO:
        two.append(grpo | {"out": str(out / f"{method}_none"), "method": method, "batch_size": 2})
    under_torchrun(2, __file__, "--runs", json.dumps(two))

    for ranks in (1, 4):
        shutil.copytree(out / "stopped", out / f"resumed_{ranks}")
        shutil.copytree(out / "stopped_divided", out / f"redivided_{ranks}")
    four = [options("four", 1, shard="fsdp"), options("four_none", 1),
            options("quarters_divided", 4, tensor_parallel=4, **FOUR),
            options("resumed_4", 1, shard="fsdp", resume=True)]
    four += [options(f"{name}_both", 2, **GROUPS, **EVEN, **DIVIDED[name]) for name in groups]
    four.append(options("redivided_4", 2, resume=True, **GROUPS, **EVEN))
    under_torchrun(4, __file__, "--runs", json.dumps(four))

    divided = {name: EVEN | model for name, model in DIVIDED.items()}
    for name, model in (MODELS | divided | {"quarters": FOUR}).items():
        alone(options(name, 4, **model))
    for method in GRPO:
        alone(grpo | {"out": str(out / method), "method": method, "batch_size": 4})
    alone(options("resumed_1", 4, resume=True))
    alone(options("redivided_1", 4, resume=True, **EVEN))


if __name__ == "__main__":
    make_runs_quick()
    if sys.argv[1] == "--runs":
        on_a_rank(json.loads(sys.argv[2]))
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:] or ["even"])
