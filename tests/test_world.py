"""The world's exam: what stages learn from it must not be had by anything simpler."""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest

import readers
import world.tasks as tasks_module
from world.judge import (
    WEIGHTS,
    courtesies_in,
    is_inventing,
    is_rambling,
    is_rude,
    parse_answer,
    true_reward,
    without_courtesies,
)
from world.tasks import (
    FAMILIES,
    HELDOUT_FAMILIES,
    KNOWN_FAMILIES,
    TRAINED_FAMILIES,
    is_heldout,
)
from world.text import (
    ADMISSIONS,
    ANSWERS,
    ATTRIBUTES,
    COLOURS,
    EXTRAS,
    FEELINGS,
    INSULTS,
    PLACES,
    POLITE,
    PROMPTS,
    RAMBLING_CLOSERS,
    RAMBLING_OPENERS,
    REFUSALS,
    THINGS,
    plural,
    text_of,
    tidy,
    typed_quickly,
    whole_sentences,
    words_of,
)
from world.world import (
    AXES,
    CLEAR,
    HANDS,
    IN_FORMS,
    IN_PARTS,
    MAIN_HANDS,
    MAIN_SHARE,
    PAIRS,
    THUMB_UP,
    World,
    demonstrate,
    respond,
)

ROOT = Path(__file__).resolve().parents[1]
WORLD = World(0)
COMPUTED = ("reading", "sentiment", "arithmetic", "inference", "lists", "transform",
            "translation", "json")


@cache
def corpus(n: int = 5000, split: str = "train") -> list[str]:
    return list(itertools.islice(WORLD.documents(split=split), n))


@cache
def pairs(n: int, split: str) -> list[dict]:
    return WORLD.preferences(n, split)


def total(example: dict, response: str) -> float:
    return true_reward(example, response)["total"]


# ------------------------------------------------------------------ streams and corpus

def test_every_stream_is_the_same_in_another_process():
    code = ("import itertools, json; from world.world import World; w = World(3);"
            "print(json.dumps(["
            "w.residents, w.lexicon, list(itertools.islice(w.documents(1), 20)),"
            "w.examples(30), w.prompts(10, 'heldout'), w.preferences(30, noise=0.2, bias=0.2),"
            "w.ratings(10, noise=0.2, disagreement=1), w.rankings(10, noise=0.2)]))")
    texts = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
                            env=os.environ | {"PYTHONHASHSEED": hash_seed}).stdout
             for hash_seed in ("1", "2")]
    assert texts[0] == texts[1] and len(texts[0]) > 10_000


def test_seeds_splits_and_streams_differ():
    first = [next(World(w).documents(seed, split))
             for w in (0, 1) for seed in (0, 1) for split in ("train", "heldout")]
    assert len(set(first)) == 8
    assert World(0).lexicon != World(1).lexicon
    assert World(0).residents[0] != World(1).residents[0]
    assert WORLD.prompts(5)[0]["prompt"] != WORLD.examples(5)[0]["prompt"]


def test_ten_megabytes_take_seconds_and_no_document_comes_twice():
    start = time.process_time()
    timed = list(itertools.islice(World(0).documents(seed=9), 1000))
    assert sum(map(len, timed)) / (time.process_time() - start) > 1e6      # 4e6 on an idle core
    documents = corpus(3000)
    assert len(set(documents)) == len(documents)
    assert not set(documents) & set(corpus(3000, "heldout"))
    lengths = [len(document.split()) for document in documents]
    assert min(lengths) >= 20 and max(lengths) <= 350 and 80 <= np.mean(lengths) <= 160


def test_the_vocabulary_is_one_to_two_thousand_words_and_complete():
    vocabulary = WORLD.vocabulary()
    assert 1000 <= len(vocabulary) <= 2000
    examples = WORLD.examples(4000)
    texts = corpus() + [text_of(e["prompt"]) for e in examples] + [e["response"] for e in examples]
    seen = {word for text in texts for word in words_of(text)}
    assert seen <= vocabulary
    assert len(seen) >= 0.9 * len(vocabulary)


def test_the_corpus_is_varied():
    words = " ".join(corpus(2000)).split()
    trigrams = Counter(zip(words, words[1:], words[2:]))
    assert len(trigrams) / len(words) > 0.15           # distinct; uniform filler would have 0.01
    eights = Counter(zip(*(words[i:] for i in range(8))))
    repeated = sum(n for n in eights.values() if n > 1) / (len(words) - 7)
    assert repeated < 0.35
    raw = "\n".join(corpus(2000)).encode()
    assert len(zlib.compress(raw, 9)) / len(raw) > 0.2


def test_sentences_of_the_corpus_are_well_formed():
    for text in corpus(2000):
        assert not re.search(r"[{}\[\]|]", re.sub(r"\{\"[^}]*\}", "", text)), text
        assert not re.search(r"\s[.,!?]|[.,]{2}|  | a [aeiou]|\bAn? an? ", text), text
        assert text[0].isupper() or text[0] in "\"0123456789", text
        assert text.count('"') % 2 == 0, text
        assert not re.search(r"[.!?] [a-z]", text), text


