"""Language consistency: does the model keep to the script it was asked to write in?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rlsys.registry import did_you_mean
from rlsys.rewards.base import ORM, register_reward

_LATIN = ("de", "en", "es", "fr", "id", "it", "nl", "pl", "pt", "tr", "vi")
SCRIPTS = {
    **dict.fromkeys(_LATIN, ("LATIN",)),
    **dict.fromkeys(("bg", "ru", "uk"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa"), ("ARABIC",)),
    "bn": ("BENGALI",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ta": ("TAMIL",),
    "th": ("THAI",),
    "zh": ("CJK",),
}
"""ISO 639-1 code -> the scripts it is written in, as Unicode names its letters."""

_NOT_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)"  # code
    # Mathematics ends before the next opening mark, so that unclosed marks cost one look a letter.
    r"|\$\$[^$]*\$\$|\$[^$\n]*\$|\\[(\[](?:(?!\\[(\[]).)*?\\[)\]]|\\[A-Za-z]+"
    r"|</?[A-Za-z_]+>"  # tags
    r"|https?://\S+",
    re.DOTALL,
)


@register_reward("language_consistency")
class LanguageConsistency(ORM):
    """Share of letters in the script of the wanted language, 0 to 1; 0 without any letters.

    Code blocks, mathematics, tags, addresses, digits and punctuation do not count. It knows
    scripts, not languages: it sees Chinese in an English answer, not French. A dataset column
    `language` sets the language row by row.
    """

    def __init__(self, language: str = "en"):
        """Settings: `language`, an ISO 639-1 code, if the dataset has no column `language`."""
        super().__init__()
        scripts(language)
        self.language = language

    def __call__(
        self, completions: list[str], language: list[str] | None = None, **columns: Any
    ) -> list[float]:
        """[G] between 0 and 1."""
        wanted = [self.language] * len(completions) if language is None else language
        return [
            share_in_script(text, scripts(code))
            for text, code in zip(completions, wanted, strict=True)
        ]

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> None:
        """See ORM: the language must be known."""
        if "language" in row:
            scripts(row["language"])


def scripts(language: str) -> tuple[str, ...]:
    """The scripts of a language.

    Raises:
        ValueError: not one of `SCRIPTS`.
    """
    if language not in SCRIPTS:
        raise ValueError(
            f"language_consistency does not know language {language!r}."
            f"{did_you_mean(str(language), list(SCRIPTS))} Known: {', '.join(sorted(SCRIPTS))}."
        )
    return SCRIPTS[language]


def share_in_script(text: str, wanted: tuple[str, ...]) -> float:
    """Letters of `text` that are in one of the scripts, divided by all letters."""
    found = [script(letter) for letter in _NOT_LANGUAGE.sub(" ", text) if letter.isalpha()]
    return sum(one in wanted for one in found) / len(found) if found else 0.0


@lru_cache(maxsize=65536)
def script(letter: str) -> str:
    """Script of a letter, the first word of its Unicode name: LATIN, CYRILLIC, CJK, HANGUL, ..."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
