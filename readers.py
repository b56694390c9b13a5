"""Rows of people's files and of the embedded world: formats, checks, where a fault stands.

    read_documents      texts to pretrain on (001 section 1.6)          .txt, .md, JSONL with `text`
    read_examples       conversations to imitate (3.4)                  JSONL, see FORMATS
    read_preferences    pairs: a prompt, a better and a worse answer    prompt / chosen / rejected
    read_ratings        answers, each rated on a scale                  prompt / completion / rating
    read_labelled       answers, each good or bad                       prompt / completion / label
    read_rankings       several answers to a prompt, best first         see RANKED
    read_chosen         the better answers of pairs, to imitate
    read_prompts        conversations to be answered (4.5)              FORMATS, or `prompt` alone
    read_classes        texts and their classes (2.2)                   text / label
    read_words          words and the label of each                     tokens / labels
    read_spans          questions, answered by a piece of a passage     question / context / answer

Each reads a file, all files of a folder, or the world ("world", "world:SEED"), and checks row by
row. A bad row is an error with file, line and remedy; bad_rows="skip" leaves it out and counts it.
"""
import hashlib
import json
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from messages import ROLES
from tokenizer import check_blanks
from world.world import World

SUFFIXES = (".txt", ".md", ".jsonl")          # of files with texts; rows are in .jsonl alone
FORMATS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"),
           ("messages",), ("prompt", "completion"))

# Preferences: pairs, single answers with a rating or a thumb up or down, several answers with
# ranks (1: the best) or ratings. The world's rows say "response" for "completion".
PAIR = ("prompt", "chosen", "rejected")
RATED = (("prompt", "completion", "rating"), ("prompt", "response", "rating"))
LABELLED = (("prompt", "completion", "label"), ("prompt", "response", "label"))
ULTRAFEEDBACK = ("instruction", "completions")
RANKED = (("prompt", "completions", "ranks"), ("prompt", "completions", "ratings"),
          ("prompt", "responses", "ratings"), ULTRAFEEDBACK)

# Of a number in a file at most, because arithmetic with 1e308 or Infinity ends in NaN.
LARGEST = 1e9

# A row that is not parsed yet: (where it stands, load). load() is called by good_rows() and not
# before, because broken JSON must raise there, where bad rows are named and counted.
UnreadRow = tuple[str, Callable[[], dict]]


# ---------------------------------------------------------------------- rows of files

def world_named(data: str | Path) -> World | None:
    """"world" or "world:SEED" -> that world; None for anything else: a file or a folder."""
    name, colon, seed = str(data).partition(":")
    if name != "world":
        return None
    if colon and not seed.isdecimal():
        raise ValueError(f"{data}: world:SEED needs a whole number, for example world:1")
    return World(int(seed or 0))                  # "world" alone is the world of seed 0


