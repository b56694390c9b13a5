"""train_ppo.py: rewards, advantages and losses by hand and by slow counts; rollouts; small runs."""
import copy
import dataclasses
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import END, TOKENIZER, ending_model, folder_of, slow_logps, tiny_model, write_rows

import data
import lora
import rewards
import sample
import train_ppo
from model import Transformer
from plumbing.curves import read_metrics
from plumbing.folders import load_model, load_reward_model
from plumbing.run import Run
from scoring import masked_mean, response_rewards, token_logps, values_before
from train_ppo import (
    adapt_beta,
    gae,
    ppo_loss,
    rollout_figures,
    shaped_rewards,
    value_loss,
    whiten,
)


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


def prompts_of(n):
    """n prompts of different lengths, as token ids."""
    return [TOKENIZER.prompt([{"role": "user", "content": f"{i}" + "?" * (3 * i % 7)}])
            for i in range(n)]


class Stop(Exception):
    pass


def watch_optimizers(monkeypatch):
    """The list into which the optimizers of a run go."""
    optimizers, pick = [], train_ppo.pick_optimizer

    def watched(*arguments, **options):
        optimizers.append(pick(*arguments, **options))
        return optimizers[-1]
    monkeypatch.setattr(train_ppo, "pick_optimizer", watched)
    return optimizers


def watch_models(monkeypatch, seen):
    """Put the four models that a run has loaded into `seen`, by name."""
    forecast = Run.forecast

    def watched(self, actor, critic, reference, reward_model, **options):
        seen.update(actor=actor, critic=critic, reference=reference, reward_model=reward_model)
        forecast(self, actor, critic, reference, reward_model, **options)
    monkeypatch.setattr(Run, "forecast", watched)


@pytest.fixture
def rolled(tmp_path, monkeypatch):
    """A function that runs train_ppo.main up to the first update: 5.2 for n prompts.

    It returns what is there then: .models, .minibatches (the rollouts), .prompts and .responses
    (token ids, in the same order). reference: a model in the place of pi_ref.
    """
    def roll(n=10, reference=None, **changes):
        models, texts, minibatches = {}, {}, []
        watch_models(monkeypatch, models)

        def watched_rewards(self, asked, prompts, responses):
            texts["prompts"] = texts.get("prompts", []) + prompts
            texts["responses"] = texts.get("responses", []) + responses
            return scores(self, asked, prompts, responses)

        def stop_after_whitening(rollouts):
            whiten(rollouts)
            minibatches.extend(rollouts)
            raise Stop

        def deepcopy(model):
            is_actor = isinstance(model, Transformer)
            return reference if is_actor and reference is not None else copy.deepcopy(model)

        scores = rewards.Reward.__call__
        with monkeypatch.context() as patch:
            patch.setattr(rewards.Reward, "__call__", watched_rewards)
            patch.setattr(train_ppo, "whiten", stop_after_whitening)
            patch.setattr(lora, "copy", SimpleNamespace(deepcopy=deepcopy))
            with pytest.raises(Stop):
                train_ppo.main(config(tmp_path, batch_size=n, overwrite=True, **changes))
        return SimpleNamespace(models=models, minibatches=minibatches, **texts)
    return roll


def answered(monkeypatch, responses):
    """Let the sampler return these responses."""
    monkeypatch.setattr(sample, "generate", lambda *arguments, **options: responses)


def config(tmp_path, **changes):
    if not (tmp_path / "sft").exists():
        folder_of(ending_model(), tmp_path / "sft")
        folder_of(tiny_model(4, head="scalar"), tmp_path / "rm")
        write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}{'?' * (i % 7)}"}
                                                for i in range(60)])
    return train_ppo.Config(**{
        "init": str(tmp_path / "sft"), "out": str(tmp_path / "ppo"), "steps": 4,
        "reward": str(tmp_path / "rm"), "prompts": str(tmp_path / "prompts.jsonl"),
        "max_new_tokens": 12, "batch_size": 8, "minibatch_size": 4, "device": "cpu",
        "dtype": "float32"} | changes)


# ---------------------------------------------------------------------- shaped rewards

