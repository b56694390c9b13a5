"""Runs that were stopped or killed, on one rank and on two: resumed, they write the same figures
and weights, bit for bit, as the run that nothing stops. (Every stage on one rank: test_resume.py.)
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stages
from tiny_runs import same_run

from plumbing.curves import read_metrics

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def assert_same_end(out: Path, ranks: int) -> None:
    """out: the folder of killed.py, with what it printed in the files stdout and stderr."""
    ends = (out / "stdout").read_text().split()
    said = (out / "stderr").read_text()
    if ranks > 1:
        killed, told_to_stop, *ends = ends
        assert killed == "1" and told_to_stop != "0", said
        assert "stopped after step" in said and "; everything is saved in" in said
    assert len(ends) > 3 and ends == ["-9"] * (len(ends) - 1) + ["0"], said
    assert "going on from step" in said
    assert same_run(out / "killed", out / "straight")
    steps = read_metrics(out / "killed")[-1]["step"] + 1
    kept = {folder.name for folder in (out / "killed" / "checkpoints").iterdir()}
    assert {f"step_{n:06d}" for n in (steps - 1, steps)} <= kept and len(kept) <= 3    # the best


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_any_moment_and_resumed_ends_bit_for_bit_the_same(background, ranks):
    """By the clock, and right before this or that file is opened, renamed or removed; on two ranks
    under torchrun as well."""
    assert_same_end(background(f"killed_{ranks}"), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_more_often_ends_bit_for_bit_the_same(tmp_path, ranks):
    with open(tmp_path / "stdout", "w") as out, open(tmp_path / "stderr", "w") as errors:
        subprocess.run([sys.executable, TESTS / "killed.py", tmp_path, str(ranks), "30", "600"],
                       env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=errors,
                       check=True)
    assert_same_end(tmp_path, ranks)


@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_a_stage_stopped_or_killed_on_two_ranks_ends_bit_for_bit_the_same(background, stage):
    stages.assert_same_end(background("stages"), stage)


@pytest.mark.slow
def test_every_stage_stopped_or_killed_on_two_ranks_ends_bit_for_bit_the_same(tmp_path):
    stages.on_two_ranks(tmp_path, list(stages.STAGES))
    for stage in stages.STAGES:
        stages.assert_same_end(tmp_path, stage)
