"""
Denoising objectives (001 sections 1.2.2 to 1.2.4, 004): windows of a corpus -> what a model reads,
and what it must predict.

    causal   the rest of a window from its beginning, for models that see the beginning both ways
             (prefix language modelling)
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

answers_apart makes such pairs of conversations, for fine-tuning an encoder_decoder (section 2.2).
A side is (ids (B, T) right-padded, lengths (B,)).
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

import data
from tokenizer import Tokenizer

# the first architecture of each objective is the usual one
ARCHITECTURES_OF = {"causal": ("prefix", "encoder_decoder"), "mlm": ("encoder",),
                    "span": ("encoder_decoder", "prefix", "decoder"),
                    "ul2": ("encoder_decoder", "prefix", "decoder")}
RATE = 0.15                           # share of the tokens that are hidden
DENOISERS = {"R": ((3, 0.15), (8, 0.15)),             # (mean length of a span, share of the tokens)
             "X": ((3, 0.5), (8, 0.5), (64, 0.5), (64, 0.15))}
MODES = "R", "S", "X"                 # of UL2, equally often
SETTINGS = {"span": ((3, RATE),), "ul2": DENOISERS["R"] + DENOISERS["X"]}

Side = tuple[np.ndarray, np.ndarray]


# ---------------------------------------------------------------------- masked language modelling

def choose(candidates: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(B, T) bool -> (B, T) bool: round(rate n) of each row's n candidates, at least one if there
    is any, each equally likely."""
    n = candidates.sum(1)
    n_chosen = np.minimum(n, np.maximum(1, np.rint(rate * n)))             # (B,)
    # the n_chosen smallest of random keys; a key of 2 puts what is no candidate behind all others
    keys = np.where(candidates, rng.random(candidates.shape), 2.0)
    rank = keys.argsort(1).argsort(1)                                      # of each key in its row
    return rank < n_chosen[:, None]


def mask_tokens(tokens: np.ndarray, n_ordinary: int, mask: int, rng: np.random.Generator,
                rate: float = RATE) -> tuple[np.ndarray, np.ndarray]:
    """BERT's noise (Devlin et al. 2019, section 3.1): (B, T) ids -> (inputs, chosen), both (B, T).

    Of the chosen tokens 80 % become `mask`, 10 % a random ordinary token and 10 % stay as they are,
    so that a model must doubt every token and not only those that say they are hidden. Ids from
    n_ordinary on are special and never chosen.
    """
    chosen = choose(tokens < n_ordinary, rate, rng)
    fate = rng.random(tokens.shape)                                        # one number decides
    masked = chosen & (fate < 0.8)
    replaced = chosen & (fate >= 0.8) & (fate < 0.9)
    inputs = np.where(masked, mask, tokens)
    random_tokens = rng.integers(0, n_ordinary, tokens.shape)
    return np.where(replaced, random_tokens, inputs), chosen


# ---------------------------------------------------------------------- spans

def random_partition(rows: int, total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, parts) positive whole numbers that add up to total, all such rows equally likely."""
    # parts - 1 different cuts among 1 .. total - 1
    order = rng.random((rows, total - 1)).argsort(1)
    cuts = np.sort(order[:, :parts - 1] + 1, 1)
    return np.diff(cuts, axis=1, prepend=0, append=total)


def span_sizes(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of `length` tokens are hidden, and in how many spans: at least 1 each, and every
    span has a token before it that is kept."""
    n_hidden = min(max(1, round(length * rate)), length - 1)
    n_kept = length - n_hidden
    n_spans = min(max(1, round(n_hidden / mean_span)), n_hidden, n_kept)
    return n_hidden, n_spans


def noise_spans(rows: int, length: int, rate: float, mean_span: float,
                rng: np.random.Generator) -> np.ndarray:
    """(rows, length) bool: the hidden tokens of T5 (Raffel et al. 2020, section 3.3.4). The number
    of tokens and of spans is fixed, their lengths are random; a row begins with kept text."""
    n_hidden, n_spans = span_sizes(length, rate, mean_span)
    # as many kept runs as hidden ones, because they alternate and a row begins with a kept one
    kept_runs = random_partition(rows, length - n_hidden, n_spans, rng)
    hidden_runs = random_partition(rows, n_hidden, n_spans, rng)
    # kept, hidden, kept, hidden, ...: (rows, 2 n_spans) lengths, then where each run ends
    runs = np.stack([kept_runs, hidden_runs], 2).reshape(rows, 2 * n_spans)
    ends = runs.cumsum(1)
    t = np.arange(length)
    run_of = (t[None, :, None] >= ends[:, None, :]).sum(2)                 # (rows, length)
    return run_of % 2 == 1                                                 # odd runs are hidden


