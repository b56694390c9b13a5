"""evaluate.py: every figure of the report by hand, in its limiting cases, or by a slow count."""
import math
import zlib

import numpy as np
import pytest
import torch
from tiny import END, TOKENIZER, slow_logps, tiny_model, write_rows

import data
import evaluate
import readers
from evaluate import (
    accuracy_by_family,
    calibration_error,
    complete_text,
    fluency,
    kl_to,
    length_accuracy,
    ngram_losses,
    validation_loss,
    win_rate,
    word_perplexity,
)
from tokenizer import Tokenizer
from world.judge import WEIGHTS, true_reward
from world.tasks import HELDOUT_FAMILIES, TRAINED_FAMILIES
from world.text import text_of
from world.world import World

SIX = np.array([0, 1, 0, 1, 2, 0], np.uint16)      # counts 3 2 1; pairs 01 01 10 12 20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------- language

def test_ngram_losses_of_six_tokens_are_what_a_hand_computes():
    unigram, bigram = ngram_losses(SIX, np.array([0, 1]), vocab_size=3, prior=10.0)
    assert unigram == pytest.approx(-(math.log(4 / 9) + math.log(3 / 9)) / 2)
    assert bigram == pytest.approx(-math.log((2 + 10 * 3 / 9) / (2 + 10)))
    _, unseen = ngram_losses(SIX, np.array([1, 1]), vocab_size=3, prior=10.0)
    assert unseen == pytest.approx(-math.log((0 + 10 * 3 / 9) / (2 + 10)))


def test_probabilities_of_both_ngram_models_sum_to_one():
    for a in range(4):                             # 3 never occurs, 0 is the last token
        pairs = [ngram_losses(SIX, np.array([a, b]), vocab_size=4)[1] for b in range(4)]
        assert sum(math.exp(-loss) for loss in pairs) == pytest.approx(1, rel=1e-12)
    singles = [ngram_losses(SIX, np.array([b, b]), vocab_size=4)[0] for b in range(4)]
    assert sum(math.exp(-loss) for loss in singles) == pytest.approx(1, rel=1e-12)


def test_a_bigram_model_knows_an_alternation_and_a_unigram_does_not():
    train = np.tile([0, 1], 5000)
    unigram, bigram = ngram_losses(train, train[:100], vocab_size=2)
    assert unigram == pytest.approx(math.log(2), rel=1e-3)
    assert 0 < bigram < 2 / 1000                   # 5 virtual tokens of 5,000 go the other way
    assert ngram_losses(train, train[:100], 2, prior=1e12)[1] == pytest.approx(unigram, rel=1e-3)


def test_validation_loss_is_per_token_of_whole_windows_and_the_same_at_every_call():
    tokens = np.array(TOKENIZER.encode("a bear sat by the river, and the river ran on"))
    source = data.TokenStream(tokens, 16, 0, TOKENIZER.endoftext, document_masks=False)
    model = tiny_model()
    loss = validation_loss(model, source, rows=99, batch_size=2)
    total = 0.0                                    # each token but the first once, in its window
    with torch.no_grad():
        for first in range(0, len(tokens) - 1, 16):
            start = min(first, len(tokens) - 17)
            logps = slow_logps(model, tokens[start:start + 17].tolist())
            total -= logps[first - start:].sum().item()
    assert loss == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert len(source) == 3 and (len(tokens) - 1) % 16          # the last window overlaps
    assert loss == validation_loss(model, source, rows=99, batch_size=2) and model.training
    few = validation_loss(model, source, rows=1, batch_size=2)
    assert few != pytest.approx(loss, rel=1e-3)


CORPUS = ["The bear went down to the river and caught a big fish for his dinner .",
          "A small cub lost a red kite near the old mill and cried all day ."]


def test_a_copied_text_is_all_copied_and_a_new_one_not_at_all():
    copied = fluency([CORPUS[0]], CORPUS)
    assert copied["copied"] == 1.0 and copied["distinct"] == 1.0
    new = fluency([" ".join(reversed(CORPUS[0].split()))], CORPUS)
    assert new["copied"] == 0.0 and new["perplexity"] > 2 * copied["perplexity"]
    strange = fluency(["quux " * 14], CORPUS)
    assert strange["perplexity"] > 3 * new["perplexity"]
    half = CORPUS[0].split()[:12] + CORPUS[1].split()[:12]       # 13 runs, the first and last known
    assert fluency([" ".join(half)], CORPUS)["copied"] == pytest.approx(2 / 13)


