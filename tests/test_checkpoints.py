"""plumbing/checkpoints.py: whole or absent, damaged or full, written beside the training."""
import errno
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import same_run, start, tiny_run, write_corpus
from torch import nn

import train_pretrain
from plumbing import checkpoints, claim
from plumbing.optimizers import adamw


def saved(run, *steps_done, **parts):
    """A checkpoint after each of so many steps; `parts` or a new model are what it holds."""
    run.track(**(parts or {"model": nn.Linear(2, 2)}))
    for steps in steps_done:
        run.save_checkpoint(steps)
    run.wait_for_checkpoint()
    return {int(f.name[5:]): f for f in checkpoints.checkpoints(run.out)}


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[:len(content) // 2])


def contents(folder: Path) -> dict:
    """All files but those that say whose the folder is."""
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*"))
            if f.is_file() and f.name not in (claim.LOCK, claim.LIST)}


# ---------------------------------------------------------------------- damaged

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
    resumed.wait_for_checkpoint()
    assert checkpoints.read_checkpoint(folders[2])["step"] == 2


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
    assert checkpoints.newest_checkpoint(run.out) == folders[1_000_000]
    damage(folders[1_000_000] / "meta.json", "missing")
    assert checkpoints.newest_checkpoint(run.out) == folders[999_999]


def test_a_checkpoint_without_its_meta_json_is_neither_counted_nor_removed(tmp_path):
    run = start(tmp_path)
    damage(saved(run, 1)[1] / "meta.json", "truncated")
    assert list(saved(run, 2, 3, 4)) == [1, 3, 4]


def test_names_reach_the_disk_after_their_contents(tmp_path, monkeypatch):
    """A power cut must not leave the name of a checkpoint whose bytes were still on their way."""
    run, events, rename, fsync = start(tmp_path), [], Path.rename, claim.fsync
    monkeypatch.setattr(claim, "fsync", lambda f: (events.append(f), fsync(f)))
    monkeypatch.setattr(Path, "rename", lambda f, to: (events.append((f, to)), rename(f, to)))
    final = saved(run, 1)[1]
    folder = final.with_name("step_000001.tmp")
    middle = events.index((folder, final))
    own = [event for event in events[:middle] if event not in (run.out, run.out / "files.json.tmp")]
    assert set(own) == {folder, *(folder / f.name for f in final.iterdir())}
    assert len(set(own)) == 4 and events[middle + 1:] == [final.parent, run.out]


def test_an_optimizers_state_of_parameters_in_another_order_is_refused(tmp_path):
    """torch would load it, because it counts the parameters alone; its fused kernels would then
    read beyond the end of the smaller one."""
    sizes = [(2, 4), (4, 4)]
    optimizers = []
    for order in (sizes, sizes[::-1]):
        model = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in order])
        sum(p.sum() for p in model).backward()
        optimizers.append(adamw(model, lr=0.1))
    optimizers[0].step()
    saved(start(tmp_path), 1, optimizer=optimizers[0])
    with pytest.raises(ValueError, match="its optimizer is not the one of this run.*exp_avg of "
                                         r"shape \(2, 4\) for a parameter of shape \(4, 4\)"):
        start(tmp_path, resume=True).track(optimizer=optimizers[1])


# ---------------------------------------------------------------------- which of them stay

def test_the_last_two_checkpoints_and_the_best_stay(tmp_path):
    run, kept = start(tmp_path), []
    run.track(model=nn.Linear(2, 2))
    for step, val_loss in zip(run.steps(8), [5, 4, 2, 3, 2.5, 6, 1, 7]):
        run.log(step, loss=1.0, val_loss=val_loss)
        run.save_checkpoint(step + 1)
        run.wait_for_checkpoint()
        kept.append([int(f.name[5:]) for f in sorted((run.out / "checkpoints").iterdir())])
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [6, 7], [7, 8]]


def test_the_best_checkpoint_is_one_that_was_evaluated_itself(tmp_path):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    for step in run.steps(6):                          # evaluated after 2, 4, 6; saved after 3, 6
        run.log(step, loss=1.0, **({"val_loss": 10.0 - step} if step % 2 else {}))
        if step in (2, 5):
            run.save_checkpoint(step + 1)
    run.wait_for_checkpoint()
    losses = [checkpoints.read_meta(f)["val_loss"] for f in checkpoints.checkpoints(run.out)]
    assert losses == [None, 5.0]


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


