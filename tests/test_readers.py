"""readers.py: the public formats, their errors, worlds by name, and what is held out."""
import json
import os
import re

import pytest

import evaluate
import readers
from tokenizer import Tokenizer
from world.world import World

QUESTION, ANSWER = "Who baked the bread?", "Old Bruno did."
ASKED = [{"role": "user", "content": QUESTION}]
TALK = [*ASKED, {"role": "assistant", "content": ANSWER}]


def write(path, rows):
    """rows as JSONL; bytes and strings stand for a raw line."""
    lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str)
             else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# ---------------------------------------------------------------------- formats

@pytest.mark.parametrize("row", [
    {"prompt": QUESTION, "response": ANSWER},
    {"question": QUESTION, "answer": ANSWER},
    {"instruction": QUESTION, "output": ANSWER},
    {"instruction": QUESTION, "input": "", "output": ANSWER},
    {"instruction": QUESTION, "input": None, "output": ANSWER},
    {"messages": TALK},
    {"messages": TALK, "prompt": "not a format of examples by itself"},
    {"prompt": QUESTION, "completion": ANSWER},
    {"prompt": QUESTION, "completion": ANSWER, "label": True},
    {"prompt": ASKED, "completion": TALK[1:]},
    {"prompt": ASKED, "response": TALK},
])
def test_every_public_format_becomes_the_same_conversation(row, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row])
    [example] = readers.read_examples(path)
    assert example == {"messages": TALK, "task": "", "chain": "", "example": {},
                       "where": f"{path}:1"}
    [prompt] = readers.read_prompts(path)
    assert prompt == {"messages": ASKED, "answer": ANSWER, "example": {}, "where": f"{path}:1"}


def test_alpaca_input_follows_its_instruction_on_a_new_line(tmp_path):
    row = {"instruction": "Translate.", "input": "honey", "output": "miel"}
    [example] = readers.read_examples(write(tmp_path / "rows.jsonl", [row]))
    assert example["messages"][0]["content"] == "Translate.\nhoney"


def test_a_long_conversation_keeps_its_system_turn_and_only_role_and_content(tmp_path):
    talk = [{"role": "system", "content": "Be brief.", "name": "x"}, *TALK, *TALK]
    [example] = readers.read_examples(write(tmp_path / "rows.jsonl", [{"messages": talk}]))
    assert example["messages"] == [{"role": "system", "content": "Be brief."}, *TALK, *TALK]
    [prompt] = readers.read_prompts(tmp_path / "rows.jsonl")
    assert prompt["messages"] == example["messages"][:-1]


def test_the_task_is_named_by_task_or_else_by_cluster(tmp_path):
    row = {"prompt": QUESTION, "response": ANSWER}
    rows = [row | {"task": "bread", "cluster": "food"}, row | {"cluster": "food"}, row]
    found = readers.read_examples(write(tmp_path / "rows.jsonl", rows))
    assert [example["task"] for example in found] == ["bread", "food", ""]


@pytest.mark.parametrize("row", [{"prompt": QUESTION}, {"prompt": ASKED}, {"messages": ASKED},
                                 {"prompt": QUESTION, "chosen": "a", "rejected": "b"},
                                 {"prompt": QUESTION, "response": ""}])
def test_prompts_need_no_answer(row, tmp_path):
    [prompt] = readers.read_prompts(write(tmp_path / "rows.jsonl", [row]))
    assert prompt["messages"] == ASKED


def test_preferences_may_be_text_messages_or_whole_conversations(tmp_path):
    other = {"role": "assistant", "content": "Nobody."}
    rows = [{"prompt": QUESTION, "chosen": ANSWER, "rejected": "Nobody."},
            {"prompt": ASKED, "chosen": TALK[1:], "rejected": [other]},
            {"prompt": QUESTION, "chosen": TALK, "rejected": [*ASKED, other]}]
    path = write(tmp_path / "pairs.jsonl", rows)
    for i, pair in enumerate(readers.read_preferences(path)):
        assert pair == {"prompt": ASKED, "chosen": ANSWER, "rejected": "Nobody.", "margin": None,
                        "example": {}, "where": f"{path}:{i + 1}"}


