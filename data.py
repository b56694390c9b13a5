"""Rows -> batches: windows of a corpus, packing, padding, task mixing, the order of an epoch.

    TokenStream         windows of one long array of ids        001 section 1.6, steps 1.3-1.6
    PackedExamples      conversations, several to a row         3.4, task mixing 3.5
    PreferencePairs     chosen and rejected answers             4.5, 4.7
    left_pad            prompts for generation

Nothing here remembers a position: batch(step) is a pure function of seed, step, batch size and
rank, so a run that resumes sees what it would have seen. Rows are numbered through epoch after
epoch, each epoch a fresh permutation; a step takes the next batch_size * world_size numbers and
each rank its own part, so that all ranks together see every epoch exactly once.

A sequence is a pair (ids, mask) of equal length: the tokens of a conversation, and 1 where a token
is a target. Rows come from readers.py.
"""
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
import torch

import readers

LISTED = 1 << 20        # up to so many items an epoch's order is an array (8 MB); shuffled()


# ---------------------------------------------------------------------- batches

@dataclass
class Batch:
    """B rows of T tokens: logits[:, :-1] are scored by tokens[:, 1:] under loss_mask[:, 1:]."""
    tokens: torch.Tensor                # (B, T) int64
    loss_mask: torch.Tensor             # (B, T) bool: this token is a target
    documents: torch.Tensor | None      # (B, T) int32: number within the row, padding -1
    positions: torch.Tensor | None      # (B, T) int64: from 0 in each document
    index: torch.Tensor                 # int64: which windows, examples or pairs these are

    @cached_property
    def n_targets(self) -> int:
        # shifted targets: nothing predicts the first token of a row
        return int(self.loss_mask[:, 1:].sum())

    @property
    def n_tokens(self) -> int:
        """Tokens that a model reads, padding included; a row's last is only a target."""
        return self.tokens[:, 1:].numel()

    def to(self, device: torch.device | str) -> "Batch":
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = None if value is None else value.to(device)
        batch = type(self)(**moved)
        # counted before the move, because asking a GPU for a number waits for all its work
        batch.n_targets = self.n_targets
        return batch


# ---------------------------------------------------------------------- the order of an epoch

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
    places get the same entry (Luby & Rackoff 1988). An entry of n or above goes through the
    network again until it is below n: fewer than 4 passes on average, and still a permutation
    (Black & Rogaway 2002, cycle walking). f is splitmix64() of right and the round's key. Integers
    only: the same on every platform.
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)         # h bits; 2h bits hold n - 1
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(8, np.uint64)

    entries = places.astype(np.uint64)
    outside = np.ones(places.shape, bool)         # entries that have not come out below n yet
    while outside.any():
        left = entries[outside] >> half
        right = entries[outside] & low_bits
        for key in keys:
            mixed = left ^ splitmix64(right ^ key) & low_bits
            left = right
            right = mixed
        entries[outside] = left << half | right
        outside = entries >= np.uint64(n)
    return entries.astype(np.int64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of x, uint64, changes about half
    of the bits of the result. Products are modulo 2^64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xbf58476d1ce4e5b9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94d049bb133111eb)
    return x ^ x >> np.uint64(31)


def shuffled(numbers: Iterable[int], n: int, seed: int) -> np.ndarray:
    """Which of n items stands at each number (N,), int64. Numbers run through epoch after epoch,
    each a permutation of its own: an array up to LISTED items, beyond it single entries."""
    epochs, places = np.divmod(np.fromiter(numbers, np.int64), n)
    index = np.empty_like(places)
    # a batch at the end of an epoch takes its last rows from the next one
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        if n <= LISTED:
            index[here] = permutation(n, seed, epoch)[places[here]]
        else:
            index[here] = scattered(places[here], n, seed, epoch)
    return index


def permuted(n: int, seed: int, step: int, batch_size: int, rank: int = 0,
             world_size: int = 1) -> list[int]:
    """Which of n items a rank uses in a step, each item once an epoch."""
    numbers = row_numbers(step, batch_size, rank, world_size)
    return shuffled(numbers, n, seed).tolist()


def once(source: "TokenStream | PackedExamples | PreferencePairs",
         batch_size: int) -> Iterator[Batch]:
    """Every row of the first epoch exactly once; the last batch may be smaller."""
    n_rows = len(source)
    for first in range(0, n_rows, batch_size):
        yield source.rows(range(first, min(first + batch_size, n_rows)))


