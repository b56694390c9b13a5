"""training.py: numbers by hand, and runs that are stopped in every way."""
import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_pretrain
import training
from model import load_model
from tokenizer import Tokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    out: str = "out/x"                # model folder to write
    steps: int = 8                    # optimizer steps, 100% of them
    lr: float = 1e-3                  # peak learning rate
    seed: int = 0                     # of everything
    device: str = "cpu"               # auto | cpu | cuda | mps
    dtype: str = "float32"            # auto | float32 | bfloat16 | float16
    compile: bool = False             # torch.compile
    log_every: int = 1                # steps between rows of metrics.jsonl
    save_every: int = 1               # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    overwrite: bool = False           # throw away what is in --out


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of a tiny run's second; test_curves.py draws one."""
    monkeypatch.setattr(training, "plot_curves", lambda *args: None)


def start(tmp_path, **options) -> training.Run:
    return training.start(Config(out=str(tmp_path / "out"), **options), "test")


# ---------------------------------------------------------------------- devices, precision, updates

@pytest.mark.parametrize("call, named", [
    (lambda: training.pick_device("gpu"), "--device gpu: .*give auto, cpu, cuda"),
    (lambda: training.pick_dtype("float8", torch.device("cpu")), "--dtype float8: give auto"),
    (lambda: training.pick_dtype("float16", torch.device("cpu")), "float16 needs a GPU")])
def test_a_device_or_precision_that_is_not_there_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_update_clips_sets_the_rate_steps_and_zeroes(tmp_path):
    run, weight = start(tmp_path), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=123.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert run.update(optimizer, lr=2.0, max_norm=1.0).item() == 5.0   # the norm before clipping
    assert weight.tolist() == pytest.approx([-2 * 0.6, -2 * 0.8], rel=1e-5)
    assert weight.grad is None
    weight.grad = torch.tensor([0.3, 0.4])
    assert run.update(optimizer, lr=1.0, max_norm=1.0).item() == pytest.approx(0.5)
    assert weight.tolist() == pytest.approx([-1.5, -2.0], rel=1e-5)


# ---------------------------------------------------------------------- updates that are skipped

class Line:
    """One weight of 1 and loss `factor * weight`, whose gradient is the factor."""

    def __init__(self, tmp_path, **tracked):
        self.run, self.weight = start(tmp_path, overwrite=True), nn.Parameter(torch.ones(1))
        self.optimizer = training.adamw(nn.ParameterList([self.weight]), lr=0.0)
        self.run.track(optimizer=self.optimizer, **tracked)

    def update(self, factor, step=0, lr=0.0):
        self.run.backward(factor * self.weight.sum(), step)
        return self.run.update(self.optimizer, lr)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_what_is_not_finite_changes_neither_weights_nor_optimizer(tmp_path, capsys, bad, where):
    line = Line(tmp_path)
    line.update(1.0, lr=0.1)
    weight, state = line.weight.item(), line.optimizer.state[line.weight]
    before = {name: value.clone() for name, value in state.items()}
    if where == "loss":                                # from a constant: the gradient is finite
        line.run.backward(line.weight.sum() + torch.tensor(bad), step=3)
    else:
        line.run.backward(line.weight.sum(), step=3)
        line.weight.grad[0] = bad
    line.run.update(line.optimizer, lr=0.1)
    assert line.weight.item() == weight and line.weight.grad is None and line.run.skipped == 1
    assert all(torch.equal(before[name], value) for name, value in state.items()) and before
    assert f"step 3: the {where} is {bad}; this update is skipped" in capsys.readouterr().err
    line.update(1.0, lr=0.1)                           # and the next one is an update again
    assert line.weight.item() < weight and line.run.skipped == 1


def test_a_bad_micro_batch_costs_its_step_and_no_other(tmp_path):
    line = Line(tmp_path)
    for constant in (0.0, math.nan, 0.0):              # of one step: the sum is judged
        line.run.backward(line.weight.sum() + constant, step=0)
    line.run.update(line.optimizer, lr=0.1)
    assert line.weight.item() == 1 and line.run.skipped == 1
    line.update(1.0, step=1, lr=0.1)                   # which the NaN of before is no part of
    assert line.weight.item() < 1 and line.run.skipped == 1


def test_too_many_in_a_row_stop_the_run_and_a_good_one_starts_the_count_again(tmp_path):
    line = Line(tmp_path)
    for _ in range(3):
        for step in range(training.MAX_SKIPPED - 1):
            line.update(math.nan, step)
        line.update(1.0)
    for step in range(training.MAX_SKIPPED - 1):
        line.update(math.nan, step)
    with pytest.raises(FloatingPointError, match="step 7: the loss is nan, and 20 updates in a row"
                       " were skipped.*No checkpoint was made yet; try a lower --lr"):
        line.update(math.nan, step=7)
    assert line.run.skipped == 4 * 19 + 1 and line.weight.item() == 1