def test_score_lands_on_the_last_real_token_and_kl_on_every_one():
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).float()
    kl = torch.tensor([[9, 0.5, -0.2, 0.1, 9], [9, 9, 0.3, 9, 9]])
    found = shaped_rewards(torch.tensor([2.0, -1.0]), kl, mask, beta=0.1)
    torch.testing.assert_close(found, torch.tensor([[0, -0.05, 0.02, 1.99, 0],
                                                    [0, 0, -1.03, 0, 0]]))


def test_without_a_penalty_the_rewards_of_a_response_add_up_to_its_score():
    mask = (torch.arange(6) >= torch.tensor([[0], [2], [5]])).float()
    score = torch.randn(3)
    found = shaped_rewards(score, torch.randn(3, 6), mask, beta=0.0)
    torch.testing.assert_close(found.sum(1), score)
    assert (found != 0).sum() == 3 and (found[:, -1] == score).all()


# ---------------------------------------------------------------------- advantages

def test_three_tokens_have_the_advantages_that_a_hand_computes():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.6]])
    # deltas 0.4 - 0.5, 0.6 - 0.4, 1 - 0.6; from the right 0.4, 0.2 + 0.4 / 2, -0.1 + 0.4 / 2
    advantages = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.1, 0.4, 0.4]]))
    torch.testing.assert_close(advantages + values, torch.tensor([[0.6, 0.8, 1.0]]))   # returns
    # gamma 1/2: deltas 0.2 - 0.5, 0.3 - 0.4, 0.4; from the right 0.4, -0.1 + 0.1, -0.3
    advantages = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.3, 0.0, 0.4]]))


def double_sum(rewards, values, mask, gamma, lam):
    """001's definition: A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})."""
    found = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        places = mask[b].nonzero()[:, 0].tolist()
        r, v = rewards[b, places], [*values[b, places], 0.0]
        for t, place in enumerate(places):
            found[b, place] = sum((gamma * lam) ** l * (r[t + l] + gamma * v[t + l + 1] - v[t + l])
                                  for l in range(len(places) - t))
    return found


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (1.0, 0.0)])
def test_advantages_are_the_double_sum_of_their_definition(gamma, lam):
    rewards, values = torch.randn(2, 4, 9, dtype=torch.float64)
    mask = torch.zeros(4, 9, dtype=torch.float64)
    for row, (first, last) in zip(mask, [(0, 9), (3, 9), (2, 7), (5, 6)]):
        row[first:last] = 1
    rewards = rewards * mask                                     # values outside must not leak in
    advantages = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, double_sum(rewards, values, mask, gamma, lam))


def test_lambda_one_is_monte_carlo_and_lambda_zero_one_step():
    rewards, values = torch.randn(2, 3, 7, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.float64)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    advantages = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, to_come - values)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    advantages = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values)


def test_whitening_is_over_the_real_tokens_of_the_whole_rollout():
    masks = [(torch.rand(4, 6) < 0.5).float() for _ in range(3)]
    minibatches = [{"advantages": torch.randn(4, 6) * 5 + 3, "mask": mask} for mask in masks]
    former = torch.cat([m["advantages"][m["mask"] > 0] for m in minibatches])
    whiten(minibatches)
    found = torch.cat([m["advantages"][m["mask"] > 0] for m in minibatches])
    torch.testing.assert_close(found, (former - former.mean()) / former.std(correction=0))
    assert found.mean().abs() < 1e-6 and found.pow(2).mean().item() == pytest.approx(1, abs=1e-5)
    assert all((m["advantages"][m["mask"] == 0] == 0).all() for m in minibatches)


# ---------------------------------------------------------------------- the losses

@pytest.mark.parametrize("advantage, ratio, loss, binds", [
    (2.0, 1.3, -2.4, True),           # better and already likelier: no further
    (2.0, 0.7, -1.4, False),          # better but less likely: all of the way back
    (-2.0, 0.7, 1.6, True),           # worse and already less likely: no further
    (-2.0, 1.3, 2.6, False),          # worse but likelier: all of the way back
    (2.0, 1.1, -2.2, False),
    (-2.0, 0.9, 1.8, False)])
