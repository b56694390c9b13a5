"""
Texts with labels: what a classifier reads (001 section 2.2), and how what it says is scored.

A row of readers.py becomes ids, the places that are read or may be said, and labels as numbers:

    task     ids                        places (mask)              labels
    class    [first] text               all                        its class
    tokens   [first] words              the last token of a word   the class of each word
    span     [first] question, passage  the passage                the answer's first and last
                                                                   token, counted in the passage

[first] is <|cls|> where the tokenizer has it, as BERT's does, else <|endoftext|>, from which every
document is predicted. A word's last token has its label, because a decoder has not read the word
before; its other tokens have none. The question stands before the passage, because a decoder has to
know it while it reads.

    train = LabelledTexts(rows, classes_of(rows, "tokens"), tokenizer, model, cfg)
    batch = train.batch(step, batch_size)
"""
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import data
import evaluate
from tokenizer import Tokenizer

NO_SPACE_BEFORE = frozenset(".,;:!?)]}'’”%")           # words that begin with one of these


# ---------------------------------------------------------------------- rows -> ids and labels

def classes_of(rows: list[dict], task: str) -> list[str]:
    """The names of a model's numbers, sorted. Raises ValueError for a single class."""
    if task == "span":
        return ["start", "end"]
    found = set()
    for row in rows:
        found.update([row["label"]] if task == "class" else row["labels"])
    if len(found) < 2:
        raise ValueError(f"every row has the class {found.pop()!r}: there is nothing to tell "
                         "apart; give rows of two classes or more")
    return sorted(found)


def encode_all(rows: list[dict], task: str, tokenizer: Tokenizer,
               classes: list[str]) -> list[dict]:
    """Rows -> [{"ids", "mask", "labels", "fixed": so many tokens at the beginning that no cut may
    take, "where"}, ...]."""
    encode = {"class": encode_text, "tokens": encode_words, "span": encode_question}[task]
    encoded = []
    for row in rows:
        encoded.append(encode(row, tokenizer, classes) | {"where": row["where"], "task": task})
    return encoded


def first_token(tokenizer: Tokenizer) -> int:
    return tokenizer.special.get("<|cls|>", tokenizer.endoftext)


def number_of(label: str, classes: list[str], where: str) -> int:
    if label not in classes:
        raise ValueError(f"{where}: the class {label!r} does not occur in training, which has "
                         f"{', '.join(classes)}")
    return classes.index(label)


def encode_text(row: dict, tokenizer: Tokenizer, classes: list[str]) -> dict:
    ids = [first_token(tokenizer), *tokenizer.encode(row["text"])]
    label = number_of(row["label"], classes, row["where"])
    return {"ids": ids, "mask": [1] * len(ids), "labels": [label], "fixed": 1}


def encode_words(row: dict, tokenizer: Tokenizer, classes: list[str]) -> dict:
    ids = [first_token(tokenizer)]
    mask = [0]
    for i, word in enumerate(row["tokens"]):
        # as in a text, because there the model has learned to read
        spaced = i > 0 and word[0] not in NO_SPACE_BEFORE
        pieces = tokenizer.encode(" " + word if spaced else word)
        ids += pieces
        mask += [0] * (len(pieces) - 1) + [1]
    labels = [number_of(label, classes, row["where"]) for label in row["labels"]]
    return {"ids": ids, "mask": mask, "labels": labels, "fixed": 1}


def encode_question(row: dict, tokenizer: Tokenizer, classes: list[str]) -> dict:
    separator = tokenizer.encode("\n")
    if "<|sep|>" in tokenizer.special:                     # BERT's
        separator = [tokenizer.special["<|sep|>"]]
    question = [first_token(tokenizer), *tokenizer.encode(row["question"]), *separator]
    passage = tokenizer.encode(row["text"])
    # where each token of the passage ends, in bytes, because a token need not be whole characters
    ends = np.cumsum([len(tokenizer.token_bytes(i)) for i in passage])
    if ends[-1] != len(row["text"].encode()):
        raise ValueError(f"{row['where']}: the tokens of the passage are not its bytes, as this "
                         "tokenizer writes them; spans need byte-level BPE without a normaliser")
    before = row["text"][:row["start"]]
    first_byte = len(before.encode())
    last_byte = first_byte + len(row["answer"].encode()) - 1
    # the token that has a byte is the first that ends behind it
    first, last = np.searchsorted(ends, [first_byte, last_byte], side="right").tolist()
    mask = [0] * len(question) + [1] * len(passage)
    return {"ids": question + passage, "mask": mask, "labels": [(first, last)],
            "fixed": len(question)}


