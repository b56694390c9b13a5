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
import os
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

MAX_LOGITS = 2**24                      # at a time and rank, where the vocabulary is divided


def join_ranks(on_gpu: bool) -> None:
    """Under torchrun, become one of the ranks; once in a process."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")


def ranks() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(rows: list) -> list:
    """The rows of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return rows
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows)
    return [row for part in found for row in part]


def check(cfg, dtype: torch.dtype) -> None:
    """Raises ValueError for a --shard or --tensor_parallel that cannot work with the other options
    or with the number of ranks."""
    shard = getattr(cfg, "shard", "none")
    tensor_parallel = getattr(cfg, "tensor_parallel", 1)
    if shard not in ("none", "fsdp"):
        raise ValueError(f"--shard {shard}: give none or fsdp")
    if shard == "none" and tensor_parallel == 1:
        return
    asked = "--shard fsdp" if shard == "fsdp" else f"--tensor_parallel {tensor_parallel}"
    if not dist.is_initialized():
        raise ValueError(f"{asked} shares the weights among ranks: start it by torchrun "
                         "--nproc_per_node N")
    ranks = dist.get_world_size()
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise ValueError(f"--tensor_parallel {tensor_parallel} on {ranks} ranks: it must divide "
                         "their number")
    groups = ranks // tensor_parallel                  # of ranks that read the same tokens
    if shard == "none" and groups > 1:
        raise ValueError(f"--tensor_parallel {tensor_parallel} on {ranks} ranks makes {groups} "
                         "groups of them; give --shard fsdp as well, which joins the groups")
    if dtype == torch.float16:
        raise ValueError(f"{asked} with float16: an overflow would be seen by the ranks that "
                         "have it alone; give --dtype bfloat16 or float32")
    if cfg.compile:
        raise ValueError(f"{asked} does not go with --compile; leave one of them out")
    peft = cfg.adapters.peft if hasattr(cfg, "adapters") else "none"
    if peft != "none":
        raise ValueError(f"{asked} does not go with --peft {peft}; leave one of them out")


def shard(model: nn.Module, fsdp: bool = True, tensor_parallel: int = 1) -> nn.Module:
    """Share the weights among all ranks, in place; every rank must hold the same ones. Groups of
    `tensor_parallel` consecutive ranks divide the matrices; whatever a rank of a group then holds
    is shared among the groups (fsdp).

    Gradients come out averaged over groups, as DDP's do. A block is gathered and let go as one; the
    embedding, the heads and the last norm stay from a forward pass to the end of the next backward
    pass, so that after a validation loss evaluate.masked_figures finds them.
    """
    # imported here, because these modules take a second to import
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # FSDP warns that nothing may write into the views it returns, and nothing does
    warnings.filterwarnings("ignore", ".*returned a view tensor")
    groups = dist.get_world_size() // tensor_parallel
    # 8 ranks in groups of 2: rows (0, 1), (2, 3), (4, 5), (6, 7) are the groups
    mesh = init_device_mesh(model.device.type, (groups, tensor_parallel),
                            mesh_dim_names=("data", "model"))
    trunk = getattr(model, "trunk", model)             # of a model with a head
    if tensor_parallel > 1:
        divide(trunk, mesh["model"], groups)
    if fsdp:
        for block in (*trunk.blocks, *getattr(trunk, "encoder", ())):
            fully_shard(block, mesh=mesh["data"], shard_placement_fn=undivided_dimension)
        fully_shard(model, mesh=mesh["data"], shard_placement_fn=undivided_dimension)
        # FSDP gathers weights before forward(), and before other methods only if told to
        for name in ("logps", "values_and_logps"):
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
    return model


# ---------------------------------------------------------------------- tensor parallelism

