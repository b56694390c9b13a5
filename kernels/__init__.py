"""
The fused operations of the model: formula, torch path and public function, one file each.

`backend()` says which path the public functions take. KERNELS=torch|triton in the environment
overrides; the Triton kernels are not there yet, so asking for them raises ValueError.
"""

import ctypes
import os
import sys

from kernels.attention import attention, attention_reference, decode_attention
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.rmsnorm import rmsnorm, rmsnorm_reference
from kernels.rope import rope, rope_reference
from kernels.swiglu import swiglu, swiglu_reference

__all__ = [
    "attention", "attention_reference", "backend", "decode_attention", "keep_memory",
    "linear_cross_entropy", "linear_cross_entropy_reference", "rmsnorm", "rmsnorm_reference",
    "rope", "rope_reference", "swiglu", "swiglu_reference",
]


def backend() -> str:
    """"torch": the only path so far. KERNELS=triton raises ValueError until its kernels exist."""
    wanted = os.environ.get("KERNELS", "torch")
    if wanted not in ("torch", "triton"):
        raise ValueError(f"KERNELS={wanted!r}: it must be torch or triton")
    if wanted == "triton":
        raise ValueError("KERNELS=triton: the Triton kernels are not there yet; use KERNELS=torch")
    return wanted


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel,
    and oneDNN to keep fewer prepared matmuls. Call it before the first matmul.

    On CPUs every training step frees all its activations; fetched back page by page, they cost up
    to a seventh of the step. Memory taken is then held until the process ends. Does nothing where
    the C library is another one. (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of mallopt(3).)
    Generation meets new shapes all the time, as rows finish: the 1,024 matmuls that oneDNN and
    torch would each keep for them grow to 2 GB.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)                            # own mappings above 32 MB only
        libc.mallopt(-1, 2**31 - 1)                        # trim what is free at the top: never
