"""
The plumbing every training script shares, so that a script can be about its algorithm:

    cfg = parse(Config)                   a dataclass and its comments become the command line
    run = start(cfg, "sft")               device, precision, ranks, seed, output folder, metrics
    run.track(model=model, optimizer=optimizer)            what a checkpoint holds; resumes
    for step in run.steps(cfg.steps):                      progress bar; Ctrl-C saves and exits
        run.backward(loss, step)
        grad_norm = run.update(optimizer, lr)              clip, step, zero; skips what does harm
        run.log(step, loss=loss, tokens=n)                 metrics.jsonl
        run.checkpoint(step)                               atomic, written while training goes on
    run.finish(model, tokenizer)                           the model folder and curves.png

Nothing here knows about losses or data. The folder it writes is described in README.md.
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import kernels
import model as model_module
import parallel
from plumbing.optimizers import Muon

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEEP_CHECKPOINTS = 2
WRITTEN = {"config.json", "model.safetensors", "tokenizer.json", "adapter.json", "metrics.jsonl",
           "adapter.safetensors", "curves.png", "checkpoints"}         # what --overwrite may delete
MAY_CHANGE = {"steps", "resume", "overwrite", "log_every", "eval_every", "save_every", "out",
              "device", "compile"}                                     # with --resume, unannounced
MAX_SKIPPED = 20                # updates in a row; fp16's loss scale falls from 2^16 below 1 in 17
SPIKE, SPIKE_WINDOW = 5.0, 100  # is_spike
UNITS = {"loss": "nats", "val_loss": "nats per token", "kl": "nats per response", "lr": "per step",
         "tokens": "tokens", "tokens_per_s": "tokens/s", "entropy": "nats per token",
         "logp_chosen": "nats per response", "logp_rejected": "nats per response",
         "response_tokens": "tokens", "skipped": "updates so far"}


# ---------------------------------------------------------------------- the command line

def parse(Config: type, argv: list[str] | None = None, description: str = "",
          presets: dict[str, dict] | None = None):
    """Build Config from the command line. A field's trailing comment is its help text.

    presets: other defaults, by the names that --preset takes. Exits with a message for a value of
    the wrong type, an unknown preset and an unknown option, naming the nearest known one.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# *(.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        kind = {"bool": parse_bool, bool: parse_bool}.get(field.type, type(field.default))
        shown = f'{comments.get(field.name, "")} (default: {field.default})'
        flag = {"nargs": "?", "const": True} if kind is parse_bool else {}
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, **flag,
                            metavar=type(field.default).__name__, help=shown.replace("%", "%%"))
    args, unknown = parser.parse_known_args(argv)
    if presets and args.preset:
        if args.preset not in presets:
            parser.error(f"--preset {args.preset}; give {', '.join(presets)}")
        parser.set_defaults(**presets[args.preset])
        args, unknown = parser.parse_known_args(argv)      # what was given stands
    if unknown:
        known = [field.name for field in dataclasses.fields(Config)]
        name = unknown[0].split("=")[0].strip("-").replace("-", "_")
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean --{nearest[0]}?" if nearest else f"the options are {' '.join(known)}"
        parser.error(f"unknown option {unknown[0]}; {hint}")
    return Config(**vars(args))


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f'"{text}"; give true or false')
    return text.lower() in ("true", "1")


def command_line(main: Callable, Config: type, description: str,
                 presets: dict[str, dict] | None = None) -> None:
    """Run a script: what a user got wrong ends in one clear line, not in a traceback."""
    cfg = parse(Config, description=description, presets=presets)
    try:
        main(cfg)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


# ---------------------------------------------------------------------- schedules and numbers

def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, floor: float = 0.1) -> float:
    """Linear warmup over `warmup` steps to `peak`, then a cosine to floor * peak at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def warmup_stable_decay(step: int, steps: int, peak: float, warmup: int = 0,
                        decay: float = 0.3) -> float:
    """Linear warmup over `warmup` steps to `peak`, `peak`, and for the last `decay` of all steps a
    line to 0 (Hu et al. 2024): more of the run at full pace than a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * min(1.0, (steps - step) / max(1.0, decay * steps))


