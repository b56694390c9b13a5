"""Encoder, prefix and encoder-decoder models: how they learn, and fill in what is hidden."""
import json
import math

import numpy as np
import pytest
import torch
from tiny import TOKENIZER, folder_of, tiny_model

import data
import evaluate
import objectives
import sample
import train_denoise
import train_pretrain
from architectures import Encoder
from plumbing.curves import read_metrics
from plumbing.folders import load_any_model, load_model
from plumbing.options import build
from scoring import denoised_logps
from tokenizer import SPECIAL_TOKENS, Tokenizer

torch.set_num_threads(1)


def some_ids(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- gaps

@torch.no_grad()
def test_a_model_of_sentence_pairs_fills_gaps_in_what_it_was_trained_on(monkeypatch):
    names = [*SPECIAL_TOKENS, "<|mask|>", "<|cls|>", "<|sep|>"]
    tokenizer = Tokenizer(TOKENIZER.ranks, TOKENIZER.pattern, names)
    model = tiny_model(architecture="encoder", n_segments=2, vocab_size=tokenizer.vocab_size)
    seen = []
    forward = Encoder.forward

    def watched(self, tokens, segments=None):
        seen.append((tokens, segments))
        return forward(self, tokens, segments=segments)
    monkeypatch.setattr(Encoder, "forward", watched)
    sample.fill(model.trunk, tokenizer, "a ___")
    [(tokens, segments)] = seen
    assert tokens[0, 0] == tokenizer.special["<|cls|>"] and not segments.any()


def test_a_masked_model_fills_gaps_with_a_token_each(tmp_path):
    """It has learned one sentence by heart."""
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on the mat. " * 200)
    train_denoise.main(config(tmp_path, file, objective="mlm", vocab_size=288, steps=100,
                              d_model=64, n_heads=4, eval_windows=4, token_shift=True))
    model, tokenizer = load_any_model(tmp_path / "base")
    assert " sat" in map(tokenizer.decode, ([i] for i in range(288)))
    text = "the cat sat on the mat. the cat___ on the mat. the cat sat on the___."
    assert sample.fill(model, tokenizer, text) == "the cat sat on the mat. " * 2 + \
        "the cat sat on the mat."


@pytest.mark.parametrize("objective", ["span", "ul2"])
def test_gaps_become_sentinels_and_what_is_written_for_them_their_text(objective, monkeypatch):
    tokenizer = objectives.with_special_tokens(TOKENIZER, objective, 40)
    special, asked = tokenizer.special, []
    one, two = special["<|sentinel_0|>"], special["<|sentinel_1|>"]
    written = [one, *tokenizer.encode("sat"), two, *tokenizer.encode("a mat"), tokenizer.end]
    monkeypatch.setattr(sample, "generate", lambda *arguments: asked.append(arguments) or [written])
    model = tiny_model(architecture="encoder_decoder", vocab_size=tokenizer.vocab_size)
    assert sample.fill(model, tokenizer, "it ___ on ___.", 20) == "it sat on a mat."
    mode = [special["<|R|>"]] if objective == "ul2" else []
    [prompt] = asked[0][1]
    assert prompt == [*mode, *tokenizer.encode("it "), one, *tokenizer.encode(" on "), two,
                      *tokenizer.encode("."), tokenizer.end]


@pytest.mark.parametrize("objective, before, after", [("causal", [], []),
                                                      ("ul2", ["<|S|>"], ["<|end|>"])])
def test_a_text_is_continued_in_the_mode_that_has_learned_it(objective, before, after):
    """As ul2 arranges an S row: its beginning is the input, the rest the target."""
    tokenizer = objectives.with_special_tokens(TOKENIZER, objective, 40)
    special, text = tokenizer.special, tokenizer.encode("One morning")
    asked = [*map(special.get, before), *text, *map(special.get, after)]
    assert sample.beginning(tokenizer, "One morning") == asked
    if objective == "ul2":
        rng, tokens = np.random.default_rng(0), np.array([text + text])
        (read, n), _ = objectives.ul2(tokens, special, np.arange(9), tokenizer.end, tokenizer.pad,
                                      rng, ("S",))
        begun = read[0, 1:n[0] - 1].tolist()
        assert read[0, :n[0]].tolist() == [special["<|S|>"], *begun, tokenizer.end]
        assert begun == tokens[0, :len(begun)].tolist()


def test_texts_and_models_without_gaps_are_refused():
    tokenizer = objectives.with_special_tokens(TOKENIZER, "span", 40)
    model = tiny_model(architecture="encoder_decoder", vocab_size=tokenizer.vocab_size)
    with pytest.raises(ValueError, match="0 gaps in 'no gap': mark each with ___"):
        sample.fill(model, tokenizer, "no gap")
    with pytest.raises(ValueError, match="1 gaps in .*trained on so many"):
        sample.fill(tiny_model(), TOKENIZER, "a ___ gap")


# ---------------------------------------------------------------------- pretraining

SENTENCES = [f"the {a} bear {b} the {c} hat." for a in ("red", "old", "shy")
             for b in ("saw", "lost", "sold", "found") for c in ("blue", "big", "new")]


@pytest.fixture
def corpus(tmp_path):
    order = np.random.default_rng(0).integers(0, len(SENTENCES), (150, 4))
    rows = [{"text": " ".join(SENTENCES[i] for i in four)} for four in order]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(tmp_path, corpus, Config=train_denoise.Config, **changes):
    return build(Config, {
        "out": str(tmp_path / "base"), "data": str(corpus), "vocab_size": 300, "d_model": 32,
        "n_layers": 1, "n_heads": 2, "context_length": 48, "copy_steps": 0, "steps": 4,
        "batch_size": 8, "lr": 1e-2, "warmup": 2, "eval_windows": 8, "device": "cpu",
        "dtype": "float32", "log_every": 1} | changes)


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)


