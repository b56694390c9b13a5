"""
Stage 4, phase 2: the reward model (001 sections 4.4 and 4.5).

  1. INITIALIZE     psi <- theta_SFT, the LM head replaced by a scalar head W_r, b_r, Adam
  2. FOR step       2.1 sample pairs  2.2 r_w, r_l  2.3 loss  2.4 update  2.5 held-out accuracy
  3. Freeze r_psi

Minimise  L = -mean log sigma(r_psi(x, y_w) - r_psi(x, y_l))  (Bradley-Terry), where r_psi(x, y) =
W_r h_last + b_r is read at the last token of the response, its <|end|>. --loss changes 2.3:

  bt             -log sigma(r_w - r_l)                     pairs
  margin         -log sigma(r_w - r_l - m)                 pairs that say how much better: m
                                                           (Touvron et al. 2023)
  pointwise      (r - rating)^2                            an answer's rating, in [0, 1]
  plackett_luce  -sum_k log softmax(r_k, ..., r_K)_k       a ranking of K answers, best first
                                                           (Plackett 1975; Luce 1959)

Differs from the document:
  2.4  the gradient is clipped; the learning rate warms up and falls by a cosine to a tenth.
  3    b_r is shifted so that the SFT model's own answers score 0 on average: the loss cannot see a
       constant added to all rewards, and in PPO 0 then means "as before" (Huang et al. 2024).

    python train_rm.py                                     # the embedded world's preferences
    python train_rm.py --data pairs.jsonl --truncate left
    python train_rm.py --seed 1 --out out/rm1              # another of an ensemble (rewards.py)

What it knows: diagnostics.png, and "diagnostics" in config.json's result (diagnostics.py).
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import diagnostics
import evaluate
import lora
import sample
from data import PreferencePairs, response_batch
from heads import WithHead
from plumbing.folders import load_model
from plumbing.optimizers import learning_rate, pick_optimizer
from plumbing.options import Options, command_line, nested
from plumbing.run import start
from preferences import margins_of, n_answers, numbers, read_ranked
from readers import read_prompts
from scoring import ranked_right, response_rewards, score_pairs


@dataclass
class Config(Options):
    init: str = "out/sft"             # model folder to start from
    out: str = "out/rm"               # model folder to write
    loss: str = "bt"                  # bt | margin | pointwise | plackett_luce
    data: str = "world"               # pairs, ratings or rankings: world, world:SEED or JSONL
    n_pairs: int = 19_200             # how many of them to take, at most, >= 1
    label_noise: float = 0.0          # the world's annotators err with this probability, in [0, 1]
    length_bias: float = 0.0          # ... or go by length alone with this one, in [0, 1]
    disagreement: float = 0.0         # ... or weigh the axes each in their own way
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # pairs longer than the context: error | left | drop
    context_length: int = 0           # tokens of prompt and answer; 0: the model's own
    prompts: str = ""                 # to sample SFT answers for the shift; empty: those of --data
    n_shift: int = 200                # SFT answers whose mean reward becomes 0, >= 1
    max_new_tokens: int = 64          # longest of those answers, in tokens, >= 1
    steps: int = 1200                 # optimizer steps (T_RM), >= 1
    batch_size: int = 16              # pairs, ratings or rankings per step and rank, >= 1
    optimizer: str = "adam"           # adam | adamw | muon: with --lr 1e-3 gains .3 points
    lr: float = 3e-4                  # peak learning rate (document, large models: 1e-5)
    warmup: int = 30                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only; adam: none
    max_norm: float = 1.0             # gradient clipping, > 0
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    eval_every: int = 200             # steps between evaluations
    eval_pairs: int = 1000            # held-out pairs, >= 1
    save_every: int = 200             # steps between checkpoints
    adapters: lora.Options = nested(lora.Options)          # what trains besides the head


def bradley_terry_loss(r_w: Tensor, r_l: Tensor) -> Tensor:
    """-log sigma(r_w - r_l), mean over pairs (001 section 4.4). log 2 when nothing is known."""
    return -F.logsigmoid(r_w - r_l).mean()


def margin_loss(r_w: Tensor, r_l: Tensor, m: Tensor) -> Tensor:
    """-log sigma(r_w - r_l - m), mean over pairs; m >= 0: how much better y_w is (Touvron et al.
    2023). m = 0 is Bradley-Terry."""
    return -F.logsigmoid(r_w - r_l - m).mean()


def pointwise_loss(r: Tensor, ratings: Tensor) -> Tensor:
    """(r - rating)^2, mean over answers; both (B,)."""
    return F.mse_loss(r, ratings)


def plackett_luce_loss(rewards: Tensor, n: Tensor) -> Tensor:
    """-log p(ranking), mean over rankings: the best is drawn first, with probability e^r_k / the
    sum over all that are left, then the next best of the rest.

    rewards: (B, K), best first; n: (B,) how many answers each ranking has. With K = 2 this is
    Bradley-Terry.
    """
    is_there = torch.arange(rewards.shape[1], device=rewards.device) < n[:, None]
    # -1e9 and not -inf, which would have a gradient of NaN
    rewards = torch.where(is_there, rewards, -1e9)
    left = rewards.flip(1).logcumsumexp(1).flip(1)                             # log sum_{j >= k}
    log_p = torch.where(is_there, rewards - left, 0.0)
    return -log_p.sum(1).mean()


def loss_of(rewards: Tensor, items: list[dict], cfg: Config) -> Tensor:
    """The loss of --loss. rewards: (K, B), best answers first; items: what stands in the data."""
    if cfg.loss == "bt":
        r_w, r_l = rewards                                                     # (B,) each
        return bradley_terry_loss(r_w, r_l)
    if cfg.loss == "margin":
        r_w, r_l = rewards
        return margin_loss(r_w, r_l, numbers(items, "margin").to(rewards.device))
    if cfg.loss == "pointwise":
        return pointwise_loss(rewards[0], numbers(items, "rating").to(rewards.device))
    return plackett_luce_loss(rewards.T, n_answers(items).to(rewards.device))


@torch.no_grad()
def heldout_figures(model: WithHead, heldout: PreferencePairs, cfg: Config) -> dict:
    """Loss, accuracy and calibration error on what is not trained on."""
    total = 0.0
    margins = []
    for batch in heldout.epoch(cfg.batch_size):
        items = heldout.items(batch.index)
        rewards = response_rewards(model, batch.to(model.device)).view(-1, len(items)).cpu()
        total += loss_of(rewards, items, cfg).item() * len(items)
        margins.append(margins_of(rewards, items))
    margin = torch.cat(margins)
    return {"val_loss": total / len(heldout), "accuracy": ranked_right(margin),
            "ece": evaluate.calibration_error(margin)}


def simple_rankers(sft, pairs: PreferencePairs, cfg: Config) -> dict[str, float]:
    """How many pairs are ranked right with no reward model at all: by length alone, and by
    log p(y|x) under the SFT model. A reward model should do better than both."""
    if cfg.loss not in ("bt", "margin"):       # no pairs
        return {}
    logp_w, logp_l = score_pairs(sft, pairs, cfg.batch_size).unbind(1)         # (N,) each
    return {"length_accuracy": evaluate.length_accuracy(pairs),
            "likelihood_accuracy": ranked_right(logp_w - logp_l).item()}


def read_shift_prompts(cfg: Config, context_length: int) -> list[dict]:
    """The prompts whose SFT answers will score 0 on average."""
    if cfg.max_new_tokens >= context_length:
        raise ValueError(f"--max_new_tokens {cfg.max_new_tokens} leaves no room for a prompt in "
                         f"the model's context of {context_length}")
    return read_prompts(cfg.prompts or cfg.data, split="heldout", n=cfg.n_shift, seed=cfg.seed,
                        bad_rows=cfg.bad_rows)


@torch.no_grad()
def shift_to_zero(model: WithHead, sft, tokenizer, prompts: list[dict], cfg: Config) -> float:
    """Move b_r so that sampled SFT answers to `prompts` score 0 on average; returns the former
    mean."""
    limit = sft.config.context_length - cfg.max_new_tokens
    # the end of a long prompt matters most
    ids = [tokenizer.prompt(prompt["messages"])[-limit:] for prompt in prompts]
    generator = torch.Generator(sft.device).manual_seed(cfg.seed)
    answers = sample.generate(sft, ids, cfg.max_new_tokens, (tokenizer.end,), temperature=1.0,
                              generator=generator)
    batch = response_batch(ids, answers, tokenizer.pad, sft.config.context_length)
    mean = response_rewards(model, batch.to(sft.device)).mean().item()
    model.head.bias -= mean
    return mean


def main(cfg: Config) -> dict:
    run = start(cfg, __file__)

    # 1. INITIALIZE
    model, tokenizer = load_model(cfg.init, run.device, run.dtype, cfg.context_length)
    model.eval()                               # because noisy routers would blur what is compared
    reference = copy.deepcopy(model).requires_grad_(False)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    lora.begin(model, cfg.adapters, run)
    model = WithHead(model, 1)                                         # W_r, b_r on top
    train, heldout = read_ranked(cfg, run, tokenizer, model.config.context_length)
    prompts = read_shift_prompts(cfg, model.config.context_length)
    forward = run.prepare(model)
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    run.track(model=model, optimizer=optimizer)
    rankers = simple_rankers(reference, heldout, cfg)
    for name, accuracy in rankers.items():
        run.say(f"held-out pairs ranked right by {name.removesuffix('_accuracy')} alone: "
                f"{accuracy:.1%}")
    run.also_writes("diagnostics.png")
    n_rows = len(train.sequences[0]) * cfg.batch_size
    run.forecast(model, reference, rows=n_rows, length=train.lengths.mean())

    # 2. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 2.1 Sample batch {(x, y_w, y_l)}
        batch = train.batch(step, cfg.batch_size, run.rank, run.world_size)
        batch = batch.to(run.device)
        items = train.items(batch.index)

        # 2.2 Compute r_w and r_l, read at the last token of each response
        rewards = response_rewards(forward, batch).view(-1, len(items))        # (2, B): r_w, r_l

        # 2.3 Loss: the mean of -log sigma(r_w - r_l), or another --loss
        loss = loss_of(rewards, items, cfg)

        # 2.4 Backpropagate, update psi
        run.backward(loss)
        grad_norm = run.clip(model, cfg.max_norm)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()

        # 2.5 Monitor accuracy on held-out preference pairs
        figures = {"loss": loss}
        figures |= {"train_accuracy": ranked_right(margins_of(rewards.detach(), items))}
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, cfg)
        tokens = batch.tokens.numel()
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    lora.end(model.trunk, cfg.adapters, run)
    shift_to_zero(model, reference, tokenizer, prompts, cfg)           # b_r
    # 3. Freeze r_psi
    model.requires_grad_(False)
    results = run.last("accuracy", "ece") | rankers
    if run.rank == 0:
        results["diagnostics"] = diagnostics.of(model, heldout, run.out / "diagnostics.png")
    return run.finish(model, tokenizer, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
