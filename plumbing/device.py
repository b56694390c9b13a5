"""
Where a run computes and in which precision.
"""
import os
import sys

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """auto: a GPU where there is one. Under torchrun each process takes the GPU of its rank."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)              # because Triton launches its kernels there
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        # torch's own message runs over many lines of which the first names the problem
        raise ValueError(f"--device {name}: {reason}; give auto, cpu, cuda, cuda:N or "
                         "mps") from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            # a T4, say, emulates bfloat16 slowly and multiplies float16 fast
            fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if fast_bf16 else "float16"
        elif device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
            name = "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: give auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type != "cuda":
        raise ValueError(f"--dtype float16 needs a GPU (its loss scaling does), not {device.type}; "
                         "give auto, float32 or bfloat16")
    return DTYPES[name]


def peak_memory(device: torch.device) -> int:
    """Bytes held at most so far: allocated on the GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                               # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