def train_a_line(run, weight, optimizer, factor):
    """Three updates by the loss factor * weight."""
    for _ in range(3):
        loss = factor * weight.sum()
        run.backward(loss)
        norm = run.clip(nn.ParameterList([weight]), max_norm=1.0)
        run.step(optimizer, 0.1, loss, norm)
        optimizer.zero_grad()


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_written(tmp_path, slow_disk):
    run, model, weight = start(tmp_path), nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = adamw(nn.ParameterList([weight]), lr=0.0)
    run.track(model=model, optimizer=optimizer)
    train_a_line(run, weight, optimizer, 1.0)
    run.metrics.pending["loss"] = [1.0]
    expected = [model.weight.clone(), optimizer.state[weight]["exp_avg"].clone()]
    run.save_checkpoint(3)                                             # returns at once
    run.metrics.pending["loss"].append(5.0)
    with torch.no_grad():
        model.weight.zero_()
    train_a_line(run, weight, optimizer, -1.0)
    assert checkpoints.checkpoints(run.out) == []
    slow_disk.set()
    run.wait_for_checkpoint()
    resumed, weights = start(tmp_path, resume=True), nn.Linear(2, 2)
    optimizer = adamw(nn.ParameterList([weight]), lr=0.0)
    resumed.track(optimizer=optimizer, model=weights)
    assert torch.equal(weights.weight, expected[0]) and weights.weight.any()
    assert torch.equal(optimizer.state[weight]["exp_avg"], expected[1])
    assert len(resumed.guard.history["optimizer"]["recent"]) == 3
    assert resumed.metrics.pending == {"loss": [1.0]}


def test_a_save_waits_for_the_one_before_it(tmp_path, slow_disk):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    run.save_checkpoint(1)
    threading.Timer(0.2, slow_disk.set).start()
    run.save_checkpoint(2)                                             # one copy at a time
    assert slow_disk.is_set()
    assert [f.name for f in checkpoints.checkpoints(run.out)][0] == "step_000001"


def test_no_thread_outlives_its_checkpoint(tmp_path):
    """One that stayed kept OpenMP workers: steps after the first save took nearly twice as long."""
    threads, run = set(threading.enumerate()), start(tmp_path)
    saved(run, 1, 2)
    until = time.monotonic() + 10
    while set(threading.enumerate()) - threads:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("where", ["steps", "save_checkpoint", "finish"])
def test_an_error_of_the_writing_thread_surfaces(tmp_path, monkeypatch, where):
    run = start(tmp_path)
    run.track(model=nn.Linear(2, 2))
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)            # no full disk: itself
    if where != "steps":
        run.save_checkpoint(1)
    with pytest.raises(ZeroDivisionError):
        if where == "steps":
            for step in run.steps(10_000):
                if step == 0:                      # not before, because a run begins by cleaning up
                    run.save_checkpoint(1)
                time.sleep(0.01)
                assert step < 3_000
        elif where == "save_checkpoint":
            run.save_checkpoint(2)
        else:
            run.finish(None, None)
    assert contents(run.out) == {}                                     # no half of it stays


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run, model = start(tmp_path), nn.Linear(2, 2)
    folders = saved(run, 3, model=model)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    run.save_checkpoint(5)
    with pytest.raises(FloatingPointError, match="after step 4 the weights are not finite; .*"
                       "step_000003 is the last good checkpoint; try a lower --lr"):
        run.wait_for_checkpoint()
    assert checkpoints.checkpoints(run.out) == list(folders.values())


# ---------------------------------------------------------------------- a full disk

def fills_the_disk(*args):
    args[1].write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_in_one_clear_message_and_costs_no_checkpoint(tmp_path, monkeypatch):
    corpus, out, save, count = write_corpus(tmp_path), tmp_path / "out", torch.save, []
    train_pretrain.main(tiny_run(tmp_path / "straight", corpus))

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
    assert same_run(out, tmp_path / "straight")


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 704 vs 598"),      # torch.save's
                                   OSError(errno.EDQUOT, "Disk quota exceeded")])
def test_other_words_for_a_full_disk_are_understood(tmp_path, monkeypatch, error):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage",
                        lambda folder: type("usage", (), {"free": 3_000_000}))
    size = 10_000_000 if isinstance(error, RuntimeError) else 100
    with pytest.raises(OSError, match="no space left.*MB are needed, 3.0 MB are free"):
        with checkpoints.room_for(tmp_path / "x", [torch.zeros(size, dtype=torch.uint8), 1]):
            raise error
    with pytest.raises(RuntimeError, match="pos"), checkpoints.room_for(tmp_path / "x", [1]):
        raise RuntimeError("pos")                                      # there is room: a bug
