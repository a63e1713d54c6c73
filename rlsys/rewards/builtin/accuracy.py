"""Is the answer mathematically right? Read and compared by math-verify."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

from rlsys.rewards.answers import (
    AnswerFormat,
    after_thinking,
    check_answer_format,
    is_prose,
    last_boxed,
    marked_answer,
    right_answer,
    right_answers,
    tagged_answers,
    warn_once,
    words_of,
)
from rlsys.rewards.base import ORM, register_reward
from rlsys.sandbox.bounded import BoundedCalls, Limit

MAX_LENGTH = 2000
"""Characters of an answer; what is longer is no answer."""


@register_reward("accuracy")
class Accuracy(ORM):
    r"""1 for an answer equal to the dataset's, else 0: numbers, fractions, sets, LaTeX.

    The answer stands after the last `</think>`: in `<answer>` tags, else in the last `\boxed{}`,
    else (`answer_format: any`) it is what math-verify finds, such as "the answer is 4" or the last
    number. Reads the columns `answer`, else `solution`, where GSM8K's `#### 72` is understood. A
    row whose answer cannot be read as mathematics, or is prose, is None: not applicable.
    """

    max_reward = 1.0
    reads_think_tags = True

    def __init__(self, answer_format: AnswerFormat = "any", time_limit_s: float = 3.0):
        """Settings.

        Args:
            answer_format: "any", "tags" for `<answer>` only, "boxed" for `\\boxed{}` only.
            time_limit_s: seconds of CPU time for one comparison. An answer that takes longer,
                such as 9^{9^{9^9}}, scores 0.

        Raises:
            ValueError: math-verify is not installed, or an unknown answer_format.
        """
        super().__init__()
        check_answer_format("accuracy", answer_format)
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("the reward accuracy needs math-verify: pip install math-verify")
        self.answer_format = answer_format
        self._check = BoundedCalls(
            "rlsys.rewards.builtin.math_check:check", cpu_limit_s=time_limit_s
        )
        self._known_golds: dict[str, bool] = {}

    def __call__(
        self,
        completions: list[str],
        solution: list[Any] | None = None,
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[G] 1.0, 0.0, or None where the row's own answer cannot be read.

        Raises:
            ValueError: a row without an answer, or with an empty one.
        """
        golds = right_answers(
            "accuracy", len(completions), is_final=_is_final, answer=answer, solution=solution
        )
        return [
            self._score(completion, None if gold is None else gold_answer(gold.value))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> None:
        """See ORM: the right answer must be a text or a number, and not empty."""
        Accuracy.gold(row)

    @staticmethod
    def gold(row: Mapping[str, Any]) -> str | None:
        """See ORM."""
        found = right_answer("accuracy", row, is_final=_is_final)
        return None if found is None else gold_answer(found.value)

    def _score(self, completion: str, gold: str | None) -> float | None:
        if gold is None:
            return None
        if gold not in self._known_golds:
            self._known_golds[gold] = self._check(gold, None, True) is True
            if not self._known_golds[gold]:
                warn_once("accuracy", f"the right answer {gold!r:.200} is no mathematics")
        if not self._known_golds[gold]:
            return None
        found, marked = self._find(completion)
        if not found or len(found) > MAX_LENGTH:
            return 0.0
        same = self._check(gold, found, marked)
        return 0.0 if same is Limit.EXCEEDED else float(same)

    def _find(self, completion: str) -> tuple[str | None, bool]:
        """The answer, and whether it was marked as one."""
        found = marked_answer(completion, self.answer_format)
        if found is not None or self.answer_format != "any":
            return found, True
        text = after_thinking(completion)
        if text is None or tagged_answers(text) != [] or last_boxed(text) is not None:
            return None, True
        # An answer in prose stands at the end, and math-verify's patterns are slow on long texts.
        return text[-MAX_LENGTH:], False


def _is_final(column: str, text: str) -> bool:
    """Whether a text without a mark is an answer: `3 apples` and `sqrt(3)`, not `See Figure 4`."""
    before_number = re.split(r"\d", text, maxsplit=1)[0]
    return not is_prose(text) and len(words_of(before_number)) < 2


def gold_answer(gold: Any) -> str:
    """The answer of a dataset's row as a text, without the `$` around LaTeX.

    Raises:
        ValueError: neither text nor finite number, or empty.
    """
    if isinstance(gold, int | float) and not isinstance(gold, bool) and math.isfinite(gold):
        return repr(gold)
    if not isinstance(gold, str):
        raise ValueError(
            f"accuracy: an answer must be text or a number, found {gold!r}. Correct the dataset."
        )
    text = gold.strip()
    bare = text[1:-1]
    if text[:1] == text[-1:] == "$" and "$" not in bare:
        text = bare.strip()
    if not text.strip("# "):
        raise ValueError(
            f"accuracy: the right answer of a row must not be empty, found {gold!r:.200}. Correct "
            "the dataset."
        )
    return text
