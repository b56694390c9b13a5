"""Muon: orthogonal steps for the inner matrices, AdamW for the rest."""
import copy

import pytest
import torch
from tiny import tiny_model

import training
from model import Linear
from muon import Muon, orthogonalize


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
    optimizers = [Muon(model, lr=1e-2) for model in models]

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(models[0], optimizers[0], 1)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers):
        step(model, optimizer, 2)
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)


def test_what_is_frozen_stays_and_names_are_checked():
    model = tiny_model()
    model.embedding.requires_grad_(False)
    optimizer = training.pick_optimizer("muon", model, 1e-2, 0.1, torch.float32)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.embedding.weight) not in held
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert isinstance(training.pick_optimizer("adamw", model, 1e-2, 0.1, torch.float32),
                      torch.optim.AdamW)
    with pytest.raises(ValueError, match="--optimizer sgd: give muon or adamw"):
        training.pick_optimizer("sgd", model, 1e-2, 0.1, torch.float32)
