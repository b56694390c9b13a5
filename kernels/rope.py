"""
Rotary position embedding (Su et al. 2021), rotating halves: channel c < C/2 forms a pair with
channel c + C/2, as in Llama's checkpoints (the documents pair neighbours: a permutation of q's and
k's channels).

    y[c]       = x[c] cos - x[c + C/2] sin           cos, sin of position * theta_c
    y[c + C/2] = x[c + C/2] cos + x[c] sin
    dx = the same turn of dy by the negative angle

Bytes moved by a fused kernel in bf16: 4 per element, forward and backward.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)        # the same for all heads

    def turn(x: Tensor) -> Tensor:
        first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return turn(q), turn(k)


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x (B, T, H, C) turned by sign times the angles, in fp32 and back to x.dtype."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    y = wide * torch.cat((cos, cos), -1).unsqueeze(-2)
    (first, second), (y1, y2) = wide.chunk(2, -1), y.chunk(2, -1)
    y1.addcmul_(second, sin.unsqueeze(-2), value=-sign)
    y2.addcmul_(first, sin.unsqueeze(-2), value=sign)
    return y.to(x.dtype)


class RoPE(torch.autograd.Function):
    """Keeps nothing but the tables: turning back needs no input."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turned(q, cos, sin, 1), turned(k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        cos, sin = ctx.saved_tensors
        return turned(dq, cos, sin, -1), turned(dk, cos, sin, -1), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q: (B, T, H, C), k: (B, T, K, C); cos, sin: fp32, (T, C/2) or (B, T, C/2), constants.

    Returns the turned q and k in their dtypes. Raises ValueError when the tables do not fit.
    """
    if cos.shape != sin.shape or cos.shape[-2:] != (q.shape[1], q.shape[-1] // 2):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be "
                         f"([{q.shape[0]},] {q.shape[1]}, {q.shape[-1] // 2}) for q "
                         f"{tuple(q.shape)}")
    if torch.compiler.is_compiling():                      # inductor fuses the formula by itself
        return rope_reference(q, k, cos, sin)
    return RoPE.apply(q, k, cos, sin)
