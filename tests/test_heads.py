"""heads.py: one linear head on any trunk, and two answers from one pass."""
import pytest
import torch
from tiny import TOKENIZER, tiny_model

from architectures import Encoder
from heads import WithHead
from model import ModelConfig, Transformer, parameter_count
from sample import cast_once

torch.set_num_threads(1)
SIZES = {"vocab_size": 40, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4,
         "n_kv_heads": 2}


def tiny(n=1, seed=0, dtype=torch.float32, **changes) -> WithHead:
    """A small model in which no weight is still at its starting zero or one."""
    torch.manual_seed(seed)
    model = WithHead(Transformer(ModelConfig(**SIZES | changes), dtype), n)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_tokens(*shape, seed=1):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def test_parameters_and_flops_are_the_hand_count():
    model = tiny()
    assert parameter_count(model) == parameter_count(model.trunk) + 32 + 1              # W_r, b_r
    assert model.matmul_parameters() == model.trunk.matmul_parameters() + 32
    assert model.flops_per_token(10) == model.trunk.flops_per_token(10) + 6 * 32


def test_the_head_starts_small_and_without_bias():
    torch.manual_seed(0)
    trunk = Transformer(ModelConfig(vocab_size=40, d_model=1024, n_layers=1, n_heads=8, d_ff=1))
    head = WithHead(trunk, 1).head
    standard_error = 1 / 2048 ** 0.5                   # of a standard deviation, relative
    assert head.weight.std().item() == pytest.approx(1025 ** -0.5, rel=4 * standard_error)
    assert head.bias.item() == 0
    assert not WithHead(trunk, 3, zero=True).head.weight.any()


@pytest.mark.parametrize("n", [1, 3])
def test_the_head_gives_n_numbers_per_token(n):
    model, tokens = tiny(n), some_tokens(2, 9)
    hidden = model.trunk.hidden(tokens)
    assert model(tokens).shape == (2, 9, n) and model(tokens).dtype == torch.float32
    for i in range(n):
        expected = (hidden * model.head.weight[i]).sum(-1) + model.head.bias[i]
        torch.testing.assert_close(model(tokens)[..., i], expected, atol=1e-5, rtol=1e-5)


def test_the_head_answers_in_fp32_in_a_bfloat16_model():
    model, tokens = tiny(dtype=torch.bfloat16), some_tokens(2, 9)
    assert model.dtype == model.trunk.hidden(tokens).dtype == torch.bfloat16
    assert model(tokens).dtype == torch.float32


def test_documents_and_positions_reach_the_trunk():
    model, tokens = tiny(), some_tokens(1, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5])
    positions = torch.tensor([[*range(4), *range(5)]])
    packed = model(tokens, documents, positions)
    alone = torch.cat([model(tokens[:, :4]), model(tokens[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_values_and_log_probs_come_from_one_pass(tied):
    model, tokens = tiny(tied=tied), some_tokens(2, 9)
    targets, loss_mask = tokens.roll(-1, 1), torch.rand(2, 9) < 0.5
    passes = []
    model.trunk.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    values, logps = model.values_and_logps(tokens, targets, loss_mask)
    assert len(passes) == 1
    assert torch.equal(values, model(tokens))
    h = model.trunk.hidden(tokens)
    for b in range(2):
        for t in range(9):
            if loss_mask[b, t]:
                logp = (model.trunk.output_weight @ h[b, t]).log_softmax(-1)[targets[b, t]]
                torch.testing.assert_close(logps[b, t], logp)
            else:
                assert logps[b, t] == 0


def test_an_untied_vocabulary_is_frozen_unless_asked_to_be_kept():
    config = ModelConfig(**SIZES, tied=False)
    frozen = WithHead(Transformer(config), 1)
    assert not frozen.trunk.lm_head.weight.requires_grad
    frozen(some_tokens(2, 9)).sum().backward()
    assert all(weight.grad is not None for weight in frozen.parameters() if weight.requires_grad)
    kept = WithHead(Transformer(config), 1, keep_lm_head=True)
    assert all(weight.requires_grad for weight in kept.parameters())
    assert all(weight.requires_grad for weight in tiny().parameters())         # tied: the embedding


def test_segments_reach_an_encoder():
    torch.manual_seed(0)
    model = WithHead(Encoder(ModelConfig(**SIZES), n_segments=2), 2)
    tokens = some_tokens(2, 9)
    segments = torch.tensor([[0] * 5 + [1] * 4] * 2)
    assert (model(tokens, segments=segments) != model(tokens)).any()


def test_gradient_checkpointing_is_the_trunks():
    model = tiny()
    model.gradient_checkpointing = True
    assert model.trunk.gradient_checkpointing and model.gradient_checkpointing


def test_a_model_with_a_head_does_not_generate():
    with pytest.raises(ValueError, match="scalar head.*generating tokens takes a language model"):
        cast_once(tiny_model(head="scalar"), torch.float32)
    assert tiny_model(head="scalar").config.vocab_size == TOKENIZER.vocab_size
