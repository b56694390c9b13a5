"""
How good is a set of instructions? Its four dimensions, counted without any model.

The formula of the document (001 section 3.3.3) is Quality(D) = f(Diversity, Complexity,
Correctness, Format Consistency): task coverage, reasoning depth, factual accuracy, template
adherence. It names no measures and no f. Here each dimension has a few measures that can be counted
on any set; there is no f, because what one dimension loses another does not make up for
(experiments/quality.py).

  diversity     tasks            how many different tasks the rows name
                effective_tasks  exp(H) of the tasks' shares: so many equal tasks would be as varied
                openings         exp(H) of the first two words of the prompts, which stand for the
                                 verb and its object that Self-Instruct counts by a parser
                distinct         different prompts / rows
                novel            1 - the mean over prompts of the highest ROUGE-L with another one
  complexity    prompt_words     mean words of all that the user says
                answer_words     mean words of the answer, the chain before it among them
                several_turns    share of conversations in which the user speaks more than once
                reasoning        share of answers with a reasoning chain or a step, 7 + 5 = 12
                steps            mean number of such steps, where there are any
  correctness   right            share of answers that the world's judge finds right
                right_steps      share of the steps that are right
                agreeing         of prompts that stand there several times, the share of answers
                                 that are their prompt's most frequent one
  format        roles            share of rows: system, if at all, then user and assistant in turn
                no_control       ... without a control token spelled in a turn, such as <|user|>
                opening          ... that open as most of their task do: "Answer:", "**", "{", bare
                ending           ... that end as most of their task do: with a mark, or with none
                consistent       ... all four

Higher is more, or better, everywhere. Each measure is {"value": None where nothing can tell,
"of_rows": the share of the rows that it is counted on}.

    python evaluate.py --data_quality tasks.jsonl      # or world, world:SEED
"""
import ast
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from fractions import Fraction
from itertools import pairwise

import numpy as np

import readers
from world.judge import is_right, parse_answer

WORLD_ROWS = 10_000                   # of a world, which has no end
SAMPLE = 500                          # prompts that are compared with each other: 125,000 pairs
LONGEST = 100                         # words of a prompt that are compared

# Of a sum, "48 / 2", before its "=". "x" is one, because "2 x 3 + 1 = 7" would otherwise be read
# from the 3 on, and be wrong.
IN_SUMS = "0123456789.,$ +-*/×÷x()"
# What stands behind the "=": a number that no further operation follows, and that is no percentage.
RESULT = re.compile(r"[\s*]*\$?(\d[\d,]*+(?:\.\d+)?+)(?!%|\s*[-+*/×÷x]\s*[\d(])")
MARKED = re.compile(r"<<(.*?)>>")     # GSM8K's calculator: <<16-3-4=9>> (Cobbe et al. 2021)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}
CONTROL = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]")
OPENING = re.compile(r"\W*(?:[A-Z]\w*(?: \w+)?:)?")        # marks, then a label: "**Answer:"


def read(data: str, seed: int) -> list[dict]:
    """All conversations of a file or folder, the first WORLD_ROWS of a world; as read_examples."""
    n = WORLD_ROWS if readers.world_named(data) else None
    return readers.read_examples(data, n, seed=seed)


def quality(rows: list[dict], seed: int = 0) -> dict[str, dict[str, dict]]:
    """{dimension: {measure: {"value", "of_rows"}}} of at least one row of readers.read_examples.
    seed: of the prompts that are compared."""
    return {"diversity": diversity(rows, seed), "complexity": complexity(rows),
            "correctness": correctness(rows), "format": format_consistency(rows)}


def counted(value: float | None, n_of: int, rows: list[dict]) -> dict:
    """A measure that n_of of the rows have told; none of them: no value."""
    return {"value": float(value) if n_of else None, "of_rows": n_of / len(rows)}


def share(hits: list[bool], rows: list[dict]) -> dict:
    """How often a thing that was told of some of the rows is true."""
    return counted(sum(hits) / max(1, len(hits)), len(hits), rows)


# ---------------------------------------------------------------------- diversity: task coverage

def diversity(rows: list[dict], seed: int) -> dict[str, dict]:
    tasks = [row["task"] for row in rows if row["task"]]
    prompts = [readers.user_text(row) for row in rows]
    openings = [tuple(words_of(prompt)[:2]) for prompt in prompts]
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(rows))[:SAMPLE]
    sample = [words_of(prompts[i])[:LONGEST] for i in chosen]
    # A single prompt has no other.
    n_compared = len(sample) if len(sample) > 1 else 0
    return {"tasks": counted(len(set(tasks)), len(tasks), rows),
            "effective_tasks": counted(effective_number(tasks), len(tasks), rows),
            "openings": counted(effective_number(openings), len(rows), rows),
            "distinct": counted(len({prompt_of(row) for row in rows}) / len(rows), len(rows), rows),
            "novel": counted(1 - np.mean(nearest(sample)), n_compared, rows)}


