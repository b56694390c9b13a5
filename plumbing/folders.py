"""
Model folders: what every finished stage leaves in --out, and the next one reads as --init.

    config.json          {"model": {sizes, architecture, n_segments, head, peft}, "sha256": sums
                         of "model" and of the files below, **record of the stage}
    model.safetensors    weights, named as in model.py (trunk.* and head.* of a model with a head);
                         where peft names a base, only those that are not the base's
    tokenizer.json

    save_model(folder, model, tokenizer, stage="sft")
    model, tokenizer = load_model(folder)              # a decoder
    model, tokenizer = load_any_model(folder)          # any architecture
    reward_model, tokenizer = load_reward_model(folder)

Folders of former versions open as well: their heads had other names, see current_names().
"""
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import lora
from architectures import ARCHITECTURES, Encoder
from heads import WithHead
from model import ModelConfig, Transformer
from plumbing import claim
from plumbing.claim import read_json, sha256
from plumbing.options import check_values
from tokenizer import Tokenizer

FILES = "config.json", "model.safetensors", "tokenizer.json"
FORMER_HEADS = "scalar_head", "next_sentence_head"
BASE_STAGES = "pretrain", "denoise"            # whose models have read texts, but no conversation


# ---------------------------------------------------------------------- writing

def save_model(folder: str | Path, model: Transformer | WithHead, tokenizer: Tokenizer,
               weights: dict[str, Tensor] | None = None, **record) -> None:
    """Write tokenizer.json, model.safetensors and, last, config.json = {"model": ..., **record}:
    a folder with config.json is complete. Each file replaces the former one atomically.
    Raises ValueError for a file of these names that no run wrote, FloatingPointError for weights
    that are not finite.

    weights: those of the whole model, for a rank that holds only its share of them.
    """
    folder = Path(folder)
    if weights is None:
        weights = model.state_dict()
    if "base" in (trunk_of(model).peft or {}):
        own = lora.learned_names(model)
        weights = {name: weight for name, weight in weights.items()
                   if name in own or name.startswith("head.")}
    # before anything is written
    if not_finite := names_not_finite(weights):
        raise FloatingPointError(f"{folder}: {not_finite[0]} is not finite; no model is written")
    folder.mkdir(parents=True, exist_ok=True)
    claim.refuse_foreign(folder, FILES)
    claim.add(folder, *FILES)
    tokenizer.save(folder)
    # contiguous, because safetensors refuses other tensors
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    claim.write_whole(folder / "model.safetensors",
                      lambda temporary: safetensors.torch.save_file(weights, temporary))
    # last, so that a folder without config.json is known to be half-written
    sizes = description(model)
    sums = {"model": sha256_of(sizes)}
    for name in ("model.safetensors", "tokenizer.json"):
        sums[name] = sha256(folder / name)
    config = json.dumps({"model": sizes, "sha256": sums, **record}, indent=2) + "\n"
    claim.write_whole(folder / "config.json", lambda temporary: temporary.write_text(config))


def description(model: Transformer | WithHead) -> dict:
    """The "model" of config.json. head: "lm" for none, "scalar" for one number (reward model,
    critic), else how many numbers."""
    head = "lm"
    trunk = trunk_of(model)
    if isinstance(model, WithHead):
        n = model.head.out_features
        head = "scalar" if n == 1 else n               # the word that former versions wrote
    found = dataclasses.asdict(trunk.config) | {
        "head": head, "architecture": trunk.architecture,
        "n_segments": getattr(trunk, "n_segments", 0)}
    if trunk.peft:
        found["peft"] = trunk.peft
    return found


def trunk_of(model: Transformer | WithHead) -> Transformer:
    return model.trunk if isinstance(model, WithHead) else model


def parents(cfg) -> dict[str, str]:
    """The model folders that a stage starts from, each with the checksum of its weights."""
    found = {}
    for folders in models_of(cfg).values():
        for folder in folders:
            found[folder] = sha256(Path(folder) / "model.safetensors")
    return found


def models_of(cfg) -> dict[str, list[str]]:
    """The model folders that a stage reads, by the options that name them."""
    found = {}
    for option in ("init", "reference"):
        if getattr(cfg, option, ""):
            found[option] = [getattr(cfg, option)]
    for option in ("reward", "gold"):
        # other names are rewards of other kinds: world, gsm8k, module:function
        terms = reward_terms(getattr(cfg, option, ""))
        folders = [name for _, name in terms if is_model_folder(name)]
        if folders:
            found[option] = folders
    return found


def is_model_folder(name: str) -> bool:
    return (Path(name) / "config.json").exists()


