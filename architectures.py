"""
Three more architectures of model.py's block, by who sees whom (004); the decoder is model.py's.

    encoder           every token sees all others (BERT): fills in, cannot write
    prefix            a prefix sees all of itself, the tokens after it look back (UL2's other form)
    encoder_decoder   one stack reads a source, another writes and looks at it (T5):

        h <- h + Attention(RMSNorm(h))         what was written so far, causal
        h <- h + Attention(RMSNorm(h), m)      m: the states that the encoder made of the source
        h <- h + SwiGLU(RMSNorm(h))

    model = ARCHITECTURES["encoder_decoder"](config)
    logps = model.logps(tokens, targets, source=source, source_lengths=lengths)

Shapes as in model.py; S tokens of a source.
"""
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model import (
    Attention,
    Block,
    KVCache,
    Linear,
    ModelConfig,
    RMSNorm,
    Transformer,
    predecessors,
)
from tokenizer import Tokenizer


def successors(h: Tensor, documents: Tensor | None) -> Tensor:
    """The embedding of the token after each, (B, T, D); 0 for the last of a document. A hidden
    word can then be told from either side of it."""
    following = F.pad(h[:, 1:], (0, 0, 0, 1))          # 0 behind the last token
    if documents is not None:
        # (B, T): whether the token after is of the same document; False at the last
        same = F.pad(documents[:, 1:] == documents[:, :-1], (0, 1))
        following = following * same[..., None]
    return following


def embed_both_ways(model: Transformer, tokens: Tensor, documents: Tensor | None,
                    positions: Tensor | None = None) -> Tensor:
    """Transformer.embed for a stack that sees what comes next: with token shift each token also
    gets the embedding of its successor. (B, T) -> (B, T, D)."""
    h = model.embedding(tokens).to(model.dtype)
    if model.config.token_shift:
        before = torch.zeros_like(h[:, -1:])           # (B, 1, D): no token before the first
        neighbours = model.shift(predecessors(h, before, documents, positions))
        neighbours = neighbours + model.shift_back(successors(h, documents))
        h = h + neighbours                             # all three (B, T, D)
    return h


def register_last(model: nn.Module, name: str) -> None:
    """Put a module, if there is one of this name, behind those registered so far: checkpoints
    number an optimizer's parameters in the order of registration, which must not change."""
    module = getattr(model, name, None)
    if module is not None:
        delattr(model, name)
        setattr(model, name, module)


# ---------------------------------------------------------------------- encoder

class Encoder(Transformer):
    """n_segments: how many kinds of segments have an embedding of their own (BERT's sentence pairs
    have 2); 0: none."""
    architecture = "encoder"

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32,
                 n_segments: int = 0):
        super().__init__(config, dtype)
        self.n_segments = n_segments
        if n_segments:
            self.segment_embedding = nn.Embedding(n_segments, config.d_model)
            nn.init.normal_(self.segment_embedding.weight, std=0.02)
        register_last(self, "shift")
        if config.token_shift:
            self.shift_back = Linear(config.d_model, config.d_model)
            nn.init.normal_(self.shift_back.weight, std=config.d_model ** -0.5)
        register_last(self, "lm_head")

    def hidden(self, tokens: Tensor, documents: Tensor | None = None,
               positions: Tensor | None = None, cache: KVCache | None = None,
               segments: Tensor | None = None) -> Tensor:
        """segments: (B, T) numbers below n_segments. A cache raises ValueError."""
        if cache is not None:
            raise ValueError("this model is an encoder: each of its tokens sees those after it, so "
                             "it cannot generate")
        T = tokens.shape[1]
        self.check(T)
        h = embed_both_ways(self, tokens, documents, positions)        # (B, T, D)
        if segments is not None:                       # an embedding of the segment, as BERT's
            h = h + F.embedding(segments, self.segment_embedding.weight).to(h.dtype)
        mask = self.mask(h, T, causal=False, documents=documents)
        h = self.run_blocks(self.blocks, h, positions, mask, documents)
        return self.norm(h)

    def forward(self, tokens: Tensor, documents: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None,
                segments: Tensor | None = None) -> Tensor:
        return self.logits_of(self.hidden(tokens, documents, positions, cache, segments))

    def logps(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None,
              documents: Tensor | None = None, positions: Tensor | None = None,
              temperature: float = 1.0, with_entropy: bool = False,
              segments: Tensor | None = None):
        h = self.hidden(tokens, documents, positions, segments=segments)
        return self.logps_of(h, targets, loss_mask, temperature, with_entropy)

    def matmul_parameters(self) -> int:
        """Token shift has a second matrix, for successors."""
        shift_back = self.config.d_model ** 2 if self.config.token_shift else 0
        return self.config.matmul_parameters() + shift_back

    def flops_per_token(self, length: int) -> float:
        """As ModelConfig.flops_per_token, but a token sees all `length` tokens."""
        # a token sees all others, not half of them as a decoder's does on average
        attended = length * self.config.n_layers * self.config.d_model
        return 6 * self.matmul_parameters() + 12 * attended

    def fresh(self, config: ModelConfig) -> "Encoder":
        return Encoder(config, self.dtype, self.n_segments)


