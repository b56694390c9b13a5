"""
Every operation of kernels/ timed beside the alternatives at hand.

On a GPU the Triton kernels are timed, on a CPU their torch paths; the first line printed says
which. All contenders of an operation are timed in turns in one process on the same random inputs;
a row has medians. The ceilings are measured first: copying a large tensor, multiplying two large
matrices. "Of the ceiling" is the time of the bytes that must move, or of the FLOPs that must be
made, at the ceiling, over the time measured.
Prints a table, writes it to --out if given, and prints one JSON line per row.

    python -m kernels.bench --ops norm,swiglu
    python -m kernels.bench --out results/kernels.md
"""
import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Case:
    """One operation at one size. Its work is the bytes that must move or, if `flops`, FLOPs."""
    op: str
    shape: str
    inputs: list[Tensor]                                   # those that get gradients come first
    contenders: dict[str, Callable]                        # the first is ours, "lifecycle"
    forward: float                                         # work of the forward pass
    backward: float = 0.0                                  # of the backward pass; 0: not measured
    flops: bool = False
    n_gradients: int = 1


class Ceilings(NamedTuple):
    """The highest speeds reached in this run."""
    bytes_per_s: float                                     # read and written
    flops_per_s: float


# ---------------------------------------------------------------------- cases
# Each function takes make(*shape, dtype=...), which draws a tensor that needs a gradient, and
# `big`: sizes for a GPU.

def optional(module: str, name: str) -> Callable | None:
    """module.name, or None where the package is not installed or has no such name."""
    package = module.split(".")[0]
    if not importlib.util.find_spec(package):
        return None
    return getattr(importlib.import_module(module), name, None)


def norm_cases(make, big: bool) -> list[Case]:
    N, D = (16384, 4096) if big else (2048, 512)
    x = make(N, D)
    delta = make(N, D)
    w = make(D, dtype=torch.float32)
    weight = w.detach().to(x.dtype)                        # the others want it in x's dtype

    def torch_norm(x, w):
        return F.rms_norm(x, (D,), weight, 1e-5)

    def torch_add_norm(x, delta, w):
        return x + delta, F.rms_norm(x + delta, (D,), weight, 1e-5)

    contenders = {"lifecycle": kernels.rmsnorm, "reference": kernels.rmsnorm_reference,
                  "torch": torch_norm}
    liger = optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    if liger:
        contenders["liger"] = lambda x, w: liger.apply(x, weight, 1e-5)
    add_contenders = {"lifecycle": kernels.add_rmsnorm, "torch": torch_add_norm}

    # forward: x read, y written; backward: dy and x read, dx written; delta, h: as many again
    size = x.element_size() * N * D
    shape = f"{N} x {D}"
    return [Case("rmsnorm", shape, [x, w], contenders, 2 * size, 3 * size),
            Case("add_rmsnorm", shape, [x, delta, w], add_contenders, 4 * size, 4 * size,
                 n_gradients=2)]


def swiglu_cases(make, big: bool) -> list[Case]:
    N, width = (16384, 8192) if big else (2048, 1024)
    x = make(N, 2 * width)
    contenders = {"lifecycle": kernels.swiglu, "reference": kernels.swiglu_reference}
    liger = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    if liger:
        contenders["liger"] = lambda x: liger.apply(*x.chunk(2, -1))

    # forward: gate and up read, y written; backward: dy, gate and up read, dgate and dup written
    size = x.element_size() * N * width
    return [Case("swiglu", f"{N} x {width}", [x], contenders, 3 * size, 5 * size)]


def rope_cases(make, big: bool) -> list[Case]:
    B, T, H, K, C = (4, 4096, 32, 8, 128) if big else (8, 256, 8, 4, 32)
    q = make(B, T, H, C)
    k = make(B, T, K, C)
    theta = 10_000.0 ** (-torch.arange(0, C, 2) / C)
    angles = torch.outer(torch.arange(T), theta).to(q.device)            # (T, C / 2)
    cos = angles.cos()
    sin = angles.sin()
    contenders = {"lifecycle": lambda q, k: kernels.rope(q, k, cos, sin),
                  "reference": lambda q, k: kernels.rope_reference(q, k, cos, sin)}

    size = 2 * q.element_size() * (q.numel() + k.numel())  # each read and written
    shape = f"{B} x {T} x ({H} + {K}) x {C}"
    return [Case("rope", shape, [q, k], contenders, size, size, n_gradients=2)]