def reward_terms(spec: str) -> list[tuple[float | None, str]]:
    """The weights, None where none is given, and names of a --reward (rewards.py).

    "0.7*out/a,0.3*out/b" -> [(0.7, "out/a"), (0.3, "out/b")]. Raises ValueError for weights that
    are no numbers.
    """
    if not spec:
        return []
    if is_model_folder(spec):                              # whatever its name looks like
        return [(None, spec)]
    terms = []
    for term in spec.split(","):
        weight, star, name = term.rpartition("*")
        if not star:
            terms.append((None, name))
            continue
        try:
            terms.append((float(weight), name))
        except ValueError:
            raise ValueError(f"--reward {spec}: the weight {weight!r} is no number; write "
                             "0.7*out/safe,0.3*out/help") from None
        if not math.isfinite(float(weight)):
            raise ValueError(f"--reward {spec}: the weight {weight} is not finite")
    return terms


def sha256_of(fields: dict) -> str:
    """The checksum of an object as JSON has it, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def names_not_finite(weights: dict[str, Tensor]) -> list[str]:
    # the sum first, which needs no second tensor: where it is finite all numbers are
    return [name for name, weight in weights.items()
            if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all()]


# ---------------------------------------------------------------------- reading

def load_model(folder: str | Path, device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.float32, context_length: int | None = None,
               to_answer: bool = False, two_stacks: bool = False) -> tuple[Transformer, Tokenizer]:
    """Read a decoder, which every stage after pretraining takes. A prefix model comes back as a
    decoder, because the stages read conversations from left to right and its weights are the same.

    context_length changes how far RoPE's table reaches. to_answer: it will not be trained, and its
    weights stay as they lie in the file, of which nothing is copied. two_stacks: take an
    encoder-decoder, too. Raises ValueError for other models, and when the folder is absent or
    half-written, or its parts do not fit together.
    """
    taken = {"decoder": "a decoder", "prefix": "a prefix model"}
    if two_stacks:
        taken["encoder_decoder"] = "an encoder-decoder"
    saved, weights, tokenizer = read_folder(folder)
    refuse_reward_model(folder, saved)
    if saved["head"] != "lm" and saved["architecture"] in taken:
        raise ValueError(f"{folder}: this is a classifier, which cannot write any more; give the "
                         "model that it was made of")
    architecture = saved["architecture"]
    if architecture == "prefix":                       # the same weights by the same names
        saved["architecture"] = "decoder"
    elif architecture not in taken:
        raise ValueError(f"{folder}: this model is an {architecture}; here give "
                         f"{' or '.join(taken.values())}")
    model = build(folder, saved, weights, tokenizer, dtype, context_length, to_answer)
    return model.to(device), tokenizer


def load_any_model(folder: str | Path, device: torch.device | str = "cpu",
                   dtype: torch.dtype = torch.float32, context_length: int | None = None,
                   to_answer: bool = False) -> tuple[Transformer | WithHead, Tokenizer]:
    """Read a model of any architecture; one that has learned next-sentence prediction comes with
    its head (WithHead). to_answer: as in load_model(). Raises as load_model() does, also for a
    reward model."""
    saved, weights, tokenizer = read_folder(folder)
    refuse_reward_model(folder, saved)
    model = build(folder, saved, weights, tokenizer, dtype, context_length, to_answer)
    return model.to(device), tokenizer


def load_reward_model(folder: str | Path, device: torch.device | str = "cpu",
                      dtype: torch.dtype = torch.float32) -> tuple[WithHead, Tokenizer]:
    """Read a reward model. Raises as load_model() does, also for a model without such a head, and
    for a reward model of former versions that reads log p as well."""
    saved, weights, tokenizer = read_folder(folder)
    if saved["head"] != "scalar":
        raise ValueError(f"{folder}: this is a language model; give a reward model, the --out of "
                         "train_rm.py")
    return build(folder, saved, weights, tokenizer, dtype).to(device), tokenizer


def read_record(folder: str | Path) -> dict:
    """config.json of a finished stage. Raises ValueError for one that is no such record."""
    file = Path(folder) / "config.json"
    record = read_json(file)
    kinds = {"model": dict, "parents": dict, "parent": dict, "config": dict, "result": dict,
             "stage": str}
    for name, kind in kinds.items():
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(f'{file} is damaged: its "{name}" is {type(record[name]).__name__} '
                             f"and not {kind.__name__}")
    return record


def lineage(folder: str | Path) -> list[dict]:
    """config.json of a model folder and of those that its stage and the stages before it started
    from, the nearest first. A folder that is not there any more is left out."""
    records = []
    seen = set()                   # because out/sft may have been trained again from its own child
    waiting = [str(folder)]
    while waiting:
        nearest = waiting.pop(0)
        file = Path(nearest) / "config.json"
        if nearest in seen or not file.is_file():
            continue
        seen.add(nearest)
        record = read_record(nearest)
        records.append(record)
        waiting += record.get("parents", {})
        waiting += record.get("parent", {}).values()       # of lora.py: the base and the adapter
    return records


def refuse_reward_model(folder: str | Path, saved: dict) -> None:
    if saved["head"] == "scalar":
        raise ValueError(f"{folder}: this is a reward model; give a language model, the --out of "
                         "train_pretrain.py, train_sft.py, train_dpo.py or train_ppo.py")


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor], Tokenizer]:
    """The "model" of config.json, the weights by their current names, and the tokenizer."""
    folder = Path(folder)
    refuse_foreign_model(folder)
    for name in FILES:
        if not (folder / name).is_file():
            problem = "there is no such folder"
            if folder.is_dir():
                problem = f"there is no {name}: the run that writes it has not finished"
            raise ValueError(f"{folder}: {problem}; give the --out folder of a finished stage")
    tokenizer = Tokenizer.load(folder)                 # raises ValueError for a damaged one
    record = read_record(folder)
    if "model" not in record:
        raise ValueError(f'{folder}/config.json is damaged: it has no "model"')
    saved = record["model"]
    try:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except Exception as error:                         # safetensors has errors of its own
        raise ValueError(f"{folder}/model.safetensors is damaged ({error}); run the stage again or "
                         "use a checkpoint of it") from error
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{folder}: {name} in model.safetensors is {weight.dtype}; weights "
                             "are floating-point numbers")
    if not_finite := names_not_finite(weights):
        raise ValueError(f"{folder}: {not_finite[0]} in model.safetensors is not finite; run the "
                         "stage again or use a checkpoint of it")
    # folders of former versions that predate these fields hold decoders
    saved = {"head": "lm", "architecture": "decoder", "n_segments": 0} | saved
    if saved["architecture"] not in tuple(ARCHITECTURES):     # which may be asked for a list
        raise ValueError(f"{folder}: architecture is {saved['architecture']!r}; it must be one of "
                         f"{tuple(ARCHITECTURES)}")
    if "next_sentence_head.weight" in weights:
        saved["head"] = len(weights["next_sentence_head.weight"])      # former versions wrote "lm"
    try:
        weights = current_names(weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return saved, weights, tokenizer


def refuse_foreign_model(folder: Path) -> None:
    """Raises ValueError, with the command that converts it, for a model in a form of others."""
    is_foreign = folder.suffix in (".gguf", ".whl", ".zip") and folder.is_file()
    if (folder / "config.json").is_file():
        record = read_json(folder / "config.json")
        is_foreign = "model" not in record and {"model_type", "architectures"} & record.keys()
    if is_foreign:
        raise ValueError(f"{folder} is a model of another library; convert it first: python "
                         f"convert.py --init {folder} --out out/{folder.stem}")


def build(folder: str | Path, saved: dict, weights: dict[str, Tensor], tokenizer: Tokenizer,
          dtype: torch.dtype, context_length: int | None = None,
          to_answer: bool = False) -> nn.Module:
    """The model that read_folder() found. to_answer: with those weights, not with copies of them,
    where nothing else is put on it."""
    sizes = dict(saved)
    architecture = sizes.pop("architecture")
    n_segments = sizes.pop("n_segments")
    head = sizes.pop("head")
    peft = sizes.pop("peft", {})
    base = {}                                          # weights that are not in this folder
    if "base" in peft:
        base = base_weights(folder, peft["base"])
    if context_length:                                 # RoPE's table is made anew, weights stay
        sizes["context_length"] = context_length
    config = sizes_of(f"{folder}/config.json", sizes)
    n_saved = sum(weight.numel() for weight in [*weights.values(), *base.values()])
    # Before the model is made, because a file of a kilobyte may ask for a million layers.
    if config.block_parameters() > n_saved:
        raise ValueError(f"{folder}: model.safetensors does not fit config.json; they are not of "
                         f"one run ({n_saved:,} parameters are there, the blocks alone have "
                         f"{config.block_parameters():,})")
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{folder}: the model has {config.vocab_size} tokens, its tokenizer "
                         f"{tokenizer.vocab_size}; they are not of one run")
    as_it_lies = to_answer and not peft and head == "lm"
    with torch.device("meta" if as_it_lies else "cpu"):
        if architecture == "encoder":
            model = Encoder(config, dtype, n_segments)
        else:
            model = ARCHITECTURES[architecture](config, dtype)
    try:
        if base:
            model.load_state_dict(base)
        if peft:
            lora.attach(model, lora.options_of(peft))
            tokenizer.n_virtual = lora.n_virtual(model)
        if head != "lm":                               # one number for "scalar", or so many
            n = 1 if head == "scalar" else head
            model = WithHead(model, n, keep_lm_head=True)
        if as_it_lies:
            model.make_rope_table("cpu")
            # a copy of what is not cast, because it would keep all of the file in memory
            weights = {name: weight.clone() if weight.dim() < 2 else weight
                       for name, weight in weights.items()}
        missing, unknown = model.load_state_dict(weights, strict=not base, assign=as_it_lies)
        own = lora.learned_names(model)
        if unknown or own & {*missing}:
            raise RuntimeError(f"not there: {sorted(own & {*missing})}; unknown: {unknown}")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: model.safetensors does not fit config.json; they are not of "
                         f"one run ({error})") from error
    verify(Path(folder))
    trunk = trunk_of(model)
    if base and peft["peft"] == "qlora":               # because a stage may train all of it
        lora.merge(trunk)
    elif peft:
        trunk.requires_grad_(True)
    return model


def base_weights(folder: str | Path, base: dict[str, str]) -> dict[str, Tensor]:
    """The weights of the model that the adapter in `folder` was made on.

    base: its "folder" and the "sha256" of its weights. Raises ValueError when it is not there, or
    has other weights now.
    """
    if not (Path(base["folder"]) / "model.safetensors").is_file():
        raise ValueError(f"{folder}: it holds what was learned beside {base['folder']}, and that "
                         "is not there; put it back")
    if sha256(Path(base["folder"]) / "model.safetensors") != base["sha256"]:
        raise ValueError(f"{folder}: it was made on {base['folder']}, which has other weights now; "
                         "put back the model that it was made on, or train it again")
    _, weights, _ = read_folder(base["folder"])
    return weights


def sizes_of(where: str, sizes: dict) -> ModelConfig:
    """The "model" of config.json as a ModelConfig. Raises ValueError, naming the file, for fields
    that are not there, unknown, of another type or that do not fit together."""
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for name, value in sizes.items():
        if name not in fields:
            raise ValueError(f"{where}: the model has no size called {name!r}")
        kind = fields[name].type
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise ValueError(f"{where}: {name} is {value!r}; it must be of type {kind.__name__}")
    try:
        check_values(ModelConfig, sizes)
        return ModelConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def verify(folder: Path) -> None:
    """Raises ValueError when a folder's content is not what the run wrote. Without checksums, in
    folders of former versions, that is said."""
    record = read_record(folder)
    sums = record.get("sha256")
    if not isinstance(sums, dict):
        print(f"{folder}: no checksums in its config.json; taken as it is", file=sys.stderr)
        return
    for name, wanted in sums.items():
        found = sha256_of(record["model"]) if name == "model" else sha256(folder / name)
        if found != wanted:
            what = "the \"model\" of config.json" if name == "model" else name
            raise ValueError(f"{folder}: {what} is not what the run wrote (its checksum differs); "
                             'put that back, or, if the change is your own, remove "sha256" from '
                             "config.json")


def current_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a folder or checkpoint of former versions, by the names of today; those of today
    stay as they are.

    Former models with a head named it scalar_head or next_sentence_head, beside the parts of the
    trunk. Raises ValueError for a reward model whose reward was r = W_r h + b_r + w_p c log p(y|x)
    with w_p ("likelihood") other than 0, because today's reward has no such term.
    """
    former_head = [name for name in FORMER_HEADS if f"{name}.weight" in weights]
    if not former_head:
        return weights
    # for example scalar_head.bias -> head.bias, blocks.0.mlp.w2.weight -> trunk.blocks.0...
    renamed = {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if part in former_head:
            renamed[f"head.{rest}"] = weight
        elif part == "likelihood":
            refuse_likelihood(weight)
        elif part != "likelihood_unit":                # c, which says nothing without w_p
            renamed[f"trunk.{name}"] = weight
    return renamed


def refuse_likelihood(weight: Tensor) -> None:
    if weight.count_nonzero() > 0:                     # 0 where --likelihood was false
        raise ValueError(f'the reward model has a weight "likelihood" of {weight.item():.3g}: its '
                         "reward adds that much of log p(y | x), a term that reward models no "
                         "longer have; train the reward model again (train_rm.py)")
