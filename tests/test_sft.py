"""train_sft.py: the masked loss by a slow count, accumulation, LoRA, a small run."""
import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import END, TOKENIZER, folder_of, slow_logps, tiny_model, write_rows

import data
import evaluate
import lora
import readers
import sample
import train_sft
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from plumbing.options import build
from scoring import answer_logps, token_logps
from tokenizer import Tokenizer
from world.tasks import TRAINED_FAMILIES


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


def made_rows(n):
    """Say the letter that was asked for, once or more often: all lengths differ."""
    return [{"prompt": f"{i} {'abc'[i % 3]}{'?' * (5 * i % 17)}",
             "response": "abc"[i % 3] * (1 + i % 7)} for i in range(n)]


def packed(tmp_path, rows, context_length=64):
    examples = readers.read_examples(write_rows(tmp_path / "rows.jsonl", rows))
    examples = data.format_examples(examples, TOKENIZER)
    return data.PackedExamples(examples, TOKENIZER, context_length, seed=0)


def config(tmp_path, **changes):
    if not (tmp_path / "base").exists():
        folder_of(tiny_model(), tmp_path / "base")
        write_rows(tmp_path / "tasks.jsonl", made_rows(80))
    return build(train_sft.Config, {
        "init": str(tmp_path / "base"), "out": str(tmp_path / "sft"), "steps": 4, "warmup": 0,
        "data": str(tmp_path / "tasks.jsonl"), "batch_size": 4, "lr": 3e-3, "device": "cpu",
        "dtype": "float32", "log_every": 1} | changes)


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------- the loss

def test_loss_is_the_mean_over_answer_tokens_of_conversations_scored_alone(tmp_path):
    rows = [*made_rows(7), {"messages": [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"}, {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"}]}]
    model, source = tiny_model(), packed(tmp_path, rows)
    batch = source.rows(range(len(source)))
    assert len(source) < len(rows)                               # several share a row
    with torch.no_grad():
        logps = token_logps(model.logps, batch)
        expected, count = 0.0, 0
        for row in source.examples:
            ids = []
            for turn in row["messages"]:                         # <|role|> text <|end|>, no spaces
                start = len(ids) + 1
                ids += [getattr(TOKENIZER, turn["role"]), *TOKENIZER.encode(turn["content"]), END]
                if turn["role"] == "assistant":                  # its text and its <|end|>
                    expected += slow_logps(model, ids)[start - 1:].sum().item()
                    count += len(ids) - start
    assert batch.n_targets == count
    assert -logps.sum().item() / count == pytest.approx(-expected / count, rel=1e-5)
    assert evaluate.response_loss(model, source, batch_size=2) == pytest.approx(-expected / count,
                                                                                rel=1e-5)


def test_what_users_say_is_never_a_target(tmp_path):
    source = packed(tmp_path, made_rows(30))
    batch = source.rows(range(len(source)))
    targets = batch.tokens[:, 1:][batch.loss_mask[:, 1:]]
    said = sorted(TOKENIZER.decode(targets.tolist(), specials=True).split("<|end|>")[:-1])
    assert said == sorted(row["response"] for row in made_rows(30))


def test_a_uniform_model_loses_log_of_the_vocabulary(tmp_path):
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    loss = evaluate.response_loss(model, packed(tmp_path, made_rows(10)), batch_size=3)
    assert loss == pytest.approx(math.log(TOKENIZER.vocab_size), rel=1e-6)


def test_accumulation_is_exact_when_micro_batches_have_unequal_targets(tmp_path):
    for name, batch_size, accumulate in (("whole", 4, 1), ("parts", 1, 4)):
        train_sft.main(config(tmp_path, out=str(tmp_path / name), batch_size=batch_size,
                              grad_accum=accumulate, context_length=32, steps=3))
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for ours, theirs in zip(parts, whole):
        for figure in ("loss", "grad_norm"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4)
    start, whole_w, parts_w = (weights_of(tmp_path / name) for name in ("base", "whole", "parts"))
    for name, w in whole_w.items():
        assert (parts_w[name] - w).norm() < 1e-3 * (w - start[name]).norm(), name

    # it would not be exact as a mean of means: the first step's rows differ in their targets
    rows = readers.read_examples(tmp_path / "tasks.jsonl", split="train")
    weights = data.mixing_weights(Counter(row["task"] for row in rows), tau=1.0)
    source = data.PackedExamples(data.format_examples(rows, TOKENIZER), TOKENIZER, 32, seed=0,
                                 weights=weights)
    model, batch = load_model(tmp_path / "base")[0], source.batch(0, 4)
    with torch.no_grad():
        loss, counts = -token_logps(model.logps, batch).sum(1), batch.loss_mask[:, 1:].sum(1)
    assert whole[0]["loss"] == pytest.approx((loss.sum() / counts.sum()).item(), rel=1e-5)
    assert (loss / counts).mean().item() != pytest.approx(whole[0]["loss"], rel=1e-2)


