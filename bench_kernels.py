"""
Every operation of kernels/ beside the alternatives at hand: `python bench.py kernels`.

On a GPU it times the Triton kernels, on a CPU their torch paths (and says so). All contenders of an
operation are timed in turns in one process on the same random inputs, medians. The ceilings are
measured first: copying a large tensor, multiplying two large matrices. A row says how far the best
possible time is away: the bytes that must move, or the FLOPs that must be made, over the ceiling.
Prints a table, writes it to --out if given, and prints one JSON line per row.

    python bench.py kernels --ops rmsnorm,swiglu
    python bench.py kernels --out results/kernels.md
"""
import functools
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import training


@dataclass
class Config:
    ops: str = "all"                  # norm,swiglu,rope,cross_entropy,attention,decode,nf4,moe
    dtype: str = "bfloat16"           # bfloat16 | float16 (GPU) | float32
    device: str = "auto"              # auto | cpu | cuda
    compile: bool = False             # also time the references under torch.compile
    repeats: int = 20                 # timed calls of each contender
    out: str = ""                     # also write the table to this Markdown file


@dataclass
class Case:
    """One operation at one size. `floor`: bytes moved or, if flops, FLOPs, forward and backward."""
    op: str
    shape: str
    inputs: list[Tensor]                                   # those that get gradients come first
    contenders: dict[str, Callable]                        # the first is ours
    forward: float
    backward: float = 0.0                                  # 0: not measured
    flops: bool = False
    n_gradients: int = 1


# ---------------------------------------------------------------------- cases

def optional(module: str, name: str) -> Callable | None:
    """module.name where the package is installed."""
    if not importlib.util.find_spec(module.split(".")[0]):
        return None
    return getattr(importlib.import_module(module), name, None)


def present(**contenders: Callable | None) -> dict[str, Callable]:
    return {name: call for name, call in contenders.items() if call is not None}


def norm_cases(make, big: bool) -> list[Case]:
    N, D = (16384, 4096) if big else (2048, 512)
    x, delta, w = make(N, D), make(N, D), make(D, dtype=torch.float32)
    liger = optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    size = x.element_size() * N * D
    weight = w.detach().to(x.dtype)
    return [
        Case("rmsnorm", f"{N} x {D}", [x, w], present(
            lifecycle=kernels.rmsnorm, reference=kernels.rmsnorm_reference,
            torch=lambda x, w: F.rms_norm(x, (D,), weight, 1e-5),
            liger=liger and (lambda x, w: liger.apply(x, weight, 1e-5))), 2 * size, 3 * size),
        Case("add_rmsnorm", f"{N} x {D}", [x, delta, w], present(
            lifecycle=kernels.add_rmsnorm,
            torch=lambda x, d, w: (x + d, F.rms_norm(x + d, (D,), weight, 1e-5))),
            4 * size, 4 * size, n_gradients=2)]


def swiglu_cases(make, big: bool) -> list[Case]:
    N, width = (16384, 8192) if big else (2048, 1024)
    x = make(N, 2 * width)
    liger = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    size = x.element_size() * N * width
    return [Case("swiglu", f"{N} x {width}", [x], present(
        lifecycle=kernels.swiglu, reference=kernels.swiglu_reference,
        liger=liger and (lambda x: liger.apply(*x.chunk(2, -1)))), 3 * size, 5 * size)]


def rope_cases(make, big: bool) -> list[Case]:
    B, T, H, K, C = (4, 4096, 32, 8, 128) if big else (8, 256, 8, 4, 32)
    q, k = make(B, T, H, C), make(B, T, K, C)
    angles = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(0, C, 2) / C)).to(q.device)
    cos, sin = angles.cos(), angles.sin()
    size = 2 * q.element_size() * (q.numel() + k.numel())
    return [Case("rope", f"{B} x {T} x ({H} + {K}) x {C}", [q, k], present(
        lifecycle=lambda q, k: kernels.rope(q, k, cos, sin),
        reference=lambda q, k: kernels.rope_reference(q, k, cos, sin)), size, size,
        n_gradients=2)]


