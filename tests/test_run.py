"""plumbing/run.py: one update, the folder of a run, and runs that are stopped in every way."""
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import free_port, metrics, same_run, start, tiny_run, wait_for_rows, write_corpus
from torch import nn

import corpus as corpora
import train_pretrain
from plumbing import claim
from plumbing import run as run_file
from plumbing.checkpoints import newest_checkpoint, read_checkpoint
from plumbing.curves import read_metrics
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import flat
from plumbing.run import Run
from tokenizer import Tokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path)


@pytest.fixture
def straight(tmp_path, corpus) -> Path:
    train_pretrain.main(tiny_run(tmp_path / "straight", corpus))
    return tmp_path / "straight"


# ---------------------------------------------------------------------- devices, precision, updates

@pytest.mark.parametrize("call, named", [
    (lambda: pick_device("gpu"), "--device gpu: .*give auto, cpu, cuda"),
    (lambda: pick_dtype("float8", torch.device("cpu")), "--dtype float8: give auto"),
    (lambda: pick_dtype("float16", torch.device("cpu")), "float16 needs a GPU")])
def test_a_device_or_precision_that_is_not_there_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_a_gpu_that_is_picked_is_the_one_that_kernels_are_launched_on(monkeypatch):
    launched_on = []
    monkeypatch.setattr(torch.cuda, "set_device", launched_on.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(
        device=torch.device(device)))
    assert pick_device("cuda:1") == torch.device("cuda:1") and launched_on == [
        torch.device("cuda:1")]


def test_clip_shortens_and_step_sets_the_rate_and_steps(tmp_path):
    run, weight = start(tmp_path), nn.Parameter(torch.zeros(2))
    model, optimizer = nn.ParameterList([weight]), torch.optim.SGD([weight], lr=123.0)
    weight.grad = torch.tensor([3.0, 4.0])
    norm = run.clip(model, max_norm=1.0)
    assert norm.item() == 5.0                                          # that before clipping
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert run.step(optimizer, lr=2.0, loss=torch.tensor(1.0), grad_norm=norm)
    assert weight.tolist() == pytest.approx([-2 * 0.6, -2 * 0.8], rel=1e-5)
    weight.grad = torch.tensor([0.3, 0.4])
    norm = run.clip(model, max_norm=1.0)
    assert norm.item() == pytest.approx(0.5)
    assert run.step(optimizer, lr=1.0, loss=torch.tensor(1.0), grad_norm=norm)
    assert weight.tolist() == pytest.approx([-1.5, -2.0], rel=1e-5)
    assert not run.step(optimizer, lr=1.0, loss=torch.tensor(math.nan), grad_norm=norm)
    assert weight.tolist() == pytest.approx([-1.5, -2.0], rel=1e-5)


def test_a_step_waits_for_the_gpu_once_however_many_micro_batches_it_has(tmp_path, monkeypatch):
    waits, run, weight = [], start(tmp_path), nn.Parameter(torch.ones(1))
    model, optimizer = nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1)
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name, real=real: (
            waits.append(name), real(*args))[1])
    loss = 0.0
    for factor in (1.0, 2.0, 3.0):
        batch_loss = factor * weight.sum()
        run.backward(batch_loss)
        loss += batch_loss.detach()
    run.step(optimizer, 0.1, loss, run.clip(model, max_norm=1.0))
    monkeypatch.undo()
    assert waits == ["tolist"] and weight.item() < 1


def test_due_is_every_so_many_steps_and_after_the_last(tmp_path):
    run = start(tmp_path)                                              # 8 steps
    assert [step for step in range(8) if run.due(step, 3)] == [2, 5, 7]
    assert [step for step in range(8) if run.due(step, 1)] == list(range(8))
    assert [step for step in range(8) if run.due(step, 0)] == [7]


def test_seeds_fix_every_source_of_random_numbers(tmp_path):
    def draws(seed):
        run = start(tmp_path, seed=seed, resume=True)
        return (torch.rand(1).item(), np.random.rand(), random.random(),
                *(torch.rand(1, generator=run.generator(step)).item() for step in (0, 1)))
    assert draws(1) == draws(1)
    assert not set(draws(1)) & set(draws(2))
    assert len(set(draws(1))) == 5


