"""
How good is a model? Every figure of the report is made here, by functions that stages use as well.

  language      validation loss (nats per token), bits per byte, unigram and bigram baselines
  tasks         exact-match accuracy of greedy answers, by family of the embedded world
  rewards       reward-model accuracy and calibration; the true reward; win rate with its interval
  drift         KL to another model, nats per response, over samples at temperature 1
  data          diversity, complexity, correctness, format of instructions (data_quality.py)

    python evaluate.py --init out/dpo --reference out/sft      # a table; --json FILE keeps it
    python evaluate.py --data_quality tasks.jsonl              # of data alone, without a model
"""
import itertools
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import data_quality
import kernels
import objectives
import parallel
import readers
import sample
from heads import WithHead
from model import Transformer
from plumbing import claim
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import command_line
from scoring import token_logps
from world.judge import (
    WEIGHTS,
    courtesies_in,
    is_inventing,
    is_rambling,
    is_rude,
    parse_answer,
    true_reward,
    without_courtesies,
)
from world.tasks import HELDOUT_FAMILIES

MAX_ANSWER = 64                       # tokens
# Of evaluate_policy's figures those that are one for each prompt, by which models are compared.
PER_PROMPT = ("rewards", "plain_rewards", "right", "whole", "words", "texts")


@dataclass
class Config:
    init: str = "out/dpo"             # model folder to evaluate
    reference: str = ""               # model folder to compare with (win rate, KL); empty: none
    data: str = "world"               # world or world:SEED: what has an answer key
    n: int = 500                      # prompts for true reward, win rate and KL, >= 1
    n_tasks: int = 1000               # task instances for accuracy, >= 1
    data_quality: str = ""            # examples to look at instead (JSONL, world:SEED), by no model
    seed: int = 0                     # of the samples, in [0, 4e9]
    json: str = ""                    # write the figures to this new file too
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


# ---------------------------------------------------------------------- language

@torch.no_grad()
def validation_loss(model: Transformer, source, rows: int, batch_size: int,
                    scores: Callable = token_logps) -> float:
    """Mean -log p per target token in nats over the first `rows` rows of a data source's epoch 0:
    the same rows at every call.

    source: data.TokenStream or data.PackedExamples; or objectives.Denoised, with
    scores=denoised_logps. An encoder-decoder scores data.PackedExamples with answer_logps.
    """
    model.eval()
    loss = 0.0
    n_targets = 0
    rows = min(rows, len(source))
    for first in range(0, rows, batch_size):
        end = min(first + batch_size, rows)
        batch = source.rows(range(first, end)).to(model.device)
        logps = scores(model.logps, batch)
        loss -= logps.sum().item()
        # Tokens are counted and not batches, because the last batch may hold fewer of them.
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
    train = train[:at_most].astype(np.int64)
    val = val[:at_most].astype(np.int64)
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)           # (V,)

    # A pair (a, b) is written as the number a V + b, because numpy sorts numbers fast.
    train_pairs = train[:-1] * vocab_size + train[1:]
    pairs, pair_counts = np.unique(train_pairs, return_counts=True)
    val_pairs = val[:-1] * vocab_size + val[1:]
    places = np.searchsorted(pairs, val_pairs)
    # A pair beyond the largest of training gets a place outside, so that it is moved to the last.
    places = places.clip(max=len(pairs) - 1)
    known = pairs[places] == val_pairs
    joint_counts = np.where(known, pair_counts[places], 0)         # c(ab) of each pair in val
    # c(a) leaves out the last token, because nothing follows it.
    followed = np.bincount(train[:-1], minlength=vocab_size)
    a = val[:-1]
    b = val[1:]
    bigram = (joint_counts + prior * unigram[b]) / (followed[a] + prior)

    unigram_loss = -np.log(unigram[val]).mean()
    bigram_loss = -np.log(bigram).mean()
    return float(unigram_loss), float(bigram_loss)


