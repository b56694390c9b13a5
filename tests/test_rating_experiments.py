"""experiments/kto_unpaired.py and reward_model.py: shares and weights, figures by hand, options."""
import pytest
import torch
from tiny import TOKENIZER, folder_of, tiny_model

import readers
import train_dpo
import train_rm
from data import PreferencePairs
from experiments import kto_unpaired, reward_model
from plumbing.options import build
from scoring import response_rewards

# ---------------------------------------------------------------------- KTO's answers and weights

@pytest.mark.parametrize("n_good, lambdas", [(4000, (1, 1)), (7200, (1, 6.75)), (800, (9, 1))])
def test_the_rarer_kind_weighs_more(n_good, lambdas):
    assert kto_unpaired.corrected(n_good, 8000 - n_good) == pytest.approx(lambdas, abs=1e-12)


def test_corrected_weights_lie_in_the_papers_range():
    for n_good in range(1, 100):
        good, bad = kto_unpaired.corrected(n_good, 100 - n_good)
        assert 1 - 1e-9 <= good * n_good / (bad * (100 - n_good)) <= 4 / 3 + 1e-9
        assert min(good, bad) == 1


def test_a_share_is_taken_exactly_and_in_order():
    rows = [{"label": number % 3 == 0, "number": number} for number in range(30)]
    taken = kto_unpaired.of_share(rows, 0.9, 10)
    assert [row["number"] for row in taken] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 1]
    with pytest.raises(ValueError, match="too few good or bad"):
        kto_unpaired.of_share(rows, 0.9, 20)   # 18 good ones of 10


@pytest.mark.parametrize("share, n_good", [(0.5, 100), (0.9, 180), (0.1, 20)])
def test_what_is_trained_on_has_exactly_the_share(share, n_good, tmp_path):
    rows = readers.read_labelled("world:3", n=500, split="train", seed=3)
    file = tmp_path / "answers.jsonl"
    kto_unpaired.write_answers(rows, share, 200, file)
    found = readers.read_labelled(file, n=200, split="train", seed=3)
    assert len(found) == 200
    assert sum(row["label"] for row in found) == n_good
    rated = {(row["response"], row["label"]) for row in rows}
    assert {(row["response"], row["label"]) for row in found} <= rated
    assert len(readers.read_labelled(file, split="heldout")) == 200 // 16


# ---------------------------------------------------------------------- KTO's runs and table

EXAM = {"true_reward": 0.8, "win_rate": 0.5, "accuracy_gain": -0.125, "kl": 1.0}


@pytest.fixture
def kto_calls(monkeypatch, tmp_path):
    """The options of each run of kto_unpaired.main(), which trains nothing here, by folder."""
    calls = {}

    def run(script, **options):
        assert script is train_dpo
        assert options["out"] not in calls
        calls[options["out"]] = train_dpo.check(build(train_dpo.Config, options))

    monkeypatch.setattr(kto_unpaired, "run", run)
    monkeypatch.setattr(kto_unpaired, "base_models", lambda seed: tmp_path / "base")
    monkeypatch.setattr(kto_unpaired, "examined", lambda folder, seed, base, n: EXAM)
    return calls


def kto_config(tmp_path, **options) -> kto_unpaired.Config:
    return kto_unpaired.Config(out=str(tmp_path / "out"), figure=str(tmp_path / "kto.png"),
                               **options)


def test_kto_runs_name_options_that_train_dpo_has(kto_calls, tmp_path):
    kto_unpaired.main(kto_config(tmp_path, seeds="3", n=200))
    found = {}
    for cfg in kto_calls.values():
        assert (cfg.seed, cfg.steps, cfg.n_pairs) == (3, 500, 200)
        assert cfg.init == str(tmp_path / "base" / "sft")
        if cfg.method == "dpo":
            assert (cfg.data, cfg.beta, cfg.lr) == ("world:3", 1.0, 1e-4)
            continue
        assert (cfg.method, cfg.beta, cfg.lr) == ("kto", 0.2, 3e-4)
        rows = readers.read_labelled(cfg.data, split="train")
        found[sum(row["label"] for row in rows), cfg.lambda_good, cfg.lambda_bad] = len(rows)
    assert len(kto_calls) == 8
    assert found == {(20, 1, 1): 200, (100, 1, 1): 200, (180, 1, 1): 200, (20, 9, 1): 200,
                     (180, 1, 6.75): 200, (100, 1, 1.5): 200, (100, 1, 2): 200}
    assert (tmp_path / "kto.png").exists() and (tmp_path / "kto.md").exists()


def test_quick_is_one_seed_and_a_tenth(kto_calls, tmp_path):
    kto_unpaired.main(kto_config(tmp_path, seeds="3,4", n=2000, quick=True))
    assert {(cfg.seed, cfg.steps, cfg.n_pairs) for cfg in kto_calls.values()} == {(3, 50, 200)}
    assert all(folder.startswith(str(tmp_path / "out" / "3_quick")) for folder in kto_calls)


def test_the_table_of_kto_has_the_mean_and_the_range():
    of_seeds = {}
    for seed, rate in (("0", 0.5), ("1", 0.75)):
        exams = {variant: EXAM for variant in (*kto_unpaired.VARIANTS, kto_unpaired.PAIRS)}
        of_seeds[seed] = exams | {"90 % good": EXAM | {"win_rate": rate}}
    lines = kto_unpaired.table(of_seeds, kto_unpaired.Config()).splitlines()
    assert ("| 90 % good | 0.800 (0.800 to 0.800) | 62.5% (50.0% to 75.0%) | "
            "-12.5% (-12.5% to -12.5%) | 1.00 (1.00 to 1.00) |") in lines
    assert lines[-1].startswith("| DPO on pairs | 0.800")