@pytest.mark.parametrize("name", ["batch_size", "grad_accum", "eval_windows"])
def test_a_count_below_one_is_refused(tmp_path, corpus, name):
    with pytest.raises(ValueError, match=f"--{name} 0: give a number >= 1"):
        train_pretrain.main(tiny_run(tmp_path / "out", corpus, **{name: 0}))


# ---------------------------------------------------------------------- the folder

def test_a_run_writes_the_whole_model_folder_and_learns(tmp_path, corpus):
    out = tmp_path / "out"
    result = train_pretrain.main(tiny_run(out, corpus, steps=40, lr=1e-2))
    assert {f.name for f in out.iterdir()} == {
        ".lock", "files.json", "config.json", "model.safetensors", "tokenizer.json",
        "metrics.jsonl", "checkpoints"}                                # no picture here
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [0, 3, 4, 7, 9, 11, 14, 15, 19, 23, 24, 27, 29, 31, 34,
                                             35, 39]
    for row in rows:
        assert {"step", "loss", "grad_norm", "lr", "tokens", "mfu", "memory_gb"} <= row.keys()
        assert ("val_loss" in row) == ("bits_per_byte" in row) == ((row["step"] + 1) % 5 == 0)
        assert all(math.isfinite(value) for value in row.values())
    assert abs(rows[0]["loss"] - math.log(272)) < 0.1 and rows[-1]["val_loss"] < 4
    assert result["val_loss"] == rows[-1]["val_loss"]
    model, tokenizer = load_model(out)
    assert tokenizer == Tokenizer.bytes() and model.config.d_model == 16


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, corpus):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_pretrain.main(tiny_run(tmp_path / name, corpus, seed=seed))
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_config_json_records_where_a_model_comes_from(tmp_path, corpus):
    base, out = tmp_path / "base", tmp_path / "out"
    train_pretrain.main(tiny_run(base, corpus, seed=4))
    cfg = tiny_run(out, corpus, init=str(base), steps=6)
    result = train_pretrain.main(cfg)
    record = json.loads((out / "config.json").read_text())
    checksum = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert record["parents"] == {str(base): checksum}
    assert json.loads((base / "config.json").read_text())["parents"] == {}
    assert record["stage"] == "pretrain" and record["seed"] == 0
    assert record["config"] == flat(cfg)
    assert record["model"]["d_model"] == 16 and record["result"] == result
    assert record["versions"]["torch"] == torch.__version__
    # it went on from the parent: the first loss is far below log 272
    assert metrics(out)[0]["loss"] < metrics(base)[-1]["loss"] + 0.2 < math.log(272)


def test_a_stage_never_writes_over_the_model_it_reads(tmp_path, corpus):
    base = tmp_path / "base"
    train_pretrain.main(tiny_run(base, corpus))
    weights = (base / "model.safetensors").read_bytes()
    for out in (base, tmp_path / "x" / ".." / "base"):
        with pytest.raises(ValueError, match="--out .*base is or holds what this stage reads"):
            train_pretrain.main(tiny_run(out, corpus, init=str(base), overwrite=True))
    assert (base / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("batch_size, grad_accum", [(2, 2), (1, 4)])
def test_gradient_accumulation_equals_the_large_batch(tmp_path, corpus, batch_size, grad_accum):
    """Also where windows differ in their number of targets: the corpus' last one has fewer."""
    train_pretrain.main(tiny_run(tmp_path / "large", corpus, log_every=1, steps=20))
    train_pretrain.main(tiny_run(tmp_path / "small", corpus, log_every=1, steps=20,
                                 batch_size=batch_size, grad_accum=grad_accum))
    large, small = metrics(tmp_path / "large"), metrics(tmp_path / "small")
    assert large[0]["tokens"] < large[1]["tokens"] - large[0]["tokens"]        # in the first step
    for a, b in zip(large, small, strict=True):
        assert a["tokens"] == b["tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


# ---------------------------------------------------------------------- stopped and resumed

@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_and_resumed_ends_bit_for_bit_the_same(tmp_path, corpus, straight,
                                                                         monkeypatch, capsys,
                                                                         signum):
    out, log = tmp_path / "out", Run.log

    def interrupting(self, step, **figures):
        log(self, step, **figures)
        if step == 6:                                                  # between two rows
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Run, "log", interrupting)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as exit:
        train_pretrain.main(tiny_run(out, corpus))
    message = f"pretrain: stopped after step 6; everything is saved in {out}, --resume goes on"
    assert exit.value.code == (130 if signum == signal.SIGINT else 0)
    assert message in capsys.readouterr().err
    assert signal.getsignal(signum) is before
    assert newest_checkpoint(out).name == "step_000007"
    assert not (out / "config.json").exists()                          # not a finished model
    monkeypatch.setattr(Run, "log", log)
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)