# ---------------------------------------------------------------------- texts that are too long

def fit_all(rows: list[dict], limit: int, truncate: str) -> list[dict]:
    """The rows that have at most `limit` tokens, or are cut to so many. Those dropped are counted
    on stderr."""
    fitting = []
    for row in rows:
        if len(row["ids"]) <= limit:
            fitting.append(row)
        elif truncate == "left":
            fitting.append(cut_left(row, len(row["ids"]) - limit))
        elif truncate == "error":
            raise ValueError(f"{row['where']}: {len(row['ids']):,} tokens, {limit:,} fit; use "
                             "--truncate left, --truncate drop or a model with a longer context")
    data.say_dropped(len(rows), len(fitting), limit)
    return fitting


def cut_left(row: dict, excess: int) -> dict:
    """The row without the first `excess` tokens of its text or passage, and without their labels.
    Raises ValueError when an answer or the whole passage would go."""
    start = row["fixed"]
    end = start + excess
    if end >= len(row["ids"]):
        raise ValueError(f"{row['where']}: the question alone fills the context; use --truncate "
                         "drop or a model with a longer context")
    n_cut = sum(row["mask"][start:end])
    labels = row["labels"]
    if row["task"] == "tokens":
        labels = labels[n_cut:]
    elif row["task"] == "span":
        [(first, last)] = labels
        if first < n_cut:
            raise ValueError(f"{row['where']}: --truncate left would cut off the answer; use "
                             "--truncate drop or a model with a longer context")
        labels = [(first - n_cut, last - n_cut)]
    ids = row["ids"][:start] + row["ids"][end:]
    mask = row["mask"][:start] + row["mask"][end:]
    return row | {"ids": ids, "mask": mask, "labels": labels}


# ---------------------------------------------------------------------- batches

@dataclass
class LabelledBatch(data.Batch):
    """B rows of T tokens, right-padded. loss_mask: the places of the table above.

    labels: class (B,); tokens (n,), those of all words of the batch in their order, as
    values[loss_mask] has them; span (B, 2), places in the row.
    """
    labels: Tensor
    segments: Tensor | None = None      # (B, T) int64: 0 the question, 1 the passage


class LabelledTexts:
    """The rows of a reader as batches, each once an epoch (data.py); .examples are those that are
    left of them, encoded. trunk: the model that is to read them. cfg: task, seed, truncate."""

    def __init__(self, rows: list[dict], classes: list[str], tokenizer: Tokenizer, trunk, cfg):
        self.task = cfg.task
        self.seed = cfg.seed
        self.classes = classes
        self.pad = tokenizer.pad
        self.limit = trunk.config.context_length
        self.has_segments = getattr(trunk, "n_segments", 0) > 0
        encoded = encode_all(rows, cfg.task, tokenizer, classes)
        self.examples = fit_all(encoded, self.limit, cfg.truncate)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, step: int, batch_size: int, rank: int = 0,
              world_size: int = 1) -> LabelledBatch:
        return self.rows(data.row_numbers(step, batch_size, rank, world_size))

    def epoch(self, batch_size: int) -> Iterator[LabelledBatch]:
        return data.once(self, batch_size)

    def mean_length(self) -> float:
        return float(np.mean([len(row["ids"]) for row in self.examples]))

    def figures(self, answers: Tensor, truths: Tensor) -> dict[str, float]:
        """How good the answers to one epoch() are. Numbers of the head (n, C) and labels (n,); of
        spans those that were answered and the right ones, (n, 2) each."""
        if self.task == "span":
            return span_figures(answers, truths)
        figures = class_figures(answers, truths)
        if self.task == "tokens":
            order = data.shuffled(range(len(self)), len(self), self.seed)
            n_words = [len(self.examples[i]["labels"]) for i in order]
            ours = self.by_text(answers.argmax(-1), n_words)
            theirs = self.by_text(truths, n_words)
            figures["entity_f1"] = entity_f1(ours, theirs)
        return figures

    def by_text(self, numbers: Tensor, n_words: list[int]) -> list[list[str]]:
        """The names of the labels (n,) of all words, text by text."""
        return [[self.classes[i] for i in text] for text in numbers.split(n_words)]

    def rows(self, numbers: Iterable[int]) -> LabelledBatch:
        index = data.shuffled(numbers, len(self), self.seed).tolist()
        chosen = [self.examples[i] for i in index]
        sequences = [(row["ids"], row["mask"]) for row in chosen]
        longest = max(len(row["ids"]) for row in chosen)
        width = data.wide_enough(longest, 8, self.limit)
        batch = data.right_padded(sequences, self.pad, width, index)
        # padding is a document of its own, because an encoder sees what is behind its text
        documents = -(batch.tokens == self.pad).int()
        labels = torch.tensor([label for row in chosen for label in row["labels"]])
        passage = torch.zeros_like(batch.tokens)
        if self.task == "span":
            passage = batch.loss_mask.long()
            labels = labels + passage.argmax(1, keepdim=True)                  # (B, 2)
        segments = passage if self.has_segments else None
        return LabelledBatch(batch.tokens, batch.loss_mask, documents, None, batch.index, labels,
                             segments)


