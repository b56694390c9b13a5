"""
The rows of bench.py on alignment: our scripts beside TRL's trainers, on the same shapes.

    python bench.py dpo         # a DPO step of 8 pairs, pi_ref cached on both sides and by default
    python bench.py rollout     # 4 answers to each of 4 prompts and the update: GRPO, RLOO

Both sides run the code that their users run, train_dpo.py and train_grpo.py here, DPOTrainer,
GRPOTrainer and RLOOTrainer there, on Llamas of one size in one dtype, with prompts of 32 tokens,
answers of 64 and random words. dpo_here, dpo_in_trl, ... return the seconds of every step.
"""
import contextlib
import itertools
import json
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

import sample
import train_dpo
import train_grpo
from model import ModelConfig, Transformer
from plumbing.curves import read_metrics
from plumbing.device import pick_device
from plumbing.folders import save_model
from plumbing.options import build
from tokenizer import N_SPECIAL, Tokenizer

PROMPT = 32                            # tokens, the template's among them
ANSWER = 64                            # tokens, <|end|> among them
WARMUP = 3                             # steps that are not timed
GROUP = 4                              # answers to a prompt
BETA = 0.04


def dpo_row(llama: Callable, cfg, name: str, mode: str) -> dict:
    """Median time of a DPO step; mode: cached, or default, in which TRL does not cache. llama:
    (cfg) -> the model of TRL's side, in the size of cfg, bench.py's Config."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "trl":
            return speeds(dpo_in_trl(cfg, mode, Path(folder), llama))
        return speeds(dpo_here(cfg, Path(folder)))


def rollout_row(llama: Callable, cfg, name: str, mode: str) -> dict:
    """Median time of a rollout and its update; mode: grpo or rloo. Of ours also the shares of
    rollout, scoring and update."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "trl":
            return speeds(rollout_in_trl(cfg, mode, Path(folder), llama))
        spent = {"rollout": 0.0, "scoring": 0.0}
        # in this process alone, which measures one row
        sample.generate = clocked(spent, "rollout", sample.generate)
        train_grpo.token_logps = clocked(spent, "scoring", train_grpo.token_logps)
        seconds = rollout_here(cfg, mode, Path(folder))
        shares = {f"{part}_share": time / sum(seconds) for part, time in spent.items()}
        return speeds(seconds) | shares | {"update_share": 1 - sum(shares.values())}


def speeds(seconds: list[float]) -> dict:
    median = statistics.median(seconds[WARMUP:])
    return {"steps_per_s": 1 / median, "ms_per_step": 1e3 * median}


def n_letters(prompts: list, answers: list[str]) -> list[float]:
    """The reward of both sides."""
    return [len(answer) / 100 for answer in answers]


# ---------------------------------------------------------------------- here

def made_words(n: int) -> list[str]:
    """n words: aaa, aab, ..."""
    letters = itertools.product(string.ascii_lowercase, repeat=3)
    return ["".join(word) for word in itertools.islice(letters, n)]


def text_of(n_words: int, rng: Random, words: list[str]) -> str:
    return " ".join(rng.choices(words, k=n_words))


def model_folder(cfg, folder: Path) -> list[str]:
    """Write a model that has not learned anything, and return the words that are one token each."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = made_words(cfg.vocab_size - N_SPECIAL - len(ranks))
    for word in words:
        ranks[f" {word}".encode()] = len(ranks)
    tokenizer = Tokenizer(ranks)
    sizes = ModelConfig(tokenizer.vocab_size, PROMPT + ANSWER, cfg.d_model, cfg.n_layers,
                        cfg.n_heads)
    save_model(folder, Transformer(sizes), tokenizer, stage="pretrain")
    return words


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_here(script, cfg, folder: Path, **options) -> list[float]:
    """A script's own seconds per step, from its metrics."""
    options |= {"init": str(folder / "base"), "out": str(folder / "out"), "log_every": 1,
                "steps": WARMUP + cfg.steps, "device": cfg.device, "dtype": cfg.dtype,
                "save_every": 0}
    # because the last line on stdout is the row
    with contextlib.redirect_stdout(sys.stderr):
        script.main(build(script.Config, options))
    seconds = []
    before = 0
    for row in read_metrics(folder / "out"):
        seconds.append((row["tokens"] - before) / row["tokens_per_s"])
        before = row["tokens"]
    return seconds


