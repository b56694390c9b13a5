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


def compile_for(cases: dict[int, list[str]], cache: Path) -> list[dict]:
    """What compile_kernels.py prints for the cases of each architecture, compiled side by side."""
    running = [subprocess.Popen([sys.executable, TOOL, str(arch), *names], text=True, cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "TRITON_CACHE_DIR": str(cache / str(arch))})
               for arch, names in cases.items()]
    printed = [process.communicate() for process in running]
    for process, (_, stderr) in zip(running, printed):
        assert process.returncode == 0, stderr[-3000:]
    return [json.loads(line) for stdout, _ in printed for line in stdout.splitlines()]


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


def test_kernels_compile_without_spills_and_fit_into_shared_memory(tmp_path):
    """bfloat16 for both architectures, fp32 for the one with less shared memory."""
    cases = [case for case in all_cases() if "slow" not in case and not case.endswith("-float16")]
    in_bfloat16 = [case for case in cases if case.endswith("-bfloat16")]
    found = compile_for({80: cases, 90: in_bfloat16}, tmp_path)
    for arch, names in ((80, cases), (90, in_bfloat16)):
        assert {kernel["case"] for kernel in found if kernel["arch"] == arch} == set(names)
    for kernel in found:
        assert_fits(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("archs", [[80, 90], [86, 89]])
def test_all_kernels_compile_in_all_precisions_for_all_architectures(archs, tmp_path):
    for kernel in compile_for(dict.fromkeys(archs, all_cases()), tmp_path):
        assert_fits(kernel)
