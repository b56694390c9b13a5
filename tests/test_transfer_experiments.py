"""experiments/leave_one_cluster_out.py, breadth.py, t0_transfer.py, few_shot.py, think_aloud.py:
what they read, gains and figures by hand."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TOKENIZER, tiny_model, write_rows

import train_sft
from experiments import base, breadth, few_shot, t0_transfer, think_aloud
from experiments import leave_one_cluster_out as leave
from experiments.base import asked_alone, write_families
from plumbing.folders import save_model
from plumbing.options import build
from world import talk
from world.tasks import FAMILIES
from world.world import World

CLUSTERS = sorted({cluster for cluster, _ in FAMILIES.values()})


@pytest.mark.parametrize("experiment", [breadth, leave])
def test_experiments_name_options_that_train_sft_has(experiment):
    assert build(train_sft.Config, dict(experiment.SFT)).steps >= 200


# ---------------------------------------------------------------------- leave_one_cluster_out.py

@pytest.mark.parametrize("cluster", CLUSTERS)
def test_no_row_of_a_cluster_that_is_left_out_is_trained_on(tmp_path, cluster):
    families = leave.all_without(leave.families_of(cluster))
    file = write_families(tmp_path / "others.jsonl", 0, families, 400)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 400
    # in no other cluster than that of conversations a row shows another task than its own
    assert all(len(row["messages"]) == 2 for row in rows if row["task"] != "talk")
    assert {row["task"] for row in rows} == {*CLUSTERS} - {cluster}


def test_the_earlier_turns_of_a_followup_show_the_families_that_are_said(monkeypatch):
    asked = set()
    real = talk.exchange

    def exchange(rng, ask, slots, answer):
        asked.add(ask.split(".")[0])
        return real(rng, ask, slots, answer)

    monkeypatch.setattr(talk, "exchange", exchange)
    World().examples(200, families=("followup",))
    assert asked - {"followup"} == {*leave.SHOWS["followup"]}
    for family in leave.SHOWS["followup"]:
        assert "followup" not in leave.all_without((family,))


def test_a_run_is_examined_in_no_family_that_it_trains_on():
    runs = leave.runs_for(CLUSTERS)
    trained, _ = runs.pop("everything")
    assert {*trained} == {*FAMILIES}
    assert all(not {*trained} & {*examined} for trained, examined in runs.values())
    # nine clusters, 17 families that have others in their cluster, three clusters alone, the parts
    assert len(runs) == 9 + 17 + 3 + len(leave.PARTS)


@pytest.mark.parametrize("part", leave.PARTS)
def test_a_part_that_is_left_out_is_asked_for_and_never_trained_on(part, tmp_path):
    family, is_of = leave.PARTS[part]
    asked_for = leave.tasks_of(part, 0, 20)
    assert len(asked_for) == 20 and all(is_of(task) for task in asked_for)
    runs = leave.runs_for([FAMILIES[family][0]])
    families, examined = runs[f"without part {part}"]
    assert family in families
    assert ("followup" in families) == (family not in leave.SHOWS["followup"])
    assert examined == (part,)
    stays = leave.rows_without(part)
    rows = [{"example": example} for example in World(0).examples(300, families=families)]
    left = [row["example"] for row in rows if stays(row) and row["example"]["family"] == family]
    # the rest of its family is still taught
    assert left and not any(is_of(example) for example in left)
    assert sum(map(stays, rows)) > 250


def test_no_question_about_a_stranger_is_trained_on_where_facts_are_left_out():
    runs = leave.runs_for(["knowledge"])
    for run in ("without part labelled facts", "without family facts"):
        families, _ = runs[run]
        assert "unanswerable" not in families
    families, _ = runs["without family unanswerable"]
    assert "facts" in families


@pytest.mark.parametrize("part", ["two facts", "labelled facts"])
def test_an_answer_to_half_of_what_was_asked_is_right_and_not_whole(part, monkeypatch):
    monkeypatch.setattr(base, "load_model", lambda *_: (None, None))

    def share(judged):
        return base.rights("", 0, (part,), 20, lambda *of: texts(of[-1]), leave.tasks_of, judged)

    def texts(tasks):
        return [f"That would be {task['answer']}." for task in tasks]

    assert share(("right",)) == {part: 1.0}
    assert share(leave.JUDGED) == {part: 0.0}


def test_a_gain_is_above_the_best_model_of_another_cluster_in_each_seed():
    found = {"base": [{"json": 0.1}, {"json": 0.0}],
             "only words": [{"json": 0.0}, {"json": 0.3}],
             "only reading": [{"json": 0.2}, {"json": 0.2}],
             "only reasoning": [{"json": 0.0}, {"json": 0.0}],
             "without cluster format": [{"json": 0.5}, {"json": 0.4}]}
    assert leave.gains(found, "json", "cluster") == pytest.approx([0.3, 0.1])
    assert leave.gains(found, "json", "family") == []
    assert leave.gaining(found, ["format"], "cluster", max) == ["format"]
    assert leave.gaining(found, ["format"], "cluster", min) == []
    # 20 points on average, in one cluster where five are asked for
    first, _, line = leave.verdict(found, ["format"])
    assert "Of whole families: in 1 of 1, NOT shown. Of families or parts: in 1 of 1," in first
    assert line == "- cluster left out: format; in every seed: none"


def test_where_parts_alone_are_left_out_it_is_parts_that_gain():
    found = {"base": [{"place first": 0.0}], "only words": [{"place first": 0.0}],
             "only reading": [{"place first": 0.1}], "only reasoning": [{"place first": 0.0}],
             "without part place first": [{"place first": 0.6}]}
    first, _, line = leave.verdict(found, ["format", "words"])
    assert "to be 15 points above" in first and "whole" not in first
    assert first.endswith("Of parts of families: in 1 of 2, NOT shown.")
    assert line == "- part left out: format; in every seed: format"


def test_only_what_can_be_left_out_is():
    with pytest.raises(ValueError, match="'clusters' is none of cluster, family, part"):
        leave.main(leave.Config(ways="part,clusters"))


def test_a_family_is_not_compared_with_a_model_of_its_own_cluster():
    found = {"base": [{"colour": 0.0}], "only words": [{"colour": 0.1}],
             "only reasoning": [{"colour": 0.0}], "without family colour": [{"colour": 0.6}]}
    assert leave.gains(found, "colour", "family") == pytest.approx([0.5])


def test_a_task_is_asked_alone_unless_it_refers_to_what_was_before():
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello!"},
             {"role": "user", "content": "What is 1 + 2 + 3?"}]
    assert asked_alone({"family": "arithmetic", "prompt": turns})["prompt"] == turns[-1]["content"]
    assert asked_alone({"family": "followup", "prompt": turns})["prompt"] == turns
    assert asked_alone({"family": "arithmetic", "prompt": "How?"})["prompt"] == "How?"


# ---------------------------------------------------------------------- breadth.py

def test_a_smaller_choice_of_families_lies_in_a_larger_one_and_none_is_examined_as_unseen():
    for seed in range(3):
        for order in range(3):
            choices = [breadth.drawn(seed, order, size) for size in breadth.SIZES]
            assert [len({*choice}) for choice in choices] == list(breadth.SIZES)
            for smaller, larger in zip(choices, choices[1:]):
                assert {*smaller} < {*larger}
            assert not {*choices[-1]} & {*breadth.UNSEEN}
    assert len({breadth.drawn(seed, order, 4) for seed in range(3) for order in range(3)}) == 9
    # nor do the earlier turns of a followup answer them
    assert not {*leave.SHOWS["followup"]} & {*breadth.UNSEEN}


# ---------------------------------------------------------------------- t0_transfer.py

def test_rows_of_a_file_go_by_their_cluster_the_largest_first(tmp_path):
    file = tmp_path / "tasks.jsonl"
    rows = [{"cluster": cluster, "prompt": "How?", "response": "So."} for cluster in "abbccc"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = t0_transfer.lines_by_cluster(str(file))
    assert {cluster: len(its) for cluster, its in lines.items()} == {"c": 3, "b": 2, "a": 1}
    assert list(lines) == ["c", "b", "a"]


@pytest.mark.parametrize("rows, complaint", [
    ([{"prompt": "How?", "response": "So."}], r'tasks.jsonl:1: "cluster" is None'),
    ([{"cluster": "a"}, {"cluster": "b"}], "2 clusters; three are needed")])
def test_a_file_without_clusters_is_refused(tmp_path, rows, complaint):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=complaint):
        t0_transfer.lines_by_cluster(str(file))


def test_rows_that_fit_are_asked_and_others_are_not(tmp_path):
    long = "How? " * t0_transfer.LORA["context_length"]
    file = Path(write_rows(tmp_path / "rows.jsonl", [{"prompt": "How?", "response": "So."},
                                                     {"prompt": long, "response": "So."}]))
    [row] = t0_transfer.asked_rows(file, 2, TOKENIZER)
    assert row.answer == "So." and TOKENIZER.decode(row.prompts[0]).strip() == "How?"
    with pytest.raises(ValueError, match="of 1 rows none has at most"):
        t0_transfer.asked_rows(Path(write_rows(file, [{"prompt": long, "response": "So."}])), 1,
                               TOKENIZER)


def test_right_answers_are_told_where_answers_are_short(tmp_path):
    save_model(tmp_path / "model", tiny_model(context_length=384), TOKENIZER)
    found = {}
    for name, answer in (("short", "So."), ("long", "So it goes. " * 20)):
        file = write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "How?", "response": answer}])
        found[name] = t0_transfer.examine(tmp_path / "model", Path(file), 1)
    assert found["short"].keys() - found["long"].keys() == {"right"}
    assert found["long"]["loss"] > 0


def test_each_cluster_is_asked_of_models_that_never_saw_it(tmp_path, monkeypatch):
    save_model(tmp_path / "model", tiny_model(context_length=384), TOKENIZER)
    # "base" is a cluster here, and no other's figures are taken for its own
    rows = [{"cluster": cluster, "prompt": f"How {i}?", "response": f"So {cluster} {i}."}
            for cluster, n in (("base", 12), ("b", 10), ("c", 8)) for i in range(n)]
    monkeypatch.setattr(t0_transfer, "LORA", t0_transfer.LORA | {"steps": 3, "warmup": 1})
    cfg = t0_transfer.Config(init=str(tmp_path / "model"), out=str(tmp_path / "out"), n=4,
                             data=write_rows(tmp_path / "rows.jsonl", rows), quick=True,
                             figure=str(tmp_path / "t0.png"))
    t0_transfer.main(cfg)
    out = tmp_path / "out" / "0_quick"
    trained = {name: (out / f"{name}.jsonl").read_text() for name in ("without_0", "without_1")}
    assert "So base" not in trained["without_0"] and "So b " not in trained["without_1"]
    assert {file.name for file in out.glob("0_by_*")} == {
        "0_by_model.json", "0_by_only_1.json", "0_by_without_0.json"}
    assert (tmp_path / "t0.md").read_text().count("| base |") == 1


def test_a_cluster_left_out_is_compared_with_the_best_model_of_another():
    of_models = {"base": {"loss": 5.0, "right": 0.1}, "others": {"loss": 2.0, "right": 0.5},
                 "a": {"loss": 2.5, "right": 0.3}, "b": {"loss": 3.0, "right": 0.4}}
    assert t0_transfer.compared(of_models, "loss") == (5.0, 2.5, 2.0)
    assert t0_transfer.compared(of_models, "right") == (0.1, 0.4, 0.5)
    assert t0_transfer.gain(of_models) == pytest.approx(0.1)
    # what the base knows already is no gain of training
    of_models["base"]["right"] = 0.6
    assert t0_transfer.gain(of_models) == pytest.approx(-0.1)


# ---------------------------------------------------------------------- few_shot.py

def letters(n: int) -> list[dict]:
    return [{"cluster": "letters", "task": f"task {i % 2}", "prompt": f"say {i}",
             "response": f"{i}!"} for i in range(n)]


@pytest.fixture
def shown(tmp_path):
    """Its config, and rows of a file of two tasks."""
    cfg = few_shot.Config(data=write_rows(tmp_path / "rows.jsonl", letters(40)), n=8, longest=250)
    clusters = few_shot.rows_by_task(cfg.data)
    return cfg, few_shot.draw_rows(clusters["letters"], TOKENIZER, cfg)


def test_examples_are_of_the_rows_own_task_and_never_the_row_itself(shown):
    cfg, _ = shown
    clusters = few_shot.rows_by_task(cfg.data)
    as_turns = SimpleNamespace(prompt=lambda turns: turns)
    rows = few_shot.draw_rows(clusters["letters"], as_turns, cfg)
    assert len(rows) == 8
    for row in rows:
        for k, turns in row.prompts.items():
            said = [turn["content"] for turn in turns]
            assert len(said) == 2 * k + 1
            assert said[-1] == f"say {row.answer[:-1]}" and said[-1] not in said[:-1]
            assert {int(text[4:]) % 2 for text in said[::2]} == {int(row.answer[:-1]) % 2}


def test_the_loss_behind_examples_is_that_of_the_answer_alone(shown):
    _, rows = shown
    model = tiny_model(context_length=256).eval()
    for k in (0, 2):
        nats = tokens = 0
        for row in rows:
            answer = [*TOKENIZER.encode(row.answer), TOKENIZER.end]
            ids = torch.tensor([row.prompts[k] + answer])
            with torch.no_grad():
                logps = model.logps(ids[:, :-1], ids[:, 1:])[0]
            nats -= float(logps[-len(answer):].sum())
            tokens += len(answer)
        found = few_shot.answer_loss(model, TOKENIZER, rows, k)
        assert found == pytest.approx(nats / tokens, rel=1e-5)


def test_tasks_whose_examples_give_the_answer_away_are_left_out():
    constant = [{"response": "Business"}, {"response": "business."}, {"response": "Sports"}]
    even = [{"response": "yes"}, {"response": "No"}]
    assert few_shot.varied({"constant": constant, "even": even}) == {"even": even}


def test_a_row_without_a_task_is_named(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [letters(1)[0] | {"task": ""}])
    with pytest.raises(ValueError, match='rows.jsonl:1: "task" is \'\'; it must be a text'):
        few_shot.rows_by_task(file)


def test_case_and_marks_at_the_ends_make_no_answer_wrong():
    assert few_shot.plain(' "Yes." \n') == few_shot.plain("yes")
    assert few_shot.plain("not yes") != few_shot.plain("yes")


# ---------------------------------------------------------------------- think_aloud.py

@pytest.mark.parametrize("text, right, steps, bare", [
    ("3 * 4 = 12. So 12 apples.", True, True, False), ("$12.", True, False, True),
    ("1,012", False, False, True), ("Twelve.", False, False, False), ("", False, False, False)])
def test_an_answer_is_right_by_its_last_number_alone(text, right, steps, bare):
    found = think_aloud.figures_of({"answer": "4 each: 3 * 4 = 12 #### 12"}, text)
    assert found == {"right": right, "steps": steps, "bare": bare}


def test_every_model_is_asked_the_same_questions_with_and_without_a_sentence(tmp_path):
    for name in ("one", "two"):
        save_model(tmp_path / name, tiny_model(context_length=256), TOKENIZER, stage="sft")
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    folders = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    cfg = think_aloud.Config(init=folders, data=write_rows(tmp_path / "rows.jsonl", rows),
                             max_new_tokens=4, quick=True, figure=str(tmp_path / "seen.png"))
    think_aloud.main(cfg)
    table = (tmp_path / "seen.md").read_text()
    assert table.count(f"| {tmp_path / 'one'} |") == table.count(f"| {tmp_path / 'two'} |") == 3
    assert "to 8 problems" in table and (tmp_path / "seen.png").exists()


def test_a_problem_without_a_number_is_refused_with_its_line(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "Who?", "answer": "nobody"}]
    cfg = think_aloud.Config(data=write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match="rows.jsonl:2: no number in its answer"):
        think_aloud.main(cfg)
