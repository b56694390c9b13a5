"""Every stage, stopped by a signal and killed between two checkpoints: resumed, it writes the same
figures and weights, bit for bit, as the run that nothing stops; on one rank and on two."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import stages
import torch
from tiny_runs import same_run

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return stages.write_inputs(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def folder(inputs, tmp_path) -> Path:
    """The inputs in a folder of the test's own."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def assert_same_end(folder: Path, stage: str) -> None:
    straight = folder / f"{stage}_straight"
    for how in ("stopped", "killed"):
        assert same_run(folder / f"{stage}_{how}", straight), (stage, how)
        for file in straight.glob("adapter.*"):                # LoRA's own weights
            assert (folder / f"{stage}_{how}" / file.name).read_bytes() == file.read_bytes()


def on_two_ranks(folder: Path, names: list[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
         str(port), str(ROOT / "tests" / "stages.py"), str(folder), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert_same_end(folder, name)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_that_was_stopped_or_killed_ends_bit_for_bit_the_same(folder, stage, monkeypatch,
                                                                      capsys):
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *args: None)
    stages.straight_stopped_and_killed(folder, stage)
    assert_same_end(folder, stage)
    said = capsys.readouterr().err
    assert "stopped after step 2; everything is saved in" in said
    assert "going on from step 3" in said and "going on from step 4" in said


def test_two_ranks_that_were_stopped_or_killed_end_bit_for_bit_the_same(folder):
    on_two_ranks(folder, ["pretrain", "ppo"])


@pytest.mark.slow
def test_two_ranks_end_bit_for_bit_the_same_in_every_stage(folder):
    on_two_ranks(folder, list(stages.STAGES))
