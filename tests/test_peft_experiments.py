"""experiments/peft_comparison.py, lora_rank.py, nf4.py: what they compute, options they name."""
import pytest
import torch

import kernels
import train_sft
from experiments import lora_rank, nf4, peft_comparison
from plumbing.options import build


@pytest.mark.parametrize("double", [True, False])
def test_the_nf4_of_the_experiment_is_that_of_the_kernel(double):
    weight = torch.randn(70, 200, generator=torch.Generator().manual_seed(0))
    expected = kernels.dequantize_nf4_reference(kernels.quantize_nf4(weight, double), torch.float32)
    torch.testing.assert_close(nf4.rounded(weight, nf4.CODES["nf4"], double), expected)


def test_int4_rounds_to_sevenths_of_the_largest():
    weight = torch.tensor([[7.0, 1.4, -2.6, 0.4]])
    found = nf4.rounded(weight, nf4.CODES["int4"], False)
    torch.testing.assert_close(found, torch.tensor([[7.0, 1.0, -3.0, 0.0]]))
    assert {name: len(code) for name, code in nf4.CODES.items()} == {"nf4": 16, "int4": 15,
                                                                     "fp4": 15}


def test_fp4_is_that_of_bitsandbytes_but_for_its_smallest_number():
    """Theirs is 1/192 where one exponent lower, as E2M1 has it, is 1/12: hardly more than 0, so
    that the gap around 0 is twice as wide, and the error of normal numbers .122 for .106."""
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = sorted(set(functional.get_4bit_type("fp4", "cpu").tolist()))
    ours = nf4.CODES["fp4"]
    differing = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != pytest.approx(b)]
    assert differing == [(-1 / 12, pytest.approx(-1 / 192)), (1 / 12, pytest.approx(1 / 192))]
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    rounded = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(nf4.rounded(weight, tuple(theirs), False), rounded)
    assert nf4.error(weight, ours, False) == pytest.approx(0.106, abs=0.001)
    assert nf4.error(weight, tuple(theirs), False) == pytest.approx(0.122, abs=0.001)


def test_65_billion_parameters_fit_into_48_gigabytes_in_4_bits():
    in_4_bits = nf4.gigabytes("65B", 4.127 / 8)
    assert 33 < in_4_bits["weights"] < 36 and in_4_bits["all"] < 48


# 001 section 2.4.5; it has no row for prompt tuning
RANGES = {"LoRA": (0.001, 0.01), "QLoRA": (0.001, 0.01), "adapter": (0.01, 0.05),
          "parallel adapter": (0.01, 0.05), "prefix": (0.0001, 0.001)}


@pytest.mark.parametrize("method", RANGES)
def test_the_shares_at_7_billion_lie_in_the_documents_ranges(method):
    peft, _ = peft_comparison.METHODS[method]
    changes = peft_comparison.AT_7B.get(method, {})
    low, high = RANGES[method]
    assert low <= peft_comparison.share_of(peft | changes, peft_comparison.LLAMA_7B) <= high


def test_the_best_rate_is_of_those_within_a_point_the_one_that_forgets_least():
    runs = [{"new": 0.980, "old": 0.9}, {"new": 0.992, "old": 0.8}, {"new": 0.993, "old": 0.2}]
    assert peft_comparison.best(runs) is runs[1]
    assert peft_comparison.best(runs[:1]) is runs[0]


def test_the_table_has_what_is_learned_of_all_seeds_and_what_is_measured_once():
    learned = {"new": 0.9, "old": 0.8, "forgotten": 0.1}
    once = dict.fromkeys(("share", "share_7b", "bytes", "peak_mb", "step", "token", "swap"), 1.0)
    found = {"full": [learned | once | {"lr": 1e-3}, learned | {"new": 0.7, "lr": 5e-4}]}
    text = peft_comparison.table(found, [learned, learned], peft_comparison.Config(seeds="0,1"))
    rows = [line for line in text.splitlines() if line.startswith("| full")]
    assert "0.0005, 0.001" in rows[0] and "80.0% (70.0% to 90.0%)" in rows[0]
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1


@pytest.mark.parametrize("method", peft_comparison.METHODS)
def test_a_method_names_options_that_train_sft_has(method):
    peft, rates = peft_comparison.METHODS[method]
    cfg = build(train_sft.Config, peft_comparison.SFT | peft | {"lr": rates[0]})
    assert cfg.adapters.peft == peft.get("peft", "none") and len(rates) == 3


def test_the_best_part_of_a_rank_keeps_the_largest_singular_values():
    change = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    largest = torch.diag(torch.tensor([3.0, 0.0, 0.0]))
    torch.testing.assert_close(lora_rank.best_part(change, 1), largest)
    torch.testing.assert_close(lora_rank.best_part(change, 3), change)


def test_a_manner_is_every_answer_in_a_frame_and_knowledge_is_of_another_world(tmp_path):
    files = lora_rank.write_data(0, tmp_path, n=20)
    manner, knowledge = (file.read_text().splitlines() for file in files.values())
    assert all("Dear friend: " in line and "Yours, the bear." in line for line in manner)
    assert len(manner) == len(knowledge) == 20