# ---------------------------------------------------------------------- reward models

def known_scores() -> dict[str, torch.Tensor]:
    """Rewards of four pairs by each model: margins 3, 2, 1 and -1, but for the ensemble."""
    margins = torch.tensor([3.0, 2.0, 1.0, -1.0])
    scores = {name: torch.stack([margins, torch.zeros(4)], 1) for name in reward_model.plan(0, 1)}
    members = torch.tensor([[1.0, 1.0], [2.0, -3.0], [3.0, -4.0]])     # two pairs by three models
    for name, (right, wrong) in zip(reward_model.MEMBERS, members):
        scores[name] = torch.stack([torch.stack([right, wrong]), torch.zeros(2)], 1)
    return scores


def test_accuracy_and_calibration_error_are_those_of_the_margins():
    found = reward_model.figures(known_scores()["margin_8000"])
    # sigma of 3, 2, 1, 1 is .953, .881, .731, .731: parts 9, 7 and 4, the last half right
    gaps = (1 - 0.95257) + (1 - 0.88080) + 2 * (0.73106 - 0.5)
    assert found == {"accuracy": 0.75, "ece": pytest.approx(gaps / 4, abs=1e-4)}


def test_the_ensemble_takes_the_mean_or_the_minimum_of_each_answer():
    scores = known_scores()
    assert reward_model.of_three(scores, "mean").tolist() == [[2, 0], [-2, 0]]
    assert reward_model.of_three(scores, "min").tolist() == [[1, 0], [-4, 0]]


def test_disagreement_of_right_and_wrong_pairs():
    # margins 1, 2, 3, of mean 2, and 1, -3, -4, of mean -2
    right = (2 / 3) ** 0.5
    wrong = (14 / 3) ** 0.5
    nats, relative = reward_model.disagreement(known_scores())
    assert nats == pytest.approx([right, wrong])
    assert relative == pytest.approx([right / 2, wrong / 2])


def test_the_table_of_reward_models():
    one = known_scores()
    other = one | {"margin_8000": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    text = reward_model.table({"0": one, "1": other}, reward_model.Config())
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| margin: 8,000"))
    assert "| 62.5% (50.0% to 75.0%) | " in row
    # members 100 %, 50 %, 50 % right; mean and minimum rank the second pair wrong
    assert "| one of three, on average | 66.7% (66.7% to 66.7%) |" in text
    assert "| mean of three | 50.0% (50.0% to 50.0%) |" in text
    assert "| in nats, mean | 0.82 (0.82 to 0.82) | 2.16 (2.16 to 2.16) |" in lines
    assert [line for line in lines if line.startswith("| bt: ")][-1].startswith("| bt: 32,000")
    quick = reward_model.table({"0": one}, reward_model.Config(quick=True))
    assert "| bt: 3,200 pairs | 75.0% |" in quick


def test_scores_are_the_rewards_of_held_out_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_model, "fast_dtype", lambda: torch.float32)
    monkeypatch.setattr(reward_model, "pick_device", lambda name: torch.device("cpu"))
    model = tiny_model(head="scalar", context_length=1024)
    found = reward_model.scores_of(folder_of(model, tmp_path / "rm"), 3, 5)
    rows = readers.read_preferences("world:3", n=5, split="heldout", seed=3)
    assert len(found) == 5
    for row, scores in zip(rows, found):
        [batch] = PreferencePairs([row], TOKENIZER, 1024, 0).epoch(1)
        with torch.no_grad():
            assert scores == pytest.approx(response_rewards(model, batch).tolist(), abs=1e-4)


@pytest.mark.parametrize("quick", [False, True])
def test_reward_models_name_options_that_train_rm_has(quick, monkeypatch, tmp_path):
    calls = {}

    def run(script, **options):
        assert script is train_rm
        calls[options["out"]] = build(train_rm.Config, options)

    monkeypatch.setattr(reward_model, "run", run)
    monkeypatch.setattr(reward_model, "base_models", lambda seed: tmp_path / "base")
    monkeypatch.setattr(reward_model, "read_record", lambda folder: {"sha256": str(folder)})
    monkeypatch.setattr(reward_model, "scores_of",
                        lambda folder, seed, n: [[3.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [1.0, 0.5]])
    reward_model.main(reward_model.Config(seeds="3,4", out=str(tmp_path / "out"), quick=quick,
                                          figure=str(tmp_path / "rm.png")))
    assert (tmp_path / "rm.png").exists() and (tmp_path / "rm.md").exists()
    part = 10 if quick else 1
    of_first = [cfg for cfg in calls.values() if cfg.data == "world:3"]
    assert len(calls) == (9 if quick else 18) and len(of_first) == 9
    for cfg in of_first:
        assert (cfg.optimizer, cfg.lr, cfg.batch_size) == ("muon", 1e-3, 16)
        assert cfg.init == str(tmp_path / "base" / "sft")
        assert cfg.steps == {500: 60, 2000: 150, 8000: 500, 32_000: 1500}[cfg.n_pairs * part] / part
    assert {cfg.loss for cfg in of_first} == {*reward_model.LOSSES}
    assert sorted(cfg.seed for cfg in of_first) == [3] * 7 + [103, 203]
    assert {cfg.n_pairs * part for cfg in of_first if cfg.loss != "bt" or cfg.seed > 3} == {8000}
