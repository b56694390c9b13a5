"""What the kernels take of a GPU, from compiling them for one that need not be there."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tests" / "compile_kernels.py"
DOTS = ("forward_kernel", "dq_kernel", "dk_dv_kernel", "decode_kernel", "gate_up_kernel",
        "rows_kernel", "hidden_backward_kernel", "weight_gradient_kernel")     # on tensor cores
if not kernels.launch.INSTALLED or sys.platform != "linux":
    pytest.skip("triton is not installed", allow_module_level=True)


def compile_for(arch: int, cache: Path, cases: list[str]) -> list[dict]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, TOOL, str(arch), *cases], capture_output=True, text=True,
                          env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def all_cases() -> list[str]:
    code = "import compile_kernels; print(*compile_kernels.CASES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=TOOL.parent)
    return done.stdout.split()


def assert_fits(kernel: dict) -> None:
    assert kernel["spills"] == 0, kernel
    assert kernel["shared"] <= kernel["limit"], kernel
    if "float32" not in kernel["case"] and kernel["kernel"] in DOTS:
        assert kernel["mma"] > 0, kernel


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills_and_fit_into_shared_memory(arch, tmp_path):
    cases = [case for case in all_cases() if "slow" not in case and not case.endswith("-float16")]
    found = compile_for(arch, tmp_path, cases)
    assert {kernel["case"] for kernel in found} == set(cases)
    for kernel in found:
        assert_fits(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_all_kernels_compile_in_all_precisions_for_all_architectures(arch, tmp_path):
    for kernel in compile_for(arch, tmp_path, all_cases()):
        assert_fits(kernel)
