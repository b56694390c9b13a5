"""data.py: the public formats, their errors, and batches checked against slow, separate counts."""
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

import data
from tokenizer import Tokenizer
from world.world import World

TOKENIZER = Tokenizer.bytes()
QUESTION, ANSWER = "Who baked the bread?", "Old Bruno did."
ASKED = [{"role": "user", "content": QUESTION}]
TALK = [*ASKED, {"role": "assistant", "content": ANSWER}]


def write(path, rows):
    """rows as JSONL; bytes and strings stand for a raw line."""
    lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str)
             else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def examples(n, seed=0):
    """n conversations of very different lengths, some of several turns."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        turns = []
        for _ in range(rng.integers(1, 3)):
            turns += [{"role": "user", "content": f"{i} " + "q" * rng.integers(1, 30)},
                      {"role": "assistant", "content": f"{i} " + "a" * rng.integers(1, 15)}]
        rows.append({"messages": turns, "task": "abc"[i % 3], "where": f"made.jsonl:{i + 1}"})
    return rows


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"prompt": [{"role": "user", "content": f"{i} " + "q" * rng.integers(1, 40)}],
             "chosen": f"{i} yes" + "y" * rng.integers(0, 40),
             "rejected": f"{i} no" + "n" * rng.integers(0, 40), "where": f"made.jsonl:{i + 1}"}
            for i in range(n)]


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
    [example] = data.read_examples(path)
    assert example == {"messages": TALK, "task": "", "example": row, "where": f"{path}:1"}
    [prompt] = data.read_prompts(path)
    assert prompt == {"messages": ASKED, "example": row, "where": f"{path}:1"}


def test_alpaca_input_follows_its_instruction_on_a_new_line(tmp_path):
    row = {"instruction": "Translate.", "input": "honey", "output": "miel"}
    [example] = data.read_examples(write(tmp_path / "rows.jsonl", [row]))
    assert example["messages"][0]["content"] == "Translate.\nhoney"


def test_a_long_conversation_keeps_its_system_turn_and_only_role_and_content(tmp_path):
    talk = [{"role": "system", "content": "Be brief.", "name": "x"}, *TALK, *TALK]
    [example] = data.read_examples(write(tmp_path / "rows.jsonl", [{"messages": talk}]))
    assert example["messages"] == [{"role": "system", "content": "Be brief."}, *TALK, *TALK]
    [prompt] = data.read_prompts(tmp_path / "rows.jsonl")
    assert prompt["messages"] == example["messages"][:-1]


def test_the_task_is_named_by_task_or_else_by_cluster(tmp_path):
    row = {"prompt": QUESTION, "response": ANSWER}
    rows = [row | {"task": "bread", "cluster": "food"}, row | {"cluster": "food"}, row]
    found = data.read_examples(write(tmp_path / "rows.jsonl", rows))
    assert [example["task"] for example in found] == ["bread", "food", ""]


@pytest.mark.parametrize("row", [{"prompt": QUESTION}, {"prompt": ASKED}, {"messages": ASKED},
                                 {"prompt": QUESTION, "chosen": "a", "rejected": "b"},
                                 {"prompt": QUESTION, "response": ""}])
def test_prompts_need_no_answer(row, tmp_path):
    [prompt] = data.read_prompts(write(tmp_path / "rows.jsonl", [row]))
    assert prompt["messages"] == ASKED


def test_preferences_may_be_text_messages_or_whole_conversations(tmp_path):
    other = {"role": "assistant", "content": "Nobody."}
    rows = [{"prompt": QUESTION, "chosen": ANSWER, "rejected": "Nobody."},
            {"prompt": ASKED, "chosen": TALK[1:], "rejected": [other]},
            {"prompt": QUESTION, "chosen": TALK, "rejected": [*ASKED, other]}]
    path = write(tmp_path / "pairs.jsonl", rows)
    for i, pair in enumerate(data.read_preferences(path)):
        assert pair == {"prompt": ASKED, "chosen": ANSWER, "rejected": "Nobody.",
                        "example": rows[i], "where": f"{path}:{i + 1}"}


def test_documents_come_from_a_file_a_folder_or_jsonl(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"\xef\xbb\xbfone\r\ntext")         # byte order mark
    (tmp_path / "a.md").write_text("two\n")
    write(tmp_path / "c.jsonl", [{"text": "three\u2028still three"}, "", {"text": "four"}])
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / ".hidden.txt").write_text("x")
    assert list(data.read_documents(tmp_path / "b" / "z.txt")) == ["one\r\ntext"]
    assert list(data.read_documents(tmp_path)) == \
        ["two\n", "one\r\ntext", "three\u2028still three", "four"]
    assert list(data.read_documents(tmp_path, max_bytes=5)) == ["two\n", "one\r\n"]
    (tmp_path / "d.txt").write_text("h\u00e9llo " * 100)           # a letter takes two of 7 bytes
    assert list(data.read_documents(tmp_path / "d.txt", max_bytes=9)) == ["h\u00e9llo h"]
    for split, first in ("train", "h"), ("heldout", "h"):
        [text] = data.read_documents(tmp_path / "d.txt", split=split, max_bytes=14)
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
        data.read_examples(path)


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
        data.read_preferences(path)
    lacking = write(tmp_path / "lacking.jsonl", [good, GOOD])
    with pytest.raises(ValueError, match="lacking.jsonl:2: no known fields.*chosen/rejected"):
        data.read_preferences(lacking)


def test_missing_empty_and_unknown_files_are_errors_that_say_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, said in [("absent.jsonl", "absent.jsonl: not found"),
                       ("empty.jsonl", "empty.jsonl: the file is empty"),
                       ("rows.csv", '".csv" files are not read here; give .*jsonl'),
                       ("folder", "folder: no .*jsonl file in this folder")]:
        for read in (data.read_examples, data.read_preferences, data.read_prompts,
                     lambda path: list(data.read_documents(path))):
            with pytest.raises(ValueError, match=said):
                read(tmp_path / name)
    with pytest.raises(ValueError, match="latin.txt: not UTF-8: byte 0xe9 at byte offset 3"):
        list(data.read_documents(tmp_path / "latin.txt"))
    with pytest.raises(ValueError, match='rows.jsonl:1: no known fields: found "txt"; give'):
        list(data.read_documents(write(tmp_path / "rows.jsonl", [{"txt": "x"}])))


def test_bad_rows_are_skipped_only_when_asked_and_then_counted(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [GOOD, "{", GOOD, {"prompt": "p", "response": ""}])
    assert len(data.read_examples(path, bad_rows="skip")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: skipped 2 of 4 rows (first: {path}:2: broken JSON")
    with pytest.raises(ValueError, match="every row is bad"):
        data.read_examples(write(path, ["{", "["]), bad_rows="skip")
    with pytest.raises(ValueError, match="bad_rows is 'ignore'"):
        data.read_examples(path, bad_rows="ignore")


# ---------------------------------------------------------------------- worlds and splits

def test_a_world_is_read_by_name_and_seed():
    for name, seed in (("world", 0), ("world:3", 3)):
        raw = World(seed).examples(5, split="heldout", seed=7)
        read = data.read_examples(name, 5, split="heldout", seed=7)
        assert [e["messages"][0]["content"] for e in read] == [e["prompt"] for e in raw]
        assert [e["messages"][1]["content"] for e in read] == [e["response"] for e in raw]
        prompts = data.read_prompts(name, 4, split="train", seed=2)
        assert [p["example"]["prompt"] for p in prompts] == \
            [e["prompt"] for e in World(seed).prompts(4, "train", seed=2)]
        noisy = data.read_preferences(name, 40, seed=1, noise=0.5)
        assert [p["chosen"] for p in noisy] == \
            [p["chosen"] for p in World(seed).preferences(40, "train", seed=1, noise=0.5)]


def test_world_documents_stop_at_max_bytes():
    documents = list(data.read_documents("world", max_bytes=20_000))
    sizes = [len(document.encode()) for document in documents]
    assert sum(sizes) >= 20_000 > sum(sizes[:-1])
    assert documents[0] == next(World(0).documents(split="train"))


def test_a_world_needs_a_whole_seed_and_a_number_of_rows(tmp_path):
    for name in ("world:", "world:x", "world:-1"):
        with pytest.raises(ValueError, match="world:SEED needs a whole number"):
            data.read_examples(name, 1)
    with pytest.raises(ValueError, match="say how many examples"):
        data.read_examples("world")
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert len(data.read_preferences(path, noise=0.0)) == 1
    with pytest.raises(ValueError, match="noise can be set for a world only"):
        data.read_preferences(path, noise=0.1)


def test_a_file_is_split_by_prompt_so_that_no_prompt_is_on_both_sides(tmp_path):
    rows = [{"prompt": f"question {i % 200}", "response": f"answer {i}"} for i in range(600)]
    path = write(tmp_path / "rows.jsonl", rows)
    train, heldout = (data.read_examples(path, split=split) for split in ("train", "heldout"))
    sides = [{e["messages"][0]["content"] for e in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200
    assert len(train) + len(heldout) == 600 and 10 <= len(sides[1]) <= 35
    some = data.read_examples(path, 50, seed=1)
    assert len({e["where"] for e in some}) == 50 and some == data.read_examples(path, 50, seed=1)
    assert some != data.read_examples(path, 50, seed=2)
    with pytest.raises(ValueError, match="split is 'test'"):
        data.read_examples(path, split="test")


def test_a_text_is_split_at_its_last_tenth_and_jsonl_documents_are_split_whole(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    (tmp_path / "text.txt").write_text(text)
    assert list(data.read_documents(tmp_path / "text.txt", split="train")) == [text[:900]]
    assert list(data.read_documents(tmp_path / "text.txt", split="heldout")) == [text[900:]]
    path = write(tmp_path / "rows.jsonl", [{"text": f"document {i}"} for i in range(300)])
    parts = [list(data.read_documents(path, split=split)) for split in ("train", "heldout")]
    assert sorted(parts[0] + parts[1]) == sorted(data.read_documents(path))
    assert 10 <= len(parts[1]) <= 50


# ---------------------------------------------------------------------- pretraining windows

def test_documents_are_joined_with_one_endoftext_after_each():
    documents = [f"bear {i}" for i in range(2500)]                             # several chunks
    tokens = data.tokenize_documents(iter(documents), TOKENIZER)
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == TOKENIZER.endoftext)
    assert len(ends) == 2500 and ends[-1] == len(tokens) - 1
    parts = np.split(tokens, ends + 1)
    assert [TOKENIZER.decode(part[:-1].tolist()) for part in parts[:-1]] == documents


@pytest.mark.parametrize("length, context", [(9, 8), (17, 8), (18, 8), (16, 8), (900, 33), (50, 1)])
def test_every_token_but_the_first_is_a_target_exactly_once_an_epoch(length, context):
    stream = data.TokenStream(np.arange(length, dtype=np.uint16), context, 0, endoftext=60000)
    for epoch in range(2):
        targets, seen = Counter(), []
        for k in range(len(stream)):
            batch = stream.rows([epoch * len(stream) + k])
            assert batch.tokens.shape == (1, context + 1) and batch.tokens.dtype == torch.int64
            assert (batch.tokens.diff() == 1).all()                            # a piece of the text
            assert not batch.loss_mask[:, 0].any()
            targets.update(batch.tokens[:, 1:][batch.loss_mask[:, 1:]].tolist())
            seen += batch.index.tolist()
        assert targets == Counter(range(1, length)) and sorted(seen) == list(range(len(stream)))
    evaluated = sum(batch.n_targets for batch in stream.epoch(3))
    assert evaluated == length - 1


def test_documents_and_positions_of_windows_agree_with_a_slow_count():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, 500).astype(np.int32)                          # 0 ends a document
    batch = data.TokenStream(tokens, 40, 0, endoftext=0).batch(0, 8)
    for row in range(8):
        number = position = 0
        for t, token in enumerate(batch.tokens[row].tolist()):
            if t and token == 0:                                               # begins the next one
                number, position = number + 1, 0
            assert batch.documents[row, t] == number and batch.positions[row, t] == position
            position += 1
    assert batch.documents.dtype == torch.int32 and batch.positions.dtype == torch.int64
    plain = data.TokenStream(tokens, 40, 0, endoftext=0, document_masks=False).batch(0, 8)
    assert plain.documents is None and plain.positions is None
    assert torch.equal(plain.tokens, batch.tokens)


def test_a_corpus_shorter_than_a_window_says_what_is_needed():
    with pytest.raises(ValueError, match="the corpus has 8 tokens; one window needs .* = 9"):
        data.TokenStream(np.zeros(8, np.uint16), 8, 0, 1)


# ---------------------------------------------------------------------- all sources of batches

def sources():
    text = np.random.default_rng(0).integers(0, 99, 700)
    return {"stream": lambda seed=0: data.TokenStream(text, 10, seed, 0),
            "packed": lambda seed=0: data.PackedExamples(examples(90), TOKENIZER, 128, seed),
            "pairs": lambda seed=0: data.PreferencePairs(pairs(71), TOKENIZER, 128, seed)}


def items(kind):
    return {"stream": 70, "packed": 90, "pairs": 71}[kind]


@pytest.mark.parametrize("kind", sources())
@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (3, 2), (2, 5)])
def test_all_ranks_together_see_each_item_once_an_epoch(kind, world_size, batch_size):
    source = sources()[kind]()
    taken = []                                       # in the order of steps and, within one, ranks
    for step in range(400 // (world_size * batch_size)):
        for rank in range(world_size):
            taken += source.batch(step, batch_size, rank, world_size).index.tolist()
    n, epochs = items(kind), []
    while len(taken) >= n:
        epoch, taken = taken[:n], taken[n:]
        assert sorted(epoch) == list(range(n))
        epochs.append(epoch)
    assert len(epochs) >= 3 and epochs[0] != epochs[1]                         # shuffled anew
    assert sorted(i for batch in source.epoch(7) for i in batch.index.tolist()) == list(range(n))


@pytest.mark.parametrize("kind", sources())
def test_a_batch_depends_on_nothing_but_seed_and_step(kind):
    make = sources()[kind]
    first, resumed, other = make(), make(), make(seed=1)
    batches = [first.batch(step, 4) for step in range(30)]
    for step in (29, 3, 17):                                                   # in any order
        batch = resumed.batch(step, 4)
        for name in ("tokens", "loss_mask", "documents", "positions", "index"):
            a, b = getattr(batch, name), getattr(batches[step], name)
            assert a is b is None or torch.equal(a, b)
    assert any(not torch.equal(other.batch(s, 4).index, batches[s].index) for s in range(3))


def test_permuted_gives_each_of_n_items_once_an_epoch():
    taken = [i for step in range(11) for rank in (0, 1)
             for i in data.permuted(7, 0, step, 3, rank, 2)]
    assert all(sorted(taken[k:k + 7]) == list(range(7)) for k in range(0, 63, 7))
    assert len({tuple(taken[k:k + 7]) for k in range(0, 63, 7)}) > 1


def test_moving_a_batch_keeps_what_is_absent_absent():
    batch = data.PreferencePairs(pairs(3), TOKENIZER, 128, 0).batch(0, 2).to("meta")
    assert batch.tokens.device.type == batch.index.device.type == "meta"
    assert batch.documents is None and batch.positions is None


# ---------------------------------------------------------------------- packed conversations

def test_packing_fits_every_item_once_and_wastes_little():
    assert data.pack([3, 5, 2, 6], 8) == [[3, 2], [1, 0]]
    rng = np.random.default_rng(0)
    for size in (64, 257):
        lengths = np.minimum(rng.lognormal(3, 0.8, 2000).astype(int) + 1, size).tolist()
        rows = data.pack(lengths, size)
        assert sorted(i for row in rows for i in row) == list(range(2000))
        assert all(sum(lengths[i] for i in row) <= size for row in rows)
        assert len(rows) <= 1.03 * math.ceil(sum(lengths) / size)
    assert data.pack([4, 4], 4) == [[0], [1]]


def test_packed_rows_are_whole_conversations_with_their_own_masks_and_positions():
    rows = examples(60)
    source = data.PackedExamples(rows, TOKENIZER, 128, seed=3)
    found, padded = [], 0
    for batch in source.epoch(4):
        index = iter(batch.index.tolist())
        for b in range(len(batch.tokens)):
            tokens, mask = batch.tokens[b].tolist(), batch.loss_mask[b].tolist()
            assert len(tokens) == 129
            documents, positions = batch.documents[b].tolist(), batch.positions[b].tolist()
            numbers = list(dict.fromkeys(documents))               # padding, if any, is the last
            assert numbers in ([*range(max(documents) + 1)], [*range(max(documents) + 1), -1])
            for number in numbers:
                span = [t for t in range(129) if documents[t] == number]
                assert span == list(range(span[0], span[-1] + 1))
                ids, targets = [tokens[t] for t in span], [mask[t] for t in span]
                assert [positions[t] for t in span] == list(range(len(span)))
                if ids[0] == TOKENIZER.pad:
                    assert set(ids) == {TOKENIZER.pad} and not any(targets)
                    assert number == -1
                    padded += 1
                    continue
                found.append(next(index))
                chat_ids, chat_mask = TOKENIZER.chat(rows[found[-1]]["messages"])
                assert ids == list(chat_ids) and targets == [bool(m) for m in chat_mask]
                assert not targets[0] and any(targets)
        assert next(index, None) is None
    assert sorted(found) == list(range(60)) and padded


def test_mixing_weights_by_hand():
    counts = {"a": 100, "b": 400}
    assert data.mixing_weights(counts) == pytest.approx({"a": 0.2, "b": 0.8})
    assert data.mixing_weights(counts, tau=2) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert data.mixing_weights(counts, tau=math.inf) == pytest.approx({"a": 0.5, "b": 0.5})
    assert data.mixing_weights(counts, cap=300) == pytest.approx({"a": 0.25, "b": 0.75})
    both = data.mixing_weights(counts, tau=2, cap=144)
    assert both == pytest.approx({"a": 10 / 22, "b": 12 / 22})
    for bad in ({"tau": 0.5}, {"cap": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            data.mixing_weights(counts, **bad)


def test_an_epoch_draws_tasks_by_weight_and_repeats_evenly():
    tasks, rng = ["a"] * 10 + ["b"] * 90, np.random.default_rng(0)
    assert sorted(data.draw(tasks, 1.0, None, rng)) == list(range(100))        # proportional: all
    uniform = Counter(data.draw(tasks, math.inf, None, rng).tolist())
    assert all(uniform[i] == 5 for i in range(10))                             # 50 draws from 10
    assert sum(uniform.values()) == 100 and max(uniform[i] for i in range(10, 100)) == 1
    capped = data.draw(tasks, 1.0, 20, rng)
    assert sorted(capped)[:10] == list(range(10)) and len(set(capped.tolist())) == 30
    thirds = [int((data.draw(["a", "b", "b"], math.inf, None, rng) == 0).sum()) for _ in range(400)]
    assert set(thirds) == {1, 2} and abs(np.mean(thirds) - 1.5) < 0.1          # 1.5 on average


def test_no_task_exceeds_its_cap_whatever_tau():
    counts, rng = {"a": 7, "b": 60, "c": 300}, np.random.default_rng(0)
    tasks = [task for task, n in counts.items() for _ in range(n)]
    for tau in (1.0, 1.7, 4.0, math.inf):
        for cap in (5, 50, 1000):
            drawn = Counter(tasks[i] for i in data.draw(tasks, tau, cap, rng))
            assert sum(drawn.values()) == sum(min(n, cap) for n in counts.values())
            assert all(n <= cap + 1e-9 or cap == 1000 for n in drawn.values())


def test_packed_examples_follow_the_mixing_weights_in_every_epoch():
    rows = examples(80)
    for i, row in enumerate(rows):
        row["task"] = "rare" if i < 8 else "common"
    source = data.PackedExamples(rows, TOKENIZER, 128, seed=0, tau=math.inf)
    for epoch in range(3):
        drawn = Counter(i for row in source.packed(epoch) for i in row)
        assert sum(drawn.values()) == 80 and sum(drawn[i] for i in range(8)) == 40


# ---------------------------------------------------------------------- preference pairs

def test_a_pair_batch_holds_the_chosen_then_the_rejected_with_response_masks():
    rows = pairs(40)
    source = data.PreferencePairs(rows, TOKENIZER, 101, seed=0)
    for batch in source.epoch(6):
        index, width = batch.index.tolist(), batch.tokens.shape[1]
        assert len(batch.tokens) == 2 * len(index) and batch.documents is batch.positions is None
        longest = 0
        for b, (i, side) in enumerate([(i, s) for s in ("chosen", "rejected") for i in index]):
            ids = TOKENIZER.prompt(rows[i]["prompt"])
            response = TOKENIZER.encode(rows[i][side]) + [TOKENIZER.end]
            padding = width - len(ids) - len(response)
            assert batch.tokens[b].tolist() == ids + response + [TOKENIZER.pad] * padding
            assert batch.loss_mask[b].tolist() == \
                [False] * len(ids) + [True] * len(response) + [False] * padding
            longest = max(longest, len(ids) + len(response))
        assert longest <= width == min(-(-longest // 8) * 8, 101)


def test_only_the_compared_response_of_a_long_conversation_is_a_target():
    pair = {"prompt": [*TALK, *ASKED], "chosen": "Bruno.", "rejected": "Ada.", "where": "x:1"}
    batch = data.PreferencePairs([pair], TOKENIZER, 256, 0).batch(0, 1)
    for b, response in enumerate(("Bruno.", "Ada.")):
        targets = batch.tokens[b][batch.loss_mask[b]].tolist()
        assert targets == TOKENIZER.encode(response) + [TOKENIZER.end]


def test_pairs_of_similar_length_share_a_batch():
    source = data.PreferencePairs(pairs(512), TOKENIZER, 256, seed=0)
    spread = [np.ptp(source.lengths[source.batch(step, 8).index]) for step in range(64)]
    unsorted = [np.ptp(group) for group in source.lengths.reshape(-1, 8)]
    assert np.mean(spread) < 0.25 * np.mean(unsorted)


# ---------------------------------------------------------------------- too long

def test_too_long_examples_are_an_error_that_names_line_length_limit_and_flag():
    [row] = examples(1)
    row["messages"][0]["content"] = "q" * 100
    length = len(TOKENIZER.chat(row["messages"])[0])
    data.PackedExamples([row], TOKENIZER, length - 1, 0)                       # C + 1 tokens fit
    with pytest.raises(ValueError, match=f"made.jsonl:1: {length} tokens .* {length - 1} fit; .*"
                                         "--truncate left, --truncate drop or a model with"):
        data.PackedExamples([row], TOKENIZER, length - 2, 0)
    with pytest.raises(ValueError, match="truncate is 'right'"):
        data.PackedExamples([row], TOKENIZER, 999, 0, "right")


def test_truncating_left_keeps_the_whole_response_and_no_first_target():
    talk = [*TALK, {"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "end"}]
    ids, mask = (list(part) for part in TOKENIZER.chat(talk))
    for limit in range(5, len(ids)):                                           # "end" needs 1 + 4
        source = data.PackedExamples([{"messages": talk, "where": "x:1", "task": ""}], TOKENIZER,
                                     limit - 1, 0, "left")
        batch = source.batch(0, 1)
        assert batch.tokens[0].tolist() == ids[-limit:]
        assert batch.loss_mask[0].tolist() == [False, *map(bool, mask[-limit:][1:])]
    with pytest.raises(ValueError, match="x:1: the response alone takes 4 tokens, 3 fit"):
        data.PackedExamples([{"messages": talk, "where": "x:1"}], TOKENIZER, 3, 0, "left")


def test_dropping_leaves_out_the_long_ones_and_says_how_many(capsys):
    rows = examples(40)
    lengths = [len(TOKENIZER.chat(row["messages"])[0]) for row in rows]
    source = data.PackedExamples(rows, TOKENIZER, 49, 0, "drop")
    assert source.examples == [row for row, n in zip(rows, lengths) if n <= 50]
    dropped = 40 - len(source.examples)
    assert 0 < dropped < 40
    assert f"dropped {dropped} of 40 rows longer than 50 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no rows left"):
        data.PackedExamples(rows, TOKENIZER, 3, 0, "drop")


def test_truncating_a_pair_cuts_the_same_prompt_tokens_from_both_sides():
    pair = {"prompt": [{"role": "user", "content": "abcdefghij" * 5}], "chosen": "yes, it is so",
            "rejected": "no", "where": "x:1"}
    with pytest.raises(ValueError, match="x:1: .*--truncate left"):
        data.PreferencePairs([pair], TOKENIZER, 40, 0)
    batch = data.PreferencePairs([pair], TOKENIZER, 42, 0, "left").batch(0, 1)
    assert batch.tokens.shape == (2, 42)                                       # no multiple of 8
    prompt = TOKENIZER.prompt(pair["prompt"])
    kept = 42 - len("yes, it is so") - 1
    for b, response in enumerate(("yes, it is so", "no")):
        row = batch.tokens[b].tolist()
        assert row[:kept] == prompt[-kept:]
        assert batch.tokens[b][batch.loss_mask[b]].tolist() == \
            TOKENIZER.encode(response) + [TOKENIZER.end]
    with pytest.raises(ValueError, match="the response alone takes 14 tokens, 13 fit"):
        data.PreferencePairs([pair], TOKENIZER, 14, 0, "left")


# ---------------------------------------------------------------------- generation

def test_left_padding_ends_all_prompts_in_the_same_column():
    tokens, starts = data.left_pad([[5, 6], [7], [1, 2, 3]], pad=9)
    assert tokens.tolist() == [[9, 5, 6], [9, 9, 7], [1, 2, 3]] and tokens.dtype == torch.int64
    assert starts.tolist() == [1, 2, 0]


def test_prompts_are_encoded_to_fit_and_cut_only_when_asked():
    prompts = [{"messages": ASKED, "where": "x:1"},
               {"messages": [{"role": "user", "content": "q" * 90}], "where": "x:2"}]
    whole = [TOKENIZER.prompt(prompt["messages"]) for prompt in prompts]
    assert data.encode_prompts(prompts, TOKENIZER, 200) == (prompts, whole)
    with pytest.raises(ValueError, match="x:2: 93 tokens .* 50 fit"):
        data.encode_prompts(prompts, TOKENIZER, 50)
    assert data.encode_prompts(prompts, TOKENIZER, 50, "left")[1] == [whole[0], whole[1][-50:]]
    assert data.encode_prompts(prompts, TOKENIZER, 50, "drop") == (prompts[:1], whole[:1])


def test_a_response_batch_marks_the_responses_alone():
    batch = data.response_batch([[1, 2], [3]], [[4], [5, 6, 7]], pad=9, context_length=4)
    assert batch.tokens.tolist() == [[1, 2, 4, 9], [3, 5, 6, 7]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch.index.tolist() == [0, 1] and batch.n_targets == 4


@pytest.mark.parametrize("longest, width", [(1, 16), (16, 16), (17, 32), (39, 40), (40, 40)])
def test_rows_are_of_few_widths_and_never_wider_than_the_context(longest, width):
    batch = data.response_batch([[1]], [[2] * (longest - 1)], pad=9, context_length=40)
    assert batch.tokens.shape == (1, width)


def test_a_copying_row_is_said_again_and_every_other_row_backwards_in_turn():
    batch = data.copying_batch(200, rows=40, length=64, seed=0, step=3)
    assert batch.tokens.shape == (40, 65) and batch.tokens.max() < 200 and batch.loss_mask.all()
    periods = []
    for i, row in enumerate(batch.tokens):
        p = next(p for p in range(1, 65)
                 if (row[p:2 * p] == (row[:p].flip(0) if i % 2 else row[:p])).all()
                 and (row[2 * p:] == row[:-2 * p]).all())
        periods.append(p)
    assert min(periods) >= 4 and max(periods) <= 16 and len(set(periods)) > 8
    again, other = (data.copying_batch(200, 40, 64, 0, step).tokens for step in (3, 4))
    assert (again == batch.tokens).all() and not (other == batch.tokens).all()


def test_targets_are_counted_before_a_batch_goes_to_a_gpu():
    batch = data.response_batch([[1], [2]], [[4, 5], [6]], pad=0, context_length=4).to("meta")
    assert batch.tokens.is_meta and batch.n_targets == 3