def test_a_spike_by_hand():
    """Median 2, highest 3: a leap by more than 5 x 1. Longest gradient 0.5: more than 2.5."""
    recent = [(2.0, 0.5)] * 60 + [(1.0, 0.1)] * 20 + [(3.0, 0.2)] * 20
    assert training.is_spike(7.01, 2.51, recent)
    assert not training.is_spike(7.0, 9.0, recent) and not training.is_spike(99.0, 2.5, recent)
    assert not training.is_spike(-99.0, 9.0, recent)               # a loss may fall as it likes
    assert not training.is_spike(7.01, 2.51, recent[1:])           # too few to know what is usual


def test_heavy_tailed_noise_is_no_spike():
    """Cubed normals: kurtosis 46 instead of 3; loss and gradient rise together, the worst case."""
    noise = np.random.default_rng(0).standard_normal(20_000) ** 3
    values = [(2 + 0.1 * x, math.exp(0.3 * x)) for x in noise.clip(-20, 20)]
    window = training.SPIKE_WINDOW
    assert not any(training.is_spike(*values[i], values[i - window:i])
                   for i in range(window, len(values)))


def test_a_spike_is_skipped_and_not_counted_as_usual(tmp_path, capsys):
    line = Line(tmp_path)
    for i in range(training.SPIKE_WINDOW):
        line.update(1 + 0.01 * (i % 7), lr=1e-4)
    weight = line.weight.item()
    for _ in range(2):                                 # the first has not moved the threshold
        line.update(50.0, lr=0.1)
    assert line.weight.item() == weight and line.run.skipped == 2
    assert "the loss leaps to 49.5, the gradient norm to 50; this" in capsys.readouterr().err
    line.update(2.0, lr=1e-4)                          # twice the usual is no spike
    assert line.weight.item() < weight and line.run.skipped == 2
    assert len(line.run.history["optimizer"]["recent"]) == training.SPIKE_WINDOW


def test_two_optimizers_are_judged_by_their_own_gradients(tmp_path):
    """As in PPO: one backward pass, two updates. The critic's gradients are usually longer."""
    critic = nn.Parameter(torch.ones(1))
    critic_optimizer = training.adamw(nn.ParameterList([critic]), lr=0.0)
    line = Line(tmp_path, critic_optimizer=critic_optimizer)

    def update(actor, other, lr=0.0):
        line.run.backward((actor * line.weight + other * critic).sum(), step=0)
        line.run.update(line.optimizer, lr)
        line.run.update(critic_optimizer, lr)
    for _ in range(training.SPIKE_WINDOW):
        update(1.0, 30.0)
    update(20.0, 200.0, lr=0.1)                        # 20 and 6 times as long as ever: both
    assert line.run.skipped == 2 and line.weight.item() == critic.item() == 1
    update(300.0, 30.0, lr=0.1)                        # the actor's alone
    assert line.run.skipped == 3 and line.weight.item() == 1 and critic.item() < 1
    update(1.0, math.nan, lr=0.1)                      # one loss: neither can trust it
    assert line.run.skipped == 5 and line.weight.item() == 1


def test_a_step_waits_for_the_gpu_once_however_many_micro_batches_it_has(tmp_path, monkeypatch):
    waits, line = [], Line(tmp_path)
    optimizer = torch.optim.SGD([line.weight], lr=0.1)
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name, real=real: (
            waits.append(name), real(*args))[1])
    for factor in (1.0, 2.0, 3.0):
        line.run.backward(factor * line.weight.sum(), step=0)
    line.run.update(optimizer, lr=0.1)
    monkeypatch.undo()
    assert waits == ["tolist"] and line.weight.item() < 1


def test_fp16_overflows_lower_the_scale_are_counted_and_training_goes_on(tmp_path):
    line = Line(tmp_path)
    line.run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
    for n in range(17):                                # 2^16 falls below 1: no reason to stop yet
        line.run.backward(line.weight.sum(), step=n)
        line.weight.grad[0] = math.inf
        line.run.update(line.optimizer, lr=0.1)
        assert line.run.scaler.get_scale() == 2.0 ** (15 - n)
    assert line.weight.item() == 1 and line.run.skipped == 17
    assert line.update(3.0, lr=0.1).item() == pytest.approx(3)         # unscaled
    assert line.weight.item() < 1 and line.run.skipped == 17
    scale = line.run.scaler.get_scale()
    line.update(math.nan, lr=0.1)
    line.update(3.0, lr=0.1)
    assert line.run.skipped == 18 and line.run.scaler.get_scale() == scale / 2


