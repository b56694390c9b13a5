"""
The Transformer that every stage trains, a decoder like Llama: pre-norm blocks of grouped-query
attention and SwiGLU (001 section 1.3), and a projection to the vocabulary.

    h <- h + Attention(RMSNorm(h))         queries and keys turned by RoPE, causal
    h <- h + SwiGLU(RMSNorm(h))            (Swish(x W1) * x W3) W2, or a Mixture of Experts of them

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, C head width,
F feed-forward width, E experts, V vocabulary. Weights are fp32 masters; `model.dtype` is the dtype
of matmuls and of the residual stream; norms' statistics, softmax, routers and log-probs are fp32.
Everything that kernels/ fuses is called through kernels/.

    model = Transformer(ModelConfig(vocab_size=1024))
    logits = model(tokens)                            # (B, T, V)
    logps = model.logps(inputs, targets)              # (B, T), never holds all logits in fp32

moe.py has the experts, architectures.py the encoder, the prefix model and the encoder-decoder made
of the same blocks, heads.py reward models and critics, plumbing/folders.py saves and loads.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
import moe
import parallel

ROPE_ORIGINAL = 8192                  # tokens: the context of Llama 3, before rope_factor


@dataclass
class ModelConfig:
    """Raises ValueError, naming the fields, when the sizes do not fit together."""
    vocab_size: int                   # V: tokens of the tokenizer, special ones included, >= 1
    context_length: int = 256         # longest input, in tokens, >= 1
    d_model: int = 128                # D: width of the residual stream, >= 1
    n_layers: int = 4                 # Transformer blocks, >= 1
    n_heads: int = 4                  # H: query heads, >= 1
    n_kv_heads: int = 0               # K: key/value heads; 0: as many as n_heads
    head_width: int = 0               # C; 0: d_model / n_heads
    d_ff: int = 0                     # F: width of SwiGLU; 0: 8/3 D, rounded up to 16s
    qkv_bias: bool = False            # queries, keys and values have biases (Qwen2)
    qk_norm: bool = False             # queries and keys are normalised, head by head (Qwen3)
    rope_theta: float = 10_000.0      # RoPE's slowest wavelength is about 2 pi times this, > 0
    rope_factor: float = 1.0          # long wavelengths are so many times longer (Llama 3), >= 1
    norm_eps: float = 1e-5            # added to RMSNorm's mean square, > 0
    tied: bool = True                 # the output projection is the embedding
    token_shift: bool = False         # add each predecessor's embedding: gains 0.4 nats
                                      # with train_pretrain.py --copy_steps 250
    common: float = 0.0               # embeddings begin with a direction in common, so many times
                                      # as long as their own part: 3 gains 0.04 nats
    n_experts: int = 0                # E: Mixture of Experts, so many SwiGLUs; 0: a dense model
    top_k: int = 2                    # experts per token, >= 1
    n_shared_experts: int = 0         # experts that every token visits besides
    d_expert: int = 0                 # width of an expert; 0: together as many FLOPs as d_ff
    n_dense_layers: int = 0           # the first so many blocks have no experts
    router: str = "token_choice"      # token_choice | expert_choice (cannot generate)
    expert_groups: int = 0            # two-level routing: experts stand in so many groups
    top_groups: int = 1               # ... of which a token visits so many, >= 1
    capacity_factor: float = 0.0      # places per expert in training, over its fair share; 0: all
    router_noise: bool = False        # noisy top-k in training: the router learns how much
    balance: str = "loss"             # loss | bias (nudged after every step) | none
    balance_coef: float = 0.01        # weight of the balance loss
    z_coef: float = 0.001             # weight of the router's z-loss
    bias_rate: float = 0.001          # step of the biases

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        # a multiple of 16, because matrix units work on tiles of 16
        self.d_ff = self.d_ff or 16 * math.ceil(8 * self.d_model / (3 * 16))
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % self.n_heads and not self.head_width:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.d_head % 2:
            raise ValueError(f"head width {self.d_head} (d_model {self.d_model} / n_heads "
                             f"{self.n_heads}) is odd; RoPE turns pairs of channels")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads "
                             f"{self.n_kv_heads}; a key/value head serves a group of query heads")
        if self.n_experts:
            visited = self.top_k + self.n_shared_experts
            # a token's experts together are as wide as d_ff, and cost as many FLOPs
            self.d_expert = self.d_expert or 16 * math.ceil(self.d_ff / (16 * visited))
            moe.check_config(self)

    @property
    def d_head(self) -> int:
        return self.head_width or self.d_model // self.n_heads

    @property
    def n_sparse_layers(self) -> int:
        """Blocks with experts: the last ones."""
        return max(0, self.n_layers - self.n_dense_layers) if self.n_experts else 0

    def attention_parameters(self) -> int:
        """wq and wo have H heads, wk and wv have K."""
        return self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)

    def block_parameters(self) -> int:
        """Parameters of all blocks that multiply a token: neither norms nor idle experts."""
        dense = 3 * self.d_model * self.d_ff           # W1, W2 and W3 of a SwiGLU
        n_dense = self.n_layers - self.n_sparse_layers
        attention = self.n_layers * self.attention_parameters()
        sparse = self.n_sparse_layers * moe.parameters_per_token(self)
        return attention + n_dense * dense + sparse

    def matmul_parameters(self) -> int:
        """Parameters that multiply a token: everything but norms, the embedding look-up, and the
        experts that the token does not visit."""
        shift = self.d_model ** 2 if self.token_shift else 0
        output = self.d_model * self.vocab_size
        return self.block_parameters() + shift + output

    def flops_per_token(self, length: int) -> float:
        """FLOPs to train a decoder on one token of a sequence of `length`: 6 per matmul parameter
        (2 forward, 4 backward) and 12 for each token seen, channel and layer, for scores and
        weighted values; a token sees length / 2 others on average. Norms and softmax are left
        out."""
        tokens_seen = 0.5 * length                     # the first sees one, the last all
        width = self.n_heads * self.d_head
        return 6 * self.matmul_parameters() + 12 * tokens_seen * self.n_layers * width


class Embedding(nn.Embedding):
    """Rows of the weight (V, D) by number, from whichever rank has them."""

    def reset_parameters(self) -> None:
        if self.weight.device.type != "meta":          # where torch would load a library for it
            super().reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        return parallel.embedding(tokens, self.weight)


class Linear(nn.Linear):
    """y = x W^T, the fp32 master weight cast to the dtype of x at use."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = parallel.local(self.weight)           # this rank's part, where ranks divide it
        return F.linear(x, weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rmsnorm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """(Swish(x W1) * x W3) W2."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w13 = Linear(d_model, 2 * d_ff)           # W1 and W3 side by side: one matmul
        self.w2 = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(kernels.swiglu(self.w13(x)))


class KVCache:
    """Keys and values of the tokens so far, for left-padded rows that grow together.

    starts: (B,) index of each row's first real token. `length` tokens are stored of `capacity`.
    The model works in `dtype` while it fills this cache.
    """

    def __init__(self, config: ModelConfig, starts: Tensor, capacity: int, dtype: torch.dtype):
        self.n_layers = config.n_layers
        self.starts = starts
        self.capacity = capacity
        self.dtype = dtype
        self.length = 0
        self.causal = True                             # False: new tokens see each other both ways
        self.keys_values: Tensor | None = None         # (layers, 2, B, K, capacity, C)
        self.newest: Tensor | None = None              # (B, 1, D) embedding, for token shift

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, C) behind those of the layer; returns its caches (B, S, K, C)."""
        B, T, K, C = k.shape
        if self.keys_values is None:
            dtype = k.dtype
            if k.device.type == "cpu":                 # at least fp32, because CPUs multiply
                dtype = torch.promote_types(dtype, torch.float32)      # single vectors fast in it
            # heads before tokens, so that the keys of one head lie together in memory
            self.keys_values = k.new_zeros(self.n_layers, 2, B, K, self.capacity, C, dtype=dtype)
        keys, values = self.keys_values[layer].transpose(2, 3)         # (B, S, K, C) each
        end = self.length + T
        keys[:, self.length:end] = k
        values[:, self.length:end] = v
        return keys, values

    def positions(self, T: int) -> Tensor:
        """(B, T) of the next T tokens, counted from each row's first real token, because padding
        must not move a row along; the padding before it stands at 0."""
        slots = torch.arange(self.length, self.length + T, device=self.starts.device)
        return (slots - self.starts[:, None]).clamp(min=0)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (an index tensor), so that finished rows cost nothing."""
        self.keys_values = self.keys_values[:, :, rows]
        self.starts = self.starts[rows]
        self.newest = self.newest[rows]


class Attention(nn.Module):
    """Grouped-query attention: H / K query heads share a head of keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.d_head = config.d_head
        self.wq = Linear(config.d_model, config.n_heads * config.d_head)
        self.wk = Linear(config.d_model, config.n_kv_heads * config.d_head)
        self.wv = Linear(config.d_model, config.n_kv_heads * config.d_head)
        self.wo = Linear(config.n_heads * config.d_head, config.d_model)
        self.has_bias = config.qkv_bias
        if self.has_bias:
            self.bq = nn.Parameter(torch.zeros(config.n_heads * config.d_head))
            self.bk = nn.Parameter(torch.zeros(config.n_kv_heads * config.d_head))
            self.bv = nn.Parameter(torch.zeros(config.n_kv_heads * config.d_head))
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.q_norm = RMSNorm(config.d_head, config.norm_eps)
            self.k_norm = RMSNorm(config.d_head, config.norm_eps)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H, C)."""
        q = self.wq(x)
        if self.has_bias:
            q = q + self.bq.to(q.dtype)
        q = q.unflatten(-1, (-1, self.d_head))
        return self.q_norm(q) if self.has_norms else q

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, K, C) each."""
        k = self.wk(x)
        v = self.wv(x)
        if self.has_bias:
            k = k + self.bk.to(k.dtype)
            v = v + self.bv.to(v.dtype)
        by_head = (-1, self.d_head)
        k = k.unflatten(-1, by_head)
        return self.k_norm(k) if self.has_norms else k, v.unflatten(-1, by_head)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: kernels.Mask | None = None,
                cache: KVCache | None = None) -> Tensor:
        q = self.queries(x)                            # (B, T, H, C)
        k, v = self.keys_and_values(x)                 # (B, T, K, C)
        # q . k then depends on the distance of the two tokens, not on where they stand
        q, k = kernels.rope(q, k, cos, sin)
        if cache is None:
            y = kernels.attention(q, k, v, mask)
        else:
            keys, values = cache.append(self.layer, k, v)      # (B, S, K, C), S the capacity
            end = cache.length + x.shape[1]
            y = kernels.decode_attention(q, keys, values, cache.starts, end, cache.causal)
        return self.wo(y.flatten(-2))                  # (B, T, H C) -> (B, T, D)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.sparse = config.n_experts > 0 and layer >= config.n_dense_layers
        if self.sparse:
            shared = None                              # one SwiGLU, as wide as all of them
            if config.n_shared_experts:
                shared = SwiGLU(config.d_model, config.n_shared_experts * config.d_expert)
            self.mlp = moe.MoE(config, shared)
        else:
            self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: kernels.Mask | None = None,
                documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """h (B, T, D) -> (B, T, D); the rest is the same for all blocks of a pass."""
        change = self.attention(self.attention_norm(h), cos, sin, mask, cache)
        # h + change, and the same normalised, by one kernel
        h, x = kernels.add_rmsnorm(h, change, self.mlp_norm.weight, self.mlp_norm.eps)
        if self.sparse:
            return h + self.mlp(x, documents)          # routers leave padding out of statistics
        return h + self.mlp(x)