def decoded(raw: bytes, offset: int = 0) -> str:
    """UTF-8 that begins `offset` bytes into a file -> text, without a byte order mark."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        bad_byte = raw[error.start]
        raise ValueError(f"not UTF-8: byte 0x{bad_byte:02x} at byte offset "
                         f"{offset + error.start} of the file; save it as UTF-8") from None
    if offset == 0:
        return text.removeprefix("\ufeff")
    # further into the file U+FEFF is an ordinary character
    return text


def json_row(raw: bytes, offset: int) -> dict:
    """A line of JSONL that begins `offset` bytes into its file -> its object."""
    try:
        row = json.loads(decoded(raw, offset), object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError("brackets are nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}; every line must be "
                         "one whole object") from None
    # a list or a number alone is JSON, too, but has no fields
    if type(row) is not dict:
        raise ValueError(f"found {excerpt(row)}; every line must be an object {{...}}")
    return row


def without_repeats(fields: list[tuple[str, object]]) -> dict:
    """A JSON object; raises ValueError for a field that stands twice, of which json.loads would
    keep the last without a word."""
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'field "{twice}" stands twice in one object; which of them is meant?')
    return found


def json_lines(path: Path) -> Iterator[UnreadRow]:
    """Every line that is not blank, with its number; one line at a time is in memory."""
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                raw = line.removesuffix(b"\n")
                # the number counts blank lines as well, because editors do
                yield f"{path}:{number}", partial(json_row, raw, offset)
            offset += len(line)


def whole_text(path: Path) -> Iterator[UnreadRow]:
    """A text file as one row {"text": ..., "whole_file": True}; no row if the file is blank."""
    raw = path.read_bytes()
    if raw.strip():
        yield str(path), lambda: {"text": decoded(raw), "whole_file": True}


def file_rows(data: str | Path, suffixes: tuple[str, ...]) -> Iterator[UnreadRow]:
    """The rows of a file, or of all files with these suffixes below a folder, sorted by path."""
    root = Path(data)
    known = ", ".join(suffixes)
    if not root.exists():
        raise ValueError(f'{data}: not found; give a {known} file, a folder of them or "world"')
    # A pipe, for example, which would be waited for without end.
    if not root.is_dir() and not root.is_file():
        raise ValueError(f"{data}: neither a file nor a folder; give a {known} file")
    files = files_below(root, suffixes, say_what_is_left_out) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"{data}: no {known} file in this folder")

    for path in files:
        suffix = path.suffix.lower()                      # .TXT is read like .txt
        # a single file of another kind: a folder's files were chosen by their suffix
        if suffix not in suffixes:
            raise ValueError(f'{path}: "{path.suffix}" files are not read here; give {known}')
        is_empty = True
        rows = json_lines(path) if suffix == ".jsonl" else whole_text(path)
        for row in rows:
            is_empty = False
            yield row
        if is_empty:
            raise ValueError(f"{path}: the file is empty")


def files_below(folder: Path, suffixes: tuple[str, ...],
                left_out: Callable[[Path, dict], None] = lambda folder, left: None) -> list[Path]:
    """All files with these suffixes, in subfolders as well. left_out(folder, {why: paths}) is told
    of all others: hidden ones (.name), of other kinds, links to nothing or to folders, folders
    that cannot be read."""
    files = []
    left = defaultdict(list)
    unreadable = "that cannot be read"
    for place, folders, names in os.walk(folder, onerror=lambda error: left[unreadable].append(
            Path(error.filename))):
        for name in sorted(folders):
            path = Path(place) / name
            if name.startswith("."):
                left["hidden"].append(path)
                folders.remove(name)                      # os.walk then leaves it out
            elif path.is_symlink():
                left["links to folders"].append(path)
        for name in names:
            path = Path(place) / name
            if name.startswith("."):
                left["hidden"].append(path)
            elif path.suffix.lower() not in suffixes:
                left["of other kinds"].append(path)
            elif not path.is_file():
                left["links to nothing or no files"].append(path)
            else:
                files.append(path)
    left_out(folder, left)
    return sorted(files)


def say_what_is_left_out(folder: Path, left: dict[str, list[Path]]) -> None:
    if left:
        kinds = [f"{len(paths)} {why} ({min(paths).name}{', ...' if len(paths) > 1 else ''})"
                 for why, paths in sorted(left.items())]
        print(f"{folder}: left out {'; '.join(kinds)}", file=sys.stderr)


def good_rows(rows: Iterable[UnreadRow], parse: Callable[[dict], dict], data: str | Path,
              bad_rows: str) -> Iterator[dict]:
    """parse(row) and "where" it stood, for every good row.

    A bad row raises ValueError, or with bad_rows "skip" is left out and counted on stderr.
    """
    if bad_rows not in ("error", "skip"):
        raise ValueError(f'bad_rows is {bad_rows!r}; it must be "error" or "skip"')
    n_good = 0
    faults = []
    try:
        for where, load in rows:
            try:
                row = parse(load())
            except ValueError as error:
                fault = f"{where}: {error}"
                if bad_rows == "error":
                    raise ValueError(fault) from None
                faults.append(fault)
                continue
            n_good += 1
            yield row | {"where": where}
    finally:
        # not after the loop, because a caller who has read enough ends this generator early
        if faults:
            n_rows = n_good + len(faults)
            print(f"{data}: skipped {len(faults):,} of {n_rows:,} rows (first: {faults[0]})",
                  file=sys.stderr)
    # no row and no fault: zero rows of a world were asked for
    if faults and not n_good:
        raise ValueError(f"{data}: every row is bad (first: {faults[0]})")


# ---------------------------------------------------------------------- fields of a row

def excerpt(value: object) -> str:
    """A value from a file, for an error message: at most 40 characters of it."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:37] + "..."


