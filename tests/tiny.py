"""Small byte-level models and files that several tests start from."""
import json
from pathlib import Path

import torch

import data
from architectures import ARCHITECTURES, Encoder
from heads import WithHead
from model import ModelConfig, Transformer
from plumbing.folders import save_model
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
END = TOKENIZER.end


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, architecture: str = "decoder",
               head: str = "lm", n_segments: int = 0, **sizes) -> Transformer | WithHead:
    """Random weights everywhere: a fresh model's zero projections would hide its own layers.

    head="scalar": a reward model. n_segments: with the head for next sentences.
    """
    torch.manual_seed(seed)
    config = ModelConfig(**{"vocab_size": TOKENIZER.vocab_size, "context_length": 64, "d_model": 32,
                            "n_layers": 2, "n_heads": 2} | sizes)
    if architecture == "encoder":
        model = Encoder(config, dtype, n_segments)
    else:
        model = ARCHITECTURES[architecture](config, dtype)
    if n_segments:
        model = WithHead(model, 2, zero=True)
    if head == "scalar":
        model = WithHead(model, 1, keep_lm_head=True)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


def ending_model() -> Transformer:
    """A tiny model whose samples often end: <|end|> has an output row that likes every state."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        states = model.hidden(torch.randint(0, 256, (8, 32))).flatten(0, 1)
        direction = states.mean(0)
        model.lm_head.weight[END] = 4 * direction / direction.dot(direction)
    return model


def own_reward(monkeypatch, folder: Path, code: str) -> str:
    """A module of a user's own, with rewards in it; returns its name, which no other test's has."""
    name = f"own_{folder.name}"
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    return name


def conversation(question: str = "Is it?", answer: str = "yes", after=()) -> data.Batch:
    """One row: prompt, answer with its <|end|>, then tokens that belong to nobody."""
    prompt = TOKENIZER.prompt([{"role": "user", "content": question}])
    response = [*TOKENIZER.encode(answer), END]
    ids = prompt + response + list(after)
    mask = [0] * len(prompt) + [1] * len(response) + [0] * len(after)
    return data.right_padded([(ids, mask)], TOKENIZER.pad, len(ids), [0])


def folder_of(model: Transformer, path: Path) -> str:
    """A model folder as a finished stage leaves it."""
    save_model(path, model, TOKENIZER, stage="test")
    return str(path)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def slow_logps(model: Transformer, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p(x_t | x_<t) of tokens 1, 2, ... one prefix at a time, in float64."""
    found = []
    for t in range(1, len(tokens)):
        logits = model(torch.tensor([tokens[:t]]))[0, -1].double() / temperature
        found.append(logits.log_softmax(-1)[tokens[t]])
    return torch.stack(found)