def dpo_here(cfg, folder: Path) -> list[float]:
    words = model_folder(cfg, folder / "base")
    rng = Random(0)
    rows = []
    for _ in range(cfg.batch_size * (WARMUP + cfg.steps) + 100):
        # a word begins with a space; three tokens of a prompt and one of an answer are special
        rows.append({"prompt": " " + text_of(PROMPT - 3, rng, words),
                     "chosen": " " + text_of(ANSWER - 1, rng, words),
                     "rejected": " " + text_of(ANSWER - 1, rng, words)})
    write_rows(folder / "pairs.jsonl", rows)
    return run_here(train_dpo, cfg, folder, data=str(folder / "pairs.jsonl"), eval_pairs=1,
                    batch_size=cfg.batch_size, eval_every=0)


def clocked(seconds: dict[str, float], part: str, function: Callable) -> Callable:
    """The function; the time that it takes is added to seconds[part], but not where a gradient is
    asked for, because that is an update."""
    def timed(*arguments, **options):
        begun = time.perf_counter()
        found = function(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()           # the call returns before the GPU is done
        if part == "rollout" or not torch.is_grad_enabled():
            seconds[part] += time.perf_counter() - begun
        return found
    return timed


def rollout_here(cfg, mode: str, folder: Path) -> list[float]:
    words = model_folder(cfg, folder / "base")
    rng = Random(0)
    rows = [{"prompt": " " + text_of(PROMPT - 3, rng, words)} for _ in range(64)]
    write_rows(folder / "prompts.jsonl", rows)
    return run_here(train_grpo, cfg, folder, prompts=str(folder / "prompts.jsonl"), method=mode,
                    batch_size=cfg.batch_size // GROUP, group=GROUP, beta=BETA,
                    minibatch_size=cfg.batch_size, max_new_tokens=ANSWER,
                    reward="bench_alignment:n_letters")


# ---------------------------------------------------------------------- TRL

def trl_tokenizer(words: list[str]):
    """One token a word, as many tokens as ours."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unknown>", *words])}
    tokenizer = Words(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="<end>", unk_token="<unknown>")


def trl_options(cfg, folder: Path) -> dict:
    """What both sides do alike, and nothing written or reported."""
    return {"output_dir": str(folder), "per_device_train_batch_size": cfg.batch_size,
            "max_steps": WARMUP + cfg.steps, "bf16": cfg.dtype == "bfloat16",
            "fp16": cfg.dtype == "float16", "use_cpu": pick_device(cfg.device).type == "cpu",
            "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False, "max_grad_norm": 1.0, "beta": BETA}


def saved(model, folder: Path):
    """The model, read from the folder in which TRL then finds the reference."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def train_in_trl(trainer) -> list[float]:
    """Seconds of every step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, *arguments, **options):
            self.times.append(time.perf_counter())

    watch = Stopwatch()
    trainer.add_callback(watch)
    begun = time.perf_counter()
    trainer.train()
    times = [begun, *watch.times]
    return [after - before for before, after in itertools.pairwise(times)]


def dpo_in_trl(cfg, mode: str, folder: Path, llama: Callable) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    words = made_words(cfg.vocab_size - 3)
    rng = Random(0)
    rows = []
    for _ in range(cfg.batch_size * (WARMUP + cfg.steps)):
        rows.append({"prompt": text_of(PROMPT, rng, words),
                     "chosen": " " + text_of(ANSWER - 1, rng, words),
                     "rejected": " " + text_of(ANSWER - 1, rng, words)})
    options = trl_options(cfg, folder) | {"precompute_ref_log_probs": mode == "cached"}
    trainer = DPOTrainer(
        saved(llama(cfg), folder / "base"), args=DPOConfig(**options),
        train_dataset=Dataset.from_list(rows), processing_class=trl_tokenizer(words))
    return train_in_trl(trainer)


def rollout_in_trl(cfg, mode: str, folder: Path, llama: Callable) -> list[float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[mode]
    words = made_words(cfg.vocab_size - 3)
    rng = Random(0)
    rows = [{"prompt": text_of(PROMPT, rng, words)} for _ in range(64)]
    options = trl_options(cfg, folder)
    options |= {"num_generations": GROUP, "max_completion_length": ANSWER}
    trainer = trainer(
        saved(llama(cfg), folder / "base"), args=config(**options),
        reward_funcs=lambda completions, **_: n_letters([], completions),
        train_dataset=Dataset.from_list(rows), processing_class=trl_tokenizer(words))
    return train_in_trl(trainer)
