"""plumbing/options.py: a Config becomes a command line, with its parents' and nested options."""
import dataclasses
import math
import re
import sys
from dataclasses import dataclass

import pytest

import bench
import compare
import evaluate
import lifecycle
import sample
import shards
import synthesize
import train_classifier
import train_denoise
import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from model import ModelConfig
from plumbing import options
from plumbing.options import Options, build, flat, nested


@dataclass
class Config:
    out: str = "out/x"                # model folder to write
    steps: int = 8                    # optimizer steps, 100% of them
    lr: float = 1e-3                  # peak learning rate
    save_every: int = 1               # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there


@dataclass
class Stage(Options):
    out: str = "out/stage"            # model folder to write
    log_every: int = 1
    save_every: int = 20              # rollouts between checkpoints
    model: ModelConfig = nested(ModelConfig, vocab_size=512, n_layers=2)   # the model's size


@dataclass
class Child(Stage):
    beta: float = 0.5                 # pull towards the reference
    out: str = "out/child"


@dataclass
class Sizes:
    width: int = 4                    # channels
    inner: int = 0                    # channels inside; 0: four times as many
    kind: str = "narrow"              # narrow | wide

    def __post_init__(self):
        self.inner = self.inner or 4 * self.width


@dataclass
class Wide(Options):
    sizes: Sizes = nested(Sizes, not_options=("kind",), width=8,
                          kind="wide")                 # how large
    token_shift: bool = False         # a token also sees its predecessor's embedding, and in an
                                      # encoder the next


# ---------------------------------------------------------------------- one flat Config

def parse(*argv):
    return options.parse(Config, list(argv), "What it does.")


def test_defaults_and_types_are_those_of_the_dataclass():
    assert parse() == Config()
    cfg = parse("--steps", "12", "--lr=0.5", "--out", "3")
    assert (cfg.steps, cfg.lr, cfg.out) == (12, 0.5, "3")
    assert [type(value) for value in (cfg.steps, cfg.lr, cfg.out)] == [int, float, str]


@pytest.mark.parametrize("argv, expected", [
    (["--resume"], True), (["--resume", "true"], True), (["--resume=True"], True),
    (["--resume", "1"], True), (["--resume", "false"], False), (["--resume", "0"], False),
    (["--resume", "--steps", "3"], True), ([], False)])
def test_a_bool_is_a_flag_that_may_have_a_value(argv, expected):
    assert parse(*argv).resume is expected