def divide(model: nn.Module, mesh, groups: int) -> None:
    """Leave each rank its part of the matrices, which enter and leave as the docstring above says.

    Raises ValueError for sizes that the ranks cannot share evenly.
    """
    from torch.distributed.tensor import Shard, _StridedShard, distribute_tensor
    check_sizes(model.config, mesh.size(), groups)
    model.tensor_parallel = mesh.size()

    def keep_part(module: nn.Module, name: str, placement) -> None:
        whole = getattr(module, name).data
        # every rank has the same weights, so that none has to be sent (src_data_rank=None)
        part = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        setattr(module, name, nn.Parameter(part))

    def enter(module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        return entering(x, mesh), *others

    def enter_both(module: nn.Module, args: tuple) -> tuple:
        x, source, *others = args                      # of cross-attention; the cache may have
        if source is not None:                         # the source's keys and values already
            source = entering(source, mesh)
        return entering(x, mesh), source, *others

    def leave(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return leaving(y, mesh)

    # nn.Linear stores (d_out, d_in): by rows a rank makes some of the outputs, by columns it reads
    # some of the inputs, so that a pair of them needs no exchange in between
    rows = Shard(0)
    columns = Shard(1)
    rows_of_w1_and_w3 = _StridedShard(0, split_factor=2)       # the same rows of both
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]                 # blocks.0.attention.wq -> wq
        if name in ("wq", "wk", "wv", "embedding", "lm_head"):
            keep_part(module, "weight", rows)
        elif name in ("wo", "w2"):
            keep_part(module, "weight", columns)
        elif name == "w13":
            keep_part(module, "weight", rows_of_w1_and_w3)
        elif hasattr(module, "router"):                # (E, ., .): some of the experts
            keep_part(module, "w13", rows)
            keep_part(module, "w2", rows)
        elif name in ("attention", "mlp", "shared"):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        elif name == "cross_attention":
            module.register_forward_pre_hook(enter_both)
            module.register_forward_hook(leave)


def check_sizes(config, tensor_parallel: int, groups: int) -> None:
    """Raises ValueError for sizes that the ranks of a group, or the groups, cannot share evenly."""
    if tensor_parallel > 1 and (config.qkv_bias or config.qk_norm):
        raise ValueError(f"--tensor_parallel {tensor_parallel}: biases and norms of queries and "
                         "keys cannot be shared among ranks; use --shard fsdp")
    d_shared = config.n_shared_experts * config.d_expert
    among_ranks = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "d_ff": config.d_ff,
                   "vocab_size": config.vocab_size, "n_experts": config.n_experts,
                   "n_shared_experts * d_expert": d_shared}
    among_groups = {"d_model": config.d_model, "d_expert": config.d_expert}
    for sizes, n in ((among_ranks, tensor_parallel), (among_groups, groups)):
        for name, size in sizes.items():
            if size % n:
                raise ValueError(f"--tensor_parallel {tensor_parallel}: {n} ranks cannot share "
                                 f"{name} {size} evenly; it must be a multiple of their number")


def undivided_dimension(parameter: nn.Parameter):
    """The dimension that FSDP shares: the first, or the second where ranks divide the first."""
    from torch.distributed.tensor import Shard
    if is_sharded(parameter) and parameter.placements[0].dim == 0:
        return Shard(1)
    return Shard(0)


def entering(x: Tensor, mesh) -> Tensor:
    """x, the same on all ranks, each of which goes on with its own weights: in the backward pass
    their gradients are added up (f of Shoeybi et al. 2019, figure 3)."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    # no check that x is the same on all ranks, because the check is an all-gather
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return x.to_local(grad_placements=[Partial()])


def leaving(y: Tensor, mesh) -> Tensor:
    """The sum of all ranks' y; its gradient is that of each (g of the same figure)."""
    from torch.distributed.tensor import DTensor, Partial
    return DTensor.from_local(y, mesh, [Partial()], run_check=False).full_tensor()


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (V, D) by number. Where ranks divide the rows, a rank adds 0 for another's."""
    if not is_sharded(weight):
        return F.embedding(tokens, weight)
    own, at, is_own = own_rows(tokens, weight)
    return leaving(F.embedding(at, own) * is_own[..., None], weight.device_mesh)