# ---------------------------------------------------------------------- prefix model

class PrefixModel(Transformer):
    """A decoder whose first tokens see each other both ways. Its weights are those of a decoder;
    while it generates, the prompt is the prefix."""
    architecture = "prefix"

    def hidden(self, tokens: Tensor, documents: Tensor | None = None,
               positions: Tensor | None = None, cache: KVCache | None = None,
               prefix: Tensor | None = None) -> Tensor:
        """prefix: (B,) how many tokens see each other both ways."""
        if cache is not None:
            cache.causal = cache.length > 0            # the first tokens are the prompt
            return super().hidden(tokens, documents, positions, cache)
        T = tokens.shape[1]
        self.check(T)
        h = self.embed(tokens, documents, positions)
        mask = self.mask(h, T, documents=documents, prefix=prefix)
        h = self.run_blocks(self.blocks, h, positions, mask, documents)
        return self.norm(h)

    def forward(self, tokens: Tensor, documents: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None,
                prefix: Tensor | None = None) -> Tensor:
        h = self.hidden(tokens, documents, positions, cache, prefix)
        if cache is not None:
            h = h[:, -1:]
        return self.logits_of(h)

    def logps(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None,
              documents: Tensor | None = None, positions: Tensor | None = None,
              temperature: float = 1.0, with_entropy: bool = False,
              prefix: Tensor | None = None):
        h = self.hidden(tokens, documents, positions, prefix=prefix)
        return self.logps_of(h, targets, loss_mask, temperature, with_entropy)


# ---------------------------------------------------------------------- encoder and decoder

class SourceCache(KVCache):
    """A KVCache that also holds the keys and values of the source, which all new tokens share.
    The first forward pass is given the source and fills it; later ones read it here."""

    def __init__(self, config: ModelConfig, starts: Tensor, capacity: int, dtype: torch.dtype):
        super().__init__(config, starts, capacity, dtype)
        self.source: dict[int, tuple[Tensor, Tensor]] = {}     # layer -> k, v (B, S, K, C)
        self.source_lengths: Tensor | None = None              # (B,)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.source = {layer: (k[rows], v[rows]) for layer, (k, v) in self.source.items()}
        self.source_lengths = self.source_lengths[rows]


class CrossAttention(Attention):
    """Queries of the text being written, keys and values of the source. No RoPE: the two texts do
    not share a line of positions, and the encoder has put the source's into its states."""

    def forward(self, x: Tensor, source: Tensor | None, mask: kernels.Mask,
                cache: SourceCache | None = None) -> Tensor:
        """x (B, T, D), source (B, S, D), or None where the cache has it."""
        q = self.queries(x)                                            # (B, T, H, C)
        if source is None:
            k, v = cache.source[self.layer]            # (B, S, K, C), made by the first pass
        else:
            k, v = self.keys_and_values(source)                        # (B, S, K, C)
            if cache is not None:
                cache.source[self.layer] = k, v
        return self.wo(kernels.attention(q, k, v, mask).flatten(-2))


