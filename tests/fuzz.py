"""
Random damage to options, rows, folders and moments of death, judged by comparison with the
undamaged run.

    python tests/fuzz.py --seconds 900 --seed 0 --log out/fuzz.jsonl    # tries add up in the log

Each try is a process, forked after the imports, in a fresh copy of one folder: a corpus, rows,
models, and of every stage a finished run and one that was stopped in the middle. What is found:

    lost       a byte of an earlier result is in no file any more
    silent     exit code 0, other weights than the undamaged run's, no line that names the damage
    traceback  an exception that is no clear line, or no end within a minute

Damage is what a check can know: syntax, type, range, missing or cut parts, anything under a
checksum. Another letter in a text, or another valid value, is none.
"""
import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killed import die_at_file
from stages import EVERY_STAGE, INPUTS, STAGES, Killed, run, write_inputs
from tiny_runs import make_runs_quick

import convert
import lora
import sample
import shards
import train_pretrain
from plumbing import options
from plumbing.run import Run

MINUTE = 60
KINDS = ("option", "row", "model", "checkpoint", "death", "command")
NONSENSE = ("", "x", "[]", "{}", "3", "null", "true", "[" * 5000, '{"a": ', '{"model": []}',
            '{"step": "x"}', "\ufffd", "NaN")


CPU = ["--device=cpu", "--dtype=float32"]
# Commands that are no stages: the script, its options, the folders whose files are damaged, and
# what comes out: files of a folder, or what is said ("").
COMMANDS = {
    "sample": (sample, ["--init=@/sft_whole", "--prompt=what is 3 and one?", "--max_new_tokens=4",
                        *CPU], ("sft_whole",), ""),
    "raw": (sample, ["--init=@/pretrain_whole", "--prompt=3 bears and", "--raw",
                     "--max_new_tokens=4", *CPU], ("pretrain_whole",), ""),
    "merge": (lora, ["--init=@/sft", "--adapter=@/lora_whole", "--out=@/merged"],
              ("sft", "lora_whole"), "merged/model.safetensors"),
    "shards": (shards, ["--data=@/documents.jsonl", "--tokenizer=bytes", "--workers=1",
                        "--shard_tokens=500", "--out=@/new_shards"], ("documents.jsonl",),
               "new_shards/train_00001.bin"),
    "overwritten shards": (shards, ["--data=@/documents.jsonl", "--tokenizer=bytes",
                                    "--workers=1", "--shard_tokens=700", "--out=@/shards",
                                    "--overwrite"], ("documents.jsonl",),
                           "shards/train_00001.bin"),
    "verify": (shards, ["--verify=@/shards"], ("shards",), ""),
    "from shards": (train_pretrain, ["--data=@/shards", "--out=@/new", "--d_model=16",
                                     "--n_layers=1", "--n_heads=2", "--context_length=32",
                                     "--batch_size=2", "--steps=3", "--eval_windows=2", *CPU],
                    ("shards",), "new/model.safetensors"),
    "to hf": (convert, ["--init=@/sft_whole", "--out=@/new_hf", "--to=hf"], ("sft_whole",),
              "new_hf/model.safetensors"),
    "from hf": (convert, ["--init=@/hf", "--out=@/new"], ("hf",), "new/model.safetensors"),
    "from gguf": (convert, ["--init=@/model.gguf", "--out=@/new"], ("model.gguf",),
                  "new/model.safetensors")}
# Models from elsewhere have no checksums: a flipped bit in their weights is another valid value.
WITHOUT_SUMS = ("from hf", "from gguf")


# ---------------------------------------------------------------------- the undamaged folder