# ---------------------------------------------------------------------- windows of a corpus

def id_dtype(vocab_size: int) -> type:
    """Two bytes hold every id of a vocabulary up to 65,536: half the memory of int32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def tokenize_documents(documents: Iterable[str], tokenizer) -> np.ndarray:
    """All documents as one array of ids, <|endoftext|> after each."""
    dtype = id_dtype(tokenizer.vocab_size)
    pieces = [np.zeros(0, dtype)]                 # so that no documents are an array, too
    for document in documents:
        ids = tokenizer.encode(document)
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
        self.tokens = tokens
        self.context_length = context_length
        self.seed = seed
        self.endoftext = endoftext
        self.document_masks = document_masks
        n_targets = len(tokens) - 1
        self.n_windows = math.ceil(n_targets / context_length)        # in an epoch

    def __len__(self) -> int:
        return self.n_windows

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.rows(row_numbers(step, batch_size, rank, world_size))

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        return once(self, batch_size)

    def rows(self, numbers: Iterable[int]) -> Batch:
        size = self.context_length
        index = shuffled(numbers, self.n_windows, self.seed)          # (B,) windows
        first_target = index * size + 1                               # (B,) places in the corpus
        # the last window would reach beyond the corpus: it begins earlier and is full
        start = np.minimum(first_target - 1, len(self.tokens) - size - 1)
        places = start[:, None] + np.arange(size + 1)                 # (B, T) in the corpus
        tokens = self.tokens[places].astype(np.int64)
        # before a window's first target stand tokens that its neighbour scores
        loss_mask = places >= first_target[:, None]
        documents = positions = None
        if self.document_masks:
            documents, positions = self.layout(tokens)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(loss_mask), documents, positions,
                     torch.from_numpy(index))

    def layout(self, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Document numbers and positions (B, T): a document begins at each <|endoftext|>.

        With E for <|endoftext|>, a b E c d -> documents 0 0 1 1 1, positions 0 1 0 1 2.
        """
        begins = tokens == self.endoftext                             # (B, T)
        begins[:, 0] = True                       # a window may begin inside a document
        documents = begins.cumsum(1, dtype=np.int32) - 1
        t = np.arange(tokens.shape[1])
        # t of the latest beginning: the running maximum of t where a document begins
        latest_begin = np.maximum.accumulate(np.where(begins, t, 0), axis=1)
        return torch.from_numpy(documents), torch.from_numpy(t - latest_begin)


def copying_batch(vocab_size: int, rows: int, length: int, seed: int, step: int) -> Batch:
    """Rows of random tokens, repeated with a period of 4 to 16 that differs from row to row; in
    every other row each second time backwards: a b c d d c b a a b c d ...

    All there is to learn is to look back and fetch the token that came after another, or before
    it. A model that has learned it uses it on text from the start: see --copy_steps of
    train_pretrain.py. tokens: (rows, length + 1); every token is a target.
    """
    rng = np.random.default_rng((seed, step))
    period = rng.integers(4, 17, (rows, 1))                           # (rows, 1)
    t = np.arange(length + 1)[None]                                   # (1, length + 1)
    row = np.arange(rows)[:, None]                                    # (rows, 1)
    place = t % period                            # in the period, (rows, length + 1)
    repetition = t // period
    backwards = (row % 2 == 1) & (repetition % 2 == 1)
    place = np.where(backwards, period - 1 - place, place)
    # 16 random tokens a row, of which a row of period p uses the first p
    periods = rng.integers(0, vocab_size, (rows, 16))
    tokens = np.take_along_axis(periods, place, axis=1)
    loss_mask = torch.ones(tokens.shape, dtype=torch.bool)
    return Batch(torch.from_numpy(tokens), loss_mask, None, None, torch.arange(rows))


# ---------------------------------------------------------------------- sequences that are too long

