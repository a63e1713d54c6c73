"""Rewards that compare an answer with the dataset's: a choice, a text, a pattern."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rlsys.rewards.answers import (
    ANSWER_COLUMNS,
    AnswerFormat,
    after_thinking,
    check_answer_format,
    is_missing,
    is_prose,
    last_boxed,
    marked_answer,
    right_answer,
    right_answers,
    tagged_answers,
)
from rlsys.rewards.base import ORM, register_reward
from rlsys.sandbox.bounded import BoundedCalls

_NO_PATTERN = (
    "regex_match needs a pattern: reward.reward_params: {regex_match: {pattern: ...}}, or a "
    "dataset column 'pattern'"
)
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
"""What follows a letter where several are named: "A or B", "(A) or (B)", "A, B and C"."""
_AND_ANOTHER_ITEM = re.compile(r"[)\]}*_$]*[.:)]\s*\(?[A-Z]\b\s*(?:[.:)]|$)")
_IS_WRONG = re.compile(r"[)*_.]*\s+(?:is|was)\s+(?:wrong|incorrect|false|not)\b", re.IGNORECASE)
_BARE_CHOICE = re.compile(
    r"[\s(\[{*_$]*(?:\\(?:text|math)[a-z]{0,2}\s*\{\s*)?\(?([A-Z])\)?\}?[\s)\]}*_$]*(?:[.:)].*)?",
    re.IGNORECASE | re.DOTALL,
)


@register_reward("multiple_choice")
class MultipleChoice(ORM):
    r"""1 for the right letter, else 0.

    The choice stands after the last `</think>`: in `<answer>` tags, else in the last `\boxed{}`,
    else (`answer_format: any`) in words such as "the answer is (B)", or it is the whole text. A
    completion that names several choices as its answer scores 0. Reads the columns `answer`, else
    `solution`: `B`, `(b)` or `B. Paris`. A row whose answer is prose is None: not applicable.
    """

    max_reward = 1.0
    reads_think_tags = True

    def __init__(self, choices: str = "ABCDEFGHIJ", answer_format: AnswerFormat = "any"):
        """Settings.

        Args:
            choices: the letters that are choices.
            answer_format: "any", "tags" for `<answer>` only, "boxed" for `\\boxed{}` only.
        """
        super().__init__()
        check_answer_format("multiple_choice", answer_format)
        if not re.fullmatch("[A-Z]{2,}", choices.upper()):
            raise ValueError(f"multiple_choice: choices must be two or more letters: {choices!r}")
        self.choices = choices.upper()
        self.answer_format = answer_format

    def __call__(
        self,
        completions: list[str],
        solution: list[Any] | None = None,
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[G] 1.0, 0.0, or None where the row has no answer.

        Raises:
            ValueError: a row whose right answer is none of the choices.
        """
        golds = right_answers(
            "multiple_choice",
            len(completions),
            is_final=_is_choice_or_short,
            answer=answer,
            solution=solution,
        )
        return [
            None if gold is None else float(self._choice(completion) == self._letter(gold.value))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: the right answer must be one of the choices."""
        self.gold(row)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """See ORM."""
        found = right_answer("multiple_choice", row, is_final=_is_choice_or_short)
        return None if found is None else self._letter(found.value)

    def _letter(self, gold: Any) -> str:
        letter = _letter(gold) if isinstance(gold, str) else None
        if letter is None or letter not in self.choices:
            raise ValueError(
                f"multiple_choice: the right answer of a row must be one of {self.choices}, "
                f"found {gold!r}. Correct the dataset, or set choices."
            )
        return letter

    def _choice(self, completion: str) -> str | None:
        marked = marked_answer(completion, self.answer_format)
        if marked is not None:
            return _only_letter(marked)
        text = after_thinking(completion)
        if self.answer_format != "any" or text is None or tagged_answers(text) != []:
            return None
        named = set()
        for found in _ANSWER_IS.finditer(text):
            if found["wrong"] or _IS_WRONG.match(text, found.end()):
                continue
            if _AND_ANOTHER.match(text, found.end()):
                return None
            named.add((found["small"] or found["capital"]).upper())
        if not named:
            return _only_letter(text)
        return named.pop() if len(named) == 1 else None


def _is_choice_or_short(column: str, text: str) -> bool:
    return _letter(text) is not None or not is_prose(text)


def _only_letter(text: str) -> str | None:
    """`_letter` of a completion, where no other choice follows: not `A. or B.`, `A.B.C.D`."""
    match = _BARE_CHOICE.fullmatch(text)
    if match is None or any(
        another.match(text, match.end(1)) for another in (_AND_ANOTHER, _AND_ANOTHER_ITEM)
    ):
        return None
    return match[1].upper()


def _letter(text: str) -> str | None:
    """The choice that `text` is: `B`, `(b)`, `B. Paris`, `**B**`, `\\text{B}`; not `A or B`."""
    match = _BARE_CHOICE.fullmatch(text)
    return match[1].upper() if match else None


@register_reward("exact_match")
class ExactMatch(ORM):
    r"""1 for an answer that is the dataset's text, or one of its texts, else 0.

    The answer is what `<answer>` tags hold, else the last `\boxed{}`, else (`answer_format: any`)
    all after the last `</think>`. Unicode's equivalent spellings are equal (NFKC), and so are runs
    of white space. Reads the columns `answer`, else `solution`, or the one that `column` names: a
    text, a number, or a list of accepted ones. Of a text that marks its answer, as by `#### 72`,
    that counts. A row that has nothing but a `solution` in prose is None: not applicable.
    """

    max_reward = 1.0
    reads_think_tags = True

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
        super().__init__()
        check_answer_format("exact_match", answer_format)
        self.column = column
        self.ignore_case = ignore_case
        self.ignore_punctuation = ignore_punctuation
        self.answer_format = answer_format

    def __call__(
        self,
        completions: list[str],
        solution: list[Any] | None = None,
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[G] 1.0, 0.0, or None where the row has no answer.

        Raises:
            ValueError: a row without an answer, or with an empty one.
        """
        columns |= {"answer": answer, "solution": solution}
        own = {name: columns.get(name) for name in self._columns}
        self._check_column(name for name, values in own.items() if values is not None)
        golds = right_answers("exact_match", len(completions), is_final=self._is_final, **own)
        return [
            None
            if gold is None
            else float(self._normal(self._answer(completion)) in self._accepted(gold.value))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: there must be a right answer, and it must not be empty."""
        self.gold(row)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """See ORM: the first text of a list."""
        self._check_column(row)
        found = right_answer("exact_match", row, columns=self._columns, is_final=self._is_final)
        if found is None:
            return None
        self._accepted(found.value)
        return str(found.value[0] if isinstance(found.value, list | tuple) else found.value)

    @property
    def _columns(self) -> tuple[str, ...]:
        return ANSWER_COLUMNS if self.column is None else (self.column,)

    def _check_column(self, there: Iterable[str]) -> None:
        if self.column is not None and self.column not in there:
            raise ValueError(f"exact_match: the dataset has no column {self.column!r}")

    def _is_final(self, column: str, text: str) -> bool:
        """Sentences may be the right answer, but not in a column that is for derivations."""
        return self.column is not None or column == "answer" or not is_prose(text)

    def _answer(self, completion: str) -> str:
        marked = marked_answer(completion, self.answer_format)
        text = after_thinking(completion)
        if marked is not None or self.answer_format != "any" or text is None:
            return marked or ""
        # Tags that do not pair up, or disagree, hold no answer, and neither does their text.
        return text if tagged_answers(text) == [] and last_boxed(text) is None else ""

    def _accepted(self, gold: Any) -> set[str]:
        golds = gold if isinstance(gold, list | tuple) else [gold]
        known = [one for one in golds if isinstance(one, str | int | float) and not is_missing(one)]
        accepted = {self._normal(str(one)) for one in known}
        if not accepted or "" in accepted:
            raise ValueError(
                f"exact_match: the right answer of a row must be a text or a list of texts, none "
                f"of them empty, found {gold!r}. Correct the dataset."
            )
        return accepted

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in text)
        return " ".join(text.split())


@register_reward("regex_match")
class RegexMatch(ORM):
    """1 for a completion in which a regular expression is found, else 0.

    Python's `re`, with flags as `(?i)` in the pattern. The pattern is a parameter, or a dataset
    column `pattern`. Matching runs in a helper process: a search that takes more than
    `time_limit_s` of CPU time (catastrophic backtracking, as of `(a+)+b`) is ended by the kernel
    and scores 0.
    """

    def __init__(
        self,
        pattern: str | None = None,
        mode: Literal["search", "match", "fullmatch"] = "search",
        time_limit_s: float = 1.0,
    ):
        """Settings.

        Args:
            pattern: the regular expression; None reads the column `pattern`.
            mode: "search" anywhere, "match" from the beginning, "fullmatch" all of it.
            time_limit_s: seconds of CPU time for one completion.

        Raises:
            ValueError: a pattern that is none, or an unknown mode.
        """
        super().__init__()
        if mode not in ("search", "match", "fullmatch"):
            raise ValueError(f"regex_match: mode must be search, match or fullmatch, not {mode!r}")
        if pattern is not None:
            check_pattern(pattern)
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
            ValueError: no pattern, or one that is none.
        """
        patterns: Sequence[str] | None = (
            pattern if self.pattern is None else [self.pattern] * len(completions)
        )
        if patterns is None:
            raise ValueError(_NO_PATTERN)
        for one in set(patterns):
            check_pattern(one)
        return [
            float(self._matches(one, completion, self.mode) is True)
            for one, completion in zip(patterns, completions, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: the pattern must be a regular expression."""
        if self.pattern is None and "pattern" not in row:
            raise ValueError(_NO_PATTERN)
        if self.pattern is None:
            check_pattern(row["pattern"])


def matches(pattern: str, text: str, mode: str) -> bool:
    """Whether `re.<mode>` finds `pattern` in `text`; runs in the helper process."""
    function = {"search": re.search, "match": re.match, "fullmatch": re.fullmatch}[mode]
    return function(pattern, text) is not None


def check_pattern(pattern: Any) -> None:
    """Raises ValueError unless it is a regular expression."""
    if not isinstance(pattern, str):
        raise ValueError(f"regex_match: a pattern must be a text, found {pattern!r:.200}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex_match: {pattern!r} is no regular expression: {error}") from None