def test_a_gpu_that_is_picked_is_the_one_that_kernels_are_launched_on(monkeypatch):
    launched_on = []
    monkeypatch.setattr(torch.cuda, "set_device", launched_on.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(
        device=torch.device(device)))
    assert training.pick_device("cuda:1") == torch.device("cuda:1") and launched_on == [
        torch.device("cuda:1")]


def test_two_optimizers_of_one_backward_pass_unscale_by_the_same_factor(tmp_path):
    """As in PPO: the actor's overflow lowers the scale, but not before the critic's update."""
    critic = nn.Parameter(torch.ones(1))
    critic_optimizer = training.adamw(nn.ParameterList([critic]), lr=0.1)
    line = Line(tmp_path, critic_optimizer=critic_optimizer)
    line.run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
    line.run.backward((line.weight + 3 * critic).sum(), step=0)
    line.weight.grad[0] = math.inf
    line.run.update(line.optimizer, lr=0.1, last=False)
    assert line.run.update(critic_optimizer, lr=0.1).item() == pytest.approx(3)
    assert line.weight.item() == 1 and critic.item() < 1
    assert line.run.scaler.get_scale() == 2.0 ** 15


def test_a_row_counts_what_was_skipped_and_leaves_it_out_of_the_means(tmp_path):
    run = start(tmp_path, log_every=2)
    for step, loss in zip(run.steps(8), [1.0, 2.0, math.nan, 4.0, math.nan, math.nan, 7.0, 8.0]):
        run.skipped += math.isnan(loss)
        run.log(step, tokens=10, loss=torch.tensor(loss), lr=0.5)
    rows = training.read_metrics(run.out)
    assert [row["step"] for row in rows] == [0, 1, 3, 5, 7]
    assert [row.get("loss") for row in rows] == [1, 2, 4, None, 7.5]
    assert [row.get("skipped") for row in rows] == [None, None, 1, 3, 3]
    assert [row["lr"] for row in rows] == [0.5] * 5 and rows[-1]["tokens"] == 80


def test_a_figure_that_is_not_finite_without_a_skipped_update_is_shown(tmp_path):
    run = start(tmp_path, log_every=2)
    for step in run.steps(2):
        run.log(step, loss=1.0, val_loss=math.nan)
    assert math.isnan(training.read_metrics(run.out)[0]["val_loss"])


def test_due_is_every_so_many_steps_and_after_the_last(tmp_path):
    run = start(tmp_path)                                              # 8 steps
    assert [step for step in range(8) if run.due(step, 3)] == [2, 5, 7]
    assert [step for step in range(8) if run.due(step, 1)] == list(range(8))
    assert [step for step in range(8) if run.due(step, 0)] == [7]


def test_seeds_fix_every_source_of_random_numbers(tmp_path):
    def draws(seed):
        run = training.start(Config(out=str(tmp_path / "out"), seed=seed, resume=True), "test")
        return (torch.rand(1).item(), np.random.rand(), random.random(),
                *(torch.rand(1, generator=run.generator(step)).item() for step in (0, 1)))
    assert draws(1) == draws(1)
    assert not set(draws(1)) & set(draws(2))
    assert len(set(draws(1))) == 5


# ---------------------------------------------------------------------- metrics

def test_a_row_holds_the_means_since_the_row_before(tmp_path):
    run = start(tmp_path, log_every=3)
    for step in run.steps(8):
        run.log(step, tokens=10, loss=torch.tensor(float(step)), lr=0.5,
                **({"val_loss": 7.0} if step == 3 else {}))
    rows = training.read_metrics(run.out)
    assert [row["step"] for row in rows] == [0, 2, 3, 5, 7]            # first, due, validated, last
    assert [row["loss"] for row in rows] == [0, 1.5, 3, 4.5, 6.5]      # of 0; 1 2; 3; 4 5; 6 7
    assert [row["tokens"] for row in rows] == [10, 30, 40, 60, 80]     # so far
    assert [row.get("val_loss") for row in rows] == [None, None, 7, None, None]
    assert all(row["lr"] == 0.5 and row["tokens_per_s"] > 0 for row in rows)
    assert run.last["loss"] == 6.5 and run.last["val_loss"] == 7


# ---------------------------------------------------------------------- the folder

