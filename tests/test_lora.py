"""
lora.py: what stands still, what moves, that merged, saved and swapped mean the same, and that peft
and transformers, where they are installed, compute the same.
"""
import copy
import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from stages import (
    EXAMPLES,
    STAGES,
    assert_same_end,
    straight_stopped_and_killed,
    write_inputs,
)
from tiny import ending_model, folder_of, llama_of

import kernels
import lora
import sample
import train_dpo
import train_grpo
import train_ppo
import train_rm
import train_sft
from data import Batch
from kernels import dequantize_nf4_reference, quantize_nf4
from lora import LoRALinear
from model import Linear, ModelConfig, Transformer, parameter_count
from plumbing.folders import load_model, load_reward_model, save_model
from plumbing.options import build
from scoring import token_logps
from tokenizer import N_SPECIAL, Tokenizer

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


def lora_options(rank=4, alpha=8.0, targets="wq,wv", **others) -> lora.Options:
    return lora.Options("lora", rank, alpha, lora_targets=targets, **others)


def apply(model, rank, alpha, targets="wq,wv") -> Transformer:
    return lora.attach(model, lora_options(rank, alpha, targets))


def adapted(model=None, seed=5, rank=4, alpha=8.0, targets="wq,wv", **others) -> Transformer:
    """The model with adapters that have been "trained": B, W_up, ... are not zero."""
    options = lora_options(rank, alpha, targets)
    model = lora.attach(model or base_model(), replace(options, **others))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and not name.endswith(".A"):
                weight.normal_(std=0.1)
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
    assert torch.equal(apply(model, 4, 8.0, targets)(TOKENS), expected)
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
    adapters = lora.add_adapters(one, lora_options(targets="wq,w2"))
    assert len(adapters) == 4 and all(weight.requires_grad for weight in one.parameters())
    lora.init_A(adapters)
    lora.init_B(adapters)
    lora.freeze_base(one)
    torch.manual_seed(1)
    assert same(weights_of(one), weights_of(apply(two, 4, 8.0, "wq,w2")))
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
    model = apply(base_model(), 4, 8.0, EVERY_TARGET)
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
    apply(model, 4, 8.0, "wq,wv")
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
    lora.save_adapter(tmp_path, model)
    loaded = lora.load_adapter(base_model(), tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert same(weights_of(loaded), weights_of(model))


def test_an_adapter_file_holds_A_and_B_and_nothing_of_the_base(tmp_path):
    lora.save_adapter(tmp_path, adapted())
    weights = safetensors.torch.load_file(tmp_path / "adapter.safetensors")
    assert sum(w.numel() for w in weights.values()) == 2 * 4 * ((32 + 32) + (32 + 16))
    shape = json.loads((tmp_path / "adapter.json").read_text())
    known = shape.pop("sha256")
    assert shape == {"peft": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_sqrt": False,
                     "lora_targets": "wq,wv", "lora_layers": "", "lora_dropout": 0.0,
                     "template": False}
    assert not list(tmp_path.glob("*.tmp"))
    raw = (tmp_path / "adapter.safetensors").read_bytes()
    assert known == hashlib.sha256(raw).hexdigest()
    (tmp_path / "adapter.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match="adapter.safetensors is not what the run wrote"):
        lora.read_adapter(tmp_path)


def test_two_adapters_are_swapped_over_one_base(tmp_path):
    models = {"a": adapted(seed=5), "b": adapted(seed=6, rank=2, alpha=2.0, targets="wk,w2")}
    lora.save_adapter(tmp_path / "a", models["a"])
    lora.save_adapter(tmp_path / "b", models["b"])
    model = base_model()
    for name in ("a", "b", "a"):
        lora.load_adapter(model, tmp_path / name)
        assert torch.equal(model(TOKENS), models[name](TOKENS))
    assert not torch.equal(models["a"](TOKENS), models["b"](TOKENS))
    assert torch.equal(lora.detach(model)(TOKENS), base_model()(TOKENS))


def test_merging_by_hand_writes_a_plain_model_folder(tmp_path):
    base, tokenizer, model = base_model(), Tokenizer.bytes(), adapted()
    save_model(tmp_path / "base", base, tokenizer)
    lora.save_adapter(tmp_path / "adapter", model)
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
        apply(model, 4, 8.0, targets)
    assert all(weight.requires_grad for weight in model.parameters())  # nothing was frozen


def test_a_rank_beyond_the_matrix_is_refused():
    with pytest.raises(ValueError, match="--lora_rank 33: wq has rank 32 at most"):
        apply(base_model(), 33, 8.0)


@pytest.mark.parametrize("changes, named", [
    ({"d_model": 64}, r"blocks.0.attention.wq.A is \(4, 32\), the model takes \(4, 64\)"),
    ({"n_layers": 1}, "blocks.1.attention.wq.A is .*, the model takes None"),
    ({"n_layers": 3}, "blocks.2.attention.wq.A is None")])
def test_an_adapter_of_another_base_is_refused(tmp_path, changes, named):
    lora.save_adapter(tmp_path, adapted())
    with pytest.raises(ValueError, match=f"{named}.*another model"):
        lora.load_adapter(base_model(**changes), tmp_path)


@pytest.mark.parametrize("missing", ["adapter.json", "adapter.safetensors"])
def test_a_folder_without_a_whole_adapter_is_refused(tmp_path, missing):
    lora.save_adapter(tmp_path, adapted())
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match="no adapter.json and adapter.safetensors"):
        lora.load_adapter(base_model(), tmp_path)


@pytest.mark.parametrize("damaged", ["adapter.json", "adapter.safetensors"])
def test_a_damaged_adapter_is_refused_by_name(tmp_path, damaged):
    lora.save_adapter(tmp_path, adapted())
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
    apply(model, 2, 4.0, "wq,wv,w2")
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
    model = apply(base_model(), 2, 4.0)
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


# ---------------------------------------------------------------------- the other methods

METHODS = {"qlora": {"lora_rank": 4, "lora_targets": EVERY_TARGET}, "adapter": {"bottleneck": 5},
           "parallel_adapter": {"bottleneck": 5}, "prefix": {"virtual_tokens": 3},
           "prompt": {"virtual_tokens": 3}}
VIRTUAL_ROW = torch.tensor([[272, 273, 274]])


def attached(method, **changes):
    return lora.attach(base_model(), lora.Options(method, **METHODS[method] | changes))


def with_virtual(tokens):
    return torch.cat([VIRTUAL_ROW.expand(len(tokens), -1), tokens], 1)


@pytest.mark.parametrize("method", ["adapter", "parallel_adapter"])
def test_an_adapter_begins_as_the_base_bit_for_bit(method):
    assert torch.equal(attached(method)(TOKENS), base_model()(TOKENS))


def test_qlora_begins_as_the_base_in_4_bits():
    rounded = base_model()
    for _, _, linear in lora.linears(rounded.blocks):
        weight = dequantize_nf4_reference(quantize_nf4(linear.weight), torch.float32)
        linear.weight.data.copy_(weight)
    found = attached("qlora")(TOKENS)
    torch.testing.assert_close(found, rounded(TOKENS), rtol=1e-4, atol=1e-4)
    assert (found - base_model()(TOKENS)).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_only_what_a_method_has_put_in_moves_and_all_of_it(method):
    model = attached(method)
    before = weights_of(model)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    batch = replace(BATCH, tokens=with_virtual(TOKENS), loss_mask=torch.ones(3, 15).bool())
    batch.loss_mask[:, :4] = False                     # no virtual token is a target
    for _ in range(2):                                 # A and W_down move from the second step on
        token_logps(model.logps, batch if method in lora.VIRTUAL else BATCH).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert moved == lora.learned_names(model)
    n = {"qlora": 4608, "adapter": 2 * 2 * 2 * 5 * 32, "parallel_adapter": 2 * 2 * 2 * 5 * 32,
         "prefix": 2 * 2 * 3 * 16, "prompt": 3 * 32}   # blocks, two each, numbers of each
    assert parameter_count(model, trainable=True) == n[method]


@pytest.mark.parametrize("method", ["adapter", "parallel_adapter"])
def test_an_adapter_is_its_formula(method):
    """2.4.3: h + f(h W_down) W_up behind a layer, h + f(x W_down) W_up beside it."""
    layer = lora.Bottleneck(Linear(6, 6), 6, 2, method == "parallel_adapter", torch.device("cpu"))
    torch.nn.init.normal_(layer.up)
    x = torch.randn(4, 6)
    h = x @ layer.base.weight.T
    z = x if method == "parallel_adapter" else h
    hidden = z @ layer.down.T
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2 ** 0.5))
    torch.testing.assert_close(layer(x), h + gelu @ layer.up.T)


