"""compare.py: a person judges two answers; nothing judged is lost, and agreement is Cohen's."""
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from tiny import folder_of, tiny_model, write_rows

import compare
from plumbing import claim
from plumbing.options import build, command_line
from readers import read_preferences

ANSWERS = [{"prompt": f"What is {i} and one?", "chosen": f"It is {i + 1}.",
            "rejected": f"{i} is odd"} for i in range(12)]


def session(monkeypatch, keys, **options):
    """A session in which the person types these keys, one after the other; then Ctrl-D."""
    keys = iter(keys)

    def typed(question):
        key = next(keys, EOFError)
        if isinstance(key, type):
            raise key
        return key
    monkeypatch.setattr(compare, "read_key", typed)
    compare.main(build(compare.Config, {"device": "cpu", "dtype": "float32"} | options))


@pytest.fixture
def at(tmp_path, monkeypatch):
    """The folder of the files answers.jsonl and pairs.jsonl, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("answers.jsonl"), ANSWERS)
    return tmp_path


def judged(monkeypatch, keys, **options):
    """The rows of pairs.jsonl after a session about answers.jsonl."""
    session(monkeypatch, keys, **{"data": "answers.jsonl", "out": "pairs.jsonl"} | options)
    return rows_of("pairs.jsonl")


def rows_of(file):
    file = Path(file)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def screens(capsys):
    """What was shown as the first and as the second answer, pair by pair."""
    shown = []
    for screen in capsys.readouterr().out.split("----")[1:]:
        first, second = [line[3:] for line in screen.splitlines() if line[:2] in ("1:", "2:")]
        shown.append((first, second))
    return shown


# ---------------------------------------------------------------------- what is saved

def test_the_stages_read_what_a_person_chose(at, monkeypatch, capsys):
    judged(monkeypatch, "12" * 6)
    pairs = read_preferences("pairs.jsonl")
    for key, shown, pair in zip("12" * 6, screens(capsys), pairs, strict=True):
        better, worse = shown if key == "1" else shown[::-1]
        assert (pair["chosen"], pair["rejected"]) == (better, worse)
    assert pairs[3]["prompt"] == [{"role": "user", "content": "What is 3 and one?"}]


def test_a_row_says_which_prompt_it_was_and_whose_answer_was_chosen(at, monkeypatch):
    rows = judged(monkeypatch, "12121212")
    for i, row in enumerate(rows):
        assert row["row"] == f"answers.jsonl:{i + 1}"
        assert ANSWERS[i][row["chosen_from"]] == row["chosen"]
        assert ANSWERS[i][row["rejected_from"]] == row["rejected"]
    assert {row["chosen_from"] for row in rows} == {"chosen", "rejected"}


def test_a_tie_is_kept_where_no_stage_takes_it_for_a_pair(at, monkeypatch):
    assert len(judged(monkeypatch, "1=2")) == 2
    assert len(read_preferences("pairs.jsonl")) == 2
    [tie] = rows_of("pairs.jsonl.ties")
    assert {tie["first"], tie["second"]} == {"It is 2.", "1 is odd"}
    assert {tie["first_from"], tie["second_from"]} == {"chosen", "rejected"}
    Path("answers.jsonl").unlink()
    assert len(read_preferences(".")) == 2                     # a folder of judgements
    with pytest.raises(ValueError, match='".ties" files are not read'):
        read_preferences("pairs.jsonl.ties")


def test_axes_are_seen_from_the_chosen_answer(at, monkeypatch):
    """Keys of helpful, harmless, honest, coherent and overall."""
    rows = judged(monkeypatch, "12=11" + "12=12" + "12=1=", axes=True)
    signs = [list(row["axes"].values()) for row in rows + rows_of("pairs.jsonl.ties")]
    assert signs == [[1, -1, 0, 1], [-1, 1, 0, -1], [1, -1, 0, 1]]
    assert list(rows[0]["axes"]) == ["helpful", "harmless", "honest", "coherent"]
    assert len(read_preferences("pairs.jsonl")) == 2


def test_a_pair_left_among_its_axes_is_not_saved(at, monkeypatch):
    assert len(judged(monkeypatch, "11111" + "11q", axes=True)) == 1


def test_each_judgement_is_on_the_disk_before_the_next_question(at, monkeypatch):
    synced = []
    monkeypatch.setattr(claim, "fsync", lambda path: synced.append(path.name))
    keys = iter("1=2")
    counts = []

    def typed(question):
        counts.append(len(rows_of("pairs.jsonl") + rows_of("pairs.jsonl.ties")))
        assert synced.count(at.name) + synced.count("") == counts[-1]
        if counts[-1] == 3:
            raise EOFError
        return next(keys)
    monkeypatch.setattr(compare, "read_key", typed)
    compare.main(build(compare.Config, {"data": "answers.jsonl", "out": "pairs.jsonl"}))
    assert counts == [0, 1, 2, 3]
    assert [name for name in synced if "pairs" in name] == ["pairs.jsonl", "pairs.jsonl.ties",
                                                            "pairs.jsonl"]


# ---------------------------------------------------------------------- sides

def test_sides_hang_on_the_pair_and_the_seed_alone(at, monkeypatch, capsys):
    judged(monkeypatch, "1" * 12)
    whole = screens(capsys)
    judged(monkeypatch, "1" * 5, out="stopped.jsonl")
    stopped = screens(capsys)                                  # the sixth was shown, too
    judged(monkeypatch, "1" * 7, out="stopped.jsonl")
    assert stopped == whole[:6] and screens(capsys) == whole[5:]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ANSWERS]
    judged(monkeypatch, "1" * 12, data=write_rows(Path("swapped.jsonl"), swapped[::-1]),
           out="swapped_pairs.jsonl")
    assert screens(capsys) == whole[::-1]
    judged(monkeypatch, "1" * 12, seed=1, out="other.jsonl")
    assert screens(capsys) != whole


def test_either_side_comes_first_equally_often():
    n = 2000
    first = sum(compare.drawn_order(compare.identity([], [f"{i} a", f"{i} b"]), 0)[0] == f"{i} a"
                for i in range(n))
    assert abs(first - n / 2) < 4 * (n / 4) ** 0.5             # four standard deviations


# ---------------------------------------------------------------------- going on

def test_the_same_command_asks_about_the_rest_only(at, monkeypatch, capsys):
    judged(monkeypatch, "1=")
    assert "2 judgements are saved in pairs.jsonl" in capsys.readouterr().out
    judged(monkeypatch, "2q")
    shown = screens(capsys)
    assert len(shown) == 2 and "It is 3." in shown[0]          # the third pair, and the fourth
    assert len(judged(monkeypatch, "1" * 9)) == 11
    said = capsys.readouterr().out
    assert "All are judged" in said and "neither 1" in said
    judged(monkeypatch, "")
    assert screens(capsys) == []


def test_a_kill_at_any_byte_of_a_row_loses_no_row_before_it(at, monkeypatch, capsys):
    judged(monkeypatch, "12")
    pairs = Path("pairs.jsonl")
    whole = pairs.read_bytes()
    first, last = whole.splitlines(keepends=True)
    for n in range(1, len(last) - 1):
        pairs.write_bytes(first + last[:n])
        assert len(compare.read_judgements(pairs)) == 1
        assert str(last[:n]) in capsys.readouterr().err
        assert compare.half_row(pairs.read_bytes()) == last[:n]
    judged(monkeypatch, "2")
    assert pairs.read_bytes() == whole


def test_a_whole_row_without_its_newline_stays(at, monkeypatch):
    judged(monkeypatch, "12")
    whole = Path("pairs.jsonl").read_bytes()
    Path("pairs.jsonl").write_bytes(whole[:-1])
    assert len(judged(monkeypatch, "1")) == 3
    assert Path("pairs.jsonl").read_bytes().startswith(whole)


FOREIGN = [b"my notes", b'{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n', b"[1]\n",
           b'{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n{"prompt": "H', b"\xff\xfe\n",
           b'{"prompt": "Hi", "first": "a", "second": "b", "first_from": "x", "second_from": "y", '
           b'"axes": {"helpful": "yes"}}\n']


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.ties"])
def test_a_file_of_another_kind_is_refused_and_stays_as_it_is(at, monkeypatch, name, content):
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}:1: "):
        judged(monkeypatch, "1")
    assert Path(name).read_bytes() == content


def test_a_half_row_stays_while_the_ties_are_of_another_kind(at, monkeypatch):
    judged(monkeypatch, "1")
    half = Path("pairs.jsonl").read_bytes() + b'{"prompt": [{"ro'
    Path("pairs.jsonl").write_bytes(half)
    Path("pairs.jsonl.ties").write_text("my notes")
    with pytest.raises(ValueError, match="ties:1: broken JSON"):
        judged(monkeypatch, "1")
    assert Path("pairs.jsonl").read_bytes() == half


# ---------------------------------------------------------------------- the person

def test_the_first_screen_says_how_to_answer_and_how_to_leave(at, monkeypatch, capsys):
    judged(monkeypatch, "q", axes=True)
    screen = capsys.readouterr().out.split("----")[0]
    for said in ("helpful, harmless, honest, coherent, overall", "1 for the first",
                 "2 for the second", "= for neither", "q or Ctrl-D leaves", "pairs.jsonl"):
        assert said in screen


def test_another_key_is_asked_for_again(at, monkeypatch, capsys):
    assert len(judged(monkeypatch, ["x", "", "12", "1"])) == 1
    assert capsys.readouterr().out.count("is none of 1, 2, = and q") == 3


def test_ctrl_c_leaves_with_what_is_saved_and_130(at, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        judged(monkeypatch, ["1", "2", KeyboardInterrupt])
    assert end.value.code == 130 and len(rows_of("pairs.jsonl")) == 2
    assert "2 judgements are saved in pairs.jsonl" in capsys.readouterr().out


def test_keys_come_from_a_pipe_and_its_end_leaves(at, monkeypatch, capsys):
    with open("keys", "w+") as pipe:
        pipe.write(" 1 \nx\n2")
        pipe.seek(0)
        monkeypatch.setattr(sys, "stdin", pipe)
        monkeypatch.setattr(sys, "argv", ["compare.py", "--data", "answers.jsonl", "--out",
                                          "pairs.jsonl"])
        command_line(compare.main, compare.Config, "")
    assert len(rows_of("pairs.jsonl")) == 2
    assert capsys.readouterr().out.endswith("the same command goes on\n")


def test_a_broken_byte_is_no_key(monkeypatch):
    def broken(question):
        return b"\xff".decode()
    monkeypatch.setattr("builtins.input", broken)
    assert compare.read_key("") not in compare.KEYS


WRONG = [({}, "give one of --init .*, --data .* and --agreement"),
         ({"init": "a", "data": "b"}, "give one of"), ({"data": "a", "agreement": "b"}, "give one"),
         ({"data": "answers.jsonl"}, "--out '': give a file that ends in .jsonl"),
         ({"data": "answers.jsonl", "out": "pairs.txt"}, "pairs.txt': give a file that ends"),
         ({"data": "answers.jsonl", "out": "no/pairs.jsonl"}, "there is no folder no"),
         ({"data": "nowhere.jsonl", "out": "pairs.jsonl"}, "nowhere.jsonl: not found"),
         ({"init": "a,b,c", "out": "pairs.jsonl"}, "give one model folder, or two with a comma"),
         ({"init": "nowhere", "out": "pairs.jsonl"}, "nowhere: there is no such folder"),
         ({"agreement": "answers.jsonl,nowhere"}, "answers.jsonl:1: no known fields"),
         ({"agreement": "nowhere,pairs.jsonl"}, "no judgements in 'nowhere'"),
         ({"init": "a", "out": "pairs.jsonl", "n": 0}, "--n 0: give a number >= 1")]


@pytest.mark.parametrize("options, named", WRONG)
def test_bad_options_end_in_a_line_that_names_them(at, monkeypatch, options, named):
    with pytest.raises(ValueError, match=named):
        session(monkeypatch, "1", **options)
    assert [file.name for file in at.iterdir()] == ["answers.jsonl"]


# ---------------------------------------------------------------------- models

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two model folders, and a file of prompts."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"d_model": 16, "n_layers": 1, "context_length": 64}
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Is {i} odd?"} for i in range(8)])
    return (folder_of(tiny_model(**sizes), folder / "sft"),
            folder_of(tiny_model(seed=1, **sizes), folder / "ppo"), str(folder / "prompts.jsonl"))


def sampled(monkeypatch, models, keys, **options):
    """The rows of a session about answers of both models."""
    session(monkeypatch, keys, **{"init": ",".join(models[:2]), "prompts": models[2],
                                  "out": "pairs.jsonl", "max_new_tokens": 4} | options)
    return rows_of("pairs.jsonl")


def test_two_models_are_compared_and_the_score_comes_last(at, monkeypatch, models, capsys):
    rows = sampled(monkeypatch, models, "1212")
    assert {row["chosen_from"] for row in rows} | {row["rejected_from"] for row in rows} \
        == set(models[:2])
    assert "Better:" not in capsys.readouterr().out        # who knows it judges by it
    rows = sampled(monkeypatch, models, "1" * 8)
    n_sft = sum(row["chosen_from"] == models[0] for row in rows)
    assert len(rows) == 8 and f"{models[0]} {n_sft}" in capsys.readouterr().out


def test_a_model_is_compared_with_itself(at, monkeypatch, models):
    rows = sampled(monkeypatch, models, "1" * 8, init=models[0])
    assert len(rows) == 8 and len(read_preferences("pairs.jsonl")) == 8
    assert {row["rejected_from"] for row in rows} == {models[0]}


def test_more_prompts_leave_the_answers_to_the_first_as_they_were(at, monkeypatch, models, capsys):
    sampled(monkeypatch, models, "1" * 3, n=3)
    rows = sampled(monkeypatch, models, "1" * 5, n=8)
    assert len(screens(capsys)) == 8 == len({row["row"] for row in rows})


def test_a_prompt_has_random_numbers_of_its_own_wherever_it_stands(at, monkeypatch, models):
    """Else all answers begin alike, or depend on the prompts before."""
    seeds = {}

    def respond(model, tokenizer, conversations, n, temperature, generator):
        seeds.setdefault(conversations[0][0]["content"], set()).add(generator.initial_seed())
        return ["a"]
    monkeypatch.setattr(compare, "respond", respond)
    for n in (2, 8):
        sampled(monkeypatch, models, "", n=n)
    assert len(seeds) == 8 == len(set.union(*seeds.values()))
    sampled(monkeypatch, models, "", seed=1)
    assert len(set.union(*seeds.values())) == 16


def test_equal_answers_are_skipped_and_counted(at, monkeypatch, models, capsys):
    assert sampled(monkeypatch, models, "", init=models[0], temperature=0) == []
    said = capsys.readouterr().out
    assert "8 pairs were skipped: their answers are equal, or one is empty" in said


def test_what_the_stages_would_refuse_is_not_asked(at, monkeypatch, models, capsys):
    answers = itertools.cycle([[""], ["a"], ["a"], ["b"]])
    monkeypatch.setattr(compare, "respond", lambda *args, **options: next(answers))
    assert len(sampled(monkeypatch, models, "1" * 8)) == 4
    assert "4 pairs were skipped" in capsys.readouterr().out
    assert len(read_preferences("pairs.jsonl")) == 4


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(at, monkeypatch, models, capsys):
    write_rows(Path("prompts.jsonl"), [{"prompt": "a" * 60}, {"prompt": "Hi"}])
    assert len(sampled(monkeypatch, models, "11", prompts="prompts.jsonl")) == 1
    assert "dropped 1 of 2 rows longer than 60 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------- agreement

def slow_kappa(a, b):
    """Chance agreement as the share of equal labels over all n x n couples of items."""
    n = len(a)
    observed = sum(a[i] == b[i] for i in range(n)) / n
    chance = sum(a[i] == b[j] for i in range(n) for j in range(n)) / n / n
    return (observed - chance) / (1 - chance)


def test_kappa_of_a_table_computed_by_hand():
    """Both yes 20, both no 15, yes and no 5, no and yes 10: p_o = 35 / 50 = 0.7, and p_e =
    25/50 30/50 + 25/50 20/50 = 0.5, so kappa = 0.2 / 0.5."""
    a = "y" * 20 + "n" * 15 + "y" * 5 + "n" * 10
    b = "y" * 20 + "n" * 15 + "n" * 5 + "y" * 10
    assert compare.cohen_kappa(a, b) == pytest.approx(0.4)


def test_kappa_is_1_for_perfect_agreement_and_minus_1_for_its_opposite():
    assert compare.cohen_kappa([1, -1, 0, 1], [1, -1, 0, 1]) == 1
    assert compare.cohen_kappa([1, -1] * 5, [-1, 1] * 5) == -1


def test_kappa_is_0_for_independent_judgements():
    a, b = zip(*itertools.product([1, 1, 1, -1, 0], [1, -1, -1, 0, 0, 0]))
    assert compare.cohen_kappa(a, b) == pytest.approx(0, abs=1e-12)
    rng = random.Random(0)
    a, b = [rng.choices([1, -1, 0], [5, 3, 2], k=10_000) for _ in range(2)]
    assert abs(compare.cohen_kappa(a, b)) < 0.04               # four times 1 / sqrt(n)


def test_kappa_is_that_of_the_slow_version():
    rng = random.Random(1)
    for n in range(2, 40):
        a = [1, *rng.choices([1, -1, 0], k=n)]
        b = [-1, *rng.choices([1, -1, 0], k=n)]
        assert compare.cohen_kappa(a, b) == pytest.approx(slow_kappa(a, b))
        assert compare.cohen_kappa(a, b) == compare.cohen_kappa(b, a)


@pytest.mark.parametrize("n", [1, 3, 7, 49])
def test_kappa_of_one_label_for_everything_is_undefined(n):
    assert compare.cohen_kappa([0] * n, [0] * n) is None
    assert compare.cohen_kappa([0] * n, [1] * n) == 0


def agreement_line(files, name):
    [line] = [line for line in compare.agreement(files).splitlines() if line.startswith(name)]
    return line


def keys_for(seed, wanted):
    """The keys by which a person who is shown the sides of this seed chooses "chosen", "rejected"
    or "=" of each pair."""
    keys = []
    for row, better in zip(ANSWERS, wanted):
        prompt = [{"role": "user", "content": row["prompt"]}]
        pair = compare.identity(prompt, [row["chosen"], row["rejected"]])
        shown = compare.drawn_order(pair, seed)
        keys.append("=" if better == "=" else "12"[shown.index(row[better])])
    return keys


def test_people_agree_whichever_sides_they_were_shown(at, monkeypatch):
    wanted = ["chosen", "rejected", "=", "chosen"] * 3
    for seed, name in ((0, "anna.jsonl"), (5, "bert.jsonl")):
        judged(monkeypatch, keys_for(seed, wanted), seed=seed, out=name)
    assert keys_for(0, wanted) != keys_for(5, wanted)
    said = compare.agreement("anna.jsonl,bert.jsonl")
    assert said.startswith("12 pairs in common, of 12 and 12\noverall")
    assert said.endswith("12 pairs   agreed 100.0%   kappa 1.00")


def test_people_who_only_choose_the_first_agree_by_chance(at, monkeypatch):
    for name in ("anna.jsonl", "bert.jsonl"):
        judged(monkeypatch, "1" * 12, out=name)
    assert "kappa undefined" in agreement_line("anna.jsonl,bert.jsonl", "overall")


def test_agreement_is_over_the_pairs_in_common_with_their_ties(at, monkeypatch):
    """Bert stops after 4 of Anna's 12 pairs; they agree about the tie and one other."""
    judged(monkeypatch, keys_for(0, ["chosen", "=", "chosen", "="] * 3), out="anna.jsonl")
    judged(monkeypatch, keys_for(0, ["chosen", "=", "rejected", "chosen"]), out="bert.jsonl")
    said = compare.agreement("anna.jsonl,bert.jsonl")
    assert said.startswith("4 pairs in common, of 12 and 4\n")
    assert "agreed  50.0%" in agreement_line("anna.jsonl,bert.jsonl", "overall")


