"""
The Llama family by the names of others: tensors and sizes at Hugging Face and in GGUF files, and
here. convert.py reads and writes by these tables.

    theirs("blocks.0.mlp.w2.weight", 0)      [["model.layers.0.mlp.down_proj.weight"]]
    our_config(config_json)                  ModelConfig, or a refusal by the name of the field
    their_config(config, tokenizer)          config.json
    config_of_gguf(metadata, tensors)        the same from a GGUF file
"""
import math
from dataclasses import replace

from torch import Tensor

import gguf_file
from imported_tokenizer import ImportedTokenizer
from model import ROPE_ORIGINAL, ModelConfig, rope_frequencies
from plumbing.folders import sizes_of

# ---------------------------------------------------------------------- names of tensors

WHOLE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
         "lm_head.weight": "lm_head.weight"}
# Of a block: {ours: theirs, which lie one below the other in ours}
OF_BLOCK = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "mlp_norm.weight": ["post_attention_layernorm.weight"],
    "attention.wq.weight": ["self_attn.q_proj.weight"],
    "attention.wk.weight": ["self_attn.k_proj.weight"],
    "attention.wv.weight": ["self_attn.v_proj.weight"],
    "attention.wo.weight": ["self_attn.o_proj.weight"],
    "attention.bq": ["self_attn.q_proj.bias"],
    "attention.bk": ["self_attn.k_proj.bias"],
    "attention.bv": ["self_attn.v_proj.bias"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "mlp.w13.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.w2.weight": ["mlp.down_proj.weight"],
    "mlp.router.weight": ["block_sparse_moe.gate.weight"],
}
# Of an expert, which is a slice of ours.
OF_EXPERT = {"mlp.w13": ["w1.weight", "w3.weight"], "mlp.w2": ["w2.weight"]}
# {Hugging Face's: GGUF's} of a layer
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "block_sparse_moe.gate": "ffn_gate_inp"}
# Of experts, which lie one behind the other in a single tensor of GGUF.
GGUF_EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
# Model types whose queries and keys lie in GGUF as interleaved() has them.
TURNED = ("llama", "mixtral")
GGUF_WHOLE = {"model.embed_tokens.weight": "token_embd.weight",
              "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def theirs(name: str, n_experts: int) -> list[list[str]]:
    """The tensors of Hugging Face that make one of ours: a list for each of its slices, of those
    that lie one below the other in it.

    "blocks.0.mlp.w2.weight" -> [["model.layers.0.mlp.down_proj.weight"]]
    """
    if name in WHOLE:
        return [[WHOLE[name]]]
    _, layer, rest = name.split(".", 2)
    start = f"model.layers.{layer}"
    if rest in OF_EXPERT:
        return [[f"{start}.block_sparse_moe.experts.{e}.{part}" for part in OF_EXPERT[rest]]
                for e in range(n_experts)]
    return [[f"{start}.{part}" for part in OF_BLOCK[rest]]]


def gguf_name(name: str) -> tuple[str, int | None]:
    """A tensor's name in GGUF, and which of its slices is meant, if it holds all experts.

    "model.layers.0.mlp.up_proj.weight" -> "blk.0.ffn_up.weight", None
    "model.layers.0.block_sparse_moe.experts.3.w2.weight" -> "blk.0.ffn_down_exps.weight", 3
    """
    if name in GGUF_WHOLE:
        return GGUF_WHOLE[name], None
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    if part in GGUF_NAMES:
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}", None
    _, _, expert, matrix = part.split(".")
    return f"blk.{layer}.{GGUF_EXPERTS[matrix]}.{kind}", int(expert)


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp's Llama turns them: channels i and i + C/2 of a head,
    which RoPE turns together, one behind the other. (n C, ...) -> (n C, ...)."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def in_halves(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of interleaved()."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def by_their_names(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by the names of Hugging Face, stacked ones taken apart."""
    found = {}
    for name, weight in weights.items():
        slices = theirs(name, config.n_experts)
        for parts, part_weight in zip(slices, weight if len(slices) > 1 else [weight]):
            chunks = part_weight.chunk(len(parts))
            found |= {part: chunk.contiguous() for part, chunk in zip(parts, chunks)}
    return found


def possible_names(config: dict) -> list[str]:
    """Every tensor that a model of these sizes may have, by its name at Hugging Face."""
    names = list(GGUF_WHOLE)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        for part in GGUF_NAMES:
            names += [f"{start}.{part}.{kind}" for kind in ("weight", "bias")]
        for expert in range(config.get("num_local_experts", 0)):
            names += [f"{start}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                      for matrix in GGUF_EXPERTS]
    return names


# ---------------------------------------------------------------------- sizes

# {model_type: (Hugging Face's class, what its models have besides)}
KINDS = {"llama": ("LlamaForCausalLM", {}), "mistral": ("MistralForCausalLM", {}),
         "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
         "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
         "mixtral": ("MixtralForCausalLM", {})}
# Fields that must be there, because the classes have defaults of their own for them.
NEEDED = {"llama": (), "mistral": ("sliding_window", "num_key_value_heads"),
          "qwen2": ("num_key_value_heads",), "qwen3": ("num_key_value_heads", "head_dim"),
          "mixtral": ("num_key_value_heads", "num_experts_per_tok", "num_local_experts")}
SIZES = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings",
         "d_model": "hidden_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
         "head_width": "head_dim", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
         "tied": "tie_word_embeddings", "n_experts": "num_local_experts",
         "top_k": "num_experts_per_tok"}
# What other values would mean is not served.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
        "use_sliding_window": False, "partial_rotary_factor": 1.0, "pretraining_tp": 1,
        "is_decoder": False, "add_cross_attention": False, "rope_interleaved": False}
# What says nothing about the function that a model computes.
SILENT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version",
          "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
          "attention_dropout", "router_aux_loss_coef", "router_jitter_noise",
          "output_router_logits", "max_window_layers", "_name_or_path", "transformers.js_config",
          "is_llama_config", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version",
          "id2label", "label2id", "problem_type",
          "chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states"}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
# How the type llama3 makes wavelengths longer, besides its factor.
OF_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": ROPE_ORIGINAL}
KIND_OF = {"rms_norm_eps": float, "tie_word_embeddings": bool}     # the other sizes are counts
LARGEST = 1 << 24                     # of a size
LARGEST_TABLE = 1 << 28               # numbers in RoPE's tables: a row for each position
MOST_EXPERTS = 1 << 10


def our_config(fields: dict) -> ModelConfig:
    """The sizes of a model from its config.json. Raises ValueError, by the name of the field, for
    what is not served."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"model_type is {kind!r}; served are {', '.join(KINDS)}")
    if kind.startswith("qwen") and fields.get("use_sliding_window") is False:
        # they say a width that is not used
        fields = fields | {"sliding_window": None}
    for name, value in fields.items():
        if name in ONLY:
            if value != ONLY[name]:
                raise ValueError(f"{name} is {value!r}; {ONLY[name]!r} is served")
        elif name not in SILENT | ROPE | {*SIZES.values()} and value not in (None, False):
            raise ValueError(f"{name} is {value!r}, and what that means is not known here; if it "
                             "changes nothing in what the model computes, remove it")
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or {*map(str, layer_types)} - {"full_attention"}:
        raise ValueError(f"layer_types is {layer_types!r}; full_attention is served")
    _, sizes = KINDS[kind]
    sizes = dict(sizes)
    for ours, name in SIZES.items():
        if fields.get(name) is not None:
            check_size(name, fields[name], KIND_OF.get(name, int))
            sizes[ours] = fields[name]
    for ours in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "d_ff",
                 "norm_eps"):
        if ours not in sizes:
            raise ValueError(f"{SIZES[ours]} is missing")
    for name in NEEDED[kind]:
        if name not in fields:
            raise ValueError(f"{name} is missing; give it as the model has it")
    if sizes.get("head_width") == sizes["d_model"] // sizes["n_heads"]:
        del sizes["head_width"]                        # the usual one, which some spell out
    sizes.setdefault("tied", False)                    # as Hugging Face's classes take it
    width = sizes.get("head_width") or sizes["d_model"] // sizes["n_heads"]
    if sizes["context_length"] * width > LARGEST_TABLE:
        raise ValueError(f"max_position_embeddings is {sizes['context_length']:,}, and RoPE's "
                         f"table for heads of {width:,} channels would be too large; give the "
                         "length that you need")
    if kind == "mixtral":
        if sizes.get("top_k", 1) < 2:                  # here a gate of one is its probability
            raise ValueError("num_experts_per_tok is 1 or missing; from 2 on is served")
        sizes["d_expert"] = sizes["d_ff"]
    elif sizes.pop("n_experts", 0):
        raise ValueError("num_local_experts: only mixtral has experts here")
    return sizes_of("its sizes", sizes | rope_of(fields))