def test_a_rank_stops_with_the_rank_that_was_interrupted(tmp_path, monkeypatch, capsys):
    run, done = start(tmp_path), []
    run.track(model=nn.Linear(2, 2))
    stops = iter([0.0, 0.0, 0.5])                                      # half of the ranks
    monkeypatch.setattr(run, "mean_over_ranks", lambda value: next(stops, value))
    with pytest.raises(SystemExit):
        done.extend(run.steps(8))
    assert "stopped after step 2" in capsys.readouterr().err
    assert newest_checkpoint(run.out).name == "step_000003"


def test_an_interrupted_run_exits_when_its_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    gate, save = threading.Event(), torch.save

    def slow(*args):
        assert gate.wait(60)
        save(*args)
    monkeypatch.setattr(torch, "save", slow)
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(SystemExit):
        for _step in run.steps(8):
            signal.raise_signal(signal.SIGTERM)
    assert read_checkpoint(newest_checkpoint(run.out))["step"] == 1


def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path, corpus, straight):
    """As a power cut at step 11 leaves it: the checkpoint of step 10, rows after it, half a row,
    half a checkpoint."""
    out = tmp_path / "out"
    train_pretrain.main(tiny_run(out, corpus))
    newest = out / "checkpoints" / "step_000012"
    newest.rename(newest.with_name("step_000012.tmp"))
    (newest.with_name("step_000012.tmp") / "meta.json").unlink()
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    assert newest_checkpoint(out).name == "step_000010"
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)
    assert newest_checkpoint(out).name == "step_000012"


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, corpus, straight):
    out = tmp_path / "out"
    claim.lock(out)
    claim.add(out, "metrics.jsonl")
    (out / "metrics.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"step": 3, "loss": 8.0}\n')
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)


def test_resuming_a_finished_run_changes_nothing(tmp_path, corpus, straight):
    rows, weights = metrics(straight), (straight / "model.safetensors").read_bytes()
    train_pretrain.main(tiny_run(straight, corpus, resume=True))
    assert metrics(straight) == rows
    assert (straight / "model.safetensors").read_bytes() == weights


def test_resuming_goes_on_with_the_same_random_numbers(tmp_path):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    torch.rand(3)
    run.save_checkpoint(1)
    run.wait_for_checkpoint()
    expected = torch.rand(4)
    start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
    assert torch.equal(torch.rand(4), expected)


