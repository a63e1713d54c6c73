"""Numbers and texts in messages."""

from __future__ import annotations

from math import isqrt

_MOST_TRIED = 1_000_000
"""Bounds the search for divisors: a number with a typing error may have fifteen digits."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 prompt" or "1,200 prompts"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def near_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` around `number`: "24 or 32" for 30 and 8."""
    below = number // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


def near_divisors(number: int, total: int) -> str:
    """The divisors of `total` around `number`: "8 or 16" for 12 and 32."""
    small = [n for n in range(1, min(isqrt(total), _MOST_TRIED) + 1) if total % n == 0]
    divisors = [*small, *[total // n for n in reversed(small)]]
    below = max(n for n in divisors if n < number)
    above = [n for n in divisors if n >= number]
    return " or ".join(str(n) for n in (below, *above[:1]))


def not_utf8(content: bytes, byte: int) -> str:
    """The problem of a line whose byte number `byte`, counted from 0, is not UTF-8."""
    hint = " (it looks like UTF-16)" if content.count(0) > len(content) // 3 else ""
    return (
        f"is not a text in UTF-8: byte {byte + 1} is {content[byte]:#04x}{hint}; convert the file "
        "to UTF-8"
    )