def test_a_repeated_text_is_neither_distinct_nor_hard_to_compress():
    repeated, varied = fluency(["go on and " * 20] * 5, CORPUS), fluency(CORPUS, CORPUS)
    assert repeated["distinct"] == 3 / (5 * 58)    # three 3-grams of all there are
    assert varied["distinct"] == 1.0
    text = "\n".join(["go on and " * 20] * 5).encode()
    assert repeated["compression"] == len(zlib.compress(text, 9)) / len(text)
    assert repeated["compression"] < 0.1 < varied["compression"]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_texts_without_a_word_have_a_fluency_too(texts):
    assert fluency(texts, CORPUS)["copied"] == fluency(texts, CORPUS)["distinct"] == 0.0


def test_word_perplexity_of_two_words_is_what_a_hand_computes():
    # "a" first: (2 + 1/5) / 5. "b" after "a": (2 + that of "b" alone, 2.2 / 5) / (2 + 1)
    a, b = (2 + 1 / 5) / 5, (2 + (2 + 1 / 5) / 5) / 3
    found = word_perplexity([["a", "b"]], [["a", "b", "a", "b"]], order=2)
    assert found == pytest.approx(math.exp(-(math.log(a) + math.log(b)) / 2))


# ---------------------------------------------------------------------- tasks

def number(family, answer):
    key = {"kind": "number", "length": 8}
    return {"family": family, "prompt": "How many?", "answer": answer, "key": key}


def test_accuracy_is_by_family_and_skips_what_has_no_answer():
    examples = [number("sums", "4"), number("sums", "7"), number("counts", "2"),
                number("counts", "3"), number("story", None)]
    texts = ["The answer is 4.", "8", "There are 2.", "", "Once upon a time"]
    assert accuracy_by_family(examples, texts) == {"sums": 0.5, "counts": 0.5, "all": 0.5}
    assert accuracy_by_family(examples[4:], texts[4:]) == {}


def test_a_demonstration_is_right_and_an_unfinished_answer_is_none():
    examples = World(0).examples(60, split="heldout")
    right = accuracy_by_family(examples, [e["response"] for e in examples])
    assert set(right.values()) == {1.0} and len(right) > 5
    ids = TOKENIZER.encode("4.")
    assert complete_text(TOKENIZER, [*ids, END]) == "4."
    for unfinished in (ids, [], [*ids, TOKENIZER.endoftext]):
        assert complete_text(TOKENIZER, unfinished) == ""


def test_quizzes_ask_unseen_instances_of_trained_and_of_untrained_families():
    quiz = evaluate.quiz("world:3", 40)
    assert len(quiz["accuracy"]) == 40 and len(quiz["unseen_families"]) == 10
    assert {e["family"] for e in quiz["accuracy"]} <= set(TRAINED_FAMILIES)
    assert {e["family"] for e in quiz["unseen_families"]} <= set(HELDOUT_FAMILIES)
    assert quiz == evaluate.quiz("world:3", 40) != evaluate.quiz("world:4", 40)
    trained_on = {(text_of(e["prompt"]), e["core"]) for e in World(3).examples(2000)}
    assert not trained_on & {(text_of(e["prompt"]), e["core"]) for e in quiz["accuracy"]}


def test_a_later_turn_is_asked_after_the_turns_before_it():
    examples = World(0).examples(20, families=("followup", "facts"))
    for example, ids in zip(examples, evaluate.chat_prompts(TOKENIZER, examples)):
        turns = example["prompt"]
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        assert ids == TOKENIZER.prompt(turns)


def test_solved_examples_of_the_same_family_stand_before_as_many_as_fit():
    tokenizer = Tokenizer.bytes()
    asked = evaluate.exam("world", 6, ("tally", "arithmetic"))
    shown, n = evaluate.few_shot("world", asked, 3, tokenizer, 10_000)
    assert n == 3
    for example, bare in zip(shown, asked):
        turns = readers.checked_turns(bare["prompt"], "prompt", "user")
        before = example["prompt"][:-len(turns)]
        assert example["prompt"][-len(turns):] == turns
        answers = [turn["content"] for turn in before if turn["role"] == "assistant"]
        solved = [shot["response"] for shot in world_examples(bare["family"])]
        assert [answer for answer in answers if answer in solved] == solved
    longest = max(map(len, evaluate.chat_prompts(tokenizer, shown))) + evaluate.MAX_ANSWER
    assert evaluate.few_shot("world", asked, 3, tokenizer, longest)[1] == 3
    assert evaluate.few_shot("world", asked, 3, tokenizer, longest - 1)[1] == 2
    assert evaluate.few_shot("world", asked, 3, tokenizer, 80) == (asked, 0)


