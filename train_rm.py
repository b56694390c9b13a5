"""
Stage 4, phase 2: the reward model (001 sections 4.4 and 4.5).

  1. INITIALIZE     psi <- theta_SFT, the LM head replaced by a scalar head W_r, b_r, Adam
  2. FOR step       2.1 sample pairs  2.2 r_w, r_l  2.3 loss  2.4 update  2.5 held-out accuracy
  3. Freeze r_psi

Minimise  L = -mean log sigma(r_psi(x, y_w) - r_psi(x, y_l))  (Bradley-Terry), where r_psi(x, y) =
W_r h_last + b_r is read at the last token of the response, its <|end|>.

Differs from the document:
  2.4  the gradient is clipped; the learning rate warms up and falls by a cosine to a tenth.
  3    b_r is shifted so that the SFT model's own answers score 0 on average: the loss cannot see a
       constant added to all rewards, and in PPO 0 then means "as before" (Huang et al. 2024).

    python train_rm.py                                     # the embedded world's preferences
    python train_rm.py --data pairs.jsonl --truncate left
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import sample
from data import PreferencePairs, response_batch
from heads import WithHead
from plumbing.folders import load_model
from plumbing.optimizers import learning_rate, pick_optimizer
from plumbing.options import Options, command_line
from plumbing.run import start
from preferences import read_pairs
from readers import read_prompts
from scoring import last_value, ranked_right, response_rewards, score_pairs


@dataclass
class Config(Options):
    init: str = "out/sft"             # model folder to start from
    out: str = "out/rm"               # model folder to write
    data: str = "world"               # preference pairs: world, world:SEED or JSONL
    n_pairs: int = 19_200             # how many to take, at most, >= 1
    label_noise: float = 0.0          # the world's annotators err with this probability, in [0, 1]
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # pairs longer than the context: error | left | drop
    context_length: int = 0           # tokens of prompt and answer; 0: the model's own
    prompts: str = ""                 # to sample SFT answers for the shift; empty: those of --data
    n_shift: int = 200                # SFT answers whose mean reward becomes 0, >= 1
    max_new_tokens: int = 64          # longest of those answers, in tokens, >= 1
    steps: int = 1200                 # optimizer steps (T_RM), >= 1
    batch_size: int = 16              # pairs per step and rank, >= 1
    optimizer: str = "adam"           # adam | adamw | muon (with --lr 7e-4 gains 0.3 points)
    lr: float = 3e-4                  # peak learning rate (document, large models: 1e-5)
    warmup: int = 30                  # steps of linear warmup, before the cosine
    weight_decay: float = 0.0         # on matrices only; adam: none
    mean_coef: float = 0.0            # of the loss on mean values; in the lifecycle 1 gains nothing
    lm_coef: float = 0.0              # of the chosen answers' LM loss: 0.3 loses 0.4 points here
    max_norm: float = 1.0             # gradient clipping, > 0
    gradient_checkpointing: bool = False   # recompute activations in the backward pass: less memory
    eval_every: int = 200             # steps between evaluations
    eval_pairs: int = 1000            # held-out pairs, >= 1
    save_every: int = 200             # steps between checkpoints


def bradley_terry_loss(r_w: Tensor, r_l: Tensor) -> Tensor:
    """-log sigma(r_w - r_l), mean over pairs (001 section 4.4). log 2 when nothing is known."""
    return -F.logsigmoid(r_w - r_l).mean()


def mean_value(values: Tensor, loss_mask: Tensor) -> Tensor:
    """values, loss_mask (B, T) -> the mean value of each row's response tokens (B,)."""
    return (values * loss_mask).sum(1) / loss_mask.sum(1)


def read_values(forward, batch, with_logps: bool) -> tuple[Tensor, Tensor | None]:
    """The value at every token (B, T), and the log p of the response's tokens in nats, (B, T)."""
    where = {"documents": batch.documents, "positions": batch.positions}
    if not with_logps:
        return forward(batch.tokens, **where).squeeze(-1), None
    # token t + 1 is predicted at t; no row begins with a response token
    targets = batch.tokens.roll(-1, 1)
    loss_mask = batch.loss_mask.roll(-1, 1)
    values, logps = forward(batch.tokens, targets, loss_mask=loss_mask, **where)
    return values.squeeze(-1), logps


