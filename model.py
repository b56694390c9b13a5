"""
The Transformer that every stage trains: pre-norm blocks of grouped-query attention and SwiGLU
(001 section 1.3), with a language-model head or a scalar head (reward model, critic).

    h <- h + Attention(RMSNorm(h))         queries and keys turned by RoPE
    h <- h + Attention(RMSNorm(h), m)      only in the decoder of two: m is what the encoder made
    h <- h + SwiGLU(RMSNorm(h))            (Swish(x W1) * x W3) W2, or a Mixture of Experts of them

Four architectures of the same block, by what a token may look at (004):

    decoder           what came before it (GPT, Llama): every stage after pretraining
    encoder           everything (BERT): fills in, cannot write
    prefix            a prefix sees all of itself, what follows it looks back (UL2's other form)
    encoder_decoder   one stack reads everything, another writes and looks at it (T5)

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, C head width,
F feed-forward width, E experts, V vocabulary. Weights are fp32 masters; `model.dtype` is what
matmuls and the residual stream run in; norms' statistics, softmax, routers and log-probs are fp32.
Everything that kernels/ fuses is called through kernels/.

    model = Transformer(ModelConfig(vocab_size=1024))
    logits = model(tokens)                            # (B, T, V)
    logps = model(inputs, targets=targets)            # (B, T), never holds all logits in fp32
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
import parallel
import routing
from tokenizer import Tokenizer

ARCHITECTURES = "decoder", "encoder", "prefix", "encoder_decoder"


@dataclass
class ModelConfig:
    """Raises ValueError, naming the fields, when the sizes do not fit together."""
    vocab_size: int                   # special tokens included
    context_length: int = 256         # longest input, in tokens
    d_model: int = 128                # D
    n_layers: int = 4
    n_heads: int = 4                  # H
    n_kv_heads: int = 0               # K; 0: as many as n_heads
    d_ff: int = 0                     # F; 0: 8/3 D, rounded up to a multiple of 16
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True                 # the output projection is the embedding
    token_shift: bool = False         # a token also sees its predecessor's embedding, and in an
                                      # encoder its successor's
    head: str = "lm"                  # lm | scalar
    architecture: str = "decoder"     # decoder | encoder | prefix | encoder_decoder
    n_segments: int = 0               # segment embeddings, and a head for next-sentence prediction
    n_experts: int = 0                # E, of which a router picks; 0: a dense model
    top_k: int = 2                    # experts per token
    n_shared_experts: int = 0         # experts that every token visits besides
    d_expert: int = 0                 # F of one expert; 0: together as many FLOPs as d_ff
    n_dense_layers: int = 0           # the first so many blocks have no experts
    router: str = "token_choice"      # token_choice | expert_choice (cannot generate)
    expert_groups: int = 0            # two-level routing: experts stand in so many groups
    top_groups: int = 1               # ... of which a token visits so many
    capacity_factor: float = 0.0      # places per expert in training, over its fair share; 0: all
    router_noise: bool = False        # noisy top-k in training
    balance: str = "loss"             # loss | bias (nudged after every step) | none
    balance_coef: float = 0.01        # weight of the balance loss
    z_coef: float = 0.001             # weight of the router's z-loss
    bias_rate: float = 0.001          # step of the biases

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.d_ff = self.d_ff or -(-8 * self.d_model // 48) * 16
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.d_head % 2:
            raise ValueError(f"head width {self.d_head} (d_model {self.d_model} / n_heads "
                             f"{self.n_heads}) is odd; RoPE turns pairs of channels")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads "
                             f"{self.n_kv_heads}; a key/value head serves a group of query heads")
        for name, choices in (("head", ("lm", "scalar")), ("architecture", ARCHITECTURES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {choices}")
        if self.n_experts:
            visited = self.top_k + self.n_shared_experts
            self.d_expert = self.d_expert or -(-self.d_ff // (16 * visited)) * 16
            self.check_experts()

    def check_experts(self) -> None:
        for name, choices in (("router", ("token_choice", "expert_choice")),
                              ("balance", ("loss", "bias", "none"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {choices}")
        groups = self.expert_groups or 1
        if self.n_experts % groups or not 1 <= self.top_groups <= groups:
            raise ValueError(f"{self.n_experts} experts cannot stand in expert_groups {groups}, or "
                             f"top_groups {self.top_groups} is not among 1 to {groups}")
        within = self.n_experts * self.top_groups // groups
        if not 1 <= self.top_k <= within:
            raise ValueError(f"top_k is {self.top_k}; a token can choose among {within} experts")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_sparse_layers(self) -> int:
        return max(0, self.n_layers - self.n_dense_layers) if self.n_experts else 0

    def matmul_parameters(self) -> int:
        """Parameters that multiply a token: everything but norms, the embedding look-up, and the
        experts that it does not visit. encoder_decoder: one token in each of the two stacks."""
        attention = self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)
        dense, sparse = 3 * self.d_model * self.d_ff, 0
        if self.n_experts:
            router = self.n_experts * (2 if self.router_noise else 1) + self.expert_groups
            visited = self.top_k + self.n_shared_experts
            sparse = self.d_model * (router + 3 * visited * self.d_expert)
        head = self.d_model * (self.vocab_size + (self.head == "scalar"))
        sides = {"encoder": 2, "encoder_decoder": 3}.get(self.architecture, 1)
        shift = sides * self.d_model ** 2 if self.token_shift else 0
        n_dense = self.n_layers - self.n_sparse_layers
        blocks = self.n_layers * attention + n_dense * dense + self.n_sparse_layers * sparse
        if self.architecture == "encoder_decoder":
            blocks = 2 * blocks + self.n_layers * attention
        return blocks + shift + head

    def flops_per_token(self, length: int) -> float:
        """FLOPs to train on one token of a sequence of `length`: 6 per matmul parameter (2 forward,
        4 backward) and 12 for each token seen, channel and layer, for scores and weighted values; a
        token sees length / 2 others on average if causal, all if not. Norms and softmax are left
        out. encoder_decoder: one token in each of the two stacks, both of `length`."""
        seen = {"decoder": 0.5, "prefix": 0.5, "encoder": 1, "encoder_decoder": 2.5}
        attended = seen[self.architecture] * length * self.n_layers * self.d_model
        return 6 * self.matmul_parameters() + 12 * attended


class Linear(nn.Linear):
    """y = x W^T, the fp32 master weight cast to the dtype of x at use."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, parallel.local(self.weight).to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rmsnorm(x, self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens so far, for left-padded rows that grow together.

    starts: (B,) index of each row's first real token. `length` tokens are stored of `capacity`.
    The model works in `dtype` while it fills this cache.
    """

    def __init__(self, config: ModelConfig, starts: Tensor, capacity: int, dtype: torch.dtype):
        self.n_layers, self.dtype, self.keys_values = config.n_layers, dtype, None
        self.starts, self.length, self.capacity = starts, 0, capacity
        self.last: Tensor | None = None                # (B, 1, D) embedding of the newest token
        self.source: list[tuple[Tensor, Tensor]] = []  # per layer: keys and values of the source
        self.source_lengths: Tensor | None = None      # (B,)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, C) behind what the layer has; returns its caches (B, S, K, C)."""
        if self.keys_values is None:
            (B, _, K, C), dtype = k.shape, k.dtype
            if k.device.type == "cpu":                             # which has no fast bf16 for it
                dtype = torch.promote_types(dtype, torch.float32)
            self.keys_values = k.new_zeros(self.n_layers, 2, B, K, self.capacity, C, dtype=dtype)
        keys, values = self.keys_values[layer].transpose(2, 3)     # contiguous per head
        keys[:, self.length:self.length + k.shape[1]] = k
        values[:, self.length:self.length + v.shape[1]] = v
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (an index tensor): finished rows cost nothing."""
        self.keys_values = self.keys_values[:, :, rows]
        self.starts, self.last = self.starts[rows], self.last[rows]
        if self.source:
            self.source = [(k[rows], v[rows]) for k, v in self.source]
            self.source_lengths = self.source_lengths[rows]


class Seen(NamedTuple):
    """What the tokens of one pass through a stack of blocks have in common: where they stand, and
    what they may look at."""
    cos: Tensor                            # (T, C / 2) or (B, T, C / 2)
    sin: Tensor
    mask: kernels.Mask | None = None       # who sees whom; with a cache: causal, or not
    documents: Tensor | None = None        # (B, T)
    cache: KVCache | None = None
    source: Tensor | None = None           # (B, S, D): what the encoder made of the source
    source_lengths: Tensor | None = None   # (B,)
    causal: bool = True                    # of a cache


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.d_head = layer, config.d_head
        self.wq = Linear(config.d_model, config.n_heads * config.d_head)
        self.wk = Linear(config.d_model, config.n_kv_heads * config.d_head)
        self.wv = Linear(config.d_model, config.n_kv_heads * config.d_head)
        self.wo = Linear(config.n_heads * config.d_head, config.d_model)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.d_head)) for w in (self.wq, self.wk, self.wv))
        q, k = kernels.rope(q, k, seen.cos, seen.sin)              # (B, T, H, C), (B, T, K, C)
        cache = seen.cache
        if cache is None:
            y = kernels.attention(q, k, v, seen.mask)
        else:
            keys, values = cache.append(self.layer, k, v)
            y = kernels.decode_attention(q, keys, values, cache.starts, cache.length + x.shape[1],
                                         seen.causal)
        return self.wo(y.flatten(-2))


class CrossAttention(Attention):
    """Queries of the text being written, keys and values of the source. No RoPE: the two texts do
    not share a line of positions, and the encoder has put the source's into its states."""

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        q, cache = self.wq(x).unflatten(-1, (-1, self.d_head)), seen.cache
        if cache is not None and len(cache.source) > self.layer:
            k, v = cache.source[self.layer]
        else:
            k, v = (w(seen.source).unflatten(-1, (-1, self.d_head)) for w in (self.wk, self.wv))
        if cache is not None and len(cache.source) == self.layer:      # the same for all tokens
            cache.source.append((k, v))
        lengths = seen.source_lengths if cache is None else cache.source_lengths
        return self.wo(kernels.attention(q, k, v, causal=False, lengths=lengths).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w13 = Linear(d_model, 2 * d_ff)                       # W1 and W3 side by side
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(kernels.swiglu(self.w13(x)))


class MoE(nn.Module):
    """y = sum_i G_i(x) E_i(x) + what the shared experts say; each E is a SwiGLU (routing.py).

    Noise and capacity are for training: in evaluation every token reaches all that it chose, so
    that a token's output does not depend on the others (expert choice excepted).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, E, F_expert = config.d_model, config.n_experts, config.d_expert
        self.config = config
        self.router = Linear(D, E)                                 # W_r, used in fp32
        if config.expert_groups:
            self.group_router = Linear(D, config.expert_groups)
        if config.router_noise:
            self.noise_router = Linear(D, E)
        if config.balance == "bias":
            self.register_buffer("bias", torch.zeros(E))
        self.w13 = nn.Parameter(torch.empty(E, 2 * F_expert, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_expert))
        if config.n_shared_experts:
            self.shared = SwiGLU(D, config.n_shared_experts * F_expert)
        self.auxiliary: Tensor | float = 0.0           # of the newest forward pass with gradients
        self.load: Tensor | float = 0.0                # its sum since the biases were last nudged
        self.dropped: Tensor | float = 0.0             # share of its pairs that found no place

    def forward(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """x (B, T, D); documents (B, T), negative on padding, which counts in no statistic."""
        flat = x.flatten(0, 1)
        real = None if documents is None else (documents >= 0).flatten()
        y = parallel.moe_experts(flat, self.w13, self.w2, self.route(flat.float(), real))
        if self.config.n_shared_experts:
            y = y + self.shared(flat)
        return y.view(x.shape)

    def route(self, x: Tensor, real: Tensor | None) -> routing.Routes:
        """Who works on what, from x (N, D) in fp32; keeps the losses and the load."""
        config, (N, E) = self.config, (len(x), self.config.n_experts)
        logits = self.router(x)
        if config.router_noise and self.training:
            logits = routing.add_noise(logits, self.noise_router(x))
        probs = logits.softmax(-1) if not config.expert_groups else \
            routing.two_level(logits, self.group_router(x), config.top_groups)
        if config.router == "expert_choice":
            return routing.expert_choice(probs, routing.capacity(1.0, N, config.top_k, E))
        experts, gates = routing.top_k(probs, config.top_k, getattr(self, "bias", None))
        if torch.is_grad_enabled():
            load = routing.load(experts, E, real)
            self.load = self.load + load
            self.auxiliary = config.z_coef * routing.z_loss(logits, real)
            if config.balance == "loss":
                balance_loss = routing.balance_loss(probs, load, real)
                self.auxiliary = self.auxiliary + config.balance_coef * balance_loss
        keep = None
        if config.capacity_factor and self.training:
            places = routing.capacity(config.capacity_factor, N, config.top_k, E)
            keep = routing.within_capacity(experts, E, places)
            self.dropped = 1 - keep.float().mean()
        return routing.dispatch(experts, gates, E, keep)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, looks_at_source: bool = False):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.sparse = config.n_experts > 0 and layer >= config.n_dense_layers
        self.mlp = MoE(config) if self.sparse else SwiGLU(config.d_model, config.d_ff)
        self.looks_at_source = looks_at_source
        if looks_at_source:
            self.cross_norm = RMSNorm(config.d_model, config.norm_eps)
            self.cross_attention = CrossAttention(config, layer)

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        delta = self.attention(self.attention_norm(h), seen)
        if self.looks_at_source:
            norm = self.cross_norm
            h, x = kernels.add_rmsnorm(h, delta, norm.weight, norm.eps)
            delta = self.cross_attention(x, seen)
        h, x = kernels.add_rmsnorm(h, delta, self.mlp_norm.weight, self.mlp_norm.eps)
        return h + (self.mlp(x, seen.documents) if self.sparse else self.mlp(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype, self.gradient_checkpointing = config, dtype, False
        self.ways = 1                                  # ranks that share the heads (parallel.py)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        two = config.architecture == "encoder_decoder"
        self.blocks = nn.ModuleList(Block(config, n, two) for n in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if two:
            self.encoder = nn.ModuleList(Block(config, n) for n in range(config.n_layers))
            self.encoder_norm = RMSNorm(config.d_model, config.norm_eps)
        if config.n_segments:
            self.segment_embedding = nn.Embedding(config.n_segments, config.d_model)
            self.next_sentence_head = nn.Linear(config.d_model, 2)         # W_NSP (004)
        if config.token_shift:
            self.shift = Linear(config.d_model, config.d_model)
            if two or config.architecture == "encoder":
                self.shift_back = Linear(config.d_model, config.d_model)
        if config.head == "scalar":
            self.scalar_head = nn.Linear(config.d_model, 1)        # W_r, b_r of 001 section 4.4
            self.likelihood = nn.Parameter(torch.zeros(1))         # w_p of train_rm.py
            self.register_buffer("likelihood_unit", torch.ones(1))         # c
        if not config.tied:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        angles = torch.outer(torch.arange(config.context_length), rope_frequencies(config))
        self.register_buffer("cos", angles.cos(), persistent=False)    # (context_length, C / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """001 step 2.1: variance 1 / fan-in, and zero for what writes to the residual stream, so
        that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.normal_(std=module.in_features ** -0.5)
            elif isinstance(module, MoE):
                module.w13.normal_(std=self.config.d_model ** -0.5)
                module.w2.zero_()
        for name, weight in self.named_parameters():
            if name.endswith(("attention.wo.weight", ".w2.weight")):
                weight.zero_()
        # Small, so that the first loss is log V; and as a tied embedding gives its own token the
        # logit D * std while all blocks are the identity, smaller in wide models.
        std = min(0.02, 3 / self.config.d_model)
        self.embedding.weight.normal_(std=std)
        if self.config.n_segments:
            self.segment_embedding.weight.normal_(std=0.02)
            self.next_sentence_head.weight.zero_()
            self.next_sentence_head.bias.zero_()
        if hasattr(self, "lm_head"):
            self.lm_head.weight.normal_(std=std)
        if self.config.head == "scalar":
            self.scalar_head.weight.normal_(std=(self.config.d_model + 1) ** -0.5)
            self.scalar_head.bias.zero_()

    @property
    def output_weight(self) -> Tensor:
        """(V, D): the projection to the vocabulary."""
        return self.embedding.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def hidden(self, tokens: Tensor, documents: Tensor | None = None,
               positions: Tensor | None = None, cache: KVCache | None = None,
               prefix: Tensor | None = None, source: Tensor | None = None,
               source_lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> final hidden states (B, T, D), normalised, in `self.dtype`, or that of
        the cache."""
        T, architecture = tokens.shape[1], self.config.architecture
        past = 0 if cache is None else cache.length
        self.check_inputs(past + T, cache, prefix, source)
        if cache is not None:                                      # count from the first real token
            positions = torch.arange(past, past + T, device=tokens.device) - cache.starts[:, None]
            positions = positions.clamp(min=0)
        h, newest = self.embed(tokens, documents, positions, cache,
                               both_ways=architecture == "encoder")
        if source is not None:
            source = self.encode(source, source_lengths).to(h.dtype)
            if cache is not None:
                cache.source_lengths = source_lengths
        if segments is not None:
            h = h + F.embedding(segments, self.segment_embedding.weight).to(h.dtype)
        prompt = architecture == "prefix" and cache is not None and past == 0
        causal = architecture != "encoder" and not prompt
        mask = self.mask(h, causal, documents, prefix) if cache is None else None
        h = self.run(self.blocks, h, Seen(
            *self.rotation(T, positions), mask, documents=documents, cache=cache, source=source,
            source_lengths=source_lengths, causal=causal))
        if cache is not None:
            cache.length, cache.last = past + T, newest
        return self.norm(h)

    def check_inputs(self, length: int, cache: KVCache | None, prefix: Tensor | None,
                     source: Tensor | None) -> None:
        architecture = self.config.architecture
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens, but the model's context_length is "
                             f"{self.config.context_length}")
        if cache is not None and architecture == "encoder":
            raise ValueError("this model is an encoder: each of its tokens sees those after it, so "
                             "it cannot generate")
        if cache is not None and self.config.n_experts and self.config.router == "expert_choice":
            raise ValueError("router is expert_choice: which tokens an expert takes depends on "
                             "tokens yet to come, so this model cannot generate; train one with "
                             "--router token_choice")
        if prefix is not None and architecture != "prefix":
            raise ValueError(f"this model is a {architecture}: it takes no prefix")
        if (source is not None) != (architecture == "encoder_decoder") and \
                not (cache is not None and cache.source):
            raise ValueError("an encoder_decoder reads a source and other models do not: "
                             f"architecture is {architecture}, source is "
                             f"{'missing' if source is None else 'given'}")

    def mask(self, h: Tensor, causal: bool, documents: Tensor | None,
             prefix: Tensor | None) -> kernels.Mask:
        """Who sees whom, for all blocks: made once."""
        (B, T, _), config = h.shape, self.config
        heads, kv_heads = (n // self.ways for n in (config.n_heads, config.n_kv_heads))
        return kernels.attention_mask((B, T, heads, config.d_head), (B, T, kv_heads, config.d_head),
                                      h.dtype, h.device, causal=causal, documents=documents,
                                      prefix=prefix)

    def rotation(self, T: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE's angles: (T, C / 2), or at positions (B, T) (B, T, C / 2)."""
        at = slice(T) if positions is None else positions
        return self.cos[at], self.sin[at]

    def embed(self, tokens: Tensor, documents: Tensor | None, positions: Tensor | None,
              cache: KVCache | None = None, both_ways: bool = False) -> tuple[Tensor, Tensor]:
        """(B, T) -> (B, T, D), and the newest token's embedding alone (B, 1, D). both_ways: for an
        encoder, which sees what comes next."""
        h = parallel.embedding(tokens, self.embedding.weight)
        h = h.to(self.dtype if cache is None else cache.dtype)
        newest = h[:, -1:]
        if self.config.token_shift:
            first = cache is None or cache.length == 0
            before = torch.zeros_like(newest) if first else cache.last
            neighbours = self.shift(predecessors(h, before, documents, positions))
            if both_ways:
                neighbours = neighbours + self.shift_back(successors(h, documents))
            h = h + neighbours
        return h, newest

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The encoder of two: source (B, S), right-padded to its lengths (B,) -> (B, S, D)."""
        S = source.shape[1]
        if S > self.config.context_length:
            raise ValueError(f"a source of {S} tokens, but the model's context_length is "
                             f"{self.config.context_length}")
        padding = torch.arange(S, device=source.device) >= lengths[:, None]
        documents = -padding.int()
        h, _ = self.embed(source, documents, None, both_ways=True)
        mask = self.mask(h, False, documents, None)
        h = self.run(self.encoder, h, Seen(*self.rotation(S, None), mask, documents=documents))
        return self.encoder_norm(h)

    def cast(self, dtype: torch.dtype) -> "Transformer":
        """This model to generate with, its matrices cast to dtype once instead of at every token;
        norms, and routers, which work in fp32, are shared with it. Itself where nothing changes,
        and where adapters or shards stand in the place of matrices: those cast at every token."""
        if dtype == self.embedding.weight.dtype:
            return self
        weights = self.state_dict()
        with torch.device("meta"):                                 # nothing is drawn or copied
            model = Transformer(self.config, self.dtype)
        if weights.keys() != model.state_dict().keys() or \
                any(map(parallel.is_sharded, weights.values())):
            return self
        weights = {name: w.to(dtype) if w.dim() >= 2 and "router" not in name else w
                   for name, w in weights.items()}
        model.load_state_dict(weights, assign=True)
        model.cos, model.sin = self.cos, self.sin
        return model.train(self.training)

    def run(self, blocks: nn.ModuleList, h: Tensor, seen: Seen) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, seen, use_reentrant=False)
            else:
                h = block(h, seen)
        return h

    @property
    def sparse_layers(self) -> list[MoE]:
        """The Mixtures of Experts, from the first block on; an encoder's first."""
        blocks = [*getattr(self, "encoder", []), *self.blocks]
        return [block.mlp for block in blocks if block.sparse]

    def dropped(self) -> Tensor | float:
        """Share of the pairs of token and expert that the newest training pass dropped."""
        shares = [moe.dropped for moe in self.sparse_layers]
        return sum(shares) / max(1, len(shares))

    def auxiliary_loss(self) -> Tensor | float:
        """What the routers of the newest forward pass add to a training loss: balance and z-loss,
        with their coefficients, summed over the blocks; 0.0 for a dense model."""
        return sum(moe.auxiliary for moe in self.sparse_layers)

    @torch.no_grad()
    def balance_experts(self, nudge: bool = True) -> Tensor | None:
        """After an optimizer step: nudge the routers' biases, where they have some and unless told
        not to. Returns the load since the last call, (sparse blocks, E), shares of each block; None
        for a dense model."""
        sparse = [moe for moe in self.sparse_layers if isinstance(moe.load, Tensor)]
        if not sparse:
            return None
        loads = torch.stack([moe.load for moe in sparse])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loads)
        loads = loads / loads.sum(1, keepdim=True)
        for moe, load in zip(sparse, loads):
            moe.load = 0.0
            if nudge and moe.config.balance == "bias":
                moe.bias.copy_(routing.nudged(moe.bias, load, moe.config.bias_rate))
        return loads

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None,
                loss_mask: Tensor | None = None, documents: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None,
                prefix: Tensor | None = None, source: Tensor | None = None,
                source_lengths: Tensor | None = None, segments: Tensor | None = None,
                temperature: float = 1.0, with_entropy: bool = False):
        """
        tokens: (B, T) ids. documents: (B, T) numbers; attention stays within equal ones.
        positions: (B, T) for RoPE, by default 0 .. T-1. cache: what came before `tokens`.
        prefix: (B,) how many tokens see each other both ways (architecture prefix). source: (B, S)
        ids, right-padded to source_lengths (B,), that an encoder_decoder reads; with a cache only
        at first. segments: (B, T) numbers below n_segments.
        Returns (all fp32)
          scalar head:   values W_r h_t + b_r (B, T); with targets (values + w_p c log p of all
                         targets before t, log-probabilities): what was read so far, and how likely
                         it was. No gradient passes that log p.
          no targets:    logits (B, T, V); with a cache those of the last position (B, 1, V)
          targets (B, T): their log-probabilities in nats (B, T), 0 where loss_mask is 0;
                          with_entropy: also the entropy (B, T) of each prediction, in nats;
                          segments: also the logits (B, 2) of "random" and "next sentence"
        Logits are divided by `temperature` first. A scalar head raises ValueError for generation,
        and every model for a length beyond context_length.
        """
        scalar = self.config.head == "scalar"
        if scalar and cache is not None:
            raise ValueError("this model has a scalar head: it is a reward model or a critic; "
                             "generating tokens takes a language model")
        h = self.hidden(tokens, documents, positions, cache, prefix, source, source_lengths,
                        segments)
        if scalar:
            values = F.linear(h.float(), self.scalar_head.weight, self.scalar_head.bias).squeeze(-1)
            if targets is None:
                return values
        if targets is None:
            h = h if cache is None else h[:, -1:]
            logits = parallel.linear(h, self.output_weight).float()
            return logits if temperature == 1.0 else logits / temperature
        if segments is not None:                                   # from h of [CLS]
            next_sentence = self.next_sentence_head(h[:, 0].float())
        h, flat_targets = h.flatten(0, 1), targets.flatten()
        if loss_mask is not None:                                  # only targets meet the V words
            rows = loss_mask.flatten().nonzero().squeeze(1)
            h, flat_targets = h[rows], flat_targets[rows]
        scores = parallel.linear_cross_entropy(h, self.output_weight, flat_targets, temperature,
                                               with_entropy)
        outputs = scores if with_entropy else (scores,)
        if loss_mask is not None:
            blank = torch.zeros(targets.numel(), device=h.device)
            outputs = [blank.index_put((rows,), output) for output in outputs]
        outputs = [output.view(targets.shape) for output in outputs]
        if scalar:
            so_far = F.pad(outputs[0].detach(), (1, -1)).cumsum(1)     # of the targets before t
            outputs = [values + self.likelihood * self.likelihood_unit * so_far, *outputs]
        if segments is not None:
            outputs = [*outputs, next_sentence]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]


