"""
When a measure becomes a target: proxy and true reward against the KL from where a policy began.

The claim of the documents (001 section 4.12): the gold reward rises at first and then falls as
KL(pi_theta || pi_ref) grows, and four things help: a KL penalty, an ensemble of reward models
(their minimum), early stopping by a gold evaluation, and a hard KL budget. Only where the truth is
known can both be drawn: the world's judge is the gold reward, a reward model the proxy.

For each seed, from the same SFT model and against the same proxy, which has seen few pairs of
annotators who err (the dials of Gao et al. 2023):

  no mitigation   PPO without a KL penalty, until it is far away
  KL penalty      the same with --beta
  ensemble        the same against the minimum of three such proxies
  early stopping  the same, kept where the judge liked held-out answers best (--gold world)
  KL budget       the same, kept where the KL was last below --kl_budget
  best of N       N answers of the SFT model, of which the proxy picks one: no training at all

    python experiments/overoptimization.py                 # results/overoptimization.png and .md
    python experiments/overoptimization.py --quick         # one seed, fewer steps
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from base import base_models, run
from matplotlib import pyplot as plt

import evaluate
import train_ppo
import train_rm
from plumbing.claim import write_whole
from plumbing.curves import read_metrics
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import load_model
from plumbing.options import command_line
from rewards import Reward
from scoring import best_of_n_kl
from world.text import text_of

# Of every PPO run; what a mitigation changes stands beside its name.
PRESSURE = {"beta": 0.0, "kl_target": 0.0, "lr": 4e-4, "critic_init": "rm"}
MITIGATIONS = {
    "no mitigation": {},
    "KL penalty": {"beta": 0.3},
    "ensemble": {"combine": "min"},
    "early stopping": {"gold": "world", "gold_every": 5, "gold_patience": 1000},
    "KL budget": {"kl_budget": 3.0},
}
WINDOW = 5                             # steps whose rollouts are averaged for a point of a curve
DRAWS = (1, 2, 4, 8, 16, 32, 64)       # N of best of N
MEMBERS = 3                            # reward models of the ensemble; the first is the proxy


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models, batches and samples
    steps: int = 100                  # of each PPO run, >= 1
    n_pairs: int = 4000               # that the proxy has seen, >= 1
    rm_steps: int = 250               # of the proxy, >= 1
    label_noise: float = 0.1          # of its annotators, in [0, 1]
    length_bias: float = 0.0          # the share that goes by length alone, in [0, 1]
    out: str = "out/overoptimization"  # folder for the models
    figure: str = "results/overoptimization.png"   # the picture; the table beside it, as .md
    quick: bool = False               # one seed and a third of the steps, marked in the picture


# ---------------------------------------------------------------------- the runs of a seed

def proxies(cfg: Config, seed: int, base: Path, out: Path) -> list[str]:
    """Reward models that differ in head, pairs and order of the pairs."""
    folders = []
    for member in range(MEMBERS):
        folders.append(str(out / f"rm{member}"))
        run(train_rm, init=str(base / "sft"), out=folders[-1], data=f"world:{seed}",
            seed=100 * member + seed, n_pairs=cfg.n_pairs, steps=cfg.rm_steps,
            label_noise=cfg.label_noise, length_bias=cfg.length_bias, optimizer="muon", lr=1e-3,
            eval_every=cfg.rm_steps)
    return folders


def ppo_runs(cfg: Config, seed: int, base: Path, out: Path, folders: list[str]) -> dict[str, Path]:
    """{name: model folder} of each mitigation."""
    found = {}
    for name, changes in MITIGATIONS.items():
        found[name] = out / name.replace(" ", "_")
        reward = ",".join(folders) if name == "ensemble" else folders[0]
        options = PRESSURE | {"steps": cfg.steps, "reward": reward} | changes
        run(train_ppo, init=str(base / "sft"), out=str(found[name]), prompts=f"world:{seed}",
            seed=seed, **options)
    return found


def curve(folder: Path) -> list[dict]:
    """The rollouts of WINDOW steps at a time: KL, proxy and true reward, with the latter's standard
    error."""
    rows = read_metrics(folder)
    points = []
    for first in range(0, len(rows) - WINDOW + 1, WINDOW):
        part = rows[first:first + WINDOW]
        truth = np.array([row["true_reward"] for row in part])
        points.append({"kl": float(np.mean([row["kl"] for row in part])),
                       "proxy": float(np.mean([row["reward"] for row in part])),
                       "truth": float(truth.mean()),
                       "error": float(truth.std(ddof=1) / math.sqrt(WINDOW))})
    return points


def best_of_n_curve(base: Path, proxy: str, seed: int, n_prompts: int) -> list[dict]:
    """The same for best of N: expected over all choices of N among the most that are drawn."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    model, tokenizer = load_model(base / "sft", device, dtype)
    reward = Reward(proxy, "min", tokenizer, device, dtype)
    examples = evaluate.reward_prompts(f"world:{seed}", n_prompts)
    generator = torch.Generator(device).manual_seed(seed)
    most = max(DRAWS)
    repeated = [example for example in examples for _ in range(most)]
    y = evaluate.answers(model, tokenizer, repeated, 1.0, generator)
    x = [ids for ids in evaluate.chat_prompts(tokenizer, examples) for _ in range(most)]
    proxy_scores = reward([{}] * len(x), x, y).view(-1, most).cpu().numpy()
    truths = evaluate.true_rewards(repeated, evaluate.complete_texts(tokenizer, y))
    truths = truths.reshape(-1, most)
    order = proxy_scores.argsort(1)
    proxy_scores = np.take_along_axis(proxy_scores, order, 1)
    truths = np.take_along_axis(truths, order, 1)
    points = []
    for n in DRAWS:
        # p(the k-th lowest of all is the best of n) = C(k - 1, n - 1) / C(most, n)
        weights = np.array([math.comb(k, n - 1) / math.comb(most, n) for k in range(most)])
        by_prompt = truths @ weights
        points.append({"n": n, "kl": best_of_n_kl(n),
                       "proxy": float((proxy_scores @ weights).mean()),
                       "truth": float(by_prompt.mean()),
                       "error": float(by_prompt.std(ddof=1) / math.sqrt(len(by_prompt)))})
    return points


