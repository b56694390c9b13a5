"""synthesize.py and sample.best_of_n: the best of N answers by a reward, as data for stages."""
import json
import math

import pytest
import torch
from tiny import END, TOKENIZER, ending_model, folder_of, tiny_model, write_rows

import readers
import sample
import synthesize
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