def own_rows(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of a divided weight (V, D), (V / n, D); the place of each id in them; and
    whether the id is one of them, bool. A place of another rank's id is not to be used."""
    own = weight.to_local()
    first = weight.device_mesh.get_local_rank() * len(own)
    at = ids - first
    is_own = (at >= 0) & (at < len(own))
    return own, at.clamp(0, len(own) - 1), is_own


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, all of it on every rank; W's rows may be divided."""
    if not is_sharded(weight):
        return F.linear(x, weight.to(x.dtype))
    from torch.distributed.tensor import DTensor, Shard
    mesh = weight.device_mesh
    y = F.linear(entering(x, mesh), weight.to_local().to(x.dtype))     # (..., V / n)
    last = Shard(y.dim() - 1)                          # ranks have different words of V
    return DTensor.from_local(y, mesh, [last], run_check=False).full_tensor()


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
    own, at, is_own = own_rows(targets, weight)

    def scores(h: Tensor, at: Tensor, is_own: Tensor) -> Tensor:
        """h (rows, D) -> log-probs and entropies, (2, rows)."""
        z = F.linear(h, own.to(h.dtype)).float() / temperature         # (rows, V / n)
        own_max = z.detach().amax(1)
        m = DTensor.from_local(own_max, mesh, [Partial("max")]).full_tensor()
        e = (z - m[:, None]).exp()                     # at most 1, so that no sum overflows
        # the logit of the target, on the rank that has it; 0 on the others
        target_logit = z.gather(1, at[:, None]).squeeze(1) * is_own
        weighted = (e * z).sum(1) if with_entropy else target_logit
        # stacked, because one all-reduce of three sums is faster than three
        sums = leaving(torch.stack((e.sum(1), target_logit, weighted)), mesh)
        total, target_logit, weighted = sums
        log_sum = m + total.log()
        return torch.stack((target_logit - log_sum, log_sum - weighted / total))

    rows = max(1, MAX_LOGITS // len(own))              # of hidden states at a time
    chunks = zip(entering(hidden, mesh).split(rows), at.split(rows), is_own.split(rows))
    # checkpointed, because the logits of all rows together may not fit into memory
    scored = [checkpoint(scores, *chunk, use_reentrant=False) for chunk in chunks]
    logps, entropies = torch.cat(scored, 1)
    return (logps, entropies) if with_entropy else logps


def moe_experts(x: Tensor, w13: Tensor, w2: Tensor, tokens: Tensor, gates: Tensor,
                offsets: Tensor) -> Tensor:
    """kernels.moe_experts. Where the experts are divided, every rank has routed all tokens alike,
    works off its own experts' part of the list, and counts the rest as dropped."""
    if not is_sharded(w13):
        return kernels.moe_experts(x, w13, w2, tokens, gates, offsets)
    mesh = w13.device_mesh
    own = w13.to_local()                               # (E / n, 2 F, D)
    first = mesh.get_local_rank() * len(own)
    own_offsets = offsets[first:first + len(own) + 1]
    # rotated, so that the pairs of this rank's experts come first
    pairs = torch.arange(len(tokens), device=x.device) + own_offsets[0]
    pairs = pairs % len(pairs)
    own_gates = entering(gates, mesh)[pairs]
    y = kernels.moe_experts(entering(x, mesh), own, w2.to_local(), tokens[pairs], own_gates,
                            own_offsets - own_offsets[0])
    return leaving(y, mesh)


# ---------------------------------------------------------------------- parts and wholes

def local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; others as they are."""
    return t.to_local() if is_sharded(t) else t


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; all of them must ask. Others stay as they are."""
    return t.full_tensor() if is_sharded(t) else t


def part(t: Tensor, like: Tensor | None) -> Tensor:
    """A copy of this rank's part of t, which all ranks have, sharded as `like` is."""
    if like is None:                                   # a parameter that this model does not have
        return t
    if t.dim() == like.dim() + 1 and t.numel() == like.numel():
        t = t.flatten(0, 1)                            # undo w1_w3_apart()
    # AdamW counts its steps in a scalar, whose shape is not the parameter's
    if not is_sharded(like) or is_sharded(t) or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None).clone()


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, each entry counted once."""
    if not any(is_sharded(g) for g in gradients):
        return nn.utils.get_total_norm(gradients)
    # an entry that r ranks hold counts 1 / r on each of them
    squares = sum(local(g).float().square().sum() / n_holders(g) for g in gradients)
    dist.all_reduce(squares)
    return squares.sqrt()


def n_holders(t: Tensor) -> int:
    """How many ranks hold the same entry of t."""
    holders = dist.get_world_size()
    if is_sharded(t):
        for ranks, placement in zip(t.device_mesh.shape, t.placements):
            if not placement.is_replicate():
                holders //= ranks
    return holders


def matrixwise(f: Callable[[Tensor], Tensor], same: list[Tensor]) -> list[Tensor]:
    """f, which takes whole matrices (..., rows, columns) and keeps their shape, of parameters of
    one shape, whether sharded or not. An expert's matrix is whole on its rank also where the
    experts are shared by FSDP."""
    if not any(is_sharded(t) for t in same):
        return list(f(torch.stack(same)))
    if any(is_sharded(t) and "model" in t.device_mesh.mesh_dim_names for t in same):
        return matrixwise_of_divided(f, same)
    if same[0].dim() == 3:                             # experts (E, rows, columns), shared along E
        results = [f(local(t)) for t in same]
    else:
        results = matrixwise_of_rows(f, same)
    return [shared_like(result, t) for result, t in zip(results, same)]


def shared_like(own: Tensor, like: Tensor) -> Tensor:
    """This rank's part `own` as a tensor that is shared as `like` is."""
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride())


