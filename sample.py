"""
Decoding (002: greedy, temperature, top-k, top-p) with a KV cache, for one prompt or a batch.

Prompts of different lengths are left-padded so that all rows grow at the same end; positions count
from each row's first real token, and attention never sees the padding, so a row's tokens are the
same alone and in a batch. A row stops at its first stop token; once a quarter of the rows have,
they are dropped from the batch. PPO's rollouts and evaluate.py use this engine too.

    python sample.py --init out/dpo                            # a chat in the terminal
    python sample.py --init out/dpo --prompt "What is the pet of Barley?"
    python sample.py --init out/pretrain --raw --prompt "One morning" --temperature 0.8
    python sample.py --init out/span --fill "The bear ___ her hat on ___."     # or out/mlm
"""
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
import lora
import objectives
from architectures import SourceCache
from data import left_pad
from heads import WithHead
from model import KVCache, Linear, Transformer, parameter_count
from parallel import is_sharded
from plumbing.device import pick_device, pick_dtype
from plumbing.folders import BASE_STAGES, lineage, load_any_model, load_model
from plumbing.options import command_line
from readers import world_named
from scoring import score_responses
from world.world import World

KEEP = 0.75          # finished rows are carried along until this share is left: less copying
SMALL = 4_000_000    # parameters of a model that CPUs decode in fp32


@dataclass
class Config:
    init: str = "out/dpo"             # model folder to read
    adapter: str = ""                 # of a run with --peft on this model; in a chat: /adapter DIR
    prompt: str = ""                  # answer this once and exit; empty: chat in the terminal
    system: str = ""                  # system message to start with
    raw: bool = False                 # continue a text, without the chat template (ul2: mode S)
    fill: str = ""                    # fill the gaps ___ of this text (models of gaps, not chat)
    max_new_tokens: int = 128         # longest answer, in tokens, if the context allows, >= 1
    temperature: float = 0.0          # 0: greedy; 1: the model's own distribution
    top_k: int = 0                    # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0                # sample among the likeliest of this probability, in (0, 1]
    seed: int = 0                     # of the random numbers, in [0, 4e9]
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set to -inf the logits that top-k (Fan et al. 2018) and nucleus sampling (Holtzman et al.
    2020) exclude.

    logits: (B, V). top_k keeps the k largest (0: all); top_p the smallest set of largest whose
    probability reaches p, at least one. Worked: probabilities .5 .3 .2 and p = .6 keep .5 and .3.
    """
    # top-k: V_k = the k tokens of the largest logits; p(v) = 0 outside V_k
    if 0 < top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k).values[:, -1:]           # (B, 1)
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)

    # top-p: V_p = the smallest set of likeliest tokens with sum_{v in V_p} p(v) >= top_p
    if top_p < 1.0:
        sorted_logits, order = logits.sort(descending=True)       # (B, V), the likeliest first
        probs = sorted_logits.softmax(-1)
        likelier = probs.cumsum(-1) - probs                       # sum of p over likelier tokens
        outside = likelier >= top_p                               # without it p is reached
        outside[:, 0] = False                                     # V_p has at least one token
        # back from sorted places to token ids: excluded[b, order[b, i]] = outside[b, i]
        excluded = outside.scatter(1, order, outside)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def next_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
               generator: torch.Generator | None) -> Tensor:
    """(B, V) logits -> (B,) ids; temperature 0 takes the likeliest."""
    # greedy: v = argmax_v z_v
    if temperature == 0.0:
        return logits.argmax(-1)
    # temperature T: p(v) = exp(z_v / T) / sum_u exp(z_u / T); below 1 it favours likely tokens
    logits = logits / temperature
    # tokens outside of V_k and V_p have p(v) = 0, the others share the whole probability
    logits = filter_logits(logits, top_k, top_p)
    probs = logits.softmax(-1)
    # sample v ~ p
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def decoding_dtype(model: Transformer) -> torch.dtype:
    """The dtype to generate in: the model's, but fp32 for small models on CPUs.

    The time of a token goes into reading the weights, and bf16 halves their bytes; but on CPUs
    each new number of rows makes bf16 matmuls prepare anew, which costs small models more."""
    if model.device.type == "cpu" and parameter_count(model) < SMALL:
        return torch.float32
    return model.dtype


def cast_once(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model to generate with, its matrices cast to dtype once instead of at every token.

    It shares the norms with the model, and the routers, which work in fp32. Returns the model
    itself where nothing changes, and where adapters or shards stand in the place of matrices: those
    are cast at every token. Raises ValueError for a model with a head.
    """
    if isinstance(model, WithHead):
        raise ValueError("this model has a scalar head: it is a reward model or a critic; "
                         "generating tokens takes a language model")
    if dtype == model.embedding.weight.dtype:
        return model
    weights = model.state_dict()
    with torch.device("meta"):                                 # nothing is drawn or copied
        cast = model.fresh(model.config)
    if weights.keys() != cast.state_dict().keys():             # adapters have others
        return model
    for name, weight in weights.items():
        if is_sharded(weight):
            return model
        if weight.dim() >= 2 and "router" not in name:
            weights[name] = weight.to(dtype)
    # assigned, not copied: norms and routers are the same tensors in both models
    cast.load_state_dict(weights, assign=True)
    cast.cos = model.cos
    cast.sin = model.sin
    return cast.train(model.training)