class Transformer(nn.Module):
    """The decoder: embedding, blocks, a last norm, a projection to the vocabulary."""
    architecture = "decoder"

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = False            # forget a block's activations, recompute
        self.d_head = config.d_head                    # C
        self.peft = None                               # what lora.py has attached
        self.tensor_parallel = 1                       # ranks that share the heads (parallel.py)
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if config.token_shift:
            self.shift = Linear(config.d_model, config.d_model)
        if not config.tied:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        self.make_rope_table(self.device)
        self.initialize()

    def make_rope_table(self, device: torch.device | str) -> None:
        """cos and sin (context_length, C / 2) of RoPE's angles; not saved with the weights, because
        they follow from the sizes."""
        with torch.device("cpu"):                      # whatever the device of the weights is
            positions = torch.arange(self.config.context_length)
            angles = torch.outer(positions, rope_frequencies(self.config))
        self.register_buffer("cos", angles.cos().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """001 step 2.1: N(0, 1 / fan-in), and zero for the matrices that write to the residual
        stream, so that every block starts as the identity."""
        if self.device.type == "meta":                 # without numbers there are none to draw
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features ** -0.5)
            elif isinstance(module, moe.MoE):
                module.w13.normal_(std=self.config.d_model ** -0.5)
                module.w2.zero_()
        for module in self.modules():
            if isinstance(module, Attention):
                module.wo.weight.zero_()
            elif isinstance(module, SwiGLU):
                module.w2.weight.zero_()
        # Small, so that the first loss is log V; and as a tied embedding gives its own token the
        # logit D * std while all blocks are the identity, smaller in wide models.
        std = min(0.02, 3 / self.config.d_model)
        self.embedding.weight.normal_(std=std)
        if self.config.common > 0:
            # Because looking back begins with a head that finds the token before, whichever it is:
            # by its place alone, and so by what is the same in all keys.
            self.embedding.weight += (
                self.config.common * std * torch.randn_like(self.embedding.weight[0]))
        if not self.config.tied:
            self.lm_head.weight.normal_(std=std)

    @property
    def output_weight(self) -> Tensor:
        """(V, D): the projection to the vocabulary."""
        return self.embedding.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, tokens: Tensor, documents: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) in fp32; with a cache those of the last position alone (B, 1, V).

        tokens: (B, T) ids. documents: (B, T) numbers; attention stays within equal ones, and
        padding has -1. positions: (B, T) for RoPE, by default 0 .. T-1. cache: of the tokens before
        these. Raises ValueError for more tokens than context_length.
        """
        h = self.hidden(tokens, documents, positions, cache)
        if cache is not None:
            h = h[:, -1:]                              # a prompt's other tokens are known
        return self.logits_of(h)

    def logps(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None,
              documents: Tensor | None = None, positions: Tensor | None = None,
              temperature: float = 1.0, with_entropy: bool = False):
        """log p(targets) in nats, (B, T) fp32, 0 where loss_mask is 0; targets[b, t] is scored by
        the prediction at token t. with_entropy: also the entropy of each prediction (B, T), in
        nats. Logits are divided by `temperature` first. The other arguments: see forward()."""
        h = self.hidden(tokens, documents, positions)
        return self.logps_of(h, targets, loss_mask, temperature, with_entropy)

    def hidden(self, tokens: Tensor, documents: Tensor | None = None,
               positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> final hidden states (B, T, D), normalised, in `self.dtype`, or in the
        dtype of the cache. The arguments: see forward()."""
        T = tokens.shape[1]
        if cache is None:
            self.check(T)
            h = self.embed(tokens, documents, positions)
            mask = self.mask(h, T, documents=documents)
            h = self.run_blocks(self.blocks, h, positions, mask, documents)
        else:
            self.check(cache.length + T, cache)
            positions = cache.positions(T)
            h = self.embed(tokens, documents, positions, cache)
            # no mask: a new token sees its row from the first real token to itself
            h = self.run_blocks(self.blocks, h, positions, None, documents, cache)
            cache.length += T
        return self.norm(h)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> logits (B, T, V), fp32."""
        return parallel.linear(hidden, self.output_weight).float()

    def logps_of(self, hidden: Tensor, targets: Tensor, loss_mask: Tensor | None = None,
                 temperature: float = 1.0, with_entropy: bool = False):
        """logps() from the hidden states (B, T, D) of a pass that more than one head reads."""
        h = hidden.flatten(0, 1)                       # (B T, D): rows to be scored
        flat_targets = targets.flatten()
        if loss_mask is not None:
            # only the scored rows meet the V words, because that matmul is the largest
            scored = loss_mask.flatten().nonzero().squeeze(1)
            h = h[scored]
            flat_targets = flat_targets[scored]
        logps = parallel.linear_cross_entropy(h, self.output_weight, flat_targets, temperature,
                                              with_entropy)

        outputs = logps if with_entropy else (logps,)
        if loss_mask is not None:
            # back from the scored rows to all of them: 0 elsewhere
            zeros = torch.zeros(targets.numel(), device=h.device)
            outputs = [zeros.index_put((scored,), output) for output in outputs]
        outputs = [output.view(targets.shape) for output in outputs]       # (B, T) each
        return tuple(outputs) if with_entropy else outputs[0]

    def check(self, length: int, cache: KVCache | None = None) -> None:
        """Raises ValueError for what this model cannot read, or cannot generate."""
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens, but the model's context_length is "
                             f"{self.config.context_length}")
        if cache is not None and self.config.n_experts and self.config.router == "expert_choice":
            raise ValueError("router is expert_choice: which tokens an expert takes depends on "
                             "tokens yet to come, so this model cannot generate; train one with "
                             "--router token_choice")

    def embed(self, tokens: Tensor, documents: Tensor | None = None,
              positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) -> (B, T, D); with token shift also of each token's predecessor."""
        h = self.embedding(tokens)
        # from here on the residual stream has the dtype of matmuls
        h = h.to(self.dtype if cache is None else cache.dtype)
        newest = h[:, -1:]                             # (B, 1, D): the next token's predecessor
        before = torch.zeros_like(newest)              # no token stands before the first
        if cache is not None:
            if cache.length > 0:
                before = cache.newest
            cache.newest = newest
        if self.config.token_shift:
            h = h + self.shift(predecessors(h, before, documents, positions))
        return h

    def mask(self, h: Tensor, n_keys: int, **who_sees_whom) -> kernels.Mask:
        """The attention mask of queries h (B, T, D) and n_keys keys, made once for all blocks.
        who_sees_whom: the keywords of kernels.attention_mask."""
        B, T, _ = h.shape
        config = self.config
        # the heads of this rank alone, because a mask may be laid out head by head
        q_shape = B, T, config.n_heads // self.tensor_parallel, self.d_head
        k_shape = B, n_keys, config.n_kv_heads // self.tensor_parallel, self.d_head
        return kernels.attention_mask(q_shape, k_shape, h.dtype, h.device, **who_sees_whom)

    def run_blocks(self, blocks: nn.ModuleList, h: Tensor, positions: Tensor | None,
                   *others) -> Tensor:
        """h (B, T, D) through all blocks; others: what they take besides h, cos and sin."""
        at = slice(h.shape[1]) if positions is None else positions
        cos = self.cos[at]                             # (T, C / 2), at positions (B, T, C / 2)
        sin = self.sin[at]
        for block in blocks:
            # without gradients nothing is kept anyway
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, *others, use_reentrant=False)
            else:
                h = block(h, cos, sin, *others)
        return h

    def matmul_parameters(self) -> int:
        """Parameters that multiply a token (ModelConfig.matmul_parameters)."""
        return self.config.matmul_parameters()

    def flops_per_token(self, length: int) -> float:
        """FLOPs to train on one token of a sequence of `length` (ModelConfig.flops_per_token)."""
        return self.config.flops_per_token(length)

    def fresh(self, config: ModelConfig) -> "Transformer":
        """A new model of the same architecture, with sizes of its own."""
        return type(self)(config, self.dtype)


