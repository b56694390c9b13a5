"""
Stage 4: Direct Preference Optimization (001 sections 4.6 and 4.7; Rafailov et al. 2023).

  1. INITIALIZE      theta <- theta_SFT, pi_ref <- theta_SFT frozen, AdamW
  2. PRECOMPUTE      log pi_ref(y|x) of every pair, once (--cache_reference)
  3. TRAINING LOOP   3.1 sample  3.2 forward, margin  3.3 loss  3.4 update  3.5 monitor
  4. RETURN theta_aligned

Minimise  L = -mean log sigma(Delta),
  Delta = beta [  (log pi_theta(y_w|x) - log pi_ref(y_w|x))
                - (log pi_theta(y_l|x) - log pi_ref(y_l|x)) ]

No reward model, no sampling: the policy is its own reward model, r = beta log(pi_theta / pi_ref).

Differs from the document:
  3.4  the learning rate warms up linearly and falls by a cosine to a tenth.

    python train_dpo.py                                    # the embedded world's preferences
    python train_dpo.py --data pairs.jsonl --truncate left --beta 0.2
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PreferencePairs
from plumbing.folders import load_model
from plumbing.optimizers import learning_rate, pick_optimizer
from plumbing.options import Options, command_line
from plumbing.run import start
from readers import read_preferences
from scoring import ranked_right, response_logps, score_pairs


@dataclass
class Config(Options):
    init: str = "out/sft"             # model folder to start from: policy and reference
    out: str = "out/dpo"              # model folder to write
    data: str = "world"               # preference pairs: world, world:SEED or JSONL
    n_pairs: int = 8000               # how many to take, at most, >= 1
    label_noise: float = 0.0          # the world's annotators err with this probability, in [0, 1]
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # pairs longer than the context: error | left | drop
    context_length: int = 0           # tokens of prompt and answer; 0: the model's own
    beta: float = 0.5                 # strength of the pull towards the reference, > 0
    cache_reference: bool = True      # score the data with pi_ref once, instead of in every step
    steps: int = 500                  # optimizer steps (T_DPO), >= 1
    batch_size: int = 16              # pairs per step and rank, >= 1
    optimizer: str = "adamw"          # adamw | adam | muon: gains .4 points held out
    lr: float = 2e-4                  # peak learning rate
    warmup: int = 20                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only
    max_norm: float = 1.0             # gradient clipping, > 0
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    eval_every: int = 250             # steps between evaluations
    eval_pairs: int = 500             # held-out pairs, >= 1
    save_every: int = 100             # steps between checkpoints


def dpo_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference loss (001 section 4.6.3; Rafailov et al. 2023, eq. 7).

    pi_w, pi_l, ref_w, ref_l: (B,) log pi(y|x) in nats, summed over the response, under policy and
    reference, chosen and rejected. Returns the mean loss (scalar) and the implicit reward margin
    Delta (B,): at the start Delta = 0 and the loss is log 2.
    """
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return -F.logsigmoid(margin).mean(), margin


@torch.no_grad()
def reference_logps(reference, ref_logps: Tensor | None, batch) -> tuple[Tensor, Tensor]:
    """log pi_ref(y_w|x) and log pi_ref(y_l|x) of the batch, (B,) each in nats: looked up in
    ref_logps (N, 2), or computed where --cache_reference is false."""
    if ref_logps is not None:
        return ref_logps[batch.index].unbind(1)
    return response_logps(reference.logps, batch).chunk(2)


def read_pairs(cfg: Config, run, tokenizer,
               length: int) -> tuple[PreferencePairs, PreferencePairs]:
    """The pairs to train on and the held-out ones; length: tokens that fit into the context."""
    train = read_preferences(cfg.data, split="train", n=cfg.n_pairs, seed=cfg.seed,
                             noise=cfg.label_noise, bad_rows=cfg.bad_rows)
    heldout = read_preferences(cfg.data, split="heldout", n=cfg.eval_pairs, seed=cfg.seed,
                               bad_rows=cfg.bad_rows)
    train = PreferencePairs(train, tokenizer, length, cfg.seed, cfg.truncate)
    heldout = PreferencePairs(heldout, tokenizer, length, cfg.seed, cfg.truncate)
    run.say(f"{len(train)} pairs, {len(heldout)} held out")
    return train, heldout


