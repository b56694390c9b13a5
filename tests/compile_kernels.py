"""
Compile what the public functions launch for a GPU that need not be there, and print what each
kernel takes of it, one JSON object a line: python tests/compile_kernels.py ARCH [DTYPE...]
(of the DTYPEs given the cases that take seconds; without any, all cases of all dtypes)

Real launches are followed up to the point where the compiled kernel would run, so what is compiled
is what ships: the same tiles, warps, dtypes and alignments. Numbers that come out are garbage.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

os.environ["KERNELS"] = "triton"
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import kernels  # noqa: E402

CUOBJDUMP = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}       # bytes a program may use


class NoGPU:
    """Triton's driver, as far as compiling needs one."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).requires_grad_()


def forward_and_backward(function, *inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


# ---------------------------------------------------------------------- cases, by kernel file

def small(dtype):
    """Norm, activation, rotation at the widths of a 124M model and of a 7B one."""
    for D in (768, 4096, 8192):
        x, delta, weight = random(8, D, dtype=dtype), random(8, D, dtype=dtype), random(D)
        forward_and_backward(kernels.rmsnorm, x, weight)
        forward_and_backward(kernels.add_rmsnorm, x, delta, weight)
        forward_and_backward(kernels.swiglu, x)
    for heads, C in ((12, 64), (32, 128)):
        q, k = random(1, 8, heads, C, dtype=dtype), random(1, 8, heads // 4, C, dtype=dtype)
        tables = torch.ones(8, C // 2), torch.ones(8, C // 2)
        forward_and_backward(lambda q, k, tables=tables: kernels.rope(q, k, *tables), q, k)


def cross_entropy(dtype):
    targets = torch.zeros(8, dtype=torch.long)
    for V in (1024, 50304):
        for with_entropy in (False, True):
            forward_and_backward(lambda z, e=with_entropy: kernels.cross_entropy(
                z, targets, with_entropy=e), random(8, V, dtype=dtype))


def moe(dtype):
    """8 experts with fp32 weights."""
    D, F, E, pairs = 768, 2048, 8, 128
    w13, w2 = (torch.zeros(E, *size, requires_grad=True) for size in ((2 * F, D), (D, F)))
    tokens, offsets = torch.arange(pairs) % 64, torch.arange(E + 1) * (pairs // E)
    forward_and_backward(lambda x, gates: kernels.moe_experts(x, w13, w2, tokens, gates, offsets),
                         random(64, D, dtype=dtype), random(pairs, dtype=torch.float32))


def nf4(dtype):
    """One row, several, and the whole weight, which backward makes; singly quantized one row."""
    codes, absmax = torch.zeros(4096, 2048, dtype=torch.uint8), torch.zeros(4096, 64)
    single = kernels.NF4Weight(codes, absmax, None, None, 4096)
    double = kernels.NF4Weight(codes, absmax.to(torch.int8), absmax.flatten()[:1024],
                               torch.tensor(0.0), 4096)
    for q, rows in ((double, 1), (double, 16), (single, 1)):
        forward_and_backward(lambda x, q=q: kernels.nf4_linear(x, q),
                             random(rows, 4096, dtype=dtype))


def attend(dtype, widths, masks, T=256):
    """Forward and, up to width 128, backward; decoding. 3 query heads a group."""
    options = {"causal": {}, "full": {"causal": False}, "prefix": {"prefix": torch.ones(2).int()},
               "documents": {"documents": torch.ones(2, T)}}
    for C in widths:
        q, k, v = (random(2, T, heads, C, dtype=dtype) for heads in (6, 2, 2))
        for mask in masks:
            call = partial(kernels.attention, **options[mask])
            forward_and_backward(call, q, k, v) if C <= 128 else call(q, k, v)
        kernels.decode_attention(q[:, :1].detach(), k.detach(), v.detach(), torch.ones(2).int(), T)


def attention(dtype):
    """In fp32, where dots are unrolled and take long to compile, one width and mask."""
    if dtype == torch.float32:
        attend(dtype, [64], ["documents"])
    else:
        attend(dtype, [64], ["causal", "full", "documents", "prefix"])
        attend(dtype, [128], ["documents"])


def attention_slow(dtype):
    """The other head widths; lengths that are not multiples of 16; many shares of a long cache."""
    attend(dtype, [16, 32, 48, 80, 96, 112, 128, 192, 256], ["causal", "documents"])
    attend(dtype, [128], ["full", "prefix"])
    attend(dtype, [64, 72, 128], ["causal", "full", "documents"], T=251)
    cache = torch.zeros(1, 2**15, 1, 256, dtype=dtype)
    kernels.decode_attention(cache[:, :1], cache, cache, torch.zeros(1).int(), 2**15)


QUICK = [small, cross_entropy, moe, nf4, attention]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


# ---------------------------------------------------------------------- compiling

def resources(kernel) -> dict:
    """Registers, bytes of local memory (spills) and tensor-core instructions of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True,
                               capture_output=True, text=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
            "mma": len(re.findall(r"mma[\w.]*\.m\d+n\d+k\d+", kernel.asm["ptx"]))}


def compile_instead_of_running(arch: int) -> dict:
    """From now on launches only compile; returns {key: (kernel name, compiled kernel)}, growing."""
    compiled, real_run = {}, JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = real_run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = self.__name__, kernel

    def check(name, x, shape, dtypes=None, contiguous=True):
        return x.contiguous() if contiguous else x

    JITFunction.run = run
    triton.runtime.driver.set_active(NoGPU(arch))
    replaced = {"check": check, "multiprocessors": lambda device: 132,
                "shared_memory": lambda device: SHARED_MEMORY[arch]}
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels."):
            for function in replaced.keys() & vars(module).keys():
                setattr(module, function, replaced[function])
    return compiled


def main(arch: int, dtypes: list[str]) -> None:
    cases = [*QUICK, attention_slow] if not dtypes else QUICK
    wanted = [dtype for dtype in DTYPES if not dtypes or str(dtype)[6:] in dtypes]
    compiled = compile_instead_of_running(arch)
    for case, dtype in product(cases, wanted):
        case(dtype)
        while compiled:
            name, kernel = compiled.popitem()[1]
            print(json.dumps({"case": case.__name__, "dtype": str(dtype)[6:], "kernel": name,
                              "arch": arch, "shared": kernel.metadata.shared,
                              "limit": SHARED_MEMORY[arch], "warps": kernel.metadata.num_warps,
                              **resources(kernel)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
