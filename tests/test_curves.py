"""plumbing/curves.py: the rows that were logged, and their picture."""
import json

from plumbing.curves import keys_by_panel, plot_curves, read_metrics


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
        ("loss", ["loss", "val_loss"]), ("lr", ["lr"]), ("load", ["load/0", "load/1"])]


def test_metrics_are_the_rows_of_the_file_and_none_before_the_first(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = [{"step": 0, "loss": 3.0}, {"step": 4, "loss": 2.0, "val_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(str(tmp_path)) == rows
