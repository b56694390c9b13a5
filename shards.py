"""
A corpus larger than memory -> shards: files of token ids that training reads where it needs them.

  1. READ    documents one at a time, readers.py's formats and splits; a chunk is about 1 MB of text
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
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from multiprocessing import get_context, parent_process
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing import claim
from plumbing.claim import sha256
from tokenizer import Tokenizer

SPLITS = ("heldout", "train")           # the short one first: if it is empty, that shows early
CHECKED = 10 ** 9                       # bytes of a split whose checksums opening it compares
CHUNK = 1 << 20                       # characters that a worker is given at a time, at least


@dataclass
class Config:
    data: str = "world"               # corpus: world, world:SEED, a text file, JSONL or folder
    out: str = "out/shards"           # folder to write
    max_bytes: int = 0                # stop after so much text; 0: all, of a world 20 MB
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    tokenizer: str = "bpe"            # bpe (trained on the first part) | bytes | a folder with one
    vocab_size: int = 2048            # tokens of a new tokenizer, special ones included, >= 1
    tokenizer_bytes: int = 20_000_000     # how much text a new tokenizer is trained on, >= 1
    workers: int = 2                  # processes that encode; 1: this one alone, >= 1
    shard_tokens: int = 100_000_000   # tokens in a file, the last of a split excepted, >= 1
    verify: str = ""                  # write nothing; compare this folder's files with their sums
    overwrite: bool = False           # throw away the finished shards in --out


# ---------------------------------------------------------------------- writing

def read(cfg: Config, split: str, at_most: float = math.inf) -> Iterator[str]:
    """The documents of a split; with --max_bytes a twentieth of that is held out, as in training
    from text. at_most: a lower limit in bytes."""
    import readers  # not above: the workers, which only encode, start sooner without it

    max_bytes = math.inf
    if cfg.max_bytes:
        max_bytes = cfg.max_bytes
    elif readers.world_named(cfg.data):
        max_bytes = 20_000_000                    # because a world has no end
    # held out is a twentieth, but an infinite limit stays one: inf // 20 is not a number
    if split == "heldout" and max_bytes < math.inf:
        max_bytes //= 20
    documents = readers.read_documents(cfg.data, min(max_bytes, at_most), split,
                                       bad_rows=cfg.bad_rows)
    # as pretraining from text does (001 section 1.6, 1.1 and 1.2)
    return readers.without_empty(readers.without_duplicates(documents))


def chunked(documents: Iterable[str]) -> Iterator[list[str]]:
    """Neighbouring documents in lists of CHUNK characters, or a little more."""
    chunk = []
    n_characters = 0
    for document in documents:
        chunk.append(document)
        n_characters += len(document)
        if n_characters >= CHUNK:
            yield chunk
            chunk = []
            n_characters = 0
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
    dtype = id_type(tokenizer.vocab_size)         # small ids cost less to send back, too
    pieces = []
    for document in documents:
        ids = tokenizer.encode(document)
        pieces.append(np.array([*ids, tokenizer.endoftext], dtype))
    return np.concatenate(pieces), len(documents), n_bytes


def end_with_parent() -> None:
    """In a worker: leave when the process that started it is gone, even if that was killed."""
    def wait():
        parent_process().join()
        # not sys.exit, because that would end this thread alone
        os._exit(1)

    # daemon, so that a worker whose work is done does not wait for this thread
    threading.Thread(target=wait, daemon=True).start()


def in_order(pool: ProcessPoolExecutor, folder: str, chunks: Iterable[list[str]],
             ahead: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """encode() of each chunk by any free worker, in the order of the chunks. At most `ahead` are
    under way, so that a reader faster than the workers does not fill the memory."""
    waiting = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode, folder, chunk))
        # the oldest chunk is next in order: its result is waited for, whoever else is ready
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    # the last `ahead` chunks are under way when the reader comes to its end
    while waiting:
        yield waiting.popleft().result()


def cut(pieces: Iterable[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a shard, ids): no piece goes on beyond the end of its shard.

    cut([[1, 2], [3, 4, 5]], 3) -> (0, [1, 2]), (0, [3]), (1, [4, 5])
    """
    n_cut = 0                                     # ids so far, over all shards
    for piece in pieces:
        while len(piece):
            number, filled = divmod(n_cut, size)
            room = size - filled
            part = piece[:room]
            piece = piece[room:]
            n_cut += len(part)
            yield number, part