# ---------------------------------------------------------------------- a whole run

def test_a_resumed_run_compares_itself_with_the_base_it_began_from(tmp_path):
    first = train_sft.main(config(tmp_path, lr=2e-2, eval_every=2, save_every=2))
    again = train_sft.main(config(tmp_path, lr=2e-2, eval_every=2, save_every=2, steps=6,
                                  resume=True))
    assert again["base_loss"] == first["base_loss"] > again["val_loss"]


def test_held_out_loss_falls_below_the_base_and_a_unigram(tmp_path):
    result = train_sft.main(config(tmp_path, steps=30, eval_every=15, lr=2e-2))
    rows = read_metrics(tmp_path / "sft")
    assert result["val_loss"] == rows[-1]["val_loss"] < 0.7 * result["unigram_loss"]
    assert result["val_loss"] < 0.5 * result["base_loss"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["val_loss"]))
    assert [row["step"] for row in rows if "val_loss" in row] == [14, 29]
    assert {"step", "loss", "tokens", "tokens_per_s", "lr", "grad_norm"} <= set(rows[0])
    record = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert record["stage"] == "sft" and record["result"] == result
    assert list(record["parents"]) == [str(tmp_path / "base")]


def test_the_base_and_unigram_to_beat_are_measured_on_held_out_answers(tmp_path):
    result = train_sft.main(config(tmp_path, steps=1))
    heldout, train = (readers.read_examples(tmp_path / "tasks.jsonl", split=split)
                      for split in ("heldout", "train"))
    assert {row["messages"][0]["content"] for row in heldout}.isdisjoint(
        row["messages"][0]["content"] for row in train)
    counts, said = np.ones(TOKENIZER.vocab_size), []             # one virtual token each
    for row in train:
        for token in [*TOKENIZER.encode(row["messages"][-1]["content"]), END]:
            counts[token] += 1
    for row in heldout:
        said += [*TOKENIZER.encode(row["messages"][-1]["content"]), END]
    expected = -np.log(counts / counts.sum())[said].mean()
    assert result["unigram_loss"] == pytest.approx(expected)
    with torch.no_grad():
        model, loss = load_model(tmp_path / "base")[0], 0.0
        for row in heldout:
            prompt = TOKENIZER.prompt(row["messages"][:1])
            answer = [*TOKENIZER.encode(row["messages"][-1]["content"]), END]
            loss -= slow_logps(model, prompt + answer)[len(prompt) - 1:].sum().item()
    assert result["base_loss"] == pytest.approx(loss / len(said), rel=1e-5)


def test_a_resumed_run_repeats_the_curve(tmp_path):
    cfg = config(tmp_path, steps=6, save_every=3, peft="lora", lora_rank=2)
    train_sft.main(cfg)
    whole, folder = read_metrics(cfg.out), tmp_path / "sft"
    weights = weights_of(folder)
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    for name in ("config.json", "model.safetensors"):            # as if killed after step 4
        (folder / name).unlink()
    train_sft.main(replace(cfg, resume=True))
    rows = read_metrics(cfg.out)
    for name in ("step", "loss", "grad_norm", "lr"):
        assert [row[name] for row in rows] == [row[name] for row in whole]
    assert all(torch.equal(w, weights[name]) for name, w in weights_of(folder).items())


# ---------------------------------------------------------------------- encoder-decoders (2.2)

def two_stacks(tmp_path, **changes):
    """The config of a run that starts from an encoder-decoder."""
    folder = folder_of(tiny_model(architecture="encoder_decoder"), tmp_path / "two_stacks")
    return config(tmp_path, **{"init": folder} | changes)


