"""
Adapters of the peft library: adapter_config.json and adapter_model.safetensors, to and from what
lora.py saves. Of its methods LoRA alone, which both have.
"""
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import lora
from model import Transformer
from tokenizer_formats import read_json

# {ours: peft's modules, which lie one below the other in ours}
OF_PEFT = {"wq": ["self_attn.q_proj"], "wk": ["self_attn.k_proj"], "wv": ["self_attn.v_proj"],
           "wo": ["self_attn.o_proj"], "w13": ["mlp.gate_proj", "mlp.up_proj"],
           "w2": ["mlp.down_proj"]}
ONLY_IN_PEFT = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False,
                "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
                "trainable_token_indices": None, "lora_bias": False, "target_parameters": None}
# What says nothing about what an adapter adds.
SILENT = {"r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform", "lora_dropout",
          "task_type", "inference_mode", "base_model_name_or_path", "init_lora_weights", "revision",
          "auto_mapping", "peft_version", "layers_pattern", "megatron_core", "ensure_weight_tying",
          "qalora_group_size"}


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
        matrix = name.split(".")[-2]
        if matrix not in OF_PEFT:
            raise ValueError(f"{adapter}: it changes the matrix {matrix}, for which peft's LoRA "
                             "has no place; merge it and give --to hf")
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
    config = read_json(folder / "adapter_config.json", None)
    theirs = read_weights(folder / "adapter_model.safetensors")
    check_config(f"{folder}/adapter_config.json", config)
    known = set()
    for layer in range(len(model.blocks)):
        for ours in OF_PEFT:
            for letter in "AB":
                known |= {*peft_names(f"blocks.{layer}._.{ours}.{letter}")}
    if unused := sorted({*theirs} - known):
        raise ValueError(f"{folder}: {len(unused)} tensors are of no use to this model, for "
                         f"example {unused[0]}")
    check_pairs(folder, theirs, config["r"])
    check_places(folder, theirs, config)
    layers = sorted({int(name.split(".")[4]) for name in theirs})
    targets = [ours for ours, modules in OF_PEFT.items()
               if any(f"{module}.lora_A" in name for module in modules for name in theirs)]
    rank = config["r"]
    alpha = float(config["lora_alpha"])
    if has_two_inputs(theirs):
        # so that alpha / r, or alpha / sqrt(r), stays
        alpha *= 2 ** 0.5 if config.get("use_rslora") else 2
        rank *= 2
    options = lora.Options(peft="lora", lora_rank=rank, lora_alpha=alpha,
                           lora_targets=",".join(targets),
                           lora_layers=",".join(map(str, layers)),
                           lora_sqrt=bool(config.get("use_rslora")))
    weights = {}
    try:
        lora.attach(model, options)
        for name, own in lora.learned(model).items():
            weights[name] = put_together(name, theirs, own)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    model.load_state_dict(weights, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, lora.LoRALinear) and not module.merged_weight().isfinite().all():
            raise ValueError(f"{folder}: it makes {name} infinite; alpha or its numbers are wrong")
    return model


def has_two_inputs(theirs: dict[str, Tensor]) -> bool:
    """Whether gate_proj and up_proj have different A somewhere, which here are one matrix's."""
    for name, gate in theirs.items():
        if "gate_proj.lora_A" in name:
            up = theirs.get(name.replace("gate_proj", "up_proj"))
            if up is not None and not torch.equal(gate, up):
                return True
    return False


def read_weights(file: Path) -> dict[str, Tensor]:
    try:
        weights = safetensors.torch.load_file(file)
    except Exception as error:                         # safetensors has errors of its own
        raise ValueError(f"{file} is missing or damaged ({error})") from None
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{file}: {name} is of the type {weight.dtype}; fp32, fp16 and bf16 "
                             "are served")
    if not weights or any(not weight.isfinite().all() for weight in weights.values()):
        raise ValueError(f"{file} is empty, or not all of its numbers are finite")
    return weights


def check_config(file: str, config: dict | None) -> None:
    """Raises ValueError, by the name of the field, for what would make another adapter of it."""
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not an object of fields")
    for name, value in config.items():
        if name in ONLY_IN_PEFT and value != ONLY_IN_PEFT[name]:
            raise ValueError(f"{file}: {name} is {value!r}; {ONLY_IN_PEFT[name]!r} is served")
        if name not in SILENT | ONLY_IN_PEFT.keys() and value not in (None, False, {}, []):
            raise ValueError(f"{file}: {name} is {value!r}, and what that means is not known here")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError(f"{file}: init_lora_weights is {config['init_lora_weights']!r}, which "
                         "changes the base as well")
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(config.get(name)) not in kinds or not 0 < config[name] < 1e30:
            raise ValueError(f"{file}: {name} is {config.get(name)!r}; it must be a "
                             f"{'whole ' if name == 'r' else ''}number above 0")


def check_pairs(folder: Path, theirs: dict[str, Tensor], rank: int) -> None:
    """Raises ValueError for an A without its B, a B without its A, and for one of another rank."""
    for name, weight in theirs.items():
        is_a = ".lora_A." in name
        start, _, end = name.rpartition(".lora_A." if is_a else ".lora_B.")
        other = start + (".lora_B." if is_a else ".lora_A.") + end
        if other not in theirs:
            raise ValueError(f"{folder}: {name} is there, and {other} is missing")
        if weight.dim() != 2 or weight.shape[0 if is_a else 1] != rank:
            raise ValueError(f"{folder}: {name} has the shape {tuple(weight.shape)}, and the "
                             f"config's r is {rank}")


def check_places(folder: Path, theirs: dict[str, Tensor], config: dict) -> None:
    """Raises ValueError for tensors of modules or layers that the config does not name, because
    peft leaves those out."""
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if targets not in (None, "all-linear") and not isinstance(targets, list):
        raise ValueError(f"{folder}/adapter_config.json: target_modules is {targets!r}; a list of "
                         "modules is served")
    for name in theirs:
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if isinstance(targets, list) and not any(f".{module}".endswith(f".{target}")
                                                 for target in targets):
            raise ValueError(f"{folder}: there is {name}, and target_modules does not name it")
        if layers and int(name.split(".")[4]) not in layers:
            raise ValueError(f"{folder}: there is {name}, and layers_to_transform is {layers}")


def put_together(name: str, theirs: dict[str, Tensor], own: Tensor) -> Tensor:
    """The A or B of one of our matrices, of own's shape, from those of peft's modules."""
    whole = torch.zeros(own.shape)
    modules = peft_names(name)
    if not any(module in theirs for module in modules):
        raise ValueError(f"{modules[0]} is missing; an adapter of the same matrices in each of its "
                         "layers is served")
    n = len(modules)
    for i, module in enumerate(modules):
        if module not in theirs:
            continue
        part = theirs[module].float()
        if name.endswith("A"):
            first = i * len(part) if len(whole) == n * len(part) else 0
            rows = slice(first, first + len(part))
            columns = slice(None)
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
