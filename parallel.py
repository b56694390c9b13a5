"""
Weights shared among ranks, in two ways that combine.

--shard fsdp (ZeRO stage 3 of Rajbhandari et al. 2020): each of n ranks keeps 1/n of every weight,
gradient and optimizer state, and all of one block's weights only while it works on it.

    forward    a block's weights are gathered, used, let go                       all-gather
    backward   gathered again; gradients averaged, each rank keeps its part       all-gather,
               of them                                                            reduce-scatter
    update     every rank steps its own part

That is 3/2 of the bytes that DDP sends, for 1/n of the memory.

--tensor_parallel k (Megatron-LM; Shoeybi et al. 2019): k ranks read the same tokens, and each
computes with its own part of every matrix, which is never gathered.

    attention  its own heads:      rows of W_q, W_k, W_v, columns of W_o
    SwiGLU     its own channels:   rows of W_1 and W_3, columns of W_2
    experts    its own experts
    words      its own tokens of the vocabulary, in the embedding and in the loss

What goes in is the same on all k ranks (entering: gradients are added up), what comes out are
addends of the result (leaving: they are added up): four all-reduces of (B, T, D) a block and step.

A parameter is a DTensor then: the part that this rank keeps, and where the others are; --shard fsdp
cuts it along another dimension than --tensor_parallel. Muon needs whole matrices, so each rank
works on some. In a checkpoint each rank writes what it holds (torch.distributed.checkpoint); a run
goes on from it on any number of ranks, sharded or not. The model at the end is one file as always.

FSDP gathers in fp32. The copies in the model's precision are made at use and live until the
backward pass, as they do without sharding; --gradient_checkpointing makes them again instead. Every
rank makes the whole model before it lets go of what is not its part: it must fit once, alone.

    torchrun --nproc_per_node 8 train_pretrain.py --shard fsdp ...     # or train_sft.py
    torchrun --nproc_per_node 8 train_pretrain.py --shard fsdp --tensor_parallel 2 ...   # 4 x 2
"""
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only
from torch.utils.checkpoint import checkpoint

import kernels

LOGITS = 2**24                          # at a time and rank, where the vocabulary is divided


def check(cfg, dtype: torch.dtype) -> None:
    """Raises ValueError for a --shard or --tensor_parallel that cannot work with what else is
    given."""
    shard, ways = getattr(cfg, "shard", "none"), getattr(cfg, "tensor_parallel", 1)
    if shard not in ("none", "fsdp"):
        raise ValueError(f"--shard {shard}: give none or fsdp")
    if shard == "none" and ways == 1:
        return
    asked = f"--tensor_parallel {ways}" if shard == "none" else "--shard fsdp"
    if not dist.is_initialized():
        raise ValueError(f"{asked} shares the weights among ranks: start it by torchrun "
                         "--nproc_per_node N")
    ranks = dist.get_world_size()
    if ways < 1 or ranks % ways:
        raise ValueError(f"--tensor_parallel {ways} on {ranks} ranks: it must divide their number")
    if shard == "none" and ranks > ways:
        raise ValueError(f"--tensor_parallel {ways} on {ranks} ranks makes {ranks // ways} groups "
                         "of them; give --shard fsdp as well, which joins the groups")
    if dtype == torch.float16:
        raise ValueError(f"{asked} with float16: an overflow would be seen by the ranks that "
                         "have it alone; give --dtype bfloat16 or float32")
    for option, is_set in (("--compile", cfg.compile),
                           ("--peft lora", getattr(cfg, "peft", "none") == "lora")):
        if is_set:
            raise ValueError(f"{asked} does not go with {option}; leave one of them out")


