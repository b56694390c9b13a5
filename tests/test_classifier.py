"""train_classifier.py: losses by hand, legal spans, padding, what is frozen, and small runs."""
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import TOKENIZER, folder_of, llama_of, tiny_model, write_rows
from torch.autograd import gradcheck

import labels
import lora
import train_classifier
import train_denoise
from heads import WithHead
from plumbing.curves import read_metrics
from plumbing.folders import load_any_model, load_model, read_record
from plumbing.options import build
from plumbing.run import Run
from readers import held_out
from train_classifier import best_span, class_nll, layers_of, n_learning, pooled, span_nll

ANIMALS = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows_of(task: str, n: int = 120) -> list[dict]:
    """Rows whose labels can be told: by the last word, by the letters of a word, by capitals."""
    rows = []
    for i in range(n):
        animal = ANIMALS[i % 3]
        if task == "class":
            rows.append({"text": f"{i} {animal}", "label": animal})
        elif task == "tokens":
            rows.append({"tokens": [f"{i}", animal, "."], "labels": ["B-n", "B-animal", "O"]})
        else:
            rows.append({"question": "who?", "context": f"{'a ' * (i % 5)}{animal.upper()} {i}",
                         "answer": animal.upper()})
    return rows


def config(tmp_path, task="class", **changes):
    if not (tmp_path / "base").exists():
        folder_of(tiny_model(), tmp_path / "base")
    data = write_rows(tmp_path / f"{task}.jsonl", rows_of(task))
    return build(train_classifier.Config, {
        "init": str(tmp_path / "base"), "out": str(tmp_path / "out"), "task": task, "data": data,
        "steps": 6, "warmup": 0, "device": "cpu", "dtype": "float32", "log_every": 1,
        "batch_size": 8, "lr": 5e-3, "eval_every": 100} | changes)


# ---------------------------------------------------------------------- the loss

def test_class_loss_is_what_a_hand_computes():
    nll = class_nll(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([0, 0]))
    e = math.e
    by_hand = [-math.log(e ** 2 / (e ** 2 + 2)), math.log(1 + 2 * e)]
    assert nll.tolist() == pytest.approx(by_hand)
    assert by_hand == pytest.approx([0.2395448, 1.8619948], abs=1e-6)


def test_class_loss_is_cross_entropy_in_value_and_gradient():
    logits, classes = torch.randn(7, 4, dtype=torch.float64), torch.randint(4, (7,))
    logits.requires_grad_()
    expected = F.cross_entropy(logits, classes, reduction="none")
    torch.testing.assert_close(class_nll(logits, classes), expected)
    assert gradcheck(lambda x: class_nll(x, classes), (logits,))
    [gradient] = torch.autograd.grad(class_nll(logits, classes).sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - F.one_hot(classes, 4))


def test_span_loss_is_two_softmaxes_over_the_passage():
    values = torch.zeros(1, 4, 2)
    values[0, 2, 0] = math.log(3)                  # start: 1/5, 3/5, 1/5; end: a third each
    passage = torch.tensor([[False, True, True, True]])
    nll = span_nll(values, torch.tensor([[2, 3]]), passage)
    assert nll.tolist() == pytest.approx([-math.log(3 / 5) - math.log(1 / 3)])
    values = torch.randn(5, 9, 2, dtype=torch.float64, requires_grad=True)
    passage = (torch.arange(9) >= 3).expand(5, 9)
    span = torch.tensor([[3, 3], [4, 8], [5, 6], [8, 8], [3, 7]])
    by_torch = sum(F.cross_entropy(values[:, 3:, i], span[:, i] - 3, reduction="none")
                   for i in range(2))
    torch.testing.assert_close(span_nll(values, span, passage), by_torch)
    assert gradcheck(lambda x: span_nll(x, span, passage), (values,))
    [gradient] = torch.autograd.grad(span_nll(values, span, passage).sum(), values)
    assert gradient.isfinite().all() and not gradient[:, :3].any()


@pytest.mark.parametrize("task, loss", [("class", math.log(3)), ("tokens", math.log(3))])
def test_a_new_head_finds_all_classes_equally_likely(task, loss, tmp_path):
    train_classifier.main(config(tmp_path, task, steps=1))
    [row] = read_metrics(tmp_path / "out")
    assert row["loss"] == pytest.approx(loss, abs=1e-6)


# ---------------------------------------------------------------------- pooling and padding

def test_the_mean_of_the_numbers_is_the_number_of_the_mean():
    h, head = torch.randn(3, 5, 8), torch.nn.Linear(8, 2)
    real = torch.arange(5) < torch.tensor([[5], [2], [1]])
    values = head(h)
    mean = torch.stack([head(h[b, :n].mean(0)) for b, n in enumerate((5, 2, 1))])
    torch.testing.assert_close(pooled(values, real, "mean"), mean)
    assert pooled(values, real, "last").equal(torch.stack([values[0, 4], values[1, 1],
                                                           values[2, 0]]))
    assert pooled(values, real, "cls").equal(values[:, 0])