def test_agreement_on_axes_is_over_the_pairs_whose_axes_both_judged(at, monkeypatch):
    anna = [key + "==2" + key for key in "1212"]               # each of two keys per axis
    judged(monkeypatch, "".join(anna[:3]), axes=True, out="anna.jsonl")
    judged(monkeypatch, "".join(anna), axes=True, out="bert.jsonl")
    judged(monkeypatch, "1" * 12, out="carl.jsonl")
    assert "3 pairs   agreed 100.0%   kappa 1.00" in agreement_line("anna.jsonl,bert.jsonl",
                                                                    "helpful")
    assert agreement_line("anna.jsonl,bert.jsonl", "honest").endswith(
        "kappa undefined: both gave one label to all")
    assert "helpful" not in compare.agreement("anna.jsonl,carl.jsonl")


def test_half_a_row_does_not_count_and_stays(at, monkeypatch, capsys):
    judged(monkeypatch, "12", out="anna.jsonl")
    judged(monkeypatch, "12", out="bert.jsonl")
    half = Path("anna.jsonl").read_bytes()[:-20]
    Path("anna.jsonl").write_bytes(half)
    session(monkeypatch, "", agreement="anna.jsonl,bert.jsonl")
    captured = capsys.readouterr()
    assert "1 pairs in common, of 1 and 2" in captured.out and "half a row" in captured.err
    assert Path("anna.jsonl").read_bytes() == half


def test_people_without_a_pair_in_common_are_refused(at, monkeypatch):
    judged(monkeypatch, "1", out="anna.jsonl")
    write_rows(Path("others.jsonl"), ANSWERS[1:])
    judged(monkeypatch, "1", data="others.jsonl", out="bert.jsonl")
    with pytest.raises(ValueError, match="no pair was judged in both"):
        compare.agreement("anna.jsonl,bert.jsonl")
    with pytest.raises(ValueError, match="give two files with a comma"):
        compare.agreement("anna.jsonl")
