"""
Softmax cross-entropy of logits, and linear layer and cross-entropy in one, a chunk of rows at a
time: the fp32 logits of all rows never exist together. The latter scores tokens for every stage's
loss.

    z = h W^T / temperature        log p(t) = z_t - logsumexp(z)        H = -sum_j p_j log p_j
    for upstream gradients g of log p(t) and e of H:
    dz_j = g ([j = t] - p_j) - e p_j (log p_j + H)
    dh = dz W / temperature        dW = dz^T h / temperature

The three matmuls run in h's dtype, softmax and sums in fp32, dW accumulates in fp32: 6 N D V FLOPs,
8 where backward makes the logits again.

Bytes moved by the kernels in bf16: 2 per logit for log p and H, 4 for dz. A program walks along one
row with three running numbers: the maximum m, the sum of exp(z - m) and the sum of exp(z - m) z. dz
needs only what they end in, logsumexp and H, so both kernels read a logit once.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import backend, check, tl, triton

CHUNK = {"cpu": 2**22, "cuda": 2**28}      # logits at a time ...
ROWS = 128                                 # ... but at least 128 rows of them
KEEP = {"cpu": 2**25, "cuda": 2**29}       # up to as many logits stay, in h's dtype, for backward;
#                                            where there are more, backward makes them again
TILE = 4096                                # logits of a row that a kernel takes at a time


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor,
                                   temperature: float = 1.0, with_entropy: bool = False):
    """Arguments and results as for linear_cross_entropy()."""
    logits = hidden @ weight.to(hidden.dtype).T            # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logp = logits.log_softmax(-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    if not with_entropy:
        return picked
    entropy = -(logp.exp() * logp).sum(-1)
    return picked, entropy


# ---------------------------------------------------------------------- Triton

@triton.jit
def score_kernel(logits, targets, logp, lse, entropy, V, temperature, BLOCK: tl.constexpr):
    """log p of the target, logsumexp of z and H, of one row."""
    row = tl.program_id(0).to(tl.int64)                    # 64 bits, as N V may exceed 2^31
    m = -3e38                                              # max z so far; finite: inf - inf is NaN
    total = 0.0                                            # sum exp(z - m)
    weighted = 0.0                                         # sum exp(z - m) z

    for first in range(0, V, BLOCK):
        j = first + tl.arange(0, BLOCK)
        z = tl.load(logits + row * V + j, j < V, other=-float("inf")).to(tl.float32) / temperature
        m_new = tl.maximum(m, tl.max(z, 0))
        e = tl.exp(z - m_new)
        # sums of before counted from the old maximum
        shrink = tl.exp(m - m_new)
        total = total * shrink + tl.sum(e, 0)
        # behind V, and for logits of -inf, e z is 0 times -inf: NaN
        weighted_z = tl.where(e > 0, e * z, 0.0)
        weighted = weighted * shrink + tl.sum(weighted_z, 0)
        m = m_new

    log_sum = m + tl.log(total)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)                   # another id scores NaN, never a number
    picked = tl.load(logits + row * V + target, known, other=float("nan")).to(tl.float32)
    tl.store(logp + row, picked / temperature - log_sum)
    tl.store(lse + row, log_sum)
    tl.store(entropy + row, log_sum - weighted / total)


@triton.jit
def logit_gradient_kernel(logits, targets, g, e, lse, entropy, dz, V, temperature,
                          ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries of one row of dz."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * V + j, j < V, other=-float("inf")).to(tl.float32) / temperature
    logp = z - tl.load(lse + row)
    p = tl.exp(logp)

    g_row = tl.load(g + row)
    target = tl.load(targets + row)
    dz_tile = tl.where(j == target, g_row, 0.0) - g_row * p
    if ENTROPY:                                            # p log p is 0, not NaN, where p is 0
        surprise = tl.where(p > 0, logp + tl.load(entropy + row), 0.0)
        dz_tile -= tl.load(e + row) * p * surprise
    tl.store(dz + row * V + j, dz_tile.to(dz.dtype.element_ty), j < V)


def tile(V: int) -> dict:
    """The logits that a program takes at a time, at least 16 of them for each thread."""
    block = min(TILE, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}


@torch.library.custom_op("lifecycle::token_scores", mutates_args=())
def launch_scores(logits: Tensor, targets: Tensor,
                  temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, V), targets (N,) -> log p of the targets, logsumexp of z and H: (N,) in fp32."""
    N, V = logits.shape
    logits = check("logits", logits, (None, None))
    targets = check("targets", targets, (N,), (torch.int64, torch.int32))

    logp, lse, entropy = (logits.new_empty(N, dtype=torch.float32) for _ in range(3))
    if N:                                                  # a grid of no programs is an error
        score_kernel[(N,)](logits, targets, logp, lse, entropy, V, temperature, **tile(V))
    return logp, lse, entropy