def fit(sequences: list[tuple], limit: int, truncate: str, where: str) -> list[tuple] | None:
    """Sequences that share one prompt, cut to at most `limit` tokens; None: drop them.

    "left" takes the same tokens from the start of each; the last response must stay whole.
    """
    longest = max(len(ids) for ids, _ in sequences)
    excess = longest - limit
    if excess <= 0:
        return sequences
    if truncate == "drop":
        return None
    if truncate == "error":
        raise ValueError(f"{where}: {longest:,} tokens with the template, {limit:,} fit; use "
                         "--truncate left, --truncate drop or a model with a longer context")
    # with the response its <|assistant|> must stay, too: the first target is predicted from it
    prompt_length = response_start(sequences[0][1])
    if excess >= prompt_length:
        raise ValueError(f"{where}: the response alone takes {longest - prompt_length:,} tokens, "
                         f"{limit - 1:,} fit; use --truncate drop or a model with a longer context")
    cut = []
    for ids, mask in sequences:
        # nothing predicts the first token of a row, so it is no target
        cut.append((ids[excess:], [0, *mask[excess + 1:]]))
    return cut


def response_start(mask: list[int]) -> int:
    """Where the last turn's targets begin, the end of the row without any: [0, 1, 0, 1, 1, 0] -> 3,
    where a template writes something behind the end of a turn."""
    if 1 not in mask:
        return len(mask)
    behind = len(mask) - mask[::-1].index(1)      # the last target
    n_targets = mask[:behind][::-1].index(0)      # before it, without a gap
    return behind - n_targets


