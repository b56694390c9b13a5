"""model.py: counted by hand, and against a slow second Transformer made of loops in float64."""
import cmath
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from data import Batch
from model import ModelConfig, Transformer, parameter_count, predecessors, rope_frequencies
from scoring import token_logps

torch.set_num_threads(1)
SIZES = {"vocab_size": 40, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4,
         "n_kv_heads": 2}                                              # C = 8, F = 96


def tiny(seed=0, dtype=torch.float32, **changes) -> Transformer:
    """A small model in which no weight is still at its starting zero or one."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | changes), dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_tokens(*shape, seed=1, vocab_size=40):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def a_batch(tokens, loss_mask=None, documents=None, positions=None) -> Batch:
    loss_mask = torch.ones_like(tokens).bool() if loss_mask is None else loss_mask
    return Batch(tokens, loss_mask, documents, positions, torch.arange(len(tokens)))


# ---------------------------------------------------------------------- counts

def test_parameter_count_is_the_hand_count():
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32        # wq, wk and wv of 2 heads of 8, wo
    mlp = 32 * 2 * 96 + 96 * 32                        # F: 8/3 * 32 = 85.3, up to a multiple of 16
    trunk = 40 * 32 + 2 * (attention + mlp + 2 * 32) + 32
    assert trunk == 26_016
    assert parameter_count(tiny()) == trunk
    assert parameter_count(tiny(tied=False)) == trunk + 40 * 32


def test_trainable_parameters_are_counted_apart():
    model = tiny().requires_grad_(False)
    model.norm.requires_grad_(True)
    assert parameter_count(model, trainable=True) == 32


def test_flops_per_token_are_the_hand_count():
    config = ModelConfig(**SIZES)
    matmul = 2 * (3072 + 9216) + 32 * 40               # two blocks, the output projection
    assert config.matmul_parameters() == matmul == 25_856
    assert config.flops_per_token(10) == 6 * matmul + 6 * 2 * 10 * 32 == 158_976
    assert Transformer(config).flops_per_token(10) == config.flops_per_token(10)


def test_a_forward_pass_multiplies_every_matmul_parameter_once_per_token():
    model, tokens = tiny(), some_tokens(2, 9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == 2 * 2 * 9 * model.config.matmul_parameters()


# ---------------------------------------------------------------------- the start

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [128, 768])
def test_initial_loss_is_log_vocabulary(tied, width):
    """Logits have std s = 0.02 sqrt(128) = 0.23, which adds s^2 / 2 = 0.03; tied, the input token
    also scores itself exp(0.02 * 128) = 13 times as likely: 0.01; 254 targets: noise of 0.02. At
    width 768 it would score itself exp(0.02 * 768) times as likely, and the loss be 15."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=1000, n_layers=2, d_model=width, tied=tied))
    loss = -token_logps(model.logps, a_batch(some_tokens(2, 128, vocab_size=1000))).mean()
    assert abs(loss.item() - math.log(1000)) < 0.1


def test_every_block_is_the_identity_at_the_start():
    model = Transformer(ModelConfig(**SIZES))
    h, documents = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.int32)
    for block in model.blocks:
        assert torch.equal(block(h, model.cos[:9], model.sin[:9], documents=documents), h)


def test_matrices_start_with_variance_one_over_fan_in():
    torch.manual_seed(0)
    block = Transformer(ModelConfig(vocab_size=40, d_model=256, n_layers=1)).blocks[0]
    for matrix in (block.attention.wq, block.attention.wk, block.attention.wv, block.mlp.w13):
        assert matrix.weight.std().item() == pytest.approx(256 ** -0.5, rel=0.02)


# ---------------------------------------------------------------------- a second implementation

def slow_norm(x, weight, eps):
    return x / ((x * x).sum() / len(x) + eps).sqrt() * weight


def slow_rope(x, position, theta):
    """x (C,), complex: channel c and c + C/2 are a number that is turned by theta^(-2c/C) m."""
    half = len(x) // 2
    turned = [torch.complex(x[c], x[c + half])
              * cmath.exp(1j * position * theta ** (-2 * c / len(x))) for c in range(half)]
    return torch.stack([z.real for z in turned] + [z.imag for z in turned])