def test_a_pair_may_say_by_how_much_it_is_better(tmp_path):
    pair = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "Nobody."}
    rows = [pair | {"margin": margin} for margin in (0, 2.5, None)] + [pair]
    read = readers.read_preferences(write(tmp_path / "pairs.jsonl", rows))
    assert [pair["margin"] for pair in read] == [0, 2.5, None, None]


@pytest.mark.parametrize("thought, rating", [
    ({"rating": 0.25}, 0.25), ({"rating": 1}, 1.0), ({"rating": 0, "scale": None}, 0.0),
    ({"rating": 2, "scale": [1, 5]}, 0.25), ({"rating": 0, "scale": [-1, 1]}, 0.5),
    ({"rating": 10, "scale": [1, 10], "label": False, "comment": "not read"}, 1.0),
])
def test_a_rating_is_read_on_its_own_scale_or_else_from_0_to_1(thought, rating, tmp_path):
    for answer in ({"completion": ANSWER}, {"response": ANSWER}, {"completion": TALK}):
        row = {"prompt": QUESTION} | answer | thought
        path = write(tmp_path / "rows.jsonl", [row])
        assert readers.read_ratings(path) == [
            {"prompt": ASKED, "response": ANSWER, "rating": rating, "example": {},
             "where": f"{path}:1"}]


def test_labelled_answers_are_good_or_bad_as_their_label_says(tmp_path):
    labels = [0, 1, "true", "False", True, "0"]
    rows = [{"prompt": ASKED, "completion": ANSWER, "label": label} for label in labels]
    path = write(tmp_path / "rows.jsonl", rows)
    read = readers.read_labelled(path)
    assert read[0] == {"prompt": ASKED, "response": ANSWER, "label": False, "example": {},
                       "where": f"{path}:1"}
    assert [row["label"] for row in read] == [False, True, True, False, True, False]


def ultrafeedback(*scores, **fields):
    completions = [{"response": text, "overall_score": score, "custom_system_prompt": text}
                   for text, score in zip("abc", scores)]
    return {"instruction": QUESTION, "completions": completions, "models": []} | fields


ABC = {"prompt": QUESTION, "completions": ["a", "b", "c"]}


@pytest.mark.parametrize("row, ratings", [
    (ABC | {"ranks": [2, 1, 3]}, None),
    (ABC | {"ranks": [2.0, 1.0, 3.0]}, None),
    (ABC | {"ratings": [0.5, 1, 0.25]}, [1, 0.5, 0.25]),
    (ABC | {"ratings": [3, 5, 1], "scale": [1, 5]}, [1, 0.5, 0]),
    ({"prompt": ASKED, "responses": ["b", "a", "c"], "ratings": [1, 0.5, 0]}, [1, 0.5, 0]),
    ({"prompt": ASKED, "completions": [[{"role": "assistant", "content": x}] for x in "abc"],
      "ratings": [0.5, 1, 0]}, [1, 0.5, 0]),
    (ultrafeedback(5.5, 10, 1), [1, 0.5, 0]),
    (ultrafeedback(2, 4, 0, scale=[0, 4]), [1, 0.5, 0]),
])
def test_every_form_of_a_ranking_is_read_best_first_and_its_ends_are_a_pair(row, ratings, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row])
    assert readers.read_rankings(path) == [
        {"prompt": ASKED, "responses": ["b", "a", "c"], "ratings": ratings, "example": {},
         "where": f"{path}:1"}]
    margin = ratings and ratings[0] - ratings[-1]
    assert readers.read_preferences(path) == [
        {"prompt": ASKED, "chosen": "b", "rejected": "c", "margin": margin, "example": {},
         "where": f"{path}:1"}]