def fit_all(rows: list[dict], sequences_of: Callable[[dict], list[tuple]], limit: int,
            truncate: str) -> tuple[list[dict], list[list[tuple]]]:
    """The rows that fit, and for each its sequences as arrays (ids int32, mask bool).

    sequences_of(row) lists sequences with one prompt. Rows dropped are counted on stderr.
    """
    if truncate not in ("left", "drop", "error"):
        raise ValueError(f'truncate is {truncate!r}; it must be "left", "drop" or "error"')
    fitting_rows = []
    all_sequences = []
    for row in rows:
        sequences = fit(sequences_of(row), limit, truncate, row["where"])
        if not sequences:
            continue
        # arrays, because lists of Python's integers take several times the memory
        arrays = [(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in sequences]
        fitting_rows.append(row)
        all_sequences.append(arrays)
    say_dropped(len(rows), len(fitting_rows), limit)
    return fitting_rows, all_sequences


def say_dropped(n_rows: int, n_left: int, limit: int) -> None:
    """How many rows were too long, on stderr. Raises ValueError when none is left."""
    if n_left < n_rows:
        print(f"dropped {n_rows - n_left:,} of {n_rows:,} rows longer than {limit:,} tokens",
              file=sys.stderr)
    if not n_left:
        raise ValueError(f"no rows left: of {n_rows:,}, none fits {limit:,} tokens")


# ---------------------------------------------------------------------- task mixing

def mixing_weights(counts: dict[str, int], tau: float = 1.0,
                   cap: int | None = None) -> dict[str, float]:
    """p_k = n_k^(1/tau) / sum_j n_j^(1/tau), n_k = min(N_k, cap): 001 section 3.5.

    tau 1: in proportion to the sizes; math.inf: all tasks alike; below 1 would favour large ones.
    """
    if tau < 1 or (cap is not None and cap < 1):
        raise ValueError(f"tau is {tau}, cap is {cap}; both must be at least 1")
    powers = {}
    for task, n in counts.items():
        powers[task] = min(n, cap or n) ** (1 / tau)
    total = sum(powers.values())
    return {task: power / total for task, power in powers.items()}


def draw(tasks: list[str], weights: dict[str, float], cap: int | None,
         rng: np.random.Generator) -> np.ndarray:
    """The examples of an epoch in the shares `weights` of their tasks (mixing_weights): sum_k
    min(N_k, cap) indices into tasks.

    Shares are rounded at random, by one offset for all, so that they add up and are right on
    average. A task is repeated only after all of it was used; with tau >= 1 none exceeds its cap.
    """
    counts = Counter(tasks)
    n_drawn = sum(min(n, cap or n) for n in counts.values())
    # of the tasks that are there: all examples of one may have been too long
    present = [weights[task] for task in counts]
    # the tasks lie side by side on a line of length n_drawn; shifted by a random offset, a task
    # gets as many examples as whole numbers fall into its part: for 1.5 one or two of them
    borders = n_drawn * np.cumsum([0.0, *present]) / sum(present)
    offset = rng.random()
    # 6 digits, because 2.9999999999 is 3 with an error of rounding
    shares = np.diff(np.floor(borders.round(6) + offset)).astype(int)

    task_of = np.array(tasks)
    parts = []
    for task, share in zip(counts, shares):
        members = np.flatnonzero(task_of == task)
        n_rounds, rest = divmod(share, len(members))
        parts += [members] * n_rounds
        parts.append(rng.choice(members, rest, replace=False))
    return np.concatenate(parts)


# ---------------------------------------------------------------------- packed conversations

def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Best fit, longest first: rows of items whose lengths add up to at most size.

    pack([3, 5, 2, 6], 8) -> [[3, 2], [1, 0]]: 6 + 2 and 5 + 3. Each item goes into the row with
    the least room that takes it. open_rows[r] lists the rows with room for r more tokens, and bit r
    of `rooms` is set if that list is not empty, so that finding the row is arithmetic on one
    integer instead of a search through all rows.
    """
    rows = []
    open_rows = [[] for _ in range(size + 1)]
    rooms = 0
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        length = lengths[i]
        enough = rooms >> length                  # bit k: some row has room for length + k
        if enough:
            lowest_bit = enough & -enough         # 0b10100 -> 0b00100
            room = length + lowest_bit.bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room                # it was the last row with this much room
        else:
            room = size
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        open_rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def format_examples(examples: list[dict], tokenizer) -> list[dict]:
    """Conversations with their "ids" in the chat template and "mask", 1 on the assistant's words:
    the two steps that train_sft.py spells out."""
    formatted = []
    for example in examples:
        ids = tokenizer.conversation(example["messages"])
        formatted.append(example | {"ids": ids, "mask": tokenizer.response_mask(ids)})
    return formatted


class PackedExamples:
    """Conversations in the chat template, several to a row of context_length + 1 tokens.

    Each is a document with positions of its own, so neither attention nor the shifted loss crosses
    examples (a first token is a role token, never a target); <|pad|> fills the row. Every epoch is
    packed anew and holds each example once, or with weights what 001's task mixing draws. Examples
    come with their ids and loss mask (format_examples).
    Batch.index lists the examples, row after row, as places in .examples (those not dropped), and
    .sequences has the tokens of each, (ids, mask).
    """
    def __init__(self, examples: list[dict], tokenizer, context_length: int, seed: int,
                 truncate: str = "error", weights: dict[str, float] | None = None,
                 cap: int | None = None):
        def sequences_of(example):
            return [(example["ids"], example["mask"])]

        self.size = context_length + 1
        self.pad = tokenizer.pad
        self.seed = seed
        self.weights = weights
        self.cap = cap
        self.examples, sequences = fit_all(examples, sequences_of, self.size, truncate)
        self.sequences = [sequence for [sequence] in sequences]
        # two epochs, because a batch at the end of one takes its last rows from the next
        self.packed = lru_cache(maxsize=2)(self.pack_epoch)
        self.first_rows = [0]                     # number of the first row of each epoch so far

    def __len__(self) -> int:
        """Rows in the first epoch."""
        return len(self.packed(0))

    def pack_epoch(self, epoch: int) -> list[list[int]]:
        """The rows of one epoch, each a list of examples."""
        rng = np.random.default_rng((self.seed, epoch))
        chosen = np.arange(len(self.examples))
        if self.weights is not None:
            tasks = [example["task"] for example in self.examples]
            chosen = draw(tasks, self.weights, self.cap, rng)
        # shuffled before packing, because pack() takes examples of one length in their order
        chosen = rng.permutation(chosen).tolist()
        lengths = [len(self.sequences[i][0]) for i in chosen]
        packed = pack(lengths, self.size)         # rows of places in `chosen`
        rows = []
        # and shuffled after packing, because pack() begins with the longest examples
        for r in rng.permutation(len(packed)):
            rows.append([chosen[place] for place in packed[r]])
        return rows

    def row(self, number: int) -> list[int]:
        """The examples of a row, numbered through all epochs, which differ in length."""
        while number >= self.first_rows[-1]:
            epoch = len(self.first_rows) - 1
            n_rows = len(self.packed(epoch))
            self.first_rows.append(self.first_rows[-1] + n_rows)
        # the epoch is the last whose first row is not behind this one
        epoch = bisect_right(self.first_rows, number) - 1
        return self.packed(epoch)[number - self.first_rows[epoch]]

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        return self.rows(row_numbers(step, batch_size, rank, world_size))

    def micro_batches(self, step: int, cfg, run) -> list[Batch]:
        """The grad_accum batches of an optimizer step, this rank's share, on its device."""
        batches = []
        for i in range(cfg.grad_accum):
            number = step * cfg.grad_accum + i
            batch = self.batch(number, cfg.batch_size, run.replica, run.replicas)
            batches.append(batch.to(run.device))
        return batches

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        return once(self, batch_size)

    def rows(self, numbers: Iterable[int]) -> Batch:
        packed = [self.row(number) for number in numbers]
        shape = (len(packed), self.size)                              # (B, T)
        tokens = np.full(shape, self.pad, np.int64)
        loss_mask = np.zeros(shape, bool)
        documents = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int64)
        t = np.arange(self.size)
        for b, examples in enumerate(packed):
            end = 0
            for document, i in enumerate(examples):
                ids, mask = self.sequences[i]
                start = end
                end = start + len(ids)
                tokens[b, start:end] = ids
                loss_mask[b, start:end] = mask
                documents[b, start:end] = document
                positions[b, start:end] = t[:len(ids)]
            # padding is a document of its own: attention from it sees padding alone
            documents[b, end:] = -1
            positions[b, end:] = t[:self.size - end]
        index = torch.tensor([i for examples in packed for i in examples])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(loss_mask),
                     torch.from_numpy(documents), torch.from_numpy(positions), index)


