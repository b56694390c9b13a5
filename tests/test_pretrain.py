"""train_pretrain.py on small texts: the loss, what it must beat, its figures, its bad input."""
import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import TOKENIZER, folder_of, tiny_model, write_rows
from tiny_runs import prepared, same_run

import corpus
import readers
import train_denoise
import train_pretrain
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from plumbing.options import build, parse
from scoring import token_logps

LINES = "the bear ate {} red berries and slept.\n"
TEXT = "".join(LINES.format("one two three four five six seven".split()[i * i % 7])
               for i in range(120))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def config(tmp_path, text=TEXT, **changes):
    (tmp_path / "text.txt").write_text(text)
    return build(train_pretrain.Config, {
        "out": str(tmp_path / "base"), "data": str(tmp_path / "text.txt"), "tokenizer": "bytes",
        "d_model": 32, "n_layers": 1, "n_heads": 2, "context_length": 32, "steps": 3,
        "batch_size": 8, "lr": 1e-2, "warmup": 2, "eval_windows": 8, "device": "cpu",
        "dtype": "float32", "log_every": 1} | changes)


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------- what it learns

def test_it_predicts_unseen_text_better_than_a_bigram_model(tmp_path):
    result = train_pretrain.main(config(tmp_path, steps=60, eval_every=20))
    rows = read_metrics(tmp_path / "base")
    assert result["val_loss"] == rows[-1]["val_loss"]
    assert result["val_loss"] < result["bigram_loss"] < result["unigram_loss"]
    assert rows[0]["loss"] == pytest.approx(math.log(TOKENIZER.vocab_size), abs=0.05)
    assert rows[-1]["loss"] < rows[0]["loss"] / 3                # a fresh model starts uniform
    assert [row["step"] for row in rows if "val_loss" in row] == [19, 39, 59]


def test_bits_per_byte_count_bytes_and_not_tokens(tmp_path):
    cfg = config(tmp_path, text="Bären fräßen Öl. " * 60, tokenizer="bpe", vocab_size=290,
                 context_length=16)
    result = train_pretrain.main(cfg)
    read = prepared(cfg)
    tokenizer, val = read.tokenizer, read.windows[cfg.data, "heldout"]
    [bytes_per_token] = corpus.bytes_per_token(read.streams).values()
    held_out = "".join(readers.read_documents(cfg.data, split="heldout"))
    assert len(held_out.encode()) > len(held_out)                # umlauts take two bytes
    assert len(val.tokens) == len(tokenizer.encode(held_out)) + 1        # and <|endoftext|>
    assert bytes_per_token == len(held_out.encode()) / len(val.tokens) > 1.2
    bits = result["val_loss"] * len(val.tokens) / math.log(2) / len(held_out.encode())
    assert result["bits_per_byte"] == pytest.approx(bits)
    assert read_metrics(cfg.out)[-1]["perplexity"] == pytest.approx(
        math.exp(result["val_loss"]))


def test_the_logged_loss_is_the_mean_nll_of_the_first_batch_under_the_first_weights(tmp_path):
    folder_of(tiny_model(n_layers=1, context_length=32), tmp_path / "init")
    cfg = config(tmp_path, init=str(tmp_path / "init"), steps=1)
    train_pretrain.main(cfg)
    [batch] = prepared(cfg, TOKENIZER).train.batch(0)
    model = tiny_model(n_layers=1, context_length=32)
    with torch.no_grad():
        logits = model(batch.tokens[:, :-1]).double().log_softmax(-1)
        nll = -logits.gather(2, batch.tokens[:, 1:, None]).mean()
    assert read_metrics(cfg.out)[0]["loss"] == pytest.approx(nll.item(), rel=1e-5)


def test_accumulating_micro_batches_is_exact(tmp_path):
    text = TEXT[:700]            # the last window is moved back and has fewer targets
    for name, batch_size, accumulate in (("whole", 6, 1), ("parts", 2, 3)):
        train_pretrain.main(config(tmp_path, text, out=str(tmp_path / name), steps=6,
                                   batch_size=batch_size, grad_accum=accumulate))
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for ours, theirs in zip(parts, whole):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert len({b["tokens"] - a["tokens"] for a, b in zip(whole, whole[1:])}) > 1


