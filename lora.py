"""
Parameter-efficient fine-tuning (001 section 2.4): the base stands still, and few numbers learn.

  lora              h = W_0 x + (alpha / r) B A x      A (r, d_in) random, B (d_out, r) zero
  qlora             the same, W_0 in 4 bits (kernels/nf4.py)
  adapter           h + f(h W_down) W_up               h: what attention, what the MLP gives
  parallel_adapter  h + f(x W_down) W_up               x: what they are given
  prefix            keys and values of L_p virtual tokens, in each layer
  prompt            embeddings of L_p virtual tokens

Sources: Hu et al. 2021 (2.4.1), Dettmers et al. 2023 (2.4.2), Houlsby et al. 2019 (2.4.3), He et
al. 2022 (004), Li and Liang 2021 (2.4.4), Lester et al. 2021 (003). The first four begin as their
base, because B and W_up are zero.

    attach(model, Options(peft="adapter"))     # in place; the base is frozen
    merge(model)                               # lora, qlora: W_0 + (alpha / r) B A, plain again
    detach(model)                              # the base as it was
    save_adapter(folder, model)                # what was learned, alone
    load_adapter(model, folder)                # in the place of another

What --out holds: with lora the merged model, and the adapter alone beside it; else the adapter
alone, with path and checksum of its base, which every --init opens.

    python train_sft.py --peft lora --lora_rank 16 --lora_targets wq,wv
    python train_dpo.py --peft qlora           # pi_ref is the base with the adapters off
    python lora.py --init out/pretrain --adapter out/sft --out out/merged      # merge by hand
"""
import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model import Linear, Transformer
from tokenizer import N_SPECIAL, Tokenizer

LORA = ("lora", "qlora")
BOTTLENECKS = ("adapter", "parallel_adapter")
VIRTUAL = ("prefix", "prompt")
# {option: the methods that read it}
READ_BY = {"lora_rank": LORA, "lora_alpha": LORA, "lora_sqrt": LORA, "lora_targets": LORA,
           "lora_layers": LORA, "lora_dropout": LORA, "nf4_double": ("qlora",),
           "bottleneck": BOTTLENECKS, "virtual_tokens": VIRTUAL, "prefix_mlp": ("prefix",),
           "template": LORA + BOTTLENECKS + VIRTUAL}


@dataclass
class Options:
    """What learns of the model that --init names, in every stage after pretraining."""
    peft: str = "none"         # none | lora | qlora | adapter | parallel_adapter | prefix | prompt
    lora_rank: int = 16               # lora, qlora: r, >= 1
    lora_alpha: float = 32.0          # lora, qlora: the change counts alpha / r times, > 0
    lora_sqrt: bool = False           # lora, qlora: or alpha / sqrt(r) times (Kalajdzievski 2023)
    lora_targets: str = "wq,wv"       # lora, qlora: with commas: wq, wk, wv, wo, w13, w2
    lora_layers: str = ""             # lora, qlora: in these blocks, with commas; empty: in all
    lora_dropout: float = 0.0         # lora, qlora: share of A's inputs left out, in [0, 1)
    nf4_double: bool = True           # qlora: quantize the constants of the quantization, too
    bottleneck: int = 16              # adapters: r, the width between W_down and W_up, >= 1
    virtual_tokens: int = 16          # prefix, prompt: L_p, of the context, >= 1
    prefix_mlp: int = 0               # prefix: made by an MLP so wide while it learns; 0: without
    template: bool = False            # embeddings of the template's tokens learn as well


# ---------------------------------------------------------------------- on, off

def attach(model: Transformer, options: Options) -> Transformer:
    """Put what --peft names on the model, in place, and freeze all else.

    Raises ValueError for a model that has adapters already, and for targets, layers or a rank that
    do not fit it.
    """
    if model.peft:
        raise ValueError(f"the model has learned by --peft {model.peft['peft']} already, which "
                         "cannot be merged; start from its base")
    if options.template:
        model.embedding = TemplateTokens(model.embedding)
        if not model.config.tied:
            model.lm_head = TemplateTokens(model.lm_head)
    if options.peft == "qlora":
        quantize(model, options.nf4_double)
    if options.peft in LORA:
        adapters = add_adapters(model, options)
        init_A(adapters)
        init_B(adapters)
    elif options.peft in BOTTLENECKS:
        add_bottlenecks(model, options)
    elif options.peft in VIRTUAL:
        add_virtual_tokens(model, options)
    freeze_base(model)
    model.peft = read_options(options)
    return model


