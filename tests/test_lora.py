"""lora.py: what stands still, what moves, and that merged, saved and swapped mean the same."""
import copy
import hashlib
import json

import pytest
import safetensors.torch
import torch
from stages import write_inputs
from tiny import ending_model, folder_of

import lora
import train_dpo
import train_grpo
import train_ppo
import train_rm
from data import Batch
from lora import LoRALinear
from model import Linear, ModelConfig, Transformer, parameter_count
from plumbing.folders import load_model, load_reward_model, save_model
from plumbing.options import build
from scoring import token_logps
from tokenizer import Tokenizer

torch.set_num_threads(1)
SIZES = {"vocab_size": 272, "context_length": 32, "d_model": 32, "n_layers": 2, "n_heads": 4,
         "n_kv_heads": 2}
EVERY_TARGET = "wq,wk,wv,wo,w13,w2"
TOKENS = torch.randint(272, (3, 12), generator=torch.Generator().manual_seed(1))
BATCH = Batch(TOKENS, torch.ones_like(TOKENS).bool(), None, None, torch.arange(3))


def base_model(seed=0, dtype=torch.float32, **changes) -> Transformer:
    """A small model in which no weight is still at its starting zero or one."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | changes), dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def adapted(model=None, seed=5, rank=4, alpha=8.0, targets="wq,wv") -> Transformer:
    """The model with an adapter that has been "trained": B is not zero."""
    model = lora.apply(model or base_model(), rank, alpha, targets)
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.B.normal_(std=0.1)
    return model


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------- the start

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["wq,wv", EVERY_TARGET])
def test_at_the_start_the_output_is_the_bases_bit_for_bit(dtype, targets):
    model = base_model(dtype=dtype)
    expected = model(TOKENS)
    assert torch.equal(lora.apply(model, 4, 8.0, targets)(TOKENS), expected)
    assert adapted(base_model(dtype=dtype), targets=targets)(TOKENS).ne(expected).any()


def test_A_starts_random_and_B_zero():
    """001 section 2.5, steps 1.1 and 1.2; std 1 / r. 4,096 numbers: 5 deviations are 6 %."""
    torch.manual_seed(0)
    module = LoRALinear(Linear(1024, 48), rank=4, alpha=8.0)
    with torch.no_grad():
        module.B.fill_(1.0)
    lora.init_A([module])
    lora.init_B([module])
    assert module.A.shape == (4, 1024) and module.B.shape == (48, 4)
    assert module.B.eq(0).all() and module.A.ne(0).all()
    assert module.A.mean().item() == pytest.approx(0, abs=0.02)
    assert module.A.std().item() == pytest.approx(1 / 4, rel=0.06)


def test_the_three_steps_of_the_start_are_apply():
    one, two = base_model(), base_model()
    torch.manual_seed(1)
    adapters = lora.add_adapters(one, 4, 8.0, "wq,w2")
    assert len(adapters) == 4 and all(weight.requires_grad for weight in one.parameters())
    lora.init_A(adapters)
    lora.init_B(adapters)
    lora.freeze_base(one)
    torch.manual_seed(1)
    assert same(weights_of(one), weights_of(lora.apply(two, 4, 8.0, "wq,w2")))
    for model in (one, two):
        learning = {name for name, w in model.named_parameters() if w.requires_grad}
        assert learning == {name for name, _ in model.named_parameters()
                            if name.endswith((".A", ".B"))}


def test_rank_16_beside_a_4096_square_matrix_trains_131_072_numbers():
    """001 section 2.4.1: |phi| = 2 r d = 131,072 against 16,777,216, 128 times fewer."""
    with torch.device("meta"):
        module = LoRALinear(Linear(4096, 4096), rank=16, alpha=32.0)
        lora.freeze_base(module)
    assert parameter_count(module, trainable=True) == 2 * 16 * 4096 == 131_072
    assert module.base.weight.numel() == 16_777_216 == 128 * 131_072


def test_trainable_count_over_a_model_is_the_hand_count():
    model = lora.apply(base_model(), 4, 8.0, EVERY_TARGET)
    per_block = (32 + 32) + 2 * (32 + 16) + (32 + 32) + (32 + 192) + (96 + 32)     # d_in + d_out
    assert parameter_count(model, trainable=True) == 2 * 4 * per_block == 4608


# ---------------------------------------------------------------------- the change

def test_the_change_is_alpha_over_r_times_B_A_x_by_hand():
    base = Linear(2, 2)
    module = LoRALinear(base, rank=2, alpha=6.0)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        module.A.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        module.B.copy_(torch.tensor([[10.0, 0.0], [-1.0, 1.0]]))
    x = torch.tensor([4.0, 5.0])                       # A x = (14, 5), B A x = (140, -9)
    assert module(x).tolist() == [4 + 3 * 140, 5 - 3 * 9]
    assert module.merged_weight().tolist() == [[31.0, 60.0], [-3.0, -2.0]]


def test_only_A_and_B_get_gradients_and_all_of_them_do():
    model = adapted(targets=EVERY_TARGET)
    token_logps(model.logps, BATCH).sum().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if name.endswith((".A", ".B"))}
    assert len(moved) == 2 * 2 * 6
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in moved)


def test_gradients_are_those_of_the_merged_weight_by_the_chain_rule():
    """W = W_0 + s B A, so dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T."""
    model = adapted(targets=EVERY_TARGET)
    plain = lora.merge(copy.deepcopy(model))
    for m in (model, plain):
        (-token_logps(m.logps, BATCH).mean()).backward()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            dW = plain.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(module.A.grad, module.scale * module.B.T @ dW, atol=1e-5,
                                       rtol=1e-4)
            torch.testing.assert_close(module.B.grad, module.scale * dW @ module.A.T, atol=1e-5,
                                       rtol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_base_untouched():
    model, expected = base_model(), base_model().state_dict()
    lora.apply(model, 4, 8.0, "wq,wv")
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        loss = -token_logps(model.logps, BATCH).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert same(weights_of(lora.detach(model)), expected)


@pytest.mark.parametrize("targets", ["wq", "wk,wo", " w13 , w2", EVERY_TARGET])
def test_merged_equals_unmerged_to_rounding(targets):
    model = adapted(targets=targets)
    expected, names = model(TOKENS), set(base_model().state_dict())
    merged = lora.merge(model)
    torch.testing.assert_close(merged(TOKENS), expected, atol=2e-5, rtol=1e-5)
    assert set(merged.state_dict()) == names                           # plain again, and trainable
    assert all(weight.requires_grad for weight in merged.parameters())
    assert not torch.equal(merged(TOKENS), base_model()(TOKENS))


def test_only_the_named_matrices_are_adapted():
    model = adapted(targets="wk,w2")
    found = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attention.wk", "mlp.w2")}


def test_detaching_restores_the_base_bit_for_bit():
    model = base_model()
    expected = weights_of(model)
    detached = lora.detach(adapted(model))
    assert same(weights_of(detached), expected)
    assert all(weight.requires_grad for weight in detached.parameters())


# ---------------------------------------------------------------------- saved alone

def test_a_saved_adapter_gives_the_same_model_on_a_fresh_copy_of_the_base(tmp_path):
    model = adapted(targets="wq,w13", rank=3, alpha=7.0)
    lora.save_adapter(tmp_path, model, 3, 7.0, "wq,w13")
    loaded = lora.load_adapter(base_model(), tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert same(weights_of(loaded), weights_of(model))


def test_an_adapter_file_holds_A_and_B_and_nothing_of_the_base(tmp_path):
    lora.save_adapter(tmp_path, adapted(), 4, 8.0, "wq,wv")
    weights = safetensors.torch.load_file(tmp_path / "adapter.safetensors")
    assert sum(w.numel() for w in weights.values()) == 2 * 4 * ((32 + 32) + (32 + 16))
    shape = json.loads((tmp_path / "adapter.json").read_text())
    known = shape.pop("sha256")
    assert shape == {"rank": 4, "alpha": 8.0, "targets": "wq,wv"}
    assert not list(tmp_path.glob("*.tmp"))
    raw = (tmp_path / "adapter.safetensors").read_bytes()
    assert known == hashlib.sha256(raw).hexdigest()
    (tmp_path / "adapter.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match="adapter.safetensors is not what the run wrote"):
        lora.read_adapter(tmp_path)


def test_two_adapters_are_swapped_over_one_base(tmp_path):
    models = {"a": adapted(seed=5), "b": adapted(seed=6, rank=2, alpha=2.0, targets="wk,w2")}
    lora.save_adapter(tmp_path / "a", models["a"], 4, 8.0, "wq,wv")
    lora.save_adapter(tmp_path / "b", models["b"], 2, 2.0, "wk,w2")
    model = base_model()
    for name in ("a", "b", "a"):
        lora.load_adapter(model, tmp_path / name)
        assert torch.equal(model(TOKENS), models[name](TOKENS))
    assert not torch.equal(models["a"](TOKENS), models["b"](TOKENS))
    assert torch.equal(lora.detach(model)(TOKENS), base_model()(TOKENS))


def test_merging_by_hand_writes_a_plain_model_folder(tmp_path):
    base, tokenizer, model = base_model(), Tokenizer.bytes(), adapted()
    save_model(tmp_path / "base", base, tokenizer)
    lora.save_adapter(tmp_path / "adapter", model, 4, 8.0, "wq,wv")
    lora.main(lora.Config(*(str(tmp_path / name) for name in ("base", "adapter", "merged"))))
    merged, found = load_model(tmp_path / "merged")
    assert found == tokenizer
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="base is not empty; give another folder"):
        lora.main(lora.Config(*(str(tmp_path / name) for name in ("base", "adapter", "base"))))


# ---------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("targets", ["wq,query", "embedding", "", "lm_head", "scalar_head"])
def test_an_unknown_target_is_refused_with_the_known_ones(targets):
    model = base_model(tied=False)
    with pytest.raises(ValueError, match="--lora_targets.*w13, w2, wk, wo, wq, wv"):
        lora.apply(model, 4, 8.0, targets)
    assert all(weight.requires_grad for weight in model.parameters())  # nothing was frozen


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="--lora_rank is 0"):
        lora.apply(base_model(), 0, 8.0)


@pytest.mark.parametrize("changes, named", [
    ({"d_model": 64}, r"blocks.0.attention.wq.A is \(4, 32\), the model takes \(4, 64\)"),
    ({"n_layers": 1}, "blocks.1.attention.wq.A is .*, the model takes None"),
    ({"n_layers": 3}, "blocks.2.attention.wq.A is None")])
def test_an_adapter_of_another_base_is_refused(tmp_path, changes, named):
    lora.save_adapter(tmp_path, adapted(), 4, 8.0, "wq,wv")
    with pytest.raises(ValueError, match=f"{named}.*another model"):
        lora.load_adapter(base_model(**changes), tmp_path)


@pytest.mark.parametrize("missing", ["adapter.json", "adapter.safetensors"])
def test_a_folder_without_a_whole_adapter_is_refused(tmp_path, missing):
    lora.save_adapter(tmp_path, adapted(), 4, 8.0, "wq,wv")
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match="no adapter.json and adapter.safetensors"):
        lora.load_adapter(base_model(), tmp_path)


@pytest.mark.parametrize("damaged", ["adapter.json", "adapter.safetensors"])
def test_a_damaged_adapter_is_refused_by_name(tmp_path, damaged):
    lora.save_adapter(tmp_path, adapted(), 4, 8.0, "wq,wv")
    whole = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(whole[:len(whole) // 2])
    model = base_model()
    with pytest.raises(ValueError, match="adapter.*damaged"):
        lora.load_adapter(model, tmp_path)
    assert torch.equal(model(TOKENS), base_model()(TOKENS))            # as it was


# ---------------------------------------------------------------------- in the alignment stages

def test_the_base_under_adapters_does_not_move_by_a_bit_while_they_learn():
    model = base_model()
    before = model.logps(TOKENS[:, :-1], TOKENS[:, 1:]).detach()
    lora.apply(model, 2, 4.0, "wq,wv,w2")
    base = lora.Base(model)
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=0.1)
    for _ in range(3):
        model.logps(TOKENS[:, :-1], TOKENS[:, 1:]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(base.logps(TOKENS[:, :-1], TOKENS[:, 1:]), before)
    after = model.logps(TOKENS[:, :-1], TOKENS[:, 1:])
    assert (after - before).abs().max() > 0.1
    assert not list(base.parameters())                         # no second copy of the weights


def test_adapters_are_on_again_after_an_error():
    model = lora.apply(base_model(), 2, 4.0)
    with pytest.raises(RuntimeError), lora.adapters_off(model):
        assert not any(adapter.is_on for adapter in lora.adapters_of(model))
        raise RuntimeError
    assert all(adapter.is_on for adapter in lora.adapters_of(model))


ALIGNED = {"dpo": (train_dpo, {"data": "pairs.jsonl", "batch_size": 4, "warmup": 0}),
           "rm": (train_rm, {"data": "pairs.jsonl", "batch_size": 4, "warmup": 0, "n_shift": 4,
                             "max_new_tokens": 6}),
           "grpo": (train_grpo, {"prompts": "examples.jsonl", "reward": "rm", "batch_size": 2,
                                 "group": 2, "max_new_tokens": 6, "method": "reinforce"}),
           "ppo": (train_ppo, {"prompts": "examples.jsonl", "reward": "rm", "batch_size": 4,
                               "minibatch_size": 2, "max_new_tokens": 6})}


@pytest.mark.parametrize("stage", ALIGNED)
def test_alignment_by_adapters_moves_their_matrices_alone(tmp_path, monkeypatch, stage):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    if stage == "grpo":
        # because answers that all never end are worth the same
        folder_of(ending_model(), "sft")
    script, options = ALIGNED[stage]
    script.main(build(script.Config, options | {
        "init": "sft", "out": "out", "peft": "lora", "lora_rank": 2, "steps": 2, "lr": 1e-2,
        "device": "cpu", "dtype": "float32"}))
    before = load_model("sft")[0]
    if stage == "rm":
        after = load_reward_model("out")[0].trunk
    else:
        after = load_model("out")[0]
    moved = {name.split(".")[-2] for name, w in after.state_dict().items()
             if not torch.equal(w, before.state_dict()[name])}
    assert moved == {"wq", "wv"}
    merged = lora.merge(lora.load_adapter(before, "out")).state_dict()
    for name, w in after.state_dict().items():
        torch.testing.assert_close(w, merged[name], atol=1e-6, rtol=1e-5)