def answer_loss(model, messages):
    """-sum_t log p(y_t | y_<t, x) of the last answer, a token at a time, and its tokens."""
    source = torch.tensor([TOKENIZER.prompt(messages[:-1])])
    written = [TOKENIZER.assistant]
    loss = 0.0
    for token in [*TOKENIZER.encode(messages[-1]["content"]), END]:
        logits = model(torch.tensor([written]), source=source,
                       source_lengths=torch.tensor([source.shape[1]]))
        loss -= logits[0, -1].double().log_softmax(-1)[token].item()
        written.append(token)
    return loss, len(written) - 1


@torch.no_grad()
def test_an_encoder_decoders_loss_is_that_of_last_answers_alone(tmp_path):
    rows = [*made_rows(9), {"messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]}]
    examples = readers.read_examples(write_rows(tmp_path / "rows.jsonl", rows))
    train_sft.format_rows(examples, TOKENIZER, last_alone=True)
    source = data.PackedExamples(examples, TOKENIZER, 64, seed=0)
    model = tiny_model(architecture="encoder_decoder", token_shift=True)
    counted = [answer_loss(model, row["messages"]) for row in examples]
    n_targets = sum(n for _, n in counted)
    assert len(source) < len(rows) and source.rows(range(len(source))).n_targets == n_targets
    found = evaluate.response_loss(model, source, 2, answer_logps)
    assert found == pytest.approx(sum(loss for loss, _ in counted) / n_targets, rel=1e-5)


WORDS = {"red": "mu", "bear": "kati", "saw": "zo", "two": "li", "moons": "pero"}


def test_an_encoder_decoder_learns_to_translate_and_answers(tmp_path, capsys):
    rows = []
    for first in WORDS:
        for second in WORDS:
            rows.append({"prompt": f"{first} {second}", "response": f"{WORDS[first]} "
                                                                    f"{WORDS[second]}"})
    file = write_rows(tmp_path / "words.jsonl", rows)
    result = train_sft.main(two_stacks(tmp_path, data=file, steps=100, batch_size=8, lr=1e-2))
    assert read_metrics(tmp_path / "sft")[-1]["loss"] < 0.1 < 1 < result["base_loss"]
    assert result["unigram_loss"] > result["val_loss"]
    model, tokenizer = load_model(tmp_path / "sft", two_stacks=True)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    said = sample.respond(model, tokenizer, asked, 20)
    heldout = {row["messages"][0]["content"] for row in readers.read_examples(file,
                                                                              split="heldout")}
    known = [(row["prompt"], text, row["response"]) for text, row in zip(said, rows)
             if row["prompt"] not in heldout]
    assert len(known) > 15 and all(text == answer for _, text, answer in known)
    capsys.readouterr()
    asked, _, answer = known[0]
    sample.main(sample.Config(init=str(tmp_path / "sft"), prompt=asked, device="cpu"))
    assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.parametrize("options", [{"peft": "lora", "lora_rank": 2}, {"peft": "adapter"},
                                     {"chosen": True}, {"grad_accum": 2, "optimizer": "muon"}])
def test_encoder_decoders_learn_with_other_options(tmp_path, options):
    if "chosen" in options:
        pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)]
        options = options | {"data": write_rows(tmp_path / "pairs.jsonl", pairs)}
    result = train_sft.main(two_stacks(tmp_path, steps=15, lr=1e-2, **options))
    assert result["val_loss"] < result["base_loss"]
    assert load_model(tmp_path / "sft", two_stacks=True)[0].architecture == "encoder_decoder"


@pytest.mark.parametrize("options, named", [
    ({"train_on": "all"}, "leave out --train_on all, or give a decoder"),
    ({"ewc": 0.1, "replay": 0.5}, "writes answers and reads all else; leave out --ewc, --replay"),
    ({"peft": "prompt"}, "virtual tokens stand before what a decoder reads")])
def test_what_an_encoder_decoder_cannot_do_is_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        train_sft.main(two_stacks(tmp_path, **options))


def test_stages_that_need_a_decoder_and_models_that_write_nothing_are_refused(tmp_path):
    folder = folder_of(tiny_model(architecture="encoder_decoder"), tmp_path / "two")
    with pytest.raises(ValueError, match="encoder_decoder; here give a decoder or a prefix model"):
        load_model(folder)
    encoder = folder_of(tiny_model(architecture="encoder"), tmp_path / "encoder")
    with pytest.raises(ValueError, match="is an encoder; here .* a prefix model or an encoder-dec"):
        train_sft.main(config(tmp_path, init=encoder))