def prepare(folder: Path) -> dict[str, bytes]:
    """Inputs and, of each stage, STAGE_whole (finished) and STAGE_half (stopped). Returns what
    undamaged stages and commands give."""
    write_inputs(folder)
    weights = {}
    save = Run.save_checkpoint
    for stage in STAGES:
        run(folder, stage, stage + "_whole")
        weights[stage] = (folder / f"{stage}_whole" / "model.safetensors").read_bytes()

        def stopping(self, done):
            save(self, done)
            self.wait_for_checkpoint()
            if done == 4:
                raise Killed
        Run.save_checkpoint = stopping
        with contextlib.suppress(Killed):
            run(folder, stage, stage + "_half")
        Run.save_checkpoint = save
    in_child(folder, shards, [*(option.replace("@", str(folder)) for option in
                                COMMANDS["shards"][1][:-1]), f"--out={folder}/shards"])
    for to, name in (("hf", "hf"), ("gguf", "model.gguf")):
        in_child(folder, convert, [f"--init={folder}/sft_whole", f"--out={folder}/{name}",
                                   f"--to={to}"])
    for name, (script, given, _, result) in COMMANDS.items():
        with tempfile.TemporaryDirectory() as place:
            at = Path(place) / "at"
            shutil.copytree(folder, at)
            argv = [option.replace("@", str(at)) for option in given]
            end, said = in_child(at, script, argv)
            assert end == "0", f"{name} fails undamaged: {said}"
            weights[name] = outcome(at, result, said)
    return weights


def outcome(folder: Path, result: str, said: str) -> bytes:
    if result:
        return (folder / result).read_bytes()
    lines = [line for line in said.replace(str(folder), "@").splitlines() if "%|" not in line]
    return "\n".join(lines).encode()                        # without progress bars and their times


def arguments(folder: Path, stage: str, out: str, **more) -> list[str]:
    """The command line of a stage in this folder."""
    _, given = STAGES[stage]
    given = EVERY_STAGE | given | {"out": str(folder / out)}
    for name in INPUTS:
        if name in given:
            given[name] = str(folder / given[name])
    return [f"--{name}={value}" for name, value in (given | more).items()]


# ---------------------------------------------------------------------- damage

def damage_file(rng: random.Random, file: Path, sums: bool = True) -> str:
    """Cut, empty, remove or replace a file, or, where there are checksums, flip a bit; returns what
    was done."""
    raw = file.read_bytes()
    ways = ["cut", "empty", "remove", "folder", "nonsense", "field"]
    how = rng.choice(ways + ["flip"] * sums)
    if how == "field" and file.suffix == ".json":
        return damage_field(rng, file)
    if how == "cut" and len(raw) > 1:
        file.write_bytes(raw[:rng.randrange(1, len(raw))])
    elif how == "empty":
        file.write_bytes(b"")
    elif how in ("remove", "folder"):
        file.unlink()
        if how == "folder":
            file.mkdir()
    elif how == "nonsense" or not sums:
        file.write_text(rng.choice(NONSENSE))
    else:
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
    return how


def damage_field(rng: random.Random, file: Path) -> str:
    """Remove a field of a JSON file, anywhere in it, or give it a value of another type."""
    saved = json.loads(file.read_text())
    at = saved
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.6:
            at = inner
            continue
        if rng.random() < 0.4:
            del at[key]
        else:
            at[key] = rng.choice([value for value in (None, [], {}, "x", -1, 10 ** 9, 1.5)
                                  if type(value) is not type(inner)])
        file.write_text(json.dumps(saved))
        return f"field {key}"


