"""
Shared by all kernels: the choice between Triton and torch, a launcher's checks, sizes of grids.

`backend()` says which path the public functions take: "triton" for tensors on a GPU where Triton is
installed, "torch" elsewhere. KERNELS=torch|triton in the environment, read once, overrides. Under
TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly: that is how tests check them.
"""
import os
from types import SimpleNamespace

import torch
from torch import Tensor

WANTED = os.environ.get("KERNELS", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:                                                   # half a second: only where it can be used
    if not (torch.version.cuda or INTERPRETED or WANTED == "triton"):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:                                    # kernels are defined, but cannot be called
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=None)
INSTALLED = not isinstance(triton, SimpleNamespace)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def backend(device: torch.device | None = None) -> str:
    """"torch" or "triton": the path that public functions take for tensors on `device` (by default
    the GPU, if there is one). Raises ValueError when KERNELS is neither, and when it asks for
    Triton where there is none."""
    if WANTED not in ("auto", "torch", "triton"):
        raise ValueError(f"KERNELS={WANTED!r}: it must be torch or triton")
    if WANTED == "triton" and not INSTALLED:
        raise ValueError("KERNELS=triton, but the package triton is not installed: "
                         "pip install triton, or use KERNELS=torch")
    if WANTED != "auto":
        return WANTED

    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return "triton" if on_gpu and INSTALLED else "torch"


def check(name: str, x: Tensor, shape: tuple, dtypes: tuple = FLOATS,
          contiguous: bool = True) -> Tensor:
    """x as a tensor that a kernel can address, else a ValueError that names it.

    shape: sizes, None where any is right. contiguous: copy a view; else return x as it lies.
    """
    fits = x.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, x.shape))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be ({wanted})")
    if x.dtype not in dtypes:
        known = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {x.dtype}; the Triton kernel takes {known} "
                         "(KERNELS=torch takes all)")

    # a kernel takes addresses: those of the other kind of memory would end the process
    if INTERPRETED and x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}; the Triton kernels run on "
                         "CPU tensors under TRITON_INTERPRET=1")
    if not INTERPRETED and x.device.type != "cuda":
        raise ValueError(f"{name} is on {x.device}; the Triton kernels run on "
                         "GPUs (on CPU tensors under TRITON_INTERPRET=1)")
    return x.contiguous() if contiguous else x


def check_width(name: str, width: int, largest: int) -> int:
    """The power of two that holds `width`; ValueError beyond `largest`."""
    if not 0 < width <= largest:
        raise ValueError(f"{name} is {width}; the Triton kernel takes 1 to {largest}")
    return triton.next_power_of_2(width)


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 2 in the interpreter, so that loops go round."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use: 227 KB on an H100, 163 on an A100, 99 on a
    GeForce 3090 or 4090."""
    if INTERPRETED:
        return 2**18
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
