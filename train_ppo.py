"""
Stage 4, phase 3: policy optimisation with PPO (001 sections 4.4 and 4.5).

  4. INITIALIZE   actor, critic, frozen reference, frozen reward model, two Adams
  5. FOR step     ROLLOUT       5.1 prompts  5.2 responses, old and reference log-probs, KL, score,
                                reward signal, values, advantages, returns
                  OPTIMIZATION  5.3 K epochs of clipped surrogate + value loss - entropy bonus
                  MONITORING    5.4 reward, KL, lengths, clip fraction, ...; adapt beta
  6. RETURN theta_aligned
Maximise  E[r_psi(x, y)] - beta KL(pi_theta || pi_ref)  through
  L = -mean min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + c1 L_critic - c2 H.
Differs from the document (Huang et al. 2024, "The N+ implementation details of RLHF with PPO"):
  4.   the critic starts from the reward model (--critic_init rm) or, as in 001, from SFT (sft), or
       is a head on the actor (shared).
  5.2  V_t is the value of the state before the action, V(x, y_<t): 001's V(x, y_<=t) has seen y_t,
       and an advantage over a baseline that knows the action is no advantage.
       Log-probs are recomputed by the function that 5.3 uses, in the same mini-batches, so rho_t is
       exactly 1 before the first update; no top-p, and one --temperature for sampling and
       log-probs, else the samples would not come from pi_theta. A response without <|end|> scores
       --no_end_score. Advantages are whitened over the real tokens.
  5.3  mini-batches keep their members over the epochs and change order; the value loss is clipped
       and has a factor 1/2; gradients are clipped; Adam's eps is 1e-5; learning rates decay
       linearly to 0.

    python train_ppo.py --prompts prompts.jsonl --reward out/rm1,out/rm2 --combine min
"""
import copy
import math
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor, nn

import evaluate
import lora
import sample
import scoring
from data import permuted, prompts_to_answer, response_batch
from heads import WithHead
from mitigations import look, read_gold, read_lm_data, why_stop
from plumbing.folders import load_model
from plumbing.optimizers import linear_decay, pick_optimizer
from plumbing.options import Options, command_line, nested, refuse_unread
from plumbing.run import start
from rewards import Reward
from scoring import kl_k1, kl_k3, last_place, masked_mean, mean_figures, token_logps

READ_BY = {"kl_horizon": ("--kl_target",), "lm_data": ("--lm_coef",), "gold_every": ("--gold",),
           "gold_prompts": ("--gold",), "gold_patience": ("--gold",)}


@dataclass
class Config(Options):
    init: str = "out/sft"             # model folder to start from: actor and reference
    out: str = "out/ppo"              # model folder to write
    reward: str = "out/rm"            # out/rm, several of them, world, gsm8k, module:function
    reward_model: str = ""            # --reward by its former name
    combine: str = "min"              # several reward models: min | mean | mean-std
    critic_init: str = "rm"           # what the critic starts from: rm | sft | shared (the actor)
    prompts: str = "world"            # prompts: world, world:SEED or JSONL
    n_prompts: int = 10_000           # how many to take, at most, >= 1
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # prompts too long for an answer to fit: error | left | drop
    max_new_tokens: int = 64          # longest response, in tokens, >= 1
    temperature: float = 1.0          # of the policy: logits are divided by it everywhere, > 0
    steps: int = 30                   # rollout batches (T_PPO), >= 1
    batch_size: int = 64              # prompts per rollout and rank (B), >= 1
    minibatch_size: int = 32          # responses per update and rank, >= 1
    epochs: int = 2                   # passes over a rollout (K_epochs), >= 1
    lr: float = 8e-5                  # actor's initial learning rate (document: 1e-6)
    critic_lr: float = 5e-4           # critic's initial learning rate (document: 1e-6)
    beta: float = 0.05                # KL coefficient to start with
    kl_target: float = 6.0            # nats per response the controller steers to; 0: beta is fixed
    kl_horizon: int = 2000            # responses over which the controller corrects, > 0
    clip: float = 0.2                 # epsilon of surrogate and value clipping, in (0, 1)
    gamma: float = 1.0                # discount, in [0, 1]
    lam: float = 0.95                 # GAE's trace decay, lambda, in [0, 1]
    value_coef: float = 0.1           # c1
    entropy_coef: float = 0.0         # c2
    no_end_score: float = -1.0        # the score of a response without <|end|>, any number
    lm_coef: float = 0.0              # of -log p per token on --lm_data: less is forgotten
    lm_data: str = "world"            # demonstrations, as for train_sft.py
    kl_budget: float = 0.0            # nats per response: the last rollout inside is kept; 0: none
    gold: str = ""                    # another --reward, which decides when to stop; empty: none
    gold_every: int = 5               # steps between its looks at held-out prompts, >= 1
    gold_prompts: int = 200           # how many of them, >= 1
    gold_patience: int = 2            # looks without a better policy before it stops, >= 1
    max_norm: float = 1.0             # gradient clipping, actor and critic each, > 0
    log_every: int = 1                # steps between rows of metrics.jsonl
    save_every: int = 20              # steps between checkpoints
    adapters: lora.Options = nested(lora.Options)          # what trains of the actor


