"""Preprocessors: a user's function that makes of each row what rlsys understands.

plugins/word_problems.py is a complete one.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from rlsys.data.readers import BadRow
from rlsys.registry import Registry

Row = dict[str, Any]
Preprocessor = Callable[[Row], Row | None]

NO_PREPROCESSOR = "none"
"""The name, in a list of one for each dataset, that leaves rows as they are."""


class RowPreprocessor:
    """Base of preprocessors that are classes, with the method that ms-swift's have.

    Example:
        @register_preprocessor("countdown")
        class Countdown(RowPreprocessor):
            def preprocess(self, row):
                row["query"] = f"Make {row['target']} out of {row['nums']}."
                return super().preprocess(row)
    """

    def preprocess(self, row: Row) -> Row | None:
        """The row to train on; None leaves it out, which is counted."""
        return row


ResponsePreprocessor = RowPreprocessor
"""ms-swift's name. Its columns `query` and `response` are understood without it."""

preprocessors: Registry[Preprocessor | type[RowPreprocessor]] = Registry("preprocessor")
"""Name -> function, or class derived from `RowPreprocessor`."""

register_preprocessor = preprocessors.register
"""Decorator form of `preprocessors[name] = value`."""


def keep_row(row: Row) -> Row:
    """The preprocessor that does nothing."""
    return row


def make_preprocessor(name: str) -> Preprocessor:
    """What is called for each row.

    Raises:
        ValueError: no such preprocessor.
    """
    if name == NO_PREPROCESSOR:
        return keep_row
    found = preprocessors[name]
    function = found().preprocess if isinstance(found, type) else found

    def checked(row: Row) -> Row | None:
        try:
            made = function(row)
        # User code: whatever it raises is told with the row and the line of the code.
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise BadRow(
                f"preprocessor {name!r} raised {type(error).__name__}: {error} "
                f"({frame.filename}, line {frame.lineno})"
            ) from error
        if made is not None and not isinstance(made, dict):
            raise BadRow(
                f"preprocessor {name!r} returned {made!r:.80}: return the row as a dictionary, or "
                "None to leave it out"
            )
        return made

    return checked