@pytest.mark.parametrize("architecture, pool", [("decoder", "last"), ("decoder", "mean"),
                                                ("encoder", "cls"), ("encoder", "mean")])
def test_padding_changes_nothing(architecture, pool, tmp_path):
    trunk = tiny_model(architecture=architecture)
    model = WithHead(trunk, 3)
    cfg = config(tmp_path, pool=pool)
    rows = [{"text": text, "label": "cat", "where": ""} for text in ("a", "a longer text " * 3)]
    texts = labels.LabelledTexts(rows, list(ANIMALS), TOKENIZER, trunk, cfg)
    together = texts.batch(0, 2)
    numbers = train_classifier.numbers_of(model, together, cfg)
    for i, expected in zip(together.index, numbers):
        alone = torch.tensor([texts.examples[i]["ids"]])
        values = model(alone)
        found = pooled(values, torch.ones_like(alone, dtype=torch.bool), pool)
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_numbers_are_those_of_transformers_classifiers():
    """Of a text at its last token, padding behind it, and of each token."""
    trunk = tiny_model()
    model = WithHead(trunk, 3)
    of_texts = llama_of(trunk, "LlamaForSequenceClassification", num_labels=3,
                        pad_token_id=TOKENIZER.pad)
    of_tokens = llama_of(trunk, "LlamaForTokenClassification", num_labels=3)
    torch.nn.init.normal_(model.head.bias)             # which the head of a text has not
    tokens = torch.randint(256, (3, 9))
    real = torch.arange(9) < torch.tensor([[9], [4], [1]])
    tokens[~real] = TOKENIZER.pad
    with torch.no_grad():
        of_texts.score.weight.copy_(model.head.weight)
        of_tokens.score.weight.copy_(model.head.weight)
        of_tokens.score.bias.copy_(model.head.bias)
    values = model(tokens)
    torch.testing.assert_close(of_tokens.eval()(tokens).logits, values, rtol=0, atol=1e-5)
    found = of_texts.eval()(tokens, attention_mask=real.long()).logits + model.head.bias
    torch.testing.assert_close(found, pooled(values, real, "last"), rtol=0, atol=1e-5)


def test_an_encoder_that_has_segments_is_told_which_is_the_passage(tmp_path):
    trunk = tiny_model(architecture="encoder", n_segments=2).trunk
    cfg = config(tmp_path, "span")
    row = {"question": "who?", "text": "Bo", "answer": "Bo", "start": 0, "where": ""}
    texts = labels.LabelledTexts([row], ["start", "end"], TOKENIZER, trunk, cfg)
    batch = texts.batch(0, 1)
    assert batch.segments[0].tolist() == [0] * 6 + [1, 1]
    values = train_classifier.numbers_of(WithHead(trunk, 2), batch, cfg)
    batch.segments = None
    assert not values.allclose(train_classifier.numbers_of(WithHead(trunk, 2), batch, cfg))


# ---------------------------------------------------------------------- legal spans

@pytest.mark.parametrize("max_span", [1, 3, 50])
def test_the_best_span_is_legal_and_no_other_is_better(max_span):
    for seed in range(20):
        torch.manual_seed(seed)
        values, passage = torch.randn(4, 12, 2), torch.rand(4, 12) < 0.6
        passage[:, 7] = True
        for b, (first, last) in enumerate(best_span(values, passage, max_span).tolist()):
            assert passage[b, first] and passage[b, last] and first <= last < first + max_span
            legal = [values[b, i, 0] + values[b, j, 1] for i in range(12)
                     for j in range(i, min(12, i + max_span)) if passage[b, i] and passage[b, j]]
            assert values[b, first, 0] + values[b, last, 1] == max(legal)


# ---------------------------------------------------------------------- what is frozen

def test_layers_are_all_parameters_once_from_the_top_down():
    for model in (WithHead(tiny_model(), 3), WithHead(tiny_model(token_shift=True), 3),
                  WithHead(tiny_model(architecture="encoder", token_shift=True), 3)):
        layers = layers_of(model)
        assert sorted(id(p) for layer in layers for p in layer) == sorted(
            id(p) for p in model.parameters())
        names = {id(p): name for name, p in model.named_parameters()}
        firsts = [names[id(layer[0])].split(".")[:3] for layer in layers]
        assert firsts == [["head", "weight"], ["trunk", "blocks", "1"], ["trunk", "blocks", "0"],
                          ["trunk", "embedding", "weight"]]
    untied = WithHead(tiny_model(tied=False), 3)               # its LM head learns nothing
    assert untied.trunk.lm_head.weight not in {p for layer in layers_of(untied) for p in layer}


