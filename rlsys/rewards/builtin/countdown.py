"""The Countdown reward: make the target out of the numbers, each used exactly once.

A model finds whatever a check forgets. So a parser that knows integers, + - * / and parentheses
reads the answer and computes it in exact fractions. Nothing is evaluated as code, and an answer
that is too long or too deep is refused before it is parsed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import permutations
from typing import Any

from rlsys.rewards.answers import row_by_row, tagged_answers
from rlsys.rewards.base import ORM, register_reward

MAX_LENGTH = 500
"""Characters of an answer, a run of white space counts as one; six numbers need far fewer."""
MAX_DEPTH = 50
"""Nested parentheses; CPython's parser itself gives up at 200."""

_NO_TARGET = "countdown needs a dataset column 'target' (or 'response')"
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_TAIL = re.compile(r"-?[0-9]+")
_SIGN = re.compile(r"(?:^|\()\s*-(?=\s*[0-9(])")
_NUMBER = re.compile(rf"({_SIGN.pattern}\s*)?([0-9]+)")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def is_solution(completion: str, nums: list[int], target: int) -> bool:
    """Whether the completion's answer makes `target` with each of `nums` used exactly once.

    The answer stands in `<answer>...</answer>`. If there are several, each must be right. A tag
    without its partner earns nothing.
    """
    answers = tagged_answers(completion) or []
    return bool(answers) and all(is_correct_answer(answer, nums, target) for answer in answers)


def is_correct_answer(answer: str, nums: list[int], target: int) -> bool:
    """Whether `answer`, the text between the tags, is right.

    A right answer is one expression of whole numbers, the binary operators + - * / and
    parentheses, optionally followed by `= target`. A minus at the beginning of the expression or
    of a parenthesis is a sign. Anything else is wrong: other signs, decimals, `x`, `×`, LaTeX.
    """
    answer = " ".join(answer.split())
    if len(answer) > MAX_LENGTH:
        return False
    expression, equals, tail = answer.partition("=")
    if equals and not (_TAIL.fullmatch(tail.strip()) and int(tail) == target):
        return False
    if not _EXPRESSION.fullmatch(expression) or not _uses_exactly(expression, nums):
        return False
    return _depth(expression) <= MAX_DEPTH and _value(expression) == target


def _uses_exactly(expression: str, nums: list[int]) -> bool:
    """Each number once, with one operator less than numbers: no `**` or `//`."""
    unused = Counter(nums)
    for sign, digits in _NUMBER.findall(expression):
        number = int(digits)
        unused[-number if sign and unused[-number] > 0 else number] -= 1
    num_operators = sum(expression.count(symbol) for symbol in "+-*/")
    return (
        not any(unused.values()) and num_operators - len(_SIGN.findall(expression)) == len(nums) - 1
    )


def _depth(expression: str) -> int:
    depth = deepest = 0
    for character in expression:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _value(expression: str) -> Fraction | None:
    """The exact value; None if the expression has none."""
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
    raise SyntaxError(f"{type(node).__name__} is not arithmetic")


MAX_SEARCHED = 20_000
"""Sets of numbers that `solve` tries: enough for all of five numbers, in 0.2 s."""


def solve(nums: list[int], target: int) -> tuple[str | None, bool]:
    """A right expression or None, and whether the search was complete."""
    seen: set[tuple[Fraction, ...]] = set()

    def search(terms: list[tuple[Fraction, str]]) -> str | None:
        if len(terms) == 1:
            return terms[0][1] if terms[0][0] == target else None
        key = tuple(sorted(value for value, _ in terms))
        if key in seen or len(seen) >= MAX_SEARCHED:
            return None
        seen.add(key)
        for (i, one), (j, other) in permutations(enumerate(terms), 2):
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for sign, compute in _SIGNS.items():
                if (sign in "+*" and i > j) or (sign == "/" and not other[0]):
                    continue
                value = compute(one[0], other[0])
                found = search([*rest, (value, f"({one[1]} {sign} {other[1]})")])
                if found is not None:
                    return found
        return None

    found = search([(Fraction(n), f"({n})" if n < 0 else str(n)) for n in nums])
    expression = None if found is None else re.sub(r"^\((.*)\)$", r"\1", found)
    return expression, len(seen) < MAX_SEARCHED


def _problem(nums: Any, target: Any) -> tuple[list[int], int]:
    if not isinstance(nums, list | tuple):
        raise ValueError(
            f"countdown needs a list of whole numbers in column 'nums', found {nums!r:.200}. "
            "Correct the dataset."
        )
    return [_integer(number, "nums") for number in nums], _integer(target, "target")


def _problem_of(row: Mapping[str, Any]) -> tuple[list[int], int]:
    if "target" not in row and "response" not in row:
        raise ValueError(_NO_TARGET)
    target = row.get("target")
    return _problem(row["nums"], row.get("response") if target is None else target)


def _integer(value: Any, column: str) -> int:
    """An int out of a dataset: 24, 24.0 or "24"."""
    if isinstance(value, str) and _TAIL.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    raise ValueError(
        f"countdown needs whole numbers in column {column!r}, found {value!r}. Correct the dataset."
    )


@register_reward("countdown")
class Countdown(ORM):
    """1 for a right answer to a Countdown problem, else 0.

    Reads the columns `nums` (list of integers) and `target`, or `response` where there is no
    `target`, as ms-swift's Countdown dataset names it.
    """

    max_reward = 1.0

    def __call__(
        self,
        completions: list[str],
        nums: list[list[int]],
        target: list[Any] | None = None,
        response: list[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """[G] 1.0 or 0.0; see `is_solution`.

        Raises:
            ValueError: the dataset has no target, or values that are not whole numbers.
        """
        if target is None and response is None:
            raise ValueError(_NO_TARGET)
        goals = row_by_row(target, response)
        return [
            float(is_solution(completion, *_problem(numbers, goal)))
            for completion, numbers, goal in zip(completions, nums, goals, strict=True)
        ]

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> None:
        """See ORM: numbers and target must be whole numbers."""
        _problem_of(row)

    @staticmethod
    def gold(row: Mapping[str, Any]) -> str:
        """See ORM."""
        nums, target = _problem_of(row)
        return f"{target} of {nums}"

    @staticmethod
    def example(row: Mapping[str, Any]) -> str | None:
        """See ORM: a right expression, or a wrong one if none is right; None if that is unknown."""
        nums, target = _problem_of(row)
        expression, searched_all = solve(nums, target)
        return " + ".join(map(str, nums)) if expression is None and searched_all else expression
