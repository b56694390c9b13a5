"""
Stage 4: Direct Preference Optimization (001 sections 4.6 and 4.7; Rafailov et al. 2023).

  1. INITIALIZE      theta <- theta_SFT, pi_ref <- theta_SFT frozen, optimizer
  2. PRECOMPUTE      log pi_ref(y|x) of every pair, once (--cache_reference)
  3. TRAINING LOOP   3.1 sample  3.2 forward, margin  3.3 loss  3.4 update  3.5 monitor
  4. RETURN theta_aligned

Minimise  L = -mean log sigma(Delta),
  Delta = beta [  (log pi_theta(y_w|x) - log pi_ref(y_w|x))
                - (log pi_theta(y_l|x) - log pi_ref(y_l|x)) ]

No reward model, no sampling: the policy is its own reward model, r = beta log(pi_theta / pi_ref).

Differs from the document:
  1.   Muon for the inner matrices (muon.py) unless --optimizer adamw.
  3.4  linear warmup and cosine on the learning rate.

    python train_dpo.py                                    # the embedded world's preferences
    python train_dpo.py --data pairs.jsonl --truncate left --beta 0.2
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import forecast
import training
from model import Transformer, load_model, token_logps


@dataclass
class Config:
    init: str = "out/sft"             # model folder to start from: policy and reference
    out: str = "out/dpo"              # model folder to write
    data: str = "world"               # preference pairs: world, world:SEED or JSONL
    n_pairs: int = 8000               # how many to take, at most
    label_noise: float = 0.0          # the world's annotators err with this probability
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # pairs longer than the context: error | left | drop
    beta: float = 0.5                 # strength of the pull towards the reference
    cache_reference: bool = True      # score the data with pi_ref once, instead of in every step
    steps: int = 500                  # optimizer steps (T_DPO)
    batch_size: int = 16              # pairs per step and rank
    optimizer: str = "muon"           # muon (inner matrices; the rest by AdamW) | adamw
    lr: float = 2e-4                  # peak learning rate
    warmup: int = 20                  # steps of linear warmup, before the cosine
    max_norm: float = 1.0             # gradient clipping
    seed: int = 0                     # of the batches
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    compile: bool = False             # torch.compile: 15-25 s, on CPUs for each width of a batch
    log_every: int = 10               # steps between rows of metrics.jsonl
    eval_every: int = 250             # steps between evaluations
    eval_pairs: int = 500             # held-out pairs
    save_every: int = 100             # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    overwrite: bool = False           # throw away what is in --out


def dpo_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference loss (001 section 4.6.3; Rafailov et al. 2023, eq. 7).

    pi_w, pi_l, ref_w, ref_l: (B,) log pi(y|x) in nats, summed over the response, under policy and
    reference, chosen and rejected. Returns the mean loss (scalar) and the implicit reward margin
    Delta (B,): at the start Delta = 0 and the loss is log 2.
    """
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return -F.logsigmoid(margin).mean(), margin


def response_logps(model, batch: data.Batch) -> Tensor:
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t) of each row, (2B,) in nats."""
    return token_logps(model, batch).sum(1)


@torch.no_grad()
def score_pairs(model: Transformer, pairs: data.PreferencePairs, batch_size: int) -> Tensor:
    """(N, 2) fp32 on the model's device: log pi of chosen and rejected of every pair."""
    scores = torch.empty(len(pairs), 2, device=model.device)
    for batch in pairs.epoch(batch_size):
        scores[batch.index] = torch.stack(response_logps(model, batch.to(model.device)).chunk(2), 1)
    return scores


def heldout_figures(policy: Transformer, pairs: data.PreferencePairs, ref_logps: Tensor,
                    cfg: Config) -> dict:
    """Loss, margin and accuracy on pairs that are not trained on."""
    pi_w, pi_l = score_pairs(policy, pairs, cfg.batch_size).unbind(1)
    loss, margin = dpo_loss(pi_w, pi_l, *ref_logps.unbind(1), cfg.beta)
    return {"val_loss": loss, "val_margin": margin.mean(),
            "val_accuracy": (margin > 0).float().mean()}


def main(cfg: Config) -> dict:
    run = training.start(cfg, "dpo")

    # 1. INITIALIZE: theta <- theta_SFT, pi_ref <- frozen copy, optimizer
    policy, tokenizer = load_model(cfg.init, run.device, run.dtype)
    policy.eval()                              # routers without noise, in both models alike
    reference = copy.deepcopy(policy).requires_grad_(False)
    length = policy.config.context_length
    pairs = data.PreferencePairs(
        data.read_preferences(cfg.data, split="train", n=cfg.n_pairs, seed=cfg.seed,
                              noise=cfg.label_noise, bad_rows=cfg.bad_rows),
        tokenizer, length, cfg.seed, cfg.truncate)
    heldout = data.PreferencePairs(
        data.read_preferences(cfg.data, split="heldout", n=cfg.eval_pairs, seed=cfg.seed,
                              bad_rows=cfg.bad_rows), tokenizer, length, cfg.seed, cfg.truncate)
    forward = run.prepare(policy)
    optimizer = training.pick_optimizer(cfg.optimizer, policy, cfg.lr, 0.0, run.dtype,
                                        betas=(0.9, 0.999))
    run.track(policy=policy, optimizer=optimizer)
    run.say(f"{len(pairs)} pairs, {len(heldout)} held out")
    forecast.announce(run, policy, reference, rows=2 * cfg.batch_size, length=pairs.lengths.mean())

    # 2. PRECOMPUTE: pi_ref never changes, so score the data once and free the second model
    heldout_ref = score_pairs(reference, heldout, cfg.batch_size)              # (N, 2)
    if cfg.cache_reference:
        ref_logps = score_pairs(reference, pairs, cfg.batch_size)              # (N, 2)
        del reference

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 3.1 Sample mini-batch {(x, y_w, y_l)}
        batch = pairs.batch(step, cfg.batch_size, run.rank, run.world_size).to(run.device)

        # 3.2 FORWARD PASS: log pi_theta(y|x), log pi_ref(y|x), margin Delta
        pi_w, pi_l = response_logps(forward, batch).chunk(2)               # (B,) each
        if cfg.cache_reference:
            ref_w, ref_l = ref_logps[batch.index].unbind(1)
        else:
            with torch.no_grad():
                ref_w, ref_l = response_logps(reference, batch).chunk(2)
        # 3.3 Batch loss
        loss, margin = dpo_loss(pi_w, pi_l, ref_w, ref_l, cfg.beta)

        # 3.4 BACKWARD + UPDATE (theta only)
        run.backward(loss, step)
        lr = training.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        grad_norm = run.update(optimizer, lr, cfg.max_norm)

        # 3.5 MONITORING
        figures = {"loss": loss, "margin": margin.mean(), "accuracy": (margin > 0).float().mean(),
                   "kl_proxy": torch.cat([pi_w - ref_w, pi_l - ref_l]).abs().mean(),
                   "logp_chosen": pi_w.mean(), "logp_rejected": pi_l.mean()}
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(policy, heldout, heldout_ref, cfg)
        run.log(step, tokens=batch.tokens.numel(), grad_norm=grad_norm, lr=lr, **figures)
        run.checkpoint(step)

    # 4. RETURN theta_aligned
    return run.finish(policy, tokenizer, {"val_accuracy": run.last["val_accuracy"],
                                          "val_margin": run.last["val_margin"]})


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
