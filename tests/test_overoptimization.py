"""experiments/overoptimization.py: points, turns and looks by hand; the runs that it asks for."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ppo
import train_rm
from experiments import overoptimization
from experiments.overoptimization import Config, curve, looks, point, turn
from plumbing.options import build


def test_a_point_is_the_mean_of_its_steps_with_the_error_of_the_truth():
    found = point(np.array([1.0, 3.0]), np.array([0.0, 1.0]), np.array([0.5, 0.7]))
    assert found["kl"] == 2 and found["proxy"] == 0.5 and found["truth"] == pytest.approx(0.6)
    assert found["error"] == pytest.approx(math.sqrt(0.02) / math.sqrt(2))     # deviation / root 2


def test_a_curve_has_a_point_for_each_five_steps(monkeypatch):
    rows = [{"kl": float(i), "reward": -float(i), "true_reward": 0.5} for i in range(12)]
    monkeypatch.setattr(overoptimization, "read_metrics", lambda folder: rows)
    points = curve(Path("anywhere"))
    assert [found["kl"] for found in points] == [2, 7]
    assert [found["proxy"] for found in points] == [-2, -7]


def test_the_turn_is_from_the_highest_point_to_the_last():
    points = [{"truth": truth, "error": 0.03, "kl": kl}
              for truth, kl in ((0.8, 0.1), (0.9, 1.0), (0.85, 2.0), (0.65, 6.0))]
    found = turn(points)
    assert found["peak"] == 0.9 and found["peak_kl"] == 1.0 and found["end"] == 0.65
    assert found["fall"] == pytest.approx(0.25)
    assert found["errors"] == pytest.approx(0.25 / math.hypot(0.03, 0.03))


def test_looks_count_words_their_repetition_and_distinct_pairs():
    found = looks(["a b a b", "c"])
    assert found["words"] == 2.5 and found["repeated_words"] == 1.0
    assert found["distinct_2"] == pytest.approx(2 / 3)         # ab, ba, ab


def test_each_mitigation_changes_one_thing_against_equal_proxies(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(overoptimization, "run",
                        lambda script, **options: runs.append((script, build(script.Config,
                                                                             options))))
    cfg = Config(steps=7)
    folders = overoptimization.proxies(cfg, 3, tmp_path, tmp_path / "out")
    overoptimization.ppo_runs(cfg, 3, tmp_path, tmp_path / "out", folders)
    proxies = [found for script, found in runs if script is train_rm]
    policies = [found for script, found in runs if script is train_ppo]
    assert [found.seed for found in proxies] == [3, 103, 203, 303, 403, 503]
    assert {found.data for found in proxies} == {"world:3"}
    assert [found.reward.count(",") for found in policies] == [0, 0, 5, 0, 0]
    assert [found.beta for found in policies] == [0, 0.3, 0, 0, 0]
    assert [found.gold for found in policies] == ["", "", "", "world", ""]
    assert [found.kl_budget for found in policies] == [0, 0, 0, 0, 1.5]
    for found in policies:
        assert (found.steps, found.lr, found.kl_target, found.seed) == (7, 1.5e-4, 0, 3)


def test_the_best_of_n_is_taken_by_the_proxy_and_judged_by_the_truth(monkeypatch):
    """Two prompts, four draws each of the answers 1, 2, 3, 4, which the proxy ranks upwards and the
    truth downwards."""
    answers = [[n, 0] for _ in range(2) for n in (1, 2, 3, 4)]
    fake = overoptimization.evaluate
    monkeypatch.setattr(overoptimization, "DRAWS", (1, 2, 4))
    monkeypatch.setattr(overoptimization, "load_model",
                        lambda *arguments: (torch.nn.Linear(1, 1), type("Words", (), {"end": 0})))
    monkeypatch.setattr(torch.nn.Linear, "dtype", torch.float32, raising=False)
    monkeypatch.setattr(overoptimization, "Reward", lambda *arguments: (
        lambda prompts, x, y: torch.tensor([float(ids[0]) for ids in y])))
    monkeypatch.setattr(fake, "reward_prompts", lambda name, n: ["a", "b"])
    monkeypatch.setattr(fake, "answers", lambda *arguments: answers)
    monkeypatch.setattr(fake, "chat_prompts", lambda tokenizer, examples: [[9], [9]])
    monkeypatch.setattr(fake, "complete_texts", lambda tokenizer, y: y)
    monkeypatch.setattr(fake, "true_rewards",
                        lambda examples, texts: np.array([1 - ids[0] / 10 for ids in texts]))
    points = overoptimization.best_of_n_curve(Path("base"), "rm", 0, 2)
    # the best of 2 out of 1, 2, 3, 4: (2 + 3 * 2 + 4 * 3) / 6
    assert [found["proxy"] for found in points] == pytest.approx([2.5, 20 / 6, 4])
    assert [found["truth"] for found in points] == pytest.approx([0.75, 1 - 2 / 6, 0.6])
    assert points[0]["kl"] == pytest.approx(0) and points[1]["kl"] < points[1]["bound"] + 0.01
    assert [found["n"] for found in points] == [1, 2, 4]