def corpus_figures(losses: dict[str, float], shares: dict[str, float],
                   bytes_per_token: dict[str, float] | None = None) -> dict[str, float]:
    """The losses of several corpora, nats per token, as figures to log: val_loss is their mean
    weighted by the training shares; a corpus of --anneal_data alone has no share in it. With
    bytes_per_token also bits per byte, which compare models of different tokenizers."""
    val_loss = sum(share * losses[name] for name, share in shares.items())
    figures = {"val_loss": val_loss, "perplexity": math.exp(val_loss)}
    for name, loss in losses.items():
        suffix = f"/{name}" if len(losses) > 1 else ""     # a single corpus is val_loss itself
        figures[f"val_loss{suffix}"] = loss
        if bytes_per_token is not None:
            figures[f"bits_per_byte{suffix}"] = loss / bytes_per_token[name] / math.log(2)
    return figures


def ngram_baselines(windows: dict, shares: dict[str, float], vocab_size: int) -> dict[str, float]:
    """ngram_losses of several corpora, weighted by their shares. windows: {(corpus, split):
    data.TokenStream}."""
    baselines = {"unigram_loss": 0.0, "bigram_loss": 0.0}
    for name, share in shares.items():
        train = windows[name, "train"].tokens
        heldout = windows[name, "heldout"].tokens
        unigram, bigram = ngram_losses(train, heldout, vocab_size)
        baselines["unigram_loss"] += share * unigram
        baselines["bigram_loss"] += share * bigram
    return baselines


def response_loss(model: Transformer, examples: data.PackedExamples, batch_size: int,
                  scores: Callable = token_logps) -> float:
    """Nats per response token over all examples."""
    return validation_loss(model, examples, len(examples), batch_size, scores)


def unigram_response_loss(train: data.PackedExamples, val: data.PackedExamples,
                          vocab_size: int) -> float:
    """Nats per response token of a unigram model of the training responses, on `val`'s."""
    train_tokens = response_tokens(train)
    val_tokens = response_tokens(val)
    unigram, _ = ngram_losses(train_tokens, val_tokens, vocab_size)
    return unigram


def response_tokens(examples: data.PackedExamples) -> np.ndarray:
    """The response tokens of all examples, one after the other."""
    return np.concatenate([ids[mask] for ids, mask in examples.sequences])


def fluency(texts: list[str], corpus: list[str], order: int = 3) -> dict[str, float]:
    """Is it the corpus' language, is it varied, is it more than a copy?

    distinct:    different word 3-grams / all of them
    compression: zlib-compressed bytes / bytes of the joined texts; lower is more repetitive
    copied:      share of 12-word runs that stand verbatim in the corpus
    perplexity:  of words, under an interpolated 3-gram model counted on the corpus
    """
    words = [text.split() for text in texts]
    corpus_words = [text.split() for text in corpus]
    grams = list(ngrams(words, order))
    runs = set(ngrams(words, 12))
    copied_runs = runs & set(ngrams(corpus_words, 12))
    joined = "\n".join(texts).encode()
    compressed = zlib.compress(joined, 9)                  # 9: as small as zlib can make it
    # Divided by at least 1, because a model may write nothing, or less than 12 words.
    return {"distinct": len(set(grams)) / max(1, len(grams)),
            "compression": len(compressed) / max(1, len(joined)),
            "copied": len(copied_runs) / max(1, len(runs)),
            "perplexity": word_perplexity(words, corpus_words, order)}


def ngrams(texts: list[list[str]], n: int) -> Iterator[tuple[str, ...]]:
    """Each run of n words: [["a", "b", "c"]], 2 -> ("a", "b"), ("b", "c")."""
    for words in texts:
        for start in range(len(words) - n + 1):
            yield tuple(words[start:start + n])