def pack_left(values: np.ndarray, chosen: np.ndarray, pad: int) -> Side:
    """The chosen values of each row, moved to its left end."""
    lengths = chosen.sum(1)
    places = np.arange(lengths.max())
    packed = np.full((len(values), lengths.max()), pad, values.dtype)
    packed[places < lengths[:, None]] = values[chosen]
    return packed, lengths


def with_end(ids: np.ndarray, chosen: np.ndarray, end: int, pad: int) -> Side:
    """The chosen ids of each row, moved to its left end, and `end` behind them."""
    one_more = (0, 0), (0, 1)
    ids = np.pad(ids, one_more, constant_values=end)
    chosen = np.pad(chosen, one_more, constant_values=True)
    return pack_left(ids, chosen, pad)


def corrupt_spans(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int,
                  pad: int) -> tuple[Side, Side]:
    """(B, T) ids, and noise (B, T): which are hidden -> inputs and targets.

    inputs: the text with a sentinel in the place of each span, and `end`; targets: each sentinel,
    then its span, and `end`. Together they are the text: nothing is lost.
    """
    hidden_before = np.pad(noise, ((0, 0), (1, 0)))[:, :-1]
    starts = noise & ~hidden_before                                        # a span begins here
    sentinel = sentinels[starts.cumsum(1) - 1]                             # (B, T) of its span
    inputs = with_end(np.where(starts, sentinel, tokens), ~noise | starts, end, pad)

    # sentinel, token, sentinel, token, ...: (B, 2 T), of which starts and hidden tokens are chosen
    pairs = np.stack([sentinel, tokens], 2).reshape(len(tokens), -1)
    chosen = np.stack([starts, noise], 2).reshape(len(tokens), -1)
    targets = with_end(pairs, chosen, end, pad)
    return inputs, targets


def split_prefix(tokens: np.ndarray, end: int, pad: int,
                 rng: np.random.Generator) -> tuple[Side, Side]:
    """The S-denoiser: the beginning of each row is the input, the rest the target; any place to cut
    is equally likely. (B, T) ids -> inputs and targets."""
    B, T = tokens.shape
    cut = rng.integers(1, T, (B, 1))
    t = np.arange(T + 1)
    # both sides end in `end`: the beginning gets a copy of it
    text = np.pad(tokens, ((0, 0), (0, 1)), constant_values=end)           # (B, T + 1)
    beginning = t < cut
    is_end = t == T
    return pack_left(text, beginning | is_end, pad), pack_left(text, ~beginning, pad)


def ul2(tokens: np.ndarray, special: dict[str, int], sentinels: np.ndarray, end: int, pad: int,
        rng: np.random.Generator, modes: tuple[str, ...] = MODES) -> tuple[Side, Side]:
    """Each row by a denoiser of its own: a mode, equally likely, then one of its settings (span,
    rate), equally likely, too. The inputs begin with the mode's token. (B, T) ids -> inputs and
    targets."""
    B, T = tokens.shape
    mode_of = rng.integers(len(modes), size=B)
    setting_of = rng.random(B)
    inputs: list = [None] * B
    targets: list = [None] * B
    for m, name in enumerate(modes):
        settings = DENOISERS.get(name, (None,))                            # S has none
        for s, setting in enumerate(settings):
            chosen = (mode_of == m) & ((setting_of * len(settings)).astype(int) == s)
            rows = np.flatnonzero(chosen)
            if not len(rows):
                continue
            if name == "S":
                pair = split_prefix(tokens[rows], end, pad, rng)
            else:
                mean_span, rate = setting
                noise = noise_spans(len(rows), T, rate, mean_span, rng)
                pair = corrupt_spans(tokens[rows], noise, sentinels, end, pad)
            for row, read, written in zip(rows, unpadded(pair[0]), unpadded(pair[1])):
                inputs[row] = [special[f"<|{name}|>"], *read]
                targets[row] = written
    return padded(inputs, pad), padded(targets, pad)


