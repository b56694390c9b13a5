"""
A corpus larger than memory -> shards: files of token ids that training reads where it needs them.

  1. READ    documents one at a time, data.py's readers and splits; a chunk is about 1 MB of text
  2. ENCODE  chunks in parallel, <|endoftext|> after each document (001 section 1.6, 1.3-1.4)
  3. WRITE   the ids of all chunks in the order of the documents, cut every --shard_tokens

The number of workers changes the speed, not a byte of the result. Memory holds a few chunks and
one line of JSONL; a text file is one document and takes about 14 times its size, so that texts of
gigabytes are better cut into rows first. The corpus is read twice, first for what is held out: bad
rows show early. A folder of shards:

    train_00000.bin, ...     token ids, nothing else: little-endian uint16 (uint32 for more than
    heldout_00000.bin, ...   65,536 tokens); a document may go on in the next shard
    tokenizer.json           the vocabulary of the ids
    index.json               {"dtype", "vocab_size", "tokenizer_sha256", "source", "splits": {split:
                             {"tokens", "documents", "bytes": of text, "shards": [{"file", "tokens",
                             "sha256"}]}}}. Written last: a folder that has one is complete

open_tokens() presents a split as one array of which only what is indexed is read.

    python shards.py --data corpus.jsonl --vocab_size 32768 --workers 4 --out out/shards
    python shards.py --verify out/shards                       # compare every file's checksum
    python train_pretrain.py --data out/shards                 # the shards and their tokenizer
"""
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, pairwise
from multiprocessing import get_context, parent_process
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import Tokenizer

SPLITS = ("heldout", "train")           # the short one first: if it is empty, that shows early
CHUNK = 1 << 20                       # characters that a worker is given at a time, at least
OURS = r"index\.json(\.tmp)?|tokenizer\.json(\.tmp)?|(train|heldout)_\d{5,}\.bin(\.tmp)?"


@dataclass
class Config:
    data: str = "world"               # corpus: world, world:SEED, a text file, JSONL or folder
    out: str = "out/shards"           # folder to write
    max_bytes: int = 0                # stop after so much text; 0: all, of a world 20 MB
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    tokenizer: str = "bpe"            # bpe (trained on the first part) | bytes | a folder with one
    vocab_size: int = 2048            # tokens of a newly trained tokenizer, special ones included
    tokenizer_bytes: int = 20_000_000     # how much text a new tokenizer is trained on
    workers: int = 2                  # processes that encode; 1: no other process than this one
    shard_tokens: int = 100_000_000   # tokens in a file, the last of a split excepted
    verify: str = ""                  # write nothing; compare this folder's files with their sums
    overwrite: bool = False           # throw away the finished shards in --out


# ---------------------------------------------------------------------- writing