def test_a_prompt_is_that_many_embeddings_before_the_text():
    model = attached("prompt")
    vectors = model.embedding.vectors
    plain = base_model()

    def slow(tokens):
        """The base, which reads the vectors in the place of embeddings."""
        h = torch.cat([vectors.expand(len(tokens), -1, -1), plain.embedding(tokens)], 1)
        h = plain.run_blocks(plain.blocks, h, None, plain.mask(h, h.shape[1]), None, None)
        return plain.logits_of(plain.norm(h))
    torch.testing.assert_close(model(with_virtual(TOKENS))[:, 3:], slow(TOKENS)[:, 3:])


def test_a_prefix_is_learned_keys_and_values_in_each_layer():
    """2.4.4: K' = [P_K, K], V' = [P_V, V] by hand, with the softmax written out."""
    model = attached("prefix")
    attention = model.blocks[0].attention
    x = torch.randn(1, 5, 32)
    model.embedding(with_virtual(TOKENS[:1, :2]))      # which says where the virtual tokens are
    cos, sin = model.cos[:5], model.sin[:5]
    found = attention(x, cos, sin)
    H, K, C = 4, 2, 8
    q = (x @ attention.wq.weight.T).view(5, H, C)
    k = torch.cat([attention.wk.vectors, x[0, 3:] @ attention.wk.base.weight.T]).view(5, K, C)
    v = torch.cat([attention.wv.vectors, x[0, 3:] @ attention.wv.base.weight.T]).view(5, K, C)
    q, k = kernels.rope_reference(q[None], k[None], cos, sin)
    rows = []
    for t in range(3, 5):
        heads = []
        for head in range(H):
            scores = k[0, :t + 1, head // 2] @ q[0, t, head] / C ** 0.5
            heads.append(scores.softmax(0) @ v[:t + 1, head // 2])
        rows.append(torch.cat(heads) @ attention.wo.weight.T)
    torch.testing.assert_close(found[0, 3:], torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_an_mlp_that_makes_the_prefix_can_be_let_go():
    model = attached("prefix", prefix_mlp=7)
    for name, weight in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(weight)
    expected = model(with_virtual(TOKENS))
    lora.settle(model)
    assert torch.equal(model(with_virtual(TOKENS)), expected)
    assert parameter_count(model, trainable=True) == 2 * 2 * 3 * 16


def test_virtual_tokens_stand_before_every_conversation_and_are_no_targets():
    tokenizer = Tokenizer.bytes()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain, mask = tokenizer.chat(turns)
    tokenizer.n_virtual = 2
    V = tokenizer.vocab_size
    assert tokenizer.chat(turns) == ([V, V + 1, *plain], [0, 0, *mask])
    assert tokenizer.prompt(turns[:1]) == [V, V + 1, *plain[:3], tokenizer.assistant]


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_generating_sees_the_virtual_tokens_that_scoring_sees(method):
    model = attached(method)
    prompts = [[272, 273, 274, 5, 6, 7], [272, 273, 274, 9]]
    answers = sample.generate(model, prompts, 6, (271,))
    for prompt, answer in zip(prompts, answers):
        for i, token in enumerate(answer):
            logits = model(torch.tensor([prompt + answer[:i]]))[0, -1]
            assert logits.argmax() == token


def test_dropout_leaves_out_inputs_of_A_in_training_only():
    torch.manual_seed(0)
    model = lora.attach(base_model(), lora_options(lora_dropout=0.5))
    for adapter in lora.adapters_of(model):
        torch.nn.init.normal_(adapter.B)
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))


def test_rank_stabilised_scale_is_alpha_by_the_root_of_r():
    module = LoRALinear(Linear(4, 4), rank=4, alpha=6.0, sqrt=True)
    assert module.scale == 3.0 and LoRALinear(Linear(4, 4), 4, 6.0).scale == 1.5


def test_only_the_named_layers_are_adapted():
    model = lora.attach(base_model(), lora_options(lora_layers="1"))
    assert {name.split(".")[1] for name in lora.learned_names(model)} == {"1"}
    with pytest.raises(ValueError, match="--lora_layers 0,2: there is no block '2'.* 0 to 1"):
        lora.attach(base_model(), lora_options(lora_layers="0,2"))


@pytest.mark.parametrize("method", ["lora", "adapter", "parallel_adapter", "prefix", "prompt"])
def test_what_a_method_puts_in_is_on_the_models_device(method):
    """A stage attaches to a model that is on the GPU already; "meta" is another device, too."""
    changes = METHODS.get(method, {}) | ({"prefix_mlp": 4} if method == "prefix" else {})
    model = lora.attach(base_model().to("meta"), lora.Options(method, **changes, template=True))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_a_model_that_cannot_be_merged_takes_no_second_method():
    with pytest.raises(ValueError, match="has learned by --peft adapter already"):
        lora.attach(attached("adapter"), lora_options())


def test_qlora_needs_half_a_byte_a_weight_and_merges_to_what_it_was():
    model = lora.attach(base_model(d_model=128), lora.Options("qlora", 4, 8.0))
    for adapter in lora.adapters_of(model):
        torch.nn.init.normal_(adapter.B, std=0.1)
    matrices = [m for m in model.modules() if isinstance(m, lora.NF4Linear)]
    n_bytes = sum(b.nbytes for m in matrices for b in m.buffers())
    n = sum(m.in_features * m.out_features for m in matrices)
    assert n_bytes / n <= 0.55
    expected = model(TOKENS)
    merged = lora.merge(model)
    torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, lora.NF4Linear) for m in merged.modules())


