"""
The command line: a stage's Config, a dataclass, and the comments behind its fields.

    @dataclass
    class Config(Options):
        out: str = "out/base"         # model folder to write
        steps: int = 1000             # optimizer steps
        model: ModelConfig = nested(ModelConfig, vocab_size=2048)      # the model's size

    cfg = parse(Config)               # --out out/x --n_layers 2 --seed 3

A field is an option: its default is the option's default and says of which type a value is; its
comment is the help text, ends with a number's range: > 0, >= 1, in [0, 1), and lists the words
that may be given: error | left | drop. The fields of a nested dataclass are options too, under
their own names (--n_layers), and arrive in it (cfg.model.n_layers). --help shows the script's own
options first, then those of nested dataclasses, then those of every stage.
"""
import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass
class Options:
    """The options of every training stage; a Config that has another default repeats the field."""
    seed: int = 0                     # of weights, batches, samples, in [0, 4e9]
    device: str = "auto"              # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"               # auto | float32 | bfloat16 | float16
    compile: bool = False             # torch.compile: 15-25 s, on CPUs for each width of a batch
    host_state: bool = False          # optimizer state on the host between steps: less GPU memory
    log_every: int = 10               # steps between rows of metrics.jsonl
    save_every: int = 200             # steps between checkpoints
    resume: bool = False              # go on from --out if anything is there
    insist: bool = False              # --resume although the data or models read have changed
    overwrite: bool = False           # remove what a run left in --out, at the end


INTERRUPTED = 130                     # exit code after Ctrl-C, as shells have it
LONGEST_ERROR = 2000                  # characters of a message that are shown
NUMBERS = "Numbers are finite and at least 0 where nothing else is said."
# At the end of a comment: > 0 | >= 1 | in [0, 1) | any number
RANGE = re.compile(r", (?:(?P<sign>>=?) (?P<bound>\S+)|in (?P<open>[\[(])(?P<low>\S+), "
                   r"(?P<high>\S+)(?P<close>[\])])|any number)$")
# error | left | drop, after the comment's beginning or a colon. No list of words is one that goes
# on with something else: bpe | bytes | a folder
CHOICES = re.compile(r"(?:^|: )([\w-]+(?: \| [\w-]+)+)(?=$|[,:;] )")


class Option(NamedTuple):
    name: str                         # without the dashes
    default: object
    holder: str = ""                  # the Config's field that holds the option's dataclass, if any


def nested(kind: type, /, not_options: tuple[str, ...] = (), **given) -> dataclasses.Field:
    """A field that holds a `kind`, a dataclass, whose own fields become options as well.

    given: defaults that differ from those of `kind`. They are kept as they are written here, since
    an object no longer shows them: __post_init__ may have put a number in the place of a 0 that
    means "computed", as ModelConfig does with d_ff. not_options: fields that the stage decides.
    """
    return dataclasses.field(default_factory=functools.partial(kind, **given),
                             metadata={"kind": kind, "given": given, "not_options": not_options})


# ---------------------------------------------------------------------- parsing

def parse(Config: type, argv: list[str] | None = None, description: str = "",
          presets: dict[str, dict] | None = None):
    """A Config from the command line (argv; None: sys.argv without the script's name).

    presets: other defaults, flat, by the names that --preset takes. Exits with a message for a
    value of the wrong type, an unknown preset and an unknown option, naming the nearest known one.
    Raises ValueError for a number outside its range, a word that is none of an option's, and for
    values that do not fit together.
    """
    # No abbreviations, because --warm would quietly mean another option once a second fits it.
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, epilog=NUMBERS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    options = options_of(Config)
    add_options(parser, options, Config)
    # Unknown options are collected, because argparse's own error does not name the nearest one.
    arguments, unknown = parser.parse_known_args(argv)
    if presets and arguments.preset:
        if arguments.preset not in presets:
            parser.error(f"--preset {arguments.preset}; give {', '.join(presets)}")
        # Parsed again, because a value that was given counts more than the preset's.
        parser.set_defaults(**presets[arguments.preset])
        arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = nearest_option(unknown[0], options)
        parser.error(f"unknown option {unknown[0]}; {hint}")
    return build(Config, vars(arguments))