def test_clipping_binds_only_where_the_policy_has_gone_far_enough(advantage, ratio, loss, binds):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    old, one = torch.zeros(1, 1), torch.ones(1, 1)
    found, found_ratio, fraction = ppo_loss(logps, old, one * advantage, one, clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and fraction.item() == binds
    assert found_ratio.item() == pytest.approx(ratio)
    assert logps.grad.item() == pytest.approx(0.0 if binds else -ratio * advantage)


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    logps = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    advantages, mask = torch.randn(3, 5, dtype=torch.float64), (torch.rand(3, 5) < 0.7).double()
    loss, ratio, fraction = ppo_loss(logps, logps.detach(), advantages, mask, clip=0.2)
    loss.backward()
    torch.testing.assert_close(logps.grad, -advantages * mask / mask.sum())
    assert torch.equal(ratio, torch.ones(3, 5, dtype=torch.float64)) and fraction == 0


def test_loss_is_a_mean_over_real_tokens_of_all_rows():
    logps, old, advantages = torch.randn(3, 2, 6) * 0.3
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]]).float()
    terms, bound = [], []
    for b, t in mask.nonzero().tolist():
        rho = math.exp(logps[b, t] - old[b, t])
        a = advantages[b, t].item()
        terms.append(min(rho * a, max(0.8, min(1.2, rho)) * a))
        bound.append(terms[-1] < rho * a)
    loss, _, fraction = ppo_loss(logps, old, advantages, mask, clip=0.2)
    assert loss.item() == pytest.approx(-sum(terms) / 5, rel=1e-5)
    assert fraction.item() == pytest.approx(sum(bound) / 5) and any(bound)


def test_what_stands_outside_the_mask_is_neither_lost_nor_counted():
    logps, old, advantages, values, returns = torch.randn(5, 2, 6, dtype=torch.float64) * 0.3
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).double()

    def figures(noise):
        x = [y + noise * (1 - mask) for y in (logps, old, advantages, values, returns)]
        loss, ratio, fraction = ppo_loss(x[0], old, x[2], mask, 0.2)
        return torch.stack([loss, fraction, value_loss(x[3], values, x[4], mask, 0.2),
                            masked_mean(x[0], mask), ratio.max(), ratio.min()])
    torch.testing.assert_close(figures(100.0), figures(0.0))


def test_value_loss_takes_the_worse_of_moved_and_clipped():
    one = torch.ones(1, 1)
    # V went from 0 to 1, the return is 2: (1 - 2)^2 against (0.2 - 2)^2
    assert value_loss(one, 0 * one, 2 * one, one, 0.2).item() == pytest.approx(0.5 * 3.24)
    # the return is 0.5: (1 - 0.5)^2 against (0.2 - 0.5)^2
    assert value_loss(one, 0 * one, 0.5 * one, one, 0.2).item() == pytest.approx(0.5 * 0.25)
    values, old, returns = torch.randn(3, 4, 5)
    mask = torch.ones(4, 5)
    assert value_loss(values, old, returns, mask, 1e9).item() == pytest.approx(
        0.5 * (values - returns).pow(2).mean().item())           # a wide clip is no clip


def test_a_value_that_has_moved_far_enough_to_its_return_gets_no_gradient():
    values = torch.tensor([[1.0, 1.0]], requires_grad=True)      # both came from 0
    value_loss(values, torch.zeros(1, 2), torch.tensor([[2.0, 0.5]]), torch.ones(1, 2),
               0.2).backward()
    assert values.grad.tolist() == [[0.0, 0.25]]


def test_gradients_of_both_losses_are_right():
    logps, old, advantages, returns = torch.randn(4, 3, 5, dtype=torch.float64)
    mask = (torch.rand(3, 5) < 0.7).double()
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, advantages, mask, 0.2)[0], logps)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, mask, 0.2), logps)


# ---------------------------------------------------------------------- the KL controller

@pytest.mark.parametrize("kl, beta", [
    (6.0, 0.1),                       # on target
    (6.6, 0.1 * (1 + 0.1 * 64 / 2000)),
    (5.4, 0.1 * (1 - 0.1 * 64 / 2000)),
    (60.0, 0.1 * (1 + 0.2 * 64 / 2000)),      # at most 20 % per horizon
    (0.0, 0.1 * (1 - 0.2 * 64 / 2000))])
def test_beta_rises_with_a_kl_above_the_target_and_falls_below_it(kl, beta):
    assert adapt_beta(0.1, kl, target=6.0, n=64, horizon=2000) == pytest.approx(beta, rel=1e-12)