def forget_sums(folder: Path) -> None:
    """A model folder as former versions wrote it: without checksums."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(config))


def damage_row(rng: random.Random, file: Path) -> str:
    lines = file.read_bytes().splitlines()
    i = rng.randrange(len(lines))
    how = rng.choice(("cut", "bytes", "type", "lacks", "twice", "nested", "list", "blanks"))
    if file.suffix != ".jsonl":
        how = "bytes"
    row = json.loads(lines[i]) if file.suffix == ".jsonl" else {}
    name = rng.choice(list(row) or [""])
    if how == "cut":
        lines[i] = lines[i][:rng.randrange(1, len(lines[i]))]
    elif how == "bytes":
        lines[i] = b"\xff\xfe" + lines[i]
    elif how == "type":
        lines[i] = json.dumps(row | {name: rng.choice((3, None, [], {}, True))}).encode()
    elif how == "lacks":
        lines[i] = json.dumps({key: row[key] for key in row if key != name}).encode()
    elif how == "twice":
        lines[i] = lines[i][:-1] + b', "' + name.encode() + b'": "again"}'
    elif how == "nested":
        lines[i] = b"[" * 5000 + b"]" * 5000
    elif how == "list":
        lines[i] = json.dumps([row]).encode()
    else:
        lines[i] = json.dumps(row | {name: " " * 1_200_000 + "x"}).encode()
    file.write_bytes(b"\n".join(lines) + b"\n")
    return how


# ---------------------------------------------------------------------- one try

def in_child(folder: Path, script, argv: list[str], die_at: int = 0) -> tuple[str, str]:
    """How the command ended ("0", "1", ..., "killed", "traceback", "hangs"), and what it said."""
    said = folder / "said.txt"
    pid = os.fork()
    if pid == 0:
        code = 99
        with said.open("w") as file, contextlib.redirect_stderr(file), \
                contextlib.redirect_stdout(file):
            os.dup2(file.fileno(), 2)                      # what Rust prints, too
            sys.argv = [f"{script.__name__}.py", *argv]
            try:
                if die_at:
                    die_at_file(die_at, str(folder))
                options.command_line(script.main, script.Config, "",
                                     getattr(script, "PRESETS", None))
                code = 0
            except SystemExit as end:
                code = end.code
                if not isinstance(code, int):
                    print(code, file=file)
                    code = 1 if code else 0
            except BaseException:
                traceback.print_exc(file=file)
            file.flush()
        os._exit(code)
    deadline = time.monotonic() + MINUTE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs", said.read_text(errors="replace")
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    end = {99: "traceback", -9: "killed"}.get(code, str(code))
    return end, said.read_text(errors="replace")


def contents(*folders: Path) -> Counter:
    """How many files have which content; those that say whose a folder is are no results."""
    found = Counter()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and file.name not in ("files.json", ".lock"):
                found[file.read_bytes()] += 1
    return found


def is_new_run(out: Path, seed: int) -> bool:
    try:
        return json.loads((out / "config.json").read_text())["seed"] == seed
    except (OSError, ValueError, KeyError, TypeError):
        return False


def try_command(rng: random.Random, base: Path, undamaged: dict[str, bytes]) -> tuple:
    name = rng.choice(list(COMMANDS))
    script, given, places, result = COMMANDS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "at"
        shutil.copytree(base, folder)
        at = folder / rng.choice(places)
        file = at
        if at.is_dir():
            file = rng.choice([file for file in sorted(at.glob("*.*")) if file.is_file()
                               and file.name not in (".lock", "metrics.jsonl")])
        if at.suffix == ".jsonl":
            what = damage_row(rng, file)
        else:
            what = damage_file(rng, file, name not in WITHOUT_SUMS)
        tried = f"command {name}: {file.relative_to(folder)}: {what}"
        before = contents(folder / "shards")
        argv = [option.replace("@", str(folder)) for option in given]
        end, said = in_child(folder, script, argv)
        tried += f" -> {end}"
        if end in ("traceback", "hangs"):
            return tried, "traceback", said
        if end != "0" and before - contents(folder / "shards"):
            return tried, "lost", said
        if end == "0" and outcome(folder, result, said) != undamaged[name] \
                and not names(said, file.name):
            return tried, "silent", said
        return tried, "", said


def one_try(rng: random.Random, base: Path, weights: dict[str, bytes]) -> tuple[str, str, str]:
    """(what was tried, what was found or "", what was said)."""
    kind = rng.choice(KINDS)
    if kind == "command":
        return try_command(rng, base, weights)
    stage = rng.choice(list(STAGES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "at"
        shutil.copytree(base, folder)
        given = STAGES[stage][1]
        out = folder / f"{stage}_half"
        # Rows that are skipped, and options, are damage to a run that starts afresh.
        more = {"resume": True}
        if kind in ("option", "row", "model") or kind == "death":
            out = folder / f"{stage}_whole"
            more = {"overwrite": True, "seed": 1} if kind == "death" else {"overwrite": True}
        die_at = 0
        if kind == "option":
            script = STAGES[stage][0]
            numbers = [option.name for option in options.options_of(script.Config)
                       if isinstance(option.default, (int, float))
                       and not isinstance(option.default, bool)
                       and option.name not in ("tau", "no_end_score")]
            named = rng.choice(numbers)
            value = rng.choice((math.nan, math.inf, -math.inf, -1, -1e9))
            more[named] = value
            what = f"--{named} {value}"
        elif kind == "row":
            option = "data" if "data" in given else "prompts"
            file = folder / given[option]
            named = file.name
            what = f"{named}: {damage_row(rng, file)}"
        elif kind == "model":
            models = [given[option] for option in ("init", "reward_model") if option in given]
            if not models:
                return f"{stage} has no model", "", ""
            file = rng.choice(sorted((folder / rng.choice(models)).glob("*.*")))
            named = file.name
            if rng.random() < 0.3:
                forget_sums(file.parent)
            what = f"{file.relative_to(folder)}: {damage_file(rng, file)}"
        elif kind == "checkpoint":
            file = rng.choice([file for file in sorted(out.rglob("*"))
                               if file.is_file() and file.name not in (".lock", "metrics.jsonl")])
            named = file.name
            what = f"{file.relative_to(folder)}: {damage_file(rng, file)}"
        else:
            named = "death"
            die_at = rng.randint(1, 250)
            what = f"death at {die_at}"
        before = contents(out)
        argv = arguments(folder, stage, out.name, **more)
        end, said = in_child(folder, STAGES[stage][0], argv, die_at)
        tried = f"{kind} {stage}: {what} -> {end}"
        if end in ("traceback", "hangs"):
            return tried, "traceback", said
        after = contents(out, out.with_name(out.name + ".old"))
        finished = end == "0" or is_new_run(out, 1)
        if more.get("overwrite") and not finished and before - after:
            return tried, "lost", said
        if kind == "checkpoint" and end != "0" and before - contents(out):
            return tried, "lost", said
        if end == "0" and kind != "death":
            same = (out / "model.safetensors").read_bytes() == weights[stage]
            if not same and not names(said, named):
                return tried, "silent", said
        return tried, "", said


def names(said: str, what: str) -> bool:
    """Whether a line names the damage: the file, the folder of a checkpoint, or the option; or says
    that a folder of a former version has no checksums to know it by."""
    return any(word in said for word in (what, "damaged", "skipped", "no checksums"))


def main(seconds: float, seed: int, log: Path) -> Counter:
    make_runs_quick()
    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            weights = prepare(base)
        torch.optim.SGD([torch.zeros(1)])                  # imports half of torch: once
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            tried, found, said = one_try(rng, base, weights)
            entry = {"tried": tried, "found": found}
            if found:
                entry["said"] = said[-600:]
                print(f"{found}: {tried}\n    {said.strip().splitlines()[-1:]}", flush=True)
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
    return total(log)


def total(log: Path) -> Counter:
    found = Counter()
    for line in log.read_text().splitlines():
        found["tries"] += 1
        if kind := json.loads(line)["found"]:
            found[kind] += 1
    print(", ".join(f"{found[name]:,} {name}" for name in ("tries", "lost", "silent",
                                                           "traceback")))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("out/fuzz.jsonl"))
    given = parser.parse_args()
    main(given.seconds, given.seed, given.log)
