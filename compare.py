"""
A person compares two answers to each prompt in the terminal (001 section 4.3: preference data).

  1. PROMPT     the next whose pair of answers has no judgement in --out
  2. ANSWERS    of two models, two samples of one model, or those that a file of pairs has
  3. SHOW       both, in an order drawn for the pair: the person does not know whose is whose
  4. JUDGE      1, 2 or =; with --axes true on each of 001's four axes, then overall
  5. SAVE       a row at once, so that a kill loses nothing; the same command goes on

    {"prompt": messages, "chosen": text, "rejected": text, "chosen_from": "out/ppo",
     "rejected_from": "out/sft", "row": "world prompts[3]", "axes": {"helpful": 1, "honest": -1}}

On an axis 1 says that the chosen answer is better, -1 that the rejected one is, 0 neither. --out is
data for train_rm.py and train_dpo.py. They would refuse a tie, because it is no preference, but an
agreement counts it: ties go to a second file, OUT.ties, with "first" and "second" in the place of
"chosen" and "rejected". Its name does not end in .jsonl, so that no stage reads it.
With the models of PPO and SFT this is 4.12's human evaluation, which says when PPO is to stop. The
world's prompts are those of training; --prompts FILE asks others.

    python compare.py --init out/sft,out/ppo --out pairs.jsonl           # answers of two models
    python compare.py --init out/sft --prompts prompts.jsonl --out pairs.jsonl       # two samples
    python compare.py --data answers.jsonl --out pairs.jsonl             # chosen and rejected
    python compare.py --agreement anna.jsonl,bert.jsonl                  # do two people agree?
"""
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

import readers
from data import encode_prompts
from plumbing import claim
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import INTERRUPTED, command_line
from sample import respond

AXES = ("helpful", "harmless", "honest", "coherent")
KEYS = {"1": 1, "2": -1, "=": 0}
NEITHER = "neither"                   # is better: a tie
# The fields of a saved row, by which readers.format_of() tells a preference from a tie.
PREFERENCE = ("prompt", "chosen", "rejected", "chosen_from", "rejected_from")
TIE = ("prompt", "first", "second", "first_from", "second_from")


@dataclass
class Config:
    init: str = ""                    # a model folder, or two with a comma
    prompts: str = "world"            # what they answer: JSONL, a folder, world or world:SEED
    data: str = ""                    # pairs, chosen and rejected, in the place of --init
    out: str = ""                     # file to write or to go on with: .jsonl
    agreement: str = ""               # two such files with a comma, which are only read
    axes: bool = False                # judge helpful, harmless, honest and coherent as well
    n: int = 100                      # prompts or pairs, at most, >= 1
    max_new_tokens: int = 64          # longest answer, in tokens, >= 1
    temperature: float = 1.0          # 0: greedy; 1: the model's own distribution
    seed: int = 0                     # of prompts, answers and sides, in [0, 4e9]
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


class Pair(NamedTuple):
    row: str                          # where its prompt stands: prompts.jsonl:3
    prompt: list[dict]                # messages
    answers: list[str]
    sources: list[str]                # whose they are: model folders, or "chosen", "rejected"


# ---------------------------------------------------------------------- two answers to a prompt

def identity(prompt: list[dict], answers: Sequence[str]) -> str:
    """The same for a prompt and two answers, whichever of them comes first."""
    return json.dumps([prompt, sorted(answers)])


def drawn_order(pair: str, seed: int) -> list[str]:
    """The answers of an identity(), in an order that hangs on the pair and the seed alone, because
    it must not matter where a person stopped."""
    _, answers = json.loads(pair)
    Random(f"{seed} {pair}").shuffle(answers)
    return answers


def is_preference(pair: Pair) -> bool:
    """Whether stages would read a judgement of it: not of equal answers, nor of an empty one."""
    try:
        readers.parse_preference(dict(zip(PREFERENCE, [pair.prompt, *pair.answers])))
    except ValueError:
        return False
    return True


def file_pairs(cfg: Config) -> list[Pair]:
    rows = readers.read_preferences(cfg.data, cfg.n, seed=cfg.seed)
    return [Pair(row["where"], row["prompt"], [row["chosen"], row["rejected"]],
                 ["chosen", "rejected"]) for row in rows]


def sampled_pairs(cfg: Config) -> Iterator[Pair]:
    """An answer of each model, or two of one, which are generated when their turn has come."""
    folders = cfg.init.split(",")
    if len(folders) > 2:
        raise ValueError(f"--init {cfg.init}: give one model folder, or two with a comma")
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    rows = readers.read_prompts(cfg.prompts, cfg.n, seed=cfg.seed)
    models = []
    for folder in folders:
        model, tokenizer = load_model(folder, device, dtype)
        room = model.config.context_length - cfg.max_new_tokens
        rows, _ = encode_prompts(rows, tokenizer, room, "drop")
        models.append((model, tokenizer))
    if len(folders) == 1:
        folders *= 2
        models *= 2
    return (Pair(row["where"], row["messages"], sampled(models, row["messages"], cfg), folders)
            for row in rows)


