"""
Linear layer and softmax cross-entropy in one, a chunk of rows at a time: the fp32 logits of all
rows never exist together. The same function scores tokens for every stage's loss.

    z = h W^T / temperature        log p(t) = z_t - logsumexp(z)        H = -sum_j p_j log p_j
    for upstream gradients g of log p(t) and e of H:
    dz_j = g ([j = t] - p_j) - e p_j (log p_j + H)
    dh = dz W / temperature        dW = dz^T h / temperature

The three matmuls run in h's dtype, softmax and sums in fp32, dW accumulates in fp32.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22        # logits at a time (16 MB in fp32) ...
ROWS = 128           # ... but at least so many rows of them
KEEP = 2**25         # up to so many logits stay, in h's dtype, from forward to backward (64 MB in
#                      bf16); where there are more, backward computes them again


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor,
                                   temperature: float = 1.0, with_entropy: bool = False):
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logp = logits.log_softmax(-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    return (picked, -(logp.exp() * logp).sum(-1)) if with_entropy else picked


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """z of the formula in fp32 (fp64 for fp64)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def logit_gradient(logits: Tensor, targets: Tensor, g: Tensor, temperature: float) -> Tensor:
    """g ([j = t] - p_j) in the dtype of the logits (rows, V)."""
    z = logits if temperature == 1.0 else scaled(logits, temperature)
    dz = z.softmax(-1).to(logits.dtype).mul_(-g[:, None].to(logits.dtype))     # fp32 inside
    return dz.scatter_add_(1, targets[:, None], g[:, None].to(logits.dtype))


def logit_gradient_with_entropy(logits: Tensor, targets: Tensor, g: Tensor, temperature: float,
                                e: Tensor, entropies: Tensor) -> Tensor:
    """All of dz of the formula, in the dtype of the logits (rows, V)."""
    logp = scaled(logits, temperature).log_softmax(-1)
    dz = logp.exp().mul_((logp + entropies[:, None]).mul_(-e[:, None]).sub_(g[:, None]))
    return dz.scatter_add_(1, targets[:, None], g[:, None]).to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy):
        V, w = len(weight), weight.to(hidden.dtype)
        ctx.rows, ctx.temperature = max(ROWS, CHUNK // V), temperature
        kept, logps, entropies = [], [], []
        for h, t in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logits = h @ w.T                                       # (rows, V)
            if len(hidden) * V <= KEEP:
                kept.append(logits)
            logp = scaled(logits, temperature).log_softmax(-1)
            logps.append(logp.gather(1, t[:, None]).squeeze(1))
            if with_entropy:
                entropies.append(torch.linalg.vecdot(logp.exp(), logp).neg_())
        logps = torch.cat(logps)
        entropies = torch.cat(entropies) if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, entropies, *kept)
        return (logps, entropies) if with_entropy else logps

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, e: Tensor | None = None):
        hidden, weight, targets, entropies, *kept = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        # g is 1 / N in a mean loss: divided by its largest entry, it is not rounded or lost in bf16
        floor = g.new_full((1,), torch.finfo(g.dtype).tiny)
        scale = torch.cat((floor, g) if e is None else (floor, g, e)).abs().max()
        dh, dw = torch.empty_like(hidden), torch.zeros_like(weight, dtype=g.dtype)
        for i, first in enumerate(range(0, len(hidden), ctx.rows)):
            part = slice(first, first + ctx.rows)
            logits = kept[i] if kept else hidden[part] @ w.T
            arguments = logits, targets[part], g[part] / scale, ctx.temperature
            dz = logit_gradient(*arguments) if e is None else \
                logit_gradient_with_entropy(*arguments, e[part] / scale, entropies[part])
            dh[part] = dz @ w
            if ctx.needs_input_grad[1]:
                dw += dz.T @ hidden[part]
        scale = scale / ctx.temperature
        return dh.mul_(scale), dw.mul_(scale).to(weight.dtype), None, None, None


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
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return LinearCrossEntropy.apply(hidden, weight, targets, temperature, with_entropy)
