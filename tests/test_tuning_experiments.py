"""
experiments/chain_of_thought.py, mixing_tau.py, masking.py, instruction_tuning.py: what they read,
options they name.
"""
import json
from collections import Counter

import pytest

import evaluate
import train_dpo
import train_sft
from experiments import chain_of_thought, instruction_tuning, masking, mixing_tau
from plumbing.options import build
from tokenizer import Tokenizer
from world.text import FORMS


@pytest.mark.parametrize("options", [
    chain_of_thought.SFT | {"cot_ratio": chain_of_thought.RATIOS[1]},
    masking.SFT | {"train_on": masking.WAYS[1]},
    *[mixing_tau.SFT | mixture for mixture in mixing_tau.MIXTURES.values()]])
def test_experiments_name_options_that_train_sft_has(options):
    assert build(train_sft.Config, options).steps >= 300


def test_a_family_is_a_task_of_its_own_a_hundred_times_as_large_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(mixing_tau, "SIZES", {100: mixing_tau.LARGE, 10: mixing_tau.SMALL})
    lines = mixing_tau.write_data(0, tmp_path / "tasks.jsonl").read_text().splitlines()
    counts = Counter(json.loads(line)["task"] for line in lines)
    assert counts == {**dict.fromkeys(mixing_tau.LARGE, 110), **dict.fromkeys(mixing_tau.SMALL, 11)}


def test_every_sum_has_its_chain_beside_it(tmp_path, monkeypatch):
    real = chain_of_thought.readers.read_examples
    monkeypatch.setattr(chain_of_thought.readers, "read_examples",
                        lambda *arguments, **options: real(*arguments, **options | {"n": 30}))
    lines = chain_of_thought.write_data(0, tmp_path / "sums.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60 and all(row["chain"].count("=") == 2 for row in rows)


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
    monkeypatch.setattr(instruction_tuning.sample, "generate", generate)
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."},
             {"role": "user", "content": "What is it?"}]
    examples = [{"prompt": turns, "key": {"sentences": 1}}, {"prompt": "And?", "key": {}}]
    texts = instruction_tuning.continued(None, tokenizer, examples)
    assert texts == ["A frog.", "A frog. A hen! The an"]     # a story may have any number
    assert [tokenizer.decode(ids) for ids in asked] == ["Hello! Hi. What is it?", "And?"]


def test_what_is_drawn_is_in_the_table(tmp_path):
    exam = dict.fromkeys(instruction_tuning.ROWS, 0.25)
    found = {stage: [exam, dict.fromkeys(exam, 0.75)] for stage in instruction_tuning.STAGES}
    cfg = instruction_tuning.Config(seeds="0,1", figure=str(tmp_path / "x.png"))
    instruction_tuning.draw(found, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    lines = instruction_tuning.table(found, cfg).splitlines()
    assert len(lines) == 6 + len(instruction_tuning.ROWS)
    assert lines[-1] == "| ... not asked |" + " 50.0% (25.0% to 75.0%) |" * 3
