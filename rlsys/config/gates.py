"""Gates: a reward that counts only where another one is high enough."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_THRESHOLD = 1.0
_GATE = re.compile(r"(?P<by>.*?)\s*(?:>=\s*(?P<threshold>\S+))?")


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on the unweighted value of another reward function."""

    by: str
    """Name of that function."""
    threshold: float = DEFAULT_THRESHOLD

    def lets_pass(self, value: float) -> bool:
        """Whether the gated function counts; also where the gate says None: it does not apply."""
        return math.isnan(value) or value >= self.threshold


def parse_gates(texts: Mapping[str, str]) -> dict[str, Gate]:
    """Gates by the name of the function that they gate.

    Example:
        {"accuracy": "format", "length": "accuracy >= 0.5"}

    Raises:
        ValueError: a text that is no gate.
    """
    return {name: parse_gate(text) for name, text in texts.items()}


def parse_gate(text: str) -> Gate:
    """`format` or `format >= 0.5`.

    Raises:
        ValueError: something else.
    """
    match = _GATE.fullmatch(text.strip())
    try:
        threshold = float(match["threshold"] or DEFAULT_THRESHOLD) if match else math.nan
    except ValueError:
        threshold = math.nan
    if match is None or not match["by"] or not math.isfinite(threshold):
        raise ValueError(
            f"{text!r} is no gate: write the name of a reward function, or NAME >= NUMBER"
        )
    return Gate(match["by"], threshold)