def check_size(name: str, value, kind: type = int) -> None:
    """Raises ValueError for a size that no model has."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
    elif kind is float:
        if type(value) not in (int, float) or not 1e-30 < value < 1e30:
            raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    elif type(value) is not int or not 0 < value <= LARGEST:
        raise ValueError(f"{name} is {value!r}; it must be a whole number in 1 .. {LARGEST:,}")


def rope_of(fields: dict) -> dict:
    """rope_theta and rope_factor, from wherever a version of config.json has them."""
    given = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    if len(given) == 2 and fields["rope_parameters"] != fields["rope_scaling"]:
        raise ValueError("rope_parameters and rope_scaling differ; remove what the model was not "
                         "trained with")
    where = given[0] if given else ""
    rope = fields[where] if given else {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where} is {rope!r}; it must be an object with a rope_type")
    if "rope_theta" not in {*rope, *fields}:
        raise ValueError("rope_theta is missing; give it as the model has it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where} has the type {kind!r}; llama3 is served")
    served = OF_LLAMA3 if kind == "llama3" else {}
    for name, value in served.items():
        if rope.get(name) != value:
            raise ValueError(f"{where}: {name} is {rope.get(name)!r}; {value} is served")
    known = {"rope_theta", "rope_type", "type", *served}
    if kind == "llama3":
        known.add("factor")
    for name in rope.keys() - known:
        raise ValueError(f"{where}: {name} is {rope[name]!r}, and what that means with the type "
                         f"{kind} is not known here")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    check_size("rope_theta", theta, float)
    if kind == "default":
        return {"rope_theta": float(theta)}
    check_size("factor", rope.get("factor"), float)
    return {"rope_theta": float(theta), "rope_factor": float(rope["factor"])}


def their_config(config: ModelConfig, tokenizer: ImportedTokenizer) -> dict:
    """config.json for transformers. Raises ValueError, by name, for what its models do not have."""
    defaults = ModelConfig(config.vocab_size)
    for name in ("token_shift", "n_shared_experts", "n_dense_layers", "router", "expert_groups",
                 "router_noise", "capacity_factor"):
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"{name} is {getattr(config, name)!r}, which no model of the Llama "
                             "family has")
    kind = "llama"
    if config.n_experts:
        kind = "mixtral"
        if config.top_k == 1 or config.balance == "bias":
            raise ValueError(f"top_k is {config.top_k} and balance {config.balance!r}; a Mixtral "
                             "has several experts per token and no biases")
    elif config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias:
        kind = "qwen2"
    name, has = KINDS[kind]
    for feature in ("qkv_bias", "qk_norm"):
        if getattr(config, feature) != has.get(feature, False):
            raise ValueError(f"{feature} is {getattr(config, feature)}; a {kind} has it otherwise")
    if kind == "qwen2" and config.d_head * config.n_heads != config.d_model:
        raise ValueError(f"d_head is {config.d_head}; a qwen2 has d_model / n_heads")
    found = {"architectures": [name], "model_type": kind, "hidden_act": "silu",
             "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad, "bos_token_id": None}
    for ours, field in SIZES.items():
        if ours not in ("n_experts", "top_k") or kind == "mixtral":
            found[field] = getattr(config, ours)
    found["head_dim"] = config.d_head
    if kind == "mixtral":
        found["intermediate_size"] = config.d_expert
    if kind == "qwen2":
        del found["head_dim"]
    found["rope_theta"] = config.rope_theta
    if config.rope_factor != 1:
        found["rope_scaling"] = {"rope_type": "llama3", "factor": config.rope_factor,
                                 **OF_LLAMA3}
    return found


READ_OF_GGUF = {"block_count", "context_length", "embedding_length", "feed_forward_length",
                "attention.head_count", "attention.head_count_kv", "attention.key_length",
                "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal",
                "rope.dimension_count", "rope.freq_base", "vocab_size", "expert_count",
                "expert_used_count"}


def config_of_gguf(metadata: dict, packed: dict) -> dict:
    """The metadata of a GGUF file as a config.json."""
    kind = metadata["general.architecture"]
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"general.architecture is {kind!r}; served are llama, qwen2, qwen3")
    n_experts = metadata.get(f"{kind}.expert_count", 0)
    if n_experts and kind != "llama":
        raise ValueError(f"{kind}.expert_count is {n_experts}; of experts those of Mixtral, whose "
                         "architecture is llama, are served")
    for name in ("block_count", "attention.head_count", "embedding_length"):
        check_size(f"{kind}.{name}", metadata[f"{kind}.{name}"])
    for name in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        check_size(f"{kind}.{name}", metadata.get(f"{kind}.{name}", 1.0), float)
    n_layers = metadata[f"{kind}.block_count"]
    if n_layers > len(packed):
        raise ValueError(f"{kind}.block_count is {n_layers:,}, and there are {len(packed):,} "
                         "tensors")
    n_heads = metadata[f"{kind}.attention.head_count"]
    width = metadata[f"{kind}.embedding_length"]
    head = metadata.get(f"{kind}.attention.key_length", width // n_heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if metadata.get(f"{kind}.{name}", head) != head:
            raise ValueError(f"{kind}.{name} is {metadata[f'{kind}.{name}']}; the width of a "
                             f"head, {head}, is served")
    for name, value in metadata.items():
        start, _, field = name.partition(".")
        if start == kind and field not in READ_OF_GGUF and value not in (0, False, "none"):
            raise ValueError(f"{name} is {value!r}, and what that means is not known here; convert "
                             "the Hugging Face folder")
    if metadata.get(f"{kind}.attention.causal", True) is not True:
        raise ValueError(f"{kind}.attention.causal is {metadata[f'{kind}.attention.causal']!r}; "
                         "decoders are served")
    n_tokens = packed["token_embd.weight"].shape[0]
    if metadata.get(f"{kind}.vocab_size", n_tokens) != n_tokens:
        raise ValueError(f"{kind}.vocab_size is {metadata[f'{kind}.vocab_size']!r}, and "
                         f"token_embd.weight has {n_tokens:,} rows")
    found = {"model_type": kind, "hidden_size": width, "num_attention_heads": n_heads,
             "head_dim": head, "num_hidden_layers": n_layers,
             "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", n_heads),
             "max_position_embeddings": metadata[f"{kind}.context_length"],
             "intermediate_size": metadata[f"{kind}.feed_forward_length"],
             "rms_norm_eps": rounded(metadata[f"{kind}.attention.layer_norm_rms_epsilon"]),
             "rope_theta": rounded(metadata.get(f"{kind}.rope.freq_base", 10_000.0)),
             "vocab_size": n_tokens,
             "tie_word_embeddings": "output.weight" not in packed}
    if n_experts:
        check_experts(f"{kind}.expert_count", n_experts, packed)
        found |= {"model_type": "mixtral", "num_local_experts": n_experts,
                  "num_experts_per_tok": metadata[f"{kind}.expert_used_count"]}
    if "rope_freqs.weight" in packed:
        if kind != "llama":
            raise ValueError(f"rope_freqs.weight: of a {kind} it is not served")
        longest = float(gguf_file.unpacked(packed["rope_freqs.weight"]).max())
        factor = factor_of(longest, found["rope_theta"], head)
        found["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **OF_LLAMA3}
    return found


def check_experts(name: str, n_experts: int, packed: dict) -> None:
    """Raises ValueError for a number of experts that some tensor does not have."""
    if type(n_experts) is not int or not 0 < n_experts <= MOST_EXPERTS:
        raise ValueError(f"{name} is {n_experts!r}; 1 .. {MOST_EXPERTS:,} are served")
    for place, tensor in packed.items():
        if "_exps." in place and tensor.shape[0] != n_experts:
            raise ValueError(f"{name} is {n_experts}, and in {place} {tensor.shape[0]:,} are there")


def factor_of(longest: float, theta: float, head: int) -> float:
    """The factor of Llama 3 by which wavelengths grow, from how many times the longest of them is
    longer. That is the factor itself, if the channel turns at most once in the original context;
    else both wavelengths are mixed."""
    turns = ROPE_ORIGINAL * theta ** (2 / head - 1) / (2 * math.pi)
    low = OF_LLAMA3["low_freq_factor"]
    share = (turns - low) / (OF_LLAMA3["high_freq_factor"] - low)      # of the old wavelength
    share = min(1.0, max(0.0, share))
    # 1 / longest = (1 - share) / factor + share
    return (1 - share) / max(1e-9, 1 / longest - share) if share < 1 else 1.0


def rope_factors(config: ModelConfig) -> Tensor:
    """How many times longer the wavelength of each pair of channels is than without rope_factor,
    (C / 2,)."""
    return rope_frequencies(replace(config, rope_factor=1.0)) / rope_frequencies(config)


def rounded(number: float) -> float:
    """A number that was stored in fp32, as it was written: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{number:.7g}")