def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    start(tmp_path)                                                    # empty: fine
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out is not empty; --resume .*--overwrite"):
        start(tmp_path)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    start(tmp_path, resume=True)
    assert (tmp_path / "out" / "thesis.txt").exists()
    with pytest.raises(ValueError, match="throw away .*thesis.txt, which is not of a training run"):
        start(tmp_path, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "out" / "metrics.jsonl")
    start(tmp_path, overwrite=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def corpus(tmp_path) -> Path:
    """2,000 bytes: 18 lines of arithmetic, of which a tiny model learns the shape at once."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"{i} bears and {j} bears are {i + j} bears.\n"
                            for i in range(8) for j in range(9)))
    return file


def tiny_run(out, corpus, **options) -> train_pretrain.Config:
    """12 steps of train_pretrain: two blocks of width 16 over bytes, a tenth of a second."""
    return train_pretrain.Config(out=str(out), **{
        "data": str(corpus), "tokenizer": "bytes", "d_model": 16, "n_layers": 2, "n_heads": 2,
        "context_length": 32, "copy_steps": 0, "steps": 12, "batch_size": 4, "warmup": 3,
        "log_every": 4, "eval_every": 5, "eval_windows": 4, "save_every": 5, "device": "cpu",
        "dtype": "float32"} | options)


def metrics(out):
    """Every row without the figures that the machine decides."""
    rows = training.read_metrics(out)
    assert rows and all(row.pop(name) > 0 for row in rows
                        for name in ("tokens_per_s", "mfu", "memory_gb"))
    return rows


def same_run(a, b):
    return (metrics(a) == metrics(b) and (a / "model.safetensors").read_bytes()
            == (b / "model.safetensors").read_bytes())


def test_a_run_writes_the_whole_model_folder_and_learns(tmp_path, corpus):
    out = tmp_path / "out"
    result = train_pretrain.main(tiny_run(out, corpus, steps=40, lr=1e-2))
    assert {f.name for f in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json",
                                               "metrics.jsonl", "checkpoints"}     # no picture here
    rows = metrics(out)
    assert [row["step"] for row in rows] == [0, 3, 4, 7, 9, 11, 14, 15, 19, 23, 24, 27, 29, 31, 34,
                                             35, 39]
    for row in rows:
        assert {"step", "loss", "grad_norm", "lr", "tokens"} <= row.keys()
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
    assert record["config"] == dataclasses.asdict(cfg)
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

@pytest.fixture
def straight(tmp_path, corpus) -> Path:
    train_pretrain.main(tiny_run(tmp_path / "straight", corpus))
    return tmp_path / "straight"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_and_resumed_ends_bit_for_bit_the_same(tmp_path, corpus, straight,
                                                                         monkeypatch, capsys,
                                                                         signum):
    out, log = tmp_path / "out", training.Run.log

    def interrupting(self, step, **figures):
        log(self, step, **figures)
        if step == 6:                                                  # between two rows
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(training.Run, "log", interrupting)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as exit:
        train_pretrain.main(tiny_run(out, corpus))
    message = f"pretrain: stopped after step 6; everything is saved in {out}, --resume goes on"
    if signum == signal.SIGINT:
        assert exit.value.code.startswith(message)                     # printed, and exit code 1
    else:
        assert exit.value.code == 0 and message in capsys.readouterr().err
    assert signal.getsignal(signum) is before
    assert training.newest_checkpoint(out).name == "step_000007"
    assert not (out / "config.json").exists()                          # not a finished model
    monkeypatch.setattr(training.Run, "log", log)
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
    assert training.newest_checkpoint(run.out).name == "step_000003"


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
    assert training.newest_checkpoint(out).name == "step_000010"
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)
    assert training.newest_checkpoint(out).name == "step_000012"


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, corpus, straight):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"step": 3, "loss": 8.0}\n')
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)


def test_resuming_a_finished_run_changes_nothing(tmp_path, corpus, straight):
    rows, weights = metrics(straight), (straight / "model.safetensors").read_bytes()
    train_pretrain.main(tiny_run(straight, corpus, resume=True))
    assert metrics(straight) == rows
    assert (straight / "model.safetensors").read_bytes() == weights


def saved(run, *steps_done, **parts):
    """A checkpoint after each of so many steps; `parts` or a new model are what it holds."""
    run.track(**(parts or {"model": nn.Linear(2, 2)}))
    for steps in steps_done:
        run.save_checkpoint(steps)
    run.written()
    return {int(f.name[5:]): f for f in training.checkpoints(run.out)}


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[:len(content) // 2])


def contents(folder: Path) -> dict:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys, name, how):
    model = nn.Linear(2, 2)
    folders = saved(start(tmp_path), 1, 2, model=model)
    if name == "meta.json" and how == "flipped":               # no JSON any more
        folders[2].joinpath(name).write_bytes(b"\xff{")
    else:
        damage(folders[2] / name, how)
    before = contents(folders[2])
    resumed, weights = start(tmp_path, resume=True), nn.Linear(2, 2)
    resumed.track(model=weights)
    assert resumed.first_step == 1 and torch.equal(weights.weight, model.weight)
    error = capsys.readouterr().err
    assert f"{folders[2] / name} is damaged" in error and "going back to the checkpoint" in error
    assert contents(folders[2]) == before                      # it may be wanted for something
    resumed.save_checkpoint(2)                                 # until the same step is whole again
    resumed.written()
    assert training.read_checkpoint(folders[2])["step"] == 2


def test_when_no_checkpoint_is_whole_all_are_named_and_none_is_removed(tmp_path):
    folders = saved(start(tmp_path), 1, 2)
    damage(folders[1] / "state.pt", "truncated")
    damage(folders[2] / "model.safetensors", "flipped")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint is whole: .*step_000002/model.safetensors "
                       ".*step_000001/state.pt .*; give --overwrite to start afresh"):
        start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
    assert contents(tmp_path) == before


def test_checkpoints_are_ordered_by_their_steps_not_their_names(tmp_path):
    run = start(tmp_path)
    folders = saved(run, 999_998, 999_999, 1_000_000)
    assert list(folders) == [999_999, 1_000_000]               # the last two stay
    assert training.newest_checkpoint(run.out) == folders[1_000_000]
    damage(folders[1_000_000] / "meta.json", "missing")
    assert training.newest_checkpoint(run.out) == folders[999_999]


def test_a_checkpoint_without_its_meta_json_is_neither_counted_nor_removed(tmp_path):
    run = start(tmp_path)
    damage(saved(run, 1)[1] / "meta.json", "truncated")
    assert list(saved(run, 2, 3, 4)) == [1, 3, 4]


def test_names_reach_the_disk_after_their_contents(tmp_path, monkeypatch):
    """A power cut must not leave the name of a checkpoint whose bytes were still on their way."""
    run, events, rename, fsync = start(tmp_path), [], Path.rename, training.fsync
    monkeypatch.setattr(training, "fsync", lambda f: (events.append(f), fsync(f)))
    monkeypatch.setattr(Path, "rename", lambda f, to: (events.append((f, to)), rename(f, to)))
    final = saved(run, 1)[1]
    folder = final.with_name("step_000001.tmp")
    middle = events.index((folder, final))
    assert set(events[:middle]) == {folder, *(folder / f.name for f in final.iterdir())}
    assert len(set(events[:middle])) == 4 and events[middle + 1:] == [final.parent, run.out]


# ---------------------------------------------------------------------- written beside the training

@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits for .set() of what this returns."""
    gate, save = threading.Event(), torch.save

    def slow(*args):
        assert gate.wait(60)
        save(*args)
    monkeypatch.setattr(torch, "save", slow)
    yield gate
    gate.set()


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_written(tmp_path, slow_disk):
    line = Line(tmp_path, model=(model := nn.Linear(2, 2)))
    for _ in range(3):
        line.update(1.0, lr=0.1)
    line.run.pending["loss"] = [1.0]
    expected = [model.weight.clone(), line.optimizer.state[line.weight]["exp_avg"].clone()]
    line.run.save_checkpoint(3)                                        # returns at once
    line.run.pending["loss"].append(5.0)
    with torch.no_grad():
        model.weight.zero_()
    for _ in range(3):
        line.update(-1.0, lr=0.1)
    assert training.checkpoints(line.run.out) == []
    slow_disk.set()
    line.run.written()
    resumed = Line.__new__(Line)
    resumed.run, weights = start(tmp_path, resume=True), nn.Linear(2, 2)
    optimizer = training.adamw(nn.ParameterList([line.weight]), lr=0.0)
    resumed.run.track(optimizer=optimizer, model=weights)
    assert torch.equal(weights.weight, expected[0]) and weights.weight.any()
    assert torch.equal(optimizer.state[line.weight]["exp_avg"], expected[1])
    assert len(resumed.run.history["optimizer"]["recent"]) == 3 and resumed.run.pending == {
        "loss": [1.0]}


def test_a_save_waits_for_the_one_before_it(tmp_path, slow_disk):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    run.save_checkpoint(1)
    threading.Timer(0.2, slow_disk.set).start()
    run.save_checkpoint(2)                                             # one copy at a time
    assert slow_disk.is_set() and [f.name for f in training.checkpoints(run.out)][0] == \
        "step_000001"


def test_no_thread_outlives_its_checkpoint(tmp_path):
    """One that stayed kept OpenMP workers: steps after the first save took nearly twice as long."""
    threads, run = set(threading.enumerate()), start(tmp_path)
    saved(run, 1, 2)
    until = time.monotonic() + 10
    while set(threading.enumerate()) - threads:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_interrupted_run_exits_when_its_checkpoint_is_on_the_disk(tmp_path, slow_disk):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    threading.Timer(0.2, slow_disk.set).start()
    with pytest.raises(SystemExit):
        for _step in run.steps(8):
            signal.raise_signal(signal.SIGTERM)
    assert training.read_checkpoint(training.newest_checkpoint(run.out))["step"] == 1


@pytest.mark.parametrize("where", ["steps", "save_checkpoint", "finish"])
def test_an_error_of_the_writing_thread_surfaces(tmp_path, monkeypatch, where):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)            # no full disk: itself
    run.save_checkpoint(1)
    with pytest.raises(ZeroDivisionError):
        if where == "steps":
            for step in run.steps(10_000):
                time.sleep(0.01)
                assert step < 3_000
        elif where == "save_checkpoint":
            run.save_checkpoint(2)
        else:
            run.finish(None, None)
    assert contents(run.out) == {}                                     # no half of it stays


