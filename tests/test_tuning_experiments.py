"""
experiments/chain_of_thought.py, mixing_tau.py, masking.py, instruction_tuning.py, quality.py,
lima.py: what they read, options they name.
"""
import json
from collections import Counter

import pytest
from tiny import folder_of, tiny_model

import data_quality
import evaluate
import readers
import train_dpo
import train_sft
from experiments import (
    base,
    chain_of_thought,
    instruction_tuning,
    lima,
    masking,
    mixing_tau,
    quality,
)
from plumbing.options import build
from tokenizer import Tokenizer
from world.judge import is_inventing, is_rambling, is_right
from world.text import FORMS


@pytest.mark.parametrize("options", [
    chain_of_thought.SFT | {"cot_ratio": chain_of_thought.RATIOS[1]},
    masking.SFT | {"train_on": masking.WAYS[1]}, quality.SFT, lima.SFT,
    *[mixing_tau.SFT | mixture for mixture in mixing_tau.MIXTURES.values()]])
def test_experiments_name_options_that_train_sft_has(options):
    assert build(train_sft.Config, options).steps >= 300


def test_a_family_is_a_task_of_its_own_a_hundred_times_as_large_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(mixing_tau, "SIZES", {100: mixing_tau.LARGE, 10: mixing_tau.SMALL})
    lines = mixing_tau.write_data(0, tmp_path / "tasks.jsonl").read_text().splitlines()
    counts = Counter(json.loads(line)["task"] for line in lines)
    assert counts == {**dict.fromkeys(mixing_tau.LARGE, 100), **dict.fromkeys(mixing_tau.SMALL, 10)}


