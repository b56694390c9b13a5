"""train_grpo.py: advantages by hand, losses by slow versions and closed forms, the optimal policy
where all answers can be listed, rollouts, small runs."""
import math

import pytest
import safetensors.torch
import torch
from tiny import END, TOKENIZER, ending_model, folder_of, own_reward, tiny_model, write_rows

import sample
import train_grpo
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from plumbing.options import build
from plumbing.run import Run
from scoring import clipped_surrogate
from train_grpo import (
    Baseline,
    Config,
    advantages_of,
    answer_losses,
    policy_gradient_loss,
)

METHODS = ("reinforce", "rloo", "grpo", "dr_grpo")
REWARDS = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


# ---------------------------------------------------------------------- advantages

def test_advantages_are_the_hand_computed_ones():
    assert advantages_of(REWARDS, "reinforce", baseline=3.0).tolist() == [[-2, -1, 3], [1, 1, 1]]
    # the others' means are 4, 3.5 and 1.5
    assert advantages_of(REWARDS, "rloo").tolist() == [[-3, -1.5, 4.5], [0, 0, 0]]
    assert advantages_of(REWARDS, "dr_grpo").tolist() == [[-2, -1, 3], [0, 0, 0]]
    std = math.sqrt((4 + 1 + 9) / 2)                               # divided by G - 1
    expected = torch.tensor([[-2, -1, 3], [0, 0, 0]]) / (std + 1e-4)
    torch.testing.assert_close(advantages_of(REWARDS, "grpo"), expected)


