"""
How fast we are beside what others use, measured in one run on this machine.

    python bench.py train                  # a training step of a 5.8M model; about 10 minutes
    python bench.py train --contenders lifecycle,nanogpt --modes eager --rounds 1
    python bench.py kernels                # every kernel beside its alternatives (kernels/bench.py)
    python bench.py generate               # 16 prompt tokens + 256 new ones, batch 1 and 16
    python bench.py tokenizer              # BPE on 10 MB of text, beside Hugging Face's in Rust

Every row is measured in fresh processes, alternated with the other rows over several rounds; the
table shows medians. Training: bf16 by autocast (ours: by the model's own casts), gradient clipping,
fused AdamW, random tokens. Contenders: Hugging Face's Llama (if transformers is installed), and our
own writing of the structure of nanoGPT's model (LayerNorm, learned positions, GELU) and of
minimind's (RMSNorm, rotary, SwiGLU, separate projections) and nanochat's (queries and keys
normalised, squared ReLU, bounded logits), each with the loss as its code has it.
After the table one JSON line per row; our own rows are named "lifecycle".
"""
import dataclasses
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import readers
from model import ModelConfig, Transformer
from sample import generate
from tokenizer import N_SPECIAL, PATTERN, train_bpe
from plumbing.optimizers import adamw
from plumbing.options import parse
from plumbing.run import DTYPES, pick_device

CONTENDERS = {"train": ("hf_llama", "nanogpt", "minimind", "nanochat", "lifecycle"),
              "generate": ("hf_llama", "nanogpt", "lifecycle"),
              "tokenizer": ("hf_tokenizers", "lifecycle")}
NEEDS = {"hf_llama": "transformers", "hf_tokenizers": "tokenizers"}
FIGURES = {"train": ("tokens_per_s", "ms_per_step"), "generate": ("tokens_per_s", "ms_per_step"),
           "tokenizer": ("mb_per_s", "seconds")}               # a speed and a time
BATCH_SIZES = {"train": [16], "generate": [1, 16], "tokenizer": [1]}


@dataclass
class Config:
    d_model: int = 256                # model width
    n_layers: int = 6
    n_heads: int = 8
    vocab_size: int = 4096
    context_length: int = 256         # train: tokens per row
    batch_size: int = 0               # rows; 0: 16 for train, both 1 and 16 for generate
    new_tokens: int = 256             # generate: tokens after a prompt of 16
    dtype: str = "bfloat16"           # bfloat16 | float32 | float16 (GPU)
    device: str = "auto"              # auto | cpu | cuda
    modes: str = "eager,compile"      # train: comma-separated; generate is eager
    contenders: str = "all"           # comma-separated: hf_llama, nanogpt, nanochat, lifecycle ...
    data: str = "world"               # tokenizer: text, as for train_pretrain.py; 10 MB of it
    rounds: int = 3                   # fresh processes per row
    steps: int = 10                   # train: timed steps per process; generate: one generation


# ---------------------------------------------------------------------- the others' models

