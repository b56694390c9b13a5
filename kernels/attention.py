"""
Softmax attention (Vaswani et al. 2017): causal or not, grouped queries, packed documents, prefixes
seen both ways, another text's keys (cross-attention), and for decoding a cache of keys and values.

    S = Q K^T / sqrt(C), -inf where a token may not look        P = softmax(S)        O = P V
    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))
    dQ = dS K / sqrt(C)        dK = dS^T Q / sqrt(C)        rowsum(P * dP) = rowsum(dO * O)

Matmuls run in the dtype of the input, softmax in fp32 inside. Shapes: B batch, T tokens, H query
heads, K key/value heads (H = K G, query head h reads key/value head h // G), C head width.
FLOPs where all see all: 4 T^2 C a query head forward, 10 T^2 C backward; causal: half. Bytes: q, k,
v and O once, and one number a row.

The kernels (Dao 2023, FlashAttention-2; the softmax of Milakov and Gimelshein 2018) never hold P: a
program has a tile of M queries and walks over the keys that these see, or a tile of M keys and
walks over the queries that see these, in tiles of N. Forward keeps O and the log-sum-exp of each
row; backward makes S and dP again, once in the kernel of dQ and once in the kernel of dK and dV:
14 T^2 C, and no two programs add to the same number.

Every mask here lets query i see an interval of keys, lo[i] <= j < hi[i], whose ends never fall from
one query to the next; each key is then seen by an interval of queries. So the first and the last
row of a tile tell which tiles to visit, and in which of these every row sees everything: there the
scores are not masked. Causal and full intervals are arithmetic, others are read from (B, T) tables.

Decoding, one query a row against a long cache, takes the time of reading the cache: programs, as
many as fill the GPU, share each row's slots, and all G queries of a key/value head read them at
once. A second kernel weighs the shares by their log-sum-exps.

Where there are no kernels, torch's scaled_dot_product_attention is called, but for bf16 on CPUs:
there it takes two to four times as long as plain matmuls. So these make the scores in blocks of
queries that skip the keys after them, with P kept for the backward pass, unless P would take too
much memory.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import (
    INTERPRETED,
    backend,
    check,
    check_width,
    multiprocessors,
    shared_memory,
    tl,
    triton,
)

BLOCK = 128          # queries at a time, on CPUs
IN_BLOCKS = (torch.bfloat16,)          # dtypes in which CPUs make the scores block by block
KEEP = 2**27         # bytes of P that these may keep per call
LOG2_E = 1.4426950408889634            # kernels take exponents to base 2, as the hardware does
WIDTHS = 64, 128, 256
# (M, N, warps, stages) by head width: what compiles without spilling registers, first for GPUs with
# 227 KB of shared memory, then for those with 99 and more.
TILES = {
    "forward": ([(128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)],
                [(128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)]),
    "dq": ([(128, 64, 8, 2)] * 2, [(64, 64, 8, 2)] * 2),
    "dk_dv": ([(128, 64, 8, 2)] * 2, [(64, 64, 8, 2)] * 2),
    "decode": ([(16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)],) * 2,
}
WIDEST_BACKWARD = WIDTHS[len(TILES["dq"][0]) - 1]      # torch's attention trains wider heads
TILES_FP32 = {                         # exact: no tensor cores, slow
    "dq": [(16, 16, 4, 1), (16, 16, 8, 1)],
    "dk_dv": [(16, 16, 8, 1), (16, 16, 4, 1)],
    "others": [(16, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)],
}
TILE_INTERPRETED = 32, 16, 4, 1        # so that tests cross borders


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
                        documents: Tensor | None = None, prefix: Tensor | None = None,
                        lengths: Tensor | None = None) -> Tensor:
    """Arguments and result as for attention()."""
    T, H, C = q.shape[1:]
    G = H // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(G, dim=2).to(wide)             # (B, Tk, H, C)
    v = v.repeat_interleave(G, dim=2).to(wide)

    scores = torch.einsum("bihc,bjhc->bhij", q.to(wide), k) / C**0.5
    hidden = ~visible(slice(0, T), k.shape[1], causal, documents, prefix, lengths, q.device)
    P = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhc->bihc", P, v).to(q.dtype)


def visible(rows: slice, keys: int, causal: bool, documents: Tensor | None, prefix: Tensor | None,
            lengths: Tensor | None, device) -> Tensor:
    """(1 or B, 1, rows, keys): True where a query of `rows` may see a key of the first `keys`."""
    allowed = torch.ones(rows.stop - rows.start, keys, dtype=torch.bool, device=device)[None, None]
    if causal:
        allowed = allowed.tril(rows.start)                 # query i of all is row i - rows.start
    if documents is not None:
        allowed = allowed & (documents[:, None, rows, None] == documents[:, None, None, :keys])
    if prefix is not None:
        allowed = allowed | (torch.arange(keys, device=device) < prefix[:, None, None, None])
    if lengths is not None:
        allowed = allowed & (torch.arange(keys, device=device) < lengths[:, None, None, None])
    return allowed


# ---------------------------------------------------------------------- Triton

@triton.jit
def head_of(x, b, h, stride_b, stride_h, C: tl.constexpr):
    """The address of the first row of batch row b, head h. All strides count rows of C channels."""
    return x + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * C


@triton.jit
def contiguous_head(x, b, h, T, HEADS: tl.constexpr, C: tl.constexpr):
    """head_of() for a contiguous (B, T, HEADS, C)."""
    return head_of(x, b, h, tl.cast(T, tl.int64) * HEADS, 1, C)


@triton.jit
def load_rows(x, start, rows, stride, C: tl.constexpr, N: tl.constexpr, BLOCK_C: tl.constexpr):
    """(N, BLOCK_C): rows start, start + 1, ... of x, zeros beyond `rows` and C."""
    n = tl.arange(0, N)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    # 64 bits to the tile's first row, 32 inside the tile: a tile is small, and 32 are faster
    at = x + tl.cast(start, tl.int64) * stride * C + (n * stride * C + c)
    return tl.load(at, (start + n < rows) & (c < C), other=0.0)


@triton.jit
def store_rows(x, tile, start, rows, stride, C: tl.constexpr, N: tl.constexpr,
               BLOCK_C: tl.constexpr):
    """tile (N, BLOCK_C) to rows start, start + 1, ... of x, up to `rows` and C."""
    n = tl.arange(0, N)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    at = x + tl.cast(start, tl.int64) * stride * C + (n * stride * C + c)
    tl.store(at, tile.to(x.dtype.element_ty), (start + n < rows) & (c < C))


@triton.jit
def stats_row(T):
    """The stride of lse and delta, (B, H, T and up to 15 unused): aligned loads, whatever T is."""
    return tl.cdiv(T, 16) * 16


@triton.jit
def interval(row, b, rows, others, lo, hi, MASK: tl.constexpr, OF_KEYS: tl.constexpr):
    """[lo, hi) of the keys that query `row` sees; OF_KEYS: of the queries that see key `row`."""
    if MASK == "interval":
        at = b * rows + row
        lo_row = tl.load(lo + at, row < rows, other=0)
        hi_row = tl.load(hi + at, row < rows, other=0)
        return lo_row, hi_row
    elif MASK == "full":
        return 0, others
    elif OF_KEYS:
        return row, others
    else:
        return 0, row + 1


@triton.jit
def walk(first, b, rows, others, lo, hi, MASK: tl.constexpr, OF_KEYS: tl.constexpr,
         M: tl.constexpr, N: tl.constexpr):
    """The range of the others that M rows see, from the intervals of the first and the last row.

    From begin to end at least one row sees one of the others; from inner_begin to inner_end every
    row sees every one, so that no score is masked there. begin is aligned to N."""
    # ends never fall from row to row: the first row has the lowest, the last row the highest
    last = tl.minimum(first + M, rows) - 1
    begin, inner_end = interval(first, b, rows, others, lo, hi, MASK, OF_KEYS)
    inner_begin, end = interval(last, b, rows, others, lo, hi, MASK, OF_KEYS)
    return begin // N * N, end, inner_begin, inner_end


@triton.jit
def hide(S, start, lo, hi, N: tl.constexpr):
    """S (M, N) of the others from `start` on, with -inf outside each row's [lo, hi)."""
    n = start + tl.arange(0, N)[None, :]
    return tl.where((lo <= n) & (n < hi), S, -float("inf"))