def predecessors(h: Tensor, before: Tensor, documents: Tensor | None,
                 positions: Tensor | None) -> Tensor:
    """The embedding of the token before each, (B, T, D); 0 for the first of a document.

    With it in the residual stream one attention layer can find "what followed this word last
    time", which otherwise takes two and many more training tokens ("smeared keys" in Olsson et al.
    2022, token shift in Peng et al. 2023). before: (B, 1, D), the embedding before the first.
    """
    previous = torch.cat([before, h[:, :-1]], dim=1)
    if documents is not None:
        # (B, T): whether the token before is of the same document; False at the first
        same = F.pad(documents[:, 1:] == documents[:, :-1], (1, 0))
        previous = previous * same[..., None]
    elif positions is not None:                        # without documents 0 marks their beginnings
        previous = previous * (positions > 0)[..., None]
    return previous


def rope_frequencies(config: ModelConfig) -> Tensor:
    """theta^(-2i/C) for i < C/2: radians per position (001 section 1.3, alpha_i). Channel i turns
    with channel i + C/2 (rotating halves, as Llama checkpoints do).

    With rope_factor s, as Llama 3.1 has it: of the frequencies that turn less than once in
    ROPE_ORIGINAL tokens an s-th, of those that turn more than 4 times all, between them a mixture.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.d_head, 2) / config.d_head)
    if config.rope_factor == 1:
        return frequencies
    turns = ROPE_ORIGINAL * frequencies / (2 * math.pi)
    kept = ((turns - 1) / (4 - 1)).clamp(0, 1)         # 1: this channel stays as it is
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


def parameter_count(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def active_parameter_count(model: Transformer) -> int:
    """Parameters that work on one token: all, less the experts that it does not visit."""
    config = model.config
    one_expert = 3 * config.d_model * config.d_expert
    n_idle = config.n_experts - config.top_k
    return parameter_count(model) - len(moe.sparse_layers(model)) * n_idle * one_expert
