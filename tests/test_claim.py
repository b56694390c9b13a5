"""plumbing/claim.py: nothing that no run wrote is ever removed, and nothing that one wrote is lost
before its successor is whole."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed import attempt, die_at_file
from stages import STAGES, run, write_inputs
from tiny_runs import same_run, start, tiny_run, write_corpus

import train_pretrain
from plumbing import claim
from plumbing.folders import load_model
from plumbing.run import Run

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
FOREIGN = ("thesis.txt", "checkpoints/mine/thesis.txt", "notes.tmp", "checkpoints/mine.tmp",
           "checkpoints/step_000012/thesis.txt")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the lock aside, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != claim.LOCK}


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a finished run, into which somebody has put files of their own."""
    out = tmp_path / "out"
    train_pretrain.main(tiny_run(out, write_corpus(tmp_path)))
    for name in FOREIGN:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("years of work")
    return out


# ---------------------------------------------------------------------- --overwrite

def test_a_folder_in_use_is_refused_and_left_alone(finished, tmp_path):
    before = content(finished)
    with pytest.raises(ValueError, match="out is not empty; --resume .*--overwrite"):
        train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt"))
    assert content(finished) == before


def test_overwriting_takes_away_what_the_run_wrote_and_nothing_else(finished, tmp_path):
    train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", seed=1, steps=4,
                                 overwrite=True))
    for name in FOREIGN:
        assert (finished / name).read_text() == "years of work"
    assert json.loads((finished / "config.json").read_text())["seed"] == 1
    assert not (finished / "checkpoints" / "step_000010").exists()     # of the first run
    assert not (tmp_path / "out.old").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_cannot_begin_leaves_the_earlier_one_as_it_was(tmp_path, stage):
    write_inputs(tmp_path)
    run(tmp_path, stage, "out")
    before = content(tmp_path / "out")
    data = STAGES[stage][1].get("data", "examples.jsonl")
    with open(tmp_path / data, "a") as file:
        file.write('{"broken": \n' if data.endswith("jsonl") else "")
    if data.endswith("txt"):
        (tmp_path / data).unlink()
    with pytest.raises(ValueError, match=data):
        run(tmp_path, stage, "out", overwrite=True)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("die_at", [2, 6])                 # before the first checkpoint, and after
def test_an_earlier_run_is_kept_whole_until_the_new_one_is_written(finished, tmp_path, monkeypatch,
                                                                   die_at):
    shutil.copytree(finished, tmp_path / "copy")
    log = Run.log

    def killed(self, step, **figures):
        log(self, step, **figures)
        if step == die_at:
            if self.writer.writing:
                self.writer.error(wait=True)               # a kill would end the thread, too
            raise KeyboardInterrupt                        # which nothing saves
    monkeypatch.setattr(Run, "log", killed)
    cfg = tiny_run(finished, tmp_path / "corpus.txt", seed=1)
    with pytest.raises(KeyboardInterrupt):
        train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", seed=1, overwrite=True))
    assert same_run(tmp_path / "out.old", tmp_path / "copy")
    load_model(tmp_path / "out.old")
    monkeypatch.setattr(Run, "log", log)
    # Overwritten once more, the earlier run would be gone before any was finished.
    with pytest.raises(ValueError, match="out.old is there already.*--resume finishes it"):
        train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", overwrite=True))
    (tmp_path / "out.old" / "thesis.txt").write_text("more work")
    cfg.resume = True
    train_pretrain.main(cfg)
    assert content(tmp_path / "out.old") == {"thesis.txt": b"more work"}
    assert json.loads((finished / "config.json").read_text())["seed"] == 1


def test_a_folder_of_that_name_that_this_run_has_not_made_stays(finished, tmp_path):
    (tmp_path / "out.old").mkdir()
    before = content(finished)
    with pytest.raises(ValueError, match="out.old is there already"):
        train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", overwrite=True))
    assert content(finished) == before
    shutil.rmtree(tmp_path / "out.old")
    (finished / claim.LIST).write_text('{"files": [], "set_aside": "out.old"}')
    (finished / "copied").mkdir()
    claim.remove_old(finished / "copied")                  # has set nothing aside
    assert not (tmp_path / "out.old").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3, "set_aside": ""}', "[" * 5000,
                                  '{"files": ["../thesis.txt"], "set_aside": ""}',
                                  '{"files": ["/thesis.txt"], "set_aside": ""}'])
