"""training.py: the command line, numbers by hand, and runs that are stopped in every way."""
import dataclasses
import hashlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train_pretrain
import training
from model import load_model
from tokenizer import Tokenizer
from training import plot_curves  # before it is switched off

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
    """They take most of a tiny run's second; test_curves_... draws one."""
    monkeypatch.setattr(training, "plot_curves", lambda *args: None)


def start(tmp_path, **options) -> training.Run:
    return training.start(Config(out=str(tmp_path / "out"), **options), "test")


# ---------------------------------------------------------------------- the command line

def parse(*argv):
    return training.parse(Config, list(argv), "What it does.")


def test_defaults_and_types_are_those_of_the_dataclass():
    assert parse() == Config()
    cfg = parse("--steps", "12", "--lr=0.5", "--out", "3")
    assert (cfg.steps, cfg.lr, cfg.out) == (12, 0.5, "3")
    assert [type(value) for value in (cfg.steps, cfg.lr, cfg.out)] == [int, float, str]


@pytest.mark.parametrize("argv, expected", [
    (["--resume"], True), (["--resume", "true"], True), (["--resume=True"], True),
    (["--resume", "1"], True), (["--resume", "false"], False), (["--resume", "0"], False),
    (["--resume", "--steps", "3"], True), ([], False)])
def test_a_bool_is_a_flag_that_may_have_a_value(argv, expected):
    assert parse(*argv).resume is expected


@pytest.mark.parametrize("argv, named", [
    (["--step", "3"], "unknown option --step; did you mean --steps?"),
    (["--save-every=3"], "unknown option --save-every=3; did you mean --save_every?"),
    (["--zzz"], "unknown option --zzz; the options are out steps lr"),
    (["stray"], "unknown option stray"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--resume", "maybe"], '--resume: "maybe"; give true or false'),
    (["--steps"], "--steps: expected one argument")])
def test_what_cannot_be_meant_is_refused_by_name(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    assert exit.value.code == 2 and named in capsys.readouterr().err


def test_help_is_made_of_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage") and "What it does." in text
    assert "--steps int optimizer steps, 100% of them (default: 8)" in text
    assert "--lr float peak learning rate (default: 0.001)" in text
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text


def test_every_stages_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        training.parse(train_pretrain.Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(train_pretrain.Config):
        assert f"--{field.name} " in text
        assert f" {type(field.default).__name__} (default: {field.default})" not in text, field.name


def test_a_users_mistake_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_x.py"])
    for error in (ValueError("--lr is odd"), FloatingPointError("--lr is odd")):
        def main(cfg, error=error):
            raise error
        with pytest.raises(SystemExit) as exit:
            training.command_line(main, Config, "")
        assert exit.value.code == "train_x.py: --lr is odd"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(ZeroDivisionError):
        training.command_line(lambda cfg: 1 / 0, Config, "")


# ---------------------------------------------------------------------- schedules and numbers

@pytest.mark.parametrize("step, expected", [
    (0, 0.2), (4, 1.0), (9, 2.0),                       # (step + 1) / 10 of the peak 2
    (10, 2.0), (40, 2 * 0.775), (55, 2 * 0.55),         # 0.1 + 0.9 (1 + cos) / 2 at 0, 60,
    (70, 2 * 0.325), (100, 0.2), (1000, 0.2)])          # 90, 120, 180 degrees, and later
def test_learning_rate_by_hand(step, expected):
    assert training.learning_rate(step, 100, 2.0, warmup=10) == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_at_its_peak_and_can_end_at_zero():
    assert training.learning_rate(0, 10, 3.0) == 3.0
    assert training.learning_rate(10, 10, 3.0, floor=0.0) == pytest.approx(0.0)
    assert training.learning_rate(5, 5, 3.0, warmup=5) == 3.0          # all of it warmup


def test_warmup_stable_decay_rises_stays_and_falls_to_nothing():
    rates = [training.warmup_stable_decay(step, 100, 2.0, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9:71] == [2.0] * 62
    assert rates[85] == pytest.approx(1.0) and rates[100] == 0
    assert sum(rates) > 1.2 * sum(training.learning_rate(s, 100, 2.0, 10) for s in range(101))


def test_linear_decay_by_hand():
    assert [training.linear_decay(step, 4, 2.0) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


def test_weight_decay_shrinks_matrices_and_nothing_else():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    before = [w.detach().clone() for w in model.parameters()]
    optimizer = training.adamw(model, lr=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before[0] * (1 - 0.1 * 0.5))
    for weight, old in zip(list(model.parameters())[1:], before[1:]):
        assert torch.equal(weight, old)


def test_frozen_weights_are_not_optimized():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    groups = training.adamw(model, lr=0.1).param_groups
    assert [w for group in groups for w in group["params"]] == [model[1].weight]


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, bad):
    run, weight = start(tmp_path), nn.Parameter(torch.ones(2))
    run.backward(weight.sum(), step=3)
    weight.grad[0] = bad
    with pytest.raises(FloatingPointError, match=f"step 3: the gradient norm is {bad}"):
        run.update(torch.optim.SGD([weight], lr=1.0), lr=1.0)
    assert weight.tolist() == [1, 1]


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


def test_curves_become_a_picture_even_of_figures_that_are_rarely_logged(tmp_path):
    rows = [{"step": step, "loss": 3 / (step + 1), "lr": 0.1, "tokens": step, "tokens_per_s": 9.0}
            | ({"val_loss": 2.0} if step == 2 else {}) for step in range(4)]
    plot_curves(rows, tmp_path / "curves.png", "test")
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5_000
    plot_curves([], tmp_path / "none.png", "nothing was logged")       # must not fail


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
    """Every row without the only figure that a clock decides."""
    rows = training.read_metrics(out)
    assert rows and all(row.pop("tokens_per_s") > 0 for row in rows)
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
        with pytest.raises(ValueError, match="--out .*base is a folder that this stage reads"):
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
                                                                         monkeypatch, signum):
    out, log = tmp_path / "out", training.Run.log

    def interrupting(self, step, **figures):
        log(self, step, **figures)
        if step == 6:                                                  # between two rows
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(training.Run, "log", interrupting)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit, match="stopped after step 6; everything is saved.*--resume"):
        train_pretrain.main(tiny_run(out, corpus))
    assert signal.getsignal(signum) is before
    assert training.newest_checkpoint(out).name == "step_000007"
    assert not (out / "config.json").exists()                          # not a finished model
    monkeypatch.setattr(training.Run, "log", log)
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)


def test_a_rank_stops_with_the_rank_that_was_interrupted(tmp_path, monkeypatch):
    run, done = start(tmp_path), []
    run.track(model=nn.Linear(2, 2))
    monkeypatch.setattr(run, "mean_over_ranks", lambda value: (value + (len(done) == 3)) / 2)
    with pytest.raises(SystemExit, match="stopped after step 2"):
        done.extend(run.steps(8))
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


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, name, damage):
    run, model = start(tmp_path), nn.Linear(2, 2)
    run.track(model=model)
    for steps_done in (1, 2):
        run.save_checkpoint(steps_done)
    newest = training.newest_checkpoint(run.out)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 255
    (newest / name).write_bytes(content) if damage == "flipped" else (newest / name).unlink()
    with pytest.raises(ValueError, match=f"step_000002/{name} is damaged.*remove .*step_000002 to"):
        start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
    for file in newest.iterdir():                                      # the way out works
        file.unlink()
    newest.rmdir()
    resumed, weights = start(tmp_path, resume=True), nn.Linear(2, 2)
    resumed.track(model=weights)
    assert resumed.first_step == 1 and torch.equal(weights.weight, model.weight)