def word_perplexity(texts: list[list[str]], corpus: list[list[str]], order: int) -> float:
    """exp of the mean -log p per word; p(w | h) = (c(hw) + p(w | shorter h)) / (c(h) + 1)."""
    counts = Counter()                                     # c(hw), hw of 1 to `order` words
    contexts = Counter()                                   # c(h), h of 0 to `order` - 1 words
    for n in range(1, order + 1):
        for gram in ngrams(corpus, n):
            counts[gram] += 1
            contexts[gram[:-1]] += 1
    loss = 0
    n_words = 0
    for words in texts:
        for end in range(1, len(words) + 1):
            # From the shortest history to the longest, because each p leans on the one before.
            p = 1 / (contexts[()] + 1)
            for n in range(1, min(order, end) + 1):
                gram = tuple(words[end - n:end])           # the last n words, w among them
                p = (counts[gram] + p) / (contexts[gram[:-1]] + 1)
            loss -= math.log(p)
            n_words += 1
    return math.exp(loss / max(1, n_words))


@torch.no_grad()
def masked_figures(model: Transformer | WithHead, source: objectives.Denoised, rows: int,
                   batch_size: int) -> dict[str, float]:
    """How often the likeliest token is the hidden one, and the share that always guessing the
    corpus' most frequent token would get; next_sentence_accuracy for a model with that head. The
    same rows at every call."""
    model.eval()
    trunk = model.trunk if isinstance(model, WithHead) else model
    token_right = []
    guess_right = []
    next_right = []
    most_frequent = np.bincount(source.tokens).argmax()
    for first in range(0, rows, batch_size):
        end = min(first + batch_size, rows)
        batch = source.rows(range(first, end)).to(model.device)
        h = trunk.hidden(batch.tokens, batch.documents, batch.positions, segments=batch.segments)
        # Only hidden tokens are scored, because logits of all T would be 7 times as many.
        hidden = h[batch.loss_mask]                                            # (hidden, D)
        logits = parallel.linear(hidden, trunk.output_weight)                  # (hidden, V)
        targets = batch.targets[batch.loss_mask]                               # (hidden,)
        likeliest = logits.argmax(-1)
        token_right += (likeliest == targets).tolist()
        guess_right += (targets == most_frequent).tolist()
        if batch.segments is not None:
            # The first token's, where BERT has [CLS], because there the head was trained.
            next_logits = model.values_of(h)[:, 0]                             # (B, 2)
            says_next = next_logits.argmax(-1)
            next_right += (says_next == batch.is_next).tolist()
    model.train()
    token_accuracy = float(np.mean(token_right))
    figures = {"masked_accuracy": token_accuracy, "guess_accuracy": float(np.mean(guess_right))}
    if next_right:
        figures["next_sentence_accuracy"] = float(np.mean(next_right))
    return figures


def span_figures(model: Transformer, source: objectives.Denoised, rows: int,
                 longest_span: int = 5) -> dict[str, float]:
    """Share of the hidden spans of at most `longest_span` tokens that greedy decoding rebuilds
    exactly, and of the spans of one token, in 15 % noise of short spans. The same rows at every
    call."""
    windows = source.stream.rows(range(rows)).tokens.numpy()       # (rows, T + 1)
    rng = np.random.default_rng(0)                         # 0: so that the same spans are hidden
    # "R": UL2's regular denoiser, which is T5's; another model of spans has no other mode.
    inputs, targets = source.pairs(windows[:, :-1], rng, modes=("R",))
    inputs = [ids.tolist() for ids in objectives.unpadded(inputs)]
    targets = [ids.tolist() for ids in objectives.unpadded(targets)]
    room = model.config.context_length - 1
    if model.architecture != "encoder_decoder":
        # A single stack holds the input too, of which the last token is the first to be answered.
        room -= max(len(ids) for ids in inputs) - 1
    longest_target = max(len(ids) for ids in targets)
    # 8 more than any target, because a span that came out too long should not cut off the rest.
    max_new_tokens = min(longest_target + 8, room)
    outputs = sample.generate(model, inputs, max_new_tokens, (source.tokenizer.end,))

    rebuilt: dict[int, list[bool]] = defaultdict(list)             # by the length of the span
    for target, output in zip(targets, outputs):
        output_spans = objectives.spans_after(output, [*source.sentinels, source.tokenizer.end])
        target_spans = objectives.spans_after(target[:-1], source.sentinels)
        for sentinel, span in target_spans.items():
            is_right = output_spans.get(sentinel) == span
            rebuilt[len(span)].append(is_right)
    short = []
    for length in range(1, longest_span + 1):
        short += rebuilt[length]
    figures = {}
    if short:                                              # else a mean of nothing would be NaN
        figures["short_spans_rebuilt"] = float(np.mean(short))
    if rebuilt[1]:
        figures["single_tokens_rebuilt"] = float(np.mean(rebuilt[1]))
    return figures


