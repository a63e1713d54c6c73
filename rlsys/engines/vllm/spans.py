"""Which tokens of a completion are of which weight version."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """The tokens of a completion that one weight version sampled, up to the next span."""

    version: int
    first_token: int


def begin_span(spans: list[Span], version: int, *, num_tokens: int, keeps_kv: bool) -> None:
    """Have weights of `version` sample what comes after the `num_tokens` tokens so far.

    A version that sampled no token is left out, with one exception: if keys and values stay
    (`keeps_kv`), what waits with no token yet may read its prompt as the first version, under
    which it or a sibling was begun, left it. That version stays in front, with no token.
    """
    if spans[-1].first_token == num_tokens and not (keeps_kv and len(spans) == 1):
        spans.pop()
    spans.append(Span(version, num_tokens))
