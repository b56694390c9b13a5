"""train_dpo.py's relatives: losses by hand, at their limits, by closed gradients and a slow count;
the optimal policy; small runs of each; rounds of own pairs."""
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_dpo import config, made_pairs, slow_score
from tiny import TOKENIZER, ending_model, folder_of, own_reward, tiny_model, write_rows

import preferences
import train_dpo
from data import PreferencePairs
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from plumbing.metrics import Metrics
from plumbing.options import build
from preferences import (
    best_and_worst,
    demonstrated,
    labels_of,
    mean_of_step,
    mismatched,
    monitored,
    sides,
)
from readers import read_preferences
from scoring import log1mexp, response_logps, score_pairs
from train_dpo import Config, dpo_loss, ipo_loss, kto_loss, method_loss, orpo_loss, simpo_loss

METHODS = ("dpo", "ipo", "kto", "orpo", "simpo")
GOOD = torch.tensor([True, False])


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------------- by hand

def test_label_smoothing_mixes_both_labels():
    pi_w, pi_l, zero = torch.tensor([3.0]), torch.tensor([1.0]), torch.zeros(1)
    loss, margin = dpo_loss(pi_w, pi_l, zero, zero, 0.5, label_smoothing=0.1)
    assert margin.item() == 1
    assert loss.item() == pytest.approx(-0.9 * math.log(sigma(1)) - 0.1 * math.log(sigma(-1)))
    # its smallest loss is at log(0.9 / 0.1), where plain DPO's margin grows for ever
    best = torch.tensor([math.log(9.0)], requires_grad=True)
    dpo_loss(best, zero, zero, zero, 1.0, label_smoothing=0.1)[0].backward()
    assert best.grad.abs().item() < 1e-6


def test_ipo_is_a_square_around_a_margin_of_one_over_two_beta():
    pi_w, ref_w = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0])       # h: 1, 0
    pi_l, ref_l = torch.tensor([-3.0, -1.0]), torch.tensor([-1.0, -1.0])       # h: -2, 0
    loss, margin = ipo_loss(pi_w, pi_l, ref_w, ref_l, beta=0.25)
    assert margin.tolist() == [3, 0]
    assert loss.item() == pytest.approx(((3 - 2) ** 2 + (0 - 2) ** 2) / 2)
    h = torch.tensor([2.0], requires_grad=True)                # where it wants to be
    ipo_loss(h, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=0.25)[0].backward()
    assert h.grad.item() == 0


def test_kto_pushes_good_answers_up_and_bad_ones_down_from_z():
    pi, ref = torch.tensor([-3.0, -3.0]), torch.tensor([-5.0, -5.0])           # h: 2
    loss, margin = kto_loss(pi, ref, GOOD, z=1.0, beta=0.5, lambda_good=1.0, lambda_bad=2.0)
    assert margin.tolist() == [0.5, -0.5]
    by_hand = (1 * (1 - sigma(0.5)) + 2 * (1 - sigma(-0.5))) / 2
    assert loss.item() == pytest.approx(by_hand)
    # at the start h = z = 0 and the loss is half of the mean lambda; a negative z counts as 0
    for z in (0.0, -3.0):
        loss, margin = kto_loss(pi, pi, GOOD, z, 0.5, 1.0, 2.0)
        assert loss.item() == pytest.approx(0.75) and margin.tolist() == [0, 0]


def test_orpo_is_likelihood_and_log_odds():
    p_w, p_l = math.log(0.6), math.log(0.2)
    pi_w = torch.tensor([5 * p_w])                             # of 5 tokens
    loss, log_odds_ratio = orpo_loss(pi_w, torch.tensor([p_w]), torch.tensor([p_l]), 5.0, lam=0.5)
    by_hand = math.log((0.6 / 0.4) / (0.2 / 0.8))              # log 6
    assert log_odds_ratio.item() == pytest.approx(by_hand, rel=1e-5)
    assert loss.item() == pytest.approx(-p_w - 0.5 * math.log(sigma(by_hand)), rel=1e-5)
    # without odds SFT on the chosen: -1 on each of 9 tokens of one, -3 on the other's only one
    pi_w, mean_w = torch.tensor([[-9.0, -3.0], [-1.0, -3.0]])
    plain, _ = orpo_loss(pi_w, mean_w, torch.tensor([-2.0, -2.0]), 5.0, lam=0.0)
    assert plain.item() == pytest.approx((9 * 1 + 1 * 3) / 10)