def final(folder: Path, seed: int, n: int) -> dict:
    """Sampled answers of a finished policy to n held-out prompts: true reward, its standard error,
    what the texts are like, and three of them."""
    device = pick_device("auto")
    model, tokenizer = load_model(folder, device, pick_dtype("auto", device))
    examples = evaluate.reward_prompts(f"world:{seed}", n)
    generator = torch.Generator(device).manual_seed(seed)
    y = evaluate.answers(model, tokenizer, examples, 1.0, generator)
    texts = evaluate.complete_texts(tokenizer, y)
    truths = evaluate.true_rewards(examples, texts)
    words = [text.split() for text in texts]
    pairs = [pair for text in words for pair in zip(text, text[1:])]
    repeated = [len(text) - len({*text}) for text in words]
    return {"truth": float(truths.mean()), "error": float(truths.std(ddof=1) / math.sqrt(n)),
            "words": float(np.mean([len(text) for text in words])),
            "distinct_2": len({*pairs}) / max(1, len(pairs)),
            "repeated_words": float(np.mean(repeated)), "answers": texts[:3],
            "prompts": [text_of(example["prompt"]) for example in examples[:3]]}


# ---------------------------------------------------------------------- what came out

def turn(points: list[dict]) -> dict:
    """The peak of the true reward, the end, and how many standard errors lie between."""
    peak = max(points, key=lambda point: point["truth"])
    end = points[-1]
    error = math.hypot(peak["error"], end["error"])
    return {"peak": peak["truth"], "peak_kl": peak["kl"], "end": end["truth"],
            "fall": peak["truth"] - end["truth"], "errors": (peak["truth"] - end["truth"])
            / max(error, 1e-9)}


