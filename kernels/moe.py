"""
The experts of a Mixture-of-Experts layer: every token goes through the SwiGLU of some experts, and
their outputs are summed, weighted by gates. Pair p sends token t = tokens[p] to expert e.

    [g; u] = W13_e x_t        h = silu(g) u        y_t = sum over the pairs p of t of gate_p W2_e h
    dh = W2_e^T dy_t          dgate_p = dh . h     (= dy_t . W2_e h, without the expert's output)
    dg = gate_p dh u s(g) (1 + g (1 - s(g)))       du = gate_p dh silu(g)        (see swiglu.py)
    dx_t = sum over p of W13_e^T [dg; du]
    dW13_e = sum over the pairs of e of [dg; du] x_t^T        dW2_e = ... of dy_t (gate_p h)^T

The routing hands over a dispatch list (P,) sorted by expert: expert e has the pairs offsets[e] to
offsets[e + 1]; what lies behind offsets[E] is unused. A token may be in any number of pairs.

FLOPs of a pair: 6 D F forward, 12 D F backward. Bytes in 16 bits: 8 F + 6 D forward, 20 F + 10 D
backward, and 6 D F for the weights of an expert. At D = 768, F = 2048 that is 450 FLOPs a byte, so
the tensor cores are the limit; for experts with less than 200 pairs it is reading the weights.
Kept for backward: [g; u], 4 F bytes a pair. To make it again takes 4 D F FLOPs: on an H200 longer
than writing and reading it where D is above 400.

The matmuls are tiles of one expert's pairs times a block of its matrix, the token's row fetched by
its index. Expert e starts at tile offsets[e] // BLOCK_M + e, which is room enough for everyone, so
a program finds its expert from the offsets on the GPU alone; programs that find none stop. Each
pair writes its own row of the output, and a kernel adds the rows of each token in the order of
the list: one result for one list, where atomic additions would give sums in any order, in fp32,
and no fewer bytes. Pairs of a token are found by sorting the list once. (Sources: Gale et al. 2022,
MegaBlocks; Tan et al. 2024, ScatterMoE.)
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import INTERPRETED, backend, check, shared_memory, tl, triton
from kernels.swiglu import swiglu_reference

GROUP = 2 if INTERPRETED else 8      # tiles of pairs that walk over a matrix together, sharing L2
INTEGERS = (torch.int32, torch.int64)


def moe_experts_reference(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                          offsets: Tensor) -> Tensor:
    x_wide, w13, w2 = (z.to(gates.dtype) for z in (x, w13.to(x.dtype), w2.to(x.dtype)))
    y = [0 * row for row in x_wide]
    for e, (first, end) in enumerate(pairwise(offsets.tolist())):
        for p in range(first, end):
            n = tokens[p]
            y[n] = y[n] + gates[p] * (w2[e] @ swiglu_reference(w13[e] @ x_wide[n]))
    return torch.stack(y).to(x.dtype)


# ---------------------------------------------------------------------- Triton

@triton.jit
def pairs_of_tile(offsets, E: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
                  BLOCK_M: tl.constexpr):
    """The expert of this program's tile, the tile's first pair, and where the expert's pairs end
    (before it, when there is nothing to do)."""
    tile = tl.program_id(2) * GROUP + tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    next_start = tl.load(offsets + 1 + e, e < E, other=0) // BLOCK_M + 1 + e
    expert = tl.sum(((e < E) & (next_start <= tile)).to(tl.int32), 0)        # E: behind the last
    first = tl.load(offsets + expert).to(tl.int64)
    end = tl.load(offsets + expert + 1, expert < E, other=0).to(tl.int64)
    return expert.to(tl.int64), first + (tile - first // BLOCK_M - expert) * BLOCK_M, end


@triton.jit
def product(a, row, row_mask, w, column, column_mask, K: tl.constexpr, STRIDE_N: tl.constexpr,
            STRIDE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_N) in fp32: rows of a (., K) times columns of w."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        here = first + k
        a_tile = tl.load(a + row[:, None] * K + here, row_mask[:, None] & (here < K), other=0.0)
        w_tile = tl.load(w + column * STRIDE_N + here[:, None] * STRIDE_K,
                         column_mask & (here[:, None] < K), other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_kernel(x, w13, tokens, offsets, gate_up, hidden, E: tl.constexpr, D: tl.constexpr,
                   F: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns of the tile alternate between gate and up: a thread holds both of a hidden unit."""
    expert, first, end = pairs_of_tile(offsets, E, BLOCK_E, GROUP, BLOCK_M)
    if first >= end:
        return
    p = first + tl.arange(0, BLOCK_M)
    token = tl.load(tokens + p, p < end, other=0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product(x, token, p < end, w13 + expert * 2 * F * D, column // 2 + column % 2 * F,
                  column < 2 * F, D, D, 1, BLOCK_M, BLOCK_N, BLOCK_K)
    g, u = tl.split(acc.reshape(BLOCK_M, BLOCK_N // 2, 2))
    f = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    mask, at = (p < end)[:, None] & (f < F), p[:, None] * F
    tl.store(gate_up + 2 * at + f, g.to(gate_up.dtype.element_ty), mask)
    tl.store(gate_up + 2 * at + f + F, u.to(gate_up.dtype.element_ty), mask)
    tl.store(hidden + at + f, (g * tl.sigmoid(g) * u).to(hidden.dtype.element_ty), mask)


@triton.jit
def rows_kernel(a, w, gates, offsets, out, E: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, GATED: tl.constexpr,
                BLOCK_E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (P, N) = a (P, K) times the expert's matrix, times the gate if GATED."""
    expert, first, end = pairs_of_tile(offsets, E, BLOCK_E, GROUP, BLOCK_M)
    if first >= end:
        return
    p = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product(a, p, p < end, w + expert * K * N, n, n < N, K, STRIDE_N, STRIDE_K, BLOCK_M,
                  BLOCK_N, BLOCK_K)
    if GATED:
        acc *= tl.load(gates + p, p < end, other=0.0)[:, None]
    tl.store(out + p[:, None] * N + n, acc.to(out.dtype.element_ty), (p < end)[:, None] & (n < N))


@triton.jit
def activation_backward(dh, f, p, end, gates, gate_up, d_gate_up, gated_hidden, F: tl.constexpr):
    """All that follows from dh of pairs p and hidden units f; returns dh . h over these units."""
    mask, at = (p < end)[:, None] & (f < F), p[:, None] * F
    gate = tl.load(gates + p, p < end, other=0.0)[:, None]
    g = tl.load(gate_up + 2 * at + f, mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + 2 * at + f + F, mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    h = g * s * u
    dg = gate * dh * u * s * (1 + g * (1 - s))
    tl.store(gated_hidden + at + f, (gate * h).to(gated_hidden.dtype.element_ty), mask)
    tl.store(d_gate_up + 2 * at + f, dg.to(d_gate_up.dtype.element_ty), mask)
    tl.store(d_gate_up + 2 * at + f + F, (gate * dh * g * s).to(d_gate_up.dtype.element_ty), mask)
    return tl.sum(dh * h, 1)


@triton.jit
def hidden_backward_kernel(dy, w2, gate_up, tokens, gates, offsets, d_gate_up, gated_hidden,
                           dgate_shares, pairs, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
                           BLOCK_E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dh, and what follows from it half a tile at a time: there are not registers for a whole."""
    expert, first, end = pairs_of_tile(offsets, E, BLOCK_E, GROUP, BLOCK_M)
    if first >= end:
        return
    p = first + tl.arange(0, BLOCK_M)
    token = tl.load(tokens + p, p < end, other=0)
    f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dh = product(dy, token, p < end, w2 + expert * D * F, f, f < F, D, 1, F, BLOCK_M, BLOCK_N,
                 BLOCK_K)
    left, right = tl.split(dh.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dgate = activation_backward(left, f, p, end, gates, gate_up, d_gate_up, gated_hidden, F)
    dgate += activation_backward(right, f + BLOCK_N // 2, p, end, gates, gate_up, d_gate_up,
                                 gated_hidden, F)
    tl.store(dgate_shares + tl.program_id(1).to(tl.int64) * pairs + p, dgate, p < end)


@triton.jit
def weight_gradient_kernel(left, right, tokens, offsets, dw, M: tl.constexpr, N: tl.constexpr,
                           LEFT_BY_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dw[e] (M, N) = sum over the expert's pairs of the outer products of rows of left (., M) and
    right (., N): one is indexed by pair, the other by token."""
    expert = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets + expert).to(tl.int32)
    end = tl.load(offsets + expert + 1).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        p = first + tl.arange(0, BLOCK_K)
        token = tl.load(tokens + p, p < end, other=0)
        left_row, right_row = p.to(tl.int64), token
        if LEFT_BY_TOKEN:
            left_row, right_row = right_row, left_row
        left_tile = tl.load(left + left_row * M + m, (m < M) & (p < end), other=0.0)
        right_tile = tl.load(right + right_row[:, None] * N + n, (p < end)[:, None] & (n < N),
                             other=0.0)
        acc = tl.dot(left_tile, right_tile, acc, input_precision="ieee")
    tl.store(dw + expert * M * N + m * N + n, acc.to(dw.dtype.element_ty), (m < M) & (n < N))


@triton.jit
def sum_pairs_kernel(rows, order, starts, y, D: tl.constexpr, BLOCK: tl.constexpr):
    """y[n] = the sum of the rows of the token's pairs, order[starts[n]:starts[n + 1]]."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts + n), tl.load(starts + n + 1)):
        p = tl.load(order + i)
        acc += tl.load(rows + p * D + d, d < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + d, acc.to(y.dtype.element_ty), d < D)


def tiling(x: Tensor) -> dict:
    """The tile of a matmul's program; fp32 keeps off the tensor cores, and needs registers.

    128 pairs at a time even where experts have fewer: multiplying zeros takes no longer than
    reading the weights, which is what there is to wait for."""
    if INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_stages": 1}
    if x.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8,
            "num_stages": 4 if shared_memory(x.device) > 2**17 else 3}


def over_pairs(kernel, width: int, experts: int, pairs: int, tiles: dict, *arguments) -> None:
    """Launch a program for each tile of pairs and each block of `width` columns."""
    grid = (GROUP, triton.cdiv(width, tiles["BLOCK_N"]),
            triton.cdiv(pairs // tiles["BLOCK_M"] + experts, GROUP))
    kernel[grid](*arguments, triton.next_power_of_2(experts), GROUP, **tiles)


def weight_gradient(left: Tensor, right: Tensor, tokens: Tensor, offsets: Tensor, dtype,
                    left_by_token: bool, tiles: dict) -> Tensor:
    M, N, E = left.shape[1], right.shape[1], len(offsets) - 1
    dw = left.new_empty(E, M, N, dtype=dtype)
    tiles = tiles | {"num_stages": 2 * tiles["num_stages"] - 1}      # a row waits for its index
    grid = (triton.cdiv(N, tiles["BLOCK_N"]), triton.cdiv(M, tiles["BLOCK_M"]), E)
    weight_gradient_kernel[grid](left, right, tokens, offsets, dw, M, N, left_by_token, **tiles)
    return dw


def sum_pairs(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """(P, D) -> (N, D)."""
    N, D = len(starts) - 1, rows.shape[1]
    y = rows.new_empty(N, D)
    block = min(2048, triton.next_power_of_2(D))
    if N:
        sum_pairs_kernel[(N, triton.cdiv(D, block))](rows, order, starts, y, D, block)
    return y


def pairs_of_tokens(tokens: Tensor, offsets: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """order (P,), starts (N + 1,): the pairs of token n are order[starts[n]:starts[n + 1]],
    ascending; unused ones come behind them all."""
    unused = torch.arange(len(tokens), device=tokens.device) >= offsets[-1]
    ascending, order = tokens.masked_fill(unused, N).to(torch.int32).sort(stable=True)
    tokens = torch.arange(N + 1, device=tokens.device, dtype=torch.int32)
    return order, torch.searchsorted(ascending, tokens)


def checked(x, w13, w2, tokens, gates, offsets):
    """What the kernels can address, the weights in the dtype of x."""
    (N, D), (E, _, F), P = x.shape, w2.shape, len(tokens)
    return (check("x", x, (N, D)), check("w13", w13, (E, 2 * F, D)).to(x.dtype),
            check("w2", w2, (E, D, F)).to(x.dtype), check("tokens", tokens, (P,), (torch.int64,)),
            check("gates", gates, (P,), (torch.float32,)),
            check("offsets", offsets, (E + 1,), INTEGERS))


@torch.library.custom_op("lifecycle::moe_forward", mutates_args=())
def launch_forward(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                   offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y (N, D), gate_up (P, 2F; unused rows are not written), and the pairs of each token:
    order (P,), starts (N + 1,)."""
    x, w13, w2, tokens, gates, offsets = checked(x, w13, w2, tokens, gates, offsets)
    (N, D), (E, _, F), P = x.shape, w2.shape, len(tokens)
    tiles = tiling(x)
    gate_up, hidden, out = (x.new_empty(P, width) for width in (2 * F, F, D))
    over_pairs(gate_up_kernel, 2 * F, E, P, tiles,
               x, w13, tokens, offsets, gate_up, hidden, E, D, F)
    over_pairs(rows_kernel, D, E, P, tiles,
               hidden, w2, gates, offsets, out, E, F, D, F, 1, True)
    order, starts = pairs_of_tokens(tokens, offsets, N)
    return sum_pairs(out, order, starts), gate_up, order, starts


@launch_forward.register_fake
def _(x, w13, w2, tokens, gates, offsets):
    P = tokens.shape[0]
    return (x.new_empty(x.shape), x.new_empty(P, w13.shape[1]), tokens.new_empty(P),
            tokens.new_empty(x.shape[0] + 1))


@torch.library.custom_op("lifecycle::moe_backward", mutates_args=())
def launch_backward(dy: Tensor, weights: bool, x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor,
                    gates: Tensor, offsets: Tensor, gate_up: Tensor, order: Tensor,
                    starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dw13, dw2 (both empty without `weights`), dgates."""
    dtypes = w13.dtype, w2.dtype
    x, w13, w2, tokens, gates, offsets = checked(x, w13, w2, tokens, gates, offsets)
    (N, D), (E, _, F), P = x.shape, w2.shape, len(tokens)
    dy = check("the gradient of y", dy, (N, D), (x.dtype,))
    tiles = tiling(x)
    d_gate_up, gated_hidden, dx_pairs = (x.new_empty(P, width) for width in (2 * F, F, D))
    dgate_shares = gates.new_zeros(triton.cdiv(F, tiles["BLOCK_N"]), P)
    over_pairs(hidden_backward_kernel, F, E, P, tiles,
               dy, w2, gate_up, tokens, gates, offsets, d_gate_up, gated_hidden, dgate_shares, P,
               E, D, F)
    over_pairs(rows_kernel, D, E, P, tiles,
               d_gate_up, w13, gates, offsets, dx_pairs, E, 2 * F, D, 1, D, False)
    dw13, dw2 = (w.new_empty(0, dtype=dtype) for w, dtype in zip((w13, w2), dtypes))
    if weights:
        dw13 = weight_gradient(d_gate_up, x, tokens, offsets, dtypes[0], False, tiles)
        dw2 = weight_gradient(dy, gated_hidden, tokens, offsets, dtypes[1], True, tiles)
    return sum_pairs(dx_pairs, order, starts), dw13, dw2, dgate_shares.sum(0)


@launch_backward.register_fake
def fake_backward(dy, weights, x, w13, w2, tokens, gates, offsets, gate_up, *kept):
    return (x.new_empty(x.shape), *(w.new_empty(w.shape if weights else 0) for w in (w13, w2)),
            gates.new_empty(gates.shape))


# ---------------------------------------------------------------------- torch

def grouped_mm_serves(a: Tensor, b: Tensor) -> bool:
    """torch >= 2.10 multiplies all experts in one launch, in bf16, rows of whole 16 bytes."""
    return (hasattr(F, "grouped_mm") and a.is_cuda and a.dtype == torch.bfloat16 and len(a) > 0
            and a.shape[-1] % 8 == 0 and b.shape[-1] % 8 == 0)


def expert_rows(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """a (P, K), w (E, K, N) -> (P, N): each row times its expert's matrix; zeros if unused."""
    if grouped_mm_serves(a, w):                        # leaves unused rows as memory had them
        unused = torch.arange(len(a), device=a.device) >= offsets[-1]
        return F.grouped_mm(a, w, offs=offsets[1:].int()).masked_fill_(unused[:, None], 0)
    out = a.new_zeros(len(a), w.shape[-1])
    for e, (first, end) in enumerate(pairwise(offsets.tolist())):
        torch.mm(a[first:end], w[e], out=out[first:end])
    return out


def expert_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a (P, M), b (P, N) -> (E, M, N): the sums of a's rows times b's, expert by expert."""
    if grouped_mm_serves(a, b):                        # on some GPUs wrong for experts without rows
        dw = F.grouped_mm(a.T, b, offs=offsets[1:].int())
        return dw.masked_fill_((offsets.diff() == 0)[:, None, None], 0)
    dw = a.new_empty(len(offsets) - 1, a.shape[1], b.shape[1])
    for e, (first, end) in enumerate(pairwise(offsets.tolist())):
        torch.mm(a[first:end].T, b[first:end], out=dw[e])
    return dw


@torch.library.custom_op("lifecycle::moe_torch_forward", mutates_args=())
def torch_forward(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                  offsets: Tensor) -> tuple[Tensor, Tensor]:
    """-> y (N, D), gate_up (P, 2F). An operation to the compiler: it cannot see the offsets."""
    gate_up = expert_rows(x.index_select(0, tokens), w13.to(x.dtype).mT, offsets)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    out = expert_rows(F.silu(gate).mul_(up), w2.to(x.dtype).mT, offsets)
    y = gates.new_zeros(x.shape).index_add_(0, tokens, out * gates[:, None])
    return y.to(x.dtype), gate_up


@torch_forward.register_fake
def _(x, w13, w2, tokens, gates, offsets):
    return x.new_empty(x.shape), x.new_empty(tokens.shape[0], w13.shape[1])


@torch.library.custom_op("lifecycle::moe_torch_backward", mutates_args=())
def torch_backward(dy: Tensor, weights: bool, x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor,
                   gates: Tensor, offsets: Tensor,
                   gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dw13, dw2 (both empty without `weights`), dgates."""
    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    silu, dy_pairs = F.silu(gate), dy.index_select(0, tokens)
    hidden = silu * up
    dh = expert_rows(dy_pairs, w2.to(x.dtype), offsets)
    dgates = (dh * hidden).sum(-1, dtype=gates.dtype)
    dh = (dh * gates[:, None]).to(x.dtype)
    dg = torch.ops.aten.silu_backward(up * dh, gate)
    d_gate_up = torch.cat((dg, silu.mul_(dh)), -1)
    dx_pairs = expert_rows(d_gate_up, w13.to(x.dtype), offsets)
    dx = gates.new_zeros(x.shape).index_add_(0, tokens, dx_pairs.to(gates.dtype)).to(x.dtype)
    dw13, dw2 = w13.new_empty(0), w2.new_empty(0)
    if weights:
        gated_hidden = (hidden * gates[:, None]).to(x.dtype)
        dw13 = expert_outer(d_gate_up, x.index_select(0, tokens), offsets).to(w13.dtype)
        dw2 = expert_outer(dy_pairs, gated_hidden, offsets).to(w2.dtype)
    return dx, dw13, dw2, dgates


torch_backward.register_fake(fake_backward)


# ---------------------------------------------------------------------- public function

class Experts(torch.autograd.Function):
    """Keeps the inputs and gate_up; frozen weights cost no gradient."""

    @staticmethod
    def forward(ctx, fused: bool, x: Tensor, w13: Tensor, w2: Tensor, *dispatch: Tensor) -> Tensor:
        y, *kept = (launch_forward if fused else torch_forward)(x, w13, w2, *dispatch)
        ctx.save_for_backward(x, w13, w2, *dispatch, *kept)
        ctx.fused = fused
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dx, dw13, dw2, dgates = (launch_backward if ctx.fused else torch_backward)(
            dy, weights, *ctx.saved_tensors)
        return (None, dx, *((dw13, dw2) if weights else (None, None)), None, dgates, None)


def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                offsets: Tensor) -> Tensor:
    """x: (N, D); w13: (E, 2F, D), gate and up of each expert; w2: (E, D, F); weights are cast to
    x.dtype. tokens: (P,) int64 below N; gates: (P,) fp32; offsets: (E + 1,) integers ascending from
    0 to P at most, not looked at on the host.

    Returns y (N, D) in x.dtype, with gradients to x, w13, w2 and gates; zeros for tokens in no
    pair. Raises ValueError when shapes or dtypes do not fit.
    """
    if x.dim() != 2 or w13.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, w13 {tuple(w13.shape)}; they must be "
                         "(N, D) and (E, 2F, D)")
    D, E, F, P = x.shape[1], len(w13), w13.shape[1] // 2, tokens.numel()
    for name, z, shape, dtypes in (
            ("w13", w13, (E, 2 * F, D), None), ("w2", w2, (E, D, F), None),
            ("tokens", tokens, (P,), (torch.int64,)), ("offsets", offsets, (E + 1,), INTEGERS),
            ("gates", gates, (P,), (torch.promote_types(x.dtype, torch.float32),))):
        if z.shape != shape or dtypes and z.dtype not in dtypes:
            raise ValueError(f"{name} is {tuple(z.shape)} in {z.dtype}; for x {tuple(x.shape)} in "
                             f"{x.dtype} and {E} experts it must be {shape} in {dtypes or 'any'}")
    return Experts.apply(backend(x.device) == "triton", x, w13, w2, tokens, gates, offsets)