def read(cfg: Config, split: str, at_most: float = math.inf) -> Iterator[str]:
    """The documents of a split; with --max_bytes a twentieth of that is held out, as in training
    from text. at_most: a lower limit in bytes."""
    import data  # not above: the workers need neither it nor torch

    max_bytes = cfg.max_bytes or (20_000_000 if data.world_named(cfg.data) else math.inf)
    max_bytes = min(max_bytes // (20 if split == "heldout" else 1), at_most)
    return data.read_documents(cfg.data, max_bytes, split, bad_rows=cfg.bad_rows)


def chunked(documents: Iterable[str]) -> Iterator[list[str]]:
    """Neighbouring documents in lists of CHUNK characters, or a little more."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def id_type(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@lru_cache(maxsize=1)
def tokenizer_of(folder: str) -> Tokenizer:
    """A worker's own tokenizer, read once."""
    return Tokenizer.load(folder)


def encode(folder: str, documents: list[str]) -> tuple[np.ndarray, int, int]:
    """Ids with <|endoftext|> after each document, number of documents, bytes of text. folder: of
    the tokenizer."""
    tokenizer = tokenizer_of(folder)
    n_bytes = sum(len(document.encode()) for document in documents)
    ids = [np.array([*ids, tokenizer.endoftext], id_type(tokenizer.vocab_size))
           for ids in tokenizer.encode_batch(documents)]
    return np.concatenate(ids), len(documents), n_bytes


def end_with_parent() -> None:
    """In a worker: leave when the process that started it is gone, even if that was killed."""
    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_order(pool: ProcessPoolExecutor, folder: str, chunks: Iterable[list[str]],
             ahead: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """encode() of each chunk by any free worker, in the order of the chunks. At most `ahead` are
    under way, so that a reader faster than the workers does not fill the memory."""
    waiting = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode, folder, chunk))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def cut(pieces: Iterable[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a shard, ids): no piece goes on beyond the end of its shard.

    cut([[1, 2], [3, 4, 5]], 3) -> (0, [1, 2]), (0, [3]), (1, [4, 5])
    """
    total = 0
    for piece in pieces:
        while len(piece):
            number, filled = divmod(total, size)
            part, piece = np.split(piece, [size - filled])
            total += len(part)
            yield number, part


def write_shard(path: Path, parts: Iterable[np.ndarray]) -> dict:
    """One file, whole or not at all: a temporary name, fsync, rename. Returns its index entry."""
    temporary, digest, n = path.with_name(path.name + ".tmp"), hashlib.sha256(), 0
    with temporary.open("wb") as file:
        for part in parts:
            raw = part.tobytes()
            file.write(raw)
            digest.update(raw)
            n += len(part)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return {"file": path.name, "tokens": n, "sha256": digest.hexdigest()}


def write_split(folder: Path, split: str, results: Iterable[tuple[np.ndarray, int, int]],
                shard_tokens: int) -> dict:
    """All shards of a split. Returns its entry in the index."""
    counts, bar = Counter(), tqdm(desc=split, unit="B", unit_scale=True)

    def pieces():
        for ids, n_documents, n_bytes in results:
            counts.update(tokens=len(ids), documents=n_documents, bytes=n_bytes)
            bar.update(n_bytes)
            yield ids

    shards = [write_shard(folder / f"{split}_{number:05d}.bin", map(itemgetter(1), parts))
              for number, parts in groupby(cut(pieces(), shard_tokens), itemgetter(0))]
    bar.close()
    return {**counts, "shards": shards}


def make_room(folder: Path, overwrite: bool) -> None:
    """Remove what an interrupted run left, and finished shards if told to; nothing else ever."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; --out names a folder")
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.iterdir(), key=lambda file: (file.name != "index.json", file.name))
    foreign = [file.name for file in files if not re.fullmatch(OURS, file.name)]
    if foreign:
        raise ValueError(f"{folder}: {foreign[0]} does not belong to a folder of shards; name "
                         "another --out")
    if files and files[0].name == "index.json" and not overwrite:
        raise ValueError(f"{folder} holds finished shards; name another --out or give --overwrite")
    for file in files:                            # index.json goes first: no longer complete
        file.unlink()


def main(cfg: Config) -> dict:
    """Write a folder of shards; returns its index. Raises ValueError for bad options and rows."""
    if cfg.verify:
        return verify(cfg.verify)
    if cfg.workers < 1 or cfg.shard_tokens < 1:
        raise ValueError(f"--workers {cfg.workers} --shard_tokens {cfg.shard_tokens}: both must be "
                         "at least 1")
    next(read(cfg, "train"))                      # a wrong --data stops before anything is removed
    if cfg.tokenizer == "bpe":
        tokenizer = Tokenizer.train(read(cfg, "train", cfg.tokenizer_bytes), cfg.vocab_size,
                                    progress=True)
    else:
        tokenizer = Tokenizer.bytes() if cfg.tokenizer == "bytes" else Tokenizer.load(cfg.tokenizer)
    out = Path(cfg.out)
    make_room(out, cfg.overwrite)
    tokenizer.save(out)
    tokenizer_of.cache_clear()                    # it may know one that was in --out before

    splits = {}
    # fresh processes: a copy of one with torch's threads in it could hang
    with (ProcessPoolExecutor(cfg.workers, get_context("spawn"), end_with_parent)
          if cfg.workers > 1 else nullcontext()) as pool:
        for split in SPLITS:
            chunks = chunked(read(cfg, split))
            results = (in_order(pool, cfg.out, chunks, 2 * cfg.workers) if pool
                       else map(partial(encode, cfg.out), chunks))
            splits[split] = write_split(out, split, results, cfg.shard_tokens)

    index = {"dtype": id_type(tokenizer.vocab_size).name, "vocab_size": tokenizer.vocab_size,
             "tokenizer_sha256": sha256(out / "tokenizer.json"), "source": cfg.data,
             "splits": splits}
    temporary = out / "index.json.tmp"
    temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    temporary.replace(out / "index.json")
    for split, entry in splits.items():
        print(f"{out} {split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
              f"{entry['tokens']:,} tokens in {len(entry['shards'])} shards")
    return index


# ---------------------------------------------------------------------- reading