def moved(tmp_path) -> set[str]:
    """The parts of the base model with a weight that training has changed by a bit or more."""
    before, _ = load_any_model(tmp_path / "base")
    after, _ = load_any_model(tmp_path / "out")
    weights = after.trunk.state_dict()
    names = {name for name, w in before.state_dict().items() if not w.equal(weights[name])}
    return {".".join(name.split(".")[:2]) for name in names}


@pytest.mark.parametrize("options, parts", [
    ({"train": "head"}, set()),
    ({"train": "last_k", "last_k": 1}, {"blocks.1", "norm.weight"}),
    ({"train": "last_k", "last_k": 2}, {"blocks.0", "blocks.1", "norm.weight"}),
    ({}, {"blocks.0", "blocks.1", "norm.weight", "embedding.weight"})])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_does_not_move_by_a_bit(options, parts, optimizer, tmp_path):
    train_classifier.main(config(tmp_path, optimizer=optimizer, weight_decay=0.1, **options))
    assert moved(tmp_path) == parts
    model, _ = load_any_model(tmp_path / "out")
    assert model.head.weight.any() and model.head.bias.any()


@pytest.mark.parametrize("peft", ["lora", "qlora", "adapter"])
def test_adapters_learn_in_the_place_of_the_trunk_and_the_folder_opens(peft, tmp_path):
    cfg = config(tmp_path, peft=peft, steps=30)
    result = train_classifier.main(cfg)
    model, _ = load_any_model(tmp_path / "out")
    base, _ = load_any_model(tmp_path / "base")
    trunk = model.trunk
    assert model.head.out_features == 3 and result["classes"] == sorted(ANIMALS)
    # lora has changed W_q and W_v, qlora rounded all matrices, an adapter stands beside them
    norm = torch.equal(trunk.norm.weight, base.norm.weight)
    embedding = torch.equal(trunk.embedding.weight, base.embedding.weight)
    assert norm and embedding and (peft == "adapter") == bool(lora.adapters_of(trunk))
    cut = train_classifier.main(replace(cfg, out=str(tmp_path / "head"), train="head", steps=1))
    assert cut["classes"] == result["classes"]


def test_layers_unfreeze_from_the_top_down_each_in_its_turn(tmp_path, monkeypatch):
    """With two steps a layer: the head moves in steps 0 to 7, the embeddings in 6 and 7."""
    layers, states = [], []
    found = train_classifier.layers_of

    def layers_of_model(model):
        layers.extend(found(model))
        states.append([[p.detach().clone() for p in layer] for layer in layers])
        return layers

    def log(self, step, **figures):
        states.append([[p.detach().clone() for p in layer] for layer in layers])
    monkeypatch.setattr(train_classifier, "layers_of", layers_of_model)
    monkeypatch.setattr(Run, "log", log)
    cfg = config(tmp_path, unfreeze="gradual", unfreeze_every=2, steps=8, weight_decay=0.1)
    train_classifier.main(cfg)
    assert len(layers) == 4 and len(states) == 9       # head, two blocks, embeddings
    for step in range(8):
        for i, (before, after) in enumerate(zip(states[step], states[step + 1])):
            has_moved = any(not a.equal(b) for a, b in zip(before, after, strict=True))
            assert has_moved == (step >= 2 * i), (step, i)


def test_a_schedule_by_hand():
    cfg = train_classifier.Config(unfreeze="gradual", unfreeze_every=10)
    assert [n_learning(step, 4, cfg) for step in (0, 9, 10, 29, 30, 99)] == [1, 1, 2, 3, 4, 4]
    assert n_learning(99, 2, cfg) == 2
    assert n_learning(0, 4, train_classifier.Config()) == 4


# ---------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("task, figure", [("class", "accuracy"), ("tokens", "entity_f1"),
                                          ("span", "exact_match")])
def test_it_learns_what_can_be_told(task, figure, tmp_path):
    result = train_classifier.main(config(tmp_path, task, steps=50, warmup=5))
    assert result[figure] > 0.9 > 0.7 > result["majority"]
    rows = read_metrics(tmp_path / "out")
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert result[figure] == rows[-1][figure]


def test_an_encoder_learns_too_and_its_former_head_is_replaced(tmp_path):
    folder_of(tiny_model(architecture="encoder", n_segments=2), tmp_path / "base")
    result = train_classifier.main(config(tmp_path, "span", steps=50))
    assert result["exact_match"] > 0.9
    model, _ = load_any_model(tmp_path / "out")
    assert model.architecture == "encoder" and model.head.out_features == 2


