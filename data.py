"""Every public format -> batches: the readers, packing, sharding and mixtures of all stages.

Readers   read_documents, read_examples, read_preferences, read_prompts: a file, a folder or the
          embedded world, checked row by row; a bad row is an error with file and line.
Batches   TokenStream (pretraining, 001 section 1.6, steps 1.3-1.6), PackedExamples (fine-tuning
          and task mixing, 3.4-3.5), PreferencePairs (4.5, 4.7), left_pad (generation).

Nothing here remembers a position: batch(step) is a pure function of seed, step, batch size and
rank, so a run that resumes sees what it would have seen. Rows are numbered through epoch after
epoch, each epoch a fresh permutation; a step takes the next batch_size * world_size numbers and
each rank its own part, so that all ranks together see every epoch exactly once.
"""
import json
import math
import sys
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from world.world import World

ROLES = ("system", "user", "assistant")
FORMATS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"),
           ("messages",), ("prompt", "completion"))
LISTED = 1 << 20        # up to so many items an epoch's order is an array (8 MB); shuffled()


# ---------------------------------------------------------------------- rows of files

def world_named(data: str | Path) -> World | None:
    """"world" or "world:SEED" -> that world; None for anything else: a file or a folder."""
    name, colon, seed = str(data).partition(":")
    if name != "world":
        return None
    if colon and not seed.isdecimal():
        raise ValueError(f"{data}: world:SEED needs a whole number, for example world:1")
    return World(int(seed or 0))


def decoded(raw: bytes, offset: int = 0) -> str:
    """UTF-8 that begins `offset` bytes into a file -> text, without a byte order mark."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: byte 0x{raw[e.start]:02x} at byte offset "
                         f"{offset + e.start} of the file; save it as UTF-8") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def json_row(raw: bytes, offset: int) -> dict:
    """A line of JSONL that begins `offset` bytes into its file -> its object."""
    try:
        row = json.loads(decoded(raw, offset))
    except json.JSONDecodeError as e:
        raise ValueError(f"broken JSON at column {e.colno}: {e.msg}; every line must be one "
                         "whole object") from None
    if type(row) is not dict:
        raise ValueError(f"found {shown(row)}; every line must be an object {{...}}")
    return row


def file_rows(data: str | Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Callable]]:
    """(where, load) of each row in a file, or in all files of these types below a folder, sorted.

    load() returns the row or raises; a text file is one row {"text": ..., "whole_file": True}.
    """
    root, known = Path(data), ", ".join(suffixes)
    if not root.exists():
        raise ValueError(f'{data}: not found; give a {known} file, a folder of them or "world"')
    files = [root]
    if root.is_dir():
        files = sorted(path for path in root.rglob("[!.]*")
                       if path.suffix.lower() in suffixes and path.is_file())
        if not files:
            raise ValueError(f"{data}: no {known} file in this folder")
    for path in files:
        if path.suffix.lower() not in suffixes:
            raise ValueError(f'{path}: "{path.suffix}" files are not read here; give {known}')
        empty = True
        for row in json_lines(path) if path.suffix.lower() == ".jsonl" else whole_text(path):
            empty = False
            yield row
        if empty:
            raise ValueError(f"{path}: the file is empty")


def json_lines(path: Path) -> Iterator[tuple[str, Callable]]:
    """(where, load) of each line that is not blank; one line at a time is in memory."""
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", partial(json_row, line.removesuffix(b"\n"), offset)
            offset += len(line)


def whole_text(path: Path) -> Iterator[tuple[str, Callable]]:
    """(where, load) of a text file, unless it is blank."""
    raw = path.read_bytes()
    if raw.strip():
        yield str(path), lambda: {"text": decoded(raw), "whole_file": True}


def parsed(rows: Iterable[tuple[str, Callable]], parse: Callable[[dict], dict], data: str | Path,
           bad_rows: str) -> Iterator[dict]:
    """parse(row) | {"where"} of every good row; a bad one raises, or is counted on stderr."""
    if bad_rows not in ("error", "skip"):
        raise ValueError(f'bad_rows is {bad_rows!r}; it must be "error" or "skip"')
    good, bad = 0, []
    try:
        for where, load in rows:
            try:
                row = parse(load()) | {"where": where}
            except ValueError as e:
                if bad_rows == "error":
                    raise ValueError(f"{where}: {e}") from None
                bad.append(f"{where}: {e}")
                continue
            good += 1
            yield row
    finally:                                      # also when the caller has read enough
        if bad:
            print(f"{data}: skipped {len(bad):,} of {good + len(bad):,} rows (first: {bad[0]})",
                  file=sys.stderr)
    if not good:
        raise ValueError(f"{data}: every row is bad (first: {bad[0]})")


# ---------------------------------------------------------------------- what a row says

def shown(value: object) -> str:
    """A value that was found, for an error message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."


