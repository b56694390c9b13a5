"""experiments/scaling_laws.py: the rule, Chinchilla's optimum, planted laws, a small grid."""
import dataclasses
import json
import math

import pytest
import torch

import data
import readers
import train_pretrain
from experiments import scaling_laws as laws
from model import ModelConfig, Transformer
from plumbing.curves import read_metrics
from tokenizer import Tokenizer

PLANTED = {"A": 40.0, "B": 400.0, "alpha": 0.45, "beta": 0.5, "L_inf": 0.6}


def grid(budgets=(5e11, 1e12, 2e12, 4e12), sizes=5):
    """N and D of an IsoFLOP grid around 20 tokens per parameter, as (runs,) each."""
    C = torch.tensor(budgets, dtype=torch.float64)[:, None]
    N = (C / 120).sqrt() * torch.logspace(-0.6, 0.6, sizes, dtype=torch.float64)
    return N.flatten(), (C / 6 / N).flatten()


# ---------------------------------------------------------------------- allocation

def test_13_billion_parameters_want_260_billion_tokens_and_2e22_flops_by_the_rule():
    D = laws.tokens_for_parameters(13e9)
    assert D == 260e9
    assert laws.training_flops(13e9, D) == pytest.approx(2.0e22, rel=0.02)
    assert laws.rule_allocation(laws.training_flops(13e9, D)) == pytest.approx((13e9, D))


def test_chinchillas_constants_give_that_budget_to_fewer_parameters_and_more_tokens():
    C = laws.training_flops(13e9, 260e9)
    N, D = laws.optimal_allocation(C, laws.CHINCHILLA)
    assert pytest.approx(7.1e9, rel=0.01) == N and pytest.approx(476e9, rel=0.01) == D
    assert D / N == pytest.approx(67, abs=0.5)
    (N1, D1), (N2, D2) = (laws.optimal_allocation(c, laws.CHINCHILLA) for c in (1e20, 1e21))
    assert math.log10(N2 / N1) == pytest.approx(0.45, abs=0.005)       # a = 0.28 / 0.62
    assert math.log10(D2 / D1) == pytest.approx(0.55, abs=0.005)


def test_what_the_readme_expects_of_gpt2_124m():
    losses = [laws.predicted_loss(123.6e6, steps * 2 ** 19, laws.CHINCHILLA)
              for steps in (1_000, 10_000, 19_000, 100_000)]
    assert [round(loss, 1) for loss in losses] == [3.9, 3.2, 3.1, 2.8]


@pytest.mark.parametrize("law", [laws.CHINCHILLA, PLANTED])
@pytest.mark.parametrize("C", [1e12, 2e22])
def test_the_closed_form_is_where_the_loss_along_a_budget_is_least(law, C):
    N_opt, D_opt = laws.optimal_allocation(C, law)
    assert laws.training_flops(N_opt, D_opt) == pytest.approx(C)
    N = N_opt * torch.logspace(-1, 1, 20_001, dtype=torch.float64)
    least = N[laws.predicted_loss(N, C / (6 * N), law).argmin()].item()
    assert least == pytest.approx(N_opt, rel=2e-4)                     # the spacing is 2.3e-4


def test_kaplans_recipe_grows_models_faster_than_data():
    assert laws.kaplan_allocation(laws.PF_DAY)[0] == pytest.approx(1.3e9)
    (N1, D1), (N2, D2) = (laws.kaplan_allocation(c * laws.PF_DAY) for c in (1, 10))
    assert math.log10(N2 / N1) == pytest.approx(0.73)
    assert math.log10(D2 / D1) == pytest.approx(0.27)
    assert laws.training_flops(N2, D2) == pytest.approx(10 * laws.PF_DAY)


def test_n_counts_each_matrix_but_the_look_up_and_the_scores_of_attention():
    config = ModelConfig(100, context_length=8, d_model=16, n_layers=2, n_heads=1, tied=False,
                         token_shift=True)
    matrices = sum(w.numel() for name, w in Transformer(config).named_parameters()
                   if w.dim() == 2 and "embedding" not in name)
    # a token sees 4 others on average: 2 D multiplications each for scores and values, a layer
    assert laws.effective_parameters(config) == matrices + 2 * 4 * 2 * 16


# ---------------------------------------------------------------------- the fit

@pytest.mark.parametrize("law, budgets", [(PLANTED, (5e11, 1e12, 2e12, 4e12)),
                                          (laws.CHINCHILLA, (1e18, 1e19, 1e20, 1e21))])
def test_the_fit_recovers_planted_constants(law, budgets):
    N, D = grid(budgets)
    found = laws.as_law(laws.fit(N, D, laws.predicted_loss(N, D, law)))
    assert found == pytest.approx(law, rel=1e-5)


