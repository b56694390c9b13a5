"""
The report of a lifecycle: what each stage changed, as report.md, report.json and report.png.

    report = summarize(results, figures, minutes)      what stages returned, what the exam found
    write_report(report, figures, shown, configs, out)
    write_blind(shown, seed, out)                      for people who do not know which is which

lifecycle.py calls it; what stands here trains and measures nothing.
"""
import json
from pathlib import Path
from random import Random

from plumbing.curves import read_metrics
from plumbing.options import flat
from world.judge import WEIGHTS

POLICIES = ("pretrain", "sft", "chosen", "dpo", "ppo")   # stages whose model can answer a prompt
REPORT_FILES = ("report.md", "report.json", "report.png", "blind.md", "blind_key.json")
ALIGNED = ("chosen", "dpo", "ppo")                     # trained on preferences, compared with SFT
# Options that add to the documents' algorithms, whose own settings are the scripts' defaults.
BEYOND = ("optimizer", "common", "token_shift", "copy_steps")
# {stage: {option: {"value", "without", "loses", "command"}}}: what a run loses without the option
GAINS = Path(__file__).parent / "results" / "gains.json"


# ---------------------------------------------------------------------- report.json

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
    for name in ALIGNED:
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
    for name in ALIGNED:
        aligned = report["stages"][name]
        low, high = aligned["win_rate_95"]
        reward = f"{aligned['sft_true_reward']:.3f} -> {aligned['true_reward']:.3f}"
        wins = f"wins {aligned['win_rate']:.1%} ({low:.1%} to {high:.1%})"
        kl = f"{aligned['kl']:.1f} nats"
        accuracy = f"{sft['accuracy']:.1%} -> {aligned['accuracy']:.1%}"
        rows.append((name, "true reward (SFT -> aligned); win rate over SFT; KL to SFT; accuracy",
                     f"{reward}; {wins}; {kl}; {accuracy}"))
    return rows


# ---------------------------------------------------------------------- report.md

def write_report(report: dict, figures: dict, shown: dict, configs: dict, out: Path) -> None:
    """report.json, report.png and report.md in `out`."""
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, configs, out / "report.png")
    lines = table_lines(report)
    lines += ["", "![what each stage changed](report.png)", ""]
    lines += parts_lines(report["stages"])
    lines += imitation_lines(read_metrics(configs["sft"].out))
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
        shares = [gain_shares(before, stages[name]).get(part) for name in ("dpo", "ppo")]
        shown_shares = ["-" if share is None else f"{share:.0%}" for share in shares]
        cells = [part, f"{weight}", *(f"{value:.3f}" for value in values), *shown_shares]
        lines.append(f"| {' | '.join(cells)} |")
    dpo_rate = stages["dpo"]["plain_win_rate"]
    ppo_rate = stages["ppo"]["plain_win_rate"]
    plain = f"Without courtesies on either side DPO wins {dpo_rate:.1%}, PPO {ppo_rate:.1%}."
    return [*lines, "", plain, "", *manner_lines(stages)]


def gain_shares(before: dict, after: dict) -> dict[str, float]:
    """Each part's share of what the true reward has gained between two stages; {} of next to
    nothing, or of a loss, of which there are no shares."""
    gain = after["true_reward"] - before["true_reward"]
    if gain <= 0.01:
        return {}
    return {part: weight * (after["parts"][part] - before["parts"][part]) / gain
            for part, weight in WEIGHTS.items()}


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


def imitation_lines(rows: list[dict]) -> list[str]:
    """What the last third of fine-tuning did to the loss and to the true reward. rows: the stage's
    metrics; nothing where its world does not judge, or was not asked so early."""
    evaluated = [row for row in rows if "val_loss" in row and "true_reward" in row]
    steps = rows[-1]["step"] + 1
    earlier = [row for row in evaluated if 3 * (row["step"] + 1) <= 2 * steps]
    if not earlier:
        return []
    before = earlier[-1]
    after = evaluated[-1]
    loss = f"{before['val_loss']:.3f} -> {after['val_loss']:.3f} nats per token"
    reward = f"{before['true_reward']:.3f} -> {after['true_reward']:.3f}"
    return [f"Likelihood is not quality: from step {before['step'] + 1} to step {steps} SFT's "
            f"held-out loss went {loss}, the true reward of its answers {reward}.", ""]


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
    lines = ["## The same 20 prompts after each stage", "",
             "(The base model continues the bare text; the others answer as assistants.)", ""]
    for i, (family, prompt) in enumerate(zip(shown["families"], shown["prompts"])):
        # on one line, because a new line would end the bold
        lines += [f"{family}: **{one_line(prompt)}**", ""]
        for name in POLICIES:
            lines.append(f"- {name}: {one_line(shown[name][i])}")
        lines.append("")
    return lines


def write_blind(shown: dict, seed: int, out: Path) -> None:
    """out/blind.md: SFT's answer to each prompt beside DPO's and beside PPO's, sides shuffled by
    the seed, to be judged by people. out/blind_key.json says which side is the aligned one, to be
    opened when every verdict is written down."""
    rng = Random(f"blind {seed}")
    lines = ["# Which answer is better?", "",
             "Write A, B or = behind each number before you open blind_key.json."]
    key = {}
    for name in ("dpo", "ppo"):
        for i, prompt in enumerate(shown["prompts"]):
            number = f"{name} {i + 1}"
            key[number] = rng.choice("AB")
            answers = {"A": shown["sft"][i], "B": shown[name][i]}
            if key[number] == "A":
                answers = {"A": shown[name][i], "B": shown["sft"][i]}
            lines += ["", f"{number}: **{one_line(prompt)}**", ""]
            lines += [f"- {side}: {one_line(answer)}" for side, answer in answers.items()]
    (out / "blind.md").write_text("\n".join(lines) + "\n")
    (out / "blind_key.json").write_text(json.dumps(key, indent=2) + "\n")


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


# ---------------------------------------------------------------------- report.png

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
    rewards = [stages[name]["true_reward"] for name in ("sft", *ALIGNED)]
    names = ["SFT", "SFT on chosen", "DPO", "PPO"]
    bars = axis.bar(names, rewards, color=["C7", "C8", "C0", "C1"])
    labels = [f"{rewards[0]:.2f}\n"]                       # SFT is what the others are measured by
    for name in ALIGNED:
        stage = stages[name]
        labels.append(f"{stage['true_reward']:.2f}\nwins {stage['win_rate']:.0%}\n"
                      f"KL {stage['kl']:.1f} nats")
    axis.bar_label(bars, labels, label_type="center")
    axis.set(title="true reward of greedy answers", ylabel="mean over unseen prompts", ylim=(0, 1))