def cross_entropy_cases(make, big: bool) -> list[Case]:
    N, D, V = (4096, 4096, 128256) if big else (2048, 256, 4096)
    h = make(N, D)
    w = make(V, D, dtype=torch.float32)
    targets = torch.randint(V, (N,), device=h.device)
    logits = make(N, V)
    contenders = {"lifecycle": lambda z: kernels.cross_entropy(z, targets),
                  "torch": lambda z: -F.cross_entropy(z.float(), targets, reduction="none")}

    size = logits.element_size() * N * V
    matmul = 2 * N * D * V                                 # FLOPs: one forward, two backward
    linear_contenders = linear_cross_entropy_contenders(w.detach().to(h.dtype), targets)
    return [Case("cross_entropy", f"{N} x {V}", [logits], contenders, size, 2 * size),
            Case("linear_cross_entropy", f"{N} x {D} x {V}", [h, w], linear_contenders,
                 matmul, 2 * matmul, flops=True, n_gradients=2)]


def linear_cross_entropy_contenders(half: Tensor, targets: Tensor) -> dict[str, Callable]:
    """half: the weight (V, D) in the dtype of the hidden states, as Liger wants it."""
    half.requires_grad_()

    def ours(h, w):
        return -kernels.linear_cross_entropy(h, w, targets).mean()

    def in_torch(h, w):
        logits = F.linear(h, w.to(h.dtype)).float()
        return F.cross_entropy(logits, targets)

    def torch_chunked(h, w):
        return F.linear_cross_entropy(h, w.to(h.dtype), targets, options=options())

    contenders = {"lifecycle": ours, "torch": in_torch}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options:                                            # older versions of torch have none
        contenders["torch_chunked"] = torch_chunked
    liger = optional("liger_kernel.ops.fused_linear_cross_entropy",
                     "LigerFusedLinearCrossEntropyFunction")
    if liger:
        contenders["liger"] = lambda h, w: liger.apply(h, half, targets)[0]
    return contenders


def attention_cases(make, big: bool) -> list[Case]:
    sizes = [(16, 256, 8, 8, 32), (4, 512, 8, 2, 64)]      # B, T, H, K, C
    if big:
        sizes = [(4, 4096, 32, 8, 128), (4, 4096, 32, 8, 64), (16, 1024, 12, 12, 64)]
    cases = []
    for B, T, H, K, C in sizes:
        q = make(B, T, H, C)
        k = make(B, T, K, C)
        v = make(B, T, K, C)
        cases += attention_cases_of(q, k, v)
    return cases


def attention_cases_of(q: Tensor, k: Tensor, v: Tensor) -> list[Case]:
    """Causal over whole rows, and over rows of five documents each."""
    B, T, H, C = q.shape
    K = k.shape[2]
    document = torch.arange(T, device=q.device).mul(5).div(T, rounding_mode="floor")
    documents = document.expand(B, T).contiguous()
    same_document = documents[:, :, None] == documents[:, None]
    allowed = same_document.tril()[:, None]                # (B, 1, T, T)

    def ours_on_documents(q, k, v):
        return kernels.attention(q, k, v, documents=documents)

    def torch_on_documents(q, k, v):
        return sdpa(q, k, v, allowed)

    causal = {"lifecycle": kernels.attention, "torch": sdpa}
    packed = {"lifecycle": ours_on_documents, "torch": torch_on_documents}
    if q.is_cuda:
        causal |= sdpa_backends()
        packed["flex_attention"] = flex(documents)

    flops = 2 * B * H * T * T * C                          # half of 4 T^2 C a head; backward 2.5 x
    shape = f"{B} x {T} x {H}/{K} x {C}"
    return [Case("attention", f"{shape} causal", [q, k, v], causal,
                 flops, 2.5 * flops, flops=True, n_gradients=3),
            Case("attention", f"{shape} 5 documents", [q, k, v], packed,
                 flops / 5, 2.5 * flops / 5, flops=True, n_gradients=3)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's attention on (B, T, heads, C), causal without a mask."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                       mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


def sdpa_backends() -> dict[str, Callable]:
    """Each backend of torch's attention by itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(backend, *inputs):
        with sdpa_kernel(backend):
            return sdpa(*inputs)

    return {"sdpa_cudnn": partial(only, SDPBackend.CUDNN_ATTENTION),
            "sdpa_flash": partial(only, SDPBackend.FLASH_ATTENTION),
            "sdpa_efficient": partial(only, SDPBackend.EFFICIENT_ATTENTION)}


def flex(documents: Tensor) -> Callable:
    """torch's flex_attention, causal inside documents (B, T), its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    B, T = documents.shape

    def allowed(b, h, i, j):
        return (i >= j) & (documents[b, i] == documents[b, j])

    block_mask = create_block_mask(allowed, B, None, T, T, documents.device)
    compiled = torch.compile(flex_attention)

    def call(q, k, v):
        y = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                     block_mask=block_mask, enable_gqa=True)
        return y.transpose(1, 2)

    return call


