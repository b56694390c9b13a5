"""
Whose a folder is: one run at a time writes to it, and nothing is removed that no run wrote.

    out/.lock          held by the operating system while a run writes here; a crash lets it go
    out/files.json     {"files": what runs wrote here, "set_aside": the folder of the former ones}

--overwrite moves the files of that list, and no others, to out.old; the run that moved them removes
them when its own model is written. Until then the earlier one is whole, in out.old.
"""
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:                            # Windows
    import msvcrt

LIST = "files.json"
LOCK = ".lock"
MOVING = "half of it"                          # "set_aside" of a folder that is still being filled
# What a checkpoint consists of when its own list, meta.json, cannot be read.
CHECKPOINT_FILES = ("meta.json", "state.pt", ".metadata")
CHECKPOINT_SUFFIXES = (".safetensors", ".distcp")
# The files of model folders that were written before there was a list.
FORMER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "curves.png",
                "adapter.json", "adapter.safetensors")

locks: dict[Path, IO] = {}                     # held by this process, by the folders' whole paths


# ---------------------------------------------------------------------- one writer

def lock(out: Path) -> None:
    """Keep all other processes from writing to `out`, which is made if it is not there.

    Raises ValueError when another process holds it, and when there is a file of that name.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {out}: {path} is a file; give a folder to write")
    out.mkdir(parents=True, exist_ok=True)
    file = out / LOCK
    mine = locks.get(out.resolve())
    # The file itself and not its name, because the folder may have been removed and made again.
    if mine is not None and file.exists() and os.path.samestat(os.fstat(mine.fileno()),
                                                               file.stat()):
        return
    unlock(out)
    opened = file.open("a")
    try:
        if os.name == "nt":
            msvcrt.locking(opened.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        opened.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise                              # a disk without locks, say
        raise ValueError(f"--out {out}: another run is writing there; wait until it has ended, or "
                         "give another folder") from None
    locks[out.resolve()] = opened


def unlock(out: Path) -> None:
    opened = locks.pop(out.resolve(), None)
    if opened is not None:
        opened.close()


# ---------------------------------------------------------------------- what runs wrote

def is_free(out: Path) -> bool:
    """Whether nothing is there yet, or the lock alone."""
    return not out.is_dir() or not any(entry.name != LOCK for entry in out.iterdir())


def written(out: Path) -> list[str]:
    """The files that runs wrote to `out`, and the folders of its checkpoints, relative to it.

    Folders of former versions have no list: there it is the usual names, if a run's record is
    among them. Raises ValueError for a list that cannot be read.
    """
    if (out / LIST).exists():
        return read_list(out)["files"]
    if not has_record(out):
        return []
    names = [name for name in FORMER_FILES if (out / name).exists()]
    steps = [path.parent for path in out.glob("checkpoints/step_*/meta.json")]
    return names + [f"checkpoints/{folder.name}" for folder in sorted(steps)]


def read_list(out: Path) -> dict:
    """files.json of a folder, as write_list() wrote it."""
    file = out / LIST
    try:
        found = json.loads(file.read_text())
        names = [Path(name) for name in found["files"]]
        Path(found["set_aside"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}), so nothing says "
                         f"which files of {out} are of a run; give another --out") from None
    for name in names:
        # Whatever a damaged list says, nothing outside the folder is touched.
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{file} is damaged: it names {name}; give another --out")
    return found


def write_list(out: Path, files: Iterable[str], set_aside: str) -> None:
    text = json.dumps({"files": sorted(set(files)), "set_aside": set_aside}, indent=1) + "\n"
    write_whole(out / LIST, lambda temporary: temporary.write_text(text))


def has_record(out: Path) -> bool:
    """Whether a run of a former version has left its config.json or a checkpoint here."""
    records = [out / "config.json", *out.glob("checkpoints/step_*/meta.json")]
    for file in records:
        try:
            if {"config", "parents"} <= read_json(file).keys():
                return True
        except (OSError, ValueError):
            continue
    return False


def add(out: Path, *names: str) -> None:
    """Put names on the folder's list, before the files are written."""
    known = [name for name in written(out)
             if (out / name).exists() or not name.startswith("checkpoints/")]      # removed since
    if not (out / LIST).exists() or not set(names) <= set(known):
        write_list(out, [*known, *names], set_aside_by(out))


def refuse_foreign(out: Path, names: Iterable[str]) -> None:
    """Raises ValueError for a file of these names that no run wrote."""
    known = written(out)
    for name in names:
        for file in (out / name, out / f"{name}.tmp"):
            if file.exists() and name not in known:
                raise ValueError(f"{file} was not written by a run, and this one would write over "
                                 "it; move it, or give another --out")


