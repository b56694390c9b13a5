"""labels.py: where a label stands among the tokens, what is cut off, entities and spans by hand."""
from types import SimpleNamespace

import pytest
import torch
from tiny import TOKENIZER, tiny_model, write_rows

import labels
import readers
from labels import LabelledTexts, entities, entity_f1, macro_f1, span_figures
from tokenizer import Tokenizer

EOT = TOKENIZER.endoftext
SPANNED = {"question": "who?", "text": "Ada met Bo", "answer": "Bo", "start": 8, "where": "x:1"}
MARKED = {"tokens": ["Ada", "met", "Bo", "."], "labels": ["name", "O", "name", "O"],
          "where": "x:1"}
TEXT = {"text": "good, bad", "label": "b", "where": "x:1"}
CLASSES = {"class": ["a", "b"], "tokens": ["O", "name"], "span": ["start", "end"]}
ROWS = {"class": TEXT, "tokens": MARKED, "span": SPANNED}


def encoded(task, tokenizer=TOKENIZER, **changes):
    [row] = labels.encode_all([ROWS[task] | changes], task, tokenizer, CLASSES[task])
    return row


def source(task, rows, limit=64, **changes):
    cfg = SimpleNamespace(**{"task": task, "seed": 0, "truncate": "error"} | changes)
    return LabelledTexts(rows, CLASSES[task], TOKENIZER, tiny_model(context_length=limit), cfg)


# ---------------------------------------------------------------------- labels among tokens

def test_a_text_begins_with_endoftext_and_all_of_it_is_read():
    row = encoded("class")
    assert row["ids"] == [EOT, *b"good, bad"] and row["mask"] == [1] * 10 and row["labels"] == [1]


def test_a_word_has_its_label_at_its_last_token_and_spaces_as_in_a_text():
    row = encoded("tokens")
    assert row["ids"] == [EOT, *b"Ada met Bo."]
    labelled = [bytes(row["ids"][1:i + 1]) for i, here in enumerate(row["mask"]) if here]
    assert labelled == [b"Ada", b"Ada met", b"Ada met Bo", b"Ada met Bo."]
    assert row["labels"] == [1, 0, 1, 0]


def test_a_span_is_counted_in_tokens_of_the_passage():
    row = encoded("span")
    assert row["ids"] == [EOT, *b"who?\nAda met Bo"] and row["labels"] == [(8, 9)]
    assert row["mask"] == [0] * 6 + [1] * 10


def test_a_span_has_the_tokens_that_hold_its_first_and_last_byte():
    """Tokens of several bytes, and characters of several: the space belongs to its word."""
    bpe = Tokenizer.train(["Zoë met Bo. " * 9], 290)
    row = encoded("span", bpe, text="Zoë met Bo. Zoë met Bo.", answer="met Bo", start=16)
    [(first, last)] = row["labels"]
    passage = row["ids"][row["mask"].index(1):]
    assert bpe.decode(passage[first:last + 1]) == " met Bo"
    assert bpe.decode(passage[:first]) == "Zoë met Bo. Zoë"
    half = encoded("span", bpe, text="Zoë met Bo. Zoë met Bo.", answer="e", start=5)
    [(first, last)] = half["labels"]
    assert first == last and "e" in bpe.decode([half["ids"][half["mask"].index(1) + first]])


def test_bert_has_cls_and_sep():
    bert = Tokenizer(TOKENIZER.ranks, TOKENIZER.pattern, [*TOKENIZER.named, "<|cls|>", "<|sep|>"])
    row = encoded("span", bert)
    assert row["ids"][0] == bert.special["<|cls|>"] and row["ids"][5] == bert.special["<|sep|>"]
    assert row["fixed"] == 6


@pytest.mark.parametrize("task, changes", [
    ("class", {"label": "c"}), ("tokens", {"labels": ["name", "O", "c", "O"]})])
