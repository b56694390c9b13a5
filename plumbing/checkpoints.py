"""
Checkpoints: everything that a run needs to go on, written whole or not at all.

    out/checkpoints/step_000200/
      model.safetensors, ...   fp32 weights of each model; of weights shared among ranks the parts
      state.pt                 optimizers, random numbers, history (read with weights_only=True)
      meta.json                step, options, parents, checksums of the files and of itself; last

A folder is written under a temporary name, flushed to the disk (fsync) and renamed, so that a kill
at any moment leaves the checkpoints before it as they were. The newest KEEP and the best stay.
"""
import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import parallel
from plumbing import claim
from plumbing.claim import read_json, sha256
from plumbing.folders import current_names, sha256_of

KEEP = 2


# ---------------------------------------------------------------------- finding and reading

def checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints in a model folder, damaged ones too, in the order of their steps."""
    # by number and not by name, because step_1000000 sorts before step_999999
    folders = {}
    for folder in Path(out).glob("checkpoints/step_*"):
        step = folder.name.removeprefix("step_")
        if step.isdecimal() and not is_foreign(folder):
            folders[int(step)] = folder
    return [folders[step] for step in sorted(folders)]


def is_foreign(folder: Path) -> bool:
    """Whether somebody else's files are all that a folder holds, as --overwrite may leave one."""
    return folder.is_dir() and any(folder.iterdir()) and not claim.checkpoint_files(folder)


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint; {} when it cannot be read, or is no such record."""
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError):
        return {}
    known = meta.pop("meta_sha256", None)              # None in checkpoints of former versions
    if known is not None and known != sha256_of(meta):
        return {}
    kinds = {"step": int, "config": dict, "sha256": dict, "parents": dict}
    if all(isinstance(meta.get(name), kind) for name, kind in kinds.items()):
        return meta
    return {}


def newest_checkpoint(out: str | Path) -> Path | None:
    """The checkpoint with the most steps whose meta.json can be read."""
    for folder in reversed(checkpoints(out)):
        if read_meta(folder):
            return folder
    return None


def read_checkpoint(folder: Path) -> dict:
    """state.pt of a checkpoint. Raises ValueError when a file is not what was written."""
    # meta.json is written last: without it no file can be trusted
    checksums = read_meta(folder).get("sha256", {"meta.json": "unreadable"})
    for name, checksum in checksums.items():
        file = folder / name
        if not file.exists() or sha256(file) != checksum:
            raise ValueError(f"{file} is damaged (its checksum differs)")
    return torch.load(folder / "state.pt", weights_only=True)


def newest_whole(out: Path, say: Callable[[str], None]) -> tuple[Path | None, dict]:
    """The newest checkpoint that is whole, and its state; (None, {}) where there is none at all.
    Damaged ones are named.

    Raises ValueError when there are checkpoints but all of them are damaged.
    """
    damaged = []
    for folder in reversed(checkpoints(out)):
        try:
            return folder, read_checkpoint(folder)
        except ValueError as error:
            say(f"{error}; going back to the checkpoint before it")
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"no checkpoint is whole: {'; '.join(damaged)}; give --overwrite "
                         "to start afresh, or another --out")
    return None, {}


def load_parts(folder: Path, parts: dict, state: dict) -> None:
    """Load the checkpoint's weights and states into `parts` (models, optimizers, ...) by name.

    Raises ValueError when they have other shapes or other parts.
    """
    states = state["parts"]
    if (folder / ".metadata").exists():                   # each rank has written its own share
        states = parallel.load_parts(states, parts, folder)
    for name, part in parts.items():
        weights = weights_file(folder, name)
        try:
            if weights.exists():
                saved = safetensors.torch.load_file(weights)
            else:
                saved = states[name]
            if isinstance(part, nn.Module):
                saved = current_names(saved)              # heads once had other names
            parallel.load(part, saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: its {name} is not the one of this run; --resume takes "
                             f"the options the run was started with ({error})") from error


def weights_file(folder: Path, name: str) -> Path:
    """The file of a model's weights. DPO of former versions called its "model" the "policy"."""
    file = folder / f"{name}.safetensors"
    former = folder / "policy.safetensors"
    if name == "model" and former.exists():
        return former
    return file


# ---------------------------------------------------------------------- writing

