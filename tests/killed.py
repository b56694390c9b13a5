"""Run train_pretrain.py whole, and again while killing it at random moments, on one rank or two.

    python tests/killed.py FOLDER RANKS KILLS STEPS

Writes FOLDER/straight, the run that nothing stops, and FOLDER/killed. Prints how each attempt
ended: -9 where it was killed, 0 for the last. Processes are forked, so that torch is imported once.
Of several ranks, two more attempts come first, under torchrun: in one rank 0 is killed, in one
torchrun is told to stop.
"""
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_runs import free_port, make_runs_quick, tiny_run, wait_for_rows, write_corpus

import train_pretrain
from plumbing.curves import read_metrics
from plumbing.options import flat

ROOT = Path(train_pretrain.__file__).parent
FILES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")


def die_at_file(moment: int, out: str) -> None:
    """Kill this process right before the moment-th thing it does to a file of the run."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event in FILES or event == "open" and out in str(args[0]):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)


def attempt(cfg, ranks: int, die) -> int:
    """Run all ranks to the end, or until rank 0 is dead, which all others then are. die(pid) is
    called with 0 in rank 0 before it starts, and with its process id here. Returns rank 0's end."""
    port = free_port()
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[rank] == 0:
            try:
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks),
                                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if rank == 0:
                    die(0)
                train_pretrain.main(cfg)
                os._exit(0)
            finally:
                os._exit(1)
    die(pids[0])
    end = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
    for pid in pids[1:]:
        if end:
            os.kill(pid, signal.SIGKILL)
        end = end or os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return end


def under_torchrun(cfg, ranks: int, signum: int) -> int:
    """Three rows later SIGKILL goes to rank 0, or SIGTERM to torchrun, which hands it on. Returns
    torchrun's end."""
    options = [f"--{name}={value}" for name, value in flat(cfg).items()]
    rows = len(read_metrics(cfg.out)) + 3
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
         "--master_port", str(free_port()), str(ROOT / "train_pretrain.py"), *options])
    wait_for_rows(cfg.out, rows, process)
    pid = process.pid
    if signum == signal.SIGKILL:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pid = min(int(child) for child in children)
    os.kill(pid, signum)
    return process.wait(timeout=100)


def main(out: Path, ranks: int, kills: int, steps: int) -> None:
    make_runs_quick()
    torch.optim.SGD([torch.zeros(1)])          # imports half of torch: once, not in each attempt
    cfg = tiny_run(out / "straight", write_corpus(out), n_layers=1, batch_size=2, steps=steps,
                   log_every=2, save_every=1)
    assert attempt(cfg, ranks, lambda pid: None) == 0
    cfg = replace(cfg, out=str(out / "killed"), resume=True)
    if ranks > 1:
        for signum in (signal.SIGKILL, signal.SIGTERM):
            print(under_torchrun(cfg, ranks, signum), flush=True)
    chance = random.Random(ranks)
    for number in range(kills):
        moment = chance.randint(1, 60)
        seconds = chance.uniform(0.05, 0.5)

        def die(pid, by_file=number % 3 > 0, moment=moment, seconds=seconds):
            if by_file and pid == 0:
                die_at_file(moment, cfg.out)
            elif not by_file and pid:
                time.sleep(seconds)
                os.kill(pid, signal.SIGKILL)
        print(attempt(cfg, ranks, die), flush=True)
    print(attempt(cfg, ranks, lambda pid: None))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
