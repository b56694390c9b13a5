"""
Stage 4, policy optimisation without a critic: REINFORCE, RLOO, GRPO, Dr. GRPO (001 section 4.2).

  1. INITIALIZE   actor, frozen reference, the reward, Adam
  2. FOR step     2.1 prompts  2.2 G answers to each, log-probs, KL, rewards
                  2.3 advantages  2.4 K epochs: loss, update  2.5 monitor
  3. RETURN theta_aligned

Several answers to one prompt are held against each other: what is better than its neighbours gets
likelier, and no critic has to guess what an answer will be worth. For answer i of a group, R_i its
reward, the advantage A_i is the same for all of its tokens:

  --method    A_i                                 loss of an answer                      KL
  reinforce   R_i - mean of earlier batches       -A_i log pi(y_i)                       in R_i
  rloo        R_i - mean of the other G - 1       -A_i log pi(y_i)                       in R_i
  grpo        (R_i - mean) / (std + 1e-4)         sum_t surrogate_t / |y_i|              in the loss
  dr_grpo     R_i - mean                          sum_t surrogate_t / max_new_tokens     in the loss

  surrogate_t = -min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps) A_i),  rho_t = pi_theta / pi_old
  KL in R_i: -beta sum_t log(pi / pi_ref);  in the loss: +beta k3 of each token.

Sources: Williams 1992; Ahmadian et al. 2024 (RLOO); Shao et al. 2024 (GRPO; std divides by G - 1);
Liu et al. 2025 (Dr. GRPO: neither the std nor |y_i|, which favour easy prompts and long mistakes).
With the KL in R_i the policy goes to 4.6.2's pi*; k3 in the loss has the gradient of KL(pi_ref ||
pi), and another limit (Tang and Munos 2025).

    python train_grpo.py --method rloo --reward world --families arithmetic
"""
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

import evaluate
import lora
import sample
import scoring
from data import permuted, prompts_to_answer, response_batches
from plumbing.folders import load_model
from plumbing.optimizers import linear_decay, pick_optimizer
from plumbing.options import Options, command_line, nested, refuse_unread
from plumbing.run import start
from rewards import Reward
from scoring import clipped_surrogate, kl_k1, kl_k3, masked_mean, mean_figures, token_logps

ONE_STEP = ("reinforce", "rloo")               # without a ratio a batch is right for one step only
READ_BY = {"clip": ("grpo", "dr_grpo"), "epochs": ("grpo", "dr_grpo")}


@dataclass
class Config(Options):
    init: str = "out/sft"             # model folder to start from: actor and reference
    out: str = "out/grpo"             # model folder to write
    reward: str = "out/rm"            # out/rm, several of them, world, gsm8k, module:function
    combine: str = "min"              # several reward models: min | mean | mean-std
    method: str = "grpo"              # reinforce | rloo | grpo | dr_grpo
    prompts: str = "world"            # prompts: world, world:SEED or JSONL
    families: str = ""                # of the world's prompts, with commas; empty: all trained ones
    n_prompts: int = 10_000           # how many to take, at most, >= 1
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # prompts too long for an answer to fit: error | left | drop
    max_new_tokens: int = 64          # longest response, in tokens, >= 1
    temperature: float = 1.0          # of the policy: logits are divided by it everywhere, > 0
    group: int = 8                    # answers to each prompt (G), >= 2
    steps: int = 100                  # rollout batches, >= 1
    batch_size: int = 8               # prompts per rollout and rank, >= 1
    minibatch_size: int = 32          # answers read at once: memory, not mathematics, >= 1
    epochs: int = 1                   # updates per rollout (K), each over all of it, >= 1
    lr: float = 1.5e-4                # initial learning rate
    beta: float = 0.2                 # KL coefficient (results: dr_grpo .6, rloo, reinforce .5)
    clip: float = 0.2                 # epsilon of grpo and dr_grpo, in (0, 1)
    no_end_score: float = -1.0        # the score of a response without <|end|>, any number
    max_norm: float = 1.0             # gradient clipping, > 0
    log_every: int = 1                # steps between rows of metrics.jsonl
    save_every: int = 20              # steps between checkpoints
    adapters: lora.Options = nested(lora.Options)          # what trains