def majority(train: LabelledTexts, heldout: LabelledTexts) -> float:
    """How often the label that is most frequent in training is right on held-out texts."""
    counts = Counter(label for row in train.examples for label in row["labels"])
    [(most_frequent, _)] = counts.most_common(1)
    labels = [label for row in heldout.examples for label in row["labels"]]
    return labels.count(most_frequent) / len(labels)


# ---------------------------------------------------------------------- scores

def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN); both (n,). A class that is neither
    there nor predicted does not count."""
    scores = []
    for c in torch.cat([predicted, labels]).unique():
        both = (predicted == c) & (labels == c)
        n_either = (predicted == c).sum() + (labels == c).sum()        # 2 TP + FP + FN
        scores.append(2 * both.sum() / n_either)
    return float(torch.stack(scores).mean())


def entities(labels: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity.

    ["B-name", "O", "B-thing", "I-thing"] -> {("name", 0, 0), ("thing", 2, 3)}. Neighbours of one
    type are one entity unless B- begins another; plain types, without B- and I-, as well.
    """
    found = set()
    first = 0
    for i, (label, following) in enumerate(pairwise([*labels, "O"])):
        kind = label.removeprefix("B-").removeprefix("I-")
        goes_on = following in (f"I-{kind}", kind)
        if label != "O" and not goes_on:
            found.add((kind, first, i))
        if label == "O" or not goes_on:
            first = i + 1
    return found


def entity_f1(predicted: list[list[str]], labels: list[list[str]]) -> float:
    """F1 over the entities of all texts: one counts if its type and both of its ends are right
    (Tjong Kim Sang & De Meulder 2003). 0 where there are none."""
    n_right = 0
    n_either = 0
    for ours, theirs in zip(predicted, labels, strict=True):
        n_right += len(entities(ours) & entities(theirs))
        n_either += len(entities(ours)) + len(entities(theirs))
    return 2 * n_right / max(1, n_either)


def class_figures(numbers: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and expected calibration error. numbers: (n, C); labels: (n,)."""
    confidence, predicted = numbers.double().softmax(-1).max(-1)
    right = predicted == labels
    return {"accuracy": float(right.double().mean()), "macro_f1": macro_f1(predicted, labels),
            "ece": evaluate.confidence_gap(confidence, right, 0.0)}


def span_figures(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Exact match, and the mean F1 of the tokens in the two spans; both (n, 2), first and last."""
    first = torch.maximum(predicted, labels)[:, 0]
    last = torch.minimum(predicted, labels)[:, 1]
    n_shared = (last - first + 1).clamp(min=0)
    n_either = lengths_of(predicted) + lengths_of(labels)
    f1 = 2 * n_shared / n_either
    is_same = (predicted == labels).all(1)
    return {"exact_match": float(is_same.double().mean()), "span_f1": float(f1.mean())}


def lengths_of(spans: Tensor) -> Tensor:
    first, last = spans.unbind(1)
    return last - first + 1