def slow_attention(x, w, name, config, positions, documents):
    """x: list of T vectors (D,) -> the same, one query, head and key at a time."""
    C, group, outputs = config.d_head, config.n_heads // config.n_kv_heads, []
    for t in range(len(x)):
        heads = []
        for head in range(config.n_heads):
            rows = slice(head // group * C, head // group * C + C)
            q = slow_rope(w[name + "wq.weight"][head * C:(head + 1) * C] @ x[t], positions[t],
                          config.rope_theta)
            seen = [s for s in range(t + 1) if documents[s] == documents[t]]
            keys = [slow_rope(w[name + "wk.weight"][rows] @ x[s], positions[s], config.rope_theta)
                    for s in seen]
            scores = torch.stack([(q * k).sum() / math.sqrt(C) for k in keys]).exp()
            values = [w[name + "wv.weight"][rows] @ x[s] for s in seen]
            heads.append(sum(p * v for p, v in zip(scores / scores.sum(), values)))
        outputs.append(w[name + "wo.weight"] @ torch.cat(heads))
    return outputs


def slow_forward(w, config, tokens, positions=None, documents=None):
    """tokens: T ints -> logits (T, V) in float64. w: weights by name, float64."""
    positions, documents = positions or range(len(tokens)), documents or [0] * len(tokens)
    h = [w["embedding.weight"][token] for token in tokens]
    for layer in range(config.n_layers):
        name = f"blocks.{layer}."
        normed = [slow_norm(x, w[name + "attention_norm.weight"], config.norm_eps) for x in h]
        change = slow_attention(normed, w, name + "attention.", config, positions, documents)
        h = [x + y for x, y in zip(h, change)]
        for t, x in enumerate(h):
            x = slow_norm(x, w[name + "mlp_norm.weight"], config.norm_eps)
            gate, up = (w[name + "mlp.w13.weight"] @ x).chunk(2)
            swish = gate / (1 + torch.exp(-gate))
            h[t] = h[t] + w[name + "mlp.w2.weight"] @ (swish * up)
    output = w["embedding.weight"] if config.tied else w["lm_head.weight"]
    return torch.stack([output @ slow_norm(x, w["norm.weight"], config.norm_eps) for x in h])


def float64_weights(model):
    return {name: weight.detach().double().requires_grad_()
            for name, weight in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"tied": False, "n_kv_heads": 1},
                                     {"n_kv_heads": 4, "rope_theta": 100.0, "d_ff": 40}])
def test_logits_equal_a_slow_second_implementation(changes):
    model, tokens = tiny(**changes), some_tokens(2, 10)
    weights = float64_weights(model)
    expected = torch.stack([slow_forward(weights, model.config, row) for row in tokens.tolist()])
    assert expected.std() > 0.5                                        # there is something to miss
    torch.testing.assert_close(model(tokens).double(), expected, atol=1e-5, rtol=1e-5)


def test_every_gradient_equals_that_of_the_slow_implementation():
    model, row = tiny(), some_tokens(9).tolist()
    loss_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1]]).bool()
    documents, positions = [0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3, 4]
    batch = a_batch(torch.tensor([row]), loss_mask, torch.tensor([documents]),
                    torch.tensor([positions]))
    token_logps(model.logps, batch).sum().backward()
    weights = float64_weights(model)
    logps = slow_forward(weights, model.config, row[:-1], positions, documents).log_softmax(-1)
    sum(logps[t - 1, row[t]] for t in range(1, 9) if loss_mask[0, t]).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(weight.grad.double(), weights[name].grad, atol=2e-5, rtol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------- positions

def test_rope_frequencies_by_hand():
    assert rope_frequencies(ModelConfig(40, d_model=8, n_heads=2)).tolist() == pytest.approx(
        [1, 0.01])                                                     # C = 4: 10000^0, 10000^-1/2
    model = Transformer(ModelConfig(40, d_model=8, n_heads=2, n_layers=1))
    assert model.cos[3].tolist() == pytest.approx([math.cos(3), math.cos(0.03)])
    assert model.sin[3].tolist() == pytest.approx([math.sin(3), math.sin(0.03)])


def test_rope_scores_depend_on_the_distance_only():
    model = tiny()
    q, k = torch.randn(2, 1, 1, 1, 8)                                  # (B, T, H, C) each

    def score(m, n):
        turned = [kernels.rope(q, k, model.cos[i:i + 1], model.sin[i:i + 1]) for i in (m, n)]
        return (turned[0][0] * turned[1][1]).sum().item()

    for m, n in [(0, 0), (3, 1), (9, 2)]:
        assert score(m, n) == pytest.approx(score(m + 13, n + 13), abs=1e-5)
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)
    assert abs(score(9, 2) - score(3, 1)) > 0.01
    assert abs(score(3, 1) - score(1, 3)) > 0.01                       # distance has a sign