def test_without_a_target_beta_is_fixed():
    assert adapt_beta(0.1, 60.0, target=0.0, n=64, horizon=2000) == 0.1


# ---------------------------------------------------------------------- rollouts

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_before_the_first_update(rolled, dtype, temperature):
    first = rolled(temperature=temperature, dtype=dtype)
    actor, critic = first.models["actor"], first.models["critic"]
    assert len(first.minibatches) == 3                           # 4 + 4 + 2 rows of many lengths
    for m in first.minibatches:
        logps, _ = token_logps(actor.logps, m["batch"], temperature, with_entropy=True)
        loss, ratio, fraction = ppo_loss(logps, m["old_logps"], m["advantages"], m["mask"], 0.2)
        assert torch.equal(ratio, torch.ones_like(ratio)) and fraction == 0
        assert torch.equal(values_before(critic, m["batch"]) * m["mask"], m["values"])
    loss.backward()
    with torch.no_grad():
        for w in actor.parameters():
            w -= 0.1 * w.grad
    ratio = ppo_loss(token_logps(actor.logps, m["batch"], temperature), m["old_logps"],
                     m["advantages"], m["mask"], 0.2)[1]
    assert (ratio != 1).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_scorer_agree_on_the_log_probs(rolled, monkeypatch, temperature):
    seen = []
    draw = sample.next_token

    def watched(logits, *arguments):
        tokens = draw(logits, *arguments)
        logps = (logits / temperature).log_softmax(-1)
        seen.append(list(zip(tokens.tolist(), logps.gather(1, tokens[:, None])[:, 0].tolist())))
        return tokens
    monkeypatch.setattr(sample, "next_token", watched)
    first = rolled(temperature=temperature)

    responses = first.responses
    rows = sorted(range(10), key=lambda i: len(first.prompts[i]))    # as generate() batches them
    sampled = [[] for _ in rows]
    for step in seen:
        for row, (_, logp) in zip(rows, step):
            sampled[row].append(logp)
        rows = [row for row, (token, _) in zip(rows, step) if token != END]
    scored = [row[keep].tolist() for m in first.minibatches
              for row, keep in zip(m["old_logps"], m["mask"] > 0)]
    assert [len(r) for r in responses] == [len(s) for s in scored] == [len(s) for s in sampled]
    for ours, theirs in zip(scored, sampled):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert len({len(r) for r in responses}) > 2                  # some ended early
    assert all(END not in r[:-1] and (r[-1] == END or len(r) == 12) for r in responses)


def test_stored_log_probs_are_those_of_the_tempered_policy_and_reference(rolled):
    first = rolled(n=3, reference=tiny_model(9, tied=False), temperature=0.7)
    (m,) = first.minibatches
    for b, (prompt, response) in enumerate(zip(first.prompts, first.responses)):
        with torch.no_grad():
            pi, ref = (slow_logps(first.models[name], prompt + response, 0.7)
                       [len(prompt) - 1:].float() for name in ("actor", "reference"))
        keep = m["mask"][b] > 0
        torch.testing.assert_close(m["old_logps"][b][keep], pi, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m["kl"][b][keep], pi - ref, rtol=1e-4, atol=1e-4)
        assert (m["kl"][b][~keep] == 0).all() and (m["values"][b][~keep] == 0).all()


def test_both_kls_of_the_first_rollout_are_exactly_zero(rolled):
    figures = rollout_figures(rolled().minibatches)
    assert figures["kl"] == 0 and figures["kl_k3"] == 0


def test_kl_estimates_are_sums_per_response(rolled):
    first = rolled(reference=tiny_model(9, tied=False))
    figures, k1, k3 = rollout_figures(first.minibatches), [], []
    for m in first.minibatches:
        for log_ratio, keep in zip(-m["kl"], m["mask"] > 0):     # log ref / pi of real tokens
            x = log_ratio[keep].tolist()
            k1.append(sum(-v for v in x))
            k3.append(sum(math.exp(v) - 1 - v for v in x))
    responses = first.responses
    assert figures["kl"].item() == pytest.approx(sum(k1) / 10, rel=1e-4)
    assert figures["kl_k3"].item() == pytest.approx(sum(k3) / 10, rel=1e-4)
    assert figures["response_tokens"].item() == pytest.approx(sum(map(len, responses)) / 10)
    assert figures["ended"].item() == pytest.approx(sum(r[-1] == END for r in responses) / 10)
    assert 0 < figures["ended"] < 1 and min(k3) > 0