def cross_entropy_cases(make, big: bool) -> list[Case]:
    N, D, V = (4096, 4096, 128256) if big else (2048, 256, 4096)
    h, w = make(N, D), make(V, D, dtype=torch.float32)
    targets = torch.randint(V, (N,), device=h.device)
    logits = make(N, V)
    half = w.detach().to(h.dtype).requires_grad_()
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    liger = optional("liger_kernel.ops.fused_linear_cross_entropy",
                     "LigerFusedLinearCrossEntropyFunction")
    size = logits.element_size() * N * V
    return [
        Case("cross_entropy", f"{N} x {V}", [logits], present(
            lifecycle=lambda z: kernels.cross_entropy(z, targets),
            torch=lambda z: -F.cross_entropy(z.float(), targets, reduction="none")),
            size, 2 * size),
        Case("linear_cross_entropy", f"{N} x {D} x {V}", [h, w], present(
            lifecycle=lambda h, w: -kernels.linear_cross_entropy(h, w, targets).mean(),
            torch=lambda h, w: F.cross_entropy(F.linear(h, w.to(h.dtype)).float(), targets),
            torch_chunked=options and (lambda h, w: F.linear_cross_entropy(
                h, w.to(h.dtype), targets, options=options())),
            liger=liger and (lambda h, w: liger.apply(h, half, targets)[0])),
            2 * N * D * V, 4 * N * D * V, flops=True, n_gradients=2)]


def attention_cases(make, big: bool) -> list[Case]:
    cases = []
    for B, T, H, K, C in ([(4, 4096, 32, 8, 128), (4, 4096, 32, 8, 64), (16, 1024, 12, 12, 64)]
                          if big else [(16, 256, 8, 8, 32), (4, 512, 8, 2, 64)]):
        q, k, v = make(B, T, H, C), make(B, T, K, C), make(B, T, K, C)
        documents = torch.arange(T, device=q.device).mul(5).div(T, rounding_mode="floor")
        documents = documents.expand(B, T).contiguous()
        flops = 2 * B * H * T * T * C                      # causal: half of 4 T^2 C a head
        seen = (documents[:, :, None] == documents[:, None]).tril()[:, None]

        def sdpa(q, k, v, mask=None):
            y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask,
                                               is_causal=mask is None, enable_gqa=True)
            return y.transpose(1, 2)
        shape = f"{B} x {T} x {H}/{K} x {C}"
        cases.append(Case("attention", f"{shape} causal", [q, k, v], present(
            lifecycle=kernels.attention, torch=sdpa, **backends(sdpa, q.device)),
            flops, 2.5 * flops, flops=True, n_gradients=3))
        cases.append(Case("attention", f"{shape} 5 documents", [q, k, v], present(
            lifecycle=lambda q, k, v, d=documents: kernels.attention(q, k, v, documents=d),
            torch=lambda q, k, v, m=seen: sdpa(q, k, v, m),
            flex_attention=flex(documents) if q.is_cuda else None),
            flops / 5, 2.5 * flops / 5, flops=True, n_gradients=3))
    return cases


def backends(sdpa: Callable, device: torch.device) -> dict[str, Callable]:
    """Each backend of scaled_dot_product_attention by itself, on a GPU."""
    if device.type != "cuda":
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(backend):
        def call(*inputs):
            with sdpa_kernel(backend):
                return sdpa(*inputs)
        return call
    return {f"sdpa_{name}": only(getattr(SDPBackend, name.upper() + "_ATTENTION"))
            for name in ("cudnn", "flash", "efficient")}


def flex(documents: Tensor) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    B, T = documents.shape
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]),
                             B, None, T, T, documents.device)
    compiled = torch.compile(flex_attention)

    def call(q, k, v):
        y = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)
    return call


