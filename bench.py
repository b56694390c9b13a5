"""
How fast we are beside what others use, measured in one run on this machine.

    python bench.py train                  # a training step of a 5.8M model; about 10 minutes
    python bench.py train --quick          # one round of it, at most five minutes
    python bench.py train --contenders lifecycle,nanogpt --modes eager --rounds 1
    python bench.py kernels                # every kernel beside its alternatives (kernels/bench.py)
    python bench.py generate               # 16 prompt tokens + 256 new ones, batch 1 and 16
    python bench.py generate --init out/smollm2 --prompt_tokens 64 --new_tokens 128
    python bench.py lora                   # the same step, all weights and LoRA, beside peft's
    python bench.py tokenizer              # BPE on 10 MB of text, beside Hugging Face's in Rust
    python bench.py dpo                    # a DPO step of 8 pairs, beside TRL's
    python bench.py rollout                # 16 answers and a GRPO or RLOO update, beside TRL's

Every row is measured in fresh processes, alternated with the other rows over several rounds, and
printed at once; the table shows medians. Training: bf16 by autocast (ours: by the model's own
casts), gradient clipping, fused AdamW, random tokens. Contenders: Hugging Face's Llama (if
transformers is installed), llama.cpp (generate --init, if xllamacpp is), and our own writing of the
structure of nanoGPT's model (LayerNorm, learned positions, GELU) and of minimind's (RMSNorm,
rotary, SwiGLU, separate projections) and nanochat's (queries and keys normalised, squared ReLU,
bounded logits), each with the loss as its code has it.
After the table one JSON line per row; our own rows are named "lifecycle".
"""
import dataclasses
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bench_alignment
import convert
import kernels
import lora
import readers
from model import ModelConfig, Transformer
from plumbing.device import DTYPES, cpu_multiplies_bfloat16, pick_device, pick_dtype
from plumbing.folders import load_model, read_record, refuse_foreign_model
from plumbing.forecast import matmul_peak
from plumbing.optimizers import adamw
from plumbing.options import command_line
from sample import cast_once, decoding_dtype, generate, lay_out
from tokenizer import N_SPECIAL, PATTERN, train_bpe

CONTENDERS = {"train": ("hf_llama", "nanogpt", "minimind", "nanochat", "lifecycle"),
              "generate": ("hf_llama", "nanogpt", "llama_cpp", "lifecycle"),
              "lora": ("peft", "lifecycle"), "tokenizer": ("hf_tokenizers", "lifecycle"),
              "dpo": ("trl", "lifecycle"), "rollout": ("trl", "lifecycle")}
MODES = {"train": ("eager", "compile"), "generate": ("eager",), "tokenizer": ("eager",),
         "lora": ("full", "lora"),
         "dpo": ("cached", "default"), "rollout": ("grpo", "rloo")}
NEEDS = {"hf_llama": "transformers", "hf_tokenizers": "tokenizers", "trl": "trl", "peft": "peft",
         "llama_cpp": "xllamacpp"}
# a speed and a time
FIGURES = {"train": ("tokens_per_s", "ms_per_step"), "generate": ("tokens_per_s", "ms_per_step"),
           "lora": ("tokens_per_s", "ms_per_step"), "tokenizer": ("mb_per_s", "seconds"),
           "dpo": ("steps_per_s", "ms_per_step"), "rollout": ("steps_per_s", "ms_per_step")}
BATCH_SIZES = {"train": [16], "lora": [16], "generate": [1, 16], "tokenizer": [1], "dpo": [8],
               "rollout": [16]}


@dataclass
class Config:
    d_model: int = 256                # model width, >= 1
    n_layers: int = 6                 # >= 1
    n_heads: int = 8                  # >= 1
    vocab_size: int = 4096            # >= 1
    context_length: int = 256         # train: tokens per row, >= 1
    batch_size: int = 0               # rows; 0: 16, 8 pairs of dpo, both 1 and 16 for generate
    init: str = ""                    # generate: a model folder, in the place of random weights
    prompt_tokens: int = 16           # generate: tokens of a prompt, >= 1
    new_tokens: int = 256             # generate: tokens after it, >= 1
    dtype: str = "auto"               # auto (what is fast here) | bfloat16 | float32 | float16
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    modes: str = "all"                # with commas: eager, compile; cached, default; grpo, rloo
    contenders: str = "all"           # comma-separated: hf_llama, nanogpt, nanochat, lifecycle ...
    data: str = "world"               # tokenizer: text, as for train_pretrain.py; 10 MB of it
    rounds: int = 3                   # fresh processes per row, >= 1
    steps: int = 10                   # timed steps per process; generate: one in all, >= 1
    quick: bool = False               # one round of 5 steps, to get an idea