def test_half_a_percent_of_noise_leaves_the_constants_inside_the_intervals():
    N, D = grid()
    noise = torch.randn(len(N), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L = laws.predicted_loss(N, D, PLANTED) * (1 + 0.005 * noise)
    resampled = laws.bootstrap(N, D, L, resamples=40)
    for name, values in zip(laws.PARAMETERS, resampled.unbind(-1)):
        low, high = laws.interval(values, level=0.95)
        assert low < PLANTED[name] < high, name
    found = laws.as_law(laws.fit(N, D, L))                       # a larger budget by a factor 4
    assert laws.predicted_loss(4e5, 6e6, found) == pytest.approx(
        laws.predicted_loss(4e5, 6e6, PLANTED), rel=0.01)


def test_the_fit_is_no_worse_than_an_lbfgs_that_starts_at_the_truth():
    N, D = grid()
    noise = torch.randn(len(N), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    L = laws.predicted_loss(N, D, PLANTED) * (1 + 0.005 * noise)

    def objective(theta):
        terms = torch.stack([theta[0] - theta[3] * N.log(), theta[1] - theta[4] * D.log(),
                             theta[2].expand(len(N))])
        return laws.huber(terms.logsumexp(0) - L.log(), 1e-3).sum()

    def theta_of(law):
        return torch.tensor([*(math.log(law[name]) for name in ("A", "B", "L_inf")), law["alpha"],
                             law["beta"]], dtype=torch.float64)

    theta = theta_of(PLANTED).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = objective(theta)
        loss.backward()
        return loss

    optimizer.step(closure)
    ours = objective(theta_of(laws.as_law(laws.fit(N, D, L))))
    assert ours <= objective(theta).item() * (1 + 1e-3)


def test_a_run_that_is_off_by_a_fifth_pulls_no_harder_than_one_off_by_a_fiftieth():
    N, D = grid()
    L = laws.predicted_loss(N, D, PLANTED).repeat(2, 1)
    L[0, 7] *= 1.02
    L[1, 7] *= 1.2
    near, far = laws.fit(N.expand(2, -1), D.expand(2, -1), L)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=0)
    assert laws.as_law(far) == pytest.approx(PLANTED, rel=0.02)


def test_the_jacobian_is_autograds():
    N, D = grid()
    theta = torch.tensor([[3.0, 6.0, -0.5, 0.4, 0.5]], dtype=torch.float64)
    runs = [x[None] for x in (N.log(), D.log(), 0 * N)]
    expected = torch.autograd.functional.jacobian(lambda t: laws.residuals(t, *runs)[0][0], theta)
    torch.testing.assert_close(laws.residuals(theta, *runs)[1][0], expected[:, 0])


def test_a_parabola_finds_its_own_minimum_and_none_at_the_edge():
    N = torch.tensor([1e5, 2e5, 4e5, 8e5])
    assert laws.parabola_minimum(N, 1 + (N / 3e5).log() ** 2) == pytest.approx(3e5, rel=1e-4)
    assert math.isnan(laws.parabola_minimum(N, 1 + (N / 3e6).log() ** 2))


# ---------------------------------------------------------------------- the runs

@pytest.mark.parametrize("preset", laws.PRESETS)
def test_every_run_spends_its_budget_and_reads_no_token_twice(preset):
    texts = list(readers.read_documents("world", split="train", max_bytes=300_000))
    tokenizer = Tokenizer.train(texts, laws.PRESETS[preset]["vocab_size"])
    n_bytes = sum(len(text.encode()) for text in texts)
    bytes_per_token = n_bytes / len(data.tokenize_documents(texts, tokenizer))
    *fitted, heldout = laws.plan(laws.Config(preset=preset), "")
    assert heldout[0] > max(C for C, _, _ in fitted)
    for C, N, config in [*fitted, heldout]:
        D = config.steps * config.batch_size * config.context_length
        assert laws.training_flops(N, D) == pytest.approx(C, rel=0.05)
        assert D * bytes_per_token < config.max_bytes


def test_the_smoke_grid_runs_and_finished_runs_are_skipped(tmp_path, monkeypatch):
    cfg = laws.Config(preset="smoke", out=str(tmp_path / "runs"), bootstrap=4, device="cpu",
                      dtype="float32", figure=str(tmp_path / "figure.png"))
    report = laws.main(cfg)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "figure.json").read_text())
    assert saved["law"] == report["law"] and len(saved["runs"]) == 6
    assert saved["heldout"]["C"] == 4e9 and saved["command"].endswith("--preset smoke")
    last = read_metrics(tmp_path / "runs/C2.0e09_d16")[-1]
    assert last["lr"] < 0.11 * 0.024 * (64 / 16) ** 0.5           # its cosine ended with the budget

    monkeypatch.setattr(train_pretrain, "main", lambda config: pytest.fail("trained again"))
    again = laws.main(dataclasses.replace(cfg, bootstrap=2))
    assert again["runs"] == report["runs"] and again["law"] == report["law"]
    with pytest.raises(ValueError, match="cpu, gpu, smoke"):
        laws.main(laws.Config(preset="big"))
