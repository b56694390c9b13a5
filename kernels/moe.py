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
    """Arguments and result as for moe_experts(); one pair at a time."""
    x_wide = x.to(gates.dtype)
    w13 = w13.to(x.dtype).to(gates.dtype)                  # rounded to x.dtype, as the matmuls do
    w2 = w2.to(x.dtype).to(gates.dtype)
    y = [0 * row for row in x_wide]
    for e, (first, end) in enumerate(pairwise(offsets.tolist())):
        for p in range(first, end):
            n = tokens[p]
            hidden = swiglu_reference(w13[e] @ x_wide[n])
            y[n] = y[n] + gates[p] * (w2[e] @ hidden)
    return torch.stack(y).to(x.dtype)


# ---------------------------------------------------------------------- Triton

@triton.jit
def pairs_of_tile(offsets, E: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
                  BLOCK_M: tl.constexpr):
    """The expert of this program's tile, the tile's first pair, and where the expert's pairs end
    (before it, when there is nothing to do)."""
    tile = tl.program_id(2) * GROUP + tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    # the first tile of expert e + 1. Example: BLOCK_M 16, expert 1 begins with pair 20:
    # its first tile is 20 // 16 + 1 = 2
    next_start = tl.load(offsets + 1 + e, e < E, other=0) // BLOCK_M + 1 + e
    # as many experts end before this tile as the number of its expert; E: behind the last
    expert = tl.sum(((e < E) & (next_start <= tile)).to(tl.int32), 0)

    first = tl.load(offsets + expert).to(tl.int64)
    end = tl.load(offsets + expert + 1, expert < E, other=0).to(tl.int64)
    return expert.to(tl.int64), first + (tile - first // BLOCK_M - expert) * BLOCK_M, end


@triton.jit
def product(a, row, row_mask, w, column, column_mask, K: tl.constexpr, STRIDE_N: tl.constexpr,
            STRIDE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_N) in fp32: rows of a (., K) times columns of w."""
    offsets_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + offsets_k
        # (BLOCK_M, BLOCK_K) of a and (BLOCK_K, BLOCK_N) of w; zeros outside add nothing
        a_tile = tl.load(a + row[:, None] * K + k, row_mask[:, None] & (k < K), other=0.0)
        w_tile = tl.load(w + column * STRIDE_N + k[:, None] * STRIDE_K,
                         column_mask & (k[:, None] < K), other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_kernel(x, w13, tokens, offsets, gate_up, hidden, E: tl.constexpr, D: tl.constexpr,
                   F: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[g; u] and h of BLOCK_M pairs and BLOCK_N / 2 hidden units.

    Columns of the tile alternate between gate and up: a thread holds both of a hidden unit."""
    expert, first, end = pairs_of_tile(offsets, E, BLOCK_E, GROUP, BLOCK_M)
    if first >= end:
        return
    p = first + tl.arange(0, BLOCK_M)
    token = tl.load(tokens + p, p < end, other=0)

    # columns 0, 1, 2, 3 ... of the tile are rows 0, F, 1, F + 1 ... of W13
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product(x, token, p < end, w13 + expert * 2 * F * D, column // 2 + column % 2 * F,
                  column < 2 * F, D, D, 1, BLOCK_M, BLOCK_N, BLOCK_K)
    g, u = tl.split(acc.reshape(BLOCK_M, BLOCK_N // 2, 2))

    f = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    mask = (p < end)[:, None] & (f < F)
    at = p[:, None] * F                                    # rows of h; those of [g; u] are 2F wide
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
    if GATED:                                              # in fp32, before the row is rounded
        acc *= tl.load(gates + p, p < end, other=0.0)[:, None]
    tl.store(out + p[:, None] * N + n, acc.to(out.dtype.element_ty), (p < end)[:, None] & (n < N))


@triton.jit
def activation_backward(dh, f, p, end, gates, gate_up, d_gate_up, gated_hidden, F: tl.constexpr):
    """Stores gate_p h and [dg; du] of pairs p and hidden units f; returns dh . h over these units.

    dh: (pairs, units), before the gate."""
    mask = (p < end)[:, None] & (f < F)
    at = p[:, None] * F
    gate = tl.load(gates + p, p < end, other=0.0)[:, None]
    g = tl.load(gate_up + 2 * at + f, mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up + 2 * at + f + F, mask, other=0.0).to(tl.float32)

    # h is made again, because [g; u] alone was kept
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
    """dh of BLOCK_M pairs and BLOCK_N hidden units; from it [dg; du], gate_p h, shares of dgate."""
    expert, first, end = pairs_of_tile(offsets, E, BLOCK_E, GROUP, BLOCK_M)
    if first >= end:
        return
    p = first + tl.arange(0, BLOCK_M)
    token = tl.load(tokens + p, p < end, other=0)

    f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dh = product(dy, token, p < end, w2 + expert * D * F, f, f < F, D, 1, F, BLOCK_M, BLOCK_N,
                 BLOCK_K)

    # half of the units at a time, because registers do not hold g, u, s and h of a whole tile
    left, right = tl.split(dh.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dgate = activation_backward(left, f, p, end, gates, gate_up, d_gate_up, gated_hidden, F)
    dgate += activation_backward(right, f + BLOCK_N // 2, p, end, gates, gate_up, d_gate_up,
                                 gated_hidden, F)

    # a row of shares for each block of units, because programs of other blocks add to dgate too
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
        left_row = p.to(tl.int64)
        right_row = token
        if LEFT_BY_TOKEN:
            left_row, right_row = right_row, left_row
        # (BLOCK_M, BLOCK_K) and (BLOCK_K, BLOCK_N), summed over pairs
        left_tile = tl.load(left + left_row * M + m, (m < M) & (p < end), other=0.0)
        right_tile = tl.load(right + right_row[:, None] * N + n, (p < end)[:, None] & (n < N),
                             other=0.0)
        acc = tl.dot(left_tile, right_tile, acc, input_precision="ieee")
    # experts without pairs store zeros: nothing else clears dw
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
    stages = 4 if shared_memory(x.device) > 2**17 else 3   # 32 KB a stage: both operands
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}


def over_pairs(kernel, width: int, experts: int, pairs: int, tiles: dict, *arguments) -> None:
    """Launch a program for each tile of pairs and each block of `width` columns."""
    columns = triton.cdiv(width, tiles["BLOCK_N"])
    tiles_of_pairs = pairs // tiles["BLOCK_M"] + experts   # room for one broken tile an expert
    # programs start in the order of the first index: GROUP tiles of pairs share a block of columns
    grid = GROUP, columns, triton.cdiv(tiles_of_pairs, GROUP)
    kernel[grid](*arguments, triton.next_power_of_2(experts), GROUP, **tiles)


def weight_gradient(left: Tensor, right: Tensor, tokens: Tensor, offsets: Tensor, dtype,
                    left_by_token: bool, tiles: dict) -> Tensor:
    """left (P or N, M), right (N or P, N) -> dw (E, M, N) in dtype; left_by_token says which."""
    M = left.shape[1]
    N = right.shape[1]
    E = len(offsets) - 1
    dw = left.new_empty(E, M, N, dtype=dtype)
    # load further ahead than elsewhere, because a row waits for its index
    tiles = tiles | {"num_stages": 2 * tiles["num_stages"] - 1}
    grid = (triton.cdiv(N, tiles["BLOCK_N"]), triton.cdiv(M, tiles["BLOCK_M"]), E)
    weight_gradient_kernel[grid](left, right, tokens, offsets, dw, M, N, left_by_token, **tiles)
    return dw


def sum_pairs(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """rows (P, D) of pairs -> (N, D), each token's rows added up. order, starts: pairs_of_tokens().
    """
    N = len(starts) - 1
    D = rows.shape[1]
    y = rows.new_empty(N, D)
    block = min(2048, triton.next_power_of_2(D))
    if N:                                                  # a grid of no programs is an error
        grid = N, triton.cdiv(D, block)
        sum_pairs_kernel[grid](rows, order, starts, y, D, block)
    return y


def pairs_of_tokens(tokens: Tensor, offsets: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """order (P,), starts (N + 1,): the pairs of token n are order[starts[n]:starts[n + 1]],
    ascending; unused pairs come behind them all."""
    unused = torch.arange(len(tokens), device=tokens.device) >= offsets[-1]
    token_or_none = tokens.masked_fill(unused, N).to(torch.int32)      # N sorts behind all tokens
    ascending, order = token_or_none.sort(stable=True)
    numbers = torch.arange(N + 1, device=tokens.device, dtype=torch.int32)
    return order, torch.searchsorted(ascending, numbers)


def checked(x, w13, w2, tokens, gates, offsets):
    """The arguments as the kernels can address them, the weights in the dtype of x."""
    N, D = x.shape
    E, _, F = w2.shape
    P = len(tokens)
    x = check("x", x, (N, D))
    w13 = check("w13", w13, (E, 2 * F, D)).to(x.dtype)
    w2 = check("w2", w2, (E, D, F)).to(x.dtype)
    tokens = check("tokens", tokens, (P,), (torch.int64,))
    gates = check("gates", gates, (P,), (torch.float32,))
    offsets = check("offsets", offsets, (E + 1,), INTEGERS)
    return x, w13, w2, tokens, gates, offsets


@torch.library.custom_op("lifecycle::moe_forward", mutates_args=())
def launch_forward(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                   offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y (N, D), gate_up (P, 2F; unused rows are not written), and the pairs of each token:
    order (P,), starts (N + 1,)."""
    x, w13, w2, tokens, gates, offsets = checked(x, w13, w2, tokens, gates, offsets)
    N, D = x.shape
    E, _, F = w2.shape
    P = len(tokens)
    tiles = tiling(x)

    # h = silu(W13 x) for each pair
    gate_up = x.new_empty(P, 2 * F)
    hidden = x.new_empty(P, F)
    over_pairs(gate_up_kernel, 2 * F, E, P, tiles,
               x, w13, tokens, offsets, gate_up, hidden, E, D, F)

    # gate_p W2 h for each pair, then the sum of each token's pairs
    out = x.new_empty(P, D)
    over_pairs(rows_kernel, D, E, P, tiles,
               hidden, w2, gates, offsets, out, E, F, D, F, 1, True)
    order, starts = pairs_of_tokens(tokens, offsets, N)
    return sum_pairs(out, order, starts), gate_up, order, starts


@launch_forward.register_fake
def _(x, w13, w2, tokens, gates, offsets):
    N = x.shape[0]
    P = tokens.shape[0]
    gate_up = x.new_empty(P, w13.shape[1])
    return x.new_empty(x.shape), gate_up, tokens.new_empty(P), tokens.new_empty(N + 1)


@torch.library.custom_op("lifecycle::moe_backward", mutates_args=())
def launch_backward(dy: Tensor, weights: bool, x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor,
                    gates: Tensor, offsets: Tensor, gate_up: Tensor, order: Tensor,
                    starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dw13, dw2 (both empty without `weights`), dgates."""
    dw13 = w13.new_empty(0)                                # in the dtype of the weight as it came
    dw2 = w2.new_empty(0)
    x, w13, w2, tokens, gates, offsets = checked(x, w13, w2, tokens, gates, offsets)
    N, D = x.shape
    E, _, F = w2.shape
    P = len(tokens)
    dy = check("the gradient of y", dy, (N, D), (x.dtype,))
    tiles = tiling(x)

    # [dg; du] and gate_p h of each pair; zeros are the gradient of gates of unused pairs
    d_gate_up = x.new_empty(P, 2 * F)
    gated_hidden = x.new_empty(P, F)
    dgate_shares = gates.new_zeros(triton.cdiv(F, tiles["BLOCK_N"]), P)
    over_pairs(hidden_backward_kernel, F, E, P, tiles,
               dy, w2, gate_up, tokens, gates, offsets, d_gate_up, gated_hidden, dgate_shares, P,
               E, D, F)

    # W13^T [dg; du] of each pair: the same kernel as W2 h, with other strides and no gate
    dx_pairs = x.new_empty(P, D)
    over_pairs(rows_kernel, D, E, P, tiles,
               d_gate_up, w13, gates, offsets, dx_pairs, E, 2 * F, D, 1, D, False)
    if weights:
        dw13 = weight_gradient(d_gate_up, x, tokens, offsets, dw13.dtype, False, tiles)
        dw2 = weight_gradient(dy, gated_hidden, tokens, offsets, dw2.dtype, True, tiles)
    return sum_pairs(dx_pairs, order, starts), dw13, dw2, dgate_shares.sum(0)


@launch_backward.register_fake
def fake_backward(dy, weights, x, w13, w2, tokens, gates, offsets, gate_up, *kept):
    dw13 = w13.new_empty(w13.shape if weights else 0)
    dw2 = w2.new_empty(w2.shape if weights else 0)
    return x.new_empty(x.shape), dw13, dw2, gates.new_empty(gates.shape)


# ---------------------------------------------------------------------- torch

def grouped_mm_serves(a: Tensor, b: Tensor) -> bool:
    """torch >= 2.10 multiplies all experts in one launch, in bf16, rows of whole 16 bytes."""
    if not hasattr(F, "grouped_mm") or not a.is_cuda or a.dtype != torch.bfloat16:
        return False
    return len(a) > 0 and a.shape[-1] % 8 == 0 and b.shape[-1] % 8 == 0


def expert_rows(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """a (P, K), w (E, K, N) -> (P, N): each row times its expert's matrix; zeros if unused."""
    if grouped_mm_serves(a, w):
        out = F.grouped_mm(a, w, offs=offsets[1:].int())
        # grouped_mm leaves unused rows as memory had them
        unused = torch.arange(len(a), device=a.device) >= offsets[-1]
        return out.masked_fill_(unused[:, None], 0)

    out = a.new_zeros(len(a), w.shape[-1])
    for e, (first, end) in enumerate(pairwise(offsets.tolist())):
        torch.mm(a[first:end], w[e], out=out[first:end])
    return out


def expert_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a (P, M), b (P, N) -> (E, M, N): the sums of a's rows times b's, expert by expert."""
    if grouped_mm_serves(a, b):
        dw = F.grouped_mm(a.T, b, offs=offsets[1:].int())
        # on some GPUs grouped_mm is wrong for experts without rows, whose sum is 0
        empty = offsets.diff() == 0
        return dw.masked_fill_(empty[:, None, None], 0)

    dw = a.new_empty(len(offsets) - 1, a.shape[1], b.shape[1])
    for e, (first, end) in enumerate(pairwise(offsets.tolist())):
        torch.mm(a[first:end].T, b[first:end], out=dw[e])
    return dw


@torch.library.custom_op("lifecycle::moe_torch_forward", mutates_args=())
def torch_forward(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                  offsets: Tensor) -> tuple[Tensor, Tensor]:
    """-> y (N, D), gate_up (P, 2F). An operation to the compiler: it cannot see the offsets."""
    x_pairs = x.index_select(0, tokens)                    # (P, D)
    gate_up = expert_rows(x_pairs, w13.to(x.dtype).mT, offsets)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    hidden = F.silu(gate).mul_(up)                         # (P, F)
    out = expert_rows(hidden, w2.to(x.dtype).mT, offsets)

    # the pairs of a token are added up in the dtype of the gates, fp32
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
    silu = F.silu(gate)
    hidden = silu * up                                     # (P, F), made again

    # dh = W2^T dy, and dgate from it, because the experts' outputs were not kept
    dy_pairs = dy.index_select(0, tokens)
    dh = expert_rows(dy_pairs, w2.to(x.dtype), offsets)
    dgates = (dh * hidden).sum(-1, dtype=gates.dtype)

    dh = (dh * gates[:, None]).to(x.dtype)                 # from here on times the gate
    dg = torch.ops.aten.silu_backward(up * dh, gate)
    du = silu.mul_(dh)
    d_gate_up = torch.cat((dg, du), -1)

    dx_pairs = expert_rows(d_gate_up, w13.to(x.dtype), offsets)
    dx = gates.new_zeros(x.shape).index_add_(0, tokens, dx_pairs.to(gates.dtype)).to(x.dtype)
    dw13 = w13.new_empty(0)
    dw2 = w2.new_empty(0)
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
        forward = launch_forward if fused else torch_forward
        y, *kept = forward(x, w13, w2, *dispatch)
        ctx.save_for_backward(x, w13, w2, *dispatch, *kept)
        ctx.fused = fused
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        weights = any(ctx.needs_input_grad[2:4])           # w13 and w2: both or neither
        backward = launch_backward if ctx.fused else torch_backward
        dx, dw13, dw2, dgates = backward(dy, weights, *ctx.saved_tensors)
        if not weights:                                    # empty tensors stand for no gradient
            dw13 = dw2 = None
        return None, dx, dw13, dw2, None, dgates, None


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

    D = x.shape[1]
    E = len(w13)
    F = w13.shape[1] // 2
    P = tokens.numel()
    wide = torch.promote_types(x.dtype, torch.float32)
    expected = (("w13", w13, (E, 2 * F, D), None),         # None: of any dtype
                ("w2", w2, (E, D, F), None),
                ("tokens", tokens, (P,), (torch.int64,)),
                ("offsets", offsets, (E + 1,), INTEGERS),
                ("gates", gates, (P,), (wide,)))
    for name, z, shape, dtypes in expected:
        if z.shape != shape or dtypes and z.dtype not in dtypes:
            raise ValueError(f"{name} is {tuple(z.shape)} in {z.dtype}; for x {tuple(x.shape)} in "
                             f"{x.dtype} and {E} experts it must be {shape} in {dtypes or 'any'}")
    return Experts.apply(backend(x.device) == "triton", x, w13, w2, tokens, gates, offsets)
