"""
Stage 4: Direct Preference Optimization (001 sections 4.6, 4.7), and its relatives (4.8, 4.10).

  1. INITIALIZE      theta <- theta_SFT, pi_ref <- theta_SFT frozen, AdamW
  2. PRECOMPUTE      log pi_ref(y|x) of every pair, once (--cache_reference)
  3. TRAINING LOOP   3.1 sample  3.2 forward, margin  3.3 loss  3.4 update  3.5 monitor
  4. RETURN theta_aligned
Minimise  L = -mean log sigma(Delta),
  Delta = beta [  (log pi_theta(y_w|x) - log pi_ref(y_w|x))
                - (log pi_theta(y_l|x) - log pi_ref(y_l|x)) ]
No reward model, no sampling: the policy is its own reward model, r = beta log(pi_theta / pi_ref).
--method changes 3.3. With h = log(pi_theta / pi_ref) and p = log pi_theta / |y|, per token:

  dpo    -log sigma(beta (h_w - h_l))                                       Rafailov et al. 2023
  ipo    ((h_w - h_l) - 1 / (2 beta))^2, h per token                        Azar et al. 2023
  kto    lambda (1 - sigma(+-beta (h - z))), + for good, - for bad answers; Ethayarajh et al. 2024
         z: the mean h of answers to other prompts, at least 0
  orpo   L_SFT - lam log sigma(log odds(y_w) - log odds(y_l)), odds = e^p / (1 - e^p); L_SFT of
         2.5: the mean over chosen tokens; no reference, from the base      Hong et al. 2024
  simpo  -log sigma(simpo_beta (p_w - p_l) - gamma), no reference           Meng et al. 2024

Differs from the document:
  3.4  the learning rate warms up linearly and falls by a cosine to a tenth.
  4.8  as in the papers, IPO's and KTO's h have no factor beta; KTO's z is of mismatched pairs.

    python train_dpo.py --data pairs.jsonl --truncate left # or the embedded world's preferences
    python train_dpo.py --rounds 5 --reward out/rm         # online: pairs of its own answers (4.10)
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from data import PreferencePairs
from plumbing.folders import load_model
from plumbing.optimizers import learning_rate, pick_optimizer
from plumbing.options import Options, command_line, nested, refuse_unread
from plumbing.run import start
from preferences import in_rounds, labels_of, mean_of_step, monitored, read_data, read_reference
from scoring import log1mexp, response_logps, score_pairs

READ_BY = {"beta": ("dpo", "ipo", "kto"), "label_smoothing": ("dpo",), "nll_coef": ("dpo",),
           "mean_logps": ("dpo",), "lambda_good": ("kto",), "lambda_bad": ("kto",),
           "lam": ("orpo",), "simpo_beta": ("simpo",), "gamma": ("simpo",),
           "prompts": ("--reward",), "answers": ("--reward",), "combine": ("--reward",),
           "no_end_score": ("--reward",)}


@dataclass
class Config(Options):
    init: str = ""                    # policy to start from; empty: out/sft, orpo: out/pretrain
    reference: str = ""               # pi_ref; empty: --init
    out: str = "out/dpo"              # model folder to write
    method: str = "dpo"               # dpo | ipo | kto | orpo | simpo
    data: str = "world"               # preference pairs (kto: labels): world, world:SEED or JSONL
    n_pairs: int = 8000               # how many to take, at most, >= 1
    label_noise: float = 0.0          # the world's annotators err with this probability, in [0, 1]
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # pairs longer than the context: error | left | drop
    context_length: int = 0           # tokens of prompt and answer; 0: the model's own
    beta: float = 0.5                 # pull to the reference (results: dpo 1, ipo 3, kto .2), > 0
    label_smoothing: float = 0.0      # dpo: so many labels are thought wrong, in [0, 0.5)
    nll_coef: float = 0.0             # dpo: of -log p(y_w) per token, which keeps y_w likely
    mean_logps: bool = False          # dpo: h per token, so that length does not count
    lambda_good: float = 1.0          # kto: weight of good answers (its paper: lambda_D)
    lambda_bad: float = 1.0           # kto: of bad ones (lambda_U); larger: loss aversion
    lam: float = 0.5                  # orpo: weight of the odds ratio, lambda
    simpo_beta: float = 2.0           # simpo: scale of its margin, > 0
    gamma: float = 1.0                # simpo: the margin to reach
    rounds: int = 1                   # online and spin: pairs are made so many times, >= 1
    reward: str = ""                  # online: what ranks its own answers (rewards.py); empty: off
    combine: str = "min"              # several reward models: min | mean | mean-std
    no_end_score: float = -1.0        # online: the score of an answer without <|end|>, any number
    prompts: str = "world"            # online: prompts: world, world:SEED or JSONL
    answers: int = 4                  # online: answers to each prompt, best against worst, >= 2
    spin: bool = False                # the demonstrations of --data against the model's own answers
    max_new_tokens: int = 64          # online, spin: longest own answer, in tokens, >= 1
    cache_reference: bool = True      # score the data with pi_ref once, instead of in every step
    steps: int = 500                  # optimizer steps (T_DPO), >= 1
    batch_size: int = 16              # pairs per step and rank, >= 1
    optimizer: str = "adamw"          # adamw | adam | muon: gains .4 points held out
    lr: float = 2e-4                  # peak rate (results: kto 2e-4, simpo 2e-5, dpo, ipo 1e-4)
    warmup: int = 20                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only
    max_norm: float = 1.0             # gradient clipping, > 0
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    eval_every: int = 250             # steps between evaluations
    eval_pairs: int = 500             # held-out pairs, >= 1
    save_every: int = 100             # steps between checkpoints
    adapters: lora.Options = nested(lora.Options)          # what trains


def dpo_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Direct preference loss (001 section 4.6.3; Rafailov et al. 2023, eq. 7).

    pi_w, pi_l, ref_w, ref_l: (B,) log pi(y|x) in nats, summed over the response, under policy and
    reference, chosen and rejected. Returns the mean loss (scalar) and the implicit reward margin
    Delta (B,): at the start Delta = 0 and the loss is log 2. label_smoothing: the probability that
    a label is wrong (conservative DPO, Mitchell 2023).
    """
    h_w = pi_w - ref_w
    h_l = pi_l - ref_l
    margin = beta * (h_w - h_l)
    right = -F.logsigmoid(margin)
    wrong = -F.logsigmoid(-margin)
    loss = (1 - label_smoothing) * right + label_smoothing * wrong
    return loss.mean(), margin