@pytest.mark.parametrize("method", ["rloo", "grpo", "dr_grpo"])
def test_the_advantages_of_a_group_sum_to_zero_and_ignore_a_constant(method):
    rewards = torch.randn(5, 7)
    found = advantages_of(rewards, method)
    torch.testing.assert_close(found.sum(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages_of(rewards + 9, method), found, atol=1e-4, rtol=1e-4)
    assert advantages_of(torch.full((2, 4), 3.0), method).tolist() == [[0] * 4] * 2


def test_rloo_is_dr_grpo_times_g_over_g_minus_1():
    rewards = torch.randn(3, 8)
    torch.testing.assert_close(advantages_of(rewards, "rloo"),
                               advantages_of(rewards, "dr_grpo") * 8 / 7)


def test_grpo_alone_does_not_see_the_scale_of_the_rewards():
    rewards = torch.randn(3, 8)
    torch.testing.assert_close(advantages_of(100 * rewards, "grpo"), advantages_of(rewards, "grpo"),
                               rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(advantages_of(100 * rewards, "rloo"),
                               100 * advantages_of(rewards, "rloo"))


def test_reinforces_baseline_knows_earlier_batches_alone():
    baseline = Baseline()
    assert baseline.value is None
    baseline.update(2.0)
    assert baseline.value == pytest.approx(2.0)
    baseline.update(4.0)
    assert baseline.value == pytest.approx(0.9 * 2 + 0.1 * 4)
    other = Baseline()
    other.load_state_dict(baseline.state_dict())
    assert other.value == baseline.value


# ---------------------------------------------------------------------- losses

def random_rollout(b: int = 4, T: int = 6) -> dict:
    lengths = torch.tensor([6, 1, 3, 4])[:b, None]
    mask = (torch.arange(T) < lengths).float()
    return {"mask": mask, "old_logps": -torch.rand(b, T) * mask,
            "ref_logps": -torch.rand(b, T) * mask, "advantages": torch.randn(b)}


def slow_losses(logps, rollout: dict, cfg: Config) -> list[float]:
    """Answer by answer and token by token."""
    found = []
    for b, A in enumerate(rollout["advantages"].tolist()):
        total, n = 0.0, 0
        for t in range(logps.shape[1]):
            if not rollout["mask"][b, t]:
                continue
            n += 1
            logp = logps[b, t].item()
            if cfg.method in ("reinforce", "rloo"):
                total -= A * logp
                continue
            ratio = math.exp(logp - rollout["old_logps"][b, t].item())
            clipped = min(max(ratio, 1 - cfg.clip), 1 + cfg.clip)
            log_ratio = rollout["ref_logps"][b, t].item() - logp
            k3 = math.exp(log_ratio) - 1 - log_ratio
            total += -min(ratio * A, clipped * A) + cfg.beta * k3
        if cfg.method == "grpo":
            total /= n
        if cfg.method == "dr_grpo":
            total /= cfg.max_new_tokens
        found.append(total)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_an_answer_is_that_of_its_tokens_one_by_one(method):
    cfg = Config(method=method, beta=0.3, max_new_tokens=10)
    rollout = random_rollout()
    logps = -torch.rand(4, 6) * rollout["mask"]
    losses, _ = answer_losses(logps, rollout, cfg)
    assert losses.tolist() == pytest.approx(slow_losses(logps, rollout, cfg), rel=1e-5)


def test_before_the_first_update_the_surrogate_is_zero_and_its_gradient_the_policy_gradient():
    logps = (-torch.rand(3, 5)).requires_grad_()
    mask = torch.ones(3, 5)
    advantages = advantages_of(REWARDS[:1], "dr_grpo").flatten()
    surrogate, ratio, _ = clipped_surrogate(logps, logps.detach(), advantages[:, None], mask, 0.2)
    assert torch.equal(ratio, torch.ones_like(ratio)) and surrogate.sum().abs() < 1e-6
    [of_surrogate] = torch.autograd.grad(surrogate.sum(), logps)
    [of_reinforce] = torch.autograd.grad(policy_gradient_loss(logps, advantages).sum(), logps)
    assert torch.equal(of_surrogate, of_reinforce) and of_surrogate.abs().max() == 3
    assert torch.equal(of_surrogate, -advantages[:, None].expand(3, 5))       # the closed form


def test_a_ratio_beyond_the_clip_has_a_gradient_only_if_it_made_things_worse():
    logps = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    surrogate, _, _ = clipped_surrogate(logps, torch.zeros(4, 1), advantages[:, None],
                                        torch.ones(4, 1), 0.2)
    surrogate.sum().backward()
    assert (logps.grad.flatten() != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_outside_an_answer_moves_nothing(method):
    cfg = Config(method=method, beta=0.3)
    rollout = random_rollout()
    logps = (-torch.rand(4, 6) * rollout["mask"]).requires_grad_()
    answer_losses(logps, rollout, cfg)[0].sum().backward()
    if method in ("grpo", "dr_grpo"):                      # the others' log-probs are 0 there
        assert (logps.grad[rollout["mask"] == 0] == 0).all()
    assert logps.grad[rollout["mask"] > 0].abs().min() > 0


def test_dr_grpo_gives_each_token_the_same_weight_and_grpo_each_answer():
    rollout = random_rollout()
    rollout["advantages"] = torch.ones(4)
    for method, expected in (("grpo", [1, 1, 1, 1]), ("dr_grpo", [6, 1, 3, 4])):
        cfg = Config(method=method, beta=0.0, max_new_tokens=1)
        losses, _ = answer_losses(rollout["old_logps"], rollout, cfg)
        assert (-losses).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------- 001 section 4.6.2

BETA = 0.5
REF_LOGPS = torch.tensor([0.3, -0.2, 0.1, 0.5, -0.4, 0.0]).log_softmax(0)
R = torch.tensor([0.0, 0.5, -0.3, 0.2, 1.0, 0.1])              # of six answers of one token


def trained_policy(method: str) -> torch.Tensor:
    """pi(y) after enough steps of --method on R, with BETA."""
    beta = BETA
    ref_logps = REF_LOGPS
    r = R
    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    cfg = Config(method=method, beta=beta, max_new_tokens=1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        y = torch.multinomial(logits.detach().softmax(0), 512, replacement=True)
        logps = logits.log_softmax(0)[y][:, None]                      # (b, 1)
        rewards = r[y]
        if method in train_grpo.ONE_STEP:
            rewards = rewards - beta * (logps[:, 0].detach() - ref_logps[y])
        baseline = rewards.mean().item() if method == "reinforce" else 0.0
        advantages = advantages_of(rewards[None], method, baseline)[0]
        rollout = {"mask": torch.ones(512, 1), "old_logps": logps.detach(),
                   "ref_logps": ref_logps[y][:, None], "advantages": advantages}
        losses, _ = answer_losses(logps, rollout, cfg)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits.detach().softmax(0)


def test_reward_and_optimal_policy_give_each_other():
    optimal = (REF_LOGPS + R / BETA).softmax(0)                # pi_ref exp(r / beta) / Z
    # r = beta log(pi* / pi_ref) + beta log Z, for the same Z at every answer
    log_z = R / BETA - (optimal.log() - REF_LOGPS)
    torch.testing.assert_close(log_z, (REF_LOGPS + R / BETA).logsumexp(0).expand(6))


@pytest.mark.parametrize("method", ["reinforce", "rloo"])
def test_with_the_kl_in_the_reward_the_policy_gradient_arrives_at_the_optimal_policy(method):
    optimal = (REF_LOGPS + R / BETA).softmax(0)
    assert (trained_policy(method) - optimal).abs().max() < 0.02


def test_with_k3_in_the_loss_it_arrives_elsewhere():
    """At pi_ref / (1 + (V - r) / beta), V such that it sums to 1: k3's gradient over samples of pi
    is that of KL(pi_ref || pi)."""
    low, high = R.max().item() - BETA, R.max().item()
    for _ in range(60):
        V = (low + high) / 2
        limit = REF_LOGPS.exp() / (1 + (V - R) / BETA)
        low, high = (V, high) if limit.sum() > 1 else (low, V)
    found = trained_policy("dr_grpo")
    assert (found - limit).abs().max() < 0.03
    optimal = (REF_LOGPS + R / BETA).softmax(0)
    assert (limit - optimal).abs().max() > 0.1


# ---------------------------------------------------------------------- sampling in groups

def test_a_group_is_sampled_as_its_prompt_repeated_would_be():
    model = ending_model()
    prompts = [TOKENIZER.prompt([{"role": "user", "content": text}]) for text in ("a", "bcd", "ef")]
    prompts.sort(key=len)                                  # the order that generate() batches in
    repeated = [prompt for prompt in prompts for _ in range(4)]

    def sampled(prompts, **options):
        return sample.generate(model, prompts, 9, (END,), 1.0, **options,
                               generator=torch.Generator().manual_seed(5))
    grouped = sampled(prompts, group=4)
    assert grouped == sampled(repeated) and len({tuple(ids) for ids in grouped}) > 6
    assert sample.generate(model, prompts, 9, (END,), group=2, batch_size=2) == sample.generate(
        model, [prompt for prompt in prompts for _ in range(2)], 9, (END,))


# ---------------------------------------------------------------------- whole runs

def config(tmp_path, **changes) -> Config:
    if not (tmp_path / "sft").exists():
        folder_of(ending_model(), tmp_path / "sft")
        folder_of(tiny_model(4, head="scalar"), tmp_path / "rm")
        write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}{'?' * (i % 7)}"}
                                                for i in range(60)])
    return build(Config, {
        "init": str(tmp_path / "sft"), "out": str(tmp_path / "grpo"), "steps": 3, "group": 4,
        "reward": str(tmp_path / "rm"), "prompts": str(tmp_path / "prompts.jsonl"),
        "max_new_tokens": 6, "batch_size": 3, "minibatch_size": 5, "device": "cpu",
        "dtype": "float32"} | changes)


def weights_of(folder) -> dict:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture
def constant(tmp_path, monkeypatch):
    code = "def three(prompts, answers):\n    return [3.0] * len(answers)\n"
    return f"{own_reward(monkeypatch, tmp_path, code)}:three"


@pytest.mark.parametrize("method", ["rloo", "grpo", "dr_grpo"])
def test_a_constant_reward_moves_no_policy(tmp_path, constant, method):
    train_grpo.main(config(tmp_path, method=method, reward=constant, beta=0.0, no_end_score=3.0))
    before = weights_of(tmp_path / "sft")
    after = weights_of(tmp_path / "grpo")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert read_metrics(tmp_path / "grpo")[0]["flat_groups"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_learns_to_end_its_answers_when_that_is_what_pays(tmp_path, constant, method):
    result = train_grpo.main(config(tmp_path, method=method, reward=constant, steps=8, lr=3e-3,
                                    batch_size=8, max_new_tokens=3, beta=0.01))
    rows = read_metrics(tmp_path / "grpo")
    assert rows[0]["ended"] < 0.8 and rows[-1]["ended"] > 0.9
    assert all(row["reward"] == pytest.approx(4 * row["ended"] - 1) for row in rows)
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    assert result["reward"] == rows[-1]["reward"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_ratio_is_one_in_the_first_epoch_and_moves_in_the_second(tmp_path, monkeypatch, epochs):
    seen = []
    real = train_grpo.clipped_surrogate

    def watched(*arguments):
        surrogate, ratio, binds = real(*arguments)
        seen.append(ratio.detach())
        return surrogate, ratio, binds
    monkeypatch.setattr(train_grpo, "clipped_surrogate", watched)
    train_grpo.main(config(tmp_path, steps=1, epochs=epochs, lr=1e-2))
    assert len(seen) == 3 * epochs                         # 12 answers, 5 at once
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in seen[:3])
    assert all((ratio != 1).any() for ratio in seen[3:])


def test_a_loss_that_is_zero_by_construction_is_said_to_be(tmp_path, capsys):
    train_grpo.main(config(tmp_path, steps=1))
    assert abs(read_metrics(tmp_path / "grpo")[0]["loss"]) < 1e-6
    assert "the loss is 0 but for the KL" in capsys.readouterr().err
    train_grpo.main(config(tmp_path, steps=1, method="rloo", overwrite=True))
    assert abs(read_metrics(tmp_path / "grpo")[0]["loss"]) > 1e-3
    assert "the loss is 0" not in capsys.readouterr().err


def test_how_many_answers_are_read_at_once_changes_no_update(tmp_path):
    for size in (2, 12):
        train_grpo.main(config(tmp_path, minibatch_size=size, out=str(tmp_path / f"by{size}")))
    small, large = weights_of(tmp_path / "by2"), weights_of(tmp_path / "by12")
    for name, weight in large.items():
        torch.testing.assert_close(small[name], weight, atol=2e-5, rtol=1e-4)


def test_the_reference_and_the_reward_model_never_move_by_a_bit(tmp_path, monkeypatch):
    models = []
    forecast = Run.forecast

    def watched(self, *found, **options):
        models.extend(found)
        forecast(self, *found, **options)
    monkeypatch.setattr(Run, "forecast", watched)
    train_grpo.main(config(tmp_path, lr=1e-2))
    actor, reference, reward_model = models
    sft = load_model(tmp_path / "sft")[0].state_dict()
    assert all(torch.equal(reference.state_dict()[name], w) for name, w in sft.items())
    assert any(not torch.equal(actor.state_dict()[name], w) for name, w in sft.items())
    for name, weight in weights_of(tmp_path / "rm").items():
        assert torch.equal(reward_model.state_dict()[name], weight)


def test_the_worlds_sums_are_a_verifiable_reward(tmp_path):
    folder_of(tiny_model(context_length=200), tmp_path / "sft")
    train_grpo.main(build(Config, {
        "init": str(tmp_path / "sft"), "out": str(tmp_path / "out"), "prompts": "world",
        "families": "arithmetic", "n_prompts": 20, "reward": "gsm8k", "steps": 1, "batch_size": 2,
        "group": 2, "max_new_tokens": 4, "device": "cpu", "truncate": "drop"}))
    assert read_metrics(tmp_path / "out")[0]["true_reward"] >= 0


@pytest.mark.parametrize("changes, message", [
    ({"group": 1}, "--group 1: give a number >= 2"),
    ({"method": "ppo"}, "--method ppo: give reinforce, rloo, grpo or dr_grpo"),
    ({"method": "rloo", "epochs": 2}, "--epochs 2: only grpo, dr_grpo would read it"),
    ({"method": "reinforce", "clip": 0.3}, "--clip 0.3: only grpo, dr_grpo would read it"),
    ({"reward": "nowhere"}, "--reward nowhere: there is no such folder"),
    ({"max_new_tokens": 60}, r"prompts.jsonl:\d+: .*--truncate left"),
    ({"families": "arithmetic"}, "prompts.jsonl: families can be set for a world only"),
    ({"prompts": "world", "families": "sums"}, "no family 'sums'; there are story")])
def test_what_cannot_work_stops_before_the_first_rollout(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_grpo.main(config(tmp_path, **changes))
    assert not (tmp_path / "grpo" / "metrics.jsonl").exists()
