"""train_dpo.py: the loss by hand, by its gradient and by a slow count, and whole small runs."""
import dataclasses
import math
import shutil

import pytest
import torch
from tiny import TOKENIZER, folder_of, slow_logps, tiny_model, write_rows

import data
import readers
import train_dpo
from plumbing.curves import keys_by_panel, read_metrics
from plumbing.folders import load_model
from preferences import monitored
from scoring import response_logps
from train_dpo import dpo_loss

LOG2 = math.log(2)


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


def made_pairs(n):
    """Prompts and answers of different lengths; the chosen one says yes."""
    return [{"prompt": f"{i}{'?' * (i % 5)}", "chosen": "yes" + "!" * (i % 3),
             "rejected": "no" + "." * (i % 4)} for i in range(n)]


def read_pairs(tmp_path, n, split=None):
    path = write_rows(tmp_path / "pairs.jsonl", made_pairs(n))
    rows = readers.read_preferences(path, split=split)
    return data.PreferencePairs(rows, TOKENIZER, 64, seed=0)


def config(tmp_path, **changes):
    if not (tmp_path / "sft").exists():
        folder_of(tiny_model(), tmp_path / "sft")
        write_rows(tmp_path / "pairs.jsonl", made_pairs(80))
    return train_dpo.Config(**{
        "init": str(tmp_path / "sft"), "out": str(tmp_path / "dpo"), "steps": 4, "warmup": 0,
        "data": str(tmp_path / "pairs.jsonl"), "batch_size": 8, "lr": 1e-3, "beta": 0.1,
        "device": "cpu", "dtype": "float32", "log_every": 1} | changes)


def slow_score(model, pair, side):
    """Sum of log p over the answer's bytes and its <|end|>, one prefix at a time."""
    prompt = TOKENIZER.prompt([{"role": "user", "content": pair["prompt"]}])
    answer = [*TOKENIZER.encode(pair[side]), TOKENIZER.end]
    return slow_logps(model, prompt + answer)[len(prompt) - 1:].sum()


# ---------------------------------------------------------------------- the loss

def test_noisy_routers_make_no_noise_between_policy_and_reference(tmp_path):
    folder_of(tiny_model(n_experts=4, router_noise=True), tmp_path / "sft")
    write_rows(tmp_path / "pairs.jsonl", made_pairs(80))
    train_dpo.main(config(tmp_path, lr=0.0))
    losses = [row["loss"] for row in read_metrics(tmp_path / "dpo")]
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-5)


def test_a_reward_model_is_no_policy(tmp_path):
    folder_of(tiny_model(head="scalar"), tmp_path / "rm")
    with pytest.raises(ValueError, match="rm: this is a reward model; give a language model"):
        train_dpo.main(config(tmp_path, init=str(tmp_path / "rm")))


def test_loss_and_margin_are_what_a_hand_computes():
    pi_w, ref_w = torch.tensor([-10.0, -7.0]), torch.tensor([-12.0, -6.0])     # + 2, - 1
    pi_l, ref_l = torch.tensor([-9.0, -5.0]), torch.tensor([-8.0, -8.0])       # - 1, + 3
    loss, margin = dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=0.1)
    torch.testing.assert_close(margin, torch.tensor([0.3, -0.4]))
    by_hand = (math.log(1 + math.exp(-0.3)) + math.log(1 + math.exp(0.4))) / 2     # 0.73368
    assert loss.item() == pytest.approx(by_hand, rel=1e-6) == pytest.approx(0.7336855, rel=1e-6)


def test_an_unmoved_policy_has_margin_zero_and_loss_log_2():
    w, l = torch.randn(5) * 30, torch.randn(5) * 30
    loss, margin = dpo_loss(w, l, w, l, beta=0.3)
    assert torch.equal(margin, torch.zeros(5))
    assert loss.item() == pytest.approx(LOG2, abs=1e-7)


