"""
When a measure becomes a target: proxy and true reward against the KL from where a policy began.

The claim of the documents (001 section 4.12): the gold reward rises at first and then falls as
KL(pi_theta || pi_ref) grows, and four things help: a KL penalty, an ensemble of reward models
(their minimum), early stopping by a gold evaluation, and a hard KL budget. Only where the truth is
known can both be drawn: the world's judge is the gold reward, a reward model the proxy.

For each seed, from the same SFT model and against the same proxy, which has seen few pairs; of the
other dials of Gao et al. 2023 there are its steps, its annotators' errors and their liking of
length:

  no mitigation   PPO without a KL penalty, until it is far away
  KL penalty      the same with --beta
  ensemble        the same against the minimum of six such proxies
  early stopping  the same, kept where the judge liked held-out answers best (--gold world)
  KL budget       the same, kept where the KL was last below --kl_budget
  best of N       N answers of the SFT model, of which the proxy picks one: no training at all

What came out, three seeds: the proxy rises to the end, the truth until the policy is .2 to .9 nats
away, if at all, and then falls by .09 to .40 (7 to 25 standard errors). Three mitigations hold, by
true reward: KL penalty .85 to .89, early stopping .82 to .86, KL budget .82 to .86; no mitigation
.44 to .81; the SFT model is at .80 to .84. The ensemble does not, .30 to .70: all six began at one
SFT model, and what they like together (in seed 1 a record, whatever was asked) is found as well.
Pairs and learning rate were chosen: by proxies of 500 pairs, at 1e-4, the truth fell by .02 to .04.

    python experiments/overoptimization.py                 # results/overoptimization.png and .md
    python experiments/overoptimization.py --quick         # one seed, fewer steps
"""
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

import evaluate
import train_ppo
import train_rm
from experiments.base import base_models, fast_dtype, keep, run, save, seed_folder
from plumbing.curves import read_metrics
from plumbing.device import pick_device
from plumbing.folders import load_model
from plumbing.options import command_line
from rewards import Reward
from scoring import best_of_n_kl, best_of_n_kl_of, score_responses
from world.text import text_of

# Of every PPO run; what a mitigation changes stands beside its name.
NO_END_SCORE = -1.0
PRESSURE = {"beta": 0.0, "kl_target": 0.0, "lr": 1.5e-4, "critic_init": "rm",
            "no_end_score": NO_END_SCORE}
MITIGATIONS = {
    "no mitigation": {},
    "KL penalty": {"beta": 0.3},
    "ensemble": {"combine": "min"},
    "early stopping": {"gold": "world", "gold_every": 5, "gold_patience": 1000},
    "KL budget": {"kl_budget": 1.5},
}
WINDOW = 5                             # steps whose rollouts are averaged for a point of a curve
DRAWS = (1, 2, 4, 8, 16, 32, 64)       # N of best of N
SHOWN = ("SFT", "KL budget", "no mitigation")          # answers at three distances
DISTANCE = "sqrt(KL), KL in nats per response"
MEMBERS = 6                            # reward models of the ensemble; the first is the proxy


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, models, batches and samples
    steps: int = 50                   # of each PPO run, >= 1
    n_pairs: int = 250                # that the proxy has seen, >= 1
    rm_steps: int = 80                # of the proxy, >= 1
    label_noise: float = 0.0          # of its annotators, in [0, 1]
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


def point(kls: np.ndarray, proxies: np.ndarray, truths: np.ndarray) -> dict:
    """A point of a curve: means, and the standard error of the true reward's."""
    error = truths.std(ddof=1) / math.sqrt(len(truths))
    return {"kl": float(kls.mean()), "proxy": float(proxies.mean()),
            "truth": float(truths.mean()), "error": float(error)}


def curve(folder: Path) -> list[dict]:
    """The rollouts of WINDOW steps at a time."""
    rows = read_metrics(folder)
    kls = np.array([row["kl"] for row in rows])
    proxies = np.array([row["reward"] for row in rows])
    truths = np.array([row["true_reward"] for row in rows])
    points = []
    for first in range(0, len(rows) - WINDOW + 1, WINDOW):
        part = slice(first, first + WINDOW)
        points.append(point(kls[part], proxies[part], truths[part]))
    return points