def must_be(needed: str, field: str, value: object) -> ValueError:
    """The error that a field with this value deserves."""
    return ValueError(f'field "{field}" is {excerpt(value)}; it must be {needed}')


def checked_text(value: object, field: str) -> str:
    """The value itself, if it is a non-empty string of real characters."""
    checked_characters(value, field)
    if not value.strip():
        raise ValueError(f'field "{field}" is empty; every row needs a non-empty "{field}"')
    return value


def checked_characters(value: object, field: str) -> str:
    """The value itself, if it is a string of real characters."""
    if type(value) is not str:
        raise must_be("a string", field, value)
    # JSON can spell half of a surrogate pair (U+D800 to U+DFFF), which has no UTF-8; asking
    # isascii first spares most texts the slow loop over their characters
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f'field "{field}" holds half a surrogate pair, which is not a character')
    try:
        check_blanks(value)
    except ValueError as error:
        raise ValueError(f'field "{field}" holds {error}') from None
    return value


def checked_turns(value: object, field: str, last: str) -> list[dict]:
    """Text, or chat messages, that end in a turn of role `last` -> [{"role", "content"}, ...].

    "Hi", "prompt", "user" -> [{"role": "user", "content": "Hi"}]
    """
    if isinstance(value, str):
        return [{"role": last, "content": checked_text(value, field)}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise must_be('a string or a list of messages {"role": "user", "content": "..."}', field,
                      value)
    # the roles are checked before the texts: a wrong order makes a row useless as a whole
    roles = [turn.get("role") for turn in value]
    for i, role in enumerate(roles):
        if role not in ROLES:
            raise ValueError(f'field "{field}[{i}].role" is {excerpt(role)}; roles are '
                             f'{", ".join(ROLES)}')
    if not roles or roles[-1] != last:
        raise ValueError(f'field "{field}" has the roles {excerpt(roles)}; it must end in '
                         f'"{last}"')

    # only role and content are taken over: some files have names, ids or dates in a turn
    turns = []
    for i, turn in enumerate(value):
        content = checked_text(turn.get("content"), f"{field}[{i}].content")
        turns.append({"role": turn["role"], "content": content})
    return turns


def response_of(value: object, field: str, prompt: list[dict]) -> str:
    """Text, or messages whose last is the answer; turns before it must repeat the prompt."""
    *before, answer = checked_turns(value, field, "assistant")
    # "chosen" may hold the whole conversation, which begins with the prompt
    if before and before != prompt:
        raise ValueError(f'field "{field}" begins with another conversation than the prompt')
    return answer["content"]


def responses_of(row: dict, field: str, answers: dict[str, object]) -> tuple[list[dict], list[str]]:
    """The prompt in a field of the row, and the text of each of its answers.

    answers: {"chosen": text, or messages that end in the answer, ...}. Messages may repeat the
    prompt with turns before it, which then belong to the prompt: some files have the bare question
    in "prompt", and the system turn in "chosen" and "rejected".
    """
    prompt = checked_turns(row[field], field, "user")
    for name, value in answers.items():
        *before, _ = checked_turns(value, name, "assistant")
        # the fuller conversation counts, because it is what was answered
        if before[-len(prompt):] == prompt:
            prompt = before
    return prompt, [response_of(value, name, prompt) for name, value in answers.items()]


def listed(row: dict, field: str) -> dict[str, object]:
    """A list in a row by the names of its places: {"ratings[0]": 3, "ratings[1]": 5}."""
    value = row[field]
    if type(value) is not list:
        raise must_be("a list", field, value)
    return {f"{field}[{i}]": item for i, item in enumerate(value)}


def checked_number(value: object, field: str, low: float, high: float, remedy: str = "") -> float:
    """The value itself, if it is a number from low to high; NaN is not, nor is true."""
    # isinstance would do for True, too, because a bool is an int in Python
    is_number = type(value) in (int, float)
    if not is_number or not low <= value <= high:
        raise must_be(f"a number from {low:g} to {high:g}{remedy}", field, value)
    return value


def checked_scale(value: object) -> list[float]:
    """[lowest, highest]: the ends of a scale for ratings."""
    if type(value) is not list or len(value) != 2:
        raise must_be("[lowest, highest]", "scale", value)
    for end in value:
        checked_number(end, "scale", -LARGEST, LARGEST)
    if value[0] >= value[1]:
        raise must_be("[lowest, highest]", "scale", value)
    return value


def rating_of(value: object, field: str, scale: object) -> float:
    """A rating on its scale -> [0, 1]: 7 on [1, 10] -> 0.67. Without a scale (None) it must lie in
    [0, 1] already, because a 1 may be the best on one scale and the worst on another."""
    low = 0
    high = 1
    if scale is not None:
        low, high = checked_scale(scale)
    remedy = '; another scale stands in a field "scale", such as [1, 10]'
    checked_number(value, field, low, high, remedy)
    return (value - low) / (high - low)


def formats_in(row: dict, formats: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    """The formats of which the row has every field."""
    return [names for names in formats if row.keys() >= set(names)]


def format_of(row: dict, formats: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The one format whose fields the row has; none or several are an error, never a guess."""
    found = formats_in(row, formats)
    if len(found) == 1:
        return found[0]
    # prompt/response and question/answer in one row: nobody knows which of them was meant
    problem = "fields of several formats" if found else "no known fields"
    fields = ", ".join(excerpt(name) for name in row) or "none"
    choices = ", ".join("/".join(names) for names in found or formats)
    raise ValueError(f"{problem}: found {fields}; give one of {choices}")


def prompt_of(row: dict, names: tuple[str, ...]) -> list[dict]:
    """The conversation up to the answer, ending in a user's turn. names: the row's format."""
    value = row[names[0]]
    if names == ("messages",):
        if value == [] or not isinstance(value, list):
            raise must_be("a list of messages", "messages", value)
        # a list may stop before the answer, because prompts need none
        last = value[-1]
        if isinstance(last, dict) and last.get("role") == "assistant":
            value = value[:-1]
    elif names == ("instruction", "output") and row.get("input") not in (None, ""):
        # Alpaca's rows may have an input, the text that the instruction is about
        instruction = checked_text(value, "instruction")
        value = instruction + "\n" + checked_text(row["input"], "input")
    return checked_turns(value, names[0], "user")


def user_text(row: dict) -> str:
    """All that the user wrote in a parsed row, by which the row is held out or trained on; of a row
    with labels its text, so that no passage has questions on both sides."""
    if "text" in row:
        return row["text"]
    # a pair has its prompt alone; an example's or a prompt's turns are its messages
    turns = row["prompt"] if "prompt" in row else row["messages"]
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")


# ---------------------------------------------------------------------- kinds of rows

def parse_document(row: dict) -> dict:
    format_of(row, (("text",),))
    # an empty text is no error here, because pretraining drops and counts empty documents
    text = checked_characters(row["text"], "text")
    return {"text": text, "whole_file": row.get("whole_file") is True}


def is_rated_good(row: dict) -> bool:
    """What the row's "label" says; without one its answer counts as good."""
    label = row.get("label", True)
    # True and 1 are equal in Python, as are False and 0
    for word, values in ((True, (1, "1", "true")), (False, (0, "0", "false"))):
        if (label.lower() if isinstance(label, str) else label) in values:
            return word
    raise must_be("true or false", "label", label)


def parse_example(row: dict) -> dict:
    names = format_of(row, FORMATS)
    if names == ("prompt", "completion") and not is_rated_good(row):
        raise ValueError('"label" is false: an answer rated bad is nothing to imitate')
    # the world names a task and the cluster of tasks around it; public files one or neither
    task = str(row.get("task") or row.get("cluster") or "")
    if names == ("messages",):
        turns = checked_turns(row["messages"], "messages", "assistant")
        prompt_of(row, names)                     # raises unless the answer follows a user's turn
    else:
        prompt = prompt_of(row, names)
        response = response_of(row[names[1]], names[1], prompt)
        turns = [*prompt, {"role": "assistant", "content": response}]
    chain = row.get("chain")
    return {"messages": turns, "task": task, "example": row,
            "chain": chain if isinstance(chain, str) else ""}


def parse_preference(row: dict) -> dict:
    if format_of(row, (PAIR, *RANKED)) != PAIR:
        return extremes(parse_ranking(row))
    answers = {name: row[name] for name in ("chosen", "rejected")}
    prompt, (chosen, rejected) = responses_of(row, "prompt", answers)
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same; the two must differ')
    margin = row.get("margin")
    if margin is not None:
        checked_number(margin, "margin", 0, LARGEST)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin,
            "example": row}


def extremes(ranking: dict) -> dict:
    """A ranking as a pair: its best answer against its worst. A ranking of two loses nothing."""
    best, *_, worst = ranking["responses"]
    margin = None
    if ranking["ratings"]:
        highest, *_, lowest = ranking["ratings"]
        margin = highest - lowest
    return {"prompt": ranking["prompt"], "chosen": best, "rejected": worst, "margin": margin,
            "example": ranking["example"]}


def parse_single(row: dict, formats: tuple[tuple[str, ...], ...]) -> dict:
    """A prompt and the one answer to it, without what somebody thinks of the answer."""
    _, name, _ = format_of(row, formats)
    answers = {name: row[name]}
    prompt, [response] = responses_of(row, "prompt", answers)
    return {"prompt": prompt, "response": response, "example": row}


def parse_rating(row: dict) -> dict:
    answered = parse_single(row, RATED)
    rating = rating_of(row["rating"], "rating", row.get("scale"))
    return answered | {"rating": rating}


def parse_labelled(row: dict) -> dict:
    answered = parse_single(row, LABELLED)
    return answered | {"label": is_rated_good(row)}


def parse_ranking(row: dict) -> dict:
    names = format_of(row, RANKED)
    if names == ULTRAFEEDBACK:
        answers, ratings = ultrafeedback_answers(row)
    else:
        answers = listed(row, names[1])
        ratings = listed_ratings(row, names[2], len(answers))
    prompt, responses = responses_of(row, names[0], answers)
    kept = best_first(ratings, responses)
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} of {len(responses)} answers differ in text and rating; "
                         "a ranking needs 2")
    # ranks say which answer is better, and not how much
    has_ratings = "ranks" not in names
    return {"prompt": prompt, "responses": list(kept.values()),
            "ratings": list(kept) if has_ratings else None,
            "example": row, "n_equal": len(responses) - len(kept)}


