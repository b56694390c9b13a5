"""objectives.py: how much is hidden, how it is distributed, and that nothing is lost."""
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

import data
import objectives
from objectives import Denoised, window_length, with_special_tokens
from tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
PAIRED = [(objective, architecture) for objective in ("causal", "span", "ul2")
          for architecture in objectives.ARCHITECTURES_OF[objective]]


def rng(seed=0):
    return np.random.default_rng(seed)


def ids(rows, length, seed=1):
    return rng(seed).integers(0, 200, (rows, length))


def within(found, expected, sigma, times=4.5):
    assert abs(found - expected) < times * sigma, (found, expected, sigma)


# ---------------------------------------------------------------------- masked language modelling

@pytest.mark.parametrize("n, hidden", [(1, 1), (3, 1), (10, 2), (20, 3), (100, 15), (256, 38)])
def test_round_15_percent_of_the_ordinary_tokens_are_chosen_and_at_least_one(n, hidden):
    tokens = np.concatenate([ids(5, n), np.full((5, 4), 250)], 1)
    tokens = rng().permuted(tokens, axis=1)
    _, chosen = objectives.mask_tokens(tokens, 200, 251, rng())
    assert (chosen.sum(1) == hidden).all() and (tokens[chosen] < 200).all()


def test_a_row_of_special_tokens_alone_has_nothing_to_hide():
    inputs, chosen = objectives.mask_tokens(np.full((2, 6), 210), 200, 251, rng())
    assert not chosen.any() and (inputs == 210).all()


def test_of_the_chosen_80_percent_are_masked_10_random_and_10_as_they_were():
    tokens, n = ids(400, 256), 400 * 38
    inputs, chosen = objectives.mask_tokens(tokens, 200, 251, rng())
    assert chosen.sum() == n and (inputs[~chosen] == tokens[~chosen]).all()
    masked = chosen & (inputs == 251)
    changed = chosen & ~masked & (inputs != tokens)
    within(masked.sum() / n, 0.8, (0.8 * 0.2 / n) ** 0.5)
    within(changed.sum() / n, 0.1 * 199 / 200, (0.1 * 0.9 / n) ** 0.5)   # one in 200 is itself
    assert (inputs[changed] < 200).all() and len(set(inputs[changed])) > 190


def test_every_position_is_chosen_equally_often():
    _, chosen = objectives.mask_tokens(ids(4000, 20), 200, 251, rng())
    for share in chosen.mean(0):
        within(share, 3 / 20, (0.15 * 0.85 / 4000) ** 0.5)


# ---------------------------------------------------------------------- spans

def test_all_partitions_are_equally_likely():
    rows = objectives.random_partition(6000, 5, 3, rng())
    assert (rows.sum(1) == 5).all() and (rows > 0).all()
    counts = Counter(map(tuple, rows.tolist()))
    assert len(counts) == 6                                    # 3 1 1, 1 3 1, 1 1 3, 2 2 1 ...
    for n in counts.values():
        within(n / 6000, 1 / 6, (5 / 36 / 6000) ** 0.5)


@pytest.mark.parametrize("length, rate, span, hidden, spans", [
    (512, 0.15, 3, 77, 26),                                    # T5's own setting
    (100, 0.15, 3, 15, 5), (100, 0.5, 3, 50, 17), (100, 0.5, 64, 50, 1), (100, 0.15, 64, 15, 1),
    (20, 0.5, 1, 10, 10), (2, 0.5, 3, 1, 1), (7, 0.9, 1, 6, 1)])
def test_the_number_of_hidden_tokens_and_of_spans_is_fixed(length, rate, span, hidden, spans):
    assert objectives.span_sizes(length, rate, span) == (hidden, spans)
    noise = objectives.noise_spans(50, length, rate, span, rng())
    starts = noise & ~np.pad(noise, ((0, 0), (1, 0)))[:, :-1]
    assert noise.shape == (50, length) and (noise.sum(1) == hidden).all()
    assert (starts.sum(1) == spans).all() and not noise[:, 0].any()