def shard(model: nn.Module, fsdp: bool = True, ways: int = 1) -> nn.Module:
    """Share the weights among all ranks, in place; every rank must hold the same ones. Groups of
    `ways` consecutive ranks divide its matrices; what is left is shared among the groups (fsdp).

    Gradients come out averaged over groups, as DDP's do. A block is gathered and let go as one; the
    embedding, the heads and the last norm stay from a forward pass to the end of the next backward
    pass, so that after a validation loss evaluate.masked_figures finds them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", ".*returned a view tensor")      # nothing is written into it
    mesh = init_device_mesh(model.device.type, (dist.get_world_size() // ways, ways),
                            mesh_dim_names=("data", "model"))
    if ways > 1:
        divide(model, mesh["model"], mesh["data"].size())
    if fsdp:
        trunk = getattr(model, "trunk", model)
        for block in (*trunk.blocks, *getattr(trunk, "encoder", ())):
            fully_shard(block, mesh=mesh["data"], shard_placement_fn=across)
        fully_shard(model, mesh=mesh["data"], shard_placement_fn=across)
        for method in ("logps", "values_and_logps"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model


# ---------------------------------------------------------------------- tensor parallelism

def divide(model: nn.Module, mesh, groups: int) -> None:
    """Leave each rank its part of the matrices, which enter and leave as the docstring above says.

    Raises ValueError for sizes that the ranks cannot share evenly.
    """
    from torch.distributed.tensor import Shard, _StridedShard, distribute_tensor
    config, ways = model.config, mesh.size()
    model.tensor_parallel = ways
    shared = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "d_ff": config.d_ff,
              "vocab_size": config.vocab_size, "n_experts": config.n_experts,
              "n_shared_experts * d_expert": config.n_shared_experts * config.d_expert}
    across_groups = {"d_model": config.d_model, "d_expert": config.d_expert}
    for sizes, n in ((shared, ways), (across_groups, groups)):
        for name, size in sizes.items():
            if size % n:
                raise ValueError(f"--tensor_parallel {ways}: {n} ranks cannot share {name} {size} "
                                 "evenly; it must be a multiple of their number")

    def keep(module: nn.Module, name: str, placement) -> None:
        whole = getattr(module, name).data
        part = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        setattr(module, name, nn.Parameter(part))

    def enter(module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        return entering(x, mesh), *others

    def enter_both(module: nn.Module, args: tuple) -> tuple:
        x, source, *others = args                      # of cross-attention
        if source is not None:
            source = entering(source, mesh)
        return entering(x, mesh), source, *others

    rows, columns = Shard(0), Shard(1)
    halves = _StridedShard(0, split_factor=2)          # some rows of W1 and the same rows of W3
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in ("wq", "wk", "wv", "embedding", "lm_head"):
            keep(module, "weight", rows)
        elif name in ("wo", "w2"):
            keep(module, "weight", columns)
        elif name == "w13":
            keep(module, "weight", halves)
        elif hasattr(module, "router"):                                # experts
            keep(module, "w13", rows)
            keep(module, "w2", rows)
        elif name in ("attention", "cross_attention", "mlp", "shared"):
            module.register_forward_pre_hook(enter_both if name == "cross_attention" else enter)
            module.register_forward_hook(lambda module, args, y: leaving(y, mesh))


def across(parameter: nn.Parameter):
    """The dimension that FSDP shares: the first, or one that is not divided already."""
    from torch.distributed.tensor import Shard
    divided = parameter.placements[0].dim if is_sharded(parameter) else None
    return Shard(1 if divided == 0 else 0)


def entering(x: Tensor, mesh) -> Tensor:
    """x, the same on all ranks, each of which goes on with its own weights: in the backward pass
    their gradients are added up (f of Shoeybi et al. 2019, figure 3)."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return x.to_local(grad_placements=[Partial()])


def leaving(y: Tensor, mesh) -> Tensor:
    """The sum of all ranks' y; its gradient is that of each (g of the same figure)."""
    from torch.distributed.tensor import DTensor, Partial
    return DTensor.from_local(y, mesh, [Partial()], run_check=False).full_tensor()


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (V, D) by number. Where they are divided, a rank adds 0 for another's."""
    if not is_sharded(weight):
        return F.embedding(tokens, weight)
    own, at, mine = own_rows(tokens, weight)
    return leaving(F.embedding(at, own) * mine[..., None], weight.device_mesh)


