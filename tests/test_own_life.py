"""Claims about own_life.py: SFT, reward model, DPO and PPO on a base and data of one's own."""
import json

import pytest
from test_convert import BASE, write_folder
from tiny import ending_model, folder_of, write_rows

import convert
import lifecycle
import own_life
from plumbing.folders import load_model

QUICK = {
    "sft": {"steps": 2, "warmup": 1, "batch_size": 2, "context_length": 0, "eval_every": 2},
    "rm": {"steps": 2, "warmup": 1, "batch_size": 2, "eval_every": 2, "eval_pairs": 4,
           "n_shift": 2, "max_new_tokens": 8},
    "dpo": {"steps": 2, "warmup": 1, "batch_size": 2, "eval_every": 2, "eval_pairs": 4},
    "ppo": {"steps": 1, "batch_size": 2, "minibatch_size": 2, "max_new_tokens": 8},
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line of a run on 60 rows of each kind and a model of random weights."""
    monkeypatch.setattr(own_life, "PLAN", QUICK)
    monkeypatch.setattr(own_life, "ANSWER", 8)
    monkeypatch.setattr(own_life, "LORA", {"peft": "lora", "lora_rank": 2})
    prompts = [f"Say {i}" for i in range(60)]
    tasks = [{"prompt": prompt, "response": f"It is {prompt[4:]}."} for prompt in prompts]
    pairs = [{"prompt": prompt, "chosen": "Yes.", "rejected": "No, no."} for prompt in prompts]
    base = folder_of(ending_model(context_length=128), tmp_path / "base")
    return {"base": base, "out": str(tmp_path / "out"), "device": "cpu", "dtype": "float32",
            "sft_data": write_rows(tmp_path / "tasks.jsonl", tasks),
            "pairs": write_rows(tmp_path / "pairs.jsonl", pairs),
            "prompts": write_rows(tmp_path / "prompts.jsonl", [{"prompt": p} for p in prompts])}


def test_four_stages_and_a_report_of_what_can_be_measured(command, tmp_path, capsys):
    found = lifecycle.main(lifecycle.Config(**command))
    assert [*found["results"]] == ["sft", "rm", "dpo", "ppo"]
    assert abs(found["figures"]["ppo"]["kl"]) < 1             # one step of PPO moves little
    assert 0 <= found["figures"]["dpo"]["wins"] <= 1
    assert "wins" not in found["figures"]["base"]
    report = (tmp_path / "out/report.md").read_text()
    n_prompts = report.count("**Say ")
    for policy in own_life.POLICIES:
        assert report.count(f"- {policy}: ") == n_prompts > 0
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["figures"]["sft"] == found["figures"]["sft"]
    # a second time nothing is trained again
    capsys.readouterr()
    lifecycle.main(lifecycle.Config(**command))
    assert capsys.readouterr().err.count("finished before, skipped") == 4


def test_the_report_asks_what_the_shortest_context_has_room_for(command, tmp_path, monkeypatch):
    """64 tokens are for an answer: a prompt of 59 fits into the base's 128, not into SFT's 80."""
    monkeypatch.setattr(own_life, "ANSWER", 64)
    short = {"sft": QUICK["sft"] | {"context_length": 80},
             "ppo": QUICK["ppo"] | {"max_new_tokens": 32, "truncate": "drop"}}
    monkeypatch.setattr(own_life, "PLAN", QUICK | short)
    prompts = [f"Say {i}" for i in range(60)] + [f"Say {i} " + "z" * 50 for i in range(60)]
    command["prompts"] = write_rows(tmp_path / "long.jsonl", [{"prompt": p} for p in prompts])
    found = lifecycle.main(lifecycle.Config(**command))
    assert [*found["figures"]] == [*own_life.POLICIES]
    assert "zzz" not in (tmp_path / "out/report.md").read_text()


def test_a_prompt_that_stands_twice_is_answered_once(tmp_path):
    rows = [{"prompt": f"Say {i % 30}"} for i in range(60)]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    found = [row["messages"][0]["content"] for row in own_life.distinct_prompts(file, 0)]
    assert 0 < len(found) == len(set(found))
    assert found != [row["messages"][0]["content"] for row in own_life.distinct_prompts(file, 1)]


def test_no_stage_stops_at_a_row_that_is_too_long():
    assert {own_life.PLAN[name]["truncate"] for name in own_life.STAGES} == {"drop"}


def test_every_stage_takes_a_model_from_elsewhere(command, tmp_path):
    folder = write_folder(tmp_path / "hf", BASE | {"max_position_embeddings": 128})
    convert.main(convert.Config(init=str(folder), out=str(tmp_path / "imported")))
    found = lifecycle.main(lifecycle.Config(**command | {"base": str(tmp_path / "imported")}))
    assert [*found["results"]] == ["sft", "rm", "dpo", "ppo"]
    _, base_tokenizer = load_model(tmp_path / "imported")
    _, tokenizer = load_model(tmp_path / "out/ppo")
    assert tokenizer == base_tokenizer


@pytest.mark.parametrize("option", ["sft_data", "pairs", "prompts"])
def test_a_base_without_its_data_is_refused_and_data_without_a_base(option, command, tmp_path):
    with pytest.raises(ValueError, match=f"--{option} is missing"):
        lifecycle.main(lifecycle.Config(**command | {option: ""}))
    with pytest.raises(ValueError, match=f"--{option} .*give it as --base"):
        lifecycle.main(lifecycle.Config(**{option: command[option]}))
    assert not (tmp_path / "out").exists()


def test_every_option_of_the_plan_is_one_of_its_script():
    cfg = lifecycle.Config(base="b", sft_data="s", pairs="p", prompts="q")
    for name, (_, config) in own_life.stages(cfg).items():
        assert config.adapters.peft == "lora"
        assert config.steps == own_life.PLAN[name]["steps"]