# ---------------------------------------------------------------------- their folders

def sft(tmp_path, method, **changes):
    write_inputs(tmp_path)
    options = {"init": "sft", "out": "out", "peft": method, "steps": 2, "lr": 1e-2, "warmup": 0,
               "data": "examples.jsonl", "batch_size": 2, "eval_every": 10, "device": "cpu",
               "dtype": "float32"} | METHODS.get(method, {}) | changes
    train_sft.main(build(train_sft.Config, options))


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_holds_what_was_learned_and_opens_with_its_base(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    sft(tmp_path, method)
    saved = safetensors.torch.load_file("out/model.safetensors")
    assert same(saved, safetensors.torch.load_file("out/adapter.safetensors"))
    model, tokenizer = load_model("out")
    assert tokenizer.n_virtual == METHODS[method].get("virtual_tokens", 0)
    base, _ = load_model("sft")
    again = lora.load_adapter(base, "out", "sft")
    x = [tokenizer.prompt([{"role": "user", "content": "1?"}])]
    torch.testing.assert_close(model(torch.tensor(x)), again(torch.tensor(x)), rtol=1e-4, atol=1e-4)
    assert all(weight.requires_grad for weight in model.parameters())
    # the next stage trains all of it, and its folder is whole
    dpo = {"init": "out", "out": "next", "data": "pairs.jsonl", "steps": 1, "batch_size": 4,
           "eval_every": 10, "device": "cpu", "dtype": "float32"}
    train_dpo.main(build(train_dpo.Config, dpo))
    load_model("next")
    shutil.rmtree("sft")
    load_model("next")
    with pytest.raises(ValueError, match="beside sft, and that is not there; put it back"):
        load_model("out")


def test_an_adapter_is_refused_on_another_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sft(tmp_path, "adapter")
    other, _ = load_model("sft")
    other.norm.weight.data += 0.1
    save_model("other", other, load_model("sft")[1])
    with pytest.raises(ValueError, match="made on sft, and other has other weights"):
        lora.load_adapter(other, "out", "other")
    save_model("sft", other, load_model("sft")[1])
    with pytest.raises(ValueError, match="made on sft, which has other weights now"):
        load_model("out")


@pytest.mark.parametrize("changes, message", [
    ({"peft": "none", "lora_rank": 2}, "--lora_rank 2: only lora, qlora would read it"),
    ({"peft": "lora", "bottleneck": 2}, "--bottleneck 2: only adapter, parallel_adapter would"),
    ({"peft": "adapter", "nf4_double": False}, "--nf4_double False: only qlora would read it"),
    ({"peft": "prefix", "truncate": "left"}, "--truncate left"),
])
def test_options_that_a_method_does_not_read_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, changes.pop("peft"), **changes)


