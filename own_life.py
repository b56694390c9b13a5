"""
lifecycle.py --base: the later half of the life, on a model from elsewhere and data of one's own.

    python lifecycle.py --base out/smollm2 --sft_data tasks.jsonl --pairs pairs.jsonl \\
        --prompts prompts.jsonl --out out/own

SFT on --sft_data; a reward model of --pairs; DPO on the same pairs, and PPO on --prompts against
the reward model, both from SFT's model. All train by LoRA on every matrix (PLAN has the options),
because a base of some size would not fit otherwise. Nothing knows the truth here: the report has
losses, what the reward model ranks right, how often it prefers a policy's answers to SFT's, how far
the policy went for that, and 20 answers side by side, for people to read.
"""
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

import data
import evaluate
import readers
import sample
import train_dpo
import train_ppo
import train_rm
import train_sft
from plumbing import claim
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import build
from rewards import Reward

LORA = {"peft": "lora", "lora_rank": 16, "lora_targets": "wq,wk,wv,wo,w13,w2"}
ANSWER = 128                           # tokens, at most
# Short, because a model that speaks already needs little; batches small, for a small memory. Rows
# longer than the context are left out, and said, because an hour may pass before a stage begins.
PLAN = {
    "sft": {"n_examples": 1000, "steps": 60, "warmup": 5, "batch_size": 4, "lr": 5e-4,
            "context_length": 512, "eval_every": 30, "truncate": "drop"},
    "rm": {"n_pairs": 1000, "steps": 60, "warmup": 5, "batch_size": 4, "lr": 5e-4,
           "eval_every": 60, "eval_pairs": 100, "n_shift": 20, "truncate": "drop"},
    # as many pairs as are trained on, because the reference reads all of them first
    "dpo": {"n_pairs": 240, "steps": 60, "warmup": 5, "batch_size": 4, "lr": 2e-4,
            "eval_every": 60, "eval_pairs": 100, "truncate": "drop"},
    "ppo": {"n_prompts": 1000, "steps": 5, "batch_size": 8, "minibatch_size": 4, "lr": 1e-4,
            "max_new_tokens": ANSWER, "truncate": "drop"},
}
STAGES = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo}
POLICIES = ("base", "sft", "dpo", "ppo")
REPORT_FILES = ("report.md", "report.json")
N_COMPARED = 60                        # held-out prompts for win rates
N_READ = 20


def check(cfg) -> None:
    """Raises ValueError for --base without its data, and for data without --base."""
    given = {"--sft_data": cfg.sft_data, "--pairs": cfg.pairs, "--prompts": cfg.prompts}
    for option, value in given.items():
        if cfg.base and not value:
            raise ValueError(f"--base {cfg.base}: {option} is missing; its world is your data: "
                             "give --sft_data, --pairs and --prompts")
        if value and not cfg.base:
            raise ValueError(f"{option} {value} is for a model from elsewhere: give it as --base")


def stages(cfg) -> dict[str, tuple[Callable, object]]:
    """Each stage's main and its config."""
    folders = {name: str(Path(cfg.out) / name) for name in STAGES}
    inputs = {"sft": {"init": cfg.base, "data": cfg.sft_data},
              "rm": {"init": folders["sft"], "data": cfg.pairs},
              "dpo": {"init": folders["sft"], "data": cfg.pairs},
              "ppo": {"init": folders["sft"], "reward": folders["rm"], "prompts": cfg.prompts}}
    plan = {}
    for name, script in STAGES.items():
        options = {"out": folders[name], "seed": cfg.seed, "device": cfg.device,
                   "dtype": cfg.dtype}
        plan[name] = (script.main, build(script.Config, options | LORA | PLAN[name] | inputs[name]))
    return plan


def distinct_prompts(file: str, seed: int) -> list[dict]:
    """Held-out prompts, N_COMPARED at most, each once: files of pairs have some several times."""
    rows = readers.read_prompts(file, split="heldout")
    distinct = {json.dumps(row["messages"]): row for row in rows}
    return Random(seed).sample([*distinct.values()], min(N_COMPARED, len(distinct)))


