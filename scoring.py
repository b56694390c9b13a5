"""
What the stages share of the mathematics: log-probabilities, rewards, values, KL, masked means.

    log p(x_t | x_<t)                token_logps      every stage's loss is made of it
    log p(y_t | y_<t, x)             answer_logps     of encoder-decoders (2.2)
    log pi(y | x) = sum_t of these   response_logps   DPO, rankings by likelihood
    r_psi(x, y)                      response_rewards the reward model at the last token of y
    KL(pi || pi_ref)                 kl_k1, kl_k3     from log pi - log pi_ref of sampled tokens

Log-probabilities are natural logarithms in fp32. A model is given by the function that makes its
log-probabilities: `model.logps`, or what Run.prepare returned for it.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import data
import objectives

# ---------------------------------------------------------------------- log-probabilities

def token_logps(logps: Callable, batch: data.Batch, temperature: float = 1.0,
                with_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """log p(x_t | x_<t) in nats of every target of the batch, (B, T-1) fp32, 0 elsewhere; with
    with_entropy also the entropy of each prediction in nats, (B, T-1).

    Tokens are shifted against their predictions here: entry t - 1 is the score of token t. Logits
    are divided by `temperature` first.
    """
    loss_mask = batch.loss_mask[:, 1:]
    if batch.n_targets == loss_mask.numel():
        loss_mask = None                               # because all tokens are scored
    documents = None if batch.documents is None else batch.documents[:, :-1]
    positions = None if batch.positions is None else batch.positions[:, :-1]
    return logps(batch.tokens[:, :-1], batch.tokens[:, 1:], loss_mask=loss_mask,
                 documents=documents, positions=positions, temperature=temperature,
                 with_entropy=with_entropy)


def denoised_logps(logps: Callable, batch) -> Tensor:
    """token_logps of an objectives.DenoisingBatch, (B, T) or (B, T-1): where targets stand beside
    the inputs nothing is shifted."""
    tokens = batch.tokens
    targets = batch.targets
    loss_mask = batch.loss_mask
    if targets is None:
        targets = tokens[:, 1:]
        tokens = tokens[:, :-1]
        loss_mask = loss_mask[:, 1:]
    return logps(tokens, targets, loss_mask=loss_mask, documents=batch.documents,
                 positions=batch.positions, **batch.of_architecture())


def answer_logps(logps: Callable, batch: data.Batch) -> Tensor:
    """log p(y_t | y_<t, x) in nats of each conversation's last answer y, by an encoder-decoder that
    reads all before it, x (001 section 2.2): (n, T_y) fp32, 0 elsewhere. batch: packed rows, n
    conversations."""
    return denoised_logps(logps, objectives.answers_apart(batch))


def response_logps(logps: Callable, batch: data.Batch) -> Tensor:
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t) of each row, (B,) in nats."""
    return token_logps(logps, batch).sum(1)


@torch.no_grad()
def score_pairs(model: nn.Module, pairs: data.PreferencePairs, batch_size: int) -> Tensor:
    """(N, 2) fp32 on the model's device: log pi(y|x) in nats of each pair's two answers."""
    scores = torch.empty(len(pairs), 2, device=model.device)
    for batch in pairs.epoch(batch_size):
        batch = batch.to(model.device)
        pi_w, pi_l = response_logps(model.logps, batch).chunk(2)               # (B,) each
        scores[batch.index] = torch.stack([pi_w, pi_l], 1)
    return scores


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0: two forms, because each loses all digits at the other's end."""
    x = x.clamp(max=-1e-7)                         # a certainty of 1, which fp32 rounds to, is -inf
    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    return torch.where(x > -math.log(2), near, far)


# ---------------------------------------------------------------------- rewards