def test_simpo_wants_a_margin_of_gamma():
    loss, margin = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=1.0)
    assert margin.item() == 1 and loss.item() == pytest.approx(math.log(2))
    loss, _ = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.0]), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(-math.log(sigma(-1)))


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = torch.tensor([-1e-6, -0.1, -math.log(2), -0.7, -5.0, -30.0], requires_grad=True)
    exact = [math.log(-math.expm1(value)) for value in x.tolist()]
    found = log1mexp(x)
    assert found.tolist() == pytest.approx(exact, rel=1e-5)
    found.sum().backward()
    assert x.grad.tolist() == pytest.approx([-1 / math.expm1(-v) for v in x.tolist()], rel=1e-4)


# ---------------------------------------------------------------------- gradients

def closed_gradient(method: str, cfg: Config, x: dict) -> tuple:
    """dL / d pi_w and dL / d pi_l (of kto: of the answers) in closed form, for B pairs."""
    B = len(x["pi_w"])
    h_w, h_l = x["pi_w"] - x["ref_w"], x["pi_l"] - x["ref_l"]
    if method == "dpo":
        weight = cfg.beta * torch.sigmoid(cfg.beta * (h_l - h_w))
        return -weight / B, weight / B
    if method == "ipo":
        weight = 2 * (h_w - h_l - 1 / (2 * cfg.beta))
        return weight / B, -weight / B
    if method == "kto":
        sign = torch.where(x["is_good"], 1.0, -1.0)
        value = torch.sigmoid(sign * cfg.beta * (h_w - 0.3))
        weight = torch.where(x["is_good"], cfg.lambda_good, cfg.lambda_bad)
        return -weight * sign * cfg.beta * value * (1 - value) / B, torch.zeros(B)
    if method == "simpo":
        margin = cfg.simpo_beta * (x["pi_w"] - x["pi_l"]) - cfg.gamma
        weight = cfg.simpo_beta * torch.sigmoid(-margin)
        return -weight / B, weight / B
    p_w, p_l = x["pi_w"].exp(), x["pi_l"].exp()                # d log odds / d log p = 1 / (1 - p)
    log_odds_ratio = torch.log(p_w / (1 - p_w)) - torch.log(p_l / (1 - p_l))
    weight = cfg.lam * torch.sigmoid(-log_odds_ratio)
    return (-1 - weight / (1 - p_w)) / B, weight / (1 - p_l) / B


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_closed_forms(method):
    cfg = Config(method=method, lambda_bad=1.5)
    x = {name: -torch.rand(6, dtype=torch.float64) - 0.05
         for name in ("pi_w", "pi_l", "ref_w", "ref_l")}
    x["is_good"] = torch.tensor([True, False, False, True, True, False])
    pi = torch.cat([x["pi_w"], x["pi_l"]]).requires_grad_()
    ref = torch.cat([x["ref_w"], x["ref_l"]])
    step_mean = 0.3 if method == "kto" else 1.0                # z, or the mean length
    loss, _ = method_loss(pi, ref, torch.ones(12), x["is_good"], step_mean, cfg)
    loss.backward()
    expected_w, expected_l = closed_gradient(method, cfg, x)
    torch.testing.assert_close(pi.grad[:6], expected_w.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pi.grad[6:], expected_l.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_with_half_of_the_rows_each_have_the_gradient_of_all_rows(method):
    """Their losses are averaged, and so is what a formula takes from the whole step."""
    cfg = Config(method=method)
    pi, ref = -5 * torch.rand(2, 12, dtype=torch.float64) - 0.05
    pi.requires_grad_()
    lengths = torch.randint(1, 9, (12,))
    is_good = torch.tensor([True, False, False, True, True, False])

    def gradient(ranks):
        """Of ranks that hold these of the 6 pairs each; a pair's other side is 6 rows below."""
        held = [[*rows, *(row + 6 for row in rows)] for rows in ranks]
        means = [mean_of_step(method, pi[i], ref[i], lengths[i]) for i in held]
        mean = sum(means) / len(ranks) if method in ("kto", "orpo") else None
        losses = [method_loss(pi[i], ref[i], lengths[i], is_good[i[:len(i) // 2]], mean, cfg)[0]
                  for i in held]
        return torch.autograd.grad(sum(losses) / len(ranks), pi)[0]

    torch.testing.assert_close(gradient([[0, 1, 2], [3, 4, 5]]), gradient([[*range(6)]]))


# ---------------------------------------------------------------------- a slow count

def slow_loss(cfg: Config, policy, reference, batch, pairs) -> float:
    """The loss from scores that are made one prefix at a time, with math alone."""
    def score(model, row, side):
        text = {"prompt": row["prompt"][-1]["content"], side: row[side]}
        value = slow_score(model, text, side).item()
        per_token = cfg.method in ("ipo", "orpo", "simpo") or cfg.mean_logps
        return value / (len(TOKENIZER.encode(row[side])) + 1) if per_token else value

    rows = [pairs.pairs[i] for i in batch.index.tolist()]
    pi_w, pi_l = ([score(policy, row, side) for row in rows] for side in ("chosen", "rejected"))
    ref_w, ref_l = ([score(reference, row, side) for row in rows]
                    for side in ("chosen", "rejected"))
    z = max(0.0, sum(p - r for p, r in zip(pi_l, ref_l)) / len(rows))
    mean_length = sum(len(TOKENIZER.encode(row.get("chosen", ""))) + 1 for row in rows) / len(rows)
    total = 0.0
    for row, w, l, rw, rl in zip(rows, pi_w, pi_l, ref_w, ref_l):
        if cfg.method == "dpo":
            margin = cfg.beta * ((w - rw) - (l - rl))
            total -= ((1 - cfg.label_smoothing) * math.log(sigma(margin))
                      + cfg.label_smoothing * math.log(sigma(-margin)))
        elif cfg.method == "ipo":
            total += ((w - rw) - (l - rl) - 1 / (2 * cfg.beta)) ** 2
        elif cfg.method == "kto":
            sign = 1 if row["label"] else -1
            total += 1 - sigma(sign * cfg.beta * (w - rw - z))
        elif cfg.method == "orpo":
            odds_w, odds_l = (math.exp(p) / (1 - math.exp(p)) for p in (w, l))
            n_tokens = len(TOKENIZER.encode(row["chosen"])) + 1
            total -= w * n_tokens / mean_length + cfg.lam * math.log(odds_w / (odds_w + odds_l))
        else:
            total -= math.log(sigma(cfg.simpo_beta * (w - l) - cfg.gamma))
    return total / len(rows)


def labelled_rows(n: int) -> list[dict]:
    return [{"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"],
             "label": bool(i % 2)} for i, pair in enumerate(made_pairs(n))]


@pytest.mark.parametrize("changes", [
    {"method": "dpo"}, {"method": "dpo", "mean_logps": True}, {"method": "dpo",
                                                               "label_smoothing": 0.2},
    {"method": "ipo"}, {"method": "kto"}, {"method": "orpo"}, {"method": "simpo"}])
def test_the_first_loss_of_a_run_is_the_slow_one(tmp_path, monkeypatch, changes):
    """The reference is another model, so that nothing cancels out."""
    folder_of(tiny_model(9), tmp_path / "other")
    rows = labelled_rows(80) if changes["method"] == "kto" else made_pairs(80)
    cfg = config(tmp_path, reference=str(tmp_path / "other"), steps=1, beta=0.5, **changes)
    write_rows(tmp_path / "pairs.jsonl", rows)
    seen = {}
    batch_of = PreferencePairs.batch

    def watched(self, *arguments):
        seen.update(pairs=self, batch=batch_of(self, *arguments))
        return seen["batch"]
    monkeypatch.setattr(PreferencePairs, "batch", watched)
    train_dpo.main(cfg)
    policy, reference = load_model(tmp_path / "sft")[0], load_model(tmp_path / "other")[0]
    expected = slow_loss(cfg, policy, reference, seen["batch"], seen["pairs"])
    assert read_metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------- 001 section 4.6.2

def test_dpo_on_enough_pairs_arrives_at_the_optimal_policy():
    """Six answers that can all be listed, labels drawn by Bradley-Terry from r:
    pi* = pi_ref exp(r / beta) / Z."""
    beta = 0.5
    ref_logps = torch.tensor([0.3, -0.2, 0.1, 0.5, -0.4, 0.0]).log_softmax(0)
    r = torch.tensor([0.0, 0.5, -0.3, 0.2, 1.0, 0.1])
    optimal = (ref_logps + r / beta).softmax(0)
    one, other = torch.randint(0, 6, (2, 100_000))
    prefers_one = torch.rand(100_000) < torch.sigmoid(r[one] - r[other])
    w = torch.where(prefers_one, one, other)
    l = torch.where(prefers_one, other, one)
    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        loss, _ = dpo_loss(logps[w], logps[l], ref_logps[w], ref_logps[l], beta)
        loss.backward()
        return loss
    optimizer.step(closure)
    assert (logits.detach().softmax(0) - optimal).abs().max() < 0.02
    assert (ref_logps.exp() - optimal).abs().max() > 0.2       # it had some way to go


# ---------------------------------------------------------------------- answers with labels

def test_every_labelled_answer_stands_beside_one_to_another_prompt():
    rows = [{"prompt": str(i), "response": f"r{i}", "label": i % 3 == 0, "where": f"x:{i}"}
            for i in range(9)]
    pairs = mismatched(rows, seed=1)
    assert sorted(pair["chosen"] for pair in pairs) == [f"r{i}" for i in range(9)]
    assert sorted(pair["rejected"] for pair in pairs) == [f"r{i}" for i in range(9)]
    for pair in pairs:
        assert pair["chosen"] == f"r{pair['prompt']}" != pair["rejected"]
        assert pair["label"] == (int(pair["prompt"]) % 3 == 0)
    with pytest.raises(ValueError, match="two answers at least"):
        mismatched(rows[:1], seed=0)


def test_two_answers_to_one_prompt_are_no_partners():
    rows = [{"prompt": str(i // 4), "response": f"r{i}", "label": True, "where": f"x:{i}"}
            for i in range(12)]
    prompt_of = {row["response"]: row["prompt"] for row in rows}
    for seed in range(20):
        for pair in mismatched(rows, seed):
            assert pair["prompt"] != prompt_of[pair["rejected"]]
    with pytest.raises(ValueError, match="two answers at least"):
        mismatched(rows[:4], seed=0)


def test_sides_are_chosen_and_rejected_or_good_and_bad():
    values = torch.arange(6.0)
    assert [side.tolist() for side in sides(values, None)] == [[0, 1, 2], [3, 4, 5]]
    is_good = torch.tensor([True, False, True])
    assert [side.tolist() for side in sides(values, is_good)] == [[0, 2], [1]]


def test_only_labelled_answers_have_labels():
    pair = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c",
            "where": "x"}
    assert labels_of(PreferencePairs([pair], TOKENIZER, 64, 0)) is None
    labelled = PreferencePairs([pair | {"label": True}, pair | {"label": False}], TOKENIZER, 64, 0)
    assert labels_of(labelled).tolist() == [True, False]
    assert labels_of(labelled, torch.tensor([1, 1, 0])).tolist() == [False, False, True]


# ---------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_to_tell_good_from_bad(tmp_path, method):
    cfg = config(tmp_path, method=method, steps=15, lr=3e-3, beta=0.5)
    if method == "kto":
        write_rows(tmp_path / "pairs.jsonl", labelled_rows(80))
    result = train_dpo.main(cfg)
    rows = read_metrics(tmp_path / "dpo")
    assert result["val_accuracy"] > 0.8
    assert rows[-1]["val_loss"] < rows[0]["loss"]
    if method in ("dpo", "kto"):                               # before it has moved
        assert rows[0]["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-5)


def test_the_nll_anchor_keeps_the_chosen_answers_likely(tmp_path):
    drift = {}
    for coef in (0.0, 2.0):
        train_dpo.main(config(tmp_path, steps=15, lr=3e-3, nll_coef=coef, overwrite=True))
        drift[coef] = read_metrics(tmp_path / "dpo")[-1]["val_logratio_chosen"]
    assert drift[2.0] > drift[0.0] + 1


def test_the_same_seed_gives_kto_the_same_model(tmp_path):
    """What a resumed run needs: partners do not change."""
    cfg = config(tmp_path, method="kto", steps=3)
    write_rows(tmp_path / "pairs.jsonl", labelled_rows(80))
    found = [train_dpo.main(replace(cfg, out=str(tmp_path / name)))["val_margin"]
             for name in "ab"]
    assert found[0] == found[1]


def test_the_world_gives_kto_labels(tmp_path):
    folder_of(tiny_model(context_length=256), tmp_path / "sft")
    cfg = Config(init=str(tmp_path / "sft"), out=str(tmp_path / "kto"), method="kto", steps=1,
                 n_pairs=40, eval_pairs=20, batch_size=4, device="cpu", truncate="left")
    assert 0 <= train_dpo.main(cfg)["val_accuracy"] <= 1


# ---------------------------------------------------------------------- own pairs, in rounds

ASKED = [{"messages": [{"role": "user", "content": text}], "answer": f"{text}!", "where": "x"}
         for text in "ab"]


def test_the_best_of_an_own_answers_stands_against_the_worst():
    def pairs_of(texts, scores, group, asked=ASKED):
        # "..." was cut off
        answers = [TOKENIZER.encode(text) + [TOKENIZER.end] * (not text.endswith("..."))
                   for text in texts]
        return best_and_worst(asked, answers, scores, group, TOKENIZER)

    one = ASKED[:1]
    found = pairs_of(["p", "q", "r", "s", "t", "u"], [1, 3, 2, 5, 5, 5], 3)
    assert found == [{"prompt": ASKED[0]["messages"], "chosen": "q", "rejected": "p"}]
    assert pairs_of(["same", "same"], [1, 2], 2, one) == []
    assert pairs_of([" ", "x"], [2, 1], 2, one) == []                        # an empty one
    assert pairs_of(["", ""], [2, 1], 2, one) == []
    # a cut-off answer is never the best, whatever its score; it may be the worst
    assert pairs_of(["and on...", "x"], [2, 1], 2, one) == []
    assert pairs_of(["and...", "on..."], [2, 1], 2, one) == []
    assert pairs_of(["and on...", "x"], [1, 2], 2, one) == [
        {"prompt": ASKED[0]["messages"], "chosen": "x", "rejected": "and on..."}]


def test_spin_puts_the_demonstration_before_the_own_answer():
    assert demonstrated(ASKED, ["own", "b!"]) == [
        {"prompt": ASKED[0]["messages"], "chosen": "a!", "rejected": "own"}]


@pytest.fixture
def taste(tmp_path, monkeypatch):
    code = "def long(prompts, answers):\n    return [len(answer) for answer in answers]\n"
    return f"{own_reward(monkeypatch, tmp_path, code)}:long"


def online(tmp_path, **changes) -> Config:
    """A config of two rounds; with spin=True those of the demonstrations, else of a reward."""
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}{'?' * (i % 5)}"} for i in range(60)])
    source = {"prompts": str(tmp_path / "prompts.jsonl"), "no_end_score": -99.0, "data": "world"}
    if "spin" in changes:
        demonstrations = [{"prompt": f"{i}?", "response": "yes"} for i in range(60)]
        source = {"data": str(write_rows(tmp_path / "demonstrations.jsonl", demonstrations))}
    cfg = config(tmp_path, **{"rounds": 2, "steps": 8, "lr": 3e-3, "max_new_tokens": 8,
                              "batch_size": 8, "eval_every": 2} | source | changes)
    folder_of(ending_model(), tmp_path / "sft")
    return cfg


def test_online_rounds_make_pairs_of_the_present_policy(tmp_path, taste):
    cfg = online(tmp_path, reward=taste)
    train_dpo.main(cfg)
    rounds = tmp_path / "dpo_rounds"
    first, second = (read_preferences(rounds / f"pairs_{number}.jsonl") for number in (1, 2))
    # longer is better, and what never ends is worst
    assert len(first) > 10 and all(0 < len(pair["chosen"]) < 8 for pair in first)
    mean = [sum(len(pair["chosen"]) for pair in pairs) / len(pairs) for pairs in (first, second)]
    assert mean[1] > mean[0]                                   # it has learnt, and shows it
    config_of = [json.loads((folder / "config.json").read_text())["config"]
                 for folder in (rounds / "1", tmp_path / "dpo")]
    assert [found["init"] for found in config_of] == [cfg.init, str(rounds / "1")]
    assert [found["reference"] for found in config_of] == [cfg.init] * 2
    assert [found["steps"] for found in config_of] == [4, 4]


def kill_before_round_2(monkeypatch, cfg: Config) -> None:
    make = preferences.make_pairs

    def killed(cfg, policy, file, number, steps):
        if number == 2:
            raise KeyboardInterrupt
        make(cfg, policy, file, number, steps)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preferences, "make_pairs", killed)
        train_dpo.main(cfg)


def test_rounds_go_on_where_they_stopped(tmp_path, taste, monkeypatch):
    cfg = online(tmp_path, reward=taste)
    train_dpo.main(cfg)
    whole = read_metrics(tmp_path / "dpo")
    again = replace(cfg, out=str(tmp_path / "again"))
    kill_before_round_2(monkeypatch, again)
    with pytest.raises(ValueError, match="pairs_1.jsonl is there already; --resume goes on"):
        train_dpo.main(again)
    # other pairs would be made than these rounds began with
    for changed in ({"reward": "world"}, {"answers": 5}, {"no_end_score": 0.0}):
        [name] = changed
        with pytest.raises(ValueError, match=f"rounds.json: these rounds began with {name} "):
            train_dpo.main(replace(again, resume=True, **changed))
    train_dpo.main(replace(again, resume=True))
    rows = read_metrics(tmp_path / "again")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]


def test_rounds_that_replace_others_go_on_where_they_stopped(tmp_path, taste, monkeypatch):
    """What was killed between the rounds of an --overwrite: the former second round's pairs, its
    model, and the former result are not taken for the new ones."""
    cfg = online(tmp_path, reward=taste)
    train_dpo.main(replace(cfg, seed=1))
    before = read_metrics(tmp_path / "dpo")
    kill_before_round_2(monkeypatch, replace(cfg, overwrite=True))
    assert read_metrics(tmp_path / "dpo") == before            # still there
    train_dpo.main(replace(cfg, resume=True))
    train_dpo.main(replace(cfg, out=str(tmp_path / "whole")))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("dpo", "whole")]
    assert losses[0] == losses[1] != [row["loss"] for row in before]


def test_spin_takes_the_policy_of_the_round_before_as_its_reference(tmp_path):
    train_dpo.main(online(tmp_path, spin=True))
    found = json.loads((tmp_path / "dpo" / "config.json").read_text())["config"]
    assert found["reference"] == found["init"] == str(tmp_path / "dpo_rounds" / "1")
    pairs = read_preferences(tmp_path / "dpo_rounds" / "pairs_2.jsonl")
    assert {pair["chosen"] for pair in pairs} == {"yes"}


def test_a_reward_that_ranks_nothing_makes_no_pairs(tmp_path, monkeypatch):
    code = "def flat(prompts, answers):\n    return [1.0] * len(answers)\n"
    reward = f"{own_reward(monkeypatch, tmp_path, code)}:flat"
    cfg = online(tmp_path, reward=reward, no_end_score=1.0)
    with pytest.raises(ValueError, match="round 1: all answers to a prompt are equal, empty"):
        train_dpo.main(cfg)
    assert not (tmp_path / "dpo").exists()


def test_a_run_does_not_go_on_with_another_reference(tmp_path):
    folder_of(tiny_model(9), tmp_path / "other")
    cfg = config(tmp_path, reference=str(tmp_path / "other"))
    train_dpo.main(cfg)
    folder_of(tiny_model(10), tmp_path / "other")
    with pytest.raises(ValueError, match="--reference: .*model.safetensors is not the one it was"):
        train_dpo.main(replace(cfg, resume=True))
    with pytest.raises(ValueError, match=r"--out .* what this stage reads \(--reference"):
        train_dpo.main(replace(cfg, out=str(tmp_path / "other"), overwrite=True))


# ---------------------------------------------------------------------- refused

@pytest.mark.parametrize("changes, message", [
    ({"method": "ppo"}, "--method ppo: give dpo, ipo, kto, orpo or simpo"),
    ({"method": "simpo", "beta": 0.1}, "--beta 0.1: only dpo, ipo, kto would read it"),
    ({"method": "ipo", "gamma": 0.5}, "--gamma 0.5: only simpo would read it"),
    ({"answers": 9}, "--answers 9: only --reward would read it"),
    ({"prompts": "no.jsonl"}, "--prompts no.jsonl: only --reward would"),
    ({"reward": "world", "data": "my.jsonl"}, "--data my.jsonl: pairs of the policy's own answers"),
    ({"reward": "world", "label_noise": 0.3}, "--label_noise 0.3: pairs of the policy's own"),
    ({"method": "orpo", "label_smoothing": 0.1}, "--label_smoothing 0.1: only dpo would read it"),
    ({"label_smoothing": 0.5}, "--label_smoothing 0.5: give a number in"),
    ({"rounds": 3}, "--rounds 3: must divide --steps, and needs --reward or --spin true"),
    ({"rounds": 9, "spin": True}, "--rounds 9: must divide --steps"),
    ({"rounds": 3, "spin": True, "steps": 10}, "--rounds 3: must divide --steps"),
    ({"reward": "world", "spin": True}, "each bring their data; give one"),
    ({"method": "kto", "spin": True}, "--method kto each bring their data")])
def test_options_that_mean_nothing_together_are_refused(tmp_path, changes, message):
    options = {"steps": 8, "init": "sft", "out": str(tmp_path / "dpo"), "device": "cpu"} | changes
    with pytest.raises(ValueError, match=message):
        train_dpo.main(build(Config, options))
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("label", [True, False])
def test_kto_needs_good_and_bad_answers(tmp_path, label):
    cfg = config(tmp_path, method="kto")
    write_rows(tmp_path / "pairs.jsonl", [row | {"label": label} for row in labelled_rows(80)])
    with pytest.raises(ValueError, match="have the same label; kto needs good and bad ones"):
        train_dpo.main(cfg)


def test_orpo_begins_with_the_base_model_and_the_others_with_sft():
    assert train_dpo.check(Config(method="orpo")).init == "out/pretrain"
    assert train_dpo.check(Config(method="orpo", init="out/x")).init == "out/x"
    assert train_dpo.check(Config()).init == "out/sft"


def test_plackett_luce_of_two_would_be_dpos_bradley_terry():
    margin = torch.randn(5)
    scores = torch.stack([margin, torch.zeros(5)], 1)
    torch.testing.assert_close(-F.logsigmoid(margin), scores.logsumexp(1) - scores[:, 0])


def test_response_logps_are_what_the_batch_scores(tmp_path):
    pairs = PreferencePairs(read_preferences(write_rows(tmp_path / "p.jsonl", made_pairs(6))),
                            TOKENIZER, 64, 0)
    batch = pairs.batch(0, 6)
    lengths = pairs.response_tokens()[batch.index].T.flatten()
    assert torch.equal(lengths, batch.loss_mask.sum(1))
    assert response_logps(tiny_model().logps, batch).shape == (12,)


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_a_method_without_a_reference_scores_no_training_data_with_one(tmp_path, monkeypatch,
                                                                       method):
    """Only the held-out pairs, which show how far it has gone."""
    scored = []

    def counted(model, pairs, batch_size):
        scored.append(len(pairs))
        return score_pairs(model, pairs, batch_size)
    monkeypatch.setattr(train_dpo, "score_pairs", counted)
    cfg = config(tmp_path, method=method, beta=Config.beta)
    train_dpo.main(cfg)
    rows = read_metrics(cfg.out)
    assert len({*scored}) == 1                                 # at the start, and in evaluations
    assert "logratio_chosen" not in rows[0] and "val_logratio_chosen" in rows[-1]


@pytest.mark.parametrize("changes", [{"mean_logps": True}, {"method": "ipo"}])
def test_drift_is_per_response_whatever_the_loss_divides(tmp_path, changes):
    """The loss of pairs without a weight moves nothing, so that the same policy is looked at."""
    drifts = []
    for more in ({}, changes):
        cfg = config(tmp_path, steps=1, lr=0.0, overwrite=True, **more)
        folder_of(tiny_model(8), tmp_path / "other")
        train_dpo.main(replace(cfg, reference=str(tmp_path / "other")))
        [row] = read_metrics(tmp_path / "dpo")
        drifts.append([row[name] for name in ("logratio_chosen", "val_logratio_rejected",
                                              "kl_proxy", "logp_chosen")])
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-6)


def test_a_batch_without_good_answers_leaves_their_figures_out_of_the_mean(tmp_path):
    pi, ref = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-2.0, -2.0, -2.0, -2.0])
    found = monitored(torch.tensor(0.1), torch.tensor([0.1, 0.2]), pi, ref,
                                torch.tensor([False, False]))
    assert found["logp_chosen"] is None and found["logratio_chosen"] is None
    assert found["logp_rejected"].item() == -1.5 and found["logratio_rejected"].item() == 0.5
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.add(0, {"a": torch.tensor(2.0), "b": None})
    metrics.add(0, {"a": torch.tensor(4.0), "b": torch.tensor(7.0)})
    assert {name: len(values) for name, values in metrics.pending.items()} == {"a": 2, "b": 1}
