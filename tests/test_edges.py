"""The edges of every script: damaged records, sizes that no memory holds, a chat that is
interrupted. Each ends in one line: what was found, where, and what would be right."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stages import write_inputs
from test_claim import content
from tiny_runs import tiny_run, write_corpus

import lora
import sample
import train_dpo
import train_pretrain
from plumbing.folders import load_model
from plumbing.options import build, command_line

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("edges"))


def with_field(folder: Path, name: str, value) -> None:
    """Change a field of config.json, of the model if it is one of its sizes; without checksums."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)
    place = config["model"] if name in config["model"] else config
    if value is KeyError:
        del place[name]
    else:
        place[name] = value
    (folder / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------- records

RECORDS = [
    ("n_layers", 1_000_000, "does not fit config.json.*the blocks alone have"),
    ("n_layers", "two", "n_layers is 'two'; it must be of type int"),
    ("n_layers", True, "n_layers is True; it must be of type int"),
    ("d_model", -16, "--d_model -16: give a number >= 1"),
    ("rope_theta", float("nan"), "--rope_theta nan: give a number > 0"),
    ("n_heads", 3, "d_model 16 is not a multiple of n_heads 3"),
    ("vocab_size", KeyError, "vocab_size"),
    ("architecture", ["decoder"], "architecture is"),
    ("model", [], 'its "model" is list and not dict'),
    ("model", KeyError, 'it has no "model"'),
    ("parents", 3, 'its "parents" is int and not dict')]


@pytest.mark.parametrize("name, value, named", RECORDS)
def test_a_record_with_a_wrong_field_is_named(models, tmp_path, name, value, named):
    folder = shutil.copytree(models / "sft", tmp_path / "sft")
    with_field(folder, name, value)
    with pytest.raises(ValueError, match=f"sft.*{named}"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 5000, '{"model": '])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_of_another_kind_is_named(models, tmp_path, name, text):
    folder = shutil.copytree(models / "sft", tmp_path / "sft")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"sft/{name}"):
        load_model(folder)


@pytest.mark.parametrize("text", ["[]", '{"rank": 2}', "[" * 5000, '{"rank": "2", "alpha": 1, '
                                  '"targets": "wq"}'])
def test_an_adapter_with_a_wrong_field_is_named(tmp_path, text):
    (tmp_path / "adapter.json").write_text(text)
    shutil.copy(ROOT / "README.md", tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="adapter.json"):
        lora.read_adapter(tmp_path)


def test_a_checkpoint_whose_record_is_of_another_kind_is_damaged(tmp_path, capsys):
    out = tmp_path / "out"
    cfg = tiny_run(out, write_corpus(tmp_path), save_every=5)
    train_pretrain.main(cfg)
    (out / "config.json").unlink()
    for text in ("[]", '{"step": "x"}', "[" * 5000):
        (out / "checkpoints" / "step_000012" / "meta.json").write_text(text)
        cfg.resume = True
        train_pretrain.main(cfg)
        said = capsys.readouterr().err
        assert "step_000012/meta.json is damaged" in said and "going on from step 10" in said


# ---------------------------------------------------------------------- sizes

@pytest.mark.parametrize("sizes", [{"n_layers": 1_000_000}, {"d_model": 2 ** 20, "n_layers": 2},
                                   {"d_ff": 10 ** 10}])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(tmp_path, sizes):
    with pytest.raises(ValueError, match="GB to be trained, but there are .*give smaller"):
        train_pretrain.main(tiny_run(tmp_path / "out", write_corpus(tmp_path), **sizes))


# ---------------------------------------------------------------------- how a script ends

def ends(main, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        command_line(main, train_dpo.Config, "")
    code = end.value.code
    said = capsys.readouterr().err
    return (1, code) if isinstance(code, str) else (code, said)


def test_ctrl_c_before_the_first_step_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt
    code, said = ends(interrupted, monkeypatch, capsys)
    assert code == 130 and said == "script.py: interrupted before there was anything to save\n"


def test_a_run_that_cannot_begin_is_one_line_and_1(models, tmp_path, monkeypatch, capsys):
    def missing(cfg):
        train_dpo.main(build(train_dpo.Config, {"init": str(models / "nowhere"),
                                                "out": str(tmp_path / "out")}))
    code, said = ends(missing, monkeypatch, capsys)
    assert code == 1 and said.startswith("script.py: ") and said.count("\n") == 0


# ---------------------------------------------------------------------- a chat

def chat(models: Path, typed: bytes, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "sample.py", "--init", str(models / "sft"), "--device",
                           "cpu", "--max_new_tokens", "3", *more], cwd=ROOT, input=typed,
                          capture_output=True, timeout=100)


def test_a_chat_goes_on_after_a_line_too_long_and_a_broken_byte(models):
    before = content(models)
    done = chat(models, b"hi\n" + b"a bear " * 40 + b"\n\xff\xfe\nhello\n")
    said = done.stdout.decode()
    assert done.returncode == 0 and not done.stderr
    assert "tokens long, and 61 fit; say it shorter" in said and "not UTF-8; type it again" in said
    assert content(models) == before


def test_an_answer_may_be_interrupted(models, monkeypatch, capsys):
    asked = iter(["one", "two", ""])
    answers = iter([KeyboardInterrupt, "fine"])
    prompts = []

    def answer(model, tokenizer, prompt, cfg, generator):
        prompts.append(tokenizer.decode(prompt, specials=True))
        said = next(answers)
        if said is KeyboardInterrupt:
            raise KeyboardInterrupt
        return said
    monkeypatch.setattr(sample, "read_line", lambda: next(asked))
    monkeypatch.setattr(sample, "print_stream", answer)
    sample.main(build(sample.Config, {"init": str(models / "sft"), "device": "cpu"}))
    assert "stopped" in capsys.readouterr().out and "one" not in prompts[1]
