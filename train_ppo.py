"""
Stage 4, phase 3: policy optimisation with PPO (001 sections 4.4 and 4.5).

  4. INITIALIZE   actor, critic, frozen reference, frozen reward model, two optimizers
  5. FOR step     ROLLOUT       5.1 prompts  5.2 responses, log-probs, KL, scores, rewards, values,
                                advantages, returns
                  OPTIMIZATION  5.3 K epochs of clipped surrogate + value loss - entropy bonus
                  MONITORING    5.4 reward, KL, lengths, clip fraction, ...; adapt beta
  6. RETURN theta_aligned

Maximise  E[r_psi(x, y)] - beta KL(pi_theta || pi_ref)  through
  L = -mean min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + c1 L_critic - c2 H.

Differs from the document (Huang et al. 2024, "The N+ implementation details of RLHF with PPO"):
  4.   the critic starts from the reward model (--critic_init rm) or, as in 001, from SFT (sft).
  5.2  V_t is the value of the state before the action, V(x, y_<t): 001's V(x, y_<=t) has seen y_t,
       and an advantage over a baseline that knows the action is no advantage.
       Log-probs are recomputed by the function that 5.3 uses, in the same mini-batches, so rho_t is
       exactly 1 before the first update; sampling is at temperature 1 without top-p, else
       the samples would not come from pi_theta. A response without <|end|> scores --no_end_score.
       Advantages are whitened over the real tokens.
  5.3  mini-batches keep their members over the epochs and change order; the value loss is clipped
       and has a factor 1/2.
       Learning rates decay linearly to 0.

    python train_ppo.py                                    # the embedded world's prompts
    python train_ppo.py --prompts prompts.jsonl --reward_model out/rm
"""
import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import data
import evaluate
import forecast
import sample
import training
from model import load_model, token_logps
from train_rm import response_rewards


@dataclass
class Config:
    init: str = "out/sft"             # model folder to start from: actor and reference
    out: str = "out/ppo"              # model folder to write
    reward_model: str = "out/rm"      # model folder of the reward model
    critic_init: str = "rm"           # what the critic starts from: rm | sft
    prompts: str = "world"            # prompts: world, world:SEED or JSONL
    n_prompts: int = 10_000           # how many to take, at most
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # prompts too long for an answer to fit: error | left | drop
    max_new_tokens: int = 64          # longest response, in tokens
    temperature: float = 1.0          # of the policy: logits are divided by it everywhere
    steps: int = 30                   # rollout batches (T_PPO)
    batch_size: int = 64              # prompts per rollout and rank (B)
    minibatch_size: int = 32          # responses per update and rank
    epochs: int = 2                   # passes over a rollout (K_epochs)
    lr: float = 8e-5                  # actor's initial learning rate
    critic_lr: float = 5e-4           # critic's initial learning rate
    beta: float = 0.05                # KL coefficient to start with
    kl_target: float = 6.0            # nats per response the controller steers to; 0: beta is fixed
    kl_horizon: int = 2000            # responses over which the controller corrects
    clip: float = 0.2                 # epsilon of the surrogate and of the value clipping
    gamma: float = 1.0                # discount
    lam: float = 0.95                 # GAE's trace decay, lambda
    value_coef: float = 0.1           # c1
    entropy_coef: float = 0.0         # c2
    no_end_score: float = -1.0        # the score of a response without <|end|>
    max_norm: float = 1.0             # gradient clipping, actor and critic each
    seed: int = 0                     # of prompts and samples
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    compile: bool = False             # torch.compile: 15-25 s, on CPUs for each width of a batch
    log_every: int = 1                # steps between rows of metrics.jsonl
    save_every: int = 20              # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    overwrite: bool = False           # throw away what is in --out


# ---------------------------------------------------------------------- the math

