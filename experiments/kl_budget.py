"""
What keeps PPO near its reference: no penalty, a fixed one, an adaptive one, a hard KL budget.

The sentences of the documents (001 section 4.12): the gold reward goes up "initially, then" down as
KL(pi_theta || pi_ref) "grows". Against it help the "KL penalty", the "primary defense, constrains
policy drift", and "constrained optimization", which is to "set hard KL budget", KL <= delta. Four
runs of train_ppo.py for each seed, from the SFT model, against the reward model of the base, with
twice the lifecycle's learning rate:

  no penalty         --beta 0 --kl_target 0
  fixed penalty      --beta 0.4 --kl_target 0
  adaptive penalty   --beta 0.05 --kl_target 3: beta rises while the KL is above 3 nats, and falls
                     below them, by at most 6 % a step (0.2 * 64 responses / --kl_horizon 200; of
                     the default, 2000, 40 steps would see little)
  hard budget        --beta 0 --kl_target 0 --kl_budget 3: stops at the first rollout beyond 3 nats,
                     and keeps the policy before it

What came out, three seeds: without a penalty the policy goes 4 to 129 nats away while the proxy
rises, and in the seed that goes furthest true reward falls to .05. The fixed penalty holds 1.4 to
1.9 nats and wins 68 to 82 % against SFT. The adaptive one begins too weak: it
is up to 4 to 6 nats away, 2.5 to 4.5 at the end, and accuracy 7 to 16 points lower. The budget
stops after 6 to 8 steps, which is early: with this learning rate three nats are soon spent.

    python experiments/kl_budget.py             # results/kl_budget.png and .md
    python experiments/kl_budget.py --quick     # one seed, a tenth of the steps

By step: the 64 answers of each rollout. At the end: greedy answers to unseen prompts, sampled ones
for the KL.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import evaluate
import train_ppo
from experiments.base import (
    base_models,
    cell,
    examined,
    fast_dtype,
    kept,
    run,
    save,
    seed_folder,
    show_table,
)
from plumbing.curves import read_metrics
from plumbing.device import pick_device
from plumbing.folders import load_model, read_record
from plumbing.options import command_line
from rewards import Reward
from scoring import score_responses

BUDGET = 3.0                           # nats per response, 001's delta
PPO = {"steps": 40, "batch_size": 64, "lr": 3e-4, "no_end_score": -1.0}
VARIANTS = {
    "no penalty": {"beta": 0.0, "kl_target": 0.0},
    "fixed penalty": {"beta": 0.4, "kl_target": 0.0},
    "adaptive penalty": {"beta": 0.05, "kl_target": BUDGET, "kl_horizon": 200},
    "hard budget": {"beta": 0.0, "kl_target": 0.0, "kl_budget": BUDGET},
}
# {figure of a rollout: the label of its panel}
PANELS = {"kl": "KL to the SFT model, nats per response", "reward": "proxy: reward model's score",
          "true_reward": "true reward"}
# {column: (name of the figure, its format)}
COLUMNS = {"steps": ("steps", ".0f"), "beta at the end": ("beta", ".3f"), "KL": ("kl", ".2f"),
           "proxy": ("proxy", ".2f"), "true reward": ("true_reward", ".3f"),
           "wins over SFT": ("win_rate", ".1%"), "accuracy over SFT's": ("accuracy_gain", "+.1%")}


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models, prompts and samples
    out: str = "out/kl_budget"        # folder for the models
    figure: str = "results/kl_budget.png"         # the picture; the table beside it, as .md
    quick: bool = False               # one seed, a tenth of the steps, marked in the picture


def mean_proxy(folder: Path, rm: Path, seed: int, n: int) -> dict:
    """The reward model's mean score of the greedy answers whose true reward the exam tells; -1 for
    an answer without an end, as in PPO."""
    device = pick_device("auto")
    model, tokenizer = load_model(folder, device, fast_dtype())
    reward = Reward(str(rm), "min", tokenizer, device, model.dtype)
    examples = evaluate.reward_prompts(f"world:{seed}", n)
    x = evaluate.chat_prompts(tokenizer, examples)
    y = evaluate.answers(model, tokenizer, examples)
    scores, _ = score_responses(reward, examples, x, y, tokenizer.end, PPO["no_end_score"])
    return {"proxy": scores.mean().item()}


def proxy_of(folder: Path, rm: Path, seed: int, n: int) -> dict:
    """mean_proxy(), once for a policy and a reward model."""
    of = {"model": read_record(folder)["sha256"], "rm": read_record(rm)["sha256"], "n": n}
    return kept(folder.with_name(f"{folder.name}_proxy.json"), of,
                partial(mean_proxy, folder, rm, seed, n))


def at_the_end(folder: Path) -> dict:
    """How many rollouts were within the budget, or all, and the KL coefficient of the last."""
    rows = read_metrics(folder)
    return {"steps": len(rows), "beta": rows[-1]["beta"]}


def draw(folders: dict[str, dict[str, Path]], file: Path, mark: str) -> None:
    """A panel for each figure of the rollouts, a color for each variant: pale a line for each seed,
    which ends in a dot, and their mean while all of them go on."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 5), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items()):
        for number, (variant, of_seeds) in enumerate(folders.items()):
            lines = [[row[name] for row in read_metrics(folder)] for folder in of_seeds.values()]
            for line in lines:
                axis.plot(line, color=f"C{number}", alpha=0.3, marker="o",
                          markevery=[len(line) - 1])
            shortest = min(len(line) for line in lines)
            # Dashed, because until it stops the budget's run is the one without a penalty.
            style = "--" if variant == "hard budget" else "-"
            axis.plot(np.mean([line[:shortest] for line in lines], 0), style, color=f"C{number}",
                      linewidth=2, label=variant)
        axis.set(title=label + mark, xlabel="step")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    axes[0].axhline(BUDGET, color="gray", linestyle=":", label="target and budget")
    # Linear up to the budget, because beyond it the runs without one may go ten times as far.
    axes[0].set_yscale("symlog", linthresh=BUDGET)
    axes[0].set_yticks([0, 1, 2, 3, 10, 30, 100], ["0", "1", "2", "3", "10", "30", "100"])
    highest = max(row["kl"] for of_seeds in folders.values() for folder in of_seeds.values()
                  for row in read_metrics(folder))
    axes[0].set_ylim(-0.2, 1.2 * max(BUDGET, highest))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, file)


