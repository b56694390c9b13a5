"""plumbing/inputs.py: a run goes on with what it began with, and says so where it does not."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from stages import run, write_inputs
from test_claim import content
from tiny import folder_of, tiny_model
from tiny_runs import same_run, start
from torch import nn

from plumbing import inputs
from plumbing.run import Run

torch.set_num_threads(1)
STOPPED = {"steps": 6, "save_every": 2}


def stop_after(monkeypatch, last: int) -> None:
    log = Run.log

    def stopping(self, step, **figures):
        log(self, step, **figures)
        if step == last:
            self.wait_for_checkpoint()
            raise KeyboardInterrupt
    monkeypatch.setattr(Run, "log", stopping)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A function that runs a stage and stops it in the middle; returns the folder of all."""
    at = tmp_path / "at"
    at.mkdir()
    write_inputs(at)

    def stop(stage: str) -> Path:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, 4)
            run(at, stage, "out", **STOPPED)
        return at
    return stop


def other_model(folder: Path, **options) -> None:
    folder_of(tiny_model(seed=7, d_model=16, n_layers=1, n_heads=2, context_length=64, **options),
              folder)


def swap_labels(file: Path) -> None:
    file.write_text(file.read_text().replace("rejected", "x").replace("chosen", "rejected")
                    .replace('"x"', '"chosen"'))


CHANGES = {
    "other weights": ("dpo", lambda at: other_model(at / "sft"),
                      "--init: .*sft/model.safetensors is not the one it was"),
    "another reward model": ("ppo", lambda at: other_model(at / "rm", head="scalar"),
                             "--reward: .*rm/model.safetensors is not the one it was"),
    "swapped labels": ("rm", lambda at: swap_labels(at / "pairs.jsonl"),
                       "--data: .*pairs.jsonl is not the one it was"),
    "a row more": ("sft", lambda at: (at / "examples.jsonl").open("a").write(
        '{"prompt": "a", "response": "b"}\n'), "--data: .*examples.jsonl is not the one it was"),
    "another corpus": ("pretrain", lambda at: (at / "corpus.txt").write_text("a bear " * 300),
                       "--data: .*corpus.txt is not the one it was"),
    "no tokenizer": ("pretrain", lambda at: (at / "out" / "tokenizer.json").unlink(),
                     "began with other inputs: .*out/tokenizer.json is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_something_else(stopped, change):
    stage, make, named = CHANGES[change]
    at = stopped(stage)
    make(at)
    before = content(at / "out")
    with pytest.raises(ValueError, match=f"{named}.*--insist"):
        run(at, stage, "out", resume=True, **STOPPED)
    assert content(at / "out") == before


def test_insisting_goes_on_and_the_record_says_with_what(stopped, capsys):
    at = stopped("dpo")
    parent = json.loads((at / "out" / "checkpoints" / "step_000004" / "meta.json").read_text())
    other_model(at / "sft")
    run(at, "dpo", "out", resume=True, insist=True, **STOPPED)
    assert "model.safetensors is not the one it was: going on with it" in capsys.readouterr().err
    record = json.loads((at / "out" / "config.json").read_text())
    assert record["inputs_before"] == [parent["inputs"]]
    assert record["inputs"]["init"][0]["sha256"] == record["parents"][str(at / "sft")]
    assert record["inputs"]["init"] != parent["inputs"]["init"]
    # Asked once, it is not asked again.
    run(at, "dpo", "out", resume=True, **STOPPED)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_a_copied_folder_and_a_touched_file_are_the_same(stopped, stage):
    at = stopped(stage)
    shutil.copytree(at, at.with_name("copy"), copy_function=shutil.copy)       # times are new
    for file in at.glob("*.*"):
        os.utime(file, (1, 1))
    run(at, stage, "out", resume=True, **STOPPED)
    run(at.with_name("copy"), stage, "out", resume=True, **STOPPED)
    assert same_run(at / "out", at.with_name("copy") / "out")


def test_a_file_of_the_same_size_and_time_is_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("a bear")
    known = inputs.describe(file, None)
    monkeypatch.setattr(inputs, "sha256", lambda path: pytest.fail("read again"))
    assert inputs.describe(file, known) == known


def test_a_world_is_its_seed_and_shards_are_their_index(tmp_path):
    assert inputs.files_of("world") == inputs.files_of("world:0") == ["world:0"]
    (tmp_path / "index.json").write_text("{}")
    assert inputs.files_of(str(tmp_path)) == [tmp_path / "index.json", tmp_path / "tokenizer.json"]
    a, b = ({"data": [{"file": f"world:{seed}", "sha256": f"world:{seed}"}]} for seed in (0, 1))
    assert inputs.differences(a, a) == []
    assert inputs.differences(a, b) == ["--data: world:1 is not the one it was"]


def test_another_code_of_the_world_is_another_world(tmp_path, monkeypatch):
    for name in ("tasks.py", "judge.py"):
        (tmp_path / name).write_text("BEARS = 3\n")
    sums = []
    for code in ("BEARS = 3\n", "BEARS = 4\n"):
        (tmp_path / "judge.py").write_text(code)
        monkeypatch.setattr(inputs, "WORLD", tmp_path)
        inputs.world_sum.cache_clear()
        sums.append({"data": [inputs.describe("world:0", None)]})
    inputs.world_sum.cache_clear()
    assert inputs.differences(sums[0], sums[1]) == ["--data: world:0 is not the one it was"]
    assert inputs.differences(sums[0], sums[0]) == []


@pytest.mark.parametrize("name, value, said", [
    ("ranks", 2, "ranks 2; from here on it is 1: a step reads the rows of so many ranks"),
    ("dtype", "torch.bfloat16", "dtype torch.bfloat16; from here on it is torch.float32: matmuls"),
    ("threads", 7, "threads 7; from here on it is 1: sums are added in another order")])
def test_other_conditions_are_said(tmp_path, capsys, name, value, said):
    first = start(tmp_path)
    first.track(model=nn.Linear(2, 2))
    first.save_checkpoint(1)
    first.wait_for_checkpoint()
    meta = next((tmp_path / "out").glob("checkpoints/*/meta.json"))
    changed = json.loads(meta.read_text()) | {name: value}
    del changed["meta_sha256"]
    meta.write_text(json.dumps(changed))
    start(tmp_path, resume=True).track(model=nn.Linear(2, 2))
    assert f"the run began with {said}" in capsys.readouterr().err
