"""
One head on a trunk: n numbers at each token, read off the last hidden state.

    reward model   r = W_r h_last + b_r        n = 1, at the last response token (001, 4.4)
    critic         V(x, y_<t) = W h_t + b      n = 1, at every token (001, 4.5)
    next sentence  logits: random, next        n = 2, at token 0 (004: W_NSP)
    classes        logits W h + b              n = C, of a text, or at each of its words (001, 2.2)
    answer span    is it the start, the end?   n = 2, at every token of a passage (001, 2.2)

The trunk is any model of architectures.py; its own arguments (segments, ...) are passed on.

    reward_model = WithHead(trunk, 1)
    values = reward_model(tokens)                                      # (B, T, 1)
    values, logps = reward_model.values_and_logps(tokens, targets)     # from one pass
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig, Transformer


class WithHead(nn.Module):
    """W h_t + b at each token, in fp32.

    zero: the head starts at zero, so that n classes are equally likely; otherwise at
    N(0, 1 / (D + 1)), the usual start of a reward model. keep_lm_head: an untied projection to the
    vocabulary goes on learning; else it is frozen, because nothing that the head says depends on
    it.
    """

    def __init__(self, trunk: Transformer, n: int, zero: bool = False, keep_lm_head: bool = False):
        super().__init__()
        d_model = trunk.config.d_model
        self.trunk = trunk
        # plain nn.Linear, because model.Linear has no bias and works in the dtype of the trunk
        self.head = nn.Linear(d_model, n)
        std = 0.0 if zero else (d_model + 1) ** -0.5
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)
        self.head.to(trunk.device)                     # drawn on the CPU: the same on any device
        # a weight that never gets a gradient would stop DDP, which waits for all of them
        if not trunk.config.tied and not keep_lm_head:
            trunk.lm_head.requires_grad_(False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None,
                positions: Tensor | None = None, **inputs) -> Tensor:
        """tokens (B, T) -> (B, T, n), fp32. Arguments: those of trunk.hidden."""
        return self.values_of(self.trunk.hidden(tokens, documents, positions, **inputs))

    def values_and_logps(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None,
                         documents: Tensor | None = None, positions: Tensor | None = None,
                         **inputs) -> tuple[Tensor, Tensor]:
        """The head's numbers (B, T, n), and log p(targets) in nats (B, T) as by trunk.logps, both
        from one pass through the trunk."""
        h = self.trunk.hidden(tokens, documents, positions, **inputs)  # (B, T, D), read twice
        return self.values_of(h), self.trunk.logps_of(h, targets, loss_mask)

    def values_of(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, T, n), fp32."""
        # in fp32, because rewards that differ in the third digit must not be rounded alike
        return F.linear(hidden.float(), self.head.weight, self.head.bias)

    @property
    def config(self) -> ModelConfig:
        return self.trunk.config

    @property
    def architecture(self) -> str:
        return self.trunk.architecture

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.dtype

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def gradient_checkpointing(self) -> bool:
        return self.trunk.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.trunk.gradient_checkpointing = on

    def matmul_parameters(self) -> int:
        """Parameters that multiply a token: the trunk's and the head's."""
        return self.trunk.matmul_parameters() + self.head.weight.numel()

    def flops_per_token(self, length: int) -> float:
        """FLOPs to train on one token of a sequence of `length` (ModelConfig.flops_per_token)."""
        # 2 FLOPs a parameter forward, 4 backward
        return self.trunk.flops_per_token(length) + 6 * self.head.weight.numel()