@pytest.mark.parametrize("tied", [True, False])
def test_the_templates_tokens_learn_beside_a_matrix_and_merge_with_it(tied):
    model = lora.attach(base_model(tied=tied), lora_options(template=True))
    expected = base_model(tied=tied)(TOKENS)
    assert torch.equal(model(TOKENS), expected)                        # as the base at first
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1.0)
    batch = replace(BATCH, tokens=torch.cat([TOKENS, torch.full((3, 1), 260)], 1),
                    loss_mask=torch.ones(3, 13).bool())
    (-token_logps(model.logps, batch).mean()).backward()
    optimizer.step()
    after = model(TOKENS)
    with lora.adapters_off(model):
        assert torch.equal(model(TOKENS), expected)
    merged = lora.merge(model)
    torch.testing.assert_close(merged(TOKENS), after, rtol=1e-5, atol=2e-5)
    embedding, before = merged.embedding.weight, base_model(tied=tied).embedding.weight
    assert torch.equal(embedding[:-N_SPECIAL], before[:-N_SPECIAL])
    assert not torch.equal(merged.output_weight[260], base_model(tied=tied).output_weight[260])


@pytest.mark.parametrize("options, message", [
    ({"peft": "prompt"}, "--peft prompt: only train_sft.py reads virtual"),
    ({"peft": "lora", "lora_dropout": 0.1}, "--lora_dropout 0.1: only train_sft.py"),
])
def test_what_would_blur_the_reference_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    dpo = {"init": "sft", "out": "out", "data": "pairs.jsonl", "steps": 1, "device": "cpu",
           "dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        train_dpo.main(build(train_dpo.Config, dpo | options))


@pytest.mark.parametrize("method", METHODS)
def test_detaching_leaves_the_base_alone_whatever_stood_around_it(method):
    model = lora.detach(attached(method, template=True))
    if method == "qlora":                              # its base is in 4 bits from then on
        assert not lora.adapters_of(model)
    else:
        assert same(weights_of(model), weights_of(base_model()))
        assert all(weight.requires_grad for weight in model.parameters())


def test_a_chat_swaps_adapters_over_one_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method in ("lora", "prompt"):
        sft(tmp_path, method, out=method, lr=0.3, steps=8)
    lines = ["1?", "/adapter lora", "/new", "1?", "/adapter prompt", "/new", "1?",
             "/adapter none", "/new", "1?", "/adapter sft"]
    monkeypatch.setattr(sample, "read_line", lambda: lines.pop(0) if lines else "")
    monkeypatch.setattr(sample, "first_screen", lambda folder: "")
    sample.main(sample.Config(init="sft", max_new_tokens=6, device="cpu", dtype="float32"))
    _, bare, with_lora, with_prompt, again, refused, *_ = capsys.readouterr().out.split("\n")
    assert again == bare and len({bare, with_lora, with_prompt}) == 3
    assert "sft: no adapter.json and adapter.safetensors there" in refused


@pytest.mark.parametrize("method", ["qlora", "parallel_adapter", "prefix", "prompt"])
def test_a_run_that_was_stopped_or_killed_ends_bit_for_bit_as_the_others(tmp_path, monkeypatch,
                                                                         method):
    """lora and adapter: test_resume.py"""
    options = EXAMPLES | METHODS[method] | {"peft": method}
    if method == "prefix":
        options["prefix_mlp"] = 4
    monkeypatch.setitem(STAGES, method, (train_sft, options))
    write_inputs(tmp_path)
    straight_stopped_and_killed(tmp_path, method)
    assert_same_end(tmp_path, method)


# ---------------------------------------------------------------------- beside peft

# {ours: Llama's}; w13 holds two of Llama's matrices, which peft gives an A each
NAMES_IN_PEFT = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w2": "down_proj"}


def in_peft(config):
    """The base model of these tests as a Llama that peft has taken in."""
    return pytest.importorskip("peft").get_peft_model(llama_of(base_model()), config)


def assert_as_good_as_equal(found, expected):
    """To 1e-6 of the largest: sums of at most 96 numbers, in another order, through two blocks."""
    largest = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * largest)