def fills_the_disk(*args):
    args[1].write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_in_one_clear_message_and_costs_no_checkpoint(tmp_path, corpus, straight,
                                                                       monkeypatch):
    out, save, count = tmp_path / "out", torch.save, []

    def fills(*args):
        count.append(1)
        (fills_the_disk if len(count) == 2 else save)(*args)
    monkeypatch.setattr(torch, "save", fills)
    with pytest.raises(OSError) as stop:
        train_pretrain.main(tiny_run(out, corpus))
    folder = out / "checkpoints" / "step_000010.tmp"
    for part in (f"{folder}: no space left on the disk; 0.1 MB are needed, ", " MB are free. ",
                 "make room, then go on with --resume"):
        assert part in str(stop.value), str(stop.value)
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["step_000005"]
    train_pretrain.main(tiny_run(out, corpus, resume=True))            # there is room again
    assert same_run(out, straight)


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 704 vs 598"),      # torch.save's
                                   OSError(errno.EDQUOT, "Disk quota exceeded")])
def test_other_words_for_a_full_disk_are_understood(tmp_path, monkeypatch, error):
    monkeypatch.setattr(training.shutil, "disk_usage",
                        lambda folder: type("usage", (), {"free": 3_000_000}))
    size = 10_000_000 if isinstance(error, RuntimeError) else 100
    with pytest.raises(OSError, match="no space left.*MB are needed, 3.0 MB are free"):
        with training.room_for(tmp_path / "x", [torch.zeros(size, dtype=torch.uint8), 1]):
            raise error
    with pytest.raises(RuntimeError, match="pos"), training.room_for(tmp_path / "x", [1]):
        raise RuntimeError("pos")                                      # there is room: a bug


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run, model = start(tmp_path), nn.Linear(2, 2)
    folders = saved(run, 3, model=model)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    run.save_checkpoint(5)
    with pytest.raises(FloatingPointError, match="after step 4 the weights are not finite; .*"
                       "step_000003 is the last good checkpoint; try a lower --lr"):
        run.written()
    assert training.checkpoints(run.out) == list(folders.values())


