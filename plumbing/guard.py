"""
Which updates would do harm, and the loss scale of float16.

    scale      float16 ends at 6e-5: small gradients vanish. So the loss is multiplied by `scale`
               before the backward pass and the gradients are divided by it after. An overflow
               halves the scale, 2,000 updates without one double it.
    history    losses and gradient norms of the last 100 updates: a loss that leaps far beyond all
               of them, with a gradient that does the same, comes from a broken batch.
"""
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

MAX_SKIPPED = 20         # updates in a row; the loss scale falls from 2^16 below 1 in 17
SPIKE = 5.0              # how many times as far as the extremes a spike leaps
SPIKE_WINDOW = 100       # updates that a spike is measured against
FIRST_SCALE = 2.0 ** 16
GROWTH_INTERVAL = 2000   # updates without an overflow until the scale doubles


def is_spike(loss: float, norm: float, recent: list[tuple[float, float]]) -> bool:
    """Whether a loss rises above the median of the recent ones SPIKE times as far as the highest
    of them, and its gradient is SPIKE times as long as their longest.

    recent: (loss, gradient norm) of the last SPIKE_WINDOW updates; with fewer nothing is a spike.
    Extremes and not a standard deviation are the measure, because losses have heavy tails and a
    hard batch is worth learning from.
    """
    if len(recent) < SPIKE_WINDOW:
        return False
    # both must leap, because a hard batch has a high loss and a usual gradient
    losses = [past_loss for past_loss, _ in recent]
    norms = [past_norm for _, past_norm in recent]
    median = statistics.median(losses)
    usual_rise = max(losses) - median
    return loss - median > SPIKE * usual_rise and norm > SPIKE * max(norms)


class Guard:
    """Keeps harmful updates away from the weights, and counts them.

    scale: factor of the loss, 1 unless float16. skipped: updates skipped so far. history: for each
    optimizer by name {"recent": [(loss, norm), ...], "in_a_row": skipped since the last good one}.
    taken: good updates so far.
    """

    def __init__(self, float16: bool):
        self.float16 = float16
        self.scale = FIRST_SCALE if float16 else 1.0
        self.without_overflow = 0
        self.history: dict[str, dict] = {}
        self.skipped = 0
        self.taken = 0

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients of a scaled loss by the scale, in place."""
        torch._foreach_div_(gradients, self.scale)

    def fault(self, name: str, loss: float, norm: float) -> str:
        """Why the update of the optimizer called `name` would do harm; "" when it is good.

        loss: of this update, in the unit of the objective; norm: of its gradient before clipping.
        """
        # of each optimizer its own: an actor's gradients are no measure of a critic's
        past = self.history.setdefault(name, {"recent": [], "in_a_row": 0})
        if not math.isfinite(loss):
            fault = f"the loss is {loss}"
        elif not math.isfinite(norm):
            fault = f"the gradient norm is {norm}"
        elif is_spike(loss, norm, past["recent"]):
            fault = f"the loss leaps to {loss:.3g}, the gradient norm to {norm:.3g}"
        else:
            fault = ""
        if self.float16:
            self.adapt_scale(overflow=not math.isfinite(norm))
        if fault:
            self.skipped += 1
            past["in_a_row"] += 1
            return fault
        # only good updates count as usual, so that a series of spikes stays one of spikes
        past["recent"] = [*past["recent"], (loss, norm)][-SPIKE_WINDOW:]
        past["in_a_row"] = 0
        self.taken += 1
        return ""

    def adapt_scale(self, overflow: bool) -> None:
        """Halve the scale after an overflow, double it after many updates without one."""
        if overflow:
            # the largest gradient times the scale was beyond float16's 65,504
            self.scale /= 2
            self.without_overflow = 0
            return
        self.without_overflow += 1
        if self.without_overflow == GROWTH_INTERVAL:
            self.scale *= 2
            self.without_overflow = 0

    def gives_up(self, name: str) -> bool:
        """Whether so many updates in a row were skipped that the run cannot recover."""
        return self.history[name]["in_a_row"] >= MAX_SKIPPED

    def refuse_idle_run(self, out: Path) -> None:
        """Raises FloatingPointError when more updates were skipped than taken: what came out is not
        what was asked for, although a few good ones kept gives_up() away."""
        if self.skipped > self.taken:
            raise FloatingPointError(f"{self.skipped} of {self.skipped + self.taken} updates were "
                                     f"skipped, so {out} gets no model; try a lower --lr or "
                                     "--dtype float32")

    def forget(self) -> None:
        """Other data come from here on, whose losses cannot be measured against the past ones."""
        self.history.clear()

    def state_dict(self) -> dict:
        """The keys are those of torch's GradScaler, which older checkpoints hold."""
        scaler = {"scale": self.scale, "_growth_tracker": self.without_overflow}
        return {"scaler": scaler if self.float16 else {}, "history": self.history,
                "skipped": self.skipped, "taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        self.history = state["history"]
        self.skipped = state["skipped"]
        # former versions did not count them
        self.taken = state.get("taken", state.get("step", 0))
        if self.float16 and state["scaler"]:
            self.scale = state["scaler"]["scale"]
            self.without_overflow = state["scaler"]["_growth_tracker"]
