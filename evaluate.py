"""
How good is a model? Every figure of the report is made here, by functions that stages use as well.

  language      validation loss (nats per token), bits per byte, unigram and bigram baselines
  tasks         exact-match accuracy of greedy answers, by family of the embedded world
  rewards       reward-model accuracy and calibration; the true reward; win rate with its interval
  drift         KL to another model, nats per response, over samples at temperature 1

    python evaluate.py --init out/dpo --reference out/sft      # a table; --json FILE keeps it
"""
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import kernels
import objectives
import parallel
import readers
import sample
from heads import WithHead
from model import Transformer
from plumbing.folders import load_model
from plumbing.options import command_line
from plumbing.run import pick_device, pick_dtype
from scoring import token_logps
from world.judge import parse_answer, true_reward
from world.tasks import HELDOUT_FAMILIES

MAX_ANSWER = 64                       # tokens


@dataclass
class Config:
    init: str = "out/dpo"             # model folder to evaluate
    reference: str = ""               # model folder to compare with (win rate, KL); empty: none
    data: str = "world"               # world or world:SEED: what has an answer key
    n: int = 500                      # prompts for true reward, win rate and KL
    n_tasks: int = 1000               # task instances for accuracy
    seed: int = 0                     # of the samples
    json: str = ""                    # write the figures to this file too
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


# ---------------------------------------------------------------------- language

@torch.no_grad()
def validation_loss(model: Transformer, source, rows: int, batch_size: int,
                    scores: Callable = token_logps) -> float:
    """Mean -log p per target token in nats over the first `rows` rows of a data source's epoch 0:
    the same rows at every call.

    source: data.TokenStream or data.PackedExamples; or objectives.Denoised, with
    scores=denoised_logps.
    """
    model.eval()
    loss = 0.0
    n_targets = 0
    rows = min(rows, len(source))
    for first in range(0, rows, batch_size):
        batch = source.rows(range(first, min(first + batch_size, rows))).to(model.device)
        loss -= scores(model.logps, batch).sum().item()
        n_targets += batch.n_targets
    model.train()
    return loss / n_targets


def ngram_losses(train: np.ndarray, val: np.ndarray, vocab_size: int,
                 prior: float = 10.0, at_most: int = 20_000_000) -> tuple[float, float]:
    """Loss of count-based models on `val`, nats per token: (unigram, bigram).

    Unigram p(b) = (c(b) + 1) / (n + V). Bigram p(b|a) = (c(ab) + prior p(b)) / (c(a) + prior):
    counts pulled towards the unigram by `prior` virtual tokens (MacKay & Peto 1995). Of a longer
    corpus the first `at_most` tokens are counted: some hundred MB, a few seconds.
    """
    train, val = (tokens[:at_most].astype(np.int64) for tokens in (train, val))
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    wanted = val[:-1] * vocab_size + val[1:]
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, pair_counts[at], 0)
    followed = np.bincount(train[:-1], minlength=vocab_size)       # c(a): nothing follows the last
    bigram = (seen + prior * unigram[val[1:]]) / (followed[val[:-1]] + prior)
    return float(-np.log(unigram[val]).mean()), float(-np.log(bigram).mean())


def ngram_baselines(windows: dict, shares: dict[str, float], vocab_size: int) -> dict[str, float]:
    """ngram_losses of several corpora, weighted by their shares. windows: {(corpus, split):
    data.TokenStream}."""
    baselines = {"unigram_loss": 0.0, "bigram_loss": 0.0}
    for name, share in shares.items():
        unigram, bigram = ngram_losses(windows[name, "train"].tokens,
                                       windows[name, "heldout"].tokens, vocab_size)
        baselines["unigram_loss"] += share * unigram
        baselines["bigram_loss"] += share * bigram
    return baselines


def response_loss(model: Transformer, examples: data.PackedExamples, batch_size: int) -> float:
    """Nats per response token over all examples."""
    return validation_loss(model, examples, len(examples), batch_size)


def unigram_response_loss(train: data.PackedExamples, val: data.PackedExamples,
                          vocab_size: int) -> float:
    """Nats per response token of a unigram model of the training responses, on `val`'s."""
    def responses(source: data.PackedExamples) -> np.ndarray:
        return np.concatenate([ids[mask] for ids, mask in source.sequences])

    unigram, _ = ngram_losses(responses(train), responses(val), vocab_size)
    return unigram


