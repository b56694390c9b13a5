"""experiments/alignment_methods.py: wins that length does not buy, and the table of the seeds."""
import dataclasses

import numpy as np
import pytest

from experiments import alignment_methods
from experiments.alignment_methods import METHODS, Config, table
from experiments.base import compare, kept, length_controlled
from plumbing.options import build


def test_where_length_decides_nothing_is_won_at_equal_length():
    rng = np.random.default_rng(0)
    longer = rng.normal(3, 4, 2000)                    # three words more on average
    wins = (longer + rng.normal(0, 4, 2000) > 0).astype(float)
    assert wins.mean() > 0.65
    assert length_controlled(wins, longer) == pytest.approx(0.5, abs=0.03)


def test_where_length_decides_nothing_the_wins_are_all_there():
    rng = np.random.default_rng(1)
    longer = rng.normal(3, 4, 5000)
    wins = (rng.random(5000) < 0.8).astype(float)
    assert length_controlled(wins, longer) == pytest.approx(0.8, abs=0.02)


def test_ties_are_half_and_one_sided_wins_are_finite():
    assert length_controlled(np.full(50, 0.5), np.arange(50.0)) == pytest.approx(0.5)
    assert 0.99 < length_controlled(np.ones(50), np.zeros(50)) <= 1


def figures(**changes) -> dict:
    found = {"true_reward": 0.5, "accuracy": 0.75, "rewards": np.array([0.5, 0.5]),
             "plain_rewards": np.array([0.5, 0.5]), "right": np.array([1, 1]),
             "whole": np.array([1, 1]), "words": np.array([2, 2]),
             "texts": ["a b c d", "a b c d"]}
    return found | changes


def test_a_method_is_compared_with_sft():
    ours = figures(rewards=np.array([0.75, 0.5]), accuracy=0.5, true_reward=0.625,
                   texts=["a b c d", "e f g"])
    row = compare(ours, figures())
    assert row["win_rate"] == 0.75 and row["plain_win_rate"] == 0.5
    assert row["accuracy_gain"] == -0.25 and row["words"] == 3.5
    assert row["distinct_3"] == 1.0                    # abc, bcd, efg


def test_the_table_has_the_mean_and_the_range_of_the_seeds():
    one = {"true_reward": 0.9, "win_rate": 0.5, "length_controlled": 0.5, "plain_win_rate": 0.5,
           "accuracy_gain": 0.0, "kl": 1.0, "distinct_3": 0.5, "words": 9.0, "base_loss": 1.0,
           "minutes": 1.0}
    other = one | {"win_rate": 0.7, "peak_gb": 1.5}
    row = table({"DPO": {"0": one, "1": other}}, Config()).splitlines()[-1]
    assert row.startswith("| DPO | policy, reference once | 8,000 pairs | pairs |")
    assert "| 60.0% (50.0% to 70.0%) |" in row
    assert row.endswith("| 1.50 |")                    # of the seed that has it


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].script])
def test_each_method_names_options_that_its_script_has(name, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(alignment_methods, "run_apart",
                        lambda script, **options: calls.append((script, options)))
    sums = {"sft": {"model.safetensors": "1" * 64}, "rm": {"model.safetensors": "2" * 64}}
    monkeypatch.setattr(alignment_methods, "made_by", lambda base: sums)
    alignment_methods.train(name, 3, tmp_path / "base", tmp_path / "out", quick=True)
    for script, options in calls:
        config = __import__(script).Config
        cfg = build(config, options)
        assert cfg.seed == 3
        world = {"prompts", "data"} & {field.name for field in dataclasses.fields(config)}
        assert any(getattr(cfg, option) == "world:3" for option in world) or cfg.data


def test_figures_are_kept_for_what_they_are_of(tmp_path):
    file = tmp_path / "deep" / "figures.json"
    assert kept(file, {"beta": 1}, lambda: {"wins": 0.5}) == {"wins": 0.5}
    assert kept(file, {"beta": 1}, lambda: 1 / 0) == {"wins": 0.5}         # not made again
    assert kept(file, {"beta": 2}, lambda: {"wins": 0.75}) == {"wins": 0.75}
    assert kept(file, {"beta": 2}, lambda: 1 / 0) == {"wins": 0.75}
