"""
The whole life of a language model in one command: pretraining -> supervised fine-tuning -> reward
model -> DPO and, beside it, PPO, on the embedded world, and a report of what each stage changed.

    python lifecycle.py                    # minutes on two CPU cores; a GPU is used if there
    python lifecycle.py --preset smoke     # every stage, real but short: under a minute
    python sample.py --init out/dpo        # then talk to it

Writes out/{pretrain,sft,rm,dpo,ppo}/, out/report.md, out/report.json and pictures. Run again, it
skips what is finished with the same settings and goes on with what was interrupted; a stage whose
settings have changed runs afresh, its earlier folder is kept as out/STAGE.1, .2, ...
"""
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
import readers
import sample
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from model import parameter_count
from plumbing.checkpoints import newest_checkpoint
from plumbing.curves import read_metrics
from plumbing.folders import load_model, parents
from plumbing.options import build, command_line, flat
from plumbing.run import pick_device, pick_dtype

# Only what differs from the scripts' own defaults, which are those of `tiny`.
PRESETS = {
    "tiny": {},
    "smoke": {
        "pretrain": {"max_bytes": 1_000_000, "steps": 80, "copy_steps": 0, "warmup": 10,
                     "eval_windows": 16},
        "sft": {"n_examples": 2000, "steps": 50, "warmup": 5, "eval_examples": 40},
        "rm": {"n_pairs": 800, "steps": 50, "warmup": 5, "eval_pairs": 100, "n_shift": 20},
        "dpo": {"n_pairs": 1000, "steps": 60, "beta": 0.1, "lr": 1e-4, "warmup": 5,
                "eval_pairs": 100},
        "ppo": {"n_prompts": 200, "steps": 3, "batch_size": 16, "minibatch_size": 8},
        "exam": {"n_tasks": 60, "n": 40},
    },
    "gpu": {
        "pretrain": {"max_bytes": 200_000_000, "vocab_size": 4096, "d_model": 512, "n_layers": 8,
                     "n_heads": 8, "batch_size": 64, "steps": 4000, "lr": 1e-3, "compile": True},
        "sft": {"n_examples": 60_000, "steps": 1500, "batch_size": 32, "lr": 3e-4},
        "rm": {"n_pairs": 60_000, "steps": 1500, "batch_size": 64, "lr": 2e-4},
        "dpo": {"n_pairs": 30_000, "steps": 600, "batch_size": 64, "lr": 5e-5},
        "ppo": {"steps": 150, "batch_size": 256, "minibatch_size": 128, "lr": 5e-5,
                "critic_lr": 1e-4},
        "exam": {},
    },
}
FIVE_FAMILIES = ("facts", "arithmetic", "reading", "unsafe", "unanswerable")


@dataclass
class Config:
    preset: str = "tiny"              # tiny (two CPU cores) | smoke (a quick try) | gpu
    seed: int = 0                     # of the world, the weights, the batches and the samples
    out: str = "out"                  # where the five model folders and the report go
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


def stages(cfg: Config) -> dict[str, tuple[Callable, object]]:
    """Each stage's main and its config: one model folder in, one out."""
    if cfg.preset not in PRESETS:
        raise ValueError(f"--preset {cfg.preset}: give {', '.join(PRESETS)}")
    out = Path(cfg.out)
    world = f"world:{cfg.seed}"
    common = {"seed": cfg.seed, "device": cfg.device, "dtype": cfg.dtype}

    def stage(script, name: str, parent: str = "", **inputs):
        init = {"init": str(out / parent)} if parent else {}
        special = PRESETS[cfg.preset].get(name, {})
        config = build(script.Config, {"out": str(out / name), **init, **inputs, **common, **special})
        return script.main, config

    return {"pretrain": stage(train_pretrain, "pretrain", data=world),
            "sft": stage(train_sft, "sft", "pretrain", data=world),
            "rm": stage(train_rm, "rm", "sft", data=world),
            "dpo": stage(train_dpo, "dpo", "sft", data=world),
            "ppo": stage(train_ppo, "ppo", "sft", prompts=world, reward_model=str(out / "rm"))}


