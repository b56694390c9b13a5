"""
The fused operations of the model, one file each.

Each file has the formula and its gradient, a plain torch reference, Triton kernels for GPUs, a
torch path for CPUs, and the public function that picks one of the two. `backend()` says which;
KERNELS=torch|triton in the environment overrides.

`python -m kernels.bench` times them beside their alternatives.
"""

import ctypes
import os
import sys

from kernels.attention import (
    Mask,
    attention,
    attention_mask,
    attention_reference,
    decode_attention,
)
from kernels.cross_entropy import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from kernels.launch import backend
from kernels.moe import moe_experts, moe_experts_reference
from kernels.nf4 import (
    NF4Weight,
    bits_per_weight,
    dequantize_nf4,
    dequantize_nf4_reference,
    nf4_linear,
    quantize_nf4,
)
from kernels.rmsnorm import add_rmsnorm, rmsnorm, rmsnorm_reference
from kernels.rope import rope, rope_reference
from kernels.swiglu import swiglu, swiglu_reference

__all__ = [
    "Mask", "NF4Weight", "add_rmsnorm", "attention", "attention_mask", "attention_reference",
    "backend", "bits_per_weight", "cross_entropy", "decode_attention", "dequantize_nf4",
    "dequantize_nf4_reference", "keep_memory", "linear_cross_entropy",
    "linear_cross_entropy_reference", "moe_experts", "moe_experts_reference", "nf4_linear",
    "quantize_nf4", "rmsnorm", "rmsnorm_reference", "rope", "rope_reference", "swiglu",
    "swiglu_reference",
]


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel,
    and oneDNN to keep fewer prepared matmuls. Call it before the first matmul.

    On CPUs every training step frees all its activations; fetched back page by page, they cost up
    to a seventh of the step. Memory taken is then held until the process ends. Does nothing where
    the C library is another one. (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of mallopt(3).)
    Generation meets new shapes all the time, as rows finish: the 1,024 matmuls that oneDNN and
    torch would each keep for them grow to 2 GB. A training step on batches of a dozen widths needs
    about 200; with 64 it prepares them anew and takes a tenth longer.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "256")
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):                           # glibc has it, musl has not
        libc.mallopt(-3, 2**25)                            # own mappings above 32 MB only
        libc.mallopt(-1, 2**31 - 1)                        # never trim free memory at the top