def test_moving_a_sequence_along_changes_nothing_but_stretching_it_does():
    model, tokens = tiny(), some_tokens(1, 8)
    places, plain = torch.arange(8)[None], model(tokens)
    torch.testing.assert_close(model(tokens, positions=places + 11), plain, atol=1e-5, rtol=1e-5)
    assert (model(tokens, positions=2 * places) - plain).abs().max() > 1e-2
    scores = [token_logps(model.logps, a_batch(tokens, positions=i * places)) for i in (1, 2)]
    assert torch.equal(scores[0], token_logps(model.logps, a_batch(tokens)))
    assert (scores[1] - scores[0]).abs().max() > 1e-2


# ---------------------------------------------------------------------- who sees whom

def test_a_token_changes_its_own_and_later_predictions_but_no_earlier_one():
    model, tokens = tiny(), some_tokens(1, 12)
    plain = model(tokens)
    for t in range(12):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        moved = (model(changed) - plain).abs().amax(-1)[0]
        assert moved[:t].max().item() < 1e-6 if t else True
        assert moved[t:].min().item() > 1e-5, t


def packed_row():
    lengths = [5, 1, 7, 4]
    documents = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])
    positions = torch.tensor([[t for n in lengths for t in range(n)]])
    return lengths, some_tokens(1, 17), documents, positions


def test_packed_documents_answer_as_they_do_alone():
    model, (lengths, tokens, documents, positions) = tiny(), packed_row()
    together = model(tokens, documents=documents, positions=positions).split(lengths, dim=1)
    for part, alone in zip(together, tokens.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, model(alone), atol=1e-5, rtol=1e-5)


def test_nothing_leaks_from_one_document_into_another():
    model, (lengths, tokens, documents, positions) = tiny(), packed_row()
    plain = model(tokens, documents=documents, positions=positions)
    for number in range(len(lengths)):
        own = documents == number
        changed = torch.where(own, (tokens + 1) % 40, tokens)
        moved = (model(changed, documents=documents, positions=positions) - plain).abs().amax(-1)
        assert moved[own].min() > 1e-5
        assert moved[~own].max() == 0


def test_without_document_numbers_the_documents_do_see_each_other():
    model, (_, tokens, documents, positions) = tiny(), packed_row()
    masked = model(tokens, documents=documents, positions=positions)
    assert (model(tokens, positions=positions) - masked)[:, 6:].abs().max() > 1e-2


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values(n_kv_heads):
    grouped, full = tiny(n_kv_heads=n_kv_heads), tiny(n_kv_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("wk.weight", "wv.weight")):                  # query head h reads key head
            heads = weights[name].unflatten(0, (n_kv_heads, 8))        # h // (H / K)
            weights[name] = heads.repeat_interleave(4 // n_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = some_tokens(2, 10)
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- heads and scores

def test_tied_output_is_the_embedding_and_untied_is_its_own():
    tied, untied = tiny(), tiny(tied=False)
    assert tied.output_weight is tied.embedding.weight and "lm_head.weight" not in tied.state_dict()
    assert untied.output_weight is untied.lm_head.weight
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.embedding.weight})
    assert torch.equal(untied(some_tokens(2, 9)), tied(some_tokens(2, 9)))


def test_temperature_divides_the_logits():
    model, tokens = tiny(), some_tokens(2, 9)
    expected = (model(tokens) / 4).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(model.logps(tokens, tokens, temperature=4.0), expected)


# ---------------------------------------------------------------------- precision and memory

