"""
Figures of a run: their means since the last row become the next row of metrics.jsonl.
"""
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from plumbing.curves import read_metrics


class Metrics:
    """What a run has logged.

    last: the newest value of every figure. evaluated: the newest step with a val_loss. tokens:
    processed so far, by all ranks together. pending: the values of every figure since the last row;
    tensors stay on their device, because reading one waits for the GPU.
    """

    def __init__(self, file: Path):
        self.file = file
        self.last: dict[str, float] = {}
        self.evaluated = -1
        self.tokens = 0
        self.pending: dict[str, list] = {}
        self.pending_tokens = 0
        self.row_time = time.perf_counter()

    def add(self, tokens: int, figures: dict) -> None:
        """One step's figures, None for those that it has none of; tokens: how many all ranks
        together have processed in it."""
        self.tokens += tokens
        self.pending_tokens += tokens
        for name, value in figures.items():
            if isinstance(value, Tensor):
                value = value.detach()                 # else its whole graph would stay in memory
            # also without a value, because all ranks must have the same names
            values = self.pending.setdefault(name, [])
            if value is not None:
                values.append(value)

    def row(self, step: int, skipped: int, mean_over_ranks: Callable) -> dict:
        """The means of all that was added since the last row, over steps and ranks.

        skipped: updates skipped so far. After the first of them rows hold that number, and in the
        row of a skipped update the means leave out values that are not finite. Means that are
        not finite themselves are named in the row's "not_finite".
        """
        just_skipped = skipped > self.last.get("skipped", 0)
        # sums and counts, not means: a figure may have been logged less often on one rank
        sums = []
        counts = []
        for values in self.pending.values():
            numbers = [float(value) for value in values]       # here a GPU is waited for
            if just_skipped:
                numbers = [number for number in numbers if math.isfinite(number)]
            sums.append(sum(numbers))
            counts.append(len(numbers))
        sums = mean_over_ranks([float(number) for number in sums])
        counts = mean_over_ranks([float(number) for number in counts])

        row = {"step": step}
        not_finite = []
        for name, total, count in zip(self.pending, sums, counts):
            if count and math.isfinite(total):
                row[name] = total / count
            elif count:
                not_finite.append(name)
                self.last.pop(name, None)              # an earlier value is not the newest
        if not_finite:
            row["not_finite"] = not_finite             # by name, because JSON has no NaN
        if skipped:
            row["skipped"] = skipped
        now = time.perf_counter()
        # since the last row, so that a slow phase shows in the rows where it happened
        if self.pending_tokens:
            row["tokens"] = self.tokens
            row["tokens_per_s"] = self.pending_tokens / (now - self.row_time)
        self.row_time = now
        self.pending = {}
        self.pending_tokens = 0
        self.last |= {name: value for name, value in row.items() if name != "not_finite"}
        if "val_loss" in row:
            self.evaluated = step
        return row

    def pending_state(self) -> dict[str, list[float]]:
        """The values since the last row, for a checkpoint."""
        state = {name: [float(value) for value in values] for name, values in self.pending.items()}
        return state | {"tokens": [self.pending_tokens]}

    def load_pending(self, states: list[dict], rank: int, world_size: int) -> None:
        """What pending_state() gave on each rank of the run that was stopped. On another number of
        ranks each goes on with the means over all of them."""
        # "tokens" are counted over all ranks already, so that their mean is the count
        if len(states) == world_size:
            pending = dict(states[rank])
        else:
            pending = {}
            for name in states[0]:
                steps = zip(*(state[name] for state in states))
                pending[name] = [sum(values) / len(values) for values in steps]
        self.pending_tokens = sum(pending.pop("tokens", []))
        self.pending = pending

    def write(self, row: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def drop_rows_from(self, step: int) -> None:
        """Cut metrics.jsonl before `step`: a resumed run will write those rows again."""
        if not self.file.exists():
            return
        rows = []
        for row in read_metrics(self.file.parent):     # without the half line that a kill leaves
            if row["step"] < step:
                rows.append(json.dumps(row) + "\n")
        # written beside it and renamed, because a kill must leave one of the two whole
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(rows))
        temporary.replace(self.file)
