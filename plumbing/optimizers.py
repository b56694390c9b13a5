"""
How a gradient becomes an update: learning rates, AdamW, Adam and Muon.

Muon (Jordan 2024) is momentum whose step is an orthogonal matrix:

    m <- mu m + (1 - mu) g                       momentum, mu = 0.95
    u  = orthogonalize((1 - mu) g + mu m)        Nesterov's look ahead; U V^T of its SVD U S V^T
    W <- W - lr (0.2 sqrt(max(rows, columns)) u + weight_decay W)

A gradient of a weight matrix is dominated by a few directions, those of the most frequent tokens.
Made orthogonal, all directions are learned at the same pace, the rare ones too. The factor gives
the step the size of AdamW's (Liu et al. 2025, section 2.2): one learning rate serves both. Muon is
for the matrices inside the model; embeddings, heads, norms and adapters go by AdamW (001 step 3.7).
"""
import math

import torch
from torch import Tensor, nn

from model import Linear
from parallel import matrixwise

# ---------------------------------------------------------------------- learning rates

def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, floor: float = 0.1) -> float:
    """Linear warmup over `warmup` steps to `peak`, then a cosine to floor * peak at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup                  # + 1: a step at rate 0 would be wasted
    progress = (step - warmup) / max(1, steps - warmup)    # 0 after the warmup, 1 at the end
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (floor + (1 - floor) * cosine)


def warmup_stable_decay(step: int, steps: int, peak: float, warmup: int = 0,
                        decay: float = 0.3) -> float:
    """Linear warmup over `warmup` steps to `peak`, `peak`, and for the last `decay` of all steps a
    line to 0 (Hu et al. 2024): more of the run at full pace than a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    steps_left = steps - step
    steps_of_decay = max(1.0, decay * steps)
    return peak * min(1.0, steps_left / steps_of_decay)


def linear_decay(step: int, steps: int, peak: float) -> float:
    """From `peak` at step 0 to 0 after the last step."""
    return peak * (1 - step / steps)


# ---------------------------------------------------------------------- optimizers by name

def pick_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float, dtype: torch.dtype,
                   betas=(0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, over the model's trainable parameters.

    name: adamw; adam, which has no weight decay (001 section 4.5); or muon. dtype: the dtype of
    the model's matmuls, which Muon's matmuls follow. Raises ValueError for another name, and for
    weight decay with adam.
    """
    if name == "adamw":
        return adamw(model, lr, betas, eps, weight_decay)
    if name == "adam":
        if weight_decay != 0:
            raise ValueError(f"--optimizer adam does without --weight_decay {weight_decay}; give "
                             "--weight_decay 0 or --optimizer adamw")
        return adam(model, lr, betas, eps)
    if name == "muon":
        if dtype == torch.float16:
            # Entries of X X^T in orthogonalize may be below fp16's smallest normal number, 6e-5.
            dtype = torch.float32
        return Muon(model, lr, betas=betas, eps=eps, weight_decay=weight_decay, dtype=dtype)
    raise ValueError(f"--optimizer {name}: give muon or adamw, or adam, which is AdamW without "
                     "weight decay")


def adamw(model: nn.Module, lr: float, betas=(0.9, 0.95), eps: float = 1e-8,
          weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, not on norms and
    biases."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps,
                             **fused_or_not(model))


def adam(model: nn.Module, lr: float, betas=(0.9, 0.95), eps: float = 1e-8) -> torch.optim.Adam:
    """Adam over the trainable parameters, in AdamW's groups: each reads the other's checkpoints."""
    return torch.optim.Adam(parameter_groups(model, 0.0), lr=lr, betas=betas, eps=eps,
                            **fused_or_not(model))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """torch's parameter groups: matrices, then norms and biases, which have no weight decay.

    Their order must stay, because a checkpoint numbers the parameters by it.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() >= 2]
    vectors = [p for p in trainable if p.dim() < 2]
    groups = []                                            # none without parameters
    if matrices:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups


def fused_or_not(model: nn.Module) -> dict[str, bool]:
    """torch's option for its fastest step: one kernel for all parameters, where there is one."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    meshes = {getattr(p, "device_mesh", None) for p in trainable}
    if len(meshes) > 1:
        # Each parameter by itself, because one call cannot mix meshes: --tensor_parallel puts the
        # divided matrices on a mesh that the norms, for example, are not on.
        return {"foreach": False}
    return {"fused": trainable[0].device.type in ("cpu", "cuda")}


def keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Between its steps the optimizer's state lies in the host's memory, where there is more of it;
    each step fetches it and brings it back (001 section 2.4.2: paged optimizers)."""
    def fetch(optimizer, *_) -> None:
        for p, state in optimizer.state.items():
            move_state(state, p.device)

    def bring_back(optimizer, *_) -> None:
        for state in optimizer.state.values():
            move_state(state, torch.device("cpu"))

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(bring_back)


def move_state(state: dict, device: torch.device) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:      # counts stay
            state[name] = value.to(device)


# ---------------------------------------------------------------------- Muon