class LaidOut(nn.Module):
    """y = x W^T with a W that lies as oneDNN multiplies by it, instead of being arranged so for
    every token."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def lay_out(model: Transformer) -> Transformer:
    """Lay out the matrices of the blocks, in place, on a CPU that has oneDNN: a model of 134M
    parameters then writes 1.4 times as fast. Nothing can train or adapt them any more."""
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        places = [(parent, name) for parent, name, matrix in lora.linears(model.blocks)
                  if isinstance(matrix, Linear)]
        for parent, name in places:
            # nobody else holds the matrix, so that it is gone before the next one is laid out
            setattr(parent, name, LaidOut(getattr(parent, name).weight))
        for parameter in model.parameters():
            # what is left may lie in the file, all of which would stay in memory with it
            parameter.data = parameter.data.clone()
    return model


def check_room(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> int:
    """The tokens that a prompt takes in the decoder's context.

    Raises ValueError for an empty prompt, and when prompt and new tokens do not fit."""
    if min(len(ids) for ids in prompts) == 0:
        raise ValueError("a prompt is empty: there is nothing to continue; give at least one token")
    longest = max(len(ids) for ids in prompts)
    if model.architecture == "encoder_decoder":
        # the encoder reads the prompt; the decoder begins with a single token
        longest = 1
    context = model.config.context_length
    if longest + max_new_tokens > context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit "
                         f"into the context of {context}; shorten it or lower max_new_tokens")
    return longest


def encoder_input(model: Transformer, prompts: list[list[int]]) -> dict[str, Tensor]:
    """What model() takes besides the decoder's tokens: the prompts for its encoder, if it has
    one. source: (B, S); source_lengths: (B,)."""
    if model.architecture != "encoder_decoder":
        return {}
    source, lengths = objectives.padded(prompts, pad=0)
    return {"source": torch.from_numpy(source).to(model.device),
            "source_lengths": torch.from_numpy(lengths).to(model.device)}


@torch.no_grad()
def stream(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
           stop: tuple[int, ...] = (), temperature: float = 0.0, top_k: int = 0,
           top_p: float = 1.0, generator: torch.Generator | None = None,
           group: int = 1) -> Iterator[list]:
    """Generate a token for every unfinished row at a time: yields [(row, id), ...].

    group: answers to each prompt; those of prompt i are the rows from i * group on. The stop token
    is the last a row yields. Raises ValueError for an empty prompt, and when prompt and new tokens
    do not fit into the model's context.
    """
    prompt_length = check_room(model, prompts, max_new_tokens)
    tokens, starts = left_pad(prompts, pad=0)                  # (B, T) and (B,)
    tokens = tokens.to(model.device)
    starts = starts.to(model.device)
    source = encoder_input(model, prompts)
    if source:
        # an encoder reads the prompts: the decoder goes on from the last token of each
        tokens = tokens[:, -1:]
        starts = torch.zeros_like(starts)
    dtype = decoding_dtype(model)
    model = cast_once(model, dtype)
    make_cache = SourceCache if source else KVCache
    cache = make_cache(model.config, starts, prompt_length + max_new_tokens, dtype)

    rows = list(range(len(prompts) * group))  # the answer of each batch row; None: stopped
    for n_new in range(max_new_tokens):
        # 1. MODEL: the logits after the newest token; the cache has keys and values of all before
        logits = model(tokens, cache=cache, **source)[:, -1]   # (B, V)
        source = {}                                            # the cache has it from now on
        if group > 1 and n_new == 0:
            # a prompt was read once: what the cache has of it serves all of its answers
            copies = torch.arange(len(prompts), device=model.device).repeat_interleave(group)
            logits = logits[copies]
            cache.keep(copies)
        # 2. SAMPLE: y_t ~ p(y | x, y_<t)
        tokens = next_token(logits, temperature, top_k, top_p, generator)[:, None]   # (B, 1)
        # 3. YIELD the token of every row that goes on, its stop token included
        ids = tokens[:, 0].tolist()
        yield [(row, token) for row, token in zip(rows, ids) if row is not None]
        # 4. STOP rows at their stop token
        rows = [None if token in stop else row for row, token in zip(rows, ids)]
        going = [b for b, row in enumerate(rows) if row is not None]
        if not going:
            return
        # 5. FORGET stopped rows, but several at once, because each time the cache is copied
        if len(going) <= KEEP * len(rows):
            keep = torch.tensor(going, device=model.device)
            cache.keep(keep)
            tokens = tokens[keep]
            rows = [rows[b] for b in going]


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             stop: tuple[int, ...] = (), temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, generator: torch.Generator | None = None,
             batch_size: int = 128, group: int = 1) -> list[list[int]]:
    """The new tokens of every answer, ending in the stop token if one came. See stream().

    Prompts of similar length share a batch; the result is in the order of the prompts, `group`
    answers to each, one after the other.
    """
    outputs: list[list[int]] = [[] for _ in range(len(prompts) * group)]
    prompts_at_once = max(1, batch_size // group)
    # by length, because the longest prompt of a batch decides how much padding the others get
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    for first in range(0, len(order), prompts_at_once):
        batch = order[first:first + prompts_at_once]           # place b is prompt batch[b]
        batch_prompts = [prompts[i] for i in batch]
        for new_tokens in stream(model, batch_prompts, max_new_tokens, stop, temperature, top_k,
                                 top_p, generator, group):
            for row, token in new_tokens:
                place, number = divmod(row, group)
                outputs[batch[place] * group + number].append(token)
    model.train(was_training)
    return outputs


def sample_and_score(model: Transformer, tokenizer, prompts: list[dict], ids: list[list[int]],
                     n: int, reward: Callable, max_new_tokens: int, no_end_score: float = -1.0,
                     temperature: float = 1.0,
                     generator: torch.Generator | None = None) -> tuple[list[list[int]], Tensor]:
    """n answers to each prompt, prompt by prompt, and their rewards (prompts, n).

    prompts, ids: rows of readers.read_prompts() and their tokens; reward: of rewards.Reward;
    no_end_score: the score of an answer that never ended.
    """
    answers = generate(model, ids, max_new_tokens, (tokenizer.end,), temperature,
                       generator=generator, group=n)
    repeated = [row for row in prompts for _ in range(n)]
    x = [prompt for prompt in ids for _ in range(n)]
    scores, _ = score_responses(reward, repeated, x, answers, tokenizer.end, no_end_score)
    return answers, scores.view(-1, n)


def best_of_n(model: Transformer, tokenizer, prompts: list[dict], n: int, reward: Callable,
              max_new_tokens: int, **options) -> list[str]:
    """The best of n sampled answers to each prompt, by a reward (001 section 4.9); "" where that
    one never ended. options: those of sample_and_score()."""
    ids = [tokenizer.prompt(row["messages"]) for row in prompts]
    answers, scores = sample_and_score(model, tokenizer, prompts, ids, n, reward, max_new_tokens,
                                       **options)
    texts = []
    for row, place in enumerate(scores.argmax(1).tolist()):
        answer = answers[row * n + place]
        texts.append(tokenizer.decode(answer) if answer[-1:] == [tokenizer.end] else "")
    return texts


def respond(model: Transformer, tokenizer, conversations: list[list[dict]], max_new_tokens: int,
            **options) -> list[str]:
    """The assistant's text for each conversation (messages of tokenizer.prompt)."""
    prompts = [tokenizer.prompt(messages) for messages in conversations]
    stop = (tokenizer.end, tokenizer.endoftext)
    responses = generate(model, prompts, max_new_tokens, stop, **options)
    return [tokenizer.decode(ids) for ids in responses]