def linear_decay(step: int, steps: int, peak: float) -> float:
    """From `peak` at step 0 to 0 after the last step."""
    return peak * (1 - step / steps)


def is_spike(loss: float, norm: float, recent: list[tuple[float, float]]) -> bool:
    """Whether a loss rises above the median of the recent ones SPIKE times as far as the highest
    of them, and its gradient is SPIKE times as long as their longest.

    recent: (loss, gradient norm) of the last SPIKE_WINDOW updates; with fewer nothing is a spike.
    Measured against extremes, not a standard deviation: losses have heavy tails, and a hard batch
    is worth learning from.
    """
    if len(recent) < SPIKE_WINDOW:
        return False
    losses, norms = zip(*recent)
    median = statistics.median(losses)
    return loss - median > SPIKE * (max(losses) - median) and norm > SPIKE * max(norms)


def adamw(model: nn.Module, lr: float, betas=(0.9, 0.95), eps: float = 1e-8,
          weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over what is trainable; weight decay on matrices only, not on norms and biases. All
    parameters in one call, unless some are on other meshes than others (--tensor_parallel)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}]
    together = {"fused": trainable[0].device.type in ("cpu", "cuda")}
    if len({getattr(p, "device_mesh", None) for p in trainable}) > 1:
        together = {"foreach": False}
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps,
                             **together)


def pick_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float,
                   dtype: torch.dtype, betas=(0.9, 0.95)) -> torch.optim.Optimizer:
    """--optimizer muon or adamw. dtype: what the model multiplies in; Muon's matmuls follow."""
    if name == "muon":
        wide = torch.float32 if dtype == torch.float16 else dtype
        return Muon(model, lr, betas=betas, weight_decay=weight_decay, dtype=wide)
    if name != "adamw":
        raise ValueError(f"--optimizer {name}: give muon or adamw")
    return adamw(model, lr, betas=betas, weight_decay=weight_decay)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
               "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)              # Triton launches its kernels there
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; "
                         "give auto, cpu, cuda, cuda:N or mps") from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto" and device.type == "cpu":
        name = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    elif name == "auto":
        name = "float32"
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: give auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type != "cuda":
        raise ValueError(f"--dtype float16 needs a GPU (its loss scaling does), not {device.type}; "
                         "give auto, float32 or bfloat16")
    return DTYPES[name]


# ---------------------------------------------------------------------- one run of one stage

def start(cfg, name: str) -> "Run":
    """Set up ranks (under torchrun), device, precision, seeds and the output folder.

    Raises ValueError when --out holds an earlier run and neither --resume nor --overwrite is given.
    """
    for count in ("batch_size", "minibatch_size", "grad_accum", "epochs", "eval_windows",
                  "eval_pairs", "eval_examples", "n_examples", "n_pairs", "n_prompts", "n_shift"):
        if getattr(cfg, count, 1) < 1:
            raise ValueError(f"--{count} {getattr(cfg, count)}: give 1 or more")
    kernels.keep_memory()
    gc.collect()
    gc.freeze()                       # imports stay: looking through them costs a sixth of world.py
    if "RANK" in os.environ and not dist.is_initialized():
        gpu = pick_device(cfg.device).type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo")
    return Run(cfg, name)