@launch_scores.register_fake
def _(logits, targets, temperature):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("lifecycle::logit_gradient", mutates_args=())
def launch_gradient(logits: Tensor, targets: Tensor, g: Tensor, e: Tensor | None, lse: Tensor,
                    entropy: Tensor, temperature: float) -> Tensor:
    """dz of the formula, (N, V) in the dtype of the logits, for upstream g and e (N,)."""
    N, V = logits.shape
    logits = logits.contiguous()
    targets = targets.contiguous()
    g = check("the gradient of log p", g, (N,), (torch.float32,))
    if e is not None:
        e = check("the gradient of the entropy", e, (N,), (torch.float32,))

    dz = torch.empty_like(logits)
    tiles = tile(V)
    grid = N, triton.cdiv(V, tiles["BLOCK"])
    if N:
        logit_gradient_kernel[grid](logits, targets, g, e, lse, entropy, dz, V, temperature,
                                    e is not None, **tiles)
    return dz


@launch_gradient.register_fake
def _(logits, targets, g, e, lse, entropy, temperature):
    return logits.new_empty(logits.shape)


# ---------------------------------------------------------------------- torch

def scaled(logits: Tensor, temperature: float) -> Tensor:
    """z of the formula in fp32 (fp64 for fp64)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def logit_gradient(logits: Tensor, targets: Tensor, g: Tensor, temperature: float) -> Tensor:
    """g ([j = t] - p_j) in the dtype of the logits (rows, V)."""
    z = logits if temperature == 1.0 else scaled(logits, temperature)
    p = z.softmax(-1).to(logits.dtype)                     # softmax is fp32 inside
    g = g[:, None]
    dz = p.mul_(-g.to(logits.dtype))
    return dz.scatter_add_(1, targets[:, None], g.to(logits.dtype))


def logit_gradient_with_entropy(logits: Tensor, targets: Tensor, g: Tensor, temperature: float,
                                e: Tensor, entropies: Tensor) -> Tensor:
    """All of dz of the formula, in the dtype of the logits (rows, V)."""
    logp = scaled(logits, temperature).log_softmax(-1)     # (rows, V)
    g = g[:, None]
    # p_j (-e (log p_j + H) - g), then g for the target alone
    factor = (logp + entropies[:, None]).mul_(-e[:, None]).sub_(g)
    dz = logp.exp().mul_(factor)
    return dz.scatter_add_(1, targets[:, None], g).to(logits.dtype)


# ---------------------------------------------------------------------- both

def token_scores(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool):
    """log p of the targets, logsumexp of z (None in torch, which makes it again) and H or None."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if backend(logits.device) == "triton":
        return launch_scores(logits, targets, temperature)

    logp = scaled(logits, temperature).log_softmax(-1)
    picked = logp.gather(1, targets[:, None]).squeeze(1)
    entropy = None
    if with_entropy:
        entropy = torch.linalg.vecdot(logp.exp(), logp).neg_()
    return picked, None, entropy


def gradient(logits: Tensor, targets: Tensor, g: Tensor, e: Tensor | None, lse: Tensor | None,
             entropy: Tensor | None, temperature: float) -> Tensor:
    """dz of the formula, (rows, V) in the dtype of the logits; e None: H gets no gradient."""
    if lse is not None:                                    # only the kernels hand over lse
        return launch_gradient(logits, targets, g, e, lse, entropy, temperature)
    if e is None:
        return logit_gradient(logits, targets, g, temperature)
    return logit_gradient_with_entropy(logits, targets, g, temperature, e, entropy)


def joined(parts: list) -> Tensor | None:
    """The scores of all chunks in one; None where the chunks have None."""
    return None if not parts or parts[0] is None else torch.cat(parts)


