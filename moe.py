"""
Mixture of Experts (002, "What is a Mixture of Experts"; 003, load balancing and capacity): which
expert works on which token, how much of its answer counts, and the layer that does it.

    y(x) = sum_i G_i(x) E_i(x)        G = 0 for all but the chosen experts

Every way of routing ends in the same dispatch list (`Routes`), which kernels.moe_experts works off.
Token choice: each token takes its k best experts. Expert choice: each expert takes its best tokens.

    logits = x W_r                            (N, E)
    probs = logits.softmax(-1)                or two_level(logits, group_logits, ...)
    experts, gates = top_k(probs, k, bias)    (N, k)
    routes = dispatch(experts, gates, E, keep=within_capacity(experts, E, capacity))

Shapes: N tokens, E experts, k experts per token, P pairs of token and expert, F_e width of an
expert. Routing is in fp32, and nothing in it waits for a GPU, so that it runs ahead of the GPU.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel


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
    p_group = group_logits.softmax(-1)                             # (N, groups)
    best = p_group.topk(top_groups).indices                        # (N, top_groups)
    # 0 for the others, so that their experts are never chosen
    p_group = torch.zeros_like(p_group).scatter(1, best, p_group.gather(1, best))
    # (N, groups, E / groups): of an expert, within its group
    p_within = logits.unflatten(1, (groups, -1)).softmax(-1)
    return (p_group[..., None] * p_within).flatten(1)


def top_k(probs: Tensor, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k experts of the highest probability and their gates, both (N, k), best first.

    A single expert keeps its raw probability as gate, because a gate renormalised to 1 would leave
    the router without a gradient (Fedus et al. 2021); the gates of several sum to 1. bias (E,)
    moves the choice only, never a gate, and never to an expert of probability 0 (DeepSeek-V3,
    section 2.1.2).
    """
    ranked = probs
    if bias is not None:
        ranked = (probs + bias).masked_fill(probs == 0, -torch.inf)
    # the choice has no gradient; the router learns through the gates
    experts = ranked.detach().topk(k).indices
    gates = probs.gather(1, experts)
    if k > 1:
        gates = gates / gates.sum(1, keepdim=True)
    return experts, gates


# ---------------------------------------------------------------------- dispatching

def capacity(capacity_factor: float, tokens: int, k: int, n_experts: int) -> int:
    """How many pairs an expert takes: ceil(capacity_factor k N / E) (the k is missing in 003)."""
    return math.ceil(capacity_factor * k * tokens / n_experts)


def within_capacity(experts: Tensor, n_experts: int, capacity: int) -> Tensor:
    """(N, k) bool: which pairs come early enough for a place at their expert. All first choices
    queue before all second choices, each in the order of the tokens (GShard, algorithm 1)."""
    queue = F.one_hot(experts.T.flatten(), n_experts)              # (k N, E), first choices first
    place = (queue.cumsum(0) * queue).sum(1) - 1                   # (k N,), 0 for an expert's first
    return (place < capacity).view(experts.T.shape).T


