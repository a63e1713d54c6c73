"""The format rewards: did the model answer in the tags that the prompt asks for?"""

from __future__ import annotations

import re
from typing import Any, Literal

from rlsys.rewards.base import ORM, register_reward
from rlsys.types import OPEN_THINK

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LAYOUT = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)


def has_format(completion: str) -> bool:
    """Whether it is `<think>...</think>`, then `<answer>...</answer>`, and nothing else.

    Each tag occurs exactly once; white space around the two parts is allowed.
    """
    return _has_each_tag_once(completion) and _LAYOUT.fullmatch(completion.strip()) is not None


def has_format_somewhere(completion: str) -> bool:
    """Whether it has one `<think>...</think>` and, after it, one `<answer>...</answer>`.

    Each tag occurs exactly once; any text may stand around the two parts.
    """
    places = [completion.find(tag) for tag in _TAGS]
    return _has_each_tag_once(completion) and places == sorted(places)


def _has_each_tag_once(completion: str) -> bool:
    return all(completion.count(tag) == 1 for tag in _TAGS)


class _TagFormat(ORM):
    max_reward = 1.0

    def __init__(self, prompt_opens_think: bool | Literal["auto"] = "auto"):
        """Settings.

        Args:
            prompt_opens_think: whether the prompt ends with `<think>`, so that completions begin
                inside it and must not repeat the tag. "auto" looks at each prompt.

        Raises:
            ValueError: another value.
        """
        super().__init__()
        if prompt_opens_think not in (True, False, "auto"):
            raise ValueError(
                f"format: prompt_opens_think must be true, false or auto, not "
                f"{prompt_opens_think!r}"
            )
        self.reads_think_tags = prompt_opens_think == "auto"
        self._opened = OPEN_THINK if prompt_opens_think is True else ""


@register_reward("format")
class Format(_TagFormat):
    """1 for `<think>...</think><answer>...</answer>` and nothing else, else 0."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        """[G] 1.0 or 0.0; see `has_format`."""
        return [float(has_format(self._opened + completion)) for completion in completions]


@register_reward("format_soft")
class FormatSoft(_TagFormat):
    """1 for one `<think>` part, then one `<answer>` part, with any text around them, else 0."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        """[G] 1.0 or 0.0; see `has_format_somewhere`."""
        return [float(has_format_somewhere(self._opened + text)) for text in completions]