# ---------------------------------------------------------------------- LoRA

def test_lora_trains_only_a_and_b_and_leaves_adapter_and_merged_model_that_agree(
        monkeypatch, tmp_path):
    trained = []
    real = train_sft.pick_optimizer

    def watched(name, model, *args):
        trained.extend(name for name, w in model.named_parameters() if w.requires_grad)
        return real(name, model, *args)
    monkeypatch.setattr(train_sft, "pick_optimizer", watched)
    cfg = config(tmp_path, peft="lora", lora_rank=2, lora_alpha=8.0, lora_targets="wq,w2", lr=1e-2)
    result = train_sft.main(replace(cfg, steps=20))
    assert len(trained) == 2 * 2 * 2 and all(name.endswith((".A", ".B")) for name in trained)
    assert result["val_loss"] < result["base_loss"]

    base, merged = weights_of(tmp_path / "base"), weights_of(tmp_path / "sft")
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert set(merged) == set(base)
    assert moved == {f"blocks.{i}.{name}.weight" for i in (0, 1)
                     for name in ("attention.wq", "mlp.w2")}
    adapter = safetensors.torch.load_file(tmp_path / "sft" / "adapter.safetensors")
    for name in moved:                                           # W0 + (alpha / r) B A
        A, B = (adapter[name.replace("weight", part)] for part in "AB")
        assert A.shape[0] == B.shape[1] == 2
        torch.testing.assert_close(merged[name], base[name] + 8.0 / 2 * B @ A)

    tokens = torch.randint(0, 256, (3, 20))
    apart = lora.load_adapter(load_model(tmp_path / "base")[0], tmp_path / "sft")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "sft")[0](tokens), apart(tokens),
                                   rtol=1e-4, atol=1e-4)


def test_recomputed_activations_train_the_same_model_and_the_cost_is_said(tmp_path, capsys):
    kept = config(tmp_path, out=str(tmp_path / "kept"))
    recomputed = config(tmp_path, gradient_checkpointing=True)
    for cfg in (kept, recomputed):
        train_sft.main(cfg)
    for name, weight in weights_of(tmp_path / "kept").items():
        torch.testing.assert_close(weights_of(tmp_path / "sft")[name], weight)
    assert "tokens to train on" in capsys.readouterr().err
    assert read_metrics(tmp_path / "sft")[-1]["mfu"] > 0


def test_full_fine_tuning_moves_every_weight(tmp_path):
    train_sft.main(config(tmp_path, steps=1))
    base, tuned = weights_of(tmp_path / "base"), weights_of(tmp_path / "sft")
    assert not any(torch.equal(base[name], w) for name, w in tuned.items())
    assert not (tmp_path / "sft" / "adapter.safetensors").exists()


# ---------------------------------------------------------------------- what is learned (3.4-3.6)

def chain_rows(text):
    return [{"messages": [{"role": "user", "content": "2 + 3 + 4?"},
                          {"role": "assistant", "content": text}], "chain": "2 + 3 = 5. 5 + 4 = 9."}
            for _ in range(400)]


@pytest.mark.parametrize("text", ["2 + 3 = 5. 5 + 4 = 9. It is 9.", "It is 9."])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_so_many_answers_have_their_chain_wherever_the_data_have_it(text, ratio):
    rows = chain_rows(text)
    train_sft.mix_chains(rows, ratio, seed=0)
    found = [row["messages"][-1]["content"] for row in rows]
    assert {*found} <= {"2 + 3 = 5. 5 + 4 = 9. It is 9.", "It is 9."}
    share = sum(answer.startswith("2") for answer in found) / 400
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / 400) ** 0.5     # 4 standard errors


def test_the_worlds_chains_stand_in_its_answers():
    rows = readers.read_examples("world", n=400)
    before = [row["messages"][-1]["content"] for row in rows]
    train_sft.mix_chains(rows, 1.0, seed=0)
    assert [row["messages"][-1]["content"] for row in rows] == before       # as they are
    train_sft.mix_chains(rows, 0.0, seed=0)
    changed = [row for row, text in zip(rows, before) if row["messages"][-1]["content"] != text]
    assert changed and all(row["chain"] not in row["messages"][-1]["content"] for row in changed)
    assert len(changed) == sum(bool(row["chain"]) for row in rows)


