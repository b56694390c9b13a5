"""experiments/system_prompts.py: rules that are kept, recognised and taken off again; the exam."""
import json

import pytest
from tiny import TOKENIZER, folder_of, tiny_model

import readers
import train_sft
from experiments import system_prompts
from experiments.system_prompts import NO_RULE, NONE, RULES, conversation, draw_tasks
from plumbing.options import build
from world.judge import parse_answer

TASKS = [task for tasks in draw_tasks(0, 200, "train") for task in tasks]


@pytest.mark.parametrize("name, dressed", [
    ("capitals", "A FROG. I HOPE SO!"), ("greeting", "Hello! A frog. I hope so!"),
    ("servant", "A frog. I hope so! At your service!"),
    ("json", '{"answer": "A frog. I hope so!"}'), ("bullets", "- A frog.\n- I hope so!"),
    ("markdown", "# Answer\nA frog. I hope so!")])
def test_a_rule_dresses_an_answer_and_takes_the_dress_off(name, dressed):
    rule = RULES[name]
    assert rule.rewrite("A frog. I hope so!") == dressed
    assert rule.plain(dressed) == "A frog. I hope so!"
    assert rule.plain("A frog. I hope so!") == "A frog. I hope so!"    # not dressed: as it is
    assert system_prompts.undressed(dressed) == "A frog. I hope so!"


@pytest.mark.parametrize("name", RULES)
def test_the_judge_finds_in_every_dress_what_the_demonstration_says(name):
    rule = RULES[name]
    for task in TASKS:
        dressed = rule.rewrite(task["response"])
        assert rule.obeys(dressed) and not rule.obeys(task["response"])
        for plain in (rule.plain, system_prompts.undressed):
            assert parse_answer(task, plain(dressed)) == parse_answer(task, task["response"])


def test_no_answer_of_one_rule_keeps_another_and_plain_ones_keep_none():
    for task in TASKS:
        assert not NO_RULE.obeys(task["response"]) and NO_RULE.rewrite("A.") == "A."
        for name, rule in RULES.items():
            dressed = rule.rewrite(task["response"])
            assert [other for other in RULES if RULES[other].obeys(dressed)] == [name]


@pytest.mark.parametrize("name, text", [
    ("json", '{"answer": 5}'), ("json", '{"answer": "a", "b": "c"}'), ("json", '{"answer": "a"'),
    ("json", 'Yes: {"answer": "a"}'), ("bullets", "- A frog.\nI hope so!"), ("bullets", ""),
    ("markdown", "# Answer A frog."), ("capitals", "A FROG. I HOPE so!")])
def test_half_of_a_rule_is_not_obeyed(name, text):
    assert not RULES[name].obeys(text)


def test_held_out_wordings_are_no_training_wordings():
    said = [wording for rule in RULES.values() for wording in rule.wordings + rule.heldout]
    assert len(said) == len(set(said)) == 6 * 8


def test_half_of_the_conversations_have_a_system_turn_and_long_ones_are_counted(tmp_path,
                                                                                monkeypatch):
    monkeypatch.setattr(system_prompts, "N_CONVERSATIONS", 60)
    file, dropped = system_prompts.write_data(0, TOKENIZER, 400, tmp_path / "rules.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert dropped == 60 - len(rows) > 0 and len(readers.read_examples(file)) == len(rows)
    for row in rows:
        roles = [turn["role"] for turn in row["messages"]]
        has_rule = row["task"] != NONE
        assert roles == ["system"] * has_rule + ["user", "assistant"] * 3
        assert len(TOKENIZER.conversation(row["messages"])) <= 400
        rule = RULES.get(row["task"], NO_RULE)
        said = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert all(rule.obeys(text) == has_rule for text in said)
        assert not has_rule or row["messages"][0]["content"] in rule.wordings
    assert len({row["task"] for row in rows}) == 1 + len(RULES)


def test_the_exam_counts_turn_by_turn_and_shows_the_models_own_answers(tmp_path, monkeypatch):
    """An obedient model that answers one turn in three wrongly, and one that stops after one."""
    folder = folder_of(tiny_model(context_length=2048), tmp_path / "model")

    def demonstrations(model, tokenizer, conversations):
        texts = []
        for turns in conversations:
            system = turns[0]["content"] if turns[0]["role"] == "system" else ""
            rules = [rule for rule in RULES.values() if system in rule.wordings + rule.heldout]
            [rule] = rules or [NO_RULE]
            task = by_prompt[turns[-1]["content"]]
            n_before = sum(turn["role"] == "assistant" for turn in turns)
            texts.append(rule.rewrite("Nothing." if n_before == 1 else task["response"]))
        return texts
    by_prompt = {task["prompt"]: task for tasks in draw_tasks(0, 12, "heldout") for task in tasks}
    monkeypatch.setattr(system_prompts, "answers", demonstrations)
    found = system_prompts.examine(folder, 0, 4)
    for name, obeyed in found["obeyed"].items():
        assert obeyed == pytest.approx([0.0 if name == NONE else 1.0] * 3)
        right = found["right"][name]
        assert right[1] == 0 and right[0] == found["right"][NONE][0] > 0.5 < right[2]
    monkeypatch.setattr(system_prompts, "answers", lambda model, tokenizer, conversations:
                        ["" if len(turns) > 2 else "A FROG." for turns in conversations])
    obeyed = system_prompts.examine(folder, 0, 4)["obeyed"]
    assert obeyed["capitals, training"] == pytest.approx([1, 0, 0])
    assert obeyed["json, held-out"] == [0, 0, 0]


def test_answers_that_do_not_end_or_do_not_fit_are_empty(monkeypatch):
    model = tiny_model(context_length=200)
    turns = [{"role": "user", "content": "hi"}]
    long = [{"role": "user", "content": "h" * 150}]
    end = TOKENIZER.end
    monkeypatch.setattr(system_prompts.sample, "generate", lambda model, prompts, *rest:
                        [[104, end], [104]][:len(prompts)])
    assert system_prompts.answers(model, TOKENIZER, [turns, long, turns]) == ["h", "", ""]
    assert system_prompts.answers(model, TOKENIZER, [long]) == [""]


def test_train_sft_has_the_options_that_the_experiment_names():
    assert build(train_sft.Config, system_prompts.SFT).steps == 400
    turns = conversation(TASKS[:3], RULES["json"], "Output only JSON.")
    assert [turn["role"] for turn in turns] == ["system"] + ["user", "assistant"] * 3