def test_document_masks_hide_the_document_before(tmp_path):
    rows = [{"text": f"{i} " + "x" * (i % 9)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(tmp_path, data=str(tmp_path / "rows.jsonl"))
    model = tiny_model(context_length=32)
    for masks in (True, False):
        train = prepared(replace(cfg, document_masks=masks)).train
        [batch] = train.batch(0)
        [changed] = train.batch(0)
        ends = (batch.tokens == TOKENIZER.endoftext).int()
        second = (ends.cumsum(1) == 1) & (ends == 0)             # after the first <|endoftext|>
        changed.tokens[(ends.cumsum(1) == 0)] = 33               # what stands before it
        with torch.no_grad():
            same = token_logps(model.logps, batch) == token_logps(model.logps, changed)
        assert second[:, 1:].sum() > 20
        assert same[second[:, 1:]].all() == masks


# ---------------------------------------------------------------------- what it leaves behind

def test_the_folder_and_figures_are_complete(tmp_path):
    result = train_pretrain.main(config(tmp_path))
    assert set(result) == {"minutes", "tokens_per_s", "val_loss", "bits_per_byte", "unigram_loss",
                           "bigram_loss"}
    rows = read_metrics(tmp_path / "base")
    assert {"step", "loss", "tokens", "tokens_per_s", "lr", "grad_norm"} <= set(rows[0])
    assert {"val_loss", "bits_per_byte", "perplexity"} <= set(rows[-1])
    assert rows[-1]["tokens"] == 3 * 8 * 32                      # targets so far
    assert [row["lr"] for row in rows[:2]] == [0.005, 0.01]      # warmup over two steps
    record = json.loads((tmp_path / "base" / "config.json").read_text())
    assert record["result"] == result and record["seed"] == 0 and record["parents"] == {}
    model, tokenizer = load_model(tmp_path / "base")
    assert tokenizer == TOKENIZER and model.config.context_length == 32


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_pretrain.main(config(tmp_path, out=str(tmp_path / name), seed=seed))
    a, b, c = (weights_of(tmp_path / name)["embedding.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_another_run_goes_on_from_the_weights_and_the_tokenizer_of_init(tmp_path):
    first = train_pretrain.main(config(tmp_path, steps=30, tokenizer="bpe", vocab_size=280))
    second = train_pretrain.main(config(tmp_path, init=str(tmp_path / "base"), steps=1, lr=0.0,
                                        warmup=0, out=str(tmp_path / "more")))
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-6)
    a, b = (weights_of(tmp_path / name) for name in ("base", "more"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------- what is dropped

def test_exact_duplicates_and_empty_documents_are_dropped_counted_and_said(tmp_path, capsys):
    unique = [f"the bear {i} ate {i * i} berries." for i in range(150)]
    empty = ["", " \n", "*** ...", "-"]
    runs = {"clean": unique, "dirty": [*unique[:5], *empty, *unique, empty[2], *unique[7:9]]}
    for name, texts in runs.items():
        rows = write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        train_pretrain.main(config(tmp_path, data=rows, out=str(tmp_path / name)))
    assert same_run(tmp_path / "clean", tmp_path / "dirty")
    said = capsys.readouterr().err
    assert "pretrain: dropped 0 duplicates and 0 empty documents\n" in said
    # the second "*** ..." is a duplicate first
    assert "pretrain: dropped 8 duplicates and 4 empty documents\n" in said


def test_texts_that_differ_in_a_letter_or_a_space_are_no_duplicates():
    texts = {("a", "train"): ["A bear.", "a bear.", "A bear. ", "A bear."],
             ("a", "heldout"): ["A bear."]}                      # another split, another list
    kept, n = corpus.drop_duplicates(texts)
    assert n == 1 and kept["a", "train"] == texts["a", "train"][:3]
    assert kept["a", "heldout"] == ["A bear."]
    assert corpus.drop_empty({("a", "train"): ["7", "Ö", "\n", "?!"]}) == (
        {("a", "train"): ["7", "Ö"]}, 2)


# ---------------------------------------------------------------------- options of train_denoise.py

@pytest.mark.parametrize("arguments", [
    ["--objective", "mlm"], ["--objective=span", "--steps", "3"],
    ["--steps", "3", "--next_sentence"], ["--architecture", "prefix"]])
def test_options_of_bert_t5_and_ul2_are_answered_with_the_command(arguments, monkeypatch):
    script = str(Path(train_pretrain.__file__))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(script, run_name="__main__")
    sentence, command = exit.value.code.split("\n")
    assert sentence.endswith("is an option of train_denoise.py:")
    assert command == f"    python train_denoise.py {' '.join(arguments)}"
    parse(train_denoise.Config, command.split()[2:])             # which takes all of them


# ---------------------------------------------------------------------- bad input

def test_text_shorter_than_a_window_is_an_error_that_names_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"context_length \+ 1 = 33.*smaller --context_length"):
        train_pretrain.main(config(tmp_path, text="A short text of 36 characters, sadly."))
    with pytest.raises(ValueError, match="the file is empty"):
        train_pretrain.main(config(tmp_path, text="  \n", overwrite=True))


def test_a_loss_that_is_not_finite_stops_with_its_step_and_no_model(tmp_path):
    with pytest.raises(ValueError, match="--lr nan: give a number >= 0"):
        train_pretrain.main(config(tmp_path, lr=math.nan))
    with pytest.raises(FloatingPointError, match="step 20: the loss is nan, and 20 updates in a row"
                                                 ".*No checkpoint was made yet; try a lower --lr"):
        train_pretrain.main(replace(config(tmp_path, steps=30, overwrite=True), lr=math.inf))
    with pytest.raises(FloatingPointError, match="after step 2 the weights are not finite"):
        train_pretrain.main(replace(config(tmp_path, overwrite=True), lr=math.inf))  # too few
    assert not (tmp_path / "base" / "config.json").exists()
    rows = read_metrics(tmp_path / "base")
    assert "loss" in rows[0] and not any("loss" in row for row in rows[1:])    # 0 was still fine


def test_a_folder_with_a_model_in_it_is_not_overwritten_unasked(tmp_path):
    train_pretrain.main(config(tmp_path, steps=1))
    before = weights_of(tmp_path / "base")
    with pytest.raises(ValueError, match="not empty.*--resume.*--overwrite"):
        train_pretrain.main(config(tmp_path, seed=1))
    assert all(torch.equal(w, before[name]) for name, w in weights_of(tmp_path / "base").items())


def test_going_on_from_a_model_keeps_its_context(tmp_path):
    base = folder_of(tiny_model(n_layers=1, context_length=24), tmp_path / "init")
    for asked, expected in (0, 24), (16, 16):
        train_pretrain.main(config(tmp_path, init=base, context_length=asked, overwrite=True))
        assert load_model(tmp_path / "base")[0].config.context_length == expected


@pytest.mark.parametrize("changes, message", [
    ({"n_heads": 3}, "d_model 32 is not a multiple of n_heads 3"),
    ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"n_heads": 32}, "head width 1 .* is odd"),
    ({"data": "nowhere.txt"}, "nowhere.txt: not found"),
    ({"tokenizer": "nowhere"}, "nowhere"),
    ({"init": "nowhere"}, "nowhere: there is no such folder"),
    ({"dtype": "float8"}, "--dtype float8: give auto, float32, bfloat16 or float16"),
])
def test_what_cannot_work_stops_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_pretrain.main(config(tmp_path, **changes))
    assert not (tmp_path / "base" / "metrics.jsonl").exists()


def test_copying_comes_first_and_text_follows(tmp_path):
    train_pretrain.main(config(tmp_path, steps=12, copy_steps=250, lr=1e-4))
    rows = read_metrics(tmp_path / "base")
    random_targets, text_targets = (rows[i + 1]["tokens"] - rows[i]["tokens"] for i in (0, 5))
    assert random_targets == 16 * 32 and text_targets == 8 * 32       # a sixth of the steps copies


def test_the_losses_of_text_are_not_held_against_those_of_copying(tmp_path, monkeypatch):
    known = []
    monkeypatch.setattr("plumbing.guard.is_spike",
                        lambda loss, norm, recent: known.append(len(recent)))
    train_pretrain.main(config(tmp_path, steps=12, copy_steps=250))
    assert known == [0, 1, *range(10)]                                # 2 steps copy, 10 read text


def test_a_model_that_goes_on_from_another_reads_text_from_its_first_step(tmp_path):
    train_pretrain.main(config(tmp_path))
    more = {"init": str(tmp_path / "base"), "out": str(tmp_path / "more"), "steps": 12}
    train_pretrain.main(config(tmp_path, copy_steps=250, **more))
    first, second = read_metrics(tmp_path / "more")[:2]
    assert second["tokens"] - first["tokens"] == 8 * 32               # windows of text, not repeats


@pytest.mark.parametrize("options", [
    {"balance": "bias"}, {"router": "expert_choice"}, {"capacity_factor": 1.0, "top_k": 1},
    {"n_shared_experts": 1, "n_dense_layers": 1, "router_noise": True},
    {"expert_groups": 2, "top_groups": 1}])
def test_a_mixture_of_experts_learns_and_logs_its_load(options, tmp_path):
    result = train_pretrain.main(config(tmp_path, n_experts=4, steps=30, n_layers=2, **options))
    assert result["val_loss"] < result["unigram_loss"]
    row = read_metrics(tmp_path / "base")[-1]
    if options.get("router") == "expert_choice":               # even by construction
        assert "load/0" not in row
    else:
        assert sum(row[f"load/{e}"] for e in range(4)) == pytest.approx(1, rel=1e-5)
        assert row["busiest_expert"] > 1
        assert (row["dropped"] > 0) == ("capacity_factor" in options)
