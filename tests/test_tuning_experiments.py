"""experiments/chain_of_thought.py, mixing_tau.py, masking.py: what they read, options they name."""
import json
from collections import Counter

import pytest

import train_sft
from experiments import chain_of_thought, masking, mixing_tau
from plumbing.options import build


@pytest.mark.parametrize("options", [
    chain_of_thought.SFT | {"cot_ratio": chain_of_thought.RATIOS[1]},
    masking.SFT | {"train_on": masking.WAYS[1]},
    *[mixing_tau.SFT | mixture for mixture in mixing_tau.MIXTURES.values()]])
def test_experiments_name_options_that_train_sft_has(options):
    assert build(train_sft.Config, options).steps >= 300


def test_a_family_is_a_task_of_its_own_a_hundred_times_as_large_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(mixing_tau, "SIZES", {100: mixing_tau.LARGE, 10: mixing_tau.SMALL})
    lines = mixing_tau.write_data(0, tmp_path / "tasks.jsonl").read_text().splitlines()
    counts = Counter(json.loads(line)["task"] for line in lines)
    assert counts == {**dict.fromkeys(mixing_tau.LARGE, 110), **dict.fromkeys(mixing_tau.SMALL, 11)}


def test_every_sum_has_its_chain_beside_it(tmp_path, monkeypatch):
    real = chain_of_thought.readers.read_examples
    monkeypatch.setattr(chain_of_thought.readers, "read_examples",
                        lambda *arguments, **options: real(*arguments, **options | {"n": 30}))
    lines = chain_of_thought.write_data(0, tmp_path / "sums.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60 and all(row["chain"].count("=") == 2 for row in rows)