def predecessors(h: Tensor, before: Tensor, documents: Tensor | None,
                 positions: Tensor | None) -> Tensor:
    """The embedding of the token before each, (B, T, D); 0 for the first of a document.

    With it in the residual stream one attention layer can find "what followed this word last
    time", which otherwise takes two and many more training tokens ("smeared keys" in Olsson et al.
    2022, token shift in Peng et al. 2023). before: (B, 1, D), what came before the first.
    """
    previous = torch.cat([before, h[:, :-1]], dim=1)
    if documents is not None:
        same = F.pad(documents[:, 1:] == documents[:, :-1], (1, 0))
        previous = previous * same[..., None]
    elif positions is not None:
        previous = previous * (positions > 0)[..., None]
    return previous


def successors(h: Tensor, documents: Tensor | None) -> Tensor:
    """The embedding of the token after each, (B, T, D); 0 for the last of a document. What stands
    in the place of a hidden word is then found from either side of it."""
    following = F.pad(h[:, 1:], (0, 0, 0, 1))
    if documents is not None:
        same = F.pad(documents[:, 1:] == documents[:, :-1], (0, 1))
        following = following * same[..., None]
    return following


def rope_frequencies(config: ModelConfig) -> Tensor:
    """theta^(-2i/C) for i < C/2: radians per position (001 section 1.3, alpha_i). Channel i turns
    with channel i + C/2 (rotating halves, as Llama checkpoints do)."""
    return config.rope_theta ** (-torch.arange(0, config.d_head, 2) / config.d_head)