@torch.no_grad()
def fill(model: Transformer, tokenizer, text: str, max_new_tokens: int = 128) -> str:
    """The text with its gaps ___ filled: by a token each from an encoder, by spans from a model
    that was trained to write them. Raises ValueError for a model or a text without gaps."""
    first, *others = [tokenizer.encode(part) for part in text.split("___")]
    is_encoder = model.architecture == "encoder"
    # gap i becomes <|mask|> for an encoder, <|sentinel_i|> for a model that writes spans
    gaps = []
    for i in range(len(others)):
        name = "<|mask|>" if is_encoder else f"<|sentinel_{i}|>"
        gaps.append(tokenizer.special.get(name))
    if not gaps or None in gaps:
        raise ValueError(f"{len(gaps)} gaps in {text!r}: mark each with ___, and give a model that "
                         "was trained on so many (train_denoise.py --objective mlm, span or ul2)")
    ids = list(first)
    for gap, part in zip(gaps, others):
        ids += [gap, *part]
    if is_encoder:
        return fill_masks(model, tokenizer, ids)
    return fill_spans(model, tokenizer, ids, gaps, max_new_tokens)


def fill_masks(model: Transformer, tokenizer, ids: list[int]) -> str:
    """Each <|mask|> becomes the likeliest token there: v = argmax_v p(v | all other tokens)."""
    mask = tokenizer.special["<|mask|>"]
    first = tokenizer.endoftext
    has_segments = model.n_segments > 0
    if has_segments:
        # trained on sentence pairs, which begin with <|cls|>
        first = tokenizer.special["<|cls|>"]
    tokens = torch.tensor([[first, *ids]], device=model.device)        # (1, T)
    segments = torch.zeros_like(tokens) if has_segments else None
    logits = model(tokens, segments=segments)[0, 1:]                   # (T - 1, V), as ids
    # special tokens are no guesses: their ids begin behind the ranks
    guesses = logits[:, :len(tokenizer.ranks)].argmax(-1).tolist()
    return tokenizer.decode(guess if i == mask else i for i, guess in zip(ids, guesses))


