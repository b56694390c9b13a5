"""experiments/beta_sweep.py, kl_budget.py, noise_robustness.py: which runs they ask for, of whom,
and what their tables make of known figures. Nothing is trained."""
import numpy as np
import pytest

import readers
import train_dpo
import train_ppo
from experiments import beta_sweep, kl_budget, noise_robustness
from plumbing.options import build

EXAM = {"true_reward": 0.75, "kl": 1.5, "win_rate": 0.625, "length_controlled": 0.5,
        "accuracy_gain": -0.125, "words": 10.0}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(script, quick=..., seeds=...) -> the runs that main() asks for, [(training script, its
    Config), ...], and the lines of the table; of the examined folders the exam is EXAM."""
    runs = []
    monkeypatch.setattr(noise_robustness, "pairs_of", lambda seed, bias, n: "")     # seconds

    def run(script, **options):
        cfg = build(script.Config, options)
        if script is train_dpo:
            cfg = train_dpo.check(cfg)                 # because IPO reads no --label_smoothing
        runs.append((script.__name__, cfg))
        return {"val_accuracy": 0.875}

    def ask(script, **options):
        monkeypatch.setattr(script, "run", run)
        monkeypatch.setattr(script, "base_models", lambda seed: tmp_path / "base" / str(seed))
        monkeypatch.setattr(script, "examined", lambda folder, seed, base, n: dict(EXAM))
        options |= {"out": str(tmp_path / "out"), "figure": str(tmp_path / "picture.png")}
        script.main(script.Config(**options))
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        return runs, (tmp_path / "picture.md").read_text().splitlines()
    return ask


@pytest.fixture
def rollouts(monkeypatch):
    """Four rollouts of any PPO run, and a proxy."""
    rows = [{"step": step, "kl": step, "reward": 1.0, "true_reward": 0.5, "beta": 0.25}
            for step in range(4)]
    monkeypatch.setattr(kl_budget, "read_metrics", lambda folder: rows)
    monkeypatch.setattr(kl_budget, "proxy_of", lambda folder, rm, seed, n: {"proxy": 2.5})


def of_method(runs: list, name: str) -> list:
    return [cfg for script, cfg in runs if script == name]


def assert_of_one_seed(runs: list, seed: int) -> None:
    """All of the same base and world, each in a folder of its own."""
    for _, cfg in runs:
        assert cfg.seed == seed and f"base/{seed}/sft" in cfg.init


# ---------------------------------------------------------------------- beta_sweep

def test_beta_is_all_that_differs_along_the_sweep(asked):
    runs, _ = asked(beta_sweep, seeds="3")
    dpo = of_method(runs, "train_dpo")
    ppo = of_method(runs, "train_ppo")
    assert [cfg.beta for cfg in dpo] == [0.05, 0.25, 1, 4, 16]
    assert [cfg.beta for cfg in ppo] == [0, 0.1, 0.4, 1.6, 6.4]
    assert len({cfg.out for _, cfg in runs}) == 10
    assert_of_one_seed(runs, 3)
    for cfg in dpo:
        assert (cfg.steps, cfg.n_pairs, cfg.lr, cfg.data) == (500, 8000, 1e-4, "world:3")
    for cfg in ppo:
        # a target would move beta away from where the sweep has put it
        assert (cfg.steps, cfg.lr, cfg.kl_target, cfg.prompts) == (40, 1.5e-4, 0, "world:3")
        assert cfg.reward.endswith("base/3/rm")


def test_a_quick_sweep_is_one_seed_three_betas_and_a_tenth_of_the_steps(asked):
    runs, lines = asked(beta_sweep, quick=True)
    assert [cfg.beta for cfg in of_method(runs, "train_dpo")] == [0.05, 1, 16]
    assert {(cfg.steps, cfg.n_pairs) for cfg in of_method(runs, "train_dpo")} == {(50, 800)}
    assert {cfg.steps for cfg in of_method(runs, "train_ppo")} == {4}
    assert_of_one_seed(runs, 0)
    assert lines[0] == "# The true reward against beta (quick)"
    assert "| PPO, beta 0.4 | 0.750 | 1.50 | 62.5% | -12.5% |" in lines


def test_a_hump_is_above_both_of_its_ends():
    assert beta_sweep.hump([0.5, 0.75, 0.625]) == (1, 0.25, 0.125)
    best, below, above = beta_sweep.hump([0.5, 0.625, 0.75])               # no hump: it only rises
    assert (best, above) == (2, 0) and below == 0.25


def test_the_table_of_betas_has_the_seeds_range_and_the_best_beta_of_each():
    rewards = {0.05: (0.5, 0.75), 1.0: (0.875, 0.625), 16.0: (0.625, 0.5)}
    exams = {beta: {"0": EXAM | {"true_reward": one}, "1": EXAM | {"true_reward": other}}
             for beta, (one, other) in rewards.items()}
    lines = beta_sweep.table({"DPO": exams}, {"0": EXAM, "1": EXAM},
                             beta_sweep.Config(seeds="0,1")).splitlines()
    cells = "| 1.50 (1.50 to 1.50) | 62.5% (62.5% to 62.5%) | -12.5% (-12.5% to -12.5%) |"
    assert f"| DPO, beta 1 | 0.750 (0.625 to 0.875) {cells}" in lines
    assert "| DPO, seed 0 | 1 | 0.375 | 0.250 |" in lines
    assert "| DPO, seed 1 | 0.05 | 0.000 | 0.250 |" in lines


# ---------------------------------------------------------------------- kl_budget

def test_only_what_holds_the_kl_differs_between_the_four_ways(asked, rollouts):
    runs, _ = asked(kl_budget, seeds="1")
    ways = [(cfg.beta, cfg.kl_target, cfg.kl_budget) for _, cfg in runs]
    assert ways == [(0, 0, 0), (0.4, 0, 0), (0.05, 3, 0), (0, 0, 3)]
    assert len({cfg.out for _, cfg in runs}) == 4
    assert_of_one_seed(runs, 1)
    for script, cfg in runs:
        assert script == "train_ppo" and cfg.reward.endswith("base/1/rm")
        assert (cfg.steps, cfg.lr, cfg.prompts) == (40, 3e-4, "world:1")


def test_an_adaptive_beta_moves_as_much_as_the_docstring_says():
    cfg = build(train_ppo.Config, kl_budget.PPO | kl_budget.VARIANTS["adaptive penalty"])
    beta = train_ppo.adapt_beta(1.0, 100.0, cfg.kl_target, cfg.batch_size, cfg.kl_horizon)
    assert beta == pytest.approx(1.064)
    assert "at most 6 % a step" in " ".join(kl_budget.__doc__.split())


def test_a_quick_budget_is_a_tenth_and_its_table_has_the_end_of_the_rollouts(asked, rollouts):
    runs, lines = asked(kl_budget, quick=True)
    assert {cfg.steps for _, cfg in runs} == {4} and len(runs) == 4
    assert lines[0].endswith("(quick)")
    assert "| hard budget | 4 | 0.250 | 1.50 | 2.50 | 0.750 | 62.5% | -12.5% |" in lines


def test_the_table_of_budgets_has_the_mean_of_the_seeds():
    one = EXAM | {"steps": 40, "beta": 0.0, "proxy": 2.0}
    other = one | {"steps": 10, "kl": 2.5, "proxy": 3.0}
    lines = kl_budget.table({"hard budget": [one, other]}, kl_budget.Config()).splitlines()
    assert lines[-1].startswith("| hard budget | 25 (10 to 40) | 0.000 (0.000 to 0.000) | "
                                "2.00 (1.50 to 2.50) | 2.50 (2.00 to 3.00) |")


# ---------------------------------------------------------------------- noise_robustness

def test_the_labels_are_as_noisy_and_the_annotators_as_biased_as_the_table_says(asked):
    runs, lines = asked(noise_robustness, seeds="2")
    dpo = of_method(runs, "train_dpo")
    noisy = [(cfg.method, cfg.beta, cfg.label_noise, cfg.label_smoothing) for cfg in dpo[:9]]
    assert noisy == [("dpo", 1, 0, 0), ("dpo", 1, 0.2, 0), ("dpo", 1, 0.4, 0),
                     ("ipo", 3, 0, 0), ("ipo", 3, 0.2, 0), ("ipo", 3, 0.4, 0),
                     ("dpo", 1, 0, 0), ("dpo", 1, 0.2, 0.2), ("dpo", 1, 0.4, 0.4)]
    # the same run is not made twice
    assert dpo[0] == dpo[6] and len({cfg.out for cfg in dpo}) == 10
    assert {(cfg.n_pairs, cfg.steps, cfg.lr) for cfg in dpo} == {(8000, 500, 1e-4)}
    assert [cfg.data.split("/")[-1] for cfg in dpo[9:]] == ["pairs_bias_0.0.jsonl",
                                                            "pairs_bias_0.5.jsonl"]
    rms = of_method(runs, "train_rm")
    assert [cfg.length_bias for cfg in rms] == [0, 0.5]
    assert {(cfg.n_pairs, cfg.steps, cfg.optimizer, cfg.lr) for cfg in rms} == {
        (8000, 500, "muon", 1e-3)}
    ppo = of_method(runs, "train_ppo")
    assert [cfg.reward for cfg in ppo] == [cfg.out for cfg in rms]
    assert {(cfg.steps, cfg.lr, cfg.beta, cfg.kl_target) for cfg in ppo} == {(40, 1.5e-4, 0.4, 0)}
    assert_of_one_seed(runs, 2)
    assert "| IPO | 0.2 | 0.750 | +0.000 | -12.5% | 87.5% |" in lines
    assert "| PPO | 0.5 | 10.0 | 0.750 | 62.5% | 50.0% |" in lines


def test_a_quick_run_on_noise_has_a_tenth_of_steps_and_pairs(asked):
    runs, _ = asked(noise_robustness, quick=True)
    assert {cfg.label_noise for cfg in of_method(runs, "train_dpo")} == {0, 0.4}
    assert {cfg.steps for script, cfg in runs if script != "train_ppo"} == {50}
    assert {cfg.n_pairs for script, cfg in runs if script != "train_ppo"} == {800}
    assert {cfg.steps for cfg in of_method(runs, "train_ppo")} == {4}


def test_the_change_is_from_the_same_seed_without_noise(asked, monkeypatch):
    def noisy(loss, noise, seed, base, out, quick):
        return EXAM | {"true_reward": 0.75 + int(seed) / 8 - noise, "val_accuracy": 0.5}
    monkeypatch.setattr(noise_robustness, "noisy", noisy)
    _, lines = asked(noise_robustness, seeds="0,1")
    row = next(line for line in lines if line.startswith("| DPO | 0.2 |"))
    assert "| 0.613 (0.550 to 0.675) | -0.200 (-0.200 to -0.200) |" in row


def test_biased_pairs_are_the_same_pairs_with_longer_ones_chosen(tmp_path):
    found = []
    for bias in (0.0, 0.5):
        file = tmp_path / f"{bias}.jsonl"
        file.write_text(noise_robustness.pairs_of("0", bias, 400))
        found.append(readers.read_preferences(file))           # as train_dpo.py will
    fair, biased = found
    assert len(fair) == len(biased) == 400
    for one, other in zip(fair, biased):
        assert one["prompt"] == other["prompt"]
        assert {one["chosen"], one["rejected"]} == {other["chosen"], other["rejected"]}
    longer = [np.mean([len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs])
              for pairs in found]
    assert longer[1] > longer[0] + 0.15


def test_enough_biased_pairs_are_written_for_those_that_are_held_out(asked, monkeypatch):
    written = []
    monkeypatch.setattr(noise_robustness, "pairs_of",
                        lambda seed, bias, n: written.append(n) or "")
    asked(noise_robustness, seeds="0")
    assert written == [9000, 9000] and 0.9 * 9000 > 8000