def test_a_ranking_of_two_is_a_pair(tmp_path):
    two = {"prompt": QUESTION, "completions": ["good", "bad"], "ranks": [1, 2]}
    pair = {"prompt": QUESTION, "chosen": "good", "rejected": "bad"}
    path = write(tmp_path / "rows.jsonl", [two, pair])
    first, second = readers.read_preferences(path)
    assert first | {"where": ""} == second | {"where": ""}


def test_a_system_turn_that_only_the_answers_have_belongs_to_the_prompt(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    full, other = ([system, *ASKED, {"role": "assistant", "content": x}] for x in "ab")
    prompt = {"prompt": QUESTION}
    for read, answers in (
            (readers.read_preferences, {"chosen": full, "rejected": other}),
            (readers.read_preferences, {"chosen": "a", "rejected": other}),
            (readers.read_ratings, {"completion": full, "rating": 1}),
            (readers.read_labelled, {"completion": full, "label": 1}),
            (readers.read_rankings, {"completions": [full, "b"], "ranks": [1, 2]})):
        [row] = read(write(tmp_path / "rows.jsonl", [prompt | answers]))
        assert row["prompt"] == [system, *ASKED]


def test_answers_that_equal_another_are_left_out_of_a_ranking_and_counted(tmp_path, capsys):
    def ranked(texts, ratings):
        return {"prompt": QUESTION, "completions": texts, "ratings": ratings}
    rows = [ranked(["a", "b", "c", "d"], [0.5, 1, 0.5, 0.5]), ranked(["a", "b"], [0, 1]),
            ranked(["a", "b", "a"], [0.2, 0.5, 0.9])]
    path = write(tmp_path / "rows.jsonl", rows)
    kept = [row["responses"] for row in readers.read_rankings(path)]
    assert kept == [["b", "a"], ["b", "a"], ["a", "b"]]
    assert capsys.readouterr().err == (f"{path}: left out 3 answers that equal another of their "
                                       "row in rating or text\n")
    readers.read_rankings(write(path, rows[1:2]))
    assert capsys.readouterr().err == ""


def test_documents_come_from_a_file_a_folder_or_jsonl(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"\xef\xbb\xbfone\r\ntext")         # byte order mark
    (tmp_path / "a.md").write_text("two\n")
    write(tmp_path / "c.jsonl", [{"text": "three\u2028still three"}, "", {"text": "four"}])
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / ".hidden.txt").write_text("x")
    assert list(readers.read_documents(tmp_path / "b" / "z.txt")) == ["one\r\ntext"]
    assert list(readers.read_documents(tmp_path)) == \
        ["two\n", "one\r\ntext", "three\u2028still three", "four"]
    assert list(readers.read_documents(tmp_path, max_bytes=5)) == ["two\n", "one\r\n"]
    (tmp_path / "d.txt").write_text("h\u00e9llo " * 100)           # a letter takes two of 7 bytes
    assert list(readers.read_documents(tmp_path / "d.txt", max_bytes=9)) == ["h\u00e9llo h"]
    for split, first in ("train", "h"), ("heldout", "h"):
        [text] = readers.read_documents(tmp_path / "d.txt", split=split, max_bytes=14)
        assert len(text) == 12 and text.startswith(first)


# ---------------------------------------------------------------------- errors