class ShardedTokens:
    """The shards of a split as one 1-D array of which only what is indexed is read.

    tokens[at] -> ids of at's shape for an integer array of any shape with values 0 .. len - 1;
    tokens[a:b] -> a copy. dtype; n_documents; n_bytes: of the text. Files are mapped into memory
    when first used, at most 256 at a time. An id that is not in the vocabulary raises ValueError.
    NumPy's functions get a copy of everything: for held-out splits and small corpora.
    """
    def __init__(self, folder: Path, index: dict, split: str):
        entry = index["splits"][split]
        self.n_documents, self.n_bytes = entry["documents"], entry["bytes"]
        self.files = [folder / shard["file"] for shard in entry["shards"]]
        self.ends = np.cumsum([shard["tokens"] for shard in entry["shards"]])
        self.dtype, self.vocab_size = np.dtype(index["dtype"]), index["vocab_size"]
        self.shard = lru_cache(maxsize=256)(self.map_shard)

    def map_shard(self, number: int) -> np.ndarray:
        mapped = np.memmap(self.files[number], self.dtype.newbyteorder("<"), "r")
        return np.asarray(mapped)                 # plain: memmap's own indexing is slower

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, at: np.ndarray | slice) -> np.ndarray:
        at = np.arange(*at.indices(len(self))) if isinstance(at, slice) else np.asarray(at)
        if not at.size:
            return np.empty(at.shape, self.dtype)
        if not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"places {at.min()} .. {at.max()} are not all in 0 .. {len(self) - 1}")
        places, ids = at.ravel(), np.empty(at.size, self.dtype)
        numbers = np.searchsorted(self.ends, places, side="right")
        # windows are neighbours in one shard, seldom in two: copy as long as the shard is the same
        changes = np.flatnonzero(np.diff(numbers)) + 1
        for i, j in pairwise([0, *changes.tolist(), at.size]):
            shard = self.shard(number := int(numbers[i]))
            ids[i:j] = shard[places[i:j] - (self.ends[number] - len(shard))]
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{self.files[numbers[ids.argmax()]]}: damaged: it holds the id "
                             f"{ids.max()}, the vocabulary has {self.vocab_size}; write the "
                             "shards again")
        return ids.reshape(at.shape)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def found(data: str) -> bool:
    """Is this a folder of shards, finished or not?"""
    return (Path(data) / "index.json").exists() or any(Path(data).glob("heldout_?????.bin*"))


def read_index(folder: Path) -> dict:
    """index.json. Raises ValueError if it is missing, or not what main() writes."""
    file = folder / "index.json"
    if not file.exists():
        raise ValueError(f"{folder}: no index.json, so these shards are not complete (or "
                         f"none): run shards.py --out {folder} again")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        for entry in map(index["splits"].__getitem__, SPLITS):
            if not 0 < entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"]):
                raise ValueError("its shards do not add up to its tokens")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); write the shards "
                         "again") from None
    return index


def open_tokens(folder: str | Path, split: str,
                tokenizer: Tokenizer | None = None) -> ShardedTokens:
    """A split of a folder of shards; sizes are checked here, checksums by verify() alone.

    tokenizer: the one of the model that is to read them. Raises ValueError for a folder that is
    not complete, a shard that is missing or of another size, and a vocabulary that differs.
    """
    folder, index = Path(folder), read_index(Path(folder))
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be "train" or "heldout"')
    own = Tokenizer.load(folder)
    if sha256(folder / "tokenizer.json") != index["tokenizer_sha256"]:
        raise ValueError(f"{folder / 'tokenizer.json'} is not the one these shards were written "
                         "with (its checksum differs); put that one back or write them again")
    ids = [(t.ranks, t.pattern, t.endoftext) for t in (own, tokenizer or own)]
    if ids[0] != ids[1]:                          # other special tokens do not occur in shards
        raise ValueError(f"{folder} was written with another vocabulary ({own.vocab_size:,} "
                         f"tokens) than the one given ({tokenizer.vocab_size:,} tokens): write "
                         "shards with shards.py --tokenizer FOLDER, or use theirs")
    for shard in index["splits"][split]["shards"]:
        file, size = folder / shard["file"], shard["tokens"] * np.dtype(index["dtype"]).itemsize
        if not file.exists():
            raise ValueError(f"{file} is missing; index.json counts {shard['tokens']:,} tokens in "
                             "it: put it back or write the shards again")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes; {shard['tokens']:,} "
                             f"tokens take {size:,}: it is damaged, write the shards again")
    return ShardedTokens(folder, index, split)


def verify(folder: str | Path) -> dict:
    """Read every shard and compare its checksum; returns the index. Raises ValueError."""
    folder, index = Path(folder), read_index(Path(folder))
    for split in SPLITS:
        open_tokens(folder, split)
        for shard in tqdm(index["splits"][split]["shards"], split, unit=" shards"):
            if sha256(folder / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{folder / shard['file']} is damaged (its checksum differs); "
                                 "write the shards again")
    return index


if __name__ == "__main__":
    import training

    training.command_line(main, Config, __doc__)