# ---------------------------------------------------------------------- padded rows

def right_padded(sequences: list[tuple], pad: int, width: int, index: list[int]) -> Batch:
    """Sequences as a Batch (B, width). Attention is causal: padding behind a row changes nothing
    before it."""
    tokens = np.full((len(sequences), width), pad, np.int64)
    loss_mask = np.zeros(tokens.shape, bool)
    for b, (ids, mask) in enumerate(sequences):
        tokens[b, :len(ids)] = ids
        loss_mask[b, :len(ids)] = mask
    return Batch(torch.from_numpy(tokens), torch.from_numpy(loss_mask), None, None,
                 torch.tensor(index))


def wide_enough(longest: int, step: int, limit: int) -> int:
    """Tokens in the rows of a batch: a multiple of `step` up to the limit. oneDNN and compiled
    models prepare every new width, so there should be few."""
    n_steps = math.ceil(longest / step)
    return max(longest, min(n_steps * step, limit))


def response_batch(prompts: list[list[int]], responses: list[list[int]], pad: int,
                   context_length: int) -> Batch:
    """Prompt and response ids, one row each; the responses are targets. Rows are padded to one of
    a few widths, up to context_length."""
    sequences = []
    for prompt, response in zip(prompts, responses, strict=True):
        mask = [0] * len(prompt) + [1] * len(response)
        sequences.append((prompt + response, mask))
    longest = max(len(ids) for ids, _ in sequences)
    width = wide_enough(longest, 16, context_length)
    return right_padded(sequences, pad, width, list(range(len(sequences))))


def response_batches(prompts: list[list[int]], responses: list[list[int]], pad: int,
                     context_length: int, rows_at_once: int) -> Iterator[Batch]:
    """response_batch() of so many rows at a time, in their order."""
    for first in range(0, len(prompts), rows_at_once):
        rows = slice(first, first + rows_at_once)
        yield response_batch(prompts[rows], responses[rows], pad, context_length)


