"""Text from a model or a data set, made safe to show on a terminal."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners: harmless, and part of how Persian, Hindi and emoji are written."""
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that move the cursor, reverse the text or cannot be encoded."""


def printable(text: str) -> str:
    r"""`text` with tabs as spaces and control characters escaped; newlines stay.

    Example:
        printable("a\x1b[31m") == r"a\x1b[31m"  # shown, not obeyed
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escape, text.replace("\r\n", "\n").expandtabs(4)))


def _escape(character: str) -> str:
    if character == "\n" or character in JOINERS:
        return character
    if unicodedata.category(character) in INVISIBLE:
        return character.encode("unicode_escape").decode("ascii")
    return character