def test_a_corrupted_row_by_hand():
    tokens = np.array([[10, 11, 12, 13, 14, 15, 16]])
    noise = np.array([[0, 1, 1, 0, 0, 1, 0]], bool)
    inputs, targets = objectives.corrupt_spans(tokens, noise, np.array([90, 91]), 80, 99)
    assert inputs[0].tolist() == [[10, 90, 13, 14, 91, 16, 80]] and inputs[1].tolist() == [7]
    assert targets[0].tolist() == [[90, 11, 12, 91, 15, 80]] and targets[1].tolist() == [6]


def rebuilt(inputs, targets, sentinels, end):
    """The text, from both sides, one token after the other."""
    assert inputs[-1] == end and targets[-1] == end
    spans = objectives.spans_after(targets[:-1], sentinels)
    text = []
    for i in inputs[:-1]:
        text += spans[i] if i in spans else [i]
    return text


def trimmed(side):
    return [row[:n].tolist() for row, n in zip(*side)]


@pytest.mark.parametrize("rate, span", [(0.15, 3), (0.5, 3), (0.5, 64), (0.15, 8), (0.3, 1)])
def test_inputs_and_targets_together_are_the_text(rate, span):
    tokens, sentinels = ids(30, 70), list(range(300, 340))
    noise = objectives.noise_spans(30, 70, rate, span, rng())
    sides = objectives.corrupt_spans(tokens, noise, np.array(sentinels), 280, 281)
    for row, read, written in zip(tokens.tolist(), *map(trimmed, sides)):
        assert rebuilt(read, written, sentinels, 280) == row
        assert [i for i in read if i >= 300] == [i for i in written if i >= 300] == \
            sentinels[:sum(i >= 300 for i in read)]            # in order, one for each span


def test_rows_with_different_noise_are_padded():
    tokens, noise = ids(2, 6), np.zeros((2, 6), bool)
    noise[0, [1, 3, 5]] = noise[1, 2:5] = True
    (read, n_read), (written, n_written) = objectives.corrupt_spans(
        tokens, noise, np.array([300, 301, 302]), 280, 281)
    assert n_read.tolist() == [7, 5] and n_written.tolist() == [7, 5]
    assert (read[1, 5:] == 281).all() and (written[1, 5:] == 281).all()


def test_a_prefix_is_cut_at_any_place_equally_often_and_nothing_is_lost():
    tokens = ids(3000, 7)
    sides = objectives.split_prefix(tokens, 280, 281, rng())
    for row, read, written in zip(tokens.tolist(), *map(trimmed, sides)):
        assert read[:-1] + written[:-1] == row and read[-1] == written[-1] == 280
    counts = Counter((sides[0][1] - 1).tolist())
    assert sorted(counts) == [1, 2, 3, 4, 5, 6]
    for n in counts.values():
        within(n / 3000, 1 / 6, (5 / 36 / 3000) ** 0.5)


def test_ul2_announces_its_denoiser_and_mixes_them_equally():
    special = {"<|R|>": 290, "<|S|>": 291, "<|X|>": 292}
    sentinels = list(range(300, 340))
    tokens = ids(3000, 60)
    sides = objectives.ul2(tokens, special, np.array(sentinels), 280, 281, rng())
    hidden = {290: [], 291: [], 292: []}
    for row, (mode, *read), written in zip(tokens.tolist(), *map(trimmed, sides)):
        hidden[mode].append(sum(i < 280 for i in written))
        text = read[:-1] + written[:-1] if mode == 291 else rebuilt(read, written, sentinels, 280)
        assert text == row
    for sizes in hidden.values():
        within(len(sizes) / 3000, 1 / 3, (2 / 9 / 3000) ** 0.5)
    assert set(hidden[290]) == {9}                             # 15 % of 60
    assert set(hidden[292]) == {9, 30}                         # three settings of 50 %, one of 15 %
    within(np.mean(np.array(hidden[292]) == 30), 0.75, (0.75 * 0.25 / len(hidden[292])) ** 0.5)
    assert set(hidden[291]) == set(range(1, 60))


