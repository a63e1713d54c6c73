"""Rewards that compare an answer with the dataset's: a choice, a text, a pattern."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from rlsys.rewards.answers import (
    AnswerFormat,
    AnswerReward,
    after_thinking,
    is_missing,
    is_prose,
    last_boxed,
    marked_answer,
    tagged_answers,
)
from rlsys.rewards.base import ORM, check_choice, register_reward
from rlsys.sandbox.bounded import BoundedCalls

# A small letter only in parentheses: "the answer is a city" chooses nothing.
_ANSWER_IS = re.compile(
    r"(?i:\b(?P<wrong>(?:wrong|incorrect|false|worst)\s+)?"
    r"(?:answer|choice|option)\b(?:\s+(?:is|would\s+be))?)[*_]{0,3}\s*:?\s*[*_]{0,3}\s*"
    r"(?:\((?P<small>[A-Za-z])\)|(?P<capital>[A-Z])\b(?!['\u2019]))"
)
_CHOICE = r"[*_$\[{]*(?:\(?[A-Za-z]\)|[A-Z]\b(?!['\u2019]))"
# A letter that ends a list, and does not begin a sentence: "B, A is wrong" chooses B.
_ENDS = r"(?=\s*(?:[.,:;)/&|*\]}]|$|(?:or|and)\b|[A-Z]\b))"
_AND_ANOTHER = re.compile(
    r"[)\]}*_$]*(?:"
    rf"\.?\s*,?\s*(?:or\b|/|\|)\s*{_CHOICE}"
    rf"|\.?\s*(?:[,;&+]\s*(?:and\b)?|and\b)\s*{_CHOICE}{_ENDS}"
    r"|\.[A-Z]\b"
    rf"|\s+{_CHOICE}{_ENDS})"
)
"""Follows a letter where several are named: "A or B", "(A) or (B)", "A, B and C"."""
_AND_ANOTHER_ITEM = re.compile(r"[)\]}*_$]*[.:)]\s*\(?[A-Z]\b\s*(?:[.:)]|$)")
_IS_WRONG = re.compile(r"[)*_.]*\s+(?:is|was)\s+(?:wrong|incorrect|false|not)\b", re.IGNORECASE)
_BARE_CHOICE = re.compile(
    r"[\s(\[{*_$]*(?:\\(?:text|math)[a-z]{0,2}\s*\{\s*)?\(?([A-Z])\)?\}?[\s)\]}*_$]*(?:[.:)].*)?",
    re.IGNORECASE | re.DOTALL,
)


@register_reward("multiple_choice")
class MultipleChoice(AnswerReward):
    r"""1 for the right letter, else 0.

    The choice stands after the last `</think>`: in `<answer>` tags, else in the last `\boxed{}`,
    else (`answer_format: any`) in words such as "the answer is (B)", or it is the whole text. A
    completion that names several choices as its answer scores 0. Reads the columns `answer`, else
    `solution`: `B`, `(b)` or `B. Paris`. A row whose answer is prose is None: not applicable.
    """

    name = "multiple_choice"

    def __init__(self, choices: str = "ABCDEFGHIJ", answer_format: AnswerFormat = "any"):
        """Settings.

        Args:
            choices: the letters that are choices.
            answer_format: "any", "tags" for `<answer>` only, "boxed" for `\\boxed{}` only.
        """
        super().__init__(answer_format)
        if not re.fullmatch("[A-Z]{2,}", choices.upper()):
            raise ValueError(f"multiple_choice: choices must be two or more letters: {choices!r}")
        self.choices = choices.upper()

    def right(self, value: Any) -> str:
        """The letter.

        Raises:
            ValueError: it is not one of the choices.
        """
        letter = _letter(value) if isinstance(value, str) else None
        if letter is None or letter not in self.choices:
            raise ValueError(
                f"multiple_choice: the right answer of a row must be one of {self.choices}, "
                f"found {value!r}. Correct the dataset, or set choices."
            )
        return letter

    def score_answer(self, completion: str, right: str) -> float:
        """1.0 or 0.0."""
        return float(self._choice(completion) == right)

    def is_final(self, column: str, text: str) -> bool:
        """A choice, with or without its sentence, or a short text."""
        return _letter(text) is not None or not is_prose(text)

    def _choice(self, completion: str) -> str | None:
        marked = marked_answer(completion, self.answer_format)
        if marked is not None:
            return _only_letter(marked)
        text = after_thinking(completion)
        if self.answer_format != "any" or text is None or tagged_answers(text) != []:
            return None
        chosen = set()
        for found in _ANSWER_IS.finditer(text):
            if found["wrong"] or _IS_WRONG.match(text, found.end()):
                continue
            if _AND_ANOTHER.match(text, found.end()):
                return None
            chosen.add((found["small"] or found["capital"]).upper())
        if not chosen:
            return _only_letter(text)
        return chosen.pop() if len(chosen) == 1 else None


def _only_letter(text: str) -> str | None:
    """`_letter` of a completion, where no other choice follows: not `A. or B.`, `A.B.C.D`."""
    match = _BARE_CHOICE.fullmatch(text)
    if match is None or any(
        another.match(text, match.end(1)) for another in (_AND_ANOTHER, _AND_ANOTHER_ITEM)
    ):
        return None
    return match[1].upper()


def _letter(text: str) -> str | None:
    """The choice in `B`, `(b)`, `B. Paris`, `**B**` or `\\text{B}`; None for `A or B`."""
    match = _BARE_CHOICE.fullmatch(text)
    return match[1].upper() if match else None


@register_reward("exact_match")
class ExactMatch(AnswerReward):
    r"""1 for an answer that is the dataset's text, or one of its texts, else 0.

    The answer is what `<answer>` tags hold, else the last `\boxed{}`, else (`answer_format: any`)
    all after the last `</think>`. Unicode's equivalent spellings are equal (NFKC), and so are runs
    of white space. Reads the columns `answer`, else `solution`, or the one that `column` names: a
    text, a number, or a list of accepted ones. If a text marks its answer, as by `#### 72`, that
    counts. A row that has nothing but a `solution` in prose is None: not applicable.
    """

    name = "exact_match"

    def __init__(
        self,
        column: str | None = None,
        ignore_case: bool = True,
        ignore_punctuation: bool = False,
        answer_format: AnswerFormat = "any",
    ):
        """Settings.

        Args:
            column: dataset column with the right answer; None is `answer`, else `solution`.
            ignore_case: whether paris is Paris.
            ignore_punctuation: whether "Paris." is "Paris".
            answer_format: "any", "tags" for `<answer>` only, "boxed" for `\\boxed{}` only.
        """
        super().__init__(answer_format)
        self.column = column
        self.columns = self.columns if column is None else (column,)
        self.ignore_case = ignore_case
        self.ignore_punctuation = ignore_punctuation

    def right(self, value: Any) -> set[str]:
        """The accepted texts in their normal form.

        Raises:
            ValueError: no text is accepted, or one is empty.
        """
        texts = value if isinstance(value, list | tuple) else [value]
        known = [t for t in texts if isinstance(t, str | int | float) and not is_missing(t)]
        accepted = {self._normal(str(text)) for text in known}
        if not accepted or "" in accepted:
            raise ValueError(
                f"exact_match: the right answer of a row must be a text or a list of texts, none "
                f"of them empty, found {value!r}. Correct the dataset."
            )
        return accepted

    def score_answer(self, completion: str, right: set[str]) -> float:
        """1.0 or 0.0."""
        return float(self._normal(self._answer(completion)) in right)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """See ORM: the first text of a list."""
        found = self._find_right(row)
        if found is None:
            return None
        self.right(found.value)
        return str(found.value[0] if isinstance(found.value, list | tuple) else found.value)

    def is_final(self, column: str, text: str) -> bool:
        """Sentences may be the right answer, but not in a column that is for derivations."""
        return column != "solution" or self.column is not None or not is_prose(text)

    def _answer(self, completion: str) -> str:
        marked = marked_answer(completion, self.answer_format)
        text = after_thinking(completion)
        if marked is not None or self.answer_format != "any" or text is None:
            return marked or ""
        # Tags that do not pair up, or disagree, hold no answer, and neither does their text.
        return text if tagged_answers(text) == [] and last_boxed(text) is None else ""

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
        return " ".join(text.split())


Mode = Literal["search", "match", "fullmatch"]


@register_reward("regex_match")
class RegexMatch(ORM):
    """1 for a completion in which a regular expression is found, else 0.

    Python's `re`, with flags as `(?i)` in the pattern. The pattern is a setting, or a dataset
    column `pattern`. A search that takes more than `time_limit_s` of CPU time (catastrophic
    backtracking, as of `(a+)+b`) is stopped and scores 0.
    """

    def __init__(
        self, pattern: str | None = None, mode: Mode = "search", time_limit_s: float = 1.0
    ):
        """Settings.

        Args:
            pattern: the regular expression; None reads the column `pattern`.
            mode: "search" anywhere, "match" from the beginning, "fullmatch" the whole text.
            time_limit_s: seconds of CPU time for one completion.

        Raises:
            ValueError: not a regular expression, or an unknown mode.
        """
        super().__init__()
        check_choice("regex_match", "mode", mode, get_args(Mode))
        if pattern is not None:
            _check_pattern(pattern)
        self.pattern = pattern
        self.mode = mode
        self._matches = BoundedCalls(
            "rlsys.rewards.builtin.matching:matches", cpu_limit_s=time_limit_s
        )

    def __call__(
        self, completions: list[str], pattern: list[str] | None = None, **columns: Any
    ) -> list[float]:
        """[G] 1.0 or 0.0.

        Raises:
            ValueError: no pattern, or not a regular expression.
        """
        patterns: Sequence[str] | None = (
            pattern if self.pattern is None else [self.pattern] * len(completions)
        )
        if patterns is None:
            raise ValueError(_NO_PATTERN)
        for one in set(patterns):
            _check_pattern(one)
        return [
            float(self._matches(one, completion, self.mode) is True)
            for one, completion in zip(patterns, completions, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: the pattern must be a regular expression."""
        if self.pattern is None and "pattern" not in row:
            raise ValueError(_NO_PATTERN)
        if self.pattern is None:
            _check_pattern(row["pattern"])


_NO_PATTERN = (
    "regex_match needs a pattern: reward.reward_params: {regex_match: {pattern: ...}}, or a "
    "dataset column 'pattern'"
)


def matches(pattern: str, text: str, mode: Mode) -> bool:
    """Whether `re.<mode>` finds `pattern` in `text`; runs in the helper process."""
    return getattr(re, mode)(pattern, text) is not None


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"regex_match: a pattern must be a text, found {pattern!r:.200}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex_match: {pattern!r} is not a regular expression: {error}") from None