def fluency(texts: list[str], corpus: list[str], order: int = 3) -> dict[str, float]:
    """Is it the corpus' language, is it varied, is it more than a copy?

    distinct:    different word 3-grams / all of them
    compression: zlib-compressed bytes / bytes of the joined texts; lower is more repetitive
    copied:      share of 12-word runs that stand verbatim in the corpus
    perplexity:  of words, under an interpolated 3-gram model counted on the corpus
    """
    words, corpus_words = ([text.split() for text in group] for group in (texts, corpus))
    grams = [tuple(w[i:i + order]) for w in words for i in range(len(w) - order + 1)]
    runs = [{tuple(w[i:i + 12]) for w in group for i in range(len(w) - 11)}
            for group in (words, corpus_words)]
    joined = "\n".join(texts).encode()
    return {"distinct": len(set(grams)) / max(1, len(grams)),
            "compression": len(zlib.compress(joined, 9)) / max(1, len(joined)),
            "copied": len(runs[0] & runs[1]) / max(1, len(runs[0])),
            "perplexity": word_perplexity(words, corpus_words, order)}


def word_perplexity(texts: list[list[str]], corpus: list[list[str]], order: int) -> float:
    """exp of the mean -log p per word; p(w | h) = (c(hw) + p(w | shorter h)) / (c(h) + 1)."""
    counts, contexts = Counter(), Counter()
    for words in corpus:
        for n in range(1, order + 1):
            for i in range(len(words) - n + 1):
                counts[tuple(words[i:i + n])] += 1
                contexts[tuple(words[i:i + n - 1])] += 1
    loss = total = 0
    for words in texts:
        for i in range(len(words)):
            p = 1 / (contexts[()] + 1)
            for n in range(1, min(order, i + 1) + 1):
                gram = tuple(words[i - n + 1:i + 1])
                p = (counts[gram] + p) / (contexts[gram[:-1]] + 1)
            loss, total = loss - math.log(p), total + 1
    return math.exp(loss / max(1, total))


@torch.no_grad()
def masked_figures(model: Transformer | WithHead, source: objectives.Denoised, rows: int,
                   batch_size: int) -> dict[str, float]:
    """How often the likeliest token is the hidden one, and the share that always guessing the
    corpus' most frequent token would get; next_sentence_accuracy for a model with that head. The
    same rows at every call."""
    model.eval()
    trunk = model.trunk if isinstance(model, WithHead) else model
    right = []
    guessed = []
    next_right = []
    most_frequent = np.bincount(source.tokens).argmax()
    for first in range(0, rows, batch_size):
        batch = source.rows(range(first, min(first + batch_size, rows))).to(model.device)
        h = trunk.hidden(batch.tokens, batch.documents, batch.positions, segments=batch.segments)
        logits = parallel.linear(h[batch.loss_mask], trunk.output_weight)      # (hidden, V)
        targets = batch.targets[batch.loss_mask]
        right += (logits.argmax(-1) == targets).tolist()
        guessed += (targets == most_frequent).tolist()
        if batch.segments is not None:
            next_logits = model.values_of(h)[:, 0]                             # (B, 2)
            next_right += (next_logits.argmax(-1) == batch.is_next).tolist()
    model.train()
    figures = {"masked_accuracy": float(np.mean(right)), "guess_accuracy": float(np.mean(guessed))}
    if next_right:
        figures["next_sentence_accuracy"] = float(np.mean(next_right))
    return figures


