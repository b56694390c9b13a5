"""
Pretraining's data (001 section 1.6, step 1): corpora, as text or as shards, become one object whose
.batch(step) is all that an optimizer step reads.

    texts = read_texts(cfg)                       {(corpus, split): documents}
    texts, n = drop_duplicates(texts)             1.1
    texts, n = drop_empty(texts)                  1.2
    ids = tokenize(texts, tokenizer)              1.3
    streams = concatenate(ids, texts, tokenizer)  1.4, or open_shards()
    windows = cut(streams, cfg, ...)              1.5
    train = TrainingData(windows, cfg, run, ...)  1.6, several corpora mixed by p_i ~ n_i^alpha

Everything is keyed by (corpus, split): ("world", "train"), ("world", "heldout"), ...
"""
import itertools
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import shards
from data import Batch, TokenStream, copying_batch, id_dtype, mixing_weights, row_numbers
from readers import read_documents, without_duplicates, without_empty
from tokenizer import Tokenizer

SPLITS = "train", "heldout"
Texts = dict[tuple[str, str], list[str]]


class Stream(NamedTuple):
    """One split of a corpus as a single run of tokens."""
    tokens: "np.ndarray | shards.ShardedTokens"       # (N,), <|endoftext|> after each document
    n_documents: int
    n_bytes: int                                      # of the text, in UTF-8


# ---------------------------------------------------------------------- texts

def names_of(option: str) -> list[str]:
    """"world, bearish" -> ["world", "bearish"]."""
    return [name.strip() for name in option.split(",")] if option else []


def all_names(cfg) -> list[str]:
    """The corpora of --data and --anneal_data, each once."""
    return list(dict.fromkeys(names_of(cfg.data) + names_of(cfg.anneal_data)))


def read_texts(cfg) -> Texts:
    """The documents of every corpus that is not a folder of shards. Of a world or a long file at
    most --max_bytes are read, a twentieth of that for validation."""
    texts = {}
    for name in all_names(cfg):
        if shards.found(name):
            continue                                  # open_shards() has its tokens
        for split in SPLITS:
            max_bytes = cfg.max_bytes if split == "train" else cfg.max_bytes // 20
            documents = read_documents(name, split=split, max_bytes=max_bytes,
                                       bad_rows=cfg.bad_rows)
            texts[name, split] = list(documents)
    return texts


def drop_duplicates(texts: Texts) -> tuple[Texts, int]:
    """Of documents of one corpus and split that are the same to the letter the first stays; also
    returns how many went."""
    return filtered(texts, without_duplicates)


def drop_empty(texts: Texts) -> tuple[Texts, int]:
    """Documents without a single letter or digit go; also returns how many."""
    return filtered(texts, without_empty)


def filtered(texts: Texts, keep: Callable) -> tuple[Texts, int]:
    kept = {}
    n_dropped = 0
    for key, documents in texts.items():
        kept[key] = list(keep(documents))
        n_dropped += len(documents) - len(kept[key])
    return kept, n_dropped


# ---------------------------------------------------------------------- tokens

def pick_tokenizer(cfg, texts: Texts, init: Tokenizer | None, out: Path) -> Tokenizer:
    """The tokenizer of the run: that of the checkpoint with --resume, that of --init (extended by
    --new_words), or as --tokenizer says: bytes, a folder, or bpe, which is that of shards or one
    trained on all texts."""
    if cfg.resume and (out / "tokenizer.json").exists():
        return Tokenizer.load(out)
    first = all_names(cfg)[0]                         # the corpus that decides
    # a model's embeddings belong to its own tokenizer
    if init is not None:
        if cfg.new_words:
            return init.extended(texts[first, "train"], cfg.new_words)
        return init
    if cfg.tokenizer == "bytes":
        return Tokenizer.bytes()
    if cfg.tokenizer != "bpe":
        return Tokenizer.load(cfg.tokenizer)
    if shards.found(first):
        return Tokenizer.load(first)
    # on held-out texts nothing is trained, not even a tokenizer
    training_texts = [texts[name, "train"] for name in all_names(cfg) if (name, "train") in texts]
    return Tokenizer.train(itertools.chain(*training_texts), cfg.model.vocab_size)


