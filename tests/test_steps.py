"""Every leaf step of the documents' algorithms has its place in a script: a comment that begins
with the step's number, above or behind the statement that does it.

The scripts are read, not imported. A step comment is `# 3.2 FORWARD PASS`, `# 4. RETURN theta*`,
or in train_sft.py, which holds two algorithms, `# 3.7/1.2 Compute sampling weights`.
"""
import ast
import functools
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# (the document's section, script, what stands before a number there, leaf steps)
ALGORITHMS = [
    ("1.6", "train_pretrain", "", "1.1 1.2 1.3 1.4 1.5 1.6 2.1 2.2 2.3 "
                                  "3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 4"),
    ("2.5", "train_sft", "", "1.1 1.2 1.3 2.1 2.2 3.1 3.2 3.3 3.4 4 5"),
    ("3.7", "train_sft", "3.7/", "1.1 1.2 1.3 2 3.1 3.2 3.3 3.4 4"),
    ("4.5, phase 2", "train_rm", "", "1 2.1 2.2 2.3 2.4 2.5 3"),
    ("4.5, phase 3", "train_ppo", "", "4 5.1 5.2 5.3 5.4 6"),
    ("4.7", "train_dpo", "", "1 2 3.1 3.2 3.3 3.4 3.5 4"),
]
LEAVES = [(script, prefix + number) for _, script, prefix, numbers in ALGORITHMS
          for number in numbers.split()]
SCRIPTS = ["train_pretrain", "train_denoise", "train_classifier", "train_sft", "train_rm",
           "train_ppo", "train_dpo"]
STEP = re.compile(r"# ((?:3\.7/)?\d(?:\.\d)?)\.? ")

# step 5.2's parts: the name that each gives to its result, and the function that it calls
PARTS_OF_5_2 = [
    ("y", "sample.generate"),                   # generate y ~ pi_theta
    ("old_logps", "token_logps"),               # old log-probs
    ("ref_logps", "token_logps"),               # reference log-probs
    ("kl", "kl_k1"),                            # KL
    ("score", "scoring.score_responses"),       # score R
    ("rewards", "shaped_rewards"),              # reward signal r_t
    ("values", "scoring.values_before"),                # values V_t
    ("advantages", "gae"),                      # advantages A_t
    ("returns", None),                          # returns G_t
]


class Comment(NamedTuple):
    line: int
    text: str
    is_behind: bool                             # behind code, not on a line of its own


class Script(NamedTuple):
    lines: list[str]                            # the first is number 1: lines[0] is empty
    comments: list[Comment]
    statements: list[ast.stmt]                  # in the order of their lines
    main: ast.FunctionDef


@functools.cache
def read(name: str) -> Script:
    return parse((ROOT / f"{name}.py").read_text())


def parse(source: str) -> Script:
    lines = ["", *source.splitlines()]
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            is_behind = bool(lines[line][:column].strip())
            comments.append(Comment(line, token.string, is_behind))
    tree = ast.parse(source)
    statements = statements_of(tree)
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef)
              and node.name == "main"]
    return Script(lines, comments, statements, main)


def statements_of(tree: ast.AST) -> list[ast.stmt]:
    """All statements inside, those of inner blocks too, in the order of their lines."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node is not tree]
    return sorted(found, key=lambda node: node.lineno)


def step_of(comment: Comment) -> str | None:
    """The number that the comment begins with: "# 3.7/1.2 Compute ..." -> "3.7/1.2"."""
    found = STEP.match(comment.text + " ")
    return found and found.group(1)


def numbers_in(text: str) -> list[str]:
    """All that looks like a step's number: "3.1", "3.7/2", and the 4 of "4. RETURN"."""
    return re.findall(r"(?<![\w./])(3\.7/\d(?:\.\d)?|\d\.\d|\d(?=\. [A-Z]))(?!\d)", text)


def comments_of_step(script: Script, number: str) -> list[Comment]:
    return [comment for comment in script.comments if step_of(comment) == number]


def statement_of(script: Script, comment: Comment) -> ast.stmt | None:
    """The statement that a step comment stands behind or above; None if there is none.

    Above means on the line before, with nothing but further step comments between.
    """
    if comment.is_behind:
        around = [node for node in script.statements
                  if node.lineno <= comment.line <= node.end_lineno]
        return around[-1] if around else None      # the innermost begins last
    line = comment.line + 1
    step_lines = {other.line for other in script.comments
                  if step_of(other) and not other.is_behind}
    while line in step_lines:
        line += 1
    beginning = [node for node in script.statements if node.lineno == line]
    return beginning[0] if beginning else None


def called(statement: ast.stmt) -> str | None:
    """The function of `f(...)` or `x = f(...)` as it is written, "run.clip"."""
    value = getattr(statement, "value", None)
    while isinstance(value, ast.BinOp):            # values_before(...) * mask
        value = value.left
    return ast.unparse(value.func) if isinstance(value, ast.Call) else None


def assigned(statement: ast.stmt) -> str | None:
    """The first name that a statement assigns to."""
    if not isinstance(statement, ast.Assign):
        return None
    target = statement.targets[0]
    if isinstance(target, ast.Tuple):
        target = target.elts[0]
    return ast.unparse(target)


# ---------------------------------------------------------------------- one number, one place

def test_there_are_sixty_leaf_steps():
    counts = [len(numbers.split()) for *_, numbers in ALGORITHMS]
    assert counts == [19, 11, 9, 7, 6, 8] and len(set(LEAVES)) == 60


@pytest.mark.parametrize("name, number", LEAVES)
def test_every_leaf_step_has_one_comment_at_a_statement(name, number):
    script = read(name)
    comments = comments_of_step(script, number)
    assert len(comments) == 1, f"{name}.py: {number} begins {len(comments)} comments"
    [comment] = comments
    assert statement_of(script, comment), \
        f"{name}.py:{comment.line}: {comment.text!r} stands over nothing"