@pytest.mark.parametrize("argv, named", [
    (["--step", "3"], "unknown option --step; did you mean --steps?"),
    (["--save-every=3"], "unknown option --save-every=3; did you mean --save_every?"),
    (["--zzz"], "unknown option --zzz; the options are out steps lr"),
    (["stray"], "unknown option stray"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--resume", "maybe"], '--resume: "maybe"; give true or false'),
    (["--steps"], "--steps: expected one argument")])
def test_what_cannot_be_meant_is_refused_by_name(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    assert exit.value.code == 2 and named in capsys.readouterr().err


def test_a_preset_gives_other_defaults_and_what_is_given_stands(capsys):
    def pretrain(*argv):
        return options.parse(train_pretrain.Config, argv, presets=train_pretrain.PRESETS)

    cfg = options.flat(pretrain("--preset", "gpt2-124m", "--steps", "5", "--lr=1e-3"))
    assert (cfg["steps"], cfg["lr"], cfg["n_layers"], cfg["preset"]) == (5, 1e-3, 12, "gpt2-124m")
    assert pretrain() == train_pretrain.Config()
    with pytest.raises(SystemExit):
        pretrain("--preset", "gpt2")
    assert "--preset gpt2; give gpt2-124m" in capsys.readouterr().err


def test_help_is_made_of_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage") and "What it does." in text
    assert "--steps int optimizer steps, 100% of them (default: 8)" in text
    assert "--lr float peak learning rate (default: 0.001)" in text
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text


def test_every_stages_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        options.parse(train_pretrain.Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in options.options_of(train_pretrain.Config):
        assert f"--{option.name} " in text
        kind = type(option.default).__name__
        assert f"--{option.name} {kind} (default: {option.default})" not in text, option.name


def test_a_users_mistake_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_x.py"])
    for error in (ValueError("--lr is odd"), FloatingPointError("--lr is odd"),
                  OSError("--lr is odd")):
        def main(cfg, error=error):
            raise error
        with pytest.raises(SystemExit) as exit:
            options.command_line(main, Config, "")
        assert exit.value.code == "train_x.py: --lr is odd"


def test_what_a_damaged_file_holds_makes_no_page_of_a_message(monkeypatch):
    def main(cfg):
        raise ValueError("field a\nb is " + "x" * 1_000_000)

    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(SystemExit) as exit:
        options.command_line(main, Config, "")
    assert exit.value.code.startswith("train_x.py: field a b is xxx")
    assert len(exit.value.code) < 2_100


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    with pytest.raises(ZeroDivisionError):
        options.command_line(lambda cfg: 1 / 0, Config, "")


# ---------------------------------------------------------------------- inheritance

def test_the_options_of_every_stage_are_inherited():
    cfg = options.parse(Stage, ["--seed", "3", "--resume", "--dtype", "bfloat16"])
    assert (cfg.seed, cfg.resume, cfg.dtype, cfg.device) == (3, True, "bfloat16", "auto")


def test_a_stage_may_have_another_default_with_the_help_text_of_before_or_its_own(capsys):
    assert options.parse(Stage, []).log_every == 1 and Options().log_every == 10
    text = help_of(Stage, capsys)
    assert "--log_every int steps between rows of metrics.jsonl (default: 1)" in text
    assert "--save_every int rollouts between checkpoints (default: 20)" in text


def test_comments_of_all_ancestors_are_help_texts(capsys):
    text = help_of(Child, capsys)
    assert "--beta float pull towards the reference (default: 0.5)" in text
    assert "--out str model folder to write (default: out/child)" in text
    assert "--overwrite [bool] remove what a run left in --out, at the end (default: False)" in text


def test_a_field_and_its_comment_may_go_on_in_the_next_line():
    texts = options.comments(Wide)
    assert texts["sizes"] == "how large" and texts["token_shift"] == (
        "a token also sees its predecessor's embedding, and in an encoder the next")


# ---------------------------------------------------------------------- groups

def help_of(Config, capsys) -> str:
    with pytest.raises(SystemExit):
        options.parse(Config, ["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_scripts_own_options_first_and_common_ones_last(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    text = help_of(Child, capsys)
    titles = ["options of train_x.py:", "the model's size:", "options of every stage:"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)

    def group_of(name: str) -> str:
        place = text.index(f" --{name} ", places[0])
        return max((start, title) for start, title in zip(places, titles) if start < place)[1]
    assert group_of("beta") == group_of("out") == "options of train_x.py:"
    assert group_of("vocab_size") == group_of("d_ff") == "the model's size:"
    assert group_of("seed") == group_of("log_every") == "options of every stage:"
    names = [option.name for option in options.options_of(Child)]
    assert names[:2] == ["out", "beta"] and names[-10:] == [
        "seed", "device", "dtype", "compile", "host_state", "log_every", "save_every", "resume",
        "insist", "overwrite"]


def test_a_script_that_is_no_stage_has_only_its_own_options(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    text = help_of(Config, capsys)
    assert "options of sample.py:" in text and "options of every stage" not in text


# ---------------------------------------------------------------------- nested dataclasses

def test_a_models_sizes_are_flat_options_and_arrive_in_the_model_config():
    cfg = options.parse(Stage, ["--n_heads", "2", "--out", "out/y", "--tied=false"])
    assert cfg.out == "out/y"
    assert cfg.model == ModelConfig(vocab_size=512, n_layers=2, n_heads=2, tied=False)
    assert options.parse(Stage, []) == Stage()


def test_sizes_that_are_computed_follow_the_sizes_that_are_given():
    """d_ff = 8/3 D in multiples of 16; the default's 352, for D = 128, must not stay."""
    assert Stage().model.d_ff == 352
    for d_model, d_ff in ((64, 176), (128, 352), (768, 2048)):
        cfg = options.parse(Stage, ["--d_model", str(d_model)])
        assert cfg.model == ModelConfig(vocab_size=512, n_layers=2, d_model=d_model)
        assert cfg.model.d_ff == d_ff
    assert options.parse(Stage, ["--n_heads", "2"]).model.n_kv_heads == 2
    assert options.parse(Stage, ["--n_experts", "4"]).model.d_expert == ModelConfig(
        vocab_size=512, n_experts=4).d_expert
    assert options.parse(Stage, ["--d_model", "64", "--d_ff", "100"]).model.d_ff == 100


def test_defaults_in_help_are_those_that_were_written_down(capsys):
    text = help_of(Wide, capsys)
    assert "how large: --width int channels (default: 8)" in text
    assert "--inner int channels inside; 0: four times as many (default: 0)" in text
    assert Wide().sizes == Sizes(8, 32, "wide")


def test_fields_that_the_stage_decides_are_no_options(capsys):
    with pytest.raises(SystemExit):
        options.parse(Wide, ["--kind", "narrow"])
    assert "unknown option --kind" in capsys.readouterr().err
    assert "--kind" not in help_of(Wide, capsys)
    with pytest.raises(TypeError, match="Wide has no option kind"):
        build(Wide, {"kind": "narrow"})
    assert options.parse(Wide, ["--width", "2"]).sizes == Sizes(2, 8, "wide")


def test_the_nearest_option_may_be_a_nested_one(capsys):
    with pytest.raises(SystemExit):
        options.parse(Stage, ["--n-layer", "3"])
    assert "unknown option --n-layer; did you mean --n_layers?" in capsys.readouterr().err


def test_presets_give_nested_values_by_flat_names():
    presets = {"small": {"d_model": 64, "log_every": 5, "preset": "small"}}

    def parse(*argv):
        return options.parse(WithPreset, list(argv), presets=presets)
    cfg = parse("--preset", "small")
    assert (cfg.model.d_model, cfg.model.d_ff, cfg.log_every) == (64, 176, 5)
    assert parse("--preset", "small", "--d_model", "128").model.d_ff == 352
    assert parse() == WithPreset()


@dataclass
class WithPreset(Stage):
    preset: str = ""                  # small


def test_sizes_that_do_not_fit_together_end_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_x.py", "--d_model", "65"])
    with pytest.raises(SystemExit) as exit:
        options.command_line(lambda cfg: None, Stage, "")
    assert exit.value.code == "train_x.py: d_model 65 is not a multiple of n_heads 4"


# ---------------------------------------------------------------------- flat values

def test_flat_names_every_option_once_without_nesting():
    values = flat(Child())
    assert list(values) == [option.name for option in options.options_of(Child)]
    assert values["out"] == "out/child" and values["seed"] == 0 and values["n_layers"] == 2
    assert values["d_ff"] == 352 and "model" not in values and "kind" not in flat(Wide())
    assert flat(Config()) == dataclasses.asdict(Config())


def test_a_config_is_built_of_flat_values():
    cfg = build(Child, {"n_layers": 3, "beta": 0.1, "seed": 7})
    assert cfg == Child(beta=0.1, seed=7, model=ModelConfig(vocab_size=512, n_layers=3))
    assert build(Child, flat(cfg)) == cfg
    with pytest.raises(TypeError, match="Child has no option n_layer"):
        build(Child, {"n_layer": 3})


# ---------------------------------------------------------------------- numbers and their ranges

SCRIPTS = (train_pretrain, train_denoise, train_sft, train_rm, train_dpo, train_ppo,
           train_grpo, train_classifier, compare, synthesize, evaluate, sample, shards, lifecycle,
           bench)
# Of each script some values that mean nothing, and what is asked for instead.
OUTSIDE = [
    (train_pretrain, "max_norm", -1.0, "> 0"), (train_pretrain, "steps", 0, ">= 1"),
    (train_pretrain, "n_heads", 0, ">= 1"), (train_pretrain, "alpha", 1.5, "in [0, 1]"),
    (train_pretrain, "rope_theta", 0.0, "> 0"), (train_pretrain, "save_every", -1, ">= 0"),
    (train_denoise, "grad_accum", 0, ">= 1"), (train_sft, "tau", 0.0, "in [1, inf]"),
    (train_sft, "lora_alpha", -1.0, "> 0"), (train_sft, "seed", -1, "in [0, 4e9]"),
    (train_rm, "label_noise", 2.0, "in [0, 1]"), (train_rm, "disagreement", -0.1, ">= 0"),
    (train_dpo, "beta", 0.0, "> 0"), (train_dpo, "eval_pairs", 0, ">= 1"),
    (train_ppo, "gamma", 5.0, "in [0, 1]"), (train_ppo, "clip", -1.0, "in (0, 1)"),
    (train_ppo, "clip", 1.0, "in (0, 1)"), (train_ppo, "temperature", 0.0, "> 0"),
    (train_classifier, "last_k", 0, ">= 1"), (train_classifier, "max_span", 0, ">= 1"),
    (sample, "top_p", 0.0, "in (0, 1]"), (sample, "temperature", -1.0, ">= 0"),
    (evaluate, "n_tasks", 0, ">= 1"), (shards, "workers", 0, ">= 1"),
    (lifecycle, "seed", 2 ** 32, "in [0, 4e9]"), (bench, "rounds", 0, ">= 1")]


@pytest.mark.parametrize("script, name, value, wanted", OUTSIDE)
def test_a_number_outside_its_range_is_refused_and_the_range_is_named(script, name, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"--{name} {value}: give a number {wanted}")):
        options.parse(script.Config, [f"--{name}", str(value)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_infinite_or_not_a_number_is_no_number(script):
    n_tried = 0
    for option in options.options_of(script.Config):
        default = option.default
        if isinstance(default, float):
            for value in (math.nan, math.inf, -math.inf):
                if (option.name, value) == ("tau", math.inf):          # documented: uniform
                    continue
                with pytest.raises(ValueError, match=f"--{option.name} {value}: give a number"):
                    build(script.Config, {option.name: value})
                n_tried += 1
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            build(script.Config, {option.name: default})               # its default is in its range
    assert n_tried or script in (shards, evaluate, lifecycle, bench)


WORDS = [
    (train_pretrain, "schedule", "cosine or wsd"), (train_pretrain, "shard", "none or fsdp"),
    (train_pretrain, "balance", "loss, bias or none"),
    (train_pretrain, "router", "token_choice or expert_choice"),
    (train_denoise, "objective", "mlm, span, ul2 or causal"),
    (train_sft, "peft", "none, lora, qlora, adapter, parallel_adapter, prefix or prompt"),
    (train_sft, "truncate", "error, left or drop"), (train_rm, "optimizer", "adam, adamw or muon"),
    (train_dpo, "bad_rows", "error or skip"), (train_ppo, "critic_init", "rm, sft or shared"),
    (train_classifier, "task", "class, tokens or span"),
    (train_classifier, "train", "head, last_k or all"),
    (train_classifier, "unfreeze", "at_once or gradual"),
    (lifecycle, "preset", "tiny, smoke or gpu"), (shards, "bad_rows", "error or skip"),
    *[(script, "dtype", "auto, ") for script in SCRIPTS if script is not shards]]


@pytest.mark.parametrize("script, name, wanted", WORDS)
def test_a_word_that_means_nothing_is_refused_and_those_that_do_are_named(script, name, wanted):
    with pytest.raises(ValueError, match=f"--{name} left-over: give {wanted}"):
        options.parse(script.Config, [f"--{name}", "left-over"])


@pytest.mark.parametrize("text, words", [
    ("error | left | drop", ["error", "left", "drop"]), ("rows: left | drop", ["left", "drop"]),
    ("bias (nudged, later) | none", ["bias", "none"]), ("a | b: a is new", ["a", "b"]),
    ("a | b, which is old", ["a", "b"]), ("bpe | bytes | a folder with one", []),
    ("auto | cuda | cuda:1 | mps", []), ("one of a | b", []), ("", [])])
def test_a_comment_lists_the_words_that_may_be_given(text, words):
    assert options.choices(text) == words


@pytest.mark.parametrize("text, inside, outside", [
    ("x, > 0", (1e-9, 3), (0, -1)), ("x, >= 1", (1, 9), (0, 0.5)),
    ("x, in [0, 1)", (0, 0.9), (1, -0.1)), ("x, in (0, inf]", (math.inf, 1), (0, -math.inf)),
    ("x, any number", (-3, 0), (math.nan, math.inf)), ("x in [0, 1]: no range", (0, 7), (-1,))])
def test_a_comment_ends_with_a_range(text, inside, outside):
    assert all(options.is_within(value, text) for value in inside)
    assert not any(options.is_within(value, text) for value in outside)