def test_a_response_that_never_ended_gets_the_fixed_score(rolled, monkeypatch):
    yes = TOKENIZER.encode("yes")
    answered(monkeypatch, [[*yes, END], yes, [*yes, TOKENIZER.endoftext]])
    first = rolled(n=3, no_end_score=-7.0)
    (m,) = first.minibatches
    own = response_rewards(first.models["reward_model"], m["batch"]).detach()
    assert m["ended"].tolist() == [True, False, False]
    torch.testing.assert_close(m["score"], torch.tensor([own[0], -7.0, -7.0]))
    assert not torch.isclose(own, torch.tensor(-7.0)).any()


def test_rewards_advantages_and_returns_of_a_rollout_follow_from_its_parts(rolled):
    minibatches = rolled(reference=tiny_model(9, tied=False), beta=0.3, gamma=0.9,
                         lam=0.8).minibatches
    plain = []
    for m in minibatches:
        rewards = -0.3 * m["kl"] * m["mask"]
        for b, keep in enumerate(m["mask"] > 0):
            rewards[b, keep.nonzero()[-1]] += m["score"][b]
        plain.append(double_sum(rewards, m["values"], m["mask"], 0.9, 0.8))
        torch.testing.assert_close(m["returns"], (plain[-1] + m["values"]) * m["mask"])
    real = torch.cat([a[m["mask"] > 0] for a, m in zip(plain, minibatches)])
    white = torch.cat([m["advantages"][m["mask"] > 0] for m in minibatches])
    torch.testing.assert_close(white, (real - real.mean()) / real.std(correction=0),
                               rtol=1e-4, atol=1e-5)


def test_the_value_of_a_state_does_not_see_the_action_taken_in_it():
    critic, prompt = tiny_model(3, head="scalar"), prompts_of(1)[0]
    action = len(prompt) + 2                                     # the third token of the response
    batches = [data.response_batch([prompt], [[65, 66, token, 67, END]], TOKENIZER.pad, 0)
               for token in (68, 69)]
    (first,), (second,) = (values_before(critic, batch) for batch in batches)
    assert first.shape == (len(prompt) + 4,)                     # V before token 1, 2, ...
    assert torch.equal(first[:action], second[:action])          # entry t - 1 is V before token t
    assert (first[action:] != second[action:]).all()
    whole = critic(batches[0].tokens)[0].squeeze(-1)
    torch.testing.assert_close(first[action - 1], whole[action - 1])


def test_padding_changes_nothing(rolled, monkeypatch):
    short, long = [70, 71, END], [72] * 11 + [END]
    prompts, found = [], []
    for responses in ([short], [short, long]):
        answered(monkeypatch, responses)
        first = rolled(n=len(responses))
        (m,) = first.minibatches
        prompts.append(first.prompts[0])
        found.append({name: m[name][0][m["mask"][0] > 0]
                      for name in ("old_logps", "kl", "values", "returns")} | {
                          "score": m["score"][0]})
    assert prompts[0] == prompts[1]
    alone, padded = found
    for name in alone:
        torch.testing.assert_close(padded[name], alone[name], rtol=1e-5, atol=1e-5)


def test_a_perfect_critic_explains_all_of_the_variance_and_a_constant_one_none(rolled):
    (m,) = rolled(n=4).minibatches
    assert rollout_figures([m | {"values": m["returns"]}])["explained_variance"] == 1
    constant = rollout_figures([m | {"values": torch.full_like(m["returns"], 3.0)}])
    assert constant["explained_variance"].item() == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------- whole runs

def reward_ending(monkeypatch):
    """A reward model for which every answer that ends is worth 1; others get no_end_score, -1."""
    monkeypatch.setattr(rewards, "response_rewards",
                        lambda model, batch: torch.ones(len(batch.tokens)))


