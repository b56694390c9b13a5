"""
Pretraining objectives (001 section 1.2, 004): windows of a corpus -> what a model reads, and what
it must predict.

    causal   each token from those before it, and for a model that sees a prefix both ways the rest
             of a window from its beginning (prefix language modelling)
    mlm      15 % of the tokens, hidden, from both sides (BERT), and with next_sentence, whether the
             second half of a row follows the first
    span     short spans, each replaced by one sentinel, spelled out after their sentinels (T5)
    ul2      a mixture of denoisers, announced by the first token: [R] short spans, 15 % of the
             tokens; [X] long ones or half of the tokens; [S] the rest of a text (Tay et al. 2022)

Each is a pure function of tokens and a NumPy generator, for B windows at a time. span and ul2 give
pairs (inputs, targets), which an encoder_decoder reads and writes, and a prefix model or a decoder
finds in one row, inputs first. Both sides end in <|end|>.

    inputs   The bear <s0> her hat on <s1> . <|end|>
    targets  <s0> had lost <s1> the hill <|end|>
"""
import numpy as np
import torch

import data
from tokenizer import Tokenizer

ARCHITECTURES_OF = {"causal": ("decoder", "prefix", "encoder_decoder"), "mlm": ("encoder",),
                    "span": ("encoder_decoder", "prefix", "decoder"),
                    "ul2": ("encoder_decoder", "prefix", "decoder")}   # the first: the usual one
RATE = 0.15                           # share of the tokens that are hidden
DENOISERS = {"R": ((3, 0.15), (8, 0.15)),             # (mean length of a span, share of the tokens)
             "X": ((3, 0.5), (8, 0.5), (64, 0.5), (64, 0.15))}
MODES = "R", "S", "X"                 # of UL2, equally often
SETTINGS = {"span": ((3, RATE),), "ul2": DENOISERS["R"] + DENOISERS["X"]}


# ---------------------------------------------------------------------- masked language modelling