@pytest.mark.parametrize("task", ["class", "tokens", "span"])
def test_the_world_has_labels_for_each_task(task, tmp_path):
    folder_of(tiny_model(context_length=300), tmp_path / "base")
    result = train_classifier.main(config(tmp_path, task, data="world:1", steps=1, n_examples=60,
                                          eval_examples=20))
    assert 0 <= result["majority"] < 0.9
    expected = {"class": ["afraid", "angry", "happy", "sad", "tired"], "span": ["start", "end"],
                "tokens": ["B-name", "B-place", "B-thing", "I-thing", "O"]}
    assert result["classes"] == expected[task]


def test_the_folder_says_what_its_numbers_mean(tmp_path):
    train_classifier.main(config(tmp_path, steps=1))
    record = read_record(tmp_path / "out")
    assert record["model"]["head"] == 3 and record["config"]["task"] == "class"
    assert record["result"]["classes"] == ["cat", "dog", "owl"]
    assert record["result"]["pool"] == "last"
    model, _ = load_any_model(tmp_path / "out")
    assert isinstance(model, WithHead) and model.head.out_features == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["result"]["ece"] >= 0
    with pytest.raises(ValueError, match="is a classifier"):
        load_model(tmp_path / "out")
    with pytest.raises(ValueError, match="is a classifier; give the model that it was made of"):
        train_denoise.main(build(train_denoise.Config, {
            "init": str(tmp_path / "out"), "objective": "span", "out": str(tmp_path / "t5"),
            "device": "cpu", "context_length": 64}))
    # it may begin another, whose head is new
    train_classifier.main(config(tmp_path, "tokens", init=str(tmp_path / "out"), steps=1,
                                 out=str(tmp_path / "other")))


# ---------------------------------------------------------------------- refusals

HELD_OUT = next(f"emu {i}" for i in range(99) if held_out(f"emu {i}"))
REFUSED = [
    ({"pool": "cls"}, [], "--pool cls: of an decoder give last or mean"),
    ({"pool": "max"}, [], "--pool max: "),
    ({"pool": "mean", "task": "tokens"}, [], "--pool mean: only class would read it"),
    ({"max_span": 3}, [], "--max_span 3: only span would read it"),
    ({"family": "inference"}, [], "family can be set for a world only"),
    ({"last_k": 1}, [], "--last_k 1: only last_k would read it"),
    ({"last_k": 3, "train": "last_k"}, [], "--last_k 3: the model has 2 blocks"),
    ({"train": "head", "unfreeze": "gradual"}, [], "--unfreeze gradual: only last_k, all would"),
    ({"unfreeze_every": 3}, [], "--unfreeze_every 3: only gradual would read it"),
    ({}, [{"text": HELD_OUT, "label": "emu"}],
     "class.jsonl:121: the class 'emu' does not occur in training"),
    ({}, [{"text": "x" * 64, "label": "cat"}], "class.jsonl:121: 65 tokens, 64 fit"),
    ({}, [{"text": "", "label": "cat"}], 'class.jsonl:121: field "text" is empty'),
    ({"task": "tokens"}, [{"tokens": ["a"], "labels": []}],
     'tokens.jsonl:121: "labels" has 0 labels for the 1 words'),
    ({"task": "span"}, [{"question": "who?", "context": "a", "answer": "b"}],
     'span.jsonl:121: "answer" "b" does not stand in "context"'),
    ({"context_length": 5}, [], "tokens, 5 fit")]


@pytest.mark.parametrize("options, rows, named", REFUSED)
def test_bad_input_is_refused(options, rows, named, tmp_path):
    cfg = config(tmp_path, **options)
    write_rows(tmp_path / f"{cfg.task}.jsonl", rows_of(cfg.task) + rows)
    with pytest.raises(ValueError, match=named):
        train_classifier.main(cfg)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_single_class_and_a_model_that_cannot_are_refused(tmp_path):
    cfg = config(tmp_path)
    write_rows(tmp_path / "class.jsonl", [row | {"label": "cat"} for row in rows_of("class")])
    with pytest.raises(ValueError, match="every row has the class 'cat'"):
        train_classifier.main(cfg)
    folder_of(tiny_model(architecture="encoder_decoder"), tmp_path / "base")
    with pytest.raises(ValueError, match="is an encoder_decoder; give a decoder or an encoder"):
        train_classifier.main(cfg)


def test_long_texts_are_cut_or_dropped(tmp_path, capsys):
    long = {"text": "x" * 64 + " cat", "label": "cat"}
    for truncate in ("left", "drop"):
        cfg = config(tmp_path, truncate=truncate, steps=1, overwrite=True)
        write_rows(tmp_path / "class.jsonl", [*rows_of("class"), long])
        train_classifier.main(cfg)
    assert "dropped 1 of" in capsys.readouterr().err