def decode_cases(make, big: bool) -> list[Case]:
    B, S, H, K, C = (16, 8192, 32, 8, 128) if big else (16, 256, 8, 8, 32)
    q = make(B, 1, H, C)
    # in fp32 on CPUs, as model.py's caches are
    cache_dtype = q.dtype if big else torch.float32
    # (B, S, K, C), in memory as (B, K, S, C)
    k_cache = make(B, K, S, C, dtype=cache_dtype).detach().transpose(1, 2)
    v_cache = make(B, K, S, C, dtype=cache_dtype).detach().transpose(1, 2)
    starts = torch.zeros(B, dtype=torch.long, device=q.device)

    def ours(q):
        return kernels.decode_attention(q, k_cache, v_cache, starts, S)

    def in_torch(q):
        q = q.transpose(1, 2).to(cache_dtype)
        return F.scaled_dot_product_attention(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2),
                                              enable_gqa=True)

    size = 2 * k_cache.element_size() * B * S * K * C            # both caches are read
    return [Case("decode_attention", f"{B} x {S} x {H}/{K} x {C}", [q],
                 {"lifecycle": ours, "torch": in_torch}, size)]


def nf4_cases(make, big: bool) -> list[Case]:
    D = 8192 if big else 1024
    w = make(D, D, dtype=torch.float32).detach()
    q = kernels.quantize_nf4(w)
    half = w.to(make(1).dtype)                             # the weight as it was, in 16 bits
    contenders = {"lifecycle": lambda x: kernels.nf4_linear(x, q),
                  "dense": lambda x: F.linear(x, half)}
    if big and importlib.util.find_spec("bitsandbytes"):   # its kernels run on GPUs
        contenders["bitsandbytes"] = bitsandbytes_linear(half)

    few = 1
    many = 4096 if big else 512
    weight_bytes = 0.516 * D * D                           # one row: reading the weight is all
    flops = 2 * many * D * D
    return [Case("nf4_linear", f"{few} x {D} x {D}", [make(few, D)], contenders, weight_bytes),
            Case("nf4_linear", f"{many} x {D} x {D}", [make(many, D)], contenders, flops,
                 flops=True)]


def bitsandbytes_linear(weight: Tensor) -> Callable:
    """x -> x w^T with bitsandbytes' NF4 form of the weight, doubly quantized."""
    import bitsandbytes
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4",
                                                          compress_statistics=True)
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)


def moe_cases(make, big: bool) -> list[Case]:
    N, D, width, E, k = (16384, 2048, 1024, 64, 8) if big else (2048, 128, 176, 8, 2)
    x = make(N, D)
    w13 = make(E, 2 * width, D, dtype=torch.float32)
    w2 = make(E, D, width, dtype=torch.float32)

    # k different experts for each token; the pairs sorted by expert
    experts = torch.rand(N, E, device=x.device).topk(k).indices.flatten()
    tokens = experts.argsort(stable=True) // k             # (N k,)
    gates = torch.rand(N * k, device=x.device)
    per_expert = torch.bincount(experts, minlength=E)
    offsets = F.pad(per_expert.cumsum(0), (1, 0))          # (E + 1,)

    def ours(x, w13, w2):
        return kernels.moe_experts(x, w13, w2, tokens, gates, offsets)

    contenders = {"lifecycle": ours, "loop": partial(expert_loop, tokens, gates, offsets)}
    if hasattr(F, "grouped_mm"):                           # torch >= 2.10
        contenders["grouped_mm"] = partial(grouped_experts, tokens, gates, offsets)
    flops = 2 * N * k * 3 * D * width                      # three matrices of D x width an expert
    return [Case("moe_experts", f"{N} x {D} x {width}, {k} of {E}", [x, w13, w2], contenders,
                 flops, 2 * flops, flops=True, n_gradients=3)]