# ---------------------------------------------------------------------- the others' models

class NanoGPT(nn.Module):
    """The structure of nanoGPT's model.py: pre-LayerNorm, one projection for q, k, v, GELU MLP."""

    class Block(nn.Module):
        def __init__(self, D: int, H: int):
            super().__init__()
            self.H = H
            self.norm1 = nn.LayerNorm(D, bias=False)
            self.norm2 = nn.LayerNorm(D, bias=False)
            self.qkv = nn.Linear(D, 3 * D, bias=False)
            self.out = nn.Linear(D, D, bias=False)
            self.up = nn.Linear(D, 4 * D, bias=False)
            self.down = nn.Linear(4 * D, D, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            B, T, D = x.shape
            q, k, v = self.qkv(self.norm1(x)).split(D, dim=2)
            q = q.view(B, T, self.H, D // self.H).transpose(1, 2)         # (B, H, T, C)
            k = k.view(B, T, self.H, D // self.H).transpose(1, 2)
            v = v.view(B, T, self.H, D // self.H).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            # nanoGPT copies into one piece before it joins the heads, and so does this.
            y = y.transpose(1, 2).contiguous().view(B, T, D)
            x = x + self.out(y)
            y = self.up(self.norm2(x))                                     # (B, T, 4 D)
            return x + self.down(F.gelu(y))

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
        T = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:T]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            # Only the last position, because generation reads no other.
            return self.head(x[:, -1:])                                    # (B, 1, V)
        return mean_loss(self.head(x), targets)


class MiniMind(nn.Module):
    """The structure of minimind's model: RMSNorm, rotary halves, SwiGLU, all projections apart."""

    class Norm(nn.Module):
        def __init__(self, D: int):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            # In fp32, because a sum of squares loses digits in bf16.
            wide = x.float()
            mean_square = wide.pow(2).mean(-1, keepdim=True)
            wide = wide * torch.rsqrt(mean_square + 1e-5)
            return (self.weight * wide).type_as(x)

    class Block(nn.Module):
        def __init__(self, D: int, H: int, width: int):
            super().__init__()
            self.H = H
            self.norm1 = MiniMind.Norm(D)
            self.norm2 = MiniMind.Norm(D)
            self.q = nn.Linear(D, D, bias=False)
            self.k = nn.Linear(D, D, bias=False)
            self.v = nn.Linear(D, D, bias=False)
            self.o = nn.Linear(D, D, bias=False)
            self.gate = nn.Linear(D, width, bias=False)
            self.up = nn.Linear(D, width, bias=False)
            self.down = nn.Linear(width, D, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            B, T, D = x.shape
            y = self.norm1(x)
            q = self.q(y).view(B, T, self.H, D // self.H)
            k = self.k(y).view(B, T, self.H, D // self.H)
            v = self.v(y).view(B, T, self.H, D // self.H)
            q = self.rotate(q, cos, sin).transpose(1, 2)                   # (B, H, T, C)
            k = self.rotate(k, cos, sin).transpose(1, 2)
            v = v.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(B, T, D)
            x = x + self.o(y)
            y = self.norm2(x)
            y = F.silu(self.gate(y)) * self.up(y)                          # (B, T, F)
            return x + self.down(y)

        @staticmethod
        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            """x (B, T, H, C), cos and sin (T, 1, C): entry i is turned with entry i + C / 2."""
            half = x.shape[-1] // 2
            turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
            return x * cos + turned * sin

    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.d_model
        H = cfg.n_heads
        # Our own model's width, so that both have as many FLOPs.
        width = ModelConfig(cfg.vocab_size, d_model=D, n_heads=H).d_ff
        self.tokens = nn.Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(self.Block(D, H, width) for _ in range(cfg.n_layers))
        self.norm = self.Norm(D)
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        angles = rotary_angles(cfg).repeat(1, 2)                           # (T, C), twice the same
        angles = angles[:, None]                                           # (T, 1, C): all heads
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.apply(small_init)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.norm(x))
        return mean_loss(logits, targets)


class NanoChat(nn.Module):
    """The structure of nanochat's first model: norms without weights, also of the embedding and of
    queries and keys; rotary halves, squared ReLU, a head of its own, logits bounded by 15."""

    class Block(nn.Module):
        def __init__(self, D: int, H: int):
            super().__init__()
            self.H = H
            self.q = nn.Linear(D, D, bias=False)
            self.k = nn.Linear(D, D, bias=False)
            self.v = nn.Linear(D, D, bias=False)
            self.o = nn.Linear(D, D, bias=False)
            self.up = nn.Linear(D, 4 * D, bias=False)
            self.down = nn.Linear(4 * D, D, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            B, T, D = x.shape
            y = unit_norm(x)
            q = self.q(y).view(B, T, self.H, D // self.H)
            k = self.k(y).view(B, T, self.H, D // self.H)
            v = self.v(y).view(B, T, self.H, D // self.H)
            # Queries and keys of one length bound the scores, so that training is stable.
            q = unit_norm(self.rotate(q, cos, sin)).transpose(1, 2)        # (B, H, T, C)
            k = unit_norm(self.rotate(k, cos, sin)).transpose(1, 2)
            v = v.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(B, T, D)
            x = x + self.o(y)
            y = self.up(unit_norm(x))                                      # (B, T, 4 D)
            return x + self.down(F.relu(y).square())

        @staticmethod
        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            """x (B, T, H, C), cos and sin (T, 1, C / 2): entry i is turned with entry i + C / 2."""
            a, b = x.chunk(2, dim=-1)
            turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
            return turned.to(x.dtype)

    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.d_model
        self.tokens = nn.Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(self.Block(D, cfg.n_heads) for _ in range(cfg.n_layers))
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        angles = rotary_angles(cfg)[:, None]                               # (T, 1, C / 2)
        dtype = DTYPES[cfg.dtype]
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))
        self.apply(small_init)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = unit_norm(self.tokens(tokens))
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(unit_norm(x))
        logits = 15 * torch.tanh(logits / 15)
        return mean_loss(logits.float(), targets)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean -log p of the targets in nats: logits (B, T, V), targets (B, T)."""
    V = logits.size(-1)
    return F.cross_entropy(logits.view(-1, V), targets.reshape(-1))


def rotary_angles(cfg: Config) -> Tensor:
    """Angle of each position and pair of a head's entries, (T, C / 2)."""
    C = cfg.d_model // cfg.n_heads
    positions = torch.arange(cfg.context_length)
    frequencies = 10_000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.outer(positions, frequencies)


def unit_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def small_init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def hf_llama(cfg: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # not at the top: need not be installed
    # Our own model's width, so that both have as many FLOPs.
    width = ModelConfig(cfg.vocab_size, d_model=cfg.d_model, n_heads=cfg.n_heads).d_ff
    longest = max(cfg.context_length, 16 + cfg.new_tokens)
    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=width,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, tie_word_embeddings=True,
        max_position_embeddings=longest, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config)


def lifecycle(cfg: Config, context_length: int) -> Transformer:
    config = ModelConfig(cfg.vocab_size, context_length, cfg.d_model, cfg.n_layers, cfg.n_heads)
    return Transformer(config, DTYPES[cfg.dtype])


# ---------------------------------------------------------------------- one measurement

def build_model(cfg: Config, name: str) -> nn.Module:
    """The contender's model, for training or for generating up to cfg.context_length tokens."""
    if name == "lifecycle":
        kernels.keep_memory()                              # the others: as their code does
        return lifecycle(cfg, cfg.context_length)
    if name in ("hf_llama", "peft"):
        return hf_llama(cfg)
    if name == "nanogpt":
        return NanoGPT(cfg)
    if name == "minimind":
        return MiniMind(cfg)
    return NanoChat(cfg)


def train_row(cfg: Config, name: str, mode: str) -> dict:
    """Median time of a training step, in this process."""
    device = pick_device(cfg.device)
    dtype = DTYPES[cfg.dtype]
    model = build_model(cfg, name).to(device)
    if mode == "lora":
        model = with_lora(model, name)
    optimizer = adamw(model, lr=3e-4, weight_decay=0.1)
    forward = model.logps if name == "lifecycle" else model
    if mode == "compile":
        forward = torch.compile(forward)
    # Ours casts by itself, so that autocast would only cost it time.
    autocasts = name != "lifecycle" and cfg.dtype != "float32"
    autocast = torch.autocast(device.type, dtype, enabled=autocasts)
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.context_length + 1), device=device)
    inputs = tokens[:, :-1].contiguous()                   # (B, T)
    targets = tokens[:, 1:].contiguous()                   # (B, T)

    def step() -> None:
        with autocast:
            if name == "lifecycle":
                loss = -forward(inputs, targets).mean()
            elif name in ("hf_llama", "peft"):             # shifts by itself: same tokens per step
                loss = forward(input_ids=inputs, labels=inputs).loss
            else:
                loss = forward(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()                                        # waits for the GPU, as logging would

    # The first steps are slower, because memory is allocated, and compiled code is made.
    ms = 1e3 * median_time(step, warmup=4, repeats=cfg.steps)
    return {"tokens_per_s": inputs.numel() / ms * 1e3, "ms_per_step": ms}


def with_lora(model: nn.Module, name: str) -> nn.Module:
    """Rank 16 beside the queries' and the values' matrices, which alone learns."""
    if name == "lifecycle":
        return lora.attach(model, lora.Options("lora", lora_rank=16, lora_targets="wq,wv"))
    import peft  # not at the top: need not be installed

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config)


def generate_row(cfg: Config, name: str, mode: str) -> dict:
    """Median time of a whole generation (greedy, no stop token), in this process."""
    shape = cfg.batch_size, cfg.prompt_tokens
    prompts = torch.randint(1, cfg.vocab_size, shape, device=pick_device(cfg.device))
    before = resident_mb()
    if name == "llama_cpp":
        run = by_llama_cpp(cfg, prompts.tolist())
    else:
        run = by_torch(cfg, name, prompts)
    warmup = 1
    if name == "nanogpt":
        warmup = 0                                         # because a generation takes a minute
    seconds = median_time(run, warmup, repeats=1)
    n_tokens = cfg.batch_size * cfg.new_tokens
    return {"tokens_per_s": n_tokens / seconds, "ms_per_step": 1e3 * seconds / cfg.new_tokens,
            "held_mb": resident_mb() - before}


def by_torch(cfg: Config, name: str, prompts: Tensor) -> Callable[[], None]:
    """A generation by one of the models in PyTorch; prompts: (B, P)."""
    device = prompts.device
    dtype = DTYPES[cfg.dtype]
    if cfg.init:
        model = of_folder(cfg, name)
    else:
        length = cfg.prompt_tokens + cfg.new_tokens
        model = build_model(dataclasses.replace(cfg, context_length=length), name)
    model = model.eval()
    if name == "lifecycle":
        model = model.to(device)                           # keeps fp32 weights and casts them
        model = cast_once(model, decoding_dtype(model))
        if cfg.init:
            model = lay_out(model)                         # as a chat does

        def run() -> None:
            generate(model, prompts.tolist(), cfg.new_tokens)
    elif name == "hf_llama":
        model = model.to(device, dtype)
        mask = torch.ones_like(prompts)                    # no padding: every token is seen

        def run() -> None:
            # A minimum too, so that no end-of-text token makes the work shorter.
            model.generate(prompts, attention_mask=mask, do_sample=False,
                           min_new_tokens=cfg.new_tokens, max_new_tokens=cfg.new_tokens,
                           use_cache=True)
    else:
        model = model.to(device, dtype)

        @torch.no_grad()
        def run() -> None:
            tokens = prompts
            for _ in range(cfg.new_tokens):
                # The whole text again for each token, because nanoGPT has no KV cache.
                logits = model(tokens)[:, -1]                              # (B, V)
                token = logits.argmax(-1, keepdim=True)                    # (B, 1)
                tokens = torch.cat((tokens, token), 1)
    return run


def by_llama_cpp(cfg: Config, prompts: list[list[int]]) -> Callable[[], None]:
    """A generation by llama.cpp, of the model of --init in this run's dtype."""
    import xllamacpp
    config, weights, tokenizer = convert.our_weights(cfg.init)
    weights = {name: weight.to(DTYPES[cfg.dtype]) for name, weight in weights.items()}
    options = xllamacpp.CommonParams()
    options.n_parallel = len(prompts)
    options.n_ctx = len(prompts) * (cfg.prompt_tokens + cfg.new_tokens)
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        convert.write_gguf(file, config, weights, tokenizer)
        options.model.path = str(file)
        server = xllamacpp.Server(options)
    request = {"prompt": prompts, "n_predict": cfg.new_tokens, "temperature": 0,
               "ignore_eos": True, "cache_prompt": False}

    def run() -> None:
        server.handle_completions(request)
    return run


def of_folder(cfg: Config, name: str) -> nn.Module:
    """The model of --init; for transformers written as its library reads it."""
    if name == "lifecycle":
        model, _ = load_model(cfg.init, dtype=DTYPES[cfg.dtype], to_answer=True)
        kernels.keep_memory()                              # as sample.py does
        return model
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        config, weights, tokenizer = convert.our_weights(cfg.init)
        convert.write_hf(Path(folder), config, weights, tokenizer)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[cfg.dtype])


def resident_mb() -> float:
    """MB of memory that this process holds now; 0 where /proc does not say it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 1e6


def tokenizer_row(cfg: Config, name: str, mode: str) -> dict:
    """Time to learn cfg.vocab_size tokens from 10 MB, one string, as those who time it have it."""
    text = "".join(readers.read_documents(cfg.data, 10_000_000))
    if name == "lifecycle":
        def run() -> None:
            train_bpe([text], cfg.vocab_size)
    else:
        # Not at the top, because the library need not be installed.
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        rust = Tokenizer(models.BPE())
        # Our own pattern cuts the text, so that both learn from the same words.
        by_pattern = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.pre_tokenizer = pre_tokenizers.Sequence([by_pattern, to_bytes])
        all_bytes = pre_tokenizers.ByteLevel.alphabet()
        # Without our special tokens, so that both learn as many merges.
        n_tokens = cfg.vocab_size - N_SPECIAL
        trainer = trainers.BpeTrainer(vocab_size=n_tokens, show_progress=False,
                                      initial_alphabet=all_bytes)

        def run() -> None:
            rust.train_from_iterator([text], trainer)
    seconds = median_time(run, warmup=0, repeats=1)
    megabytes = len(text.encode()) / 1e6
    return {"mb_per_s": megabytes / seconds, "seconds": seconds}


def median_time(call, warmup: int, repeats: int) -> float:
    """Seconds per call, median. On a GPU the clock stops when the work is done."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()                       # the call returns before the GPU is done
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def measure(bench: str, cfg: Config, name: str, mode: str) -> dict:
    """One row in a fresh process. Raises RuntimeError with its output if that fails."""
    spec = json.dumps([bench, dataclasses.asdict(cfg), name, mode])
    # Fresh, because memory and compiled code of one contender would help or hinder the next.
    command = [sys.executable, __file__, "--worker", spec]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{bench} {name} {mode} failed:\n{done.stderr[-2000:]}")
    last_line = done.stdout.splitlines()[-1]               # libraries may print lines before it
    return json.loads(last_line)


def worker(bench: str, cfg: dict, name: str, mode: str) -> None:
    """The fresh process: measures one row and prints it as JSON."""
    torch.manual_seed(0)
    measure_row = {"train": train_row, "lora": train_row, "generate": generate_row,
                   "tokenizer": tokenizer_row,
                   "dpo": partial(bench_alignment.dpo_row, hf_llama),
                   "rollout": partial(bench_alignment.rollout_row, hf_llama)}[bench]
    row = measure_row(Config(**cfg), name, mode)
    if torch.cuda.is_available():
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6           # bytes
    else:
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3      # kB
    print(json.dumps(row))


# ---------------------------------------------------------------------- the table

def main(bench: str, cfg: Config) -> list[dict]:
    """Measure every row `rounds` times, alternating; print the table and the JSON lines.

    Raises ValueError for contenders, modes and data that are not there.
    """
    device = pick_device(cfg.device)
    dtype = str(pick_dtype(cfg.dtype, device)).removeprefix("torch.")
    cfg = dataclasses.replace(cfg, dtype=dtype)
    if cfg.quick:
        cfg = dataclasses.replace(cfg, rounds=1, steps=5)
    names = pick_contenders(bench, cfg)
    modes = MODES[bench] if cfg.modes == "all" else cfg.modes.split(",")
    if not {*modes} <= {*MODES[bench]}:
        raise ValueError(f"--modes {cfg.modes}: {bench} knows {', '.join(MODES[bench])}; give some "
                         "of them with commas, or all")
    if not cfg.init:
        names = [name for name in names if name != "llama_cpp"]    # which wants a vocabulary
    else:
        if bench != "generate":
            raise ValueError(f"--init {cfg.init}: only generate takes a model; leave it out")
        refuse_foreign_model(Path(cfg.init))
        names = [name for name in names if name != "nanogpt"]      # which has other weights
        cfg = dataclasses.replace(cfg, vocab_size=read_record(cfg.init)["model"]["vocab_size"])
    if bench == "tokenizer":
        next(readers.read_documents(cfg.data, 1))          # raises for what cannot be read
    print(machine(device), flush=True)
    sizes = [cfg.batch_size] if cfg.batch_size else BATCH_SIZES[bench]
    conditions = [(name, mode, size) for size in sizes for mode in modes for name in names]
    speed = FIGURES[bench][0]
    measured = {condition: [] for condition in conditions}
    # Rounds outside and rows inside, so that a slow minute of the machine hits all rows alike.
    for number in range(1, cfg.rounds + 1):
        for name, mode, size in conditions:
            row = measure(bench, dataclasses.replace(cfg, batch_size=size), name, mode)
            measured[name, mode, size].append(row)
            print(f"round {number}/{cfg.rounds}: {name} {mode} {dtype} batch {size}: "
                  f"{row[speed]:.1f} {speed}", flush=True)
    rows = []
    for name, mode, size in conditions:
        row = {"bench": bench, "name": name, "mode": mode, "dtype": cfg.dtype, "batch_size": size}
        shares = [figure for figure in measured[name, mode, size][0]
                  if figure.endswith("_share") or figure == "held_mb"]
        for figure in (*FIGURES[bench], "peak_mb", *shares):
            values = [of_round[figure] for of_round in measured[name, mode, size]]
            row[figure] = statistics.median(values)
        rows.append(row)
    print_table(bench, rows)
    for row in rows:
        print(json.dumps(row))
    return rows


def machine(device: torch.device) -> str:
    """What computes here, and how fast: the peaks that no contender can pass."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        bfloat16 = "with" if cpu_multiplies_bfloat16() else "without"
        name = f"CPU, {torch.get_num_threads()} threads, {capability} {bfloat16} bfloat16"
    peaks = []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32 or device.type == "cuda" or cpu_multiplies_bfloat16():
            peak = matmul_peak(device, dtype) / 1e12
            peaks.append(f"{str(dtype).removeprefix('torch.')} {peak:.3g} TFLOP/s")
    return f"{name}; large matmuls: {', '.join(peaks)}"


def pick_contenders(bench: str, cfg: Config) -> list[str]:
    """The contenders that were asked for and whose library is installed; the others are said."""
    known = CONTENDERS[bench]
    if cfg.contenders == "all":
        names = list(known)
    else:
        names = cfg.contenders.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--contenders {','.join(unknown)}: {bench} knows {', '.join(known)}")
    installed = []
    for name in names:
        library = NEEDS.get(name)
        if library and importlib.util.find_spec(library) is None:
            print(f"{name} is left out: {library} is not installed")
        else:
            installed.append(name)
    return installed


def print_table(bench: str, rows: list[dict]) -> None:
    """A line for each row, and how many times as fast our own row of the same conditions is."""
    speed, duration = FIGURES[bench]
    print(f"{'':13} {'mode':8} {'batch':>5} {speed:>12} {duration:>11} {'peak MB':>8}  "
          "lifecycle is")
    ours = {}                                              # our speed, by mode and batch size
    for row in rows:
        if row["name"] == "lifecycle":
            ours[row["mode"], row["batch_size"]] = row[speed]
    for row in rows:
        our_speed = ours.get((row["mode"], row["batch_size"]))     # None: --contenders without us
        ratio = ""
        if our_speed is not None:
            ratio = f"{our_speed / row[speed]:.2f}x"
        print(f"{row['name']:13} {row['mode']:8} {row['batch_size']:5} {row[speed]:12.1f} "
              f"{row[duration]:11.1f} {row['peak_mb']:8.0f}  {ratio}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["kernels"]:
        import kernels.bench
        try:
            kernels.bench.main(kernels.bench.parse(sys.argv[2:]))
        except (ValueError, OSError) as error:
            sys.exit(f"bench.py: {error}")
    elif sys.argv[1:2] and sys.argv[1] in CONTENDERS:
        bench = sys.argv.pop(1)
        command_line(lambda cfg: main(bench, cfg), Config, __doc__)
    elif sys.argv[1:2] in (["--help"], ["-h"]):
        print(f"{__doc__}\nfirst argument: {', '.join(CONTENDERS)} or kernels; each has a --help")
    else:
        sys.exit(f"{__doc__}\nfirst argument: {', '.join(CONTENDERS)} or kernels")