class Writer:
    """Writes one checkpoint at a time in a thread, while training goes on.

    ranks: the process group of all ranks where the weights are shared among them, so that each
    writes its own share; None where rank 0 holds everything.
    """

    def __init__(self, out: Path):
        self.out = out
        self.ranks: dist.ProcessGroup | None = None
        self.writing: Future | None = None

    def start(self, state: dict, models: list[str], meta: dict) -> None:
        """Copy the state to CPU memory and begin to write it. models: the names of the modules
        among state["parts"]."""
        copy = parallel.parts_on_cpu(state)
        # A new thread for each checkpoint, because a thread that stayed would keep OpenMP workers,
        # and with more workers than cores OpenMP lets all of them sleep between operations: the
        # steps after the first checkpoint would take nearly twice as long.
        thread = ThreadPoolExecutor(1)
        self.writing = thread.submit(self.write, copy, models, meta)
        thread.shutdown(wait=False)

    def error(self, wait: bool) -> BaseException | None:
        """The exception of the last checkpoint, if it has failed. wait: until it is written."""
        if self.writing is None or not (wait or self.writing.done()):
            return None
        return self.writing.exception()

    def write(self, state: dict, models: list[str], meta: dict) -> None:
        """checkpoints/step_N: a temporary folder, fsync, rename, fsync.

        Raises FloatingPointError when weights are not finite, OSError when the disk is full.
        """
        final = self.out / "checkpoints" / f"step_{state['step']:06d}"
        temporary = final.with_name(final.name + ".tmp")
        self.refuse_damage(state, models)
        with room_for(temporary, tree_leaves(state)):
            if self.ranks is not None:
                state["parts"] = parallel.save_parts(state["parts"], temporary, self.ranks)
                if dist.get_rank() > 0:
                    return
            else:
                temporary.mkdir(parents=True)
                for name in models:
                    weights = state["parts"].pop(name)
                    weights = {key: tensor.contiguous() for key, tensor in weights.items()}
                    safetensors.torch.save_file(weights, temporary / f"{name}.safetensors")
            torch.save(state, temporary / "state.pt")
            checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
            meta = meta | {"sha256": checksums}
            meta["meta_sha256"] = sha256_of(meta)
            (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
            for path in (*temporary.iterdir(), temporary):
                claim.fsync(path)
            # The rows that the checkpoint goes on from, too, and its tokenizer. By name, because
            # the main thread may be writing other files of the folder.
            for path in (self.out / "metrics.jsonl", self.out / "tokenizer.json"):
                if path.exists():
                    claim.fsync(path)
            claim.add(self.out, f"checkpoints/{final.name}")
        remove(final)                                         # a damaged one of the same step
        temporary.rename(final)
        for folder in (final.parent, self.out):               # the new name reaches the disk, too
            claim.fsync(folder)
        prune_checkpoints(self.out)

    def refuse_damage(self, state: dict, models: list[str]) -> None:
        """Raises FloatingPointError, on all ranks alike, when a weight is not finite."""
        damaged = 0
        for name in models:
            for weight in state["parts"][name].values():
                damaged += int(not parallel.local(weight).isfinite().all())
        damaged = torch.tensor(damaged)
        if self.ranks is not None:
            dist.all_reduce(damaged, group=self.ranks)
        if damaged:
            raise FloatingPointError(f"after step {state['step'] - 1} the weights are not finite; "
                                     f"{way_back(self.out)}")


def way_back(out: Path) -> str:
    """What a user can do about a run that has gone wrong."""
    newest = newest_checkpoint(out)
    if newest is None:
        kept = "No checkpoint was made yet"
    else:
        kept = f"{newest} is the last good checkpoint"
    return f"{kept}; try a lower --lr or --dtype float32"


def prune_checkpoints(out: Path) -> None:
    """Keep the newest KEEP and, of the evaluated ones, the one with the lowest validation loss.

    A checkpoint without a readable meta.json is neither counted nor removed.
    """
    losses = {}
    for folder in checkpoints(out):
        if meta := read_meta(folder):
            losses[folder] = meta.get("val_loss")
    evaluated = {folder: loss for folder, loss in losses.items() if loss is not None}
    best = min(evaluated, key=evaluated.get, default=None)     # the lowest validation loss
    for folder in list(losses)[:-KEEP]:
        if folder != best and is_own(folder):
            # renamed first, because a kill in between must not leave half of a checkpoint
            doomed = folder.rename(folder.with_name(folder.name + ".tmp"))
            remove(doomed)


def is_own(folder: Path) -> bool:
    """Whether nothing but a checkpoint is in the folder."""
    return len(claim.checkpoint_files(folder)) == len(list(folder.iterdir()))


def remove(folder: Path) -> None:
    """Remove the checkpoint in a folder, and the folder. Somebody else's files in it stay, in
    folder.1 or the first such name that is free."""
    if not folder.is_dir():
        return
    for file in claim.checkpoint_files(folder):
        file.unlink()
    claim.remove_empty(folder)
    if folder.exists():
        claim.number(folder)


def remove_unfinished(out: Path) -> None:
    """Remove what a killed run was writing."""
    for folder in out.glob("checkpoints/step_*.tmp"):
        if folder.is_dir() and is_own(folder):
            remove(folder)


@contextlib.contextmanager
def room_for(path: Path, parts: list) -> Iterator[None]:
    """Write the tensors among `parts` to `path` or nothing: after an error nothing is left of it.

    Raises OSError with sizes and the way out when the disk is full, else the error itself.
    """
    try:
        yield
    except Exception as error:                 # torch and safetensors raise their own for this
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        # sizes, because "No space left on device" does not say how much is missing
        size = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        existing = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(existing).free
        disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if free > size and not disk_full:
            raise
        raise OSError(f"{path}: no space left on the disk; {size / 1e6:.1f} MB are needed, "
                      f"{free / 1e6:.1f} MB are free. What was saved before is still there: "
                      "make room, then go on with --resume") from error


def modules_of(parts: dict) -> list[str]:
    """The names of the models among the parts of a run."""
    return [name for name, part in parts.items() if isinstance(part, nn.Module)]
