"""
Stage 4, phase 2: the reward model (001 sections 4.4 and 4.5).

  1. INITIALIZE     psi <- theta_SFT, the LM head replaced by a scalar head W_r, b_r
  2. FOR step       2.1 sample pairs  2.2 r_w, r_l  2.3 loss  2.4 update  2.5 held-out accuracy
  3. Freeze r_psi   shifted so that the SFT model's own answers score 0 on average

Minimise  L = -mean log sigma(r_psi(x, y_w) - r_psi(x, y_l))  (Bradley-Terry), where r_psi(x, y) =
W_r h_T + b_r is read at the last token of the response, its <|end|>. The loss cannot see a constant
added to all rewards; step 3 uses that freedom (Huang et al. 2024): in PPO, 0 means "as before".

Differs from the document:
  1.  The LM head stays, beside the scalar head, and the reward has a third term,

          r_psi(x, y) = W_r h_T + b_r + w_p c log p_psi(y | x),    c = 32 / mean length of y

      whose w_p starts at 0 (--likelihood false keeps it there: the document's reward). A small
      model says 7 - 4 = 3 long before it can tell that a given 7 - 4 = 0 is wrong, which takes
      comparing what it reads with what it would have said; log p is that comparison. No gradient
      passes log p, and its unit c suits texts of any length to the optimizer's steps.
      Muon (muon.py) unless --optimizer adamw, with a higher learning rate that stays up for 70 % of
      the steps: the default model is small.
  2.3 Two terms more. The same loss on the mean of the values at all response tokens: a mistake is
      felt where it stands, not only through the last token (--mean_coef). And the language-model
      loss of the preferred responses, so that the model does not forget what it judges by, nor
      log p its meaning (Yang et al. 2024; --lm_coef).

    python train_rm.py                                     # the embedded world's preferences
    python train_rm.py --data pairs.jsonl --truncate left
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
import forecast
import sample
import training
from model import load_model
from train_dpo import score_pairs


@dataclass
class Config:
    init: str = "out/sft"             # model folder to start from
    out: str = "out/rm"               # model folder to write
    data: str = "world"               # preference pairs: world, world:SEED or JSONL
    n_pairs: int = 12_800             # how many to take, at most
    label_noise: float = 0.0          # the world's annotators err with this probability
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # pairs longer than the context: error | left | drop
    prompts: str = ""                 # to sample SFT answers for the shift; empty: those of --data
    n_shift: int = 200                # SFT answers whose mean reward becomes 0
    max_new_tokens: int = 64          # longest of those answers, in tokens
    steps: int = 800                  # optimizer steps (T_RM)
    batch_size: int = 16              # pairs per step and rank
    optimizer: str = "muon"           # muon (inner matrices; the rest by AdamW) | adamw
    lr: float = 7e-4                  # peak learning rate
    warmup: int = 30                  # steps of linear warmup; the last 30 % decay to 0
    mean_coef: float = 1.0            # weight of the loss on mean values; 0: the document's
    lm_coef: float = 0.3              # weight of the language-model loss; 0: the document's
    likelihood: bool = True           # the reward also reads log p(y | x); false: the document's
    weight_decay: float = 0.01        # on matrices only
    max_norm: float = 1.0             # gradient clipping
    seed: int = 0                     # of head, batches and samples
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    compile: bool = False             # torch.compile: 15-25 s, on CPUs for each width of a batch
    log_every: int = 10               # steps between rows of metrics.jsonl
    eval_every: int = 200             # steps between evaluations
    eval_pairs: int = 1000            # held-out pairs ranked at the end
    save_every: int = 200             # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    overwrite: bool = False           # throw away what is in --out


def last_value(values: Tensor, loss_mask: Tensor) -> Tensor:
    """values, loss_mask (B, T) -> the value at each row's last response token (B,).

    A row without one raises ValueError.
    """
    if not loss_mask.any(1).all():
        raise ValueError("a row has no response token: there is nothing to reward")
    places = torch.arange(values.shape[1], device=values.device)
    last = (loss_mask * places).argmax(1, keepdim=True)                # (B, 1)
    return values.gather(1, last).squeeze(1)


def mean_value(values: Tensor, loss_mask: Tensor) -> Tensor:
    """values, loss_mask (B, T) -> the mean value of each row's response tokens (B,)."""
    return (values * loss_mask).sum(1) / loss_mask.sum(1)


def values_and_logps(model: nn.Module, batch: data.Batch) -> tuple[Tensor, Tensor]:
    """The value at every token of the response, and the log p of that token, in nats, both (B, T);
    log p is 0 elsewhere. Each row's value at its last response token is r_psi(x, y)."""
    # the prediction of token t + 1 stands at t; no row begins with a response token
    targets, wanted = batch.tokens.roll(-1, 1), batch.loss_mask.roll(-1, 1)
    values, logps = model(batch.tokens, targets=targets, loss_mask=wanted,
                          documents=batch.documents, positions=batch.positions)
    return values, logps.roll(1, 1)


def response_rewards(model: nn.Module, batch: data.Batch) -> Tensor:
    """r_psi(x, y), one per row (B,): the value at the last response token.

    batch.loss_mask (B, T) marks the response; a row without one raises ValueError.
    """
    return last_value(values_and_logps(model, batch)[0], batch.loss_mask)


def bradley_terry_loss(r_w: Tensor, r_l: Tensor) -> Tensor:
    """-log sigma(r_w - r_l), mean over pairs (001 section 4.4). log 2 when nothing is known."""
    return -F.logsigmoid(r_w - r_l).mean()