def test_a_files_chain_stands_before_its_answer(tmp_path):
    file = write_rows(tmp_path / "sums.jsonl",
                      [{"prompt": "1 + 1?", "response": "2", "chain": "One and one."},
                       {"prompt": "7?", "response": "7", "chain": 5}])
    rows = readers.read_examples(file)
    assert [row["chain"] for row in rows] == ["One and one.", ""]
    train_sft.mix_chains(rows, 1.0, seed=0)
    assert [row["messages"][-1]["content"] for row in rows] == ["One and one. 2", "7"]


def test_prompts_are_targets_only_if_asked_for_and_virtual_tokens_never():
    rows = chain_rows("9")[:1]
    train_sft.format_rows(rows, TOKENIZER)
    assert sum(rows[0]["mask"]) == 2                   # "9" and <|end|>
    tokenizer = Tokenizer.bytes()
    tokenizer.n_virtual = 3
    train_sft.format_rows(rows, tokenizer, "all")
    assert rows[0]["mask"] == [0] * 3 + [1] * (len(rows[0]["ids"]) - 3)


class Stop(Exception):
    pass


@pytest.mark.parametrize("options, share", [({}, 1 / 11), ({"tau": 2.0}, 1 / (1 + 10 ** 0.5)),
                                            ({"cap": 12}, 6 / 18)])
def test_a_cap_and_a_temperature_let_small_tasks_in(tmp_path, monkeypatch, options, share):
    """60 examples of one task and 6 of another: p_k ~ min(N_k, M)^(1/tau) (3.5)."""
    sizes = {"large": 60, "small": 6}
    rows = [{"task": task} for task, n in sizes.items() for _ in range(n)]

    def packed(examples, tokenizer, length, seed, truncate, weights, cap):
        assert weights["small"] == pytest.approx(share) and cap == options.get("cap")
        raise Stop
    monkeypatch.setattr(train_sft, "read_rows", lambda cfg: (rows, []))
    monkeypatch.setattr(train_sft, "mix_chains", lambda *arguments: None)
    monkeypatch.setattr(train_sft, "format_rows", lambda *arguments, **options: None)
    monkeypatch.setattr(train_sft, "PackedExamples", packed)
    with pytest.raises(Stop):
        train_sft.main(config(tmp_path, **options))


def test_families_asked_for_are_all_that_is_trained_on_and_examined(tmp_path):
    """"summary" is in no mixture, and only there if it is asked for."""
    cfg = config(tmp_path, data="world:3", families="summary,translation", n_examples=40)
    for rows in train_sft.read_rows(cfg):
        assert {row["example"]["family"] for row in rows} == {"summary", "translation"}
    asked = evaluate.quiz("world:3", 40, train_sft.families_of(cfg))["accuracy"]
    assert {example["family"] for example in asked} == {"summary", "translation"}
    all_rows, _ = train_sft.read_rows(replace(cfg, families="", n_examples=400))
    assert {row["example"]["family"] for row in all_rows} == {*TRAINED_FAMILIES}


# ---------------------------------------------------------------------- bad input

@pytest.mark.parametrize("changes, message", [
    ({"families": "summary"}, "tasks.jsonl: families can be set for a world only"),
    ({"families": "facts", "chosen": True}, "--families facts: pairs are not drawn by family"),
    ({"data": "world", "families": "facts,poems"}, "no family 'poems'; there are story, facts"),
    ({"peft": "lora", "lora_targets": "wq,query"}, "query.*the model has w13, w2, wk, wo, wq, wv"),
    ({"peft": "lora", "lora_rank": 0}, "--lora_rank 0: give a number >= 1"),
    ({"context_length": 8}, r"tasks.jsonl:\d+: \d+ tokens with the template, 9 fit"),
])
def test_what_cannot_work_stops_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_sft.main(config(tmp_path, **changes))
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()


def test_longer_examples_are_dropped_only_if_asked(tmp_path):
    cfg = config(tmp_path, context_length=20, steps=1)
    with pytest.raises(ValueError, match="--truncate drop"):
        train_sft.main(cfg)
    train_sft.main(replace(cfg, truncate="drop", overwrite=True))
    assert load_model(tmp_path / "sft")[0].config.context_length == 20
