"""
RMSNorm (Zhang and Sennrich 2019), statistics in fp32, alone or fused with the residual addition
before it.

    h = x + delta          (residual add; h = x without delta)
    r = 1 / sqrt(mean_d h_d^2 + eps)        hhat = h r        y = hhat * w
    dw = sum over rows of dy * hhat
    dh = r (dy * w - hhat * mean_d(dy * w * hhat)) + (gradient of h from the residual stream)

Bytes moved in bf16: 4 per element forward, 6 backward; with the addition 8 and 8, where addition
and norm by themselves move 10 and 10. FLOPs (4 an element) don't count beside them.

The kernels take a few rows at a time, a whole row in registers. Backward runs as many programs as
the GPU holds at once; each walks over its rows and adds up its own share of dw in registers, so
that dw costs no pass over memory.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import backend, check, check_width, multiprocessors, tl, triton

WIDEST = 8192        # elements of a row that registers hold
TILE = 4096          # elements that a program takes at a time, if a row is not longer


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x.dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight).to(x.dtype)


# ---------------------------------------------------------------------- Triton

@triton.jit
def rmsnorm_forward_kernel(x, delta, weight, y, h, r, rows, eps, D: tl.constexpr,
                           ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows: y and r, and with ADD also h."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * D + d       # (ROWS, BLOCK); 64 bits, as N D may exceed 2^31
    mask = (row[:, None] < rows) & (d < D)

    x_tile = tl.load(x + at, mask, other=0.0)
    if ADD:
        delta_tile = tl.load(delta + at, mask, other=0.0)
        total = x_tile.to(tl.float32) + delta_tile.to(tl.float32)
        x_tile = total.to(x_tile.dtype)                    # the norm sees h as it is stored
        tl.store(h + at, x_tile, mask)

    # columns beyond D were loaded as zeros, so that the sum is over D
    wide = x_tile.to(tl.float32)
    mean_square = tl.sum(wide * wide, 1) / D
    r_tile = tl.rsqrt(mean_square + eps)                   # (ROWS,)
    tl.store(r + row, r_tile, row < rows)

    w = tl.load(weight + d, d < D, other=0.0).to(tl.float32)
    tl.store(y + at, (wide * r_tile[:, None] * w).to(y.dtype.element_ty), mask)


@triton.jit
def rmsnorm_backward_kernel(dy, dh_residual, h, weight, r, dx, dw_shares, rows, D: tl.constexpr,
                            ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx of every num_programs-th group of ROWS rows, and this program's share of dw."""
    d = tl.arange(0, BLOCK)
    w = tl.load(weight + d, d < D, other=0.0).to(tl.float32)
    # a sum for each row of the tile: adding rows up in every round would make threads wait
    dw = tl.zeros((ROWS, BLOCK), tl.float32)

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * D + d
        mask = (row[:, None] < rows) & (d < D)

        dy_tile = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        r_tile = tl.load(r + row, row < rows, other=0.0)[:, None]
        hhat = tl.load(h + at, mask, other=0.0).to(tl.float32) * r_tile
        dw += dy_tile * hhat

        g = dy_tile * w
        mean = tl.sum(g * hhat, 1) / D                     # (ROWS,), mean_d(dy * w * hhat)
        dx_tile = r_tile * (g - hhat * mean[:, None])
        if ADD:                                            # h also goes on by the residual stream
            dx_tile += tl.load(dh_residual + at, mask, other=0.0).to(tl.float32)
        tl.store(dx + at, dx_tile.to(dx.dtype.element_ty), mask)

    tl.store(dw_shares + tl.program_id(0) * D + d, tl.sum(dw, 0), d < D)


def tiling(D: int, per_thread: int) -> dict:
    """Rows and columns of a tile, and warps enough for `per_thread` elements a thread."""
    block = check_width("the last dimension of x", D, WIDEST)
    rows = max(1, TILE // block)
    warps = rows * block // (32 * per_thread)              # of 32 threads each
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, warps)}


