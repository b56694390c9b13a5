"""
Softmax attention (Vaswani et al. 2017): causal or not, grouped queries, packed documents, and for
decoding a cache of keys and values.

    S = Q K^T / sqrt(C), -inf where a token may not look        P = softmax(S)        O = P V
    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))
    dQ = dS K / sqrt(C)        dK = dS^T Q / sqrt(C)

Matmuls run in the dtype of the input, softmax in fp32 inside. Shapes: B batch, T tokens, H query
heads, K key/value heads (H = K G, query head h reads key/value head h // G), C head width.

On CPUs the scores are made in blocks of queries that skip the keys after them, with P kept for the
backward pass: plain matmuls reach two to three times the speed of torch's
scaled_dot_product_attention there, most of all in bf16. Where P would take too much memory, and on
other devices, scaled_dot_product_attention is called.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128          # queries at a time
KEEP = 2**27         # bytes of P that may be kept per call


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
                        documents: Tensor | None = None) -> Tensor:
    T, H, C = q.shape[1:]
    k, v = (x.repeat_interleave(H // k.shape[2], dim=2) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihc,bjhc->bhij", q.to(wide), k.to(wide)) / C**0.5
    hidden = ~visible(slice(0, T), T, causal, documents, q.device)
    P = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhc->bihc", P, v.to(wide)).to(q.dtype)


def visible(rows: slice, keys: int, causal: bool, documents: Tensor | None, device) -> Tensor:
    """(1 or B, 1, rows, keys): True where a query of `rows` may see a key of the first `keys`."""
    seen = torch.ones(rows.stop - rows.start, keys, dtype=torch.bool, device=device)[None, None]
    if causal:
        seen = seen.tril(rows.start)
    if documents is not None:
        seen = seen & (documents[:, None, rows, None] == documents[:, None, None, :keys])
    return seen


class BlockAttention(torch.autograd.Function):
    """Rows are (token, query head of a group) pairs, so that a group shares its keys' matmuls."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Tensor | None):
        (B, T, H, C), K = q.shape, k.shape[2]
        G = H // K
        q = q.reshape(B, T, K, G * C).transpose(1, 2).reshape(B * K, T * G, C)
        k, v = (x.transpose(1, 2).reshape(B * K, T, C) for x in (k, v))
        out, kept = torch.empty_like(q), []
        for first in range(0, T, BLOCK):
            tokens = slice(first, min(first + BLOCK, T))
            rows, keys = slice(G * tokens.start, G * tokens.stop), tokens.stop if causal else T
            seen = visible(tokens, keys, causal, documents, q.device)
            bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
            bias = bias.repeat_interleave(G, 2).expand(-1 if documents is None else B,
                                                       1 if documents is None else K, -1, -1)
            scores = torch.baddbmm(bias.flatten(0, 1), q[:, rows], k[:, :keys].mT, alpha=C**-0.5)
            P = scores.softmax(-1)                             # (B K, rows, keys), fp32 inside
            out[:, rows] = P @ v[:, :keys]
            kept.append(P)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape = B, T, H, K, C
        return out.view(B, K, T, G * C).transpose(1, 2).reshape(B, T, H, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        B, T, H, K, C = ctx.shape
        G = H // K
        dout = dout.reshape(B, T, K, G * C).transpose(1, 2).reshape(B * K, T * G, C)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, P in enumerate(kept):
            rows, keys = slice(G * BLOCK * i, G * BLOCK * i + P.shape[1]), P.shape[2]
            dv[:, :keys] += P.mT @ dout[:, rows]
            dP = dout[:, rows] @ v[:, :keys].mT
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            dq[:, rows] = dS @ k[:, :keys]
            dk[:, :keys] += dS.mT @ q[:, rows]
        dq = dq.mul_(C**-0.5).view(B, K, T, G * C).transpose(1, 2).reshape(B, T, H, C)
        dk, dv = (x.view(B, K, T, C).transpose(1, 2) for x in (dk.mul_(C**-0.5), dv))
        return dq, dk, dv, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
              documents: Tensor | None = None) -> Tensor:
    """q: (B, T, H, C), k, v: (B, T, K, C), H a multiple of K -> (B, T, H, C).

    documents: (B, T) numbers; a token sees those with its own number only (and, if causal, none
    after it). Padding is a document of its own. Raises ValueError when the shapes do not fit.
    """
    (B, T, H, C), K = q.shape, k.shape[2]
    if k.shape != (B, T, K, C) or v.shape != k.shape or H % K:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must "
                         "be (B, T, H, C) and twice (B, T, K, C), H a multiple of K")
    if documents is not None and documents.shape != (B, T):
        raise ValueError(f"documents {tuple(documents.shape)} must be {(B, T)}")
    if q.device.type == "cpu" and B * H * T * T * q.element_size() <= KEEP:
        return BlockAttention.apply(q, k, v, causal, documents)
    mask = None if documents is None else visible(slice(0, T), T, causal, documents, q.device)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask,
                                         is_causal=causal and mask is None, enable_gqa=H != K)
    return out.transpose(1, 2)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor,
                     length: int) -> Tensor:
    """Attention of the newest tokens over a cache that already holds their keys and values.

    q: (B, Tq, H, C), the tokens in slots length - Tq .. length - 1; caches: (B, S, K, C), with
    S >= length; starts: (B,) the first real slot of each left-padded row. A query sees the slots
    from its row's start to its own. Returns (B, Tq, H, C) in q.dtype; arithmetic is in the dtype of
    the caches. Raises ValueError when the shapes do not fit.

    On CPUs single tokens are fastest with caches that are fp32 and lie in memory as (B, K, S, C).
    """
    (B, Tq, H, _), K = q.shape, k_cache.shape[2]
    if k_cache.shape != v_cache.shape or k_cache.shape[0] != B or H % K or not \
            Tq <= length <= k_cache.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, caches {tuple(k_cache.shape)} and "
                         f"{tuple(v_cache.shape)}, length {length}: they must be (B, Tq, H, C) and "
                         "twice (B, S, K, C) with H a multiple of K and Tq <= length <= S")
    k, v = (x[:, :length].transpose(1, 2) for x in (k_cache, v_cache))         # (B, K, length, C)
    slots = torch.arange(length, device=q.device)
    if q.device.type == "cpu" and Tq == 1:
        return decode_one(q, k, v, slots, starts)
    own = slots[length - Tq:, None]
    seen = (slots <= own) & (slots >= starts[:, None, None]) | (slots == own)  # padding sees itself
    out = F.scaled_dot_product_attention(q.transpose(1, 2).to(k.dtype), k, v, seen[:, None],
                                         enable_gqa=H != K)
    return out.transpose(1, 2).to(q.dtype)


def decode_one(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """One query a row, (B, 1, H, C), by plain matmuls over k and v (B, K, length, C)."""
    B, K, length, C = k.shape
    queries = q.reshape(B * K, -1, C).to(k.dtype)                              # (B K, G, C)
    k, v = k.reshape(B * K, length, C), v.reshape(B * K, length, C)
    # a single bf16 row times a matrix is slow in oneDNN, the matrix times a column is not
    scores = queries @ k.mT if k.dtype == torch.float32 else (k @ queries.mT).mT
    scores = scores.to(torch.promote_types(k.dtype, torch.float32)) * C**-0.5
    if starts.any():
        padding = (slots < starts[:, None]).repeat_interleave(K, 0)[:, None]   # (B K, 1, length)
        scores = scores.masked_fill_(padding, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).view(q.shape).to(q.dtype)
