"""
Decoding (002: greedy, temperature, top-k, top-p) with a KV cache, for one prompt or a batch.

Prompts of different lengths are left-padded so that all rows grow at the same end; positions count
from each row's first real token, and attention never sees the padding, so a row's tokens are the
same alone and in a batch. A row stops at its first stop token; once a quarter of the rows have,
they are dropped from the batch. PPO's rollouts and evaluate.py use this engine too.

    python sample.py --init out/dpo                            # a chat in the terminal
    python sample.py --init out/dpo --prompt "Who lives in the old mill?"
    python sample.py --init out/pretrain --raw --prompt "One morning" --temperature 0.8
    python sample.py --init out/span --fill "The bear ___ her hat on ___."     # or out/mlm
"""
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
import objectives
import training
from data import left_pad
from model import KVCache, Transformer, load_model, parameter_count

KEEP = 0.75          # rows that have stopped are carried along until so few are left: less copying
SMALL = 4_000_000    # parameters of a model that CPUs decode in fp32


@dataclass
class Config:
    init: str = "out/dpo"             # model folder to read
    prompt: str = ""                  # answer this once and exit; empty: chat in the terminal
    system: str = ""                  # system message to start with
    raw: bool = False                 # continue a text, without the chat template (ul2: mode S)
    fill: str = ""                    # fill the gaps ___ of this text (models of gaps, not chat)
    max_new_tokens: int = 128         # longest answer, in tokens, as far as the context allows
    temperature: float = 0.0          # 0: greedy; 1: the model's own distribution
    top_k: int = 0                    # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0                # sample among the likeliest that hold this probability
    seed: int = 0                     # of the random numbers
    device: str = "auto"              # auto | cpu | cuda | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set to -inf what top-k (Fan et al. 2018) and nucleus sampling (Holtzman et al. 2020) exclude.

    logits: (B, V). top_k keeps the k largest (0: all); top_p the smallest set of largest whose
    probability reaches p, at least one. Worked: probabilities .5 .3 .2 and p = .6 keep .5 and .3.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p            # what came before already reaches p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits


def next_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
               generator: torch.Generator | None) -> Tensor:
    """(B, V) logits -> (B,) ids; temperature 0 takes the likeliest."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probs = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def decoding_dtype(model: Transformer) -> torch.dtype:
    """What to generate in. On CPUs bf16 halves the bytes of the weights, which is what the time of
    a token goes into, but sets its matmuls up for every new number of rows: small models lose."""
    small = parameter_count(model) < SMALL
    return torch.float32 if model.device.type == "cpu" and small else model.dtype


@torch.no_grad()
def stream(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
           stop: tuple[int, ...] = (), temperature: float = 0.0, top_k: int = 0,
           top_p: float = 1.0, generator: torch.Generator | None = None) -> Iterator[list]:
    """Generate a token for every unfinished row at a time: yields [(row, id), ...].

    The stop token is the last a row yields. Raises ValueError for an empty prompt, and when prompt
    and new tokens do not fit into the model's context.
    """
    longest, context = max(map(len, prompts)), model.config.context_length
    apart = model.config.architecture == "encoder_decoder"     # prompts have their own encoder
    taken = 1 if apart else longest
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt is empty: there is nothing to continue; give at least one token")
    if taken + max_new_tokens > context:
        raise ValueError(f"a prompt of {taken} tokens and {max_new_tokens} new ones do not fit "
                         f"into the context of {context}; shorten it or lower max_new_tokens")
    tokens, starts = left_pad(prompts, pad=0)
    tokens, starts, source = tokens.to(model.device), starts.to(model.device), {}
    if apart:                                                  # writes after a prompt's last token
        read, lengths = map(torch.from_numpy, objectives.padded(prompts, pad=0))
        source = {"source": read.to(model.device), "source_lengths": lengths.to(model.device)}
        tokens, starts = tokens[:, -1:], torch.zeros_like(starts)
    dtype = decoding_dtype(model)
    model = model.cast(dtype)
    cache = KVCache(model.config, starts, taken + max_new_tokens, dtype)
    rows = list(range(len(prompts)))                           # which prompt each batch row answers
    for _ in range(max_new_tokens):
        logits = model(tokens, cache=cache, **source)[:, -1]   # (B, V)
        source = {}                                            # the cache has it now
        tokens = next_token(logits, temperature, top_k, top_p, generator)[:, None]
        ids = tokens[:, 0].tolist()
        yield [(row, token) for row, token in zip(rows, ids) if row is not None]
        rows = [None if token in stop else row for row, token in zip(rows, ids)]
        going = [i for i, row in enumerate(rows) if row is not None]
        if not going:
            return
        if len(going) <= KEEP * len(rows):                     # forget the rows that have stopped
            keep = torch.tensor(going, device=model.device)
            cache.keep(keep)
            tokens, rows = tokens[keep], [rows[i] for i in going]


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             stop: tuple[int, ...] = (), temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, generator: torch.Generator | None = None,
             batch_size: int = 128) -> list[list[int]]:
    """The new tokens of every prompt, ending in the stop token if one came. See stream().

    Prompts of similar length share a batch; the result is in the order of the prompts.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    for first in range(0, len(order), batch_size):
        batch = order[first:first + batch_size]
        for pairs in stream(model, [prompts[i] for i in batch], max_new_tokens, stop, temperature,
                            top_k, top_p, generator):
            for row, token in pairs:
                outputs[batch[row]].append(token)
    model.train(was_training)
    return outputs


