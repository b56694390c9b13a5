"""
Sharded training (FSDP; ZeRO stage 3 of Rajbhandari et al. 2020): each of n ranks keeps 1/n of every
weight, gradient and optimizer state, and all of one block's weights only while it works on it.

    forward    a block's weights are gathered, used, let go                       all-gather
    backward   gathered again; gradients averaged, each rank keeps its part       all-gather,
               of them                                                            reduce-scatter
    update     every rank steps its own part

That is 3/2 of the bytes that DDP sends, for 1/n of the memory. A parameter is a DTensor then: the
rows that this rank keeps, and where the others are. What needs whole matrices asks for them: Muon,
a checkpoint, the finished model. Files are the same as without sharding, so that a run goes on on
any number of ranks, sharded or not.

Weights are gathered in fp32. The copies in the model's precision are made at use and live until the
backward pass, as they do without sharding; --gradient_checkpointing makes them again instead.
"""
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def check(cfg, dtype: torch.dtype) -> None:
    """Raises ValueError for a --shard that is unknown or cannot work with the other options."""
    shard = getattr(cfg, "shard", "none")
    if shard not in ("none", "fsdp"):
        raise ValueError(f"--shard {shard}: give none or fsdp")
    if shard == "none":
        return
    if not dist.is_initialized():
        raise ValueError("--shard fsdp shares the weights among ranks: start it by torchrun "
                         "--nproc_per_node N")
    if dtype == torch.float16:
        raise ValueError("--shard fsdp with float16: an overflow would be seen by the ranks that "
                         "have it alone; give --dtype bfloat16 or float32")
    for option, is_set in (("--compile", cfg.compile),
                           ("--peft lora", getattr(cfg, "peft", "none") == "lora")):
        if is_set:
            raise ValueError(f"--shard fsdp does not go with {option}; leave one of them out")


def shard(model: nn.Module) -> nn.Module:
    """Share the weights among all ranks, in place; every rank must hold the same ones.

    Gradients come out averaged over ranks, as DDP's do. A block is gathered and let go as one; the
    embedding, the heads and the last norm stay from a forward pass to the end of the backward pass.
    """
    warnings.filterwarnings("ignore", ".*returned a view tensor")      # nothing is written into it
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for block in (*model.blocks, *getattr(model, "encoder", ())):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; all of them must ask. Others stay as they are."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def part(t: Tensor, like: Tensor) -> Tensor:
    """This rank's part of t, which all ranks have, sharded as `like` is."""
    if not isinstance(like, DTensor) or t.shape != like.shape:     # AdamW counts steps in a scalar
        return t
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def copied(tree, keep: bool):
    """`tree` with each tensor copied to CPU memory, whole, one after the other; None instead of it
    on a rank that is not to keep it, which must call this all the same."""
    def copy(t: Tensor) -> Tensor | None:
        t = whole(t.detach())
        return t.to("cpu", copy=True) if keep else None
    return tree_map_only(Tensor, copy, tree)


def load(target: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """target.load_state_dict(state) for a state of whole tensors.

    Raises what load_state_dict does for a state that does not fit: RuntimeError, ValueError or
    KeyError.
    """
    if isinstance(target, nn.Module):
        own = target.state_dict()
        state = {name: part(t, own[name]) if name in own else t for name, t in state.items()}
    elif isinstance(target, torch.optim.Optimizer):        # which numbers its parameters in order
        own = [p for group in target.param_groups for p in group["params"]]
        state = state | {"state": {n: {key: part(value, own[n]).clone() if isinstance(value, Tensor)
                                       else value for key, value in entries.items()}
                                   for n, entries in state["state"].items()}}
    target.load_state_dict(state)