def test_extreme_margins_neither_overflow_nor_lose_the_gradient():
    pi_w = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss, margin = dpo_loss(pi_w, zero, zero, zero, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1e4 / 2)                 # log sigma(-m) -> -m
    assert pi_w.grad.tolist() == [0.0, -0.5]                     # won: no push; lost: the whole one


def test_drift_from_the_reference_is_what_a_hand_computes():
    pi_w, ref_w = torch.tensor([-10.0, -7.0]), torch.tensor([-12.0, -6.0])     # + 2, - 1
    pi_l, ref_l = torch.tensor([-9.0, -5.0]), torch.tensor([-8.0, -8.0])       # - 1, + 3
    margin = torch.tensor([0.3, -0.4])
    figures = monitored(torch.tensor(0.5), margin, torch.cat([pi_w, pi_l]),
                        torch.cat([ref_w, ref_l]), None)
    found = {name: value.item() for name, value in figures.items()}
    assert found == pytest.approx({
        "logratio_chosen": 0.5, "logratio_rejected": 1.0, "kl_proxy": 7 / 4, "margin": -0.05,
        "loss": 0.5,
        "accuracy": 0.5, "logp_chosen": -8.5, "logp_rejected": -7.0})


def test_gradient_is_the_sigmoid_weight_of_section_464():
    pi_w, pi_l, ref_w, ref_l = (torch.randn(6, dtype=torch.float64) * 5 for _ in range(4))
    for x in (pi_w, pi_l):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, l: dpo_loss(w, l, ref_w, ref_l, 0.2)[0], (pi_w, pi_l))
    dpo_loss(pi_w, pi_l, ref_w, ref_l, 0.2)[0].backward()
    reward_w, reward_l = 0.2 * (pi_w - ref_w), 0.2 * (pi_l - ref_l)
    weight = 0.2 * torch.sigmoid(reward_l - reward_w).detach() / 6
    torch.testing.assert_close(pi_w.grad, -weight)
    torch.testing.assert_close(pi_l.grad, weight)


def test_parameters_move_by_weighted_differences_of_their_log_prob_gradients(tmp_path):
    policy, reference, pairs = tiny_model(1), tiny_model(2), read_pairs(tmp_path, 4)
    batch = pairs.batch(0, 4)
    with torch.no_grad():
        ref_w, ref_l = response_logps(reference.logps, batch).chunk(2)
    loss, margin = dpo_loss(*response_logps(policy.logps, batch).chunk(2), ref_w, ref_l, beta=0.1)
    loss.backward()
    found = {name: w.grad.clone() for name, w in policy.named_parameters()}
    expected = {name: torch.zeros_like(w) for name, w in policy.named_parameters()}
    for i, delta in zip(batch.index.tolist(), margin.tolist()):  # -beta mean sigma(-D) (dw - dl)
        for side, sign in (("chosen", -1), ("rejected", 1)):
            policy.zero_grad()
            slow_score(policy, made_pairs(4)[i], side).backward()
            for name, w in policy.named_parameters():
                expected[name] += sign * 0.1 / (1 + math.exp(delta)) / 4 * w.grad
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("cached", [True, False])
def test_training_starts_at_log_2_and_raises_the_held_out_margin(tmp_path, cached):
    result = train_dpo.main(config(tmp_path, steps=12, eval_every=1, cache_reference=cached))
    rows = read_metrics(tmp_path / "dpo")
    # a cached score comes from a batch of another width: equal up to fp32 rounding of sums of ~50
    tolerance = 1e-5 if cached else 0.0
    assert abs(rows[0]["margin"]) <= tolerance and rows[0]["kl_proxy"] <= 10 * tolerance
    assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-7 + tolerance)
    assert rows[-1]["val_margin"] > 0.3 > rows[0]["val_margin"]
    assert rows[-1]["val_loss"] < LOG2 and rows[-1]["loss"] < LOG2
    assert result["val_accuracy"] == rows[-1]["val_accuracy"] > 0.9
    assert result["val_margin"] == rows[-1]["val_margin"]