def respond(model: Transformer, tokenizer, conversations: list[list[dict]], max_new_tokens: int,
            **options) -> list[str]:
    """The assistant's text for each conversation (messages of tokenizer.prompt)."""
    prompts = [tokenizer.prompt(messages) for messages in conversations]
    stop = (tokenizer.end, tokenizer.endoftext)
    return [tokenizer.decode(ids) for ids in
            generate(model, prompts, max_new_tokens, stop, **options)]


@torch.no_grad()
def fill(model: Transformer, tokenizer, text: str, max_new_tokens: int = 128) -> str:
    """The text with its gaps ___ filled: by a token each from an encoder, by spans from a model
    that was trained to write them. Raises ValueError for a model or a text without gaps."""
    special, (first, *rest) = tokenizer.special, map(tokenizer.encode, text.split("___"))
    encoder = model.config.architecture == "encoder"
    gaps = [special.get("<|mask|>" if encoder else f"<|sentinel_{i}|>") for i in range(len(rest))]
    if not rest or None in gaps:
        raise ValueError(f"{len(gaps)} gaps in {text!r}: mark each with ___, and give a model that "
                         "was trained on so many (train_pretrain.py --objective mlm, span or ul2)")
    ids = first + [i for gap, part in zip(gaps, rest) for i in (gap, *part)]
    if encoder:
        paired = model.config.n_segments > 0           # it has read [CLS] and two segments
        first = special["<|cls|>"] if paired else tokenizer.endoftext
        tokens = torch.tensor([[first, *ids]], device=model.device)
        segments = torch.zeros_like(tokens) if paired else None
        guesses = model(tokens, segments=segments)[0, 1:, :len(tokenizer.ranks)].argmax(-1).tolist()
        return tokenizer.decode(guess if i == gaps[0] else i for i, guess in zip(ids, guesses))
    mode = [special["<|R|>"]] if "<|R|>" in special else []
    [written] = generate(model, [mode + ids + [tokenizer.end]], max_new_tokens, (tokenizer.end,))
    borders = [i for name, i in special.items() if name.startswith(("<|sentinel_", "<|end|>"))]
    spans = objectives.spans_said(written, borders)
    return tokenizer.decode(j for i in ids for j in (spans.get(i, ()) if i in gaps else (i,)))


def beginning(tokenizer, text: str) -> list[int]:
    """The ids of a text to continue; for a model trained by --objective ul2 in its S mode."""
    ids, special = tokenizer.encode(text), tokenizer.special
    return [special["<|S|>"], *ids, tokenizer.end] if "<|S|>" in special else ids


def print_stream(model: Transformer, tokenizer, prompt: list[int], cfg: Config,
                 generator: torch.Generator) -> str:
    """Write the continuation of `prompt` to the terminal as it comes; returns it."""
    ids, text, shown = [], "", ""
    for [(_, token)] in stream(model, [prompt], cfg.max_new_tokens,
                               (tokenizer.end, tokenizer.endoftext), cfg.temperature, cfg.top_k,
                               cfg.top_p, generator):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):                        # a character may span several tokens
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(text[len(shown):])
    return text


def main(cfg: Config) -> None:
    if cfg.temperature < 0:
        raise ValueError(f"--temperature {cfg.temperature}: give 0 (greedy) or more")
    kernels.keep_memory()
    device = training.pick_device(cfg.device)
    model, tokenizer = load_model(cfg.init, device, training.pick_dtype(cfg.dtype, device),
                                  any_architecture=cfg.raw or bool(cfg.fill))
    model.eval()
    if cfg.fill:
        print(fill(model, tokenizer, cfg.fill, cfg.max_new_tokens))
        return
    context = model.config.context_length
    room = context - min(context // 2, 64)                         # the rest is for the prompt
    cfg = replace(cfg, max_new_tokens=min(cfg.max_new_tokens, room))
    generator = torch.Generator(device).manual_seed(cfg.seed)
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    if cfg.raw:
        if not cfg.prompt:
            raise ValueError("--raw continues a text: give it with --prompt")
        print(cfg.prompt, end="")
        print_stream(model, tokenizer, beginning(tokenizer, cfg.prompt), cfg, generator)
        return
    if not cfg.prompt:
        print(f"Talking to {cfg.init}. An empty line or Ctrl-D ends it; /new starts over.")
    while text := cfg.prompt or read_line():
        if text == "/new" and not cfg.prompt:
            messages = messages[:1] if cfg.system else []
            continue
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.prompt(messages)
        room = context - cfg.max_new_tokens
        first = 1 if cfg.system else 0
        while len(prompt) > room and len(messages) > first + 2:     # forget the oldest exchange
            del messages[first:first + 2]
            prompt = tokenizer.prompt(messages)
        reply = print_stream(model, tokenizer, prompt, cfg, generator)
        messages.append({"role": "assistant", "content": reply})
        if cfg.prompt:
            return


def read_line() -> str:
    try:
        return input("you> ") if sys.stdin.isatty() else sys.stdin.readline().strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


if __name__ == "__main__":
    training.command_line(main, Config, __doc__)
