"""
LoRA (001 section 2.4.1; Hu et al. 2021): freeze W_0 and learn a low-rank change beside it.

    h = W_0 x + (alpha / r) B A x          A (r, d_in) random, B (d_out, r) zero at the start

An adapter is small (2 r d numbers per square matrix), can be saved alone, swapped for another over
the same base, and merged into the weights, after which inference costs nothing more.

    adapters = add_adapters(model, rank=16, alpha=32.0, targets="wq,wv")
    init_A(adapters)                       # 001 section 2.5, step 1.1
    init_B(adapters)                       # 1.2
    freeze_base(model)                     # 1.3

    python train_sft.py --peft lora --lora_rank 16 --lora_targets wq,wv
    python train_dpo.py --peft lora            # pi_ref is the base with the adapters off
    python lora.py --init out/pretrain --adapter out/sft --out out/merged      # merge by hand
"""
import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer


class LoRALinear(nn.Module):
    """A Linear without bias and its low-rank change. Its A is set by init_A; as long as B = 0 the
    second term is exactly 0, and the output is the base's bit for bit."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        device = base.weight.device
        self.base = base                               # W_0, frozen by freeze_base
        self.scale = alpha / rank
        self.is_on = True                              # off: the base alone (Base)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_on:
            return self.base(x)
        low = F.linear(x, self.A.to(x.dtype))          # (..., r): all that the change sees of x
        return self.base(x) + self.scale * F.linear(low, self.B.to(x.dtype))

    def merged_weight(self) -> Tensor:
        """W_0 + (alpha / r) B A, fp32 (001 section 2.5, step 4)."""
        # (d_out, r) times (r, d_in): as large as W_0, but of rank r
        return self.base.weight + self.scale * self.B @ self.A


# ---------------------------------------------------------------------- 2.5, step 1

def add_adapters(model: Transformer, rank: int, alpha: float,
                 targets: str = "wq,wv") -> list[LoRALinear]:
    """Put an adapter beside every Linear of the model that is named in `targets`, in place.

    targets: comma-separated names of wq, wk, wv, wo, w13, w2. Raises ValueError for others. Returns
    the adapters, whose A is yet to be set (init_A).
    """
    names = {name.strip() for name in targets.split(",")}
    known = {name for _, name, _ in linears(model.blocks)}     # neither embedding nor lm_head
    unknown = sorted(names - known)
    if unknown:
        raise ValueError(f"--lora_targets: no matrix is called {', '.join(unknown)}; "
                         f"the model has {', '.join(sorted(known))}")
    if rank < 1:
        raise ValueError(f"--lora_rank is {rank}; it must be at least 1")
    adapters = []
    # listed first, because the loop changes the modules that linears() walks through
    for parent, name, base in list(linears(model)):
        if name in names:
            adapter = LoRALinear(base, rank, alpha)
            setattr(parent, name, adapter)             # blocks.0.attention.wq is the adapter now
            adapters.append(adapter)
    return adapters


@torch.no_grad()
def init_A(adapters: list[LoRALinear]) -> None:
    """A ~ N(0, 1 / r^2): std 1 / r (001 section 2.5, step 1.1)."""
    for adapter in adapters:
        rank = adapter.A.shape[0]                      # A is (r, d_in)
        adapter.A.normal_(std=1 / rank)


@torch.no_grad()
def init_B(adapters: list[LoRALinear]) -> None:
    """B = 0 (step 1.2), so that training starts from the base model's outputs."""
    for adapter in adapters:
        adapter.B.zero_()


def freeze_base(model: nn.Module) -> None:
    """Only A and B of the adapters learn (step 1.3)."""
    model.requires_grad_(False)                        # norms and embeddings, too
    for adapter in adapters_of(model):
        adapter.A.requires_grad_(True)
        adapter.B.requires_grad_(True)


def apply(model: Transformer, rank: int, alpha: float, targets: str = "wq,wv") -> Transformer:
    """Step 1 as a whole, in place."""
    adapters = add_adapters(model, rank, alpha, targets)
    init_A(adapters)
    init_B(adapters)
    freeze_base(model)
    return model


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(the module that it belongs to, its name there, the matrix) of every nn.Linear."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