@torch.library.custom_op("lifecycle::rmsnorm_forward", mutates_args=())
def launch_forward(x: Tensor, delta: Tensor | None, weight: Tensor,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta (N, D) -> y (N, D), h (N, D) (empty without delta), r (N,) in fp32."""
    rows, D = x.shape
    x = check("x", x, (None, None))
    weight = check("weight", weight, (D,))
    if delta is not None:
        delta = check("delta", delta, (rows, D), (x.dtype,))

    y = torch.empty_like(x)
    r = x.new_empty(rows, dtype=torch.float32)
    h = x.new_empty(0) if delta is None else torch.empty_like(x)
    tiles = tiling(D, 16)
    if rows:                                               # a grid of no programs is an error
        rmsnorm_forward_kernel[(triton.cdiv(rows, tiles["ROWS"]),)](
            x, delta, weight, y, h, r, rows, eps, D, delta is not None, **tiles)
    return y, h, r


@launch_forward.register_fake
def _(x, delta, weight, eps):
    h = x.new_empty(0 if delta is None else x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("lifecycle::rmsnorm_backward", mutates_args=())
def launch_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor,
                    r: Tensor) -> tuple[Tensor, Tensor]:
    """dy, dh (the gradient of the returned h) -> dx (N, D), dw (D,) in fp32."""
    rows, D = h.shape
    h = h.contiguous()
    weight = weight.contiguous()
    dy = check("the gradient of y", dy, (rows, D))
    if dh is not None:
        dh = check("the gradient of h", dh, (rows, D))

    tiles = tiling(D, 8)
    # two programs a multiprocessor: one computes while the other waits for its rows
    programs = min(triton.cdiv(rows, tiles["ROWS"]), 2 * multiprocessors(h.device))
    dx = torch.empty_like(h)
    dw_shares = h.new_empty(programs, D, dtype=torch.float32)
    if rows:
        rmsnorm_backward_kernel[(programs,)](dy, dh, h, weight, r, dx, dw_shares, rows, D,
                                             dh is not None, **tiles)
    return dx, dw_shares.sum(0)


@launch_backward.register_fake
def _(dy, dh, h, weight, r):
    return h.new_empty(h.shape), h.new_empty(h.shape[1], dtype=torch.float32)


class FusedRMSNorm(torch.autograd.Function):
    """h and r are kept; without delta h is x itself."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float):
        y, h, r = launch_forward(x, delta, weight, eps)
        ctx.add = delta is not None
        ctx.save_for_backward(h if ctx.add else x, weight, r)
        return (h, y) if ctx.add else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        h, weight, r = ctx.saved_tensors
        dh, dy = gradients if ctx.add else (None, *gradients)
        dx, dw = launch_backward(dy, dh, h, weight, r)
        ddelta = dx if ctx.add else None                   # h = x + delta: the same gradient
        return dx, ddelta, dw.to(weight.dtype), None


# ---------------------------------------------------------------------- torch

def normalized(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y in x.dtype, and r (..., 1) in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = (wide * r).mul_(weight)                            # in place: one pass over memory less
    return y.to(x.dtype), r


class RMSNorm(torch.autograd.Function):
    """By hand: half the passes over memory that autograd makes, and x is all that is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        weight_wide = weight.to(r.dtype)
        xhat = x.to(r.dtype) * r                           # hhat of the formula
        dy_wide = dy.to(r.dtype)

        product = dy_wide * xhat
        dw = None
        if ctx.needs_input_grad[1]:
            dw = product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)

        # r (dy * w - xhat * mean_d(dy * w * xhat)), in the memory of the product and of dy * w
        mean = product.mul_(weight_wide).mean(-1, keepdim=True)
        dx = (dy_wide * weight_wide).addcmul_(xhat, mean, value=-1).mul_(r)
        return dx.to(x.dtype), dw, None


# ---------------------------------------------------------------------- public functions

def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x: (..., D), weight: (D,) -> (..., D) in x.dtype. Raises ValueError when D differs."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; rows of x have {x.shape[-1]}")
    if backend(x.device) == "triton":
        return FusedRMSNorm.apply(x.flatten(0, -2), None, weight, eps).view(x.shape)
    if torch.compiler.is_compiling():                      # inductor fuses the formula by itself
        return rmsnorm_reference(x, weight, eps)
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, eps)
    return normalized(x, weight, eps)[0]


def add_rmsnorm(x: Tensor, delta: Tensor, weight: Tensor,
                eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x, delta: (..., D), weight: (D,) -> h = x + delta and rmsnorm(h), both (..., D) in x.dtype.
    Raises ValueError when shapes differ."""
    if delta.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(f"delta has shape {tuple(delta.shape)}, weight {tuple(weight.shape)}; "
                         f"x has {tuple(x.shape)}")
    if backend(x.device) == "triton":
        h, y = FusedRMSNorm.apply(x.flatten(0, -2), delta.flatten(0, -2), weight, eps)    # (N, D)
        return h.view(x.shape), y.view(x.shape)
    h = x + delta
    return h, rmsnorm(h, weight, eps)