def fill_spans(model: Transformer, tokenizer, ids: list[int], gaps: list[int],
               max_new_tokens: int) -> str:
    """Each sentinel becomes the span that the model writes behind it.

    it <|sentinel_0|> on a <|sentinel_1|> -> the model writes <|sentinel_0|> sat <|sentinel_1|> mat
    """
    special = tokenizer.special
    prompt = [*ids, tokenizer.end]
    if "<|R|>" in special:
        # UL2 has learned short spans in its mode R
        prompt = [special["<|R|>"], *prompt]
    [written] = generate(model, [prompt], max_new_tokens, (tokenizer.end,))
    borders = [i for name, i in special.items() if name.startswith(("<|sentinel_", "<|end|>"))]
    spans = objectives.spans_after(written, borders)
    filled = []
    for i in ids:
        # a gap for which the model has written nothing stays empty
        filled += spans.get(i, ()) if i in gaps else [i]
    return tokenizer.decode(filled)


def beginning(tokenizer, text: str) -> list[int]:
    """The ids of a text to continue; for a model trained by --objective ul2 in its S mode."""
    ids = tokenizer.encode(text)
    if "<|S|>" not in tokenizer.special:
        return ids
    return [tokenizer.special["<|S|>"], *ids, tokenizer.end]


def print_stream(model: Transformer, tokenizer, prompt: list[int], cfg: Config,
                 generator: torch.Generator) -> str:
    """Write the continuation of `prompt` to the terminal as it comes; returns it."""
    stop = (tokenizer.end, tokenizer.endoftext)
    ids = []
    text = ""
    n_printed = 0                                              # characters
    for [(_, token)] in stream(model, [prompt], cfg.max_new_tokens, stop, cfg.temperature,
                               cfg.top_k, cfg.top_p, generator):
        ids.append(token)
        text = tokenizer.decode(ids)
        # U+FFFD at the end: the bytes of a character that has not come whole yet
        if not text.endswith("\ufffd"):
            print(text[n_printed:], end="", flush=True)
            n_printed = len(text)
    print(text[n_printed:])
    return text


