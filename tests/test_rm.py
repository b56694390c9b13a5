"""train_rm.py: Bradley-Terry by hand, where the reward is read, the shift to zero, a small run."""
import dataclasses
import math

import pytest
import torch
from tiny import (
    END,
    TOKENIZER,
    conversation,
    ending_model,
    folder_of,
    slow_logps,
    tiny_model,
    write_rows,
)

import data
import readers
import sample
import train_rm
from plumbing.curves import read_metrics
from plumbing.folders import load_model, load_reward_model
from plumbing.run import Run
from scoring import response_rewards
from train_rm import bradley_terry_loss, margins, shift_to_zero


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


def made_pairs(n):
    """The chosen answer says yes and is always the shorter one."""
    return [{"prompt": f"{i}{'?' * (i % 5)}", "chosen": "yes", "rejected": "no, no" + "." * (i % 4)}
            for i in range(n)]


def config(tmp_path, **changes):
    if not (tmp_path / "sft").exists():
        folder_of(ending_model(), tmp_path / "sft")
        write_rows(tmp_path / "pairs.jsonl", made_pairs(80))
    return train_rm.Config(**{
        "init": str(tmp_path / "sft"), "out": str(tmp_path / "rm"), "steps": 10, "warmup": 0,
        "data": str(tmp_path / "pairs.jsonl"), "batch_size": 8, "lr": 1.4e-3, "device": "cpu",
        "n_shift": 8, "max_new_tokens": 12, "dtype": "float32", "log_every": 1} | changes)


# ---------------------------------------------------------------------- the loss

def test_loss_is_what_a_hand_computes():
    loss = bradley_terry_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
    by_hand = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6) == pytest.approx(0.8132617, rel=1e-6)


def test_a_model_that_knows_nothing_loses_log_2():
    r = torch.randn(7)
    assert bradley_terry_loss(r, r).item() == pytest.approx(math.log(2), abs=1e-7)


def test_gradient_pushes_by_the_probability_of_being_wrong():
    r_w, r_l = torch.randn(2, 5, dtype=torch.float64)
    r_w.requires_grad_(), r_l.requires_grad_()
    assert torch.autograd.gradcheck(bradley_terry_loss, (r_w, r_l))
    bradley_terry_loss(r_w, r_l).backward()
    wrong = torch.sigmoid(r_l - r_w).detach()
    torch.testing.assert_close(r_w.grad, -wrong / 5)
    torch.testing.assert_close(r_l.grad, wrong / 5)


def test_a_constant_added_to_all_rewards_changes_nothing():
    r_w, r_l = torch.randn(2, 5, dtype=torch.float64)
    loss = bradley_terry_loss(r_w, r_l)
    torch.testing.assert_close(bradley_terry_loss(r_w + 7.5, r_l + 7.5), loss)
    assert not torch.isclose(bradley_terry_loss(r_w + 7.5, r_l), loss)


# ---------------------------------------------------------------------- margins of pairs

def test_margins_are_chosen_minus_rejected_of_every_pair(tmp_path):
    rows = readers.read_preferences(write_rows(tmp_path / "pairs.jsonl", made_pairs(11)))
    model, pairs = tiny_model(head="scalar"), data.PreferencePairs(rows, TOKENIZER, 64, seed=0)
    found = margins(model, pairs, batch_size=4)
    expected = {}
    for i, pair in enumerate(made_pairs(11)):
        r_w, r_l = (response_rewards(model, conversation(pair["prompt"], pair[side])).item()
                    for side in ("chosen", "rejected"))
        expected[i] = r_w - r_l
    order = torch.cat([batch.index for batch in pairs.epoch(4)]).tolist()
    torch.testing.assert_close(found, torch.tensor([expected[i] for i in order]))
    assert sorted(order) == list(range(11)) and model.training


# ---------------------------------------------------------------------- what is added to the loss

def test_mean_value_by_hand():
    values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    loss_mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    assert train_rm.mean_value(values, loss_mask).tolist() == [2.5, 8]


def test_log_probs_of_the_response_tokens_stand_where_they_are_predicted():
    model = tiny_model(head="scalar", tied=False)
    sides = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([6, 7, 8], [0, 1, 1]), ([1, 2, 9], [0, 0, 1])]
    batch = data.right_padded(sides, TOKENIZER.pad, 6, [0, 1, 2])
    values, logps = train_rm.read_values(model.values_and_logps, batch, with_logps=True)
    expected = torch.zeros(3, 6)
    for b, (ids, mask) in enumerate(sides):
        for t in range(len(ids)):
            if mask[t]:
                expected[b, t - 1] = slow_logps(model.trunk, ids)[t - 1]
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(values, model(batch.tokens).squeeze(-1))