def read_options(options: Options) -> dict:
    """--peft and the options that it reads, by name."""
    values = asdict(options)
    return {name: value for name, value in values.items()
            if name == "peft" or options.peft in READ_BY[name]}


def options_of(peft: dict) -> Options:
    """What read_options() gave, in adapter.json or config.json, where it may name a base."""
    return Options(**{name: value for name, value in peft.items() if name != "base"})


def n_virtual(model: Transformer) -> int:
    """How many virtual tokens each conversation of this model begins with."""
    return (model.peft or {}).get("virtual_tokens", 0)


def freeze_base(model: nn.Module) -> None:
    """Only what a method has put in learns (2.5, step 1.3)."""
    model.requires_grad_(False)                        # norms and embeddings, too
    own = learned_names(model)
    for name, weight in model.named_parameters():
        if name in own:
            weight.requires_grad_(True)


def learned_names(model: nn.Module) -> set[str]:
    """The names of the weights that a method has put in."""
    names = set()
    for path, module in model.named_modules():
        for name in getattr(module, "learns", ()):
            names.add(f"{path}.{name}".lstrip("."))
    return names


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a method has put in, by name."""
    names = learned_names(model)
    return {name: weight for name, weight in model.state_dict().items() if name in names}


def adapters_of(model: nn.Module) -> list[nn.Module]:
    """What stands in the place of a matrix, of a layer or of the embedding."""
    return [module for module in model.modules() if hasattr(module, "learns")]


def detach(model: Transformer) -> Transformer:
    """Remove all that a method has put in, in place: the base as it was, and trainable."""
    # lists, because the loop changes the modules that it walks through
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            while hasattr(child, "learns"):            # an embedding may have two around it
                child = child.base
            setattr(parent, name, child)
    model.peft = None
    return model.requires_grad_(True)


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """Fold lora's and qlora's matrices into the base's, in place: a plain, trainable model. A base
    in 4 bits comes back as what those stand for."""
    for parent, name, base in list(linears(model)):
        if isinstance(base, NF4Linear):
            setattr(parent, name, base.dense())
    for module in list(model.modules()):
        if isinstance(module, (LoRALinear, TemplateTokens)):
            module.base.weight.copy_(module.merged_weight())
    return detach(model)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base."""
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


# ---------------------------------------------------------------------- in a stage

def begin(model: Transformer, options: Options, run, tokenizer=None) -> None:
    """Attach what --peft names. tokenizer: where conversations may begin with virtual tokens.

    Raises ValueError where --peft does not go with the stage or its other options.
    """
    # imported here, because plumbing/ stands above this file
    from plumbing.options import refuse_unread
    refuse_unread(options, READ_BY, choice="peft")
    if options.peft == "none":
        return
    if options.peft in VIRTUAL and tokenizer is None:
        raise ValueError(f"--peft {options.peft}: only train_sft.py reads virtual tokens before a "
                         "text; here give lora, qlora or an adapter")
    if options.lora_dropout and tokenizer is None:
        raise ValueError(f"--lora_dropout {options.lora_dropout}: only train_sft.py learns with "
                         "dropout; leave it out")
    if options.peft in VIRTUAL and run.cfg.truncate == "left":
        raise ValueError(f"--truncate left: it would cut off the virtual tokens of --peft "
                         f"{options.peft}; give error or drop")
    if options.template and not isinstance(Tokenizer.load(run.cfg.init), Tokenizer):
        raise ValueError("--template: the template of a model from elsewhere has been learned "
                         "already, and its tokens stand anywhere; leave it out")
    run.also_writes("adapter.json", "adapter.safetensors")
    attach(model, options)
    if tokenizer is not None:
        tokenizer.n_virtual = n_virtual(model)


def end(model: Transformer, options: Options, run) -> None:
    """Save what was learned, alone; with lora merge it into the model (2.5, step 4)."""
    if options.peft == "none":
        return
    if options.peft == "prefix":
        settle(model)
    base = run.cfg.init
    model.peft["base"] = {"folder": base, "sha256": run.parents[base]}
    if run.rank == 0:
        save_adapter(run.out, model)
    if options.peft == "lora":
        merge(model)


def reference_of(model: Transformer, options: Options) -> nn.Module:
    """pi_ref: a frozen copy of the model, or with --peft its base, without a copy."""
    if options.peft == "none":
        return copy.deepcopy(model).requires_grad_(False)
    return Base(model)