def last_place(mask: Tensor) -> Tensor:
    """mask (B, T) of 0 and 1 -> the place of each row's last 1, (B, 1)."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (mask * places).argmax(1, keepdim=True)


def last_value(values: Tensor, loss_mask: Tensor) -> Tensor:
    """values, loss_mask (B, T) -> the value at each row's last response token (B,).

    Raises ValueError for a row without one.
    """
    if not loss_mask.any(1).all():
        raise ValueError("a row has no response token: there is nothing to reward")
    return values.gather(1, last_place(loss_mask)).squeeze(1)


def response_rewards(rewards: Callable, batch: data.Batch) -> Tensor:
    """r_psi(x, y) = W_r h_last + b_r of each row, (B,) (001 section 4.4).

    rewards: the reward model's forward, tokens (B, T) -> (B, T, 1). batch.loss_mask (B, T) marks
    the response, whose last token is read; a row without a response raises ValueError.
    """
    values = rewards(batch.tokens, documents=batch.documents, positions=batch.positions)
    return last_value(values.squeeze(-1), batch.loss_mask)


def values_before(critic: Callable, batch: data.Batch) -> Tensor:
    """V(x, y_<t) for every target t, (B, T-1): the critic has read all tokens before t (001
    section 4.5). critic: tokens (B, T) -> (B, T, 1)."""
    return critic(batch.tokens[:, :-1]).squeeze(-1)


def score_responses(reward: Callable, prompts: list[dict], x: list[list[int]], y: list[list[int]],
                    end: int, no_end_score: float) -> tuple[Tensor, Tensor]:
    """R of each response, (N,), and whether it has ended with the token `end`: one that was cut off
    gets no_end_score, because no reward model ever saw such. reward: a rewards.Reward."""
    scores = reward(prompts, x, y)
    ended = torch.tensor([ids[-1:] == [end] for ids in y], device=scores.device)
    return torch.where(ended, scores, no_end_score), ended


def ranked_right(margin: Tensor) -> Tensor:
    """Share of the pairs whose margin (N,), better minus worse, is above 0; ties count half."""
    return (margin.sign() + 1).mean() / 2


# ---------------------------------------------------------------------- the clipped surrogate

def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
                      clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """-min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) of each token (Schulman et al. 2017, eq.
    7), the ratio rho_t, 1 where pi_theta = pi_old, and whether clipping binds, 0 or 1.

    All (b, T); advantages may be (b, 1), the same for all tokens. The first is 0 where mask is.
    """
    ratio = torch.exp((logps - old_logps) * mask)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    binds = (clipped < unclipped).float()
    return -torch.minimum(unclipped, clipped) * mask, ratio, binds


# ---------------------------------------------------------------------- means and KL

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x where mask is 1; both of one shape -> scalar."""
    return (x * mask).sum() / mask.sum()


def mean_if_any(x: Tensor) -> Tensor | None:
    """The mean of x (n,); None of nothing, as of the good answers in a batch of bad ones."""
    return x.mean() if len(x) else None


def mean_figures(updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each figure over the updates of a step; the highest of one called *_max."""
    means = {}
    for name in updates[0]:
        values = torch.stack([update[name] for update in updates]).detach()
        means[name] = values.max() if name.endswith("_max") else values.mean()
    return means


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log pi(y_t) - log pi_ref(y_t) of tokens y_t ~ pi, in nats: its mean is KL(pi || pi_ref), a
    single one may be negative (Schulman 2020)."""
    return logps - ref_logps


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: KL(best of n || pi) where no answer is ever drawn twice; else it is
    less (001 section 4.9)."""
    return math.log(n) - (n - 1) / n


def best_of_n_kl_of(counts: list[int], n: int) -> float:
    """KL(best of n || pi) in nats, pi being a prompt's distinct answers as often as they were
    drawn; counts: how often each was, from the worst answer to the best."""
    drawn = sum(counts)
    kl = 0.0
    below = 0                                      # draws of answers that are worse
    for count in counts:
        p = count / drawn
        # the best of n is this answer if none is better, and not all are worse
        p_best = ((below + count) / drawn) ** n - (below / drawn) ** n
        kl += p_best * math.log(p_best / p)
        below += count
    return kl


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """ratio - 1 - log ratio, ratio = pi_ref / pi, in nats: the same mean as kl_k1 with less
    variance, and never negative (Schulman 2020)."""
    log_ratio = ref_logps - logps
    return torch.exp(log_ratio) - 1 - log_ratio
