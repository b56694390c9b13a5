"""
What an answer is worth to a policy: one grammar of --reward for PPO, GRPO and best-of-N.

    out/rm                       a reward model (001 section 4.4)
    out/rm1,out/rm2              an ensemble, by --combine: min, mean, mean-std (4.12, mitigation 2)
    0.7*out/safe,0.3*out/help    several signals and their weights
    world                        the true reward of the embedded world's prompts
    gsm8k                        a verifiable one: the right number, in the right form
    module:function              your own; a folder of that name wins over all of these

Your own function gets conversations and answers, and returns a finite number for each answer. In
taste.py, as --reward taste:short,

    def short(prompts, answers):
        return [-len(answer.split()) for answer in answers]

    reward = Reward("out/rm1,out/rm2", "min", tokenizer, device, dtype)
    scores = reward(prompts, x, y)                         # (N,)
"""
import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import evaluate
from data import response_batches
from heads import WithHead
from plumbing.folders import is_model_folder, load_reward_model, reward_terms
from scoring import response_rewards

# "#### 72" in gsm8k's answers, "The answer is 72." in the world's
FINAL_NUMBER = re.compile(r"(?:####|answer is) *\$?(-?[\d,]*\.?\d+)")
NUMBER = re.compile(r"-?[\d,]*\.?\d+")


class Reward:
    """Scores answers by the terms of a --reward.

    models: the reward models among the terms, frozen. Raises ValueError for a term that is none of
    the grammar's, for a reward model with another tokenizer, and for terms of which only some have
    a weight.
    """

    def __init__(self, spec: str, combine: str, tokenizer, device: torch.device,
                 dtype: torch.dtype, rows_at_once: int = 32):
        self.tokenizer = tokenizer
        self.rows_at_once = rows_at_once
        self.combine = combine
        self.device = device
        self.models: list[WithHead] = []
        self.terms: list[Callable] = []                    # (prompts, x, y) -> (N,) each
        terms = reward_terms(spec)
        self.weights = [weight for weight, _ in terms if weight is not None]
        if self.weights and len(self.weights) < len(terms):
            raise ValueError(f"--reward {spec}: some terms have a weight and some none; give each "
                             "one, as in 0.7*out/safe,0.3*out/help")
        if self.weights and combine != "min":              # which is the default
            raise ValueError(f"--combine {combine}: weights make a sum of {spec}; leave it out, or "
                             "the weights")
        for _, name in terms:
            self.terms.append(self.term(name, dtype))

    def __call__(self, prompts: list[dict], x: list[list[int]], y: list[list[int]]) -> Tensor:
        """prompts: rows of readers.read_prompts(); x, y: their ids and their answers'. Returns (N,)
        fp32. Raises ValueError for a function of the user's that fails."""
        scores = torch.stack([term(prompts, x, y) for term in self.terms], 1)      # (N, K)
        if self.weights:
            return scores @ torch.tensor(self.weights, device=self.device)
        return combined(scores, self.combine)

    def term(self, name: str, dtype: torch.dtype) -> Callable:
        """The function (prompts, x, y) -> (N,) behind one name of the grammar."""
        # a model's, because the world's own code lies in a folder "world", too
        if is_model_folder(name):
            return self.by_model(name, dtype)
        if name == "world":
            return self.by_texts(true_rewards)
        if name == "gsm8k":
            return self.by_texts(right_numbers)
        if ":" in name:
            function = import_function(name)
            return self.by_texts(lambda prompts, texts: own_scores(name, function, prompts, texts))
        if Path(name).exists():
            return self.by_model(name, dtype)              # which says what is wrong with it
        raise ValueError(f"--reward {name}: there is no such folder; give an --out of train_rm.py, "
                         "world, gsm8k or module:function")

    def by_model(self, folder: str, dtype: torch.dtype) -> Callable:
        model, tokenizer = load_reward_model(folder, self.device, dtype)
        if tokenizer != self.tokenizer:
            raise ValueError(f"--reward {folder}: its tokenizer is not that of --init; give an "
                             "--out of train_rm.py that began with the same model")
        model.requires_grad_(False).eval()
        self.models.append(model)

        def scores(prompts, x, y):
            return model_scores(model, x, y, self.tokenizer.pad, self.rows_at_once)
        return scores

    def by_texts(self, function: Callable) -> Callable:
        def scores(prompts, x, y):
            # without specials, so that no function sees a control token
            texts = [self.tokenizer.decode(ids) for ids in y]
            return torch.tensor(function(prompts, texts), dtype=torch.float32, device=self.device)
        return scores


