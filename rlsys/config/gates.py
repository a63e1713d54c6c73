"""Gates: a reward that counts only where another one is high enough."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_THRESHOLD = 1.0
_GATE = re.compile(r"(?P<by>.+?)\s*(?:>=\s*(?P<threshold>\S+))?")


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on the unweighted value of another reward function."""

    by: str
    """Name of that function."""
    threshold: float = DEFAULT_THRESHOLD

    def lets_pass(self, value: float) -> bool:
        """Whether the gated function counts; also where the gate does not apply (NaN)."""
        return math.isnan(value) or value >= self.threshold


def parse_gates(texts: Mapping[str, str]) -> dict[str, Gate]:
    """Gates by the name of the function that they gate.

    Example:
        {"accuracy": "format", "length": "accuracy >= 0.5"}

    Raises:
        ValueError: a text is not a gate.
    """
    return {name: parse_gate(text) for name, text in texts.items()}


def parse_gate(text: str) -> Gate:
    """Read `format` or `format >= 0.5`.

    Raises:
        ValueError: the text is something else.
    """
    match = _GATE.fullmatch(text.strip())
    try:
        threshold = float(match["threshold"] or DEFAULT_THRESHOLD) if match else math.nan
    except ValueError:
        threshold = math.nan
    if match is None or not math.isfinite(threshold):
        raise ValueError(
            f"{text!r} is not a gate: write the name of a reward function, or NAME >= NUMBER"
        )
    return Gate(match["by"], threshold)