# ---------------------------------------------------------------------- tasks of the world

def chat_prompts(tokenizer, examples: list[dict]) -> list[list[int]]:
    """Token ids of a conversation that ends where the assistant is to answer, of each example."""
    prompts = []
    for example in examples:
        # A prompt may be a conversation already, which ends in the user's turn.
        turns = readers.checked_turns(example["prompt"], "prompt", "user")
        prompts.append(tokenizer.prompt(turns))
    return prompts


def answers(model: Transformer, tokenizer, examples: list[dict], temperature: float = 0.0,
            generator: torch.Generator | None = None) -> list[list[int]]:
    """Token ids of the model's answer to each example of the world, <|end|> included."""
    prompts = chat_prompts(tokenizer, examples)
    # <|endoftext|> ends an answer too, because a base model knows no other end.
    stop_tokens = (tokenizer.end, tokenizer.endoftext)
    return sample.generate(model, prompts, MAX_ANSWER, stop_tokens, temperature,
                           generator=generator)


def complete_text(tokenizer, ids: list[int]) -> str:
    """The response's text; nothing at all when it never ended, which is no answer."""
    if not ids or ids[-1] != tokenizer.end:
        return ""
    return tokenizer.decode(ids)


def complete_texts(tokenizer, responses: list[list[int]]) -> list[str]:
    return [complete_text(tokenizer, ids) for ids in responses]


def accuracy_by_family(examples: list[dict], texts: list[str]) -> dict[str, float]:
    """Share of exact matches of the parsed answer, for families that have one, and "all"."""
    right = defaultdict(list)
    for example, text in zip(examples, texts):
        if example["answer"] is None:                      # a story, say, can be told in many ways
            continue
        is_right = parse_answer(example, text) == example["answer"]
        right[example["family"]].append(is_right)
        right["all"].append(is_right)
    return {family: sum(hits) / len(hits) for family, hits in right.items()}


def exam(name: str, n: int, families: tuple[str, ...] | None = None) -> list[dict]:
    """n held-out examples of a world; [] when `name` is not a world: files have no answer key."""
    world = readers.world_named(name)
    if world is None:
        return []
    return world.examples(n, split="heldout", seed=1, families=families)


def reward_prompts(name: str, n: int) -> list[dict]:
    """n held-out prompts of a world, the same for every model whose true rewards are compared."""
    # Seed 2, because exam() draws by seed 1: no prompt should count twice.
    return readers.world_named(name).prompts(n, "heldout", seed=2)