def ipo_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """((h_w - h_l) - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17): a margin to reach and not to pass.
    As dpo_loss, but log pi(y|x) is the mean over the response. At the start 1 / (4 beta^2)."""
    margin = (pi_w - ref_w) - (pi_l - ref_l)
    loss = (margin - 1 / (2 * beta)) ** 2
    return loss.mean(), margin


def kto_loss(pi: Tensor, ref: Tensor, is_good: Tensor, z: float, beta: float, lambda_good: float,
             lambda_bad: float) -> tuple[Tensor, Tensor]:
    """lambda (1 - sigma(beta (h - z))) of a good answer, lambda (1 - sigma(beta (z - h))) of a bad
    one (Ethayarajh et al. 2024).

    pi, ref: (B,) log pi(y|x) in nats; is_good (B,) bool; z: nats, 0 if it is negative. Returns the
    mean loss and the margins beta |h - z| (B,), with a minus where h is on z's wrong side.
    """
    sign = torch.where(is_good, 1.0, -1.0).to(pi.device)
    weight = torch.where(is_good, lambda_good, lambda_bad).to(pi.device)
    h = pi - ref
    margin = sign * beta * (h - max(z, 0.0))
    loss = weight * (1 - margin.sigmoid())
    return loss.mean(), margin


def orpo_loss(pi_w: Tensor, mean_w: Tensor, mean_l: Tensor, mean_length: float, lam: float
              ) -> tuple[Tensor, Tensor]:
    """L_SFT - lam log sigma(log odds ratio) (001 section 4.8.3; Hong et al. 2024). pi_w: (B,) log
    pi(y_w|x) in nats; mean_w, mean_l: (B,) log pi(y|x) / |y|; mean_length: the mean |y_w| in tokens
    over all ranks. Returns the mean loss and the log odds ratio (B,)."""
    log_odds_w = mean_w - log1mexp(mean_w)
    log_odds_l = mean_l - log1mexp(mean_l)
    log_odds_ratio = log_odds_w - log_odds_l
    # Each token counts alike, as in SFT, because a long answer has more to be learned.
    sft_loss = -pi_w.mean() / mean_length
    return sft_loss - lam * F.logsigmoid(log_odds_ratio).mean(), log_odds_ratio