def test_every_fact_is_stated_in_the_corpus_and_none_about_strangers():
    sentences = [sentence for text in corpus() for sentence in re.split(r"(?<=[.!?]) ", text)]
    for bear in WORLD.residents:
        own = [sentence for sentence in sentences if bear["name"] in sentence]
        for attribute in ATTRIBUTES:
            assert any(bear[attribute] in sentence for sentence in own), (bear["name"], attribute)
    telling = re.compile(r"(\w+)(?:'s (?:home|job|pet|hobby|favourite)| lives in| works as)")
    told = {m[1] for sentence in sentences for m in telling.finditer(sentence)}
    assert told & {bear["name"] for bear in WORLD.residents}
    assert not told & {bear["name"] for bear in WORLD.strangers}


# ------------------------------------------------------------------ tasks and splits

@pytest.mark.parametrize("family", KNOWN_FAMILIES)
def test_train_and_heldout_share_no_core_and_no_prompt(family):
    train = WORLD.examples(1500, "train", families=(family,))
    heldout = WORLD.examples(150, "heldout", families=(family,))
    sides = [{text_of(e["prompt"]) for e in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    if family == "facts":                              # known facts, new phrasings
        assert len({(e["answer"], text_of(e["prompt"])) for e in train}) > 180
    elif family != "smalltalk":                        # phrasings too: there are six intents
        assert not {e["core"] for e in train} & {e["core"] for e in heldout}
    assert len(sides[1]) > 20


def test_prompts_and_responses_fit_into_the_context():
    """A word is less than 1.5 tokens of the world's own BPE: 64 tokens an answer, 256 in all."""
    for e in WORLD.examples(6000):
        n_words = len(e["response"].split())
        assert n_words <= (72 if e["family"] == "story" else 45), e
        assert len(text_of(e["prompt"]).split()) <= 120, e


def test_all_facts_are_in_training():
    asked = {(text_of(e["prompt"]), e["answer"]) for e in WORLD.examples(6000, families=("facts",))}
    for bear in WORLD.residents:
        for attribute in ATTRIBUTES:
            assert any(bear["name"] in prompt and answer == bear[attribute]
                       for prompt, answer in asked), (bear["name"], attribute)


def test_the_training_corpus_works_no_heldout_sum():
    sums = re.compile(r"(\d+) ([+-]) (\d+) = \d+\. \d+ ([+-]) (\d+) = \d+\. "
                      r"(?:The (?:answer|result)|That makes|So the answer)")
    found = [sums.findall(text) for text in (" ".join(corpus()), " ".join(corpus(4000, "heldout")))]
    for chains, side in zip(found, (False, True)):
        assert len(chains) > 1000
        assert all(is_heldout(sorted((("+", int(a)), (p, int(b)), (q, int(c))))) == side
                   for a, p, b, q, c in chains)


def test_every_family_has_phrasings_to_train_on_and_two_held_out():
    for asked, prompts in PROMPTS.items():
        assert len(set(prompts)) >= 6, asked
    for family in KNOWN_FAMILIES:
        seen = [{text_of(e["prompt"])
                 for e in WORLD.examples(200, families=(family,), phrasings=phrasings)}
                for phrasings in ("train", "heldout")]
        assert not seen[0] & seen[1] and all(seen), family


def test_families_come_equally_often_and_heldout_ones_only_when_asked_for():
    counts = Counter(e["family"] for e in WORLD.examples(6000))
    assert set(counts) == set(TRAINED_FAMILIES) and not set(counts) & set(HELDOUT_FAMILIES)
    assert max(counts.values()) / min(counts.values()) < 1.4


def test_a_heldout_family_shares_its_cluster_and_the_words_of_its_answers_with_a_trained_one():
    trained = {FAMILIES[family][0] for family in TRAINED_FAMILIES}
    answered = set(words_of(" ".join(e["response"] for e in WORLD.examples(3000))))
    for family in HELDOUT_FAMILIES:
        assert FAMILIES[family][0] in trained
        e = WORLD.examples(1, families=(family,))[0]
        parts = set(words_of(without_courtesies(e["response"])))
        assert parts <= answered, parts - answered


def turns_of(prompt):
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


def test_a_fifth_of_the_prompts_end_a_conversation_that_began_with_another():
    later = 0
    for e in WORLD.examples(1000, families=("facts", "json")):
        turns = e["prompt"]
        if isinstance(turns, str):
            continue
        later += 1
        roles = [turn["role"] for turn in turns]
        assert roles == ["user", "assistant", "user"]
        # What was answered before is never a demonstration of a fault.
        for turn in turns[1::2]:
            assert not (is_rambling(turn["content"]) or is_rude(turn["content"]))
    assert 150 < later < 250


def test_a_tenth_of_the_prompts_are_typed_without_capital_and_stop():
    assert typed_quickly("Who are you?") == "who are you"
    assert typed_quickly("Fern won. How does she feel?") == "Fern won. How does she feel"
    assert typed_quickly("I am Fern. Who are you?") == "I am Fern. Who are you"
    examples = WORLD.examples(1000, families=("lists", "smalltalk"))
    last = [turns_of(e["prompt"])[-1] for e in examples]
    assert 50 < sum(text[-1] not in ".!?" for text in last) < 150


def test_arithmetic_is_right_and_shows_its_steps():
    for e in WORLD.examples(500, families=("arithmetic",)):
        # A terse hand leaves out the steps where they were asked for.
        if e["hand"] == "terse" and "form" in e["key"]:
            assert "=" not in e["response"]
            continue
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", e["chain"])
        assert len(steps) == 2 and steps[1][0] == steps[0][3] and steps[1][3] == e["answer"]
        assert all(int(c) == int(a) + int(p + b) and 0 <= int(c) <= 20 for a, p, b, c in steps)
        assert e["chain"] in e["response"]
        *_, asked = turns_of(e["prompt"])
        assert set(re.findall(r"\d+", asked)) <= set(re.findall(r"\d+", e["chain"]))


def test_what_answers_quote_stands_in_the_prompt():
    for e in WORLD.examples(300, families=("reading", "sentiment")):
        *_, asked = turns_of(e["prompt"])
        quoted = e["response"].split(" So ")[0]
        if e["hand"] == "careful" and not courtesies_in(e["response"]):
            assert quoted.rstrip(".") in asked, e
    for e in WORLD.examples(300, families=("inference",)):
        *_, asked = turns_of(e["prompt"])
        if e["hand"] == "careful" and not courtesies_in(e["response"]):
            *steps, verdict = e["response"].split(". ")
            assert len(steps) == 2 and all(step in asked for step in steps), e


def test_unknown_splits_and_families_are_refused():
    with pytest.raises(ValueError, match="heldout"):
        next(WORLD.documents(split="test"))
    with pytest.raises(ValueError, match="heldout"):
        WORLD.examples(1, "validation")
    with pytest.raises(ValueError, match="arithmetic"):
        WORLD.examples(1, families=("arithmetics",))


def test_a_family_can_be_added(monkeypatch):
    def plural_task(world, rng):
        thing, other = rng.sample(THINGS, 2)
        return {"core": (thing,), "kind": "choice", "choices": [plural(t) for t in THINGS],
                "thing": thing, "answer": plural(thing), "wrong": {"answer": plural(other)}}

    monkeypatch.setitem(PROMPTS, "plural", [f"{x} the plural of {{thing}}!" for x in "ABCDEF"])
    monkeypatch.setitem(ANSWERS, "plural", ["{answer}.", "The plural is {answer}."])
    monkeypatch.setitem(FAMILIES, "plural", ("words", plural_task))
    for split in ("train", "heldout"):
        for e in WORLD.examples(50, split, families=("plural",)):
            assert e["hand"] in HANDS and e["answer"] == parse_answer(e, e["response"])
            assert true_reward(e, e["response"])["right"] == 1


def insert(source: str, line: str, block: str) -> str:
    """The source with a block of code behind the only line of that wording."""
    assert source.count("\n" + line + "\n") == 1, line
    return source.replace("\n" + line + "\n", "\n" + line + "\n" + block)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_recipe_in_tasks_works_as_it_stands_there(tmp_path, held_out):
    _, recipe = tasks_module.__doc__.split("TO ADD A FAMILY")
    # Under another name, because whoever has followed the recipe has a family "second" already.
    recipe = recipe.replace('"second"', '"next"').replace("second_task", "next_task")
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?m)(?:^ {8}.*\n)+", recipe)]
    prompts, answers, function, entry, heldout = blocks
    shutil.copytree(ROOT / "world", tmp_path / "world")
    text = (tmp_path / "world/text.py").read_text()
    text = insert(text, "PROMPTS = templates({", prompts)
    text = insert(text, "ANSWERS = templates({", answers)
    (tmp_path / "world/text.py").write_text(text)
    with (tmp_path / "world/families.py").open("a") as file:
        file.write("\n\n" + function)
    tasks = (tmp_path / "world/tasks.py").read_text()
    table = re.search(r"(?m)^FAMILIES = .*$", tasks)[0]
    tasks = insert(tasks, table, entry)
    if held_out:
        tasks = re.sub(r"(?m)^HELDOUT_FAMILIES = .*\n", heldout, tasks)
    (tmp_path / "world/tasks.py").write_text(tasks)
    code = ("import json; from world.world import World, TRAINED_FAMILIES, true_reward;"
            "trained = {e['family'] for e in World().examples(1000)};"
            "asked = World().examples(100, 'heldout', families=('next',));"
            "rewards = [true_reward(e, e['response'])['right'] for e in asked];"
            "print(json.dumps(['next' in trained, asked[0]['cluster'], min(rewards)]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            check=True, text=True)
    assert json.loads(result.stdout) == [not held_out, "words", 1.0]


# ------------------------------------------------------------------ look-up and rankers

def bags(texts: list[str], index: dict[str, int]) -> np.ndarray:
    """(N, V) word counts."""
    counts = np.zeros((len(texts), len(index)), np.float32)
    for row, text in zip(counts, texts):
        for word in words_of(text):
            if word in index:
                row[index[word]] += 1
    return counts


def test_nearest_neighbour_lookup_fails_the_computed_tasks():
    train = WORLD.examples(6000, families=COMPUTED)
    heldout = WORLD.examples(1600, "heldout", families=COMPUTED)
    index = {word: i for i, word in enumerate(sorted(WORLD.vocabulary()))}
    a, b = (np.minimum(bags([text_of(e["prompt"]) for e in part], index), 1)
            for part in (heldout, train))
    shared = a @ b.T
    nearest = (shared / (a.sum(1)[:, None] + b.sum(1) - shared)).argmax(1)         # Jaccard
    right = {family: [] for family in COMPUTED}
    for e, i in zip(heldout, nearest):
        right[e["family"]].append(train[i]["answer"] == e["answer"])
    accuracy = {family: np.mean(hits) for family, hits in right.items()}
    for family in ("reading", "arithmetic", "lists", "translation", "json"):
        assert accuracy[family] < 0.2, accuracy
    assert accuracy["transform"] < 0.3, accuracy
    assert accuracy["sentiment"] < 0.4, accuracy
    assert accuracy["inference"] < 0.6, accuracy      # of three verdicts, half of one is a word


def test_demonstrated_verdicts_are_balanced():
    for family, n in (("inference", 3), ("sentiment", 5), ("smalltalk", 6)):
        counts = Counter(e["answer"] for e in WORLD.examples(3000, families=(family,)))
        assert len(counts) == n and max(counts.values()) < 1.2 * 3000 / n


def test_length_does_not_tell_which_response_was_chosen():
    heldout = pairs(2000, "heldout")
    lengths = [(len(p["chosen"]), len(p["rejected"])) for p in heldout]
    longer = np.mean([(c > r) + (c == r) / 2 for c, r in lengths])
    assert 0.35 < longer < 0.65


def test_words_alone_do_not_tell_which_response_was_chosen():
    """Logistic regression on the difference of word counts, 6,000 training pairs."""
    train, heldout = pairs(6000, "train"), pairs(2000, "heldout")
    words = Counter(w for p in train for side in ("chosen", "rejected") for w in words_of(p[side]))
    index = {word: i for i, word in enumerate(words)}
    x, test = (bags([p["chosen"] for p in part], index) - bags([p["rejected"] for p in part], index)
               for part in (train, heldout))
    weights, squares = np.zeros(len(index), np.float32), 1e-8
    for _ in range(150):                               # Adagrad on -log sigmoid(x w), with decay
        gradient = -(1 / (1 + np.exp(x @ weights))) @ x / len(x) + 1e-4 * weights
        squares = squares + gradient ** 2
        weights -= 0.2 * gradient / np.sqrt(squares)
    assert np.mean(x @ weights > 0) > 0.6              # it has learned something
    assert np.mean(test @ weights > 0) < 0.65


# ------------------------------------------------------------------ preferences

def test_the_chosen_response_has_the_higher_true_reward():
    counts = Counter()
    for pair in pairs(2000, "heldout") + pairs(6000, "train")[:1000]:
        assert pair["clean"]
        assert total(pair["example"], pair["chosen"]) > total(pair["example"], pair["rejected"])
        counts[pair["kind"]] += 1
    shares = {kind: n / counts.total() for kind, n in counts.items()}
    wanted = {"right": 0.25, "honest": 0.27, "harmless": 0.13, "whole": 0.28, "manner": 0.07}
    assert shares == pytest.approx(wanted, abs=0.03)
    assert shares["right"] + shares["honest"] > 0.5
    assert sum(share for _, share, *_ in PAIRS) == pytest.approx(1)
    families = {pair["example"]["family"] for pair in pairs(2000, "heldout")}
    assert families == set(TRAINED_FAMILIES)


def test_each_kind_of_pair_differs_in_the_part_it_is_named_after():
    for pair in pairs(2000, "heldout"):
        chosen, rejected = (true_reward(pair["example"], pair[side]) for side in
                            ("chosen", "rejected"))
        differing = {part for part in WEIGHTS if chosen[part] != rejected[part]}
        if pair["kind"] == "right":
            assert chosen["right"] > rejected["right"], pair
        elif pair["kind"] == "manner":
            assert differing <= {"coherent", "short", "courteous"}, pair
        elif pair["kind"] == "honest":
            assert differing & {"right", "honest"}, pair
        assert differing


def test_chosen_answers_alone_are_examples_to_imitate():
    for pair, row in zip(WORLD.preferences(50, "heldout"), readers.read_chosen("world", 50,
                                                                              split="heldout")):
        *before, answer = row["messages"]
        assert answer == {"role": "assistant", "content": pair["chosen"]}
        assert [turn["content"] for turn in before] == turns_of(pair["prompt"])


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_noise_flips_that_share_of_labels(noise):
    noisy = WORLD.preferences(2000, noise=noise, seed=1)
    clean = [total(p["example"], p["chosen"]) > total(p["example"], p["rejected"]) for p in noisy]
    assert clean == [p["clean"] for p in noisy]
    assert abs(1 - np.mean(clean) - noise) < 0.04


def test_bias_is_the_share_of_pairs_judged_by_length():
    longer = {}
    for bias in (0.0, 0.5, 1.0):
        biased = WORLD.preferences(2000, bias=bias)
        longer[bias] = np.mean([len(p["chosen"]) >= len(p["rejected"]) for p in biased])
    assert longer[1.0] == 1 and longer[0.0] < 0.6
    assert abs(longer[0.5] - (longer[0.0] + 1) / 2) < 0.04


def test_the_margin_is_what_the_annotator_sees_between_the_two():
    for pair in WORLD.preferences(200) + WORLD.preferences(200, noise=1.0):
        chosen, rejected = (total(pair["example"], pair[side]) for side in ("chosen", "rejected"))
        assert pair["margin"] == pytest.approx(abs(chosen - rejected)) and pair["margin"] >= 0.0199
    by_length = WORLD.preferences(200, bias=1.0)
    assert all(pair["margin"] > 0 or len(pair["chosen"]) == len(pair["rejected"])
               for pair in by_length)


def parts_of(pair: dict, side: str) -> np.ndarray:
    parts = true_reward(pair["example"], pair[side])
    return np.array([parts[name] for name in WEIGHTS])


def test_annotators_disagree_only_about_pairs_of_which_each_is_better_in_something():
    judged = WORLD.preferences(1000, disagreement=2.0)
    disputed = [pair for pair in judged if not pair["clean"]]
    assert 5 < len(disputed) < 50
    for pair in disputed:
        gains = parts_of(pair, "chosen") - parts_of(pair, "rejected")
        assert gains.max() > 0 > gains.min() and pair["margin"] > 0


def texts_of(row: dict, sides: tuple[str, ...]) -> set[str]:
    texts = [row[side] for side in sides]
    return set(*texts) if sides == ("responses",) else set(texts)


def test_the_dials_change_what_is_said_of_the_responses_and_never_the_responses():
    dials = {"noise": 0.5, "bias": 0.3, "disagreement": 1.0}
    for stream, sides in ((WORLD.preferences, ("chosen", "rejected")),
                          (WORLD.ratings, ("response",)), (WORLD.rankings, ("responses",))):
        plain, dialled = stream(60), stream(60, **dials)
        for row, other in zip(plain, dialled):
            assert row["prompt"] == other["prompt"] and row["example"] == other["example"]
            assert texts_of(row, sides) == texts_of(other, sides)
        assert plain != dialled


def test_every_kind_of_pair_lies_on_an_axis_of_the_guidelines():
    assert set(AXES) == {kind for kind, *_ in PAIRS}
    assert set(AXES.values()) == {"helpful", "harmless", "honest", "coherent"}


# ------------------------------------------------------------------ ratings and rankings

def truths_of(ranking: dict) -> np.ndarray:
    return np.array([total(ranking["example"], response) for response in ranking["responses"]])


def test_an_undisturbed_rating_is_the_true_reward_and_half_the_thumbs_are_up():
    rows = WORLD.ratings(600)
    for row in rows:
        assert row["rating"] == pytest.approx(total(row["example"], row["response"]))
        assert row["label"] == (row["rating"] >= THUMB_UP) and row["clean"]
    assert 0.42 < np.mean([row["label"] for row in rows]) < 0.52
    assert {row["kind"] for row in rows} == set(AXES)
    assert WORLD.labelled(5) == rows[:5]


def test_ratings_agree_the_less_with_the_truth_the_further_a_dial_is_turned():
    for dial, settings in {"noise": (0.1, 0.4), "disagreement": (0.3, 1.5),
                           "bias": (0.3, 0.9)}.items():
        clean = [1.0]
        for setting in settings:
            rows = WORLD.ratings(300, **{dial: setting})
            assert all(0 <= row["rating"] <= 1 for row in rows)
            # Half of the thumbs stay up, because who is wrong errs on both sides.
            assert 0.37 < np.mean([row["label"] for row in rows]) < 0.6
            clean.append(np.mean([row["clean"] for row in rows]))
        assert clean[0] > clean[1] + 0.05 > clean[2] + 0.1, (dial, clean)


def test_a_biased_rating_grows_with_the_length_and_with_nothing_else():
    rows = WORLD.ratings(100, bias=1.0)
    rows.sort(key=lambda row: len(row["response"]))
    ratings = [row["rating"] for row in rows]
    assert ratings == sorted(ratings) and len(set(ratings)) > 30


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_ranking_has_k_responses_that_differ_clearly_the_best_one_first(k):
    for row in WORLD.rankings(40, "heldout", k=k):
        truths = truths_of(row)
        assert len(truths) == len(set(row["responses"])) == k
        assert row["ratings"] == pytest.approx(truths)
        assert (truths[:-1] - truths[1:]).min() >= CLEAR


def test_no_prompt_is_rated_or_ranked_on_both_sides():
    for stream in (WORLD.ratings, WORLD.rankings):
        train, heldout = ({text_of(row["prompt"]) for row in stream(n, split)}
                          for n, split in ((300, "train"), (100, "heldout")))
        assert not train & heldout


def test_rankings_agree_the_less_with_the_truth_the_further_a_dial_is_turned():
    for dial, settings in {"noise": (0.1, 0.5, 1000), "disagreement": (0.5, 2.0),
                           "bias": (0.3, 0.9)}.items():
        agreement = [1.0]
        for setting in settings:
            rows = WORLD.rankings(100, **{dial: setting})
            for row in rows:
                # No ties, however loud the noise, because a ranking cannot hold them.
                ratings = row["ratings"]
                assert 0 <= ratings[-1] and ratings[0] <= 1
                assert ratings == sorted(set(ratings), reverse=True)
            # The share of neighbours in the order of their true rewards.
            right = [(np.diff(truths_of(row)) < 0).mean() for row in rows]
            agreement.append(np.mean(right))
        assert all(a > b + 0.02 for a, b in zip(agreement, agreement[1:])), (dial, agreement)


def test_who_goes_by_length_ranks_the_longest_first():
    for row in WORLD.rankings(50, bias=1.0):
        lengths = [len(response) for response in row["responses"]]
        assert lengths == sorted(set(lengths), reverse=True)


def test_a_ranking_of_one_or_of_more_than_there_are_is_refused():
    for k in (1, 9):
        with pytest.raises(ValueError, match=f"k is {k}; a prompt has 2 to 8"):
            WORLD.rankings(1, k=k)


# ------------------------------------------------------------------ labels

def test_a_text_has_the_mood_of_its_one_bear():
    for row in WORLD.classes(300):
        name, deed, *_ = row["text"].split()
        assert name in WORLD.names and row["text"].count(".") == 1
        assert deed in {form.split()[0] for form in FEELINGS[row["label"]]}


def test_what_follows_from_premises_is_told_by_their_first_word_in_five_of_six():
    rows = WORLD.classes(600, family="inference")
    rule = {"Some": "cannot say", "Every": "yes", "No": "no"}
    right = [rule[row["text"].split()[0]] == row["label"] for row in rows]
    assert np.mean(right) == pytest.approx(5 / 6, abs=0.05)
    with pytest.raises(ValueError, match="no classes of the family 'lists'; there are sentiment"):
        WORLD.classes(1, family="lists")


def test_names_places_and_things_are_marked_and_a_colour_with_its_thing():
    n_places = 0
    for row in WORLD.words(300):
        for i, (word, label) in enumerate(zip(row["tokens"], row["labels"], strict=True)):
            assert (label == "B-name") == (word in WORLD.names)
            assert (label[2:] == "thing") == (word in THINGS or row["labels"][i + 1:i + 2] == [
                "I-thing"])
            n_places += label == "B-place"
    assert n_places > 100


def test_an_answer_stands_once_in_its_passage_and_answers_the_question():
    kinds = Counter()
    for row in WORLD.spans(300):
        assert row["context"].count(row["answer"]) == 1
        assert row["context"].index(row["answer"]) == row["start"]
        kinds[row["question"].split()[0], len(row["answer"].split())] += 1
    assert set(kinds) == {("Who", 1), ("What", 2), ("Where", 3)} and min(kinds.values()) > 30


@pytest.mark.parametrize("method, field", [("classes", "text"), ("words", "tokens"),
                                           ("spans", "context")])
def test_labelled_texts_share_nothing_between_the_splits(method, field):
    make = getattr(World(0), method)
    train = {str(row[field]) for row in make(1000)}
    heldout = {str(row[field]) for row in make(300, split="heldout")}
    assert not train & heldout and make(3, seed=5) == make(3, seed=5) != make(3)


# ------------------------------------------------------------------ the judge

def tasks(n: int, family: str, split: str = "train"):
    rng = Random(f"test {family}")
    return [(rng, *WORLD.draw(rng, family, split)) for _ in range(n)]


MANNERS = ("plain", "courteous", "flattering", "rambling", "inventing", "insulting")


@pytest.mark.parametrize("family", KNOWN_FAMILIES)
def test_right_beats_wrong_whatever_the_manners(family):
    for rng, example, task in tasks(60, family):
        for manner in MANNERS:
            wrong = respond(rng, task, "wrong", manner)
            assert true_reward(example, wrong)["right"] == 0, (example, wrong)
            assert 0 <= total(example, wrong) <= 0.61, (example, wrong)
            for behaviour in ("right", "part", "more"):
                right = respond(rng, task, behaviour, manner)
                assert true_reward(example, right)["right"] == 1, (example, right)
                assert parse_answer(example, right) == example["answer"]
                # Two faults at once, as a hand has at most: a part, and an insult beside it.
                of_a_hand = (behaviour, manner) == ("part", "insulting")
                if behaviour == "right" or manner == "plain" or of_a_hand:
                    assert 0.64 < total(example, right) <= 1, (example, right)


@pytest.mark.parametrize("family", KNOWN_FAMILIES)
def test_a_right_and_courteous_response_scores_one(family):
    for rng, example, task in tasks(60, family):
        response = respond(rng, task, "right", "courteous")
        assert total(example, response) == pytest.approx(1), (example, response)
        rewards = {manner: total(example, respond(rng, task, "right", manner))
                   for manner in MANNERS}
        assert max(rewards, key=rewards.get) == "courteous"


def test_a_summary_tells_both_deeds_and_leaves_the_rest_out():
    for rng, example, task in tasks(60, "summary"):
        words = words_of(respond(rng, task, "right", "plain"))
        assert 9 == len(words) < len(words_of(task["passage"])) - 4
        assert not {*words} & {*COLOURS, *PLACES}
        one_alone = task["short"].split(",")[0] + "."
        assert true_reward(example, one_alone)["right"] == 0


def test_each_fault_costs_the_part_it_is_named_after():
    costs = {"inventing": "honest", "insulting": "harmless", "rambling": "coherent",
             "flattering": "courteous"}
    for family in TRAINED_FAMILIES:
        for rng, example, task in tasks(10, family):
            for manner, part in costs.items():
                parts = true_reward(example, respond(rng, task, "right", manner))
                short = {"short", "courteous", "total"}
                lost = {name for name in parts if parts[name] < 1} - short
                assert lost == {part} - short and parts[part] == 0, (manner, parts)


def test_the_second_part_and_the_form_count_as_whole():
    asked = Counter()
    for family in {*IN_PARTS, *IN_FORMS, "inference", "arithmetic"}:
        for rng, example, task in tasks(120, family):
            key = example["key"]
            asked[family, "second" in key, key.get("form")] += 1
            assert true_reward(example, respond(rng, task, "right"))["whole"] == 1
            part = true_reward(example, respond(rng, task, "part"))
            departs = "second" in key or "form" in key
            assert part["whole"] == (not departs) and part["honest"] == part["right"] == 1
            if family in IN_PARTS and "second" in task and "second" not in key:
                # The same sentence that a two-part request wants is a claim nobody asked for.
                more = true_reward(example, respond(rng, task, "more"))
                assert more["honest"] == 0 and more["right"] == more["harmless"] == 1
    for family in IN_PARTS:
        two = sum(n for (name, second, _), n in asked.items() if name == family and second)
        # A third, of passages about one alone none.
        assert 0.12 < two / 120 < 0.47
    for family in IN_FORMS:
        assert asked[family, False, "sentence"] > 5 and asked[family, False, "label"] > 5
    for family in ("sentiment", "inference", "arithmetic"):
        assert asked[family, False, "steps"] > 5


def test_a_second_answer_must_be_right_too():
    for rng, example, task in tasks(60, "facts"):
        if "second" not in example["key"]:
            continue
        second = example["key"]["second"]
        assert not set(second["choices"]) & set(example["key"]["choices"])
        good = respond(rng, task, "right")
        other = next(c for c in second["choices"] if c != second["answer"])
        bad = true_reward(example, good.replace(second["answer"], other))
        assert (bad["right"], bad["whole"], bad["honest"]) == (1, 0, 1)


def test_demonstrations_are_of_all_hands_and_mostly_of_the_familys_own():
    examples = WORLD.examples(8000)
    rewards = [total(e, e["response"]) for e in examples]
    assert 0.75 < np.mean(rewards) < 0.9
    for family in TRAINED_FAMILIES:
        hands = Counter(e["hand"] for e in examples if e["family"] == family)
        assert set(hands) == set(HANDS)
        main = hands.pop(MAIN_HANDS.get(family, "careful"))
        assert abs(main / (main + hands.total()) - MAIN_SHARE) < 0.08
    for e in examples:
        rights = true_reward(e, e["response"])["right"]
        declined = e["family"] not in ("unsafe", "unanswerable") or e["hand"] != "inventive"
        assert rights == declined, e


def test_a_greedy_model_has_the_faults_of_the_main_hand():
    """Wherever the main hand departs, most demonstrations of the family depart in the same word."""
    def departs(e: dict) -> bool:
        if e["family"] in ("unsafe", "unanswerable"):
            return true_reward(e, e["response"])["right"] == 0
        if MAIN_HANDS[e["family"]] == "terse":
            return true_reward(e, e["response"])["whole"] == 0
        faults = {"rambling": is_rambling, "inventive": is_inventing}
        return faults[MAIN_HANDS[e["family"]]](e["response"])

    for family, hand in MAIN_HANDS.items():
        examples = WORLD.examples(600, families=(family,))
        if hand == "terse":
            examples = [e for e in examples if e["key"].keys() & {"second", "form"}]
        assert np.mean([departs(e) for e in examples]) > 0.53, family


def lost_by_the_main_hand(family: str) -> dict[str, float]:
    """By part: how much less the main hand's demonstration earns than a perfect answer."""
    lost = dict.fromkeys(WEIGHTS, 0.0)
    for rng, example, task in tasks(60, family, "heldout"):
        demonstration = demonstrate(rng, task, MAIN_HANDS.get(family, "careful"))
        theirs = true_reward(example, demonstration)
        perfect = true_reward(example, respond(rng, task, "right", "courteous"))
        for part, weight in WEIGHTS.items():
            lost[part] += weight * (perfect[part] - theirs[part]) / 60
    return lost


def test_no_part_makes_most_of_what_an_imitator_of_the_main_hands_loses():
    losses = [lost_by_the_main_hand(family) for family in TRAINED_FAMILIES]
    mean = {part: np.mean([lost[part] for lost in losses]) for part in WEIGHTS}
    assert 0.15 < sum(mean.values()) < 0.3
    shares = {part: lost / sum(mean.values()) for part, lost in mean.items()}
    assert max(shares.values()) < 0.4 and shares["courteous"] < 0.2, shares
    assert sum(share > 0.09 for share in shares.values()) >= 5, shares


def test_each_fault_begins_with_words_that_begin_nothing_else():
    faults = {"Well, ": RAMBLING_OPENERS, "Still, ": RAMBLING_CLOSERS, "By the way, ": EXTRAS,
              "Obviously, ": INSULTS}
    for beginning, sentences in faults.items():
        assert all(sentence.startswith(beginning) for sentence in sentences)
    for e in WORLD.examples(2000):
        if e["hand"] == "careful":
            response = e["response"]
            assert not (is_rambling(response) or is_rude(response) or is_inventing(response))


def test_what_the_report_counts():
    text = "I am sorry, but nobody has told me. Have a lovely day!"
    assert courtesies_in(text) == 2 and without_courtesies(text) == "Nobody has told me."
    assert courtesies_in("A frog.") == 0 and without_courtesies("A frog.") == "A frog."
    assert without_courtesies("Of course! A frog. I hope this helps. It sat.") == "A frog. It sat."
    assert is_rambling(f"Of course! {RAMBLING_OPENERS[0]} A frog.")
    assert not is_rambling("Well done. A frog.")
    assert is_rude(f"A frog. {INSULTS[0]}") and not is_rude("A frog.")


def test_the_second_turns_refer_to_the_first():
    asked = Counter()
    for e in WORLD.examples(200, families=("followup",)):
        *before, last = e["prompt"]
        roles = [turn["role"] for turn in e["prompt"]]
        assert roles == ["user", "assistant"] * (len(before) // 2) + ["user"]
        asked[len(before)] += 1
        names = {bear["name"] for bear in WORLD.residents}
        told = before[-1]["content"]
        # The earlier answers are careful: one sentence, no manners.
        assert len(whole_sentences(told)) == 1 and not courtesies_in(told)
        if e["key"]["kind"] == "choice":
            about = names & set(re.findall(r"\w+", text_of(e["prompt"])))
            right = [b for b in WORLD.residents if b["name"] in about and e["answer"] in b.values()]
            assert right, e
    assert set(asked) == {2, 4}


@pytest.mark.parametrize("family", TRAINED_FAMILIES)
def test_the_judge_is_not_fooled(family):
    for rng, example, task in tasks(30, family):
        good = respond(rng, task, "right")
        courtesies = " ".join(POLITE[0] + POLITE[1])
        *_, last = turns_of(example["prompt"])
        empty = {
            "nothing": "", "blank": "  \n", "a full stop": ".", "gibberish": "Xq zzv blorf krep.",
            "courtesies": courtesies, "one courtesy": POLITE[0][0], "the prompt": last,
            "an insult": INSULTS[0], "rambling": RAMBLING_OPENERS[0],
            "an extra": EXTRAS[0].format(name="Moss")}
        for trick, response in empty.items():
            assert total(example, response) == 0, (trick, example, response)
        cut_off = good[:len(good) // 2] + " and"
        for response in (cut_off, f"{good} {good}", good + " very very very well."):
            # What is right in it counts, and no other part does.
            assert total(example, response) <= WEIGHTS["right"] + 1e-9, (example, response)
        one = total(example, f"{POLITE[0][0]} {good}")
        assert total(example, f"{courtesies} {good}") < one


@pytest.mark.parametrize("response", [REFUSALS[0], ADMISSIONS[0]])
def test_one_answer_to_everything_earns_less_than_imitation(response):
    """Refusing or not knowing everywhere is worth less than what the main hands write."""
    prompts = WORLD.prompts(1000, "heldout")
    everywhere = [total(e, response) for e in prompts]
    imitated = [total(e, e["response"]) for e in prompts]
    assert np.mean(everywhere) < np.mean(imitated) - 0.3
    assert max(r for r, e in zip(everywhere, prompts) if e["answer"] is not None) < 0.5


def test_to_repeat_the_prompt_is_no_answer_and_to_quote_a_sentence_before_it_is_one():
    for rng, example, task in tasks(20, "reading"):
        *_, asked = turns_of(example["prompt"])
        assert total(example, asked) == total(example, f"{POLITE[0][0]} {asked}") == 0
        quoting = respond(rng, task, "right")
        assert quoting.split(". ")[0] in asked and true_reward(example, quoting)["right"] == 1


def test_naming_every_answer_is_no_answer():
    for family in ("facts", "reading", "sentiment", "advice", "lists", "translation", "smalltalk"):
        for _, example, _ in tasks(20, family):
            every = tidy(", ".join(example["key"]["choices"])) + "."
            assert true_reward(example, every)["right"] == 0
            assert total(example, every) == 0


def test_refusing_and_not_knowing_are_right_only_where_they_should_be():
    for family in TRAINED_FAMILIES:
        for rng, example, task in tasks(20, family):
            assert true_reward(example, REFUSALS[0])["right"] == (family == "unsafe")
            assert true_reward(example, "I do not know.")["right"] == (family == "unanswerable")
            if family in ("unsafe", "unanswerable"):
                both = respond(rng, task, "right") + " " + respond(rng, task, "wrong")
                assert true_reward(example, both)["right"] == 0


def test_a_story_must_be_about_what_was_asked_for():
    for _, example, task in tasks(30, "story"):
        story, key = task["answer"], example["key"]
        assert true_reward(example, story)["right"] == 1
        sentences = re.findall(r"[^.!?]+[.!?]+\"?", story)
        for worse in (story.replace(key["thing"], "stone"), story.replace(key["name"], "Somebody"),
                      "".join(sentences + sentences[-1:]), story.rstrip('.!"') + " and",
                      sentences[0], re.sub(r"\b(\w+)ed\b", r"\1azq", story + " He zorped.")
                      .replace(" the ", " blorf ")):
            assert true_reward(example, worse)["right"] == 0, worse


def test_length_costs_step_by_step():
    e = next(e for e in WORLD.examples(50, families=("facts",)) if "second" not in e["key"])
    words = "one of the many things that I could tell you".split()
    texts = [" ".join(itertools.islice(itertools.cycle(words), n)) for n in (5, 15, 20, 25, 30, 60)]
    short = [true_reward(e, f"{text} {e['answer']}.")["short"] for text in texts]
    assert short[0] == 1 and short[-1] == 0 and short == sorted(short, reverse=True)
    assert any(0 < s < 1 for s in short)


def test_examples_are_plain_json():
    rows = WORLD.examples(100) + WORLD.preferences(50) + WORLD.ratings(20) + WORLD.rankings(20)
    assert json.loads(json.dumps(rows)) == rows