def quiz(name: str, n: int, families: tuple[str, ...] | None = None) -> dict[str, list[dict]]:
    """Small exams for use during training: of these families, or all trained ones, and of families
    never trained on."""
    if readers.world_named(name) is None:
        return {}
    return {"accuracy": exam(name, n, families),
            "unseen_families": exam(name, n // 4, HELDOUT_FAMILIES)}


def few_shot(name: str, examples: list[dict], k: int, tokenizer,
             context_length: int) -> tuple[list[dict], int]:
    """The examples with solved ones of their own family before them, as earlier turns: k of them,
    or as many as fit every example's context beside the answer. Returns them and their number."""
    world = readers.world_named(name)
    solved = {}
    for family in {example["family"] for example in examples}:
        solved[family] = []
        for shot in world.examples(k, families=(family,)):
            turns = readers.checked_turns(shot["prompt"], "prompt", "user")
            solved[family].append([*turns, {"role": "assistant", "content": shot["response"]}])
    longest = context_length - MAX_ANSWER
    for n in range(k, 0, -1):
        shown = []
        for example in examples:
            turns = readers.checked_turns(example["prompt"], "prompt", "user")
            before = itertools.chain(*solved[example["family"]][:n])
            shown.append(example | {"prompt": [*before, *turns]})
        if max(map(len, chat_prompts(tokenizer, shown))) <= longest:
            return shown, n
    return examples, 0


def quiz_accuracy(model: Transformer, tokenizer, quizzes: dict[str, list[dict]]) -> dict:
    """Accuracy over all families of each quiz that has a family with an answer: {"accuracy": ...,
    "unseen_families": ...}; and the true reward of the answers to the first, {"true_reward": ...},
    because an imitator's loss still falls when its answers no longer get better."""
    scores = {}
    for name, examples in quizzes.items():
        texts = greedy_texts(model, tokenizer, examples)
        by_family = accuracy_by_family(examples, texts)
        if by_family:                                      # {} of examples without an answer
            scores[name] = by_family["all"]
        if name == "accuracy":
            scores["true_reward"] = float(true_rewards(examples, texts).mean())
    return scores


def judgements(examples: list[dict], texts: list[str]) -> dict[str, np.ndarray]:
    """The world's own judgement of each text: "total" and each of its parts, (n,) in [0, 1]."""
    judged = [true_reward(example, text) for example, text in zip(examples, texts)]
    return {part: np.array([parts[part] for parts in judged]) for part in ("total", *WEIGHTS)}


def true_rewards(examples: list[dict], texts: list[str]) -> np.ndarray:
    """The total of the judgements, (n,)."""
    return judgements(examples, texts)["total"]


def rollout_truth(prompts: list[dict], responses: list[list[int]], tokenizer) -> dict:
    """The true reward of a rollout where the prompts carry an answer key: proxy beside truth."""
    examples = [prompt["example"] for prompt in prompts]
    if not {"family", "key"} <= examples[0].keys():
        return {}
    texts = complete_texts(tokenizer, responses)
    return {"true_reward": float(true_rewards(examples, texts).mean())}


# ---------------------------------------------------------------------- comparisons

def wins_of(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(n,) for each prompt 1 where ours is higher, 1/2 for a tie, 0 where theirs is."""
    # Closer than 1e-9 is a tie, because sums of the same parts may be rounded in another way.
    higher = ours > theirs + 1e-9
    tied = np.abs(ours - theirs) <= 1e-9
    return higher + 0.5 * tied


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Share of prompts on which ours is higher, ties counting half, and its 95 % interval (normal
    approximation of the mean of 0, 1/2, 1)."""
    wins = wins_of(ours, theirs)
    rate = wins.mean()
    half_width = 1.96 * wins.std() / math.sqrt(len(wins))
    return float(rate), float(rate - half_width), float(rate + half_width)


def wins_over(ours: dict, theirs: dict) -> dict:
    """What evaluate_policy() found of two models, compared prompt by prompt: {"win_rate",
    "win_rate_95": its interval, "plain_win_rate": without courtesies on either side,
    "right_to_wrong": of their right answers the share that is wrong with us, "longer": words more,
    courtesies not counted, where theirs was right and whole already}."""
    rate, low, high = win_rate(ours["rewards"], theirs["rewards"])
    plain_rate, _, _ = win_rate(ours["plain_rewards"], theirs["plain_rewards"])
    was_right = theirs["right"] == 1
    was_whole = was_right & (theirs["whole"] == 1)
    return {"win_rate": rate, "win_rate_95": [low, high], "plain_win_rate": plain_rate,
            "right_to_wrong": mean_where(was_right, 1 - ours["right"]),
            "longer": mean_where(was_whole, ours["words"] - theirs["words"])}


def mean_where(condition: np.ndarray, values: np.ndarray) -> float:
    """The mean of the values where the condition holds; 0 where it never does."""
    return float(values[condition].mean()) if condition.any() else 0.0


def manners(texts: list[str], right: np.ndarray) -> dict[str, float]:
    """The shares of texts with a fault of manner; right: (n,) 1 where a text's answer is right."""
    courtesies = np.array([courtesies_in(text) for text in texts])
    return {"rambling": float(np.mean([is_rambling(text) for text in texts])),
            "rude": float(np.mean([is_rude(text) for text in texts])),
            "inventing": float(np.mean([is_inventing(text) for text in texts])),
            "third_courtesy": float(np.mean(courtesies > 2)),
            "courteous_and_wrong": float(np.mean((courtesies > 0) & (right == 0)))}


@torch.no_grad()
def kl_to(model: Transformer, reference: Transformer, tokenizer, examples: list[dict],
          seed: int) -> float:
    """KL(model || reference) in nats per response: the mean over samples y ~ model at temperature 1
    of log model(y|x) - log reference(y|x)."""
    generator = torch.Generator(model.device).manual_seed(seed)
    responses = answers(model, tokenizer, examples, 1.0, generator)
    prompts = chat_prompts(tokenizer, examples)
    total = 0.0
    for first in range(0, len(examples), 64):              # 64 rows: what fits a small memory
        part = slice(first, first + 64)
        batch = data.response_batch(prompts[part], responses[part], tokenizer.pad,
                                    model.config.context_length).to(model.device)
        logps = token_logps(model.logps, batch)                                # (B, T - 1)
        reference_logps = token_logps(reference.logps, batch)
        # Subtracted token by token before the sum, because there the differences are small.
        total += (logps - reference_logps).sum().item()
    return total / len(examples)


def calibration_error(margin: Tensor, bins: int = 10) -> float:
    """Expected calibration error of a reward model (001 section 4.4): p = sigma(|r_w - r_l|) is its
    confidence in its own ranking; the mean gap between confidence and accuracy over `bins` equal
    parts of [0.5, 1], weighted by how many pairs fall into each.

    margin: (pairs,) r_w - r_l, positive where the ranking is right.
    """
    confidence = torch.sigmoid(margin.abs().double())
    return confidence_gap(confidence, margin > 0, 0.5, bins)


def confidence_gap(confidence: Tensor, right: Tensor, lowest: float, bins: int = 10) -> float:
    """The mean gap between confidence and accuracy over `bins` equal parts of [lowest, 1], weighted
    by how many predictions fall into each (Guo et al. 2017). confidence, right: (n,)."""
    part_of = ((confidence - lowest) / (1 - lowest) * bins).long()
    part_of = part_of.clamp(max=bins - 1)      # because a confidence of 1 would begin another part
    right = right.double()
    total = 0
    for part in range(bins):
        inside = part_of == part
        # Sums and not means, because a part's weight is the number of predictions inside.
        gap = confidence[inside].sum() - right[inside].sum()
        total += abs(gap)
    return float(total / len(right))


def length_accuracy(pairs: data.PreferencePairs) -> float:
    """How often the longer response (in tokens) is the chosen one, ties counting half."""
    score = 0
    # Ids of prompt and response may be compared, because both sides have the same prompt.
    for (chosen, _), (rejected, _) in pairs.sequences:
        if len(chosen) > len(rejected):
            score += 1
        elif len(chosen) == len(rejected):
            score += 0.5
    return score / len(pairs.sequences)


def greedy_texts(model: Transformer, tokenizer, examples: list[dict]) -> list[str]:
    return complete_texts(tokenizer, answers(model, tokenizer, examples))


def evaluate_policy(model: Transformer, tokenizer, name: str, n_tasks: int, n: int,
                    answer: Callable = greedy_texts) -> dict:
    """The answers of a model to the exam: {"accuracy", "families", "true_reward", "parts": the
    mean of each part of it, "manners"}, and for comparisons, n each: "rewards", "right", "whole",
    without the courtesies of the answers "plain_rewards" and "words", and the "texts"."""
    tasks = exam(name, n_tasks)
    prompts = reward_prompts(name, n)
    # Answered in one go, because prompts of similar length are then batched together.
    texts = answer(model, tokenizer, tasks + prompts)
    families = accuracy_by_family(tasks, texts[:n_tasks])
    accuracy = families.pop("all")
    judged_texts = texts[n_tasks:]
    parts = judgements(prompts, judged_texts)
    rewards = parts.pop("total")
    plain = [without_courtesies(text) for text in judged_texts]
    return {"accuracy": accuracy, "families": families, "true_reward": float(rewards.mean()),
            "parts": {part: float(values.mean()) for part, values in parts.items()},
            "manners": manners(judged_texts, parts["right"]),
            "rewards": rewards, "right": parts["right"], "whole": parts["whole"],
            "plain_rewards": true_rewards(prompts, plain),
            "words": np.array([len(text.split()) for text in plain]),
            "texts": judged_texts}


# ---------------------------------------------------------------------- the table

def print_figures(figures: dict) -> None:
    """A line for each figure; those of the families, the reward's parts and the manners last.

    Raises FloatingPointError when one is not finite, before any line is printed.
    """
    tables = figures["families"] | figures["parts"] | figures["manners"]
    numbers = {}
    for name, value in {**figures, **tables}.items():
        if isinstance(value, float):                       # not the interval, and not "families"
            numbers[name] = value
    lost = [name for name, value in numbers.items() if not math.isfinite(value)]
    if lost:
        raise FloatingPointError(f"{', '.join(lost)}: not finite, so no figure can be trusted; try "
                                 "--dtype float32")
    for name, value in numbers.items():
        print(f"{name:24s} {value:8.3f}")


def keep_figures(cfg: Config, figures: dict) -> None:
    if cfg.json:
        text = json.dumps(figures, indent=2) + "\n"
        claim.write_whole(Path(cfg.json), lambda temporary: temporary.write_text(text))


def examine_data(cfg: Config) -> dict:
    """The four dimensions of --data_quality; no model is opened."""
    if cfg.reference:
        raise ValueError(f"--reference {cfg.reference}: --data_quality looks at data alone; give "
                         "one of the two")
    rows = data_quality.read(cfg.data_quality, cfg.seed)
    figures = data_quality.quality(rows, cfg.seed)
    print(data_quality.table(figures, len(rows)))
    keep_figures(cfg, figures)
    return figures


def main(cfg: Config) -> dict:
    if cfg.json:
        claim.check_new_file("--json", cfg.json)
    if cfg.data_quality:
        return examine_data(cfg)
    kernels.keep_memory()
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if readers.world_named(cfg.data) is None:
        raise ValueError(f"--data {cfg.data}: only a world has an answer key; give world or "
                         "world:SEED")
    # KL scores answers in one row with their prompts, as decoders read them
    model, tokenizer = load_model(cfg.init, device, dtype, two_stacks=not cfg.reference)
    if cfg.reference:
        # Loaded before the exam, because a wrong folder should not be found out minutes later.
        reference, reference_tokenizer = load_model(cfg.reference, device, dtype)
        if reference_tokenizer != tokenizer:
            raise ValueError(f"--reference {cfg.reference}: its tokenizer is not that of --init "
                             f"{cfg.init}, so that their predictions cannot be compared")
    figures = evaluate_policy(model, tokenizer, cfg.data, cfg.n_tasks, cfg.n)
    if cfg.reference:
        theirs = evaluate_policy(reference, tokenizer, cfg.data, cfg.n_tasks, cfg.n)
        figures |= wins_over(figures, theirs)
        figures["reference_true_reward"] = theirs["true_reward"]
        figures["reference_accuracy"] = theirs["accuracy"]
        prompts = reward_prompts(cfg.data, cfg.n)
        figures["kl"] = kl_to(model, reference, tokenizer, prompts, cfg.seed)
    for name in PER_PROMPT:                                # arrays, which JSON cannot hold
        del figures[name]
    print_figures(figures)
    keep_figures(cfg, figures)
    return figures


if __name__ == "__main__":
    command_line(main, Config, __doc__)