def best_first(ratings: list[float], responses: list[str]) -> dict[float, str]:
    """{rating: response} from the best on: [0.2, 0.9, 0.2], [a, b, c] -> {0.9: b, 0.2: a}.

    Equal ratings would be a tie, and a text that comes twice would be better than itself: of
    either the first is kept.
    """
    rated = list(zip(ratings, responses))
    # by the rating alone, because equal ratings then keep the order of the row
    rated.sort(key=itemgetter(0), reverse=True)
    kept = {}
    for rating, response in rated:
        is_new = response not in kept.values()
        if is_new and rating not in kept:
            kept[rating] = response
    return kept


def listed_ratings(row: dict, field: str, n: int) -> list[float]:
    """What each of n answers is worth: its rating in [0, 1], or its rank with a minus."""
    values = listed(row, field)
    if len(values) != n:
        raise must_be(f"a list of {n} numbers, one for each answer", field, row[field])
    if field == "ranks":
        return negated(row["ranks"])
    scale = row.get("scale")
    return [rating_of(value, place, scale) for place, value in values.items()]


def negated(ranks: list) -> list[float]:
    """Ranks as numbers of which the highest is the best: [2, 1, 3] -> [-2, -1, -3]."""
    n = len(ranks)
    # a gap, a rank that comes twice or a fraction leaves one of the n numbers missing
    missing = [rank for rank in range(1, n + 1) if rank not in ranks]
    if missing:
        raise must_be(f"each of 1 (the best) to {n} once", "ranks", ranks)
    return [-rank for rank in ranks]