def add_options(parser: argparse.ArgumentParser, options: list[Option], Config: type) -> None:
    """Tell the parser about the options, in groups: the script's own, nested ones, common ones."""
    texts = help_texts(Config)
    groups = {}                                            # argparse's, by their titles
    for option in options:
        title = f"options of {parser.prog}"
        if option.holder:                                  # its comment: "the model's size"
            title = texts.get(option.holder, option.holder)
        elif option.name in common_names(Config):
            title = "options of every stage"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = type(option.default)
        text = texts.get(option.name, "")
        if option.default != "":                           # an empty text says nothing
            text += f" (default: {option.default})"
        text = text.replace("%", "%%")                     # argparse would read % as a format
        flag = {}
        if kind is bool:                                   # --resume means --resume true
            kind = parse_bool
            flag = {"nargs": "?", "const": True}
        groups[title].add_argument(f"--{option.name}", type=kind, default=option.default, help=text,
                                   metavar=type(option.default).__name__, **flag)


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f'"{text}"; give true or false')
    return text.lower() in ("true", "1")


def check_values(Config: type, values: dict) -> None:
    """Raises ValueError for a word that is not among those of its option's comment, and for a
    number that is not in the range at the comment's end; where none stands, it must be finite and
    at least 0."""
    texts = help_texts(Config)
    for name, value in values.items():
        words = choices(texts.get(name, ""))
        if isinstance(value, str) and words and value not in words:
            raise ValueError(f"--{name} {value}: give {', '.join(words[:-1])} or {words[-1]}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not is_within(value, texts.get(name, "")):
            found = RANGE.search(texts.get(name, ""))
            wanted = found[0].removeprefix(", ") if found else ">= 0"
            raise ValueError(f"--{name} {value}: give a number {wanted}")


def choices(text: str) -> list[str]:
    """The words that a comment lists, remarks in brackets aside; [] where others may be given."""
    found = CHOICES.search(re.sub(r" \([^)]*\)", "", text))
    return found[1].split(" | ") if found else []


def is_within(value: float, text: str) -> bool:
    """Whether a number is in the range that ends a comment. NaN is in none."""
    if value == math.inf and text.endswith("inf]"):        # the only infinite number that is asked
        return True
    if not math.isfinite(value):
        return False
    found = RANGE.search(text)
    if found is None:
        return value >= 0
    if found["sign"] == ">":
        return value > float(found["bound"])
    if found["sign"] == ">=":
        return value >= float(found["bound"])
    if found["low"] is None:                               # any number
        return True
    low = float(found["low"])
    high = float(found["high"])
    above = value > low if found["open"] == "(" else value >= low
    below = value < high if found["close"] == ")" else value <= high
    return above and below


def refuse_unread(config, read_by: dict[str, tuple[str, ...]], choice: str = "method") -> None:
    """Raises ValueError for an option that was given although nothing in this run reads it.

    read_by: {option: its readers}. A reader is a value of --method (choice), or an option that is
    on unless it is 0, empty or false: {"lam": ("orpo",), "gold_every": ("--gold",)}.
    """
    for name, readers in read_by.items():
        is_read = getattr(config, choice, "") in readers
        for reader in readers:
            if reader.startswith("--"):
                is_read = is_read or bool(getattr(config, reader[2:]))
        value = getattr(config, name)
        if value != getattr(type(config), name) and not is_read:
            raise ValueError(f"--{name} {value}: only {', '.join(readers)} would read it; leave it "
                             "out, or give that")


def nearest_option(argument: str, options: list[Option]) -> str:
    """A hint for an argument that is no option: --step -> did you mean --steps?"""
    known = [option.name for option in options]
    name = argument.split("=")[0].strip("-").replace("-", "_")     # --save-every=3 -> save_every
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean --{nearest[0]}?"
    return f"the options are {' '.join(known)}"


def command_line(main: Callable, Config: type, description: str,
                 presets: dict[str, dict] | None = None) -> None:
    """Run a script: a user's mistake ends in one clear line, not in a traceback.

    Exit codes: 0 done (or saved after SIGTERM), 1 refused, 2 unknown options, 130 Ctrl-C.
    """
    try:
        cfg = parse(Config, description=description, presets=presets)
        main(cfg)
    # Options or data that do not fit, a run that diverged, a file or disk: all else is a bug of
    # ours and keeps its traceback, because that is how it gets reported.
    except (ValueError, FloatingPointError, OSError) as error:
        # one line, and no page of what a damaged file holds
        text = " ".join(str(error).splitlines())
        sys.exit(f"{Path(sys.argv[0]).name}: {text[:LONGEST_ERROR]}")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted before there was anything to save",
              file=sys.stderr)
        sys.exit(INTERRUPTED)


