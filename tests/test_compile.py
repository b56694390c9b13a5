"""What the kernels take of a GPU, from compiling them for one that need not be there."""
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tests" / "compile_kernels.py"
DOTS = ("forward_kernel", "dq_kernel", "dk_dv_kernel", "decode_kernel", "gate_up_kernel",
        "rows_kernel", "hidden_backward_kernel", "weight_gradient_kernel")     # on tensor cores
if not kernels.launch.INSTALLED or sys.platform != "linux":
    pytest.skip("triton is not installed", allow_module_level=True)


def printed(file: Path) -> list[dict]:
    """What compile_kernels.py says of each kernel."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_fits(kernel: dict) -> None:
    assert kernel["spills"] == 0, kernel
    assert kernel["shared"] <= kernel["limit"], kernel
    if kernel["dtype"] != "float32" and kernel["kernel"] in DOTS:
        assert kernel["mma"] > 0, kernel


@pytest.mark.parametrize("job, dtypes", [("compile_80", {"float32"}),
                                         ("compile_90", {"bfloat16"})])
def test_kernels_compile_without_spills_and_fit_into_shared_memory(background, job, dtypes):
    """fp32, which takes the most of it, where there is less; bfloat16 where there is more."""
    found = printed(background(job) / "stdout")
    cases = {"small", "cross_entropy", "moe", "nf4", "attention"}
    assert {(kernel["case"], kernel["dtype"]) for kernel in found} == set(product(cases, dtypes))
    for kernel in found:
        assert_fits(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("archs", [[80, 90], [86, 89]])
def test_all_kernels_compile_in_all_precisions_for_all_architectures(archs, tmp_path):
    running = []
    for arch in archs:
        with open(tmp_path / str(arch), "w") as file:
            running.append(subprocess.Popen(
                [sys.executable, TOOL, str(arch)], stdout=file, cwd=ROOT,
                env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / f"cache_{arch}")}))
    for process, arch in zip(running, archs):
        assert process.wait() == 0
        for kernel in printed(tmp_path / str(arch)):
            assert_fits(kernel)