def test_resuming_goes_on_with_as_many_threads(tmp_path, monkeypatch):
    """Another number of them would add in another order; OMP_NUM_THREADS changes it knowingly."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run_file, "ALL_THREADS", 2)
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    run.save_checkpoint(1)                             # with one, as all tests
    run.wait_for_checkpoint()
    try:
        torch.set_num_threads(2)
        start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_resuming_with_other_sizes_is_refused(tmp_path, corpus, straight):
    with pytest.raises(ValueError, match="step_000012: its model is not the one of this run"):
        train_pretrain.main(tiny_run(straight, corpus, resume=True, d_model=32))


def test_a_resumed_run_says_which_options_are_not_those_it_began_with(tmp_path, corpus, capsys):
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, save_every=6))
    capsys.readouterr()
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, save_every=6, steps=14, lr=1e-4,
                                 resume=True))
    said = capsys.readouterr().err
    assert "the run began with --lr" in said and "from here on it is 0.0001" in said
    assert "the run began with --steps 12; from here on it is 14: the learning rate follows" in said
    assert "the learning rate leaps from " in said and "--resume" not in said


# ---------------------------------------------------------------------- skipped updates

@pytest.fixture
def bad_losses(monkeypatch):
    """Steps whose loss is NaN, to be filled in."""
    steps, batch, scores = set(), corpora.TrainingData.batch, train_pretrain.token_logps
    now = []
    monkeypatch.setattr(corpora.TrainingData, "batch",
                        lambda self, step: (now.append(step), batch(self, step))[1])
    monkeypatch.setattr(train_pretrain, "token_logps", lambda *args: scores(*args) * (
        math.nan if torch.is_grad_enabled() and now[-1] in steps else 1))
    return steps


def test_a_skipped_step_is_one_that_the_optimizer_never_saw(tmp_path, corpus, bad_losses,
                                                            monkeypatch):
    bad_losses |= {4, 7}
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, log_every=1))
    bad_losses.clear()
    step = Run.step

    def without(run, *args):
        return run.current_step not in (4, 7) and step(run, *args)
    monkeypatch.setattr(Run, "step", without)
    train_pretrain.main(tiny_run(tmp_path / "expected", corpus, log_every=1))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert a == b
    rows = metrics(tmp_path / "out")
    assert [row.get("skipped", 0) for row in rows] == [0] * 4 + [1] * 3 + [2] * 5
    assert [row["step"] for row in rows if "loss" not in row] == [4, 7]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_what_was_skipped_survives_a_resume_bit_for_bit(tmp_path, corpus, bad_losses, monkeypatch):
    """Stopped in the middle of a row and of a series of bad steps."""
    monkeypatch.setattr("plumbing.guard.SPIKE_WINDOW", 4)              # full, and sliding
    monkeypatch.setattr("plumbing.guard.SPIKE", 1e9)
    bad_losses |= {5, 6, 8}
    train_pretrain.main(tiny_run(tmp_path / "straight", corpus))
    log = Run.log

    def interrupting(self, step, **figures):
        log(self, step, **figures)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Run, "log", interrupting)
    with pytest.raises(SystemExit):
        train_pretrain.main(tiny_run(tmp_path / "out", corpus))
    monkeypatch.setattr(Run, "log", log)
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, resume=True))
    assert same_run(tmp_path / "out", tmp_path / "straight")
    assert metrics(tmp_path / "out")[-1]["skipped"] == 3
    ends = [read_checkpoint(tmp_path / name / "checkpoints" / "step_000012")
            for name in ("out", "straight")]
    assert ends[0]["history"] == ends[1]["history"] and ends[0]["skipped"] == 3
    assert len(ends[0]["history"]["optimizer"]["recent"]) == 4


def test_a_loss_that_stays_bad_stops_the_run_and_keeps_what_was_good(tmp_path, corpus, straight,
                                                                    monkeypatch, bad_losses):
    monkeypatch.setattr("plumbing.guard.MAX_SKIPPED", 3)
    monkeypatch.setattr("plumbing.run.MAX_SKIPPED", 3)
    out = tmp_path / "out"
    bad_losses |= set(range(6, 12))
    with pytest.raises(FloatingPointError) as stop:
        train_pretrain.main(tiny_run(out, corpus))
    newest = newest_checkpoint(out)
    assert newest.name == "step_000005" and not (out / "config.json").exists()
    for part in ("step 8: the loss is nan, and 3 updates in a row were skipped",
                 f"{newest} is the last good checkpoint", "--lr"):
        assert part in str(stop.value)
    assert [row["step"] for row in metrics(out)] == [0, 3, 4, 7]
    assert all(math.isfinite(value) for row in metrics(out) for value in row.values())
    bad_losses.clear()                                                 # a better machine
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)


# ---------------------------------------------------------------------- other processes

def command(cfg) -> list[str]:
    options = [f"--{name}={value}" for name, value in flat(cfg).items()]
    return [sys.executable, str(ROOT / "train_pretrain.py"), *options]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_process_that_is_told_to_stop_saves_and_exits_at_once(tmp_path, corpus, signum, code):
    """Ctrl-C in a terminal is an error to scripts; a scheduler's SIGTERM is what it asked for."""
    out = tmp_path / "out"
    cfg = tiny_run(out, corpus, steps=1_000_000, log_every=1, eval_every=0, save_every=0)
    process = subprocess.Popen(command(cfg), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_rows(out, 3, process)
        process.send_signal(signum)
        error = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    newest = newest_checkpoint(out)
    done = int(newest.name[5:])
    assert process.returncode == code and "Traceback" not in error
    assert f"stopped after step {done - 1}; everything is saved in {out}" in error
    assert metrics(out)[-1]["step"] == done - 1
    train_pretrain.main(replace(cfg, steps=done + 3, resume=True))
    assert [row["step"] for row in metrics(out)] == list(range(done + 3))


def on_two_ranks(script: str) -> list[subprocess.Popen]:
    """The script in two processes that find each other, as torchrun would start them."""
    environment = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                 "MASTER_PORT": str(free_port())}
    processes = []
    for rank in "01":
        processes.append(subprocess.Popen(
            [sys.executable, "-c", script], env=environment | {"RANK": rank}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Three runs one after the other in two processes: one that nothing disturbs; one with a NaN on
    rank 1 alone, in the third of 8 steps; one in which rank 0's disk is full.

    Returns their folder, the corpus, and for each rank (exit code, stdout, stderr).
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    corpus = write_corpus(folder)
    same = tiny_run(folder / "two", corpus, batch_size=2, log_every=1, steps=8)
    skips = tiny_run(folder / "skips", corpus, batch_size=2, log_every=1, steps=8)
    full = tiny_run(folder / "full", corpus, batch_size=2, steps=10_000, save_every=2)
    processes = on_two_ranks(f"""import hashlib, math, os, sys, torch, train_pretrain
from plumbing.options import build
from plumbing.run import Run
sys.path.append("tests")
from tiny_runs import make_runs_quick
make_runs_quick()
train_pretrain.main(build(train_pretrain.Config, {flat(same)}))
calls, scores, finish = [], train_pretrain.token_logps, Run.finish
def broken(*args):
    calls.append(1)
    return scores(*args) * (math.nan if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
def told(run, model, *args):
    weights = b"".join(w.detach().numpy().tobytes() for w in model.parameters())
    print(run.guard.skipped, run.guard.history["optimizer"], hashlib.sha256(weights).hexdigest(),
          flush=True)
    return finish(run, model, *args)
def full(*args):
    raise OSError(28, "No space left on device")
train_pretrain.token_logps, Run.finish = broken, told
train_pretrain.main(build(train_pretrain.Config, {flat(skips)}))
torch.save = full
train_pretrain.main(build(train_pretrain.Config, {flat(full)}))""")
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return folder, corpus, [(code, *texts) for code, texts in zip(codes, said)]


def test_two_processes_train_as_one_with_the_same_global_batch(two_ranks):
    """In the first of the steps the ranks have different numbers of targets."""
    folder, corpus, said = two_ranks
    assert (folder / "two" / "config.json").exists(), said
    train_pretrain.main(tiny_run(folder / "one", corpus, batch_size=4, log_every=1, steps=8))
    one = metrics(folder / "one")
    two = metrics(folder / "two")
    assert len(one) == 8 and one[0]["tokens"] < 128 == one[1]["tokens"] - one[0]["tokens"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in ("loss", "grad_norm", "lr", "val_loss"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3), (name, a, b)
    weights = [load_model(folder / name)[0].state_dict() for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-3, rtol=0)


def test_ranks_skip_together_and_fail_together(two_ranks):
    folder, _, ((code, first, why), (other_code, second, hint)) = two_ranks
    assert first == second and first.startswith("1 {"), (why, hint)
    rows = metrics(folder / "skips")
    assert [row.get("skipped") for row in rows] == [None] * 2 + [1] * 6
    assert all(math.isfinite(row["loss"]) for row in rows)             # of rank 0, in the third
    assert "step_000002.tmp: no space left on the disk" in why.splitlines()[-1], why
    assert "another rank could not write its checkpoint, and says why" in hint.splitlines()[-1]
    assert code == other_code == 1


def test_an_optimizer_on_the_host_trains_the_same_model(tmp_path):
    corpus = write_corpus(tmp_path)
    for name in ("plain", "host"):
        train_pretrain.main(tiny_run(tmp_path / name, corpus, host_state=name == "host"))
    assert same_run(tmp_path / "plain", tmp_path / "host")