def decode_cases(make, big: bool) -> list[Case]:
    B, S, H, K, C = (16, 8192, 32, 8, 128) if big else (16, 256, 8, 8, 32)
    q = make(B, 1, H, C)
    caches = [make(B, K, S, C).detach().transpose(1, 2) for _ in range(2)]
    starts = torch.zeros(B, dtype=torch.long, device=q.device)
    size = 2 * q.element_size() * B * S * K * C
    return [Case("decode_attention", f"{B} x {S} x {H}/{K} x {C}", [q], present(
        lifecycle=lambda q: kernels.decode_attention(q, *caches, starts, S),
        torch=lambda q: F.scaled_dot_product_attention(
            q.transpose(1, 2), *(x.transpose(1, 2) for x in caches), enable_gqa=True)), size)]


def nf4_cases(make, big: bool) -> list[Case]:
    D = 8192 if big else 1024
    w = make(D, D, dtype=torch.float32).detach()
    q, half = kernels.quantize_nf4(w), w.to(make(1).dtype)
    bnb = optional("bitsandbytes.functional", "quantize_4bit") if big else None
    theirs = None
    if bnb:
        import bitsandbytes
        packed, state = bnb(half, quant_type="nf4", compress_statistics=True)

        def theirs(x):
            return bitsandbytes.matmul_4bit(x, packed.t(), state)
    cases = []
    for rows in (1, 4096 if big else 512):
        few = rows == 1
        cases.append(Case("nf4_linear", f"{rows} x {D} x {D}", [make(rows, D)], present(
            lifecycle=lambda x: kernels.nf4_linear(x, q),
            dense=lambda x: F.linear(x, half), bitsandbytes=theirs),
            0.516 * D * D if few else 2 * rows * D * D, flops=not few))
    return cases


def moe_cases(make, big: bool) -> list[Case]:
    N, D, width, E, k = (16384, 2048, 1024, 64, 8) if big else (2048, 128, 176, 8, 2)
    x, w13 = make(N, D), make(E, 2 * width, D, dtype=torch.float32)
    w2 = make(E, D, width, dtype=torch.float32)
    experts = torch.rand(N, E, device=x.device).topk(k).indices.flatten()
    order = experts.argsort(stable=True)
    tokens, gates = order // k, torch.rand(N * k, device=x.device)
    offsets = F.pad(torch.bincount(experts, minlength=E).cumsum(0), (1, 0))
    ends = offsets[1:].int()

    def grouped(x, w13, w2):
        weights = (w.to(x.dtype).transpose(1, 2) for w in (w13, w2))
        h = kernels.swiglu(F.grouped_mm(x[tokens], next(weights), offs=ends))
        h = F.grouped_mm(h, next(weights), offs=ends) * gates[:, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, h)

    def loop(x, w13, w2):
        y = torch.zeros_like(x)
        for e, (a, b) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
            h = F.linear(kernels.swiglu(F.linear(x[tokens[a:b]], w13[e].to(x.dtype))),
                         w2[e].to(x.dtype))
            y = y.index_add(0, tokens[a:b], h * gates[a:b, None].to(x.dtype))
        return y
    flops = 2 * N * k * 3 * D * width
    return [Case("moe_experts", f"{N} x {D} x {width}, {k} of {E}", [x, w13, w2], present(
        lifecycle=lambda x, w13, w2: kernels.moe_experts(x, w13, w2, tokens, gates, offsets),
        loop=loop, grouped_mm=grouped if hasattr(F, "grouped_mm") else None),
        flops, 2 * flops, flops=True, n_gradients=3)]


CASES = {"norm": norm_cases, "swiglu": swiglu_cases, "rope": rope_cases,
         "cross_entropy": cross_entropy_cases, "attention": attention_cases,
         "decode": decode_cases, "nf4": nf4_cases, "moe": moe_cases}


# ---------------------------------------------------------------------- measuring