def best_of_n_curve(base: Path, proxy: str, seed: int, n_prompts: int) -> list[dict]:
    """The same for best of N: expected over all choices of N among the most that are drawn, and
    "bound": log N - (N - 1) / N, which the KL may not pass."""
    device = pick_device("auto")
    model, tokenizer = load_model(base / "sft", device, fast_dtype())
    reward = Reward(proxy, "min", tokenizer, device, model.dtype)
    examples = evaluate.reward_prompts(f"world:{seed}", n_prompts)
    generator = torch.Generator(device).manual_seed(seed)
    most = max(DRAWS)
    repeated = [example for example in examples for _ in range(most)]
    y = evaluate.answers(model, tokenizer, repeated, 1.0, generator)
    x = [ids for ids in evaluate.chat_prompts(tokenizer, examples) for _ in range(most)]
    proxies, _ = score_responses(reward, [{}] * len(x), x, y, tokenizer.end, NO_END_SCORE)
    proxies = proxies.view(-1, most).cpu().numpy()
    truths = evaluate.true_rewards(repeated, evaluate.complete_texts(tokenizer, y))
    # from the proxy's worst answer of each prompt to its best
    order = proxies.argsort(1)
    proxies = np.take_along_axis(proxies, order, 1)
    truths = np.take_along_axis(truths.reshape(-1, most), order, 1)
    counts = []
    for row, places in enumerate(order):
        # an answer that was drawn again has the same score, and stands beside itself
        counts.append(Counter(tuple(y[row * most + place]) for place in places).values())
    points = []
    for n in DRAWS:
        # p(the k-th of all is the best of n) = C(k - 1, n - 1) / C(most, n)
        ways = [math.comb(k, n - 1) for k in range(most)]
        p = np.array(ways) / math.comb(most, n)
        kls = np.array([best_of_n_kl_of(of_prompt, n) for of_prompt in counts])
        points.append(point(kls, proxies @ p, truths @ p) | {"n": n, "bound": best_of_n_kl(n)})
    return points


def final(folder: Path, seed: int, n: int) -> dict:
    """Sampled answers of a finished policy to n held-out prompts: true reward, its standard error,
    what the texts are like, and three of them."""
    device = pick_device("auto")
    model, tokenizer = load_model(folder, device, fast_dtype())
    examples = evaluate.reward_prompts(f"world:{seed}", n)
    generator = torch.Generator(device).manual_seed(seed)
    y = evaluate.answers(model, tokenizer, examples, 1.0, generator)
    texts = evaluate.complete_texts(tokenizer, y)
    truths = evaluate.true_rewards(examples, texts)
    error = truths.std(ddof=1) / math.sqrt(n)
    return {"truth": float(truths.mean()), "error": float(error), **looks(texts),
            "answers": texts[:3], "prompts": [text_of(row["prompt"]) for row in examples[:3]]}


def looks(texts: list[str]) -> dict[str, float]:
    """What hacking may look like: words per answer, how many of them are said again, and the share
    of distinct pairs of words over all answers."""
    n_words = []
    n_repeated = []
    pairs = []
    for text in texts:
        words = text.split()
        n_words.append(len(words))
        n_repeated.append(len(words) - len({*words}))
        pairs += zip(words, words[1:])
    return {"words": float(np.mean(n_words)), "repeated_words": float(np.mean(n_repeated)),
            "distinct_2": len({*pairs}) / max(1, len(pairs))}


# ---------------------------------------------------------------------- what came out

def turn(points: list[dict]) -> dict:
    """The peak of the true reward, the end, and how many standard errors lie between. Of 16 points
    that differ by noise alone the highest is 1.3 of them above the last, on average."""
    peak = max(points, key=lambda found: found["truth"])
    end = points[-1]
    fall = peak["truth"] - end["truth"]
    error = math.hypot(peak["error"], end["error"])
    return {"peak": peak["truth"], "peak_kl": peak["kl"], "end": end["truth"], "fall": fall,
            "errors": fall / max(error, 1e-9)}


def distances(points: list[dict]) -> list[float]:
    """sqrt(KL) of each point, the distance in which Gao et al. 2023 find simple curves."""
    return [math.sqrt(max(0.0, found["kl"])) for found in points]


def values(points: list[dict], name: str) -> np.ndarray:
    return np.array([found[name] for found in points])


def draw_proxy_and_truth(axis, points: list[dict], title: str) -> None:
    truth = values(points, "truth")
    error = values(points, "error")
    axis.plot(distances(points), truth, color="C0", marker=".", label="true reward (left axis)")
    axis.fill_between(distances(points), truth - 2 * error, truth + 2 * error, alpha=0.2)
    axis.set(title=title, xlabel=DISTANCE, ylabel="true reward", ylim=(0, 1))
    other = axis.twinx()
    other.plot(distances(points), values(points, "proxy"), color="C1", marker=".",
               label="proxy (right axis)")
    other.set_ylabel("reward model's score")
    axis.legend(loc="lower left")
    other.legend(loc="lower right")