def own_rows(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of a divided weight (V, D); where in them the ids stand; whether they do."""
    own = weight.to_local()
    at = ids - weight.device_mesh.get_local_rank() * len(own)
    return own, at.clamp(0, len(own) - 1), (at >= 0) & (at < len(own))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, all of it on every rank; W's rows may be divided."""
    if not is_sharded(weight):
        return F.linear(x, weight.to(x.dtype))
    from torch.distributed.tensor import DTensor, Shard
    mesh = weight.device_mesh
    y = F.linear(entering(x, mesh), weight.to_local().to(x.dtype))
    return DTensor.from_local(y, mesh, [Shard(y.dim() - 1)], run_check=False).full_tensor()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                         with_entropy: bool = False):
    """kernels.linear_cross_entropy; where the rows of weight are divided, each rank makes the
    logits of its own tokens, some rows at a time, and again in the backward pass:

        log p(t) = z_t - m - log sum exp(z - m)      the sum, and z_t, over all ranks; m their max
        H = m + log sum exp(z - m) - sum exp(z - m) z / sum exp(z - m)
    """
    if not is_sharded(weight):
        return kernels.linear_cross_entropy(hidden, weight, targets, temperature=temperature,
                                            with_entropy=with_entropy)
    from torch.distributed.tensor import DTensor, Partial
    mesh = weight.device_mesh
    own, at, mine = own_rows(targets, weight)

    def scores(h: Tensor, at: Tensor, mine: Tensor) -> Tensor:
        z = F.linear(h, own.to(h.dtype)).float() / temperature         # (rows, V / ways)
        m = DTensor.from_local(z.detach().amax(1), mesh, [Partial("max")]).full_tensor()
        e = (z - m[:, None]).exp()
        picked = z.gather(1, at[:, None]).squeeze(1) * mine
        total, picked, weighted = leaving(torch.stack(
            (e.sum(1), picked, (e * z).sum(1) if with_entropy else picked)), mesh)
        lse = m + total.log()
        return torch.stack((picked - lse, lse - weighted / total))

    n = max(1, LOGITS // len(own))
    parts = [checkpoint(scores, *part, use_reentrant=False) for part in zip(
        entering(hidden, mesh).split(n), at.split(n), mine.split(n))]
    logps, entropies = torch.cat(parts, 1)
    return (logps, entropies) if with_entropy else logps


def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                offsets: Tensor) -> Tensor:
    """kernels.moe_experts. Where the experts are divided, every rank has routed all tokens alike,
    works off its own experts' part of the list, and counts the rest as dropped."""
    if not is_sharded(w13):
        return kernels.moe_experts(x, w13, w2, tokens, gates, offsets)
    mesh = w13.device_mesh
    own = w13.to_local()
    first = mesh.get_local_rank() * len(own)
    own_offsets = offsets[first:first + len(own) + 1]
    # rotate the list, so that the pairs of this rank's experts come first
    pairs = torch.arange(len(tokens), device=x.device) + own_offsets[0]
    pairs = pairs % len(pairs)
    own_gates = entering(gates, mesh)[pairs]
    y = kernels.moe_experts(entering(x, mesh), own, w2.to_local(), tokens[pairs], own_gates,
                            own_offsets - own_offsets[0])
    return leaving(y, mesh)


# ---------------------------------------------------------------------- parts and wholes

def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return t.to_local() if is_sharded(t) else t


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; all of them must ask. Others stay as they are."""
    return t.full_tensor() if is_sharded(t) else t


def part(t: Tensor, like: Tensor | None) -> Tensor:
    """A copy of this rank's part of t, which all ranks have, sharded as `like` is."""
    if like is None:                                                   # of another model
        return t
    if t.dim() == like.dim() + 1 and t.numel() == like.numel():        # of halved()
        t = t.flatten(0, 1)
    if not is_sharded(like) or is_sharded(t) or t.shape != like.shape:  # AdamW counts in a scalar
        return t
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None).clone()


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, each entry counted once."""
    if not any(map(is_sharded, gradients)):
        return nn.utils.get_total_norm(gradients)
    squares = sum(local(g).float().square().sum() / copies(g) for g in gradients)
    dist.all_reduce(squares)
    return squares.sqrt()


def copies(t: Tensor) -> int:
    """How many ranks hold the same entry."""
    placed = zip(t.device_mesh.shape, t.placements) if is_sharded(t) else ()
    return dist.get_world_size() // math.prod(n for n, placement in placed
                                              if not placement.is_replicate())


def matrixwise(f: Callable[[Tensor], Tensor], same: list[Tensor]) -> list[Tensor]:
    """f, which takes whole matrices (..., rows, columns) and keeps their shape, of parameters of
    one shape.

    If they are sharded by rows, n of them are worked on at a time, one by each of n ranks: it sends
    its rows of matrix i to rank i, so that it has all rows of one matrix, and gets its rows of the
    results in the same way. Experts are sharded too, but an expert's matrix is on one rank. Divided
    matrices are gathered by all ranks, n at a time; each works on one and sends all of its result.
    """
    if not any(map(is_sharded, same)):
        return list(f(torch.stack(same)))
    from torch.distributed.tensor import DTensor
    if any(is_sharded(t) and "model" in t.device_mesh.mesh_dim_names for t in same):
        results, rank, n = [], dist.get_rank(), dist.get_world_size()
        for first in range(0, len(same), n):
            some = [whole(t).contiguous() for t in same[first:first + n]]
            some[rank:rank + 1] = [f(G).contiguous() for G in some[rank:rank + 1]]
            for i, G in enumerate(some):
                dist.broadcast(G, i)
            results += [part(G, t) for G, t in zip(some, same[first:])]
        return results
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


# ---------------------------------------------------------------------- what is saved

def copied(tree, keep: bool):
    """`tree` with each tensor copied to CPU memory, whole, one after the other; None instead of it
    on a rank that is not to keep it, which must call this all the same."""
    def copy(t: Tensor) -> Tensor | None:
        t = whole(t.detach())
        return t.to("cpu", copy=True) if keep else None
    return tree_map_only(Tensor, copy, tree)


def copied_parts(tree):
    """`tree` with each tensor copied to CPU memory, of the sharded this rank's part."""
    return tree_map_only(Tensor, lambda t: halved(t.detach()).to("cpu", copy=True), tree)