def run_stage(main: Callable, cfg) -> dict:
    """Skip a stage that is finished with this config and these parents, go on with one that was
    interrupted, and run anything else afresh. Returns the stage's result."""
    def same(record: dict) -> bool:
        ignored = {"resume": False, "overwrite": False}
        return (record["config"] | ignored == flat(cfg) | ignored
                and record["parents"] == parents(cfg))

    finished = Path(cfg.out) / "config.json"
    record = json.loads(finished.read_text()) if finished.exists() else None
    if record and same(record):
        print(f"{record['stage']}: finished before, skipped ({cfg.out})", file=sys.stderr)
        return record["result"]
    checkpoint = newest_checkpoint(Path(cfg.out))
    going_on = record is None and checkpoint is not None and same(
        json.loads((checkpoint / "meta.json").read_text()))
    if not going_on and Path(cfg.out).is_dir():
        number = next(n for n in itertools.count(1) if not Path(f"{cfg.out}.{n}").exists())
        Path(cfg.out).rename(f"{cfg.out}.{number}")
        print(f"{cfg.out} is of other settings: kept as {cfg.out}.{number}", file=sys.stderr)
    return main(dataclasses.replace(cfg, resume=going_on))


# ---------------------------------------------------------------------- the exam

def examine(configs: dict, cfg: Config) -> tuple[dict, dict]:
    """Greedy answers of base, SFT, DPO and PPO models to the same held-out exam.

    Returns the figures of each model and the answers to five prompts.
    """
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    world = f"world:{cfg.seed}"
    size = {"n_tasks": 1000, "n": 500} | PRESETS[cfg.preset].get("exam", {})
    five = [evaluate.exam(world, 1, (family,))[0] for family in FIVE_FAMILIES]
    prompts = readers.world_named(world).prompts(size["n"], "heldout", seed=2)
    found, shown = {}, {}
    for name in ("pretrain", "sft", "dpo", "ppo"):
        model, tokenizer = load_model(configs[name].out, device, dtype)
        share = 5 if name == "pretrain" else 1       # it knows no end: slow, and hardly ever right
        found[name] = evaluate.evaluate_policy(
            model, tokenizer, world, **{what: n // share for what, n in size.items()})
        found[name]["parameters"] = parameter_count(model)
        shown[name] = [tokenizer.decode(ids) for ids in evaluate.answers(model, tokenizer, five)]
        if name == "pretrain":
            found[name] |= examine_language(model, tokenizer, configs[name])
            shown[name] = [tokenizer.decode(ids) for ids in sample.generate(
                model, [tokenizer.encode(e["prompt"]) for e in five], 40, (tokenizer.endoftext,))]
        elif name == "sft":
            sft = model
        else:
            rate, low, high = evaluate.win_rate(found[name]["rewards"], found["sft"]["rewards"])
            found[name] |= {"win_rate": rate, "win_rate_95": [low, high],
                            "kl": evaluate.kl_to(model, sft, tokenizer, prompts, cfg.seed)}
    return found, {"prompts": [e["prompt"] for e in five], **shown}


def examine_language(model, tokenizer, cfg: train_pretrain.Config, n: int = 32) -> dict:
    """Fluency of documents sampled from the base model, beside held-out documents of the corpus."""
    corpus = list(readers.read_documents(cfg.data, split="train", max_bytes=2_000_000))
    heldout = readers.read_documents(cfg.data, split="heldout", max_bytes=1_000_000)
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    length = min(160, model.config.context_length - 1)
    stories = [tokenizer.decode(ids) for ids in sample.generate(
        model, [[tokenizer.endoftext]] * n, length, (tokenizer.endoftext,), 0.8,
        generator=generator)]
    sizes = [len(story.split()) for story in stories]
    real = [" ".join(text.split()[:size]) for text, size in zip(heldout, sizes)]
    return {"stories": stories[:3], "fluency": evaluate.fluency(stories, corpus),
            "fluency_corpus": evaluate.fluency(real, corpus)}


# ---------------------------------------------------------------------- the report

def summarize(results: dict, found: dict, minutes: float) -> dict:
    """out/report.json: minutes, and for each stage what it cost and what it was measured by."""
    def pick(stage: str, *names: str) -> dict:
        return {name: results[stage][name] for name in names}

    sft = found["sft"]
    report = {"minutes": minutes, "parameters": sft["parameters"], "stages": {
        "pretrain": pick("pretrain", "minutes", "tokens_per_s", "val_loss", "bits_per_byte",
                         "unigram_loss", "bigram_loss")
        | {"fluency": found["pretrain"]["fluency"],
           "fluency_corpus": found["pretrain"]["fluency_corpus"]},
        "sft": pick("sft", "minutes", "tokens_per_s", "val_loss", "base_loss")
        | {"accuracy": sft["accuracy"], "base_accuracy": found["pretrain"]["accuracy"],
           "families": sft["families"], "true_reward": sft["true_reward"]},
        "rm": pick("rm", "minutes", "tokens_per_s", "accuracy", "ece", "length_accuracy",
                   "likelihood_accuracy")}}
    for name in ("dpo", "ppo"):
        report["stages"][name] = pick(name, "minutes", "tokens_per_s") | {
            key: found[name][key] for key in ("win_rate", "win_rate_95", "true_reward", "kl",
                                              "accuracy", "families")}
        report["stages"][name]["sft_true_reward"] = sft["true_reward"]
    return report


def stage_rows(report: dict) -> list[tuple[str, str, str]]:
    """(stage, measured by, before -> after) for the table."""
    s = report["stages"]
    rows = [("pretrain", "validation loss, nats per token (unigram, bigram model -> ours)",
             f"{s['pretrain']['unigram_loss']:.2f}, {s['pretrain']['bigram_loss']:.2f} -> "
             f"{s['pretrain']['val_loss']:.2f}"),
            ("sft", "exact-match accuracy on unseen instances (base -> SFT)",
             f"{s['sft']['base_accuracy']:.1%} -> {s['sft']['accuracy']:.1%}"),
            ("rm", "held-out pairs ranked right (by length, by log p of the SFT model -> ours)",
             f"{s['rm']['length_accuracy']:.1%}, {s['rm']['likelihood_accuracy']:.1%} -> "
             f"{s['rm']['accuracy']:.1%}; calibration error {s['rm']['ece']:.3f}")]
    for name in ("dpo", "ppo"):
        x = s[name]
        rows.append((name, "true reward (SFT -> aligned); win rate over SFT; KL to SFT; accuracy",
                     f"{x['sft_true_reward']:.3f} -> {x['true_reward']:.3f}; wins "
                     f"{x['win_rate']:.1%} ({x['win_rate_95'][0]:.1%} to {x['win_rate_95'][1]:.1%})"
                     f"; {x['kl']:.1f} nats; {s['sft']['accuracy']:.1%} -> {x['accuracy']:.1%}"))
    return rows


def write_report(report: dict, found: dict, shown: dict, configs: dict, out: Path) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, configs, out / "report.png")
    lines = ["# From raw text to an aligned assistant", "",
             f"{report['parameters'] / 1e6:.2f}M parameters, {report['minutes']:.1f} minutes.",
             "", "| stage | minutes | tokens/s | measured by | before -> after |",
             "|---|---|---|---|---|"]
    for name, measure, change in stage_rows(report):
        stage = report["stages"][name]
        lines.append(f"| {name} | {stage['minutes']:.1f} | {stage['tokens_per_s']:,.0f} "
                     f"| {measure} | {change} |")
    lines += ["", "![what each stage changed](report.png)", "",
              "## The same five prompts after each stage", "",
              "(The base model continues the bare text; the others answer as assistants.)", ""]
    for i, prompt in enumerate(shown["prompts"]):
        lines += [f"**{prompt}**".replace("\n", " "), ""]
        lines += [f"- {name}: {' '.join(shown[name][i].split())}"
                  for name in ("pretrain", "sft", "dpo", "ppo")] + [""]
    lines += ["## Documents written by the base model (temperature 0.8)", ""]
    lines += [f"> {' '.join(story.split())}\n" for story in found["pretrain"]["stories"]]
    ours, corpus = (report["stages"]["pretrain"][key] for key in ("fluency", "fluency_corpus"))
    lines += ["| fluency | model | held-out corpus |", "|---|---|---|"]
    lines += [f"| {name} | {ours[name]:.3g} | {corpus[name]:.3g} |" for name in ours]
    lines += ["", "## Curves", ""] + [f"![{name}]({name}/curves.png)" for name in configs]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def draw(report: dict, configs: dict, file: Path) -> None:
    """report.png: one panel per stage."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    s = report["stages"]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    curves = {name: read_metrics(cfg.out) for name, cfg in configs.items()}

    def plot(axis, rows, key, **style):
        axis.plot(*zip(*[(row["step"], row[key]) for row in rows if key in row]), **style)

    axis = axes[0, 0]
    plot(axis, curves["pretrain"], "loss", label="training", alpha=0.6)
    plot(axis, curves["pretrain"], "val_loss", label="validation", marker="o")
    copying = min(configs["pretrain"].copy_steps, configs["pretrain"].steps // 6)
    axis.axvspan(0, copying, color="gray", alpha=0.15, label="copying" if copying else None)
    for name, style in (("unigram", ":"), ("bigram", "--")):
        axis.axhline(s["pretrain"][f"{name}_loss"], color="gray", ls=style, label=f"{name} model")
    axis.set(title="1 pretraining", xlabel="step", ylabel="loss (nats per token)")
    axis.legend()

    axis, names = axes[0, 1], list(s["sft"]["families"])
    for k, name in enumerate(("sft", "dpo", "ppo")):
        places = [i + 0.27 * k for i in range(len(names))]
        axis.barh(places, [100 * s[name]["families"][f] for f in names], 0.25, label=name.upper())
    axis.set(title="2 accuracy by task family", xlabel="exact match (%)", xlim=(0, 140),
             xticks=range(0, 101, 20), yticks=[i + 0.27 for i in range(len(names))],
             yticklabels=names)
    axis.invert_yaxis()
    axis.legend(loc="center right")

    axis = axes[0, 2]
    plot(axis, curves["rm"], "train_accuracy", label="training", alpha=0.6)
    plot(axis, curves["rm"], "accuracy", label="held out", marker="o")
    for name, label, style in (("length", "by length", ":"),
                               ("likelihood", "by log p of the SFT model", "--")):
        axis.axhline(s["rm"][f"{name}_accuracy"], color="gray", ls=style, label=label)
    axis.set(title="3 reward model", xlabel="step", ylabel="pairs ranked right", ylim=(0.4, 1))
    axis.legend()

    axis = axes[1, 0]
    plot(axis, curves["dpo"], "logp_chosen", label="chosen")
    plot(axis, curves["dpo"], "logp_rejected", label="rejected")
    axis.set(title="4a DPO: what happens to log pi(y|x)", xlabel="step", ylabel="nats per response")
    axis.legend()

    axis, right = axes[1, 1], axes[1, 1].twinx()
    plot(axis, curves["ppo"], "reward", label="reward model's score", color="C0")
    if any("true_reward" in row for row in curves["ppo"]):
        plot(right, curves["ppo"], "true_reward", color="C2")
    axis.plot([], [], color="C2", label="true reward (right)")
    axis.set(title="4b PPO: proxy and truth", xlabel="step", ylabel="reward model's score")
    right.set(ylabel="true reward", ylim=(0, 1))
    axis.legend(loc="lower right")

    axis = axes[1, 2]
    rewards = [s["sft"]["true_reward"], s["dpo"]["true_reward"], s["ppo"]["true_reward"]]
    bars = axis.bar(["SFT", "DPO", "PPO"], rewards, color=["C7", "C0", "C1"])
    notes = [""] + [f"wins {s[n]['win_rate']:.0%}\nKL {s[n]['kl']:.1f} nats"
                    for n in ("dpo", "ppo")]
    axis.bar_label(bars, [f"{r:.2f}\n{note}" for r, note in zip(rewards, notes)],
                   label_type="center")
    axis.set(title="true reward of greedy answers", ylabel="mean over unseen prompts", ylim=(0, 1))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(cfg: Config) -> dict:
    plan = stages(cfg)
    configs = {name: stage_cfg for name, (_, stage_cfg) in plan.items()}
    out = Path(cfg.out)
    results = {name: run_stage(script_main, stage_cfg)
               for name, (script_main, stage_cfg) in plan.items()}
    started = time.perf_counter()
    found, shown = examine(configs, cfg)
    minutes = sum(result["minutes"] for result in results.values())
    report = summarize(results, found, minutes + (time.perf_counter() - started) / 60)
    write_report(report, found, shown, configs, out)
    for name, measure, change in stage_rows(report):
        print(f"{name:9s} {report['stages'][name]['minutes']:5.1f} min   {measure}: {change}")
    print(f"{report['minutes']:.1f} minutes; read {out}/report.md, or talk to it:\n"
          f"    python sample.py --init {out}/dpo")
    return report


if __name__ == "__main__":
    command_line(main, Config, __doc__)