def sampled(models: list[tuple], prompt: list[dict], cfg: Config) -> list[str]:
    """An answer of each model. The seed is the prompt's own, and no other prompt is in the batch,
    because who goes on, or gives a larger --n, must find the same answers."""
    seed = zlib.crc32(f"{cfg.seed} {json.dumps(prompt)}".encode())
    generator = torch.Generator(models[0][0].device).manual_seed(seed)
    answers = []
    for model, tokenizer in models:
        answers += respond(model, tokenizer, [prompt], cfg.max_new_tokens,
                           temperature=cfg.temperature, generator=generator)
    return answers


# ---------------------------------------------------------------------- the file of judgements

def saved_row(pair: Pair, shown: list[str], verdicts: dict[str, int]) -> dict:
    """The row to save. verdicts: 1 where the first answer is better as they were shown."""
    names = PREFERENCE if verdicts["overall"] else TIE
    first, second = shown
    sign = 1
    if verdicts["overall"] == -1:
        # the second is chosen: the axes are turned round, because they are seen from there
        second, first = shown
        sign = -1
    source = dict(zip(pair.answers, pair.sources))
    row = dict(zip(names, [pair.prompt, first, second, source[first], source[second]]))
    row["row"] = pair.row
    if len(verdicts) > 1:
        row["axes"] = {axis: sign * verdicts[axis] for axis in AXES}
    return row


def parse_judgement(row: dict) -> dict:
    """A saved row -> {"pair": its identity(), "better": whose answer, "labels": {"overall": 1}}.

    A label is 1 or -1, 0 for neither, of "overall" and the axes. The answer that counts as 1 is the
    first of those that --seed 0 shows, because people who only ever choose the first must agree by
    chance alone. Raises ValueError for other rows, a pair that nobody judged here included.
    """
    names = readers.format_of(row, (PREFERENCE, TIE))
    prompt, *answers, source, _ = [row[name] for name in names]
    read = readers.parse_preference(dict(zip(PREFERENCE, [prompt, *answers])))
    pair = identity(read["prompt"], [read["chosen"], read["rejected"]])
    axes = row.get("axes", {})
    if not isinstance(axes, dict) or not all(verdict in (-1, 0, 1) for verdict in axes.values()):
        raise ValueError(f'field "axes" is {readers.excerpt(axes)}; it must hold 1, 0 or -1')
    verdicts = {"overall": int(names == PREFERENCE)} | axes
    sign = 1 if read["chosen"] == drawn_order(pair, seed=0)[0] else -1
    labels = {name: sign * verdict for name, verdict in verdicts.items()}
    better = str(source) if names == PREFERENCE else NEITHER
    return {"pair": pair, "better": better, "labels": labels}


def ties_of(out: Path) -> Path:
    return out.with_name(out.name + ".ties")


def half_row(text: bytes) -> bytes:
    """What a kill in the middle of a row has left at a file's end; b"" where the last row is whole,
    and for an end that no session wrote."""
    last = text.rpartition(b"\n")[2]
    beginning = b'{"prompt": '
    try:
        json.loads(last)
    except ValueError:
        return last if last.startswith(beginning[:len(last)]) else b""
    return b""


def read_judgements(out: Path) -> list[dict]:
    """What sessions have saved in `out` and its ties, if they are there. Changes nothing."""
    found = []
    for file in (out, ties_of(out)):
        if not file.exists():
            continue
        lines = list(readers.json_lines(file))
        half = half_row(file.read_bytes())
        if half:
            print(f"{file}: half a row, which a kill has left at its end, is left out: {half}",
                  file=sys.stderr)
            lines.pop()
        found += readers.good_rows(lines, parse_judgement, file, "error")
    return found


def save(row: dict, out: Path) -> None:
    """Append a row to `out`, or to its ties; it is on the disk when this returns."""
    file = out if "chosen" in row else ties_of(out)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    claim.fsync(file)
    claim.fsync(file.parent)                  # the name of a new file


def end_with_whole_row(file: Path) -> None:
    """Cut off half a row, so that the next begins a line of its own; all before it stays."""
    text = file.read_bytes() if file.exists() else b""
    whole = text.removesuffix(half_row(text))
    # an editor may have left out the last newline
    if whole and not whole.endswith(b"\n"):
        whole += b"\n"
    if whole != text:
        claim.write_whole(file, lambda temporary: temporary.write_bytes(whole))


# ---------------------------------------------------------------------- agreement of two people