def write_shard(path: Path, parts: Iterable[np.ndarray]) -> dict:
    """One file, whole or not at all: a temporary name, fsync, rename. Returns its index entry."""
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    n_tokens = 0
    with temporary.open("wb") as file:
        for part in parts:
            raw = part.tobytes()
            file.write(raw)
            digest.update(raw)
            n_tokens += len(part)
        # on the disk before it has its name: a power cut leaves no half file under that name
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return {"file": path.name, "tokens": n_tokens, "sha256": digest.hexdigest()}


def write_split(folder: Path, split: str, results: Iterable[tuple[np.ndarray, int, int]],
                shard_tokens: int) -> dict:
    """All shards of a split. Returns its entry in the index."""
    counts = Counter()
    bar = tqdm(desc=split, unit="B", unit_scale=True)

    def counted_ids():
        for ids, n_documents, n_bytes in results:
            counts.update(tokens=len(ids), documents=n_documents, bytes=n_bytes)
            bar.update(n_bytes)
            yield ids

    shards = []
    # ids flow from reader to file piece by piece: groupby() gives all pieces of one shard
    numbered_parts = cut(counted_ids(), shard_tokens)
    for number, group in groupby(numbered_parts, key=itemgetter(0)):
        path = folder / f"{split}_{number:05d}.bin"
        claim.add(folder, path.name)
        shards.append(write_shard(path, (part for _, part in group)))
    bar.close()
    return {**counts, "shards": shards}


def place_to_write(out: Path, overwrite: bool) -> Path:
    """--out, or out.new where finished shards are to be replaced: they stay until the new ones are
    complete, because a bad row may be the last. Raises ValueError without --overwrite, and for a
    folder with somebody else's files in it."""
    if not (out / "index.json").exists():
        make_room(out)
        return out
    if not overwrite:
        raise ValueError(f"{out} holds finished shards; name another --out or give --overwrite")
    claim.lock(out)
    refuse_others(out)
    new = out.with_name(out.name + ".new")
    make_room(new)
    return new


def make_room(folder: Path) -> None:
    """Remove what an interrupted run left, and nothing else ever."""
    claim.lock(folder)
    refuse_others(folder)
    claim.remove_written(folder)


def refuse_others(folder: Path) -> None:
    """Raises ValueError for a file that shards.py did not write."""
    known = claim.written(folder)
    for file in sorted(folder.iterdir()):
        name = file.name.removesuffix(".tmp")
        if name not in (*known, claim.LIST, claim.LOCK):
            raise ValueError(f"{folder}: {file.name} does not belong to a folder of shards; name "
                             "another --out")


def take_place(new: Path, out: Path) -> None:
    """Put the complete shards of `new` where others are."""
    # The index goes first and comes last, because a folder that has one passes for complete.
    (out / "index.json").unlink()
    claim.remove_written(out)
    names = claim.written(new)
    claim.add(out, *names)
    for name in sorted(names, key=lambda name: name == "index.json"):
        (new / name).rename(out / name)
    claim.unlock(new)
    claim.remove_marks(new)
    claim.remove_empty(new)


