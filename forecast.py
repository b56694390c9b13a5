"""
What a training run will take, said before it starts: parameters, tokens, FLOPs, memory, time.

    FLOPs    6 per matmul parameter and token, and attention (ModelConfig.flops_per_token)
    memory   fp32 master weights, their gradients and the optimizer's state, the weights' copies in
             the model's precision, and what the forward pass keeps for the backward pass
    time     FLOPs / (the matmul speed measured here * the share of it that training reaches)

Memory and time are estimates: memory within a fifth of what is kept (a test counts it), time within
a factor of two, most of it in how far a small model stays below the speed of large matmuls.
"""
import os
import time
from collections.abc import Iterable

import torch
from torch import nn

from model import ModelConfig
from parallel import local

USUAL_MFU = 0.4                       # of the matmul peak, for a model that fills the machine


def activation_bytes(config: ModelConfig, rows: int, length: int, element: int,
                     checkpointing: bool = False, keeps_scores: bool = False,
                     ways: int = 1) -> int:
    """Bytes that the forward pass of rows * length tokens keeps for the backward pass.

    element: bytes of a number in the residual stream. keeps_scores: attention probabilities are
    kept, as on CPUs. Per token a block keeps the inputs and outputs of its two norms, queries,
    keys, values and the output of attention (D each, fewer for grouped keys), the 2 F inputs of
    SwiGLU and its F outputs; checkpointing keeps each block's input and makes the rest again, one
    block at a time. encoder_decoder: rows * length tokens in each of the two. ways: ranks that
    share heads, F and experts (--tensor_parallel).
    """
    D, heads, grouped = (config.d_model, config.n_heads * config.d_head,
                         config.n_kv_heads * config.d_head)
    attention = 2 * D + (2 * heads + 2 * grouped) / ways
    scores = config.n_heads * length / ways if keeps_scores else 0     # half of them if causal
    mlp = 2 * D + 3 * config.d_ff / ways
    if config.n_experts:                               # inputs are gathered for each expert
        visited = config.top_k + config.n_shared_experts
        mlp = 2 * D + visited * (3 * config.d_expert + D) / ways
    block = attention + mlp + (scores if config.architecture == "encoder" else scores / 2)
    kept = config.n_layers * block
    if config.architecture == "encoder_decoder":
        block += scores / 2 + attention + scores                   # across; the encoder sees all
        kept = config.n_layers * (block + attention + mlp + scores / 2)
    if checkpointing:
        kept = config.n_layers * D * (2 if config.architecture == "encoder_decoder" else 1) + block
    return int(rows * length * element * (kept + 3 * D))           # embedding, shift, last norm


def state_bytes(model: nn.Module, optimizer: str, dtype: torch.dtype, ways: int = 1) -> int:
    """Bytes of master weights, gradients and optimizer state in fp32 (AdamW: two numbers a weight,
    Muon one), of its own part only where they are sharded, and of the weights cast to dtype where
    that is another one: of `ways` ranks each its part, under FSDP of two blocks at a time."""
    n = sum(local(p).numel() for p in model.parameters())
    trained = sum(local(p).numel() for p in model.parameters() if p.requires_grad)
    cast = sum(p.numel() for p in model.parameters())              # of all ranks together
    if hasattr(model, "reshard"):
        in_blocks = sum(p.numel() for p in model.blocks.parameters())
        cast -= in_blocks * max(0.0, 1 - 2 / len(model.blocks))
    cast = 0 if dtype == torch.float32 else dtype.itemsize * cast / ways
    return int(4 * n + 4 * trained * (2 if optimizer == "muon" else 3) + cast)


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """FLOP/s of the best of three large square matmuls, the measure of MFU."""
    n = n or (8192 if device.type == "cuda" else 1024)
    a = torch.full((n, n), 0.01, device=device, dtype=dtype)       # no random numbers are taken
    best = float("inf")
    for _ in range(4):                                 # the first one warms up
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def memory_of(device: torch.device) -> int:
    """Bytes of memory there are in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def check(models: tuple[nn.Module, ...], optimizer: str, rows: int, length: int, tokens: float,
          peak: float, memory: int, options: Iterable[str] = (), ways: int = 1) -> str:
    """A sentence about the run, for the reader. The first of the models reads `tokens` tokens in
    the whole run (on this rank), `rows` rows of `length` at once; of the others only the memory
    counts. ways: ranks that do so together (--tensor_parallel). Raises ValueError, naming those of
    the script's options that help, when it cannot fit into `memory`."""
    model, config = models[0], models[0].config
    flops = config.flops_per_token(length) * tokens
    state = sum(state_bytes(m, optimizer, m.dtype, ways) for m in models)

    def needed(checkpointing: bool) -> int:
        return state + activation_bytes(config, rows, length, model.dtype.itemsize, checkpointing,
                                        model.device.type == "cpu", ways)

    total = needed(model.gradient_checkpointing)
    if total > memory:
        if state > memory:
            advice = "a smaller model (--d_model, --n_layers of pretraining)"
            advice += ", or --shard fsdp" * ("shard" in options)
        elif "gradient_checkpointing" in options and needed(True) < memory:
            advice = "--gradient_checkpointing"
        else:
            advice = f"a smaller --{'mini' * ('minibatch_size' in options)}batch_size"
            advice += " with more --grad_accum" * ("grad_accum" in options)
            advice += ", or a shorter --context_length" * ("context_length" in options)
        raise ValueError(f"this run needs about {total / 1e9:.1f} GB ({state / 1e9:.1f} for "
                         f"weights, gradients and optimizer, {(total - state) / 1e9:.1f} for "
                         f"activations), but there are {memory / 1e9:.1f} GB: give {advice}")
    return (f"{tokens / 1e6:.1f}M tokens to train on, {flops:.1e} FLOPs; about "
            f"{in_words(flops / ways / (peak * USUAL_MFU))} at {USUAL_MFU:.0%} of "
            f"{peak / 1e12:.2f} TFLOP/s, and {total / 1e9:.2f} of {memory / 1e9:.0f} GB for "
            "weights, optimizer and activations")


def announce(run, *models: nn.Module, rows: int = 0, length: float = 0, tokens: float = 0) -> None:
    """Say what a run will take, or refuse it (check); the MFU of the first model will be logged.

    By default batch_size rows of a whole context are read at once, and grad_accum times that in a
    step. rows, length, tokens: what else is read at once, and in the whole run.
    """
    cfg, config = run.cfg, models[0].config
    rows, length = rows or cfg.batch_size, round(length) or config.context_length
    tokens = tokens or cfg.steps * getattr(cfg, "grad_accum", 1) * rows * length
    run.peak, run.flops_per_token = (matmul_peak(run.device, run.dtype),
                                     config.flops_per_token(length))
    if config.architecture == "encoder_decoder":
        run.flops_per_token /= 2                           # which counts one token in each stack
    run.say(check(models, getattr(cfg, "optimizer", "adamw"), rows, length, tokens, run.peak,
                  memory_of(run.device), vars(cfg), run.ways))
