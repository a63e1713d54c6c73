"""The format reward: did the model answer in the tags it was asked for?"""

from __future__ import annotations

import re
from typing import Any

from rlsys.rewards.base import ORM, register_reward

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LAYOUT = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)


def has_format(completion: str) -> bool:
    """Whether it is `<think>...</think>`, then `<answer>...</answer>`, and nothing else.

    Each tag occurs exactly once; white space around and between the two parts is allowed, and
    both may have several lines.
    """
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return False
    return _LAYOUT.fullmatch(completion.strip()) is not None


@register_reward("format")
class Format(ORM):
    """1 for `<think>...</think><answer>...</answer>`, else 0."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        """[G] 1.0 or 0.0; see `has_format`."""
        return [float(has_format(completion)) for completion in completions]
