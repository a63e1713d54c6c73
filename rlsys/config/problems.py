"""A broken rule between config fields, and words for numbers that would keep it."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple


class RuleProblem(NamedTuple):
    """One broken rule."""

    fields: tuple[str, ...]
    """The fields it is about, as `section.field`."""
    text: str
    """What is wrong, with the numbers, and what to do."""


def count(things: list[Any], what: str) -> str:
    """Such as "2 values"."""
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


_MOST_TRIED = 1_000_000
"""A number with a typing error may have fifteen digits: advice can do without some divisors."""


def near_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` around `number`: "24 or 32" for 30 and 8."""
    below = number // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


def near_divisors(number: int, of: int) -> str:
    """The divisors of `of` around `number`: "8 or 16" for 12 and 32."""
    small = [n for n in range(1, min(isqrt(of), _MOST_TRIED) + 1) if of % n == 0]
    divisors = [*small, *[of // n for n in reversed(small)]]
    below = max(n for n in divisors if n < number)
    above = [n for n in divisors if n >= number]
    return " or ".join(str(n) for n in (below, *above[:1]))