def main(cfg: Config) -> None:
    if cfg.temperature < 0:
        raise ValueError(f"--temperature {cfg.temperature}: give 0 (greedy) or more")
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if cfg.raw or cfg.fill:
        model, tokenizer = load_any_model(cfg.init, device, dtype, to_answer=True)
    else:
        model, tokenizer = load_model(cfg.init, device, dtype, to_answer=True, two_stacks=True)
    kernels.keep_memory()                                          # but not what loading has freed
    if isinstance(model, WithHead):
        model = model.trunk                                        # without its next sentences
    model.eval()
    if cfg.adapter:
        swap_adapter(model, tokenizer, cfg.adapter, cfg.init)
    if cfg.fill:
        print(fill(model, tokenizer, cfg.fill, cfg.max_new_tokens))
        return
    # at least 64 tokens of the context, or half of a short one, are kept free for the prompt
    context = model.config.context_length
    longest_answer = context - min(context // 2, 64)
    cfg = replace(cfg, max_new_tokens=min(cfg.max_new_tokens, longest_answer))
    generator = torch.Generator(device).manual_seed(cfg.seed)
    if not cfg.adapter and parameter_count(model) >= SMALL:
        # now, because at every answer it would be a second copy of the model
        model = lay_out(cast_once(model, decoding_dtype(model)))
    if not cfg.raw:
        if is_base(cfg.init):
            print(f"{cfg.init} is a base model: it continues text and has never seen a "
                  "conversation; give --raw to have it continue yours", file=sys.stderr)
        chat(model, tokenizer, cfg, generator)
        return
    if not cfg.prompt:
        raise ValueError("--raw continues a text: give it with --prompt")
    print(cfg.prompt, end="")
    print_stream(model, tokenizer, beginning(tokenizer, cfg.prompt), cfg, generator)


def swap_adapter(model: Transformer, tokenizer, adapter: str, base: str) -> None:
    """Put the adapter in this folder on the model, in the place of another; "none": take it off.
    base: the model's own folder. Raises ValueError for one that was made on another model."""
    if adapter == "none":
        lora.detach(model)
    else:
        lora.load_adapter(model, adapter, base).eval()
    tokenizer.n_virtual = lora.n_virtual(model)


def is_base(folder: str) -> bool:
    return lineage(folder)[0].get("stage") in BASE_STAGES


def first_screen(folder: str) -> str:
    """What a chat begins with: which model it is, how to leave, what it can be asked."""
    stage = lineage(folder)[0].get("stage")
    model = f"{folder} (stage {stage})" if stage else folder
    lines = [f"Talking to {model}.", "An empty line or Ctrl-D ends the chat; /new starts over."]
    world = world_of(folder)
    # a base model answers no questions, whatever it has read
    if world and not is_base(folder):
        lines.append("Ask it, for example:")
        lines += [f"    {question}" for question in example_questions(world)]
    return "\n".join(lines)


def world_of(folder: str) -> World | None:
    """The embedded world that the model learned from, in its own stage or the nearest before."""
    for record in lineage(folder):
        options = record.get("config", {})
        for option in ("data", "prompts"):
            for name in options.get(option, "").split(","):    # pretraining's data have commas
                world = world_named(name.strip())
                if world:
                    return world
    return None


def example_questions(world: World) -> list[str]:
    """Three questions about a world, of different kinds, the same at every call."""
    by_cluster = {}
    # held out, because the answers to these were not learned by heart
    for example in world.prompts(100, split="heldout"):
        # a follow-up says little without the turns before it
        fits_a_line = isinstance(example["prompt"], str) and len(example["prompt"]) <= 72
        # None: a story or a refusal, of which the reader could not tell whether it is right
        if fits_a_line and example["answer"] is not None:
            by_cluster.setdefault(example["cluster"], example["prompt"])
    return list(by_cluster.values())[:3]


def chat(model: Transformer, tokenizer, cfg: Config, generator: torch.Generator) -> None:
    """Answer cfg.prompt, or without one every line that is typed."""
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    turns = []
    if not cfg.prompt:
        print(first_screen(cfg.init))
    while True:
        text = cfg.prompt or read_line()
        if not text:
            return
        if text == "/new" and not cfg.prompt:
            turns = []
            continue
        if text.startswith("/adapter ") and not cfg.prompt:
            try:
                if any(isinstance(module, LaidOut) for module in model.modules()):
                    # nothing can be put on matrices that are laid out
                    model, _ = load_model(cfg.init, model.device, model.dtype, to_answer=True)
                swap_adapter(model, tokenizer, text.split(maxsplit=1)[1], cfg.init)
            except ValueError as error:
                print(error)
            continue
        turns.append({"role": "user", "content": text})
        prompt = tokenizer.prompt(system + turns)
        # forget the oldest question and answer until the rest fits; the system message stays
        room = model.config.context_length - cfg.max_new_tokens
        while len(prompt) > room and len(turns) > 2:
            turns = turns[2:]
            prompt = tokenizer.prompt(system + turns)
        if len(prompt) > room:
            message = f"that is {len(prompt):,} tokens long, and {room:,} fit; say it shorter"
            if cfg.prompt:
                raise ValueError(f"--prompt: {message}")
            print(message)
            turns.pop()
            continue
        try:
            reply = print_stream(model, tokenizer, prompt, cfg, generator)
        except KeyboardInterrupt:
            if cfg.prompt:                 # there is no chat to go on with
                raise
            print("\n(stopped; Ctrl-D ends the chat)")
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": reply})
        if cfg.prompt:
            return


def read_line() -> str:
    """A typed line, "" at the end; from a pipe without the question you>."""
    try:
        line = input("you> ") if sys.stdin.isatty() else sys.stdin.readline().strip()
        line.encode()                      # where the locale lets broken bytes through
        return line
    except UnicodeError:
        print("that line is not UTF-8; type it again")
        return read_line()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


if __name__ == "__main__":
    command_line(main, Config, __doc__)