def mean_loss(logits):
    """Of TOKENS, each from those before it, nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def test_the_base_is_the_llama_that_transformers_computes():
    assert_as_good_as_equal(base_model()(TOKENS), llama_of(base_model())(TOKENS).logits)


@pytest.mark.parametrize("sqrt", [False, True])
def test_lora_is_pefts_in_output_gradients_and_merged_weights(sqrt):
    peft = pytest.importorskip("peft")
    model = adapted(targets=",".join(NAMES_IN_PEFT), rank=4, alpha=6.0, lora_sqrt=sqrt)
    theirs = in_peft(peft.LoraConfig(r=4, lora_alpha=6.0, use_rslora=sqrt,
                                     target_modules=list(NAMES_IN_PEFT.values())))
    pairs = []
    for path, layer in theirs.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            number = int(path.split("layers.")[1].split(".")[0])
            block = model.blocks[number]
            [name] = [ours for ours, other in NAMES_IN_PEFT.items() if path.endswith(other)]
            ours = block.mlp.w2 if name == "w2" else getattr(block.attention, name)
            layer.lora_A["default"].weight.data.copy_(ours.A)
            layer.lora_B["default"].weight.data.copy_(ours.B)
            pairs.append((ours, layer))
    assert len(pairs) == 2 * 5
    logits, their_logits = model(TOKENS), theirs(TOKENS).logits
    assert_as_good_as_equal(logits, their_logits)
    assert (logits - base_model()(TOKENS)).abs().max() > 0.1
    mean_loss(logits).backward()
    mean_loss(their_logits).backward()
    merged = [ours.merged_weight() for ours, _ in pairs]
    theirs.merge_adapter()
    for (ours, layer), weight in zip(pairs, merged):
        assert_as_good_as_equal(ours.A.grad, layer.lora_A["default"].weight.grad)
        assert_as_good_as_equal(ours.B.grad, layer.lora_B["default"].weight.grad)
        assert_as_good_as_equal(weight, layer.base_layer.weight)


def test_a_prompt_is_pefts_in_output_and_gradient():
    peft = pytest.importorskip("peft")
    model = attached("prompt")
    theirs = in_peft(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    vectors = theirs.prompt_encoder["default"].embedding.weight
    vectors.data.copy_(model.embedding.vectors)
    logits, their_logits = model(with_virtual(TOKENS))[:, 3:], theirs(TOKENS).logits[:, 3:]
    assert_as_good_as_equal(logits, their_logits)
    mean_loss(logits).backward()
    mean_loss(their_logits).backward()
    assert_as_good_as_equal(model.embedding.vectors.grad, vectors.grad)


def test_a_prefix_is_pefts_whose_keys_are_not_turned():
    """peft's keys stand behind RoPE; ours are turned as those of other tokens are. What one can say
    the other can: theirs is ours, turned by its place."""
    peft = pytest.importorskip("peft")
    model = attached("prefix")
    theirs = in_peft(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    n_kv, C = model.config.n_kv_heads, model.config.d_head
    layers = []
    for block in model.blocks:
        keys = block.attention.wk.vectors.view(1, 3, n_kv, C)
        _, turned = kernels.rope_reference(keys, keys, model.cos[:3], model.sin[:3])
        layers += [turned.flatten(2)[0], block.attention.wv.vectors]
    # (L_p, layers, key and value, K C), as peft has it in a row
    vectors = theirs.prompt_encoder["default"].embedding.weight
    vectors.data.copy_(torch.cat(layers, 1).detach())
    logits, their_logits = model(with_virtual(TOKENS))[:, 3:], theirs(TOKENS).logits
    assert_as_good_as_equal(logits, their_logits)
    mean_loss(logits).backward()
    mean_loss(their_logits).backward()
    their_values = vectors.grad.view(3, 2, 2, n_kv * C)[:, :, 1].unbind(1)
    for block, gradient in zip(model.blocks, their_values):
        assert_as_good_as_equal(block.attention.wv.vectors.grad, gradient)


def test_the_templates_tokens_are_pefts_trainable_tokens():
    """They learn in both places, where they are read and where they are predicted."""
    peft = pytest.importorskip("peft")
    V = SIZES["vocab_size"]
    model = lora.attach(base_model(), lora_options(template=True))
    theirs = in_peft(peft.TrainableTokensConfig(token_indices=list(range(V - N_SPECIAL, V))))
    [their_rows] = [weight for weight in theirs.parameters() if weight.requires_grad]
    rows = model.embedding.rows
    with torch.no_grad():
        rows.add_(0.1 * torch.randn_like(rows))
        their_rows.copy_(rows)
    logits, their_logits = model(TOKENS), theirs(TOKENS).logits
    assert_as_good_as_equal(logits, their_logits)
    mean_loss(logits).backward()
    mean_loss(their_logits).backward()
    assert_as_good_as_equal(rows.grad, their_rows.grad)