COMBINATIONS = [(objective, architecture, False) for objective, architectures in
                objectives.ARCHITECTURES_OF.items() for architecture in architectures]


@pytest.mark.parametrize("objective, architecture, next_sentence",
                         [*COMBINATIONS, ("mlm", "encoder", True)])
def test_every_objective_trains_every_architecture_that_fits_it(objective, architecture,
                                                                next_sentence, tmp_path, corpus):
    cfg = config(tmp_path, corpus, objective=objective, architecture=architecture, steps=30,
                 next_sentence=next_sentence)
    result = train_denoise.main(cfg)
    rows = read_metrics(tmp_path / "base")
    first = math.log(300) + math.log(2) * next_sentence
    assert rows[0]["loss"] == pytest.approx(first, abs=0.1)              # starts uniform
    assert rows[-1]["loss"] < 0.75 * first and result["val_loss"] < rows[0]["loss"]
    model, tokenizer = load_any_model(tmp_path / "base")
    assert model.architecture == architecture
    assert ("bits_per_byte" in result) == (objective == "causal")
    assert ("short_spans_rebuilt" in result) == (objective in ("span", "ul2"))
    assert ("next_sentence_accuracy" in result) == next_sentence


def pretrain_causal(tmp_path, corpus):
    cfg = config(tmp_path, corpus, train_pretrain.Config, out=str(tmp_path / "causal"), steps=40)
    train_pretrain.main(cfg)


def test_a_decoder_becomes_a_prefix_model_that_fills_in(tmp_path, corpus):
    pretrain_causal(tmp_path, corpus)
    before, _ = load_model(tmp_path / "causal")
    cfg = config(tmp_path, corpus, init=str(tmp_path / "causal"), objective="ul2",
                 architecture="prefix", steps=1, lr=0.0)
    train_denoise.main(cfg)
    after, tokenizer = load_any_model(tmp_path / "base")
    assert after.architecture == "prefix" and "<|X|>" in tokenizer.special
    tokens = torch.tensor([tokenizer.encode("the red bear saw the new hat")])
    known = after(tokens)[..., :len(tokenizer.ranks)]
    torch.testing.assert_close(known, before(tokens)[..., :len(tokenizer.ranks)])


def test_a_decoder_becomes_both_stacks_of_an_encoder_decoder_that_learns(tmp_path, corpus):
    pretrain_causal(tmp_path, corpus)
    before, _ = load_model(tmp_path / "causal")
    cfg = config(tmp_path, corpus, init=str(tmp_path / "causal"), objective="span", steps=1, lr=0.0)
    train_denoise.main(cfg)
    after, tokenizer = load_any_model(tmp_path / "base")
    tokens, source = some_ids(2, 9), some_ids(2, 7)
    written = after(tokens, source=source, source_lengths=torch.tensor([7, 4]))
    n = len(tokenizer.ranks)
    torch.testing.assert_close(written[..., :n], before(tokens)[..., :n])      # whatever it reads
    for block, own in zip(after.encoder, before.blocks):
        torch.testing.assert_close(block.state_dict(), own.state_dict())
    # training moves the new cross-attention's way out, and with it what is written
    train_denoise.main(config(tmp_path, corpus, init=str(tmp_path / "causal"), objective="span",
                               steps=2, lr=1e-3, out=str(tmp_path / "moved")))
    moved_on, _ = load_any_model(tmp_path / "moved")
    assert all(block.cross_attention.wo.weight.abs().max() > 0 for block in moved_on.blocks)


