"""architectures.py: who sees whom, and what encoder, prefix and encoder-decoder models compute."""
import pytest
import torch
from tiny import TOKENIZER, folder_of, tiny_model

import sample
from architectures import (
    ARCHITECTURES,
    Encoder,
    EncoderDecoder,
    SourceCache,
    extend_vocabulary,
    successors,
    with_encoder,
)
from model import ModelConfig, parameter_count
from plumbing.folders import load_any_model, load_model
from plumbing.optimizers import Muon
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


@torch.no_grad()
def test_successors_are_those_within_the_document():
    h = torch.arange(1.0, 7.0).view(1, 6, 1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    assert successors(h, None).flatten().tolist() == [2, 3, 4, 5, 6, 0]
    assert successors(h, documents).flatten().tolist() == [2, 3, 0, 5, 0, 0]


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
        model.logps(tokens, tokens, source=source, source_lengths=lengths).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(grads[1][name], grad)


def test_every_block_of_a_fresh_encoder_decoder_is_the_identity():
    model = EncoderDecoder(ModelConfig(vocab_size=50, d_model=32, n_heads=2))
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
    assert model.matmul_parameters() == matmuls
    # scores and weighted values: 12 T D where all is seen (encoder, cross), half where causal
    assert model.flops_per_token(50) == 6 * matmuls + 2 * 12 * 50 * 32 * 2.5
    encoder = Encoder(ModelConfig(vocab_size=V, d_model=32, n_heads=2, n_layers=2))
    assert encoder.flops_per_token(50) == 6 * encoder.matmul_parameters() + 2 * 12 * 50 * 32
    # token shift: one matrix for each side, of which both stacks use the first
    for architecture, used in ("encoder", 2), ("encoder_decoder", 3):
        plain, shifted = (tiny_model(architecture=architecture, token_shift=flag)
                          for flag in (False, True))
        assert parameter_count(shifted) - parameter_count(plain) == 2 * 32 * 32
        assert shifted.matmul_parameters() - plain.matmul_parameters() == \
            used * 32 * 32


def test_muon_takes_the_inner_matrices_of_both_stacks_and_leaves_tables_and_heads():
    model = tiny_model(architecture="encoder_decoder")
    [inner] = [g["params"] for g in Muon(model, 1e-3).param_groups if g["rule"] == "muon"]
    assert len(inner) == 2 * 2 * 6 + 2 * 4                     # wq wk wv wo w13 w2; cross-attention
    model = tiny_model(architecture="encoder", n_segments=2)
    [inner] = [g["params"] for g in Muon(model, 1e-3).param_groups if g["rule"] == "muon"]
    assert len(inner) == 2 * 6


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_decoder_as_both_stacks_writes_at_first_what_the_decoder_does(tied, token_shift):
    decoder = tiny_model(tied=tied, token_shift=token_shift)
    model = with_encoder(decoder)
    tokens, source = some_ids(2, 9), some_ids(2, 7)
    written = model(tokens, source=source, source_lengths=torch.tensor([7, 4]))
    torch.testing.assert_close(written, decoder(tokens))               # whatever it reads
    for block, own in zip(model.encoder, decoder.blocks, strict=True):
        torch.testing.assert_close(block.state_dict(), own.state_dict())
    torch.testing.assert_close(model.encoder_norm.weight, decoder.norm.weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_the_log_softmax_of_the_logits(architecture):
    model = tiny_model(architecture=architecture)
    tokens, targets, loss_mask = some_ids(2, 6), some_ids(2, 6, seed=2), some_ids(2, 6) > 99
    inputs = {"encoder_decoder": {"source": tokens, "source_lengths": torch.tensor([6, 2])},
              "prefix": {"prefix": torch.tensor([3, 0])}}.get(architecture, {})
    expected = model(tokens, **inputs).log_softmax(-1)
    logps, entropies = model.logps(tokens, targets, loss_mask, with_entropy=True, **inputs)
    picked = expected.gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(logps, picked * loss_mask)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1) * loss_mask)


# ---------------------------------------------------------------------- segments

def test_segments_are_added_and_the_first_token_tells_whether_they_follow_each_other():
    model = tiny_model(architecture="encoder", n_segments=2)
    trunk = model.trunk
    tokens, segments = some_ids(3, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    follows, logps = model.values_and_logps(tokens, tokens, segments=segments)
    follows = follows[:, 0]
    assert torch.equal(logps, trunk.logps(tokens, tokens, segments=segments))
    with torch.no_grad():
        trunk.embedding.weight += trunk.segment_embedding.weight[0]
        shifted = trunk.hidden(tokens)
        trunk.embedding.weight -= trunk.segment_embedding.weight[0]
    same = trunk.hidden(tokens, segments=torch.zeros_like(segments))
    torch.testing.assert_close(same, shifted)
    head = model.head
    expected = trunk.hidden(tokens, segments=segments)[:, 0] @ head.weight.T + head.bias
    assert logps.shape == (3, 7) and follows.shape == (3, 2)
    torch.testing.assert_close(follows, expected)
    assert not torch.allclose(same, trunk.hidden(tokens, segments=segments), atol=1e-3)


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
    cache = SourceCache(model.config, torch.zeros(3, dtype=torch.long), 5, torch.float32)
    model(some_ids(3, 1), cache=cache, source=source, source_lengths=lengths)
    rows = torch.tensor([2, 0])
    cache.keep(rows)
    found = model(torch.tensor([[9], [8]]), cache=cache)[:, 0]
    expected = model(torch.cat([some_ids(3, 1)[rows], torch.tensor([[9], [8]])], 1),
                     source=source[rows], source_lengths=lengths[rows])[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- what is refused

def test_a_model_says_what_it_cannot_do(tmp_path):
    tokens, lengths = some_ids(1, 5), torch.tensor([5])
    with pytest.raises(ValueError, match="is an encoder.*cannot generate"):
        sample.generate(tiny_model(architecture="encoder"), [[1, 2]], 3)
    with pytest.raises(ValueError, match="reads a source.*source is missing"):
        tiny_model(architecture="encoder_decoder")(tokens)
    with pytest.raises(TypeError, match="unexpected keyword argument 'source'"):
        tiny_model()(tokens, source=tokens, source_lengths=lengths)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prefix'"):
        tiny_model()(tokens, prefix=lengths)
    with pytest.raises(ValueError, match="source of 70 tokens.*context_length is 64"):
        tiny_model(architecture="encoder_decoder")(tokens, source=some_ids(1, 70),
                                                   source_lengths=torch.tensor([70]))
    for architecture in ("encoder", "encoder_decoder"):
        folder = folder_of(tiny_model(architecture=architecture), tmp_path / architecture)
        with pytest.raises(ValueError, match=f"{architecture}: this model is an {architecture}"):
            load_model(folder)
        model, _ = load_any_model(folder)
        assert model.architecture == architecture


def test_the_stages_after_pretraining_read_a_prefix_model_as_a_decoder(tmp_path):
    folder = folder_of(tiny_model(architecture="prefix"), tmp_path / "prefix")
    model, _ = load_model(folder)
    assert model.architecture == "decoder"
    assert load_any_model(folder)[0].architecture == "prefix"


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


