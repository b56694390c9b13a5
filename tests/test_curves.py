"""plumbing/curves.py: the rows that were logged, and their picture."""
import json

import pytest
from matplotlib.figure import Figure

from plumbing.curves import (
    FIRST,
    LAST,
    draw_panel,
    keys_by_panel,
    panel_of,
    plot_curves,
    read_metrics,
)


def test_curves_become_a_picture_even_of_figures_that_are_rarely_logged(tmp_path):
    rows = [{"step": step, "loss": 3 / (step + 1), "lr": 0.1, "tokens": step, "tokens_per_s": 9.0}
            | ({"val_loss": 2.0} if step == 2 else {}) for step in range(4)]
    plot_curves(rows, tmp_path / "curves.png", "test")
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5_000
    plot_curves([], tmp_path / "none.png", "nothing was logged")       # must not fail


def test_figures_that_belong_together_share_a_panel():
    rows = [{"step": 0, "tokens": 8, "loss": 3.0, "lr": 0.1, "load/0": 0.5, "load/1": 0.5},
            {"step": 1, "tokens": 16, "loss": 2.0, "lr": 0.1, "val_loss": 2.5}]
    assert list(keys_by_panel(rows).items()) == [
        ("loss", ["loss", "val_loss"]), ("load", ["load/0", "load/1"]), ("lr", ["lr"])]


@pytest.mark.parametrize("key, panel", [
    ("val_loss", "loss"), ("val_loss/world", "loss"), ("bits_per_byte/world", "bits_per_byte"),
    ("val_accuracy", "accuracy"), ("train_accuracy", "accuracy"), ("val_margin", "margin"),
    ("value_loss", "value_loss"), ("reward_max", "reward"), ("kl_k3", "kl"),
    ("logratio_rejected", "logratio"), ("val_logratio_chosen", "logratio")])
def test_a_figure_stands_beside_what_it_is_compared_with(key, panel):
    assert panel_of(key) == panel


def test_losses_come_first_then_what_the_stage_is_for_and_the_machine_last():
    row = dict.fromkeys(["step", "skipped", "memory_gb", "mfu", "tokens_per_s", "lr", "grad_norm",
                         "news", "kl", "reward", "accuracy", "value_loss", "loss"], 1.0)
    assert list(keys_by_panel([row])) == [
        "loss", "value_loss", "accuracy", "reward", "kl", "news", "grad_norm", "lr",
        "tokens_per_s", "mfu", "memory_gb", "skipped"]
    assert not set(FIRST) & set(LAST)


def test_raw_log_probabilities_are_logged_but_not_drawn():
    row = {"step": 0, "logp_chosen": -10.0, "logp_rejected": -12.0, "logratio_chosen": -0.7}
    assert keys_by_panel([row]) == {"logratio": ["logratio_chosen"]}


@pytest.mark.parametrize("keys, names", [
    (["lr"], []), (["loss", "val_loss"], ["loss", "val_loss"]),
    ([f"load/{e}" for e in range(64)], [])])                   # 64 names would hide the lines
def test_a_panel_of_several_lines_has_a_legend(keys, names):
    axis = Figure().subplots()
    draw_panel(axis, panel_of(keys[0]), keys, [{"step": 0} | dict.fromkeys(keys, 1.0)])
    legend = axis.get_legend()
    texts = legend.get_texts() if legend else []
    assert [text.get_text() for text in texts] == names


@pytest.mark.parametrize("keys, unit", [
    (["loss", "val_loss"], "nats"), (["loss"], ""), (["kl", "kl_k3"], "nats per response"),
    (["load/0", "load/1"], "share of choices"), (["memory_gb"], "GB")])
def test_a_panel_has_the_unit_of_its_figures(keys, unit):
    axis = Figure().subplots()
    draw_panel(axis, panel_of(keys[0]), keys, [{"step": 0} | dict.fromkeys(keys, 1.0)])
    assert axis.get_ylabel() == unit


def test_metrics_are_the_rows_of_the_file_and_none_before_the_first(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = [{"step": 0, "loss": 3.0}, {"step": 4, "loss": 2.0, "val_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(str(tmp_path)) == rows