def ultrafeedback_answers(row: dict) -> tuple[dict[str, object], list[float]]:
    """The answers of a row of UltraFeedback (Cui et al. 2023), and their ratings in [0, 1].

    "overall_score" is on its own scale of 1 to 10. "custom_system_prompt" is left out, because
    each completion of a row has another one.
    """
    scale = row.get("scale")
    if scale is None:
        scale = [1, 10]
    answers = {}
    ratings = []
    for place, completion in listed(row, "completions").items():
        if not isinstance(completion, dict):
            raise must_be('an object with "response" and "overall_score"', place, completion)
        answers[f"{place}.response"] = completion.get("response")
        score = completion.get("overall_score")
        ratings.append(rating_of(score, f"{place}.overall_score", scale))
    return answers, ratings


def parse_class(row: dict) -> dict:
    format_of(row, (("text", "label"),))
    return {"text": checked_text(row["text"], "text"), "label": class_name(row["label"], "label")}


def class_name(value: object, field: str) -> str:
    """A class as text: "sad" -> "sad", 1 -> "1"."""
    # a bool is an int in Python; a float is no name, because 1.0 and 1 would be two classes
    if isinstance(value, int):
        return json.dumps(value)
    if not isinstance(value, str):
        raise must_be("the name of a class, text or a whole number", field, value)
    return checked_text(value, field)


