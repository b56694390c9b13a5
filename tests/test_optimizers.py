"""plumbing/optimizers.py: schedules by hand; Muon, AdamW and Adam against torch's."""
import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from model import Linear
from plumbing import optimizers
from plumbing.optimizers import Muon, adam, adamw, keep_on_host, orthogonalize, pick_optimizer

# ---------------------------------------------------------------------- learning rates

@pytest.mark.parametrize("step, expected", [
    (0, 0.2), (4, 1.0), (9, 2.0),                       # (step + 1) / 10 of the peak 2
    (10, 2.0), (40, 2 * 0.775), (55, 2 * 0.55),         # 0.1 + 0.9 (1 + cos) / 2 at 0, 60,
    (70, 2 * 0.325), (100, 0.2), (1000, 0.2)])          # 90, 120, 180 degrees, and later
def test_learning_rate_by_hand(step, expected):
    assert optimizers.learning_rate(step, 100, 2.0, warmup=10) == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_at_its_peak_and_can_end_at_zero():
    assert optimizers.learning_rate(0, 10, 3.0) == 3.0
    assert optimizers.learning_rate(10, 10, 3.0, floor=0.0) == pytest.approx(0.0)
    assert optimizers.learning_rate(5, 5, 3.0, warmup=5) == 3.0          # all of it warmup


