"""
synthesize.py and sample.best_of_n: the best of N answers by a reward, chains before known answers,
as data for stages.
"""
import json
import math
from collections import Counter

import pytest
import torch
from tiny import END, TOKENIZER, ending_model, folder_of, tiny_model, write_rows

import readers
import sample
import synthesize
import train_sft
from plumbing.options import build
from scoring import best_of_n_kl, best_of_n_kl_of

ASKED = [{"messages": [{"role": "user", "content": text}], "answer": "", "example": {},
          "where": text} for text in ("a", "bcd", "ef")]


def length(prompts, x, y) -> torch.Tensor:
    return torch.tensor([float(len(ids)) for ids in y])


def test_the_best_answer_is_the_one_with_the_highest_reward():
    model = ending_model()
    ids = [TOKENIZER.prompt(row["messages"]) for row in ASKED]

    def seeded():
        return torch.Generator().manual_seed(3)
    answers, scores = sample.sample_and_score(model, TOKENIZER, ASKED, ids, 5, length, 9,
                                              generator=seeded())
    assert scores.shape == (3, 5) and len(answers) == 15
    for answer, score in zip(answers, scores.flatten().tolist()):
        # of 9 tokens at most; those that are cut off there have the score of no answer
        assert score == (len(answer) if answer[-1] == TOKENIZER.end else -1)
    best = sample.best_of_n(model, TOKENIZER, ASKED, 5, length, 9, generator=seeded())
    for row in range(3):
        group = answers[5 * row:5 * row + 5]
        place = scores[row].argmax().item()
        has_ended = group[place][-1] == TOKENIZER.end
        assert best[row] == (TOKENIZER.decode(group[place]) if has_ended else "")


@pytest.mark.parametrize("n, kl", [(1, 0), (2, math.log(2) - 0.5), (16, math.log(16) - 15 / 16)])
def test_the_kl_of_best_of_n(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl)


def test_the_kl_of_best_of_n_is_what_drawing_it_gives():
    """1,000 equally likely answers of different scores: p(best of n is k) is known exactly."""
    k = torch.arange(1, 1001, dtype=torch.float64)
    for n in (2, 8):
        p = (k / 1000) ** n - ((k - 1) / 1000) ** n
        kl = (p * (p * 1000).log()).sum().item()
        assert kl == pytest.approx(best_of_n_kl(n), abs=0.01) and kl <= best_of_n_kl(n)
        # and counted: each of a thousand answers was drawn once
        assert best_of_n_kl_of([1] * 1000, n) == pytest.approx(kl, abs=1e-9)
    # two answers of which the better is drawn half of the time: the best of 2 is it in 3 of 4
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert best_of_n_kl_of([3, 3], 2) == pytest.approx(by_hand)
    assert best_of_n_kl_of([6], 4) == 0                        # only one answer: nothing to choose
    # with ties it is less: three answers
    p = (k[:3] / 3) ** 8 - ((k[:3] - 1) / 3) ** 8
    assert (p * (p * 3).log()).sum().item() < best_of_n_kl(8) - 0.1


@pytest.fixture
def config(tmp_path, monkeypatch):
    folder_of(ending_model(), tmp_path / "sft")
    folder_of(tiny_model(4, head="scalar"), tmp_path / "rm")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i}{'?' * (i % 7)}"} for i in range(90)])
    monkeypatch.chdir(tmp_path)

    def made(**changes):
        return build(synthesize.Config, {
            "init": "sft", "reward": "rm", "prompts": "prompts.jsonl", "n": 4, "device": "cpu",
            "max_new_tokens": 6, "dtype": "float32"} | changes)
    return made


def test_the_best_answers_are_examples_for_fine_tuning(config, tmp_path):
    written = synthesize.main(config())
    examples = readers.read_examples(tmp_path / "best.jsonl")
    assert len(examples) == len(written) > 30
    assert examples[0]["messages"][-1] == {"role": "assistant", "content": written[0]["response"]}
    worse = synthesize.main(config(n=2, out="two.jsonl"))
    mean = [sum(row["score"] for row in rows) / len(rows) for rows in (worse, written)]
    assert mean[1] > mean[0]                                   # more to choose from


def test_an_answer_that_was_cut_off_is_no_example(config):
    # the only token of an answer is its end, or the answer has none
    with pytest.raises(ValueError, match="no answer is worth keeping: all are empty, cut off"):
        synthesize.main(config(max_new_tokens=1))


def test_best_and_worst_are_pairs_for_dpo(config, tmp_path):
    synthesize.main(config(method="pairs", out="pairs.jsonl"))
    assert len(readers.read_preferences(tmp_path / "pairs.jsonl")) > 30