def simpo_loss(mean_w: Tensor, mean_l: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """-log sigma(margin - gamma), margin = beta (p_w - p_l) (Meng et al. 2024). As orpo_loss."""
    margin = beta * (mean_w - mean_l)
    loss = -F.logsigmoid(margin - gamma)
    return loss.mean(), margin


def method_loss(pi: Tensor, ref: Tensor | None, lengths: Tensor, is_good: Tensor | None,
                step_mean: float | None, cfg: Config) -> tuple[Tensor, Tensor]:
    """The loss and margins of --method. pi, ref, lengths |y| (2B,): B chosen, then their B rejected
    answers; for kto B answers, good or not by is_good (B,), then B to other prompts.
    step_mean: mean_of_step() over all ranks."""
    means = pi / lengths                                                       # log p per token
    mean_w, mean_l = means.chunk(2)
    if cfg.method == "simpo":
        return simpo_loss(mean_w, mean_l, cfg.simpo_beta, cfg.gamma)
    if cfg.method == "ipo" or cfg.mean_logps:
        pi = means
        ref = ref / lengths
    pi_w, pi_l = pi.chunk(2)                                                   # (B,) each
    if cfg.method == "orpo":
        return orpo_loss(pi_w, mean_w, mean_l, step_mean, cfg.lam)
    ref_w, ref_l = ref.chunk(2)
    if cfg.method == "ipo":
        return ipo_loss(pi_w, pi_l, ref_w, ref_l, cfg.beta)
    if cfg.method == "kto":
        return kto_loss(pi_w, ref_w, is_good, step_mean, cfg.beta, cfg.lambda_good, cfg.lambda_bad)
    loss, margin = dpo_loss(pi_w, pi_l, ref_w, ref_l, cfg.beta, cfg.label_smoothing)
    return loss - cfg.nll_coef * mean_w.mean(), margin


@torch.no_grad()
def reference_logps(reference, ref_logps: Tensor | None, batch) -> Tensor | None:
    """log pi_ref(y|x) of the batch's rows, (2B,) in nats: looked up in ref_logps (N, 2), or
    computed where --cache_reference is false; None without a reference."""
    if ref_logps is not None:
        return ref_logps[batch.index].T.flatten()
    return response_logps(reference.logps, batch) if reference else None


def heldout_figures(policy, pairs: PreferencePairs, ref_logps: Tensor, cfg: Config) -> dict:
    """Loss, margin, accuracy and drift from the reference on pairs that are not trained on."""
    pi = score_pairs(policy, pairs, cfg.batch_size).T.flatten()                # (2N,)
    ref = ref_logps.T.flatten()
    lengths = pairs.response_tokens().T.flatten().to(pi.device)
    is_good = labels_of(pairs)                                                 # (N,) or None
    step_mean = mean_of_step(cfg.method, pi, ref, lengths)
    loss, margin = method_loss(pi, ref, lengths, is_good, step_mean, cfg)
    figures = monitored(loss, margin, pi, ref, is_good)
    return {f"val_{name}": value for name, value in figures.items()}


def check(cfg: Config) -> Config:
    """The config with its --init. Raises ValueError for options that do not go together."""
    refuse_unread(cfg, READ_BY)
    if cfg.rounds > 1 and not (cfg.reward or cfg.spin) or cfg.steps % cfg.rounds:
        raise ValueError(f"--rounds {cfg.rounds}: must divide --steps, and needs --reward or "
                         "--spin true, which make the pairs of each round")
    if bool(cfg.reward) + cfg.spin + (cfg.method == "kto") > 1:
        raise ValueError("--reward, --spin and --method kto each bring their data; give one")
    return replace(cfg, init=cfg.init or ("out/pretrain" if cfg.method == "orpo" else "out/sft"))


def main(cfg: Config) -> dict:
    cfg = check(cfg)
    if cfg.reward or cfg.spin:
        return in_rounds(main, cfg)            # this main, on each round's own pairs
    run = start(cfg, __file__)

    # 1. INITIALIZE
    model, tokenizer = load_model(cfg.init, run.device, run.dtype, cfg.context_length)
    model.eval()                               # because noisy routers would blur what is compared
    lora.begin(model, cfg.adapters, run)
    reference = read_reference(cfg, run, model)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    train, heldout = read_data(cfg, run, tokenizer, model.config.context_length)
    forward = run.prepare(model, "logps")
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    run.track(model=model, optimizer=optimizer)
    run.forecast(model, reference, rows=2 * cfg.batch_size, length=train.lengths.mean())

    # 2. PRECOMPUTE: pi_ref never changes, so score the data once and free the second model
    heldout_ref = score_pairs(reference, heldout, cfg.batch_size)              # (N, 2)
    reference = None if cfg.method in ("orpo", "simpo") else reference     # held-out pairs suffice
    ref_logps = None
    if reference and cfg.cache_reference:
        ref_logps = score_pairs(reference, train, cfg.batch_size)
        reference = None

    # 3. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 3.1 Sample mini-batch
        batch = train.batch(step, cfg.batch_size, run.rank, run.world_size)
        batch = batch.to(run.device)
        is_good = labels_of(train, batch.index)                            # kto: (B,), else None

        # 3.2 FORWARD PASS
        pi = response_logps(forward, batch)                                # (2B,): B y_w, B y_l
        ref = reference_logps(reference, ref_logps, batch)                 # (2B,)
        lengths = batch.loss_mask.sum(1)                                   # (2B,) |y|

        # 3.3 Batch loss: the mean of -log sigma(Delta), or another --method's
        step_mean = mean_of_step(cfg.method, pi, ref, lengths)
        if step_mean is not None:
            step_mean = run.mean_over_ranks(step_mean)
        loss, margin = method_loss(pi, ref, lengths, is_good, step_mean, cfg)

        # 3.4 BACKWARD + UPDATE
        run.backward(loss)
        grad_norm = run.clip(model, cfg.max_norm)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()

        # 3.5 MONITORING
        figures = monitored(loss, margin, pi, ref, is_good)
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, heldout_ref, cfg)
        tokens = batch.tokens.numel()
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    lora.end(model, cfg.adapters, run)
    # 4. RETURN theta_aligned
    return run.finish(model, tokenizer, run.last("val_accuracy", "val_margin"))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