def matrixwise_of_divided(f: Callable[[Tensor], Tensor], same: list[Tensor]) -> list[Tensor]:
    """matrixwise() of matrices that --tensor_parallel divides: all ranks gather them, as many at a
    time as there are ranks; each rank works on one and sends all of its result."""
    results = []
    rank = dist.get_rank()
    n_ranks = dist.get_world_size()
    for first in range(0, len(same), n_ranks):
        # matrix i of these is this rank's to work on if i is its number
        matrices = [whole(t).contiguous() for t in same[first:first + n_ranks]]
        if rank < len(matrices):
            matrices[rank] = f(matrices[rank]).contiguous()
        for source, matrix in enumerate(matrices):     # rank `source` has worked on this matrix
            dist.broadcast(matrix, source)
        results += [part(matrix, t) for matrix, t in zip(matrices, same[first:])]
    return results


def matrixwise_of_rows(f: Callable[[Tensor], Tensor], same: list[Tensor]) -> list[Tensor]:
    """matrixwise() of matrices that FSDP shares by rows, n of them at a time, one by each of n
    ranks: a rank sends its rows of matrix i to rank i, so that it has all rows of one matrix, and
    gets its rows of the results in the same way."""
    mesh = same[0].device_mesh
    shape = same[0].shape
    own_parts = [local(t) for t in same]               # (n_own, columns) each
    n_ranks = mesh.size()
    n_own = len(own_parts[0])
    # as FSDP shares them: 10 rows on 4 ranks are 3, 3, 3 and 1
    rows = [len(chunk) for chunk in torch.empty(shape[0]).chunk(n_ranks)]
    rows += [0] * (n_ranks - len(rows))
    results = []
    for first in range(0, len(same), n_ranks):
        # the last matrix again, where fewer are left than there are ranks
        numbers = [min(i, len(same) - 1) for i in range(first, first + n_ranks)]
        sent = torch.cat([own_parts[i] for i in numbers])              # (n_ranks n_own, columns)
        matrix = sent.new_empty(shape)
        dist.all_to_all_single(matrix, sent, rows, [n_own] * n_ranks, mesh.get_group())
        result = f(matrix).contiguous()                # (rows, columns), of this rank's matrix
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, result, [n_own] * n_ranks, rows, mesh.get_group())
        results += received.unflatten(0, (n_ranks, n_own))
    return results


# ---------------------------------------------------------------------- what is saved

def whole_on_cpu(tree, keep: bool):
    """`tree` with each tensor copied to CPU memory, whole, one after the other; None instead of it
    on a rank that is not to keep it, which must call this all the same."""
    def copy(t: Tensor) -> Tensor | None:
        t = whole(t.detach())                          # all ranks take part
        return t.to("cpu", copy=True) if keep else None

    return tree_map_only(Tensor, copy, tree)


def parts_on_cpu(tree):
    """`tree` with each tensor copied to CPU memory; of a sharded tensor this rank's part."""
    def copy(t: Tensor) -> Tensor:
        return w1_w3_apart(t.detach()).to("cpu", copy=True)

    return tree_map_only(Tensor, copy, tree)


