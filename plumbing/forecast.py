"""
The tokens, FLOPs, memory and time that a training run will take, computed before it starts.

    FLOPs    6 per matmul parameter and token, and attention (ModelConfig.flops_per_token)
    memory   fp32 master weights, their gradients and the optimizer's state, the weights' copies in
             the model's precision, and the activations that the forward pass keeps for the
             backward pass
    time     FLOPs / (the matmul speed measured here * the share of it that training reaches)

Memory and time are estimates: activations within a fifth of the bytes that autograd keeps (a test
counts them), time within a factor of two, because a small model stays far below the speed of large
matmuls. Nothing here changes the run: functions return numbers and a sentence.

    work = workload(cfg, model.config)
    peak = matmul_peak(device, dtype)
    print(describe((model,), "adamw", work, peak, memory_of(device), flat(cfg)))
"""
import os
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from model import ModelConfig
from parallel import local

USUAL_MFU = 0.4                       # of the matmul peak, for a model that fills the machine


class Workload(NamedTuple):
    rows: int                         # sequences in one forward pass, on this rank
    length: int                       # tokens in each of them
    tokens: float                     # tokens in the whole run, on this rank


def workload(cfg, config: ModelConfig, rows: int = 0, length: float = 0,
             tokens: float = 0) -> Workload:
    """The Workload of a stage: batch_size rows of a whole context, grad_accum times in each step.

    rows, length, tokens: given by a stage that reads otherwise, pairs or answers for example.
    """
    rows = rows or cfg.batch_size
    length = round(length) or config.context_length        # round: a mean length has a fraction
    if not tokens:
        micro_batches = cfg.steps * getattr(cfg, "grad_accum", 1)
        tokens = micro_batches * rows * length
    return Workload(rows, length, tokens)


def describe(models: tuple[nn.Module, ...], optimizer: str, work: Workload, peak: float,
             memory: int, options: Iterable[str] = (), tensor_parallel: int = 1) -> str:
    """A sentence about the run, for the reader.

    models: the first one is trained on `work`; the others, frozen ones for example, only take
    memory. peak: FLOP/s of a rank (matmul_peak). memory: bytes of a rank (memory_of). options:
    names of the script's options. tensor_parallel: ranks that divide each matrix. Raises
    ValueError, naming those of the options that help, when the run cannot fit into `memory`.
    """
    model = models[0]
    config = model.config

    def activations(checkpointing: bool) -> int:
        on_cpu = model.device.type == "cpu"
        return activation_bytes(config, work.rows, work.length, model.dtype.itemsize,
                                checkpointing, on_cpu, tensor_parallel, model.architecture)

    state = 0
    for each in models:
        state += state_bytes(each, optimizer, model.dtype, tensor_parallel)
    kept = activations(model.gradient_checkpointing)
    total = state + kept
    if total > memory:
        with_checkpointing = state + activations(checkpointing=True)
        raise ValueError(f"this run needs about {total / 1e9:.1f} GB ({state / 1e9:.1f} for "
                         f"weights, gradients and optimizer, {kept / 1e9:.1f} for activations), "
                         f"but there are {memory / 1e9:.1f} GB: give "
                         f"{advice(state, with_checkpointing, memory, options)}")
    flops = model.flops_per_token(work.length) * work.tokens
    # The ranks of a tensor-parallel group share the FLOPs of the same tokens.
    seconds = flops / tensor_parallel / (peak * USUAL_MFU)
    return (f"{work.tokens / 1e6:.1f}M tokens to train on, {flops:.1e} FLOPs; about "
            f"{in_words(seconds)} at {USUAL_MFU:.0%} of {peak / 1e12:.3g} TFLOP/s, and "
            f"{total / 1e9:.2f} of {memory / 1e9:.0f} GB for weights, optimizer and activations")


def refuse_too_large(config: ModelConfig, device: torch.device, ranks: int) -> None:
    """Raises ValueError, before it is made, for a model that cannot be trained on `device` even
    without activations. ranks: that share its weights."""
    n = config.block_parameters() + config.vocab_size * config.d_model
    # weights, gradients and two moments in fp32; Python's objects of a block take 50 kB
    needed = 16 * n / ranks + 50_000 * config.n_layers
    memory = memory_of(device)
    if needed > memory:
        raise ValueError(f"a model of {config.n_layers:,} layers of width {config.d_model:,} has "
                         f"at least {n / 1e9:,.1f} billion parameters and needs "
                         f"{needed / 1e9:,.0f} GB to be trained, but there are "
                         f"{memory / 1e9:.0f} GB: give smaller --n_layers, --d_model, --d_ff or "
                         "--vocab_size")


def advice(state: int, with_checkpointing: int, memory: int, options: Iterable[str]) -> str:
    """The options that make a run fit: of those that the script has, the ones that cost least.

    state: bytes of weights, gradients and optimizer. with_checkpointing: all bytes of the run if
    it makes activations again.
    """
    if state > memory:                         # even without a single row: batches are no remedy
        words = "a smaller model (--d_model, --n_layers of pretraining)"
        if "shard" in options:
            words += ", or --shard fsdp"
        return words
    # Before a smaller batch, because it leaves the result as it is and costs a third of the speed.
    if "gradient_checkpointing" in options and with_checkpointing < memory:
        return "--gradient_checkpointing"
    words = "a smaller --batch_size"
    if "minibatch_size" in options:            # PPO's batch_size is that of a rollout
        words = "a smaller --minibatch_size"
    if "grad_accum" in options:
        words += " with more --grad_accum"     # so that a step has as many tokens as before
    if "context_length" in options:
        words += ", or a shorter --context_length"
    return words


