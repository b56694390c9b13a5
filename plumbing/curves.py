"""metrics.jsonl, one object per logged step, and the picture that shows it."""
import json
import sys
from pathlib import Path

# panels in the order of a reader's questions: does the loss fall, does the stage reach its goal,
# and last, because they matter when something is wrong, how the machine works; panels in neither
# list stand between the two
FIRST = ("loss", "actor_loss", "value_loss", "perplexity", "bits_per_byte",
         "accuracy", "margin", "logratio", "reward", "true_reward", "kl", "kl_proxy")
LAST = ("busiest_expert", "dropped", "load", "beta", "grad_norm", "lr", "tokens_per_s", "mfu",
        "memory_gb", "skipped")

# figures that are drawn in the panel of another, because only beside it do they say anything
SHARED = {"train_accuracy": "accuracy", "unseen_families": "accuracy", "few_shot": "accuracy",
          "guess_accuracy": "masked_accuracy", "reward_min": "reward", "reward_max": "reward",
          "kl_k3": "kl", "logratio_chosen": "logratio", "logratio_rejected": "logratio",
          "base_old_loss": "old_loss"}

# not drawn: the x axis; a straight line; raw log p, which differs from response to response by far
# more than training moves it (logratio is drawn instead)
NO_PANEL = ("step", "tokens", "logp_chosen", "logp_rejected", "not_finite")

# of a panel, or of a figure in it; PPO's loss, which has no val_loss, is a sum without a unit
UNITS = {"val_loss": "nats", "old_loss": "nats", "kl_old": "nats per token",
         "value_loss": "score squared", "bits_per_byte": "bits per byte",
         "accuracy": "share that is right", "masked_accuracy": "share that is right",
         "next_sentence_accuracy": "share that is right",
         "short_spans_rebuilt": "share of the spans",
         "single_tokens_rebuilt": "share of the spans", "margin": "nats",
         "logratio": "nats per response", "reward": "reward model's score",
         "reward_std": "reward model's score", "true_reward": "from 0 to 1",
         "kl": "nats per response", "kl_proxy": "nats per response", "ended": "share of responses",
         "clip_fraction": "share of tokens", "entropy": "nats per token",
         "response_tokens": "tokens", "beta": "score per nat", "load": "share of choices",
         "dropped": "share of choices", "lr": "per step", "tokens_per_s": "tokens/s",
         "mfu": "share of the peak", "memory_gb": "GB", "skipped": "updates so far"}
MAX_NAMES = 8        # lines that a legend names; those of 64 experts would hide the lines


def read_metrics(out: str | Path) -> list[dict]:
    """The rows that a run has logged in its folder so far; [] before the first. Lines that are not
    whole are left out, and counted on stderr."""
    file = Path(out) / "metrics.jsonl"
    if not file.exists():
        return []
    rows = []
    broken = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"] + 0
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            broken.append(number)
    if broken:
        print(f"{file}: left out {len(broken)} broken lines (first: line {broken[0]})",
              file=sys.stderr)
    return rows


def plot_curves(rows: list[dict], file: Path, title: str) -> None:
    """The logged figures against the step, those that belong together in one panel. Writes no file
    if no figure was logged."""
    import matplotlib  # not at the top, because it takes a second
    matplotlib.use("Agg")                      # because a server has no screen
    from matplotlib import pyplot as plt

    panels = keys_by_panel(rows)
    if not panels:
        return
    n_columns = min(3, len(panels))                        # more would not fit a page's width
    n_lines = -(-len(panels) // n_columns)                 # rounded up
    # sharex, because a figure that was logged once says little without the whole run's steps
    figure, axes = plt.subplots(n_lines, n_columns, sharex=True, squeeze=False,
                                layout="constrained",
                                figsize=(4.2 * n_columns, 2.8 * n_lines))      # in inches
    for axis, (name, keys) in zip(axes.flat, panels.items()):
        draw_panel(axis, name, keys, rows)
    for axis in axes.flat[len(panels):]:                   # places of the last line left over
        axis.axis("off")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def keys_by_panel(rows: list[dict]) -> dict[str, list[str]]:
    """The keys that share a panel, by its name: FIRST, others as they were first logged, LAST."""
    panels = {}
    for row in rows:
        for key in row:
            if key.removeprefix("val_") in NO_PANEL:
                continue
            keys = panels.setdefault(panel_of(key), [])
            if key not in keys:
                keys.append(key)
    between = [name for name in panels if name not in FIRST + LAST]
    return {name: panels[name] for name in (*FIRST, *between, *LAST) if name in panels}


def panel_of(key: str) -> str:
    """val_loss and val_loss/world -> "loss"; load/0, load/1, ... -> "load"."""
    name = key.split("/")[0].removeprefix("val_")
    return SHARED.get(name, name)


def draw_panel(axis, name: str, keys: list[str], rows: list[dict]) -> None:
    for key in keys:
        logged = [row for row in rows if key in row]       # val_loss, say, is not in every row
        steps = [row["step"] for row in logged]
        values = [row[key] for row in logged]
        marker = "." if len(logged) < 15 else None         # a line alone would hide single points
        axis.plot(steps, values, marker=marker, label=key)
    units = [UNITS[known] for known in (name, *keys) if known in UNITS]
    axis.set(xlabel="step", ylabel=units[0] if units else "", title=name)
    axis.tick_params(labelbottom=True)                     # sharex would leave it to the last line
    axis.grid(alpha=0.3)
    if 1 < len(keys) <= MAX_NAMES:
        axis.legend(fontsize="small")