def test_gradient_checkpointing_computes_the_same_gradients_by_running_blocks_twice():
    gradients, calls = {}, {}
    for on in (False, True):
        model, count = tiny(), []
        model.gradient_checkpointing = on
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        token_logps(model.logps, a_batch(some_tokens(2, 10))).sum().backward()
        gradients[on], calls[on] = [w.grad for w in model.parameters()], len(count)
    assert calls == {False: 2, True: 4}
    for plain, recomputed in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_bfloat16_stays_close_to_float32_on_float32_weights():
    """bf16 keeps 8 bits, 0.4 %: about ten roundings of logits below 4 leave less than 0.1."""
    precise, rough = tiny(), tiny(dtype=torch.bfloat16)
    batch = a_batch(some_tokens(2, 12))
    assert rough.hidden(batch.tokens).dtype == torch.bfloat16
    expected, scores = (token_logps(model.logps, batch) for model in (precise, rough))
    difference = (scores - expected).abs()
    assert scores.dtype == torch.float32 and 0 < difference.max() < 0.1
    for model, values in ((precise, expected), (rough, scores)):
        values.sum().backward()
        assert {w.grad.dtype for w in model.parameters()} == {torch.float32}
    for a, b in zip(precise.parameters(), rough.parameters(), strict=True):
        assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.99


# ---------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("changes, named", [
    ({"n_heads": 5, "n_kv_heads": 5}, "d_model 32 is not a multiple of n_heads 5"),
    ({"n_heads": 32, "n_kv_heads": 32}, "head width 1 .* is odd"),
    ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"n_layers": 0}, "n_layers is 0")])
def test_sizes_that_do_not_fit_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**SIZES | changes)


def test_the_context_can_be_filled_but_not_exceeded():
    model = tiny()
    assert model(some_tokens(1, 24)).shape == (1, 24, 40)
    with pytest.raises(ValueError, match="25 tokens.*context_length is 24"):
        model(some_tokens(1, 25))


# ---------------------------------------------------------------------- token shift

@torch.no_grad()
def test_predecessors_are_those_within_the_document():
    h = torch.arange(1.0, 7.0).view(1, 6, 1)
    before = torch.zeros(1, 1, 1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    assert predecessors(h, before, None, None).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert predecessors(h, before, documents, None).flatten().tolist() == [0, 1, 2, 0, 4, 0]
    positions = torch.tensor([[0, 0, 1, 2, 3, 4]])                     # one token of left padding
    assert predecessors(h, before, None, positions).flatten().tolist() == [0, 0, 2, 3, 4, 5]
    assert predecessors(h[:, 4:], h[:, 3:4], None, None).flatten().tolist() == [4, 5]


@torch.no_grad()
def test_with_token_shift_packed_documents_answer_as_they_do_alone_and_see_no_future():
    model, tokens = tiny(token_shift=True), some_tokens(1, 14)
    documents = torch.tensor([[0] * 5 + [1] * 9])
    positions = torch.tensor([[*range(5), *range(9)]])
    packed = model(tokens, documents=documents, positions=positions)
    alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 40
    later = model(changed, documents=documents, positions=positions)
    torch.testing.assert_close(later[:, :9], packed[:, :9], atol=0, rtol=0)
    assert (later[:, 9:] != packed[:, 9:]).any(-1).all()


def test_token_shift_costs_one_square_matrix():
    plain, shifted = (ModelConfig(**SIZES, token_shift=flag) for flag in (False, True))
    assert shifted.matmul_parameters() - plain.matmul_parameters() == 32 * 32
    assert parameter_count(Transformer(shifted)) - parameter_count(Transformer(plain)) == 32 * 32


def test_embeddings_begin_with_a_direction_in_common_if_asked():
    torch.manual_seed(1)
    plain = Transformer(ModelConfig(**SIZES))
    torch.manual_seed(1)
    shared = Transformer(ModelConfig(**SIZES, common=3.0))
    added = shared.embedding.weight - plain.embedding.weight
    # One vector for all tokens, three times as long as an embedding, up to the draw.
    assert torch.allclose(added, added[:1].expand_as(added), atol=1e-6)
    length = plain.embedding.weight.norm(dim=-1).mean()
    assert 1.5 * length < added[0].norm() < 6 * length