def main(cfg: Config) -> dict:
    """Write a folder of shards; returns its index. Raises ValueError for bad options and rows."""
    if cfg.verify:
        return verify(cfg.verify)
    if cfg.workers < 1 or cfg.shard_tokens < 1:
        raise ValueError(f"--workers {cfg.workers} --shard_tokens {cfg.shard_tokens}: both must be "
                         "at least 1")
    next(read(cfg, "train"))                      # a wrong --data stops before anything is removed
    tokenizer = pick_tokenizer(cfg)
    out = Path(cfg.out)
    folder = place_to_write(out, cfg.overwrite)
    claim.add(folder, "tokenizer.json", "index.json")
    tokenizer.save(folder)
    tokenizer_of.cache_clear()                    # it may know one that was there before

    splits = write_splits(cfg, folder)

    index = {"dtype": id_type(tokenizer.vocab_size).name, "vocab_size": tokenizer.vocab_size,
             "tokenizer_sha256": sha256(folder / "tokenizer.json"), "source": cfg.data,
             "splits": splits}
    # last of all: a folder with an index is complete
    text = json.dumps(index, indent=1)
    claim.write_whole(folder / "index.json",
                      lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if folder != out:
        take_place(folder, out)
    claim.unlock(out)
    for split, entry in splits.items():
        print(f"{out} {split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
              f"{entry['tokens']:,} tokens in {len(entry['shards'])} shards")
    return index


def pick_tokenizer(cfg: Config) -> Tokenizer:
    if cfg.tokenizer == "bytes":
        return Tokenizer.bytes()
    if cfg.tokenizer == "bpe":
        # the first part will do: frequent pairs are frequent everywhere
        beginning = read(cfg, "train", cfg.tokenizer_bytes)
        return Tokenizer.train(beginning, cfg.vocab_size, progress=True)
    return Tokenizer.load(cfg.tokenizer)


def write_splits(cfg: Config, folder: Path) -> dict[str, dict]:
    """All shards of both splits. Returns {split: its entry in the index}."""
    splits = {}
    if cfg.workers == 1:
        for split in SPLITS:
            chunks = chunked(read(cfg, split))
            encoded = (encode(str(folder), chunk) for chunk in chunks)
            splits[split] = write_split(folder, split, encoded, cfg.shard_tokens)
        return splits
    # "spawn", because a forked copy of a process with torch's threads in it could hang
    try:
        with ProcessPoolExecutor(cfg.workers, get_context("spawn"), end_with_parent) as pool:
            for split in SPLITS:
                chunks = chunked(read(cfg, split))
                encoded = in_order(pool, str(folder), chunks, ahead=2 * cfg.workers)
                splits[split] = write_split(folder, split, encoded, cfg.shard_tokens)
    except BrokenProcessPool:
        raise OSError("a worker was killed, perhaps because memory was short; give fewer "
                      "--workers, and the same command begins again") from None
    return splits


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
        shards = entry["shards"]
        self.n_documents = entry["documents"]
        self.n_bytes = entry["bytes"]
        self.files = [folder / shard["file"] for shard in shards]
        # shard s holds the places ends[s - 1] .. ends[s] - 1 of the array
        self.ends = np.cumsum([shard["tokens"] for shard in shards])
        self.dtype = np.dtype(index["dtype"])
        self.vocab_size = index["vocab_size"]
        # at most 256 mapped files, because systems limit how many a process may hold
        self.shard = lru_cache(maxsize=256)(self.map_shard)

    def map_shard(self, number: int) -> np.ndarray:
        mapped = np.memmap(self.files[number], self.dtype.newbyteorder("<"), "r")
        return np.asarray(mapped)                 # plain: memmap's own indexing is slower

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        # for NumPy's own functions; copy=False, because self[:] is a copy already
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, at: np.ndarray | slice) -> np.ndarray:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            at = np.arange(start, stop, step)
        at = np.asarray(at)
        if not at.size:
            return np.empty(at.shape, self.dtype)
        if not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"places {at.min()} .. {at.max()} are not all in 0 .. {len(self) - 1}")
        places = at.ravel()                                           # (N,)
        ids = np.empty(at.size, self.dtype)
        shard_of = np.searchsorted(self.ends, places, side="right")   # (N,) numbers of shards
        # a window lies in one shard, seldom in two: copied in runs of places in the same shard
        changes = np.flatnonzero(np.diff(shard_of)) + 1
        borders = [0, *changes.tolist(), at.size]
        for i, j in pairwise(borders):
            number = int(shard_of[i])
            shard = self.shard(number)
            shard_begin = self.ends[number] - len(shard)
            ids[i:j] = shard[places[i:j] - shard_begin]
        # checked here, because a model's embedding fails on such an id without naming a file
        largest = ids.max()
        if largest >= self.vocab_size:
            file = self.files[shard_of[ids.argmax()]]
            raise ValueError(f"{file}: damaged: it holds the id {largest}, the vocabulary has "
                             f"{self.vocab_size}; write the shards again")
        return ids.reshape(at.shape)


def found(data: str) -> bool:
    """Is this a folder of shards, finished or not?"""
    folder = Path(data)
    # the held-out split is written first: an interrupted run has at least its first file
    return (folder / "index.json").exists() or any(folder.glob("heldout_?????.bin*"))