def test_resuming_goes_on_with_the_same_random_numbers(tmp_path):
    run = start(tmp_path)
    torch.rand(3)
    saved(run, 1)
    expected = torch.rand(4)
    start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
    assert torch.equal(torch.rand(4), expected)


def test_resuming_with_other_sizes_is_refused(tmp_path, corpus, straight):
    with pytest.raises(ValueError, match="step_000012: its model is not the one of this run"):
        train_pretrain.main(tiny_run(straight, corpus, resume=True, d_model=32))


def test_the_last_two_checkpoints_and_the_best_stay(tmp_path):
    run, kept = start(tmp_path), []
    run.track(model=nn.Linear(2, 2))
    for step, val_loss in zip(run.steps(8), [5, 4, 2, 3, 2.5, 6, 1, 7]):
        run.log(step, loss=1.0, val_loss=val_loss)
        run.checkpoint(step)
        run.written()
        kept.append([int(f.name[5:]) for f in sorted((run.out / "checkpoints").iterdir())])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [6, 7], [7, 8]]


def test_the_best_checkpoint_is_one_that_was_evaluated_itself(tmp_path):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    for step in run.steps(6):                          # evaluated after 2, 4, 6; saved after 3, 6
        run.log(step, loss=1.0, **({"val_loss": 10.0 - step} if step % 2 else {}))
        if step in (2, 5):
            run.checkpoint(step)
    run.written()
    assert [training.read_meta(f)["val_loss"] for f in training.checkpoints(run.out)] == [None, 5.0]


def test_a_resumed_run_says_which_options_are_not_those_it_began_with(tmp_path, corpus, capsys):
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, save_every=6))
    capsys.readouterr()
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, save_every=6, steps=14, lr=1e-4,
                                 resume=True))
    said = capsys.readouterr().err
    assert "the run began with --lr" in said and "from here on it is 0.0001" in said
    assert "--steps" not in said and "--resume" not in said


@pytest.mark.parametrize("name", ["batch_size", "grad_accum", "eval_windows"])
def test_a_count_below_one_is_refused(tmp_path, corpus, name):
    with pytest.raises(ValueError, match=f"--{name} 0: give 1 or more"):
        train_pretrain.main(tiny_run(tmp_path / "out", corpus, **{name: 0}))