def combined(scores: Tensor, combine: str) -> Tensor:
    """(N, K) scores of K reward models -> (N,): the lowest, the mean, or the mean minus one
    standard deviation, the more careful the less they agree (001 section 4.12, mitigation 2)."""
    if combine == "min":
        return scores.min(1).values
    if combine == "mean":
        return scores.mean(1)
    # correction 0, because one model alone agrees with itself
    return scores.mean(1) - scores.std(1, correction=0)


# ---------------------------------------------------------------------- the terms

@torch.no_grad()
def model_scores(model: WithHead, x: list[list[int]], y: list[list[int]], pad: int,
                 rows_at_once: int) -> Tensor:
    """r_psi(x, y) of each answer, (N,)."""
    scores = []
    for batch in response_batches(x, y, pad, model.config.context_length, rows_at_once):
        scores.append(response_rewards(model, batch.to(model.device)))
    return torch.cat(scores)


def true_rewards(prompts: list[dict], texts: list[str]) -> np.ndarray:
    """The world's judgement, in [0, 1]. Raises ValueError for prompts without an answer key."""
    for prompt in prompts:
        if "key" not in prompt["example"]:
            raise ValueError(f"--reward world: {prompt['where']} has no answer key; give --prompts "
                             "world")
    return evaluate.true_rewards([prompt["example"] for prompt in prompts], texts)


def right_numbers(prompts: list[dict], texts: list[str]) -> list[float]:
    """0.9 for the right number and 0.1 for the form: "#### 72" or "The answer is 72.".

    Raises ValueError for a prompt whose own answer has no number.
    """
    scores = []
    for prompt, text in zip(prompts, texts, strict=True):
        wanted = number_in(prompt["answer"])
        if wanted is None:
            raise ValueError(f"--reward gsm8k: the answer of {prompt['where']} has no number; give "
                             "prompts with one, as gsm8k's question and answer")
        right = number_in(text) == wanted
        in_form = FINAL_NUMBER.search(text) is not None
        scores.append(0.9 * right + 0.1 * in_form)
    return scores


def number_in(text: str) -> float | None:
    """The final number of an answer, else its last one: "6 + 6 = 12. #### 1,200" -> 1200.0."""
    found = FINAL_NUMBER.findall(text) or NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def import_function(name: str) -> Callable:
    """module:function -> the function. The module may lie in the folder one works in."""
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--reward {name}: {error}; give module:function, a function in a "
                         "module.py of this folder") from None


def own_scores(name: str, function: Callable, prompts: list[dict],
               texts: list[str]) -> list[float]:
    """The user's function on all answers of a rollout. Raises ValueError when it does, and for
    anything but a finite number for each answer."""
    conversations = [prompt["messages"] for prompt in prompts]
    try:
        scores = [float(score) for score in function(conversations, texts)]
    except Exception as error:                 # whatever a user's function may raise
        raise ValueError(f"--reward {name} failed on {len(texts)} answers: "
                         f"{type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise ValueError(f"--reward {name} returned {len(scores)} numbers for {len(texts)} "
                         "answers; it must return one for each")
    for text, score in zip(texts, scores):
        if not math.isfinite(score):
            raise ValueError(f"--reward {name} returned {score} for the answer {text!r}; it must "
                             "be a finite number")
    return scores
