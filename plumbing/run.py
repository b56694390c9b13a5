"""
One run of one stage: device, precision, ranks, folder, and the few things every loop does.

    run = start(cfg, __file__)                             device, ranks, seeds, output folder
    forward = run.prepare(model, "logps")                  compiled, or averaged over ranks
    run.track(model=model, optimizer=optimizer)            the parts of a checkpoint; resumes
    for step in run.steps(cfg.steps):                      progress bar; Ctrl-C saves and exits
        run.backward(loss)
        grad_norm = run.clip(model, cfg.max_norm)
        run.step(optimizer, lr, loss, grad_norm)           skips an update that would do harm
        optimizer.zero_grad()
        run.log(step, loss=loss, tokens=n)                 metrics.jsonl
        if run.due(step, cfg.save_every):
            run.save_checkpoint(step + 1)                  written while training goes on
    run.finish(model, tokenizer)                           the model folder and curves.png

Nothing here knows about losses or data.
"""
import functools
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import kernels
import parallel
from plumbing import checkpoints, claim, folders, forecast, inputs
from plumbing.curves import plot_curves, read_metrics
from plumbing.device import (
    ALL_THREADS,
    CoreWatch,
    peak_memory,
    pick_device,
    pick_dtype,
    pick_threads,
)
from plumbing.guard import MAX_SKIPPED, Guard
from plumbing.metrics import Metrics
from plumbing.optimizers import keep_on_host
from plumbing.options import INTERRUPTED, flat

# what every run writes; more with run.also_writes()
FILES = ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "curves.png")


# ---------------------------------------------------------------------- one run of one stage

def start(cfg, script: str) -> "Run":
    """Set up ranks (under torchrun), device, precision, seeds and the output folder. script: its
    file name; train_sft.py is the stage sft.

    Raises ValueError when --out holds an earlier run and neither --resume nor --overwrite is given.
    """
    kernels.keep_memory()
    # everything imported stays until the end: the garbage collector need not look through it
    gc.collect()
    gc.freeze()
    parallel.join_ranks(on_gpu=pick_device(cfg.device).type == "cuda")
    return Run(cfg, Path(script).stem.removeprefix("train_"))


class CallForward(nn.Module):
    """A module whose forward is some method of `model`, because DDP works through forward alone."""

    def __init__(self, model: nn.Module, method: Callable):
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args, **kwargs):
        return self.method(*args, **kwargs)