def shaped_rewards(score: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = -beta kl_t, and the score on top at the last token (001 step 5.2).

    score: (B,). kl, mask: (B, T), mask 1 on response tokens. Returns (B, T), 0 outside the mask.
    """
    rewards = -beta * kl * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, score[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates (001 section 4.4; Schulman et al. 2016, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, V and A being 0 after
    the last token. All (B, T); the mask is one run of 1s per row. Returns advantages and returns
    G_t = A_t + V_t, both 0 outside the mask.
    """
    values = values * mask
    advantages, advantage = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(advantage)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
             clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate (001 section 4.4; Schulman et al. 2017, eq. 7), all inputs (B, T).

    Returns the loss, the ratio rho_t (B, T), 1 where pi_theta = pi_old, and the fraction of real
    tokens where clipping binds.
    """
    ratio = torch.exp((logps - old_logps) * mask)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(unclipped, clipped), mask)
    return loss, ratio, masked_mean((clipped < unclipped).float(), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               clip: float) -> Tensor:
    """0.5 mean max((V - G)^2, (V_clipped - G)^2), V_clipped within `clip` of the rollout's V."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, mask)


def adapt_beta(beta: float, kl: float, target: float, n: int, horizon: int) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) after n responses (Ziegler et al.
    2019, section 2.2): a KL above the target raises beta. target 0 leaves it."""
    if not target:
        return beta
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def values_before(critic, batch: data.Batch) -> Tensor:
    """V(x, y_<t) for every target t, (B, T-1): the critic has read all tokens before t. It reads no
    log p, unlike the reward model it may come from: trained on values alone, it unlearns that."""
    return critic(batch.tokens[:, :-1])


class Controller:
    """The KL coefficient: the only thing a checkpoint must know besides models and optimizers."""

    def __init__(self, beta: float):
        self.beta = beta

    def state_dict(self) -> dict:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict) -> None:
        self.beta = state["beta"]


# ---------------------------------------------------------------------- rollouts

@torch.no_grad()
def rollout(models: dict, tokenizer, prompts: list[list[int]], beta: float, cfg: Config,
            generator: torch.Generator) -> tuple[list[dict], list[list[int]]]:
    """001 step 5.2: responses of the actor with everything the updates need, as mini-batches.

    models: actor, critic, reference, reward_model. Returns the mini-batches, dicts of (b, T-1)
    tensors beside "batch" and "score" (b,), and the responses (token ids) in the same order.
    """
    # Generate response y ~ pi_theta(.|x)
    responses = sample.generate(models["actor"], prompts, cfg.max_new_tokens, (tokenizer.end,),
                                cfg.temperature, generator=generator)
    minibatches = []
    for first in range(0, len(prompts), cfg.minibatch_size):
        part = slice(first, first + cfg.minibatch_size)
        batch = data.response_batch(prompts[part], responses[part], tokenizer.pad,
                                    models["actor"].config.context_length)
        batch = batch.to(models["actor"].device)
        mask = batch.loss_mask[:, 1:].float()                              # (b, T-1)
        # Per-token log pi_theta_old, log pi_ref and kl_t
        old_logps = token_logps(models["actor"], batch, cfg.temperature)
        ref_logps = token_logps(models["reference"], batch, cfg.temperature)
        kl = old_logps - ref_logps
        # Reward model score R; a fixed one where the response never ended
        score = response_rewards(models["reward_model"], batch)            # (b,)
        ended = torch.tensor([r[-1] == tokenizer.end for r in responses[part]], device=score.device)
        score = torch.where(ended, score, torch.full_like(score, cfg.no_end_score))
        # r_t = -beta kl_t, plus R at the final token; V_t; GAE advantages and returns
        rewards = shaped_rewards(score, kl, mask, beta)
        values = values_before(models["critic"], batch) * mask
        advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
        minibatches.append({"batch": batch, "mask": mask, "old_logps": old_logps, "kl": kl,
                            "score": score, "ended": ended, "values": values,
                            "advantages": advantages, "returns": returns})
    whiten(minibatches)
    return minibatches, responses


def whiten(minibatches: list[dict]) -> None:
    """Advantages to mean 0 and variance 1 over the real tokens of the whole rollout, in place."""
    flat = torch.cat([m["advantages"][m["mask"] > 0] for m in minibatches])
    mean, std = flat.mean(), flat.std(correction=0) + 1e-8
    for m in minibatches:
        m["advantages"] = (m["advantages"] - mean) / std * m["mask"]


def rollout_figures(minibatches: list[dict]) -> dict:
    """001 step 5.4: what the rollout says about the policy before its updates."""
    score = torch.cat([m["score"] for m in minibatches])
    kl = torch.cat([m["kl"].sum(1) for m in minibatches])                  # k1, nats per response
    k3 = torch.cat([((torch.exp(-m["kl"]) - 1 + m["kl"]) * m["mask"]).sum(1) for m in minibatches])
    length = torch.cat([m["mask"].sum(1) for m in minibatches])
    ended = torch.cat([m["ended"] for m in minibatches]).float()
    real = [m["mask"] > 0 for m in minibatches]
    returns = torch.cat([m["returns"][keep] for m, keep in zip(minibatches, real)])
    values = torch.cat([m["values"][keep] for m, keep in zip(minibatches, real)])
    explained = 1 - (returns - values).var() / (returns.var() + 1e-8)
    return {"reward": score.mean(), "reward_std": score.std(), "reward_min": score.min(),
            "reward_max": score.max(), "kl": kl.mean(), "kl_k3": k3.mean(),
            "response_tokens": length.mean(), "ended": ended.mean(),
            "explained_variance": explained}


def main(cfg: Config) -> dict:
    run = training.start(cfg, "ppo")

    # 4. INITIALIZE: actor, critic, frozen reference, frozen reward model, optimizers
    actor, tokenizer = load_model(cfg.init, run.device, run.dtype)
    reference = copy.deepcopy(actor).requires_grad_(False)
    reward_model, rm_tokenizer = load_model(cfg.reward_model, run.device, run.dtype, head=None)
    if reward_model.config.head != "scalar" or rm_tokenizer != tokenizer:
        raise ValueError(f"--reward_model {cfg.reward_model}: it must be an --out of train_rm.py "
                         f"that uses the tokenizer of --init {cfg.init}")
    if cfg.critic_init not in ("rm", "sft"):
        raise ValueError(f"--critic_init {cfg.critic_init}: give rm or sft")
    critic = copy.deepcopy(reward_model) if cfg.critic_init == "rm" else \
        load_model(cfg.init, run.device, run.dtype, head="scalar")[0]
    for name, weight in critic.named_parameters():                     # its values read no log p
        weight.requires_grad_(name not in ("likelihood", "lm_head.weight"))
    reward_model.requires_grad_(False)
    models = {"actor": actor, "critic": critic, "reference": reference,
              "reward_model": reward_model}
    for model in models.values():                      # routers without noise: else rho_t is not 1
        model.eval()
    prompts = data.read_prompts(cfg.prompts, split="train", n=cfg.n_prompts, seed=cfg.seed,
                                bad_rows=cfg.bad_rows)
    prompts, prompt_ids = data.encode_prompts(
        prompts, tokenizer, actor.config.context_length - cfg.max_new_tokens, cfg.truncate)
    actor_forward, critic_forward = run.prepare(actor), run.prepare(critic)
    actor_optimizer = training.adamw(actor, cfg.lr, betas=(0.9, 0.95), eps=1e-5)
    critic_optimizer = training.adamw(critic, cfg.critic_lr, betas=(0.9, 0.95), eps=1e-5)
    controller = Controller(cfg.beta)
    run.track(actor=actor, critic=critic, actor_optimizer=actor_optimizer,
              critic_optimizer=critic_optimizer, controller=controller)
    longest = cfg.max_new_tokens + sum(map(len, prompt_ids)) / len(prompt_ids)
    forecast.announce(run, *models.values(), rows=cfg.minibatch_size, length=longest,
                      tokens=2 * cfg.epochs * cfg.steps * cfg.batch_size * longest)
    run.flops_per_token = 0.0                  # no MFU: the time goes into generation

    # 5. FOR step = 1 TO T_PPO
    for step in run.steps(cfg.steps):
        generator = run.generator(step)

        # ---- ROLLOUT PHASE
        # 5.1 Sample batch of prompts
        index = data.permuted(len(prompts), cfg.seed, step, cfg.batch_size, run.rank,
                              run.world_size)
        # 5.2 Responses, log-probs, KL, scores, rewards, values, advantages, returns
        minibatches, responses = rollout(models, tokenizer, [prompt_ids[i] for i in index],
                                         controller.beta, cfg, generator)
        figures = rollout_figures(minibatches)
        updates = []

        # ---- OPTIMIZATION PHASE
        # 5.3 K epochs over shuffled mini-batches
        for _epoch in range(cfg.epochs):
            for i in torch.randperm(len(minibatches), generator=generator, device=run.device):
                m = minibatches[i]
                # Recompute log pi_theta, importance ratio, clipped surrogate loss
                logps, entropy = token_logps(actor_forward, m["batch"], cfg.temperature,
                                             with_entropy=True)            # (b, T-1)
                actor_loss, ratio, clip_fraction = ppo_loss(
                    logps, m["old_logps"], m["advantages"], m["mask"], cfg.clip)
                # Value loss and entropy bonus
                values = values_before(critic_forward, m["batch"])
                critic_loss = value_loss(values, m["values"], m["returns"], m["mask"], cfg.clip)
                mean_entropy = masked_mean(entropy, m["mask"])
                # Total: L = L_actor + c1 L_critic - c2 H; update theta and phi
                loss = actor_loss + cfg.value_coef * critic_loss - cfg.entropy_coef * mean_entropy
                run.backward(loss, step)
                lr = training.linear_decay(step, cfg.steps, cfg.lr)
                critic_lr = training.linear_decay(step, cfg.steps, cfg.critic_lr)
                grad_norm = run.update(actor_optimizer, lr, cfg.max_norm, last=False)
                run.update(critic_optimizer, critic_lr, cfg.max_norm)
                updates.append(torch.stack([loss, actor_loss, critic_loss, clip_fraction,
                                            mean_entropy, ratio.max(), grad_norm]).detach())

        # 5.4 MONITORING and adaptive KL controller
        names = ("loss", "actor_loss", "value_loss", "clip_fraction", "entropy", "ratio_max",
                 "grad_norm")
        figures |= dict(zip(names, torch.stack(updates).mean(0)))
        figures |= evaluate.rollout_truth([prompts[i] for i in index], responses, tokenizer)
        run.log(step, tokens=sum(m["batch"].tokens.numel() for m in minibatches),
                beta=controller.beta, lr=lr, **figures)
        controller.beta = adapt_beta(controller.beta, run.mean_over_ranks(figures["kl"].item()),
                                     cfg.kl_target, cfg.batch_size * run.world_size, cfg.kl_horizon)
        run.checkpoint(step)

    # 6. RETURN theta_aligned
    return run.finish(actor, tokenizer, {"kl": run.last["kl"], "reward": run.last["reward"]})


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
