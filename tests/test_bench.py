"""The benchmarks compare like with like: all contenders compute the same."""
import math

import pytest
import torch

import bench


@pytest.mark.parametrize("contender", [bench.NanoGPT, bench.MiniMind, bench.NanoChat])
def test_a_contender_starts_at_log_v_and_all_of_it_learns(contender):
    torch.manual_seed(0)
    cfg = bench.Config(d_model=32, n_layers=2, n_heads=4, vocab_size=100, context_length=16,
                       dtype="float32")
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
