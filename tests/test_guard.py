"""plumbing/guard.py: spikes and loss scales by hand, and updates that are kept from the weights."""
import math

import numpy as np
import pytest
import torch
from tiny_runs import start
from torch import nn

from plumbing import guard
from plumbing.guard import Guard
from plumbing.optimizers import adamw


class Line:
    """One weight of 1 and loss `factor * weight`, whose gradient is the factor."""

    def __init__(self, tmp_path, **tracked):
        self.run = start(tmp_path, overwrite=True)
        self.weight = nn.Parameter(torch.ones(1))
        self.model = nn.ParameterList([self.weight])
        self.optimizer = adamw(self.model, lr=0.0)
        self.run.track(optimizer=self.optimizer, **tracked)

    def update(self, factor, step=0, lr=0.0):
        """One step as a stage makes it; returns the gradient norm."""
        self.run.current_step = step
        loss = factor * self.weight.sum()
        self.run.backward(loss)
        return self.apply(loss, lr)

    def apply(self, loss, lr):
        norm = self.run.clip(self.model, max_norm=1.0)
        self.run.step(self.optimizer, lr, loss, norm)
        self.optimizer.zero_grad()
        return norm


# ---------------------------------------------------------------------- what is not finite

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_what_is_not_finite_changes_neither_weights_nor_optimizer(tmp_path, capsys, bad, where):
    line = Line(tmp_path)
    line.update(1.0, lr=0.1)
    weight, state = line.weight.item(), line.optimizer.state[line.weight]
    before = {name: value.clone() for name, value in state.items()}
    line.run.current_step = 3
    loss = line.weight.sum()
    if where == "loss":                                # from a constant: the gradient is finite
        loss = loss + torch.tensor(bad)
    line.run.backward(loss)
    if where == "gradient norm":
        line.weight.grad[0] = bad
    line.apply(loss, lr=0.1)
    assert line.weight.item() == weight and line.weight.grad is None
    assert line.run.guard.skipped == 1
    assert all(torch.equal(before[name], value) for name, value in state.items()) and before
    assert f"step 3: the {where} is {bad}; this update is skipped" in capsys.readouterr().err
    line.update(1.0, lr=0.1)                           # and the next one is an update again
    assert line.weight.item() < weight and line.run.guard.skipped == 1


def test_a_bad_micro_batch_costs_its_step_and_no_other(tmp_path):
    line = Line(tmp_path)
    loss = 0.0
    for constant in (0.0, math.nan, 0.0):              # of one step: the sum is judged
        batch_loss = line.weight.sum() + constant
        line.run.backward(batch_loss)
        loss += batch_loss.detach()
    line.apply(loss, lr=0.1)
    assert line.weight.item() == 1 and line.run.guard.skipped == 1
    line.update(1.0, step=1, lr=0.1)                   # which the NaN of before is no part of
    assert line.weight.item() < 1 and line.run.guard.skipped == 1


def test_too_many_in_a_row_stop_the_run_and_a_good_one_starts_the_count_again(tmp_path):
    line = Line(tmp_path)
    for _ in range(3):
        for step in range(guard.MAX_SKIPPED - 1):
            line.update(math.nan, step)
        line.update(1.0)
    for step in range(guard.MAX_SKIPPED - 1):
        line.update(math.nan, step)
    with pytest.raises(FloatingPointError, match="step 7: the loss is nan, and 20 updates in a row"
                       " were skipped.*No checkpoint was made yet; try a lower --lr"):
        line.update(math.nan, step=7)
    assert line.run.guard.skipped == 4 * 19 + 1 and line.weight.item() == 1


# ---------------------------------------------------------------------- spikes

def test_a_spike_by_hand():
    """Median 2, highest 3: a leap by more than 5 x 1. Longest gradient 0.5: more than 2.5."""
    recent = [(2.0, 0.5)] * 60 + [(1.0, 0.1)] * 20 + [(3.0, 0.2)] * 20
    assert guard.is_spike(7.01, 2.51, recent)
    assert not guard.is_spike(7.0, 9.0, recent) and not guard.is_spike(99.0, 2.5, recent)
    assert not guard.is_spike(-99.0, 9.0, recent)                  # a loss may fall as it likes
    assert not guard.is_spike(7.01, 2.51, recent[1:])              # too few to know what is usual


