"""
Data made by a model, as JSONL that train_sft.py and train_dpo.py read.

  --method best_of_n   the best of N own answers to each prompt, by a reward: rejection sampling,
                       once train_sft.py has learnt from them (001 section 4.9)
           pairs       the best against the worst of them: preferences for train_dpo.py (4.10)

  1. SAMPLE   y_1, ..., y_N ~ pi_theta(.|x)     2. SCORE  r(x, y_i)
  3. SELECT   y* = argmax_i r(x, y_i)           4. WRITE  {"prompt", "response", "score"}

The best of N lies at most log N - (N - 1) / N nats from pi_theta, less if an answer is drawn twice
(scoring.best_of_n_kl).

    python synthesize.py --n 8 --out best.jsonl && python train_sft.py --init out/sft \\
        --data best.jsonl --steps 200 --lr 5e-4 --out out/best
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import sample
from data import prompts_to_answer
from plumbing import claim
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import command_line
from preferences import best_and_worst
from rewards import Reward
from scoring import best_of_n_kl


@dataclass
class Config:
    method: str = "best_of_n"         # best_of_n | pairs
    init: str = "out/sft"             # model folder that answers
    reward: str = "out/rm"            # out/rm, several of them, world, gsm8k, module:function
    combine: str = "min"              # several reward models: min | mean | mean-std
    prompts: str = "world"            # prompts: world, world:SEED or JSONL
    n_prompts: int = 2000             # how many to take, at most, >= 1
    n: int = 8                        # answers to each (N), >= 2
    temperature: float = 1.0          # of the answers, > 0
    max_new_tokens: int = 64          # longest answer, in tokens, >= 1
    no_end_score: float = -1.0        # the score of an answer without <|end|>, any number
    bad_rows: str = "error"           # what to do with a bad row: error | skip
    truncate: str = "error"           # prompts too long for an answer to fit: error | left | drop
    out: str = "best.jsonl"           # new file to write
    seed: int = 0                     # of prompts and answers, in [0, 4e9]
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


def main(cfg: Config) -> list[dict]:
    claim.check_new_file("--out", cfg.out)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model, tokenizer = load_model(cfg.init, device, dtype)
    reward = Reward(cfg.reward, cfg.combine, tokenizer, device, dtype)
    prompts, ids = prompts_to_answer(cfg, tokenizer, model.config.context_length)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    written = []
    for first in tqdm(range(0, len(prompts), 64), desc=cfg.method, unit="64 prompts"):
        asked = prompts[first:first + 64]
        # 1. SAMPLE, 2. SCORE, 3. SELECT
        answers, scores = sample.sample_and_score(
            model, tokenizer, asked, ids[first:first + 64], cfg.n, reward, cfg.max_new_tokens,
            cfg.no_end_score, cfg.temperature, generator)
        if cfg.method == "pairs":
            written += best_and_worst(asked, answers, scores.flatten().tolist(), cfg.n, tokenizer)
            continue
        for number, (row, best) in enumerate(zip(asked, scores.argmax(1).tolist())):
            answer = answers[number * cfg.n + best]
            text = tokenizer.decode(answer)
            # nor one that was cut off, because a model would learn to end there
            if text.strip() and answer[-1] == tokenizer.end:
                written.append({"prompt": row["messages"], "response": text,
                                "score": scores[number, best].item()})
    # 4. WRITE
    if not written:
        raise ValueError(f"--prompts {cfg.prompts}: no answer is worth keeping: all are empty, "
                         "cut off, or with --method pairs worth the same")
    text = "".join(json.dumps(row) + "\n" for row in written)
    claim.write_whole(Path(cfg.out), lambda file: file.write_text(text))
    print(f"{len(written)} of {len(prompts)} prompts are in {cfg.out}; the best of {cfg.n} answers "
          f"lies at most {best_of_n_kl(cfg.n):.2f} nats from the model's own")
    return written


if __name__ == "__main__":
    command_line(main, Config, __doc__)