def test_cached_and_live_reference_train_the_same_policy(tmp_path):
    for cached in (True, False):
        train_dpo.main(config(tmp_path, out=str(tmp_path / str(cached)), steps=6,
                              cache_reference=cached))
    start, cached, live = (load_model(tmp_path / name)[0].state_dict()
                           for name in ("sft", "True", "False"))
    for name in live:
        moved = (live[name] - start[name]).norm()
        assert (cached[name] - live[name]).norm() < 1e-3 * moved, name


def test_every_figure_that_step_35_asks_for_is_logged(tmp_path):
    train_dpo.main(config(tmp_path, steps=2))
    rows = read_metrics(tmp_path / "dpo")
    assert len(rows) == 2
    assert {"step", "loss", "margin", "accuracy", "kl_proxy", "logp_chosen", "logp_rejected",
            "grad_norm", "lr", "tokens", "tokens_per_s"} <= set(rows[0])
    assert {"logratio_chosen", "logratio_rejected"} <= set(rows[0])
    assert {"val_loss", "val_margin", "val_accuracy", "val_logratio_chosen",
            "val_logratio_rejected"} <= set(rows[-1])


def test_the_margin_is_beta_times_the_difference_of_the_drifts_held_out_too(tmp_path):
    train_dpo.main(config(tmp_path, steps=12, eval_every=1))
    rows = read_metrics(tmp_path / "dpo")
    for row in rows:
        for prefix in ("", "val_"):
            drift_apart = row[prefix + "logratio_chosen"] - row[prefix + "logratio_rejected"]
            assert row[prefix + "margin"] == pytest.approx(0.1 * drift_apart, abs=1e-5)
    # 1e-5: fp32 rounding of sums of ~50, as the reference's are cached
    assert abs(rows[0]["logratio_chosen"]) < 1e-4 < abs(rows[-1]["val_logratio_chosen"])


def test_the_picture_shows_the_drift_of_both_answers_in_one_panel(tmp_path):
    train_dpo.main(config(tmp_path, steps=2))
    panels = keys_by_panel(read_metrics(tmp_path / "dpo"))
    assert panels["logratio"] == ["logratio_chosen", "logratio_rejected", "val_logratio_chosen",
                                  "val_logratio_rejected"]
    assert not {"logp_chosen", "logp_rejected"} & panels.keys()


def test_a_resumed_run_repeats_the_curve_against_the_same_reference(tmp_path):
    cfg = config(tmp_path, steps=6, save_every=3)
    result = train_dpo.main(cfg)
    whole = read_metrics(cfg.out)
    shutil.rmtree(tmp_path / "dpo" / "checkpoints" / "step_000006")
    for name in ("config.json", "model.safetensors"):            # as if killed after step 4
        (tmp_path / "dpo" / name).unlink()
    again = train_dpo.main(dataclasses.replace(cfg, resume=True))
    rows = read_metrics(cfg.out)
    assert [row["step"] for row in rows] == list(range(6))
    assert abs(whole[3]["margin"]) > 0.01                        # a reset reference would give 0
    for name in ("loss", "margin", "kl_proxy", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in whole]
    assert again["val_margin"] == result["val_margin"]


def test_a_pair_longer_than_the_context_stops_before_training(tmp_path):
    cfg = config(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [*made_pairs(80), {
        "prompt": "x" * 60, "chosen": "yes", "rejected": "no"}])
    with pytest.raises(ValueError, match=r"pairs.jsonl:81.*64 fit.*--truncate left"):
        train_dpo.main(cfg)
    assert not (tmp_path / "dpo" / "metrics.jsonl").exists()
    train_dpo.main(dataclasses.replace(cfg, truncate="left", overwrite=True, steps=1))
    assert (tmp_path / "dpo" / "model.safetensors").exists()
