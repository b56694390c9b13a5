"""
Mixture-of-Experts routing: which expert works on which token, and how much of its answer counts
(002, "What is a Mixture of Experts"; 003, load balancing and capacity).

    y(x) = sum_i G_i(x) E_i(x)        G = 0 for all but the chosen experts

Every way of routing ends in the same dispatch list (`Routes`), which kernels.moe_experts works off.
Token choice: each token takes its k best experts. Expert choice: each expert takes its best tokens.

    logits = x W_r                            (N, E)
    probs = logits.softmax(-1)                or two_level(logits, group_logits, ...)
    experts, gates = top_k(probs, k, bias)    (N, k)
    routes = dispatch(experts, gates, E, keep=within_capacity(experts, E, capacity))

Shapes: N tokens, E experts, k experts per token, P pairs of token and expert. All fp32. Nothing
here waits for a GPU, so that routing runs ahead of it.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routes(NamedTuple):
    """Pair p sends token tokens[p], with weight gates[p], to the expert e with
    offsets[e] <= p < offsets[e + 1]. Pairs from offsets[E] on are dropped."""
    tokens: Tensor                    # (P,) int64
    gates: Tensor                     # (P,)
    offsets: Tensor                   # (E + 1,) int64


# ---------------------------------------------------------------------- choosing

def add_noise(logits: Tensor, noise_logits: Tensor, generator: torch.Generator | None = None):
    """Noisy top-k gating (Shazeer et al. 2017, eq. 4): logits + normal * softplus(x W_noise). The
    noise lets experts that lose narrowly be tried; the model learns how much of it is good."""
    normal = torch.randn(logits.shape, generator=generator, device=logits.device)
    return logits + normal * F.softplus(noise_logits)


def two_level(logits: Tensor, group_logits: Tensor, top_groups: int) -> Tensor:
    """Hierarchical routing (Shazeer et al. 2017, appendix B): probabilities (N, E) of experts that
    stand in groups, p(expert) = p(group) p(expert | group), 0 outside the top_groups best groups.

    logits: (N, E), group after group; group_logits: (N, groups).
    """
    groups = group_logits.shape[1]
    p_group = group_logits.softmax(-1)
    best = p_group.topk(top_groups).indices
    p_group = torch.zeros_like(p_group).scatter(1, best, p_group.gather(1, best))
    p_within = logits.unflatten(1, (groups, -1)).softmax(-1)       # (N, groups, E / groups)
    return (p_group[..., None] * p_within).flatten(1)


def top_k(probs: Tensor, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k experts of the highest probability and their gates, both (N, k), best first.

    One expert keeps its raw probability as gate (renormalised to 1 it would leave the router
    without a gradient; Fedus et al. 2021), more share 1 among them. bias (E,) moves the choice
    only, never a gate, and never to an expert of probability 0 (DeepSeek-V3, section 2.1.2).
    """
    ranked = probs if bias is None else (probs + bias).masked_fill(probs == 0, -torch.inf)
    experts = ranked.detach().topk(k).indices
    gates = probs.gather(1, experts)
    return experts, gates / gates.sum(1, keepdim=True) if k > 1 else gates


# ---------------------------------------------------------------------- dispatching

def capacity(capacity_factor: float, tokens: int, k: int, n_experts: int) -> int:
    """How many pairs an expert takes: ceil(capacity_factor k N / E) (the k is missing in 003)."""
    return math.ceil(capacity_factor * k * tokens / n_experts)


def within_capacity(experts: Tensor, n_experts: int, capacity: int) -> Tensor:
    """(N, k) bool: which pairs come early enough for a place at their expert. All first choices
    queue before all second choices, each in the order of the tokens (GShard, algorithm 1)."""
    queue = F.one_hot(experts.T.flatten(), n_experts)              # (k N, E), first choices first
    place = (queue.cumsum(0) * queue).sum(1) - 1                   # in the queue of one's expert
    return (place < capacity).view(experts.T.shape).T


def dispatch(experts: Tensor, gates: Tensor, n_experts: int, keep: Tensor | None = None) -> Routes:
    """Sort the pairs (N, k) by expert, once; those not to keep go behind the last."""
    key = experts if keep is None else experts.masked_fill(~keep, n_experts)
    key, order = key.flatten().sort(stable=True)
    edges = torch.arange(n_experts + 1, device=key.device)
    return Routes(order // experts.shape[1], gates.flatten()[order], torch.searchsorted(key, edges))


def expert_choice(probs: Tensor, capacity: int) -> Routes:
    """Each expert takes the `capacity` tokens that want it most (Zhou et al. 2022): balanced by
    construction. A token's experts then depend on all tokens of the batch, later ones included:
    such a model cannot generate, and its validation loss has seen the future."""
    N, E = probs.shape
    gates, tokens = probs.T.topk(min(capacity, N))                 # (E, capacity)
    offsets = torch.arange(E + 1, device=probs.device) * gates.shape[1]
    return Routes(tokens.flatten(), gates.flatten(), offsets)


# ---------------------------------------------------------------------- balancing

def load(experts: Tensor, n_experts: int, real: Tensor | None = None) -> Tensor:
    """(E,) share of the (token, slot) pairs that each expert was chosen for, before any is dropped;
    1 / E at balance. real: (N,) bool, padding left out."""
    counts = F.one_hot(experts, n_experts).sum(1)                  # (N, E)
    counts = (counts if real is None else counts * real[:, None]).sum(0)
    return counts / counts.sum().clamp(min=1)


def balance_loss(probs: Tensor, load: Tensor, real: Tensor | None = None) -> Tensor:
    """E sum_i f_i P_i: f the load, P the mean probability of each expert (Switch Transformer,
    eq. 4-6): 1 at balance, E when all tokens go to one expert. The gradient flows through P."""
    P = probs.mean(0) if real is None else (probs * real[:, None]).sum(0) / real.sum().clamp(min=1)
    return len(load) * (load * P).sum()


def z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2: keeps the router's logits small (ST-MoE, eq. 5)."""
    z = logits.logsumexp(-1).square()
    return z.mean() if real is None else (z * real).sum() / real.sum().clamp(min=1)


def nudged(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias + rate sign(mean load - load): balance without a loss (Wang et al. 2024): an expert with
    too little work becomes easier to choose."""
    return bias + rate * (load.mean() - load).sign()