def test_each_term_has_its_say_only_if_its_coefficient_is_not_zero(tmp_path, monkeypatch):
    def weights_after(name, **coefficients):
        train_rm.main(config(tmp_path, out=str(tmp_path / name), steps=1, **coefficients))
        return load_reward_model(tmp_path / name)[0].trunk.embedding.weight
    plain = weights_after("plain", mean_coef=0.0, lm_coef=0.0)
    assert not torch.equal(plain, weights_after("lm", mean_coef=0.0, lm_coef=0.3))
    assert not torch.equal(plain, weights_after("mean", mean_coef=1.0, lm_coef=0.0))
    monkeypatch.setattr(train_rm, "mean_value", lambda values, loss_mask: values.mean(1))
    assert torch.equal(plain, weights_after("other mean", mean_coef=0.0, lm_coef=0.0))


# ---------------------------------------------------------------------- the shift

def test_after_the_shift_sampled_sft_answers_score_zero_on_average(tmp_path):
    sft, reward_model, cfg = ending_model(), tiny_model(5, head="scalar"), config(tmp_path)
    prompts = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(40)]
    with torch.no_grad():
        reward_model.head.bias += 3.0

    def mean_reward(seed):
        """Scored one answer at a time, and the standard error of the mean."""
        ids = [TOKENIZER.prompt(prompt["messages"]) for prompt in prompts]
        answers = sample.generate(sft, ids, 12, (END,), temperature=1.0,
                                  generator=torch.Generator().manual_seed(seed))
        scores = torch.stack([reward_model(torch.tensor([x + y]))[0, -1, 0]
                              for x, y in zip(ids, answers)]).detach()
        return scores.mean().item(), scores.std().item() / 40 ** 0.5

    before, _ = mean_reward(cfg.seed)
    assert before > 1
    assert shift_to_zero(reward_model, sft, TOKENIZER, prompts, cfg) == pytest.approx(before,
                                                                                      rel=1e-5)
    assert mean_reward(cfg.seed)[0] == pytest.approx(0, abs=1e-5)
    others, error = mean_reward(cfg.seed + 1)                    # answers that it has not seen
    assert abs(others) < 4 * 2 ** 0.5 * error


def test_the_shift_changes_no_ranking_and_no_weight_but_the_bias(tmp_path):
    sft, reward_model = ending_model(), tiny_model(5, head="scalar")
    before = {name: w.clone() for name, w in reward_model.state_dict().items()}
    prompts = [{"messages": [{"role": "user", "content": "a question" * 9}]}]    # gets cut
    shift_to_zero(reward_model, sft, TOKENIZER, prompts, config(tmp_path))
    moved = {name for name, w in reward_model.state_dict().items()
             if not torch.equal(w, before[name])}
    assert moved == {"head.bias"}


# ---------------------------------------------------------------------- a whole run

def test_training_learns_to_rank_unseen_pairs_against_their_length(tmp_path):
    result = train_rm.main(config(tmp_path, eval_every=1, seed=3))       # a head that begins wrong
    rows = read_metrics(tmp_path / "rm")
    assert result["accuracy"] == rows[-1]["accuracy"] == 1.0
    assert result["length_accuracy"] == 0.0                      # the chosen one is always shorter
    assert result["likelihood_accuracy"] == 1.0
    assert 0 <= result["ece"] == rows[-1]["ece"] <= 0.5
    assert rows[0]["accuracy"] < 0.5
    assert rows[-1]["val_loss"] < 0.45 < 0.6 < rows[0]["val_loss"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"train_accuracy", "grad_norm", "lr", "tokens"} <= set(rows[0])


def test_psi_starts_as_the_sft_model_with_a_fresh_scalar_head(tmp_path):
    train_rm.main(config(tmp_path, steps=1, lr=0.0))
    sft, _ = load_model(tmp_path / "sft")
    reward_model, _ = load_reward_model(tmp_path / "rm")
    kept = dict(reward_model.state_dict())
    head, bias = kept.pop("head.weight"), kept.pop("head.bias")
    assert head.shape == (1, 32) and bias.shape == (1,)
    assert set(kept) == {f"trunk.{name}" for name in sft.state_dict()}
    assert all(torch.equal(kept[f"trunk.{name}"], w) for name, w in sft.state_dict().items())
    assert head.abs().sum() > 0 and bias.item() != 0             # random, and shifted


def test_step_3_freezes_the_reward_model(tmp_path, monkeypatch):
    finished = []
    monkeypatch.setattr(Run, "finish", lambda self, model, *others: finished.append(model))
    train_rm.main(config(tmp_path, steps=1))
    [model] = finished
    assert not any(weight.requires_grad for weight in model.parameters())


def test_an_empty_answer_stops_before_training(tmp_path):
    cfg = config(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [*made_pairs(80), {"prompt": "?", "chosen": "",
                                                            "rejected": "no"}])
    with pytest.raises(ValueError, match=r'pairs.jsonl:81: field "chosen" is empty'):
        train_rm.main(cfg)
    train_rm.main(dataclasses.replace(cfg, bad_rows="skip", overwrite=True, steps=1))
