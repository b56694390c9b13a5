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
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model, parents
from plumbing.options import build, command_line, flat
from world.judge import WEIGHTS
from world.text import text_of

STAGES = {"pretrain": train_pretrain, "sft": train_sft, "rm": train_rm, "dpo": train_dpo,
          "ppo": train_ppo}
POLICIES = ("pretrain", "sft", "dpo", "ppo")           # stages whose model can answer a prompt
FIVE_FAMILIES = ("facts", "arithmetic", "reading", "unsafe", "unanswerable")
# Options that add to the documents' algorithms, whose own settings are the scripts' defaults.
BEYOND = ("optimizer", "common", "token_shift", "copy_steps", "mean_coef", "lm_coef")
# {stage: {option: {"value", "without", "loses", "command"}}}: what a run loses without the option
GAINS = Path(__file__).parent / "results" / "gains.json"

# Only what differs from the scripts' own defaults; "exam": how many tasks and prompts.
PRESETS = {
    "tiny": {
        "pretrain": {"optimizer": "muon", "common": 3.0, "n_heads": 2, "rope_theta": 1000.0},
        "sft": {"optimizer": "muon", "lr": 4e-3},
        "dpo": {"lr": 1e-4},
        "ppo": {"steps": 40, "lr": 1e-4, "kl_target": 3.0},
    },
    "smoke": {
        "pretrain": {"max_bytes": 1_000_000, "steps": 80, "warmup": 10, "eval_windows": 16},
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


@dataclass
class Config:
    preset: str = "tiny"              # tiny (two CPU cores) | smoke (a quick try) | gpu
    seed: int = 0                     # of the world, the weights, the batches and the samples
    out: str = "out"                  # where the five model folders and the report go
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


# ---------------------------------------------------------------------- the stages

def stages(cfg: Config) -> dict[str, tuple[Callable, object]]:
    """Each stage's main and its config: one model folder in, one out."""
    if cfg.preset not in PRESETS:
        raise ValueError(f"--preset {cfg.preset}: give {', '.join(PRESETS)}")
    folders = {name: str(Path(cfg.out) / name) for name in STAGES}
    world = f"world:{cfg.seed}"
    inputs = {
        "pretrain": {"data": world},
        "sft": {"init": folders["pretrain"], "data": world},
        "rm": {"init": folders["sft"], "data": world},
        "dpo": {"init": folders["sft"], "data": world},
        "ppo": {"init": folders["sft"], "reward_model": folders["rm"], "prompts": world},
    }
    plan = {}
    for name, script in STAGES.items():
        options = {"out": folders[name], "seed": cfg.seed, "device": cfg.device,
                   "dtype": cfg.dtype}
        options |= inputs[name]
        # The preset comes last, so that it may change any option.
        options |= PRESETS[cfg.preset].get(name, {})
        plan[name] = (script.main, build(script.Config, options))
    return plan


def run_stage(main: Callable, cfg) -> dict:
    """Skip a stage that is finished with this config and these parents, go on with one that was
    interrupted, and run anything else afresh. Returns the stage's result."""
    out = Path(cfg.out)
    record_file = out / "config.json"                      # written last: there when finished
    goes_on = False
    if record_file.exists():
        record = json.loads(record_file.read_text())
        if is_same_run(record, cfg):
            print(f"{record['stage']}: finished before, skipped ({cfg.out})", file=sys.stderr)
            return record["result"]
    else:
        checkpoint = newest_checkpoint(out)                # None before the first
        if checkpoint is not None:
            record = json.loads((checkpoint / "meta.json").read_text())
            goes_on = is_same_run(record, cfg)
    # Set aside and not overwritten, because it may have taken someone's hours.
    if out.is_dir() and not goes_on:
        set_aside(out)
    return main(dataclasses.replace(cfg, resume=goes_on))


def is_same_run(record: dict, cfg) -> bool:
    """Whether a record, of a finished stage or of a checkpoint, is of this config and has the
    parents of now."""
    # --resume and --overwrite say what to do with a folder, and nothing about what comes out.
    ignored = {"resume": False, "overwrite": False}
    recorded = record["config"] | ignored
    wanted = flat(cfg) | ignored
    # Checksums of the parents' weights too, because a folder may have been trained again.
    return recorded == wanted and record["parents"] == parents(cfg)


def set_aside(out: Path) -> None:
    """Rename a folder to the first of out.1, out.2, ... that is free."""
    number = 1
    while Path(f"{out}.{number}").exists():
        number += 1
    out.rename(f"{out}.{number}")
    print(f"{out} is of other settings: kept as {out}.{number}", file=sys.stderr)


# ---------------------------------------------------------------------- the exam

def examine(configs: dict, cfg: Config) -> tuple[dict, dict]:
    """Greedy answers of base, SFT, DPO and PPO models to the same held-out exam.

    Returns the figures of each model and the answers to five prompts.
    """
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    # The world that the stages were trained on, whose held-out part none of them has read.
    world = f"world:{cfg.seed}"
    size = {"n_tasks": 1000, "n": 1000} | PRESETS[cfg.preset].get("exam", {})
    # One prompt of each family that fails in a way of its own, to be read by people.
    five = [evaluate.exam(world, 1, (family,))[0] for family in FIVE_FAMILIES]
    figures = {}
    shown = {"prompts": [text_of(example["prompt"]) for example in five]}
    for name in POLICIES:
        model, tokenizer = load_model(configs[name].out, device, dtype)
        n_tasks = size["n_tasks"]
        n = size["n"]
        if name == "pretrain":
            # A fifth, because the base model knows no end: it is slow, and hardly ever right.
            n_tasks //= 5
            n //= 5
        figures[name] = evaluate.evaluate_policy(model, tokenizer, world, n_tasks, n)
        figures[name]["parameters"] = parameter_count(model)
        if name == "pretrain":
            figures[name] |= examine_language(model, tokenizer, configs[name])
            # Bare text, because the roles' tokens are still untrained at this stage.
            responses = continuations(model, tokenizer, five)
        else:
            responses = evaluate.answers(model, tokenizer, five)
        shown[name] = [tokenizer.decode(ids) for ids in responses]
        if name == "sft":
            sft = model                                    # kept, because the KL is to this model
        elif name in ("dpo", "ppo"):
            figures[name] |= evaluate.wins_over(figures[name], figures["sft"])
            prompts = evaluate.reward_prompts(world, size["n"])
            figures[name]["kl"] = evaluate.kl_to(model, sft, tokenizer, prompts, cfg.seed)
    return figures, shown


def continuations(model, tokenizer, examples: list[dict]) -> list[list[int]]:
    """40 tokens after each bare prompt, for a base model that has never seen a conversation."""
    prompts = [tokenizer.encode(text_of(example["prompt"])) for example in examples]
    return sample.generate(model, prompts, 40, (tokenizer.endoftext,))


def examine_language(model, tokenizer, cfg: train_pretrain.Config, n: int = 32) -> dict:
    """Fluency of documents sampled from the base model, beside held-out documents of the corpus."""
    # 2 MB of the training text, enough to find a copy of a template and quick to count.
    training_texts = list(readers.read_documents(cfg.data, split="train", max_bytes=2_000_000))
    heldout = readers.read_documents(cfg.data, split="heldout", max_bytes=1_000_000)
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    # 160 tokens hold six in ten documents of the corpus from beginning to end.
    length = min(160, model.config.context_length - 1)
    starts = [[tokenizer.endoftext]] * n                   # a document follows the end of another
    sampled = sample.generate(model, starts, length, (tokenizer.endoftext,), 0.8,
                              generator=generator)
    stories = [tokenizer.decode(ids) for ids in sampled]
    # Held-out documents are cut to the stories' lengths, because longer texts repeat more words.
    real = []
    for story, text in zip(stories, heldout):
        n_words = len(story.split())
        words = text.split()[:n_words]
        real.append(" ".join(words))
    return {"stories": stories[:3], "fluency": evaluate.fluency(stories, training_texts),
            "fluency_corpus": evaluate.fluency(real, training_texts)}


# ---------------------------------------------------------------------- the report

def summarize(results: dict, figures: dict, minutes: float) -> dict:
    """out/report.json: minutes, and for each stage what it cost and what it was measured by.

    results: what each stage's main returned; figures: what examine() found of each model.
    """
    base = figures["pretrain"]
    sft = figures["sft"]
    pretrain = pick(results["pretrain"], "minutes", "tokens_per_s", "val_loss", "bits_per_byte",
                    "unigram_loss", "bigram_loss")
    pretrain |= pick(base, "fluency", "fluency_corpus")
    finetune = pick(results["sft"], "minutes", "tokens_per_s", "val_loss", "base_loss")
    finetune |= pick(sft, "accuracy")
    finetune["base_accuracy"] = base["accuracy"]
    finetune |= pick(sft, "families", "true_reward", "parts", "manners")
    reward_model = pick(results["rm"], "minutes", "tokens_per_s", "accuracy", "ece",
                        "length_accuracy", "likelihood_accuracy")
    report = {"minutes": minutes, "parameters": sft["parameters"],
              "stages": {"pretrain": pretrain, "sft": finetune, "rm": reward_model}}
    for name in ("dpo", "ppo"):
        stage = pick(results[name], "minutes", "tokens_per_s")
        stage |= pick(figures[name], "win_rate", "win_rate_95", "plain_win_rate", "right_to_wrong",
                      "longer", "true_reward", "parts", "manners", "kl", "accuracy", "families")
        stage["sft_true_reward"] = sft["true_reward"]      # again, to stand beside its own
        report["stages"][name] = stage
    return report


def pick(figures: dict, *names: str) -> dict:
    return {name: figures[name] for name in names}


def beyond_defaults(configs: dict) -> list[dict]:
    """The options by which this run's stages go beyond the documents' algorithms, each with what a
    run loses without it: {"stage", "option", "value", "without", "loses", "command"}.

    without: the value in its place. loses and command, which shows the loss, are those of GAINS;
    "not measured" and "" where GAINS has no entry for this value.
    """
    gains = {}
    if GAINS.exists():
        gains = json.loads(GAINS.read_text())
    rows = []
    for stage, config in configs.items():
        defaults = flat(type(config)())
        values = flat(config)
        for option in BEYOND:
            if option not in values or values[option] == defaults[option]:
                continue
            row = {"stage": stage, "option": option, "value": values[option],
                   "without": defaults[option], "loses": "not measured", "command": ""}
            measured = gains.get(stage, {}).get(option, {})
            # Only of the same value, because 250 copying steps say nothing about 20.
            if measured.get("value") == values[option]:
                row |= measured
            rows.append(row)
    return rows


def stage_rows(report: dict) -> list[tuple[str, str, str]]:
    """(stage, measured by, before -> after) for the table."""
    pretrain = report["stages"]["pretrain"]
    # The losses of n-gram models, which a model that only counted would reach.
    counting = f"{pretrain['unigram_loss']:.2f}, {pretrain['bigram_loss']:.2f}"
    sft = report["stages"]["sft"]
    rm = report["stages"]["rm"]
    # Rankings without a reward model, which it has to beat.
    simple = f"{rm['length_accuracy']:.1%}, {rm['likelihood_accuracy']:.1%}"
    rows = [("pretrain", "validation loss, nats per token (unigram, bigram model -> ours)",
             f"{counting} -> {pretrain['val_loss']:.2f}"),
            ("sft", "exact-match accuracy on unseen instances (base -> SFT)",
             f"{sft['base_accuracy']:.1%} -> {sft['accuracy']:.1%}"),
            ("rm", "held-out pairs ranked right (by length, by log p of the SFT model -> ours)",
             f"{simple} -> {rm['accuracy']:.1%}; calibration error {rm['ece']:.3f}")]
    for name in ("dpo", "ppo"):
        aligned = report["stages"][name]
        low, high = aligned["win_rate_95"]
        reward = f"{aligned['sft_true_reward']:.3f} -> {aligned['true_reward']:.3f}"
        wins = f"wins {aligned['win_rate']:.1%} ({low:.1%} to {high:.1%})"
        kl = f"{aligned['kl']:.1f} nats"
        accuracy = f"{sft['accuracy']:.1%} -> {aligned['accuracy']:.1%}"
        rows.append((name, "true reward (SFT -> aligned); win rate over SFT; KL to SFT; accuracy",
                     f"{reward}; {wins}; {kl}; {accuracy}"))
    return rows


def write_report(report: dict, figures: dict, shown: dict, configs: dict, out: Path) -> None:
    """report.json, report.png and report.md in `out`."""
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, configs, out / "report.png")
    lines = table_lines(report)
    lines += ["", "![what each stage changed](report.png)", ""]
    lines += parts_lines(report["stages"])
    lines += beyond_lines(report["beyond_defaults"])
    lines += answer_lines(shown)
    lines += story_lines(figures["pretrain"])
    # Relative paths, so that the folder may be moved as a whole.
    lines += ["", "## Curves", ""]
    lines += [f"![{name}]({name}/curves.png)" for name in configs]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def table_lines(report: dict) -> list[str]:
    millions = report["parameters"] / 1e6
    lines = ["# From raw text to an aligned assistant", "",
             f"{millions:.2f}M parameters, {report['minutes']:.1f} minutes.",
             "", "| stage | minutes | tokens/s | measured by | before -> after |",
             "|---|---|---|---|---|"]
    for name, measure, change in stage_rows(report):
        stage = report["stages"][name]
        lines.append(f"| {name} | {stage['minutes']:.1f} | {stage['tokens_per_s']:,.0f} "
                     f"| {measure} | {change} |")
    return lines


def parts_lines(stages: dict) -> list[str]:
    """What the true reward is made of after each stage, and each part's share of the gain."""
    lines = ["## What alignment changed", "",
             "| part of the true reward | weight | SFT | DPO | PPO | of DPO's gain | of PPO's |",
             "|---|---|---|---|---|---|---|"]
    before = stages["sft"]
    for part, weight in WEIGHTS.items():
        values = [stages[name]["parts"][part] for name in ("sft", "dpo", "ppo")]
        shares = []
        for name in ("dpo", "ppo"):
            after = stages[name]
            gain = after["true_reward"] - before["true_reward"]
            part_gain = weight * (after["parts"][part] - before["parts"][part])
            # Of next to nothing, or of a loss, there are no shares.
            shares.append(f"{part_gain / gain:.0%}" if gain > 0.01 else "-")
        cells = [part, f"{weight}", *(f"{value:.3f}" for value in values), *shares]
        lines.append(f"| {' | '.join(cells)} |")
    dpo_rate = stages["dpo"]["plain_win_rate"]
    ppo_rate = stages["ppo"]["plain_win_rate"]
    plain = f"Without courtesies on either side DPO wins {dpo_rate:.1%}, PPO {ppo_rate:.1%}."
    return [*lines, "", plain, "", *manner_lines(stages)]


def manner_lines(stages: dict) -> list[str]:
    """Faults that a reward model may teach, and what the right answers of SFT became."""
    lines = ["| of the answers | SFT | DPO | PPO |", "|---|---|---|---|"]
    for fault in stages["sft"]["manners"]:
        shares = [f"{stages[name]['manners'][fault]:.1%}" for name in ("sft", "dpo", "ppo")]
        lines.append(f"| {fault.replace('_', ' ')} | {' | '.join(shares)} |")
    lost = [f"{stages[name]['right_to_wrong']:.1%}" for name in ("dpo", "ppo")]
    longer = [f"{stages[name]['longer']:+.2f}" for name in ("dpo", "ppo")]
    lines.append(f"| right under SFT, now wrong (of those) | | {' | '.join(lost)} |")
    lines.append(f"| words more where SFT's was right and whole | | {' | '.join(longer)} |")
    return [*lines, ""]


def beyond_lines(beyond: list[dict]) -> list[str]:
    lines = ["## Beyond the documents' defaults", ""]
    if not beyond:
        return [*lines, "Nothing: every stage ran the document's algorithm.", ""]
    lines += ["| stage | option | without | the same run without it loses | measured by |",
              "|---|---|---|---|---|"]
    for row in beyond:
        command = f"`{row['command']}`" if row["command"] else ""
        lines.append(f"| {row['stage']} | {row['option']} {row['value']} | {row['without']} "
                     f"| {row['loses']} | {command} |")
    return [*lines, ""]


def answer_lines(shown: dict) -> list[str]:
    lines = ["## The same five prompts after each stage", "",
             "(The base model continues the bare text; the others answer as assistants.)", ""]
    for i, prompt in enumerate(shown["prompts"]):
        prompt_line = f"**{prompt}**".replace("\n", " ")   # because a new line would end the bold
        lines += [prompt_line, ""]
        for name in POLICIES:
            lines.append(f"- {name}: {one_line(shown[name][i])}")
        lines.append("")
    return lines


def story_lines(base: dict) -> list[str]:
    lines = ["## Documents written by the base model (temperature 0.8)", ""]
    for story in base["stories"]:
        lines.append(f"> {one_line(story)}\n")             # \n: else Markdown would join stories
    lines += ["| fluency | model | held-out corpus |", "|---|---|---|"]
    for name, value in base["fluency"].items():
        corpus_value = base["fluency_corpus"][name]
        lines.append(f"| {name} | {value:.3g} | {corpus_value:.3g} |")
    return lines


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------- the picture

def draw(report: dict, configs: dict, file: Path) -> None:
    """report.png: one panel per stage, and one for the true reward."""
    import matplotlib  # not at the top, because it takes a second
    matplotlib.use("Agg")                                  # because a server has no screen
    from matplotlib import pyplot as plt

    stages = report["stages"]
    curves = {name: read_metrics(config.out) for name, config in configs.items()}
    figure, axes = plt.subplots(2, 3, figsize=(15, 8))     # in inches
    draw_pretraining(axes[0, 0], curves["pretrain"], stages["pretrain"])
    draw_families(axes[0, 1], stages)
    draw_reward_model(axes[0, 2], curves["rm"], stages["rm"])
    draw_dpo(axes[1, 0], curves["dpo"])
    draw_ppo(axes[1, 1], curves["ppo"])
    draw_true_reward(axes[1, 2], stages)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot(axis, rows: list[dict], key: str, **style) -> None:
    """A logged figure against the step, of the rows that have it."""
    logged = [row for row in rows if key in row]
    steps = [row["step"] for row in logged]
    values = [row[key] for row in logged]
    axis.plot(steps, values, **style)


def draw_pretraining(axis, rows: list[dict], stage: dict) -> None:
    plot(axis, rows, "loss", label="training", alpha=0.6)
    plot(axis, rows, "val_loss", label="validation", marker="o")
    for name, style in (("unigram", ":"), ("bigram", "--")):
        loss = stage[f"{name}_loss"]
        axis.axhline(loss, color="gray", ls=style, label=f"{name} model")
    axis.set(title="1 pretraining", xlabel="step", ylabel="loss (nats per token)")
    axis.legend()


def draw_families(axis, stages: dict) -> None:
    families = list(stages["sft"]["families"])
    rows = range(len(families))
    for k, name in enumerate(("sft", "dpo", "ppo")):
        # Three bars a family, of height 0.25 and 0.27 apart, so that they do not touch.
        places = [row + 0.27 * k for row in rows]
        accuracy = stages[name]["families"]
        percents = [100 * accuracy[family] for family in families]
        axis.barh(places, percents, 0.25, label=name.upper())
    middles = [row + 0.27 for row in rows]
    # The axis ends at 140 % and not at 100, to leave room for the legend.
    axis.set(title="2 accuracy by task family", xlabel="exact match (%)", xlim=(0, 140),
             xticks=range(0, 101, 20), yticks=middles, yticklabels=families)
    axis.invert_yaxis()                                    # because barh begins at the bottom
    axis.legend(loc="center right")


def draw_reward_model(axis, rows: list[dict], stage: dict) -> None:
    plot(axis, rows, "train_accuracy", label="training", alpha=0.6)
    plot(axis, rows, "accuracy", label="held out", marker="o")
    by_length = stage["length_accuracy"]
    by_likelihood = stage["likelihood_accuracy"]
    axis.axhline(by_length, color="gray", ls=":", label="by length")
    axis.axhline(by_likelihood, color="gray", ls="--", label="by log p of the SFT model")
    axis.set(title="3 reward model", xlabel="step", ylabel="pairs ranked right", ylim=(0.4, 1))
    axis.legend()


def draw_dpo(axis, rows: list[dict]) -> None:
    plot(axis, rows, "logratio_chosen", label="chosen")
    plot(axis, rows, "logratio_rejected", label="rejected")
    # not log pi itself, which differs from answer to answer by far more than training moves it
    axis.set(title=r"4a DPO: $\log\pi(y|x) - \log\pi_{ref}(y|x)$", xlabel="step",
             ylabel="nats per response")
    axis.legend()


def draw_ppo(axis, rows: list[dict]) -> None:
    right = axis.twinx()               # a second y axis, because the two rewards differ in scale
    plot(axis, rows, "reward", label="reward model's score", color="C0")
    plot(right, rows, "true_reward", color="C2")
    # An empty line on the left axis, because only one axis's lines get into the legend.
    axis.plot([], [], color="C2", label="true reward (right)")
    axis.set(title="4b PPO: proxy and truth", xlabel="step", ylabel="reward model's score")
    right.set(ylabel="true reward", ylim=(0, 1))
    axis.legend(loc="lower right")


def draw_true_reward(axis, stages: dict) -> None:
    rewards = [stages[name]["true_reward"] for name in ("sft", "dpo", "ppo")]
    bars = axis.bar(["SFT", "DPO", "PPO"], rewards, color=["C7", "C0", "C1"])
    labels = [f"{rewards[0]:.2f}\n"]                       # SFT is what the others are measured by
    for name in ("dpo", "ppo"):
        stage = stages[name]
        labels.append(f"{stage['true_reward']:.2f}\nwins {stage['win_rate']:.0%}\n"
                      f"KL {stage['kl']:.1f} nats")
    axis.bar_label(bars, labels, label_type="center")
    axis.set(title="true reward of greedy answers", ylabel="mean over unseen prompts", ylim=(0, 1))


def main(cfg: Config) -> dict:
    plan = stages(cfg)
    out = Path(cfg.out)
    configs = {}
    results = {}
    for name, (train, config) in plan.items():
        configs[name] = config
        results[name] = run_stage(train, config)
    started = time.perf_counter()
    figures, shown = examine(configs, cfg)
    minutes = (time.perf_counter() - started) / 60
    # Of skipped stages too: what the whole takes, and not what is left of it.
    minutes += sum(result["minutes"] for result in results.values())
    report = summarize(results, figures, minutes)
    report["beyond_defaults"] = beyond_defaults(configs)
    write_report(report, figures, shown, configs, out)
    for name, measure, change in stage_rows(report):
        stage_minutes = report["stages"][name]["minutes"]
        print(f"{name:9s} {stage_minutes:5.1f} min   {measure}: {change}")
    print(f"{report['minutes']:.1f} minutes; read {out}/report.md, or talk to it:\n"
          f"    python sample.py --init {out}/dpo")
    return report


if __name__ == "__main__":
    command_line(main, Config, __doc__)
