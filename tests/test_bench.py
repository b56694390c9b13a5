"""The benchmarks compare like with like: all contenders compute the same."""
import json
import math

import pytest
import torch

import bench
import bench_kernels
import training


def made(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("op", bench_kernels.CASES)
def test_all_contenders_of_a_kernel_compute_the_same(op):
    torch.manual_seed(0)
    for case in bench_kernels.CASES[op](made, big=False):
        assert len(case.contenders) > 1 and next(iter(case.contenders)) == "lifecycle"
        results = {name: call(*case.inputs) for name, call in case.contenders.items()
                   if name != "dense"}                             # nf4's is not quantized
        for result in results.values():
            for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,)
                                      for x in (results["lifecycle"], result)), strict=True):
                error = (ours - theirs.view(ours.shape)).abs().max() / ours.abs().max()
                assert error < 1e-4


def test_a_table_row_counts_from_the_measured_time(tmp_path, capsys):
    cfg = training.parse(bench_kernels.Config, ["--ops", "swiglu", "--repeats", "2", "--dtype",
                                                "float32", "--device", "cpu", "--out",
                                                str(tmp_path / "table.md")])
    rows = bench_kernels.main(cfg)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert printed == rows and [row["pass"] for row in rows] == ["forward", "both"]
    moved = 3 * 4 * 2048 * 1024                            # gate, up and y, in fp32
    assert rows[0]["rate"] == pytest.approx(moved / (rows[0]["ms"] / 1e3) / 1e12)
    assert (tmp_path / "table.md").read_text().count("| swiglu |") == 2


def test_an_unknown_operation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="--ops swigli: give norm, swiglu"):
        bench_kernels.main(bench_kernels.Config(ops="swigli"))


@pytest.mark.parametrize("contender", [bench.NanoGPT, bench.MiniMind, bench.NanoChat])
def test_a_contender_starts_at_log_v_and_all_of_it_learns(contender):
    torch.manual_seed(0)
    cfg = bench.Config(d_model=32, n_layers=2, n_heads=4, vocab_size=100, context_length=16)
    model, tokens = contender(cfg), torch.randint(100, (4, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(100), rel=0.03)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_tokenizer_is_timed_on_the_text_that_was_asked_for(tmp_path):
    (tmp_path / "book.txt").write_text("the cat sat on the mat\n" * 400)
    cfg = bench.Config(data=str(tmp_path / "book.txt"), vocab_size=280)
    row = bench.tokenizer_row(cfg, "lifecycle", "eager")
    assert row["mb_per_s"] * row["seconds"] == pytest.approx(23 * 400 / 1e6)