@pytest.mark.parametrize("changes, named", [
    ({"objective": "mlm", "architecture": "decoder"}, "decoder does not go with .*mlm; give encod"),
    ({"objective": "causal", "architecture": "encoder"}, "encoder does not go with .*causal"),
    ({"objective": "causal", "next_sentence": True}, "--next_sentence goes with --objective mlm")])
def test_what_cannot_be_learned_is_refused_by_name(changes, named, tmp_path, corpus):
    with pytest.raises(ValueError, match=named):
        train_denoise.main(config(tmp_path, corpus, **changes))


def test_a_model_of_another_architecture_is_refused(tmp_path, corpus):
    folder = folder_of(tiny_model(architecture="encoder"), tmp_path / "encoder")
    with pytest.raises(ValueError, match="is an encoder with 0 segments; .* an encoder_decoder"):
        train_denoise.main(config(tmp_path, corpus, init=folder, objective="span", n_layers=2))


def test_sizes_that_the_given_model_does_not_have_are_refused(tmp_path, corpus):
    start = {"init": folder_of(tiny_model(), tmp_path / "start"), "objective": "causal",
             "architecture": "prefix", "n_layers": 2}
    with pytest.raises(ValueError, match="--d_model 48, but the model in --init .* has 32"):
        train_denoise.main(config(tmp_path, corpus, **start, d_model=48))
    train_denoise.main(config(tmp_path, corpus, **start, steps=1, overwrite=True))


# ---------------------------------------------------------------------- what is measured

def test_rebuilt_spans_are_counted_span_by_span(monkeypatch):
    tokenizer = objectives.with_special_tokens(TOKENIZER, "span", 40)
    tokens = data.tokenize_documents([" ".join(SENTENCES)], tokenizer)
    stream = data.TokenStream(tokens, 40, 0, tokenizer.endoftext)
    source = objectives.Denoised(stream, tokenizer, "span", "encoder_decoder")
    model = tiny_model(architecture="encoder_decoder", vocab_size=tokenizer.vocab_size)
    targets = [row[:n].tolist() for row, n in
               zip(*source.pairs(stream.rows(range(6)).tokens[:, :-1].numpy(),
                                 np.random.default_rng(0))[1])]
    monkeypatch.setattr(sample, "generate", lambda *arguments: targets)
    assert evaluate.span_figures(model, source, 6)["short_spans_rebuilt"] == 1
    wrong = [[(i + 1) % 256 if i < 256 and n == 1 else i for n, i in enumerate(row)]
             for row in targets]                               # the first token of the first span
    monkeypatch.setattr(sample, "generate", lambda *arguments: wrong)
    spans = [objectives.spans_after(row[:-1], source.sentinels) for row in targets]
    short = [sum(len(span) <= 5 for span in row.values()) for row in spans]
    spoiled = sum(len(row[source.sentinels[0]]) <= 5 for row in spans)
    found = evaluate.span_figures(model, source, 6)["short_spans_rebuilt"]
    assert found == pytest.approx(1 - spoiled / sum(short)) and 0 < found < 1


def test_masked_accuracy_counts_first_guesses():
    tokenizer = objectives.with_special_tokens(TOKENIZER, "mlm", 40)
    tokens = data.tokenize_documents([" ".join(SENTENCES)], tokenizer)
    stream = data.TokenStream(tokens, 40, 0, tokenizer.endoftext)
    source = objectives.Denoised(stream, tokenizer, "mlm", "encoder")
    model = tiny_model(architecture="encoder", vocab_size=tokenizer.vocab_size)
    batch = source.rows(range(4))
    guesses = model(batch.tokens).argmax(-1)
    expected = (guesses == batch.targets)[batch.loss_mask].float().mean()
    found = evaluate.masked_figures(model, source, 4, 4)
    assert found["masked_accuracy"] == pytest.approx(expected.item())
    space = (batch.targets[batch.loss_mask] == ord(" ")).float().mean()
    assert found["guess_accuracy"] == pytest.approx(space.item())
    assert evaluate.validation_loss(model, source, 4, 2, denoised_logps) == pytest.approx(
        -sum(denoised_logps(model.logps, source.rows(range(i, i + 2))).sum() for i in (0, 2)).item()
        / sum(source.rows(range(i, i + 2)).n_targets for i in (0, 2)), rel=1e-5)
