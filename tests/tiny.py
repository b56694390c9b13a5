"""Small byte-level models and files that several tests start from."""
import json
from pathlib import Path

import pytest
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


def ending_model(**sizes) -> Transformer:
    """A tiny model whose samples often end: <|end|> has an output row that likes every state."""
    model = tiny_model(tied=False, **sizes)
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


def llama_of(model: Transformer, kind: str = "LlamaForCausalLM", **options):
    """transformers' Llama with the sizes and weights of a tied Transformer; without transformers
    the test is skipped. kind: which of its classes; a head that is not ours is as it was drawn."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    llama = getattr(transformers, kind)(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, **options))
    weights = {"embed_tokens.weight": model.embedding.weight, "norm.weight": model.norm.weight}
    for number, block in enumerate(model.blocks):
        gate, up = block.mlp.w13.weight.chunk(2)
        attention = block.attention
        of_block = {"input_layernorm": block.attention_norm.weight,
                    "post_attention_layernorm": block.mlp_norm.weight,
                    "self_attn.q_proj": attention.wq.weight,
                    "self_attn.k_proj": attention.wk.weight,
                    "self_attn.v_proj": attention.wv.weight,
                    "self_attn.o_proj": attention.wo.weight,
                    "mlp.gate_proj": gate, "mlp.up_proj": up,
                    "mlp.down_proj": block.mlp.w2.weight}
        for name, weight in of_block.items():
            weights[f"layers.{number}.{name}.weight"] = weight
    llama.model.load_state_dict(weights)             # lm_head is the embedding
    return llama


def slow_logps(model: Transformer, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p(x_t | x_<t) of tokens 1, 2, ... one prefix at a time, in float64."""
    found = []
    for t in range(1, len(tokens)):
        logits = model(torch.tensor([tokens[:t]]))[0, -1].double() / temperature
        found.append(logits.log_softmax(-1)[tokens[t]])
    return torch.stack(found)