@pytest.fixture
def bad_losses(monkeypatch):
    """Steps whose loss is NaN, one micro-batch each, to be filled in."""
    steps, batch, scores = set(), train_pretrain.data.TokenStream.batch, train_pretrain.token_logps
    now = []
    monkeypatch.setattr(train_pretrain.data.TokenStream, "batch",
                        lambda self, n, *args: (now.append(n), batch(self, n, *args))[1])
    monkeypatch.setattr(train_pretrain, "token_logps", lambda *args: scores(*args) * (
        math.nan if torch.is_grad_enabled() and now[-1] in steps else 1))
    return steps


def test_a_skipped_step_is_one_that_the_optimizer_never_saw(tmp_path, corpus, bad_losses,
                                                            monkeypatch):
    bad_losses |= {4, 7}
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, log_every=1))
    bad_losses.clear()
    update = training.Run.update

    def without(run, optimizer, *args):
        if run.step not in (4, 7):
            return update(run, optimizer, *args)
        optimizer.zero_grad()
        return torch.tensor(0.0)
    monkeypatch.setattr(training.Run, "update", without)
    train_pretrain.main(tiny_run(tmp_path / "expected", corpus, log_every=1))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert a == b
    rows = metrics(tmp_path / "out")
    assert [row.get("skipped", 0) for row in rows] == [0] * 4 + [1] * 3 + [2] * 5
    assert [row["step"] for row in rows if "loss" not in row] == [4, 7]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_what_was_skipped_survives_a_resume_bit_for_bit(tmp_path, corpus, bad_losses, monkeypatch):
    """Stopped in the middle of a row and of a series of bad steps."""
    monkeypatch.setattr(training, "SPIKE_WINDOW", 4)                   # full, and sliding
    monkeypatch.setattr(training, "SPIKE", 1e9)
    bad_losses |= {5, 6, 8}
    train_pretrain.main(tiny_run(tmp_path / "straight", corpus))
    log = training.Run.log

    def interrupting(self, step, **figures):
        log(self, step, **figures)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(training.Run, "log", interrupting)
    with pytest.raises(SystemExit):
        train_pretrain.main(tiny_run(tmp_path / "out", corpus))
    monkeypatch.setattr(training.Run, "log", log)
    train_pretrain.main(tiny_run(tmp_path / "out", corpus, resume=True))
    assert same_run(tmp_path / "out", tmp_path / "straight")
    assert metrics(tmp_path / "out")[-1]["skipped"] == 3
    ends = [training.read_checkpoint(tmp_path / name / "checkpoints" / "step_000012")
            for name in ("out", "straight")]
    assert ends[0]["history"] == ends[1]["history"] and ends[0]["skipped"] == 3
    assert len(ends[0]["history"]["optimizer"]["recent"]) == 4


def test_a_loss_that_stays_bad_stops_the_run_and_keeps_what_was_good(tmp_path, corpus, straight,
                                                                    monkeypatch, bad_losses):
    monkeypatch.setattr(training, "MAX_SKIPPED", 3)
    out = tmp_path / "out"
    bad_losses |= set(range(6, 12))
    with pytest.raises(FloatingPointError) as stop:
        train_pretrain.main(tiny_run(out, corpus))
    newest = training.newest_checkpoint(out)
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
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(cfg).items()]
    return [sys.executable, str(ROOT / "train_pretrain.py"), *options]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
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
    newest = training.newest_checkpoint(out)
    done = int(newest.name[5:])
    assert process.returncode == code and "Traceback" not in error
    assert f"stopped after step {done - 1}; everything is saved in {out}" in error
    assert metrics(out)[-1]["step"] == done - 1
    train_pretrain.main(dataclasses.replace(cfg, steps=done + 3, resume=True))
    assert [row["step"] for row in metrics(out)] == list(range(done + 3))


def wait_for_rows(out, n, process) -> None:
    deadline = time.monotonic() + 200
    while len(training.read_metrics(out)) < n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def killed_again_and_again(out, cfg, ranks, kills) -> None:
    """tests/killed.py, to which out/killed may exist; it must equal out/straight in the end."""
    options = dataclasses.asdict(cfg) | {"out": str(out)}
    killed = subprocess.run([sys.executable, str(ROOT / "tests" / "killed.py"), json.dumps(options),
                             str(ranks), str(kills)], env=ENVIRONMENT, capture_output=True,
                            text=True, timeout=300)
    ends = killed.stdout.split()
    assert ends == ["-9"] * kills + ["0"], killed.stderr
    assert "Error" not in killed.stderr and "going on from step" in killed.stderr
    assert same_run(out / "killed", out / "straight")
    kept = {f.name for f in (out / "killed" / "checkpoints").iterdir()}    # with the best, perhaps
    assert {f"step_{n:06d}" for n in (cfg.steps - 1, cfg.steps)} <= kept and len(kept) <= 3