class WritingBlock(Block):
    """A decoder's block that also looks at the source."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.cross_norm = RMSNorm(config.d_model, config.norm_eps)
        self.cross_attention = CrossAttention(config, layer)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: kernels.Mask | None,
                documents: Tensor | None, cache: SourceCache | None, source: Tensor | None,
                source_mask: kernels.Mask) -> Tensor:
        change = self.attention(self.attention_norm(h), cos, sin, mask, cache)
        # h: the residual stream, x: the same normalised, both (B, T, D)
        h, x = kernels.add_rmsnorm(h, change, self.cross_norm.weight, self.cross_norm.eps)
        change = self.cross_attention(x, source, source_mask, cache)
        h, x = kernels.add_rmsnorm(h, change, self.mlp_norm.weight, self.mlp_norm.eps)
        if self.sparse:
            return h + self.mlp(x, documents)
        return h + self.mlp(x)


class EncoderDecoder(Transformer):
    architecture = "encoder_decoder"

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype)
        layers = range(config.n_layers)
        # in the place of the decoder's blocks, which lack cross-attention
        self.blocks = nn.ModuleList(WritingBlock(config, layer) for layer in layers)
        self.encoder = nn.ModuleList(Block(config, layer) for layer in layers)
        self.encoder_norm = RMSNorm(config.d_model, config.norm_eps)
        register_last(self, "shift")
        if config.token_shift:
            self.shift_back = Linear(config.d_model, config.d_model)
        register_last(self, "lm_head")
        self.initialize()                              # anew, with the modules added here

    def hidden(self, tokens: Tensor, documents: Tensor | None = None,
               positions: Tensor | None = None, cache: SourceCache | None = None,
               source: Tensor | None = None, source_lengths: Tensor | None = None) -> Tensor:
        """source: (B, S) ids, right-padded to source_lengths (B,); with a cache only at first."""
        if source is None and not (cache is not None and cache.source):
            raise ValueError("an encoder_decoder reads a source and other models do not: "
                             "architecture is encoder_decoder, source is missing")
        T = tokens.shape[1]
        past = 0 if cache is None else cache.length
        self.check(past + T, cache)
        if cache is not None:
            positions = cache.positions(T)
        h = self.embed(tokens, documents, positions, cache)            # (B, T, D)
        # who sees whom among the tokens being written; a cache knows by itself
        mask = self.mask(h, T, documents=documents) if cache is None else None
        states = None
        if source is not None:
            states = self.encode(source, source_lengths).to(h.dtype)   # (B, S, D)
            n_source = source.shape[1]
            if cache is not None:
                cache.source_lengths = source_lengths
        else:
            n_source = cache.source[0][0].shape[1]     # of the keys (B, S, K, C) of layer 0
            source_lengths = cache.source_lengths
        # all of a source but its padding, for every token being written
        source_mask = self.mask(h, n_source, causal=False, lengths=source_lengths)
        h = self.run_blocks(self.blocks, h, positions, mask, documents, cache, states, source_mask)
        if cache is not None:
            cache.length += T
        return self.norm(h)

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """source (B, S), right-padded to its lengths (B,) -> (B, S, D)."""
        S = source.shape[1]
        if S > self.config.context_length:
            raise ValueError(f"a source of {S} tokens, but the model's context_length is "
                             f"{self.config.context_length}")
        padding = torch.arange(S, device=source.device) >= lengths[:, None]
        documents = -padding.int()                     # (B, S): the source is 0, its padding -1
        h = embed_both_ways(self, source, documents)
        mask = self.mask(h, S, causal=False, documents=documents)
        return self.encoder_norm(self.run_blocks(self.encoder, h, None, mask, documents))

    def forward(self, tokens: Tensor, documents: Tensor | None = None,
                positions: Tensor | None = None, cache: SourceCache | None = None,
                source: Tensor | None = None, source_lengths: Tensor | None = None) -> Tensor:
        h = self.hidden(tokens, documents, positions, cache, source, source_lengths)
        if cache is not None:
            h = h[:, -1:]
        return self.logits_of(h)

    def logps(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None,
              documents: Tensor | None = None, positions: Tensor | None = None,
              temperature: float = 1.0, with_entropy: bool = False,
              source: Tensor | None = None, source_lengths: Tensor | None = None):
        h = self.hidden(tokens, documents, positions, None, source, source_lengths)
        return self.logps_of(h, targets, loss_mask, temperature, with_entropy)

    def matmul_parameters(self) -> int:
        """Those of one token in each of the two stacks."""
        config = self.config
        cross_attention = config.n_layers * config.attention_parameters()
        # both stacks shift from the left, the encoder also from the right
        shift = 3 * config.d_model ** 2 if config.token_shift else 0
        output = config.d_model * config.vocab_size    # only the decoder predicts words
        return 2 * config.block_parameters() + cross_attention + shift + output

    def flops_per_token(self, length: int) -> float:
        """For one token in each of the two stacks, both of `length`: it sees all of the source
        twice (encoder, cross-attention) and half of what is written."""
        attended = 2.5 * length * self.config.n_layers * self.config.d_model
        return 6 * self.matmul_parameters() + 12 * attended


ARCHITECTURES = {"decoder": Transformer, "encoder": Encoder, "prefix": PrefixModel,
                 "encoder_decoder": EncoderDecoder}


def with_encoder(decoder: Transformer) -> EncoderDecoder:
    """An encoder_decoder whose two stacks both begin as the decoder's (Rothe et al. 2020). At first
    it writes what the decoder would: its cross-attention is new and adds nothing yet, and neither
    do the successors that its encoder sees."""
    model = EncoderDecoder(dataclasses.replace(decoder.config), decoder.dtype).to(decoder.device)
    weights = decoder.state_dict()
    model.load_state_dict(weights, strict=False)       # all but the encoder and cross-attention
    model.encoder.load_state_dict(decoder.blocks.state_dict())
    model.encoder_norm.load_state_dict(decoder.norm.state_dict())
    if decoder.config.token_shift:
        nn.init.zeros_(model.shift_back.weight)        # the decoder has never seen a successor
    return model


def extend_vocabulary(model: Transformer, old: Tokenizer, new: Tokenizer) -> Transformer:
    """The same model for a tokenizer with more tokens. Those of the old one keep their embeddings;
    a new word starts at the mean of those of its pieces, a new special token near the mean of all.

    Raises ValueError when `new` lacks a token of `old`, reserved ones excepted.
    """
    new_ids = new.ranks | new.special
    # old id -> new id; None for a token that the new tokenizer does not have
    moves = {old.special[name]: new_ids.get(name) for name in old.named}
    for token, i in old.ranks.items():
        moves[i] = new_ids.get(token)
    missing = [i for i, j in moves.items() if j is None]
    if missing:
        raise ValueError(f"the new tokenizer lacks {len(missing)} tokens of the model, for example "
                         f"{old.decode(missing[:1], specials=True)!r}; extend the model's own")
    config = dataclasses.replace(model.config, vocab_size=new.vocab_size)
    extended = model.fresh(config).to(model.device)
    weights = model.state_dict()
    taken = set(moves.values())
    for name in ("embedding.weight", "lm_head.weight"):
        if name not in weights:                        # tied models have no lm_head
            continue
        rows = weights[name]                           # (V_old, D)
        # noise of the usual size, because equal embeddings would stay equal for long
        table = rows.mean(0) + 0.02 * torch.randn_like(extended.embedding.weight)
        table[list(moves.values())] = rows[list(moves.keys())]
        for token, i in new.ranks.items():
            if i not in taken:                         # a new word, of pieces that the old one had
                table[i] = rows[old.pieces(token)].mean(0)
        weights[name] = table
    extended.load_state_dict(weights)
    return extended
