"""
Does the main job hold? lifecycle.py with three seeds, in bf16 and in fp32 as on a processor without
AVX512, and the worst of the six of every figure: what README.md may promise.

    python experiments/main_job.py                     # two hours on two cores; results/main_job.md
    python experiments/main_job.py --seeds 3,4 --table out/other_seeds.md

Each run is a process of its own in out/main_job/SEED_DTYPE and goes on where it was stopped.
"""
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.curves import read_metrics
from plumbing.options import command_line
from report import gain_shares

ROOT = Path(__file__).resolve().parents[1]
# PyTorch, oneDNN and MKL then take the kernels that they have for AVX2.
WITHOUT_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                  "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ENVIRONMENTS = {"bfloat16": {}, "float32": WITHOUT_AVX512}
POLICIES = ("sft", "dpo", "ppo")


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, weights, batches and samples
    dtypes: str = "bfloat16,float32"  # float32 runs as on a processor that has AVX2 alone
    out: str = "out/main_job"         # folder for the models
    table: str = "results/main_job.md"   # the table


def run(seed: str, dtype: str, out: Path) -> dict:
    """The figures of one run by their names in the table; it is made unless it is there."""
    environment = os.environ | ENVIRONMENTS[dtype]

    def call(*command: str) -> str:
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True,
                              stdout=subprocess.PIPE, text=True).stdout

    call("lifecycle.py", "--seed", seed, "--dtype", dtype, "--out", str(out))
    figures = figures_of(json.loads((out / "report.json").read_text()))
    # About 300 questions of each family, which the report's exam is too small for.
    exam = out / "sft_exam.json"
    exam.unlink(missing_ok=True)               # of this script, from before it was stopped
    call("evaluate.py", "--init", str(out / "sft"), "--data", f"world:{seed}", "--dtype", dtype,
         "--n_tasks", "5400", "--n", "1", "--json", str(exam))
    families = json.loads(exam.read_text())["families"]
    figures["sft: weakest family of 300 questions"] = min(families.values())
    figures["sft: families never tuned on"] = read_metrics(out / "sft")[-1]["unseen_families"]
    for name in POLICIES:
        talk = call("-m", "tests.first_contact", "--init", str(out / name), "--seed", seed)
        figures[f"{name}: first contact, of 30"] = int(re.search(r"(\d+) of 30", talk)[1])
    return figures


def figures_of(report: dict) -> dict[str, float]:
    """What a report says, by the names of the table's rows."""
    stages = report["stages"]
    sft = stages["sft"]
    rm = stages["rm"]
    figures = {"minutes": report["minutes"], "sft: accuracy": sft["accuracy"],
               "rm: accuracy": rm["accuracy"],
               "rm: points over log p": rm["accuracy"] - rm["likelihood_accuracy"],
               "chosen: true reward": stages["chosen"]["true_reward"]}
    for name in ("dpo", "ppo"):
        stage = stages[name]
        # A run that gained nothing has no shares, and is the worst by all other rows.
        shares = gain_shares(sft, stage) or {"courteous": 0.0}
        figures |= {f"{name}: true reward": stage["true_reward"],
                    f"{name}: wins over sft": stage["win_rate"],
                    f"{name}: wins, courtesies taken out": stage["plain_win_rate"],
                    f"{name}: accuracy over sft's": stage["accuracy"] - sft["accuracy"],
                    f"{name}: right becomes wrong": stage["right_to_wrong"],
                    f"{name}: words more": stage["longer"],
                    f"{name}: largest part of the gain": max(shares.values()),
                    f"{name}: courtesy's part of the gain": shares["courteous"]}
        for fault, share in stage["manners"].items():
            more = share - sft["manners"][fault]
            figures[f"{name}: {fault.replace('_', ' ')}, over sft's"] = more
    return figures


def table_of(runs: dict[str, dict]) -> str:
    """Markdown: a row a figure, a column a run, and the worst of them."""
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    lines = ["# The main job, run by run", "",
             f"`python experiments/main_job.py`, {len(runs)} runs (seed, dtype), OpenMP threads: "
             f"{threads}; float32 as on a processor without AVX512.", "",
             "| | " + " | ".join(runs) + " | worst |", "|---" * (len(runs) + 2) + "|"]
    for name in next(iter(runs.values())):
        values = [figures[name] for figures in runs.values()]
        worst = max(values) if is_cost(name) else min(values)
        cells = [shown(value) for value in (*values, worst)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def is_cost(name: str) -> bool:
    """Whether more of it is worse."""
    costs = ("minutes", "right becomes wrong", "words more", "part of the gain", ", over sft's")
    return any(cost in name for cost in costs)


def shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def main(cfg: Config) -> None:
    runs = {}
    for seed in cfg.seeds.split(","):
        for dtype in cfg.dtypes.split(","):
            runs[f"{seed} {dtype}"] = run(seed, dtype, Path(cfg.out) / f"{seed}_{dtype}")
            # After each run, because the next may take a quarter of an hour.
            Path(cfg.table).write_text(table_of(runs))
    print(Path(cfg.table).read_text())


if __name__ == "__main__":
    command_line(main, Config, __doc__)