def text_of(value: object, field: str) -> str:
    """The value itself, if it is a non-empty string of real characters."""
    if type(value) is not str:
        raise ValueError(f'field "{field}" is {shown(value)}; it must be a string')
    if not value.strip():
        raise ValueError(f'field "{field}" is empty; every row needs a non-empty "{field}"')
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f'field "{field}" holds half a surrogate pair, which is not a character')
    return value


def turns_of(value: object, field: str, last: str) -> list[dict]:
    """Text, or chat messages, that end in a turn of role `last` -> [{"role", "content"}, ...]."""
    if isinstance(value, str):
        return [{"role": last, "content": text_of(value, field)}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f'field "{field}" is {shown(value)}; it must be a string or a list of '
                         'messages {"role": "user", "content": "..."}')
    roles = [turn.get("role") for turn in value]
    for i, role in enumerate(roles):
        if role not in ROLES:
            raise ValueError(f'field "{field}[{i}].role" is {shown(role)}; roles are '
                             f'{", ".join(ROLES)}')
    if roles[-1:] != [last]:
        raise ValueError(f'field "{field}" has the roles {shown(roles)}; it must end in "{last}"')
    return [{"role": role, "content": text_of(turn.get("content"), f"{field}[{i}].content")}
            for i, (role, turn) in enumerate(zip(roles, value))]


def response_of(value: object, field: str, prompt: list[dict]) -> str:
    """Text, or messages whose last is the answer; turns before it must repeat the prompt."""
    *before, answer = turns_of(value, field, "assistant")
    if before and before != prompt:
        raise ValueError(f'field "{field}" begins with another conversation than the prompt')
    return answer["content"]