def orthogonalize(G: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """(..., m, n) -> about U V^T of each SVD U S V^T, in fp32, by matmuls in `dtype` alone.

    A step takes every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5 (Newton-Schulz, with
    Jordan's coefficients): five take all from 0.002 to 1 into 0.68 to 1.21, which is even enough.
    """
    is_tall = G.shape[-2] > G.shape[-1]
    X = G.mT if is_tall else G             # m <= n from here on, so that X X^T is the smaller one
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = (X / (norm + 1e-7)).to(dtype)      # no singular value is above the norm, that is 1
    for _ in range(steps):
        # Not by the faster baddbmm, because its other rounding would change every recorded figure.
        A = X @ X.mT                       # (..., m, m)
        polynomial = 2.0315 * A @ A - 4.7750 * A
        X = 3.4445 * X + polynomial @ X
    if is_tall:
        X = X.mT
    return X.float()


class Muon(torch.optim.Optimizer):
    """Muon for the Linear weights of the model's blocks and for its experts, AdamW for all other
    trainable parameters (embeddings, heads, routers, norms, adapters).

    dtype: of the matmuls in orthogonalize. Weight decay is for matrices only.
    """

    def __init__(self, model: nn.Module, lr: float, mu: float = 0.95, betas=(0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32):
        if not lr >= 0:                                    # which is true of NaN, too
            raise ValueError(f"learning rate: {lr}; it must not be negative")
        inner = inner_matrices(model)
        by_muon = []
        by_adamw = []
        for p in model.parameters():
            if p.requires_grad and id(p) in inner:
                by_muon.append(p)
            elif p.requires_grad:
                by_adamw.append(p)
        matrices = [p for p in by_adamw if p.dim() >= 2]
        vectors = [p for p in by_adamw if p.dim() < 2]
        # Their order must stay, because a checkpoint numbers the parameters by it.
        groups = []
        for rule, decay, params in (("muon", weight_decay, by_muon),
                                    ("adamw", weight_decay, matrices), ("adamw", 0.0, vectors)):
            if params:
                groups.append({"params": params, "rule": rule, "weight_decay": decay})
        super().__init__(groups, {"lr": lr})
        self.mu = mu
        self.betas = betas
        self.eps = eps
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == "muon":
                self.step_by_muon(params, group)
            else:
                # Made and applied one by one: all directions together are as large as the model.
                for p in params:
                    move(p, self.adamw_direction(p), group)

    def step_by_muon(self, params: list[Tensor], group: dict) -> None:
        """Matrices of one shape are made orthogonal together, because a few large matmuls are
        faster than many small ones; where they are sharded, each rank works on some of them."""
        by_shape: dict[tuple, list[Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - self.mu)       # m <- mu m + (1 - mu) g
            by_shape.setdefault(tuple(p.shape), []).append(p)
        for same_shape in by_shape.values():
            # (1 - mu) g + mu m: the momentum if the same gradient came once more (Nesterov).
            ahead = [p.grad.lerp(self.state[p]["momentum"], self.mu) for p in same_shape]
            directions = matrixwise(self.muon_direction, ahead)
            for p, direction in zip(same_shape, directions):
                move(p, direction, group)

    def muon_direction(self, G: Tensor) -> Tensor:
        """(..., m, n) -> the same shape: orthogonal, with entries as large as AdamW's."""
        # The root mean square of orthogonal entries is 1 / sqrt(max(m, n)), of AdamW's about 0.2.
        size = 0.2 * max(G.shape[-2:]) ** 0.5
        return orthogonalize(G, self.dtype) * size

    def adamw_direction(self, p: Tensor) -> Tensor:
        """m / (sqrt(v) + eps) of the running means m of the gradient and v of its square, both
        divided by 1 - beta^t because they began at 0 (Kingma & Ba 2015, algorithm 1)."""
        beta1, beta2 = self.betas
        state = self.state[p]
        if not state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
        state["t"] += 1
        t = state["t"]
        m = state["m"].lerp_(p.grad, 1 - beta1)                # m <- beta1 m + (1 - beta1) g
        v = state["v"].lerp_(p.grad.square(), 1 - beta2)       # v <- beta2 v + (1 - beta2) g^2
        unbiased_m = m / (1 - beta1 ** t)
        unbiased_v = v / (1 - beta2 ** t)
        return unbiased_m / (unbiased_v.sqrt() + self.eps)


def inner_matrices(model: nn.Module) -> set[int]:
    """id() of each parameter that Muon steps: of blocks and experts, not of heads and routers."""
    found = set()
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        # A router scores experts as a head scores tokens, and both go by AdamW.
        if isinstance(module, Linear) and name != "lm_head" and "router" not in path:
            found.add(id(module.weight))
    for p in model.parameters():
        if p.dim() == 3:                                       # (E, m, n): a matrix per expert
            found.add(id(p))
    return found


def move(p: Tensor, direction: Tensor, group: dict) -> None:
    """p <- p - lr (direction + weight_decay p), in place."""
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(direction, alpha=group["lr"])