def grouped_experts(tokens: Tensor, gates: Tensor, offsets: Tensor, x: Tensor, w13: Tensor,
                    w2: Tensor) -> Tensor:
    """moe_experts by torch's grouped_mm, all experts in one call."""
    ends = offsets[1:].int()
    gate_up = F.grouped_mm(x[tokens], w13.to(x.dtype).transpose(1, 2), offs=ends)
    h = kernels.swiglu(gate_up)
    out = F.grouped_mm(h, w2.to(x.dtype).transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, tokens, out * gates[:, None].to(x.dtype))


def expert_loop(tokens: Tensor, gates: Tensor, offsets: Tensor, x: Tensor, w13: Tensor,
                w2: Tensor) -> Tensor:
    """moe_experts as most write it: one expert after the other."""
    y = torch.zeros_like(x)
    borders = offsets.tolist()
    for e in range(len(w2)):
        pairs = slice(borders[e], borders[e + 1])
        h = kernels.swiglu(F.linear(x[tokens[pairs]], w13[e].to(x.dtype)))
        out = F.linear(h, w2[e].to(x.dtype))
        y = y.index_add(0, tokens[pairs], out * gates[pairs, None].to(x.dtype))
    return y


CASES = {"norm": norm_cases, "swiglu": swiglu_cases, "rope": rope_cases,
         "cross_entropy": cross_entropy_cases, "attention": attention_cases,
         "decode": decode_cases, "nf4": nf4_cases, "moe": moe_cases}


# ---------------------------------------------------------------------- measuring

def timed(call: Callable, device: torch.device) -> float:
    """Seconds of one call, its work on the GPU included."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # 256 MB push the inputs of the call before out of the L2 cache
        torch.empty(2**26, device=device).zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3               # of milliseconds
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turns(calls: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, after three rounds to warm up. Each round calls all of them,
    because a machine's pace changes over a run."""
    times = {name: [] for name in calls}
    for round_number in range(-3, repeats):
        for name, call in calls.items():
            seconds = timed(call, device)
            if round_number >= 0:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A large copy in fp32, and a large matmul in dtype on random numbers (zeros run faster)."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**24, device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)

    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    seconds = in_turns(calls, 10, device)
    moved = 2 * 4 * source.numel()                         # 4 bytes read, 4 written
    return Ceilings(moved / seconds["copy"], 2 * n**3 / seconds["matmul"])


def measure(case: Case, options: argparse.Namespace, device: torch.device,
            ceilings: Ceilings) -> Iterator[dict]:
    """A row for the forward pass and, where there is one, for forward and backward together."""
    contenders = dict(case.contenders)
    if options.compile and "reference" in contenders:
        contenders["compiled"] = torch.compile(contenders["reference"])
    upstream = [torch.randn_like(y) for y in outputs(contenders["lifecycle"], case)]

    def forward(call: Callable) -> None:
        call(*case.inputs)

    # backward is never timed alone, because some make their gradients in the forward pass
    def both(call: Callable) -> None:
        torch.autograd.grad(outputs(call, case), case.inputs[:case.n_gradients], upstream)

    with torch.no_grad():
        calls = {name: partial(forward, call) for name, call in contenders.items()}
        seconds = in_turns(calls, options.repeats, device)
    yield row(case, "forward", case.forward, seconds, options.dtype, device, ceilings)

    if case.backward:
        calls = {name: partial(both, call) for name, call in contenders.items()}
        seconds = in_turns(calls, options.repeats, device)
        work = case.forward + case.backward
        yield row(case, "both", work, seconds, options.dtype, device, ceilings)


def outputs(call: Callable, case: Case) -> tuple[Tensor, ...]:
    y = call(*case.inputs)
    return y if isinstance(y, tuple) else (y,)


