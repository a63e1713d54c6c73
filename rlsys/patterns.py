"""Regular expressions of users and of model folders, matched for a limited time.

Some expressions take exponential time for some texts, as `(a+)+b` does. `regex` reads what Python's
`re` reads, and stops when its time is up.
"""

from __future__ import annotations

from typing import Any, Literal

import regex

LIMIT_S = 2.0
"""Seconds for one text. Names of tensors and replies of a judge take microseconds."""


def find(mode: Literal["search", "fullmatch", "findall"], pattern: str, text: str) -> Any:
    """What `re.search`, `re.fullmatch` or `re.findall` returns.

    Raises:
        ValueError: it takes more than `LIMIT_S` seconds.
    """
    try:
        # Without the interpreter's lock: other threads go on, such as one that answers heartbeats.
        return getattr(regex, mode)(pattern, text, timeout=LIMIT_S, concurrent=True)
    except TimeoutError:
        raise ValueError(
            f"the regular expression {pattern!r} takes more than {LIMIT_S:g} s for the text "
            f"{text[:100]!r}: write it without a repetition inside a repetition, such as (a+)+"
        ) from None
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