def unpadded(side: Side) -> list[np.ndarray]:
    """The rows of a side without their padding."""
    ids, lengths = side
    return [row[:length] for row, length in zip(ids, lengths)]


def padded(rows: list, pad: int) -> Side:
    """Rows of ids -> (B, T) right-padded, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), pad, np.int64)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = row
    return ids, lengths


# ---------------------------------------------------------------------- next sentence prediction

def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) bool: tokens whose text ends a sentence."""
    # a quotation mark may stand behind the full stop: He said: "Yes."
    ends = []
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i]).strip().rstrip('"\')')
        ends.append(text.endswith((".", "!", "?")))
    return np.array(ends)


def find_cuts(tokens: np.ndarray, ends: np.ndarray, endoftext: int) -> np.ndarray:
    """(N,) ids -> (n, 3) begin, cut and end of n halved documents: all places between two sentences
    of one document, whose tokens are begin .. end - 1."""
    borders = np.flatnonzero(tokens == endoftext)
    cuts = np.flatnonzero(ends[tokens]) + 1
    n_ended = np.searchsorted(borders, cuts)                       # documents that end before
    begin = np.concatenate([[0], borders + 1])[n_ended]
    end = np.concatenate([borders, [len(tokens)]])[n_ended]
    # a cut at a border would leave one of the halves empty
    inside = (cuts > begin) & (cuts < end)
    return np.stack([begin, cuts, end], 1)[inside]