def test_warmup_stable_decay_rises_stays_and_falls_to_nothing():
    rates = [optimizers.warmup_stable_decay(step, 100, 2.0, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9:71] == [2.0] * 62
    assert rates[85] == pytest.approx(1.0) and rates[100] == 0
    assert sum(rates) > 1.2 * sum(optimizers.learning_rate(s, 100, 2.0, 10) for s in range(101))


def test_linear_decay_by_hand():
    assert [optimizers.linear_decay(step, 4, 2.0) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


# ---------------------------------------------------------------------- AdamW

def test_weight_decay_shrinks_matrices_and_nothing_else():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    before = [w.detach().clone() for w in model.parameters()]
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before[0] * (1 - 0.1 * 0.5))
    for weight, old in zip(list(model.parameters())[1:], before[1:]):
        assert torch.equal(weight, old)


def test_frozen_weights_are_not_optimized():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    groups = adamw(model, lr=0.1).param_groups
    assert [w for group in groups for w in group["params"]] == [model[1].weight]


# ---------------------------------------------------------------------- Muon

def spectrum(shape: tuple, values: torch.Tensor) -> torch.Tensor:
    """A random matrix with these singular values."""
    m, n = shape
    U, V = (torch.linalg.qr(torch.randn(size, len(values))).Q for size in (m, n))
    return U * values @ V.T


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_one_and_singular_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    G = spectrum(shape, torch.logspace(-1, 1, 24))                 # 1 : 100
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    found = orthogonalize(G, dtype)
    inside = U.T @ found @ Vh.T                                    # diagonal, if the vectors stayed
    low, high = torch.linalg.svdvals(found).aminmax()
    assert 0.6 < low and high < 1.3
    rest = inside - inside.diag().diag()
    assert rest.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def test_many_matrices_at_once_are_each_made_orthogonal():
    torch.manual_seed(0)
    G = torch.randn(3, 8, 5)
    torch.testing.assert_close(orthogonalize(G), torch.stack([orthogonalize(g) for g in G]))


def test_a_step_is_torchs_muon_for_inner_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    ours = tiny_model(tied=False, token_shift=True)
    theirs = copy.deepcopy(ours)
    inner = [module.weight for name, module in theirs.named_modules()
             if isinstance(module, Linear) and name != "lm_head"]
    rest = [p for p in theirs.parameters() if not any(p is q for q in inner)]
    assert len(inner) == 6 * len(theirs.blocks) + 1
    optimizer = Muon(ours, lr=1e-2, weight_decay=0.1)
    references = [torch.optim.Muon(inner, lr=1e-2, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([{"params": [p for p in rest if p.dim() >= 2],
                                      "weight_decay": 0.1},
                                     {"params": [p for p in rest if p.dim() < 2],
                                      "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95))]
    for _ in range(4):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for one in [optimizer, *references]:
            one.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        # theirs multiplies in bf16 (8 bits); four steps of 0.01 * 0.2 sqrt(n) move an entry by 0.01
        close = 1e-3 if any(q is w for w in inner) else 1e-6
        assert (p - q).abs().max() < close


def test_a_step_has_the_size_of_adamws():
    torch.manual_seed(0)
    model = tiny_model()
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    Muon(model, lr=1e-2).step()
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        step = (p - q).detach().square().mean().sqrt()
        assert 0.1e-2 < step < 1.1e-2, name            # AdamW's first step is lr, later 0.2 lr


def test_its_state_survives_saving():
    torch.manual_seed(0)
    models = [tiny_model()]
    models.append(copy.deepcopy(models[0]))
    muons = [Muon(model, lr=1e-2) for model in models]

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(models[0], muons[0], 1)
    models[1].load_state_dict(models[0].state_dict())
    muons[1].load_state_dict(copy.deepcopy(muons[0].state_dict()))
    for model, optimizer in zip(models, muons):
        step(model, optimizer, 2)
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_on_the_host_is_fetched_for_each_step_and_changes_nothing(monkeypatch, name):
    torch.manual_seed(0)
    models = [tiny_model()]
    models.append(copy.deepcopy(models[0]))
    plain, paged = (pick_optimizer(name, model, 1e-2, 0.0, torch.float32) for model in models)
    keep_on_host(paged)
    moved = []
    move = optimizers.move_state
    monkeypatch.setattr(optimizers, "move_state", lambda state, to: (moved.append(to.type),
                                                                     move(state, to)))
    for seed in range(3):
        for model, optimizer in zip(models, (plain, paged)):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)
    # back after each step, and fetched before each but the first, which finds none
    assert len(moved) == 5 * len(paged.state)


def test_a_states_tensors_are_moved_and_its_counts_are_not():
    state = {"exp_avg": torch.ones(2, 2), "step": torch.tensor(3.0), "t": 3}
    optimizers.move_state(state, torch.device("meta"))
    assert state["exp_avg"].device.type == "meta" and state["step"].device.type == "cpu"
    assert state["t"] == 3


# ---------------------------------------------------------------------- by name

def test_what_is_frozen_stays_and_names_are_checked():
    model = tiny_model()
    model.embedding.requires_grad_(False)
    optimizer = pick_optimizer("muon", model, 1e-2, 0.1, torch.float32)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.embedding.weight) not in held
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert isinstance(pick_optimizer("adamw", model, 1e-2, 0.1, torch.float32), torch.optim.AdamW)
    with pytest.raises(ValueError, match="--optimizer sgd: give muon or adamw"):
        pick_optimizer("sgd", model, 1e-2, 0.1, torch.float32)


def test_adam_is_torchs_and_takes_no_weight_decay():
    model = tiny_model()
    optimizer = pick_optimizer("adam", model, 1e-2, 0.0, torch.float32, eps=1e-5)
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0 and group["eps"] == 1e-5 and group["fused"]
    with pytest.raises(ValueError, match="--optimizer adam does without --weight_decay 0.1"):
        pick_optimizer("adam", model, 1e-2, 0.1, torch.float32)


def test_adam_goes_on_from_a_checkpoint_of_adamw_without_weight_decay():
    torch.manual_seed(0)
    straight = tiny_model()
    changed = copy.deepcopy(straight)
    by_adamw = adamw(straight, 1e-2)
    optimizer = adamw(changed, 1e-2)
    for step in range(5):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = adam(changed, 1e-2)
            optimizer.load_state_dict(state)
        for p, q in zip(straight.parameters(), changed.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        by_adamw.step()
        optimizer.step()
    for p, q in zip(straight.parameters(), changed.parameters()):
        assert torch.equal(p, q)