class Base(nn.Module):
    """A model as it was before its adapters: its log-probs do not move while they learn."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.models = [model]                          # in a list, or its weights would count twice

    @torch.no_grad()
    def logps(self, *arguments, **options) -> Tensor:
        with adapters_off(self.models[0]):
            return self.models[0].logps(*arguments, **options)

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.models[0].dtype


# ---------------------------------------------------------------------- lora (2.4.1)

class LoRALinear(nn.Module):
    """A Linear without bias and its low-rank change. Its A is set by init_A; as long as B = 0 the
    second term is exactly 0, and the output is the base's bit for bit."""
    learns = ("A", "B")

    def __init__(self, base: nn.Module, rank: int, alpha: float, sqrt: bool = False,
                 dropout: float = 0.0):
        super().__init__()
        device = base.weight.device
        self.base = base                               # W_0, a Linear or an NF4Linear
        self.scale = alpha / rank ** 0.5 if sqrt else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.is_on = True                              # off: the base alone
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_on:
            return self.base(x)
        low = F.linear(self.dropout(x), self.A.to(x.dtype))    # (..., r): all that B sees of x
        return self.base(x) + self.scale * F.linear(low, self.B.to(x.dtype))

    def merged_weight(self) -> Tensor:
        """W_0 + (alpha / r) B A, fp32 (001 section 2.5, step 4)."""
        # (d_out, r) times (r, d_in): as large as W_0, but of rank r
        return self.base.weight + self.scale * self.B @ self.A


def add_adapters(model: Transformer, options: Options) -> list[LoRALinear]:
    """A LoRALinear in the place of every matrix named in --lora_targets, in the blocks that
    --lora_layers names. Returns them; their A is yet to be set (init_A).

    Raises ValueError for names, layers and ranks that the model does not have.
    """
    names = {name.strip() for name in options.lora_targets.split(",")}
    known = {name for _, name, _ in linears(model.blocks)}     # neither embedding nor lm_head
    unknown = sorted(names - known)
    if unknown:
        raise ValueError(f"--lora_targets: no matrix is called {', '.join(unknown)}; "
                         f"the model has {', '.join(sorted(known))}")
    places = []
    for layer in layers_of(model, options.lora_layers):
        for parent, name, base in linears(model.blocks[layer]):
            if name in names:
                places.append((parent, name, base))
    adapters = []
    for parent, name, base in places:
        full = min(base.in_features, base.out_features)
        if options.lora_rank > full:
            raise ValueError(f"--lora_rank {options.lora_rank}: {name} has rank {full} at most")
        adapter = LoRALinear(base, options.lora_rank, options.lora_alpha, options.lora_sqrt,
                             options.lora_dropout)
        setattr(parent, name, adapter)                 # blocks.0.attention.wq is the adapter now
        adapters.append(adapter)
    return adapters


def layers_of(model: Transformer, layers: str) -> list[int]:
    """ "0,2" -> [0, 2]; all blocks where it is empty. Raises ValueError for others."""
    n = len(model.blocks)
    if not layers:
        return list(range(n))
    found = []
    for word in layers.split(","):
        if not word.strip().isdecimal() or int(word) >= n:
            raise ValueError(f"--lora_layers {layers}: there is no block {word!r}; the model has "
                             f"0 to {n - 1}")
        found.append(int(word))
    return found


@torch.no_grad()
def init_A(adapters: list[LoRALinear]) -> None:
    """A ~ N(0, 1 / r^2): std 1 / r (001 section 2.5, step 1.1)."""
    for adapter in adapters:
        rank = adapter.A.shape[0]                      # A is (r, d_in)
        adapter.A.normal_(std=1 / rank)


@torch.no_grad()
def init_B(adapters: list[LoRALinear]) -> None:
    """B = 0 (step 1.2), so that training starts from the base model's outputs."""
    for adapter in adapters:
        adapter.B.zero_()


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(the module that it belongs to, its name there, the matrix) of every Linear."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (nn.Linear, NF4Linear)):
                yield parent, name, child


# ---------------------------------------------------------------------- qlora (2.4.2)