def sentence_pairs(tokens: np.ndarray, cuts: np.ndarray, rows: int, length: int, cls: int, sep: int,
                   pad: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BERT's rows [CLS] A [SEP] B [SEP], right-padded to `length` -> (ids, segments, is_next), two
    (rows, length) and (rows,).

    A is the text before a cut, B in half of the rows the text after it, in the others the text
    after a cut of another document. Each side is shortened, far from the cut, to half of the room.
    Raises ValueError when the text is a single document.
    """
    if (cuts[:, 0] == cuts[0, 0]).all():
        raise ValueError("next-sentence prediction needs at least two documents of several "
                         "sentences; this corpus has one")
    first = rng.integers(len(cuts), size=rows)
    is_next = rng.random(rows) < 0.5
    second = other_documents(cuts, first, is_next, rng)

    room = (length - 3) // 2                                       # 3: [CLS], [SEP], [SEP]
    a_end = cuts[first, 1]
    a_begin = np.maximum(cuts[first, 0], a_end - room)
    b_begin = cuts[second, 1]
    b_end = np.minimum(cuts[second, 2], b_begin + room)

    t = np.arange(length)
    n_a = (a_end - a_begin)[:, None]
    n_b = (b_end - b_begin)[:, None]
    first_sep = n_a + 1                                            # (rows, 1) places
    last_sep = n_a + n_b + 2
    in_a = a_begin[:, None] + t - 1                                # (rows, length) in the corpus
    in_b = b_begin[:, None] + t - n_a - 2
    place = np.where(t <= n_a, in_a, in_b)
    # places outside the corpus belong to [CLS], [SEP] or padding, which are written over below
    ids = tokens[place.clip(0, len(tokens) - 1)].astype(np.int64)
    ids = np.where((t == first_sep) | (t == last_sep), sep, ids)
    ids = np.where(t == 0, cls, ids)
    ids = np.where(t > last_sep, pad, ids)
    segments = ((t > first_sep) & (t <= last_sep)).astype(np.int64)
    return ids, segments, is_next


def other_documents(cuts: np.ndarray, first: np.ndarray, is_next: np.ndarray,
                    rng: np.random.Generator) -> np.ndarray:
    """The cut after which B begins: that of A where is_next, else one of another document."""
    second = first.copy()
    while True:
        same_document = cuts[second, 0] == cuts[first, 0]
        wrong = ~is_next & same_document
        if not wrong.any():
            return second
        second[wrong] = rng.integers(len(cuts), size=wrong.sum())


# ---------------------------------------------------------------------- how long rows become

def longest_side(objective: str, one_row: bool, window: int) -> int:
    """The tokens of the longest side (one_row: of both together) that `window` tokens can give."""
    sizes = [span_sizes(window, rate, span) for span, rate in SETTINGS.get(objective, ())]
    if objective != "span":
        sizes.append((1, 0))                           # a prefix and the rest: one token at least
    lengths = []
    for n_hidden, n_spans in sizes:
        if one_row:
            lengths.append(window + 2 * n_spans + 2)   # each sentinel twice, two <|end|>
        else:
            lengths.append(window - n_hidden + n_spans + 1)
    mode_token = 1 if objective == "ul2" else 0
    return max(lengths) + mode_token


def window_length(objective: str, architecture: str, context_length: int) -> int:
    """How many tokens of text a row holds so that the pair made of them fits the context."""
    if architecture == "encoder":
        return context_length
    one_row = architecture != "encoder_decoder"
    room = context_length + 1 if one_row else context_length       # a row's last token is no input
    fitting = [n for n in range(2, 2 * context_length)
               if longest_side(objective, one_row, n) <= room]
    return max(fitting)


def with_special_tokens(tokenizer: Tokenizer, objective: str, window: int) -> Tokenizer:
    """The tokenizer with the special tokens that the objective needs; the ids of others stay."""
    names = {"causal": [], "mlm": ["mask", "cls", "sep"], "span": [], "ul2": list(MODES)}[objective]
    n_sentinels = 0
    for mean_span, rate in SETTINGS.get(objective, ()):
        _, n_spans = span_sizes(window, rate, mean_span)
        n_sentinels = max(n_sentinels, n_spans)
    names += [f"sentinel_{i}" for i in range(n_sentinels)]
    missing = [f"<|{name}|>" for name in names if f"<|{name}|>" not in tokenizer.special]
    if not missing:
        return tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"--objective {objective} needs the special tokens {' '.join(missing)}, "
                         "and the vocabulary of a model from elsewhere stays as it is; give "
                         "--objective causal, or a model of this project")
    return Tokenizer(tokenizer.ranks, tokenizer.pattern, [*tokenizer.named, *missing])


# ---------------------------------------------------------------------- sources of batches

@dataclass
class DenoisingBatch(data.Batch):
    """B rows of T tokens. With targets of their own, logits are scored by these under loss_mask,
    unshifted; without, by the next token, as in data.Batch."""
    targets: torch.Tensor | None = None          # (B, T) int64
    prefix: torch.Tensor | None = None           # (B,) int64: so many tokens see each other
    source: torch.Tensor | None = None           # (B, S) int64: what an encoder reads
    source_lengths: torch.Tensor | None = None   # (B,) int64: tokens of it, the rest is padding
    segments: torch.Tensor | None = None         # (B, T) int64: 0 or 1
    is_next: torch.Tensor | None = None          # (B,) int64: 1 if the second segment follows

    @cached_property
    def n_targets(self) -> int:
        if self.targets is None:
            return int(self.loss_mask[:, 1:].sum())
        return int(self.loss_mask.sum())

    @property
    def n_tokens(self) -> int:
        """Tokens that a model reads, padding and the source included."""
        if self.targets is None:
            return self.tokens[:, 1:].numel()          # the last of a row is only a target
        n_read = 0 if self.source is None else self.source.numel()
        return self.tokens.numel() + n_read

    def of_architecture(self) -> dict[str, torch.Tensor]:
        """The inputs that only some architectures take, those that are there."""
        found = {}
        for name in ("prefix", "source", "source_lengths", "segments"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found


class Denoised:
    """A TokenStream's windows under a denoising objective, as DenoisingBatch. Row k, numbered
    through all epochs, is corrupted by a generator of its own batch: each epoch hides other tokens,
    and the same numbers always give the same batch."""

    def __init__(self, stream, tokenizer: Tokenizer, objective: str, architecture: str,
                 next_sentence: bool = False):
        self.stream = stream
        self.tokenizer = tokenizer
        self.objective = objective
        self.architecture = architecture
        self.next_sentence = next_sentence
        self.context_length = stream.context_length
        self.sentinels = []
        while (name := f"<|sentinel_{len(self.sentinels)}|>") in tokenizer.special:
            self.sentinels.append(tokenizer.special[name])
        if next_sentence:
            self.cuts = find_cuts(stream.tokens, sentence_ends(tokenizer), tokenizer.endoftext)

    @property
    def tokens(self) -> np.ndarray:
        return self.stream.tokens

    def __len__(self) -> int:
        return len(self.stream)

    def batch(self, step: int, batch_size: int, rank: int = 0,
              world_size: int = 1) -> DenoisingBatch:
        return self.rows(data.row_numbers(step, batch_size, rank, world_size))

    def rows(self, numbers: range) -> DenoisingBatch:
        rng = np.random.default_rng((self.stream.seed, numbers[0], len(numbers)))
        if self.next_sentence:
            return self.paired_rows(numbers, rng)
        windows = self.stream.rows(numbers)
        text = windows.tokens[:, :-1].numpy()          # the last token is the neighbour's first
        batch = self.hide(text, rng)
        batch.index = windows.index
        # only BERT keeps a window's places, so that attention can stay inside its documents
        if self.objective == "mlm" and windows.documents is not None:
            batch.documents = windows.documents[:, :-1]
            batch.positions = windows.positions[:, :-1]
        return batch

    def paired_rows(self, numbers: range, rng: np.random.Generator) -> DenoisingBatch:
        """Two segments in a row, of which the second follows the first or does not."""
        special = self.tokenizer.special
        pad = self.tokenizer.pad
        tokens, segments, is_next = sentence_pairs(
            self.stream.tokens, self.cuts, len(numbers), self.context_length, special["<|cls|>"],
            special["<|sep|>"], pad, rng)
        batch = self.hide(tokens, rng)
        batch.documents = -(batch.targets == pad).int()                    # 0, padding -1
        batch.index = torch.tensor(numbers)
        batch.segments = torch.from_numpy(segments)
        batch.is_next = torch.from_numpy(is_next.astype(int))
        return batch

    def copying_batch(self, vocab_size: int, rows: int, length: int, seed: int,
                      step: int) -> DenoisingBatch:
        """data.copying_batch under the objective: each hidden token stands elsewhere in the row. In
        place of spans the rest of a row is hidden, where looking back is enough: with spans,
        sentinels would have to be matched as well, which takes far longer to learn."""
        tokens = data.copying_batch(vocab_size, rows, length, seed, step).tokens[:, :-1].numpy()
        rng = np.random.default_rng((seed, step))
        if self.objective == "mlm":
            return self.hide(tokens, rng)
        inputs, targets = split_prefix(tokens, self.tokenizer.end, self.tokenizer.pad, rng)
        return self.arrange(inputs, targets)

    def hide(self, tokens: np.ndarray, rng: np.random.Generator) -> DenoisingBatch:
        """(B, T) ids as a batch of the objective."""
        if self.objective != "mlm":
            inputs, targets = self.pairs(tokens, rng)
            return self.arrange(inputs, targets)
        mask = self.tokenizer.special["<|mask|>"]
        inputs, chosen = mask_tokens(tokens, len(self.tokenizer.ranks), mask, rng)
        return DenoisingBatch(torch.from_numpy(inputs), torch.from_numpy(chosen), None, None,
                              torch.arange(len(tokens)), targets=torch.from_numpy(tokens))

    def pairs(self, tokens: np.ndarray, rng: np.random.Generator,
              modes: tuple[str, ...] = MODES) -> tuple[Side, Side]:
        """Inputs and targets of (B, T) ids. modes: those of ul2."""
        end = self.tokenizer.end
        pad = self.tokenizer.pad
        sentinels = np.array(self.sentinels)
        if self.objective == "causal":
            return split_prefix(tokens, end, pad, rng)
        if self.objective == "span":
            [(mean_span, rate)] = SETTINGS["span"]
            noise = noise_spans(*tokens.shape, rate, mean_span, rng)
            return corrupt_spans(tokens, noise, sentinels, end, pad)
        return ul2(tokens, self.tokenizer.special, sentinels, end, pad, rng, modes)

    def arrange(self, inputs: Side, targets: Side) -> DenoisingBatch:
        """A pair as the architecture reads it: by two stacks, or in one row."""
        if self.architecture == "encoder_decoder":
            return self.two_stacks(inputs, targets)
        return self.in_one_row(inputs, targets)

    def two_stacks(self, inputs: Side, targets: Side) -> DenoisingBatch:
        """The inputs are the source. The writer starts from <|end|>, the source's last token."""
        read, n_read = inputs
        written, n_written = targets
        limit = longest_side(self.objective, False, self.context_length)
        read = widened(read, limit, self.tokenizer.pad)                    # (B, S)
        written = widened(written, limit, self.tokenizer.pad)              # (B, T)
        # token t is predicted from the tokens before it
        before = np.pad(written, ((0, 0), (1, 0)), constant_values=self.tokenizer.end)[:, :-1]
        loss_mask = np.arange(written.shape[1]) < n_written[:, None]
        return DenoisingBatch(
            torch.from_numpy(before), torch.from_numpy(loss_mask), None, None,
            torch.arange(len(read)), targets=torch.from_numpy(written),
            source=torch.from_numpy(read), source_lengths=torch.from_numpy(n_read))

    def in_one_row(self, inputs: Side, targets: Side) -> DenoisingBatch:
        """Inputs, then targets, of which the targets are scored."""
        read, n_read = inputs
        written, n_written = targets
        is_read = np.arange(read.shape[1]) < n_read[:, None]
        is_written = np.arange(written.shape[1]) < n_written[:, None]
        both = np.concatenate([read, written], 1)
        tokens, lengths = pack_left(both, np.concatenate([is_read, is_written], 1),
                                    self.tokenizer.pad)
        limit = longest_side(self.objective, True, self.context_length)
        tokens = widened(tokens, limit, self.tokenizer.pad)                # (B, T)
        t = np.arange(tokens.shape[1])
        loss_mask = (t >= n_read[:, None]) & (t < lengths[:, None])
        prefix = torch.from_numpy(n_read) if self.architecture == "prefix" else None
        return DenoisingBatch(torch.from_numpy(tokens), torch.from_numpy(loss_mask), None, None,
                              torch.arange(len(tokens)), prefix=prefix)


def widened(ids: np.ndarray, limit: int, pad: int) -> np.ndarray:
    """Padded to one of a few widths (data.wide_enough)."""
    n_more = data.wide_enough(ids.shape[1], 16, limit) - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, n_more)), constant_values=pad)