def prompt_of(row: dict) -> tuple[tuple[str, str], ...]:
    """All that comes before the answer."""
    return tuple((turn["role"], turn["content"]) for turn in row["messages"][:-1])


def words_of(text: str) -> list[str]:
    """"Tell me, Fern!" -> ["tell", "me", "fern"]."""
    return re.findall(r"\w+", text.lower())


def effective_number(things: Iterable[Hashable]) -> float:
    """exp(H), H = -sum p log p over the shares of the things: K equally frequent ones -> K, one
    that is nearly all -> 1 (Hill 1973); 1 of no things."""
    counts = np.array(list(Counter(things).values()))
    p = counts / counts.sum()
    return math.exp(-(p * np.log(p)).sum())


def nearest(texts: list[list[str]]) -> np.ndarray:
    """(n,) the highest ROUGE-L of each text with another, in [0, 1]. Self-Instruct takes a new
    instruction only where this is below 0.7 (Wang et al. 2023, section 2.2)."""
    highest = np.zeros(len(texts))
    for i, text in enumerate(texts):
        for j in range(i):
            score = rouge_l(text, texts[j])
            highest[i] = max(highest[i], score)
            highest[j] = max(highest[j], score)
    return highest


def rouge_l(a: list[str], b: list[str]) -> float:
    """2 LCS / (|a| + |b|): F1 of the longest common subsequence (Lin 2004), in [0, 1]."""
    return 2 * common_subsequence(a, b) / max(1, len(a) + len(b))


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of its table as the bits of one number: bit
    i is 0 where the table grows at a[i] (Hyyrö 2004). 50 times as fast as the table."""
    places = defaultdict(int)
    for i, word in enumerate(a):
        places[word] |= 1 << i
    whole = (1 << len(a)) - 1
    row = whole
    for word in b:
        matches = row & places.get(word, 0)
        row = (row + matches) | (row - matches)
    return len(a) - (row & whole).bit_count()


# ---------------------------------------------------------------------- complexity: reasoning depth

def complexity(rows: list[dict]) -> dict[str, dict]:
    n = len(rows)
    answers = [whole_answer(row) for row in rows]
    prompt_words = [len(readers.user_text(row).split()) for row in rows]
    answer_words = [len(answer.split()) for answer in answers]
    users = [[turn["role"] for turn in row["messages"]].count("user") for row in rows]
    steps = [len(steps_in(answer)) for answer in answers]
    reasons = [bool(row["chain"]) or found > 0 for row, found in zip(rows, steps)]
    n_with = sum(found > 0 for found in steps)
    return {"prompt_words": counted(sum(prompt_words) / n, n, rows),
            "answer_words": counted(sum(answer_words) / n, n, rows),
            "several_turns": share([count > 1 for count in users], rows),
            "reasoning": share(reasons, rows),
            "steps": counted(sum(steps) / max(1, n_with), n_with, rows)}


def whole_answer(row: dict) -> str:
    """The answer behind its chain, as train_sft.py learns it."""
    answer = row["messages"][-1]["content"]
    return answer if row["chain"] in answer else f"{row['chain']} {answer}"


def steps_in(text: str) -> list[bool]:
    """Whether each step of arithmetic is right: "7 + 5 = 12. 12 - 3 = 8." -> [True, False].

    Where GSM8K's marks <<...>> are, they alone count. What is no plain sum of numbers ("x = 5",
    "60% of 20 = 12") is no step. 10 / 3 = 3.33 is right: rounded to the decimals that it has.
    """
    text = "\n".join(MARKED.findall(text)) or text
    found = []
    for before, behind in pairwise(text.split("=")):
        result = RESULT.match(behind)
        run = before[len(before.rstrip(IN_SUMS)):]
        value = value_of(re.split("[.,] ", run)[-1])       # "12. 12 - 3" -> "12 - 3"
        if result is None or value is None:
            continue
        number = result[1].replace(",", "")
        _, _, decimals = number.partition(".")
        rounding = Fraction(1, 2 * 10 ** len(decimals)) if decimals else 0
        found.append(abs(value - Fraction(number)) <= rounding)
    return found


def value_of(text: str) -> Fraction | None:
    """"16 - 3 * (2 + 1)" -> 7; None for what is no sum of at least two numbers."""
    text = re.sub(r"[$,]", "", text).strip(" *")           # ** begins what is printed in bold
    text = text.translate({ord("×"): "*", ord("÷"): "/", ord("x"): "*"})
    try:
        tree = ast.parse(text, mode="eval").body
        return computed(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, KeyError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def computed(node: ast.expr) -> Fraction:
    """Raises KeyError for any operation but + - * /: a sign is none, for it may be a bullet."""
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](computed(node.left), computed(node.right))
    if not isinstance(node, ast.Constant):
        raise KeyError(node)
    return Fraction(str(node.value))           # by its text, because 0.1 is 1/10 on paper


# ---------------------------------------------------------------------- correctness

def correctness(rows: list[dict]) -> dict[str, dict]:
    """What cannot be checked has no value: a file's facts, say, or answers without steps."""
    judged = [is_right(row["example"], row["messages"][-1]["content"])
              for row in rows if "key" in row["example"]]
    of_rows = [found for row in rows if (found := steps_in(whole_answer(row)))]
    steps = [step for found in of_rows for step in found]
    answers = defaultdict(list)                # to each prompt
    for row in rows:
        answer = final_answer(row)
        if answer is not None:
            answers[prompt_of(row)].append(answer)
    repeated = [Counter(given) for given in answers.values() if len(given) > 1]
    n_repeated = sum(given.total() for given in repeated)
    n_agreeing = sum(max(given.values()) for given in repeated)
    return {"right": share(judged, rows),
            "right_steps": counted(sum(steps) / max(1, len(steps)), len(of_rows), rows),
            "agreeing": counted(n_agreeing / max(1, n_repeated), n_repeated, rows)}