def test_one_mode_of_ul2_can_be_asked_for():
    special = {"<|R|>": 290, "<|S|>": 291, "<|X|>": 292}
    read, _ = objectives.ul2(ids(20, 30), special, np.arange(300, 340), 280, 281, rng(), ("R",))
    assert (read[0][:, 0] == 290).all()


def test_spans_are_read_from_what_a_model_wrote():
    assert objectives.spans_after([5, 90, 1, 2, 91, 92, 3, 90, 4], [90, 91, 92]) == \
        {90: (1, 2, 4), 91: (), 92: (3,)}


# ---------------------------------------------------------------------- next sentence

TEXTS = ["A b. C d! E f?", "One. Two. Three. Four.", "No cut here.", 'He said "yes." She left.']


def pairs_of(rows, length=40, seed=0):
    tokens = data.tokenize_documents(TEXTS, BYTES)
    cuts = objectives.find_cuts(tokens, objectives.sentence_ends(BYTES), BYTES.endoftext)
    return tokens, cuts, objectives.sentence_pairs(tokens, cuts, rows, length, 500, 501, BYTES.pad,
                                                   rng(seed))


def test_cuts_stand_between_two_sentences_of_a_document():
    tokens, cuts, _ = pairs_of(1)
    halves = [(BYTES.decode(tokens[a:b]), BYTES.decode(tokens[b:c])) for a, b, c in cuts]
    assert halves == [("A b.", " C d! E f?"), ("A b. C d!", " E f?"),
                      ("One.", " Two. Three. Four."), ("One. Two.", " Three. Four."),
                      ("One. Two. Three.", " Four."),
                      ('He said "yes.', '" She left.')]        # bytes: the quote is a token apart


def test_rows_are_cls_a_sep_b_sep_and_half_of_the_pairs_follow_each_other():
    rows, segments, is_next = pairs_of(2000)[2]
    halves = set()
    for row, segment, follows in zip(rows.tolist(), segments.tolist(), is_next):
        first, second = (i for i, token in enumerate(row) if token == 501)
        assert row[0] == 500 and set(row[second + 1:]) <= {BYTES.pad}
        a, b = row[1:first], row[first + 1:second]
        assert segment == [0] * (first + 1) + [1] * (second - first) + [0] * (39 - second)
        a, b = BYTES.decode(a), BYTES.decode(b)
        homes = [[n for n, text in enumerate(TEXTS) if part in text] for part in (a, b)]
        assert (a + b in TEXTS[homes[0][0]]) == follows
        assert (homes[0] == homes[1]) == follows               # never at random from the same one
        halves.add((a, b, bool(follows)))
    within(is_next.mean(), 0.5, 0.5 / 2000 ** 0.5)
    assert len(halves) > 20


def test_long_sides_are_cut_far_from_the_border():
    rows, *_ = pairs_of(50, length=13)[2]
    for row in rows.tolist():
        first, second = (i for i, token in enumerate(row) if token == 501)
        assert first - 1 <= 5 and second - first - 1 <= 5
        assert BYTES.decode(row[1:first])[-1] in '.!'


def test_one_document_alone_is_refused():
    tokens = data.tokenize_documents(["One. Two. Three."], BYTES)
    cuts = objectives.find_cuts(tokens, objectives.sentence_ends(BYTES), BYTES.endoftext)
    with pytest.raises(ValueError, match="at least two documents"):
        objectives.sentence_pairs(tokens, cuts, 2, 20, 500, 501, BYTES.pad, rng())


# ---------------------------------------------------------------------- tokens and lengths

@pytest.mark.parametrize("objective", objectives.ARCHITECTURES_OF)
def test_special_tokens_are_added_and_all_others_keep_their_ids(objective):
    tokenizer = with_special_tokens(BYTES, objective, 100)
    assert all(tokenizer.special[name] == i for name, i in BYTES.special.items()
               if not name.startswith("<|reserved_"))
    assert with_special_tokens(tokenizer, objective, 100) == tokenizer       # all there already
    spelled = "<|mask|> <|sentinel_0|> <|R|>"
    assert tokenizer.decode(tokenizer.encode(spelled)) == spelled            # text stays text
    assert max(tokenizer.encode(spelled)) < 256