def save_parts(tree, folder: Path, group: dist.ProcessGroup):
    """Write the tensors of parts_on_cpu, all ranks of the group at once: of the sharded each its
    part, of the others its share. Returns the tree with tensors without data in their place.

    Raises, on all ranks, what went wrong on the first that could not."""
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        save(by_path(tree), storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        failures = list(error.failures.values())       # (exception, traceback) of each rank
        raise failures[0][0] from None

    def without_data(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    return tree_map_only(Tensor, without_data, tree)


def w1_w3_apart(t: Tensor) -> Tensor:
    """W1 and W3 side by side, divided as divide() does: (2 F, D) as (2, F, D), divided along F, as
    torch.distributed.checkpoint can describe it. Other tensors as they are."""
    from torch.distributed.tensor import DTensor, Shard, _StridedShard
    if not is_sharded(t):
        return t
    if not any(isinstance(placement, _StridedShard) for placement in t.placements):
        return t
    placements = []
    for placement in t.placements:
        # F is the second dimension now, and all others moved up by one
        strided = isinstance(placement, _StridedShard)
        placements.append(Shard(1 if strided else placement.dim + 1))
    return DTensor.from_local(t.to_local().unflatten(0, (2, -1)), t.device_mesh, placements)


def load_parts(tree, targets: dict, folder: Path) -> dict:
    """The tree that save_parts returned, with its tensors: those that have the shape of a parameter
    of the target are shared as that parameter is here, on however many ranks there are."""
    from torch.distributed.checkpoint import load
    warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
    loaded = {}
    for name, target in targets.items():
        if name in tree:
            loaded[name] = zeros_for(tree[name], target)
    load(by_path(loaded), checkpoint_id=folder)        # writes into these tensors
    return loaded


def by_path(tree) -> dict[str, Tensor]:
    """The tensors of a tree of dicts and lists, by names that tell where they are."""
    leaves, _ = tree_flatten_with_path(tree)
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def zeros_for(state: dict, target: nn.Module | torch.optim.Optimizer) -> dict:
    """A state of tensors without data -> the same of zeros, sharded as the target's parameters."""
    def zeros(t: Tensor, parameter: Tensor | None) -> Tensor:
        if parameter is not None and parameter.shape == t.shape:
            return torch.zeros_like(parameter, dtype=t.dtype)
        return torch.zeros(t.shape, dtype=t.dtype)

    if isinstance(target, nn.Module):
        own = target.state_dict()
        return {name: zeros(t, own.get(name)) for name, t in state.items()}
    return map_optimizer_state(zeros, state, target)


def map_optimizer_state(f: Callable, state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state_dict with f(tensor, the parameter it belongs to) for each tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_number = dict(enumerate(parameters))            # as state_dict() numbers them
    mapped = {}
    for number, entries in state["state"].items():
        parameter = by_number.get(number)
        mapped[number] = tree_map_only(Tensor, lambda t, p=parameter: f(t, p), entries)
    return state | {"state": mapped}


def load(target: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """target.load_state_dict(state) for a state of whole tensors, or of parts like the target's.

    Raises what load_state_dict does for a state that does not fit: RuntimeError, ValueError or
    KeyError; and ValueError for an optimizer's state of parameters in another order.
    """
    if isinstance(target, nn.Module):
        own = target.state_dict()
        state = {name: part(t, own.get(name)) for name, t in state.items()}
    elif isinstance(target, torch.optim.Optimizer):    # other objects have no tensors to share
        state = map_optimizer_state(part, state, target)
    target.load_state_dict(state)
    if isinstance(target, torch.optim.Optimizer):
        check_state_sizes(target)


def check_state_sizes(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for a state of another size than its parameter: torch compares only how
    many parameters there are, and its fused kernels would read beyond the end of a smaller one."""
    for parameter, entries in optimizer.state.items():
        for name, t in entries.items():
            # AdamW counts its steps in a scalar
            if isinstance(t, Tensor) and t.dim() > 0 and t.numel() != parameter.numel():
                raise ValueError(f"{name} of shape {tuple(t.shape)} for a parameter of shape "
                                 f"{tuple(parameter.shape)}")
