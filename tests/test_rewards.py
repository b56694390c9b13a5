"""rewards.py: each term of the grammar, how several are combined, and what is refused by name."""
import math
import sys

import pytest
import torch
from tiny import END, TOKENIZER, folder_of, tiny_model

import rewards
from data import response_batch
from plumbing.folders import reward_terms
from readers import read_prompts
from rewards import Reward, combined, number_in
from scoring import response_rewards, score_responses
from tokenizer import Tokenizer
from world.judge import true_reward

CPU = torch.device("cpu")
ASKED = [{"messages": [{"role": "user", "content": text}], "answer": answer, "example": {},
          "where": f"rows.jsonl:{i}"}
         for i, (text, answer) in enumerate([("6 + 6?", "6 + 6 = 12. The answer is 12."),
                                             ("how many?", "#### 1,200"), ("why?", "It is 3.5.")])]


def ids_of(*texts: str) -> list[list[int]]:
    return [[*TOKENIZER.encode(text), END] for text in texts]


def reward_of(spec: str, combine: str = "min", tokenizer=TOKENIZER) -> Reward:
    return Reward(spec, combine, tokenizer, CPU, torch.float32, rows_at_once=2)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three reward models in rm0, rm1 and rm2 of the folder that one works in."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        folder_of(tiny_model(i + 4, head="scalar"), tmp_path / f"rm{i}")
    folder_of(tiny_model(1), tmp_path / "lm")
    return tmp_path


def scores_of(spec: str, combine: str = "min") -> torch.Tensor:
    x = [TOKENIZER.prompt(prompt["messages"]) for prompt in ASKED]
    return reward_of(spec, combine)(ASKED, x, ids_of("yes", "it is 12", "no, never"))


# ---------------------------------------------------------------------- the grammar

@pytest.mark.parametrize("spec, terms", [
    ("out/rm", [(None, "out/rm")]), ("a,b", [(None, "a"), (None, "b")]),
    ("0.7*out/safe,0.3*world", [(0.7, "out/safe"), (0.3, "world")]), ("", []),
    ("-1*taste:short", [(-1.0, "taste:short")])])
def test_terms_have_names_and_weights(spec, terms):
    assert reward_terms(spec) == terms


@pytest.mark.parametrize("name", ["world", "0.5*x,y", "taste:short"])
def test_a_folder_of_that_name_wins_over_the_grammar(models, name):
    folder_of(tiny_model(4, head="scalar"), models / name)
    assert torch.equal(scores_of(name), scores_of("rm0"))


# ---------------------------------------------------------------------- reward models

def test_a_reward_model_scores_as_it_does_row_by_row(models):
    reward = reward_of("rm0")
    x = [TOKENIZER.prompt(prompt["messages"]) for prompt in ASKED]
    y = ids_of("yes", "it is 12", "no, never")
    for row, score in enumerate(reward(ASKED, x, y)):
        batch = response_batch([x[row]], [y[row]], TOKENIZER.pad, 64)
        alone = response_rewards(reward.models[0], batch)
        torch.testing.assert_close(score[None], alone, rtol=1e-5, atol=1e-5)
    assert not any(weight.requires_grad for weight in reward.models[0].parameters())


def test_an_ensemble_is_combined_by_hand_computed_numbers():
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert combined(scores, "min").tolist() == [1, 2]
    assert combined(scores, "mean").tolist() == [2, 2]
    assert combined(scores, "mean-std").tolist() == [1, 2]       # deviations of 1 and of 0
    assert combined(scores[:, :1], "mean-std").tolist() == [1, 2]    # one model agrees with itself


@pytest.mark.parametrize("combine", ["min", "mean", "mean-std"])
def test_an_ensemble_never_scores_above_its_mean(models, combine):
    mean = torch.stack([scores_of(f"rm{i}") for i in range(3)]).mean(0)
    assert (scores_of("rm0,rm1,rm2", combine) <= mean + 1e-6).all()


def test_weights_make_a_sum_of_different_signals(models):
    found = scores_of("0.7*rm0,0.3*rm1")
    torch.testing.assert_close(found, 0.7 * scores_of("rm0") + 0.3 * scores_of("rm1"))
    with pytest.raises(ValueError, match="--combine mean: weights make a sum of 0.7"):
        scores_of("0.7*rm0,0.3*rm1", "mean")


def test_a_response_without_an_end_gets_the_fixed_score(models):
    reward = reward_of("rm0")
    x = [TOKENIZER.prompt(prompt["messages"]) for prompt in ASKED]
    y = ids_of("yes", "it is", "no")
    y[1] = y[1][:-1]
    scores, ended = score_responses(reward, ASKED, x, y, END, -7.0)
    assert ended.tolist() == [True, False, True] and scores[1] == -7
    assert torch.equal(scores[[0, 2]], reward(ASKED, x, y)[[0, 2]])


# ---------------------------------------------------------------------- known truths