def advantages_of(rewards: Tensor, method: str, baseline: float = 0.0) -> Tensor:
    """rewards (prompts, G) -> advantages (prompts, G) by --method; baseline: reinforce's."""
    mean = rewards.mean(1, keepdim=True)
    if method == "reinforce":
        return rewards - baseline
    if method == "rloo":
        G = rewards.shape[1]
        total = rewards.sum(1, keepdim=True)
        others = (total - rewards) / (G - 1)                               # mean of the other G - 1
        return rewards - others
    if method == "grpo":
        return (rewards - mean) / (rewards.std(1, keepdim=True) + 1e-4)
    return rewards - mean                                                  # dr_grpo


def policy_gradient_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    """-A_i log pi(y_i), (b,) (Williams 1992). logps (b, T), 0 outside answers; advantages (b,)."""
    return -advantages * logps.sum(1)


def answer_losses(logps: Tensor, rollout: dict, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each answer by --method, (b,), and what the log says of it."""
    mask = rollout["mask"]
    if cfg.method in ONE_STEP:
        return policy_gradient_loss(logps, rollout["advantages"]), {}
    advantages = rollout["advantages"][:, None]                            # (b, 1)
    surrogate, ratio, binds = clipped_surrogate(logps, rollout["old_logps"], advantages, mask,
                                                cfg.clip)                  # (b, T) each
    k3 = kl_k3(logps, rollout["ref_logps"])
    penalty = cfg.beta * k3 * mask
    length = mask.sum(1) if cfg.method == "grpo" else cfg.max_new_tokens
    figures = {"ratio_max": ratio.max(), "clip_fraction": masked_mean(binds, mask)}
    return (surrogate + penalty).sum(1) / length, figures


class Baseline:
    """reinforce's: a running mean of earlier batches' rewards; a checkpoint must know it."""

    def __init__(self):
        self.value = None

    def update(self, mean_reward: float) -> None:
        if self.value is None:
            self.value = mean_reward
        self.value += 0.1 * (mean_reward - self.value)

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def rollout_figures(score: Tensor, kl: Tensor, ended: Tensor) -> dict[str, Tensor]:
    """Of the policy before its update. score (prompts, G); kl, nats per response, ended (N,)."""
    spread = score.std(1)
    return {"reward": score.mean(), "reward_std": score.std(), "group_std": spread.mean(),
            "flat_groups": (spread < 1e-6).float().mean(),     # they teach nothing but the KL
            "kl": kl.mean(), "ended": ended.float().mean()}


def main(cfg: Config) -> dict:
    refuse_unread(cfg, READ_BY)
    run = start(cfg, __file__)

    # 1. INITIALIZE: actor, frozen reference, the reward, optimizer
    actor, tokenizer = load_model(cfg.init, run.device, run.dtype)
    actor.eval()                               # because with noisy routers rho_t would not be 1
    lora.begin(actor, cfg.adapters, run)
    reference = lora.reference_of(actor, cfg.adapters)
    reward = Reward(cfg.reward, cfg.combine, tokenizer, run.device, run.dtype)
    length = actor.config.context_length
    options = {}
    if cfg.families:
        options["families"] = tuple(cfg.families.split(","))
    prompts, prompt_ids = prompts_to_answer(cfg, tokenizer, length, **options)
    forward = run.prepare(actor, "logps")
    optimizer = pick_optimizer("adam", actor, cfg.lr, 0.0, run.dtype, eps=1e-5)
    baseline = Baseline()
    run.track(actor=actor, optimizer=optimizer, baseline=baseline)
    if cfg.method == "grpo":                   # its gradient is not 0
        run.say("the loss is 0 but for the KL in each first update, because rho_t is 1 and the A_i "
                "of a group add up to 0; whether it learns is seen in reward and kl")
    length_read = mean(map(len, prompt_ids)) + cfg.max_new_tokens
    n_answers = cfg.batch_size * cfg.group
    n_read = n_answers * cfg.steps * cfg.epochs
    run.forecast(actor, reference, *reward.models, rows=cfg.minibatch_size, length=length_read,
                 log_mfu=False, tokens=n_read * length_read)

    # 2. FOR step = 1 TO T
    for step in run.steps(cfg.steps):
        # 2.1 Sample batch of prompts
        index = permuted(len(prompts), cfg.seed, step, cfg.batch_size, run.rank, run.world_size)
        asked = [prompts[i] for i in index for _ in range(cfg.group)]
        x = [prompt_ids[i] for i in index]

        # 2.2 G answers y ~ pi_theta(.|x) to each of N / G prompts, log-probs, KL and rewards
        y = sample.generate(actor, x, cfg.max_new_tokens, (tokenizer.end,), cfg.temperature,
                            generator=run.generator(step), group=cfg.group)   # N
        x = [ids for ids in x for _ in range(cfg.group)]
        score, ended = scoring.score_responses(reward, asked, x, y, tokenizer.end,
                                               cfg.no_end_score)           # (N,)
        rollouts = []
        with torch.no_grad():
            for batch in response_batches(x, y, tokenizer.pad, length, cfg.minibatch_size):
                batch = batch.to(run.device)
                old_logps = token_logps(actor.logps, batch, cfg.temperature)       # (b, T-1)
                ref_logps = token_logps(reference.logps, batch, cfg.temperature)
                kl = kl_k1(old_logps, ref_logps).sum(1)                    # nats, (b,)
                mask = batch.loss_mask[:, 1:].float()
                rollouts.append({"batch": batch, "mask": mask, "old_logps": old_logps,
                                 "ref_logps": ref_logps, "kl": kl})
        kl = torch.cat([r["kl"] for r in rollouts])                        # (N,)
        rewards = score                                                    # R_i
        if cfg.method in ONE_STEP:
            rewards = score - cfg.beta * kl

        # 2.3 Advantages, from each prompt's own group
        mean_reward = run.mean_over_ranks(rewards.mean().item())
        if baseline.value is None:             # the first batch, which has no earlier one
            baseline.update(mean_reward)
        groups = rewards.view(-1, cfg.group)
        advantages = advantages_of(groups, cfg.method, baseline.value)
        for r, part in zip(rollouts, advantages.flatten().split(cfg.minibatch_size)):
            r["advantages"] = part
        baseline.update(mean_reward)                                       # for later batches

        # 2.4 K epochs, one update each: the mean loss over all answers
        updates = []
        for _epoch in range(cfg.epochs):
            total_loss = 0.0
            for r in rollouts:
                forward.require_backward_grad_sync = r is rollouts[-1]
                logps = token_logps(forward, r["batch"], cfg.temperature)  # (b, T-1)
                losses, figures = answer_losses(logps, r, cfg)             # (b,)
                loss = losses.sum() / n_answers
                run.backward(loss)
                total_loss += loss.detach()
                updates.append(figures)
            grad_norm = run.clip(actor, cfg.max_norm)
            lr = linear_decay(step, cfg.steps, cfg.lr)
            run.step(optimizer, lr, total_loss, grad_norm)
            optimizer.zero_grad()

        # 2.5 MONITORING
        figures = rollout_figures(score.view(-1, cfg.group), kl, ended)
        figures["response_tokens"] = mean(map(len, y))
        figures |= mean_figures(updates)
        figures |= evaluate.rollout_truth(asked, y, tokenizer)
        tokens = sum(r["batch"].tokens.numel() for r in rollouts)
        run.log(step, tokens=tokens, loss=total_loss, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    lora.end(actor, cfg.adapters, run)
    # 3. RETURN theta_aligned
    return run.finish(actor, tokenizer, run.last("kl", "reward"))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