@torch.no_grad()
def margins(model: nn.Module, pairs: data.PreferencePairs, batch_size: int) -> Tensor:
    """r_w - r_l of every pair, (N,), on the CPU, in the order of the batches."""
    model.eval()
    found = []
    for batch in pairs.epoch(batch_size):
        r_w, r_l = response_rewards(model, batch.to(model.device)).chunk(2)
        found.append((r_w - r_l).cpu())
    model.train()
    return torch.cat(found)


@torch.no_grad()
def shift_to_zero(reward_model, sft, tokenizer, prompts: list[dict], cfg: Config) -> float:
    """Move b_r so that sampled SFT answers to `prompts` score 0 on average; returns the former
    mean."""
    ids = [tokenizer.prompt(prompt["messages"]) for prompt in prompts]
    limit = sft.config.context_length - cfg.max_new_tokens
    ids = [prompt[-limit:] for prompt in ids]                          # the end matters most
    generator = torch.Generator(sft.device).manual_seed(cfg.seed)
    answers = sample.generate(sft, ids, cfg.max_new_tokens, (tokenizer.end,), temperature=1.0,
                              generator=generator)
    batch = data.response_batch(ids, answers, tokenizer.pad, sft.config.context_length)
    batch = batch.to(sft.device)
    mean = response_rewards(reward_model, batch).mean().item()
    reward_model.scalar_head.bias -= mean
    return mean


def main(cfg: Config) -> dict:
    run = training.start(cfg, "rm")

    # 1. INITIALIZE: psi <- theta_SFT with a scalar head
    model, tokenizer = load_model(cfg.init, run.device, run.dtype, head="scalar")
    model.likelihood.requires_grad_(cfg.likelihood)
    sft, _ = load_model(cfg.init, run.device, run.dtype)
    sft.requires_grad_(False)
    length = model.config.context_length
    pairs = data.PreferencePairs(
        data.read_preferences(cfg.data, split="train", n=cfg.n_pairs, seed=cfg.seed,
                              noise=cfg.label_noise, bad_rows=cfg.bad_rows),
        tokenizer, length, cfg.seed, cfg.truncate)
    heldout = data.PreferencePairs(
        data.read_preferences(cfg.data, split="heldout", n=cfg.eval_pairs, seed=cfg.seed,
                              bad_rows=cfg.bad_rows), tokenizer, length, cfg.seed, cfg.truncate)
    if cfg.max_new_tokens >= length:
        raise ValueError(f"--max_new_tokens {cfg.max_new_tokens} leaves no room for a prompt in "
                         f"the model's context of {length}")
    prompts = data.read_prompts(cfg.prompts or cfg.data, split="heldout", n=cfg.n_shift,
                                seed=cfg.seed, bad_rows=cfg.bad_rows)[:cfg.n_shift]
    lengths = [sum(mask) for sides in pairs.sides for _, mask in sides]          # of responses
    model.likelihood_unit.fill_(32 * len(lengths) / sum(lengths))
    forward = run.prepare(model)
    optimizer = training.pick_optimizer(cfg.optimizer, model, cfg.lr, cfg.weight_decay, run.dtype,
                                        betas=(0.9, 0.999))
    run.track(model=model, optimizer=optimizer)
    longer = evaluate.length_accuracy(heldout)
    logp_w, logp_l = score_pairs(sft.eval(), heldout, cfg.batch_size).unbind(1)
    likelier = (logp_w > logp_l).float().mean().item()
    run.say(f"{len(pairs)} pairs, {len(heldout)} held out; length alone ranks {longer:.1%} right, "
            f"log p of the SFT model {likelier:.1%}")
    forecast.announce(run, model, sft, rows=2 * cfg.batch_size, length=pairs.lengths.mean())

    # 2. TRAINING LOOP
    for step in run.steps(cfg.steps):
        # 2.1 Sample batch {(x, y_w, y_l)}
        batch = pairs.batch(step, cfg.batch_size, run.rank, run.world_size).to(run.device)
        # 2.2 Rewards of both sides
        values, logps = values_and_logps(forward, batch)
        r_w, r_l = last_value(values, batch.loss_mask).chunk(2)        # (B,) each
        # 2.3 Loss
        loss = bradley_terry_loss(r_w, r_l)
        mean_loss = bradley_terry_loss(*mean_value(values, batch.loss_mask).chunk(2))
        nll = -logps.chunk(2)[0].sum() / batch.loss_mask.chunk(2)[0].sum()   # of y_w
        # 2.4 Backpropagate, update psi
        run.backward(loss + cfg.mean_coef * mean_loss + cfg.lm_coef * nll, step)
        lr = training.warmup_stable_decay(step, cfg.steps, cfg.lr, cfg.warmup)
        grad_norm = run.update(optimizer, lr, cfg.max_norm)
        # 2.5 Monitor accuracy on held-out pairs
        figures = {"loss": loss, "mean_loss": mean_loss, "lm_loss": nll,
                   "train_accuracy": (r_w > r_l).float().mean()}
        if run.due(step, cfg.eval_every):
            margin = margins(model, heldout, cfg.batch_size)
            figures |= {"val_loss": -F.logsigmoid(margin).mean(),
                        "accuracy": (margin > 0).float().mean(),
                        "ece": evaluate.calibration_error(margin)}
        run.log(step, tokens=batch.tokens.numel(), grad_norm=grad_norm, lr=lr, **figures)
        run.checkpoint(step)

    # 3. Freeze r_psi: the SFT model's own answers score 0 on average
    shift_to_zero(model, sft, tokenizer, prompts, cfg)
    return run.finish(model, tokenizer, {"accuracy": run.last["accuracy"], "ece": run.last["ece"],
                                         "length_accuracy": longer,
                                         "likelihood_accuracy": likelier})


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