def tokenize(texts: Texts, tokenizer: Tokenizer) -> dict[tuple[str, str], list[np.ndarray]]:
    """The ids of each document."""
    dtype = id_dtype(tokenizer.vocab_size)            # because Python's lists take 18 times as much
    ids = {}
    for key, documents in texts.items():
        ids[key] = [np.array(tokenizer.encode(document), dtype) for document in documents]
    return ids


def concatenate(ids: dict[tuple[str, str], list[np.ndarray]], texts: Texts,
                tokenizer: Tokenizer) -> dict[tuple[str, str], Stream]:
    """All documents of a split behind each other, <|endoftext|> after each."""
    streams = {}
    for key, documents in ids.items():
        # behind each document, so that a text is predicted to end and the next one begins after it
        end = np.array([tokenizer.endoftext], id_dtype(tokenizer.vocab_size))
        pieces = [end[:0]]                            # so that no document at all is an array, too
        for document in documents:
            pieces.append(document)
            pieces.append(end)
        n_bytes = sum(len(text.encode()) for text in texts[key])
        streams[key] = Stream(np.concatenate(pieces), len(documents), n_bytes)
    return streams


def open_shards(cfg, tokenizer: Tokenizer) -> dict[tuple[str, str], Stream]:
    """The corpora that shards.py has tokenized and concatenated."""
    streams = {}
    for name in all_names(cfg):
        if shards.found(name):
            for split in SPLITS:
                tokens = shards.open_tokens(name, split, tokenizer)
                streams[name, split] = Stream(tokens, tokens.n_documents, tokens.n_bytes)
    return streams


def cut(streams: dict[tuple[str, str], Stream], cfg, length: int,
        endoftext: int) -> dict[tuple[str, str], TokenStream]:
    """Windows of length + 1 tokens. Attention stays inside a document (--document_masks), unless
    each corpus is a single one."""
    several = any(stream.n_documents > 1 for (_, split), stream in streams.items()
                  if split == "train")
    masks = cfg.document_masks and several
    windows = {}
    for key, stream in streams.items():
        windows[key] = TokenStream(stream.tokens, length, cfg.seed, endoftext,
                                   document_masks=masks)
    return windows


def bytes_per_token(streams: dict[tuple[str, str], Stream]) -> dict[str, float]:
    """Of each corpus' held-out text."""
    found = {}
    for (name, split), stream in streams.items():
        if split == "heldout":
            found[name] = stream.n_bytes / len(stream.tokens)
    return found


# ---------------------------------------------------------------------- mixing

