"""A group while it is sampled, and which weight version sampled which of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rlsys.types import Prompt


class Span(NamedTuple):
    """The tokens of a completion that one weight version sampled, up to the next span."""

    version: int
    first_token: int


@dataclass(slots=True)
class RunningGroup:
    """A group that is being sampled."""

    prompt: Prompt
    version: int
    """Version of the weights when the group was added."""
    _spans: dict[int, list[Span]] = field(default_factory=dict)
    """The spans of each completion during which weights changed, by its index."""

    def spans(self, index: int) -> list[Span]:
        """The spans of completion `index`, in order."""
        return self._spans.setdefault(index, [Span(self.version, 0)])

    def begin_version(self, index: int, version: int, *, num_tokens: int, keeps_kv: bool) -> None:
        """Note that `version` samples what follows the first `num_tokens` tokens of a completion.

        A version that sampled no token is left out. The exception is the version under which the
        group was added, if keys and values stay (`keeps_kv`): it may have read the prompt, so it
        stays in front, without a token. The version that it has already begins nothing.
        """
        spans = self.spans(index)
        if spans[-1].version == version:  # a weight sync that was done again
            return
        if spans[-1].first_token == num_tokens and not (keeps_kv and len(spans) == 1):
            spans.pop()
        spans.append(Span(version, num_tokens))
