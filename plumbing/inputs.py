"""
What a run reads, and whether it is the same when the run goes on after a stop.

    {"init": [{"file", "bytes", "modified", "sha256"}, ...], "data": [...], ...}

kept in each checkpoint's meta.json and in config.json. --resume compares: another reference in the
middle of DPO, swapped labels or a new tokenizer for old weights would show in no figure.
"""
import hashlib
from functools import cache
from pathlib import Path

import readers
import shards
from plumbing.claim import sha256
from plumbing.folders import BASE_STAGES, lineage, models_of

WORLD = Path(readers.__file__).parent / "world"
# Options that name the world, a file, a folder, or several with commas.
DATA = ("data", "anneal_data", "prompts", "lm_data", "replay_data")
# Those of train_sft.py by which a run reads the text that --init was pretrained on (forgetting.py).
OLD_TEXT = ("ewc", "l2_to_base", "kl_to_base", "replay", "track_drift")

# Options that say nothing about how a run ends.
FREE = {"resume", "insist", "overwrite", "log_every", "eval_every", "save_every", "out", "device",
        "compile", "reward_model", "host_state"}
# What some changes do to a run that goes on; of the others their names say it.
ANOTHER = ", and the run will not end as one that was never stopped"
EFFECTS = {"steps": f": the learning rate follows a schedule of that length{ANOTHER}",
           "batch_size": f": a step reads so many rows{ANOTHER}",
           "ranks": f": a step reads the rows of so many ranks{ANOTHER}",
           "threads": ": sums are added in another order, and last digits differ",
           "dtype": f": matmuls round differently{ANOTHER}"}


def read_by(cfg, made: list[Path], known: dict) -> dict[str, list[dict]]:
    """What a stage with this config reads, by its options; "out": what it has made for itself.

    known: what read_by() gave when the run began, or {}. A file of the same size and time as then
    is taken for the same one; of others the whole content counts, so that a copied folder is the
    same.
    """
    files = {"out": made}
    for option, folders in models_of(cfg).items():
        files[option] = []
        for folder in folders:
            files[option] += [Path(folder) / "model.safetensors", Path(folder) / "tokenizer.json"]
    named = {option: getattr(cfg, option, "") for option in DATA}
    named["replay_data"] = old_text(cfg).get("data", "")
    for option, several in named.items():
        if several:
            files[option] = []
            for data in several.split(","):
                files[option] += files_of(data)

    found = {}
    for option, paths in files.items():
        before = {entry["file"]: entry for entry in known.get(option, [])}
        found[option] = [describe(path, before.get(str(path))) for path in paths
                         if isinstance(path, str) or path.exists()]
    return found


def old_text(cfg) -> dict:
    """The options of pretraining's data: --replay_data, else those of the stage that pretrained
    --init; {} where the stage reads no such text, and where no record names one."""
    if not any(getattr(cfg, option, 0) for option in OLD_TEXT):
        return {}
    if cfg.replay_data:
        return {"data": cfg.replay_data}
    for record in lineage(cfg.init):
        if record.get("stage") in BASE_STAGES:
            return record.get("config", {})
    return {}


def paths_read(cfg) -> list[tuple[str, str]]:
    """(option, path) of all that a stage reads."""
    found = []
    for option, folders in models_of(cfg).items():
        found += [(option, folder) for folder in folders]
    for option in (*DATA, "tokenizer"):
        found += [(option, path) for path in getattr(cfg, option, "").split(",") if path]
    return found


def files_of(data: str) -> list[Path | str]:
    """The files behind a --data; of shards their index, which has the others' checksums; of a world
    its name."""
    world = readers.world_named(data)
    if world is not None:
        return [f"world:{world.seed}"]
    path = Path(data)
    if path.is_dir() and shards.found(data):
        return [path / "index.json", path / "tokenizer.json"]
    if path.is_dir():
        return readers.files_below(path, readers.SUFFIXES)
    return [path]


def describe(path: Path | str, before: dict | None) -> dict:
    """An entry of read_by() for one file; a world's checksum is its name and that of its code."""
    if isinstance(path, str):
        return {"file": path, "bytes": 0, "modified": 0, "sha256": f"{path} {world_sum()}"}
    status = path.stat()
    entry = {"file": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}
    if before is not None and entry.items() <= before.items():
        return before
    return entry | {"sha256": sha256(path)}


@cache
def world_sum() -> str:
    """The checksum of world/: another task family or judge makes another world of the same seed."""
    sums = [sha256(file) for file in sorted(WORLD.glob("*.py"))]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def differences(began: dict, now: dict) -> list[str]:
    """What of a run's inputs is not as it was when the run began, one line each."""
    found = []
    for option, entries in sorted(began.items()):
        if option == "reward_model":                       # as former versions called it
            option = "reward"
        then = [entry["sha256"] for entry in entries]
        today = [entry["sha256"] for entry in now.get(option, [])]
        if then == today:
            continue
        changed = [entry["file"] for entry in now.get(option, []) if entry["sha256"] not in then]
        missing = [entry["file"] for entry in entries if entry["sha256"] not in today]
        if changed:
            what = f"{changed[0]} is not the one it was"
        elif missing:
            what = f"{missing[0]} is missing"
        else:
            what = "the files stand in another order"
        found.append(what if option == "out" else f"--{option}: {what}")
    return found


def changes(meta: dict, now: dict, conditions: dict) -> list[str]:
    """What else is not as it was, and what that does to a run that goes on, one line each.

    meta: of the checkpoint; now: the options, flat; conditions: of Run.conditions().
    """
    found = []
    for name in sorted(meta["config"].keys() & now.keys() - FREE):
        before = meta["config"][name]
        # former versions wrote 0 for these sizes, which are computed from others
        computed = before == 0 and name in ("n_kv_heads", "d_ff", "d_expert")
        if before != now[name] and not computed:
            found.append(f"the run began with --{name} {before}; from here on it is {now[name]}"
                         f"{EFFECTS.get(name, '')}")
    for name, value in conditions.items():
        before = meta.get(name, value)                 # former versions did not keep them
        if before != value:
            found.append(f"the run began with {name} {before}; from here on it is {value}"
                         f"{EFFECTS[name]}")
    return found
