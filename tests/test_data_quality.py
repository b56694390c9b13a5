"""data_quality.py: each measure by hand, in its limiting cases, and each damage in its own one."""
import json
import math
import random

import pytest
from tiny import write_rows

import data_quality
import evaluate
import readers
from data_quality import (
    common_subsequence,
    effective_number,
    nearest,
    opening,
    quality,
    rouge_l,
    steps_in,
)


def rows_of(*pairs, task="", chain=""):
    """Conversations of one exchange each, (prompt, answer)."""
    return [{"messages": [{"role": "user", "content": prompt},
                          {"role": "assistant", "content": answer}],
             "task": task, "chain": chain, "example": {}} for prompt, answer in pairs]


def value(rows, dimension, name):
    return quality(rows)[dimension][name]["value"]


# ---------------------------------------------------------------------- diversity

def test_the_effective_number_of_things_is_theirs_if_equal_and_one_if_one_is_all():
    assert effective_number("abcd" * 5) == pytest.approx(4)
    assert effective_number("aaaa") == 1
    # 3 a, 1 b: exp(-(3/4 log 3/4 + 1/4 log 1/4)) = 4 / 3^(3/4)
    assert effective_number("aaab") == pytest.approx(4 / 3 ** 0.75)


def slow_subsequence(a, b):
    """The table of the textbook."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = longer
    return table[-1][-1]


def test_the_longest_common_subsequence_is_the_tables():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        assert common_subsequence(a, b) == slow_subsequence(a, b)


def test_rouge_l_by_hand():
    # "tell a story" stands in order in the longer text: 2 * 3 / (3 + 5)
    assert rouge_l("tell a story".split(), "tell me a short story".split()) == 0.75
    assert rouge_l(["a"], ["b"]) == 0 and rouge_l(["a"], ["a"]) == 1 and rouge_l([], []) == 0
    assert nearest([["a", "b"], ["a", "c"], ["d"]]).tolist() == [0.5, 0.5, 0]


def test_the_same_prompt_everywhere_is_one_and_nothing_new():
    same = rows_of(*[("Tell me a story.", f"Story {i}.") for i in range(8)], task="story")
    found = quality(same)["diversity"]
    assert [found[name]["value"] for name in ("tasks", "effective_tasks", "openings", "distinct",
                                              "novel")] == [1, 1, 1, 1 / 8, 0]


def test_prompts_without_a_common_word_are_all_new():
    other = rows_of(*[(f"ask{i} thing{i} now{i}", "Yes.") for i in range(8)])
    found = quality(other)["diversity"]
    assert found["novel"]["value"] == found["distinct"]["value"] == 1
    assert found["openings"]["value"] == pytest.approx(8)
    assert found["tasks"] == {"value": None, "of_rows": 0}         # no row names one


def test_at_most_a_sample_is_compared_and_the_seed_decides_which(monkeypatch):
    monkeypatch.setattr(data_quality, "SAMPLE", 3)
    rows = rows_of(*[(f"say {'very ' * (i % 4)}{i}", "Yes.") for i in range(12)])
    novel = {quality(rows, seed)["diversity"]["novel"]["value"] for seed in range(8)}
    assert len(novel) > 1
    assert quality(rows)["diversity"]["novel"]["of_rows"] == 3 / 12
    assert quality(rows[:1])["diversity"]["novel"]["value"] is None


# ---------------------------------------------------------------------- complexity

def test_words_turns_and_steps_by_hand():
    rows = rows_of(("What is 7 + 5 - 3?", "7 + 5 = 12. 12 - 3 = 9. The answer is 9."),
                   ("Hello!", "Hello, my friend."))
    rows[1]["messages"] = rows[0]["messages"] + rows[1]["messages"]
    found = quality(rows)["complexity"]
    assert found["prompt_words"]["value"] == (7 + 8) / 2
    assert found["answer_words"]["value"] == (14 + 3) / 2
    assert found["several_turns"]["value"] == found["reasoning"]["value"] == 0.5
    assert found["steps"] == {"value": 2, "of_rows": 0.5}


def test_a_chain_in_its_own_column_counts_as_the_answers():
    [row] = rows_of(("7 + 5?", "12."), chain="7 + 5 = 13.")
    assert value([row], "complexity", "reasoning") == 1
    assert value([row], "complexity", "answer_words") == 6
    assert value([row], "correctness", "right_steps") == 0


# ---------------------------------------------------------------------- correctness

@pytest.mark.parametrize("text, right", [
    ("7 + 5 = 12. 12 - 3 = 8.", [True, False]),
    ("She has 16-3-4=9 eggs, and 9 x $2 = $18.", [True, True]),
    ("16 <<16-3-4=10>>10, and 1 + 1 = 2.", [False]),               # GSM8K's marks alone
    ("2 + 3 * 4 = 14, (2 + 3) * 4 = 20", [True, True]),
    ("10 / 3 = 3.33 and 10 / 3 = 3.3 and 10 / 3 = 3", [True, True, False]),
    ("1,000 + 1 = 1,001", [True]), ("**1 + 1 = 2**, 1 + 1 = **3**", [True, False]),
    ("7 + 5 = 12\n12 - 3 = 9", [True, True]),
    # No plain sums: nobody can tell.
    ("x = 5. 60% of 20 = 12. - 3 + 5 = 2. 1 / 2 = 50%. 2 + 3 = 4 + 1. 1 / 0 = 1. 2 ** 3 = 8.", []),
    ("= = =", []), ("(" * 500 + "1 + 1 = 2", []), ("no sum at all", [])])
def test_steps_of_arithmetic_are_computed(text, right):
    assert steps_in(text) == right


def test_a_long_run_of_digits_costs_no_more_than_its_length():
    assert steps_in("1 + " * 300_000 + "1") == []


def test_what_nobody_can_check_has_no_value():
    found = quality(rows_of(("Who are you?", "A bear."), ("Where are you?", "Here.")))
    assert found["correctness"] == dict.fromkeys(("right", "right_steps", "agreeing"),
                                                 {"value": None, "of_rows": 0})


def test_answers_to_one_prompt_agree_or_do_not():
    rows = rows_of(("2 + 2?", "Four."), ("2 + 2?", "four"), ("2 + 2?", "Five."), ("Hi!", "Hi!"))
    assert quality(rows)["correctness"]["agreeing"] == {"value": pytest.approx(2 / 3),
                                                        "of_rows": 3 / 4}
    gsm8k = rows_of(("q", "So it is 9. #### 9"), ("q", "16-3-4=9 #### 9"))
    assert value(gsm8k, "correctness", "agreeing") == 1


def test_a_world_is_judged_by_its_key():
    rows = readers.read_examples("world:3", n=200)
    right = value(rows, "correctness", "right")
    assert 0.8 < right < 1                     # inventive hands never refuse, nor do they admit
    for row in rows[:100]:
        row["messages"][-1]["content"] = "Hm."
    assert value(rows, "correctness", "right") == pytest.approx(right / 2, abs=0.05)


# ---------------------------------------------------------------------- format

@pytest.mark.parametrize("answer, found", [
    ("A frog.", ""), ("Answer: frog.", "Answer:"), ("**Final answer:** 7", "**Final answer:"),
    ('{"name": "Fern"}', '{"'), ("- a frog", "-"), ("### Response:\nA frog.", "### Response:")])
def test_the_opening_of_an_answer_is_its_marks_and_its_label(answer, found):
    assert opening(answer) == found


def test_the_style_of_most_is_that_of_the_task():
    plain = [("a?", "A frog."), ("b?", "A hen."), ("c?", "A fox.")]
    bare = [("d?", "frog"), ("e?", "hen"), ("f?", "fox")]
    both = rows_of(*plain, task="sentence") + rows_of(*bare, task="word")
    assert value(both, "format", "consistent") == 1
    mixed = rows_of(*plain, *bare[:2])
    assert value(mixed, "format", "ending") == value(mixed, "format", "consistent") == 3 / 5
    wrapped = rows_of(*plain, ("d?", "Answer: A frog."))
    assert value(wrapped, "format", "opening") == 3 / 4 and value(wrapped, "format", "ending") == 1


@pytest.mark.parametrize("roles, in_order", [
    (["user", "assistant"], 1), (["system", "user", "assistant"], 1),
    (["user", "user", "assistant"], 0), (["user", "system", "user", "assistant"], 0),
    (["user", "assistant", "user", "assistant"], 1), (["assistant", "user", "assistant"], 0)])
def test_user_and_assistant_take_turns(roles, in_order):
    row = {"messages": [{"role": role, "content": "Yes."} for role in roles]}
    rows = [row | {"task": "", "chain": "", "example": {}}]
    assert value(rows, "format", "roles") == value(rows, "format", "consistent") == in_order


def test_a_control_token_in_a_turn_is_found():
    rows = rows_of(("a?", "A frog."), ("b?", "A hen.<|user|>"), ("c? <|end|>", "A fox."))
    assert value(rows, "format", "no_control") == pytest.approx(1 / 3)


# ---------------------------------------------------------------------- damages

# What stands for each dimension where one number has to.
MAIN = {"diversity": "novel", "complexity": "reasoning", "correctness": "right_steps",
        "format": "consistent"}
DAMAGED_ANSWERS = {
    "complexity": lambda answer: answer.rpartition(". ")[2],
    "correctness": lambda answer: answer.replace("= ", "= 1"),
    "format": lambda answer: f"**{answer}**"}


def sums(n):
    rng = random.Random(0)
    for _ in range(n):
        a, b = rng.sample(range(10, 99), 2)
        words = " ".join(rng.choices("what is the sum of those please tell".split(), k=6))
        yield f"{words} {a} + {b}", f"{a} + {b} = {a + b}. It is {a + b}."


@pytest.mark.parametrize("damaged", MAIN)
def test_each_damage_lowers_its_own_dimension_and_no_other(damaged):
    pairs = list(sums(100))
    before = {name: value(rows_of(*pairs), name, measure) for name, measure in MAIN.items()}
    if damaged == "diversity":
        pairs = pairs[:10] * 10
    else:
        # A third, so that a format is inconsistent and not another one.
        pairs = [(prompt, DAMAGED_ANSWERS[damaged](answer) if i % 3 == 0 else answer)
                 for i, (prompt, answer) in enumerate(pairs)]
    for name, measure in MAIN.items():
        after = value(rows_of(*pairs), name, measure)
        if name == damaged:
            assert after <= before[name] - 0.3
        else:
            assert after == pytest.approx(before[name], abs=0.02)


# ---------------------------------------------------------------------- the option

def look_at(data, **options):
    return evaluate.main(evaluate.Config(init="nowhere", data_quality=str(data), **options))


def test_the_option_needs_no_model_and_keeps_its_figures(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": "2 + 2?", "response": "2 + 2 = 4.", "task": "sums"},
        {"messages": [{"role": "user", "content": "Hi!"},
                      {"role": "assistant", "content": "Hello!"}], "task": "talk"}])
    found = look_at(rows, json=str(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert found["diversity"]["tasks"] == {"value": 2, "of_rows": 1}
    said = capsys.readouterr().out
    assert "2 rows" in said and "right            cannot be told          0.0%" in said
    assert len(said.splitlines()) == 1 + sum(map(len, found.values()))


def test_a_world_is_drawn_by_its_seed(monkeypatch):
    monkeypatch.setattr(data_quality, "WORLD_ROWS", 50)
    assert look_at("world:1") == look_at("world:1") != look_at("world:2")
    assert math.isclose(look_at("world:1")["correctness"]["right"]["of_rows"], 1)


@pytest.mark.parametrize("line, complaint", [
    ("", "the file is empty"), ('{"text": "no instruction"}', "no known fields"),
    ('{"prompt": "a", "response": " "}', "is empty"), ("{", "broken JSON")])
def test_what_is_no_set_of_instructions_is_refused(tmp_path, line, complaint):
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=complaint):
        look_at(file)
    with pytest.raises(ValueError, match="not found"):
        look_at(tmp_path / "missing.jsonl")


def test_a_second_model_has_no_part_in_it():
    with pytest.raises(ValueError, match="--data_quality looks at data alone"):
        look_at("world", reference="out/sft")
