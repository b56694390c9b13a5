"""
SwiGLU (Shazeer 2020): gate and up are the two halves of one matrix, as w13 makes them.

    y = silu(g) * u             silu(g) = g s(g),  s(g) = 1 / (1 + exp(-g))
    du = dy * silu(g)           dg = dy * u * s(g) (1 + g (1 - s(g)))

Bytes moved by a fused kernel in bf16: 6 per output forward, 10 backward.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    """Keeps gate_up alone. Halves are copied first: strided bf16 arithmetic is twice as slow."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.contiguous()).mul_(up.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        gate, up = (half.contiguous() for half in ctx.saved_tensors[0].chunk(2, dim=-1))
        dg = torch.ops.aten.silu_backward(dy * up, gate)
        return torch.cat((dg, F.silu(gate).mul_(dy)), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2F) -> (..., F). Raises ValueError for an odd width."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {gate_up.shape[-1]} wide; two halves need an even width")
    if torch.compiler.is_compiling():                      # inductor fuses the formula by itself
        return swiglu_reference(gate_up)
    return SwiGLU.apply(gate_up)