def save_parts(tree, folder: Path, group: dist.ProcessGroup):
    """Write the tensors of copied_parts, all ranks of the group at once: of the sharded each its
    part, of the others its share. Returns the tree with tensors without data in their place.

    Raises, on all ranks, what went wrong on the first that could not."""
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        save(by_path(tree), storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), tree)


def halved(t: Tensor) -> Tensor:
    """W1 and W3 side by side, divided as divide() does: (2 F, D) as (2, F, D), divided along F, as
    torch.distributed.checkpoint can describe it. Other tensors as they are."""
    from torch.distributed.tensor import DTensor, Shard, _StridedShard
    if not is_sharded(t) or not any(isinstance(p, _StridedShard) for p in t.placements):
        return t
    placements = [Shard(1 if isinstance(p, _StridedShard) else p.dim + 1) for p in t.placements]
    return DTensor.from_local(t.to_local().unflatten(0, (2, -1)), t.device_mesh, placements)


def load_parts(tree, targets: dict, folder: Path) -> dict:
    """The tree that save_parts returned, with its tensors: of those that have the shape of a
    parameter of the target, as that is sharded here, on however many ranks there are."""
    from torch.distributed.checkpoint import load
    warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
    tree = {name: like(tree[name], target) for name, target in targets.items() if name in tree}
    load(by_path(tree), checkpoint_id=folder)
    return tree


def by_path(tree) -> dict[str, Tensor]:
    """The tensors of a tree of dicts and lists, by names that tell where they are."""
    leaves, _ = tree_flatten_with_path(tree)
    return {keystr(path): t for path, t in leaves if isinstance(t, Tensor)}


def like(state: dict, target: nn.Module | torch.optim.Optimizer) -> dict:
    """A state of tensors without data -> the same of zeros, sharded as the target's parameters."""
    def zeros(t: Tensor, p: Tensor | None) -> Tensor:
        if p is not None and p.shape == t.shape:
            return torch.zeros_like(p, dtype=t.dtype)
        return torch.zeros(t.shape, dtype=t.dtype)

    if isinstance(target, nn.Module):
        own = target.state_dict()
        return {name: zeros(t, own.get(name)) for name, t in state.items()}
    return with_state(state, target, zeros)


def with_state(state: dict, optimizer: torch.optim.Optimizer, f: Callable) -> dict:
    """An optimizer's state_dict with f(tensor, the parameter it belongs to) for each tensor."""
    own = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    return state | {"state": {n: tree_map_only(Tensor, lambda t, n=n: f(t, own.get(n)), entries)
                              for n, entries in state["state"].items()}}


def load(target: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """target.load_state_dict(state) for a state of whole tensors, or of parts like the target's.

    Raises what load_state_dict does for a state that does not fit: RuntimeError, ValueError or
    KeyError.
    """
    if isinstance(target, nn.Module):
        own = target.state_dict()
        state = {name: part(t, own.get(name)) for name, t in state.items()}
    elif isinstance(target, torch.optim.Optimizer):        # which numbers its parameters in order
        state = with_state(state, target, part)
    target.load_state_dict(state)