# ---------------------------------------------------------------------- the math

def shaped_rewards(score: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = -beta kl_t, and the score on top at the last token (001 step 5.2).

    score: (B,). kl, mask: (B, T), mask 1 on response tokens. Returns (B, T), 0 outside the mask.
    """
    rewards = -beta * kl * mask
    place = last_place(mask)                                               # (B, 1)
    return rewards.scatter_add(1, place, score[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> Tensor:
    """Generalized advantage estimates (001 section 4.4; Schulman et al. 2016, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, V and A being 0 after
    the last token. All (B, T); the mask is one run of 1s per row. The returns are A_t + V_t.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(values[:, 0])                             # (B,) A_{t+1}
    next_value = torch.zeros_like(values[:, 0])                            # (B,) V_{t+1}
    for t in reversed(range(values.shape[1])):
        value = values[:, t]                                               # (B,) V_t
        delta = rewards[:, t] + gamma * next_value - value
        advantage = delta + gamma * lam * advantage
        advantage = advantage * mask[:, t]
        advantages[:, t] = advantage
        next_value = value
    return advantages


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
             clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate (001 section 4.4; Schulman et al. 2017, eq. 7), all inputs (B, T).

    Returns the loss, the ratio rho_t (B, T), 1 where pi_theta = pi_old, and the fraction of real
    tokens where clipping binds.
    """
    surrogate, ratio, binds = scoring.clipped_surrogate(logps, old_logps, advantages, mask, clip)
    loss = masked_mean(surrogate, mask)
    clip_fraction = masked_mean(binds, mask)
    return loss, ratio, clip_fraction


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               clip: float) -> Tensor:
    """0.5 mean max((V - G)^2, (V_clipped - G)^2), V_clipped within `clip` of the rollout's V."""
    change = (values - old_values).clamp(-clip, clip)
    clipped = old_values + change
    error = (values - returns) ** 2
    clipped_error = (clipped - returns) ** 2
    larger = torch.maximum(error, clipped_error)
    return 0.5 * masked_mean(larger, mask)


def adapt_beta(beta: float, kl: float, target: float, n: int, horizon: int) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) after n responses (Ziegler et al.
    2019, section 2.2): a KL above the target raises beta. target 0 leaves it."""
    if not target:
        return beta
    too_far = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + too_far * n / horizon)


class Controller:
    """For checkpoints: the KL coefficient beta; --gold's best score, and how many looks ago."""

    def __init__(self, beta: float):
        self.beta = beta
        self.best_gold = -math.inf
        self.looks_since = 0

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


# ---------------------------------------------------------------------- rollouts

def whiten(rollouts: list[dict]) -> None:
    """Advantages to mean 0 and variance 1 over the real tokens of this rank's rollout, in place."""
    flat = of_tokens(rollouts, "advantages")
    mean = flat.mean()
    std = flat.std(correction=0) + 1e-8
    for r in rollouts:
        whitened = (r["advantages"] - mean) / std
        r["advantages"] = whitened * r["mask"]


def of_tokens(rollouts: list[dict], name: str) -> Tensor:
    """(n,) a figure of all real tokens, one after another."""
    return torch.cat([r[name][r["mask"] > 0] for r in rollouts])


def rollout_figures(rollouts: list[dict]) -> dict[str, Tensor]:
    """What the rollout says about the policy before its updates (001 step 5.4)."""
    score = torch.cat([r["score"] for r in rollouts])                      # (B,), as all these
    ended = torch.cat([r["ended"] for r in rollouts])
    kl = torch.cat([r["kl"].sum(1) for r in rollouts])                     # nats per response
    k3 = torch.cat([r["kl_k3"].sum(1) for r in rollouts])                  # 0 outside the mask
    length = torch.cat([r["mask"].sum(1) for r in rollouts])               # tokens
    figures = {"reward": score.mean(), "reward_std": score.std()}
    figures["reward_min"] = score.min()
    figures["reward_max"] = score.max()
    figures["kl"] = kl.mean()
    figures["kl_k3"] = k3.mean()
    figures["response_tokens"] = length.mean()
    figures["ended"] = ended.float().mean()
    returns = of_tokens(rollouts, "returns")
    values = of_tokens(rollouts, "values")
    unexplained = (returns - values).var()
    variance = returns.var() + 1e-8
    figures["explained_variance"] = 1 - unexplained / variance
    return figures


def load_critic(actor, reward: Reward, cfg: Config, run) -> tuple[WithHead, nn.Module]:
    """A copy of the (first) reward model, theta_SFT with a new scalar head, or a head on the actor;
    and phi, the part of it that is not the actor's.

    Raises ValueError where there is no reward model to copy, and for one trunk on several ranks.
    """
    if cfg.critic_init == "shared":
        if run.world_size > 1:
            raise ValueError("--critic_init shared: one process only, because DDP would average "
                             "the trunk's gradients twice; give rm or sft")
        critic = WithHead(actor, 1, keep_lm_head=True)
        return critic, critic.head
    if cfg.critic_init == "rm":
        if not reward.models:
            raise ValueError(f"--reward {cfg.reward} is no reward model that the critic could "
                             "start from; give --critic_init sft")
        critic = copy.deepcopy(reward.models[0]).requires_grad_(True)
        if not critic.config.tied:
            critic.trunk.lm_head.requires_grad_(False)     # values do not depend on it
    else:
        trunk, _ = load_model(cfg.init, run.device, run.dtype)
        critic = WithHead(trunk, 1)
    return critic, critic


def main(cfg: Config) -> dict:
    refuse_unread(cfg, READ_BY)
    if cfg.kl_budget and cfg.gold:
        raise ValueError("--kl_budget and --gold both say which policy to keep; give one of them")
    if cfg.reward_model and cfg.reward != Config.reward:
        raise ValueError("--reward_model is --reward by its former name; give one of them")
    cfg = replace(cfg, reward=cfg.reward_model or cfg.reward, reward_model="")
    run = start(cfg, __file__)

    # 4. INITIALIZE: actor, critic, frozen reference, frozen reward model(s), optimizers
    actor, tokenizer = load_model(cfg.init, run.device, run.dtype)
    lora.begin(actor, cfg.adapters, run)
    reference = lora.reference_of(actor, cfg.adapters)
    end = tokenizer.end
    b = cfg.minibatch_size
    reward = Reward(cfg.reward, cfg.combine, tokenizer, run.device, run.dtype, b)
    critic, phi = load_critic(actor, reward, cfg, run)
    for model in (actor, critic, reference):
        model.eval()                           # because with noisy routers rho_t would not be 1
    length = actor.config.context_length
    prompts, prompt_ids = prompts_to_answer(cfg, tokenizer, length)
    actor_forward = run.prepare(actor, "logps")
    critic_forward = run.prepare(critic)
    actor_optimizer = pick_optimizer("adam", actor, cfg.lr, 0.0, run.dtype, eps=1e-5)
    critic_optimizer = pick_optimizer("adam", phi, cfg.critic_lr, 0.0, run.dtype, eps=1e-5)
    controller = Controller(cfg.beta)
    lm_data = read_lm_data(cfg, tokenizer, length)
    gold = read_gold(cfg, run, tokenizer, length)
    # a copy of the actor as it was when a mitigation last approved of it
    kept = {}
    if cfg.kl_budget or cfg.gold:
        kept["kept"] = copy.deepcopy(actor)
    run.track(actor=actor, critic=phi, actor_optimizer=actor_optimizer,
              critic_optimizer=critic_optimizer, controller=controller, **kept)
    length_read = mean(map(len, prompt_ids)) + cfg.max_new_tokens
    n_read = cfg.batch_size * cfg.steps * cfg.epochs * 2                   # 2: by the critic, too
    run.forecast(actor, phi, reference, *reward.models, rows=b, length=length_read,
                 log_mfu=False, tokens=n_read * length_read)

    # 5. FOR step = 1 TO T_PPO
    for step in run.steps(cfg.steps):
        generator = run.generator(step)

        # ---- ROLLOUT PHASE
        # 5.1 Sample batch of prompts
        index = permuted(len(prompts), cfg.seed, step, cfg.batch_size, run.rank, run.world_size)
        asked = [prompts[i] for i in index]
        x = [prompt_ids[i] for i in index]

        # 5.2 FOR each prompt: all that the updates need, in mini-batches, (b, T-1) each
        y = sample.generate(actor, x, cfg.max_new_tokens, (end,), cfg.temperature,
                            generator=generator)                           # generate y ~ pi_theta
        rollouts = []
        with torch.no_grad():
            for first in range(0, len(x), b):
                rows = slice(first, first + b)
                asked_now = asked[rows]
                x_now = x[rows]
                y_now = y[rows]
                batch = response_batch(x_now, y_now, tokenizer.pad, length).to(run.device)
                mask = batch.loss_mask[:, 1:].float()                      # 1 on tokens of y
                old_logps = token_logps(actor.logps, batch, cfg.temperature)       # old log-probs
                ref_logps = token_logps(reference.logps, batch, cfg.temperature)   # reference's
                kl = kl_k1(old_logps, ref_logps)                           # KL of each token, nats
                k3 = kl_k3(old_logps, ref_logps)
                score, ended = scoring.score_responses(reward, asked_now, x_now, y_now, end,
                                                       cfg.no_end_score)   # score R (b,)
                rewards = shaped_rewards(score, kl, mask, controller.beta)     # reward signal r_t
                values = scoring.values_before(critic, batch) * mask       # values V_t
                advantages = gae(rewards, values, mask, cfg.gamma, cfg.lam)    # advantages A_t
                returns = advantages + values                              # returns G_t
                rollouts.append({
                    "batch": batch, "mask": mask, "old_logps": old_logps, "kl": kl, "kl_k3": k3,
                    "score": score, "ended": ended, "values": values, "advantages": advantages,
                    "returns": returns})
        whiten(rollouts)                       # the scale of A_t must not change the step's size
        figures = rollout_figures(rollouts)
        mean_kl = run.mean_over_ranks(figures["kl"].item())
        if gold and step % cfg.gold_every == 0:
            figures["gold"] = look(gold, actor, tokenizer, cfg)
        reason = ""
        if kept:
            reason = why_stop(actor, kept["kept"], controller, mean_kl, figures, cfg)
        if reason:
            run.say(f"step {step}: {reason}; the policy kept before is the result")
            break

        # ---- OPTIMIZATION PHASE
        # 5.3 FOR epoch = 1 TO K_epochs, over shuffled mini-batches
        updates = []
        for _epoch in range(cfg.epochs):
            order = torch.randperm(len(rollouts), generator=generator, device=run.device)
            for i in order:
                r = rollouts[i]
                batch = r["batch"]
                mask = r["mask"]                                           # (b, T-1)
                advantages = r["advantages"]
                returns = r["returns"]
                # Recompute log pi_theta, importance ratio, clipped surrogate loss
                logps, entropy = token_logps(actor_forward, batch, cfg.temperature,
                                             with_entropy=True)            # (b, T-1)
                actor_loss, ratio, clip_fraction = ppo_loss(logps, r["old_logps"], advantages,
                                                            mask, cfg.clip)
                # Value loss and entropy bonus
                values = scoring.values_before(critic_forward, batch)
                critic_loss = value_loss(values, r["values"], returns, mask, cfg.clip)
                mean_entropy = masked_mean(entropy, mask)
                # Total: L = L_actor + c1 L_critic - c2 H
                loss = actor_loss + cfg.value_coef * critic_loss - cfg.entropy_coef * mean_entropy
                if lm_data:
                    per_step = cfg.epochs * len(rollouts)
                    number = step * per_step + len(updates)
                    lm_batch = lm_data.batch(number, 4, run.rank, run.world_size)
                    lm_logps = token_logps(actor_forward, lm_batch.to(run.device))
                    lm_loss = -lm_logps.sum() / lm_batch.n_targets
                    loss = loss + cfg.lm_coef * lm_loss
                # Backpropagate, update theta and phi
                run.backward(loss)
                grad_norm = run.clip(actor, cfg.max_norm)
                critic_grad_norm = run.clip(phi, cfg.max_norm)
                lr = linear_decay(step, cfg.steps, cfg.lr)
                critic_lr = linear_decay(step, cfg.steps, cfg.critic_lr)
                run.step(actor_optimizer, lr, loss, grad_norm)
                run.step(critic_optimizer, critic_lr, loss, critic_grad_norm)
                actor_optimizer.zero_grad()
                critic_optimizer.zero_grad()
                ratio_max = ratio.max()
                updates.append({"loss": loss, "actor_loss": actor_loss, "value_loss": critic_loss,
                                "clip_fraction": clip_fraction, "entropy": mean_entropy,
                                "ratio_max": ratio_max, "grad_norm": grad_norm})

        # 5.4 MONITORING, and the adaptive KL controller
        figures |= mean_figures(updates)
        figures |= evaluate.rollout_truth(asked, y, tokenizer)
        tokens = sum(r["batch"].tokens.numel() for r in rollouts)
        beta = controller.beta
        run.log(step, tokens=tokens, beta=beta, lr=lr, **figures)
        n = cfg.batch_size * run.world_size
        controller.beta = adapt_beta(beta, mean_kl, cfg.kl_target, n, cfg.kl_horizon)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    # 6. RETURN theta_aligned
    if kept:
        actor.load_state_dict(kept["kept"].state_dict())
    lora.end(actor, cfg.adapters, run)
    return run.finish(actor, tokenizer, run.last("kl", "reward"))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