def answers_apart(batch: data.Batch) -> DenoisingBatch:
    """The conversations of packed rows (data.PackedExamples), each a row of its own, for an
    encoder-decoder (001 section 2.2): the source is all before the last answer, <|assistant|> at
    its end; the targets are that answer and its <|end|>. The writer starts from the source's last
    token, as sample.py does. (B, T) -> source (n, S), the others (n, T_y).

        <|user|>Hi<|end|><|assistant|>Yo<|end|> -> source   <|user|>Hi<|end|><|assistant|>
                                                   tokens   <|assistant|>Yo
                                                   targets  Yo<|end|>
    """
    inside = batch.documents >= 0                      # (B, T): no padding
    n_in_row = batch.documents.amax(1, keepdim=True) + 1                   # (B, 1) conversations
    n_before = n_in_row.cumsum(0) - n_in_row           # in the rows above
    row = (n_before + batch.documents)[inside]         # (N,) where each token goes, and its place
    place = batch.positions[inside]
    ids = batch.tokens[inside]
    n = int(n_in_row.sum())

    # an answer begins behind the last token that is no target
    others = ~batch.loss_mask[inside]
    last_read = row.new_zeros(n).scatter_reduce(0, row[others], place[others], "amax")
    n_read = last_read + 1
    is_read = place < n_read[row]
    longest = batch.tokens.shape[1] - 1                # one is written at least
    # 0 behind the ends of rows, where nothing looks
    width = data.wide_enough(int(n_read.max()), 16, longest)
    source = ids.new_zeros(n, width)                                       # (n, S)
    source[row[is_read], place[is_read]] = ids[is_read]

    row = row[~is_read]
    place = place[~is_read] - n_read[row]              # in the answer
    width = data.wide_enough(int(place.max()) + 1, 16, longest)
    targets = ids.new_zeros(n, width)                                      # (n, T_y)
    targets[row, place] = ids[~is_read]
    loss_mask = torch.zeros_like(targets, dtype=torch.bool)
    loss_mask[row, place] = True
    start = source.gather(1, last_read[:, None])                           # (n, 1)
    before = torch.cat([start, targets[:, :-1]], 1)    # token t is predicted from those before it
    return DenoisingBatch(before, loss_mask, None, None, batch.index, targets=targets,
                          source=source, source_lengths=n_read)


def spans_after(ids: list[int], sentinels: list[int]) -> dict[int, tuple[int, ...]]:
    """Targets as a model wrote them -> {sentinel: its span}; text before the first is left out."""
    spans: dict[int, list[int]] = {}
    known = set(sentinels)
    current = None
    for i in ids:
        if i in known:
            current = spans.setdefault(i, [])
        elif current is not None:
            current.append(i)
    return {sentinel: tuple(span) for sentinel, span in spans.items()}