def row(case: Case, direction: str, work: float, seconds: dict[str, float], dtype: str,
        device: torch.device, ceilings: Ceilings) -> dict:
    """seconds: of each contender, for `work` bytes or FLOPs."""
    ours = seconds["lifecycle"]
    rate = work / ours
    ceiling = ceilings.flops_per_s if case.flops else ceilings.bytes_per_s
    ratios = {name: other / ours for name, other in seconds.items() if name != "lifecycle"}
    return {"bench": "kernels", "op": case.op, "pass": direction, "shape": case.shape,
            "dtype": dtype, "device": device.type, "ms": 1e3 * ours, "rate": rate / 1e12,
            "unit": "TFLOP/s" if case.flops else "TB/s", "of_ceiling": rate / ceiling,
            "times_as_fast_as": ratios}


# ---------------------------------------------------------------------- the table

TABLE_HEAD = ["| operation | pass | shape | ms | rate | of the ceiling | times as fast as |",
              "|---|---|---|---|---|---|---|"]


def table_line(row: dict) -> str:
    ratios = row["times_as_fast_as"].items()
    others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios)
    return (f"| {row['op']} | {row['pass']} | {row['shape']} | {row['ms']:.3g} | "
            f"{row['rate']:.3g} {row['unit']} | {row['of_ceiling']:.0%} | {others} |")


def conditions(options: argparse.Namespace, device: torch.device, ceilings: Ceilings) -> str:
    """The sentence over the table: everything that the figures depend on."""
    on_gpu = device.type == "cuda"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if on_gpu else cpu
    fused = kernels.backend(device) == "triton"
    path = "Triton kernels" if fused else "torch paths of the kernels"
    copy = ceilings.bytes_per_s / 1e12
    matmul = ceilings.flops_per_s / 1e12
    return (f"{path} on {machine}, {options.dtype}, torch {torch.__version__}, {date.today()}; "
            f"ceilings measured in this run: copy {copy:.3g} TB/s, matmul {matmul:.3g} TFLOP/s; "
            f"median of {options.repeats} calls, in turns.")


def pick_device(name: str) -> torch.device:
    """auto: the GPU if there is one, else the CPU. Raises ValueError for a device that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)                      # Triton launches its kernels there
    return device


def main(options: argparse.Namespace) -> list[dict]:
    """Measure the operations asked for; print the table and the JSON lines, and return the rows.
    Raises ValueError for an unknown operation or device."""
    device = pick_device(options.device)
    dtype = DTYPES[options.dtype]
    names = list(CASES) if options.ops == "all" else options.ops.split(",")
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise ValueError(f"--ops {','.join(unknown)}: give {', '.join(CASES)}")
    torch.manual_seed(0)
    kernels.keep_memory()

    def make(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    ceilings = measure_ceilings(device, dtype)
    head = conditions(options, device, ceilings)
    print(head, flush=True)
    rows = []
    for op in CASES:
        if op not in names:
            continue
        for case in CASES[op](make, device.type == "cuda"):
            for measured in measure(case, options, device, ceilings):
                rows.append(measured)
                print(table_line(measured), flush=True)

    if options.out:
        lines = ["# Kernels\n", head + "\n", *TABLE_HEAD]
        lines += [table_line(measured) for measured in rows]
        Path(options.out).write_text("\n".join(lines) + "\n")
    for measured in rows:
        print(json.dumps(measured))
    return rows


# ---------------------------------------------------------------------- the command line

def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default, help: str, **rest) -> None:
        parser.add_argument(name, default=default, help=f"{help} (default: %(default)s)", **rest)

    option("--ops", "all", f"comma-separated: {', '.join(CASES)}")
    option("--dtype", "bfloat16", "float16: on a GPU", choices=DTYPES)
    option("--device", "auto", "auto | cpu | cuda")
    option("--compile", False, "also time the references under torch.compile",
           type=true_or_false, nargs="?", const=True)
    option("--repeats", 20, "timed calls of each contender", type=int)
    option("--out", "", "also write the table to this Markdown file")
    return parser.parse_args(arguments)


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f'"{text}"; give true or false')
    return text.lower() in ("true", "1")


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"kernels.bench: {error}")