class NF4Linear(nn.Module):
    """x W^T with W in 4 bits. Gradients go through it to x; W is not kept in any other form."""

    def __init__(self, base: nn.Linear, double: bool):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        quantized = kernels.quantize_nf4(base.weight, double)
        # not saved, because they follow from the base's weights
        for name in ("codes", "absmax", "scale", "mean"):
            self.register_buffer(name, getattr(quantized, name), persistent=False)

    @property
    def quantized(self) -> kernels.NF4Weight:
        return kernels.NF4Weight(self.codes, self.absmax, self.scale, self.mean, self.in_features)

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in) fp32, made anew at each call."""
        return kernels.dequantize_nf4(self.quantized, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.nf4_linear(x, self.quantized)

    def dense(self) -> Linear:
        """A Linear of the numbers that the codes stand for."""
        with torch.device("meta"):
            linear = Linear(self.in_features, self.out_features)
        linear.weight = nn.Parameter(self.weight)
        return linear


def quantize(model: Transformer, double: bool = True) -> None:
    """All Linears of the blocks to NF4, in place; embedding, head, norms and experts stay."""
    for parent, name, base in list(linears(model.blocks)):
        if isinstance(base, nn.Linear):                # not one that is in 4 bits already
            setattr(parent, name, NF4Linear(base, double))


# ---------------------------------------------------------------------- adapters (2.4.3)

class Bottleneck(nn.Module):
    """A layer g and a small one: h + f(z W_down) W_up, h = g(x); z is h behind the layer, and x
    beside it. W_up = 0 at the start, so that it begins as g. f is GELU."""
    learns = ("down", "up")

    def __init__(self, base: nn.Module, d_model: int, r: int, is_parallel: bool,
                 device: torch.device):
        super().__init__()
        self.base = base
        self.is_parallel = is_parallel
        self.is_on = True                              # off: the base alone
        down = torch.randn(r, d_model, device=device) * d_model ** -0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(d_model, r, device=device))

    def forward(self, x: Tensor, *others) -> Tensor:
        h = self.base(x, *others)
        if not self.is_on:
            return h
        z = x if self.is_parallel else h
        low = F.gelu(F.linear(z, self.down.to(z.dtype)))       # (B, T, r)
        return h + F.linear(low, self.up.to(z.dtype))


def add_bottlenecks(model: Transformer, options: Options) -> None:
    """Two to a block: with its attention and with its MLP."""
    is_parallel = options.peft == "parallel_adapter"
    for block in model.blocks:
        for name in ("attention", "mlp"):
            layer = Bottleneck(getattr(block, name), model.config.d_model, options.bottleneck,
                               is_parallel, model.device)
            setattr(block, name, layer)


# ---------------------------------------------------------------------- the template's tokens

class TemplateTokens(nn.Module):
    """An embedding, or a projection to the vocabulary, whose rows of special tokens learn. A base
    has never seen <|user|> and <|end|>: what it takes as the end of an answer is as random as its
    initialization, and no change elsewhere makes <|end|> likely without making others likely."""
    learns = ("rows",)

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.is_on = True                              # off: the base alone
        # the last ones of a vocabulary (tokenizer.py)
        self.rows = nn.Parameter(base.weight[-N_SPECIAL:].detach().clone())

    @property
    def weight(self) -> Tensor:
        """(V, D)"""
        return self.merged_weight() if self.is_on else self.base.weight

    def merged_weight(self) -> Tensor:
        return torch.cat([self.base.weight[:-N_SPECIAL], self.rows])

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


# ---------------------------------------------------------------------- virtual tokens (2.4.4)

class VirtualTokens(nn.Module):
    """The embedding, and L_p more tokens, whose ids follow on the vocabulary's: V, V + 1, ... Each
    conversation begins with them (Tokenizer.n_virtual), so that places, masks and the KV cache know
    them as tokens; none is ever a target."""

    def __init__(self, base: nn.Embedding, n: int, is_learned: bool):
        super().__init__()
        self.base = base
        self.is_on = True                              # for adapters_off(); prompts hold them still
        V = len(base.weight)
        self.V = V
        # words of the vocabulary to begin with (Lester et al. 2021, section 3.2)
        words = base.weight[torch.randint(V, (n,), device=base.weight.device)].detach()
        self.vectors = nn.Parameter(words if is_learned else torch.zeros_like(words), is_learned)
        self.learns = ("vectors",) if is_learned else ()
        self.place = None                              # (B, T) of the last tokens: 0 .. L_p - 1,
        #                                                below 0 where a token is a real one

    def forward(self, tokens: Tensor) -> Tensor:
        self.place = tokens - self.V
        real = self.base(tokens.clamp(max=self.V - 1))
        return self.put(self.vectors, real)

    def put(self, vectors: Tensor, x: Tensor) -> Tensor:
        """x (B, T, n), at the virtual tokens of the last forward() the vectors (L_p, n)."""
        virtual = F.embedding(self.place.clamp(min=0), vectors)
        return torch.where((self.place >= 0)[..., None], virtual, x)

    @property
    def weight(self) -> Tensor:
        """(V, D), of the real tokens: the projection to the vocabulary, where it is tied."""
        return self.base.weight


class PrefixLinear(nn.Module):
    """W_k or W_v of a layer: at virtual tokens learned vectors in the place of W x."""

    def __init__(self, base: nn.Linear, tokens: VirtualTokens, mlp: int):
        super().__init__()
        self.base = base
        self.is_on = True
        self.tokens = [tokens]                         # in a list, or it would be a part of this
        n = len(tokens.vectors)
        # as far from each other as the keys and values of real tokens
        start = base(torch.randn(n, base.in_features, device=base.weight.device)).detach()
        self.learns = ("vectors",)
        self.vectors = nn.Parameter(start)
        if mlp:
            self.learns = ("vectors", "down", "up")
            width = start.shape[1]
            down = torch.randn(mlp, width, device=start.device) * width ** -0.5
            self.down = nn.Parameter(down)
            self.up = nn.Parameter(torch.zeros(width, mlp, device=start.device))

    def prefix(self) -> Tensor:
        """(L_p, K C) of the virtual tokens; with --prefix_mlp E + f(E W_down) W_up, which is easier
        to learn than E alone (Li and Liang 2021, section 4.3)."""
        if "up" not in self.learns:
            return self.vectors
        return self.vectors + F.linear(torch.tanh(F.linear(self.vectors, self.down)), self.up)

    def forward(self, x: Tensor) -> Tensor:
        [tokens] = self.tokens
        return tokens.put(self.prefix().to(x.dtype), self.base(x))


def add_virtual_tokens(model: Transformer, options: Options) -> None:
    """More tokens beside the embedding; for prefix with keys and values of their own."""
    if model.architecture != "decoder":
        raise ValueError(f"--peft {options.peft}: virtual tokens stand before what a decoder "
                         f"reads; this model is an {model.architecture}")
    tokens = VirtualTokens(model.embedding, options.virtual_tokens, options.peft == "prompt")
    model.embedding = tokens
    if options.peft == "prefix":
        for block in model.blocks:
            for name in ("wk", "wv"):
                base = getattr(block.attention, name)
                setattr(block.attention, name, PrefixLinear(base, tokens, options.prefix_mlp))


@torch.no_grad()
def settle(model: Transformer) -> None:
    """Keep the vectors that --prefix_mlp makes, and let go of the MLP."""
    for module in model.modules():
        if isinstance(module, PrefixLinear):
            module.vectors = nn.Parameter(module.prefix())
            if "up" in module.learns:
                del module.down, module.up
            module.learns = ("vectors",)
    model.peft["prefix_mlp"] = 0


# ---------------------------------------------------------------------- on the disk

def save_adapter(folder: str | Path, model: Transformer) -> None:
    """Write adapter.safetensors and adapter.json (--peft and its options, path and checksum of the
    base where they are known, checksum) into `folder`."""
    from plumbing.claim import sha256, write_whole
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in learned(model).items()}
    write_whole(folder / "adapter.safetensors",
                lambda temporary: safetensors.torch.save_file(weights, temporary))
    shape = model.peft | {"sha256": sha256(folder / "adapter.safetensors")}
    write_whole(folder / "adapter.json",
                lambda temporary: temporary.write_text(json.dumps(shape) + "\n"))


def load_adapter(model: Transformer, folder: str | Path, base: str | Path = "") -> Transformer:
    """Put the adapter saved in `folder` on `model`; one already there is swapped for it.

    base: the model's own folder. Raises ValueError when `folder` has no whole adapter, or one that
    was made on another base.
    """
    folder = Path(folder)
    peft, weights = read_adapter(folder)
    refuse_other_base(folder, peft, base)
    detach(model)
    in_4_bits = any(isinstance(module, NF4Linear) for module in model.modules())
    if in_4_bits and peft["peft"] != "qlora":
        raise ValueError(f"{folder}: its base is in full precision, and the model is in 4 bits "
                         "since another adapter; load the base anew")
    attach(model, options_of(peft))
    own = learned(model)                               # of the same names, if it fits
    for name in sorted(set(weights) | set(own)):
        found = shape_of(weights.get(name))
        wanted = shape_of(own.get(name))
        if found != wanted:
            raise ValueError(f"{folder}/adapter.safetensors: {name} is {found}, the model takes "
                             f"{wanted}; the adapter was made for another model")
    # not strict, because the base has no weights there; the loop above has compared all others
    model.load_state_dict(weights, strict=False)
    return model


def refuse_other_base(folder: Path, peft: dict, base: str | Path) -> None:
    from plumbing.claim import sha256
    if not base or "base" not in peft:                 # of a former version, or not asked
        return
    made_on = peft["base"]
    if sha256(Path(base) / "model.safetensors") != made_on["sha256"]:
        raise ValueError(f"{folder}: this adapter was made on {made_on['folder']}, and {base} has "
                         "other weights; give the model that it was made on")


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """adapter.json (--peft, its options and its base) and the weights by name."""
    from plumbing.claim import sha256
    from plumbing.options import check_values
    if not (folder / "adapter.json").is_file() or not (folder / "adapter.safetensors").is_file():
        raise ValueError(f"{folder}: no adapter.json and adapter.safetensors there; "
                         "train_sft.py --peft lora writes them")
    try:
        peft = json.loads((folder / "adapter.json").read_text())
        weights = safetensors.torch.load_file(folder / "adapter.safetensors")
        if "rank" in peft:                             # as a former version wrote it
            peft = {"peft": "lora", "lora_rank": peft.pop("rank"), "lora_alpha": peft.pop("alpha"),
                    "lora_targets": peft.pop("targets")} | peft
        known = peft.pop("sha256", None)
        check_values(Options, asdict(options_of(peft)))
        if "base" in peft and peft["base"].keys() != {"folder", "sha256"}:
            raise ValueError("its base must have a folder and a sha256")
    except Exception as error:
        raise ValueError(f"{folder}: adapter.json or adapter.safetensors is damaged ({error}); "
                         "train the adapter again") from error
    if known is None:
        print(f"{folder}: no checksums in its adapter.json; taken as it is", file=sys.stderr)
    elif known != sha256(folder / "adapter.safetensors"):
        raise ValueError(f"{folder}: adapter.safetensors is not what the run wrote (its checksum "
                         'differs); put that back, or, if the change is your own, remove "sha256" '
                         "from adapter.json")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{folder}/adapter.safetensors: {name} is not finite; train the "
                             "adapter again")
    return peft, weights


def shape_of(weight: Tensor | None) -> tuple | None:
    return None if weight is None else tuple(weight.shape)


# ---------------------------------------------------------------------- merging by hand

@dataclass
class Config:
    init: str = "out/pretrain"        # model folder of the base
    adapter: str = "out/sft"          # folder with adapter.safetensors
    out: str = "out/merged"           # model folder to write


def main(cfg: Config) -> None:
    # imported here, because plumbing/ stands above this file, and only this command needs it
    from plumbing import claim
    from plumbing.folders import load_model, save_model
    if Path(cfg.out).is_dir() and any(Path(cfg.out).iterdir()):
        raise ValueError(f"--out {cfg.out} is not empty; give another folder to write")
    model, tokenizer = load_model(cfg.init)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    load_adapter(model, cfg.adapter, cfg.init)
    method = model.peft["peft"]
    if method not in LORA:
        raise ValueError(f"{cfg.adapter}: what --peft {method} has learned is no change of a "
                         "matrix and cannot be merged; give the folder itself as --init")
    if method == "qlora":
        bare = merge(detach(copy.deepcopy(model))).state_dict()
        moved = {name: (bare[name] - w).norm() / w.norm() for name, w in weights.items()}
        print(f"in 4 bits the base's matrices differ by up to {max(moved.values()):.1%} of their "
              "norm from what they were; the merged model keeps that")
    merge(model)
    claim.lock(Path(cfg.out))
    save_model(cfg.out, model, tokenizer, stage="merge",
               parent={"folder": cfg.init, "adapter": cfg.adapter})
    claim.unlock(Path(cfg.out))
    print(f"{cfg.init} with the adapter of {cfg.adapter} merged: {cfg.out}")


if __name__ == "__main__":
    from plumbing.options import command_line
    command_line(main, Config, __doc__)