def world_examples(family):
    return readers.world_named("world").examples(3, families=(family,))


def test_a_file_has_no_answer_key_and_no_quiz(tmp_path):
    file = write_rows(tmp_path / "tasks.jsonl", [{"prompt": "a", "response": "b"}])
    assert evaluate.quiz(file, 40) == {} and evaluate.exam(file, 40) == []
    assert evaluate.rollout_truth([{"example": {"prompt": "a"}}], [[END]], TOKENIZER) == {}
    with pytest.raises(ValueError, match="only a world has an answer key"):
        evaluate.main(evaluate.Config(data=file, device="cpu"))


def test_quiz_accuracy_is_of_greedy_answers_that_ended(monkeypatch):
    replies = ["4", "9", "5"]
    monkeypatch.setattr(evaluate, "answers", lambda model, tokenizer, examples: [
        [*TOKENIZER.encode(reply), END if reply != "9" else 65] for reply in replies])
    quizzes = {"accuracy": [number("sums", "4"), number("sums", "9"), number("sums", "6")],
               "unseen_families": []}
    scores = evaluate.quiz_accuracy(None, TOKENIZER, quizzes)
    # "4" and "5" are answers without an end of their sentence, and no attempts: right alone counts.
    assert scores == {"accuracy": 1 / 3, "true_reward": pytest.approx(WEIGHTS["right"] / 3)}


def test_truth_of_a_rollout_is_the_mean_true_reward_of_finished_answers():
    examples = World(0).prompts(3, split="train")
    texts = [e["response"] for e in World(0).prompts(3, split="train")]
    responses = [[*TOKENIZER.encode(text), END] for text in texts]
    responses[2].pop()                             # cut off: worth what silence is worth
    found = evaluate.rollout_truth([{"example": e} for e in examples], responses, TOKENIZER)
    expected = [true_reward(e, text)["total"] for e, text in zip(examples, [*texts[:2], ""])]
    assert found["true_reward"] == pytest.approx(sum(expected) / 3)
    assert expected[0] > 0


# ---------------------------------------------------------------------- comparisons