GOOD = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize("line, said", [
    ({"prompt": "p", "response": " "},
     'field "response" is empty; every row needs a non-empty "response"'),
    ({"prompt": "", "response": "r"}, 'field "prompt" is empty'),
    ({"prompt": "p", "response": 17}, 'field "response" is 17; it must be a string'),
    ({"prompt": "p", "response": "\ud83d"}, "half a surrogate pair"),
    ({"prompt": "p", "answer": "r"},
     'no known fields: found "prompt", "answer"; give one of prompt/response, question/answer'),
    ({}, "no known fields: found none"),
    (GOOD | {"completion": "r"}, "several formats"),
    ('{"prompt": "p", "response": ', "broken JSON at column"),
    ('["p", "r"]', 'found ["p", "r"]; every line must be an object'),
    (b'{"prompt": "p\xff", "response": "r"}', "not UTF-8: byte 0xff at byte offset 79"),
    ({"messages": "p"}, 'field "messages" is "p"; it must be'),
    ({"messages": []}, 'field "messages" has the roles []; it must'),
    ({"messages": ASKED}, 'field "messages" has the roles ["user"]; it must end in "assistant"'),
    ({"messages": [{"role": "bot", "content": "x"}]},
     'field "messages[0].role" is "bot"; roles are system, user, assistant'),
    ({"messages": TALK[1:]}, 'field "messages" has the roles []; it must end in "user"'),
    ({"messages": [*TALK, {"role": "assistant"}]}, 'field "messages[2].content" is null'),
    ({"prompt": "p", "completion": "r", "label": False}, '"label" is false'),
])
def test_a_bad_example_is_named_with_file_and_line(line, said, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD, line, GOOD])
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(said)):
        readers.read_examples(path)


@pytest.mark.parametrize("change, said", [
    ({"rejected": "good"}, '"chosen" and "rejected" are the same'),
    ({"chosen": ""}, 'field "chosen" is empty'),
    ({"rejected": ASKED}, 'field "rejected" has the roles ["user"]; it must end in "assistant"'),
    ({"chosen": TALK}, 'field "chosen" begins with another conversation'),
    ({"prompt": TALK}, 'field "prompt" has the roles ["user", "assistant"]; it must end in "user"'),
])
def test_a_bad_pair_is_named_with_file_and_line(change, said, tmp_path):
    good = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    path = write(tmp_path / "pairs.jsonl", [good, "", good | change])          # blank lines count
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {said}")):
        readers.read_preferences(path)
    lacking = write(tmp_path / "lacking.jsonl", [good, GOOD])
    with pytest.raises(ValueError, match="lacking.jsonl:2: no known fields.*chosen/rejected"):
        readers.read_preferences(lacking)