class LinearCrossEntropy(torch.autograd.Function):
    """A chunk of rows at a time; their logits are kept for backward where KEEP allows it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy):
        V = len(weight)
        w = weight.to(hidden.dtype)
        device = hidden.device.type if hidden.is_cuda else "cpu"
        ctx.rows = max(ROWS, CHUNK[device] // V)
        ctx.temperature = temperature
        keep = len(hidden) * V <= KEEP[device]

        kept = []
        scores = []
        for h, t in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logits = h @ w.T                               # (rows, V)
            if keep:
                kept.append(logits)
            scores.append(token_scores(logits, t, temperature, with_entropy))

        logps, lse, entropies = (joined(parts) for parts in zip(*scores))
        ctx.save_for_backward(hidden, weight, targets, lse, entropies, *kept)
        return (logps, entropies) if with_entropy else logps

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, e: Tensor | None = None):
        hidden, weight, targets, lse, entropies, *kept = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        # g is 1 / N in a mean loss: divided by its largest entry, it is not rounded or lost in bf16
        floor = g.new_full((1,), torch.finfo(g.dtype).tiny)        # no division by 0
        upstream = (floor, g) if e is None else (floor, g, e)
        scale = torch.cat(upstream).abs().max()

        dh = torch.empty_like(hidden)
        dw = torch.zeros_like(weight, dtype=g.dtype)       # fp32, because many chunks are added up
        for i, first in enumerate(range(0, len(hidden), ctx.rows)):
            part = slice(first, first + ctx.rows)
            logits = kept[i] if kept else hidden[part] @ w.T
            lse_part, entropies_part = (None if x is None else x[part] for x in (lse, entropies))
            e_part = None if e is None else e[part] / scale
            dz = gradient(logits, targets[part], g[part] / scale, e_part, lse_part, entropies_part,
                          ctx.temperature)
            dh[part] = dz @ w
            if ctx.needs_input_grad[1]:
                dw += dz.T @ hidden[part]

        # dz was of z = h W^T / temperature, and of gradients divided by `scale`
        scale = scale / ctx.temperature
        return dh.mul_(scale), dw.mul_(scale).to(weight.dtype), None, None, None


class CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, with_entropy):
        logps, lse, entropies = token_scores(logits, targets, temperature, with_entropy)
        ctx.save_for_backward(logits, targets, lse, entropies)
        ctx.temperature = temperature
        return (logps, entropies) if with_entropy else logps

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, e: Tensor | None = None):
        logits, targets, lse, entropies = ctx.saved_tensors
        g = g / ctx.temperature
        if e is not None:
            e = e / ctx.temperature
        dlogits = gradient(logits, targets, g, e, lse, entropies, ctx.temperature)
        return dlogits, None, None, None


# ---------------------------------------------------------------------- public functions

def cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0,
                  with_entropy: bool = False):
    """logits (N, V), targets (N,) ids -> log-probabilities of the targets (N,) in nats, fp32;
    with_entropy: (log-probabilities, entropies (N,) in nats). Logits are divided by `temperature`.
    Raises ValueError when the shapes do not fit or temperature is not positive.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: they must "
                         "be (N, V) and (N,)")
    return CrossEntropy.apply(logits, targets, temperature, with_entropy)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         temperature: float = 1.0, with_entropy: bool = False):
    """hidden (N, D), weight (V, D), targets (N,) ids -> log-probabilities of the targets (N,) in
    nats, fp32; with_entropy: (log-probabilities, entropies (N,) in nats). Logits are divided by
    `temperature`. Raises ValueError when the shapes do not fit or temperature is not positive.
    """
    if hidden.dim() != 2 or hidden.shape[1:] != weight.shape[1:] \
            or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
                         f"{tuple(targets.shape)}: they must be (N, D), (V, D) and (N,)")

    N = len(hidden)
    missing = -N % ROWS
    if missing and hidden.device.type == "cpu":    # oneDNN takes 2 ms to prepare each new shape
        hidden = F.pad(hidden, (0, 0, 0, missing))
        targets = F.pad(targets, (0, missing))
        scores = linear_cross_entropy(hidden, weight, targets, temperature, with_entropy)
        return tuple(score[:N] for score in scores) if with_entropy else scores[:N]
    return LinearCrossEntropy.apply(hidden, weight, targets, temperature, with_entropy)