@pytest.mark.parametrize("name", sorted({name for name, _ in LEAVES}))
def test_no_comment_holds_two_numbers(name):
    leaves = {number for script, number in LEAVES if script == name}
    for comment in read(name).comments:
        numbers = [number for number in numbers_in(comment.text) if number in leaves]
        assert len(numbers) <= 1, f"{name}.py:{comment.line}: {comment.text}"


@pytest.mark.parametrize("section, name, prefix, numbers", ALGORITHMS)
def test_main_takes_the_steps_in_the_documents_order(section, name, prefix, numbers):
    """3.5 of 1.6 is said before the backward pass that does it, and 3.9 is the loop's own."""
    numbers = [prefix + number for number in numbers.split()]
    if section == "1.6":
        numbers = [number for number in numbers if number not in ("3.5", "3.9")]
    script = read(name)
    found = [step_of(comment) for comment in script.comments
             if script.main.lineno < comment.line <= script.main.end_lineno]
    found = [number for number in found if number in numbers]
    assert found == [number for number in numbers if number in found]
    elsewhere = {"2.5": 2, "3.7": 0}.get(section, 0)       # an example's two
    assert len(found) == len(numbers) - elsewhere


def test_35_of_pretraining_stands_where_the_last_backward_pass_is_told_to_synchronize():
    script = read("train_pretrain")
    [comment] = comments_of_step(script, "3.5")
    statement = statement_of(script, comment)
    assert assigned(statement) == "forward.require_backward_grad_sync"
    assert ast.unparse(statement.value) == "batch is batches[-1]"
    # before the forward pass of the same micro-batch, because DDP asks there
    after = [called(node) for node in script.statements if node.lineno > statement.lineno]
    assert after.index("token_logps") < after.index("run.backward") < after.index("run.clip")


def test_the_nine_parts_of_52_are_nine_statements_in_their_order():
    script = read("train_ppo")
    [begin] = comments_of_step(script, "5.2")
    [end] = comments_of_step(script, "5.3")
    inside = [node for node in statements_of(script.main) if begin.line < node.lineno < end.line]
    names = [name for name, _ in PARTS_OF_5_2]
    parts = [node for node in inside if assigned(node) in names]
    assert [(assigned(node), called(node)) for node in parts] == PARTS_OF_5_2
    assert len({node.lineno for node in parts}) == 9


# ---------------------------------------------------------------------- the update in sight

@pytest.mark.parametrize("name", SCRIPTS)
def test_main_writes_backward_clip_step_and_zero(name):
    """PPO clips, steps and zeroes actor and critic one after the other."""
    order = []
    for statement in statements_of(read(name).main):
        function = called(statement) or ""
        if function.endswith(".zero_grad"):
            function = "zero_grad"
        if function in ("run.backward", "run.clip", "run.step", "zero_grad"):
            if function not in order[-1:]:
                order.append(function)
    assert order == ["run.backward", "run.clip", "run.step", "zero_grad"]


def test_main_of_pretraining_has_at_most_sixty_statements():
    assert len(statements_of(read("train_pretrain").main)) <= 60


def lines_of_main(name: str) -> list[str]:
    script = read(name)
    lines = script.lines[script.main.lineno:script.main.end_lineno + 1]
    return [line.strip() for line in lines if line.strip()]


def n_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)                # of the lines of a so far and b[:j]
    for line in a:
        former = lengths.copy()
        for j, other in enumerate(b, 1):
            if line == other:
                lengths[j] = former[j - 1] + 1
            else:
                lengths[j] = max(former[j], lengths[j - 1])
    return lengths[-1]


@pytest.mark.parametrize("name", ["train_rm", "train_sft"])
def test_twenty_lines_of_dpos_main_stand_in_the_others_too(name):
    assert n_common(lines_of_main("train_dpo"), lines_of_main(name)) >= 20


# ---------------------------------------------------------------------- the checks themselves

@pytest.mark.parametrize("body, line", [
    ("# 3.1 Sample\n    x = 1", 3),
    ("x = 1  # 3.1 Sample", 2),
    ("# 3.1 Sample\n    # 3.7/3.1 by weights\n    x = 1", 4),
    ("x = f(1,\n          2)  # 3.1 Sample", 2),
    ("if y:\n        x = 1  # 3.1 Sample", 3),
    ("# 3.1 Sample\n\n    x = 1", None),                   # above a blank line
    ("# 3.1 Sample\n    # because of that\n    x = 1", None),
    ("x = 1\n    # 3.1 Sample", None)])
def test_a_step_comment_belongs_to_the_statement_before_it_on_its_line_or_below_it(body, line):
    script = parse(f"def main():\n    {body}\n")
    [comment] = comments_of_step(script, "3.1")
    statement = statement_of(script, comment)
    assert (statement and statement.lineno) == line


@pytest.mark.parametrize("comment, numbers", [
    ("# 3.1 Sample, 3.2 forward", ["3.1", "3.2"]), ("# 3.7/3.1 by 3.1", ["3.7/3.1", "3.1"]),
    ("# 3.7/2 theta", ["3.7/2"]), ("# 4. MERGE, 5. RETURN", ["4", "5"]),
    ("# 2.2 AdamW(0.9, 0.95, 1e-8, 0.1)", ["2.2", "0.9", "0.1"])])
def test_numbers_are_found_in_a_comment(comment, numbers):
    assert numbers_in(comment) == numbers


def test_the_longest_common_subsequence_by_hand():
    assert n_common(list("abcde"), list("xbydze")) == 3    # b d e
    assert n_common(list("ab"), list("ba")) == 1
    assert n_common([], ["a"]) == 0