def draw_mitigations(axis, of_seed: dict, title: str) -> None:
    for name, points in of_seed["curves"].items():
        end = of_seed["ends"][name]["truth"]
        axis.plot(distances(points), values(points, "truth"), marker=".",
                  label=f"{name}: ends at {end:.2f}")
    axis.set(title=title, ylim=(0, 1), xlabel=DISTANCE, ylabel="true reward")
    axis.legend(loc="lower left")


def draw(found: dict[str, dict], file: Path, mark: str) -> None:
    """A row of panels for each seed: proxy and truth of PPO and best of N, and the mitigations."""
    figure, axes = plt.subplots(len(found), 3, figsize=(15, 4 * len(found)), squeeze=False,
                                layout="constrained")
    for (left, middle, right), (seed, of_seed) in zip(axes, found.items()):
        draw_proxy_and_truth(left, of_seed["curves"]["no mitigation"], f"seed {seed}: PPO{mark}")
        draw_proxy_and_truth(middle, of_seed["best of N"], f"seed {seed}: best of N{mark}")
        draw_mitigations(right, of_seed, f"seed {seed}: mitigations{mark}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    save(figure, file)


def row_of(seed: str, of_seed: dict) -> str:
    turned = of_seed["turn"]
    cells = [seed, f"{of_seed['accuracy']:.1%}", f"{turned['peak']:.3f}",
             f"{turned['peak_kl']:.1f}", f"{turned['fall']:.3f}", f"{turned['errors']:.1f}"]
    for name in MITIGATIONS:
        cells.append(f"{of_seed['ends'][name]['truth']:.3f}")
    return f"| {' | '.join(cells)} |"


def table(found: dict[str, dict], cfg: Config) -> str:
    """results/overoptimization.md: the turn, the mitigations, and what hacking looks like."""
    head = ["seed", "proxy's accuracy", "peak", "at KL", "fall", "standard errors", *MITIGATIONS]
    mark = " (quick)" if cfg.quick else ""
    lines = [f"# Over-optimisation{mark}", "",
             f"`python experiments/overoptimization.py`: proxies of {cfg.n_pairs:,} pairs, labels "
             f"wrong: {cfg.label_noise:.0%}; {cfg.steps} steps of PPO. Under the "
             "names of the mitigations: true reward of the final policy, sampled answers to 500 "
             "held-out prompts (standard error about .01).", "",
             f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row_of(seed, of_seed) for seed, of_seed in found.items()]
    lines += ["", "Best of N, its KL measured and at most, nats per response:", "",
              "| seed | N | KL | at most | proxy | true reward |", "|---" * 6 + "|"]
    for seed, of_seed in found.items():
        for of_n in of_seed["best of N"]:
            lines.append(f"| {seed} | {of_n['n']} | {of_n['kl']:.2f} | {of_n['bound']:.2f} | "
                         f"{of_n['proxy']:.2f} | {of_n['truth']:.3f} |")
    lines += ["", "What the policies say, by how far they went:", ""]
    for seed, of_seed in found.items():
        for name in SHOWN:
            end = of_seed["ends"][name]
            lines.append(f"- seed {seed}, {name}: {end['words']:.1f} words, "
                         f"{end['distinct_2']:.2f} of the word pairs distinct, "
                         f"{end['repeated_words']:.1f} words repeated")
    first = next(iter(found.values()))["ends"]
    for number, prompt in enumerate(first["SFT"]["prompts"]):
        lines += ["", f"**{prompt}**", ""]
        for name in SHOWN:
            lines.append(f"- {name}: {first[name]['answers'][number] or '(never ended)'}")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict:
    if cfg.quick:
        cfg.seeds = cfg.seeds.split(",")[0]
        cfg.steps //= 3
    found = {}
    for seed in cfg.seeds.split(","):
        base = base_models(int(seed))
        out = seed_folder(cfg, seed)
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
    draw(found, Path(cfg.figure), " (quick)" if cfg.quick else "")
    keep(Path(cfg.figure).with_suffix(".md"), table(found, cfg))
    return found


if __name__ == "__main__":
    command_line(main, Config, __doc__)