class Run:
    """What a running stage has: device, dtype, rank, folder; guard, metrics, checkpoints.

    replica, replicas: which of the groups of ranks that read different tokens this rank is in; with
    --tensor_parallel k each k ranks read the same ones.
    """

    def __init__(self, cfg, name: str):
        self.cfg = cfg
        self.name = name
        self.out = Path(cfg.out)
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.rank, self.world_size = parallel.ranks()
        parallel.check(cfg, self.dtype)
        tensor_parallel = getattr(cfg, "tensor_parallel", 1)
        self.replica = self.rank // tensor_parallel
        self.replicas = self.world_size // tensor_parallel
        # the same on all ranks, so that they start from the same weights
        torch.manual_seed(cfg.seed)
        np.random.seed(cfg.seed)
        random.seed(cfg.seed)
        self.guard = Guard(self.dtype == torch.float16)
        self.metrics = Metrics(self.out / "metrics.jsonl")
        self.writer = checkpoints.Writer(self.out)
        self.parts: dict = {}                          # of a checkpoint, by name
        self.first_step = 0
        self.current_step = 0
        self.saved_step = -1                           # steps done at the newest checkpoint
        self.files = list(FILES)                       # that this run writes to its folder
        self.tokenizer = None                          # written when training begins
        self.first_files: dict[str, Callable] = {}     # and these, as writes_first() says
        self.parents: dict = {}                        # the models it starts from
        self.inputs: dict = {}                         # what this run reads (plumbing/inputs.py)
        self.inputs_before: list[dict] = []            # what it read until --insist
        self.rate_before = 0.0                         # the last learning rate before a resume
        self.flops_per_token = 0.0                     # 0: no MFU is logged
        self.matmul_peak = 1.0                         # FLOP/s
        self.started = time.perf_counter()
        self.claim_folder()
        self.cores = CoreWatch(self.device)
        self.pick_threads()

    def claim_folder(self) -> None:
        """Refuse a folder with an earlier run in it unless told what to do with that run."""
        for option, path in inputs.paths_read(self.cfg):
            inside = (Path(path).resolve(), *Path(path).resolve().parents)
            if self.out.resolve() in inside:
                raise ValueError(f"--out {self.out} is or holds what this stage reads "
                                 f"(--{option} {path}); give another one to write")
        # rank 0 alone changes the folder, and the others wait for it
        if self.rank == 0:
            if not (claim.is_free(self.out) or self.cfg.resume or self.cfg.overwrite):
                raise ValueError(f"--out {self.out} is not empty; --resume goes on with what "
                                 "is there, --overwrite starts afresh, or give another folder")
            claim.lock(self.out)
            claim.move_back(self.out)
            if self.sets_aside():
                claim.check_overwrite(self.out)
            claim.refuse_foreign(self.out, self.files)
        self.barrier()

    def sets_aside(self) -> bool:
        """Whether an earlier run makes room for this one."""
        return self.cfg.overwrite and not self.cfg.resume and not claim.is_free(self.out)

    def also_writes(self, *names: str) -> None:
        """Files of this stage besides FILES. Raises ValueError for those of somebody else."""
        self.files += names
        if self.rank == 0:
            claim.refuse_foreign(self.out, names)

    def writes_first(self, name: str, write: Callable[[Path], object]) -> None:
        """A file of this stage that is there as training begins, because --resume must find it.
        write(temporary file) writes it."""
        self.also_writes(name)
        self.first_files[name] = write

    def begin(self) -> None:
        """The first that changes the folder: all that this run reads has been read and checked."""
        if self.rank == 0:
            if self.sets_aside():
                claim.set_aside(self.out)
            claim.add(self.out, *self.files)
            checkpoints.remove_unfinished(self.out)
            self.metrics.drop_rows_from(self.first_step)
            if self.tokenizer is not None:
                self.tokenizer.save(self.out)
            for name, write in self.first_files.items():
                claim.write_whole(self.out / name, write)
            self.inputs = self.read_inputs(self.inputs)
        # now and not at the end, when somebody may have trained a parent again
        self.parents = folders.parents(self.cfg)
        self.barrier()

    def pick_threads(self) -> None:
        """As many as are fast now."""
        choice = pick_threads(self.device)
        if choice:
            self.say(choice)
        self.cores.restart()

    def say(self, message: str) -> None:
        """A line for the reader, above the progress bar."""
        if self.rank == 0:
            tqdm.write(f"{self.name}: {message}", file=sys.stderr)

    # ---- ranks

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def mean_over_ranks(self, value: float | list[float] | Tensor) -> float | list[float]:
        """The mean of a number, or of each of several, over all ranks."""
        if self.world_size == 1:
            return value.tolist() if isinstance(value, Tensor) else value
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def prepare(self, model: nn.Module, method: str = "forward",
                unused_parameters: bool = False) -> Callable:
        """What to train through: model.<method>, compiled if asked for, in DDP under torchrun. With
        --shard fsdp or --tensor_parallel the model's weights are shared among the ranks, in place:
        an optimizer must take its parameters from here on.

        A loop over micro-batches sets its require_backward_grad_sync, which DDP looks at and others
        ignore (FSDP averages in each backward pass, because it keeps no whole gradients).
        unused_parameters: some steps leave parameters without a gradient, which DDP must look for.
        """
        fsdp = getattr(self.cfg, "shard", "none") == "fsdp"
        tensor_parallel = getattr(self.cfg, "tensor_parallel", 1)
        if fsdp or tensor_parallel > 1:
            # checkpoints travel through a group of their own: NCCL has no CPU tensors
            self.writer.ranks = dist.new_group(backend="gloo")
            parallel.shard(model, fsdp, tensor_parallel)
            return functools.partial(getattr(model, method))
        call = getattr(model, method)
        if self.cfg.compile:
            call = torch.compile(call)
        if self.world_size > 1:
            return nn.parallel.DistributedDataParallel(
                CallForward(model, call), find_unused_parameters=unused_parameters)
        return functools.partial(call)                 # a plain method takes no attributes

    def generator(self, step: int) -> torch.Generator:
        """Random numbers for one step and rank, the same after a resume."""
        # primes, so that no two of (seed, step, rank) share their numbers
        seed = self.cfg.seed * 1_000_003 + step * 1_009 + self.replica
        return torch.Generator(self.device).manual_seed(seed)

    # ---- the loop

    def refuse_too_large(self, config) -> None:
        """Raises ValueError, before it is made, for a model that no memory here could train."""
        # with --shard fsdp all ranks share the weights
        forecast.refuse_too_large(config, self.device, self.world_size)

    def forecast(self, *models: nn.Module, rows: int = 0, length: float = 0,
                 tokens: float = 0, log_mfu: bool = True) -> None:
        """Say what the run will take (plumbing/forecast.py), and log the MFU of the first model.

        rows, length: what is read at once, by default batch_size rows of a whole context. tokens:
        what this rank reads in the whole run. log_mfu: False where most of the time goes into
        something else than training. Raises ValueError for a run that does not fit.
        """
        work = forecast.workload(self.cfg, models[0].config, rows, length, tokens)
        peak = forecast.matmul_peak(self.device, self.dtype)
        if log_mfu:
            self.matmul_peak = peak
            self.flops_per_token = forecast.flops_per_token(models[0], work.length)
        optimizer = getattr(self.cfg, "optimizer", "adam")
        memory = forecast.memory_of(self.device)
        self.say(forecast.describe(models, optimizer, work, peak, memory, flat(self.cfg),
                                   getattr(self.cfg, "tensor_parallel", 1)))

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps still to do. Ctrl-C or SIGTERM: finish the step, save, leave().

        Raises the error of a checkpoint that could not be written, at the end of a step.
        """
        signals = []                                   # received so far

        def remember(signum, frame):
            signals.append(signum)

        # a signal in the middle of a step only leaves a note, because half a step cannot be saved
        self.begin()
        handlers = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            handlers[signum] = signal.signal(signum, remember)
        self.bar = tqdm(total=total, initial=self.first_step, desc=self.name, unit="step",
                        disable=self.rank > 0, dynamic_ncols=True, mininterval=0.5)
        self.metrics.row_time = time.perf_counter()
        self.cores.restart()                           # reading and tokenizing keep one core busy
        try:
            for step in range(self.first_step, total):
                self.current_step = step
                yield step
                self.bar.update()
                if self.cores.has_changed():
                    self.pick_threads()
                failed = self.writer.writing and self.writer.error(wait=False)
                stop = bool(signals or failed)
                if self.mean_over_ranks(stop):                  # all ranks, at the same step
                    self.save_checkpoint(step + 1)
                    self.wait_for_checkpoint()
                    self.leave(step, signals)
        finally:
            self.bar.close()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def leave(self, step: int, signals: list[int]) -> None:
        """Exit with code 130 after Ctrl-C, and with 0 after a scheduler's SIGTERM."""
        if self.rank == 0:
            claim.unlock(self.out)
        message = (f"stopped after step {step}; everything is saved in {self.out}, "
                   "--resume goes on from there")
        self.say(message)
        interrupted = signals and signals[0] == signal.SIGINT
        raise SystemExit(INTERRUPTED if interrupted else 0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; in float16 those of the loss times the loss scale."""
        if self.guard.float16:
            loss = loss * self.guard.scale
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Shorten the model's gradients to max_norm if together they are longer.

        Returns their norm before that (scalar), over all ranks where they are shared.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # the norm is that of the loss itself, not of the loss times the scale
        if self.guard.float16:
            self.guard.unscale(gradients)
        norm = parallel.total_norm(gradients)
        # a tensor, so that no GPU is waited for; 1e-6, because the norm may be 0
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([parallel.local(gradient) for gradient in gradients], factor)
        return norm

    def step(self, optimizer: torch.optim.Optimizer, lr: float, loss: Tensor,
             grad_norm: Tensor) -> bool:
        """One step of the optimizer at learning rate lr, unless it would do harm: then weights and
        optimizer stay as they are. Returns whether the step was taken.

        loss, grad_norm: what the update is judged by (plumbing/guard.py). Raises FloatingPointError
        when it was the MAX_SKIPPED-th harmful update in a row.
        """
        self.say_leap(lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        name = ""
        for part_name, part in self.parts.items():
            if part is optimizer:
                name = part_name
        # The mean over ranks, so that all of them decide alike. Reading it waits for the GPU, once
        # a step.
        judged = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        loss_value, norm_value = self.mean_over_ranks(judged)
        fault = self.guard.fault(name, loss_value, norm_value)
        if not fault:
            optimizer.step()
            return True
        if self.guard.gives_up(name):
            self.wait_for_checkpoint()
            raise FloatingPointError(f"step {self.current_step}: {fault}, and {MAX_SKIPPED} "
                                     "updates in a row were skipped for the like; "
                                     f"{checkpoints.way_back(self.out)}")
        self.say(f"step {self.current_step}: {fault}; this update is skipped")
        return False

    def due(self, step: int, every: int) -> bool:
        """True every `every` steps and after the last one."""
        return step + 1 == self.cfg.steps or every > 0 and (step + 1) % every == 0

    def log(self, step: int, *, tokens: int = 0, **figures) -> None:
        """Add this step's figures; every log_every steps their means become a row of metrics.jsonl.

        tokens: how many tokens this rank processed in this step (the row has the total so far).
        """
        self.metrics.add(tokens * self.replicas, figures)
        # every validation gets a row of its own, whenever it comes
        if not (step == 0 or self.due(step, self.cfg.log_every) or "val_loss" in figures):
            return
        row = self.metrics.row(step, self.guard.skipped, self.mean_over_ranks)
        if self.flops_per_token:
            flops_per_s = row["tokens_per_s"] / self.world_size * self.flops_per_token
            # a peak below that was measured while other processes were busy
            self.matmul_peak = max(self.matmul_peak, flops_per_s)
            row["mfu"] = flops_per_s / self.matmul_peak
        row["memory_gb"] = peak_memory(self.device) / 1e9
        self.metrics.last |= row
        if self.rank == 0:
            self.metrics.write(row)
            shown = {}
            for name in ("loss", "val_loss", "reward"):
                if name in row:
                    shown[name] = f"{row[name]:.3g}"
            self.bar.set_postfix(shown, refresh=False)

    def last(self, *names: str) -> dict[str, float]:
        """The newest values of these figures; None for one that was not finite."""
        return {name: self.metrics.last.get(name) for name in names}

    def last_with(self, *prefixes: str) -> dict[str, float]:
        """The newest values of all figures whose names begin like this."""
        return {name: value for name, value in self.metrics.last.items()
                if name.startswith(prefixes)}

    # ---- checkpoints

    def save_tokenizer(self, tokenizer) -> None:
        """As training begins, because --resume must find the tokenizer of its checkpoints."""
        self.tokenizer = tokenizer

    def track(self, **parts) -> None:
        """Name what a checkpoint holds (things with state_dict); with --resume load the newest
        that is whole.

        Raises ValueError when there are checkpoints but all are damaged, when the newest whole one
        holds other shapes or parts, for a finished model without any, and without --insist when
        what the run reads has changed.
        """
        self.parts = parts
        if self.cfg.host_state:
            for part in parts.values():
                if isinstance(part, torch.optim.Optimizer):
                    keep_on_host(part)
        folder = None
        if self.cfg.resume:
            folder, state = checkpoints.newest_whole(self.out, self.say)
            if folder is None and (self.out / "config.json").exists():
                raise ValueError(f"{self.out} holds a finished model, and no checkpoint to go on "
                                 "from; nothing was changed. --overwrite starts afresh, or give "
                                 "another --out")
        if folder is not None:
            checkpoints.load_parts(folder, parts, state)
            self.load_state(state)
            meta = checkpoints.read_meta(folder)
            if self.rank == 0:
                self.compare_inputs(meta)
            self.say(f"going on from step {self.first_step} ({folder})")
            for change in inputs.changes(meta, flat(self.cfg), self.conditions()):
                self.say(change)
            if meta["config"].get("steps") != self.cfg.steps:
                self.rate_before = self.metrics.last.get("lr", 0.0)

    def compare_inputs(self, meta: dict) -> None:
        """Raises ValueError when what the run reads is not what it began with; with --insist that
        is said, and recorded."""
        began = meta.get("inputs", {})                 # {} in checkpoints of former versions
        self.inputs = self.read_inputs(began)
        self.inputs_before = meta.get("inputs_before", [])
        changed = "; ".join(inputs.differences(began, self.inputs))
        if not changed:
            return
        if not self.cfg.insist:
            raise ValueError(f"{self.out} began with other inputs: {changed}. Put back what was "
                             "there; or give --insist to go on with what is there now, or "
                             "--overwrite to start afresh")
        self.say(f"{changed}: going on with it because of --insist")
        self.inputs_before = [*self.inputs_before, began]

    def conditions(self) -> dict:
        """What besides options and inputs decides how a run ends."""
        return {"ranks": self.world_size, "threads": torch.get_num_threads(),
                "dtype": str(self.dtype)}

    def read_inputs(self, known: dict) -> dict:
        """plumbing/inputs.py's description of what this run reads."""
        made = [] if self.tokenizer is None else [self.out / "tokenizer.json"]
        return inputs.read_by(self.cfg, made, known)

    def say_leap(self, lr: float) -> None:
        """A schedule of another length has another learning rate here."""
        if self.rate_before and not 0.8 < lr / self.rate_before < 1.25:
            self.say(f"the learning rate leaps from {self.rate_before:.2g} to {lr:.2g}, because "
                     "the schedule is of another number of steps")
        self.rate_before = 0.0

    def state(self, steps_done: int) -> dict:
        """Everything but the options that the run needs to go on. Collective: all ranks ask."""
        pending = [self.metrics.pending_state()]
        if self.world_size > 1:                               # each rank has figures of its own
            mine = pending[0]
            pending = [{}] * self.world_size
            dist.all_gather_object(pending, mine)
        gpu_rng = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        # a loss of an earlier step says nothing about these weights
        evaluated_now = self.metrics.evaluated == steps_done - 1
        val_loss = self.metrics.last.get("val_loss") if evaluated_now else None
        return {"step": steps_done, "tokens": self.metrics.tokens, "last": self.metrics.last,
                "threads": torch.get_num_threads(), "pending": pending,
                "rng": torch.get_rng_state(), "gpu_rng": gpu_rng,
                "val_loss": val_loss,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
                **self.guard.state_dict()}

    def load_state(self, state: dict) -> None:
        self.first_step = state["step"]
        self.metrics.tokens = state["tokens"]
        self.metrics.last = state["last"]
        self.metrics.load_pending(state["pending"], self.rank, self.world_size)
        self.guard.load_state_dict(state)
        torch.set_rng_state(state["rng"])
        # another number of threads would add numbers in another order, and end with other weights
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            threads = min(state.get("threads", ALL_THREADS), ALL_THREADS)
            torch.set_num_threads(threads)
        if self.device.type == "cuda" and state.get("gpu_rng") is not None:
            torch.cuda.set_rng_state(state["gpu_rng"])        # because noisy routers draw from it

    def save_checkpoint(self, steps_done: int) -> None:
        """Copy everything to CPU memory; a thread of rank 0, or of each rank where they share the
        weights, writes it to the disk while training goes on.

        Raises the error of the checkpoint before this one, as wait_for_checkpoint() does.
        """
        self.wait_for_checkpoint()
        if self.saved_step == steps_done:              # on all ranks alike
            return
        self.saved_step = steps_done
        state = self.state(steps_done)                 # on all ranks, because it gathers
        if self.writer.ranks is not None or self.rank == 0:
            meta = {"step": steps_done, "val_loss": state["val_loss"], "config": flat(self.cfg),
                    "parents": self.parents, "inputs": self.inputs,
                    "inputs_before": self.inputs_before, **self.conditions()}
            self.writer.start(state, checkpoints.modules_of(self.parts), meta)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on the disk; on all ranks, at the same point.

        Raises, on all of them, the error that kept it from being written: OSError (a full disk,
        say), or FloatingPointError when weights are not finite.
        """
        error = self.writer.error(wait=True)
        if self.mean_over_ranks(error is not None):
            raise error or OSError("another rank could not write its checkpoint, and says why")

    def finish(self, model: nn.Module, tokenizer, result: dict | None = None) -> dict:
        """Write the model folder and curves.png. Returns `result` with minutes and tokens_per_s.

        Raises OSError when the disk is full, FloatingPointError when hardly any update was good,
        and what wait_for_checkpoint() raises.
        """
        self.wait_for_checkpoint()
        self.guard.refuse_idle_run(self.out)
        rows = read_metrics(self.out)                  # also those from before a resume
        # the median, because rows with a validation or a checkpoint in them are slower
        speeds = sorted(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
        result = {"minutes": (time.perf_counter() - self.started) / 60,
                  "tokens_per_s": speeds[len(speeds) // 2] if speeds else None, **(result or {})}
        weights = parallel.whole_on_cpu(model.state_dict(), keep=self.rank == 0)
        if self.rank == 0:
            plot_curves(rows, self.out / "curves.png", self.name)
            versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                        "numpy": np.__version__}
            temporary = self.out / "model.safetensors.tmp"
            with checkpoints.room_for(temporary, list(weights.values())):
                folders.save_model(self.out, model, tokenizer, weights, stage=self.name,
                                   parents=self.parents, inputs=self.inputs,
                                   inputs_before=self.inputs_before, config=flat(self.cfg),
                                   seed=self.cfg.seed, result=result, versions=versions)
            claim.remove_old(self.out)
            claim.unlock(self.out)
        self.barrier()
        return result
