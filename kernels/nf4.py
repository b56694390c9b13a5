"""
NF4 (Dettmers et al. 2023; 001 section 2.4.2): frozen weights in 4 bits, for QLoRA.

    code_i = one of 16 numbers, the quantiles of a normal distribution, from -1 to 1
    a_b = max |w_i| over block b, 64 neighbours in a row            i = argmin |w / a_b - code_i|
    doubly quantized: a_b = max(mean + scale_B c_b, 0), c_b in -127 ... 127, B of 256 blocks
    w^ = code_i a_b            y = x w^T            dx = dy w^            w is frozen: no dw

Error: |w - w^| <= 0.152 a_b (half the largest gap between codes); double quantization adds up to
scale_B / 2. c_b is linear because a_b of normal weights stays near its mean.

Bits a weight: 4 + 32/64 = 4.5, doubly quantized 4 + 8/64 + 32/(64 256) = 4.127. Blocks don't cross
rows; the last of a row is shorter where 64 does not divide D.
Bytes moved for a weight, bf16: few rows 0.516, by one kernel that decodes in registers. Many rows
4.5: 0.516 read and 2 written to make w^, 2 read by the matmul, in forward and again in backward; w^
is not kept between them. FLOPs: 2 a weight and row.

By count, few rows on an H100 are limited by instructions, not bytes: 7 a weight for one row, 9 on
tensor cores, as compiled. A code is looked up among 16 numbers in shared memory, which lie in 16
banks: no lane waits for another. In a table of 256 pairs lanes would meet in the same banks. a_b is
decoded where it is used: decoded before, it would take a launch and 8 bytes more for every 33.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import FLOATS, backend, check, multiprocessors, tl, triton

CODE = (-1.0, -0.696192801, -0.525073051, -0.394917488, -0.284441382, -0.18477343, -0.0910500363,
        0.0, 0.0795802996, 0.160930201, 0.246112302, 0.337915242, 0.440709829, 0.562617004,
        0.722956836, 1.0)
BLOCK = 64           # weights that share an absmax
GROUP = 256          # blocks whose absmax share a scale
FEW = 16             # rows up to which decoding inside the product is cheaper than making w^ first


class NF4Weight(NamedTuple):
    """A frozen (N, D) matrix. A module may hold the tensors as buffers, and be saved with them."""
    codes: Tensor                     # (N, ceil(D / 2)) uint8: the even column in the high 4 bits,
    #                                   its right neighbour in the low ones
    absmax: Tensor                    # (N, ceil(D / 64)): fp32, doubly quantized int8
    scale: Tensor | None              # (ceil(N ceil(D / 64) / 256),) fp32 of absmax, row after row,
    mean: Tensor | None               # () fp32: both None where absmax is fp32
    columns: int                      # D

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    def to(self, device: torch.device | str) -> "NF4Weight":
        *tensors, columns = self
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return NF4Weight(*moved, columns)


def bits_per_weight(q: NF4Weight) -> float:
    """All bytes stored, in bits, by the number of weights."""
    *tensors, D = q
    N = len(q.codes)
    stored = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return 8 * stored / (N * D)


@torch.no_grad()
def quantize_nf4(weight: Tensor, double: bool = True) -> NF4Weight:
    """weight (N, D) of any float dtype -> its NF4 form on the same device. Raises ValueError for
    another shape, no weights, or weights that are not finite."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; "
                         "it must be a matrix of floats, not empty")
    wide = weight.float()
    bad = int((~wide.isfinite()).sum())
    if bad:
        raise ValueError(f"weight has {bad} NaN or infinite of {weight.numel()} values")

    D = weight.shape[1]
    blocks = F.pad(wide, (0, -D % BLOCK)).unflatten(1, (-1, BLOCK))      # (N, ceil(D / 64), 64)
    absmax = blocks.abs().amax(-1)                         # (N, ceil(D / 64))
    divisor = torch.where(absmax == 0, 1.0, absmax)        # a block of zeros: any divisor will do
    relative = blocks / divisor[..., None]                 # -1 to 1

    # the nearest code changes halfway between two neighbours
    code = torch.tensor(CODE, device=weight.device)
    borders = (code[1:] + code[:-1]) / 2
    nearest = torch.bucketize(relative, borders, out_int32=True).to(torch.uint8)
    nearest = nearest.flatten(1)[:, :D + D % 2]            # an odd row ends in a code of padding
    codes = nearest[:, ::2] << 4 | nearest[:, 1::2]        # two to a byte

    if not double:
        return NF4Weight(codes, absmax, None, None, D)
    absmax, scale, mean = quantize_absmax(absmax)
    return NF4Weight(codes, absmax, scale, mean, D)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax -> codes in int8, scale, mean; absmax = mean + scale * code up to scale / 2."""
    mean = absmax.mean()
    groups = (absmax - mean).flatten()
    groups = F.pad(groups, (0, -len(groups) % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1) / 127
    divisor = torch.where(scale == 0, 1.0, scale)          # equal absmax: all codes are 0
    codes = (groups / divisor[:, None]).round().to(torch.int8)
    codes = codes.flatten()[:absmax.numel()].view_as(absmax)
    return codes.clone(), scale, mean                      # a view would keep the padding


def decoded_absmax(q: NF4Weight) -> Tensor:
    """a_b of the formula, (N, ceil(D / 64)) fp32."""
    if q.scale is None:
        return q.absmax
    scale = q.scale.repeat_interleave(GROUP)[:q.absmax.numel()].view_as(q.absmax)
    return (q.mean + q.absmax * scale).clamp(min=0)


def dequantize_nf4_reference(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """w^ (N, D) in dtype."""
    N, D = q.shape
    pairs = torch.stack((q.codes >> 4, q.codes & 15), -1)  # (N, ceil(D / 2), 2)
    index = pairs.flatten(1)[:, :D].long()
    code = torch.tensor(CODE, device=q.codes.device)
    a = decoded_absmax(q).repeat_interleave(BLOCK, 1)[:, :D]
    return (code[index] * a).to(dtype)


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """CODE as (16,) fp32 on `device`, made once."""
    return torch.tensor(CODE, device=device)


# ---------------------------------------------------------------------- Triton

@triton.jit
def decode(codes, absmax, scale, mean, code, n, first, N, D: tl.constexpr, GROUP: tl.constexpr,
           BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows n, columns first ... first + BLOCK_D: code_i (BLOCK_N, blocks, BLOCK) and a_b of the
    formula (BLOCK_N, blocks, 1), in fp32; outside the weight they are any finite numbers."""
    PAIRS: tl.constexpr = (D + 1) // 2
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = n[:, None].to(tl.int64)                          # 64 bits, as N D may exceed 2^31
    inside = n[:, None] < N

    # a byte holds two columns, the even one in the high 4 bits: joined they stand in order
    pair = first // 2 + tl.arange(0, BLOCK_D // 2)
    byte = tl.load(codes + row * PAIRS + pair, inside & (pair < PAIRS), other=0).to(tl.int32)
    index = tl.reshape(tl.join(byte >> 4, byte & 15), (BLOCK_N * BLOCK_D,))

    block = first // BLOCK + tl.arange(0, BLOCK_D // BLOCK)
    at = row * BLOCKS + block                              # (BLOCK_N, blocks)
    inside = inside & (block < BLOCKS)
    a = tl.load(absmax + at, inside, other=0).to(tl.float32)
    if scale is not None:                                  # doubly quantized: mean + scale c_b
        a = tl.maximum(tl.load(mean) + a * tl.load(scale + at // GROUP, inside, other=0.0), 0.0)
    return tl.reshape(tl.gather(code, index, 0), (BLOCK_N, BLOCK_D // BLOCK, BLOCK)), a[:, :, None]


@triton.jit
def few_rows_kernel(x, codes, absmax, scale, mean, code, y, rows, N, steps, D: tl.constexpr,
                    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program takes BLOCK_N outputs and the products of `steps` blocks of columns."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, ROWS)[:, None]
    table = tl.load(code + tl.arange(0, 16))
    y_tile = tl.zeros((ROWS, BLOCK_N), tl.float32)

    for step in range(steps):
        first = (tl.program_id(1) * steps + step) * BLOCK_D
        d = first + tl.arange(0, BLOCK_D)
        # zeros beyond D, so that it does not matter what numbers decode() has there
        x_tile = tl.load(x + r * D + d, (r < rows) & (d < D), other=0.0)
        w, a = decode(codes, absmax, scale, mean, table, n, first, N, D, GROUP, BLOCK, BLOCK_N,
                      BLOCK_D)
        if ROWS == 1:                                      # times a once a block, not once a weight
            x_blocks = tl.reshape(x_tile, (1, BLOCK_D // BLOCK, BLOCK)).to(tl.float32)
            blocks = tl.sum(w * x_blocks, 2, keep_dims=True) * a
            y_tile += tl.reshape(tl.sum(blocks, 1), (1, BLOCK_N))
        else:
            w = tl.reshape(w * a, (BLOCK_N, BLOCK_D)).to(x_tile.dtype)
            y_tile = tl.dot(x_tile, tl.trans(w), y_tile, input_precision="ieee")

    # y is (shares, rows, N): each program along the columns has a share of its own
    share = y + tl.program_id(1).to(tl.int64) * rows * N
    tl.store(share + r * N + n, y_tile.to(y.dtype.element_ty), (r < rows) & (n < N))


@triton.jit
def dequantize_kernel(codes, absmax, scale, mean, code, w, N, D: tl.constexpr, GROUP: tl.constexpr,
                      BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of w^ (BLOCK_N, BLOCK_D), in the dtype of w."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    table = tl.load(code + tl.arange(0, 16))
    w_tile, a = decode(codes, absmax, scale, mean, table, n, first, N, D, GROUP, BLOCK, BLOCK_N,
                       BLOCK_D)
    w_tile = tl.reshape(w_tile * a, (BLOCK_N, BLOCK_D)).to(w.dtype.element_ty)
    tl.store(w + n[:, None].to(tl.int64) * D + d, w_tile, (n[:, None] < N) & (d < D))


def checked(codes: Tensor, absmax: Tensor, scale: Tensor | None, mean: Tensor | None,
            D: int) -> list[Tensor | None]:
    """The tensors of an NF4Weight as the kernels take them, and the code."""
    N = len(codes)
    blocks = triton.cdiv(D, BLOCK)
    codes = check("codes", codes, (N, triton.cdiv(D, 2)), (torch.uint8,))
    if scale is None:
        absmax = check("absmax", absmax, (N, blocks), (torch.float32,))
    else:
        absmax = check("absmax", absmax, (N, blocks), (torch.int8,))
        scale = check("scale", scale, (triton.cdiv(N * blocks, GROUP),), (torch.float32,))
        mean = check("mean", mean, (), (torch.float32,))
    return [codes, absmax, scale, mean, code_table(codes.device)]


def tiling(rows: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Tile of few_rows_kernel, programs along the columns, steps of each. One row: 64 weights a
    thread. More: what the operands of a matmul leave registers for. Where outputs alone make fewer
    than four programs for each multiprocessor, columns are shared out too."""
    if rows == 1:
        block_d = max(BLOCK, min(1024, triton.next_power_of_2(D)))
        tile = {"ROWS": 1, "BLOCK_N": 8192 // block_d, "BLOCK_D": block_d}
    elif dtype == torch.float32:
        tile = {"ROWS": FEW, "BLOCK_N": 32, "BLOCK_D": 64}
    else:
        tile = {"ROWS": FEW, "BLOCK_N": 64, "BLOCK_D": 128}

    programs = triton.cdiv(N, tile["BLOCK_N"])             # along the outputs
    shares = max(1, 4 * multiprocessors(device) // programs)
    blocks = triton.cdiv(D, tile["BLOCK_D"])
    steps = triton.cdiv(blocks, shares)                    # rounded up: fewer shares may do
    return tile, triton.cdiv(blocks, steps), steps


@torch.library.custom_op("lifecycle::nf4_few_rows", mutates_args=())
def launch_few_rows(x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None,
                    mean: Tensor | None) -> Tensor:
    """x (rows, D), at most FEW rows -> (rows, N). Shares of programs along the columns are added up
    afterwards, in fp32 and in order: the same every time."""
    rows, D = x.shape
    N = len(codes)
    x = check("x", x, (None, None))
    q = checked(codes, absmax, scale, mean, D)
    if rows > FEW:
        raise ValueError(f"x has {rows} rows; this kernel takes up to {FEW}")

    tile, shares, steps = tiling(rows, N, D, x.dtype, x.device)
    share_dtype = x.dtype if shares == 1 else torch.float32
    y = x.new_empty(shares, rows, N, dtype=share_dtype)
    grid = triton.cdiv(N, tile["BLOCK_N"]), shares
    if rows:                                               # a grid of no programs is an error
        few_rows_kernel[grid](x, *q, y, rows, N, steps, D, GROUP, BLOCK, **tile, num_stages=1)
    return y.view(rows, N) if shares == 1 else y.sum(0).to(x.dtype)


@launch_few_rows.register_fake
def _(x, codes, absmax, scale, mean):
    return x.new_empty(x.shape[0], codes.shape[0])


@torch.library.custom_op("lifecycle::nf4_dequantize", mutates_args=())
def launch_dequantize(codes: Tensor, absmax: Tensor, scale: Tensor | None, mean: Tensor | None,
                      D: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, D) in dtype."""
    N = len(codes)
    q = checked(codes, absmax, scale, mean, D)
    if dtype not in FLOATS:
        known = ", ".join(str(float_dtype) for float_dtype in FLOATS)
        raise ValueError(f"dtype is {dtype}; the Triton kernel makes {known} "
                         "(KERNELS=torch makes all)")

    w = codes.new_empty(N, D, dtype=dtype)
    block_d = max(BLOCK, min(512, triton.next_power_of_2(D)))
    block_n = 4096 // block_d                              # 4096 weights a program
    grid = triton.cdiv(N, block_n), triton.cdiv(D, block_d)
    dequantize_kernel[grid](*q, w, N, D, GROUP, BLOCK, block_n, block_d)
    return w


@launch_dequantize.register_fake
def _(codes, absmax, scale, mean, D, dtype):
    return codes.new_empty(codes.shape[0], D, dtype=dtype)


# ---------------------------------------------------------------------- torch

@functools.cache
def pair_table(device: torch.device) -> Tensor:
    """(256,): the two fp32 numbers that a byte stands for, in the 8 bytes of one int64, which is
    ten times as fast to look up as rows of two."""
    byte = torch.arange(256, device=device)
    code = code_table(device)
    pairs = torch.stack((code[byte >> 4], code[byte & 15]), 1)           # (256, 2) fp32
    return pairs.view(torch.int64).flatten()


def dequantize_torch(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """w^ (N, D) in dtype, by looking up two weights at a time."""
    N, D = q.shape
    absmax = decoded_absmax(q)                             # (N, blocks)
    whole_blocks = absmax.shape[1] * BLOCK // 2            # bytes of a row, last block filled up
    codes = F.pad(q.codes, (0, whole_blocks - q.codes.shape[1]))

    pairs = pair_table(codes.device).index_select(0, codes.flatten().int())
    values = pairs.view(torch.float32)                     # the two numbers of each int64
    values.view(*absmax.shape, BLOCK).mul_(absmax[..., None])
    return values.view(N, -1)[:, :D].to(dtype)


# ---------------------------------------------------------------------- public functions

def dequantize_nf4(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """w^ (N, D) in dtype: computed in fp32, rounded once."""
    if backend(q.codes.device) == "triton":
        return launch_dequantize(*q, dtype)
    if torch.compiler.is_compiling():                      # inductor fuses the formula by itself
        return dequantize_nf4_reference(q, dtype)
    return dequantize_torch(q, dtype)


class NF4Linear(torch.autograd.Function):
    """Keeps the 4-bit weight alone: neither x, which only dw would need, nor w^."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None,
                mean: Tensor | None, D: int) -> Tensor:
        ctx.save_for_backward(codes, absmax, scale, mean)
        ctx.columns = D
        if len(x) <= FEW and backend(x.device) == "triton":
            return launch_few_rows(x, codes, absmax, scale, mean)
        w = dequantize_nf4(NF4Weight(codes, absmax, scale, mean, D), x.dtype)
        return x @ w.T

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        w = dequantize_nf4(NF4Weight(*ctx.saved_tensors, ctx.columns), dy.dtype)
        return dy @ w, None, None, None, None, None


def nf4_linear(x: Tensor, q: NF4Weight) -> Tensor:
    """x (..., D) -> x w^T (..., N) in x.dtype; the gradient goes to x alone. Raises ValueError when
    widths or devices differ or x is not of floats."""
    N, D = q.shape
    if x.shape[-1:] != (D,):
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be {D}, the "
                         f"columns of the weight")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; it must be of floats")
    if x.device != q.codes.device:
        raise ValueError(f"x is on {x.device}, the weight on {q.codes.device}: q.to(x.device)")
    y = NF4Linear.apply(x.reshape(-1, D), *q)              # (rows, N)
    return y.view(*x.shape[:-1], N)