def parse_words(row: dict) -> dict:
    format_of(row, (("tokens", "labels"),))
    words = [checked_text(word, place) for place, word in listed(row, "tokens").items()]
    labels = [class_name(label, place) for place, label in listed(row, "labels").items()]
    if len(labels) != len(words):
        raise ValueError(f'"labels" has {len(labels)} labels for the {len(words)} words of '
                         '"tokens"; each word needs one')
    if not words:
        raise must_be("a list of words", "tokens", words)
    return {"tokens": words, "labels": labels, "text": " ".join(words)}


def parse_span(row: dict) -> dict:
    format_of(row, (("question", "context", "answer"),))
    question, context, answer = [checked_text(row[name], name)
                                 for name in ("question", "context", "answer")]
    return {"question": question, "text": context, "answer": answer,
            "start": start_of(answer, context, row.get("start"))}


def start_of(answer: str, context: str, start: object) -> int:
    """The first character of the answer in the context, which a row has to say where the answer
    stands there more than once."""
    if start is None:
        n_times = context.count(answer)
        if n_times == 0:
            raise ValueError(f'"answer" {excerpt(answer)} does not stand in "context"; a span is '
                             "copied to the letter")
        if n_times > 1:
            raise ValueError(f'"answer" {excerpt(answer)} stands {n_times} times in "context"; '
                             'say which is meant by "start", the number of its first character')
        return context.index(answer)
    if type(start) is not int or start < 0:
        raise must_be("a whole number, 0 for the first character", "start", start)
    if not context.startswith(answer, start):
        raise ValueError(f'at "start" {start} the context has '
                         f'{excerpt(context[start:start + len(answer)])} and not the answer, '
                         f'{excerpt(answer)}')
    return start


def parse_chosen(row: dict) -> dict:
    """A pair as an example: its prompt, and the chosen answer to imitate."""
    pair = parse_preference(row)
    turns = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
    return {"messages": turns, "task": "", "chain": "", "example": row}


def parse_prompt(row: dict) -> dict:
    formats = (*FORMATS, ULTRAFEEDBACK)
    # `prompt` alone counts only if nothing else fits: prompt/response would be two formats
    if not formats_in(row, formats):
        formats = (("prompt",), *formats)
    names = format_of(row, formats)
    return {"messages": prompt_of(row, names), "answer": own_answer(row, names), "example": row}


def own_answer(row: dict, names: tuple[str, ...]) -> str:
    """The answer that a row of prompts has itself, "" for none: a checker compares with it."""
    # the world's rows have the key's answer beside a demonstration, which may be wrong
    if "answer" in row:
        return str(row["answer"] or "")
    if names == ("prompt",):
        return ""
    value = row[names[-1]]                     # of ("messages",) the whole conversation
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        last = value[-1]
        value = last.get("content") if last.get("role") == "assistant" else ""
    # nothing else is said about it, because no model reads it
    return value if isinstance(value, str) else ""


