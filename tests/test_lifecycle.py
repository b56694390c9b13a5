"""lifecycle.py from end to end on a very small preset, what it repeats, and bad command lines."""
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_claim import content
from tiny import folder_of, tiny_model, write_rows
from tiny_runs import tiny_run, write_corpus

import bench
import compare
import evaluate
import lifecycle
import lora
import readers
import report as report_module
import sample
import shards
import synthesize
import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from plumbing.curves import plot_curves, read_metrics
from plumbing.folders import read_record
from plumbing.options import command_line
from world.judge import WEIGHTS
from world.tasks import TRAINED_FAMILIES
from world.text import text_of

ROOT = Path(lifecycle.__file__).parent
STAGES = ("pretrain", "sft", "rm", "chosen", "dpo", "ppo")
SCRIPTS = (train_pretrain, train_sft, train_rm, train_dpo, train_ppo)
TINY = {
    "pretrain": {"max_bytes": 100_000, "vocab_size": 512, "d_model": 32, "n_layers": 1,
                 "n_heads": 2, "batch_size": 4, "copy_steps": 0, "steps": 30, "warmup": 2,
                 "lr": 1e-2, "eval_windows": 4},
    "sft": {"n_examples": 400, "batch_size": 4, "steps": 320, "warmup": 2, "lr": 6e-3,
            "eval_examples": 8},
    "rm": {"n_pairs": 60, "batch_size": 8, "steps": 60, "warmup": 1, "lr": 3e-3, "eval_pairs": 30,
           "n_shift": 8},
    "chosen": {"n_examples": 60, "batch_size": 4, "steps": 4, "warmup": 1},
    "dpo": {"n_pairs": 60, "batch_size": 8, "steps": 12, "warmup": 1, "lr": 1e-3, "eval_pairs": 30},
    "ppo": {"n_prompts": 40, "steps": 2, "batch_size": 8, "minibatch_size": 4},
    "exam": {"n_tasks": 30, "n": 20},
}
CONFIG = lifecycle.Config(preset="smoke", seed=3, out="out", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """One real run of everything: its folder, report, and what the exam found."""
    folder, seen = tmp_path_factory.mktemp("life"), {}
    real_examine, real_documents = lifecycle.examine, readers.read_documents

    def examine(*arguments):
        seen["exam"] = real_examine(*arguments)
        return seen["exam"]

    def documents(name, max_bytes=None, **options):      # two megabytes take seconds to examine
        return real_documents(name, max_bytes=min(max_bytes, 100_000), **options)

    def plot(rows, *arguments):                              # so do twenty panels of PPO
        plot_curves([{"step": row["step"], "loss": row["loss"]} for row in rows], *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(lifecycle.PRESETS, "smoke", TINY)
        patch.setattr(lifecycle, "examine", examine)
        patch.setattr(readers, "read_documents", documents)
        patch.setattr("plumbing.run.plot_curves", plot)
        report = lifecycle.main(CONFIG)
    return folder, report, seen["exam"]


@pytest.fixture
def again(first_run, tmp_path, monkeypatch):
    """A copy of the first run to go on from; examinations repeat what the first one found.

    Returns the list of stages whose main is called, each with its config.
    """
    folder, _, exam = first_run
    shutil.copytree(folder / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(lifecycle.PRESETS, "smoke", TINY)
    monkeypatch.setattr(lifecycle, "examine", lambda *arguments: copy.deepcopy(exam))
    monkeypatch.setattr(report_module, "draw", lambda *arguments: None)
    monkeypatch.setattr("plumbing.run.plot_curves", lambda *arguments: None)
    called = []
    for script in SCRIPTS:
        monkeypatch.setattr(script, "main", lambda cfg, real=script.main: (
            called.append((Path(cfg.out).name, cfg)), real(cfg))[1])
    return called


def curve(out, *names):
    return [[row.get(name) for name in names] for row in read_metrics(out)]


# ---------------------------------------------------------------------- what it makes

def test_the_report_has_every_figure_and_each_is_a_number(first_run):
    folder, report, _ = first_run
    assert json.loads((folder / "out" / "report.json").read_text()) == report
    wanted = {
        "pretrain": {"minutes", "tokens_per_s", "val_loss", "unigram_loss", "bigram_loss"},
        "sft": {"minutes", "accuracy", "base_accuracy"}, "rm": {"minutes", "accuracy", "ece"},
        "dpo": {"minutes", "win_rate", "true_reward", "sft_true_reward", "kl", "accuracy"},
        "chosen": {"minutes", "win_rate", "true_reward", "accuracy"},
        "ppo": {"minutes", "win_rate", "true_reward", "sft_true_reward", "kl", "accuracy"}}
    assert tuple(report["stages"]) == STAGES
    for stage, names in wanted.items():
        for name in names:
            assert math.isfinite(report["stages"][stage][name]), (stage, name)
    for name in ("chosen", "dpo", "ppo"):
        low, high = report["stages"][name]["win_rate_95"]
        assert 0 <= low <= report["stages"][name]["win_rate"] <= high <= 1 + 1e-9
    assert report["minutes"] >= sum(stage["minutes"] for stage in report["stages"].values())


def test_the_parts_of_the_true_reward_add_up_and_so_do_their_shares_of_the_gain(first_run):
    folder, report, _ = first_run
    stages = report["stages"]
    for name in ("sft", "dpo", "ppo"):
        total = sum(weight * stages[name]["parts"][part] for part, weight in WEIGHTS.items())
        assert total == pytest.approx(stages[name]["true_reward"])
    for name in ("dpo", "ppo"):
        assert 0 <= stages[name]["plain_win_rate"] <= 1
    made_up = {"sft": {"true_reward": 0.5, "parts": dict.fromkeys(WEIGHTS, 0.5)},
               "dpo": {"true_reward": 1.0, "parts": dict.fromkeys(WEIGHTS, 1.0)},
               "ppo": {"true_reward": 0.5, "parts": dict.fromkeys(WEIGHTS, 0.5)}}
    for name, stage in made_up.items():
        stage["manners"] = {"rude": 0.25 if name == "sft" else 0.0}
        stage |= {"plain_win_rate": 0.5, "right_to_wrong": 0.125, "longer": 0.5}
    table = report_module.parts_lines(made_up)
    assert "| right | 0.37 | 0.500 | 1.000 | 0.500 | 37% | - |" in table
    assert "| rude | 25.0% | 0.0% | 0.0% |" in table
    assert "| right under SFT, now wrong (of those) | | 12.5% | 12.5% |" in table
    assert "## What alignment changed" in (folder / "out" / "report.md").read_text()


def test_the_report_says_what_the_last_third_of_imitation_did():
    rows = [{"step": step, "loss": 1.0} for step in range(9)]
    for step, loss, reward in ((2, 0.5, 0.7), (5, 0.25, 0.8), (8, 0.2, 0.81)):
        rows[step] |= {"val_loss": loss, "true_reward": reward}
    [line, _] = report_module.imitation_lines(rows)
    assert "from step 6 to step 9" in line
    assert "0.250 -> 0.200 nats" in line and "0.800 -> 0.810" in line
    assert report_module.imitation_lines(rows[:3]) == []


def test_every_stage_is_real_each_loss_ends_below_its_start(first_run):
    folder, report, _ = first_run
    for name in ("pretrain", "sft", "rm", "dpo"):
        rows = read_metrics(folder / "out" / name)
        assert rows[-1]["loss"] < rows[0]["loss"], name
    ppo = read_metrics(folder / "out" / "ppo")
    assert ppo[0]["kl"] == 0 and all("true_reward" in row for row in ppo)
    sft = read_metrics(folder / "out" / "sft")
    assert {"accuracy", "unseen_families"} <= set(sft[-1])
    assert report["stages"]["sft"]["val_loss"] < report["stages"]["sft"]["base_loss"]


def test_each_stage_starts_from_the_one_before(first_run):
    folder, _, _ = first_run
    records = {name: json.loads((folder / "out" / name / "config.json").read_text())
               for name in STAGES}
    assert {name: list(record["parents"]) for name, record in records.items()} == {
        "pretrain": [], "sft": ["out/pretrain"], "rm": ["out/sft"], "chosen": ["out/sft"],
        "dpo": ["out/sft"], "ppo": ["out/sft", "out/rm"]}
    assert {record["seed"] for record in records.values()} == {3}
    worlds = {record["config"].get("data") or record["config"]["prompts"]
              for record in records.values()}
    assert worlds == {"world:3"}


def test_the_written_report_has_a_table_20_prompts_and_pictures(first_run):
    folder, report, (_, shown) = first_run
    assert len(shown["prompts"]) == len(set(shown["prompts"])) == 20
    assert set(shown["families"]) == set(TRAINED_FAMILIES)
    text = (folder / "out" / "report.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    table = {row[1].strip(): row for row in rows if row[1].strip() in STAGES}
    assert list(table) == list(STAGES) and all(len(row) == 7 for row in table.values())
    assert table["sft"][5].strip().endswith(f"-> {report['stages']['sft']['accuracy']:.1%}")
    for prompt in shown["prompts"]:
        assert f"**{prompt}**".replace("\n", " ") in text
    for name in ("pretrain", "sft", "chosen", "dpo", "ppo"):
        written = sum(line.startswith(f"- {name}: ") for line in text.splitlines())
        assert written == len(shown["prompts"])
    for picture in ("report.png", *(f"{name}/curves.png" for name in STAGES)):
        assert f"]({picture})" in text
        assert (folder / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_blind_reading_hides_which_side_is_aligned(first_run):
    folder, _, (_, shown) = first_run
    blocks = (folder / "out" / "blind.md").read_text().split("\n\n")
    key = json.loads((folder / "out" / "blind_key.json").read_text())
    assert len(key) == 2 * len(shown["prompts"]) and set(key.values()) == {"A", "B"}
    for number, side in key.items():
        name, i = number.split()
        [at] = [k for k, block in enumerate(blocks) if block.startswith(f"{number}: ")]
        sides = dict(line[2:].split(": ", 1) for line in blocks[at + 1].splitlines())
        assert sides[side] == report_module.one_line(shown[name][int(i) - 1])
        other = {"A": "B", "B": "A"}[side]
        assert sides[other] == report_module.one_line(shown["sft"][int(i) - 1])


def test_the_exam_compares_greedy_answers_on_prompts_no_stage_has_seen(first_run):
    folder, report, (found, _) = first_run
    prompts = readers.world_named("world:3").prompts(20, "heldout", seed=2)
    trained_on = {text_of(row["messages"]) for row in readers.read_prompts(
        "world:3", split="train", n=40, seed=3)}
    assert not trained_on & {text_of(example["prompt"]) for example in prompts}
    model, tokenizer = lifecycle.load_model(folder / "out" / "dpo")
    texts = [evaluate.complete_text(tokenizer, ids)
             for ids in evaluate.answers(model, tokenizer, prompts)]
    rewards = evaluate.true_rewards(prompts, texts)
    assert rewards.tolist() == found["dpo"]["rewards"].tolist()
    assert len(set(found["sft"]["rewards"])) > 1
    assert report["stages"]["dpo"]["true_reward"] == pytest.approx(rewards.mean())
    rate, _, _ = evaluate.win_rate(rewards, found["sft"]["rewards"])
    assert report["stages"]["dpo"]["win_rate"] == rate
    assert report["stages"]["dpo"]["sft_true_reward"] == found["sft"]["rewards"].mean()


def test_evaluate_py_measures_a_folder_as_the_report_does(first_run, tmp_path):
    folder, report, _ = first_run
    found = evaluate.main(evaluate.Config(
        init=str(folder / "out" / "dpo"), reference=str(folder / "out" / "sft"), data="world:3",
        n=20, n_tasks=30, seed=3, json=str(tmp_path / "dpo.json"), device="cpu", dtype="float32"))
    assert json.loads((tmp_path / "dpo.json").read_text()) == found
    for name in ("accuracy", "true_reward", "win_rate", "kl"):
        assert found[name] == pytest.approx(report["stages"]["dpo"][name], rel=1e-6), name


# ---------------------------------------------------------------------- what it does again

def test_a_second_call_skips_every_stage_and_reports_the_same(first_run, again):
    _, report, _ = first_run
    second = lifecycle.main(CONFIG)
    assert again == []
    assert second["stages"] == report["stages"]
    assert sorted(path.name for path in Path("out").iterdir() if path.is_dir()) == sorted(STAGES)


def test_a_changed_setting_runs_that_stage_afresh_and_keeps_the_old_folder(again, monkeypatch):
    before = Path("out/dpo/model.safetensors").read_bytes()
    for number, lr in ((1, 2e-3), (2, 3e-3)):
        monkeypatch.setitem(lifecycle.PRESETS, "smoke", TINY | {"dpo": TINY["dpo"] | {"lr": lr}})
        lifecycle.main(CONFIG)
        assert [name for name, _ in again] == ["dpo"] * number
        assert Path(f"out/dpo.{number}/config.json").exists()
    assert Path("out/dpo.1/model.safetensors").read_bytes() == before
    assert json.loads(Path("out/dpo.2/config.json").read_text())["config"]["lr"] == 2e-3
    assert json.loads(Path("out/dpo/config.json").read_text())["config"]["lr"] == 3e-3


def test_a_stage_of_a_world_whose_code_has_changed_runs_afresh(again, monkeypatch):
    """An added task family, say: what was finished is of another world."""
    main, cfg = lifecycle.stages(CONFIG)["pretrain"]
    lifecycle.run_stage(main, cfg)
    assert not again
    monkeypatch.setattr("plumbing.inputs.world_sum", lambda: "another")
    lifecycle.run_stage(main, cfg)
    assert [name for name, _ in again] == ["pretrain"]


def test_another_seed_is_another_life(again):
    other = lifecycle.stages(dataclasses.replace(CONFIG, seed=4))
    main, cfg = other["pretrain"]
    lifecycle.run_stage(main, cfg)
    assert [(name, cfg.seed, cfg.data) for name, cfg in again] == [("pretrain", 4, "world:4")]
    assert Path("out/pretrain.1/model.safetensors").exists()


@pytest.mark.parametrize("parent, children", [("sft", ["rm", "chosen", "dpo", "ppo"]),
                                              ("rm", ["ppo"])])
def test_a_changed_parent_makes_its_children_run_again(again, parent, children):
    weights = Path(f"out/{parent}/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    run = []

    def remake(cfg):
        run.append(Path(cfg.out).name)
        shutil.copytree(cfg.out + ".1", cfg.out)
    for _, cfg in lifecycle.stages(CONFIG).values():
        lifecycle.run_stage(remake, cfg)
    assert run == children


def test_an_interrupted_stage_goes_on_where_it_was(again, monkeypatch):
    """Ctrl-C in the fourth step of DPO: saved, and continued with the figures of the first run."""
    whole = curve("out/dpo", "step", "loss", "margin", "lr")
    shutil.rmtree("out/dpo")
    calls, loss = [], train_dpo.dpo_loss

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)
    monkeypatch.setattr(train_dpo, "dpo_loss", interrupted)
    with pytest.raises(SystemExit, match="130"):
        lifecycle.main(CONFIG)
    assert [name for name, _ in again] == ["dpo"] and not Path("out/dpo/config.json").exists()
    monkeypatch.setattr(train_dpo, "dpo_loss", loss)
    lifecycle.main(CONFIG)
    assert [(name, cfg.resume) for name, cfg in again] == [("dpo", False), ("dpo", True)]
    assert curve("out/dpo", "step", "loss", "margin", "lr") == whole
    assert not Path("out/dpo.1").exists()


def test_an_interrupted_stage_of_other_settings_is_not_gone_on_with(again):
    Path("out/dpo/config.json").unlink()           # as if killed after its last checkpoint
    _, cfg = lifecycle.stages(CONFIG)["dpo"]
    run = []
    lifecycle.run_stage(run.append, dataclasses.replace(cfg, beta=0.2))
    assert not run[0].resume and Path("out/dpo.1/checkpoints").exists()
    assert not Path("out/dpo").exists()


# ---------------------------------------------------------------------- bad command lines

@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with a model, a text and a broken file."""
    folder = tmp_path_factory.mktemp("bad")
    folder_of(tiny_model(), folder / "base")
    (folder / "text.txt").write_text("A bear. " * 200)
    write_rows(folder / "tasks.jsonl", [{"prompt": "a", "response": "b"}] * 2)
    with open(folder / "tasks.jsonl", "a") as file:
        file.write('{"prompt": "a", "resp\n')
    return folder


@pytest.fixture(scope="module")
def complaints(bad):
    """Exit code and stderr of scripts that are told something wrong, run side by side."""
    commands = {"missing file": "train_pretrain.py --data nowhere.txt",
                "broken line": "train_sft.py --init base --data tasks.jsonl",
                "unknown option": "train_rm.py --batchsize 4"}
    started = {case: subprocess.Popen(
        [sys.executable, ROOT / script, *options], cwd=bad, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for case, (script, *options) in ((k, line.split()) for k, line in commands.items())}
    errors = {case: process.communicate(timeout=120)[1] for case, process in started.items()}
    return {case: (started[case].returncode, errors[case]) for case in started}


@pytest.mark.parametrize("case, code, message", [
    ("missing file", 1, "train_pretrain.py: nowhere.txt: not found; give a .txt, .md, .jsonl file"),
    ("broken line", 1, "train_sft.py: tasks.jsonl:3: broken JSON at column 17: "),
    ("unknown option", 2, "unknown option --batchsize; did you mean --batch_size?"),
])
def test_a_wrong_command_ends_in_one_clear_line_and_no_traceback(complaints, case, code, message):
    found, errors = complaints[case]
    assert found == code and "Traceback" not in errors
    assert message in errors.strip().splitlines()[-1]


@pytest.mark.parametrize("script, options, message", [
    (train_dpo, "--init nowhere", "nowhere: there is no such folder; give the --out folder"),
    (train_ppo, "--init base", "out/rm: there is no such folder"),
    (train_grpo, "--init base --reward nowhere", "--reward nowhere: there is no such folder"),
    (train_sft, "--init base --data world:x", "world:x: world:SEED needs a whole number"),
    (train_rm, "--init base --data text.txt", 'text.txt: ".txt" files are not read here'),
    (train_pretrain, "--data text.txt --tokenizer bytes --context_length 64 --n_heads 3",
     "d_model 128 is not a multiple of n_heads 3"),
    (lifecycle, "--preset huge", "--preset huge: give tiny, smoke or gpu"),
    (lifecycle, "--out text.txt", "--out text.txt: text.txt is a file; give a folder to write"),
    (evaluate, "--init nowhere", "nowhere: there is no such folder"),
    (evaluate, "--init base --data text.txt", "--data text.txt: only a world has an answer key"),
    (evaluate, "--init base --json text.txt", "--json text.txt is there already"),
    (evaluate, "--init base --json lost/x.json", "--json lost/x.json: there is no folder lost"),
    (evaluate, "--init base --reference nowhere", "nowhere: there is no such folder"),
    (evaluate, "--init base --device tpu", "--device tpu: "),
    (sample, "--init text.txt", "text.txt: there is no such folder"),
    (sample, "--init base --prompt hi --device tpu", "--device tpu: "),
    (lora, "--init base --adapter base --out x", "base: no adapter.json and adapter.safetensors"),
    (lora, "--init base --adapter base --out base", "--out base is not empty"),
    (shards, "--data text.txt --tokenizer bytes --out text.txt", "text.txt is a file"),
    (shards, "--data nowhere.txt --out new", "nowhere.txt: not found"),
    (synthesize, "--init base --out text.txt", "--out text.txt is there already"),
    (compare, "--init base --out text.txt", "--out 'text.txt': give a file that ends in .jsonl"),
    (compare, "", "give one of --init (models that answer), --data (answers that are there)"),
    (bench, "--contenders gpt5", "--contenders gpt5: train knows hf_llama, nanogpt"),
    (bench, "--modes fast", "--modes fast: train knows eager, compile; give some"),
])
def test_each_script_says_what_is_wrong_with_its_options(monkeypatch, bad, script, options,
                                                         message):
    monkeypatch.chdir(bad)
    name = f"{script.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    if script.__name__.startswith("train_"):
        sys.argv += ["--out", "new", "--overwrite"]
    main = functools.partial(bench.main, "train") if script is bench else script.main
    before = content(bad)
    with pytest.raises(SystemExit) as stopped:
        command_line(main, script.Config, script.__doc__)
    assert content(bad) == before
    assert stopped.value.code.startswith(f"{name}: ") and message in stopped.value.code
    assert "\n" not in stopped.value.code and not Path("new/metrics.jsonl").exists()


def test_an_option_that_has_come_since_makes_no_other_run_and_one_that_was_given_does(tmp_path):
    cfg = tiny_run(tmp_path / "out", write_corpus(tmp_path), steps=2)
    lifecycle.run_stage(train_pretrain.main, cfg)
    record = read_record(tmp_path / "out")
    del record["config"]["host_state"]
    assert lifecycle.is_same_run(record, cfg)
    assert not lifecycle.is_same_run(record, dataclasses.replace(cfg, host_state=True))
    assert not lifecycle.is_same_run(record | {"config": record["config"] | {"gone": 1}}, cfg)