def known_fields(row: dict, formats: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The one format whose fields the row has; none or several are an error, never a guess."""
    found = [names for names in formats if all(name in row for name in names)]
    if len(found) != 1:
        what = "fields of several formats" if found else "no known fields"
        raise ValueError(f"{what}: found {', '.join(map(shown, row)) or 'none'}; give one of "
                         + ", ".join("/".join(names) for names in found or formats))
    return found[0]


def prompt_of(row: dict, names: tuple[str, ...]) -> list[dict]:
    """The conversation up to the answer, ending in a user's turn."""
    value = row[names[0]]
    if names == ("messages",):
        if value == [] or not isinstance(value, list):
            raise ValueError(f'field "messages" is {shown(value)}; it must be a list of messages')
        answered = isinstance(value[-1], dict) and value[-1].get("role") == "assistant"
        value = value[:-1] if answered else value
    elif names == ("instruction", "output") and row.get("input") not in (None, ""):
        value = text_of(value, "instruction") + "\n" + text_of(row["input"], "input")
    return turns_of(value, names[0], "user")


def parse_document(row: dict) -> dict:
    known_fields(row, (("text",),))
    return {"text": text_of(row["text"], "text"), "whole_file": row.get("whole_file") is True}


def parse_example(row: dict) -> dict:
    names = known_fields(row, FORMATS)
    if names == ("prompt", "completion") and row.get("label") is False:
        raise ValueError('"label" is false: an answer rated bad is nothing to imitate')
    task = next((str(row[name]) for name in ("task", "cluster") if row.get(name)), "")
    if names == ("messages",):
        turns = turns_of(row["messages"], "messages", "assistant")
        prompt_of(row, names)                     # the answer must follow a user's turn
    else:
        prompt = prompt_of(row, names)
        response = response_of(row[names[1]], names[1], prompt)
        turns = [*prompt, {"role": "assistant", "content": response}]
    return {"messages": turns, "task": task, "example": row}


def parse_preference(row: dict) -> dict:
    known_fields(row, (("prompt", "chosen", "rejected"),))
    prompt = turns_of(row["prompt"], "prompt", "user")
    chosen, rejected = (response_of(row[name], name, prompt) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same; the two must differ')
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "example": row}


def parse_prompt(row: dict) -> dict:
    whole = any(all(name in row for name in names) for names in FORMATS)
    names = known_fields(row, FORMATS if whole else (("prompt",), *FORMATS))
    return {"messages": prompt_of(row, names), "example": row}


# ---------------------------------------------------------------------- readers

def held_out(prompt: str) -> bool:
    """True for one text in ten, by a hash: the same text is always on the same side."""
    return zlib.crc32(prompt.encode()) % 10 == 9


def check_split(split: str | None) -> None:
    if split not in (None, "train", "heldout"):
        raise ValueError(f'split is {split!r}; it must be "train", "heldout" or None')


def read_documents(data: str | Path, max_bytes: int | None = None, split: str | None = None,
                   seed: int = 0, bad_rows: str = "error") -> Iterator[str]:
    """Texts of a .txt or .md file (one), a folder, JSONL with `text`, or a world: "world" (without
    end) or "bearish", its small second language.

    split: "train", "heldout" or None (all of a file, a world's "train"). Held out are a world's
    own documents, the last tenth of a text file and, by hash, a tenth of a JSONL file's rows.
    Stops after the document that reaches max_bytes (UTF-8), and cuts a text file there. seed: which
    documents of a world.
    """
    check_split(split)
    if str(data).partition(":")[0] == "bearish":
        world = world_named("world" + str(data).removeprefix("bearish"))
        documents = world.bearish_documents(split or "train")
    elif world := world_named(data):
        documents = world.documents(seed=seed, split=split or "train")
    else:
        rows = file_rows(data, (".txt", ".md", ".jsonl"))
        documents = (split_document(row, split, max_bytes)
                     for row in parsed(rows, parse_document, data, bad_rows))
    size = 0
    for document in filter(None, documents):
        yield document
        size += len(document.encode())
        if max_bytes is not None and size >= max_bytes:
            return
    if not size:
        raise ValueError(f'{data}: too few documents to split; none fell into "{split}"')


def split_document(row: dict, split: str | None, max_bytes: int | None = None) -> str:
    """The part of a document that belongs to the split, which may be none of it; of a text file at
    most max_bytes."""
    text = row["text"]
    if row["whole_file"]:
        cut = int(len(text) * 0.9)
        text = {None: text, "train": text[:cut], "heldout": text[cut:]}[split]
        if max_bytes is not None and len(raw := text.encode()) > max_bytes:
            text = raw[:max_bytes].decode(errors="ignore")
        return text
    return text if not split or held_out(text) == (split == "heldout") else ""


def read_examples(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Conversations to imitate: [{"messages", "task", "example": the raw row, "where"}, ...]."""
    return read_rows(data, "examples", parse_example, n, **options)


def read_preferences(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Pairs: [{"prompt": messages, "chosen": text, "rejected": text, "example", "where"}, ...]."""
    return read_rows(data, "preferences", parse_preference, n, **options)


def read_prompts(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Conversations to be answered: [{"messages", "example", "where"}, ...]; answers are cut."""
    return read_rows(data, "prompts", parse_prompt, n, **options)


def read_rows(data: str | Path, method: str, parse: Callable[[dict], dict], n: int | None = None,
              split: str | None = None, seed: int = 0, bad_rows: str = "error",
              **world_options) -> list[dict]:
    """n rows of World.<method>(..., **world_options), or a file's rows, at most n drawn by seed.

    split: "train", "heldout" or None (all of a file, a world's "train"). A tenth of a file's
    prompts, chosen by hash, is held out: no prompt has rows on both sides.
    """
    check_split(split)
    if world := world_named(data):
        if n is None:
            raise ValueError(f"{data}: a world has no end; say how many {method} to read")
        drawn = getattr(world, method)(n, split=split or "train", seed=seed, **world_options)
        rows = ((f"{data} {method}[{i}]", partial(dict, row)) for i, row in enumerate(drawn))
        return list(parsed(rows, parse, data, bad_rows))
    if any(world_options.values()):
        raise ValueError(f"{data}: {', '.join(world_options)} can be set for a world only")
    rows = list(parsed(file_rows(data, (".jsonl",)), parse, data, bad_rows))
    if split:
        rows = [row for row in rows if held_out(said(row)) == (split == "heldout")]
        if not rows:
            raise ValueError(f'{data}: too few prompts to split; none fell into "{split}"')
    if n is not None and n < len(rows):
        if split == "train":
            print(f"{data}: {n:,} of {len(rows):,} {method} are used, drawn by the seed",
                  file=sys.stderr)
        rows = [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:n])]
    return rows


def said(row: dict) -> str:
    """The user's side of a conversation."""
    turns = row["prompt"] if "prompt" in row else row["messages"]
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")


# ---------------------------------------------------------------------- batches

@dataclass
class Batch:
    """B rows of T tokens: logits[:, :-1] are scored by tokens[:, 1:] under loss_mask[:, 1:]; or,
    where a batch has targets of its own (objectives.py), logits by targets under loss_mask."""
    tokens: torch.Tensor                # (B, T) int64
    loss_mask: torch.Tensor             # (B, T) bool: this token is a target
    documents: torch.Tensor | None      # (B, T) int32: number within the row, padding -1
    positions: torch.Tensor | None      # (B, T) int64: from 0 in each document
    index: torch.Tensor                 # int64: which windows, examples or pairs these are
    targets: torch.Tensor | None = None          # (B, T) int64, not shifted
    prefix: torch.Tensor | None = None           # (B,) int64: so many tokens see each other
    source: torch.Tensor | None = None           # (B, S) int64: what an encoder reads
    source_lengths: torch.Tensor | None = None   # (B,) int64: tokens of it, the rest is padding
    segments: torch.Tensor | None = None         # (B, T) int64: 0 or 1
    is_next: torch.Tensor | None = None          # (B,) int64: 1 if the second segment follows

    @cached_property
    def n_targets(self) -> int:
        return int((self.loss_mask if self.targets is not None else self.loss_mask[:, 1:]).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens that a model reads, padding included; an ordinary row's last is only a target."""
        if self.targets is None:
            return self.tokens[:, 1:].numel()
        return self.tokens.numel() + (0 if self.source is None else self.source.numel())

    def to(self, device: torch.device | str) -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        batch = Batch(*(None if value is None else value.to(device) for value in values))
        batch.n_targets = self.n_targets               # counted here: to ask a GPU is to wait
        return batch


def row_numbers(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """The rows of one rank in one step, numbered through all epochs."""
    first = (step * world_size + rank) * batch_size
    return range(first, first + batch_size)


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def scattered(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Entries `places` (int64, any shape) of a permutation of 0 .. n - 1, without the permutation.

    A Feistel network over the 4^h >= n numbers of two halves of h bits: each round turns
    (left, right) into (right, left ^ f(right)), which can be undone whatever f is, so that no two
    places get the same entry (Luby & Rackoff 1988). What comes out at n or above goes through
    again until it is below: fewer than 4 passes on average, and still a permutation (Black &
    Rogaway 2002, cycle walking). f is the finaliser of splitmix64 (Steele et al. 2014) under the
    round's key. Integers only: the same on every platform.
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(8, np.uint64)
    entries, outside = places.astype(np.uint64), np.ones(places.shape, bool)
    while outside.any():
        left, right = entries[outside] >> half, entries[outside] & low
        for key in keys:
            x = right ^ key
            x = (x ^ x >> np.uint64(30)) * np.uint64(0xbf58476d1ce4e5b9)       # modulo 2^64
            x = (x ^ x >> np.uint64(27)) * np.uint64(0x94d049bb133111eb)
            left, right = right, left ^ (x ^ x >> np.uint64(31)) & low
        entries[outside] = left << half | right
        outside = entries >= np.uint64(n)
    return entries.astype(np.int64)


def shuffled(numbers: Iterable[int], n: int, seed: int) -> np.ndarray:
    """Which of n items stands at each number (N,), int64. Numbers run through epoch after epoch,
    each a permutation of its own: an array up to LISTED items, beyond it single entries."""
    epochs, places = np.divmod(np.fromiter(numbers, np.int64), n)
    index = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        index[here] = (permutation(n, seed, epoch)[places[here]] if n <= LISTED
                       else scattered(places[here], n, seed, epoch))
    return index


def permuted(n: int, seed: int, step: int, batch_size: int, rank: int = 0,
             world_size: int = 1) -> list[int]:
    """Which of n items a rank uses in a step, each item once an epoch."""
    return shuffled(row_numbers(step, batch_size, rank, world_size), n, seed).tolist()


def once(source: "TokenStream | PackedExamples | PreferencePairs",
         batch_size: int) -> Iterator[Batch]:
    """Every row of the first epoch exactly once; the last batch may be smaller."""
    for first in range(0, len(source), batch_size):
        yield source.rows(range(first, min(first + batch_size, len(source))))


def tokenize_documents(documents: Iterable[str], tokenizer) -> np.ndarray:
    """001 1.6 steps 1.3-1.4: all documents as one array of ids, <|endoftext|> after each."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    documents, pieces = iter(documents), [np.zeros(0, dtype)]
    while chunk := list(islice(documents, 1024)):
        for ids in tokenizer.encode_batch(chunk):
            pieces.append(np.array([*ids, tokenizer.endoftext], dtype))
    return np.concatenate(pieces)


class TokenStream:
    """Shuffled windows of context_length + 1 tokens of one long array (001 1.6, steps 1.5-1.6).

    Neighbours share a token, the last of one being the first of the next, so that each token but
    the very first is a target once an epoch; the last window is moved back until it is full and
    does not score again what its neighbour scores. <|endoftext|> is a document's last target and
    the next one's first input: a document is predicted from <|endoftext|> at position 0, in
    training as in generation. tokens: 1-D integer array, or shards.open_tokens() if large.
    """
    def __init__(self, tokens: np.ndarray, context_length: int, seed: int, endoftext: int,
                 document_masks: bool = True):
        if len(tokens) <= context_length:
            raise ValueError(f"the corpus has {len(tokens):,} tokens; one window needs "
                             f"context_length + 1 = {context_length + 1:,}: give more text or a "
                             "smaller --context_length")
        self.tokens, self.context_length, self.seed = tokens, context_length, seed
        self.endoftext, self.document_masks = endoftext, document_masks

    def __len__(self) -> int:
        """Windows in an epoch."""
        return math.ceil((len(self.tokens) - 1) / self.context_length)

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.rows(row_numbers(step, batch_size, rank, world_size))

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        return once(self, batch_size)

    def rows(self, numbers: Iterable[int]) -> Batch:
        size, index = self.context_length, shuffled(numbers, len(self), self.seed)
        start = np.minimum(index * size, len(self.tokens) - size - 1)
        at = start[:, None] + np.arange(size + 1)                    # (B, T) places in the corpus
        tokens = self.tokens[at].astype(np.int64)
        loss_mask = at > index[:, None] * size
        layout = self.layout(tokens) if self.document_masks else (None, None)
        return Batch(*map(torch.from_numpy, (tokens, loss_mask)), *layout, torch.from_numpy(index))

    def layout(self, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Document numbers and positions (B, T): a document begins at each <|endoftext|>."""
        begins = tokens == self.endoftext
        begins[:, 0] = True
        t = np.arange(tokens.shape[1])
        positions = t - np.maximum.accumulate(np.where(begins, t, 0), axis=1)
        return torch.from_numpy(begins.cumsum(1, dtype=np.int32) - 1), torch.from_numpy(positions)


def copying_batch(vocab_size: int, rows: int, length: int, seed: int, step: int) -> Batch:
    """Random tokens said again and again, with a period of 4 to 16 that differs from row to row; in
    every other row each second time backwards.

    All there is to learn is to look back and fetch what came after a token, or before it. A model
    that has learned it (in about 200 steps) uses it on text from the start: see --copy_steps of
    train_pretrain.py.
    """
    rng = np.random.default_rng((seed, step))
    period, t = rng.integers(4, 17, (rows, 1)), np.arange(length + 1)[None]
    backwards = (np.arange(rows)[:, None] % 2 == 1) & (t // period % 2 == 1)
    places = np.where(backwards, period - 1 - t % period, t % period)        # (rows, length + 1)
    tokens = np.take_along_axis(rng.integers(0, vocab_size, (rows, 16)), places, axis=1)
    return Batch(torch.from_numpy(tokens), torch.ones(tokens.shape, dtype=torch.bool), None, None,
                 torch.arange(rows))


# ---------------------------------------------------------------------- conversations

def fit(sides: list[tuple], limit: int, truncate: str, where: str) -> list[tuple] | None:
    """(ids, mask) sides that share one prompt, cut to at most `limit` tokens; None: drop them.

    "left" takes the same tokens from the start of each side; the last response must stay whole.
    """
    longest = max(len(ids) for ids, _ in sides)
    excess = longest - limit
    if excess <= 0:
        return sides
    if truncate == "error":
        raise ValueError(f"{where}: {longest:,} tokens with the template, {limit:,} fit; use "
                         "--truncate left, --truncate drop or a model with a longer context")
    start = response_start(sides[0][1])
    if truncate == "left" and excess >= start:                       # <|assistant|> must stay, too
        raise ValueError(f"{where}: the response alone takes {longest - start:,} tokens, "
                         f"{limit - 1:,} fit; use --truncate drop or a model with a longer context")
    if truncate == "left":                                           # a first token is no target
        return [(ids[excess:], [0, *mask[excess + 1:]]) for ids, mask in sides]
    return None


def response_start(mask: list[int]) -> int:
    """Where the last turn's targets begin: [0, 0, 1, 0, 1, 1] -> 4."""
    return len(mask) - mask[::-1].index(0)


def fit_all(rows: list[dict], sides_of: Callable[[dict], list[tuple]], limit: int,
            truncate: str) -> tuple[list[dict], list[list[tuple]]]:
    """The rows kept and their sides as arrays (ids int32, mask bool); drops go to stderr."""
    if truncate not in ("left", "drop", "error"):
        raise ValueError(f'truncate is {truncate!r}; it must be "left", "drop" or "error"')
    kept, arrays = [], []
    for row in rows:
        if sides := fit(sides_of(row), limit, truncate, row["where"]):
            kept.append(row)
            arrays.append([(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in sides])
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept):,} of {len(rows):,} rows longer than {limit:,} "
              "tokens", file=sys.stderr)
    if not kept:
        raise ValueError(f"no rows left: of {len(rows):,}, none fits {limit:,} tokens")
    return kept, arrays


def mixing_weights(counts: dict[str, int], tau: float = 1.0,
                   cap: int | None = None) -> dict[str, float]:
    """p_k = n_k^(1/tau) / sum_j n_j^(1/tau), n_k = min(N_k, cap): 001 section 3.5.

    tau 1: in proportion to the sizes; math.inf: all tasks alike; below 1 would favour large ones.
    """
    if tau < 1 or (cap is not None and cap < 1):
        raise ValueError(f"tau is {tau}, cap is {cap}; both must be at least 1")
    powers = {task: min(n, cap or n) ** (1 / tau) for task, n in counts.items()}
    return {task: power / sum(powers.values()) for task, power in powers.items()}


def draw(tasks: list[str], tau: float, cap: int | None, rng: np.random.Generator) -> np.ndarray:
    """The examples of an epoch under mixing_weights: sum_k min(N_k, cap) indices into tasks.

    Shares are rounded at random, by one offset for all, so that they add up and are right on
    average. A task is repeated only after all of it was used; with tau >= 1 none exceeds its cap.
    """
    counts = Counter(tasks)
    total = sum(min(n, cap or n) for n in counts.values())
    ends = total * np.cumsum([0.0, *mixing_weights(counts, tau, cap).values()])
    shares = np.diff(np.floor(ends.round(6) + rng.random())).astype(int)
    names, parts = np.array(tasks), []
    for task, share in zip(counts, shares):
        rounds, rest = divmod(share, counts[task])
        members = np.flatnonzero(names == task)
        parts += [members] * rounds + [rng.choice(members, rest, replace=False)]
    return np.concatenate(parts)


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Best fit, longest first: rows of items whose lengths add up to at most size.

    pack([3, 5, 2, 6], 8) -> [[3, 2], [1, 0]]: 6 + 2 and 5 + 3. open_rows[r] lists the rows with r
    tokens of room, and bit r of `rooms` is set if there are any: the tightest row that takes a
    length is the lowest bit from there on.
    """
    rows, open_rows, rooms = [], [[] for _ in range(size + 1)], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if fitting := rooms >> lengths[i]:
            room = lengths[i] + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= 0 if open_rows[room] else 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        open_rows[room - lengths[i]].append(row)
        rooms |= 1 << (room - lengths[i])
    return rows


class PackedExamples:
    """Conversations in the chat template, several to a row of context_length + 1 tokens.

    Each is a document with positions of its own, so neither attention nor the shifted loss crosses
    examples (a first token is a role token, never a target); <|pad|> fills the row. Every epoch is
    packed anew and holds each example once, or what 001's task mixing draws if tau or cap is set.
    Batch.index lists the examples, row after row, as places in .examples (those not dropped).
    """
    def __init__(self, examples: list[dict], tokenizer, context_length: int, seed: int,
                 truncate: str = "error", tau: float | None = None, cap: int | None = None):
        self.size, self.pad, self.seed = context_length + 1, tokenizer.pad, seed
        self.tau, self.cap = tau, cap
        self.examples, sides = fit_all(examples, lambda row: [tokenizer.chat(row["messages"])],
                                       self.size, truncate)
        self.sides = [side for side, in sides]
        self.packed = lru_cache(maxsize=2)(self.pack_epoch)
        self.first_rows = [0]                     # number of the first row of each epoch so far

    def __len__(self) -> int:
        """Rows in the first epoch."""
        return len(self.packed(0))

    def pack_epoch(self, epoch: int) -> list[list[int]]:
        """The rows of one epoch, each a list of examples."""
        rng = np.random.default_rng((self.seed, epoch))
        chosen = np.arange(len(self.examples))
        if self.tau is not None or self.cap is not None:
            tau = 1.0 if self.tau is None else self.tau
            chosen = draw([row["task"] for row in self.examples], tau, self.cap, rng)
        chosen = rng.permutation(chosen).tolist()
        rows = pack([len(self.sides[i][0]) for i in chosen], self.size)
        return [[chosen[j] for j in rows[r]] for r in rng.permutation(len(rows))]

    def row(self, number: int) -> list[int]:
        """The examples of a row, numbered through all epochs, which differ in length."""
        while number >= self.first_rows[-1]:
            rows = self.packed(len(self.first_rows) - 1)
            self.first_rows.append(self.first_rows[-1] + len(rows))
        epoch = bisect_right(self.first_rows, number) - 1
        return self.packed(epoch)[number - self.first_rows[epoch]]

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.rows(row_numbers(step, batch_size, rank, world_size))

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        return once(self, batch_size)

    def rows(self, numbers: Iterable[int]) -> Batch:
        packed = [self.row(number) for number in numbers]
        shape, t = (len(packed), self.size), np.arange(self.size)
        tokens, loss_mask = np.full(shape, self.pad, np.int64), np.zeros(shape, bool)
        documents, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int64)
        for b, row in enumerate(packed):
            end = 0
            for number, i in enumerate(row):
                ids, mask = self.sides[i]
                start, end = end, end + len(ids)
                tokens[b, start:end], loss_mask[b, start:end] = ids, mask
                documents[b, start:end], positions[b, start:end] = number, t[:len(ids)]
            documents[b, end:], positions[b, end:] = -1, t[:self.size - end]
        index = torch.tensor([i for row in packed for i in row])
        return Batch(*map(torch.from_numpy, (tokens, loss_mask, documents, positions)), index)


def right_padded(sides: list[tuple], pad: int, width: int, index: list[int]) -> Batch:
    """(ids, mask) rows as a Batch of that width. Attention is causal: padding changes nothing."""
    tokens = np.full((len(sides), width), pad, np.int64)
    loss_mask = np.zeros(tokens.shape, bool)
    for b, (ids, mask) in enumerate(sides):
        tokens[b, :len(ids)], loss_mask[b, :len(ids)] = ids, mask
    return Batch(*map(torch.from_numpy, (tokens, loss_mask)), None, None, torch.tensor(index))


def wide_enough(longest: int, step: int, limit: int) -> int:
    """Tokens in the rows of a batch: a multiple of `step` up to the limit. oneDNN and compiled
    models prepare every new width, so there should be few."""
    return max(longest, min(-(-longest // step) * step, limit))


def response_batch(prompts: list[list[int]], responses: list[list[int]], pad: int,
                   context_length: int) -> Batch:
    """Prompt and response ids, one row each; the responses are targets. Rows are padded to one of
    a few widths, up to context_length."""
    sides = [(x + y, [0] * len(x) + [1] * len(y)) for x, y in zip(prompts, responses, strict=True)]
    width = wide_enough(max(len(ids) for ids, _ in sides), 16, context_length)
    return right_padded(sides, pad, width, list(range(len(sides))))


class PreferencePairs:
    """Pairs (x, y_w, y_l) -> 2B right-padded rows: B chosen, then their B rejected.

    The loss mask covers the compared response and its <|end|>, not earlier turns. The model sees
    all of a row (a reward is read at its last token), so at most context_length tokens fit. A
    batch holds pairs of similar length. Batch.index: places in .pairs (those not dropped).
    """
    def __init__(self, pairs: list[dict], tokenizer, context_length: int, seed: int,
                 truncate: str = "error"):
        def sides_of(pair):
            answers = ({"role": "assistant", "content": pair[k]} for k in ("chosen", "rejected"))
            sides = [tokenizer.chat([*pair["prompt"], answer]) for answer in answers]
            start = response_start(sides[0][1])
            return [(ids, [0] * start + mask[start:]) for ids, mask in sides]

        self.context_length, self.pad, self.seed = context_length, tokenizer.pad, seed
        self.pairs, self.sides = fit_all(pairs, sides_of, context_length, truncate)
        self.lengths = np.array([max(len(ids) for ids, _ in sides) for sides in self.sides])
        self.order = lru_cache(maxsize=2)(self.order_epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def order_epoch(self, epoch: int, group: int) -> np.ndarray:
        """A permutation in groups alike in length: sorted within 16 groups, then shuffled."""
        rng, n = np.random.default_rng((self.seed, epoch)), len(self)
        order = rng.permutation(n)
        order = order[np.lexsort((self.lengths[order], np.arange(n) // (16 * group)))]
        whole = n // group * group
        groups = rng.permutation(order[:whole].reshape(-1, group))
        return np.concatenate([groups.ravel(), order[whole:]])

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        numbers = row_numbers(step, batch_size, rank, world_size)
        return self.rows(numbers, group=batch_size * world_size)

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        return once(self, batch_size)

    def rows(self, numbers: Iterable[int], group: int = 16) -> Batch:
        n = len(self)
        index = [int(self.order(k // n, group)[k % n]) for k in numbers]
        sides = [self.sides[i][side] for side in (0, 1) for i in index]
        width = wide_enough(max(self.lengths[index]), 8, self.context_length)
        return right_padded(sides, self.pad, width, index)


def encode_prompts(prompts: list[dict], tokenizer, max_tokens: int,
                   truncate: str = "error") -> tuple[list[dict], list[list[int]]]:
    """The prompts kept and their ids, ending in <|assistant|>, each at most max_tokens long."""
    def sides_of(prompt):
        ids = tokenizer.prompt(prompt["messages"])
        return [(ids, [0] * len(ids))]

    kept, sides = fit_all(prompts, sides_of, max_tokens, truncate)
    return kept, [ids.tolist() for (ids, _), in sides]


def left_pad(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation: tokens (B, T), padded on the left; starts (B,), first real token."""
    longest = max(map(len, rows))
    starts = torch.tensor([longest - len(ids) for ids in rows])
    return torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows]), starts