def test_a_run_killed_at_any_moment_and_resumed_ends_bit_for_bit_the_same(tmp_path, corpus):
    """Killed by the clock, and right before this or that file is opened, renamed or removed. So
    many steps that three kills by the clock, half a second at most, come before the last one."""
    cfg = tiny_run("", corpus, n_layers=1, steps=200, log_every=2, save_every=1)
    killed_again_and_again(tmp_path, cfg, ranks=1, kills=9)


def workers(process) -> list[int]:
    """The ranks that a torchrun has started."""
    pid = process.pid
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_two_ranks_killed_and_told_to_stop_under_torchrun_end_bit_for_bit_the_same(tmp_path,
                                                                                  corpus):
    out = tmp_path / "killed"
    cfg = tiny_run(out, corpus, n_layers=1, steps=70, log_every=2, save_every=1, batch_size=2,
                   resume=True)

    def launch(rows):
        """Under torchrun, until so many rows are logged."""
        python, *script = command(cfg)
        process = subprocess.Popen(
            [python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
             str(free_port()), *script], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        wait_for_rows(out, rows, process)
        return process
    process = launch(4)
    os.kill(min(workers(process)), signal.SIGKILL)             # rank 0: torchrun ends the other
    assert "going on from" not in process.communicate(timeout=60)[1] and process.returncode
    process = launch(len(training.read_metrics(out)) + 3)
    process.send_signal(signal.SIGTERM)                        # which torchrun hands on
    error = process.communicate(timeout=30)[1]
    done = int(training.newest_checkpoint(out).name[5:])
    assert f"stopped after step {done - 1}; everything is saved in {out}" in error and done < 70
    killed_again_and_again(tmp_path, dataclasses.replace(cfg, resume=False), ranks=2, kills=4)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path, corpus):
    """In the first of the steps the ranks have different numbers of targets."""
    options = {"log_every": 1, "steps": 8}
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    cfg = tiny_run(tmp_path / "two", corpus, batch_size=2, **options)
    together = [sys.executable, "-c", f"""import training, train_pretrain
training.plot_curves = lambda *args: None
train_pretrain.main(train_pretrain.Config(**{dataclasses.asdict(cfg)}))"""]
    processes = [subprocess.Popen(together, env=ENVIRONMENT | ranks | {"RANK": rank},
                                  cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in "01"]
    train_pretrain.main(tiny_run(tmp_path / "one", corpus, batch_size=4, **options))
    try:
        for process in processes:
            error = process.communicate(timeout=200)[1]
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == 8 and one[0]["tokens"] < 128 == one[1]["tokens"] - one[0]["tokens"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in ("loss", "grad_norm", "lr", "val_loss"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3), (name, a, b)
    weights = [load_model(tmp_path / name)[0].state_dict() for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-3, rtol=0)


def test_ranks_skip_together_and_fail_together(tmp_path, corpus):
    """A NaN on rank 1 alone, in the third of 8 steps; then rank 0's disk is full."""
    cfg = tiny_run(tmp_path / "skips", corpus, batch_size=2, log_every=1, steps=8)
    full = tiny_run(tmp_path / "full", corpus, batch_size=2, steps=10_000, save_every=2)
    script = f"""import hashlib, math, os, torch, training, train_pretrain
training.plot_curves = lambda *args: None
calls, scores, finish = [], train_pretrain.token_logps, training.Run.finish
def broken(*args):
    calls.append(1)
    return scores(*args) * (math.nan if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
def told(run, model, *args):
    weights = b"".join(w.detach().numpy().tobytes() for w in model.parameters())
    print(run.skipped, run.history["optimizer"], hashlib.sha256(weights).hexdigest(), flush=True)
    return finish(run, model, *args)
def full(*args):
    raise OSError(28, "No space left on device")
train_pretrain.token_logps, training.Run.finish = broken, told
train_pretrain.main(train_pretrain.Config(**{dataclasses.asdict(cfg)}))
torch.save = full
train_pretrain.main(train_pretrain.Config(**{dataclasses.asdict(full)}))"""
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True,
                                  env=ENVIRONMENT | ranks | {"RANK": rank}, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE) for rank in "01"]
    try:
        (first, why), (second, hint) = (process.communicate(timeout=200) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert first == second and first.startswith("1 {"), (why, hint)
    rows = metrics(tmp_path / "skips")
    assert [row.get("skipped") for row in rows] == [None] * 2 + [1] * 6
    assert all(math.isfinite(row["loss"]) for row in rows)             # of rank 0, in the third
    assert "step_000002.tmp: no space left on the disk" in why.splitlines()[-1], why
    assert "another rank could not write its checkpoint, and says why" in hint.splitlines()[-1]
    assert all(process.returncode == 1 for process in processes)
