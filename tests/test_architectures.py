"""Encoder, prefix and encoder-decoder models: who sees whom, what they compute, how they learn."""
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
import train_pretrain
import training
from model import (
    KVCache,
    ModelConfig,
    Transformer,
    extend_vocabulary,
    load_model,
    parameter_count,
    token_logps,
)
from muon import Muon
from tokenizer import SPECIAL_TOKENS, Tokenizer

torch.set_num_threads(1)


def some_ids(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def moved(model, tokens, at, **options):
    """(B, T): how much each logit row moves when token `at` changes."""
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % 256
    return (model(changed, **options) - model(tokens, **options)).abs().amax(-1)


# ---------------------------------------------------------------------- who sees whom

@pytest.mark.parametrize("token_shift", [False, True])
@torch.no_grad()
def test_every_token_of_an_encoder_sees_every_other_of_its_document(token_shift):
    model = tiny_model(architecture="encoder", token_shift=token_shift)
    tokens = some_ids(1, 9)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1, -1]])
    for at in range(9):
        assert (moved(model, tokens, at) > 0).all()
        assert torch.equal(moved(model, tokens, at, documents=documents) > 0,
                           documents == documents[0, at])


@torch.no_grad()
def test_a_prefix_sees_all_of_itself_and_the_rest_looks_back():
    model, tokens, prefix = tiny_model(architecture="prefix"), some_ids(2, 8), torch.tensor([3, 5])
    for at in range(8):
        seen = moved(model, tokens, at, prefix=prefix) > 0
        for row, n in zip(seen.tolist(), prefix.tolist()):
            assert row == [(at < n and t < n) or t >= at for t in range(8)]


@torch.no_grad()
def test_a_prefix_of_one_token_or_none_makes_a_decoder():
    prefix_model, decoder = tiny_model(architecture="prefix"), tiny_model()
    decoder.load_state_dict(prefix_model.state_dict())
    tokens = some_ids(2, 7)
    torch.testing.assert_close(prefix_model(tokens, prefix=torch.tensor([0, 1])), decoder(tokens))
    assert torch.equal(prefix_model(tokens), decoder(tokens))


@pytest.mark.parametrize("token_shift", [False, True])
@torch.no_grad()
def test_a_writer_sees_what_it_wrote_and_all_of_the_source_but_its_padding(token_shift):
    model = tiny_model(architecture="encoder_decoder", token_shift=token_shift)
    tokens, source = some_ids(2, 6), some_ids(2, 7, seed=2)
    options = {"source": source, "source_lengths": torch.tensor([4, 7])}
    for at in range(6):
        assert torch.equal(moved(model, tokens, at, **options) > 0,
                           (torch.arange(6) >= at).expand(2, 6))
    plain = model(tokens, **options)
    for at in range(7):
        changed = source.clone()
        changed[:, at] += 1
        change = (model(tokens, **options | {"source": changed}) - plain).abs().amax((1, 2)) > 0
        assert change.tolist() == [at < 4, True]


# ---------------------------------------------------------------------- what they compute