def test_a_class_that_training_never_saw_is_named(task, changes):
    with pytest.raises(ValueError, match="x:1: the class 'c' does not occur in training"):
        encoded(task, **changes)


@pytest.mark.parametrize("task", ["class", "tokens"])
def test_a_single_class_is_nothing_to_learn(task):
    rows = [ROWS[task] | {"label": "b", "labels": ["O"] * 4}] * 2
    with pytest.raises(ValueError, match="every row has the class"):
        labels.classes_of(rows, task)
    assert labels.classes_of([TEXT, TEXT | {"label": "a"}], "class") == ["a", "b"]


# ---------------------------------------------------------------------- texts that are too long

def test_left_cuts_a_text_behind_its_first_token():
    [row] = labels.fit_all([encoded("class")], 4, "left")
    assert row["ids"] == [EOT, *b"bad"] and row["mask"] == [1] * 4 and row["labels"] == [1]


def test_left_cuts_words_with_their_labels():
    [row] = labels.fit_all([encoded("tokens")], 6, "left")
    assert row["ids"] == [EOT, *b"t Bo."] and row["labels"] == [0, 1, 0]
    assert row["mask"] == [0, 1, 0, 0, 1, 1]


def test_left_cuts_the_passage_and_never_the_question():
    [row] = labels.fit_all([encoded("span")], 10, "left")
    assert row["ids"] == [EOT, *b"who?\nt Bo"] and row["labels"] == [(2, 3)]


@pytest.mark.parametrize("row, limit, truncate, named", [
    (encoded("class"), 9, "error", "x:1: 10 tokens, 9 fit; use --truncate left"),
    (encoded("class"), 9, "drop", "no rows left: of 1, none fits 9 tokens"),
    (encoded("span", answer="Ada", start=0), 15, "left", "x:1: --truncate left would cut off"),
    (encoded("span"), 6, "left", "x:1: the question alone fills the context")])
def test_what_cannot_be_cut_is_refused(row, limit, truncate, named):
    with pytest.raises(ValueError, match=named):
        labels.fit_all([row], limit, truncate)


def test_drop_leaves_out_and_says_so(capsys):
    rows = [encoded("class"), encoded("class", text="good")]
    assert labels.fit_all(rows, 6, "drop") == [rows[1]]
    assert "dropped 1 of 2 rows longer than 6 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------- batches

def test_labels_of_a_batch_stand_where_its_tokens_do():
    longer = SPANNED | {"question": "whom did she meet?"}
    batch = source("span", [SPANNED, longer]).batch(0, 2)
    for ids, (first, last), real in zip(batch.tokens, batch.labels, batch.documents == 0):
        assert bytes(ids[first:last + 1].tolist()) == b"Bo"
        assert real.equal(ids != TOKENIZER.pad)
    words = [MARKED, MARKED | {"tokens": ["Bo"], "labels": ["name"]}]
    batch = source("tokens", words).batch(0, 2)
    expected = [label for i in batch.index for label in ([1, 0, 1, 0], [1])[i]]
    assert batch.labels.tolist() == expected and batch.loss_mask.sum() == 5


def test_every_row_comes_once_an_epoch():
    rows = [TEXT | {"text": f"{i}"} for i in range(7)]
    texts = source("class", rows)
    once = torch.cat([batch.index for batch in texts.epoch(3)])
    assert sorted(once.tolist()) == list(range(7))
    steps = torch.cat([texts.batch(step, 2, rank, 2).index for step in range(2)
                       for rank in (0, 1)])
    assert steps[:7].equal(once)


def test_the_majority_is_counted_in_training():
    train = source("class", [TEXT, TEXT, TEXT | {"label": "a"}])
    heldout = source("class", [TEXT] + [TEXT | {"label": "a"}] * 3)
    assert labels.majority(train, heldout) == 0.25


# ---------------------------------------------------------------------- scores

