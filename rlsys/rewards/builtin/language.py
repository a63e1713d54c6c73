"""Language consistency: does the model keep to the script it was asked to write in?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rlsys.registry import did_you_mean
from rlsys.rewards.base import ORM, register_reward

SCRIPTS = {
    "ar": ("ARABIC",),
    "bg": ("CYRILLIC",),
    "bn": ("BENGALI",),
    "de": ("LATIN",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "es": ("LATIN",),
    "fa": ("ARABIC",),
    "fr": ("LATIN",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "id": ("LATIN",),
    "it": ("LATIN",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "nl": ("LATIN",),
    "pl": ("LATIN",),
    "pt": ("LATIN",),
    "ru": ("CYRILLIC",),
    "ta": ("TAMIL",),
    "th": ("THAI",),
    "tr": ("LATIN",),
    "uk": ("CYRILLIC",),
    "vi": ("LATIN",),
    "zh": ("CJK",),
}
"""ISO 639-1 code -> the scripts it is written in, as Unicode names its letters."""

_NOT_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)"  # code
    # Mathematics. What is opened ends before the next opening, so that unclosed marks cost no
    # more than one look at each letter.
    r"|\$\$[^$]*\$\$|\$[^$\n]*\$|\\[(\[](?:(?!\\[(\[]).)*?\\[)\]]|\\[A-Za-z]+"
    r"|</?[A-Za-z_]+>"  # tags
    r"|https?://\S+",
    re.DOTALL,
)


@register_reward("language_consistency")
class LanguageConsistency(ORM):
    """Share of letters in the script of the wanted language, 0 to 1; 0 without any letters.

    Code blocks, mathematics, tags and addresses are left out, digits and punctuation do not
    count. It knows scripts, not languages: it sees Chinese in an English answer, not French.
    A dataset column `language` says the language row by row.
    """

    def __init__(self, language: str = "en"):
        """Settings.

        Args:
            language: ISO 639-1 code of the wanted language, where the dataset has no column
                `language`.
        """
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
            f"{did_you_mean(str(language), list(SCRIPTS))} Known: {', '.join(SCRIPTS)}."
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
