"""parallel.py: ranks under torchrun train as one process does with the same global batch.

Tolerances: sums of fp32 numbers in another order differ by 1e-7 of them. In these few steps losses
and gradient norms stay within 1e-5, and weights within 1e-4, a fortieth of one step at --lr 4e-3
(AdamW divides by the gradient, of which near zero nothing but rounding may be left).
"""
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import parallel
import train_pretrain
import training

ROOT = Path(__file__).resolve().parents[1]
MODELS = {                                  # what equals one process
    "muon": {}, "adamw": {"optimizer": "adamw", "tied": False},
    "accumulated": {"grad_accum": 2, "gradient_checkpointing": True}}
OTHERS = {                                  # what equals DDP: routers are balanced on each rank
    "experts": {"n_experts": 4, "balance": "bias", "gradient_checkpointing": True},
    "bert": {"objective": "mlm"}}           # its figures are of hidden states

RANK = """import json, math, os, signal, sys, training, train_pretrain
from parallel import local
log, finish, scores = training.Run.log, training.Run.finish, train_pretrain.token_logps
calls = []
def stopping(run, step, **figures):
    log(run, step, **figures)
    if run.out.name.startswith("stopped") and step == 4:       # a step after the newest row
        signal.raise_signal(signal.SIGTERM)
def counted(run, model, *args):
    held = [*model.parameters()] + [t for state in run.tracked["optimizer"].state.values()
                                    for t in state.values() if getattr(t, "ndim", 0)]
    file = run.out / f"held_{run.rank}_of_{run.world_size}.json"
    file.write_text(json.dumps([sum(local(t).numel() for t in held), sum(t.numel() for t in held)]))
    return finish(run, model, *args)
def broken(*args):
    calls.append(1)
    return scores(*args) * (math.nan if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
training.plot_curves = lambda *args: None
training.Run.log, training.Run.finish = stopping, counted
for options in json.loads(sys.argv[1]):
    train_pretrain.token_logps = broken if options["out"].endswith("skips") else scores
    try:
        train_pretrain.main(train_pretrain.Config(**options))
    except SystemExit as end:
        assert end.code == 0
"""


def under_torchrun(ranks: int, runs: list[dict]) -> None:
    """All of the runs, one after the other, in the same processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
         "--master_port", str(port), "--no_python", sys.executable, "-c", RANK, json.dumps(runs)],
        cwd=ROOT, env=training.os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """All runs that the tests look at: ONE/..., NAME_none and NAME_fsdp on two ranks, ..."""
    out = tmp_path_factory.mktemp("parallel")
    text = "".join(f"{i} bears and {j} bears are {i + j} bears.\n"
                   for i in range(8) for j in range(9))
    (out / "corpus.txt").write_text(text)

    def options(name, batch_size, **more) -> dict:
        return {"out": str(out / name), "data": str(out / "corpus.txt"), "tokenizer": "bytes",
                "d_model": 20, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1,
                "context_length": 32, "copy_steps": 0, "steps": 8, "batch_size": batch_size,
                "warmup": 3, "log_every": 3, "eval_every": 4, "eval_windows": 4, "save_every": 0,
                "device": "cpu", "dtype": "float32"} | more

    under_torchrun(2, [options(f"{name}_{shard}", 2, shard=shard, **model)
                       for name, model in (MODELS | OTHERS).items() for shard in ("none", "fsdp")]
                   + [options("stopped", 2, shard="fsdp"), options("skips", 2, shard="fsdp")]
                   + [options("stopped_2", 2, shard="fsdp", resume=resume)
                      for resume in (False, True)])
    for name in ("resumed_1", "resumed_4"):
        shutil.copytree(out / "stopped", out / name)
    under_torchrun(4, [options("four", 1, shard="fsdp"),
                       options("resumed_4", 1, shard="fsdp", resume=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curves", lambda *args: None)
        for name, model in MODELS.items():
            train_pretrain.main(train_pretrain.Config(**options(name, 4, **model)))
        train_pretrain.main(train_pretrain.Config(**options("resumed_1", 4, resume=True)))
    return out


def same_to_rounding(a: Path, b: Path) -> None:
    rows = [training.read_metrics(folder) for folder in (a, b)]
    assert len(rows[0]) == 5 and all(math.isfinite(row["loss"]) for row in rows[0])
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"tokens", "tokens_per_s", "mfu", "memory_gb"}:   # rank 0's
            assert other[name] == pytest.approx(one[name], rel=1e-5), (name, one, other)
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_ranks_train_as_one_process_with_the_same_global_batch(out, name, shard):
    same_to_rounding(out / name, out / f"{name}_{shard}")


@pytest.mark.parametrize("name", OTHERS)
def test_sharded_ranks_train_as_ranks_with_all_the_weights(out, name):
    same_to_rounding(out / f"{name}_none", out / f"{name}_fsdp")


def test_four_sharded_ranks_train_as_one_process(out):
    same_to_rounding(out / "muon", out / "four")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_stopped_on_two_sharded_ranks_goes_on_on_another_number_of_them(out, ranks):
    """Between two rows, the later of which has what both ranks had seen; on 1, without shards."""
    same_to_rounding(out / "muon", out / f"resumed_{ranks}")


def test_on_the_same_number_of_them_it_goes_on_bit_for_bit(out):
    straight, resumed = (out / name / "model.safetensors" for name in ("muon_fsdp", "stopped_2"))
    assert straight.read_bytes() == resumed.read_bytes()
    assert (resumed.parent / "checkpoints" / "step_000005").exists()


def test_each_rank_holds_its_share_of_the_weights_and_of_the_optimizers_state(out):
    for folder, ranks, shared in (("muon_fsdp", 2, True), ("adamw_fsdp", 2, True),
                                  ("four", 4, True), ("resumed_4", 4, True),
                                  ("muon_none", 2, False)):
        held, all_of_it = zip(*(json.loads((out / folder / f"held_{rank}_of_{ranks}.json")
                                           .read_text()) for rank in range(ranks)))
        if shared:                                   # of 10 rows four ranks have 3, 3, 3 and 1
            assert sum(held) == all_of_it[0] and max(held) < 1.05 * sum(held) / ranks
        else:
            assert held == all_of_it


def test_a_nan_on_one_rank_is_skipped_by_all(out):
    rows = training.read_metrics(out / "skips")
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 1, 1]
    assert all(weight.isfinite().all() for weight in
               safetensors.torch.load_file(out / "skips" / "model.safetensors").values())


@pytest.mark.parametrize("options, dtype, named", [
    ({"shard": "ddp"}, torch.float32, "--shard ddp: give none or fsdp"),
    ({}, torch.float32, "start it by torchrun"),
    ({"ranks": 2}, torch.float16, "with float16: .* give --dtype bfloat16 or float32"),
    ({"ranks": 2, "compile": True}, torch.float32, "does not go with --compile"),
    ({"ranks": 2, "peft": "lora"}, torch.float32, "does not go with --peft lora")])
def test_what_cannot_be_sharded_is_refused(monkeypatch, options, dtype, named):
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: "ranks" in options)
    cfg = SimpleNamespace(**{"shard": "fsdp", "compile": False} | options)
    with pytest.raises(ValueError, match=named):
        parallel.check(cfg, dtype)
    parallel.check(SimpleNamespace(**vars(cfg) | {"shard": "none"}), dtype)