def mixing_shares(sizes: list[int], alpha: float) -> list[float]:
    """p_i = n_i^alpha / sum_j n_j^alpha of corpora of n_i tokens (004; 1 / alpha is a temperature).

    1: as they are; 0.3: small ones count for more (Conneau et al. 2020); 0: all alike.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 (all alike) to 1 (by size)")
    tau = 1 / alpha if alpha else math.inf
    return list(mixing_weights(dict(enumerate(sizes)), tau).values())


def mixed(names: list[str], shares: str,
          windows: dict[tuple[str, str], TokenStream], alpha: float) -> tuple:
    """The training windows of these corpora as one source, and the share of each corpus in it.
    shares: "0.8,0.2", or "" for shares by alpha."""
    streams = [windows[name, "train"] for name in names]
    parts = [float(share) for share in names_of(shares)]
    if not parts:                                     # n_i: tokens, not documents
        parts = mixing_shares([len(stream.tokens) for stream in streams], alpha)
    mixture = Mixture(streams, parts)                 # also checks the shares of a single one
    source = mixture if len(names) > 1 else streams[0]
    return source, dict(zip(names, parts))


class Mixture:
    """Windows of several TokenStreams, of each its share; usable where one stream is.

    Of the first n * BLOCK rows a stream with cumulative shares from a to b has those numbered
    floor(n BLOCK a) to floor(n BLOCK b): the shares hold exactly, block by block, and a row's
    number in its own stream is known without counting. Inside a block the order is shuffled.
    """
    BLOCK = 256

    def __init__(self, streams: list[TokenStream], shares: list[float]):
        if len(shares) != len(streams) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares {shares} of {len(streams)} corpora: give one for each, "
                             "none negative, together 1")
        self.streams = streams
        self.ends = np.cumsum([0.0, *shares]).round(9)        # cumulative: [0, 0.8, 1]
        self.context_length = streams[0].context_length
        self.seed = streams[0].seed
        self.endoftext = streams[0].endoftext
        self.order = lru_cache(maxsize=4)(self.order_block)

    @property
    def tokens(self) -> np.ndarray:
        """All corpora, one after the other."""
        return np.concatenate([np.asarray(stream.tokens[:]) for stream in self.streams])

    def __len__(self) -> int:
        """Windows of all streams together."""
        return sum(len(stream) for stream in self.streams)

    def order_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each of the block's rows, and the row's number in it, (BLOCK,) each."""
        # (2, streams + 1): rows up to each border before this block, and after it
        bounds = np.floor(np.outer([block, block + 1], self.BLOCK * self.ends)).astype(int)
        before, after = np.diff(bounds, axis=1)               # (streams,) rows of each so far
        stream_of = np.repeat(np.arange(len(self.streams)), after - before)
        stream_of = np.random.default_rng((self.seed, block)).permutation(stream_of)
        number = np.empty_like(stream_of)
        for stream, first in enumerate(before):
            here = stream_of == stream
            number[here] = first + np.arange(here.sum())
        return stream_of, number

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.rows(row_numbers(step, batch_size, rank, world_size))

    def rows(self, numbers: Iterable[int]) -> Batch:
        rows = []
        for number in numbers:
            block, place = divmod(number, self.BLOCK)
            stream_of, number_in_stream = self.order(block)
            stream = self.streams[stream_of[place]]
            rows.append(stream.rows([number_in_stream[place]]))
        # one row each -> columns of the batch: tokens (B, T), loss_mask (B, T), ...
        columns = {}
        for name in ("tokens", "loss_mask", "documents", "positions", "index"):
            values = [getattr(row, name) for row in rows]
            columns[name] = None if values[0] is None else torch.cat(values)
        return Batch(**columns)


# ---------------------------------------------------------------------- one object for the loop

def copying_steps(cfg) -> int:
    """How many steps of a new model copy: --copy_steps, but at most a sixth of all steps."""
    return min(cfg.copy_steps, cfg.steps // 6)


class TrainingData:
    """What each optimizer step reads: at first copying, then the corpora, at last --anneal_data.

    batch(step) is a pure function of the step, so that a resumed run reads what it would have read.
    wrap: turns windows into another objective's source (objectives.Denoised).
    """

    def __init__(self, windows: dict[tuple[str, str], TokenStream], cfg, run, n_words: int,
                 wrap: Callable = lambda source: source):
        self.cfg = cfg
        self.run = run
        self.n_words = n_words                        # ordinary tokens, to copy
        source, self.shares = mixed(names_of(cfg.data), cfg.shares, windows, cfg.alpha)
        self.text = wrap(source)
        self.last_text = self.text
        if cfg.anneal_data:
            source, _ = mixed(names_of(cfg.anneal_data), "", windows, cfg.alpha)
            self.last_text = wrap(source)
        # a model from --init can look back already
        self.text_from = 0 if cfg.init else copying_steps(cfg)
        self.last_text_from = cfg.steps
        if cfg.anneal_data:                           # while the learning rate falls (wsd)
            self.last_text_from = round((1 - cfg.decay) * cfg.steps)
        # steps at which other text begins, whose losses are no measure of a spike
        self.changes = (self.text_from, self.last_text_from)

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of this step, this rank's share, on its device."""
        run = self.run
        size = self.cfg.batch_size
        micro_batches = []
        for i in range(self.cfg.grad_accum):
            number = step * self.cfg.grad_accum + i        # counted through all steps
            if step < self.text_from:
                # twice as many rows of at most 64 tokens, because a period has at most 16
                make = getattr(self.text, "copying_batch", copying_batch)
                length = min(64, self.text.context_length)
                batch = make(self.n_words, 2 * size, length, self.cfg.seed,
                             number * run.replicas + run.replica)
            else:
                source = self.text if step < self.last_text_from else self.last_text
                batch = source.rows(row_numbers(number, size, run.replica, run.replicas))
            micro_batches.append(batch.to(run.device))
        return micro_batches