@pytest.mark.parametrize("changes, message", [
    ({"n": 1}, "--n 1: give a number >= 2"), ({"method": "evol"}, "--method evol: give best_of_n"),
    ({"out": "prompts.jsonl"}, "--out prompts.jsonl is there already"),
    ({"out": "lost/x.jsonl"}, "there is no folder lost"),
    ({"reward": "nowhere"}, "--reward nowhere: there is no such folder"),
    ({"max_new_tokens": 60}, r"prompts.jsonl:\d+: .*--truncate left")])
def test_what_cannot_work_writes_nothing(config, tmp_path, changes, message):
    before = (tmp_path / "prompts.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        synthesize.main(config(**changes))
    assert not (tmp_path / "best.jsonl").exists()
    assert (tmp_path / "prompts.jsonl").read_bytes() == before


def test_an_answer_that_says_nothing_is_no_example(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *args, group, **options: [[END]] * 4 * 64)
    monkeypatch.setattr(synthesize.Reward, "__call__", lambda self, prompts, x, y: torch.zeros(256))
    with pytest.raises(ValueError, match="no answer is worth keeping: all are empty"):
        synthesize.main(config(n_prompts=64))
    assert json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["prompt"] == "0"


# ---------------------------------------------------------------------- chains

GSM8K = [{"question": f"What is {a} and {a}?", "answer": f"{a} + {a} = {2 * a}.\n#### {2 * a}"}
         for a in range(1, 60)]


@pytest.mark.parametrize("text, chain, final", [
    ("7 + 5 = 12. 12 - 3 = 9. The answer is 9. Bye, 2 bears.", "7 + 5 = 12. 12 - 3 = 9.",
     "The answer is 9."),
    ("It is 6 + 6, or\n<<6+6=12>>12.\n#### 12", "It is 6 + 6, or\n<<6+6=12>>12.", "#### 12"),
    ("2 + 2 = 4. So the answer is $1,200.50", "2 + 2 = 4.", "So the answer is $1,200.50"),
    ("3 + 4 = 6. The answer is 6. No: 3 + 4 = 7. The answer is 7.",
     "3 + 4 = 6. The answer is 6. No: 3 + 4 = 7.", "The answer is 7."),
    ("Of course! The answer is 9.", "", "The answer is 9."), ("7 + 5 = 12.", "", ""), ("", "", "")])
def test_an_answer_is_a_chain_and_what_it_comes_to(text, chain, final):
    assert synthesize.parts_of(text) == (chain, final)


def test_the_first_right_answer_with_a_chain_is_kept_and_all_are_counted():
    counts = Counter()
    texts = [None, "The answer is 9.", "12 - 4 = 8. The answer is 8.", "12 - 3 = 9. #### 9.0",
             "9 + 0 = 9. The answer is 9.", "It is a frog."]
    question = {"messages": "x", "known": 9.0}
    row = synthesize.first_right(question, texts, counts)
    assert row == {"prompt": "x", "response": "#### 9.0", "chain": "12 - 3 = 9."}
    assert counts == {"cut off": 1, "bare": 2, "wrong": 1, "right": 2}
    assert synthesize.first_right(question, texts[:3], counts) is None


def answering(monkeypatch, answer):
    """The model answers with answer(prompt's ids), and the prompts that it is given are returned,
    as text."""
    asked = []

    def generate(model, prompts, *arguments, group, **options):
        asked.extend(TOKENIZER.decode(ids) for ids in prompts)
        return [answer(ids) for ids in prompts for _ in range(group)]
    monkeypatch.setattr(sample, "generate", generate)
    return asked


def doubled(ids: list[int]) -> list[int]:
    """The right answer to the last question of GSM8K that stands in a prompt, but for 13."""
    a = int(TOKENIZER.decode(ids).rsplit(" and ", 1)[1].rstrip("?"))
    result = 0 if a == 13 else 2 * a
    return [*TOKENIZER.encode(f"I add {a}. The answer is {result}."), END]


@pytest.fixture
def chains(config, tmp_path):
    folder_of(tiny_model(context_length=256), tmp_path / "long")
    write_rows(tmp_path / "gsm8k.jsonl", GSM8K)

    def made(**changes):
        return config(**{"method": "chains", "reward": "out/rm", "prompts": "gsm8k.jsonl",
                         "max_new_tokens": 40, "n": 2, "init": "long"} | changes)
    return made


def test_chains_that_come_to_the_known_answer_are_examples_for_fine_tuning(chains, tmp_path,
                                                                           monkeypatch, capsys):
    asked = answering(monkeypatch, doubled)
    written = synthesize.main(chains(shots=3))
    n_questions = len(asked)
    assert len(written) == n_questions - 1                     # 13 is answered wrongly
    assert (f"{n_questions - 1} of {n_questions} questions are in best.jsonl; of "
            f"{2 * n_questions} answers {2 * n_questions - 2} are right, 2 wrong, 0 without a "
            "chain, 0 cut off; before each question 3 to 3 examples (--shots 3)"
            ) in capsys.readouterr().out
    # the same three before each, answered as they are in the file, and no example is a question
    beginnings = {text.rsplit("What", 1)[0] for text in asked}
    assert len(beginnings) == 1
    assert all(text.count("=") == 3 and text.count("####") == 3 for text in asked)
    rows = readers.read_examples(tmp_path / "best.jsonl")
    train_sft.mix_chains(rows, 1.0, 0)
    _, answer = rows[0]["messages"]
    assert answer["content"] == f"{written[0]['chain']} {written[0]['response']}"
    assert answer["content"].startswith("I add ")
    rows = readers.read_examples(tmp_path / "best.jsonl")
    train_sft.mix_chains(rows, 0.0, 0)
    assert rows[0]["messages"][1]["content"] == written[0]["response"]


def test_as_many_examples_as_fit_stand_before_a_question(chains, monkeypatch, capsys):
    asked = answering(monkeypatch, doubled)
    synthesize.main(chains(shots=9))
    assert "before each question 5 to 5 examples (--shots 9)" in capsys.readouterr().out
    # an example has 37 bytes and roles, later ones up to 43, a question 18 to 20: of the 256 less
    # 40 for the answer five take 185 and more, six would take 222
    assert all(text.count("####") == 5 for text in asked)
    with pytest.raises(ValueError, match=r"gsm8k.jsonl:\d+: .*--truncate left"):
        synthesize.main(chains(max_new_tokens=220, out="none.jsonl"))


def test_a_base_model_goes_on_with_a_text(chains, monkeypatch):
    monkeypatch.setattr(sample, "is_base", lambda folder: True)
    more = TOKENIZER.encode(" And 1 and 1? The answer is 2.")
    asked = answering(monkeypatch, lambda ids: doubled(ids)[:-1] + more)
    written = synthesize.main(chains(shots=2))
    assert len(written) == len(asked) - 1                      # the first final answer counts
    first, second, question = asked[0].split("\n\n")
    assert (first, second) == ("What is 1 and 1? 1 + 1 = 2. #### 2",
                               "What is 2 and 2? 2 + 2 = 4. #### 4")
    assert question.startswith("What is ") and question.endswith("?")


@pytest.mark.parametrize("text, found", [
    ("6 + 6 = 12. The answer is 12. What", "6 + 6 = 12. The answer is 12."),
    ("6 + 6 = 12. The answer is 1", None), ("6 + 6 =", None), ("A frog.\n\nWhat", "A frog."),
    ("A frog.\n\n2 + 2 = 4. The answer is 4.", "A frog.")])
def test_a_base_models_answer_ends_with_the_final_number_or_the_paragraph(text, found):
    assert synthesize.ended_text(TOKENIZER, TOKENIZER.encode(text), True) == found


@pytest.mark.parametrize("is_text", [True, False])
def test_an_answer_ends_with_its_end(is_text):
    ids = [*TOKENIZER.encode("A frog"), END]
    assert synthesize.ended_text(TOKENIZER, ids, is_text) == "A frog"
    assert synthesize.ended_text(TOKENIZER, ids[:-1], is_text) is None


def test_the_worlds_sums_have_chains_and_known_answers(chains):
    examples, questions = synthesize.worked_examples(chains(prompts="world:3", shots=2,
                                                            n_prompts=20))
    assert len(examples) == 2 and len(questions) == 20
    for *_, answer in examples:
        chain, final = synthesize.parts_of(answer["content"])
        assert chain.count("=") == 2 and final.startswith("The answer is ")
        assert answer["content"] == f"{chain} {final}"         # without manners


@pytest.mark.parametrize("changes, message", [
    ({"reward": "rm"}, "--reward rm: only best_of_n, pairs would read it"),
    ({"combine": "mean"}, "--combine mean: only best_of_n, pairs would read it"),
    ({"no_end_score": 0.0}, "--no_end_score 0.0: only best_of_n, pairs would"),
    ({"method": "pairs", "reward": "rm", "shots": 2}, "--shots 2: only chains would read it"),
    ({"shots": 0}, "--shots 0: give a number >= 1"),
    ({"prompts": "bare.jsonl"}, "of 7 rows 0 can be worked examples, and 7 are left"),
    ({"prompts": "frogs.jsonl"}, r"frogs.jsonl:\d+: its answer has no number by which")])
def test_what_chains_cannot_be_made_of_is_refused(chains, tmp_path, changes, message):
    write_rows(tmp_path / "bare.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"}
                                         for i in range(9)])
    write_rows(tmp_path / "frogs.jsonl", [{"question": f"{i}?", "answer": "A frog."}
                                          for i in range(9)])
    with pytest.raises(ValueError, match=message):
        synthesize.main(chains(**changes))
    assert not (tmp_path / "best.jsonl").exists()