def test_a_policy_learns_to_end_its_answers_when_that_is_what_pays(monkeypatch, tmp_path):
    reward_ending(monkeypatch)
    result = train_ppo.main(config(tmp_path, steps=6, batch_size=32, minibatch_size=16, lr=3e-3,
                                   critic_lr=3e-3, max_new_tokens=3))
    rows = read_metrics(tmp_path / "ppo")
    assert rows[0]["ended"] < 0.7 and rows[-1]["ended"] > 0.9
    assert all(row["reward"] == pytest.approx(2 * row["ended"] - 1) for row in rows)
    assert rows[0]["kl"] == 0 == rows[0]["kl_k3"] and rows[-1]["kl_k3"] > 0.01
    assert result["kl"] == rows[-1]["kl"] and result["reward"] == rows[-1]["reward"]
    assert rows[0]["lr"] == 3e-3 and rows[-1]["lr"] == pytest.approx(3e-3 / 6)   # to 0


def test_a_high_price_on_kl_keeps_the_policy_where_it_was(monkeypatch, tmp_path):
    reward_ending(monkeypatch)
    drift = {}
    for beta in (0.0, 5.0):
        train_ppo.main(config(tmp_path, steps=5, batch_size=32, minibatch_size=16, lr=1e-3,
                              critic_lr=3e-3, max_new_tokens=3, beta=beta, kl_target=0.0,
                              overwrite=True))
        rows = read_metrics(tmp_path / "ppo")
        assert {row["beta"] for row in rows} == {beta}
        drift[beta] = sum(row["kl_k3"] for row in rows[-3:]) / 3
    assert drift[5.0] < drift[0.0] / 3


def test_every_figure_that_step_54_asks_for_is_logged(tmp_path):
    train_ppo.main(config(tmp_path, steps=2))
    rows = read_metrics(tmp_path / "ppo")
    assert len(rows) == 2
    assert {"step", "loss", "reward", "reward_std", "reward_min", "reward_max", "kl", "kl_k3",
            "response_tokens", "ended", "clip_fraction", "actor_loss", "value_loss", "entropy",
            "explained_variance", "beta", "ratio_max", "grad_norm", "lr", "tokens",
            "tokens_per_s"} <= set(rows[0])
    assert rows[0]["beta"] == 0.05 and rows[1]["beta"] == pytest.approx(
        0.05 * (1 - 0.2 * 8 / 2000))                             # the first KL, 0, is below target


@pytest.mark.parametrize("critic_init", ["rm", "sft"])
def test_actor_and_reference_start_from_sft_and_the_critic_where_it_is_told(
        monkeypatch, tmp_path, critic_init):
    def watched(self, *models, **options):
        actor, critic, reference, reward_model = (model.state_dict() for model in models)
        sft, rm = load_model(tmp_path / "sft")[0], load_reward_model(tmp_path / "rm")[0]
        for name, w in sft.state_dict().items():
            assert torch.equal(actor[name], w) and torch.equal(reference[name], w)
        assert all(torch.equal(reward_model[name], w) for name, w in rm.state_dict().items())
        start = rm.trunk if critic_init == "rm" else sft
        for name, w in start.state_dict().items():
            assert torch.equal(critic[f"trunk.{name}"], w)
        assert torch.equal(critic["head.weight"], rm.head.weight) == (critic_init == "rm")
        frozen = [not w.requires_grad for model in models[2:] for w in model.parameters()]
        assert all(frozen) and models[0].embedding.weight.requires_grad
        raise Stop
    monkeypatch.setattr(Run, "forecast", watched)
    with pytest.raises(Stop):
        train_ppo.main(config(tmp_path, critic_init=critic_init))


def test_updates_move_actor_and_critic_and_nothing_else(monkeypatch, tmp_path):
    seen = {}
    watch_models(monkeypatch, seen)
    train_ppo.main(config(tmp_path, steps=1))
    sft = load_model(tmp_path / "sft")[0].state_dict()
    rm = load_reward_model(tmp_path / "rm")[0].state_dict()
    for name, start, moves in (("actor", sft, True), ("critic", rm, True),
                               ("reference", sft, False), ("reward_model", rm, False)):
        moved = [not torch.equal(w, start[k]) for k, w in seen[name].state_dict().items()]
        assert all(moved) if moves else not any(moved), name
    aligned = load_model(tmp_path / "ppo")[0].state_dict()
    assert all(torch.equal(w, aligned[k]) for k, w in seen["actor"].state_dict().items())