def span_figures(model: Transformer, source: objectives.Denoised, rows: int,
                 longest_span: int = 5) -> dict[str, float]:
    """Share of the hidden spans of at most `longest_span` tokens that greedy decoding rebuilds
    exactly, and of the spans of one token, in 15 % noise of short spans. The same rows at every
    call."""
    windows = source.stream.rows(range(rows)).tokens.numpy()
    inputs, targets = source.pairs(windows[:, :-1], np.random.default_rng(0), modes=("R",))
    inputs = [ids.tolist() for ids in objectives.unpadded(inputs)]
    targets = [ids.tolist() for ids in objectives.unpadded(targets)]
    room = model.config.context_length - 1
    if model.architecture != "encoder_decoder":
        room -= max(len(ids) for ids in inputs) - 1
    max_new_tokens = min(max(len(ids) for ids in targets) + 8, room)
    answers = sample.generate(model, inputs, max_new_tokens, (source.tokenizer.end,))

    rebuilt: dict[int, list[bool]] = defaultdict(list)             # by the length of the span
    for target, answer in zip(targets, answers):
        found = objectives.spans_after(answer, [*source.sentinels, source.tokenizer.end])
        for sentinel, span in objectives.spans_after(target[:-1], source.sentinels).items():
            rebuilt[len(span)].append(found.get(sentinel) == span)
    short = []
    for length in range(1, longest_span + 1):
        short += rebuilt[length]
    figures = {}
    if short:
        figures["short_spans_rebuilt"] = float(np.mean(short))
    if rebuilt[1]:
        figures["single_tokens_rebuilt"] = float(np.mean(rebuilt[1]))
    return figures


# ---------------------------------------------------------------------- tasks of the world

def answers(model: Transformer, tokenizer, examples: list[dict], temperature: float = 0.0,
            generator: torch.Generator | None = None) -> list[list[int]]:
    """Token ids of the model's answer to each example of the world, <|end|> included."""
    prompts = [tokenizer.prompt([{"role": "user", "content": e["prompt"]}]) for e in examples]
    return sample.generate(model, prompts, MAX_ANSWER, (tokenizer.end, tokenizer.endoftext),
                           temperature, generator=generator)


def complete_text(tokenizer, ids: list[int]) -> str:
    """The response's text; nothing at all when it never ended, which is no answer."""
    return tokenizer.decode(ids) if ids and ids[-1] == tokenizer.end else ""


def accuracy_by_family(examples: list[dict], texts: list[str]) -> dict[str, float]:
    """Share of exact matches of the parsed answer, for families that have one, and "all"."""
    right = defaultdict(list)
    for example, text in zip(examples, texts):
        if example["answer"] is not None:
            hit = parse_answer(example, text) == example["answer"]
            right[example["family"]].append(hit)
            right["all"].append(hit)
    return {family: sum(hits) / len(hits) for family, hits in right.items()}


def exam(name: str, n: int, families: tuple[str, ...] | None = None) -> list[dict]:
    """n held-out examples of a world; [] when `name` is not a world: files have no answer key."""
    world = readers.world_named(name)
    return world.examples(n, split="heldout", seed=1, families=families) if world else []