class NanoGPT(nn.Module):
    """The structure of nanoGPT's model.py: pre-LayerNorm, one projection for q, k, v, GELU MLP."""

    class Block(nn.Module):
        def __init__(self, D: int, H: int):
            super().__init__()
            self.H = H
            self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            B, T, D = x.shape
            q, k, v = (y.view(B, T, self.H, D // self.H).transpose(1, 2)
                       for y in self.qkv(self.norm1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.d_model
        self.tokens = nn.Embedding(cfg.vocab_size, D)
        self.positions = nn.Embedding(cfg.context_length, D)
        self.blocks = nn.ModuleList(self.Block(D, cfg.n_heads) for _ in range(cfg.n_layers))
        self.norm = nn.LayerNorm(D, bias=False)
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(small_init)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, -1:])
        logits = self.head(x)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


class MiniMind(nn.Module):
    """The structure of minimind's model: RMSNorm, rotary halves, SwiGLU, all projections apart."""

    class Norm(nn.Module):
        def __init__(self, D: int):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return (self.weight * wide).type_as(x)

    class Block(nn.Module):
        def __init__(self, D: int, H: int, width: int):
            super().__init__()
            self.H = H
            self.norm1, self.norm2 = MiniMind.Norm(D), MiniMind.Norm(D)
            self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(D, width, bias=False) for _ in range(2))
            self.down = nn.Linear(width, D, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            B, T, D = x.shape
            y = self.norm1(x)
            q, k, v = (w(y).view(B, T, self.H, D // self.H) for w in (self.q, self.k, self.v))

            def rotate(y):
                half = y.shape[-1] // 2
                return y * cos + torch.cat((-y[..., half:], y[..., :half]), dim=-1) * sin
            q, k, v = (y.transpose(1, 2) for y in (rotate(q), rotate(k), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
            y = self.norm2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def __init__(self, cfg: Config):
        super().__init__()
        D, C = cfg.d_model, cfg.d_model // cfg.n_heads
        width = ModelConfig(cfg.vocab_size, d_model=D, n_heads=cfg.n_heads).d_ff
        self.tokens = nn.Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(self.Block(D, cfg.n_heads, width) for _ in range(cfg.n_layers))
        self.norm = self.Norm(D)
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        angles = torch.outer(torch.arange(cfg.context_length),
                             10_000.0 ** (-torch.arange(0, C, 2) / C)).repeat(1, 2)[:, None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.apply(small_init)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:tokens.shape[1]], self.sin[:tokens.shape[1]])
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


class NanoChat(nn.Module):
    """The structure of nanochat's first model: norms without weights, also of the embedding and of
    queries and keys; rotary halves, squared ReLU, a head of its own, logits bounded by 15."""

    class Block(nn.Module):
        def __init__(self, D: int, H: int):
            super().__init__()
            self.H = H
            self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
            self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            B, T, D = x.shape
            y = unit_norm(x)
            q, k, v = (w(y).view(B, T, self.H, D // self.H) for w in (self.q, self.k, self.v))

            def rotate(y):
                a, b = y.chunk(2, dim=-1)
                return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(y.dtype)
            q, k, v = (y.transpose(1, 2) for y in (unit_norm(rotate(q)), unit_norm(rotate(k)), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.relu(self.up(unit_norm(x))).square())

    def __init__(self, cfg: Config):
        super().__init__()
        D, C = cfg.d_model, cfg.d_model // cfg.n_heads
        self.tokens = nn.Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(self.Block(D, cfg.n_heads) for _ in range(cfg.n_layers))
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        angles = torch.outer(torch.arange(cfg.context_length),
                             10_000.0 ** (-torch.arange(0, C, 2) / C))[:, None]
        dtype = DTYPES[cfg.dtype]
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))
        self.apply(small_init)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = unit_norm(self.tokens(tokens))
        for block in self.blocks:
            x = block(x, self.cos[:tokens.shape[1]], self.sin[:tokens.shape[1]])
        logits = 15 * torch.tanh(self.head(unit_norm(x)) / 15)
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))


def unit_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def small_init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def hf_llama(cfg: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    width = ModelConfig(cfg.vocab_size, d_model=cfg.d_model, n_heads=cfg.n_heads).d_ff
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=width,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, tie_word_embeddings=True,
        max_position_embeddings=max(cfg.context_length, 16 + cfg.new_tokens), use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0))


def lifecycle(cfg: Config, context_length: int) -> Transformer:
    return Transformer(ModelConfig(cfg.vocab_size, context_length, cfg.d_model, cfg.n_layers,
                                   cfg.n_heads), DTYPES[cfg.dtype])


# ---------------------------------------------------------------------- one measurement

def train_row(cfg: Config, name: str, mode: str) -> dict:
    """Median time of a training step, in this process."""
    device = pick_device(cfg.device)
    if name == "lifecycle":
        kernels.keep_memory()                              # the others: as their code does
    model = {"hf_llama": lambda: hf_llama(cfg), "nanogpt": lambda: NanoGPT(cfg),
             "minimind": lambda: MiniMind(cfg), "nanochat": lambda: NanoChat(cfg),
             "lifecycle": lambda: lifecycle(cfg, cfg.context_length)}[name]().to(device)
    optimizer = adamw(model, lr=3e-4, weight_decay=0.1)
    call = model.logps if name == "lifecycle" else model
    if mode == "compile":
        call = torch.compile(call)
    autocast = torch.autocast(device.type, DTYPES[cfg.dtype],
                              enabled=cfg.dtype != "float32" and name != "lifecycle")
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.context_length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with autocast:
            if name == "lifecycle":
                loss = -call(inputs, targets).mean()
            elif name == "hf_llama":                       # shifts by itself: same tokens per step
                loss = call(input_ids=inputs, labels=inputs).loss
            else:
                loss = call(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    ms = 1e3 * median_time(step, warmup=4, repeats=cfg.steps)
    return {"tokens_per_s": inputs.numel() / ms * 1e3, "ms_per_step": ms}


def generate_row(cfg: Config, name: str, mode: str) -> dict:
    """Median time of a whole generation (greedy, no stop token), in this process."""
    device, dtype = pick_device(cfg.device), DTYPES[cfg.dtype]
    length = 16 + cfg.new_tokens
    prompts = torch.randint(1, cfg.vocab_size, (cfg.batch_size, 16), device=device)
    if name == "lifecycle":
        kernels.keep_memory()                              # the others: as their code does
        model = lifecycle(cfg, length).to(device)

        def run() -> None:
            generate(model, prompts.tolist(), cfg.new_tokens)
    elif name == "hf_llama":
        model = hf_llama(cfg).to(device, dtype)

        def run() -> None:
            model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                           min_new_tokens=cfg.new_tokens, max_new_tokens=cfg.new_tokens,
                           use_cache=True)
    else:
        model = NanoGPT(dataclasses.replace(cfg, context_length=length)).to(device, dtype)

        def run() -> None:
            tokens = prompts
            with torch.no_grad():
                for _ in range(cfg.new_tokens):
                    tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    model.eval()
    seconds = median_time(run, warmup=int(name != "nanogpt"), repeats=1)   # it takes a minute
    return {"tokens_per_s": cfg.batch_size * cfg.new_tokens / seconds,
            "ms_per_step": 1e3 * seconds / cfg.new_tokens}


def tokenizer_row(cfg: Config, name: str, mode: str) -> dict:
    """Time to learn cfg.vocab_size tokens from 10 MB, one string, as those who time it have it."""
    text = "".join(readers.read_documents(cfg.data, 10_000_000))
    if name == "lifecycle":
        def run() -> None:
            train_bpe([text], cfg.vocab_size)
    else:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
        rust = Tokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = trainers.BpeTrainer(
            vocab_size=cfg.vocab_size - N_SPECIAL, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

        def run() -> None:
            rust.train_from_iterator([text], trainer)
    seconds = median_time(run, warmup=0, repeats=1)
    return {"mb_per_s": len(text.encode()) / 1e6 / seconds, "seconds": seconds}


def median_time(call, warmup: int, repeats: int) -> float:
    """Seconds per call, median. On a GPU the clock stops when the work is done."""
    def timed() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start
    for _ in range(warmup):
        timed()
    return statistics.median(timed() for _ in range(repeats))


def measure(bench: str, cfg: Config, name: str, mode: str) -> dict:
    """One row in a fresh process. Raises RuntimeError with its output if that fails."""
    spec = json.dumps([bench, dataclasses.asdict(cfg), name, mode])
    done = subprocess.run([sys.executable, __file__, "--worker", spec], capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError(f"{bench} {name} {mode} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(bench: str, cfg: dict, name: str, mode: str) -> None:
    torch.manual_seed(0)
    rows = {"train": train_row, "generate": generate_row, "tokenizer": tokenizer_row}
    row = rows[bench](Config(**cfg), name, mode)
    peak_mb = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps(row | {"peak_mb": peak_mb}))


# ---------------------------------------------------------------------- the table

def main(bench: str, cfg: Config) -> list[dict]:
    """Measure every row `rounds` times, alternating; print the table and the JSON lines."""
    names = CONTENDERS[bench] if cfg.contenders == "all" else cfg.contenders.split(",")
    if unknown := set(names) - set(CONTENDERS[bench]):
        raise ValueError(f"--contenders {','.join(unknown)}: {bench} knows "
                         f"{', '.join(CONTENDERS[bench])}")
    missing = [name for name in names
               if name in NEEDS and not importlib.util.find_spec(NEEDS[name])]
    for name in missing:
        print(f"{name} is left out: {NEEDS[name]} is not installed")
    names = [name for name in names if name not in missing]
    modes = cfg.modes.split(",") if bench == "train" else ["eager"]
    sizes = [cfg.batch_size] if cfg.batch_size else BATCH_SIZES[bench]
    keys = [(name, mode, size) for size in sizes for mode in modes for name in names]
    results: dict = {key: [] for key in keys}
    speed, time_taken = FIGURES[bench]
    for done in range(cfg.rounds):
        for name, mode, size in keys:
            row = measure(bench, dataclasses.replace(cfg, batch_size=size), name, mode)
            results[name, mode, size].append(row)
            print(f"round {done + 1}/{cfg.rounds}: {name} {mode} batch {size}: "
                  f"{row[speed]:.1f} {speed}", file=sys.stderr, flush=True)
    rows = [{"bench": bench, "name": name, "mode": mode, "dtype": cfg.dtype, "batch_size": size}
            | {figure: statistics.median(row[figure] for row in results[name, mode, size])
               for figure in (speed, time_taken, "peak_mb")}
            for name, mode, size in keys]
    print(f"{'':13} {'mode':8} {'batch':>5} {speed:>12} {time_taken:>11} {'peak MB':>8}  "
          "lifecycle is")
    for row in rows:
        ours = [other[speed] for other in rows if other["name"] == "lifecycle"
                and all(other[key] == row[key] for key in ("mode", "batch_size"))]
        ratio = f"{ours[0] / row[speed]:.2f}x" if ours else ""
        print(f"{row['name']:13} {row['mode']:8} {row['batch_size']:5} {row[speed]:12.1f} "
              f"{row[time_taken]:11.1f} {row['peak_mb']:8.0f}  {ratio}")
    for row in rows:
        print(json.dumps(row))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    elif sys.argv[1:2] and sys.argv[1] in (*CONTENDERS, "kernels"):
        try:
            if sys.argv[1] == "kernels":
                import kernels.bench
                kernels.bench.main(kernels.bench.parse(sys.argv[2:]))
            else:
                main(sys.argv[1], parse(Config, sys.argv[2:], __doc__))
        except ValueError as error:
            sys.exit(f"bench.py: {error}")
    else:
        sys.exit(f"{__doc__}\nfirst argument: {', '.join(CONTENDERS)} or kernels")