def choose(candidates: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(B, T) bool -> (B, T) bool: round(rate n) of each row's n candidates, at least one if there
    is any, each equally likely."""
    n = candidates.sum(1)
    wanted = np.minimum(n, np.maximum(1, np.rint(rate * n)))
    keys = np.where(candidates, rng.random(candidates.shape), 2.0)
    return keys.argsort(1).argsort(1) < wanted[:, None]            # rank among the row's keys


def mask_tokens(tokens: np.ndarray, n_ordinary: int, mask: int, rng: np.random.Generator,
                rate: float = RATE) -> tuple[np.ndarray, np.ndarray]:
    """BERT's noise (Devlin et al. 2019, section 3.1): (B, T) ids -> (inputs, chosen), both (B, T).

    Of the chosen tokens 80 % become `mask`, 10 % a random ordinary token and 10 % stay as they are,
    so that a model must doubt every token and not only those that say they are hidden. Ids from
    n_ordinary on are special and never chosen.
    """
    chosen = choose(tokens < n_ordinary, rate, rng)
    fate = rng.random(tokens.shape)
    inputs = np.where(chosen & (fate < 0.8), mask, tokens)
    random = rng.integers(0, n_ordinary, tokens.shape)
    return np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, inputs), chosen


# ---------------------------------------------------------------------- spans

def random_partition(rows: int, total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, parts) positive whole numbers that add up to total, all such rows equally likely."""
    cuts = rng.random((rows, total - 1)).argsort(1)[:, :parts - 1] + 1     # of 1 .. total - 1
    return np.diff(np.sort(cuts, 1), axis=1, prepend=0, append=total)


def span_sizes(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of `length` tokens are hidden, and in how many spans: at least 1 each, and every
    span has a token before it that is kept."""
    hidden = min(max(1, round(length * rate)), length - 1)
    return hidden, min(max(1, round(hidden / mean_span)), hidden, length - hidden)


def noise_spans(rows: int, length: int, rate: float, mean_span: float,
                rng: np.random.Generator) -> np.ndarray:
    """(rows, length) bool: the hidden tokens of T5 (Raffel et al. 2020, section 3.3.4). The number
    of tokens and of spans is fixed, their lengths are random; a row begins with kept text."""
    hidden, spans = span_sizes(length, rate, mean_span)
    runs = np.stack([random_partition(rows, length - hidden, spans, rng),
                     random_partition(rows, hidden, spans, rng)], 2).reshape(rows, 2 * spans)
    which = (np.arange(length)[None, :, None] >= runs.cumsum(1)[:, None, :]).sum(2)   # its run
    return which % 2 == 1


def pack_left(values: np.ndarray, chosen: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The chosen values of each row, moved to its left end, and how many they are."""
    lengths = chosen.sum(1)
    packed = np.full((len(values), lengths.max()), pad, values.dtype)
    packed[np.arange(lengths.max()) < lengths[:, None]] = values[chosen]
    return packed, lengths


def corrupt_spans(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int,
                  pad: int) -> tuple[tuple, tuple]:
    """(B, T) ids and which are hidden -> (inputs, lengths), (targets, lengths), right-padded.

    inputs: the text with a sentinel in the place of each span, and `end`; targets: each sentinel,
    then its span, and `end`. Together they are the text: nothing is lost.
    """
    starts = noise & ~np.pad(noise, ((0, 0), (1, 0)))[:, :-1]
    sentinel = sentinels[starts.cumsum(1) - 1]
    def ended(ids, chosen):
        more = (0, 0), (0, 1)
        return pack_left(np.pad(ids, more, constant_values=end),
                         np.pad(chosen, more, constant_values=True), pad)

    pairs = np.stack([sentinel, tokens], 2).reshape(len(tokens), -1)       # sentinel, token, ...
    said = np.stack([starts, noise], 2).reshape(len(tokens), -1)
    return ended(np.where(starts, sentinel, tokens), ~noise | starts), ended(pairs, said)


def split_prefix(tokens: np.ndarray, end: int, pad: int,
                 rng: np.random.Generator) -> tuple[tuple, tuple]:
    """The S-denoiser: the beginning of each row is the input, the rest the target; any place to cut
    is equally likely. Shapes as those of corrupt_spans."""
    (B, T), t = tokens.shape, np.arange(tokens.shape[1] + 1)
    first = t < rng.integers(1, T, (B, 1))
    text = np.pad(tokens, ((0, 0), (0, 1)), constant_values=end)
    return pack_left(text, first | (t == T), pad), pack_left(text, ~first, pad)


def ul2(tokens: np.ndarray, special: dict[str, int], sentinels: np.ndarray, end: int, pad: int,
        rng: np.random.Generator, modes: tuple[str, ...] = MODES) -> tuple[tuple, tuple]:
    """Each row by a denoiser of its own: a mode, equally likely, then one of its (span, rate), so
    too. The inputs begin with the mode's token. Shapes as those of corrupt_spans."""
    mode, setting = rng.integers(len(modes), size=len(tokens)), rng.random(len(tokens))
    rows: list = [None] * len(tokens)
    for m, name in enumerate(modes):
        options = DENOISERS.get(name, (None,))
        for i, option in enumerate(options):
            at = np.flatnonzero((mode == m) & ((setting * len(options)).astype(int) == i))
            if not len(at):
                continue
            if name == "S":
                pair = split_prefix(tokens[at], end, pad, rng)
            else:
                noise = noise_spans(len(at), tokens.shape[1], option[1], option[0], rng)
                pair = corrupt_spans(tokens[at], noise, sentinels, end, pad)
            for row, read, n_read, written, n_written in zip(at, *pair[0], *pair[1]):
                rows[row] = [special[f"<|{name}|>"], *read[:n_read]], written[:n_written]
    return tuple(padded([pair[side] for pair in rows], pad) for side in (0, 1))


def padded(rows: list, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> (B, T) right-padded, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    out = np.full((len(rows), lengths.max()), pad, np.int64)
    for row, ids in zip(out, rows):
        row[:len(ids)] = ids
    return out, lengths


# ---------------------------------------------------------------------- next sentence prediction

def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: tokens whose text ends a sentence."""
    texts = [tokenizer.decode([i]).strip().rstrip('"\')') for i in range(tokenizer.vocab_size)]
    return np.array([text.endswith((".", "!", "?")) for text in texts])


def find_cuts(tokens: np.ndarray, ends: np.ndarray, endoftext: int) -> np.ndarray:
    """(N,) ids -> (n, 3) begin, cut and end of n halved documents: all places between two sentences
    of one document, whose tokens are begin .. end - 1."""
    borders = np.flatnonzero(tokens == endoftext)
    cuts = np.flatnonzero(ends[tokens]) + 1
    number = np.searchsorted(borders, cuts)                        # documents that ended before
    begin = np.concatenate([[0], borders + 1])[number]
    end = np.concatenate([borders, [len(tokens)]])[number]
    inside = (cuts > begin) & (cuts < end)
    return np.stack([begin, cuts, end], 1)[inside]


def sentence_pairs(tokens: np.ndarray, cuts: np.ndarray, rows: int, length: int, cls: int, sep: int,
                   pad: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """BERT's rows [CLS] A [SEP] B [SEP], right-padded to `length` -> (ids, segments, is_next), two
    (rows, length) and (rows,).

    A is what stands before a cut, B in half of the rows what follows it, in the others what follows
    a cut of another document. Each side is shortened, far from the cut, to half of the room.
    Raises ValueError when the text is a single document.
    """
    if (cuts[:, 0] == cuts[0, 0]).all():
        raise ValueError("next-sentence prediction needs at least two documents of several "
                         "sentences; this corpus has one")
    room = (length - 3) // 2
    first = rng.integers(len(cuts), size=rows)
    is_next, second = rng.random(rows) < 0.5, first.copy()
    while (same := ~is_next & (cuts[second, 0] == cuts[first, 0])).any():
        second[same] = rng.integers(len(cuts), size=same.sum())
    a_begin, a_end, _ = cuts[first].T
    _, b_begin, b_end = cuts[second].T
    a_begin, b_end = np.maximum(a_begin, a_end - room), np.minimum(b_end, b_begin + room)
    n_a, n_b, t = (a_end - a_begin)[:, None], (b_end - b_begin)[:, None], np.arange(length)
    at = np.where(t <= n_a, a_begin[:, None] + t - 1, b_begin[:, None] + t - n_a - 2)
    ids = tokens[at.clip(0, len(tokens) - 1)].astype(np.int64)
    ids = np.where(t == 0, cls, np.where((t == n_a + 1) | (t == n_a + n_b + 2), sep, ids))
    segments = ((t > n_a + 1) & (t <= n_a + n_b + 2)).astype(np.int64)
    return np.where(t > n_a + n_b + 2, pad, ids), segments, is_next


# ---------------------------------------------------------------------- sources of batches

def longest(objective: str, one_row: bool, window: int) -> int:
    """The tokens of the longest side (one_row: of both together) that `window` tokens can give."""
    sizes = [span_sizes(window, rate, span) for span, rate in SETTINGS.get(objective, ())]
    if objective != "span":                            # a prefix and the rest: one token at least
        sizes.append((1, 0))
    sides = [window + 2 * spans + 2 if one_row else window - hidden + spans + 1
             for hidden, spans in sizes]
    return max(sides) + (objective == "ul2")           # its mode


def window_length(objective: str, architecture: str, context_length: int) -> int:
    """How many tokens of text a row holds so that what is made of them fits the context."""
    if architecture == "encoder":
        return context_length
    one_row = architecture != "encoder_decoder"        # of which the last token is no input
    return max(n for n in range(2, 2 * context_length)
               if longest(objective, one_row, n) <= context_length + one_row)


def with_special_tokens(tokenizer: Tokenizer, objective: str, window: int) -> Tokenizer:
    """The tokenizer with the special tokens that the objective needs; the ids of others stay."""
    names = {"causal": [], "mlm": ["mask", "cls", "sep"], "span": [], "ul2": list(MODES)}[objective]
    spans = [span_sizes(window, rate, span)[1] for span, rate in SETTINGS.get(objective, ())]
    names += [f"sentinel_{i}" for i in range(max(spans, default=0))]
    wanted = [f"<|{name}|>" for name in names if f"<|{name}|>" not in tokenizer.special]
    names = [*tokenizer.named, *wanted]
    return Tokenizer(tokenizer.ranks, tokenizer.pattern, names) if wanted else tokenizer


class Denoised:
    """A TokenStream's windows under an objective other than plain causal language modelling, as
    data.Batch. Row k, numbered through all epochs, is corrupted by a generator of its own batch:
    each epoch hides other tokens, and the same numbers always give the same batch."""

    def __init__(self, stream: data.TokenStream, tokenizer: Tokenizer, objective: str,
                 architecture: str, next_sentence: bool = False):
        self.stream, self.tokenizer = stream, tokenizer
        self.objective, self.architecture = objective, architecture
        self.next_sentence = next_sentence
        special, self.sentinels = tokenizer.special, []
        while (name := f"<|sentinel_{len(self.sentinels)}|>") in special:
            self.sentinels.append(special[name])
        if next_sentence:
            self.cuts = find_cuts(stream.tokens, sentence_ends(tokenizer), tokenizer.endoftext)
        self.context_length = stream.context_length

    @property
    def tokens(self) -> np.ndarray:
        return self.stream.tokens

    def __len__(self) -> int:
        return len(self.stream)

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> data.Batch:
        return self.rows(data.row_numbers(step, batch_size, rank, world_size))

    def rows(self, numbers: range) -> data.Batch:
        rng = np.random.default_rng((self.stream.seed, numbers[0], len(numbers)))
        if self.next_sentence:
            special, length = self.tokenizer.special, self.stream.context_length
            tokens, segments, is_next = sentence_pairs(
                self.stream.tokens, self.cuts, len(numbers), length, special["<|cls|>"],
                special["<|sep|>"], self.tokenizer.pad, rng)
            batch = self.hide(tokens, rng)
            padding = batch.targets == self.tokenizer.pad
            batch.documents, batch.index = -padding.int(), torch.tensor(numbers)
            batch.segments, batch.is_next = map(torch.from_numpy, (segments, is_next.astype(int)))
            return batch
        windows = self.stream.rows(numbers)
        batch = self.hide(windows.tokens[:, :-1].numpy(), rng)     # the last is its neighbour's
        batch.index = windows.index
        if self.objective == "mlm" and windows.documents is not None:
            batch.documents, batch.positions = windows.documents[:, :-1], windows.positions[:, :-1]
        return batch

    def copying_batch(self, vocab_size: int, rows: int, length: int, seed: int,
                      step: int) -> data.Batch:
        """data.copying_batch under the objective: what is hidden stands elsewhere in the row. In
        place of spans the rest of a row is hidden, where looking back is enough: found in 250
        steps, which for spans, where sentinels must be matched as well, 400 are too few."""
        tokens = data.copying_batch(vocab_size, rows, length, seed, step).tokens[:, :-1].numpy()
        rng = np.random.default_rng((seed, step))
        if self.objective == "mlm":
            return self.hide(tokens, rng)
        return self.arranged(*split_prefix(tokens, self.tokenizer.end, self.tokenizer.pad, rng))

    def hide(self, tokens: np.ndarray, rng: np.random.Generator) -> data.Batch:
        """(B, T) ids as a batch of the objective."""
        if self.objective == "mlm":
            mask, n_ordinary = self.tokenizer.special["<|mask|>"], len(self.tokenizer.ranks)
            read, chosen = map(torch.from_numpy, mask_tokens(tokens, n_ordinary, mask, rng))
            return data.Batch(read, chosen, None, None, torch.arange(len(tokens)),
                              torch.from_numpy(tokens))
        return self.arranged(*self.pairs(tokens, rng))

    def pairs(self, tokens: np.ndarray, rng: np.random.Generator,
              modes: tuple[str, ...] = MODES) -> tuple[tuple, tuple]:
        """((inputs, lengths), (targets, lengths)) of (B, T) ids. modes: those of ul2."""
        end, pad, sentinels = self.tokenizer.end, self.tokenizer.pad, np.array(self.sentinels)
        if self.objective == "causal":
            return split_prefix(tokens, end, pad, rng)
        if self.objective == "span":
            (span, rate), = SETTINGS["span"]
            noise = noise_spans(*tokens.shape, rate, span, rng)
            return corrupt_spans(tokens, noise, sentinels, end, pad)
        return ul2(tokens, self.tokenizer.special, sentinels, end, pad, rng, modes)

    def arranged(self, inputs: tuple, targets: tuple) -> data.Batch:
        """Pairs as the architecture reads them.

        encoder_decoder: inputs are the source; the writer starts from <|end|>, which is the
        source's last token. Others: one row, inputs then targets, of which the targets are scored.
        """
        (read, n_read), (written, n_written), index = inputs, targets, torch.arange(len(inputs[0]))
        limit = longest(self.objective, self.architecture != "encoder_decoder", self.context_length)
        pad, t = self.tokenizer.pad, np.arange(max(limit, read.shape[1] + written.shape[1]))

        def widened(ids: np.ndarray) -> np.ndarray:                # see data.wide_enough
            more = data.wide_enough(ids.shape[1], 16, limit) - ids.shape[1]
            return np.pad(ids, ((0, 0), (0, more)), constant_values=pad)

        if self.architecture == "encoder_decoder":
            read, written = widened(read), widened(written)
            before = np.pad(written, ((0, 0), (1, 0)), constant_values=self.tokenizer.end)[:, :-1]
            mask = t[:written.shape[1]] < n_written[:, None]
            return data.Batch(*map(torch.from_numpy, (before, mask)), None, None, index,
                              torch.from_numpy(written), source=torch.from_numpy(read),
                              source_lengths=torch.from_numpy(n_read))
        both = np.concatenate([read, written], 1)
        kept = np.concatenate([t[:read.shape[1]] < n_read[:, None],
                               t[:written.shape[1]] < n_written[:, None]], 1)
        tokens, lengths = pack_left(both, kept, pad)
        tokens = widened(tokens)
        t = t[:tokens.shape[1]]
        mask = (t >= n_read[:, None]) & (t < lengths[:, None])
        prefix = torch.from_numpy(n_read) if self.architecture == "prefix" else None
        return data.Batch(*map(torch.from_numpy, (tokens, mask)), None, None, index, prefix=prefix)


def spans_said(ids: list[int], sentinels: list[int]) -> dict[int, tuple[int, ...]]:
    """Targets as a model wrote them -> {sentinel: its span}; text before the first is left out."""
    spans: dict[int, list[int]] = {}
    known, current = set(sentinels), None
    for i in ids:
        if i in known:
            current = spans.setdefault(i, [])
        elif current is not None:
            current.append(i)
    return {sentinel: tuple(span) for sentinel, span in spans.items()}
