"""train_rm.py: Bradley-Terry by hand, where the reward is read, the shift to zero, a small run."""
import dataclasses
import itertools
import json
import math

import pytest
import torch
from tiny import (
    END,
    TOKENIZER,
    ending_model,
    folder_of,
    tiny_model,
    write_rows,
)

import data
import diagnostics
import readers
import sample
import train_rm
from plumbing.curves import read_metrics
from plumbing.folders import load_model, load_reward_model
from plumbing.run import Run
from preferences import margins_of
from train_rm import (
    bradley_terry_loss,
    margin_loss,
    plackett_luce_loss,
    pointwise_loss,
    shift_to_zero,
)


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


# ---------------------------------------------------------------------- other losses

def test_a_margin_shifts_what_bradley_terry_asks_for():
    r_w, r_l = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])
    loss = margin_loss(r_w, r_l, torch.tensor([2.0, 1.0]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.e)) / 2)
    assert margin_loss(r_w, r_l, torch.zeros(2)) == bradley_terry_loss(r_w, r_l)


def test_pointwise_is_a_squared_distance():
    loss = pointwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75]))
    assert loss.item() == pytest.approx((0.25 + 0.5625) / 2)


def test_plackett_luce_by_hand_and_by_drawing_one_after_the_other():
    rewards = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    loss = plackett_luce_loss(rewards, torch.tensor([3, 2]))
    e = math.e
    by_hand = (-math.log(e ** 2 / (e ** 2 + e + 1)) - math.log(e / (e + 1)) + math.log(2)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    # over all orders of three answers the probabilities add up to 1
    orders = torch.tensor(list(itertools.permutations([0.3, -1.0, 2.0])))
    total = sum(math.exp(-plackett_luce_loss(order[None], torch.tensor([3]))) for order in orders)
    assert total == pytest.approx(1, rel=1e-6)


def test_plackett_luce_of_two_is_bradley_terry():
    rewards = torch.randn(6, 2)
    torch.testing.assert_close(plackett_luce_loss(rewards, torch.full((6,), 2)),
                               bradley_terry_loss(*rewards.T))


def test_the_gradient_of_plackett_luce_is_finite_and_right():
    rewards = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    n = torch.tensor([4, 2, 3])
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, n), (rewards,))
    plackett_luce_loss(rewards, n).backward()
    assert rewards.grad[1, 2:].tolist() == [0, 0] and rewards.grad.isfinite().all()
    torch.testing.assert_close(rewards.grad.sum(1), torch.zeros(3, dtype=torch.float64))


# ---------------------------------------------------------------------- margins

def test_margins_are_better_minus_worse_of_every_two_answers():
    pair, three = {"chosen": "a", "rejected": "b"}, {"responses": ["a", "b", "c"]}
    two = {"responses": ["a", "b"]}
    rewards = torch.tensor([[3.0, 5.0], [1.0, 9.0]])
    assert margins_of(rewards, [pair, pair]).tolist() == [2, -4]
    rewards = torch.tensor([[3.0, 5.0], [1.0, 9.0], [0.0, 9.0]])             # (K, B)
    assert sorted(margins_of(rewards, [three, two]).tolist()) == [-4, 1, 2, 3]
    rated = [{"rating": 0.2, "responses": ["a"]}, {"rating": 0.9, "responses": ["b"]},
             {"rating": 0.9, "responses": ["c"]}]
    assert sorted(margins_of(torch.tensor([[1.0, 4.0, 0.0]]), rated).tolist()) == [-1, 3]


def test_rows_of_rankings_are_the_best_answers_first_and_the_last_again(tmp_path):
    rows = [{"prompt": "a", "completions": ["x", "yy", "zzz"], "ranks": [2, 1, 3]},
            {"prompt": "b", "completions": ["p", "qq"], "ranks": [1, 2]}]
    rankings = readers.read_rankings(write_rows(tmp_path / "rows.jsonl", rows))
    source = data.PreferencePairs(rankings, TOKENIZER, 64, seed=0)
    batch = source.batch(0, 2)
    texts = [TOKENIZER.decode(ids[mask].tolist()) for ids, mask in
             zip(batch.tokens, batch.loss_mask)]
    by_item = {"a": ["yy", "x", "zzz"], "b": ["p", "qq", "qq"]}
    names = [source.pairs[i]["prompt"][0]["content"] for i in batch.index]
    assert texts == [by_item[name][rank] for rank in range(3) for name in names]


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