def check_new_file(option: str, file: str) -> None:
    """Raises ValueError when `file`, given as that option, cannot be written or would replace
    something."""
    if Path(file).exists():
        raise ValueError(f"{option} {file} is there already; remove it, or name another file")
    if not Path(file).parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {Path(file).parent}; make it first")


def set_aside_by(out: Path) -> str:
    """The name of the folder to which the run in `out` moved an earlier one; "" for none."""
    return read_list(out)["set_aside"] if (out / LIST).exists() else ""


# ---------------------------------------------------------------------- --overwrite

def old_folder(out: Path) -> Path:
    # resolved, because "." has no name
    return Path(f"{out.resolve()}.old")


def check_overwrite(out: Path) -> None:
    """Raises ValueError when an earlier run cannot be set aside."""
    old = old_folder(out)
    if old.exists():
        raise ValueError(f"{old} is there already: an --overwrite that has not finished keeps the "
                         f"run before it there. --resume finishes it; or move {old} away")
    written(out)                               # raises for a list that cannot be read


def set_aside(out: Path) -> None:
    """Move what runs wrote to `out` to out.old, file by file; all else stays where it is."""
    old = old_folder(out)
    names = written(out)
    # Its list is in it from the first moment, so that a kill never leaves one without.
    beginning = old.with_name(old.name + ".tmp")
    beginning.mkdir(exist_ok=True)
    write_list(beginning, names, MOVING)
    beginning.rename(old)
    move(names, out, old)
    write_list(out, [], old.name)
    write_list(old, names, "")


def move_back(out: Path) -> None:
    """Undo a set_aside() that was killed in the middle."""
    old = old_folder(out)
    if not (old / LIST).exists() or set_aside_by(old) != MOVING or set_aside_by(out) == old.name:
        return
    move(written(old), old, out)
    remove_marks(old)
    remove_empty(old)


def move(names: list[str], source: Path, target: Path) -> None:
    for name in names:
        for file in files_of(source, name):
            moved = target / file.relative_to(source)
            moved.parent.mkdir(parents=True, exist_ok=True)
            file.rename(moved)
        remove_empty(source / name)
    remove_empty(source / "checkpoints")


def remove_old(out: Path) -> None:
    """Remove what this folder's run has set aside, now that its own model is written."""
    old = old_folder(out)
    # Another name where the folder was renamed or copied since: that one's is not this one's.
    if set_aside_by(out) != old.name:
        return
    if old.is_dir():
        remove_written(old)
        remove_marks(old)
        remove_empty(old)                      # it stays if somebody has put something there
    write_list(out, written(out), "")


def remove_marks(out: Path) -> None:
    """Remove what says whose a folder is, once nothing of a run is left in it."""
    for name in (LOCK, LIST, f"{LIST}.tmp"):
        (out / name).unlink(missing_ok=True)


def remove_written(out: Path) -> None:
    """Remove what runs wrote to `out`, file by file."""
    for name in written(out):
        for file in files_of(out, name):
            file.unlink()
        remove_empty(out / name)
    remove_empty(out / "checkpoints")


def files_of(out: Path, name: str) -> list[Path]:
    """The files behind a name of the list: itself, half-written too, or those of a checkpoint."""
    path = out / name
    if path.is_dir():
        return checkpoint_files(path)
    return [file for file in (path, path.with_name(path.name + ".tmp")) if file.is_file()]


def checkpoint_files(folder: Path) -> list[Path]:
    """The files in a checkpoint's folder that are of a checkpoint, by their names."""
    return [file for file in sorted(folder.iterdir()) if file.is_file()
            and (file.name in CHECKPOINT_FILES or file.suffix in CHECKPOINT_SUFFIXES)]


def remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def number(folder: Path) -> Path:
    """Rename a folder to the first of folder.1, folder.2, ... that is free, and return that."""
    n = 1
    while Path(f"{folder}.{n}").exists():
        n += 1
    return folder.rename(f"{folder}.{n}")


# ---------------------------------------------------------------------- files, whole or not at all

def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """write(a temporary file), which then takes the place of `file`: a kill or a power cut at any
    moment leaves the former one or the new one, whole."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.unlink(missing_ok=True)          # of a run that was killed
    temporary.touch()
    mode = temporary.stat().st_mode            # what this user lets others do with new files
    try:
        write(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Again, because safetensors lets nobody but the owner read its files.
    temporary.chmod(mode)
    fsync(temporary)
    temporary.replace(file)
    fsync(file.parent)


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else in it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"{file} is damaged ({reason})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds {type(found).__name__} and no object")
    return found


def sha256(file: Path) -> str:
    """The checksum of a file, read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():      # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