def token_logps(model: nn.Module, batch, temperature: float = 1.0, with_entropy: bool = False):
    """log p(x_t | x_<t) in nats of every target in the batch, (B, T-1) fp32, 0 elsewhere.

    batch: data.Batch. The one place where tokens are shifted against their predictions; every
    stage's loss is made of what it returns. Entry t - 1 is the score of token t. A batch with
    targets of its own is not shifted: (B, T), and what the model returns for segments.
    """
    def inputs(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :-1]
    if batch.targets is not None:
        return model(batch.tokens, targets=batch.targets, loss_mask=batch.loss_mask,
                     documents=batch.documents, positions=batch.positions, source=batch.source,
                     source_lengths=batch.source_lengths, segments=batch.segments,
                     temperature=temperature, with_entropy=with_entropy)
    all_scored = batch.n_targets == batch.n_tokens
    return model(batch.tokens[:, :-1], targets=batch.tokens[:, 1:],
                 loss_mask=None if all_scored else batch.loss_mask[:, 1:],
                 documents=inputs(batch.documents), positions=inputs(batch.positions),
                 prefix=batch.prefix, temperature=temperature, with_entropy=with_entropy)


def parameter_count(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def active_parameter_count(model: Transformer) -> int:
    """Parameters that work on one token: all, less the experts that it does not visit."""
    config = model.config
    idle = (config.n_experts - config.top_k) * 3 * config.d_model * config.d_expert
    return parameter_count(model) - len(model.sparse_layers) * idle


def with_encoder(decoder: Transformer) -> Transformer:
    """An encoder_decoder whose two stacks both begin as the decoder's (Rothe et al. 2020). At first
    it writes what the decoder would: its cross-attention is new, and adds nothing yet, nor does
    what the encoder sees of successors."""
    config = dataclasses.replace(decoder.config, architecture="encoder_decoder")
    model = Transformer(config, decoder.dtype).to(decoder.device)
    weights = decoder.state_dict() | {"encoder_norm.weight": decoder.norm.weight}
    weights |= {name.replace("blocks", "encoder", 1): weight
                for name, weight in weights.items() if name.startswith("blocks.")}
    model.load_state_dict(weights, strict=False)
    if config.token_shift:
        nn.init.zeros_(model.shift_back.weight)
    return model


def extend_vocabulary(model: Transformer, old: Tokenizer, new: Tokenizer) -> Transformer:
    """The same model for a tokenizer with more tokens. Those of the old one keep their embeddings;
    a new word starts at the mean of those of its pieces, a new special token near the mean of all.

    Raises ValueError when `new` lacks a token of `old`, reserved ones excepted.
    """
    config = dataclasses.replace(model.config, vocab_size=new.vocab_size)
    extended = Transformer(config, model.dtype).to(model.device)
    ids = new.ranks | new.special
    known = [(old.special[name], ids.get(name)) for name in old.named]
    known += [(i, ids.get(token)) for token, i in old.ranks.items()]
    if missing := [i for i, j in known if j is None]:
        raise ValueError(f"the new tokenizer lacks {len(missing)} tokens of the model, for example "
                         f"{old.decode(missing[:1], specials=True)!r}; extend the model's own")
    before, after = map(torch.tensor, zip(*known))
    taken = set(after.tolist())
    weights = model.state_dict()
    for name in {"embedding.weight", "lm_head.weight"} & weights.keys():
        rows, mean = weights[name], weights[name].mean(0)
        weights[name] = table = mean + 0.02 * torch.randn_like(extended.embedding.weight)
        table[after] = rows[before]
        for token, i in new.ranks.items():
            if i not in taken:
                table[i] = rows[old.pieces(token)].mean(0)
    extended.load_state_dict(weights)
    return extended


# ---------------------------------------------------------------------- the model folder

def save_model(folder: str | Path, model: Transformer, tokenizer: Tokenizer,
               weights: dict[str, Tensor] | None = None, **record) -> None:
    """Write tokenizer.json, model.safetensors and, last, config.json = {"model": ..., **record}:
    a folder with config.json is complete. Each file replaces the former one atomically. weights:
    those of the model, where it has only a share of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    weights = {name: w.detach().cpu().contiguous()
               for name, w in (weights or model.state_dict()).items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors.tmp")
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")
    config = {"model": dataclasses.asdict(model.config), **record}
    (folder / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "config.json.tmp").replace(folder / "config.json")


def load_model(folder: str | Path, device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.float32, head: str | None = "lm",
               context_length: int | None = None,
               any_architecture: bool = False) -> tuple[Transformer, Tokenizer]:
    """Read a model folder. head: "lm" refuses a reward model; "scalar" puts a fresh scalar head on
    a language model (001 step 4.5-1); None takes what is there. context_length changes how far
    RoPE's table reaches.

    Every stage after pretraining reads conversations from left to right: a prefix model comes back
    as a decoder, whose weights are the same, and other architectures are refused, unless
    any_architecture. Raises ValueError also when the folder is absent or half-written, or its parts
    do not fit together.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            why = f"there is no {name}: the run that writes it has not finished" \
                if folder.is_dir() else "there is no such folder"
            raise ValueError(f"{folder}: {why}; give the --out folder of a finished stage")
    tokenizer = Tokenizer.load(folder)
    try:
        saved = json.loads((folder / "config.json").read_text())["model"]
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except Exception as error:
        raise ValueError(f"{folder}: config.json or model.safetensors is damaged ({error}); "
                         "run the stage again or use a checkpoint of it") from error
    if head == "lm" and saved["head"] == "scalar":
        raise ValueError(f"{folder}: this is a reward model; give a language model, the --out of "
                         "train_pretrain.py, train_sft.py, train_dpo.py or train_ppo.py")
    config = ModelConfig(**saved | ({"head": head} if head else {})
                         | ({"context_length": context_length} if context_length else {}))
    if config.architecture != "decoder" and not any_architecture:
        if config.architecture != "prefix":
            raise ValueError(f"{folder}: this model is an {config.architecture}; chatting and the "
                             "stages after pretraining take a decoder or a prefix model")
        config.architecture = "decoder"
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{folder}: the model has {config.vocab_size} tokens, its tokenizer "
                         f"{tokenizer.vocab_size}; they are not of one run")
    model = Transformer(config, dtype)
    if head == "scalar" and saved["head"] == "lm":
        fresh = model.state_dict()
        weights |= {name: fresh[name] for name in
                    ("scalar_head.weight", "scalar_head.bias", "likelihood", "likelihood_unit")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: model.safetensors does not fit config.json; they are not of "
                         f"one run ({error})") from error
    return model.to(device), tokenizer