def test_the_world_scores_as_its_judge():
    asked = read_prompts("world", n=20, split="train")
    texts = [row["example"]["response"] for row in asked]
    y = [[*TOKENIZER.encode(text), END] for text in texts]
    truth = [true_reward(row["example"], text)["total"] for row, text in zip(asked, texts)]
    found = reward_of("world")(asked, [[]] * 20, y)
    torch.testing.assert_close(found, torch.tensor(truth))
    assert 0 < min(truth) < max(truth) <= 1


@pytest.mark.parametrize("text, number", [
    ("6 + 6 = 12. The answer is 12.", 12), ("He has 3. #### 1,200", 1200), ("#### -4", -4),
    ("3.5", 3.5), ("the answer is $7, of 9", 7), ("first 1, then 2", 2), ("none", None)])
def test_the_final_number_of_an_answer_is_found(text, number):
    assert number_in(text) == number


def test_a_right_number_counts_most_and_its_form_a_little():
    texts = ["The answer is 12.", "#### 1200", "Perhaps 3.5"]
    assert rewards.right_numbers(ASKED, texts) == [1.0, 1.0, 0.9]
    assert rewards.right_numbers(ASKED, ["#### 13", "1201", "who knows"]) == [0.1, 0.0, 0.0]


def test_the_worlds_sums_are_verified_by_their_keys():
    asked = read_prompts("world", n=30, split="train", families=("arithmetic",))
    texts = [f"The answer is {row['answer']}." for row in asked]
    assert rewards.right_numbers(asked, texts) == [1.0] * 30


# ---------------------------------------------------------------------- your own function

TASTE = """
def short(prompts, answers):
    assert all(turns[-1]["role"] == "user" for turns in prompts)
    return [-len(answer.split()) for answer in answers]
def few(prompts, answers): return [1.0]
def lost(prompts, answers): return [float("nan")] * len(answers)
def broken(prompts, answers): return 1 / 0
def worded(prompts, answers): return ["good"] * len(answers)
"""


@pytest.fixture
def taste(tmp_path, monkeypatch):
    (tmp_path / "own_taste.py").write_text(TASTE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield
    sys.modules.pop("own_taste", None)


def test_a_function_of_ones_own_gets_conversations_and_texts(taste):
    assert scores_of("own_taste:short").tolist() == [-1, -3, -2]
    assert scores_of("2*own_taste:short").tolist() == [-2, -6, -4]


@pytest.mark.parametrize("function, message", [
    ("few", "own_taste:few returned 1 numbers for 3 answers; it must return one for each"),
    ("lost", "own_taste:lost returned nan for the answer 'yes'; it must be a finite number"),
    ("broken", "own_taste:broken failed on 3 answers: ZeroDivisionError: division by zero"),
    ("worded", "own_taste:worded failed on 3 answers: ValueError: could not convert")])
def test_what_a_function_does_wrong_is_named(taste, function, message):
    with pytest.raises(ValueError, match=message):
        scores_of(f"own_taste:{function}")


# ---------------------------------------------------------------------- refused

@pytest.mark.parametrize("spec, message", [
    ("nowhere", "--reward nowhere: there is no such folder; give an --out of train_rm.py, world"),
    ("rm0,nowhere", "--reward nowhere: there is no such folder"),
    ("0.5*rm0,rm1", "some terms have a weight and some none"),
    ("half*rm0", "the weight 'half' is no number; write 0.7\\*out/safe"),
    ("nan*rm0", "the weight nan is not finite"),
    ("lm", "lm: this is a language model; give a reward model"),
    ("no_such_module:f", "--reward no_such_module:f: No module named 'no_such_module'"),
    ("math:no_such_function", "--reward math:no_such_function: .*no attribute"),
    ("math:", "--reward math:: ")])
def test_what_is_no_reward_is_refused_by_name(models, spec, message):
    with pytest.raises(ValueError, match=message):
        reward_of(spec)


def test_a_reward_model_with_another_tokenizer_is_refused(models):
    other = Tokenizer.train(["a bear, a bear, a bear"], TOKENIZER.vocab_size + 4)
    with pytest.raises(ValueError, match="--reward rm0: its tokenizer is not that of --init"):
        reward_of("rm0", tokenizer=other)


@pytest.mark.parametrize("spec, message", [
    ("world", "--reward world: rows.jsonl:0 has no answer key; give --prompts world"),
    ("gsm8k", "--reward gsm8k: the answer of rows.jsonl:7 has no number")])
def test_prompts_that_cannot_be_judged_are_named(spec, message):
    asked = ASKED if spec == "world" else [ASKED[0], ASKED[0] | {"answer": "", "where":
                                                                 "rows.jsonl:7"}]
    with pytest.raises(ValueError, match=message):
        reward_of(spec)(asked, [[]] * len(asked), ids_of(*["12"] * len(asked)))


def test_every_score_is_finite(models):
    assert all(math.isfinite(score) for score in scores_of("rm0,rm1,rm2", "mean-std"))