@triton.jit
def scores(tile, others, start, inner_begin, inner_end, lo, hi, N: tl.constexpr):
    """S (M, N) of M rows and of the N others from `start` on, tiles of q and k or of k and q."""
    S = tl.dot(tile, others.T, input_precision="ieee")
    if (start < inner_begin) | (start + N > inner_end):    # elsewhere every row sees every one
        S = hide(S, start, lo, hi, N)
    return S


@triton.jit
def absorb(S, v_tile, O, m, l, scale):
    """Online softmax, one tile further: m (M,) largest exponent so far, l (M,) sum of P, O = P V.

    Exponents are to base 2: scale is log2(e) / sqrt(C)."""
    m_new = tl.maximum(m, tl.max(S, 1) * scale)
    P = tl.exp2(S * scale - m_new[:, None])
    # O and l of the tiles before counted from the old maximum
    shrink = tl.exp2(m - m_new)
    O = tl.dot(P.to(v_tile.dtype), v_tile, O * shrink[:, None], input_precision="ieee")
    return O, m_new, l * shrink + tl.sum(P, 1)


@triton.jit
def nothing_seen(M: tl.constexpr, BLOCK_C: tl.constexpr):
    """O, m, l to begin with."""
    O = tl.zeros((M, BLOCK_C), tl.float32)
    m = tl.full((M,), -3e38, tl.float32)                   # finite, because -inf - -inf is NaN
    l = tl.zeros((M,), tl.float32)
    return O, m, l


