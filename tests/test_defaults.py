"""Without options each stage runs the document's algorithm: its optimizer, on a plain Llama."""
import pytest
import torch
from tiny import folder_of, tiny_model, write_rows

import train_classifier
import train_denoise
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from model import SwiGLU, Transformer
from plumbing.options import build
from plumbing.run import Run


class Stop(Exception):
    pass


@pytest.fixture
def parts_of(tmp_path, monkeypatch):
    """A function that runs a script up to its training loop, with no option but where the data are,
    and returns the parts of its checkpoints: models and optimizers by name."""
    def track(self, **parts):
        found.update(parts)
        raise Stop

    found = {}
    monkeypatch.setattr(Run, "track", track)
    (tmp_path / "corpus.txt").write_text("The bear went home and slept. " * 200)
    questions = [{"prompt": f"{i}?", "text": f"{i}?", "label": i % 2} for i in range(40)]
    answers = {"response": "yes", "chosen": "yes", "rejected": "no"}
    rows = write_rows(tmp_path / "rows.jsonl", [row | answers for row in questions])
    folders = {"init": folder_of(tiny_model(), tmp_path / "base"),
               "reward_model": folder_of(tiny_model(head="scalar"), tmp_path / "rm")}
    options = {
        train_pretrain: {"data": str(tmp_path / "corpus.txt"), "tokenizer": "bytes"},
        train_denoise: {"data": str(tmp_path / "corpus.txt"), "tokenizer": "bytes"},
        train_classifier: {"init": folders["init"], "data": rows},
        train_sft: {"init": folders["init"], "data": rows},
        train_rm: {"init": folders["init"], "data": rows, "max_new_tokens": 8},
        train_dpo: {"init": folders["init"], "data": rows},
        train_ppo: {**folders, "prompts": rows, "max_new_tokens": 8}}

    def run(script):
        places = options[script] | {"out": str(tmp_path / "out"), "device": "cpu",
                                    "dtype": "float32"}
        with pytest.raises(Stop):
            script.main(build(script.Config, places))
        return found
    return run


def weight_decays(optimizer):
    """(of matrices, of norms and biases)"""
    matrices, vectors = optimizer.param_groups
    assert all(p.dim() >= 2 for p in matrices["params"])
    assert all(p.dim() < 2 for p in vectors["params"])
    return matrices["weight_decay"], vectors["weight_decay"]


@pytest.mark.parametrize("script", [train_pretrain, train_denoise])
def test_pretraining_is_by_adamw_with_the_numbers_of_16(parts_of, script):
    optimizer = parts_of(script)["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8
    assert weight_decays(optimizer) == (0.1, 0.0)


@pytest.mark.parametrize("script, kind", [
    (train_sft, torch.optim.AdamW),        # 2.5 and 3.7
    (train_classifier, torch.optim.AdamW),
    (train_rm, torch.optim.Adam),          # 4.5, phase 2
    (train_dpo, torch.optim.AdamW)])       # 4.7
def test_later_stages_take_the_documents_optimizer_without_weight_decay(parts_of, script, kind):
    optimizer = parts_of(script)["optimizer"]
    assert type(optimizer) is kind
    assert weight_decays(optimizer) == (0.0, 0.0)


def test_ppo_has_two_adams(parts_of):
    parts = parts_of(train_ppo)
    for name in ("actor_optimizer", "critic_optimizer"):
        assert type(parts[name]) is torch.optim.Adam
        assert weight_decays(parts[name]) == (0.0, 0.0)


def test_a_default_model_is_a_plain_llama(parts_of):
    model = parts_of(train_pretrain)["model"]
    assert type(model) is Transformer
    assert not model.config.token_shift and model.config.common == model.config.n_experts == 0
    assert all(type(block.mlp) is SwiGLU for block in model.blocks)
    parts = {"embedding.weight", "norm.weight"}
    for i in range(len(model.blocks)):
        for part in ("attention_norm", "attention.wq", "attention.wk", "attention.wv",
                     "attention.wo", "mlp_norm", "mlp.w13", "mlp.w2"):
            parts.add(f"blocks.{i}.{part}.weight")
    assert set(model.state_dict()) == parts


def test_copying_steps_and_further_loss_terms_are_off():
    assert train_pretrain.Config().copy_steps == 0
    reward = train_rm.Config()
    assert reward.loss == "bt"
