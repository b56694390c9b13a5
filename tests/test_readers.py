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
    assert example == {"messages": TALK, "task": "", "example": {}, "where": f"{path}:1"}
    [prompt] = readers.read_prompts(path)
    assert prompt == {"messages": ASKED, "example": {}, "where": f"{path}:1"}


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
        assert pair == {"prompt": ASKED, "chosen": ANSWER, "rejected": "Nobody.",
                        "example": {}, "where": f"{path}:{i + 1}"}


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
