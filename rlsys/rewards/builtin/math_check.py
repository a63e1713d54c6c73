"""Are two answers the same number, set or expression? Runs in the helper process of `accuracy`.

math-verify reads and compares. Its own time limits are off: they are signals, which do not
interrupt C code.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Expr, N, pi
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.trigonometric import InverseTrigonometricFunction

from rlsys.rewards.builtin.latex import in_one_spelling, without_style

# They warn that no time limit is set; the helper process has one.
logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
logging.getLogger("math_verify.grader").setLevel(logging.ERROR)

_log = logging.getLogger(__name__)

_EQUAL_WITHIN = 1e-6  # as math-verify rounds
_MOST_BRACKETS = 5
"""Brackets within brackets."""
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_NO_WORDS = re.compile(r"\\(?:text|mathrm|textbf|operatorname|mbox|begin|end)\s*\{[^{}]*\}")
_LATEX = LatexExtractionConfig(boxed_match_priority=0)


def check(gold: str, answer: str | None, marked: bool) -> bool:
    """`is_same`, or without an answer whether `gold` can be read."""
    if answer is not None:
        return is_same(gold, answer, marked)
    # math-verify returns the text alone when it is not mathematics.
    return any(not isinstance(value, str) for value in _read(gold, True))


def is_same(gold: str, answer: str, marked: bool) -> bool:
    """Whether `answer` is `gold`.

    Args:
        gold: the dataset's answer, with nothing around it.
        answer: the model's answer, or a text in which math-verify looks for one: LaTeX, "the
            answer is 4", or the last number.
        marked: whether it is the answer alone.
    """
    # Words in LaTeX are read as symbols, and words without it not at all.
    if marked and without_style(gold) == without_style(answer):
        return True
    right = _read(gold, True)
    try:
        found = _read(answer, marked)
        if not found or any(_contradicts_itself(value) for value in found):
            return False
        return bool(verify(right, found, timeout_seconds=None))
    except (RecursionError, MemoryError):
        raise  # the helper process ends; another one takes the next answer
    except Exception:
        # sympy raises errors of many kinds at what a model may write, and none may end a run.
        _log.debug("an answer that cannot be compared: %.200r", answer, exc_info=True)
        return False


@lru_cache(maxsize=1024)
def _read(text: str, marked: bool) -> list[Any]:
    text = in_one_spelling(text, is_answer=marked)
    if not marked:
        return parse(text, parsing_timeout=None)
    # In a box all of the text is the answer: without one math-verify reads 2\sqrt{3} as 2.
    prose = "$" in text or r"\boxed" in text or _WORD.search(_NO_WORDS.sub("", text)) is not None
    read = [] if prose else parse(f"\\boxed{{{text}}}", [_LATEX], parsing_timeout=None)
    read = read or parse(text, [_LATEX, ExprExtractionConfig()], parsing_timeout=None)
    side = _right_side(text) if all(isinstance(value, str) for value in read) else None
    return read if side is None else _read(side, True)


def _right_side(text: str) -> str | None:
    r"""The right side of one equation: `P(X>2) = 0.3` is 0.3. None for several equations."""
    left, equals, right = text.partition("=")
    for _ in range(_MOST_BRACKETS):
        left = re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "", left)
    return right if equals and "=" not in right and not re.search(r"[,;<>]", left) else None


def _contradicts_itself(value: Any) -> bool:
    """`4 = 3` or `1 = 2 = 3`: math-verify would take the right side for the answer."""
    return isinstance(value, Basic) and any(
        isinstance(equation.lhs, Expr)
        and isinstance(equation.rhs, Expr)
        and not equation.free_symbols
        and not equation.atoms(AppliedUndef)  # as in `f(2) = 4`
        and not _is_true(equation)
        for equation in value.atoms(Eq)
    )


def _is_true(equation: Eq) -> bool:
    r"""Whether both sides have one value; an angle may stand in degrees, `\arcsin 1 = 90`."""
    left, right = equation.lhs.doit(), equation.rhs.doit()
    if left == right and right.is_infinite:
        return equation.lhs != right  # a limit, and not `\infty = \infty`
    in_degrees = equation.lhs.has(InverseTrigonometricFunction)
    return _is_zero(left - right) or (in_degrees and _is_zero(left * 180 / pi - right))


def _is_zero(difference: Expr) -> bool:
    size = abs(N(difference))
    # NaN for `\infty = \infty` or `\frac00 = 3`, which compares with nothing.
    return size.is_finite is True and bool(size <= _EQUAL_WITHIN)