def test_every_sum_has_its_chain_beside_it(tmp_path, monkeypatch):
    real = chain_of_thought.readers.read_examples
    monkeypatch.setattr(chain_of_thought.readers, "read_examples",
                        lambda *arguments, **options: real(*arguments, **options | {"n": 30}))
    lines = chain_of_thought.write_data(0, tmp_path / "sums.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 30 and all(row["chain"].count("=") == 2 for row in rows)


@pytest.mark.parametrize("script", [chain_of_thought, mixing_tau])
def test_no_task_of_the_exam_is_in_the_data(script, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing_tau, "SIZES", {300: mixing_tau.LARGE + mixing_tau.SMALL})
    lines = script.write_data(0, tmp_path / "tasks.jsonl").read_text().splitlines()
    asked = {json.loads(line)["messages"][-2]["content"] for line in lines}
    exam = evaluate.exam("world:0", 200, ("arithmetic", "translation", "lists"))
    assert not asked & {readers.checked_turns(task["prompt"], "prompt", "user")[-1]["content"]
                        for task in exam}


def test_alignment_of_the_tuned_model_names_options_that_train_dpo_has():
    cfg = build(train_dpo.Config, instruction_tuning.DPO)
    assert train_dpo.check(cfg).steps * cfg.batch_size == cfg.n_pairs          # each pair once


def test_the_sentence_that_asks_for_steps_is_one_that_training_has_behind_the_last_turn():
    assert instruction_tuning.ASKED in FORMS["steps"]
    [example] = evaluate.exam("world", 1, ("arithmetic",))
    turns = instruction_tuning.turns_of(example)
    *before, last = instruction_tuning.asked_for_steps(example)["prompt"]
    assert before == turns[:-1]
    assert last == {"role": "user", "content": f"{turns[-1]['content']} Do it step by step."}


def test_each_prompt_has_as_many_solved_ones_as_fit_it():
    tokenizer = Tokenizer.bytes()
    short, long = ({"family": "tally", "prompt": text} for text in ("How many?", 400 * "x"))
    before = []
    for room in (10_000, 700):
        shown = instruction_tuning.with_shots("world", [short, long], 3, tokenizer, room)
        before.append([len(instruction_tuning.turns_of(example)) // 2 for example in shown])
    assert before == [[3, 3], [3, 1]]


@pytest.mark.parametrize("form, text, kept", [
    ("label", "Answer: frog.", True), ("label", "Of course! Answer: frog.", True),
    ("label", "The middle one is frog.", False), ("sentence", "The middle one is frog.", True),
    ("sentence", "Answer: frog.", False), ("sentence", "", False)])
def test_a_form_is_kept_in_what_answers(form, text, kept):
    example = {"answer": "frog", "key": {"form": form}}
    assert instruction_tuning.in_form(example, text) == kept


def test_a_base_model_is_given_a_text_and_as_many_sentences_as_an_answer_has(monkeypatch):
    tokenizer = Tokenizer.bytes()
    asked = []

    def generate(model, prompts, *arguments):
        asked.extend(prompts)
        return [tokenizer.encode("A frog. A hen! The an") for _ in prompts]
    monkeypatch.setattr(base.sample, "generate", generate)
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."},
             {"role": "user", "content": "What is it?"}]
    examples = [{"prompt": turns, "key": {"sentences": 1}}, {"prompt": "And?", "key": {}}]
    texts = base.continued(None, tokenizer, examples)
    assert texts == ["A frog.", "A frog. A hen! The an"]     # a story may have any number
    assert [tokenizer.decode(ids) for ids in asked] == ["Hello! Hi. What is it?", "And?"]


def test_a_stage_by_lora_names_options_that_its_script_has():
    assert build(train_sft.Config, instruction_tuning.LORA_SFT).steps == 60
    assert build(train_dpo.Config, instruction_tuning.LORA_DPO).steps == 60
    assert instruction_tuning.shorter(instruction_tuning.LORA_DPO)["n_pairs"] == 50
    assert instruction_tuning.shorter(instruction_tuning.LORA_SFT)["n_examples"] == 100


def test_an_answer_that_never_ends_is_read_up_to_the_limit(monkeypatch):
    tokenizer = Tokenizer.bytes()
    never_ended = tokenizer.encode("A frog. And a")
    monkeypatch.setattr(evaluate, "answers", lambda *_: [never_ended])
    assert base.cut_texts(None, tokenizer, [{}]) == ["A frog. And a"]
    assert evaluate.greedy_texts(None, tokenizer, [{}]) == [""]


def test_what_is_drawn_is_in_the_table(tmp_path):
    exam = dict.fromkeys(instruction_tuning.ROWS, 0.25)
    found = {stage: [exam, dict.fromkeys(exam, 0.75)] for stage in instruction_tuning.STAGES}
    cfg = instruction_tuning.Config(seeds="0,1", figure=str(tmp_path / "x.png"))
    instruction_tuning.draw(found, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    lines = instruction_tuning.table(found, cfg).splitlines()
    assert len(lines) == 6 + len(instruction_tuning.ROWS)
    assert lines[-1] == "| ... not asked |" + " 50.0% (25.0% to 75.0%) |" * 3


# ---------------------------------------------------------------------- demonstrations by one hand

@pytest.mark.parametrize("split", ["train", "heldout"])
def test_demonstrations_are_split_again_as_they_were_drawn(tmp_path, split):
    rows = base.demonstrations(3, 40, split, base.careful)
    file = base.write_rows(tmp_path / "rows.jsonl", rows)
    found = readers.read_examples(file, split=split)
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    assert len(found) == 40


def test_prompts_are_the_same_whoever_answers_them():
    of_hands = [base.demonstrations(3, 60, "train", hand) for hand in (base.careful, lima.noisy)]
    prompts = [[row["messages"][:-1] for row in rows] for rows in of_hands]
    assert prompts[0] == prompts[1]
    assert base.demonstrations(3, 20, "train", base.careful) == of_hands[0][:20]


def test_no_right_chain_comes_back_before_a_wrong_answer():
    rows = base.demonstrations(0, 200, "train", quality.half_wrong, families=("arithmetic",))
    wrong = [row for row in rows if not is_right(row["example"], row["messages"][-1]["content"])]
    assert 60 < len(wrong) < 140               # half of 200, within six standard errors
    assert not any(row["chain"] for row in wrong)
    assert sum(bool(row["chain"]) for row in rows) == 200 - len(wrong)


# ---------------------------------------------------------------------- quality.py

@pytest.fixture(scope="module")
def sets():
    return {name: draw(0, 600) for name, draw in quality.SETS.items()}


@pytest.fixture(scope="module")
def of_sets(sets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_quality, "SAMPLE", 2)           # no row of the table compares prompts
        return {name: quality.measured(rows, 0) for name, rows in sets.items()}


def test_all_sets_have_as_many_rows_and_prompts_to_train_on(sets):
    for rows in sets.values():
        assert len(rows) == 600
        assert all(readers.in_split(readers.user_text(row), "train") for row in rows)


# {set: the measures that its damage lowers}
LOWERED = {"few prompts": {"new prompts"}, "few tasks": {"tasks"}, "simple": {"reasoning", "words"},
           "half wrong": {"right"}, "half misshapen": {"one format"}}


@pytest.mark.parametrize("name", LOWERED)
def test_each_damage_lowers_its_own_dimension(of_sets, name):
    for measure, clean in of_sets["clean"].items():
        after = of_sets[name][measure]
        if measure in LOWERED[name]:
            assert after < 0.75 * clean
        elif name not in ("few prompts", "few tasks") or measure in ("right", "one format"):
            # Where there are 30 prompts, or 4 tasks, they may have more or fewer words and chains.
            assert after > 0.85 * clean


def test_what_is_misshapen_is_not_wrong(of_sets):
    assert of_sets["half misshapen"]["one format"] == pytest.approx(0.5, abs=0.1)
    assert of_sets["half misshapen"]["right"] > 0.95 > of_sets["half wrong"]["right"]
    assert of_sets["half wrong"]["right"] == pytest.approx(0.5, abs=0.1)


def test_the_simplest_are_of_all_families_alike(sets):
    clean, simple = (Counter(row["example"]["family"] for row in sets[name])
                     for name in ("clean", "simple"))
    assert simple.keys() == clean.keys()
    assert max(simple.values()) - min(simple.values()) <= 1


# ---------------------------------------------------------------------- lima.py

def test_careless_hands_are_three_and_a_third_of_their_answers_wrong():
    rows = base.demonstrations(0, 900, "train", lima.noisy)
    answers = [row["messages"][-1]["content"] for row in rows]
    # 30 %, and the inventive hand's answers to what is to be refused or admitted: 1/3 of 2/18.
    wrong = sum(not is_right(row["example"], answer) for row, answer in zip(rows, answers)) / 900
    assert wrong == pytest.approx(0.3 + 0.7 / 3 * 2 / 18, abs=0.06)
    for fault in (is_rambling, is_inventing):
        assert sum(map(fault, answers)) / 900 == pytest.approx(1 / 3, abs=0.06)


def test_a_wrong_answer_is_dressed_as_its_hand_dresses_all(monkeypatch):
    monkeypatch.setattr(lima, "WRONG", 1.0)
    monkeypatch.setattr(lima, "CARELESS", ["rambling"])
    rows = base.demonstrations(0, 60, "train", lima.noisy)
    assert all(is_rambling(row["messages"][-1]["content"]) for row in rows)
    assert lima.MANNERS.keys() == {"terse", "rambling", "inventive"}


# ---------------------------------------------------------------------- what is examined

def test_the_format_of_answers_counts_those_that_never_end():
    prompts = [{"prompt": str(i), "cluster": "words"} for i in range(5)]
    texts = ["A frog.", "A hen.", "**A fox.**", "A cat", ""]
    assert base.consistent_share(prompts, texts) == 2 / 5
    assert base.consistent_share(prompts, [""] * 5) == 0


def test_a_policy_is_examined_on_all_that_the_tables_show(tmp_path):
    """A model that knows nothing is right nowhere."""
    folder = folder_of(tiny_model(context_length=512), tmp_path / "model")
    found = base.policy_figures(folder, 0, 4)
    assert found.keys() | {"unseen_families", "arithmetic"} == quality.COLUMNS.keys()
    assert lima.COLUMNS.keys() - {"right"} <= quality.COLUMNS.keys()
    assert not any(found.values())


@pytest.mark.parametrize("script, sets_of_a_seed", [(quality, 6), (lima, 4)])
def test_every_set_is_learned_and_stands_in_the_table(script, sets_of_a_seed, tmp_path,
                                                      monkeypatch, capsys):
    learned = []
    monkeypatch.setattr(data_quality, "SAMPLE", 2)
    monkeypatch.setattr(quality, "N", 600)
    monkeypatch.setattr(lima, "SIZES", (300, 900))

    def tuned_on(rows, folder, seed, base, n, **options):
        assert build(train_sft.Config, options).steps == 40        # --quick
        learned.append(folder)
        return dict.fromkeys(script.COLUMNS, 0.5)

    monkeypatch.setattr(script, "tuned_on", tuned_on)
    monkeypatch.setattr(script, "base_models", lambda seed: tmp_path)
    figure = tmp_path / "figure.png"
    script.main(script.Config(out=str(tmp_path / "out"), figure=str(figure), quick=True))
    assert len(set(learned)) == len(learned) == sets_of_a_seed
    assert figure.exists() and "(quick)" in figure.with_suffix(".md").read_text()
    assert "seeds 0:" in capsys.readouterr().out
