"""Tests find the scripts and run them quickly; without a GPU Triton runs interpreted. What takes
long in processes of its own is started first, on the second core, and looked at last."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"       # read when kernels are defined, so only for these:
    import kernels
    if kernels.launch.INSTALLED:
        import triton.experimental.gluon  # noqa: F401
    del os.environ["TRITON_INTERPRET"]         # what the tests start is to run as users run it

from tiny_runs import make_runs_quick  # noqa: E402  (after the lines above, which kernels must see)

make_runs_quick()
torch.set_num_threads(1)                       # two wait for each other beside a busy core

JOBS = {                                       # name: the tests that wait for it, its command
    "compile_80": ("test_compile", ["compile_kernels.py", "80", "float32"]),
    "compile_90": ("test_compile", ["compile_kernels.py", "90", "bfloat16"]),
    "killed_1": ("test_killed", ["killed.py", ".", "1", "6", "140"]),
    "killed_2": ("test_killed", ["killed.py", ".", "2", "4", "70"]),
    "stages": ("test_killed", ["stages.py", ".", "pretrain", "ppo"]),
    "parallel_runs": ("test_parallel", ["parallel_runs.py", "."])}


def pytest_collection_modifyitems(items):
    """Tests that wait for a job go to the end."""
    waiting = [file for file, _ in JOBS.values()]
    items.sort(key=lambda item: item.path.stem in waiting)


def step_aside():
    """The first core is for the tests of this process."""
    os.nice(10)
    if hasattr(os, "sched_setaffinity"):       # macOS has no such thing
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[1:] or cores)


def run_job(folder, script, *arguments):
    environment = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as errors:
        done = subprocess.run([sys.executable, TESTS / script, *arguments], cwd=folder, stdout=out,
                              stderr=errors, env=os.environ | environment, preexec_fn=step_aside)
    assert done.returncode == 0, (folder / "stderr").read_text()[-3000:]
    return folder


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """Runs the jobs that tests of this session wait for, one after the other, each in a folder.

    Returns wait(name) -> that folder when the job has ended; its files stdout and stderr are there.
    """
    wanted = {item.path.stem for item in request.session.items}
    with ThreadPoolExecutor(1) as pool:
        jobs = {}
        for name, (file, command) in JOBS.items():
            if file in wanted:
                jobs[name] = pool.submit(run_job, tmp_path_factory.mktemp(name), *command)
        yield lambda name: jobs[name].result()
        pool.shutdown(cancel_futures=True)