def dispatch(experts: Tensor, gates: Tensor, n_experts: int, keep: Tensor | None = None) -> Routes:
    """Sort the pairs (N, k) by expert, once; pairs without `keep` go behind the last expert's."""
    k = experts.shape[1]
    if keep is not None:
        experts = experts.masked_fill(~keep, n_experts)            # as if of an expert E
    # stable, so that an expert reads its tokens in their order; (N k,)
    expert_of_pair, order = experts.flatten().sort(stable=True)
    edges = torch.arange(n_experts + 1, device=experts.device)
    offsets = torch.searchsorted(expert_of_pair, edges)
    # pair n k + slot is of token n
    return Routes(order // k, gates.flatten()[order], offsets)


def expert_choice(probs: Tensor, capacity: int) -> Routes:
    """Each expert takes the `capacity` tokens that want it most (Zhou et al. 2022): balanced by
    construction. A token's experts then depend on all tokens of the batch, later ones included:
    such a model cannot generate, and its validation loss has seen the future."""
    N, E = probs.shape
    gates, tokens = probs.T.topk(min(capacity, N))                 # (E, capacity)
    # all ranges are of the same length: 0, c, 2 c, ...
    offsets = torch.arange(E + 1, device=probs.device) * gates.shape[1]
    return Routes(tokens.flatten(), gates.flatten(), offsets)


# ---------------------------------------------------------------------- balancing

def load(experts: Tensor, n_experts: int, real: Tensor | None = None) -> Tensor:
    """(E,) share of the (token, slot) pairs that each expert was chosen for, before any is dropped;
    1 / E at balance. real: (N,) bool, padding left out."""
    counts = F.one_hot(experts, n_experts).sum(1)                  # (N, E): 1 where chosen
    if real is not None:
        counts = counts * real[:, None]
    counts = counts.sum(0)
    # at least 1, because a batch may be all padding
    return counts / counts.sum().clamp(min=1)


def mean_over(x: Tensor, real: Tensor | None) -> Tensor:
    """The mean of x (N, ...) over the tokens that are `real` (N,), 0 without any."""
    if real is None:
        return x.mean(0)
    weights = real.view(-1, *[1] * (x.dim() - 1))                  # (N, 1, ...), 0 for padding
    return (x * weights).sum(0) / real.sum().clamp(min=1)


def balance_loss(probs: Tensor, load: Tensor, real: Tensor | None = None) -> Tensor:
    """E sum_i f_i P_i: f the load, P the mean probability of each expert (Switch Transformer,
    eq. 4-6): 1 at balance, E when all tokens go to one expert. The gradient flows through P."""
    P = mean_over(probs, real)                                     # (E,)
    return len(load) * (load * P).sum()


def z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2: keeps the router's logits small (ST-MoE, eq. 5)."""
    return mean_over(logits.logsumexp(-1).square(), real)


def nudged(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias + rate sign(mean load - load): balance without a loss (Wang et al. 2024): an expert with
    too little work becomes easier to choose."""
    return bias + rate * (load.mean() - load).sign()


# ---------------------------------------------------------------------- sizes

def check_config(config) -> None:
    """Raises ValueError, naming the fields of a ModelConfig, for experts that do not fit."""
    choices = {"router": ("token_choice", "expert_choice"), "balance": ("loss", "bias", "none")}
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {allowed}")
    groups = config.expert_groups or 1
    if config.n_experts % groups or not 1 <= config.top_groups <= groups:
        raise ValueError(f"{config.n_experts} experts cannot stand in expert_groups {groups}, or "
                         f"top_groups {config.top_groups} is not among 1 to {groups}")
    reachable = config.n_experts * config.top_groups // groups     # of a token, in its best groups
    if not 1 <= config.top_k <= reachable:
        raise ValueError(f"top_k is {config.top_k}; a token can choose among {reachable} experts")


def parameters_per_token(config) -> int:
    """Parameters of one layer that multiply a token: routers and the experts it visits."""
    router_rows = config.n_experts + config.expert_groups
    if config.router_noise:
        router_rows += config.n_experts                # the noise has a router of its own
    visited = config.top_k + config.n_shared_experts
    return config.d_model * (router_rows + 3 * visited * config.d_expert)      # W1, W2, W3


# ---------------------------------------------------------------------- the layer

class MoE(nn.Module):
    """y = sum_i G_i(x) E_i(x) + shared(x); each E is a SwiGLU.

    config: model.ModelConfig. shared: a SwiGLU that every token visits, or None. Noise and capacity
    are for training: in evaluation every token reaches all experts that it chose, so that a token's
    output does not depend on the others (expert choice excepted).
    """

    def __init__(self, config, shared: nn.Module | None = None):
        super().__init__()
        D = config.d_model
        E = config.n_experts
        self.config = config
        self.router = nn.Linear(D, E, bias=False)                  # W_r, used in fp32
        if config.expert_groups:                                   # two levels: groups, experts
            self.group_router = nn.Linear(D, config.expert_groups, bias=False)
        if config.router_noise:
            self.noise_router = nn.Linear(D, E, bias=False)
        bias = torch.zeros(E) if config.balance == "bias" else None
        self.register_buffer("bias", bias)
        self.w13 = nn.Parameter(torch.empty(E, 2 * config.d_expert, D))
        self.w2 = nn.Parameter(torch.empty(E, D, config.d_expert))
        self.shared = shared
        self.router_loss: Tensor | float = 0.0         # of the newest forward pass with gradients
        self.load: Tensor | float = 0.0                # summed since the biases were last nudged
        self.dropped: Tensor | float = 0.0             # share of the pairs that found no place

    def forward(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """x (B, T, D); documents (B, T), negative on padding, which counts in no statistic."""
        flat = x.flatten(0, 1)                                     # (N, D)
        real = None
        if documents is not None:
            real = (documents >= 0).flatten()
        # in fp32, because a rounding would change which experts are chosen
        routes = self.route(flat.float(), real)
        y = parallel.moe_experts(flat, self.w13, self.w2, *routes)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view(x.shape)

    def route(self, x: Tensor, real: Tensor | None) -> Routes:
        """Who works on which of the tokens x (N, D) in fp32; keeps the losses and the load."""
        config = self.config
        N = len(x)
        E = config.n_experts
        logits = self.router(x)                                    # (N, E)
        if config.router_noise and self.training:
            logits = add_noise(logits, self.noise_router(x))
        if config.expert_groups:
            probs = two_level(logits, self.group_router(x), config.top_groups)
        else:
            probs = logits.softmax(-1)
        if config.router == "expert_choice":
            return expert_choice(probs, capacity(1.0, N, config.top_k, E))
        experts, gates = top_k(probs, config.top_k, self.bias)     # (N, k)
        if torch.is_grad_enabled():                                # evaluation counts in none
            self.keep_statistics(logits, probs, experts, real)
        keep = None
        if config.capacity_factor and self.training:
            places = capacity(config.capacity_factor, N, config.top_k, E)
            keep = within_capacity(experts, E, places)             # (N, k) bool
            self.dropped = 1 - keep.float().mean()
        return dispatch(experts, gates, E, keep)

    def keep_statistics(self, logits: Tensor, probs: Tensor, experts: Tensor,
                        real: Tensor | None) -> None:
        config = self.config
        step_load = load(experts, config.n_experts, real)          # (E,)
        # summed, because a step may have several micro-batches
        self.load = self.load + step_load
        self.router_loss = config.z_coef * z_loss(logits, real)
        if config.balance == "loss":
            balance = balance_loss(probs, step_load, real)
            self.router_loss = self.router_loss + config.balance_coef * balance


# ---------------------------------------------------------------------- all layers of a model

def sparse_layers(model: nn.Module) -> list[MoE]:
    """The model's Mixtures of Experts, from the first block on."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def router_loss(model: nn.Module) -> Tensor | float:
    """The routers' part of a training loss after a forward pass: balance loss and z-loss, with
    their coefficients, summed over the blocks; 0 for a dense model."""
    if model.config.n_experts == 0:
        return 0.0
    return sum(layer.router_loss for layer in sparse_layers(model))


def dropped(model: nn.Module) -> Tensor | float:
    """Share of the pairs of token and expert that the newest training pass dropped."""
    layers = sparse_layers(model)
    return sum(layer.dropped for layer in layers) / max(1, len(layers))


@torch.no_grad()
def balance_experts(model: nn.Module, nudge: bool = True) -> Tensor | None:
    """After an optimizer step: nudge the routers' biases, where they have some and unless told
    not to. Returns the load since the last call, (sparse blocks, E), shares of each block; None
    for a dense model."""
    routed = [layer for layer in sparse_layers(model) if isinstance(layer.load, Tensor)]
    if not routed:
        return None
    loads = torch.stack([layer.load for layer in routed])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads)            # because each rank routed its own tokens
    loads = loads / loads.sum(1, keepdim=True)         # each block's shares sum to 1
    for layer, share in zip(routed, loads):
        layer.load = 0.0
        if nudge and layer.bias is not None:
            layer.bias.copy_(nudged(layer.bias, share, layer.config.bias_rate))
    return loads


def balance_routers(model: nn.Module, nudge: bool) -> dict[str, Tensor | float]:
    """After an optimizer step: balance the experts, and the figures to log; {} for a dense model
    and for expert choice.

    busiest_expert: the largest load over an even share. load/e: the share of expert e, over all
    blocks. dropped: the share of the pairs that found no place.
    """
    if model.config.n_experts == 0:
        return {}
    loads = balance_experts(model, nudge)              # (sparse blocks, E)
    if loads is None:                                  # expert choice: even by construction
        return {}
    figures = {"busiest_expert": loads.max() * loads.shape[1], "dropped": dropped(model)}
    for expert, share in enumerate(loads.mean(0)):
        figures[f"load/{expert}"] = share
    return figures