def cohen_kappa(a: Sequence, b: Sequence) -> float | None:
    """kappa = (p_o - p_e) / (1 - p_e): how much more two people agree than by chance (Cohen 1960).

    a, b: the labels that they gave to the same items, at least one. p_o: the share of items with
    equal labels. p_e = sum_k p_a(k) p_b(k): that share if each drew labels at random, as often as
    they gave them. Limits: 1 for people who always agree, about 0 for independent ones. None for
    p_e = 1: both gave one label to everything, and kappa is 0 / 0.
    """
    n = len(a)
    p_o = sum(x == y for x, y in zip(a, b, strict=True)) / n
    counts_a = Counter(a)
    counts_b = Counter(b)
    # divided last, because a sum of shares may miss 1 by a rounding
    p_e = sum(counts_a[label] * counts_b[label] for label in counts_a) / n ** 2
    if p_e == 1:
        return None
    return (p_o - p_e) / (1 - p_e)


def agreement(files: str) -> str:
    """A line for "overall", and for each axis, over the pairs of which both people judged it."""
    people = []
    for file in files.split(","):
        people.append({row["pair"]: row["labels"] for row in read_judgements(Path(file))})
        if not people[-1]:
            raise ValueError(f"--agreement {files}: there are no judgements in {file!r}")
    if len(people) != 2:
        raise ValueError(f"--agreement {files}: give two files with a comma")
    one, other = people
    common = one.keys() & other.keys()
    if not common:
        raise ValueError(f"--agreement {files}: no pair was judged in both; people judge the same "
                         "pairs if their options are the same, --out aside")
    lines = [f"{len(common)} pairs in common, of {len(one)} and {len(other)}"]
    for name in ("overall", *AXES):
        both = [pair for pair in common if name in one[pair] and name in other[pair]]
        if not both:
            continue
        a = [one[pair][name] for pair in both]
        b = [other[pair][name] for pair in both]
        agreed = sum(x == y for x, y in zip(a, b)) / len(both)
        kappa = cohen_kappa(a, b)
        said = "undefined: both gave one label to all" if kappa is None else f"{kappa:.2f}"
        lines.append(f"{name:9} {len(both):6} pairs   agreed {agreed:6.1%}   kappa {said}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- the session

def read_key(question: str) -> str:
    """What is typed. Raises EOFError at the end, which is Ctrl-D."""
    try:
        return input(question).strip()
    except UnicodeError:                      # where the locale lets no broken bytes through
        return "\ufffd"


def ask(question: str) -> int:
    """1 or -1: the first or the second answer is better, 0: neither. Raises EOFError for q."""
    while True:
        key = read_key(f"{question} (1, 2, =, q)? ")
        if key in KEYS:
            return KEYS[key]
        if key == "q":
            raise EOFError
        print(f"{key!r} is none of 1, 2, = and q")


def main(cfg: Config) -> None:
    if bool(cfg.init) + bool(cfg.data) + bool(cfg.agreement) != 1:
        raise ValueError("give one of --init (models that answer), --data (answers that are there) "
                         "and --agreement (files of judgements)")
    if cfg.agreement:
        print(agreement(cfg.agreement))
        return
    out = Path(cfg.out)
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {cfg.out!r}: give a file that ends in .jsonl, because stages read "
                         "no other")
    if not out.exists():
        claim.check_new_file("--out", cfg.out)
    better = {row["pair"]: row["better"] for row in read_judgements(out)}
    pairs = file_pairs(cfg) if cfg.data else sampled_pairs(cfg)
    # not before both are read, because a file of another kind must stay as it is
    end_with_whole_row(out)
    end_with_whole_row(ties_of(out))

    questions = [*AXES, "overall"] if cfg.axes else ["overall"]
    print(f"Which answer is better: {', '.join(questions)}? Answers of {cfg.init or cfg.data}.\n"
          "Type 1 for the first, 2 for the second, = for neither; q or Ctrl-D leaves.\n"
          f"Every judgement is saved at once; {len(better)} are in {out}.")
    score = Counter()
    n_skipped = 0
    interrupted = False
    try:
        # 1. PROMPT, 2. ANSWERS
        for pair in pairs:
            if not is_preference(pair):
                n_skipped += 1
                continue
            name = identity(pair.prompt, pair.answers)
            if name not in better:
                # 3. SHOW
                first, second = drawn_order(name, cfg.seed)
                print(f"\n---- {pair.row}")
                for turn in pair.prompt:
                    print(f"{turn['role']}: {turn['content']}")
                print(f"\n1: {first}\n\n2: {second}\n")
                # 4. JUDGE
                verdicts = {question: ask(question) for question in questions}
                # 5. SAVE
                row = saved_row(pair, [first, second], verdicts)
                save(row, out)
                better[name] = row.get("chosen_from", NEITHER)
            score[better[name]] += 1
        # not before the end, because who knows the score judges by it
        counts = ", ".join(f"{source} {n}" for source, n in score.most_common())
        print(f"\nAll are judged. Better: {counts}")
    except EOFError:
        print()
    except KeyboardInterrupt:
        interrupted = True
        print()
    if n_skipped:
        print(f"{n_skipped} pairs were skipped: their answers are equal, or one is empty")
    print(f"{len(better)} judgements are saved in {out} and {ties_of(out)}; the same command goes "
          "on")
    if interrupted:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