def test_resuming_goes_on_with_the_same_random_numbers(tmp_path):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    torch.rand(3)
    run.save_checkpoint(1)
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
        kept.append([int(f.name[5:]) for f in sorted((run.out / "checkpoints").iterdir())])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [6, 7], [7, 8]]


def test_a_checkpoint_is_absent_until_it_is_whole(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    run.save_checkpoint(1)

    def full_disk(*args):
        raise OSError("no space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        run.save_checkpoint(2)
    assert training.newest_checkpoint(run.out).name == "step_000001"
    monkeypatch.undo()
    run.save_checkpoint(2)                                             # its leftovers do no harm
    assert training.newest_checkpoint(run.out).name == "step_000002"
    assert training.read_checkpoint(training.newest_checkpoint(run.out))["step"] == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(tmp_path, corpus, straight,
                                                                        monkeypatch):
    out, scores, calls = tmp_path / "out", train_pretrain.token_logps, []

    def broken(*args):
        calls.append(1)
        return scores(*args) * (math.nan if len(calls) == 8 else 1)    # in step 7

    monkeypatch.setattr(train_pretrain, "token_logps", broken)
    with pytest.raises(FloatingPointError) as stop:
        train_pretrain.main(tiny_run(out, corpus))
    newest = training.newest_checkpoint(out)
    assert newest.name == "step_000005" and not (out / "config.json").exists()
    for part in ("step 7: the loss is nan", f"{newest} is the last good checkpoint", "--lr"):
        assert part in str(stop.value)
    assert [row["step"] for row in metrics(out)] == [0, 3, 4]          # kept, and no NaN among them
    train_pretrain.main(tiny_run(out, corpus, resume=True))
    assert same_run(out, straight)


def test_a_bad_loss_before_any_checkpoint_says_so(tmp_path):
    run, weight = start(tmp_path), nn.Parameter(torch.ones(2))
    with pytest.raises(FloatingPointError, match="step 0: the loss is inf.*No checkpoint was made"):
        run.backward(weight.sum() * math.inf, step=0)
    assert weight.grad is None


# ---------------------------------------------------------------------- other processes

def command(cfg) -> list[str]:
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(cfg).items()]
    return [sys.executable, str(ROOT / "train_pretrain.py"), *options]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_ctrl_c_in_a_terminal_saves_and_exits_and_resume_goes_on(tmp_path, corpus):
    out = tmp_path / "out"
    cfg = tiny_run(out, corpus, steps=1_000_000, log_every=1, eval_every=0, save_every=0)
    process = subprocess.Popen(command(cfg), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while len(training.read_metrics(out) if (out / "metrics.jsonl").exists() else []) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=200)[1]
    finally:
        process.kill()
    newest = training.newest_checkpoint(out)
    done = int(newest.name[5:])
    assert process.returncode == 1 and "Traceback" not in error
    assert f"stopped after step {done - 1}; everything is saved in {out}" in error
    assert metrics(out)[-1]["step"] == done - 1
    train_pretrain.main(dataclasses.replace(cfg, steps=done + 3, resume=True))
    assert [row["step"] for row in metrics(out)] == list(range(done + 3))


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