def timed(call: Callable, device: torch.device) -> float:
    """Seconds of one call, its work on the GPU included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(2**26, device=device).zero_()          # out of the L2 cache with the last one
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, after warming up; one call of each in every round."""
    times = {name: [] for name in calls}
    for i in range(-3, repeats):
        for name, call in calls.items():
            seconds = timed(call, device)
            if i >= 0:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), FLOPs a second of a large matmul."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**24, device=device)
    target, n = torch.empty_like(source), 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 10, device)
    return 8 * source.numel() / seconds["copy"], 2 * n**3 / seconds["matmul"]


def measure(case: Case, cfg: Config, device: torch.device, ceiling: tuple[float, float]):
    """A row for the forward pass and, where there is one, for forward and backward together."""
    contenders = dict(case.contenders)
    if cfg.compile and "reference" in contenders:
        contenders["compiled"] = torch.compile(contenders["reference"])
    def outputs(call: Callable) -> tuple:
        y = call(*case.inputs)
        return y if isinstance(y, tuple) else (y,)
    upstream = [torch.randn_like(y) for y in outputs(contenders["lifecycle"])]

    def both(call: Callable) -> None:                      # some make their gradients forward
        torch.autograd.grad(outputs(call), case.inputs[:case.n_gradients], upstream)
    passes = [("forward", case.forward, lambda call: call(*case.inputs))]
    if case.backward:
        passes.append(("both", case.forward + case.backward, both))
    for direction, floor, run in passes:
        with torch.set_grad_enabled(direction == "both"):
            seconds = in_turns({name: functools.partial(run, call)
                                for name, call in contenders.items()}, cfg.repeats, device)
        ours = seconds.pop("lifecycle")
        yield {"bench": "kernels", "op": case.op, "pass": direction, "shape": case.shape,
               "dtype": cfg.dtype, "device": device.type, "ms": 1e3 * ours,
               "rate": floor / ours / 1e12, "unit": "TFLOP/s" if case.flops else "TB/s",
               "of_ceiling": floor / ours / ceiling[case.flops],
               "times_as_fast_as": {name: other / ours for name, other in seconds.items()}}


def table(rows: list[dict]) -> list[str]:
    lines = ["| operation | pass | shape | ms | rate | of the ceiling | times as fast as |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["times_as_fast_as"].items())
        lines.append(f"| {row['op']} | {row['pass']} | {row['shape']} | {row['ms']:.3g} | "
                     f"{row['rate']:.3g} {row['unit']} | {row['of_ceiling']:.0%} | {others} |")
    return lines


def main(cfg: Config) -> list[dict]:
    device, dtype = training.pick_device(cfg.device), training.DTYPES[cfg.dtype]
    wanted = set(CASES) if cfg.ops == "all" else set(cfg.ops.split(","))
    if unknown := wanted - set(CASES):
        raise ValueError(f"--ops {','.join(sorted(unknown))}: give {', '.join(CASES)}")
    torch.manual_seed(0)
    kernels.keep_memory()

    def make(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()
    ceiling = ceilings(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else \
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    path = "Triton kernels" if kernels.backend(device) == "triton" else "torch paths of the kernels"
    head = (f"{path} on {name}, {cfg.dtype}, torch {torch.__version__}, {date.today()}; ceilings "
            f"measured in this run: copy {ceiling[0] / 1e12:.3g} TB/s, matmul "
            f"{ceiling[1] / 1e12:.3g} TFLOP/s; median of {cfg.repeats} calls, in turns.")
    print(head, flush=True)
    rows = []
    for op in (op for op in CASES if op in wanted):
        for case in CASES[op](make, device.type == "cuda"):
            for row in measure(case, cfg, device, ceiling):
                rows.append(row)
                print(table([row])[-1], flush=True)
    if cfg.out:
        Path(cfg.out).write_text("\n".join(["# Kernels\n", head + "\n", *table(rows)]) + "\n")
    for row in rows:
        print(json.dumps(row))
    return rows