def test_heavy_tailed_noise_is_no_spike():
    """Cubed normals: kurtosis 46 instead of 3; loss and gradient rise together, the worst case."""
    noise = np.random.default_rng(0).standard_normal(20_000) ** 3
    values = [(2 + 0.1 * x, math.exp(0.3 * x)) for x in noise.clip(-20, 20)]
    window = guard.SPIKE_WINDOW
    assert not any(guard.is_spike(*values[i], values[i - window:i])
                   for i in range(window, len(values)))


def test_a_spike_is_skipped_and_not_counted_as_usual(tmp_path, capsys):
    line = Line(tmp_path)
    for i in range(guard.SPIKE_WINDOW):
        line.update(1 + 0.01 * (i % 7), lr=1e-4)
    weight = line.weight.item()
    for _ in range(2):                                 # the first has not moved the threshold
        line.update(50.0, lr=0.1)
    assert line.weight.item() == weight and line.run.guard.skipped == 2
    assert "the loss leaps to 49.5, the gradient norm to 50; this" in capsys.readouterr().err
    line.update(2.0, lr=1e-4)                          # twice the usual is no spike
    assert line.weight.item() < weight and line.run.guard.skipped == 2
    assert len(line.run.guard.history["optimizer"]["recent"]) == guard.SPIKE_WINDOW


def test_losses_of_other_data_are_not_measured_against_the_past():
    watch = Guard(float16=False)
    for _ in range(guard.SPIKE_WINDOW):
        assert watch.fault("optimizer", 1.0, 1.0) == ""
    watch.forget()
    assert watch.fault("optimizer", 50.0, 50.0) == ""
    assert watch.history["optimizer"]["recent"] == [(50.0, 50.0)]


def two_optimizers(tmp_path):
    """As in PPO: one backward pass of `actor * weight + other * critic`, then two updates."""
    critic = nn.Parameter(torch.ones(1))
    critic_model = nn.ParameterList([critic])
    critic_optimizer = adamw(critic_model, lr=0.0)
    line = Line(tmp_path, critic_optimizer=critic_optimizer)

    def update(actor, other, lr=0.0, overflow=False):
        loss = (actor * line.weight + other * critic).sum()
        line.run.backward(loss)
        if overflow:
            line.weight.grad[0] = math.inf
        norm = line.run.clip(line.model, max_norm=1.0)
        critic_norm = line.run.clip(critic_model, max_norm=1.0)
        line.run.step(line.optimizer, lr, loss, norm)
        line.run.step(critic_optimizer, lr, loss, critic_norm)
        line.optimizer.zero_grad()
        critic_optimizer.zero_grad()
        return critic_norm
    return line, critic, update


def test_two_optimizers_are_judged_by_their_own_gradients(tmp_path):
    """The critic's gradients are usually longer."""
    line, critic, update = two_optimizers(tmp_path)
    for _ in range(guard.SPIKE_WINDOW):
        update(1.0, 30.0)
    update(20.0, 200.0, lr=0.1)                        # 20 and 6 times as long as ever: both
    assert line.run.guard.skipped == 2 and line.weight.item() == critic.item() == 1
    update(300.0, 30.0, lr=0.1)                        # the actor's alone
    assert line.run.guard.skipped == 3 and line.weight.item() == 1 and critic.item() < 1
    update(1.0, math.nan, lr=0.1)                      # one loss: neither can trust it
    assert line.run.guard.skipped == 5 and line.weight.item() == 1


# ---------------------------------------------------------------------- float16's loss scale

def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_2000_good_updates():
    watch = Guard(float16=True)
    assert watch.scale == 2.0 ** 16
    assert watch.fault("optimizer", 1.0, math.inf) == "the gradient norm is inf"
    assert watch.scale == 2.0 ** 15
    for _ in range(1999):
        watch.fault("optimizer", 1.0, 1.0)
    assert watch.scale == 2.0 ** 15
    watch.fault("optimizer", 1.0, 1.0)                 # the 2,000th
    assert watch.scale == 2.0 ** 16
    for _ in range(1999):
        watch.fault("optimizer", 1.0, 1.0)
    watch.fault("optimizer", 1.0, math.nan)            # starts the count again
    for _ in range(1999):
        watch.fault("optimizer", 1.0, 1.0)
    assert watch.scale == 2.0 ** 15


