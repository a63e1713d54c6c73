"""What an audit finds: how much was checked, what could not be, and the first difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.files import decode_row
from rlsys.rotation import open_parts


@dataclass(frozen=True, slots=True)
class Checked:
    """Something that was compared and is right."""

    what: str
    how_much: str
    """n of m, in words."""


@dataclass(frozen=True, slots=True)
class NotChecked:
    """Something that could not be compared."""

    what: str
    why: str


Finding = Checked | NotChecked


class Difference(Exception):
    """A file says something else than what follows from the others."""

    def __init__(self, where: str, field: str, recorded: Any, expected: Any, why: str = ""):
        super().__init__(where, field, recorded, expected, why)

    def __str__(self) -> str:
        where, field, recorded, expected, why = self.args
        because = f" ({why})" if why else ""
        return (
            f"{where}, {field}: recorded {_shown(recorded)}, expected {_shown(expected)}{because}"
        )


def line_of(path: Path, occurrence: int = 1, **fields: Any) -> str:
    """`FILE, line N` of a row with these values, in a file or its older parts; `occurrence` counts
    from 1."""
    with ExitStack() as stack:
        for part, file in open_parts(path, stack):
            for number, line in enumerate(file, start=1):
                row = decode_row(line)
                if row is not None and all(row.get(k) == v for k, v in fields.items()):
                    occurrence -= 1
                    if not occurrence:
                        return f"{part.name}, line {number}"
    described = ", ".join(f"{name} {value}" for name, value in fields.items())
    return f"{path.name}, {described}"


def is_same(one: Any, other: Any, tolerance: float = 1e-9) -> bool:
    """Whether two numbers are equal up to the order in which they were summed; NaN and None are."""
    one, other = (math.nan if value is None else float(value) for value in (one, other))
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance * 1e-3)


def compare(
    path: Path, step: int, recorded: dict[str, Any], expected: dict[str, float], why: str
) -> Iterator[str]:
    """Compare the metrics of a row; yields the names of those that were compared.

    Raises:
        Difference: the first that differs.
    """
    for name, value in expected.items():
        if name not in recorded:
            continue  # an older version did not log it
        # Advantages of tokens are float32, whose sums depend on how they are vectorised.
        tolerance = 1e-5 if "advantages/" in name else 1e-9
        if not is_same(recorded[name], value, tolerance):
            where = line_of(path, step=step, **{name: recorded[name]})
            raise Difference(where, name, recorded[name], value, why)
        yield name


def _shown(value: Any) -> str:
    return f"{value:.17g}" if isinstance(value, float) else str(value)