@pytest.mark.parametrize("objective, architecture", [*PAIRED, ("mlm", "encoder")])
@pytest.mark.parametrize("context", [32, 100, 256])
def test_the_window_is_the_longest_that_fits_the_context(objective, architecture, context):
    def longest(window):
        source, batch = a_source(objective, architecture, window, rows=2000)
        if architecture == "encoder_decoder":
            return max(batch.source.shape[1], batch.tokens.shape[1])
        return batch.tokens.shape[1] - (architecture != "encoder")   # the last token is no input
    window = window_length(objective, architecture, context)
    assert longest(window) <= context < longest(window + 1)


# ---------------------------------------------------------------------- batches

def a_source(objective, architecture, window, rows=8, next_sentence=False):
    tokenizer = with_special_tokens(BYTES, objective, window)
    text = ["the bear went home and slept. " * 9 for _ in range(3 * window)]
    tokens = data.tokenize_documents(text, tokenizer)
    stream = data.TokenStream(tokens, window, 0, tokenizer.endoftext)
    source = Denoised(stream, tokenizer, objective, architecture, next_sentence)
    return source, source.rows(range(rows))


ALL = [*PAIRED, ("mlm", "encoder")]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix"])
def test_batches_of_many_lengths_come_in_few_widths(architecture):
    source, _ = a_source("ul2", architecture, 100)
    batches = [source.batch(step, 4) for step in range(50)]
    sides = [batch.tokens for batch in batches]
    sides += [batch.source for batch in batches if batch.source is not None]
    widths = {side.shape[1] for side in sides}
    assert len(widths) > 2 and all(width % 16 == 0 for width in widths - {max(widths)})
    for batch in batches:                                          # no side lost its end
        lengths = (batch.loss_mask * torch.arange(1, batch.tokens.shape[1] + 1)).amax(1)
        assert (lengths > 0).all() and lengths.max() > batch.tokens.shape[1] - 16


@pytest.mark.parametrize("objective, architecture", ALL)
def test_the_same_numbers_give_the_same_batch_and_another_epoch_hides_other_tokens(objective,
                                                                                   architecture):
    source, batch = a_source(objective, architecture, 30)
    again, later = source.rows(range(8)), source.rows(range(len(source), len(source) + 8))
    assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.loss_mask, again.loss_mask)
    assert batch.tokens.shape != later.tokens.shape or not torch.equal(batch.tokens, later.tokens)


@pytest.mark.parametrize("objective, architecture", ALL)
def test_ranks_together_read_what_one_process_would(objective, architecture):
    source, _ = a_source(objective, architecture, 30)
    apart = torch.cat([source.batch(3, 4, rank, 2).index for rank in range(2)])
    assert torch.equal(apart, source.batch(3, 8).index)


def scored(batch):
    """Each row's targets, in order."""
    shifted = batch.targets is None
    ids, mask = (batch.tokens[:, 1:], batch.loss_mask[:, 1:]) if shifted else \
        (batch.targets, batch.loss_mask)
    return [row[m].tolist() for row, m in zip(ids, mask)]


@pytest.mark.parametrize("objective", ["causal", "span", "ul2"])
def test_all_architectures_read_and_score_the_same_pairs(objective):
    source, apart = a_source(objective, "encoder_decoder", 30)
    windows = source.stream.rows(range(8))
    sides = source.pairs(windows.tokens[:, :-1].numpy(), rng((0, 0, 8)))
    assert torch.equal(apart.index, windows.index)
    assert scored(apart) == trimmed(sides[1]) and apart.n_targets == sides[1][1].sum()
    assert [row[:n].tolist() for row, n in zip(apart.source, apart.source_lengths)] == \
        trimmed(sides[0])
    for before, after in zip(apart.tokens, apart.targets):     # a writer reads what it has written
        assert before[0] == BYTES.end and torch.equal(before[1:], after[:-1])
    for architecture in ("prefix", "decoder"):
        source.architecture = architecture
        batch = source.rows(range(8))
        assert scored(batch) == trimmed(sides[1]) and batch.n_targets == apart.n_targets
        for row, read, written in zip(batch.tokens.tolist(), *map(trimmed, sides)):
            both = read + written
            assert row == both + [BYTES.pad] * (len(row) - len(both))
        assert (batch.prefix is not None) == (architecture == "prefix")
    source.architecture = "prefix"
    assert source.rows(range(8)).prefix.tolist() == sides[0][1].tolist()