def rows_of(loss: str, n: int = 80) -> list[dict]:
    """Rows that --loss learns from: the shorter an answer, the better."""
    rows = []
    for i, pair in enumerate(made_pairs(n)):
        if loss == "pointwise":
            side = "chosen" if i % 2 else "rejected"
            rows.append({"prompt": pair["prompt"], "completion": pair[side], "rating": i % 2})
        elif loss == "plackett_luce":
            rows.append({"prompt": pair["prompt"], "ratings": [0.9, 0.1, 0.5],
                         "completions": ["yes", "no, no, no", "maybe"][:3 - i % 2 * 1]}
                        | ({"ratings": [0.9, 0.1]} if i % 2 else {}))
        else:
            rows.append(pair | {"margin": 0.5})
    return rows


@pytest.mark.parametrize("loss", ["margin", "pointwise", "plackett_luce"])
def test_every_loss_learns_to_rank_what_it_has_not_seen(tmp_path, loss):
    cfg = config(tmp_path, loss=loss, steps=30, eval_every=29)
    write_rows(tmp_path / "pairs.jsonl", rows_of(loss))
    result = train_rm.main(cfg)
    rows = read_metrics(tmp_path / "rm")
    assert result["accuracy"] > 0.9 and rows[-1]["loss"] < rows[0]["loss"]
    assert (result["diagnostics"] == {}) == (loss != "margin")


@pytest.mark.parametrize("loss", ["bt", "margin", "pointwise", "plackett_luce"])
def test_the_world_draws_what_each_loss_reads(tmp_path, loss):
    folder_of(tiny_model(context_length=300), tmp_path / "sft")
    result = train_rm.main(train_rm.Config(
        init=str(tmp_path / "sft"), out=str(tmp_path / "rm"), loss=loss, steps=1, n_pairs=20,
        eval_pairs=40, batch_size=4, device="cpu", truncate="left", n_shift=2, max_new_tokens=4,
        label_noise=0.1, length_bias=0.1, disagreement=0.5))
    assert 0 <= result["accuracy"] <= 1


def test_a_pair_without_a_margin_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'pairs.jsonl:\d+: this pair has no "margin"'):
        train_rm.main(config(tmp_path, loss="margin"))


# ---------------------------------------------------------------------- what it knows

def test_calibration_is_confidence_beside_accuracy():
    margin = torch.tensor([0.0, math.log(9), math.log(9), -math.log(9), 50.0])
    (half, tie, one), (ninety, right, three), (sure, last, other) = diagnostics.calibration(margin)
    assert (half, tie, one) == (0.5, 0.5, 1)
    assert (ninety, right, three) == (pytest.approx(0.9), pytest.approx(2 / 3), 3)
    assert (sure, last, other) == (1.0, 1.0, 1)


def test_length_correlation_is_pearsons():
    lengths = torch.tensor([1.0, 2, 3, 4])
    assert diagnostics.correlation(-2 * lengths + 7, lengths) == pytest.approx(-1)
    assert diagnostics.correlation(torch.tensor([1.0, -1, -1, 1]), lengths) == 0
    assert diagnostics.correlation(torch.ones(4), lengths) == 0
    a, b = torch.randn(2, 50)
    expected = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert diagnostics.correlation(a, b) == pytest.approx(expected, abs=1e-6)


def test_accuracy_is_told_by_axis_and_by_distance():
    pairs = [{"example": {"kind": kind}, "margin": i / 10} for i, kind in
             enumerate(["right", "whole", "honest", "manner"] * 2)]
    margin = torch.tensor([1.0, 1, -1, 1, 1, -1, -1, 1])
    assert diagnostics.accuracy_by(diagnostics.axis_of, pairs, margin) == {
        "coherent": 1.0, "helpful": 0.75, "honest": 0.0}
    found = diagnostics.accuracy_by_distance(pairs, margin)
    assert [share for _, share in found] == [1.0, 0.5, 0.5, 0.5]
    assert [mean for mean, _ in found] == pytest.approx([0.05, 0.25, 0.45, 0.65])
    assert diagnostics.accuracy_by_distance([{"margin": None}] * 8, margin) == []


def test_a_run_leaves_its_diagnostics_as_numbers_and_a_picture(tmp_path):
    result = train_rm.main(config(tmp_path))
    assert (tmp_path / "rm" / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "rm" / "config.json").read_text())["result"]["diagnostics"]
    assert record["accuracy"] == result["accuracy"]
    assert record["ece"] == pytest.approx(result["ece"], abs=1e-4)
    assert record["length_correlation"] < 0                    # the shorter answer is the better


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