class PreferencePairs:
    """Pairs (x, y_w, y_l) -> 2B right-padded rows: B chosen, then their B rejected. Rankings of K
    answers ("responses" in the place of "chosen" and "rejected") -> K B rows, the best answers
    first; a shorter ranking repeats its last answer, which no loss then counts.

    The loss mask covers the compared response and its <|end|>, not earlier turns. The model sees
    all of a row (a reward is read at its last token), so at most context_length tokens fit. A
    batch holds pairs of similar length. Batch.index: places in .pairs (those not dropped);
    .sequences has (ids, mask) of each of their answers, the chosen or best first.
    """
    def __init__(self, pairs: list[dict], tokenizer, context_length: int, seed: int,
                 truncate: str = "error"):
        def sequences_of(pair):
            sequences = []
            for answer in pair.get("responses") or (pair["chosen"], pair["rejected"]):
                turn = {"role": "assistant", "content": answer}
                ids, mask = tokenizer.chat([*pair["prompt"], turn])
                # earlier answers stand in both rows and say nothing about a preference
                start = response_start(mask)
                sequences.append((ids, [0] * start + mask[start:]))
            return sequences

        self.context_length = context_length
        self.pad = tokenizer.pad
        self.seed = seed
        self.pairs, self.sequences = fit_all(pairs, sequences_of, context_length, truncate)
        longest = [max(len(ids) for ids, _ in answers) for answers in self.sequences]
        self.lengths = np.array(longest)          # (N,) tokens of the longest row of a pair
        # two epochs, because a batch at the end of one takes its last pairs from the next
        self.order = lru_cache(maxsize=2)(self.order_epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def items(self, index: torch.Tensor) -> list[dict]:
        """The rows of the data, pairs, ratings or rankings, at the places of a batch, (B,)."""
        # as a list, because a GPU would be asked for each number of a tensor by itself
        return [self.pairs[i] for i in index.tolist()]

    def response_tokens(self) -> torch.Tensor:
        """|y| of each pair's two answers, (N, 2)."""
        counts = []
        for (_, chosen), (_, rejected) in self.sequences:
            counts.append([int(sum(chosen)), int(sum(rejected))])
        return torch.tensor(counts)

    def order_epoch(self, epoch: int, group: int) -> np.ndarray:
        """A permutation of the pairs in groups alike in length: sorted within every 16 groups,
        then the groups shuffled."""
        n = len(self)
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(n)
        # sorted by length, but only within blocks of 16 groups: each epoch has other groups
        block = np.arange(n) // (16 * group)
        order = order[np.lexsort((self.lengths[order], block))]
        # pairs beyond the last whole group stay at the end, so that no group is cut in two
        n_grouped = n // group * group
        groups = rng.permutation(order[:n_grouped].reshape(-1, group))
        return np.concatenate([groups.ravel(), order[n_grouped:]])

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        numbers = row_numbers(step, batch_size, rank, world_size)
        # a group for all ranks, because they wait for the one with the longest rows
        return self.rows(numbers, group=batch_size * world_size)

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        return once(self, batch_size)

    def rows(self, numbers: Iterable[int], group: int = 16) -> Batch:
        index = []
        for number in numbers:
            epoch, place = divmod(number, len(self))
            index.append(int(self.order(epoch, group)[place]))
        answers = [self.sequences[i] for i in index]
        rows = []
        for rank in range(max(map(len, answers))):
            rows += [ranked[min(rank, len(ranked) - 1)] for ranked in answers]
        width = wide_enough(max(self.lengths[index]), 8, self.context_length)
        return right_padded(rows, self.pad, width, index)


# ---------------------------------------------------------------------- prompts for generation

def encode_prompts(prompts: list[dict], tokenizer, max_tokens: int,
                   truncate: str = "error") -> tuple[list[dict], list[list[int]]]:
    """The prompts that fit and their ids, ending in <|assistant|>, each at most max_tokens long."""
    def sequences_of(prompt):
        ids = tokenizer.prompt(prompt["messages"])
        return [(ids, [0] * len(ids))]            # a prompt has no targets

    fitting_prompts, sequences = fit_all(prompts, sequences_of, max_tokens, truncate)
    return fitting_prompts, [ids.tolist() for [(ids, _)] in sequences]


def prompts_to_answer(cfg, tokenizer, context_length: int,
                      **options) -> tuple[list[dict], list[list[int]]]:
    """--prompts that leave room for an answer of --max_new_tokens: their rows and their ids.

    options: of readers.read_prompts(), where they are not --n_prompts of the training split.
    """
    options = {"split": "train", "n": cfg.n_prompts, "seed": cfg.seed} | options
    rows = readers.read_prompts(cfg.prompts, bad_rows=cfg.bad_rows, **options)
    return encode_prompts(rows, tokenizer, context_length - cfg.max_new_tokens, cfg.truncate)


def left_pad(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation: tokens (B, T), padded on the left; starts (B,), first real token.

    left_pad([[5, 6, 7], [8]], 0) -> [[5, 6, 7], [0, 0, 8]], [0, 2]
    """
    longest = max(len(ids) for ids in rows)
    padded = []
    starts = []
    for ids in rows:
        n_padding = longest - len(ids)
        padded.append([pad] * n_padding + ids)
        starts.append(n_padding)
    return torch.tensor(padded), torch.tensor(starts)