def test_a_shared_trunk_learns_from_both_losses(monkeypatch, tmp_path):
    seen = {}
    watch_models(monkeypatch, seen)

    def weights(**changes):
        # one step, because in the next its values decide what the actor learns
        cfg = config(tmp_path, steps=1, overwrite=True, **changes)
        train_ppo.main(cfg)
        return load_model(cfg.out)[0].state_dict()

    def differ(one, other):
        return [not torch.equal(w, other[name]) for name, w in one.items()]

    both = weights(critic_init="shared", value_coef=1.0)
    # phi is the head alone, so that the forecast does not count the trunk twice
    assert seen["critic"].weight.shape == (1, seen["actor"].config.d_model)
    assert all(differ(both, weights(critic_init="shared", value_coef=0.0)))
    # a trunk of its own takes all of the value loss
    assert not any(differ(weights(value_coef=1.0), weights(value_coef=0.0)))


@pytest.mark.parametrize("critic_init", ["rm", "shared"])
def test_beta_and_the_curve_survive_a_checkpoint(tmp_path, critic_init):
    cfg = config(tmp_path, steps=6, save_every=3, kl_horizon=20, critic_init=critic_init)
    train_ppo.main(cfg)
    whole = read_metrics(cfg.out)
    shutil.rmtree(tmp_path / "ppo" / "checkpoints" / "step_000006")
    for name in ("config.json", "model.safetensors"):            # as if killed after step 4
        (tmp_path / "ppo" / name).unlink()
    train_ppo.main(dataclasses.replace(cfg, resume=True))
    rows = read_metrics(cfg.out)
    assert [row["step"] for row in rows] == list(range(6))
    assert whole[3]["beta"] < 0.9 * cfg.beta                     # a fresh one would be cfg.beta
    for name in ("beta", "loss", "reward", "kl", "value_loss", "entropy"):
        assert [row[name] for row in rows] == [row[name] for row in whole], name


def test_a_bad_mini_batch_is_skipped_for_actor_and_critic_and_the_others_count(monkeypatch,
                                                                               tmp_path):
    """8 prompts in two mini-batches, two epochs: four updates of each model, of which one is bad"""
    calls, loss = [], train_ppo.ppo_loss
    optimizers = watch_optimizers(monkeypatch)

    def broken(*args):
        calls.append(1)
        actor_loss, *rest = loss(*args)
        return actor_loss * (math.nan if len(calls) == 2 else 1), *rest
    monkeypatch.setattr(train_ppo, "ppo_loss", broken)
    train_ppo.main(config(tmp_path, steps=1, batch_size=8, minibatch_size=4, epochs=2))
    assert len(calls) == 4 and len(optimizers) == 2
    for optimizer in optimizers:
        assert {state["step"].item() for state in optimizer.state.values()} == {3}
    (row,) = read_metrics(tmp_path / "ppo")
    assert row["skipped"] == 2 and "reward" in row
    assert all(math.isfinite(value) for value in row.values())


def test_optimizers_are_those_of_the_n_plus_paper(monkeypatch, tmp_path):
    optimizers = watch_optimizers(monkeypatch)
    train_ppo.main(config(tmp_path, steps=1, lr=1e-4, critic_lr=2e-4))
    made = [{(group["lr"], group["eps"], group["weight_decay"]) for group in o.param_groups}
            for o in optimizers]
    assert made == [{(1e-4, 1e-5, 0.0)}, {(2e-4, 1e-5, 0.0)}]
    usual = train_ppo.Config()
    assert (usual.clip, usual.value_coef, usual.gamma, usual.lam) == (0.2, 0.1, 1.0, 0.95)


@pytest.mark.parametrize("changes, message", [
    ({"reward": "sft"}, "sft: this is a language model; give a reward model, the --out of"),
    ({"max_new_tokens": 60}, r"prompts.jsonl:\d+: .*--truncate left"),
])
def test_what_cannot_work_stops_before_the_first_rollout(tmp_path, changes, message):
    if "reward" in changes:
        changes = {"reward": str(tmp_path / "sft")}
    with pytest.raises(ValueError, match=message):
        train_ppo.main(config(tmp_path, **changes))
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


def test_a_critic_cannot_start_from_a_reward_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="--reward gsm8k is no reward model .*--critic_init sft"):
        train_ppo.main(config(tmp_path, reward="gsm8k"))