@torch.no_grad()
def margins(model: WithHead, pairs: PreferencePairs, batch_size: int) -> Tensor:
    """r_w - r_l of every pair, (N,), on the CPU, in the order of the batches."""
    found = []
    for batch in pairs.epoch(batch_size):
        r_w, r_l = response_rewards(model, batch.to(model.device)).chunk(2)
        found.append((r_w - r_l).cpu())
    return torch.cat(found)


def heldout_figures(model: WithHead, pairs: PreferencePairs, cfg: Config) -> dict:
    """Loss, accuracy and calibration error on pairs that are not trained on."""
    margin = margins(model, pairs, cfg.batch_size)                             # (N,)
    return {"val_loss": -F.logsigmoid(margin).mean(), "accuracy": ranked_right(margin),
            "ece": evaluate.calibration_error(margin)}


def optional_loss(values: Tensor, logps: Tensor | None, batch,
                  cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted terms of --mean_coef and --lm_coef, and each of them unweighted for the log.

    mean_loss: Bradley-Terry on the mean value over each response, so that a mistake is felt where
    it stands and not only through the last token. lm_loss: nats per token of the chosen responses,
    so that the model does not forget the language it judges by (Yang et al. 2024).
    """
    mean_w, mean_l = mean_value(values, batch.loss_mask).chunk(2)              # (B,) each
    mean_loss = bradley_terry_loss(mean_w, mean_l)
    total = cfg.mean_coef * mean_loss
    figures = {"mean_loss": mean_loss}
    if logps is not None:
        logps_w, _ = logps.chunk(2)                                            # (B, T)
        mask_w, _ = batch.loss_mask.chunk(2)
        lm_loss = -logps_w.sum() / mask_w.sum()
        total = total + cfg.lm_coef * lm_loss
        figures["lm_loss"] = lm_loss
    return total, figures


def simple_rankers(sft, pairs: PreferencePairs, cfg: Config) -> dict[str, float]:
    """How many pairs are ranked right with no reward model at all: by length alone, and by
    log p(y|x) under the SFT model. A reward model should do better than both."""
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
    model = WithHead(model, 1, keep_lm_head=cfg.lm_coef > 0)           # W_r, b_r on top
    train, heldout = read_pairs(cfg, run, tokenizer, model.config.context_length)
    prompts = read_shift_prompts(cfg, model.config.context_length)
    forward = run.prepare(model, "values_and_logps" if cfg.lm_coef else "forward")
    optimizer = pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype)
    run.track(model=model, optimizer=optimizer)
    rankers = simple_rankers(reference, heldout, cfg)
    run.say(f"held-out pairs ranked right by length alone: {rankers['length_accuracy']:.1%}, by "
            f"log p of the SFT model: {rankers['likelihood_accuracy']:.1%}")
    run.forecast(model, reference, rows=2 * cfg.batch_size, length=train.lengths.mean())

    # 2. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 2.1 Sample batch {(x, y_w, y_l)}
        batch = train.batch(step, cfg.batch_size, run.rank, run.world_size).to(run.device)

        # 2.2 Compute r_w and r_l, read at the last token of each response
        values, logps = read_values(forward, batch, with_logps=cfg.lm_coef > 0)  # (2B, T) each
        r_w, r_l = last_value(values, batch.loss_mask).chunk(2)                # (B,) each

        # 2.3 Loss: the mean of -log sigma(r_w - r_l)
        pair_loss = bradley_terry_loss(r_w, r_l)
        extra_loss, extra_figures = optional_loss(values, logps, batch, cfg)   # 0 by default
        loss = pair_loss + extra_loss

        # 2.4 Backpropagate, update psi
        run.backward(loss)
        grad_norm = run.clip(model, cfg.max_norm)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
        run.step(optimizer, lr, loss, grad_norm)
        optimizer.zero_grad()

        # 2.5 Monitor accuracy on held-out preference pairs
        figures = {"loss": pair_loss, "train_accuracy": ranked_right(r_w - r_l),
                   **extra_figures}
        if run.due(step, cfg.eval_every):
            figures |= heldout_figures(model, heldout, cfg)
        tokens = batch.tokens.numel()
        run.log(step, tokens=tokens, grad_norm=grad_norm, lr=lr, **figures)
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)

    shift_to_zero(model, reference, tokenizer, prompts, cfg)           # b_r
    # 3. Freeze r_psi
    model.requires_grad_(False)
    results = run.last("accuracy", "ece") | rankers
    return run.finish(model, tokenizer, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