def quiz(name: str, n: int) -> dict[str, list[dict]]:
    """Small exams for use during training: trained families, and families never trained on."""
    if not readers.world_named(name):
        return {}
    return {"accuracy": exam(name, n),
            "unseen_families": exam(name, n // 4, HELDOUT_FAMILIES)}


def quiz_accuracy(model: Transformer, tokenizer, quizzes: dict[str, list[dict]]) -> dict:
    scores = {}
    for name, examples in quizzes.items():
        texts = [complete_text(tokenizer, ids) for ids in answers(model, tokenizer, examples)]
        if found := accuracy_by_family(examples, texts):
            scores[name] = found["all"]
    return scores


def true_rewards(examples: list[dict], texts: list[str]) -> np.ndarray:
    return np.array([true_reward(e, text)["total"] for e, text in zip(examples, texts)])


def rollout_truth(prompts: list[dict], responses: list[list[int]], tokenizer) -> dict:
    """The true reward of a rollout where the prompts carry an answer key: proxy beside truth."""
    examples = [prompt["example"] for prompt in prompts]
    if not {"family", "key"} <= examples[0].keys():
        return {}
    texts = [complete_text(tokenizer, ids) for ids in responses]
    return {"true_reward": float(true_rewards(examples, texts).mean())}


# ---------------------------------------------------------------------- comparisons

def win_rate(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Share of prompts on which ours is higher, ties counting half, and its 95 % interval (normal
    approximation of the mean of 0, 1/2, 1)."""
    wins = (ours > theirs + 1e-9) + 0.5 * (np.abs(ours - theirs) <= 1e-9)
    half = 1.96 * wins.std() / math.sqrt(len(wins))
    return float(wins.mean()), float(wins.mean() - half), float(wins.mean() + half)


@torch.no_grad()
def kl_to(model: Transformer, reference: Transformer, tokenizer, examples: list[dict],
          seed: int) -> float:
    """KL(model || reference) in nats per response: the mean over samples y ~ model at temperature 1
    of log model(y|x) - log reference(y|x)."""
    generator = torch.Generator(model.device).manual_seed(seed)
    responses = answers(model, tokenizer, examples, 1.0, generator)
    prompts = [tokenizer.prompt([{"role": "user", "content": e["prompt"]}]) for e in examples]
    total = 0.0
    for first in range(0, len(examples), 64):
        part = slice(first, first + 64)
        batch = data.response_batch(prompts[part], responses[part], tokenizer.pad,
                                    model.config.context_length).to(model.device)
        total += (token_logps(model.logps, batch) - token_logps(reference.logps, batch)).sum().item()
    return total / len(examples)


def calibration_error(margin: Tensor, bins: int = 10) -> float:
    """Expected calibration error of a reward model (001 section 4.4): p = sigma(|r_w - r_l|) is its
    confidence in its own ranking; the mean gap between confidence and accuracy over `bins` equal
    parts of [0.5, 1], weighted by how many pairs fall into each."""
    confidence, right = torch.sigmoid(margin.abs().double()), (margin > 0).double()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [abs(confidence[which == b].sum() - right[which == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(margin))


def length_accuracy(pairs: data.PreferencePairs) -> float:
    """How often the longer response (in tokens) is the chosen one, ties counting half."""
    lengths = [tuple(len(ids) for ids, _ in sides) for sides in pairs.sequences]
    return sum((w > r) + 0.5 * (w == r) for w, r in lengths) / len(lengths)


def evaluate_policy(model: Transformer, tokenizer, name: str, n_tasks: int, n: int) -> dict:
    """Greedy answers of a model to the exam: {"accuracy", "families", "true_reward", and the
    per-prompt "rewards" of the first n prompts that are compared in win rates}."""
    tasks, prompts = exam(name, n_tasks), readers.world_named(name).prompts(n, "heldout", seed=2)
    texts = [complete_text(tokenizer, ids) for ids in answers(model, tokenizer, tasks + prompts)]
    families = accuracy_by_family(tasks, texts[:n_tasks])
    rewards = true_rewards(prompts, texts[n_tasks:])
    return {"accuracy": families.pop("all"), "families": families,
            "true_reward": float(rewards.mean()), "rewards": rewards}


def main(cfg: Config) -> dict:
    kernels.keep_memory()
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if readers.world_named(cfg.data) is None:
        raise ValueError(f"--data {cfg.data}: only a world has an answer key; give world or "
                         "world:SEED")
    model, tokenizer = load_model(cfg.init, device, dtype)
    if cfg.reference:
        reference, reference_tokenizer = load_model(cfg.reference, device, dtype)
        if reference_tokenizer != tokenizer:
            raise ValueError(f"--reference {cfg.reference}: its tokenizer is not that of --init "
                             f"{cfg.init}, so that their predictions cannot be compared")
    found = evaluate_policy(model, tokenizer, cfg.data, cfg.n_tasks, cfg.n)
    rewards = found.pop("rewards")
    if cfg.reference:
        theirs = evaluate_policy(reference, tokenizer, cfg.data, cfg.n_tasks, cfg.n)
        rate, low, high = win_rate(rewards, theirs["rewards"])
        prompts = readers.world_named(cfg.data).prompts(cfg.n, "heldout", seed=2)
        found |= {"win_rate": rate, "win_rate_95": [low, high],
                  "reference_true_reward": theirs["true_reward"],
                  "reference_accuracy": theirs["accuracy"],
                  "kl": kl_to(model, reference, tokenizer, prompts, cfg.seed)}
    for name, value in {**found, **found["families"]}.items():
        if isinstance(value, float):
            print(f"{name:24s} {value:8.3f}")
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    command_line(main, Config, __doc__)
