"""metrics.jsonl, one object per logged step, and the picture that shows it."""
import json
from pathlib import Path

UNITS = {"loss": "nats", "val_loss": "nats per token", "kl": "nats per response", "lr": "per step",
         "tokens": "tokens", "tokens_per_s": "tokens/s", "entropy": "nats per token",
         "logp_chosen": "nats per response", "logp_rejected": "nats per response",
         "response_tokens": "tokens", "skipped": "updates so far"}


def read_metrics(out: str | Path) -> list[dict]:
    """The rows that a run has logged in its folder so far; [] before the first."""
    file = Path(out) / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def plot_curves(rows: list[dict], file: Path, title: str) -> None:
    """One panel per logged figure against the step. Writes no file if no figure was logged."""
    import matplotlib  # not at the top, because it takes a second
    matplotlib.use("Agg")                      # because a server has no screen
    from matplotlib import pyplot as plt

    panels = keys_by_panel(rows)
    if not panels:
        return
    n_columns = min(3, len(panels))                        # more would not fit a page's width
    n_lines = -(-len(panels) // n_columns)                 # rounded up
    figure, axes = plt.subplots(n_lines, n_columns, squeeze=False, layout="constrained",
                                figsize=(4.2 * n_columns, 2.8 * n_lines))      # in inches
    for axis, (name, keys) in zip(axes.flat, panels.items()):
        draw_panel(axis, name, keys, rows)
    for axis in axes.flat[len(panels):]:                   # places of the last line left over
        axis.axis("off")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def keys_by_panel(rows: list[dict]) -> dict[str, list[str]]:
    """The keys that share a panel, by its name, in the order in which they were first logged.

    val_loss goes into the panel of loss; load/0, load/1, ... share the panel load.
    """
    panels = {}
    for row in rows:
        for key in row:
            if key in ("step", "tokens"):                  # the x axis, and a straight line
                continue
            name = "loss" if key == "val_loss" else key.split("/")[0]
            keys = panels.setdefault(name, [])
            if key not in keys:
                keys.append(key)
    return panels


def draw_panel(axis, name: str, keys: list[str], rows: list[dict]) -> None:
    for key in keys:
        logged = [row for row in rows if key in row]       # val_loss, say, is not in every row
        steps = [row["step"] for row in logged]
        values = [row[key] for row in logged]
        marker = "." if len(logged) < 15 else None         # a line alone would hide single points
        axis.plot(steps, values, marker=marker, label=key)
    axis.set(xlabel="step", ylabel=UNITS.get(name, ""), title=name)
    axis.grid(alpha=0.3)
    if "val_loss" in keys:
        axis.legend()
