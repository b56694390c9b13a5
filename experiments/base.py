"""What the experiments on alignment start from: the lifecycle's own base model, SFT model and
reward model, one of each for a seed, in out/exp_base/SEED, made once for all experiments.

    python experiments/base.py --seeds 0,1,2               # a quarter of an hour each, on two cores
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lifecycle
from plumbing.options import build, command_line

BASE = Path("out/exp_base")
MADE = ("pretrain", "sft", "rm")


@dataclass
class Config:
    seeds: str = "0,1,2"              # of world, weights and batches


def base_models(seed: int) -> Path:
    """The folder with the models of a seed, pretrain, sft and rm, which are made if they are not
    there."""
    out = BASE / str(seed)
    plan = lifecycle.stages(lifecycle.Config(seed=seed, out=str(out)))
    for name in MADE:
        lifecycle.run_stage(*plan[name])
    return out


def run(script, **options) -> dict:
    """A stage of an experiment: skipped if it is finished, gone on with if it was stopped."""
    return lifecycle.run_stage(script.main, build(script.Config, options))


def main(cfg: Config) -> None:
    for seed in cfg.seeds.split(","):
        print(base_models(int(seed)))


if __name__ == "__main__":
    command_line(main, Config, __doc__)