def test_a_damaged_list_says_nothing_about_who_wrote_what(finished, tmp_path, text):
    (finished / claim.LIST).write_text(text)
    before = content(finished)
    with pytest.raises(ValueError, match=r"files.json is damaged.*give another --out"):
        train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", overwrite=True))
    assert content(finished) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.tmp", "curves.png"])
def test_a_file_of_somebody_else_is_not_written_over(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    for option in ("resume", "overwrite"):
        with pytest.raises(ValueError, match=f"{name} was not written by a run"):
            train_pretrain.main(tiny_run(out, write_corpus(tmp_path), **{option: True}))
    assert content(out) == {name: b"mine"}


def test_a_run_of_a_former_version_which_kept_no_list_is_known_by_its_record(finished, tmp_path):
    (finished / claim.LIST).unlink()
    train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", steps=4, overwrite=True))
    for name in FOREIGN:
        assert (finished / name).read_text() == "years of work"
    assert not (finished / "checkpoints" / "step_000010").exists()


def test_an_overwriting_run_may_be_killed_at_any_moment(tmp_path):
    """Then either the earlier model is whole or the new one is, and the new run can be finished."""
    torch.optim.SGD([torch.zeros(1)])                      # imports half of torch once
    corpus = write_corpus(tmp_path)
    cfg = tiny_run(tmp_path / "out", corpus, steps=2, save_every=1, seed=1, overwrite=True)
    train_pretrain.main(tiny_run(tmp_path / "earlier", corpus, steps=2, save_every=1))
    earlier = (tmp_path / "earlier" / "model.safetensors").read_bytes()
    end = -9
    moment = 4
    while end == -9:
        moment += 11
        for folder in ("out", "out.old"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        shutil.copytree(tmp_path / "earlier", tmp_path / "out")

        def die(pid, moment=moment):
            if pid == 0:
                die_at_file(moment, cfg.out)
        end = attempt(cfg, 1, die)
        folders = [folder for folder in (tmp_path / "out", tmp_path / "out.old")
                   if (folder / "model.safetensors").exists()]
        kept = [(folder / "model.safetensors").read_bytes() for folder in folders]
        assert earlier in kept or json.loads(
            (tmp_path / "out" / "config.json").read_text())["seed"] == 1
        has_begun = claim.set_aside_by(tmp_path / "out") == "out.old"
        train_pretrain.main(dataclasses.replace(cfg, overwrite=not has_begun, resume=has_begun))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["seed"] == 1
        assert not (tmp_path / "out.old").exists()
    assert end == 0 and moment > 60                        # to the end at last


# ---------------------------------------------------------------------- --resume

def test_a_finished_model_without_checkpoints_is_not_trained_over(finished, tmp_path):
    shutil.rmtree(finished / "checkpoints")
    before = content(finished)
    with pytest.raises(ValueError, match="finished model, and no checkpoint.*nothing was changed"):
        train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", resume=True))
    assert content(finished) == before


def test_what_a_kill_leaves_at_the_end_is_no_obstacle(finished, tmp_path):
    (finished / "model.safetensors").rename(finished / "model.safetensors.tmp")
    (finished / "config.json").unlink()
    train_pretrain.main(tiny_run(finished, tmp_path / "corpus.txt", steps=4, overwrite=True))
    assert not (finished / "model.safetensors.tmp").exists()


def test_a_model_may_be_read_by_whoever_reads_its_neighbours(finished):
    modes = {name: (finished / name).stat().st_mode for name in claim.written(finished)
             if (finished / name).is_file()}
    assert len(modes) == 4 and len(set(modes.values())) == 1


# ---------------------------------------------------------------------- one writer

def test_two_runs_do_not_write_to_one_folder(tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from plumbing import claim; "
         "claim.lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()", str(out)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for option in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match="out: another run is writing there"):
            start(tmp_path, **option)
    holder.send_signal(signal.SIGKILL)                     # a crash lets it go
    holder.communicate()
    start(tmp_path)


def test_a_finished_run_lets_its_folder_go(finished):
    lock = os.open(finished / claim.LOCK, os.O_RDWR)
    claim.fcntl.flock(lock, claim.fcntl.LOCK_EX | claim.fcntl.LOCK_NB)
    os.close(lock)