def test_win_rate_counts_ties_half_and_has_the_interval_of_a_mean():
    ours, theirs = np.array([1.0, 0.0, 0.5, 0.7]), np.array([0.0, 1.0, 0.5 + 1e-12, 0.2])
    rate, low, high = win_rate(ours, theirs)       # wins 1, 0, 1/2, 1
    assert rate == 0.625
    half = 1.96 * math.sqrt((0.375**2 + 0.625**2 + 0.125**2 + 0.375**2) / 4) / 2
    assert (low, high) == pytest.approx((0.625 - half, 0.625 + half))
    assert win_rate(theirs, ours)[0] == 1 - rate
    assert win_rate(ours, ours) == (0.5, 0.5, 0.5)
    assert win_rate(ours + 1, ours) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_win_rate_holds_the_truth_19_times_in_20():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        ours = (rng.random(200) < 0.6).astype(float)
        _, low, high = win_rate(ours, np.full(200, 0.5))
        inside += low <= 0.6 <= high
    assert abs(inside / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_calibration_error_is_what_a_hand_computes():
    sure, unsure = math.log(4), math.log(1.5)      # confidences 0.8 and 0.6
    margin = torch.tensor([sure, sure, sure, -sure, -unsure])
    # 0.8 against 3 of 4 right, 0.6 against 0 of 1
    assert calibration_error(margin) == pytest.approx((4 * 0.05 + 1 * 0.6) / 5, abs=1e-6)
    # ten parts of [0.5, 1]: 0.52 and 0.58 are not averaged, and their errors do not cancel
    apart = torch.tensor([-math.log(0.52 / 0.48), math.log(0.58 / 0.42)])
    assert calibration_error(apart) == pytest.approx((0.52 + 0.42) / 2, abs=1e-6)
    assert calibration_error(apart, bins=5) == pytest.approx(abs(0.52 + 0.58 - 1) / 2, abs=1e-6)


def test_calibration_error_is_0_for_sure_and_right_and_1_for_sure_and_wrong():
    assert calibration_error(torch.full((50,), 40.0)) == pytest.approx(0, abs=1e-12)
    assert calibration_error(torch.full((50,), -40.0)) == pytest.approx(1, abs=1e-12)


def test_margins_that_err_as_often_as_they_say_are_calibrated():
    margin = torch.rand(200_000, dtype=torch.float64) * 4
    wrong = torch.rand(200_000, dtype=torch.float64) > torch.sigmoid(margin)
    assert calibration_error(torch.where(wrong, -margin, margin)) < 0.01


def test_length_alone_is_judged_by_tokens_with_ties_half(tmp_path):
    answers = [("long", "no"), ("no", "long"), ("yes", "nay"), ("longer", "x")]
    rows = readers.read_preferences(write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": f"{i}", "chosen": w, "rejected": l} for i, (w, l) in enumerate(answers)]))
    assert length_accuracy(data.PreferencePairs(rows, TOKENIZER, 64, seed=0)) == 2.5 / 4


def questions(n):
    return [{"prompt": str(i)} for i in range(n)]


def test_kl_of_a_model_to_itself_is_zero():
    model = tiny_model(context_length=96)
    assert kl_to(model, tiny_model(context_length=96), TOKENIZER, questions(5), seed=0) == 0


def test_kl_is_the_mean_log_ratio_of_whole_sampled_answers():
    model, other = tiny_model(1, context_length=96), tiny_model(2, context_length=96)
    found = kl_to(model, other, TOKENIZER, questions(2), seed=7)
    sampled = evaluate.answers(model, TOKENIZER, questions(2), 1.0,
                               torch.Generator().manual_seed(7))
    total = 0.0
    with torch.no_grad():
        for question, answer in zip(questions(2), sampled):
            prompt = TOKENIZER.prompt([{"role": "user", "content": question["prompt"]}])
            for m, sign in ((model, 1), (other, -1)):
                total += sign * slow_logps(m, prompt + answer)[len(prompt) - 1:].sum().item()
    assert found == pytest.approx(total / 2, rel=1e-4) and found > 1


def test_figures_of_several_corpora_by_hand():
    """A corpus of the annealing alone is measured, but has no share in the mean."""
    losses = {"a": 1.0, "b": 3.0, "last": 2.0}
    figures = evaluate.corpus_figures(losses, {"a": 0.75, "b": 0.25}, dict.fromkeys(losses, 2.0))
    assert figures["val_loss"] == 1.5 and figures["perplexity"] == math.exp(1.5)
    assert figures["val_loss/last"] == 2.0 and figures["bits_per_byte/b"] == 1.5 / math.log(2)
    assert evaluate.corpus_figures({"a": 1.0}, {"a": 1.0}).keys() == {"val_loss", "perplexity"}


def test_two_models_are_compared_prompt_by_prompt():
    def found(rewards, right, whole, words):
        texts = [""] * 4
        columns = rewards, rewards, right, whole, words, texts
        return dict(zip(evaluate.PER_PROMPT, map(np.array, columns)))

    before = found([0.5, 0.5, 0.5, 0.0], [1, 1, 1, 0], [1, 1, 0, 0], [4, 4, 4, 4])
    after = found([0.7, 0.5, 0.1, 0.9], [1, 1, 0, 1], [1, 1, 1, 1], [5, 4, 9, 9])
    compared = evaluate.wins_over(after, before)
    assert compared["win_rate"] == compared["plain_win_rate"] == 2.5 / 4
    # One of three right answers was lost; the two that were whole grew by one word and by none.
    assert compared["right_to_wrong"] == pytest.approx(1 / 3) and compared["longer"] == 0.5


def test_faults_of_manner_are_counted():
    texts = ["Well, who knows? A frog.", "A frog. Obviously, thinking is not your strength.",
             "Of course! A frog. I hope this helps. Have a lovely day!", "With pleasure! A hen."]
    assert evaluate.manners(texts, np.array([1, 1, 1, 0])) == {
        "rambling": 0.25, "rude": 0.25, "inventing": 0.0, "third_courtesy": 0.25,
        "courteous_and_wrong": 0.25}
