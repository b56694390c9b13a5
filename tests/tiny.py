"""Small byte-level models and files that several tests start from."""
import json
from pathlib import Path

import torch

from model import ModelConfig, Transformer, save_model
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
END = TOKENIZER.end


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> Transformer:
    """Random weights everywhere: a fresh model's zero projections would hide its own layers."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{
        "vocab_size": TOKENIZER.vocab_size, "context_length": 64, "d_model": 32, "n_layers": 2,
        "n_heads": 2} | sizes), dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


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
