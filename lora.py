"""
LoRA (001 section 2.4.1; Hu et al. 2021): freeze W_0 and learn a low-rank change beside it.

    h = W_0 x + (alpha / r) B A x          A (r, d_in) random, B (d_out, r) zero at the start

An adapter is small (2 r d numbers per square matrix), can be saved alone, swapped for another over
the same base, and merged into the weights, after which inference costs nothing more.

    python train_sft.py --peft lora --lora_rank 16 --lora_targets wq,wv
    python lora.py --init out/pretrain --adapter out/sft --out out/merged      # merge by hand
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import training
from model import Linear, Transformer, load_model, save_model


class LoRALinear(nn.Module):
    """A frozen Linear and its low-rank change. At the start its output is the base's bit for bit:
    B = 0, so the second term is exactly 0."""

    def __init__(self, base: Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.A.to(x.dtype))                      # (..., r)
        return self.base(x) + self.scale * F.linear(low, self.B.to(x.dtype))

    def merged_weight(self) -> Tensor:
        """W_0 + (alpha / r) B A, fp32 (001 section 2.5, step 4)."""
        return self.base.weight + self.scale * self.B @ self.A


def apply(model: Transformer, rank: int, alpha: float, targets: str = "wq,wv") -> Transformer:
    """Freeze the model and put an adapter beside every Linear named in `targets`, in place.

    targets: comma-separated names of wq, wk, wv, wo, w13, w2. Raises ValueError for others.
    """
    names = [name.strip() for name in targets.split(",")]
    known = {name.rsplit(".", 1)[-1] for name, module in model.blocks.named_modules()
             if isinstance(module, Linear)}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"--lora_targets: no matrix is called {', '.join(unknown)}; "
                         f"the model has {', '.join(sorted(known))}")
    if rank < 1:
        raise ValueError(f"--lora_rank is {rank}; it must be at least 1")
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, Linear):
                setattr(module, name, LoRALinear(child, rank, alpha))
    return model


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """Fold every adapter into its base weight, in place: the model is plain and trainable again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                child.base.weight.copy_(child.merged_weight())
                setattr(module, name, child.base)
    return model.requires_grad_(True)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The A and B of every adapter, by name."""
    return {name: w for name, w in model.state_dict().items() if name.endswith((".A", ".B"))}


def save_adapter(folder: str | Path, model: nn.Module, rank: int, alpha: float,
                 targets: str) -> None:
    """Write adapter.safetensors and adapter.json (rank, alpha, targets) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in adapter_state(model).items()}
    safetensors.torch.save_file(weights, folder / "adapter.safetensors.tmp")
    (folder / "adapter.safetensors.tmp").replace(folder / "adapter.safetensors")
    shape = {"rank": rank, "alpha": alpha, "targets": targets}
    (folder / "adapter.json").write_text(json.dumps(shape) + "\n")


def load_adapter(model: Transformer, folder: str | Path) -> Transformer:
    """Put the adapter saved in `folder` on `model`; one already there is swapped for it.

    Raises ValueError when the folder has no whole adapter or one made for another model.
    """
    folder = Path(folder)
    if not (folder / "adapter.json").is_file() or not (folder / "adapter.safetensors").is_file():
        raise ValueError(f"{folder}: no adapter.json and adapter.safetensors there; "
                         "train_sft.py --peft lora writes them")
    try:
        shape = json.loads((folder / "adapter.json").read_text())
        weights = safetensors.torch.load_file(folder / "adapter.safetensors")
    except Exception as error:
        raise ValueError(f"{folder}: adapter.json or adapter.safetensors is damaged ({error}); "
                         "train the adapter again") from error
    apply(detach(model), **shape)
    there = adapter_state(model)
    for name in sorted(set(weights) | set(there)):
        found, wanted = (tuple(state[name].shape) if name in state else None
                         for state in (weights, there))
        if found != wanted:
            raise ValueError(f"{folder}/adapter.safetensors: {name} is {found}, the model takes "
                             f"{wanted}; the adapter was made for another model")
    model.load_state_dict(weights, strict=False)                   # checked above: A and B, all
    return model


def detach(model: Transformer) -> Transformer:
    """Remove every adapter, in place: the base as it was."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.base)
    return model.requires_grad_(True)


@dataclass
class Config:
    init: str = "out/pretrain"        # model folder of the base
    adapter: str = "out/sft"          # folder with adapter.safetensors
    out: str = "out/merged"           # model folder to write


def main(cfg: Config) -> None:
    if Path(cfg.out).is_dir() and any(Path(cfg.out).iterdir()):
        raise ValueError(f"--out {cfg.out} is not empty; give another folder to write")
    model, tokenizer = load_model(cfg.init)
    merge(load_adapter(model, cfg.adapter))
    save_model(cfg.out, model, tokenizer, stage="merge",
               parent={"folder": cfg.init, "adapter": cfg.adapter})
    print(f"{cfg.init} with the adapter of {cfg.adapter} merged: {cfg.out}")


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