# ---------------------------------------------------------------------- readers

def held_out(prompt: str) -> bool:
    """True for one text in ten, by a hash: the same text is always on the same side."""
    # crc32, because Python's own hash of a text differs from process to process
    return zlib.crc32(prompt.encode()) % 10 == 9


def in_split(text: str, split: str | None) -> bool:
    """Does a row with this text belong to "train" or "heldout"? Every row belongs to None."""
    return split is None or held_out(text) == (split == "heldout")


def check_split(split: str | None) -> None:
    if split not in (None, "train", "heldout"):
        raise ValueError(f'split is {split!r}; it must be "train", "heldout" or None')


def read_documents(data: str | Path, max_bytes: int | None = None, split: str | None = None,
                   seed: int = 0, bad_rows: str = "error") -> Iterator[str]:
    """Texts of a .txt or .md file (one text), a folder, JSONL with `text`, or a world: "world"
    (without end) or "bearish", its small second language.

    split: "train", "heldout" or None (all of a file, a world's "train"). Held out are a world's
    own documents, the last tenth of a text file and, by hash, a tenth of a JSONL file's rows.
    Stops after the document that reaches max_bytes (UTF-8), and cuts a text file there. seed: which
    documents of a world.
    """
    check_split(split)
    # a world makes its held-out documents apart: all of its ordinary ones are for training
    world = world_named(data)
    if str(data).partition(":")[0] == "bearish":
        world = world_named("world" + str(data).removeprefix("bearish"))
        documents = world.bearish_documents(split or "train")
    elif world:
        documents = world.documents(seed=seed, split=split or "train")
    else:
        rows = file_rows(data, SUFFIXES)
        rows = good_rows(rows, parse_document, data, bad_rows)
        documents = (split_document(row, split, max_bytes) for row in rows)

    n_bytes = 0
    n_read = 0
    for document in documents:
        if document is None:                      # a row of the other split
            continue
        yield document
        n_read += 1
        n_bytes += len(document.encode())
        if max_bytes is not None and n_bytes >= max_bytes:
            return
    if not n_read:
        raise ValueError(f'{data}: too few documents to split; none fell into "{split}"')


def split_document(row: dict, split: str | None, max_bytes: int | None = None) -> str | None:
    """The part of a document that belongs to the split, None if none of it does; of a text file at
    most max_bytes."""
    text = row["text"]
    if not row["whole_file"]:
        return text if in_split(text, split) else None
    # a text file is one document, too long to be held out whole: its last tenth is
    cut = int(len(text) * 0.9)
    if split == "train":
        text = text[:cut]
    elif split == "heldout":
        text = text[cut:]
    if max_bytes is not None:
        raw = text.encode()
        if len(raw) > max_bytes:
            # "ignore", because the cut may fall inside a character of several bytes
            text = raw[:max_bytes].decode(errors="ignore")
    return text or None


def without_duplicates(documents: Iterable[str]) -> Iterator[str]:
    """Of documents that are the same to the letter the first. A digest of 16 bytes is kept of each,
    so that a corpus larger than memory can be read."""
    digests = set()
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if digest not in digests:
            digests.add(digest)
            yield document


def without_empty(documents: Iterable[str]) -> Iterator[str]:
    """The documents with at least one letter or digit: "\n", "" or "***" teach nothing."""
    for document in documents:
        if any(character.isalnum() for character in document):
            yield document