def draw(found: dict[str, dict], file: Path, mark: str) -> None:
    """A row of panels for each seed: proxy and truth of PPO and best of N, and the mitigations."""
    figure, axes = plt.subplots(len(found), 3, figsize=(15, 4 * len(found)), squeeze=False,
                                layout="constrained")
    for (left, middle, right), (seed, of_seed) in zip(axes, found.items()):
        for axis, points, name in ((left, of_seed["curves"]["no mitigation"], "PPO"),
                                   (middle, of_seed["best of N"], "best of N")):
            distance = [math.sqrt(max(0.0, point["kl"])) for point in points]
            truth = np.array([point["truth"] for point in points])
            error = np.array([point["error"] for point in points])
            axis.plot(distance, truth, color="C0", marker=".", label="true reward (left axis)")
            axis.fill_between(distance, truth - 2 * error, truth + 2 * error, alpha=0.2)
            axis.set(title=f"seed {seed}: {name}{mark}", xlabel="sqrt(KL), KL in nats per response",
                     ylabel="true reward", ylim=(0, 1))
            other = axis.twinx()
            other.plot(distance, [point["proxy"] for point in points], color="C1", marker=".",
                       label="proxy (right axis)")
            other.set_ylabel("reward model's score")
            axis.legend(loc="lower left")
            other.legend(loc="lower right")
            axis.grid(alpha=0.3)
        for name, points in of_seed["curves"].items():
            distance = [math.sqrt(max(0.0, point["kl"])) for point in points]
            right.plot(distance, [point["truth"] for point in points], marker=".",
                       label=f"{name}: ends at {of_seed['ends'][name]['truth']:.2f}")
        right.set(title=f"seed {seed}: mitigations{mark}", ylim=(0, 1),
                  xlabel="sqrt(KL), KL in nats per response", ylabel="true reward")
        right.grid(alpha=0.3)
        right.legend(loc="lower left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def table(found: dict[str, dict], cfg: Config) -> str:
    """results/overoptimization.md: the turn, the mitigations, and what hacking looks like."""
    lines = ["# Over-optimisation", "",
             f"`python experiments/overoptimization.py`: proxies of {cfg.n_pairs:,} pairs, "
             f"{cfg.label_noise:.0%} of them labelled wrongly; {cfg.steps} steps of PPO.", "",
             "| seed | proxy's accuracy | peak, at KL | end | fall | standard errors | "
             + " | ".join(list(MITIGATIONS)[1:]) + " |", "|---" * (6 + len(MITIGATIONS) - 1) + "|"]
    for seed, of_seed in found.items():
        ends = of_seed["ends"]
        turned = of_seed["turn"]
        cells = [seed, f"{of_seed['accuracy']:.1%}",
                 f"{turned['peak']:.3f}, {turned['peak_kl']:.1f}",
                 f"{ends['no mitigation']['truth']:.3f}", f"{turned['fall']:.3f}",
                 f"{turned['errors']:.1f}"]
        cells += [f"{ends[name]['truth']:.3f}" for name in list(MITIGATIONS)[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "The ends are sampled answers to 500 held-out prompts at temperature 1. What the "
              "policies say, by how far they went:", ""]
    for seed, of_seed in found.items():
        for name in ("SFT", "KL budget", "no mitigation"):
            end = of_seed["ends"][name]
            lines.append(f"- seed {seed}, {name}: {end['words']:.1f} words, "
                         f"{end['distinct_2']:.2f} of the word pairs distinct, "
                         f"{end['repeated_words']:.1f} words repeated")
    first = next(iter(found.values()))["ends"]
    for number in range(3):
        lines += ["", f"**{first['SFT']['prompts'][number]}**", ""]
        for name in ("SFT", "KL budget", "no mitigation"):
            lines.append(f"- {name}: {first[name]['answers'][number] or '(never ended)'}")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        cfg.steps //= 3
    found = {}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = Path(cfg.out) / (f"{seed}_quick" if cfg.quick else seed)
        folders = proxies(cfg, int(seed), base, out)
        runs = ppo_runs(cfg, int(seed), base, out, folders)
        curves = {name: curve(folder) for name, folder in runs.items()}
        ends = {name: final(folder, int(seed), 500) for name, folder in runs.items()}
        ends["SFT"] = final(base / "sft", int(seed), 500)
        record = json.loads((Path(folders[0]) / "config.json").read_text())
        found[seed] = {"curves": curves, "ends": ends, "turn": turn(curves["no mitigation"]),
                       "best of N": best_of_n_curve(base, folders[0], int(seed), 200),
                       "accuracy": record["result"]["accuracy"]}
        print(f"seed {seed}: {found[seed]['turn']}; ends "
              f"{ {name: round(end['truth'], 3) for name, end in ends.items()} }", flush=True)
    file = Path(cfg.figure)
    draw(found, file, " (quick)" if cfg.quick else "")
    write_whole(file.with_suffix(".md"), lambda temporary: temporary.write_text(table(found, cfg)))
    return found


if __name__ == "__main__":
    command_line(main, Config, __doc__)
