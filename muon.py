"""
Muon (Jordan 2024): momentum whose step is an orthogonal matrix.

    m <- mu m + (1 - mu) g                       momentum, mu = 0.95
    u  = orthogonalize((1 - mu) g + mu m)        Nesterov's look ahead; U V^T of its SVD U S V^T
    W <- W - lr (0.2 sqrt(max(rows, columns)) u + weight_decay W)

A gradient of a weight matrix is dominated by a few directions, those of the most frequent tokens.
Made orthogonal, all directions are learned at the same pace, the rare ones too. The factor gives
the step the size of AdamW's (Liu et al. 2025, section 2.2): one learning rate serves both. It is
for the matrices inside the model; embeddings, heads, norms and adapters go by AdamW (001 step 3.7).
"""
import torch
from torch import Tensor, nn

from model import Linear
from parallel import matrixwise


def orthogonalize(G: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """(..., m, n) -> about U V^T of each SVD U S V^T, in fp32, by matmuls in `dtype` alone.

    A step takes every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5 (Newton-Schulz, with
    Jordan's coefficients): five take all from 0.002 to 1 into 0.68 to 1.21, which is even enough.
    """
    X = G.mT if G.shape[-2] > G.shape[-1] else G                   # the smaller side first
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)    # singular values <= 1
    # Two baddbmm a step would round less and take a quarter less time. But to a short training any
    # other rounding is another draw (seed 0's validation loss ends at .724 like this, .737 by
    # baddbmm, .742 with mu = 0.95001), and all that was measured was measured with this one.
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return (X.mT if G.shape[-2] > G.shape[-1] else X).float()


class Muon(torch.optim.Optimizer):
    """Muon for the Linear weights of the model's blocks and for its experts, AdamW for all else
    that is trainable (embeddings, heads, routers, norms, adapters).

    dtype: of the matmuls in orthogonalize. Weight decay is for matrices only.
    """

    def __init__(self, model: nn.Module, lr: float, mu: float = 0.95, betas=(0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32):
        if not lr >= 0:
            raise ValueError(f"learning rate: {lr}; it must not be negative")
        inner = {id(module.weight) for name, module in model.named_modules()
                 if isinstance(module, Linear) and name != "lm_head" and "router" not in name}
        inner |= {id(p) for p in model.parameters() if p.dim() == 3}       # a matrix per expert
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [("muon", weight_decay, [p for p in trainable if id(p) in inner]),
                  ("adamw", weight_decay,
                   [p for p in trainable if id(p) not in inner and p.dim() >= 2]),
                  ("adamw", 0.0, [p for p in trainable if p.dim() < 2])]
        super().__init__([{"params": params, "rule": rule, "weight_decay": decay}
                          for rule, decay, params in groups if params], {"lr": lr})
        self.mu, self.betas, self.eps, self.dtype = mu, betas, eps, dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            steps = self.muon(params) if group["rule"] == "muon" else map(self.adamw, params)
            for p, step in zip(params, steps):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])

    def muon(self, params: list[Tensor]) -> list[Tensor]:
        """Each parameter's step; matrices of one shape are made orthogonal together, if they are
        sharded one of them on each rank."""
        ahead: dict[tuple, list[Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 1 - self.mu)
            ahead.setdefault(tuple(p.shape), []).append(p.grad.lerp(momentum, self.mu))
        steps = {shape: iter(matrixwise(lambda G: orthogonalize(G, self.dtype)
                                        * (0.2 * max(G.shape[-2:]) ** 0.5), same))
                 for shape, same in ahead.items()}
        return [next(steps[tuple(p.shape)]) for p in params]

    def adamw(self, p: Tensor) -> Tensor:
        (b1, b2), state = self.betas, self.state[p]
        if not state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
        m = state["m"].lerp_(p.grad, 1 - b1)
        v = state["v"].lerp_(p.grad.square(), 1 - b2)
        t = state["t"] = state["t"] + 1
        return m / (1 - b1 ** t) / ((v / (1 - b2 ** t)).sqrt() + self.eps)
