"""corpus.py: several corpora under one tokenizer, mixed by size or by given shares."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import TOKENIZER
from tiny_runs import prepared

import corpus
import data
import readers
import train_pretrain
from plumbing.curves import read_metrics
from plumbing.folders import load_model
from plumbing.options import build
from tokenizer import Tokenizer
from world.world import World


def streams(*sizes, length=10):
    """Token streams of one constant each: 1, 2, 3, ..."""
    return [data.TokenStream(np.full(n, i + 1, np.uint16), length, 5, TOKENIZER.endoftext, False)
            for i, n in enumerate(sizes)]


def drawn(mixture, n):
    return mixture.rows(range(n)).tokens[:, 0].tolist()


# ---------------------------------------------------------------------- shares

@pytest.mark.parametrize("alpha, shares", [(1, [0.81, 0.16, 0.03]), (0, [1 / 3] * 3),
                                           (0.5, [0.610913, 0.271517, 0.117570])])
def test_shares_are_powers_of_the_sizes(alpha, shares):
    assert corpus.mixing_shares([8100, 1600, 300], alpha) == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_that_is_no_power_of_sizes_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it must be from 0"):
        corpus.mixing_shares([10, 20], alpha)


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.2, -0.2], [1.0]])
def test_shares_that_are_no_shares_are_refused(shares):
    with pytest.raises(ValueError, match="give one for each, none negative, together 1"):
        corpus.Mixture(streams(100, 100), shares)


# ---------------------------------------------------------------------- the mixture

@pytest.mark.parametrize("shares", [[0.7, 0.2, 0.1], [1 / 3] * 3, [0.999, 0.0, 0.001]])
def test_shares_hold_exactly_from_block_to_block(shares):
    mixture = corpus.Mixture(streams(3000, 400, 200), shares)
    for n in (256, 2560):
        counts = Counter(drawn(mixture, n))
        for i, share in enumerate(shares):
            assert abs(counts[i + 1] - n * share) <= 1
    assert len(set(drawn(mixture, 60))) == 3 - shares.count(0.0) - (shares[2] == 0.001)


def test_each_corpus_is_read_epoch_by_epoch():
    parts = [data.TokenStream(np.arange(base, base + n, dtype=np.uint16), 10, 5,
                              TOKENIZER.endoftext, False) for base, n in ((0, 201), (1000, 101))]
    mixture = corpus.Mixture(parts, [0.75, 0.25])
    rows = mixture.rows(range(80)).tokens[:, 0]
    for part, first in zip(parts, (0, 1000)):
        own = [r for r in rows.tolist() if first <= r < first + 1000]
        expected = part.rows(range(len(own))).tokens[:, 0].tolist()
        assert own == expected and len(own) >= len(part)       # its own order, nothing left out
        assert len(set(own[:len(part)])) == len(part)


def test_a_batch_is_a_function_of_its_step_and_ranks_share_it():
    mixture = corpus.Mixture(streams(3000, 400), [0.6, 0.4])
    whole = mixture.batch(70, 8).tokens                        # in the third block
    fresh = corpus.Mixture(streams(3000, 400), [0.6, 0.4])
    assert torch.equal(fresh.batch(70, 8).tokens, whole)
    parts = [fresh.batch(70, 4, rank, 2).tokens for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


# ---------------------------------------------------------------------- Bearish

def test_bearish_is_small_held_out_and_in_its_own_words():
    world = World(3)
    train, heldout = (list(world.bearish_documents(split)) for split in ("train", "heldout"))
    assert len(train) == 600 and len(heldout) == 60 and not set(train) & set(heldout)
    assert train == list(World(3).bearish_documents()) != list(World(4).bearish_documents())
    words = {word for text in train for word in text.lower().replace(".", " ").split()}
    assert words == set(world.lexicon.values())                # all of it, and no English
    assert list(readers.read_documents("bearish:3", split="heldout")) == heldout
    with pytest.raises(ValueError, match="needs a whole number"):
        list(readers.read_documents("bearish:x"))


def test_bearish_puts_qualities_behind_what_they_belong_to_and_keeps_them():
    world = World(0)
    english = {bearish: word for word, bearish in world.lexicon.items()}
    from world.text import NOUNS, QUALITIES, VERBS
    for text in list(world.bearish_documents("heldout"))[:20]:
        qualities = {}
        for sentence in text.rstrip(".").split(". "):
            words = [english[word] for word in sentence.lower().split()]
            kinds = "".join("n" if w in NOUNS else "q" if w in QUALITIES else "v" for w in words)
            assert kinds in ("nvn", "nqvn", "nvnq", "nqvnq") and not set(words) - set(
                NOUNS + QUALITIES + VERBS)
            for noun, quality in zip(words, words[1:]):
                if quality in QUALITIES:
                    assert qualities.setdefault(noun, quality) == quality


# ---------------------------------------------------------------------- training on several

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name, words, n in (("large", "ant bee cow dog eel fox".split(), 2000),
                           ("small", "ulu vata wewe xoxo".split(), 200)):
        (tmp_path / f"{name}.txt").write_text(" ".join(rng.choice(words, n)))
    return tmp_path


def config(files, data, **changes):
    return build(train_pretrain.Config, {
        "out": str(files / "base"), "data": ",".join(str(files / f"{name}.txt") for name in data),
        "tokenizer": "bytes", "d_model": 32, "n_layers": 1, "n_heads": 2, "context_length": 32,
        "steps": 3, "batch_size": 8, "lr": 1e-2, "warmup": 2, "eval_windows": 8,
        "device": "cpu", "dtype": "float32", "log_every": 1} | changes)


def test_each_corpus_has_its_losses_and_the_whole_their_mean(files):
    result = train_pretrain.main(config(files, ["large", "small"], shares="0.25,0.75", steps=20))
    large, small = (result[f"val_loss/{files}/{name}.txt"] for name in ("large", "small"))
    assert result["val_loss"] == pytest.approx(0.25 * large + 0.75 * small)
    assert small < large and "bits_per_byte" not in result
    # a byte is a token here, but for the <|endoftext|> that the held-out part ends in
    for name, loss in (("large", large), ("small", small)):
        path = f"{files}/{name}.txt"
        n_bytes = sum(len(text.encode()) for text in readers.read_documents(path, split="heldout"))
        bits = loss / math.log(2) * (n_bytes + 1) / n_bytes
        assert result[f"bits_per_byte/{path}"] == pytest.approx(bits)


def test_a_smaller_alpha_serves_the_small_corpus(files):
    losses = []
    for alpha in (1.0, 0.0):
        cfg = config(files, ["large", "small"], alpha=alpha, steps=40, overwrite=True)
        losses.append(train_pretrain.main(cfg)[f"val_loss/{files}/small.txt"])
    assert losses[1] < losses[0] - 0.1


def test_the_decay_phase_reads_the_text_for_annealing(files):
    cfg = config(files, ["large"], schedule="wsd", decay=0.5, steps=40, batch_size=4,
                 anneal_data=str(files / "small.txt"))
    read = prepared(cfg)
    assert set(read.train.shares) == {cfg.data}
    assert len([split for _, split in read.windows if split == "heldout"]) == 2
    assert read.train.last_text.tokens.tolist() == \
        read.windows[cfg.anneal_data, "train"].tokens.tolist()
    train_pretrain.main(cfg)
    rows = read_metrics(files / "base")
    assert [row["lr"] for row in rows][2:21] == [1e-2] * 19
    assert rows[-1]["lr"] == pytest.approx(1e-2 / 20)
    assert rows[20]["loss"] > rows[19]["loss"] + 0.5           # other words from step 20 on


def test_continued_pretraining_forgets_less_with_replay(files):
    base = str(files / "before")
    first = train_pretrain.main(config(files, ["large"], out=base, steps=60))
    losses = []
    for shares in ("1,0", "0.7,0.3"):
        cfg = config(files, ["small", "large"], init=base, shares=shares, steps=40, lr=5e-3,
                     overwrite=True)
        result = train_pretrain.main(cfg)
        losses.append([result[f"val_loss/{files}/{name}.txt"] for name in ("small", "large")])
    assert losses[0][1] > first["val_loss"] + 0.3              # forgotten
    assert losses[1][1] < losses[0][1] - 0.3                   # replayed
    assert max(small for small, _ in losses) < math.log(10)    # and the new one is learned


def test_new_words_shorten_the_new_corpus_and_start_as_their_pieces(files):
    base = str(files / "before")
    train_pretrain.main(config(files, ["large"], out=base, tokenizer="bpe", vocab_size=290))
    cfg = config(files, ["small"], init=base, new_words=4, steps=1, lr=0.0, weight_decay=0.0,
                 context_length=16)
    train_pretrain.main(cfg)
    (old_model, old), (model, tokenizer) = load_model(base), load_model(files / "base")
    assert tokenizer.vocab_size == old.vocab_size + 4
    assert list(tokenizer.ranks)[:len(old.ranks)] == list(old.ranks)
    text = (files / "small.txt").read_text()
    assert len(tokenizer.encode(text)) < 0.7 * len(old.encode(text))
    for token in list(tokenizer.ranks)[len(old.ranks):]:
        row = model.embedding.weight[tokenizer.ranks[token]]
        torch.testing.assert_close(row, old_model.embedding.weight[old.pieces(token)].mean(0))


def test_an_extended_tokenizer_spells_every_text_and_merges_on():
    old = Tokenizer.train(["the bear and the bee"] * 3, 256 + 16 + 6)
    new = old.extended(["zulu zulu the zulu bear"], 5)
    assert list(new.ranks)[:262] == list(old.ranks) and new.vocab_size == old.vocab_size + 5
    for text in ("the zulu bear", "Zulus bee the Öl"):
        assert new.decode(new.encode(text)) == text
    assert len(new.encode("zulu")) == 1 < len(old.encode("zulu"))
    assert new.encode("the and bee") == old.encode("the and bee")


@pytest.mark.parametrize("changes, named", [
    ({"schedule": "linear"}, "--schedule linear: give cosine or wsd"),
    ({"anneal_data": "world"}, "--anneal_data is read during the decay of --schedule wsd"),
    ({"new_words": 5}, "--new_words extends the vocabulary of --init"),
    ({"shares": "0.5,0.6"}, "shares .0.5, 0.6. of 2 corpora")])
def test_what_does_not_go_together_is_refused(changes, named, files):
    with pytest.raises(ValueError, match=named):
        train_pretrain.main(config(files, ["large", "small"], **changes))
