"""parallel.py: ranks under torchrun train as one process does with the same global batch.

Tolerances: sums of fp32 numbers in another order differ by 1e-7 of them. In these few steps losses
and gradient norms stay within 1e-5, and weights within 1e-4, a fortieth of one step at --lr 4e-3
(AdamW divides by the gradient, of which near zero nothing but rounding may be left).
"""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import parallel_runs
import pytest
import safetensors.torch
import torch
from parallel_runs import BOTH, DIVIDED, MODELS, OTHERS

import parallel
import train_pretrain
from model import ModelConfig, Transformer
from plumbing.checkpoints import newest_checkpoint, read_checkpoint, read_meta
from plumbing.curves import read_metrics
from plumbing.options import build


@pytest.fixture(scope="module")
def out(background) -> Path:
    """The folder of parallel_runs.py, when all of its runs have ended."""
    return background("parallel_runs")


@pytest.fixture(scope="module")
def slow_out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("parallel")
    parallel_runs.main(out, list(parallel_runs.BOTH))
    return out


def same_to_rounding(a: Path, b: Path) -> None:
    rows = [read_metrics(folder) for folder in (a, b)]
    assert len(rows[0]) == 5 and all(math.isfinite(row["loss"]) for row in rows[0])
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"tokens", "tokens_per_s", "mfu", "memory_gb"}:   # rank 0's
            assert other[name] == pytest.approx(one[name], rel=1e-5), (name, one, other)
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_ranks_train_as_one_process_with_the_same_global_batch(out, name, shard):
    same_to_rounding(out / name, out / f"{name}_{shard}")