def read_examples(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Conversations to imitate: [{"messages", "task", "chain", "example", "where"}, ...]. chain:
    the reasoning before the answer, or "". "example": a world's own row, with the answer key; {} of
    a file's, whatever its columns are called."""
    return read_rows(data, "examples", parse_example, n, **options)


def read_preferences(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Pairs: [{"prompt": messages, "chosen": text, "rejected": text, "margin", "example", "where"},
    ...]. Of a ranking the best answer against the worst.

    margin: how much better, >= 0: a pair's own column "margin", on whatever scale; of a ranking
    the difference of the two ratings, in [0, 1]; None where nobody says.
    """
    return read_rows(data, "preferences", parse_preference, n, **options)


def read_ratings(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Answers on a scale: [{"prompt": messages, "response": text, "rating": in [0, 1], "example",
    "where"}, ...].

    A file's ratings lie in [0, 1], or its rows have "scale": [lowest, highest], which becomes
    [0, 1]. Anything beyond is an error.
    """
    return read_rows(data, "ratings", parse_rating, n, **options)


def read_labelled(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Answers that are good or bad: [{"prompt": messages, "response": text, "label": bool,
    "example", "where"}, ...], as KTO learns from (Ethayarajh et al. 2024)."""
    return read_rows(data, "labelled", parse_labelled, n, **options)


def read_rankings(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Answers in order: [{"prompt": messages, "responses": texts, best first, "ratings": of each,
    in [0, 1], or None, "example", "where"}, ...].

    Two answers at least. Ratings as in read_ratings, UltraFeedback's from 1 to 10; None of ranks.
    A ranking holds no ties: of answers with equal ratings the first is kept, of equal texts the
    best. What is left out so is counted and said; a row without two answers is a bad row.
    """
    rows = read_rows(data, "rankings", parse_ranking, n, **options)
    # here and not in parse_ranking, because it is said once of all rows
    n_equal = sum(row.pop("n_equal") for row in rows)
    if n_equal:
        print(f"{data}: left out {n_equal:,} answers that equal another of their row in rating or "
              "text", file=sys.stderr)
    return rows


def read_chosen(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """The chosen answers of pairs alone, as conversations to imitate."""
    return read_rows(data, "preferences", parse_chosen, n, **options)


def read_prompts(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Conversations to be answered: [{"messages", "answer", "example", "where"}, ...]. "answer":
    the row's own, which no model sees; "" for none."""
    return read_rows(data, "prompts", parse_prompt, n, **options)


def read_classes(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Texts with a class each: [{"text", "label", "where"}, ...]. A label is text; whole numbers
    are spelled."""
    return read_rows(data, "classes", parse_class, n, **options)


def read_words(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Words with a label each: [{"tokens", "labels", "text": the words, "where"}, ...]."""
    return read_rows(data, "words", parse_words, n, **options)


def read_spans(data: str | Path, n: int | None = None, **options) -> list[dict]:
    """Questions that a piece of a passage answers: [{"question", "text": the passage, "answer",
    "start": its first character there, "where"}, ...]. A file's rows call the passage "context",
    and have a "start" where the answer stands there more than once."""
    return read_rows(data, "spans", parse_span, n, **options)


def read_rows(data: str | Path, method: str, parse: Callable[[dict], dict], n: int | None = None,
              split: str | None = None, seed: int = 0, bad_rows: str = "error",
              **world_options) -> list[dict]:
    """n rows of World.<method>(..., **world_options), or a file's rows, at most n drawn by seed.

    split: "train", "heldout" or None (all of a file, a world's "train"). A tenth of a file's
    prompts, chosen by hash, is held out: no prompt has rows on both sides.
    """
    check_split(split)
    world = world_named(data)
    if world:
        if n is None:
            raise ValueError(f"{data}: a world has no end; say how many {method} to read")
        make_rows = getattr(world, method)                # for example World.preferences
        made = make_rows(n, split=split or "train", seed=seed, **world_options)
        rows = [(f"{data} {method}[{i}]", partial(dict, row)) for i, row in enumerate(made)]
        return list(good_rows(rows, parse, data, bad_rows))
    # options at 0 do no harm: scripts hand on --noise 0.0 whatever their data are
    if any(world_options.values()):
        raise ValueError(f"{data}: {', '.join(world_options)} can be set for a world only")

    rows = list(good_rows(file_rows(data, (".jsonl",)), parse, data, bad_rows))
    rows = [row | {"example": {}} for row in rows if in_split(user_text(row), split)]
    if not rows:
        raise ValueError(f'{data}: too few prompts to split; none fell into "{split}"')
    if n is None or n >= len(rows):
        return rows
    if split == "train":
        print(f"{data}: {n:,} of {len(rows):,} {method} are used, drawn by the seed",
              file=sys.stderr)
    # drawn from all rows, not the first n, because files are often sorted by topic
    drawn = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [rows[i] for i in sorted(drawn)]               # in the order of the file
