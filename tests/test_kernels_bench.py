"""The benchmark of the kernels compares like with like: all contenders compute the same."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import bench

ROOT = Path(__file__).resolve().parents[1]


def made(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("op", bench.CASES)
def test_all_contenders_of_a_kernel_compute_the_same(op):
    torch.manual_seed(0)
    for case in bench.CASES[op](made, big=False):
        assert len(case.contenders) > 1 and next(iter(case.contenders)) == "lifecycle"
        results = {name: call(*case.inputs) for name, call in case.contenders.items()
                   if name != "dense"}                             # nf4's is not quantized
        for result in results.values():
            for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,)
                                      for x in (results["lifecycle"], result)), strict=True):
                error = (ours - theirs.view(ours.shape)).abs().max() / ours.abs().max()
                assert error < 1e-4


def test_a_table_row_counts_from_the_measured_time(tmp_path, capsys):
    options = bench.parse(["--ops", "swiglu", "--repeats", "2", "--dtype", "float32",
                           "--device", "cpu", "--out", str(tmp_path / "table.md")])
    rows = bench.main(options)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert printed == rows and [row["pass"] for row in rows] == ["forward", "both"]
    moved = 3 * 4 * 2048 * 1024                            # gate, up and y, in fp32
    assert rows[0]["rate"] == pytest.approx(moved / (rows[0]["ms"] / 1e3) / 1e12)
    assert (tmp_path / "table.md").read_text().count("| swiglu |") == 2


def test_an_unknown_operation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="--ops swigli: give norm, swiglu"):
        bench.main(bench.parse(["--ops", "swigli"]))


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return set(done.stdout.split())


def test_it_imports_nothing_of_the_project_but_the_kernels():
    project = {path.stem for path in ROOT.glob("*.py")}
    project |= {path.name for path in ROOT.iterdir() if path.is_dir()}
    loaded = {name.split(".")[0] for name in modules_after("import kernels.bench")}
    assert loaded & project == {"kernels"}


def test_the_kernels_do_not_import_their_benchmark():
    assert "kernels.bench" not in modules_after("import kernels")