def margin_figures(margin: Tensor, pi_w: Tensor, pi_l: Tensor, ref_w: Tensor,
                   ref_l: Tensor) -> dict[str, Tensor]:
    """What 3.5 tracks, means over the pairs. logratio_*: log pi_theta - log pi_ref in nats per
    response, which shows where the policy drifts; kl_proxy: the mean of its size."""
    logratio_w = pi_w - ref_w                                                  # (B,)
    logratio_l = pi_l - ref_l
    log_ratios = torch.cat([logratio_w, logratio_l])                           # (2B,)
    return {"margin": margin.mean(), "accuracy": ranked_right(margin),
            "logratio_chosen": logratio_w.mean(), "logratio_rejected": logratio_l.mean(),
            "kl_proxy": log_ratios.abs().mean(), "logp_chosen": pi_w.mean(),
            "logp_rejected": pi_l.mean()}


def heldout_figures(policy, pairs: PreferencePairs, ref_logps: Tensor, cfg: Config) -> dict:
    """Loss, margin, accuracy and drift from the reference on pairs that are not trained on."""
    pi_w, pi_l = score_pairs(policy, pairs, cfg.batch_size).unbind(1)          # (N,) each
    ref_w, ref_l = ref_logps.unbind(1)
    loss, margin = dpo_loss(pi_w, pi_l, ref_w, ref_l, cfg.beta)
    return {"val_loss": loss, "val_margin": margin.mean(),
            "val_accuracy": ranked_right(margin),
            "val_logratio_chosen": (pi_w - ref_w).mean(),
            "val_logratio_rejected": (pi_l - ref_l).mean()}


def main(cfg: Config) -> dict:
    run = start(cfg, __file__)

    # 1. INITIALIZE
    model, tokenizer = load_model(cfg.init, run.device, run.dtype, cfg.context_length)
    model.eval()                               # because noisy routers would blur what is compared
    reference = copy.deepcopy(model).requires_grad_(False)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    train, heldout = read_pairs(cfg, run, tokenizer, model.config.context_length)
    forward = run.prepare(model, "logps")
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    run.track(model=model, optimizer=optimizer)
    run.forecast(model, reference, rows=2 * cfg.batch_size, length=train.lengths.mean())

    # 2. PRECOMPUTE: pi_ref never changes, so score the data once and free the second model
    heldout_ref = score_pairs(reference, heldout, cfg.batch_size)              # (N, 2)
    ref_logps = score_pairs(reference, train, cfg.batch_size) if cfg.cache_reference else None
    reference = None if cfg.cache_reference else reference

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 3.1 Sample mini-batch
        batch = train.batch(step, cfg.batch_size, run.rank, run.world_size).to(run.device)

        # 3.2 FORWARD PASS
        pi_w, pi_l = response_logps(forward, batch).chunk(2)               # (B,) each
        ref_w, ref_l = reference_logps(reference, ref_logps, batch)        # (B,) each

        # 3.3 Batch loss: the mean of -log sigma(Delta)
        loss, margin = dpo_loss(pi_w, pi_l, ref_w, ref_l, cfg.beta)

        # 3.4 BACKWARD + UPDATE
        run.backward(loss)
        grad_norm = run.clip(model, cfg.max_norm)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()

        # 3.5 MONITORING
        figures = {"loss": loss}
        figures |= margin_figures(margin, pi_w, pi_l, ref_w, ref_l)
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, heldout_ref, cfg)
        tokens = batch.tokens.numel()
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    # 4. RETURN theta_aligned
    results = run.last("val_accuracy", "val_margin")
    return run.finish(model, tokenizer, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