def examine(cfg) -> tuple[dict, dict]:
    """{policy: its figures}, and the answers to N_READ prompts."""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    out = Path(cfg.out)
    rows = distinct_prompts(cfg.prompts, cfg.seed)
    figures = {}
    shown = {}
    for name in POLICIES:
        folder = cfg.base if name == "base" else str(out / name)
        model, tokenizer = load_model(folder, device, dtype)
        if name == POLICIES[0]:
            reward = Reward(str(out / "rm"), "min", tokenizer, device, dtype)
            # the same prompts for all policies, and SFT's has the shortest context
            context = PLAN["sft"]["context_length"] or model.config.context_length
            room = min(context, model.config.context_length) - ANSWER
            rows, ids = data.encode_prompts(rows, tokenizer, room, "drop")
            examples = [{"prompt": row["messages"]} for row in rows]
            shown["prompt"] = [row["messages"][-1]["content"] for row in rows[:N_READ]]
        answers = sample.generate(model, ids, ANSWER, (tokenizer.end, tokenizer.endoftext))
        texts = [tokenizer.decode(answer) for answer in answers]
        scores = reward(rows, ids, answers).cpu().numpy()
        ended = [answer[-1] in (tokenizer.end, tokenizer.endoftext) for answer in answers]
        figures[name] = {"reward": float(scores.mean()), "scores": scores,
                         "ended": sum(ended) / len(ended),
                         "words": sum(len(text.split()) for text in texts) / len(texts)}
        shown[name] = texts[:N_READ]
        if name == "sft":
            sft = model                                # kept, because the KL is to this model
        elif name in ("dpo", "ppo"):
            figures[name]["wins"], _, _ = evaluate.win_rate(scores, figures["sft"]["scores"])
            figures[name]["kl"] = evaluate.kl_to(model, sft, tokenizer, examples[:16], cfg.seed)
    for of_policy in figures.values():
        del of_policy["scores"]
    return figures, shown


# ---------------------------------------------------------------------- the report

def table(results: dict, figures: dict) -> list[str]:
    """What each stage cost and changed, in lines of Markdown."""
    sft = results["sft"]
    rm = results["rm"]
    measured = {
        "sft": f"held-out loss, nats per token: {sft['base_loss']:.3f} -> {sft['val_loss']:.3f}",
        "rm": f"held-out pairs ranked right: {rm['accuracy']:.1%} (by length "
              f"{rm['length_accuracy']:.1%})"}
    for name in ("dpo", "ppo"):
        found = figures[name]
        measured[name] = (f"the reward model prefers it to SFT's: {found['wins']:.1%}; KL "
                          f"{found['kl']:.2f} nats per answer")
    lines = ["| stage | minutes | |", "|---|---|---|"]
    lines += [f"| {name} | {results[name]['minutes']:.1f} | {measured[name]} |" for name in STAGES]
    lines += ["", "| answers of | reward | ended | words |", "|---|---|---|---|"]
    lines += [f"| {name} | {found['reward']:.2f} | {found['ended']:.0%} | {found['words']:.0f} |"
              for name, found in figures.items()]
    return lines


def write_report(cfg, results: dict, figures: dict, shown: dict) -> list[str]:
    """report.md and report.json in --out. Returns the table."""
    lines = table(results, figures)
    read = ["", f"## {len(shown['prompt'])} answers to prompts that nothing was trained on", ""]
    for i, prompt in enumerate(shown["prompt"]):
        read += [f"**{prompt}**", ""]
        read += [f"- {name}: {' '.join(shown[name][i].split())}" for name in POLICIES] + [""]
    out = Path(cfg.out)
    claim.add(out, *REPORT_FILES)
    (out / "report.md").write_text("\n".join([f"# {cfg.base} and what was made of it", "",
                                              *lines, *read]) + "\n")
    (out / "report.json").write_text(json.dumps({"results": results, "figures": figures},
                                                indent=2) + "\n")
    return lines


def live(cfg, run_stage: Callable) -> dict:
    """All stages, and the report. run_stage: lifecycle's, which skips what is finished."""
    out = Path(cfg.out)
    claim.lock(out)
    claim.refuse_foreign(out, REPORT_FILES)
    began = time.perf_counter()
    results = {name: run_stage(train, config) for name, (train, config) in stages(cfg).items()}
    with torch.no_grad():
        figures, shown = examine(cfg)
    lines = write_report(cfg, results, figures, shown)
    claim.unlock(out)
    print("\n".join(lines))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; read {out}/report.md, or talk to it:"
          f"\n    python sample.py --init {out}/dpo")
    return {"results": results, "figures": figures}