def final_answer(row: dict) -> str | None:
    """What two answers to one prompt must share: in the world the parsed answer (None where there
    is none, as in a story), else what stands behind GSM8K's "####", else all words."""
    text = row["messages"][-1]["content"]
    if "key" in row["example"]:
        return parse_answer(row["example"], text)
    return " ".join(words_of(text.rpartition("####")[2]))


# ---------------------------------------------------------------------- format: template adherence

def format_consistency(rows: list[dict]) -> dict[str, dict]:
    """Empty answers need no measure: readers refuse them."""
    answers = [row["messages"][-1]["content"] for row in rows]
    tasks = [row["task"] for row in rows]
    follows = {"roles": [in_order(row["messages"]) for row in rows],
               "no_control": [not any(CONTROL.search(turn["content"]) for turn in row["messages"])
                              for row in rows],
               "opening": as_most([opening(answer) for answer in answers], tasks),
               "ending": as_most([has_ending(answer) for answer in answers], tasks)}
    follows["consistent"] = [all(of_row) for of_row in zip(*follows.values())]
    return {name: share(hits, rows) for name, hits in follows.items()}


def in_order(turns: list[dict]) -> bool:
    """System, if at all, then user and assistant in turn."""
    roles = [turn["role"] for turn in turns]
    if roles[0] == "system":
        roles = roles[1:]
    return roles == ["user", "assistant"] * (len(roles) // 2)


def opening(answer: str) -> str:
    """The marks and the label before an answer: "**Answer:** 7" -> "**Answer:", "A frog." -> ""."""
    return OPENING.match(answer).group().strip()


def has_ending(answer: str) -> bool:
    """"A frog." -> True; "A frog", "a frog," and "a frog and" are cut off, or never have a mark."""
    last = answer.rstrip()[-1]
    return not (last.isalnum() or last in ",;:-")


def as_most(styles: list[Hashable], tasks: list[str]) -> list[bool]:
    """Whether each row has its own task's most frequent style. By task, because a task of JSON has
    another style than one of stories, and both are consistent."""
    counts = defaultdict(Counter)
    for style, task in zip(styles, tasks):
        counts[task][style] += 1
    most = {task: of_task.most_common(1)[0][0] for task, of_task in counts.items()}
    return [style == most[task] for style, task in zip(styles, tasks)]


# ---------------------------------------------------------------------- the table

def table(figures: dict[str, dict[str, dict]], n: int) -> str:
    """A line for each measure; n: how many rows there are."""
    lines = [f"{f'{n:,} rows':14s} {'':16s} {'value':>14s}   of the rows"]
    for dimension, measures in figures.items():
        for name, measure in measures.items():
            value = measure["value"]
            told = "cannot be told" if value is None else f"{value:14.3f}"
            lines.append(f"{dimension:14s} {name:16s} {told}   {measure['of_rows']:11.1%}")
    return "\n".join(lines)