RATED = {"prompt": "p", "completion": "r", "rating": 0.5}
LABELLED = {"prompt": "p", "completion": "r", "label": 1}
RANKS = ABC | {"ranks": [1, 2, 3]}
RATINGS = ABC | {"ratings": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize("read, good, change, said", [
    (readers.read_ratings, RATED, {"completion": " "}, 'field "completion" is empty'),
    (readers.read_ratings, RATED, {"completion": None}, 'field "completion" is null; it must be'),
    (readers.read_ratings, RATED, {"prompt": TALK}, 'field "prompt" has the roles'),
    (readers.read_ratings, RATED, {"rating": 7}, 'field "rating" is 7; it must be a number from 0 '
     'to 1; another scale stands in a field "scale", such as [1, 10]'),
    (readers.read_ratings, RATED, {"rating": 0, "scale": [1, 10]},
     'field "rating" is 0; it must be a number from 1 to 10'),
    (readers.read_ratings, RATED, {"rating": float("nan")}, 'field "rating" is NaN; it must be'),
    (readers.read_ratings, RATED, {"rating": 10 ** 400}, 'field "rating" is 1000000'),
    (readers.read_ratings, RATED, {"rating": True}, 'field "rating" is true; it must be a number'),
    (readers.read_ratings, RATED, {"rating": "0.5"}, 'field "rating" is "0.5"; it must be a num'),
    (readers.read_ratings, RATED, {"scale": [1]}, 'field "scale" is [1]; it must be [lowest, hi'),
    (readers.read_ratings, RATED, {"scale": [1, 1]}, 'field "scale" is [1, 1]; it must be [lowest'),
    (readers.read_ratings, RATED, {"scale": [0, float("inf")]}, 'field "scale" is Infinity; it'),
    (readers.read_ratings, RATED, {"response": "r"}, "fields of several formats"),
    (readers.read_labelled, LABELLED, {"label": "maybe"}, 'field "label" is "maybe"; it must be '
     "true or false"),
    (readers.read_labelled, LABELLED, {"label": None}, 'field "label" is null'),
    (readers.read_labelled, LABELLED, {"completion": ""}, 'field "completion" is empty'),
    (readers.read_rankings, RANKS, {"ranks": [1, 2, 4]}, 'field "ranks" is [1, 2, 4]; it'),
    (readers.read_rankings, RANKS, {"ranks": [1, 3, 3]}, 'field "ranks" is [1, 3, 3]; it must be '
     "each of 1 (the best) to 3 once"),
    (readers.read_rankings, RANKS, {"ranks": [1, 2, "3"]}, 'field "ranks" is [1, 2, "3"]; it'),
    (readers.read_rankings, RANKS, {"ranks": [0, 1, 2]}, 'field "ranks" is [0, 1, 2]; it'),
    (readers.read_rankings, RANKS, {"ranks": [1, 2]}, 'field "ranks" is [1, 2]; it must be a list '
     "of 3 numbers, one for each answer"),
    (readers.read_rankings, RANKS, {"ranks": 1}, 'field "ranks" is 1; it must be a list'),
    (readers.read_rankings, RANKS, {"completions": "a"}, 'field "completions" is "a"; it must be '
     "a list"),
    (readers.read_rankings, RANKS, {"completions": ["a", "", "c"]}, 'field "completions[1]" is em'),
    (readers.read_rankings, RANKS, {"completions": ["a"] * 3}, "1 of 3 answers differ in text and "
     "rating; a ranking needs 2"),
    (readers.read_rankings, RANKS, {"completions": ["a"], "ranks": [1]}, "1 of 1 answers differ"),
    (readers.read_rankings, RANKS, {"completions": [], "ranks": []}, "0 of 0 answers differ"),
    (readers.read_rankings, RANKS, {"ratings": [1, 0, 0]}, "fields of several formats"),
    (readers.read_rankings, RATINGS, {"ratings": [0.5] * 3}, "1 of 3 answers differ"),
    (readers.read_rankings, RATINGS, {"ratings": [0, 1, 2]}, 'field "ratings[2]" is 2; it must be '
     "a number from 0 to 1"),
    (readers.read_rankings, RATINGS, {"ratings": [0, None, 1]}, 'field "ratings[1]" is null'),
    (readers.read_rankings, RATINGS, {"ratings": [0, 1]}, 'field "ratings" is [0, 1]; it must be '),
    (readers.read_rankings, ultrafeedback(1, 2), ultrafeedback(1, 11),
     'field "completions[1].overall_score" is 11; it must be a number from 1 to 10'),
    (readers.read_rankings, ultrafeedback(1, 2), {"completions": ["a", "b"]},
     'field "completions[0]" is "a"; it must be an object with "response" and "overall_score"'),
    (readers.read_rankings, ultrafeedback(1, 2), {"completions": [{"overall_score": 2}]},
     'field "completions[0].response" is null; it must be a string'),
    (readers.read_preferences, RATINGS, {"ratings": [1, 1, 1]}, "1 of 3 answers differ"),
    (readers.read_preferences, RATINGS, {"chosen": "a", "rejected": "b"}, "fields of several"),
])
def test_a_bad_judgement_is_named_with_file_and_line(read, good, change, said, tmp_path):
    path = write(tmp_path / "rows.jsonl", [good, "", good | change, good])
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {said}")):
        read(path)
    assert len(read(path, bad_rows="skip")) == 2


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf"), "1", True])
def test_a_margin_is_a_number_from_0_on(margin, tmp_path):
    row = {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": margin}
    with pytest.raises(ValueError, match='rows.jsonl:1: field "margin" is .*a number from 0 to'):
        readers.read_preferences(write(tmp_path / "rows.jsonl", [row]))


def test_missing_empty_and_unknown_files_are_errors_that_say_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, said in [("absent.jsonl", "absent.jsonl: not found"),
                       ("empty.jsonl", "empty.jsonl: the file is empty"),
                       ("rows.csv", '".csv" files are not read here; give .*jsonl'),
                       ("folder", "folder: no .*jsonl file in this folder")]:
        for read in (readers.read_examples, readers.read_preferences, readers.read_prompts,
                     lambda path: list(readers.read_documents(path))):
            with pytest.raises(ValueError, match=said):
                read(tmp_path / name)
    with pytest.raises(ValueError, match="latin.txt: not UTF-8: byte 0xe9 at byte offset 3"):
        list(readers.read_documents(tmp_path / "latin.txt"))
    with pytest.raises(ValueError, match='rows.jsonl:1: no known fields: found "txt"; give'):
        list(readers.read_documents(write(tmp_path / "rows.jsonl", [{"txt": "x"}])))


def test_bad_rows_are_skipped_only_when_asked_and_then_counted(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [GOOD, "{", GOOD, {"prompt": "p", "response": ""}])
    assert len(readers.read_examples(path, bad_rows="skip")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: skipped 2 of 4 rows (first: {path}:2: broken JSON")
    with pytest.raises(ValueError, match="every row is bad"):
        readers.read_examples(write(path, ["{", "["]), bad_rows="skip")
    with pytest.raises(ValueError, match="bad_rows is 'ignore'"):
        readers.read_examples(path, bad_rows="ignore")


# ---------------------------------------------------------------------- worlds and splits

def test_a_world_is_read_by_name_and_seed():
    for name, seed in (("world", 0), ("world:3", 3)):
        raw = World(seed).examples(5, split="heldout", seed=7)
        read = readers.read_examples(name, 5, split="heldout", seed=7)
        for row, example in zip(read, raw):
            *prompt, answer = row["messages"]
            assert prompt == readers.checked_turns(example["prompt"], "prompt", "user")
            assert answer["content"] == example["response"]
        prompts = readers.read_prompts(name, 4, split="train", seed=2)
        assert [p["example"]["prompt"] for p in prompts] == \
            [e["prompt"] for e in World(seed).prompts(4, "train", seed=2)]
        noisy = readers.read_preferences(name, 40, seed=1, noise=0.5)
        assert [p["chosen"] for p in noisy] == \
            [p["chosen"] for p in World(seed).preferences(40, "train", seed=1, noise=0.5)]


@pytest.mark.parametrize("read, fields", [
    (readers.read_preferences, ("chosen", "rejected", "margin")),
    (readers.read_ratings, ("response", "rating")),
    (readers.read_labelled, ("response", "label")),
    (readers.read_rankings, ("responses", "ratings")),
])
def test_all_that_annotators_of_a_world_say_is_read_as_it_was_said(read, fields, capsys):
    dials = {"noise": 0.3, "bias": 0.2, "disagreement": 0.5}
    method = read.__name__.removeprefix("read_")
    made = getattr(World(2), method)(60, split="heldout", seed=3, **dials)
    rows = read("world:2", 60, split="heldout", seed=3, **dials)
    for row, raw in zip(rows, made, strict=True):
        assert row["prompt"] == readers.checked_turns(raw["prompt"], "prompt", "user")
        assert [row[field] for field in fields] == [raw[field] for field in fields]
        assert row["example"] == raw
    assert capsys.readouterr().err == ""


def test_conversations_of_a_world_are_read_as_examples_pairs_and_prompts():
    examples = readers.read_examples("world", 20, families=("followup",))
    for e in examples:
        raw = e["example"]
        assert e["messages"] == [*raw["prompt"], {"role": "assistant", "content": raw["response"]}]
        assert e["task"] == "talk" and len(e["messages"]) in (4, 6)
    prompts = readers.read_prompts("world", 20, families=("followup",))
    assert all(p["messages"] == p["example"]["prompt"] for p in prompts)
    read = readers.read_preferences("world", 200)
    for pair, raw in zip(read, World(0).preferences(200, "train")):
        if raw["example"]["family"] == "followup":
            assert pair["prompt"] == raw["prompt"] and len(raw["prompt"]) in (3, 5)
    assert any(len(pair["prompt"]) > 1 for pair in read)


def test_world_documents_stop_at_max_bytes():
    documents = list(readers.read_documents("world", max_bytes=20_000))
    sizes = [len(document.encode()) for document in documents]
    assert sum(sizes) >= 20_000 > sum(sizes[:-1])
    assert documents[0] == next(World(0).documents(split="train"))


def test_a_world_needs_a_whole_seed_and_a_number_of_rows(tmp_path):
    for name in ("world:", "world:x", "world:-1"):
        with pytest.raises(ValueError, match="world:SEED needs a whole number"):
            readers.read_examples(name, 1)
    with pytest.raises(ValueError, match="say how many examples"):
        readers.read_examples("world")
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert len(readers.read_preferences(path, noise=0.0)) == 1
    with pytest.raises(ValueError, match="noise can be set for a world only"):
        readers.read_preferences(path, noise=0.1)


def test_a_file_is_split_by_prompt_so_that_no_prompt_is_on_both_sides(tmp_path):
    rows = [{"prompt": f"question {i % 200}", "response": f"answer {i}"} for i in range(600)]
    path = write(tmp_path / "rows.jsonl", rows)
    train, heldout = (readers.read_examples(path, split=split) for split in ("train", "heldout"))
    sides = [{e["messages"][0]["content"] for e in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200
    assert len(train) + len(heldout) == 600 and 10 <= len(sides[1]) <= 35
    some = readers.read_examples(path, 50, seed=1)
    assert len({e["where"] for e in some}) == 50 and some == readers.read_examples(path, 50, seed=1)
    assert some != readers.read_examples(path, 50, seed=2)
    with pytest.raises(ValueError, match="split is 'test'"):
        readers.read_examples(path, split="test")


@pytest.mark.parametrize("read, judged", [
    (readers.read_preferences, {"chosen": "a", "rejected": "b"}),
    (readers.read_preferences, {"completions": ["a", "b"], "ranks": [1, 2]}),
    (readers.read_ratings, {"completion": "a", "rating": 0.5}),
    (readers.read_labelled, {"completion": "a", "label": 0}),
    (readers.read_rankings, {"completions": ["a", "b"], "ratings": [0, 1]}),
])
def test_a_held_out_prompt_is_the_same_in_every_form_of_preference(read, judged, tmp_path):
    prompts = [f"question {i % 100}" for i in range(300)]
    path = write(tmp_path / "rows.jsonl", [{"prompt": prompt} | judged for prompt in prompts])
    for split, is_heldout in (("train", False), ("heldout", True)):
        read_prompts = [row["prompt"][0]["content"] for row in read(path, split=split)]
        assert read_prompts == [p for p in prompts if readers.held_out(p) == is_heldout]
        assert read_prompts


def test_a_text_is_split_at_its_last_tenth_and_jsonl_documents_are_split_whole(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    (tmp_path / "text.txt").write_text(text)
    assert list(readers.read_documents(tmp_path / "text.txt", split="train")) == [text[:900]]
    assert list(readers.read_documents(tmp_path / "text.txt", split="heldout")) == [text[900:]]
    path = write(tmp_path / "rows.jsonl", [{"text": f"document {i}"} for i in range(300)])
    parts = [list(readers.read_documents(path, split=split)) for split in ("train", "heldout")]
    assert sorted(parts[0] + parts[1]) == sorted(readers.read_documents(path))
    assert 10 <= len(parts[1]) <= 50


# ---------------------------------------------------------------------- nothing in silence

def test_what_is_left_out_of_a_folder_is_counted_and_said(tmp_path, capsys):
    for name in ("a.txt", "notes.csv", "b.pdf", ".hidden.txt", ".git/c.txt", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    assert list(readers.read_documents(tmp_path)) == ["a.txt", "sub/d.txt"]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: left out ") and "2 hidden (.git, ...)" in said
    assert "2 of other kinds (b.pdf, ...)" in said and "1 links to folders (again)" in said
    assert "1 links to nothing or no files (gone.txt)" in said


def test_a_folder_that_cannot_be_read_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "secret").mkdir()
    scan = os.scandir

    def refusing(path):                        # as for another user than root
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", refusing)
    assert list(readers.read_documents(tmp_path)) == ["a"]
    assert "1 that cannot be read (secret)" in capsys.readouterr().err


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl: neither a file nor a folder"):
        readers.read_examples(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("label, good", [(True, True), (1, True), ("true", True), ("True", True),
                                         (False, False), (0, False), ("0", False),
                                         ("False", False), (0.0, False)])
def test_a_label_means_what_it_says(tmp_path, label, good):
    row = {"prompt": QUESTION, "completion": ANSWER, "label": label}
    path = write(tmp_path / "rows.jsonl", [row, {"prompt": QUESTION, "completion": ANSWER}])
    if good:
        assert len(readers.read_examples(path)) == 2
    else:
        with pytest.raises(ValueError, match='rows.jsonl:1: "label" is false'):
            readers.read_examples(path)


@pytest.mark.parametrize("line, named", [
    ('{"prompt": "a", "response": "b", "prompt": "c"}', 'field "prompt" stands twice'),
    ('{"messages": [{"role": "user", "role": "user"}]}', 'field "role" stands twice'),
    ("[" * 5000 + "]" * 5000, "nested too deeply"),
    ('{"prompt": "a", "completion": "b", "label": "maybe"}', 'field "label" is "maybe"; it must'),
    ('{"prompt": "a", "completion": "b", "label": null}', 'field "label" is null; it must'),
    ('{"prompt": "a' + " " * 600_000 + '", "response": "b"}', '"prompt" holds 600,000 blanks'),
])
def test_a_row_that_can_be_read_in_two_ways_or_not_at_all_is_named(tmp_path, line, named):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + '\n{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{named}"):
        readers.read_examples(path)
    assert len(readers.read_examples(path, bad_rows="skip")) == 1


def test_columns_called_like_the_worlds_are_no_answer_key(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": QUESTION, "family": "reading", "key": 3}])
    prompts = readers.read_prompts(path)
    assert evaluate.rollout_truth(prompts, [[65]], Tokenizer.bytes()) == {}


@pytest.mark.parametrize("row", [
    {"prompt": "ask"}, {"prompt": "ask", "chosen": "yes", "rejected": "no", "margin": 1.0},
    {"prompt": "ask", "completions": ["yes", "no"], "ranks": [1, 2]},
    {"prompt": "ask", "completions": ["yes", "no"], "ratings": [5, 1]},
    {"prompt": "ask", "completion": "yes", "rating": 4, "scale": [1, 5]},
    {"prompt": "ask", "completion": "yes", "label": True},
    {"instruction": "ask", "completions": [{"response": "yes", "overall_score": 9},
                                           {"response": "no", "overall_score": 2}]}])
def test_of_every_form_of_preferences_the_prompts_can_be_read(tmp_path, row):
    """By PPO and GRPO, and by the reward model, which is centred on answers to them."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [found] = readers.read_prompts(tmp_path / "rows.jsonl")
    assert found["messages"] == [{"role": "user", "content": "ask"}]