class Run:
    """What a running stage has: device, dtype, rank, its folder, and what it has logged."""

    def __init__(self, cfg, name: str):
        self.cfg, self.name, self.out = cfg, name, Path(cfg.out)
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        parallel.check(cfg, self.dtype)
        self.ways = getattr(cfg, "tensor_parallel", 1)         # ranks that read the same tokens
        self.replica, self.replicas = self.rank // self.ways, self.world_size // self.ways
        torch.manual_seed(cfg.seed)
        np.random.seed(cfg.seed)
        random.seed(cfg.seed)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.first_step, self.step, self.tokens, self.tracked = 0, 0, 0, {}
        self.pending: dict[str, list] = {}            # logged since the last row of metrics.jsonl
        self.last: dict[str, float] = {}              # the newest value of every figure
        self.evaluated = -1                           # the newest step with a val_loss
        self.loss, self.updated = torch.zeros((), device=self.device), True    # since an update
        self.history: dict[str, dict] = {}            # of each optimizer, for skips()
        self.skipped = 0                              # updates so far
        self.flops_per_token, self.peak = 0.0, 1.0    # set by a stage that wants its MFU logged
        self.interrupted = 0                          # the signal
        self.writing = None                           # the checkpoint on its way to the disk
        self.writers = None                           # all ranks, where each writes its own part
        self.saved_step = -1                          # that self.writing is about
        self.started = self.last_row = time.perf_counter()
        self.claim_folder()

    @functools.cached_property
    def parents(self) -> dict[str, str]:
        """The models this run starts from: read once, not at every checkpoint."""
        return parents(self.cfg)

    def claim_folder(self) -> None:
        """Refuse a folder with an earlier run in it unless told what to do with that run."""
        for name in ("init", "reward_model", "data", "anneal_data", "prompts", "tokenizer"):
            for path in filter(None, getattr(self.cfg, name, "").split(",")):
                if self.out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                    raise ValueError(f"--out {self.out} is or holds what this stage reads "
                                     f"(--{name} {path}); give another one to write")
        if self.rank == 0:
            if self.out.is_dir() and any(self.out.iterdir()) and not self.cfg.resume:
                if not self.cfg.overwrite:
                    raise ValueError(f"--out {self.out} is not empty; --resume goes on with what "
                                     "is there, --overwrite starts afresh, or give another folder")
                for entry in sorted(self.out.iterdir()):
                    if entry.name not in WRITTEN and entry.suffix != ".tmp":
                        raise ValueError(f"--overwrite would throw away {entry}, which is not of "
                                         "a training run; move it, or give another --out")
                shutil.rmtree(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
        self.barrier()

    def say(self, message: str) -> None:
        """A line for the reader, above the progress bar."""
        if self.rank == 0:
            tqdm.write(f"{self.name}: {message}", file=sys.stderr)

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def mean_over_ranks(self, value: float | list[float] | Tensor) -> float | list[float]:
        """DDP averages gradients over ranks: a summed loss divided by the mean number of target
        tokens per rank is, after that average, divided by the number of all."""
        if self.world_size == 1:
            return value.tolist() if isinstance(value, Tensor) else value
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def prepare(self, model: nn.Module) -> nn.Module:
        """The callable to train through: `model`, compiled if asked for, in DDP under torchrun;
        with --shard fsdp or --tensor_parallel `model` itself, whose parameters an optimizer must
        take from here on."""
        fsdp = getattr(self.cfg, "shard", "none") == "fsdp"
        if fsdp or self.ways > 1:
            self.writers = dist.new_group(backend="gloo")
            return parallel.shard(model, fsdp, self.ways)
        if self.cfg.compile:
            model = torch.compile(model)
        if self.world_size > 1:
            # batches that copy have no next sentences: its head gets no gradient from them
            model = nn.parallel.DistributedDataParallel(
                model, find_unused_parameters=getattr(self.cfg, "next_sentence", False))
        return model

    def generator(self, step: int) -> torch.Generator:
        """Random numbers for one step and rank, the same after a resume."""
        seed = self.cfg.seed * 1_000_003 + step * 1_009 + self.replica
        return torch.Generator(self.device).manual_seed(seed)

    # ---- the loop

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps still to do. Ctrl-C or SIGTERM: finish the step, save, exit (1 or 0).

        Raises what went wrong with writing a checkpoint at the end of the step it is known in.
        """
        def interrupt(signum, frame):
            self.interrupted = self.interrupted or signum
        handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=total, initial=self.first_step, desc=self.name, unit="step",
                        disable=self.rank > 0, dynamic_ncols=True, mininterval=0.5)
        self.last_row = time.perf_counter()
        try:
            for step in range(self.first_step, total):
                yield step
                self.bar.update()
                failed = self.writing and self.writing.done() and self.writing.exception()
                if self.mean_over_ranks(bool(self.interrupted or failed)):
                    self.save_checkpoint(step + 1)              # all ranks, at the same step
                    self.written()
                    message = (f"stopped after step {step}; everything is saved in {self.out}, "
                               "--resume goes on from there")
                    if self.interrupted == signal.SIGINT:
                        raise SystemExit(f"{self.name}: {message}")
                    self.say(message)                           # a scheduler's SIGTERM: exit code 0
                    raise SystemExit(0)
        finally:
            self.bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def backward(self, loss: Tensor, step: int) -> None:
        """Back-propagate; the losses until the next update add up to the one it is judged by."""
        self.step = step
        self.loss = loss.detach().float() + (0 if self.updated else self.loss)
        self.updated = False
        self.scaler.scale(loss).backward()

    def update(self, optimizer: torch.optim.Optimizer, lr: float, max_norm: float = 1.0,
               last: bool = True) -> Tensor:
        """Clip to max_norm, set the learning rate, step, zero. Returns the norm before clipping.
        last: no other optimizer follows whose gradients are of the same backward pass.

        An update that would do harm is skipped: weights and optimizer stay as they are. Raises
        FloatingPointError when that was the MAX_SKIPPED-th in a row.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]
                      if p.grad is not None]
        self.scaler.unscale_(optimizer)
        grad_norm = parallel.total_norm([p.grad for p in parameters])
        shrink = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([parallel.local(p.grad) for p in parameters], shrink)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not self.skips(optimizer, grad_norm):
            self.scaler.step(optimizer)
        if last:
            self.scaler.update()                              # after an overflow: a lower scale
        optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def skips(self, optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> bool:
        """Whether the loss or the gradient is not finite or spikes: the same on all ranks, whose
        losses are averaged as DDP does gradients. The only place where a step waits for the GPU."""
        self.updated = True
        loss, norm = self.mean_over_ranks(torch.stack([self.loss, grad_norm.float()]))
        name = next((n for n, part in self.tracked.items() if part is optimizer), "")
        seen = self.history.setdefault(name, {"recent": [], "in_a_row": 0})
        if not math.isfinite(loss):
            why = f"the loss is {loss}"
        elif not math.isfinite(norm):
            why = f"the gradient norm is {norm}"
        elif is_spike(loss, norm, seen["recent"]):
            why = f"the loss leaps to {loss:.3g}, the gradient norm to {norm:.3g}"
        else:
            seen["recent"] = [*seen["recent"], (loss, norm)][-SPIKE_WINDOW:]
            seen["in_a_row"] = 0
            return False
        self.skipped += 1
        seen["in_a_row"] += 1
        if seen["in_a_row"] >= MAX_SKIPPED:
            self.written()
            raise FloatingPointError(f"step {self.step}: {why}, and {MAX_SKIPPED} updates in a row "
                                     f"were skipped for the like; {self.way_back()}")
        self.say(f"step {self.step}: {why}; this update is skipped")
        return True

    def way_back(self) -> str:
        kept = newest_checkpoint(self.out)
        return (f"{f'{kept} is the last good checkpoint' if kept else 'No checkpoint was made yet'}"
                "; try a lower --lr or --dtype float32")

    def due(self, step: int, every: int) -> bool:
        """True every `every` steps and after the last one."""
        return step + 1 == self.cfg.steps or every > 0 and (step + 1) % every == 0

    def log(self, step: int, *, tokens: int = 0, **figures) -> None:
        """Add this step's figures; every log_every steps their means become a row of metrics.jsonl.

        tokens: how many tokens this rank processed in this step (the row has the total so far).
        After the first skipped update rows have `skipped`, how many there were so far; a mean then
        leaves out what is not finite.
        """
        self.tokens += tokens * self.replicas
        self.pending.setdefault("tokens", []).append(tokens * self.replicas)
        for name, value in figures.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.pending.setdefault(name, []).append(value)
        if not (step == 0 or self.due(step, self.cfg.log_every) or "val_loss" in figures):
            return
        now, interval_tokens = time.perf_counter(), sum(self.pending.pop("tokens"))
        keep = math.isfinite if self.skipped > self.last.get("skipped", 0) else lambda value: True
        values = [[v for v in map(float, values) if keep(v)] for values in self.pending.values()]
        sums, counts = (self.mean_over_ranks([float(of(v)) for v in values]) for of in (sum, len))
        row = {"step": step, **{k: s / n for k, s, n in zip(self.pending, sums, counts) if n}}
        if self.skipped:
            row["skipped"] = self.skipped
        if interval_tokens:
            row |= {"tokens": self.tokens, "tokens_per_s": interval_tokens / (now - self.last_row)}
        if self.flops_per_token:
            row["mfu"] = (row["tokens_per_s"] / self.world_size * self.flops_per_token / self.peak)
            row["memory_gb"] = peak_memory(self.device) / 1e9
        self.pending, self.last_row = {}, now
        self.last |= row
        self.evaluated = step if "val_loss" in row else self.evaluated
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            self.bar.set_postfix({k: f"{row[k]:.3g}" for k in ("loss", "val_loss", "reward")
                                  if k in row}, refresh=False)

    # ---- checkpoints

    def track(self, **parts) -> None:
        """Name what a checkpoint holds (things with state_dict); with --resume load the newest
        that is whole.

        Raises ValueError when there are checkpoints but all are damaged, or when the newest whole
        one holds other shapes or parts.
        """
        self.tracked = parts
        if self.rank == 0:
            for left in self.out.glob("checkpoints/*.tmp"):   # by a run that was killed
                shutil.rmtree(left)
        damaged = []
        for folder in reversed(checkpoints(self.out)) if self.cfg.resume else ():
            try:
                state = read_checkpoint(folder)
            except ValueError as error:
                self.say(f"{error}; going back to the checkpoint before it")
                damaged.append(str(error))
                continue
            self.load_checkpoint(folder, state)
            self.say(f"going on from step {self.first_step} ({folder})")
            began, now = read_meta(folder)["config"], dataclasses.asdict(self.cfg)
            for name in sorted(began.keys() & now.keys() - MAY_CHANGE):
                if began[name] != now[name]:
                    self.say(f"the run began with --{name} {began[name]}; from here on it is "
                             f"{now[name]}")
            break
        else:
            if damaged:
                raise ValueError(f"no checkpoint is whole: {'; '.join(damaged)}; give --overwrite "
                                 "to start afresh, or another --out")
        metrics = self.out / "metrics.jsonl"
        if self.rank == 0 and metrics.exists():       # rows after the checkpoint will come again
            rows = [r for r in metrics.read_text().splitlines(keepends=True)
                    if r.endswith("\n") and json.loads(r)["step"] < self.first_step]
            metrics.with_suffix(".tmp").write_text("".join(rows))
            metrics.with_suffix(".tmp").replace(metrics)

    def load_checkpoint(self, folder: Path, state: dict) -> None:
        parts = state["parts"]
        if (folder / ".metadata").exists():                   # each rank has written its own
            parts = parallel.load_parts(parts, self.tracked, folder)
        for name, part in self.tracked.items():
            weights = folder / f"{name}.safetensors"
            try:
                parallel.load(part, safetensors.torch.load_file(weights) if weights.exists()
                              else parts[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(f"{folder}: its {name} is not the one of this run; --resume takes "
                                 f"the options the run was started with ({error})") from error
        self.first_step, self.tokens, self.last = state["step"], state["tokens"], state["last"]
        pending = state["pending"]                            # of each rank there was
        self.pending = pending[self.rank] if len(pending) == self.world_size else {
            name: [sum(v) / len(v) for v in zip(*(p[name] for p in pending))]
            for name in pending[0]}
        self.history, self.skipped = state["history"], state["skipped"]
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state.get("gpu_rng") is not None:
            torch.cuda.set_rng_state(state["gpu_rng"])            # noisy routers draw from it

    def checkpoint(self, step: int) -> None:
        """Save every save_every steps."""
        if self.due(step, self.cfg.save_every):
            self.save_checkpoint(step + 1)

    def save_checkpoint(self, steps_done: int) -> None:
        """Copy everything to CPU memory; a thread of rank 0, or of each rank where they share the
        weights, writes it to the disk while training goes on.

        Raises what went wrong with the checkpoint before this one, as written() does.
        """
        self.written()
        pending = [{name: [float(v) for v in values] for name, values in self.pending.items()}]
        if self.world_size > 1:                               # each rank has figures of its own
            mine, pending = pending[0], [{}] * self.world_size
            dist.all_gather_object(pending, mine)
        if self.saved_step == steps_done:
            return
        state = {"step": steps_done, "tokens": self.tokens, "last": self.last, "pending": pending,
                 "rng": torch.get_rng_state(), "scaler": self.scaler.state_dict(),
                 "gpu_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                 "history": self.history, "skipped": self.skipped,
                 "val_loss": self.last["val_loss"] if self.evaluated == steps_done - 1 else None,
                 "parts": {n: p.state_dict() for n, p in self.tracked.items()}}
        if self.writers or self.rank == 0:
            copy = parallel.copied_parts(state)
            # A thread for each. One that stayed would keep OpenMP workers of its own, and with more
            # workers than cores OpenMP lets all of them sleep between operations: the steps after
            # the first save would take nearly twice as long.
            writer = ThreadPoolExecutor(1)
            self.writing = writer.submit(self.write_checkpoint, copy)
            writer.shutdown(wait=False)
        self.saved_step = steps_done

    def written(self) -> None:
        """Wait until the last checkpoint is on the disk; on all ranks, at the same point.

        Raises, on all of them, what went wrong with it: OSError (a full disk, say), or
        FloatingPointError when weights are not finite.
        """
        error = self.writing and self.writing.exception()
        if self.mean_over_ranks(error is not None):
            raise error or OSError("another rank could not write its checkpoint, and says why")

    def write_checkpoint(self, state: dict) -> None:
        """checkpoints/step_N, whole or not at all: temporary folder, fsync, rename, fsync."""
        final = self.out / "checkpoints" / f"step_{state['step']:06d}"
        folder = final.with_name(final.name + ".tmp")
        models = [n for n, part in self.tracked.items() if isinstance(part, nn.Module)]
        weights = [parallel.local(w) for n in models for w in state["parts"][n].values()]
        damage = torch.tensor(sum(not w.isfinite().all() for w in weights))
        if self.writers:
            dist.all_reduce(damage, group=self.writers)
        if damage:
            raise FloatingPointError(f"after step {state['step'] - 1} the weights are not finite; "
                                     f"{self.way_back()}")
        with room_for(folder, tree_leaves(state)):
            if self.writers:
                state["parts"] = parallel.save_parts(state["parts"], folder, self.writers)
                if self.rank > 0:
                    return
            else:
                folder.mkdir(parents=True)
                for name in models:
                    part = state["parts"].pop(name)
                    safetensors.torch.save_file({n: w.contiguous() for n, w in part.items()},
                                                folder / f"{name}.safetensors")
            torch.save(state, folder / "state.pt")
            meta = {"step": state["step"], "val_loss": state["val_loss"],
                    "config": dataclasses.asdict(self.cfg), "parents": self.parents,
                    "sha256": {f.name: sha256(f) for f in sorted(folder.iterdir())}}
            (folder / "meta.json").write_text(json.dumps(meta, indent=2))
            for path in (*folder.iterdir(), folder, *self.out.glob("*.json*")):
                fsync(path)                                   # with the rows it goes on from
        shutil.rmtree(final, ignore_errors=True)              # a damaged one of the same step
        folder.rename(final)
        for path in (final.parent, self.out):                 # the names are on the disk, too
            fsync(path)
        prune_checkpoints(self.out)

    def finish(self, model: nn.Module, tokenizer, result: dict | None = None) -> dict:
        """Write the model folder and curves.png. Returns `result` with minutes and tokens_per_s.

        Raises OSError when the disk is full, and what written() raises.
        """
        self.written()
        rows = read_metrics(self.out)
        speeds = sorted(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
        result = {"minutes": (time.perf_counter() - self.started) / 60,
                  "tokens_per_s": speeds[len(speeds) // 2] if speeds else None, **(result or {})}
        weights = parallel.copied(model.state_dict(), keep=self.rank == 0)
        if self.rank == 0:
            plot_curves(rows, self.out / "curves.png", self.name)
            with room_for(self.out / "model.safetensors.tmp", list(weights.values())):
                model_module.save_model(
                    self.out, model, tokenizer, weights, stage=self.name, parents=self.parents,
                    config=dataclasses.asdict(self.cfg), seed=self.cfg.seed, result=result,
                    versions={"python": sys.version.split()[0], "torch": torch.__version__,
                              "numpy": np.__version__})
        self.barrier()
        return result


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


def folders_read(cfg) -> list[str]:
    """The model folders a config starts from."""
    return [folder for name in ("init", "reward_model") if (folder := getattr(cfg, name, ""))]


def parents(cfg) -> dict[str, str]:
    """Each folder that the config reads, with the checksum of its weights."""
    return {folder: sha256(Path(folder) / "model.safetensors") for folder in folders_read(cfg)}


@contextlib.contextmanager
def room_for(path: Path, parts: list) -> Iterator[None]:
    """Write the tensors among `parts` to `path` or nothing: an error removes what is there of it.

    Raises OSError with sizes and the way out when the disk is full, else the error itself.
    """
    try:
        yield
    except Exception as error:                 # torch and safetensors raise their own for this
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        size = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        if free > size and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{path}: no space left on the disk; {size / 1e6:.1f} MB are needed, "
                      f"{free / 1e6:.1f} MB are free. What was saved before is still there: "
                      "make room, then go on with --resume") from error


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a model folder, damaged ones too, in the order of their steps."""
    folders = Path(out).glob("checkpoints/step_*")
    return sorted((f for f in folders if f.name[5:].isdecimal()), key=lambda f: int(f.name[5:]))


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint; {} when it cannot be read."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return {}


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint with the most steps whose meta.json can be read."""
    return next(filter(read_meta, reversed(checkpoints(out))), None)


def prune_checkpoints(out: Path) -> None:
    """Keep the newest KEEP_CHECKPOINTS and, of those that were evaluated, the one with the lowest
    validation loss. What has no readable meta.json is neither counted nor removed."""
    losses = {f: meta.get("val_loss") for f in checkpoints(out) if (meta := read_meta(f))}
    scored = {f: loss for f, loss in losses.items() if loss is not None}
    best = min(scored, key=scored.get, default=None)
    for folder in list(losses)[:-KEEP_CHECKPOINTS]:
        if folder != best:                        # a kill in between must not leave half of it
            shutil.rmtree(folder.rename(folder.with_name(folder.name + ".tmp")))


def read_checkpoint(folder: Path) -> dict:
    """state.pt of a checkpoint. Raises ValueError when a file is not what was written."""
    checksums = read_meta(folder).get("sha256", {"meta.json": "unreadable"})
    for name, checksum in checksums.items():
        if not (folder / name).exists() or sha256(folder / name) != checksum:
            raise ValueError(f"{folder / name} is damaged (its checksum differs)")
    return torch.load(folder / "state.pt", weights_only=True)


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------- metrics and pictures

def read_metrics(out: str | Path) -> list[dict]:
    file = Path(out) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plot_curves(rows: list[dict], file: Path, title: str) -> None:
    """One panel per logged figure against the step; val_loss goes into the panel of loss, and
    load/0, load/1, ... share one."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {}                                            # title: keys
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in ("step", "tokens"):
            name = "loss" if key == "val_loss" else key.split("/")[0]
            panels.setdefault(name, []).append(key)
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 2.8 * lines),
                                squeeze=False, layout="constrained")
    for axis, (name, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), marker="." if len(points) < 15 else None, label=key)
        axis.set(xlabel="step", ylabel=UNITS.get(name, ""), title=name)
        axis.grid(alpha=0.3)
        if "val_loss" in keys:
            axis.legend()
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)