@pytest.mark.parametrize("method", parallel_runs.GRPO)
def test_two_ranks_align_a_policy_as_one_process_with_twice_the_prompts(out, method):
    rows = [read_metrics(out / name) for name in (method, f"{method}_none")]
    for one, other in zip(*rows, strict=True):
        for name in ("loss", "reward", "kl", "grad_norm", "response_tokens"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (name, one, other)
    weights = [safetensors.torch.load_file(out / name / "model.safetensors")
               for name in (method, f"{method}_none")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_sharded_ranks_train_as_ranks_with_all_the_weights(out, name):
    same_to_rounding(out / f"{name}_none", out / f"{name}_fsdp")


@pytest.mark.parametrize("one, four", [("muon", "four_none"), ("muon", "four"),
                                       ("quarters", "quarters_divided")])
def test_four_ranks_train_as_one_process(out, one, four):
    """Under DDP, FSDP, and with a quarter of each matrix."""
    same_to_rounding(out / one, out / four)


@pytest.mark.parametrize("name", DIVIDED)
def test_two_ranks_that_divide_each_matrix_train_as_one_process(out, name):
    """The same batch on both: heads, channels, experts and words of the vocabulary are shared."""
    same_to_rounding(out / name, out / f"{name}_divided")


def test_two_groups_of_two_ranks_train_as_one_process(out):
    """Each group divides the matrices and reads half the batch; FSDP shares what is left."""
    same_to_rounding(out / "even", out / "even_both")


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_two_groups_of_two_ranks_train_as_two_whole_processes_or_one(slow_out, name):
    same_to_rounding(slow_out / BOTH[name], slow_out / f"{name}_both")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_divided_run_goes_on_whole_and_divided_otherwise(out, ranks):
    same_to_rounding(out / "even", out / f"redivided_{ranks}")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_stopped_on_two_sharded_ranks_goes_on_on_another_number_of_them(out, ranks):
    """Between two rows, the later of which has what both ranks had seen; on 1, without shards."""
    same_to_rounding(out / "muon", out / f"resumed_{ranks}")


def test_on_the_same_number_of_them_it_goes_on_bit_for_bit(out):
    straight, resumed = (out / name / "model.safetensors" for name in ("muon_fsdp", "stopped_2"))
    assert straight.read_bytes() == resumed.read_bytes()
    assert (resumed.parent / "checkpoints" / "step_000005").exists()


def test_each_rank_holds_its_share_of_the_weights_and_of_the_optimizers_state(out):
    for folder, ranks, shared in (("muon_fsdp", 2, True), ("adamw_fsdp", 2, True),
                                  ("four", 4, True), ("resumed_4", 4, True),
                                  ("muon_none", 2, False)):
        held, all_of_it = zip(*(json.loads((out / folder / f"held_{rank}_of_{ranks}.json")
                                           .read_text()) for rank in range(ranks)))
        if shared:                                   # of 10 rows four ranks have 3, 3, 3 and 1
            assert sum(held) == all_of_it[0] and max(held) < 1.05 * sum(held) / ranks
        else:
            assert held == all_of_it


def test_of_divided_matrices_each_rank_holds_its_part(out):
    """All but the norms and the shift, which are 1 % here and whole in each group."""
    for folder, ranks in (("even_divided", 2), ("redivided_4", 4)):
        for rank in range(ranks):
            held, all_of_it = json.loads((out / folder / f"held_{rank}_of_{ranks}.json")
                                         .read_text())
            assert all_of_it / ranks <= held < 1.06 * all_of_it / ranks


@pytest.mark.parametrize("name, ranks", [("muon_fsdp", 2), ("even_divided", 2), ("even_both", 4)])
def test_each_rank_writes_its_own_part_of_a_checkpoint(out, name, ranks, tmp_path):
    [folder] = (out / name / "checkpoints").iterdir()
    assert not (folder / "model.safetensors").exists()
    sizes = [(folder / f"__{rank}_0.distcp").stat().st_size for rank in range(ranks)]
    assert max(sizes) < 1.25 * sum(sizes) / ranks, sizes
    read_checkpoint(folder)
    damaged = Path(shutil.copytree(folder, tmp_path / folder.name)) / f"__{ranks - 1}_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"__{ranks - 1}_0.distcp is damaged"):
        read_checkpoint(damaged.parent)


@pytest.mark.parametrize("other, named", [({"d_model": 24}, "its model is not the one of this run"),
                                          ({"n_layers": 3}, "its model is not the one"),
                                          ({"optimizer": "adamw"}, "its optimizer is not the one")])
def test_a_checkpoint_of_another_run_is_refused(out, other, named, tmp_path):
    folder = Path(shutil.copytree(out / "stopped", tmp_path / "stopped"))
    config = read_meta(newest_checkpoint(folder))["config"]
    config |= {"out": str(folder), "shard": "none", "resume": True} | other
    with pytest.raises(ValueError, match=named):
        train_pretrain.main(build(train_pretrain.Config, config))


def test_a_full_disk_under_one_rank_is_said_by_all_and_leaves_nothing_half_written(out):
    for rank in range(2):
        assert "step_000002.tmp: no space left on the disk" in (out / f"full{rank}").read_text()
    assert list((out / "full" / "checkpoints").iterdir()) == []


def test_a_nan_on_one_rank_is_skipped_by_all(out):
    rows = read_metrics(out / "skips")
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 1, 1]
    assert all(weight.isfinite().all() for weight in
               safetensors.torch.load_file(out / "skips" / "model.safetensors").values())


@pytest.mark.parametrize("options, dtype, named", [
    ({"shard": "ddp"}, torch.float32, "--shard ddp: give none or fsdp"),
    ({}, torch.float32, "--shard fsdp shares .* start it by torchrun"),
    ({"shard": "none", "tensor_parallel": 2}, torch.float32, "--tensor_parallel 2 .* by torchrun"),
    ({"ranks": 4, "tensor_parallel": 3}, torch.float32, "3 on 4 ranks: it must divide"),
    ({"ranks": 4, "tensor_parallel": 0}, torch.float32, "0 on 4 ranks: it must divide"),
    ({"ranks": 4, "shard": "none", "tensor_parallel": 2}, torch.float32,
     "makes 2 groups of them; give --shard fsdp as well"),
    ({"ranks": 2}, torch.float16, "with float16: .* give --dtype bfloat16 or float32"),
    ({"ranks": 2, "compile": True}, torch.float32, "does not go with --compile"),
    ({"ranks": 2, "adapters": SimpleNamespace(peft="lora")}, torch.float32,
     "does not go with --peft lora")])
def test_what_cannot_be_sharded_is_refused(monkeypatch, options, dtype, named):
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: "ranks" in options)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: options["ranks"])
    cfg = SimpleNamespace(**{"shard": "fsdp", "compile": False} | options)
    with pytest.raises(ValueError, match=named):
        parallel.check(cfg, dtype)
    parallel.check(SimpleNamespace(**vars(cfg) | {"shard": "none", "tensor_parallel": 1}), dtype)


@pytest.mark.parametrize("sizes, named", [
    ({"n_heads": 3, "d_model": 12}, "2 ranks cannot share n_heads 3 evenly"),
    ({"n_kv_heads": 1}, "2 ranks cannot share n_kv_heads 1"),
    ({"vocab_size": 31}, "2 ranks cannot share vocab_size 31"),
    ({"n_experts": 3}, "2 ranks cannot share n_experts 3"),
    ({}, "3 ranks cannot share d_model 16")])
def test_sizes_that_ranks_cannot_divide_are_refused(sizes, named):
    config = ModelConfig(**{"vocab_size": 30, "n_layers": 1, "n_heads": 4, "d_model": 16,
                            "d_ff": 32} | sizes)
    with pytest.raises(ValueError, match=named):
        parallel.divide(Transformer(config), SimpleNamespace(size=lambda: 2), groups=3)