# ---------------------------------------------------------------------- memory

def activation_bytes(config: ModelConfig, rows: int, length: int, element: int,
                     checkpointing: bool = False, on_cpu: bool = False,
                     tensor_parallel: int = 1, architecture: str = "decoder") -> int:
    """Bytes that the forward pass of rows * length tokens keeps for the backward pass.

    element: bytes of a number in the residual stream. on_cpu: without the fused kernels, so that
    silu of the gate is kept, and in half precision attention's probabilities. checkpointing keeps
    the input of each block and makes the rest again, one block at a time. encoder_decoder:
    rows * length tokens in each of the two. tensor_parallel: ranks that share heads, F, experts.
    """
    D = config.d_model
    scores = length if on_cpu and element == 2 else 0
    blocks = kept_by_block(config, scores, on_cpu, tensor_parallel, architecture)
    if checkpointing:
        n_inputs = len(blocks) * config.n_layers           # one per block, of both stacks if two
        kept = n_inputs * D + max(blocks)                  # the largest is made again in full
    else:
        kept = config.n_layers * sum(blocks)
    kept += 3 * D                                          # embedding, token shift, last norm
    return int(rows * length * element * kept)


def kept_by_block(config: ModelConfig, kept_scores: int, on_cpu: bool, tensor_parallel: int,
                  architecture: str) -> list[float]:
    """Numbers that a block keeps for the backward pass, per token: [block], or of an
    encoder-decoder [encoder's block, decoder's block]. kept_scores: of each query head."""
    D = config.d_model
    queries = config.n_heads * config.d_head
    keys = config.n_kv_heads * config.d_head               # fewer than queries if grouped
    # The norm's input and output; queries and the output of attention; keys and values.
    attention = 2 * D + (2 * queries + 2 * keys) / tensor_parallel
    # The norm's input and output; the 2 F inputs of SwiGLU and its F outputs; silu of the gate.
    widths = 4 if on_cpu else 3
    mlp = 2 * D + widths * config.d_ff / tensor_parallel
    if config.n_experts:
        visited = config.top_k + config.n_shared_experts
        per_expert = 3 * config.d_expert + D               # D: inputs are gathered for each expert
        mlp = 2 * D + visited * per_expert / tensor_parallel
    scores = config.n_heads * kept_scores / tensor_parallel    # with each token of the sequence
    sees_all = attention + mlp + scores
    looks_back = attention + mlp + scores / 2              # causal: half of the scores, on average
    if architecture == "encoder":
        return [sees_all]
    if architecture == "encoder_decoder":
        cross_attention = attention + scores               # every token sees all of the source
        return [sees_all, looks_back + cross_attention]
    return [looks_back]


def state_bytes(model: nn.Module, optimizer: str, dtype: torch.dtype,
                tensor_parallel: int = 1) -> int:
    """Bytes of master weights, gradients and optimizer state in fp32, and of the weights cast to
    `dtype` where that is another one.

    AdamW keeps two numbers a weight, Muon one. Where weights are sharded, a rank counts its own
    part, and of the cast weights its part of two blocks at a time.
    """
    parameters = list(model.parameters())
    n = sum(local(p).numel() for p in parameters)          # local: the part of this rank
    n_trained = sum(local(p).numel() for p in parameters if p.requires_grad)
    gradients = 4 * n_trained
    numbers_a_weight = 1 if optimizer == "muon" else 2
    state = numbers_a_weight * 4 * n_trained
    cast = 0
    if dtype != torch.float32:
        n_cast = sum(p.numel() for p in parameters)        # of all ranks, because FSDP gathers them
        if hasattr(model, "reshard"):                      # FSDP: one block at work, the next ahead
            n_in_blocks = sum(p.numel() for p in model.blocks.parameters())
            share_let_go = max(0.0, 1 - 2 / len(model.blocks))
            n_cast -= n_in_blocks * share_let_go
        cast = dtype.itemsize * n_cast / tensor_parallel
    return int(4 * n + gradients + state + cast)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------------- speed

def matmul_peak(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """FLOP/s of the best of many large square matmuls, the measure of MFU."""
    if n == 0:
        n = 8192 if device.type == "cuda" else 1024
    # A constant, because random numbers would move the generator that the run draws from.
    a = torch.full((n, n), 0.01, device=device, dtype=dtype)
    best = float("inf")                                    # seconds
    # for a fifth of a second, because on a busy machine most of them are interrupted
    began = time.perf_counter()
    while time.perf_counter() - began < 0.2 or best == float("inf"):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)                 # the call returns before the GPU is done
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def flops_per_token(model: nn.Module, length: int) -> float:
    """FLOPs to train on one token of a sequence of `length`, for the MFU that a run logs."""
    flops = model.flops_per_token(length)
    if model.architecture == "encoder_decoder":
        flops /= 2             # because the model counts a pair: one token in each of the stacks
    return flops


def in_words(seconds: float) -> str:
    """In the largest unit of which there are two: 7200 -> 2 hours, 7199 -> 120 minutes."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