# ---------------------------------------------------------------------- a Config and its options

def options_of(Config: type) -> list[Option]:
    """The options in the order of --help: the script's own, nested ones, those of every stage."""
    own = []
    inner = []
    common = []
    # Sorted here, because dataclasses puts inherited fields first and a reader wants them last.
    declared_here = vars(Config).get("__annotations__", {})
    fields = sorted(dataclasses.fields(Config), key=lambda field: field.name not in declared_here)
    for field in fields:
        if "kind" in field.metadata:                       # made by nested()
            inner += options_inside(field)
        elif field.name in common_names(Config):
            common.append(Option(field.name, field.default))
        else:
            own.append(Option(field.name, field.default))
    return own + inner + common


def options_inside(field: dataclasses.Field) -> list[Option]:
    """The options of a nested dataclass, with the defaults that were written down for them."""
    given = field.metadata["given"]
    options = []
    for inner in dataclasses.fields(field.metadata["kind"]):
        if inner.name not in field.metadata["not_options"]:
            # The class's default or the given one, so that d_ff shows 0 and not the computed width.
            default = given.get(inner.name, inner.default)
            options.append(Option(inner.name, default, holder=field.name))
    return options


def common_names(Config: type) -> list[str]:
    """The options of every stage; none where a script is not a stage, as sample.py is not."""
    if not issubclass(Config, Options):
        return []
    return [field.name for field in dataclasses.fields(Options)]


def build(Config: type, values: dict):
    """A Config with these values, flat, by the options' names; the others keep their defaults.

    Raises TypeError for a name that is no option, ValueError for a value that check_values()
    refuses, and what a nested dataclass raises.
    """
    known = [option.name for option in options_of(Config)]
    for name in values:
        if name not in known:
            raise TypeError(f"{Config.__qualname__} has no option {name}")
    check_values(Config, values)
    arguments = {}
    for field in dataclasses.fields(Config):
        if "kind" in field.metadata:
            inner = dict(field.metadata["given"])
            for option in options_inside(field):
                if option.name in values:
                    inner[option.name] = values[option.name]
            # Built in one go, because __post_init__ computes some values from others.
            arguments[field.name] = field.metadata["kind"](**inner)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return Config(**arguments)


def flat(config) -> dict:
    """All options by name, without nesting: {"out": "out/base", "n_layers": 4, "seed": 0}.

    config.json and meta.json keep them like this. Values are those of the objects: where 0 means
    "computed", the number that was computed.
    """
    values = {}
    for option in options_of(type(config)):
        holder = getattr(config, option.holder) if option.holder else config
        values[option.name] = getattr(holder, option.name)
    return values


def help_texts(Config: type) -> dict[str, str]:
    """The comment behind each field, of a Config, of its parents and of nested dataclasses."""
    texts = {}
    for field in dataclasses.fields(Config):
        if "kind" in field.metadata:
            texts |= comments(field.metadata["kind"])
    # The Config's own come last: they stand where a field that is no option has the same name.
    return texts | comments(Config)


@functools.cache                               # because finding a class in its file takes 20 ms
def comments(dataclass_type: type) -> dict[str, str]:
    """The comment behind each field, in a class and in its parents.

    `lr: float = 1e-3   # peak learning rate` -> {"lr": "peak learning rate"}
    """
    found = {}
    # Parents first, so that the comment of a child's field replaces theirs, if it has one.
    parents_first = reversed(dataclass_type.__mro__[:-1])      # all but `object`, the last
    for parent in parents_first:
        source = inspect.getsource(parent)
        source = re.sub(r"\n {5,}#? *", " ", source)       # joins a field or comment of two lines
        found |= dict(re.findall(r"^    (\w+):[^#\n]*# *(.*)$", source, re.M))
    return found
