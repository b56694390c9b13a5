"""plumbing/forecast.py: memory against what autograd really keeps, and what is refused."""
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model

import parallel
import train_dpo
import train_ppo
import train_pretrain
from architectures import Encoder, EncoderDecoder
from model import ModelConfig, Transformer
from parallel import local
from plumbing import forecast
from plumbing.forecast import Workload
from plumbing.optimizers import pick_optimizer
from plumbing.options import flat

SIZES = {"vocab_size": 272, "d_model": 64, "n_layers": 3, "n_heads": 4, "context_length": 96}


@pytest.fixture
def two_ranks():
    """This process is the first of two, whose other one is not there: sums are of zeros."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def kept_bytes(model, tokens, **inputs):
    """Bytes of all tensors that the backward pass of this forward pass holds, parameters apart."""
    own, found = {local(p).untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), x    # held: an address is not used again
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.logps(tokens, tokens, **inputs).sum()
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("changes, kind", [
    ({}, Transformer), ({"n_kv_heads": 1}, Transformer), ({"d_ff": 512}, Transformer),
    ({"token_shift": True}, Transformer), ({}, Encoder)])
def test_activations_are_what_autograd_keeps(changes, kind):
    torch.manual_seed(0)
    model = kind(ModelConfig(**SIZES | changes))
    tokens = torch.randint(256, (4, 96))
    real = kept_bytes(model, tokens)
    estimate = forecast.activation_bytes(model.config, 4, 96, 4, on_cpu=True,
                                         architecture=model.architecture)
    assert estimate == pytest.approx(real, rel=0.2)


def test_activations_of_an_encoder_decoder_are_what_autograd_keeps():
    model = EncoderDecoder(ModelConfig(**SIZES))
    tokens = torch.randint(256, (4, 96))
    real = kept_bytes(model, tokens, source=tokens, source_lengths=torch.full((4,), 96))
    estimate = forecast.activation_bytes(model.config, 4, 96, 4, on_cpu=True,
                                         architecture="encoder_decoder")
    assert estimate == pytest.approx(real, rel=0.25)


@pytest.mark.parametrize("changes", [{}, {"d_ff": 512}, {"n_experts": 4}])
def test_ranks_that_divide_the_matrices_keep_their_parts(changes, two_ranks):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES | changes))
    whole = forecast.state_bytes(model, "muon", torch.bfloat16)
    parallel.shard(model, fsdp=False, tensor_parallel=2)
    real = kept_bytes(model, torch.randint(256, (4, 96)))
    estimate, alone = (forecast.activation_bytes(model.config, 4, 96, 4, on_cpu=True,
                                                 tensor_parallel=n) for n in (2, 1))
    assert estimate == pytest.approx(real, rel=0.25) and estimate < 0.75 * alone
    assert forecast.state_bytes(model, "muon", torch.bfloat16, 2) == pytest.approx(whole / 2,
                                                                                  rel=0.02)


def test_sharded_weights_are_gathered_two_blocks_at_a_time(two_ranks):
    model = Transformer(ModelConfig(**SIZES | {"n_layers": 20}))
    n, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.blocks[0]))
    parallel.shard(model)
    own = sum(local(p).numel() for p in model.parameters())
    assert forecast.state_bytes(model, "adamw", torch.bfloat16) == pytest.approx(
        16 * own + 2 * (n - 18 * block), rel=1e-6)
    assert own == pytest.approx(n / 2, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_blocks_only():
    config = ModelConfig(**SIZES | {"n_layers": 40})
    whole = forecast.activation_bytes(config, 4, 96, 2)
    assert forecast.activation_bytes(config, 4, 96, 2, checkpointing=True) < whole / 8


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam"])
def test_state_is_what_weights_gradients_and_optimizer_take(optimizer):
    model = tiny_model(vocab_size=2, d_model=64)
    chosen = pick_optimizer(optimizer, model, 1e-3, 0.0, torch.float32)
    model(torch.ones(1, 4, dtype=torch.long)).sum().backward()
    chosen.step()
    real = sum(p.numel() * 8 for p in model.parameters()) + sum(
        x.numel() * x.element_size() for state in chosen.state.values() for x in state.values()
        if isinstance(x, torch.Tensor) and x.dim())
    assert forecast.state_bytes(model, optimizer, torch.float32) == pytest.approx(real, rel=0.02)


def test_the_peak_is_at_least_what_a_matmul_reaches_now():
    peak = forecast.matmul_peak(torch.device("cpu"), torch.float32, 256)
    assert 1e8 < peak < 1e15
    assert forecast.memory_of(torch.device("cpu")) > 1e8


def test_a_run_is_described_in_tokens_flops_memory_and_time():
    model = Transformer(ModelConfig(**SIZES))
    flops = model.config.flops_per_token(96) * 1e6
    sentence = forecast.describe((model,), "adamw", Workload(4, 96, 1e6), 1e9, 2**34)
    assert f"1.0M tokens to train on, {flops:.1e} FLOPs" in sentence
    assert f"about {flops / 0.4e9 / 60:.0f} minutes at 40% of 0.001 TFLOP/s" in sentence


PRETRAIN, DPO, PPO = (flat(script.Config()) for script in (train_pretrain, train_dpo, train_ppo))


@pytest.mark.parametrize("memory, rows, checkpointing, options, advice", [
    (1_000_000, 4, False, PRETRAIN, "a smaller model .--d_model.*, or --shard fsdp"),
    (1_000_000, 4, False, DPO, "a smaller model .--d_model, --n_layers of pretraining.$"),
    (30_000_000, 24, False, PRETRAIN, "--gradient_checkpointing"),
    (30_000_000, 24, False, DPO, "--gradient_checkpointing"),
    (30_000_000, 10**4, False, DPO, "a smaller --batch_size, or a shorter --context_length$"),
    (30_000_000, 24, False, PPO, "a smaller --minibatch_size$"),
    (30_000_000, 10**4, False, PRETRAIN,
     "a smaller --batch_size with more --grad_accum, or a shorter --context_length$"),
    (30_000_000, 400, True, PRETRAIN, "a smaller --batch_size with more --grad_accum")])
def test_what_cannot_fit_is_refused_with_the_flag_that_helps(memory, rows, checkpointing, options,
                                                             advice):
    model = Transformer(ModelConfig(**SIZES))
    model.gradient_checkpointing = checkpointing
    with pytest.raises(ValueError, match=f"needs about .* but there are .* GB: give {advice}"):
        forecast.describe((model,), "adamw", Workload(rows, 96, 1e6), 1e12, memory, options)
    forecast.describe((model,), "adamw", Workload(rows, 96, 1e6), 1e12, 2**40)


def test_a_second_model_takes_memory_but_no_time():
    """The reference of DPO, frozen: its weights alone, in fp32."""
    model, frozen = (Transformer(ModelConfig(**SIZES)) for _ in range(2))
    frozen.requires_grad_(False)
    work = Workload(4, 96, 1e6)
    alone, beside = (forecast.describe(models, "adamw", work, 1e9, 2**40)
                     for models in ((model,), (model, frozen)))
    assert alone.split(" TFLOP/s")[0] == beside.split(" TFLOP/s")[0]
    weights = 4 * sum(p.numel() for p in frozen.parameters())
    assert forecast.state_bytes(frozen, "adamw", torch.float32) == weights
    room = (forecast.state_bytes(model, "adamw", torch.float32) + weights // 2
            + forecast.activation_bytes(model.config, 4, 96, 4, on_cpu=True))
    forecast.describe((model,), "adamw", work, 1e9, room)
    with pytest.raises(ValueError, match="this run needs about"):
        forecast.describe((model, frozen), "adamw", work, 1e9, room)


def test_a_stage_reads_its_batch_size_unless_it_says_otherwise():
    cfg = SimpleNamespace(batch_size=8, steps=10, grad_accum=3)
    config = ModelConfig(**SIZES)
    assert forecast.workload(cfg, config) == (8, 96, 10 * 3 * 8 * 96)
    assert forecast.workload(cfg, config, rows=2, length=40.4) == (2, 40, 10 * 3 * 2 * 40)
    assert forecast.workload(cfg, config, tokens=5.0) == (8, 96, 5.0)


def test_an_encoder_decoders_token_is_read_by_one_of_its_stacks():
    for kind, share in ((Transformer, 1), (EncoderDecoder, 0.5)):
        model = kind(ModelConfig(**SIZES))
        assert forecast.flops_per_token(model, 96) == share * model.flops_per_token(96)


@pytest.mark.parametrize("seconds, words", [
    (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"), (7200, "2 hours"),
    (172_800, "2 days")])
def test_a_time_is_given_in_the_largest_unit_of_which_there_are_two(seconds, words):
    assert forecast.in_words(seconds) == words
