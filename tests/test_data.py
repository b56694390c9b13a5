"""data.py: batches checked against slow, separate counts."""
import math
from collections import Counter

import numpy as np
import pytest
import torch

import data
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
ASKED = [{"role": "user", "content": "Who baked the bread?"}]
TALK = [*ASKED, {"role": "assistant", "content": "Old Bruno did."}]


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


def packed(rows, context_length, seed, *args, **options):
    """Conversations as train_sft.py packs them."""
    rows = data.format_examples(rows, TOKENIZER)
    return data.PackedExamples(rows, TOKENIZER, context_length, seed, *args, **options)


def draw(tasks, tau, cap, rng):
    """An epoch of examples in the shares that train_sft.py gives their tasks."""
    return data.draw(tasks, data.mixing_weights(Counter(tasks), tau, cap), cap, rng)


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"prompt": [{"role": "user", "content": f"{i} " + "q" * rng.integers(1, 40)}],
             "chosen": f"{i} yes" + "y" * rng.integers(0, 40),
             "rejected": f"{i} no" + "n" * rng.integers(0, 40), "where": f"made.jsonl:{i + 1}"}
            for i in range(n)]


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
            "packed": lambda seed=0: packed(examples(90), 128, seed),
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
    source = packed(rows, 128, seed=3)
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
    assert sorted(draw(tasks, 1.0, None, rng)) == list(range(100))        # proportional: all
    uniform = Counter(draw(tasks, math.inf, None, rng).tolist())
    assert all(uniform[i] == 5 for i in range(10))                             # 50 draws from 10
    assert sum(uniform.values()) == 100 and max(uniform[i] for i in range(10, 100)) == 1
    capped = draw(tasks, 1.0, 20, rng)
    assert sorted(capped)[:10] == list(range(10)) and len(set(capped.tolist())) == 30
    thirds = [int((draw(["a", "b", "b"], math.inf, None, rng) == 0).sum()) for _ in range(400)]
    assert set(thirds) == {1, 2} and abs(np.mean(thirds) - 1.5) < 0.1          # 1.5 on average


def test_no_task_exceeds_its_cap_whatever_tau():
    counts, rng = {"a": 7, "b": 60, "c": 300}, np.random.default_rng(0)
    tasks = [task for task, n in counts.items() for _ in range(n)]
    for tau in (1.0, 1.7, 4.0, math.inf):
        for cap in (5, 50, 1000):
            drawn = Counter(tasks[i] for i in draw(tasks, tau, cap, rng))
            assert sum(drawn.values()) == sum(min(n, cap) for n in counts.values())
            assert all(n <= cap + 1e-9 or cap == 1000 for n in drawn.values())


def test_packed_examples_follow_the_mixing_weights_in_every_epoch():
    rows = examples(80)
    for i, row in enumerate(rows):
        row["task"] = "rare" if i < 8 else "common"
    weights = data.mixing_weights(Counter(row["task"] for row in rows), tau=math.inf)
    source = packed(rows, 128, seed=0, weights=weights)
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
    packed([row], length - 1, 0)                       # C + 1 tokens fit
    with pytest.raises(ValueError, match=f"made.jsonl:1: {length} tokens .* {length - 1} fit; .*"
                                         "--truncate left, --truncate drop or a model with"):
        packed([row], length - 2, 0)
    with pytest.raises(ValueError, match="truncate is 'right'"):
        packed([row], 999, 0, "right")


def test_truncating_left_keeps_the_whole_response_and_no_first_target():
    talk = [*TALK, {"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "end"}]
    ids, mask = (list(part) for part in TOKENIZER.chat(talk))
    for limit in range(5, len(ids)):                                           # "end" needs 1 + 4
        source = packed([{"messages": talk, "where": "x:1", "task": ""}], limit - 1, 0, "left")
        batch = source.batch(0, 1)
        assert batch.tokens[0].tolist() == ids[-limit:]
        assert batch.loss_mask[0].tolist() == [False, *map(bool, mask[-limit:][1:])]
    with pytest.raises(ValueError, match="x:1: the response alone takes 4 tokens, 3 fit"):
        packed([{"messages": talk, "where": "x:1"}], 3, 0, "left")


def test_dropping_leaves_out_the_long_ones_and_says_how_many(capsys):
    rows = data.format_examples(examples(40), TOKENIZER)
    lengths = [len(TOKENIZER.chat(row["messages"])[0]) for row in rows]
    source = packed(rows, 49, 0, "drop")
    assert source.examples == [row for row, n in zip(rows, lengths) if n <= 50]
    dropped = 40 - len(source.examples)
    assert 0 < dropped < 40
    assert f"dropped {dropped} of 40 rows longer than 50 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no rows left"):
        packed(rows, 3, 0, "drop")


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


@pytest.mark.parametrize("mask, start", [([0, 0, 1, 0, 1, 1], 4), ([0, 1, 0, 1, 1, 0], 3),
                                         ([0, 1, 1, 0, 0], 1), ([0, 0], 2)])
def test_the_last_response_begins_where_its_targets_do_whatever_stands_behind(mask, start):
    assert data.response_start(mask) == start
