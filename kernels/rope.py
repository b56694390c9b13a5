"""
Rotary position embedding (Su et al. 2021), rotating halves: channel c < C/2 forms a pair with
channel c + C/2, as in Llama's checkpoints (the documents pair neighbours: a permutation of q's and
k's channels).

    y[c]       = x[c] cos - x[c + C/2] sin           cos, sin of position * theta_c
    y[c + C/2] = x[c + C/2] cos + x[c] sin
    dx = the same turn of dy by the negative angle

Bytes moved in bf16: 4 per element, forward and backward. One launch turns q and k: a program takes
one token's heads, so that its row of the tables is read once for all of them.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import backend, check, tl, triton


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as for rope()."""
    # (T, 1, C): the same for all heads, and for both halves of the channels
    cos = torch.cat((cos, cos), -1).unsqueeze(-2)
    sin = torch.cat((-sin, sin), -1).unsqueeze(-2)         # the first half of y subtracts

    def turn(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, cos.dtype))
        first, second = wide.chunk(2, dim=-1)
        others = torch.cat((second, first), -1)            # the other channel of each pair
        return (wide * cos + others * sin).to(x.dtype)

    return turn(q), turn(k)


# ---------------------------------------------------------------------- Triton

@triton.jit
def turn_heads(x, y, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
               BLOCK_C: tl.constexpr):
    """All heads of the program's token, (HEADS, 2 HALF), from x to y."""
    h = tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_C)
    mask = (h < HEADS) & (c < HALF)
    head = tl.program_id(0).to(tl.int64) * HEADS + h       # counted over all tokens
    at = head * 2 * HALF + c                               # (BLOCK_H, BLOCK_C): the first halves

    first = tl.load(x + at, mask, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask, other=0.0).to(tl.float32)
    tl.store(y + at, (first * cos - second * sin).to(y.dtype.element_ty), mask)
    tl.store(y + at + HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask)


@triton.jit
def rope_kernel(q, k, cos, sin, q_out, k_out, table_rows, sign, H: tl.constexpr, K: tl.constexpr,
                HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_C: tl.constexpr):
    """All heads of q and of k of one token."""
    c = tl.arange(0, BLOCK_C)
    # tables of positions have T rows, and serve all B texts
    table_row = tl.program_id(0) % table_rows
    at = table_row.to(tl.int64) * HALF + c
    cos_row = tl.load(cos + at, c < HALF, other=0.0)
    sin_row = tl.load(sin + at, c < HALF, other=0.0) * sign
    turn_heads(q, q_out, cos_row, sin_row, H, HALF, BLOCK_H, BLOCK_C)
    turn_heads(k, k_out, cos_row, sin_row, K, HALF, BLOCK_K, BLOCK_C)


@torch.library.custom_op("lifecycle::rope", mutates_args=())
def launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """q (B, T, H, C), k (B, T, K, C) turned by sign times the angles of tables whose rows stand for
    tokens (B T) or, the same for all B, for positions (T)."""
    B, T, H, C = q.shape
    K = k.shape[2]
    q = check("q", q, (B, T, H, C))
    k = check("k", k, (B, T, K, C), (q.dtype,))
    cos = check("cos", cos, cos.shape, (torch.float32,))
    sin = check("sin", sin, sin.shape, (torch.float32,))

    q_out = torch.empty_like(q)
    k_out = torch.empty_like(k)
    half = C // 2
    blocks = [triton.next_power_of_2(n) for n in (H, K, half)]
    warps = 4 if H * C <= 4096 else 8
    if q.numel():
        table_rows = cos.numel() // half
        rope_kernel[(B * T,)](q, k, cos, sin, q_out, k_out, table_rows, sign, H, K, half, *blocks,
                              num_warps=warps)
    return q_out, k_out


@launch.register_fake
def _(q, k, cos, sin, sign):
    return (q.new_empty(q.shape), k.new_empty(k.shape))


class FusedRoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return launch(q, k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        cos, sin = ctx.saved_tensors
        return *launch(dq, dk, cos, sin, -1), None, None


# ---------------------------------------------------------------------- public function

def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q: (B, T, H, C), k: (B, T, K, C); cos, sin: fp32, (T, C/2) or (B, T, C/2), constants.

    Returns the turned q and k in their dtypes. Raises ValueError when the tables do not fit.
    """
    B, T, _, C = q.shape
    if cos.shape != sin.shape or cos.shape[-2:] != (T, C // 2):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be "
                         f"([{B},] {T}, {C // 2}) for q {tuple(q.shape)}")
    if backend(q.device) == "triton":
        return FusedRoPE.apply(q, k, cos, sin)
    return rope_reference(q, k, cos, sin)                  # on CPUs nothing by hand was faster
