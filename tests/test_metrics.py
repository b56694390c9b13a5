"""plumbing/metrics.py: means of the steps, over ranks, beside skipped updates and after a kill."""
import json
import math

import torch
from tiny_runs import start

from plumbing.curves import read_metrics
from plumbing.metrics import Metrics


def test_a_row_holds_the_means_since_the_row_before(tmp_path):
    run = start(tmp_path, log_every=3)
    for step in run.steps(8):
        extra = {"val_loss": 7.0} if step == 3 else {}
        run.log(step, tokens=10, loss=torch.tensor(float(step)), lr=0.5, **extra)
    rows = read_metrics(run.out)
    assert [row["step"] for row in rows] == [0, 2, 3, 5, 7]            # first, due, validated, last
    assert [row["loss"] for row in rows] == [0, 1.5, 3, 4.5, 6.5]      # of 0; 1 2; 3; 4 5; 6 7
    assert [row["tokens"] for row in rows] == [10, 30, 40, 60, 80]     # so far
    assert [row.get("val_loss") for row in rows] == [None, None, 7, None, None]
    assert all(row["lr"] == 0.5 and row["tokens_per_s"] > 0 for row in rows)
    assert run.metrics.last["loss"] == 6.5 and run.metrics.last["val_loss"] == 7
    assert run.last("loss", "lr") == {"loss": 6.5, "lr": 0.5}
    assert run.last_with("val_", "lo") == {"val_loss": 7, "loss": 6.5}


def test_a_row_counts_what_was_skipped_and_leaves_it_out_of_the_means(tmp_path):
    run = start(tmp_path, log_every=2)
    for step, loss in zip(run.steps(8), [1.0, 2.0, math.nan, 4.0, math.nan, math.nan, 7.0, 8.0]):
        run.guard.skipped += math.isnan(loss)
        run.log(step, tokens=10, loss=torch.tensor(loss), lr=0.5)
    rows = read_metrics(run.out)
    assert [row["step"] for row in rows] == [0, 1, 3, 5, 7]
    assert [row.get("loss") for row in rows] == [1, 2, 4, None, 7.5]
    assert [row.get("skipped") for row in rows] == [None, None, 1, 3, 3]
    assert [row["lr"] for row in rows] == [0.5] * 5 and rows[-1]["tokens"] == 80


def test_a_figure_that_is_not_finite_without_a_skipped_update_is_named(tmp_path):
    run = start(tmp_path, log_every=2)
    for step in run.steps(4):
        run.log(step, loss=1.0, val_loss=[3.0, 2.0, math.nan, math.inf][step])
    assert [row.get("not_finite") for row in read_metrics(run.out)] == [None, None] + 2 * [
        ["val_loss"]]
    assert "NaN" not in (run.out / "metrics.jsonl").read_text()
    assert run.last("loss", "val_loss") == {"loss": 1.0, "val_loss": None}     # 2.0 is not newest
    run.save_checkpoint(4)


def test_lines_that_are_broken_are_left_out_and_counted(tmp_path, capsys):
    run = start(tmp_path, log_every=1)
    for step in run.steps(3):
        run.log(step, loss=1.0)
    for broken in (b"\xff\xfe\n", b"[3]\n", b'{"loss": 2}\n', b'{"step": "x"}\n', b'{"step": 3'):
        with open(run.out / "metrics.jsonl", "ab") as file:
            file.write(broken)
    assert [row["step"] for row in read_metrics(run.out)] == [0, 1, 2]
    assert "metrics.jsonl: left out 5 broken lines (first: line 4)" in capsys.readouterr().err
    run.metrics.drop_rows_from(2)
    assert [row["step"] for row in read_metrics(run.out)] == [0, 1]


def test_another_number_of_ranks_goes_on_with_the_means_over_all_former_ones(tmp_path):
    former = [{"loss": [1.0, 2.0], "tokens": [30]}, {"loss": [3.0, 6.0], "tokens": [50]}]
    same = Metrics(tmp_path / "metrics.jsonl")
    same.load_pending(former, rank=1, world_size=2)
    assert same.pending == {"loss": [3.0, 6.0]} and same.pending_tokens == 50
    fewer = Metrics(tmp_path / "metrics.jsonl")
    fewer.load_pending(former, rank=0, world_size=1)
    assert fewer.pending == {"loss": [2.0, 4.0]} and fewer.pending_tokens == 40
    assert former[1] == {"loss": [3.0, 6.0], "tokens": [50]}


def test_rows_after_the_checkpoint_and_half_a_row_are_cut_off(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.drop_rows_from(0)                                          # no file yet: nothing to do
    for step in range(4):
        metrics.write({"step": step, "loss": 1.0})
    with metrics.file.open("a") as file:
        file.write('{"step": 4, "lo')
    metrics.drop_rows_from(3)
    rows = [json.loads(line) for line in metrics.file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
