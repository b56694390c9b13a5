"""
What pretraining reads (001 section 1.6, step 1): one corpus or several, as text or as shards, under
one tokenizer and one objective -> batches.

  1.3-1.4  tokenize all documents, <|endoftext|> after each       (or shards.py has done it)
  1.5-1.6  cut into windows, shuffle, share among the ranks       (data.TokenStream)
           several corpora: mix them, p_i ~ n_i^alpha              (Mixture)
           another objective than the next token: hide something   (objectives.Denoised)
"""
import itertools
import math
from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

import data
import objectives
import shards
from tokenizer import Tokenizer


class Corpus(NamedTuple):
    """Sources of data.Batch: .batch(step, ...), .rows(numbers), .tokens, .context_length."""
    tokenizer: Tokenizer
    train: "data.TokenStream | Mixture | objectives.Denoised"
    anneal: "data.TokenStream | Mixture | objectives.Denoised"       # for the end of the schedule
    shares: dict[str, float]          # of the corpora in train
    trains: dict                      # {corpus: its source alone}
    vals: dict                        # {corpus: its held-out part}
    bytes_per_token: dict[str, float]  # of each corpus' held-out text


def read(cfg, tokenizer: Tokenizer | None) -> Corpus:
    """The corpora of --data and --anneal_data. cfg: train_pretrain.Config. tokenizer: that of the
    model to go on from; None: as --tokenizer says."""
    names, last = names_of(cfg.data), names_of(cfg.anneal_data)
    every, texts = list(dict.fromkeys(names + last)), {}
    for name in every:
        if not shards.found(name):
            texts[name] = [list(data.read_documents(name, split=split, max_bytes=n_bytes,
                                                    bad_rows=cfg.bad_rows))
                           for split, n_bytes in (("train", cfg.max_bytes),
                                                  ("heldout", cfg.max_bytes // 20))]
    tokenizer = tokenizer or pick_tokenizer(cfg, names[0], texts)
    if cfg.new_words:
        tokenizer = tokenizer.extended(texts[names[0]][0], cfg.new_words)
    plain = cfg.objective == "causal" and cfg.architecture in ("", "decoder")
    window = cfg.context_length
    if not plain:
        window = objectives.window_length(cfg.objective, cfg.architecture, cfg.context_length)
        tokenizer = objectives.with_special_tokens(tokenizer, cfg.objective, window)

    def source(stream):
        return stream if plain else objectives.Denoised(stream, tokenizer, cfg.objective,
                                                        cfg.architecture, cfg.next_sentence)

    def mixed(names: list[str], shares: str) -> tuple:
        sizes = [len(trains[name].tokens) for name in names]
        parts = [float(share) for share in names_of(shares)] or mixing_shares(sizes, cfg.alpha)
        mixture = Mixture([trains[name] for name in names], parts)
        return source(mixture if len(names) > 1 else trains[names[0]]), dict(zip(names, parts))

    trains, vals, bytes_per_token = {}, {}, {}
    for name in every:
        if name in texts:
            tokens = [data.tokenize_documents(split, tokenizer) for split in texts[name]]
            n_documents = len(texts[name][0])
            n_bytes = sum(len(text.encode()) for text in texts[name][1])
        else:
            tokens = [shards.open_tokens(name, split, tokenizer) for split in ("train", "heldout")]
            n_documents, n_bytes = tokens[0].n_documents, tokens[1].n_bytes
        bytes_per_token[name] = n_bytes / len(tokens[1])
        masks = cfg.document_masks and n_documents > 1
        trains[name], vals[name] = (data.TokenStream(ids, window, cfg.seed, tokenizer.endoftext,
                                                     document_masks=masks) for ids in tokens)
    train, shares = mixed(names, cfg.shares)
    anneal = mixed(last, "")[0] if last else train
    return Corpus(tokenizer, train, anneal, shares, trains,
                  {name: source(val) for name, val in vals.items()}, bytes_per_token)


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def pick_tokenizer(cfg, first: str, texts: dict[str, list]) -> Tokenizer:
    """--tokenizer: bytes, a folder, or bpe: that of shards, or one trained on all texts."""
    if cfg.tokenizer != "bpe":
        return Tokenizer.bytes() if cfg.tokenizer == "bytes" else Tokenizer.load(cfg.tokenizer)
    if shards.found(first):
        return Tokenizer.load(first)
    return Tokenizer.train(itertools.chain(*(train for train, _ in texts.values())), cfg.vocab_size)


def mixing_shares(sizes: list[int], alpha: float) -> list[float]:
    """p_i = n_i^alpha / sum_j n_j^alpha of corpora of n_i tokens (004; 1 / alpha is a temperature).

    1: as they are; 0.3: small ones count for more (Conneau et al. 2020); 0: all alike.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0 (all alike) to 1 (by size)")
    tau = 1 / alpha if alpha else math.inf
    return list(data.mixing_weights(dict(enumerate(sizes)), tau).values())


class Mixture:
    """Windows of several TokenStreams, of each its share; usable where one stream is.

    Of the first n * BLOCK rows a stream with cumulative shares from a to b has those numbered
    floor(n BLOCK a) to floor(n BLOCK b): the shares hold exactly, block by block, and a row's
    number in its own stream is known without counting. Inside a block the order is shuffled.
    """
    BLOCK = 256

    def __init__(self, streams: list[data.TokenStream], shares: list[float]):
        if len(shares) != len(streams) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares {shares} of {len(streams)} corpora: give one for each, "
                             "none negative, together 1")
        first = streams[0]
        self.streams, self.ends = streams, np.cumsum([0.0, *shares]).round(9)
        self.context_length, self.seed, self.endoftext = (first.context_length, first.seed,
                                                          first.endoftext)
        self.order = lru_cache(maxsize=4)(self.order_block)

    @property
    def tokens(self) -> np.ndarray:
        """All corpora, one after the other."""
        return np.concatenate([np.asarray(stream.tokens[:]) for stream in self.streams])

    def __len__(self) -> int:
        """Windows of all streams together."""
        return sum(map(len, self.streams))

    def order_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which stream each of the block's rows is of, and how many rows of it came before."""
        bounds = np.floor(np.outer([block, block + 1], self.BLOCK * self.ends)).astype(int)
        before, after = np.diff(bounds, axis=1)                    # (streams,) rows until then
        streams = np.repeat(np.arange(len(self.streams)), after - before)
        streams = np.random.default_rng((self.seed, block)).permutation(streams)
        number = np.empty_like(streams)
        for i, first in enumerate(before):
            number[streams == i] = first + np.arange((streams == i).sum())
        return streams, number

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> data.Batch:
        return self.rows(data.row_numbers(step, batch_size, rank, world_size))

    def rows(self, numbers: Iterable[int]) -> data.Batch:
        rows = []
        for block, place in (divmod(k, self.BLOCK) for k in numbers):
            streams, number = self.order(block)
            rows.append(self.streams[streams[place]].rows([number[place]]))
        values = ([getattr(row, field.name) for row in rows] for field in fields(data.Batch))
        return data.Batch(*(None if column[0] is None else torch.cat(column) for column in values))
