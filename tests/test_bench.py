"""The benchmarks compare like with like: all contenders compute the same."""
import dataclasses
import math
from random import Random

import pytest
import torch

import bench
import bench_alignment
import sample
import train_grpo
from plumbing.folders import load_model


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


TINY = bench.Config(d_model=16, n_layers=1, n_heads=2, vocab_size=600, dtype="float32",
                    device="cpu", steps=2)


def test_prompts_and_answers_have_as_many_tokens_as_they_say(tmp_path):
    words = bench_alignment.model_folder(TINY, tmp_path / "base")
    _, tokenizer = load_model(tmp_path / "base")
    assert tokenizer.vocab_size == 600
    rng = Random(0)
    prompt = " " + bench_alignment.text_of(bench_alignment.PROMPT - 3, rng, words)
    assert len(tokenizer.prompt([{"role": "user", "content": prompt}])) == bench_alignment.PROMPT
    answer = " " + bench_alignment.text_of(bench_alignment.ANSWER - 1, rng, words)
    assert len(tokenizer.encode(answer)) + 1 == bench_alignment.ANSWER         # and <|end|>


def test_a_dpo_step_reads_its_pairs_to_the_last_token():
    cfg = dataclasses.replace(TINY, batch_size=4)
    row = bench_alignment.dpo_row(None, cfg, "lifecycle", "cached")
    assert row["steps_per_s"] * row["ms_per_step"] == pytest.approx(1e3)


def test_rollout_scoring_and_update_make_the_whole_of_a_step(monkeypatch):
    # they are clocked in a process that ends; here they are put back
    monkeypatch.setattr(sample, "generate", sample.generate)
    monkeypatch.setattr(train_grpo, "token_logps", train_grpo.token_logps)
    cfg = dataclasses.replace(TINY, batch_size=8)
    row = bench_alignment.rollout_row(None, cfg, "lifecycle", "rloo")
    shares = [row["rollout_share"], row["scoring_share"], row["update_share"]]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