def test_the_scale_moves_as_torchs_grad_scaler_moves_its_own(monkeypatch):
    monkeypatch.setattr(guard, "GROWTH_INTERVAL", 5)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    watch = Guard(float16=True)
    for i in range(60):
        weight.grad = torch.full((1,), math.inf if i in (3, 9, 10, 31) else 1.0)
        scaler.scale(torch.ones(1))                    # which makes its scale a tensor
        scaler.unscale_(optimizer)
        watch.fault("optimizer", 1.0, weight.grad.item())
        scaler.step(optimizer)
        scaler.update()
        assert watch.scale == scaler.get_scale()
        assert watch.without_overflow == scaler.state_dict()["_growth_tracker"]
    assert watch.scale > 2.0 ** 16


def test_without_float16_nothing_is_scaled():
    watch = Guard(float16=False)
    for norm in (1.0, math.inf):
        watch.fault("optimizer", 1.0, norm)
    assert watch.scale == 1 and watch.state_dict()["scaler"] == {}


def test_the_state_of_torchs_grad_scaler_in_older_checkpoints_is_read():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 13)
    scaler.scale(torch.ones(1))
    former = scaler.state_dict() | {"_growth_tracker": 1999}
    watch = Guard(float16=True)
    watch.load_state_dict({"scaler": former, "history": {}, "skipped": 4})
    assert watch.scale == 2.0 ** 13 and watch.skipped == 4
    watch.fault("optimizer", 1.0, 1.0)
    assert watch.scale == 2.0 ** 14
    for enabled in (False, True):                      # bfloat16's was {}, and is ignored by both
        other = Guard(float16=enabled)
        first = other.scale
        other.load_state_dict({"scaler": {}, "history": {}, "skipped": 0})
        assert other.scale == first


def test_its_state_survives_saving():
    watch = Guard(float16=True)
    for norm in (math.inf, 1.0, 2.0):
        watch.fault("optimizer", 1.0, norm)
    other = Guard(float16=True)
    other.load_state_dict(watch.state_dict())
    assert vars(other) == vars(watch) and other.without_overflow == 2 and other.skipped == 1


def test_fp16_overflows_lower_the_scale_are_counted_and_training_goes_on(tmp_path):
    line = Line(tmp_path)
    line.run.guard = Guard(float16=True)
    for n in range(17):                                # 2^16 falls below 1: no reason to stop yet
        loss = line.weight.sum()
        line.run.backward(loss)
        line.weight.grad[0] = math.inf
        line.apply(loss, lr=0.1)
        assert line.run.guard.scale == 2.0 ** (15 - n)
    assert line.weight.item() == 1 and line.run.guard.skipped == 17
    assert line.update(3.0, lr=0.1).item() == pytest.approx(3)         # unscaled
    assert line.weight.item() < 1 and line.run.guard.skipped == 17
    scale = line.run.guard.scale
    line.update(math.nan, lr=0.1)
    line.update(3.0, lr=0.1)
    assert line.run.guard.skipped == 18 and line.run.guard.scale == scale / 2


def test_two_optimizers_of_one_backward_pass_unscale_by_the_same_factor(tmp_path):
    """The actor's overflow lowers the scale, but not before the critic's gradients are unscaled."""
    line, critic, update = two_optimizers(tmp_path)
    line.run.guard = Guard(float16=True)
    assert update(1.0, 3.0, lr=0.1, overflow=True).item() == pytest.approx(3)
    assert line.weight.item() == 1 and critic.item() < 1
    assert line.run.guard.scale == 2.0 ** 15


def test_a_run_of_which_hardly_any_update_was_good_leaves_no_model(tmp_path):
    watch = Guard(float16=False)
    for loss in [1.0, math.nan, math.nan] * 3:             # never MAX_SKIPPED in a row
        watch.fault("optimizer", loss, 1.0)
    with pytest.raises(FloatingPointError, match="6 of 9 updates were skipped, so .*no model"):
        watch.refuse_idle_run(tmp_path)
    again = Guard(float16=False)
    again.load_state_dict(watch.state_dict())              # after a resume, too
    for loss in [1.0] * 3:
        again.fault("optimizer", loss, 1.0)
    again.refuse_idle_run(tmp_path)
