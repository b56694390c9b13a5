"""plumbing/folders.py: what is written comes back, what is damaged or foreign is refused by name,
and folders of former versions open."""
import json

import pytest
import safetensors.torch
import torch
from tiny import TOKENIZER, tiny_model

from heads import WithHead
from model import Transformer
from plumbing.folders import (
    current_names,
    load_any_model,
    load_model,
    load_reward_model,
    save_model,
)
from tokenizer import Tokenizer

torch.set_num_threads(1)


def tiny(**changes) -> Transformer | WithHead:
    """A small model in which no weight is still at its starting zero or one."""
    model = tiny_model(**{"context_length": 24, "n_heads": 4, "n_kv_heads": 2} | changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_tokens(*shape):
    return torch.randint(272, shape, generator=torch.Generator().manual_seed(1))


def saved(folder, **changes) -> Transformer | WithHead:
    model = tiny(**changes)
    save_model(folder, model, TOKENIZER, stage="test", seed=3)
    return model


KINDS = {"decoder": {}, "untied": {"tied": False}, "experts": {"n_experts": 4, "balance": "bias"},
         "encoder": {"architecture": "encoder", "token_shift": True},
         "prefix": {"architecture": "prefix"}, "sentences": {"architecture": "encoder",
                                                             "n_segments": 2},
         "encoder_decoder": {"architecture": "encoder_decoder", "token_shift": True}}


def inputs_of(kind):
    tokens = some_tokens(2, 9)
    more = {"sentences": {"segments": tokens % 2}, "prefix": {"prefix": torch.tensor([3, 9])},
            "encoder_decoder": {"source": tokens, "source_lengths": torch.tensor([9, 4])}}
    return {"tokens": tokens, **more.get(kind, {})}


def assert_same(model, loaded, kind):
    assert type(loaded) is type(model) and loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in
               zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert torch.equal(loaded(**inputs_of(kind)), model(**inputs_of(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(tmp_path, kind):
    model = saved(tmp_path / "new" / "folder", **KINDS[kind])
    loaded, tokenizer = load_any_model(tmp_path / "new" / "folder")
    assert tokenizer == TOKENIZER
    assert_same(model, loaded, kind)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_reward_model_is_the_saved_one_bit_for_bit(tmp_path, tied):
    model = saved(tmp_path / "folder", head="scalar", tied=tied)
    loaded, tokenizer = load_reward_model(tmp_path / "folder")
    assert tokenizer == TOKENIZER
    assert_same(model, loaded, "decoder")
    assert all(weight.requires_grad for weight in loaded.parameters())
    for load in (load_model, load_any_model):
        with pytest.raises(ValueError, match="folder: this is a reward model; give a language"):
            load(tmp_path / "folder")


def test_a_language_model_is_no_reward_model(tmp_path):
    saved(tmp_path / "sft")
    with pytest.raises(ValueError, match="sft: this is a language model; give a reward model"):
        load_reward_model(tmp_path / "sft")


def test_a_model_folder_holds_three_files_and_its_record(tmp_path):
    saved(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "files.json",
                                                          "model.safetensors", "tokenizer.json"]
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["stage"], record["seed"], record["model"]["d_ff"]) == ("test", 3, 96)


def test_saving_over_a_model_replaces_it(tmp_path):
    saved(tmp_path)
    newer = saved(tmp_path, seed=1, n_layers=1)
    assert torch.equal(load_model(tmp_path)[0].embedding.weight, newer.embedding.weight)


def test_loading_casts_the_residual_stream_but_not_the_weights(tmp_path):
    saved(tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_half_written_folder_is_refused_by_the_missing_file(tmp_path, missing):
    saved(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"{missing}.*not finished"):
        load_model(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", None), ("model.safetensors", b""), ("config.json", b'{"mod'),
    ("config.json", b"{}"), ("tokenizer.json", b"[1, 2")])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    saved(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    saved(tmp_path)
    Tokenizer(TOKENIZER.ranks | {b"th": 256}).save(tmp_path)
    with pytest.raises(ValueError, match="272 tokens, its tokenizer 273"):
        load_model(tmp_path)


def test_weights_of_another_shape_or_name_are_refused(tmp_path):
    for changes in ({"d_model": 64}, {"n_layers": 3}, {"tied": False}):
        saved(tmp_path)
        other = tiny(**changes).state_dict()
        safetensors.torch.save_file(other, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="does not fit config.json"):
            load_model(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_becomes_a_reward_model_with_a_fresh_head(tmp_path, tied):
    model = saved(tmp_path, tied=tied)
    reward = WithHead(load_model(tmp_path)[0], 1)
    tokens = some_tokens(2, 9)
    assert torch.equal(reward.trunk.hidden(tokens), model.hidden(tokens))
    assert reward(tokens).shape == (2, 9, 1) and reward.head.weight.abs().min() > 0
    assert reward.head.bias.item() == 0
    assert torch.equal(reward.trunk.output_weight, model.output_weight)
    save_model(tmp_path / "rm", reward, TOKENIZER)
    again = load_reward_model(tmp_path / "rm")[0]                      # now its head is kept
    assert torch.equal(again(tokens), reward(tokens))


def test_context_length_can_be_changed_on_loading(tmp_path):
    model = saved(tmp_path)
    longer, _ = load_model(tmp_path, context_length=50)
    tokens = some_tokens(1, 50)
    assert longer(tokens).shape == (1, 50, 272)
    assert torch.equal(longer(tokens[:, :20]), model(tokens[:, :20]))


# ---------------------------------------------------------------------- former versions

def as_before(folder, model, likelihood=0.0) -> None:
    """Write the model as former versions did: heads beside the trunk, more fields in config.json,
    and in a reward model a weight for log p(y | x)."""
    save_model(folder, model, TOKENIZER, stage="test")
    weights = model.state_dict()
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    if isinstance(model, WithHead):
        scalar = config["model"]["head"] == "scalar"
        head = "scalar_head." if scalar else "next_sentence_head."
        weights = {name.replace("trunk.", "").replace("head.", head) if "lm_head" not in name
                   else name.replace("trunk.", ""): w for name, w in weights.items()}
        if scalar:
            weights |= {"likelihood": torch.tensor([likelihood]),
                        "likelihood_unit": torch.tensor([1.5])}
        config["model"]["head"] = "scalar" if scalar else "lm"
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_former_version_opens(tmp_path, kind):
    model = tiny(**KINDS[kind])
    as_before(tmp_path / "old", model)
    config = json.loads((tmp_path / "old" / "config.json").read_text())["model"]
    assert config["head"] == "lm" and config["n_segments"] == 2 * (kind == "sentences")
    assert config["architecture"] == getattr(model, "trunk", model).architecture
    assert_same(model, load_any_model(tmp_path / "old")[0], kind)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_of_a_former_version_opens(tmp_path, tied):
    model = tiny(head="scalar", tied=tied)
    as_before(tmp_path / "old", model)
    names = safetensors.torch.load_file(tmp_path / "old" / "model.safetensors").keys()
    assert {"scalar_head.weight", "scalar_head.bias", "likelihood", "norm.weight"} <= names
    assert ("lm_head.weight" in names) != tied
    assert_same(model, load_reward_model(tmp_path / "old")[0], "decoder")
    with pytest.raises(ValueError, match="old: this is a reward model; give a language"):
        load_model(tmp_path / "old")


def test_a_reward_that_reads_log_p_is_refused_by_name(tmp_path):
    as_before(tmp_path / "old", tiny(head="scalar"), likelihood=0.25)
    with pytest.raises(ValueError, match='old: .*weight "likelihood" of 0.25.*log p.*train the '
                                         'reward model again'):
        load_reward_model(tmp_path / "old")


def test_names_of_today_stay_as_they_are():
    for model in (tiny(), tiny(head="scalar"), tiny(architecture="encoder_decoder")):
        weights = model.state_dict()
        assert current_names(weights) == weights


def test_an_unknown_architecture_is_refused(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["architecture"] = "T5"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architecture is 'T5'.*'encoder_decoder'"):
        load_any_model(tmp_path)


# ---------------------------------------------------------------------- what the run wrote, or not

def flip_a_bit(folder):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def transpose(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "blocks.0.attention.wo.weight"              # as wide as high
    weights[name] = weights[name].T.contiguous()
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def edit_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= {"n_heads": 2, "n_kv_heads": 1}         # the matrices are as large as before
    config["model"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))


def permute_ranks(folder):
    ranks = sorted(TOKENIZER.ranks, key=TOKENIZER.ranks.get)[::-1]
    Tokenizer({token: i for i, token in enumerate(ranks)}).save(folder)


@pytest.mark.parametrize("change, named", [
    (flip_a_bit, "model.safetensors is not what"), (transpose, "model.safetensors is not what"),
    (edit_heads, 'the "model" of config.json is not what'),
    (permute_ranks, "tokenizer.json is not what")])
def test_a_changed_folder_is_refused_and_may_be_accepted(tmp_path, capsys, change, named):
    saved(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=f'{named} the run wrote.*remove "sha256" from config'):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_model(tmp_path)
    assert "no checksums in its config.json; taken as it is" in capsys.readouterr().err


@pytest.mark.parametrize("value, named", [
    (torch.nan, "norm.weight in model.safetensors is not finite"),
    (torch.inf, "norm.weight in model.safetensors is not finite")])
def test_weights_that_are_not_finite_are_neither_read_nor_written(tmp_path, value, named):
    model = saved(tmp_path)
    weights = model.state_dict()
    weights["norm.weight"][3] = value
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        load_model(tmp_path)
    with pytest.raises(FloatingPointError, match="norm.weight is not finite; no model is written"):
        save_model(tmp_path / "new", model, TOKENIZER)


def test_weights_are_floating_point_numbers(tmp_path):
    weights = saved(tmp_path).state_dict()
    weights["norm.weight"] = weights["norm.weight"].long()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight in model.safetensors is torch.int64"):
        load_model(tmp_path)