def conversations(*texts):
    """Packed rows of conversations "question>answer>question>answer"."""
    rows = []
    for n, text in enumerate(texts):
        roles = ("user", "assistant") * 9
        turns = [{"role": role, "content": said} for role, said in zip(roles, text.split(">"))]
        rows.append({"messages": turns, "task": "", "where": f"row {n}"})
    return data.PackedExamples(data.format_examples(rows, BYTES), BYTES, 24, seed=0)


def test_conversations_apart_by_hand():
    packed = conversations("ab>cd", "e>f>g>hij", "k>l")
    batch = packed.rows(range(len(packed)))
    assert len(batch.tokens) == 2                              # 13 + 6 tokens in a row, and 8
    pairs = objectives.answers_apart(batch)
    user, writes, end = BYTES.user, BYTES.assistant, BYTES.end
    a, b, c, d, e, f, g, h, i, j, k, m = b"abcdefghijkl"
    expected = {0: ([user, a, b, end, writes], [writes, c, d], [c, d, end]),
                1: ([user, e, end, writes, f, end, user, g, end, writes], [writes, h, i, j],
                    [h, i, j, end]),
                2: ([user, k, end, writes], [writes, m], [m, end])}
    assert sorted(pairs.index.tolist()) == [0, 1, 2] and pairs.n_targets == 9
    rows = zip(pairs.index.tolist(), pairs.source, pairs.source_lengths, pairs.tokens,
               pairs.targets, pairs.loss_mask)
    for n, source, length, tokens, targets, mask in rows:
        found = source[:length].tolist(), tokens[mask].tolist(), targets[mask].tolist()
        assert found == expected[n]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)        # from the left
    assert pairs.source.shape == (3, 16) and pairs.tokens.shape == pairs.targets.shape == (3, 16)


def test_a_conversation_that_fills_the_context_has_a_source_that_fits():
    packed = conversations("a" * 20 + ">b")                    # 25 tokens in all, 2 of them written
    pairs = objectives.answers_apart(packed.rows([0]))
    assert pairs.source.shape == (1, 24) and pairs.source_lengths.tolist() == [23]


def test_masked_batches_score_the_chosen_tokens_and_stay_inside_documents():
    source, batch = a_source("mlm", "encoder", 40)
    window = source.stream.rows(range(8))
    assert torch.equal(batch.targets, window.tokens[:, :-1])
    assert torch.equal(batch.documents, window.documents[:, :-1])
    assert (batch.targets[batch.loss_mask] < 256).all() and batch.n_targets == batch.loss_mask.sum()
    assert torch.equal(batch.tokens[~batch.loss_mask], batch.targets[~batch.loss_mask])


def test_next_sentence_batches_mark_padding_and_segments():
    source, batch = a_source("mlm", "encoder", 400, next_sentence=True)
    special = source.tokenizer.special
    padding = batch.targets == BYTES.pad
    assert padding.any() and torch.equal(batch.documents == -1, padding)
    assert not (batch.loss_mask & padding).any() and set(batch.is_next.tolist()) <= {0, 1}
    assert (batch.tokens[:, 0] == special["<|cls|>"]).all()      # special tokens are never hidden
    assert (batch.targets == special["<|sep|>"]).sum(1).tolist() == [2] * 8


def test_every_pair_of_an_objective_with_an_architecture_is_tested():
    assert len(list(product(objectives.ARCHITECTURES_OF, range(4)))) == 16
    assert len(ALL) == sum(map(len, objectives.ARCHITECTURES_OF.values()))
