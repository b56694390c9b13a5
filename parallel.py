"""
Sharded training (FSDP; ZeRO stage 3 of Rajbhandari et al. 2020): each of n ranks keeps 1/n of every
weight, gradient and optimizer state, and all of one block's weights only while it works on it.

    forward    a block's weights are gathered, used, let go                       all-gather
    backward   gathered again; gradients averaged, each rank keeps its part       all-gather,
               of them                                                            reduce-scatter
    update     every rank steps its own part

That is 3/2 of the bytes that DDP sends, for 1/n of the memory. A parameter is a DTensor then: the
rows that this rank keeps, and where the others are. Muon needs whole matrices, so each rank works
on some. Rank 0 collects all there is, one tensor after the other, to write checkpoints and models:
the same files as without sharding, so that a run goes on on any number of ranks, sharded or not.

Weights are gathered in fp32. The copies in the model's precision are made at use and live until the
backward pass, as they do without sharding; --gradient_checkpointing makes them again instead. Every
rank makes the whole model before it lets go of what is not its part: it must fit once, alone.

    torchrun --nproc_per_node 8 train_pretrain.py --shard fsdp ...     # or train_sft.py
"""
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
    embedding, the heads and the last norm stay from a forward pass to the end of the next backward
    pass, so that after a validation loss evaluate.masked_figures finds them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second to import: only where needed
    warnings.filterwarnings("ignore", ".*returned a view tensor")      # nothing is written into it
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for block in (*model.blocks, *getattr(model, "encoder", ())):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return t.to_local() if is_sharded(t) else t


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; all of them must ask. Others stay as they are."""
    return t.full_tensor() if is_sharded(t) else t


def part(t: Tensor, like: Tensor) -> Tensor:
    """A copy of this rank's part of t, which all ranks have, sharded as `like` is."""
    if not is_sharded(like) or t.shape != like.shape:          # AdamW counts steps in a scalar
        return t
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None).clone()


def matrixwise(f: Callable[[Tensor], Tensor], same: list[Tensor]) -> list[Tensor]:
    """f, which takes whole matrices (..., rows, columns) and keeps their shape, of parameters of
    one shape.

    If they are sharded by rows, n of them are worked on at a time, one by each of n ranks: it sends
    its rows of matrix i to rank i, so that it has all rows of one matrix, and gets its rows of the
    results in the same way. Experts are sharded too, but an expert's matrix is on one rank.
    """
    if not is_sharded(same[0]):
        return list(f(torch.stack(same)))
    from torch.distributed.tensor import DTensor
    mesh, shape, mine = same[0].device_mesh, same[0].shape, [local(t) for t in same]
    if len(shape) == 3:
        results = [f(experts) for experts in mine]
    else:
        n, own, results = mesh.size(), len(mine[0]), []
        rows = [len(c) for c in torch.empty(shape[0]).chunk(n)]    # of each rank
        rows += [0] * (n - len(rows))
        for first in range(0, len(mine), n):
            some = [mine[min(i, len(mine) - 1)] for i in range(first, first + n)]  # the last again
            one, back = mine[0].new_empty(shape), mine[0].new_empty(n * own, shape[1])
            dist.all_to_all_single(one, torch.cat(some), rows, [own] * n, mesh.get_group())
            dist.all_to_all_single(back, f(one).contiguous(), [own] * n, rows, mesh.get_group())
            results += back.unflatten(0, (n, own))
    return [DTensor.from_local(result, mesh, t.placements, shape=shape, stride=t.stride())
            for result, t in zip(results, same)]


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
        own = dict(enumerate(p for group in target.param_groups for p in group["params"]))
        state = state | {"state": {
            n: tree_map_only(Tensor, lambda t, n=n: part(t, own[n]), entries)
            for n, entries in state["state"].items()}}
    target.load_state_dict(state)
