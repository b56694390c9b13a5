"""Runs of a tenth of a second that several tests start, and how two of them are compared."""
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import corpus
import train_pretrain
from plumbing import forecast, run
from plumbing.curves import read_metrics
from plumbing.options import Options, build

ARITHMETIC = "".join(f"{i} bears and {j} bears are {i + j} bears.\n"
                     for i in range(8) for j in range(9))


def make_runs_quick() -> None:
    """Leave out of every run in this process: three quarters of a tiny run's time, none of it in
    what it computes. test_curves.py draws a picture, test_forecast.py measures the peak."""
    measure = forecast.matmul_peak
    forecast.matmul_peak = lambda device, dtype, n=0: measure(device, dtype, n) if n else 1e11
    run.pick_threads = lambda device: ""       # a busy machine must not decide what tests compute
    run.plot_curves = lambda *args: None
    os.fsync = lambda descriptor: None         # no test cuts the power
    run.gc = SimpleNamespace(collect=lambda: None, freeze=lambda: None)


@dataclass
class Config(Options):
    """The options of a stage without data."""
    out: str = "out/x"                # model folder to write
    steps: int = 8                    # optimizer steps
    device: str = "cpu"               # of every test
    dtype: str = "float32"            # of every test
    log_every: int = 1                # steps between rows of metrics.jsonl
    save_every: int = 1               # steps between checkpoints


def start(tmp_path: Path, **options) -> run.Run:
    """A run of no stage in particular, in tmp_path/out."""
    return run.start(Config(out=str(tmp_path / "out"), **options), "train_test.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def under_torchrun(ranks: int, *command: str) -> None:
    """Run a script with its arguments on so many ranks, to the end."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                    "--master_port", str(free_port()), *command],
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=500)


def write_corpus(tmp_path: Path) -> Path:
    """2,000 bytes: 72 lines of arithmetic, of which a tiny model learns the shape at once."""
    file = tmp_path / "corpus.txt"
    file.write_text(ARITHMETIC)
    return file


def tiny_run(out, corpus, **options) -> train_pretrain.Config:
    """12 steps of train_pretrain: two blocks of width 16 over bytes, a tenth of a second."""
    return build(train_pretrain.Config, {
        "out": str(out), "data": str(corpus), "tokenizer": "bytes", "d_model": 16, "n_layers": 2,
        "n_heads": 2, "context_length": 32, "steps": 12, "batch_size": 4, "warmup": 3,
        "log_every": 4, "eval_every": 5, "eval_windows": 4, "save_every": 5, "device": "cpu",
        "dtype": "float32"} | options)


def prepared(cfg, init=None) -> SimpleNamespace:
    """What train_pretrain.py's step 1 makes of the corpora, on one rank. init: --init's
    tokenizer."""
    texts = corpus.read_texts(cfg)
    texts, n_duplicates = corpus.drop_duplicates(texts)
    texts, n_empty = corpus.drop_empty(texts)
    tokenizer = corpus.pick_tokenizer(cfg, texts, init, Path(cfg.out))
    ids = corpus.tokenize(texts, tokenizer)
    streams = corpus.concatenate(ids, texts, tokenizer) | corpus.open_shards(cfg, tokenizer)
    windows = corpus.cut(streams, cfg, cfg.context_length, tokenizer.endoftext)
    here = SimpleNamespace(device="cpu", replica=0, replicas=1)
    train = corpus.TrainingData(windows, cfg, here, n_words=len(tokenizer.ranks))
    return SimpleNamespace(texts=texts, n_duplicates=n_duplicates, n_empty=n_empty,
                           tokenizer=tokenizer, streams=streams, windows=windows, train=train)


def wait_for_rows(out, n, process) -> None:
    deadline = time.monotonic() + 200
    while len(read_metrics(out)) < n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def metrics(out) -> list[dict]:
    """Every row without the figures that the machine decides."""
    rows = read_metrics(out)
    assert rows
    for row in rows:
        assert row.pop("tokens_per_s") > 0
        for name in ("mfu", "memory_gb"):
            assert row.pop(name, 1) > 0                    # where PPO samples there is no MFU
    return rows


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs have logged the same figures and ended with the same weights."""
    weights = [(folder / "model.safetensors").read_bytes() for folder in (a, b)]
    return metrics(a) == metrics(b) and weights[0] == weights[1]