def table(found: dict[str, list[dict]], cfg: Config) -> str:
    """results/kl_budget.md; found: {variant: the figures of each seed}."""
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# What keeps PPO near its reference{mark}", "",
             f"`python experiments/kl_budget.py`, seeds {cfg.seeds}: the mean, and from the lowest "
             f"to the highest. Target and budget are {BUDGET:g} nats per response. Proxy, true "
             "reward, wins and accuracy of greedy answers to unseen prompts, the KL of sampled "
             "ones.", "",
             f"| {' | '.join(['', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for variant, of_seeds in found.items():
        cells = [variant]
        for name, form in COLUMNS.values():
            cells.append(cell([figures[name] for figures in of_seeds], form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    steps = PPO["steps"]
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        steps //= 10
    n = 50 if cfg.quick else 500                       # prompts of an exam
    folders = {variant: {} for variant in VARIANTS}
    found = {variant: [] for variant in VARIANTS}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
        for variant, changes in VARIANTS.items():
            folder = out / variant.replace(" ", "_")
            options = PPO | changes | {"steps": steps}
            run(train_ppo, init=str(base / "sft"), out=str(folder), reward=str(base / "rm"),
                prompts=f"world:{seed}", seed=int(seed), **options)
            folders[variant][seed] = folder
            figures = examined(folder, int(seed), base, n)
            figures |= proxy_of(folder, base / "rm", int(seed), n) | at_the_end(folder)
            found[variant].append(figures)
    draw(folders, Path(cfg.figure), " (quick)" if cfg.quick else "")
    show_table(cfg, table(found, cfg))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