@pytest.mark.parametrize("text, found", [
    ("B-x I-x O B-y", {("x", 0, 1), ("y", 3, 3)}), ("B-x B-x", {("x", 0, 0), ("x", 1, 1)}),
    ("I-x I-x O", {("x", 0, 1)}), ("B-x I-y", {("x", 0, 0), ("y", 1, 1)}),
    ("x x y O x", {("x", 0, 1), ("y", 2, 2), ("x", 4, 4)}), ("O O", set()), ("", set())])
def test_entities_by_hand(text, found):
    assert entities(text.split()) == found


def test_entity_f1_counts_no_entity_with_a_wrong_boundary():
    truth = [["B-x", "I-x", "O", "B-y"], ["O", "B-y"]]
    said = [["B-x", "O", "O", "B-y"], ["B-y", "B-y"]]          # one end and one entity too many
    assert entity_f1(said, truth) == pytest.approx(2 * 2 / (4 + 3))
    assert entity_f1(truth, truth) == 1 and entity_f1([["O"]], [["O"]]) == 0


def test_macro_f1_by_hand():
    predicted, truth = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    # of class 0: 2/3, 1: 2/4, 2: 0; class 3 is nowhere
    assert macro_f1(predicted, truth) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_span_figures_by_hand():
    predicted = torch.tensor([[2, 4], [2, 4], [0, 1]])
    truth = torch.tensor([[2, 4], [3, 6], [2, 2]])
    assert span_figures(predicted, truth) == {
        "exact_match": pytest.approx(1 / 3),
        "span_f1": pytest.approx((1 + 2 * 2 / (3 + 4) + 0) / 3)}


# ---------------------------------------------------------------------- rows of files

@pytest.mark.parametrize("read, row, named", [
    (readers.read_classes, {"text": " ", "label": "a"}, 'rows.jsonl:1: field "text" is empty'),
    (readers.read_classes, {"text": "x"}, "no known fields.*give one of text/label"),
    (readers.read_classes, {"text": "x", "label": None}, 'field "label" is null; it must be the'),
    (readers.read_classes, {"text": "x", "label": 0.5}, 'field "label" is 0.5'),
    (readers.read_words, {"tokens": ["a", "b"], "labels": ["O"]},
     'rows.jsonl:1: "labels" has 1 labels for the 2 words'),
    (readers.read_words, {"tokens": [], "labels": []}, 'field "tokens" is \\[\\]'),
    (readers.read_words, {"tokens": ["a", ""], "labels": ["O", "O"]},
     'field "tokens\\[1\\]" is empty'),
    (readers.read_words, {"tokens": "a b", "labels": ["O", "O"]}, '"tokens" is "a b"; .* a list'),
    (readers.read_spans, {"question": "q", "context": "a b", "answer": "c"},
     'rows.jsonl:1: "answer" "c" does not stand in "context"'),
    (readers.read_spans, {"question": "q", "context": "a b a", "answer": "a"},
     '"answer" "a" stands 2 times in "context"; say which'),
    (readers.read_spans, {"question": "q", "context": "a b a", "answer": "a", "start": 2},
     'at "start" 2 the context has "b" and not the answer, "a"'),
    (readers.read_spans, {"question": "q", "context": "a b a", "answer": "a", "start": -1},
     'field "start" is -1; it must be a whole number'),
    (readers.read_spans, {"question": "", "context": "a", "answer": "a"}, '"question" is empty')])
def test_a_bad_row_is_named(read, row, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        read(write_rows(tmp_path / "rows.jsonl", [row]))


def test_good_rows_and_their_split(tmp_path):
    rows = [{"question": f"q{i % 3}", "context": f"{i // 3} b a", "answer": "a"}
            for i in range(90)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    train, heldout = (readers.read_spans(data, split=split) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 90 and not {row["text"] for row in train} & {
        row["text"] for row in heldout}                # a passage's questions are on one side
    [row] = readers.read_classes(write_rows(tmp_path / "one.jsonl", [{"text": "x", "label": 1}]))
    assert row["label"] == "1"
