"""Claims about convert.py: other people's models, in and out."""
import json
import struct
import zipfile
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from test_imported_tokenizer import CHATML, vocabulary
from torch.nn.functional import silu

import convert
import gguf_file
import llama_family
import lora
import sample
import tokenizer_formats
from model import ModelConfig, Transformer
from plumbing.folders import load_model, save_model
from tokenizer import Tokenizer

# ---------------------------------------------------------------------- folders by hand

BASE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "rope_theta": 500.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "float32", "use_cache": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
CONFIGS = {
    "llama": BASE,
    "tied": BASE | {"tie_word_embeddings": True},
    "llama3": BASE | {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "rope_parameters": {name: value for name, value in BASE.items() if name != "rope_theta"}
    | {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None},
    "qwen2": BASE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 20, "attention_bias": False},
    "mixtral": BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tensors_of(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by the names and in the shapes that Hugging Face publishes."""
    D = config["hidden_size"]
    F = config["intermediate_size"]
    H = config["num_attention_heads"]
    K = config["num_key_value_heads"]
    C = config.get("head_dim", D // H)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    for layer in range(config["num_hidden_layers"]):
        block = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
                 "self_attn.q_proj.weight": (H * C, D), "self_attn.k_proj.weight": (K * C, D),
                 "self_attn.v_proj.weight": (K * C, D), "self_attn.o_proj.weight": (D, H * C)}
        if config["model_type"] == "qwen2":
            block |= {f"self_attn.{name}_proj.bias": (n * C,)
                      for name, n in (("q", H), ("k", K), ("v", K))}
        if config["model_type"] == "qwen3":
            block |= {"self_attn.q_norm.weight": (C,), "self_attn.k_norm.weight": (C,)}
        if config["model_type"] == "mixtral":
            block["block_sparse_moe.gate.weight"] = (config["num_local_experts"], D)
            for e in range(config["num_local_experts"]):
                block |= {f"block_sparse_moe.experts.{e}.w{i}.weight": shape
                          for i, shape in ((1, (F, D)), (2, (D, F)), (3, (F, D)))}
        else:
            block |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D),
                      "mlp.down_proj.weight": (D, F)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.1 * normal if "norm" in name else normal * shape[-1] ** -0.5
    return found


def write_folder(folder, config: dict, tensors: dict | None = None, shards: int = 1):
    """A Hugging Face folder, written by hand to the published layout."""
    folder.mkdir(parents=True)
    tensors = tensors_of(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    json_of_tokens, settings = vocabulary(config["vocab_size"])
    (folder / "tokenizer.json").write_text(json.dumps(json_of_tokens))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        names = sorted(tensors)[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def to_lifecycle(folder, out, **options):
    convert.main(convert.Config(init=str(folder), out=str(out), **options))
    return load_model(out)


# ---------------------------------------------------------------------- a slow, separate Llama

def slow_logits(config: dict, w: dict, ids: list[int]) -> torch.Tensor:
    """Logits (T, V), one token and one head at a time, straight from the papers, in fp64."""
    w = {name: weight.double() for name, weight in w.items()}
    D = config["hidden_size"]
    H = config["num_attention_heads"]
    K = config["num_key_value_heads"]
    C = config.get("head_dim", D // H)

    def norm(x, weight):
        return x / (x.pow(2).mean() + config["rms_norm_eps"]).sqrt() * weight

    def turned(x, t):
        y = x.clone()
        rope = config.get("rope_parameters") or {}
        theta = rope.get("rope_theta") or config["rope_theta"]
        for i in range(C // 2):
            frequency = theta ** (-2 * i / C)
            scaling = config.get("rope_scaling")
            if scaling:
                wavelength = 2 * torch.pi / frequency
                original = scaling["original_max_position_embeddings"]
                if wavelength > original / scaling["low_freq_factor"]:
                    frequency /= scaling["factor"]
                elif wavelength > original / scaling["high_freq_factor"]:
                    smooth = ((original / wavelength - scaling["low_freq_factor"])
                              / (scaling["high_freq_factor"] - scaling["low_freq_factor"]))
                    frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
            angle = torch.tensor(t * frequency, dtype=torch.float64)
            a, b = x[i], x[i + C // 2]
            y[i] = a * angle.cos() - b * angle.sin()
            y[i + C // 2] = b * angle.cos() + a * angle.sin()
        return y

    def head(x, start, name, n, t):
        projected = w[f"{start}.self_attn.{name}_proj.weight"] @ x
        if config["model_type"] == "qwen2":
            projected = projected + w[f"{start}.self_attn.{name}_proj.bias"]
        heads = projected.view(n, C)
        if config["model_type"] == "qwen3" and name in "qk":
            heads = torch.stack([norm(h, w[f"{start}.self_attn.{name}_norm.weight"])
                                 for h in heads])
        return heads if name == "v" else torch.stack([turned(h, t) for h in heads])

    def feed_forward(x, start):
        if config["model_type"] != "mixtral":
            inner = silu(w[f"{start}.mlp.gate_proj.weight"] @ x) \
                * (w[f"{start}.mlp.up_proj.weight"] @ x)
            return w[f"{start}.mlp.down_proj.weight"] @ inner
        moe = f"{start}.block_sparse_moe"
        gates, chosen = (w[f"{moe}.gate.weight"] @ x).softmax(0).topk(2)
        y = 0
        for gate, e in zip(gates / gates.sum(), chosen):
            expert = f"{moe}.experts.{e}"
            inner = silu(w[f"{expert}.w1.weight"] @ x) * (w[f"{expert}.w3.weight"] @ x)
            y = y + gate * (w[f"{expert}.w2.weight"] @ inner)
        return y

    states = [w["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        inputs = [norm(x, w[f"{start}.input_layernorm.weight"]) for x in states]
        keys = [head(x, start, "k", K, t) for t, x in enumerate(inputs)]
        values = [head(x, start, "v", K, t) for t, x in enumerate(inputs)]
        for t, x in enumerate(inputs):
            q = head(x, start, "q", H, t)
            outputs = []
            for h in range(H):
                g = h // (H // K)
                scores = torch.stack([q[h] @ keys[s][g] for s in range(t + 1)]) / C ** 0.5
                weights = scores.softmax(0)
                outputs.append(sum(weights[s] * values[s][g] for s in range(t + 1)))
            change = w[f"{start}.self_attn.o_proj.weight"] @ torch.cat(outputs)
            states[t] = states[t] + change
        for t, x in enumerate(states):
            x = norm(x, w[f"{start}.post_attention_layernorm.weight"])
            states[t] = states[t] + feed_forward(x, start)
    last = torch.stack([norm(x, w["model.norm.weight"]) for x in states])
    output = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return last @ output.T


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_a_slow_separate_model(kind, tmp_path):
    config = CONFIGS[kind]
    tensors = tensors_of(config)
    folder = write_folder(tmp_path / "hf", config, tensors)
    model, _ = to_lifecycle(folder, tmp_path / "ours")
    ids = [3, 141, 59, 26, 5, 35, 299, 3]
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].double()
    slow = slow_logits(config, tensors, ids)
    assert (ours - slow).abs().max() < 1e-5 * slow.abs().max()


@pytest.mark.parametrize("kind", ["llama", "tied", "llama3", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_and_out_again_is_bit_for_bit_the_same(kind, dtype, tmp_path):
    tensors = {name: w.to(dtype) for name, w in tensors_of(CONFIGS[kind]).items()}
    folder = write_folder(tmp_path / "hf", CONFIGS[kind], tensors)
    to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "back"), to="hf"))
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, weight in tensors.items():
        assert back[name].dtype == dtype and torch.equal(back[name], weight), name
    first = llama_family.our_config(json.loads((folder / "config.json").read_text()))
    assert llama_family.our_config(json.loads((tmp_path / "back/config.json").read_text())) == first
    again, _ = to_lifecycle(tmp_path / "back", tmp_path / "again")
    assert again.config == first


def test_shards_are_one_model(tmp_path):
    whole = write_folder(tmp_path / "whole", BASE)
    shards = write_folder(tmp_path / "shards", BASE, shards=3)
    one, _ = to_lifecycle(whole, tmp_path / "one")
    three, _ = to_lifecycle(shards, tmp_path / "three")
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, three.state_dict()[name])


# ---------------------------------------------------------------------- GGUF

@pytest.mark.parametrize("kind", ["llama", "tied", "llama3", "qwen2", "qwen3", "mixtral"])
def test_a_gguf_file_holds_the_same_model_and_tokenizer(kind, tmp_path):
    folder = write_folder(tmp_path / "hf", CONFIGS[kind])
    model, tokenizer = to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "m.gguf"),
                                to="gguf"))
    again, again_tokenizer = to_lifecycle(tmp_path / "m.gguf", tmp_path / "again")
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert again_tokenizer.tokens == tokenizer.tokens
    assert again_tokenizer.merges == tokenizer.merges
    assert again_tokenizer.template == tokenizer.template


def test_a_gguf_file_keeps_a_rope_whose_longest_wavelength_is_a_mixture(tmp_path):
    # four channels of a head: the slowest turns once in 6,283 tokens, not in the original 8,192
    model, _ = own_model(tmp_path / "own", rope_theta=10_000.0, rope_factor=8.0)
    convert.main(convert.Config(init=str(tmp_path / "own"), out=str(tmp_path / "m.gguf"),
                                to="gguf"))
    back, _ = to_lifecycle(tmp_path / "m.gguf", tmp_path / "back")
    assert 1 < llama_family.rope_factors(model.config).max() < 8
    assert back.config.rope_factor == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "tied", "llama3", "mistral", "qwen2", "qwen3",
                                  "mixtral"])
def test_llama_cpp_opens_what_we_write_and_predicts_the_same(kind, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp")       # llama.cpp itself, as a wheel
    folder = write_folder(tmp_path / "hf", CONFIGS[kind])
    model, tokenizer = to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "m.gguf"),
                                to="gguf"))
    options = llama_cpp.CommonParams()
    options.model.path = str(tmp_path / "m.gguf")
    options.n_ctx = model.config.context_length
    options.n_parallel = 1
    options.cache_type_k = options.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(options)
    n = model.config.vocab_size
    for last in range(60, 120):
        ids = [5, 80, 120, 7, 33, 250, last]
        ours = slow_logits(CONFIGS[kind], tensors_of(CONFIGS[kind]), ids)[-1].log_softmax(-1)
        if tokenizer.token_bytes(int(ours.argmax())).isalpha():
            break                                      # it tells nothing of half a character
    reply = server.handle_completions({"prompt": ids, "n_predict": 1, "n_probs": n,
                                       "temperature": 0, "ignore_eos": True})
    reply = json.loads(reply) if isinstance(reply, str) else reply
    [predicted] = reply["choices"][0]["logprobs"]["content"]
    theirs = torch.zeros(n)
    for token in predicted["top_logprobs"]:
        theirs[token["id"]] = token["logprob"]
    # its products round their inputs
    assert torch.allclose(theirs.double(), ours, atol=0.01)
    # and it finds the same ids in the template's text
    turns = [{"role": "user", "content": "Why? 1 2 3, hello world!"}]
    reply = server.handle_chat_completions({"messages": turns, "max_tokens": 1})
    reply = json.loads(reply) if isinstance(reply, str) else reply
    assert reply["usage"]["prompt_tokens"] == len(tokenizer.prompt(turns))


def test_arrays_of_numbers_are_of_int32_as_llama_cpp_asks():
    packed = gguf_file.packed_value([1, 3])
    assert struct.unpack("<IIQii", packed) == (9, 5, 2, 1, 3)


def test_llama_cpp_turns_neighbours_where_we_turn_halves():
    weight = torch.arange(8.0)[:, None]                # one head of 8 channels
    assert llama_family.interleaved(weight, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(llama_family.in_halves(llama_family.interleaved(weight, 2), 2), weight)


def test_a_block_of_q8_0_is_a_scale_times_its_codes():
    block = struct.pack("<e32b", 0.5, *range(-16, 16))
    packed = gguf_file.Packed("w", "Q8_0", (1, 32), torch.frombuffer(
        bytearray(block), dtype=torch.uint8).numpy())
    assert gguf_file.unpacked(packed).tolist() == [[0.5 * code for code in range(-16, 16)]]


def test_a_block_of_q4_1_has_its_low_bits_first():
    codes = bytes(low | (15 - low) << 4 for low in range(16))
    block = struct.pack("<ee", 2.0, -1.0) + codes
    packed = gguf_file.Packed("w", "Q4_1", (32,), torch.frombuffer(
        bytearray(block), dtype=torch.uint8).numpy())
    expected = [2.0 * code - 1 for code in [*range(16), *range(15, -1, -1)]]
    assert gguf_file.unpacked(packed).tolist() == expected


@pytest.mark.parametrize("kind", [name for name, k in gguf_file.KINDS.items() if k.unpack])
def test_blocks_unpack_as_in_the_gguf_package(kind):
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType
    k = gguf_file.KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (50, k.size), generator=generator, dtype=torch.uint8).numpy()
    half = torch.randn(50, generator=generator).half().numpy().view("uint8").reshape(50, 2)
    for first in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
        blocks[:, first:first + 2] = half
    theirs = quants.dequantize(blocks, GGMLQuantizationType[kind])
    ours = k.unpack(blocks).reshape(theirs.shape)
    assert abs(ours - theirs).max() <= 1e-6 * abs(theirs).max()


# ---------------------------------------------------------------------- adapters of peft

def test_an_adapter_of_two_different_a_for_gate_and_up_adds_what_peft_adds(tmp_path):
    folder = write_folder(tmp_path / "hf", BASE)
    base, _ = to_lifecycle(folder, tmp_path / "ours")
    generator = torch.Generator().manual_seed(1)
    r, D, F = 3, 32, 48
    theirs = {}
    for module in ("gate_proj", "up_proj"):
        start = f"base_model.model.model.layers.1.mlp.{module}"
        theirs[f"{start}.lora_A.weight"] = torch.randn(r, D, generator=generator)
        theirs[f"{start}.lora_B.weight"] = torch.randn(F, r, generator=generator)
    (tmp_path / "peft").mkdir()
    safetensors.torch.save_file(theirs, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": r, "lora_alpha": 6,
         "target_modules": ["gate_proj", "mlp.up_proj"]}))
    merged, _ = to_lifecycle(tmp_path / "peft", tmp_path / "merged", base=str(tmp_path / "ours"))
    change = merged.blocks[1].mlp.w13.weight - base.blocks[1].mlp.w13.weight
    wanted = []
    for module in ("gate_proj", "up_proj"):
        start = f"base_model.model.model.layers.1.mlp.{module}"
        wanted.append(6 / r * theirs[f"{start}.lora_B.weight"] @ theirs[f"{start}.lora_A.weight"])
    assert torch.allclose(change, torch.cat(wanted), atol=1e-5)
    for name, weight in base.state_dict().items():
        if name != "blocks.1.mlp.w13.weight":
            assert torch.equal(weight, merged.state_dict()[name]), name


@pytest.mark.parametrize("sqrt", [False, True])
def test_an_adapter_goes_out_to_peft_and_comes_back_the_same(sqrt, tmp_path):
    folder = write_folder(tmp_path / "hf", BASE)
    model, tokenizer = to_lifecycle(folder, tmp_path / "ours")
    lora.attach(model, lora.Options(peft="lora", lora_rank=2, lora_targets="wq,w13,w2",
                                    lora_layers="1", lora_sqrt=sqrt))
    with torch.no_grad():
        for weight in lora.learned(model).values():
            weight.normal_()
    lora.save_adapter(tmp_path / "adapter", model)
    convert.main(convert.Config(init=str(tmp_path / "adapter"), out=str(tmp_path / "peft"),
                                to="peft"))
    to_lifecycle(tmp_path / "peft", tmp_path / "back", base=str(tmp_path / "ours"))
    _, first = lora.read_adapter(tmp_path / "adapter")
    _, back = lora.read_adapter(tmp_path / "back")
    assert first.keys() == back.keys()
    for name, weight in first.items():
        assert torch.equal(weight, back[name]), name
    merged, _ = load_model(tmp_path / "back")
    assert torch.equal(merged.blocks[1].mlp.w2.weight,
                       lora.merge(model).blocks[1].mlp.w2.weight)


# ---------------------------------------------------------------------- our own models out

def own_model(folder, **sizes):
    tokenizer = Tokenizer.train(["the bear sat on the mat, the bear ran"] * 20, 290)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 32, 2, 4, **sizes))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.wo.weight.normal_(std=0.2)
            block.mlp.w2.weight.normal_(std=0.2)
    save_model(folder, model, tokenizer, stage="sft")
    return model, tokenizer


def test_a_model_of_this_project_comes_back_with_its_ids_and_its_answers(tmp_path):
    model, tokenizer = own_model(tmp_path / "own")
    convert.main(convert.Config(init=str(tmp_path / "own"), out=str(tmp_path / "hf"), to="hf"))
    back, back_tokenizer = to_lifecycle(tmp_path / "hf", tmp_path / "back")
    messages = [{"role": "system", "content": "be a bear"}, {"role": "user", "content": "the mat"},
                {"role": "assistant", "content": "ran"}, {"role": "user", "content": "the bear"}]
    ids = tokenizer.prompt(messages)
    assert back_tokenizer.prompt(messages) == ids
    assert back_tokenizer.chat(messages) == tokenizer.chat(messages)
    assert sample.generate(back, [ids], 8) == sample.generate(model, [ids], 8)


def test_what_llama_cpp_would_refuse_does_not_go_out(tmp_path):
    own_model(tmp_path / "own", qk_norm=True, rope_factor=8.0)
    with pytest.raises(ValueError, match="rope_factor is 8.0"):
        convert.main(convert.Config(init=str(tmp_path / "own"), out=str(tmp_path / "m.gguf"),
                                    to="gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_what_no_llama_has_does_not_go_out(tmp_path):
    own_model(tmp_path / "own", token_shift=True)
    with pytest.raises(ValueError, match="token_shift is True"):
        convert.main(convert.Config(init=str(tmp_path / "own"), out=str(tmp_path / "hf"), to="hf"))
    assert not (tmp_path / "hf").exists()


# ---------------------------------------------------------------------- bad input

BAD_CONFIGS = {
    "model_type is 'gemma'": {"model_type": "gemma"},
    "sliding_window is 16": {"sliding_window": 16},
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "attention_bias is True": {"attention_bias": True},
    "type 'yarn'": {"rope_scaling": {"type": "yarn", "factor": 2}},
    "low_freq_factor is 2": {"rope_scaling": LLAMA3 | {"low_freq_factor": 2}},
    "logits_scaling is 8": {"logits_scaling": 8},
    "asks? ?f|sizes in config": {"hidden_size": 64},
    "num_hidden_layers is 1,000,000": {"num_hidden_layers": 1_000_000},
    "lm_head.weight is missing|layers.2": {"num_hidden_layers": 3},
    "tensors are of no use": {"num_hidden_layers": 1},
    "vocab_size must be|vocab_size is": {"vocab_size": "many"},
    "rope_scaling is 'linear'": {"rope_scaling": "linear"},
    "num_attention_heads is 0; it must be a whole number": {"num_attention_heads": 0},
    "num_attention_heads is '2'": {"num_attention_heads": "2"},
    "max_position_embeddings is 1000000000000": {"max_position_embeddings": 10 ** 12},
    "tie_word_embeddings is 'no'": {"tie_word_embeddings": "no"},
    "config: rms_norm_eps is 0; it must be a number": {"rms_norm_eps": 0},
    "num_local_experts is 1,000,000, and there are": {
        "model_type": "mixtral", "num_local_experts": 1_000_000, "num_experts_per_tok": 2},
    "sliding_window is missing": {"model_type": "mistral"},
    "rope_scaling: factor is 2, .* type default": {"rope_scaling": {"factor": 2}},
    "factor is None": {"rope_scaling": {**LLAMA3, "factor": None}},
    "rope_parameters and rope_scaling differ": {
        "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    "rope_parameters: partial_rotary_factor is 0.5": {
        "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
    "rope_theta is None": {"rope_theta": None},
    "rope_theta is 1e\\+39": {"rope_theta": 1e39},
    "layer_types is 5": {"layer_types": 5},
    "max_position_embeddings is 16,777,216": {
        "model_type": "qwen3", "head_dim": 1 << 24, "max_position_embeddings": 1 << 24},
    "num_experts_per_tok is 1": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1},
    "sliding_window is 4": {         # a field of Qwen's alone switches it off
        "model_type": "mistral", "sliding_window": 4, "use_sliding_window": False},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_config_that_is_not_served_is_refused_by_its_field(message, tmp_path):
    folder = write_folder(tmp_path / "hf", BASE)
    config = json.loads((folder / "config.json").read_text()) | BAD_CONFIGS[message]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        to_lifecycle(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


up = "model.layers.0.mlp.up_proj.weight"
BAD_TENSORS = {
    r"gate_proj.weight has the shape \(40, 32\)": {
        "model.layers.0.mlp.gate_proj.weight": torch.ones(40, 32), up: torch.ones(56, 32)},
    r"up_proj.weight has the shape \(48, 16\)": {up: torch.ones(48, 16)},
    r"up_proj.weight has the shape \(48,\)": {up: torch.ones(48)},
    "type torch.float64": {up: torch.ones(48, 32, dtype=torch.float64)},
    "lm_head.weight is not the embedding": {"lm_head.weight": torch.ones(300, 32)},
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_tensor_that_is_not_the_configs_is_refused_by_its_name(message, tmp_path):
    folder = write_folder(tmp_path / "hf", CONFIGS["tied"],
                          tensors_of(CONFIGS["tied"]) | BAD_TENSORS[message])
    with pytest.raises(ValueError, match=message):
        to_lifecycle(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_embedding_that_is_written_twice_is_taken(tmp_path):
    tensors = tensors_of(CONFIGS["tied"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model, _ = to_lifecycle(write_folder(tmp_path / "hf", CONFIGS["tied"], tensors),
                            tmp_path / "ours")
    assert model.config.tied


def test_a_field_that_classes_fill_in_differently_must_be_there(tmp_path):
    folder = write_folder(tmp_path / "hf", {name: value for name, value in BASE.items()
                                            if name != "rms_norm_eps"} | {"unsloth_fixed": True},
                          tensors_of(BASE))
    with pytest.raises(ValueError, match="rms_norm_eps is missing"):
        to_lifecycle(folder, tmp_path / "ours")


@pytest.mark.parametrize("field, value, message", [
    ("layer_replication", [[0, 1]], "layer_replication is"), ("r", None, "r is None"),
    ("init_lora_weights", "pissa", "changes the base"), ("use_dora", True, "use_dora is True"),
    ("r", 16, r"lora_A.weight has the shape \(2, 32\), and the config's r is 16"),
    ("r", 2.5, "r is 2.5; it must be a whole number"), ("r", True, "r is True"),
    ("lora_alpha", float("nan"), "lora_alpha is nan"), ("lora_alpha", 10 ** 400, "lora_alpha is 1"),
    ("target_modules", ["v_proj"], "target_modules does not name it"),
    ("target_modules", ".*q_proj", "a list of modules is served"),
    ("layers_to_transform", [1], r"layers_to_transform is \[1\]"),
    ("exclude_modules", ["q_proj"], "exclude_modules is")])
def test_an_adapter_that_would_add_something_else_is_refused(field, value, message, tmp_path):
    to_lifecycle(write_folder(tmp_path / "hf", BASE), tmp_path / "ours")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    (tmp_path / "peft").mkdir()
    safetensors.torch.save_file({name.format("A"): torch.ones(2, 32),
                                 name.format("B"): torch.ones(32, 2)},
                                tmp_path / "peft/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | {field: value}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        to_lifecycle(tmp_path / "peft", tmp_path / "x", base=str(tmp_path / "ours"))
    assert not (tmp_path / "x").exists()


def test_half_of_an_adapter_is_refused(tmp_path):
    to_lifecycle(write_folder(tmp_path / "hf", BASE), tmp_path / "ours")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    (tmp_path / "peft").mkdir()
    safetensors.torch.save_file({name: torch.ones(2, 32)},
                                tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(ValueError, match="q_proj.lora_B.weight is missing"):
        to_lifecycle(tmp_path / "peft", tmp_path / "x", base=str(tmp_path / "ours"))
    # and what nothing would read is not taken along in silence
    with pytest.raises(ValueError, match="--dtype float32: .* an adapter of peft"):
        to_lifecycle(tmp_path / "peft", tmp_path / "x", base=str(tmp_path / "ours"),
                     dtype="float32")
    safetensors.torch.save_file({name: torch.full((2, 32), 1e25), name.replace("_A", "_B"):
                                 torch.full((32, 2), 1e25)},
                                tmp_path / "peft/adapter_model.safetensors")
    with pytest.raises(ValueError, match="it makes blocks.0.attention.wq infinite"):
        to_lifecycle(tmp_path / "peft", tmp_path / "x", base=str(tmp_path / "ours"))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="--base .*: .* is a model"):
        to_lifecycle(tmp_path / "hf", tmp_path / "x", base=str(tmp_path / "ours"))


def test_an_adapter_of_a_matrix_that_takes_none_here_is_refused_by_its_name(tmp_path):
    to_lifecycle(write_folder(tmp_path / "hf", BASE), tmp_path / "ours")
    (tmp_path / "peft").mkdir()
    safetensors.torch.save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)},
                                tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(ValueError, match="of no use to this model.*lm_head.lora_A"):
        to_lifecycle(tmp_path / "peft", tmp_path / "x", base=str(tmp_path / "ours"))


def test_the_tokens_of_a_foreign_template_do_not_learn_anew(tmp_path):
    to_lifecycle(write_folder(tmp_path / "hf", BASE), tmp_path / "ours")
    run = SimpleNamespace(cfg=SimpleNamespace(init=str(tmp_path / "ours"), truncate="error"))
    model, tokenizer = load_model(tmp_path / "ours")
    with pytest.raises(ValueError, match="--template"):
        lora.begin(model, lora.Options(peft="lora", template=True), run, tokenizer)


def test_weights_that_are_not_finite_leave_nothing(tmp_path):
    tensors = tensors_of(BASE)
    tensors["model.norm.weight"][3] = float("nan")
    folder = write_folder(tmp_path / "hf", BASE, tensors)
    with pytest.raises(FloatingPointError, match="norm.weight"):
        to_lifecycle(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_options_that_nothing_reads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--base b: only lifecycle"):
        convert.main(convert.Config(init="x", out=str(tmp_path / "y"), to="hf", base="b"))


def test_a_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path / "hf", BASE, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        to_lifecycle(folder, tmp_path / "ours")


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", BASE, shards=2)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        to_lifecycle(folder, tmp_path / "ours")


@pytest.mark.parametrize("weight_map", [{"lm_head.weight": 3}, {"lm_head.weight": ["a"]}])
def test_an_index_of_no_texts_is_refused(weight_map, tmp_path):
    folder = write_folder(tmp_path / "hf", BASE, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="not all files in weight_map are texts"):
        to_lifecycle(folder, tmp_path / "ours")


def test_an_index_that_is_not_the_folders_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", BASE, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"does not hold the tensor {names[0]}"):
        to_lifecycle(folder, tmp_path / "ours")
    # left over from a model that was saved before
    safetensors.torch.save_file(tensors_of(BASE, seed=1), folder / "model.safetensors")
    with pytest.raises(ValueError, match="a model.safetensors and an index of shards"):
        to_lifecycle(folder, tmp_path / "ours")


def test_a_tensor_that_stands_in_two_shards_is_named(tmp_path):
    folder = write_folder(tmp_path / "hf", BASE, shards=2)
    first = safetensors.torch.load_file(folder / "model-00001-of-00002.safetensors")
    second = safetensors.torch.load_file(folder / "model-00002-of-00002.safetensors")
    name = min(first)
    safetensors.torch.save_file(second | {name: first[name] + 1},
                                folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"{name} stands in model-00001.*and in model-00002"):
        to_lifecycle(folder, tmp_path / "ours")


def gguf_bytes(tmp_path) -> bytes:
    folder = write_folder(tmp_path / "hf", BASE)
    to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "m.gguf"),
                                to="gguf"))
    return (tmp_path / "m.gguf").read_bytes()


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path):
    whole = gguf_bytes(tmp_path)
    for n in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 50), len(whole) - 1]:
        with pytest.raises(ValueError):
            gguf_file.read(memoryview(whole[:n]))


def test_a_header_that_claims_terabytes_is_refused_at_once(tmp_path):
    huge = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1 << 42) + b"x"
    with pytest.raises(ValueError, match="cut short or its header is wrong"):
        gguf_file.read(memoryview(huge))
    array = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" \
        + struct.pack("<IIQ", 9, 8, 1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 entries"):
        gguf_file.read(memoryview(array))


def test_arrays_within_arrays_and_tensors_of_nothing_are_refused():
    def text(name: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name

    nested = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a") + struct.pack("<I", 9) \
        + 5_000 * struct.pack("<IQ", 9, 1)
    with pytest.raises(ValueError, match="a is an array of arrays"):
        gguf_file.read(memoryview(nested))
    twice = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text(b"a") + struct.pack("<IB", 0, 1))
    with pytest.raises(ValueError, match="a stands twice"):
        gguf_file.read(memoryview(twice))
    for offset, message in ((0, "the tensors v and w overlap"), (4, "offset of w is 4")):
        headers = [text(name) + struct.pack("<IQIQ", 1, 8, 0, at)
                   for name, at in ((b"v", 0), (b"w", offset))]
        both = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + b"".join(headers) + bytes(128)
        with pytest.raises(ValueError, match=message):
            gguf_file.read(memoryview(both))
    empty = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text(b"w") \
        + struct.pack("<IQQIQ", 2, 0, 300_000, 0, 0)
    with pytest.raises(ValueError, match=r"w has the shape \(0, 300000\)"):
        gguf_file.read(memoryview(empty))


GGUF_DAMAGE = {
    "m.gguf: .*eos_token_id is 'x', a str": {"tokenizer.ggml.eos_token_id": "x"},
    "m.gguf: .*chat_template is '3', a int": {"tokenizer.chat_template": 3},
    "m.gguf: the merge 1 is no pair": {"tokenizer.ggml.merges": [1, 2]},
    "m.gguf: the merge 'a b c' is no pair": {"tokenizer.ggml.merges": ["a b c"]},
    "m.gguf: .*tokens has entries that are no texts": {"tokenizer.ggml.tokens": [1, 2]},
    "m.gguf: .*attention.head_count is 0": {"llama.attention.head_count": 0},
    "m.gguf: .*attention.head_count is '2'": {"llama.attention.head_count": "2"},
    "m.gguf: .*attention.causal is False": {"llama.attention.causal": False},
    "m.gguf: .*vocab_size is 1, and": {"llama.vocab_size": 1},
    "m.gguf: .*rms_epsilon is 'x'": {"llama.attention.layer_norm_rms_epsilon": "x"},
}


def test_damaged_metadata_of_a_gguf_file_are_refused_by_file_and_field(tmp_path):
    metadata, _ = gguf_file.read(memoryview(gguf_bytes(tmp_path)))
    model, tokenizer = load_model(tmp_path / "ours")
    tensors = {llama_family.gguf_name(name)[0]: weight for name, weight in
               llama_family.by_their_names(model.config, model.state_dict()).items()}
    for message, damage in GGUF_DAMAGE.items():
        gguf_file.write(tmp_path / "m.gguf", metadata | damage, tensors)
        with pytest.raises(ValueError, match=message):
            to_lifecycle(tmp_path / "m.gguf", tmp_path / "x")
    gguf_file.write(tmp_path / "m.gguf", metadata,
                    tensors | {"blk.0.attn_k.weight": torch.ones(31, 32)})
    with pytest.raises(ValueError, match="m.gguf: blk.0.attn_k.weight has 31 rows"):
        to_lifecycle(tmp_path / "m.gguf", tmp_path / "x")
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="m.gguf: the file is empty"):
        to_lifecycle(tmp_path / "m.gguf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_metadata_that_would_change_the_model_is_refused(tmp_path):
    metadata, packed = gguf_file.read(memoryview(gguf_bytes(tmp_path)))
    with pytest.raises(ValueError, match="llama.rope.scale_linear is 4.0"):
        llama_family.config_of_gguf(metadata | {"llama.rope.scale_linear": 4.0}, packed)
    llama_family.config_of_gguf(metadata | {"llama.rope.scaling.type": "none"}, packed)


def test_a_number_of_experts_that_are_not_there_is_refused(tmp_path):
    to_lifecycle(write_folder(tmp_path / "hf", CONFIGS["mixtral"]), tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "m.gguf"),
                                to="gguf"))
    metadata, packed = gguf_file.read(memoryview((tmp_path / "m.gguf").read_bytes()))
    assert packed["blk.1.ffn_down_exps.weight"].shape == (4, 32, 48)
    with pytest.raises(ValueError, match="llama.expert_count is 1000000; 1 .. 1,024 are served"):
        llama_family.config_of_gguf(metadata | {"llama.expert_count": 1_000_000}, packed)
    more = packed["blk.1.ffn_up_exps.weight"]._replace(shape=(8, 24, 32))
    with pytest.raises(ValueError, match="is 4, and in blk.1.ffn_up_exps.weight 8 are there"):
        llama_family.config_of_gguf(metadata, packed | {"blk.1.ffn_up_exps.weight": more})


def write_zip(file, entries: dict[str, bytes]):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


def test_a_zip_of_one_model_is_read_and_one_of_two_is_refused(tmp_path):
    whole = gguf_bytes(tmp_path)
    one = write_zip(tmp_path / "one.zip", {"a/m.gguf": whole, "a/LICENSE": b"free"})
    model, _ = to_lifecycle(one, tmp_path / "from_zip")
    ours, _ = load_model(tmp_path / "ours")
    assert torch.equal(model.embedding.weight, ours.embedding.weight)
    two = write_zip(tmp_path / "two.zip", {"m.gguf": whole, "n.gguf": whole})
    with pytest.raises(ValueError, match="one .gguf file; found: m.gguf, n.gguf"):
        to_lifecycle(two, tmp_path / "x")
    (tmp_path / "cut.zip").write_bytes(one.read_bytes()[:-30])
    damaged = bytearray(one.read_bytes())
    damaged[len(whole) // 2] ^= 255
    (tmp_path / "damaged.zip").write_bytes(damaged)
    for name in ("cut.zip", "damaged.zip"):
        with pytest.raises(ValueError, match="neither|damaged"):
            to_lifecycle(tmp_path / name, tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("m.gguf", whole)
    damaged = bytearray((tmp_path / "lzma.zip").read_bytes())
    damaged[60:200] = bytes(140)
    (tmp_path / "lzma.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match="lzma.zip is damaged"):
        to_lifecycle(tmp_path / "lzma.zip", tmp_path / "x")
    outside = write_zip(tmp_path / "outside.zip", {"../m.gguf": whole})
    with pytest.raises(ValueError, match="leads out of it"):
        to_lifecycle(outside, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_hugging_face_is_named_with_the_command_that_converts_it(tmp_path):
    folder = write_folder(tmp_path / "Some-Model", BASE)
    with pytest.raises(ValueError, match=f"convert.py --init {folder} --out out/Some-Model"):
        load_model(folder)


def test_nothing_there_is_replaced(tmp_path):
    folder = write_folder(tmp_path / "hf", BASE)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/mine").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        to_lifecycle(folder, tmp_path / "ours")
    assert (tmp_path / "ours/mine").read_text() == "mine"


# ---------------------------------------------------------------------- beside the libraries

@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_opens_what_goes_out_and_says_the_same(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path / "hf", CONFIGS[kind])
    model, tokenizer = to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "out"), to="hf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out",
                                                              dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "low lower, 123 löwe 東京"}]
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                              return_dict=False)
    assert tokenizer.prompt(messages) == list(ids)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        wanted = theirs(tokens).logits
        found = model(tokens)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    written = theirs.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None,
                              pad_token_id=tokenizer.pad)[0, tokens.shape[1]:]
    assert sample.generate(model, [list(ids)], 12) == [written.tolist()]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_has_trained_on_comes_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path / "hf", CONFIGS[kind])
    before, _ = to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "out"), to="hf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out",
                                                              dtype=torch.float32)
    tokens = torch.tensor([[5, 9, 100, 7, 42, 8]])
    theirs(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    theirs.save_pretrained(tmp_path / "trained")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(
        tmp_path / "trained")
    after, tokenizer = to_lifecycle(tmp_path / "trained", tmp_path / "back")
    with torch.no_grad():
        wanted = theirs.eval()(tokens).logits
        assert (after(tokens) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (before(tokens) - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert tokenizer.encode("low lower") == Tokenizer.load(tmp_path / "ours").encode("low lower")


def test_the_gguf_package_reads_the_file_that_goes_out(tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = write_folder(tmp_path / "hf", BASE)
    model, tokenizer = to_lifecycle(folder, tmp_path / "ours")
    convert.main(convert.Config(init=str(tmp_path / "ours"), out=str(tmp_path / "m.gguf"),
                                to="gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    wanted = llama_family.interleaved(model.blocks[1].attention.wk.weight.detach(), 2)
    assert torch.equal(tensors["blk.1.attn_k.weight"], wanted)
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens[tokenizer.end] == "<|im_end|>" and len(tokens) == BASE["vocab_size"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_peft_says_the_same_with_an_adapter_that_goes_out(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    folder = write_folder(tmp_path / "hf", CONFIGS[kind])
    model, _ = to_lifecycle(folder, tmp_path / "ours")
    lora.attach(model, lora.Options(peft="lora", lora_rank=3, lora_targets="wq,wv,w13,w2"))
    with torch.no_grad():
        for weight in lora.learned(model).values():
            weight.normal_(std=0.2)
    lora.save_adapter(tmp_path / "adapter", model)
    convert.main(convert.Config(init=str(tmp_path / "adapter"), out=str(tmp_path / "peft"),
                                to="peft"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    tokens = torch.tensor([[5, 9, 100, 7, 42, 8]])
    with torch.no_grad():
        wanted = theirs(tokens).logits
        assert (model(tokens) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_sizes_survive_the_way_through_a_record():
    config = llama_family.our_config(CONFIGS["llama3"])
    assert ModelConfig(**asdict(config)) == config
    assert tokenizer_formats.GGUF_PATTERNS["llama-bpe"] == [tokenizer_formats.PATTERN]
