"""Run train_pretrain.py whole, and again while killing it at random moments, on one rank or more.

    python tests/killed.py '{"data": ..., "out": ..., ...}' RANKS KILLS

Writes OUT/straight, the run that nothing stops, and OUT/killed. Prints how each attempt ended: -9
where it was killed, 0 for the last. Processes are forked, so that torch is imported once.
"""
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_runs import make_runs_quick

import train_pretrain
from plumbing.options import build

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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
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


def main(options: dict, ranks: int, kills: int) -> None:
    make_runs_quick()
    torch.optim.SGD([torch.zeros(1)])          # imports half of torch: once, not in each attempt
    out = Path(options.pop("out"))
    cfg = build(train_pretrain.Config, options | {"out": str(out / "straight")})
    assert attempt(cfg, ranks, lambda pid: None) == 0
    cfg = replace(cfg, out=str(out / "killed"), resume=True)
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
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