@triton.jit
def normalized(O, m, l):
    """The output, 0 for rows that saw nothing, and the log-sum-exp."""
    l = tl.where(l == 0, 1.0, l)
    return O / l[:, None], m + tl.log2(l)


@triton.jit
def tile_of_queries(Tq, M: tl.constexpr):
    """The program's b H + h and first query. The last queries, which see most if causal, are the
    first to be taken, because short programs fill the gaps at the end better than long ones."""
    tiles = tl.cdiv(Tq, M)
    bh = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * M
    return bh, first


@triton.jit
def forward_kernel(q, k, v, lo, hi, out, lse, q_b, q_t, q_h, k_b, k_t, k_h, Tq, Tk, scale,
                   H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, BLOCK_C: tl.constexpr):
    """out and lse of M queries of one head."""
    bh, first = tile_of_queries(Tq, M)
    b = bh // H
    h = bh % H
    i = first + tl.arange(0, M)

    k = head_of(k, b, h // G, k_b, k_h, C)
    v = head_of(v, b, h // G, k_b, k_h, C)
    q_tile = load_rows(head_of(q, b, h, q_b, q_h, C), first, Tq, q_t, C, M, BLOCK_C)
    q_tile = q_tile.to(k.dtype.element_ty)                 # a cache may be of another dtype than q
    O, m, l = nothing_seen(M, BLOCK_C)
    lo_rows, hi_rows = interval(i[:, None], b, Tq, Tk, lo, hi, MASK, False)
    begin, end, inner_begin, inner_end = walk(first, b, Tq, Tk, lo, hi, MASK, False, M, N)

    for start in range(begin, end, N):
        k_tile = load_rows(k, start, Tk, k_t, C, N, BLOCK_C)
        v_tile = load_rows(v, start, Tk, k_t, C, N, BLOCK_C)
        S = scores(q_tile, k_tile, start, inner_begin, inner_end, lo_rows, hi_rows, N)
        O, m, l = absorb(S, v_tile, O, m, l, scale)

    O, lse_tile = normalized(O, m, l)
    store_rows(contiguous_head(out, b, h, Tq, H, C), O, first, Tq, H, C, M, BLOCK_C)
    tl.store(lse + bh * stats_row(Tq) + i, lse_tile, i < Tq)


@triton.jit
def dq_kernel(q, k, v, lo, hi, out, lse, dout, delta, dq, Tq, Tk, scale, H: tl.constexpr,
              G: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr, M: tl.constexpr,
              N: tl.constexpr, BLOCK_C: tl.constexpr):
    """dq of M queries of one head, and delta, rowsum(dO * O), which dk_dv_kernel reads."""
    bh, first = tile_of_queries(Tq, M)
    K = H // G
    b = bh // H
    h = bh % H
    i = first + tl.arange(0, M)

    k = contiguous_head(k, b, h // G, Tk, K, C)
    v = contiguous_head(v, b, h // G, Tk, K, C)
    q = contiguous_head(q, b, h, Tq, H, C)
    out = contiguous_head(out, b, h, Tq, H, C)
    dout = contiguous_head(dout, b, h, Tq, H, C)
    dq = contiguous_head(dq, b, h, Tq, H, C)

    q_tile = load_rows(q, first, Tq, H, C, M, BLOCK_C)
    O = load_rows(out, first, Tq, H, C, M, BLOCK_C)
    dout_tile = load_rows(dout, first, Tq, H, C, M, BLOCK_C)
    delta_tile = tl.sum(O.to(tl.float32) * dout_tile.to(tl.float32), 1)        # (M,)
    at = bh * stats_row(Tq) + i
    tl.store(delta + at, delta_tile, i < Tq)
    lse_tile = tl.load(lse + at, i < Tq, other=0.0)

    dq_tile = tl.zeros((M, BLOCK_C), tl.float32)
    lo_rows, hi_rows = interval(i[:, None], b, Tq, Tk, lo, hi, MASK, False)
    begin, end, inner_begin, inner_end = walk(first, b, Tq, Tk, lo, hi, MASK, False, M, N)
    for start in range(begin, end, N):
        k_tile = load_rows(k, start, Tk, K, C, N, BLOCK_C)
        v_tile = load_rows(v, start, Tk, K, C, N, BLOCK_C)
        S = scores(q_tile, k_tile, start, inner_begin, inner_end, lo_rows, hi_rows, N)
        P = tl.exp2(S * scale - lse_tile[:, None])         # softmax at once: its sum is known
        dP = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
        dS = P * (dP - delta_tile[:, None])
        dq_tile = tl.dot(dS.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")

    store_rows(dq, dq_tile * C**-0.5, first, Tq, H, C, M, BLOCK_C)


@triton.jit
def dk_dv_kernel(q, k, v, lo, hi, lse, dout, delta, dk, dv, Tq, Tk, scale, H: tl.constexpr,
                 G: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr, M: tl.constexpr,
                 N: tl.constexpr, BLOCK_C: tl.constexpr):
    """dk and dv of M keys of one key/value head. lo, hi: the queries that see each key."""
    tiles = tl.cdiv(Tk, M)
    K = H // G
    bk = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * M                   # the first keys are seen by most queries
    b = bk // K
    kv = bk % K
    j = first + tl.arange(0, M)

    k_tile = load_rows(contiguous_head(k, b, kv, Tk, K, C), first, Tk, K, C, M, BLOCK_C)
    v_tile = load_rows(contiguous_head(v, b, kv, Tk, K, C), first, Tk, K, C, M, BLOCK_C)
    dk_tile = tl.zeros((M, BLOCK_C), tl.float32)
    dv_tile = tl.zeros((M, BLOCK_C), tl.float32)
    lo_rows, hi_rows = interval(j[:, None], b, Tk, Tq, lo, hi, MASK, True)
    begin, end, inner_begin, inner_end = walk(first, b, Tk, Tq, lo, hi, MASK, True, M, N)

    # one loop over tiles of queries times the G query heads, which take turns at each tile
    for n in range(tl.cdiv(end - begin, N) * G):
        h = kv * G + n % G
        start = begin + n // G * N
        i = start + tl.arange(0, N)
        at = (bk * G + n % G) * stats_row(Tq) + i
        q_tile = load_rows(contiguous_head(q, b, h, Tq, H, C), start, Tq, H, C, N, BLOCK_C)
        dout_tile = load_rows(contiguous_head(dout, b, h, Tq, H, C), start, Tq, H, C, N, BLOCK_C)

        # S, P, dP and dS are transposed here: (M keys, N queries)
        dP = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
        S = scores(k_tile, q_tile, start, inner_begin, inner_end, lo_rows, hi_rows, N)
        P = tl.exp2(S * scale - tl.load(lse + at, i < Tq, other=0.0)[None, :])
        dS = P * (dP - tl.load(delta + at, i < Tq, other=0.0)[None, :])
        dv_tile = tl.dot(P.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
        dk_tile = tl.dot(dS.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")

    dk = contiguous_head(dk, b, kv, Tk, K, C)
    store_rows(dk, dk_tile * C**-0.5, first, Tk, K, C, M, BLOCK_C)
    dv = contiguous_head(dv, b, kv, Tk, K, C)
    store_rows(dv, dv_tile, first, Tk, K, C, M, BLOCK_C)


@triton.jit
def decode_kernel(q, k, v, starts, shares, lse, k_b, k_t, k_h, length, splits, scale,
                  K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
                  N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The G query heads of one key/value head, as M rows, over one of `splits` shares of the slots
    -> shares (B H, splits, C), lse (B H, splits)."""
    bk = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    g = tl.arange(0, M)
    b = bk // K
    kv = bk % K

    # with one query a row, q is (B K, G, C): the group's heads lie one after the other
    k = head_of(k, b, kv, k_b, k_h, C)
    v = head_of(v, b, kv, k_b, k_h, C)
    q_tile = load_rows(q, bk * G, bk * G + G, 1, C, M, BLOCK_C).to(k.dtype.element_ty)

    # shares are whole tiles of slots from the row's start on; the last may be short or empty
    start = tl.load(starts + b).to(tl.int32)
    share = tl.cdiv(length - start, splits * N) * N
    lo = start + split * share
    hi = tl.minimum(start + (split + 1) * share, length)
    O, m, l = nothing_seen(M, BLOCK_C)
    for slot in range(lo, hi, N):
        k_tile = load_rows(k, slot, length, k_t, C, N, BLOCK_C)
        v_tile = load_rows(v, slot, length, k_t, C, N, BLOCK_C)
        S = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if slot + N > hi:
            S = hide(S, slot, lo, hi, N)
        O, m, l = absorb(S, v_tile, O, m, l, scale)

    O, lse_tile = normalized(O, m, l)
    at = bk * G * splits + split
    store_rows(shares + at.to(tl.int64) * C, O, 0, G, splits, C, M, BLOCK_C)
    tl.store(lse + at + g * splits, lse_tile, g < G)


@triton.jit
def combine_kernel(shares, lse, out, splits, C: tl.constexpr, N: tl.constexpr,
                   BLOCK_C: tl.constexpr):
    """One head: the mean of its shares, each weighted by its part of the softmax's denominator."""
    bh = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    c = tl.arange(0, BLOCK_C)
    lse_tile = tl.load(lse + bh * splits + n, n < splits, other=-float("inf"))
    weight = tl.exp2(lse_tile - tl.max(lse_tile, 0))       # (N,); an empty share has none
    tile = load_rows(shares, bh * splits, bh * splits + splits, 1, C, N, BLOCK_C)
    mean = tl.sum(weight[:, None] * tile, 0) / tl.sum(weight, 0)
    tl.store(out + bh * C + c, mean.to(out.dtype.element_ty), c < C)


def tiling(kernel: str, C: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Tile sizes, warps and pipeline stages for head width C."""
    large, small = TILES[kernel]
    tiles = large if shared_memory(device) >= 200_000 else small
    name = "the head width C"
    if kernel in ("dq", "dk_dv"):
        name += " of a backward pass"
    widest = WIDTHS[len(tiles) - 1]
    block = max(16, check_width(name, C, widest))          # a dot needs an inner size of 16

    if dtype == torch.float32:
        tiles = TILES_FP32.get(kernel, TILES_FP32["others"])
    M, N, warps, stages = tiles[WIDTHS.index(max(64, block))]
    if INTERPRETED:
        M, N, warps, stages = TILE_INTERPRETED
    return {"M": M, "N": N, "BLOCK_C": block, "num_warps": warps, "num_stages": stages}


def addressed(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """q, k, v, their strides in rows of C, and their lengths. Views, as those of a cache, are not
    copied unless C channels do not make a row, or k and v lie differently."""
    check("q", q, q.shape, contiguous=False)
    check("k", k, k.shape, contiguous=False)
    check("v", v, v.shape, (k.dtype,), contiguous=False)
    C = q.shape[3]
    if not in_rows(q):
        q = q.contiguous()
    if not in_rows(k) or k.stride() != v.stride():
        k = k.contiguous()
        v = v.contiguous()

    # of batch row, token and head, for q and for k (and v)
    strides = [n // C for n in q.stride()[:3] + k.stride()[:3]]
    return q, k, v, (*strides, q.shape[1], k.shape[1])


def in_rows(x: Tensor) -> bool:
    """Whether x (B, T, H, C) lies in memory as rows of C channels, each at a multiple of C."""
    *strides, channel_stride = x.stride()
    C = x.shape[3]
    return channel_stride == 1 and all(n % C == 0 for n in strides)


def mask_kind(lo: Tensor | None, causal: bool) -> str:
    """MASK of the kernels: intervals from tables, or by arithmetic."""
    if lo is not None:
        return "interval"
    return "causal" if causal else "full"


def outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, C) and lse (B, H, Tq rounded up to 16, see stats_row), not filled."""
    B, Tq, H, _ = q.shape
    rounded = -(-Tq // 16) * 16
    return q.new_empty(q.shape), q.new_empty(B, H, rounded, dtype=torch.float32)


@torch.library.custom_op("lifecycle::attention_forward", mutates_args=())
def launch_forward(q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None,
                   causal: bool) -> tuple[Tensor, Tensor]:
    """q (B, Tq, H, C), k, v (B, Tk, K, C), lo, hi (B, Tq) or, without them, causal or all keys ->
    out (B, Tq, H, C) and lse (B, H, Tq + up to 15), in fp32 to base 2."""
    q, k, v, layout = addressed(q, k, v)
    B, Tq, H, C = q.shape
    G = H // k.shape[2]
    if lo is not None:
        lo = check("lo", lo, (B, Tq), (torch.int32,))
        hi = check("hi", hi, (B, Tq), (torch.int32,))

    out, lse = outputs(q)
    tile = tiling("forward", C, k.dtype, q.device)
    programs = B * H * triton.cdiv(Tq, tile["M"])
    if q.numel():                                          # a grid of no programs is an error
        forward_kernel[(programs,)](q, k, v, lo, hi, out, lse, *layout, C**-0.5 * LOG2_E, H, G, C,
                                    mask_kind(lo, causal), **tile)
    return out, lse


@launch_forward.register_fake
def _(q, k, v, lo, hi, causal):
    return outputs(q)


@torch.library.custom_op("lifecycle::attention_backward", mutates_args=())
def launch_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    lo: Tensor | None, hi: Tensor | None,
                    causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; out, lse, lo, hi as launch_forward() has them."""
    dout = check("the gradient of the output", dout, q.shape, (q.dtype,))
    q, k, v, out = (x.contiguous() for x in (q, k, v, out))
    B, Tq, H, C = q.shape
    Tk, K = k.shape[1:3]
    G = H // K
    scale = C**-0.5 * LOG2_E
    mask = mask_kind(lo, causal)
    dq, dk, dv, delta = (x.new_empty(x.shape) for x in (q, k, v, lse))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()

    tile = tiling("dq", C, q.dtype, q.device)
    programs = B * H * triton.cdiv(Tq, tile["M"])
    dq_kernel[(programs,)](q, k, v, lo, hi, out, lse, dout, delta, dq, Tq, Tk, scale, H, G, C, mask,
                           **tile)

    # query i sees lo[i] <= j < hi[i], ends that never fall: key j is seen from the first query
    # with hi > j on, up to the first query with lo > j
    if lo is not None:
        j = torch.arange(Tk, dtype=torch.int32, device=q.device).repeat(B, 1)
        first_query = torch.searchsorted(hi, j, right=True, out_int32=True)
        end_query = torch.searchsorted(lo, j, right=True, out_int32=True)
        lo, hi = first_query, end_query
    tile = tiling("dk_dv", C, q.dtype, q.device)
    programs = B * K * triton.cdiv(Tk, tile["M"])
    dk_dv_kernel[(programs,)](q, k, v, lo, hi, lse, dout, delta, dk, dv, Tq, Tk, scale, H, G, C,
                              mask, **tile)
    return dq, dk, dv


@launch_backward.register_fake
def _(dout, q, k, v, out, lse, lo, hi, causal):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("lifecycle::attention_decode", mutates_args=())
def launch_decode(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, length: int) -> Tensor:
    """q (B, 1, H, C), k, v (B, S, K, C) -> (B, 1, H, C)."""
    q, k, v, layout = addressed(q.contiguous(), k, v)
    _, _, _, *k_strides, _, _ = layout
    B, _, H, C = q.shape
    K = k.shape[2]
    G = H // K
    starts = check("starts", starts, (B,), (torch.int32, torch.int64))
    tile = tiling("decode", C, k.dtype, q.device)
    tile["M"] = max(16, triton.next_power_of_2(G))         # a dot needs 16 rows

    # four programs a multiprocessor, none with less than two tiles of slots
    enough = 4 * multiprocessors(q.device) // max(1, B * K)
    longest = triton.cdiv(length, 2 * tile["N"])
    splits = max(1, min(128, longest, enough))
    shares = q.new_empty(B * H, splits, C, dtype=torch.float32)
    lse = shares.new_empty(B * H, splits)
    out = q.new_empty(q.shape)
    if q.numel():                                          # a grid of no programs is an error
        decode_kernel[(B * K * splits,)](q, k, v, starts, shares, lse, *k_strides, length, splits,
                                         C**-0.5 * LOG2_E, K, G, C, **tile)
        combine_kernel[(B * H,)](shares, lse, out, splits, C, triton.next_power_of_2(splits),
                                 tile["BLOCK_C"], num_warps=8)
    return out


@launch_decode.register_fake
def _(q, k, v, starts, length):
    return q.new_empty(q.shape)


class FusedAttention(torch.autograd.Function):
    """Keeps q, k, v, out and one number a row; P is made again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None,
                causal: bool) -> Tensor:
        out, lse = launch_forward(q, k, v, lo, hi, causal)
        ctx.save_for_backward(q, k, v, out, lse, lo, hi)
        ctx.causal = causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        return *launch_backward(dout, *ctx.saved_tensors, ctx.causal), None, None, None


def intervals(B: int, T: int, causal: bool, documents: Tensor | None, prefix: Tensor | None,
              lengths: Tensor | None,
              device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """lo, hi (B, T): query i sees the keys lo <= j < hi. None where `causal` says it all."""
    if documents is prefix is lengths is None:
        return None, None
    if lengths is not None:
        hi = lengths[:, None].to(torch.int32).repeat(1, T)
        return torch.zeros_like(hi), hi

    behind = torch.arange(1, T + 1, dtype=torch.int32, device=device).repeat(B, 1)     # i + 1
    if prefix is not None:
        hi = torch.maximum(behind, prefix[:, None].clamp(max=T)).to(torch.int32)
        return torch.zeros_like(hi), hi

    # documents numbered 0, 1, 2 ... along each row, because searchsorted takes ascending numbers:
    # a document begins at the first equal number and ends behind the last
    number = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).cumsum(1)
    lo = torch.searchsorted(number, number, right=False, out_int32=True)
    end = torch.searchsorted(number, number, right=True, out_int32=True)
    return lo, behind if causal else end


# ---------------------------------------------------------------------- torch

def biases(T: int, Tk: int, H: int, K: int, causal: bool, documents: Tensor | None,
           prefix: Tensor | None, lengths: Tensor | None, dtype, device) -> list[Tensor]:
    """(1 or B K, rows, keys) for each block of queries: 0 where a row may look, -inf elsewhere."""
    blocks = []
    for first in range(0, T, BLOCK):
        tokens = slice(first, min(first + BLOCK, T))
        keys = tokens.stop if causal and prefix is None else Tk          # none after the block
        allowed = visible(tokens, keys, causal, documents, prefix, lengths, device)
        bias = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)

        # rows are (token, head of the group) pairs; the same for all key/value heads
        bias = bias.repeat_interleave(H // K, 2)
        if len(bias) > 1:                                  # a mask for each text
            bias = bias.expand(-1, K, -1, -1)
        blocks.append(bias.flatten(0, 1))
    return blocks


class BlockAttention(torch.autograd.Function):
    """Rows are (token, query head of a group) pairs, so that a group shares its keys' matmuls."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor):
        B, T, H, C = q.shape
        Tk, K = k.shape[1:3]
        G = H // K
        # contiguous, because views of one projection would keep all of it until backward
        q = q.reshape(B, T, K, G * C).transpose(1, 2).reshape(B * K, T * G, C).contiguous()
        k = k.transpose(1, 2).reshape(B * K, Tk, C).contiguous()
        v = v.transpose(1, 2).reshape(B * K, Tk, C).contiguous()

        out = torch.empty_like(q)
        kept = []
        for i, bias in enumerate(biases):
            first = G * BLOCK * i
            rows = slice(first, first + bias.shape[1])
            keys = bias.shape[2]
            scores = torch.baddbmm(bias, q[:, rows], k[:, :keys].mT, alpha=C**-0.5)
            P = scores.softmax(-1)                         # (B K, rows, keys), fp32 inside
            out[:, rows] = P @ v[:, :keys]
            kept.append(P)

        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape = B, T, H, K, C, Tk
        return out.view(B, K, T, G * C).transpose(1, 2).reshape(B, T, H, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        B, T, H, K, C, Tk = ctx.shape
        G = H // K
        dout = dout.reshape(B, T, K, G * C).transpose(1, 2).reshape(B * K, T * G, C)

        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for i, P in enumerate(kept):
            first = G * BLOCK * i
            rows = slice(first, first + P.shape[1])
            keys = P.shape[2]
            dv[:, :keys] += P.mT @ dout[:, rows]           # a key is seen by several blocks
            dP = dout[:, rows] @ v[:, :keys].mT
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)        # P * (dP - rowsum(P dP))
            dq[:, rows] = dS @ k[:, :keys]
            dk[:, :keys] += dS.mT @ q[:, rows]

        # 1 / sqrt(C) of the scores, which baddbmm took in as alpha
        dq = dq.mul_(C**-0.5).view(B, K, T, G * C).transpose(1, 2).reshape(B, T, H, C)
        dk = dk.mul_(C**-0.5).view(B, K, Tk, C).transpose(1, 2)
        dv = dv.view(B, K, Tk, C).transpose(1, 2)
        return dq, dk, dv, *[None] * len(kept)


def decode_by_torch(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> Tensor:
    """The newest Tq tokens of a row, (B, Tq, H, C), by torch's attention over k and v
    (B, length, K, C), their own among them."""
    Tq, H = q.shape[1:3]
    length, K = k.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))       # heads before tokens
    allowed = None                                         # one token sees all, without padding
    if Tq > 1 or starts.any():
        slots = torch.arange(length, device=q.device)
        own = slots[length - Tq:, None]                    # (Tq, 1), against slots (length,)
        last = own if causal else length
        allowed = (slots <= last) & (slots >= starts[:, None, None])           # (B, Tq, length)
        # padding sees itself, because a softmax over nothing is NaN
        allowed = (allowed | (slots == own))[:, None]      # (B, 1, Tq, length)
    out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, allowed, enable_gqa=H != K)
    return out.transpose(1, 2).to(q.dtype)


# ---------------------------------------------------------------------- public functions

class Mask(NamedTuple):
    """The keys that each query sees, made once a pass for all layers."""
    causal: bool
    documents: Tensor | None = None        # (B, T)
    prefix: Tensor | None = None           # (B,)
    lengths: Tensor | None = None          # (B,)
    lo: Tensor | None = None               # Triton: (B, T), query i sees lo[i] <= j < hi[i]; None
    hi: Tensor | None = None               # where `causal` says it all
    biases: list[Tensor] | None = None     # bf16 on CPUs: (1 or B K, rows, keys) for each block
    bias: Tensor | None = None             # torch's attention: (1 or B, 1, T, Tk); None: as `lo`


def attention_mask(q_shape: tuple, k_shape: tuple, dtype: torch.dtype, device: torch.device, *,
                   causal: bool = True, documents: Tensor | None = None,
                   prefix: Tensor | None = None, lengths: Tensor | None = None) -> Mask:
    """The mask of queries (B, T, H, C) and keys (B, Tk, K, C) in `dtype`, for attention().

    documents: (B, T) numbers, equal ones adjacent; a token sees those with its own number only
    (and, if causal, none after it). Padding is a document of its own.
    prefix: (B,) how many tokens at the beginning of each row all tokens of the row see, besides
    what `causal` lets them see; not together with documents.
    lengths: (B,) how many keys of each row are real, at least 1; with causal=False and neither of
    the others.
    Raises ValueError when shapes and masks do not fit.
    """
    B, T, H, _ = q_shape
    _, Tk, K, _ = k_shape
    across = not causal and documents is None
    if documents is not None and documents.shape != (B, T):
        raise ValueError(f"documents {tuple(documents.shape)} must be {(B, T)}")
    if prefix is not None and (prefix.shape != (B,) or documents is not None or not causal):
        raise ValueError(f"prefix {tuple(prefix.shape)} must be {(B,)}, with causal=True and "
                         "without documents: it opens what causal hides, in a row of one document")
    if lengths is not None and (lengths.shape != (B,) or not across):
        raise ValueError(f"lengths {tuple(lengths.shape)} must be {(B,)}, with causal=False and "
                         "without documents: with them padding has a number of its own")

    if backend(device) == "triton":
        lo, hi = intervals(B, T, causal, documents, prefix, lengths, device)
        return Mask(causal, documents, prefix, lengths, lo=lo, hi=hi)
    kept = B * H * T * Tk * dtype.itemsize                 # bytes of P
    if device.type == "cpu" and dtype in IN_BLOCKS and kept <= KEEP:
        blocks = biases(T, Tk, H, K, causal, documents, prefix, lengths, dtype, device)
        return Mask(causal, documents, prefix, lengths, biases=blocks)
    bias = None                                            # without one torch's is faster
    if not (documents is prefix is lengths is None):
        allowed = visible(slice(0, T), Tk, causal, documents, prefix, lengths, device)
        bias = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return Mask(causal, documents, prefix, lengths, bias=bias)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, causal: bool = True,
              documents: Tensor | None = None, prefix: Tensor | None = None,
              lengths: Tensor | None = None) -> Tensor:
    """q: (B, T, H, C), k, v: (B, T, K, C), H a multiple of K -> (B, T, H, C).

    mask: of attention_mask(), for queries, keys and dtype like these; without one it is made here,
    of the keywords. Not causal and without documents, k and v may have another length than q.
    Raises ValueError when shapes, dtypes or masks do not fit.
    """
    B, T, H, C = q.shape
    Tk, K = k.shape[1:3]
    if mask is not None:
        causal, documents, prefix, lengths = mask[:4]
    across = not causal and documents is None              # k and v may be of another text
    fits = k.shape == v.shape == (B, Tk, K, C) and H % K == 0
    if not fits or (T != Tk and not across):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must "
                         "be (B, T, H, C) and twice (B, T, K, C), H a multiple of K")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they must be of one dtype")

    if mask is None:
        mask = attention_mask(q.shape, k.shape, q.dtype, q.device, causal=causal,
                              documents=documents, prefix=prefix, lengths=lengths)
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend(q.device) == "triton" and not (trains and C > WIDEST_BACKWARD):
        return FusedAttention.apply(q, k, v, mask.lo, mask.hi, causal)
    if mask.biases is not None:
        return BlockAttention.apply(q, k, v, *mask.biases)

    bias = mask.bias
    if mask.lo is not None:                                # a mask for kernels; heads are too wide
        bias = visible(slice(0, T), Tk, causal, documents, prefix, lengths, q.device)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                         bias, is_causal=causal and bias is None,
                                         enable_gqa=H != K)
    return out.transpose(1, 2)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor,
                     length: int, causal: bool = True) -> Tensor:
    """Attention of the newest tokens over a cache that already holds their keys and values.

    q: (B, Tq, H, C), the tokens in slots length - Tq .. length - 1; caches: (B, S, K, C), with
    S >= length; starts: (B,) the first real slot of each left-padded row. A query sees the slots
    from its row's start to its own, or if not causal (the prompt of a prefix model) to the last;
    what padding gets is finite and means nothing. Returns (B, Tq, H, C) in q.dtype; arithmetic is
    in the dtype of the caches. Raises ValueError when the shapes do not fit.

    On CPUs single tokens are fastest with caches that are fp32 and lie in memory as (B, K, S, C).
    """
    B, Tq, H, _ = q.shape
    S, K = k_cache.shape[1:3]
    fits = k_cache.shape == v_cache.shape and k_cache.shape[0] == B and H % K == 0
    if not fits or not Tq <= length <= S:
        raise ValueError(f"q {tuple(q.shape)}, caches {tuple(k_cache.shape)} and "
                         f"{tuple(v_cache.shape)}, length {length}: they must be (B, Tq, H, C) and "
                         "twice (B, S, K, C) with H a multiple of K and Tq <= length <= S")
    if backend(q.device) == "triton" and Tq == 1:
        return launch_decode(q, k_cache, v_cache, starts, length)

    k = k_cache[:, :length]
    v = v_cache[:, :length]
    if backend(q.device) == "torch":
        return decode_by_torch(q, k, v, starts, causal)

    own = torch.arange(length - Tq, length, device=q.device)
    last = own if causal else own[-1:]
    lo = starts[:, None].expand(B, Tq).to(torch.int32)
    hi = last.expand(B, Tq).to(torch.int32) + 1
    out, _ = launch_forward(q, k, v, lo, hi, True)
    return out