def read_index(folder: Path) -> dict:
    """index.json as main() writes it. Raises ValueError if it is missing or damaged."""
    file = folder / "index.json"
    if not file.exists():
        raise ValueError(f"{folder}: no index.json, so these shards are not complete (or "
                         f"none): run shards.py --out {folder} again")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        for split in SPLITS:
            entry = index["splits"][split]
            n_tokens = sum(shard["tokens"] for shard in entry["shards"])
            if n_tokens <= 0 or n_tokens != entry["tokens"]:
                raise ValueError("its shards do not add up to its tokens")
            for shard in entry["shards"]:
                # so that no file elsewhere is read, whatever a damaged index says
                if not re.fullmatch(rf"{split}_\d{{5,}}\.bin", shard["file"]):
                    raise ValueError(f"{shard['file']} is not the name of a shard")
                if shard["tokens"] < 1 or not isinstance(shard["sha256"], str):
                    raise ValueError(f"the entry of {shard['file']} is not whole")
        if index["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {index['dtype']!r}")
        if type(index["vocab_size"]) is not int:
            raise ValueError(f"vocab_size is {index['vocab_size']!r}")
        if type(index["tokenizer_sha256"]) is not str:
            raise ValueError(f"tokenizer_sha256 is {index['tokenizer_sha256']!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); write the shards "
                         "again") from None
    return index


def open_tokens(folder: str | Path, split: str,
                tokenizer: Tokenizer | None = None) -> ShardedTokens:
    """A split of a folder of shards. Sizes are checked, and checksums of a split of at most
    CHECKED bytes; of larger ones by verify() alone, because that reads every byte.

    tokenizer: the one of the model that is to read them. Raises ValueError for a folder that is
    not complete, a shard that is missing or of another size, and a vocabulary that differs.
    """
    folder = Path(folder)
    index = read_index(folder)
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be "train" or "heldout"')
    own = Tokenizer.load(folder)
    if sha256(folder / "tokenizer.json") != index["tokenizer_sha256"]:
        raise ValueError(f"{folder / 'tokenizer.json'} is not the one these shards were written "
                         "with (its checksum differs); put that one back or write them again")
    if tokenizer is not None and not same_ids(own, tokenizer):
        raise ValueError(f"{folder} was written with another vocabulary ({own.vocab_size:,} "
                         f"tokens) than the one given ({tokenizer.vocab_size:,} tokens): write "
                         "shards with shards.py --tokenizer FOLDER, or use theirs")
    token_bytes = np.dtype(index["dtype"]).itemsize
    for shard in index["splits"][split]["shards"]:
        check_size(folder / shard["file"], shard["tokens"], token_bytes)
    if is_small(index, split):
        for shard in index["splits"][split]["shards"]:
            check_content(folder / shard["file"], shard["sha256"])
    return ShardedTokens(folder, index, split)


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Do both give every text the same ids, and <|endoftext|>, too?"""
    # other special tokens may differ, because none of them occurs in shards
    names = ["ranks", "endoftext"]
    own = ["pattern"]
    imported = ["merges", "patterns", "nfc", "whole_words"]
    names += own if isinstance(a, Tokenizer) else imported
    return type(a) is type(b) and all(getattr(a, name) == getattr(b, name) for name in names)


def check_size(file: Path, n_tokens: int, token_bytes: int) -> None:
    if not file.exists():
        raise ValueError(f"{file} is missing; index.json counts {n_tokens:,} tokens in it: put it "
                         "back or write the shards again")
    size = file.stat().st_size
    expected_size = n_tokens * token_bytes
    if size != expected_size:
        raise ValueError(f"{file} has {size:,} bytes; {n_tokens:,} tokens take "
                         f"{expected_size:,}: it is damaged, write the shards again")


def is_small(index: dict, split: str) -> bool:
    """Whether opening a split compares its checksums."""
    return index["splits"][split]["tokens"] * np.dtype(index["dtype"]).itemsize <= CHECKED


def check_content(file: Path, checksum: str) -> None:
    if sha256(file) != checksum:
        raise ValueError(f"{file} is damaged (its checksum differs); write the shards again")


def verify(folder: str | Path) -> dict:
    """Read every shard and compare its checksum; returns the index. Raises ValueError."""
    folder = Path(folder)
    index = read_index(folder)
    for split in SPLITS:
        # sizes first: a shard that is missing or cut short shows without reading gigabytes
        open_tokens(folder, split)
        if is_small(index, split):                # its checksums have just been compared
            continue
        for shard in tqdm(index["splits"][split]["shards"], split, unit=" shards"):
            check_content(folder / shard["file"], shard["sha256"])
    return index


if __name__ == "__main__":
    from plumbing.options import command_line

    command_line(main, Config, __doc__)