@torch.no_grad()
def slow_encoder_decoder(model, tokens, source):
    """One row, (T, V), in plain matmuls with explicit masks; no shared code but RoPE's angles."""
    def norm(x, module):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * module.weight

    def turned(x):
        cos, sin = model.cos[:len(x), None], model.sin[:len(x), None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(module, x, y, causal, rotate):
        q, k, v = ((z @ w.weight.T).view(len(z), -1, 16)
                   for z, w in ((x, module.wq), (y, module.wk), (y, module.wv)))
        q, k = (turned(q), turned(k)) if rotate else (q, k)
        scores = torch.einsum("ihc,jhc->hij", q, k) / 4
        if causal:
            scores += torch.full(scores.shape[1:], -torch.inf).triu(1)
        return torch.einsum("hij,jhc->ihc", scores.softmax(-1), v).flatten(1) @ module.wo.weight.T

    def feed(module, x):
        gate, up = (x @ module.w13.weight.T).chunk(2, -1)
        return (gate * gate.sigmoid() * up) @ module.w2.weight.T

    def embedded(ids, both_ways):
        e, zero = model.embedding.weight[ids], torch.zeros(1, 32)
        if not model.config.token_shift:
            return e
        h = e + torch.cat([zero, e[:-1]]) @ model.shift.weight.T
        return h + torch.cat([e[1:], zero]) @ model.shift_back.weight.T if both_ways else h

    m = embedded(source, True)
    for block in model.encoder:
        x = norm(m, block.attention_norm)
        m = m + attend(block.attention, x, x, False, True)
        m = m + feed(block.mlp, norm(m, block.mlp_norm))
    m, h = norm(m, model.encoder_norm), embedded(tokens, False)
    for block in model.blocks:
        x = norm(h, block.attention_norm)
        h = h + attend(block.attention, x, x, True, True)
        h = h + attend(block.cross_attention, norm(h, block.cross_norm), m, False, False)
        h = h + feed(block.mlp, norm(h, block.mlp_norm))
    return norm(h, model.norm) @ model.embedding.weight.T


@pytest.mark.parametrize("token_shift", [False, True])
def test_an_encoder_decoder_equals_a_slow_second_implementation(token_shift):
    model = tiny_model(architecture="encoder_decoder", token_shift=token_shift)
    tokens, source, lengths = some_ids(2, 6), some_ids(2, 9, seed=2), torch.tensor([9, 5])
    logits = model(tokens, source=source, source_lengths=lengths)
    for row in range(2):
        expected = slow_encoder_decoder(model, tokens[row], source[row, :lengths[row]])
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def test_all_parameters_of_an_encoder_decoder_learn_and_checkpointing_changes_no_gradient():
    model = tiny_model(architecture="encoder_decoder", token_shift=True)
    tokens, source, lengths = some_ids(2, 6), some_ids(2, 9, seed=2), torch.tensor([9, 5])
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(tokens, source=source, source_lengths=lengths, targets=tokens).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(grads[1][name], grad)


def test_every_block_of_a_fresh_encoder_decoder_is_the_identity():
    model = Transformer(ModelConfig(vocab_size=50, d_model=32, n_heads=2,
                                    architecture="encoder_decoder"))
    tokens, source = some_ids(2, 5) % 50, some_ids(2, 4) % 50
    logits = model(tokens, source=source, source_lengths=torch.tensor([4, 2]))
    h = model.embedding.weight[tokens]
    expected = h * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() @ model.embedding.weight.T
    torch.testing.assert_close(logits, expected)


def test_sizes_of_an_encoder_decoder_are_the_hand_count():
    model = tiny_model(architecture="encoder_decoder")
    block = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    cross = 4 * 32 * 32 + 32
    V = TOKENIZER.vocab_size
    assert parameter_count(model) == V * 32 + 2 * 2 * block + 2 * cross + 2 * 32
    matmuls = 2 * 2 * (4 * 32 * 32 + 3 * 32 * 96) + 2 * 4 * 32 * 32 + V * 32
    assert model.config.matmul_parameters() == matmuls
    # scores and weighted values: 12 T D where all is seen (encoder, cross), half where causal
    assert model.config.flops_per_token(50) == 6 * matmuls + 2 * 12 * 50 * 32 * 2.5
    encoder = ModelConfig(vocab_size=V, d_model=32, n_heads=2, n_layers=2, architecture="encoder")
    assert encoder.flops_per_token(50) == 6 * encoder.matmul_parameters() + 2 * 12 * 50 * 32
    # token shift: one matrix for each side, of which both stacks use the first
    for architecture, used in ("encoder", 2), ("encoder_decoder", 3):
        plain, shifted = (tiny_model(architecture=architecture, token_shift=flag)
                          for flag in (False, True))
        assert parameter_count(shifted) - parameter_count(plain) == 2 * 32 * 32
        assert shifted.config.matmul_parameters() - plain.config.matmul_parameters() == \
            used * 32 * 32


def test_muon_takes_the_inner_matrices_of_both_stacks_and_leaves_tables_and_heads():
    model = tiny_model(architecture="encoder_decoder")
    [inner] = [g["params"] for g in Muon(model, 1e-3).param_groups if g["rule"] == "muon"]
    assert len(inner) == 2 * 2 * 6 + 2 * 4                     # wq wk wv wo w13 w2; cross-attention
    model = tiny_model(architecture="encoder", n_segments=2)
    [inner] = [g["params"] for g in Muon(model, 1e-3).param_groups if g["rule"] == "muon"]
    assert len(inner) == 2 * 6


# ---------------------------------------------------------------------- segments

def test_segments_are_added_and_the_first_token_tells_whether_they_follow_each_other():
    model = tiny_model(architecture="encoder", n_segments=2)
    tokens, segments = some_ids(3, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    logps, follows = model(tokens, targets=tokens, segments=segments)
    with torch.no_grad():
        model.embedding.weight += model.segment_embedding.weight[0]
        shifted = model.hidden(tokens)
        model.embedding.weight -= model.segment_embedding.weight[0]
    same = model.hidden(tokens, segments=torch.zeros_like(segments))
    torch.testing.assert_close(same, shifted)
    head = model.next_sentence_head
    expected = model.hidden(tokens, segments=segments)[:, 0] @ head.weight.T + head.bias
    assert logps.shape == (3, 7) and follows.shape == (3, 2)
    torch.testing.assert_close(follows, expected)
    assert not torch.allclose(same, model.hidden(tokens, segments=segments), atol=1e-3)


# ---------------------------------------------------------------------- generation

@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("architecture", ["prefix", "encoder_decoder"])
@torch.no_grad()
def test_generation_with_a_cache_is_the_argmax_of_the_full_forward_repeated(architecture,
                                                                            token_shift):
    model = tiny_model(seed=2, architecture=architecture, token_shift=token_shift)
    prompts = [some_ids(n, seed=n).tolist() for n in (5, 1, 9, 3, 7)]
    outputs = sample.generate(model, prompts, 8, stop=(3, 7, 50), batch_size=5)
    for prompt, output in zip(prompts, outputs):
        for i, token in enumerate(output):
            if architecture == "prefix":
                logits = model(torch.tensor([prompt + output[:i]]),
                               prefix=torch.tensor([len(prompt)]))
            else:
                logits = model(torch.tensor([[prompt[-1]] + output[:i]]),
                               source=torch.tensor([prompt]),
                               source_lengths=torch.tensor([len(prompt)]))
            assert token == logits[0, -1].argmax()
    assert len({tuple(output) for output in outputs}) == 5


@torch.no_grad()
def test_rows_that_stop_take_their_source_with_them():
    model = tiny_model(architecture="encoder_decoder")
    source, lengths = some_ids(3, 6), torch.tensor([6, 2, 4])
    cache = KVCache(model.config, torch.zeros(3, dtype=torch.long), 5, torch.float32)
    model(some_ids(3, 1), cache=cache, source=source, source_lengths=lengths)
    rows = torch.tensor([2, 0])
    cache.keep(rows)
    found = model(torch.tensor([[9], [8]]), cache=cache)[:, 0]
    expected = model(torch.cat([some_ids(3, 1)[rows], torch.tensor([[9], [8]])], 1),
                     source=source[rows], source_lengths=lengths[rows])[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_of_sentence_pairs_fills_gaps_in_what_it_was_trained_on(monkeypatch):
    names = [*SPECIAL_TOKENS, "<|mask|>", "<|cls|>", "<|sep|>"]
    tokenizer = Tokenizer(TOKENIZER.ranks, TOKENIZER.pattern, names)
    model = tiny_model(architecture="encoder", n_segments=2, vocab_size=tokenizer.vocab_size)
    seen = []
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, tokens, *others: (
        seen.append((tokens, others[-1])), hidden(self, tokens, *others))[1])
    sample.fill(model, tokenizer, "a ___")
    [(tokens, segments)] = seen
    assert tokens[0, 0] == tokenizer.special["<|cls|>"] and not segments.any()


def test_a_masked_model_fills_gaps_with_a_token_each(tmp_path):
    """It has learned one sentence by heart."""
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on the mat. " * 200)
    train_pretrain.main(config(tmp_path, file, objective="mlm", vocab_size=288, steps=100,
                               d_model=64, n_heads=4, eval_windows=4))
    model, tokenizer = load_model(tmp_path / "base", any_architecture=True)
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


# ---------------------------------------------------------------------- what is refused

def test_a_model_says_what_it_cannot_do(tmp_path):
    tokens, lengths = some_ids(1, 5), torch.tensor([5])
    with pytest.raises(ValueError, match="is an encoder.*cannot generate"):
        sample.generate(tiny_model(architecture="encoder"), [[1, 2]], 3)
    with pytest.raises(ValueError, match="reads a source.*source is missing"):
        tiny_model(architecture="encoder_decoder")(tokens)
    with pytest.raises(ValueError, match="architecture is decoder, source is given"):
        tiny_model()(tokens, source=tokens, source_lengths=lengths)
    with pytest.raises(ValueError, match="is a decoder: it takes no prefix"):
        tiny_model()(tokens, prefix=lengths)
    with pytest.raises(ValueError, match="source of 70 tokens.*context_length is 64"):
        tiny_model(architecture="encoder_decoder")(tokens, source=some_ids(1, 70),
                                                   source_lengths=torch.tensor([70]))
    for architecture in ("encoder", "encoder_decoder"):
        folder = folder_of(tiny_model(architecture=architecture), tmp_path / architecture)
        with pytest.raises(ValueError, match=f"{architecture}: this model is an {architecture}"):
            load_model(folder)
        model, _ = load_model(folder, any_architecture=True)
        assert model.config.architecture == architecture


def test_the_stages_after_pretraining_read_a_prefix_model_as_a_decoder(tmp_path):
    folder = folder_of(tiny_model(architecture="prefix"), tmp_path / "prefix")
    model, _ = load_model(folder)
    assert model.config.architecture == "decoder"
    assert load_model(folder, any_architecture=True)[0].config.architecture == "prefix"


# ---------------------------------------------------------------------- more tokens

def test_a_larger_vocabulary_keeps_what_was_and_starts_words_from_their_pieces():
    old = Tokenizer.train(["the bear the bear then bears"], 256 + 16 + 3)
    words = dict(old.ranks) | {b" bears": 259, b"zq": 260}
    new = Tokenizer(words, old.pattern, [*SPECIAL_TOKENS, "<|mask|>"])
    model = tiny_model(vocab_size=old.vocab_size, tied=False)
    larger = extend_vocabulary(model, old, new)
    pieces = old.pieces(b" bears")
    assert [old.decode([i]) for i in pieces] == [" ", "bear", "s"] or len(pieces) > 1
    for table in ("embedding", "lm_head"):
        before, after = (getattr(m, table).weight for m in (model, larger))
        assert torch.equal(after[:259], before[:259])
        torch.testing.assert_close(after[259], before[pieces].mean(0))
        torch.testing.assert_close(after[260], before[[ord("z"), ord("q")]].mean(0))
        for name in SPECIAL_TOKENS:
            assert torch.equal(after[new.special[name]], before[old.special[name]])
    tokens = torch.tensor([old.encode("the bears") + [old.end]])
    moved = torch.tensor([old.encode("the bears") + [new.end]])
    rows = [*range(259), *(new.special[name] for name in SPECIAL_TOKENS)]
    same = [*range(259), *(old.special[name] for name in SPECIAL_TOKENS)]
    torch.testing.assert_close(larger(moved)[..., rows], model(tokens)[..., same])
    with pytest.raises(ValueError, match="lacks .* tokens of the model"):
        extend_vocabulary(larger, new, old)


def test_pieces_of_a_word_are_what_encoding_it_gives():
    tokenizer = Tokenizer.train(["the bear then bears there, the three bears"], 256 + 16 + 30)
    for word in ("the", " bears", "there", " three", "Bären", "b"):
        assert tokenizer.pieces(word.encode()) == tokenizer.encode(word)


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


def config(tmp_path, corpus, **changes):
    return train_pretrain.Config(**{
        "out": str(tmp_path / "base"), "data": str(corpus), "vocab_size": 300, "d_model": 32,
        "n_layers": 1, "n_heads": 2, "context_length": 48, "copy_steps": 0, "steps": 4,
        "batch_size": 8, "lr": 1e-2, "warmup": 2, "eval_windows": 8, "device": "cpu",
        "dtype": "float32", "log_every": 1} | changes)


@pytest.fixture(autouse=True)
def seeded_and_without_pictures(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(training, "plot_curves", lambda *arguments: None)


COMBINATIONS = [(objective, architecture, False) for objective, architectures in
                objectives.ARCHITECTURES_OF.items() for architecture in architectures]


@pytest.mark.parametrize("objective, architecture, next_sentence",
                         [*COMBINATIONS, ("mlm", "encoder", True)])
def test_every_objective_trains_every_architecture_that_fits_it(objective, architecture,
                                                                next_sentence, tmp_path, corpus):
    cfg = config(tmp_path, corpus, objective=objective, architecture=architecture, steps=30,
                 next_sentence=next_sentence)
    result = train_pretrain.main(cfg)
    rows = training.read_metrics(tmp_path / "base")
    first = math.log(300) + math.log(2) * next_sentence
    assert rows[0]["loss"] == pytest.approx(first, abs=0.1)              # starts uniform
    assert rows[-1]["loss"] < 0.75 * first and result["val_loss"] < rows[0]["loss"]
    model, tokenizer = load_model(tmp_path / "base", any_architecture=True)
    assert model.config.architecture == architecture
    assert ("bits_per_byte" in result) == (objective == "causal")
    assert ("short_spans_rebuilt" in result) == (objective in ("span", "ul2"))
    assert ("next_sentence_accuracy" in result) == next_sentence


def test_a_decoder_becomes_a_prefix_model_that_fills_in(tmp_path, corpus):
    train_pretrain.main(config(tmp_path, corpus, out=str(tmp_path / "causal"), steps=40))
    before, _ = load_model(tmp_path / "causal")
    cfg = config(tmp_path, corpus, init=str(tmp_path / "causal"), objective="ul2",
                 architecture="prefix", steps=1, lr=0.0)
    train_pretrain.main(cfg)
    after, tokenizer = load_model(tmp_path / "base", any_architecture=True)
    assert after.config.architecture == "prefix" and "<|X|>" in tokenizer.special
    tokens = torch.tensor([tokenizer.encode("the red bear saw the new hat")])
    known = after(tokens)[..., :len(tokenizer.ranks)]
    torch.testing.assert_close(known, before(tokens)[..., :len(tokenizer.ranks)])


def test_a_decoder_becomes_both_stacks_of_an_encoder_decoder_that_learns(tmp_path, corpus):
    train_pretrain.main(config(tmp_path, corpus, out=str(tmp_path / "causal"), steps=40))
    before, _ = load_model(tmp_path / "causal")
    cfg = config(tmp_path, corpus, init=str(tmp_path / "causal"), objective="span", steps=1, lr=0.0)
    train_pretrain.main(cfg)
    after, tokenizer = load_model(tmp_path / "base", any_architecture=True)
    tokens, source = some_ids(2, 9), some_ids(2, 7)
    written = after(tokens, source=source, source_lengths=torch.tensor([7, 4]))
    n = len(tokenizer.ranks)
    torch.testing.assert_close(written[..., :n], before(tokens)[..., :n])      # whatever it reads
    for block, own in zip(after.encoder, before.blocks):
        torch.testing.assert_close(block.state_dict(), own.state_dict())
    # training moves the new cross-attention's way out, and with it what is written
    train_pretrain.main(config(tmp_path, corpus, init=str(tmp_path / "causal"), objective="span",
                               steps=2, lr=1e-3, out=str(tmp_path / "moved")))
    moved_on, _ = load_model(tmp_path / "moved", any_architecture=True)
    assert all(block.cross_attention.wo.weight.abs().max() > 0 for block in moved_on.blocks)


@pytest.mark.parametrize("changes, named", [
    ({"objective": "bert"}, "--objective bert: give causal, mlm, span, ul2"),
    ({"objective": "mlm", "architecture": "decoder"}, "decoder does not go with .*mlm; give encod"),
    ({"architecture": "encoder"}, "encoder does not go with --objective causal"),
    ({"next_sentence": True}, "--next_sentence goes with --objective mlm")])
def test_what_cannot_be_learned_is_refused_by_name(changes, named, tmp_path, corpus):
    with pytest.raises(ValueError, match=named):
        train_pretrain.main(config(tmp_path, corpus, **changes))


def test_a_model_of_another_architecture_is_refused(tmp_path, corpus):
    folder = folder_of(tiny_model(architecture="encoder"), tmp_path / "encoder")
    with pytest.raises(ValueError, match="is an encoder with 0 segments; .* an encoder_decoder"):
        train_pretrain.main(config(tmp_path, corpus, init=folder, objective="span", n_layers=2))


def test_sizes_that_the_given_model_does_not_have_are_refused(tmp_path, corpus):
    folder = folder_of(tiny_model(), tmp_path / "start")
    with pytest.raises(ValueError, match="--d_model 48, but the model in --init .* has 32"):
        train_pretrain.main(config(tmp_path, corpus, init=folder, d_model=48, n_layers=2))
    train_pretrain.main(config(tmp_path, corpus, init=folder, n_layers=2, n_heads=2, steps=1,
                               overwrite=True))


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
    spans = [objectives.spans_said(row[:-1], source.sentinels) for row in targets]
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
    assert evaluate.validation_loss(model, source, 4, 2) == pytest.approx(
        -sum(token_logps(model, source.rows(range(i, i + 2))).sum() for i in (0, 2)).item()
        / sum(source.rows(range(i, i + 2)).n_targets for i in (0, 2)), rel=1e-5)