def adapters_of(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


# ---------------------------------------------------------------------- in the alignment stages

@dataclass
class Options:
    """What learns of the model that --init names, in every stage after pretraining."""
    peft: str = "none"                # none (train everything) | lora
    lora_rank: int = 16               # r, >= 1
    lora_alpha: float = 32.0          # alpha: the change counts alpha / r times, > 0
    lora_targets: str = "wq,wv"       # comma-separated: wq, wk, wv, wo, w13, w2


def begin(model: Transformer, options: Options, run) -> None:
    """With --peft lora put adapters on the model, which alone learn."""
    if options.peft == "lora":
        run.also_writes("adapter.json", "adapter.safetensors")
        apply(model, options.lora_rank, options.lora_alpha, options.lora_targets)


def reference_of(model: Transformer, options: Options) -> nn.Module:
    """pi_ref: a frozen copy of the model, or with --peft lora its base, without a copy."""
    if options.peft == "lora":
        return Base(model)
    return copy.deepcopy(model).requires_grad_(False)


def end(model: Transformer, options: Options, run) -> None:
    """With --peft lora save the adapters alone, and merge them into the model (2.5, step 4)."""
    if options.peft == "lora":
        if run.rank == 0:
            save_adapter(run.out, model, options.lora_rank, options.lora_alpha,
                         options.lora_targets)
        merge(model)


class Base(nn.Module):
    """A model as it was before its adapters: its log-probs do not move while they learn."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.models = [model]                          # in a list, or its weights would count twice

    @torch.no_grad()
    def logps(self, *arguments, **options) -> Tensor:
        with adapters_off(self.models[0]):
            return self.models[0].logps(*arguments, **options)

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.models[0].dtype


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


# ---------------------------------------------------------------------- adapters off again

@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """Fold every adapter into its base weight, in place: the model is plain and trainable again."""
    for adapter in adapters_of(model):
        adapter.base.weight.copy_(adapter.merged_weight())
    return detach(model)


def detach(model: Transformer) -> Transformer:
    """Remove every adapter, in place: the base as it was, and trainable."""
    # lists, because the loop changes the modules that it walks through
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.base)
    return model.requires_grad_(True)


# ---------------------------------------------------------------------- adapters on the disk

def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The A and B of every adapter, by name."""
    return {name: w for name, w in model.state_dict().items() if name.endswith((".A", ".B"))}


def save_adapter(folder: str | Path, model: nn.Module, rank: int, alpha: float,
                 targets: str) -> None:
    """Write adapter.safetensors and adapter.json (rank, alpha, targets, checksum) into `folder`."""
    # imported here, because plumbing/ stands above this file
    from plumbing.claim import sha256, write_whole
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in adapter_state(model).items()}
    write_whole(folder / "adapter.safetensors",
                lambda temporary: safetensors.torch.save_file(weights, temporary))
    shape = {"rank": rank, "alpha": alpha, "targets": targets,
             "sha256": sha256(folder / "adapter.safetensors")}
    write_whole(folder / "adapter.json",
                lambda temporary: temporary.write_text(json.dumps(shape) + "\n"))


def load_adapter(model: Transformer, folder: str | Path) -> Transformer:
    """Put the adapter saved in `folder` on `model`; one already there is swapped for it.

    Raises ValueError when the folder has no whole adapter or one made for another model.
    """
    folder = Path(folder)
    shape, weights = read_adapter(folder)
    detach(model)
    apply(model, **shape)
    own = adapter_state(model)                         # of the same names, if it fits
    for name in sorted(set(weights) | set(own)):
        found = shape_of(weights.get(name))
        wanted = shape_of(own.get(name))
        if found != wanted:
            raise ValueError(f"{folder}/adapter.safetensors: {name} is {found}, the model takes "
                             f"{wanted}; the adapter was made for another model")
    # not strict, because the base has no weights there; the loop above has compared all A and B
    model.load_state_dict(weights, strict=False)
    return model


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """adapter.json (rank, alpha, targets) and the weights by name."""
    from plumbing.claim import sha256
    if not (folder / "adapter.json").is_file() or not (folder / "adapter.safetensors").is_file():
        raise ValueError(f"{folder}: no adapter.json and adapter.safetensors there; "
                         "train_sft.py --peft lora writes them")
    try:
        shape = json.loads((folder / "adapter.json").read_text())
        weights = safetensors.torch.load_file(folder / "adapter.safetensors")
    except Exception as error:
        raise ValueError(f"{folder}: adapter.json or adapter.safetensors is damaged ({error}); "
                         "train the adapter again") from error
    kinds = {"rank": int, "alpha": (int, float), "targets": str}
    known = None
    if isinstance(shape, dict):
        known = shape.pop("sha256", None)
    if not isinstance(shape, dict) or shape.keys() != kinds.keys() or not all(
            isinstance(shape[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"{folder}/adapter.json is damaged: it must hold a rank, an alpha and "
                         "targets")
    if known is None:
        print(f"{folder}: no checksums in its adapter.json; taken as it is", file=sys.stderr)
    elif known != sha256(folder / "adapter.safetensors"):
        raise ValueError(f"{folder}: adapter.safetensors is not what the run wrote (its checksum "
                         'differs); put that back, or, if the change is your own, remove "sha256" '
                         "from adapter.json")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{folder}/adapter.safetensors: {name} is not finite; train the "
                             "adapter again")
    return shape, weights


def shape_of(weight: Tensor | None) -> tuple | None:
    return None if weight is None else tuple(weight.shape)


# ---------------------------------------------------------------------- merging by hand

@dataclass
class Config:
    init: str = "out/pretrain"        # model folder of the base
    adapter: str = "out/sft"          # folder with adapter.safetensors
    out: str = "out/merged"           # model folder to write


def main(cfg: Config) -> None:
    # imported here, because plumbing/ stands above this file, and only this command needs it
    from plumbing import claim
    from plumbing.folders import load_model, save_model
    if Path(cfg.out).is_dir() and any(Path(cfg.out).iterdir()):
        raise ValueError(f"--out {cfg.out} is not empty; give another folder to write")
    model, tokenizer = load_model(cfg.init)
    load_adapter(model, cfg.adapter)
    merge(model)
    claim.lock(Path(cfg.out))
    save_model(cfg.out, model, tokenizer, stage="merge",
               parent={"folder": cfg.init, "adapter": cfg.adapter})
    claim.unlock(Path(cfg.out))
    print(f"{cfg.init} with the adapter of {cfg.adapter} merged: {cfg.out}")


if __name__ == "__main__":
    from plumbing.options import command_line
    command_line(main, Config, __doc__)
