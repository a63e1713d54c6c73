"""Is the answer mathematically right? Read and compared by math-verify."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

from rlsys.rewards.answers import (
    AnswerFormat,
    AnswerReward,
    after_thinking,
    is_prose,
    last_boxed,
    marked_answer,
    tagged_answers,
    warn_once,
    words_of,
)
from rlsys.rewards.base import register_reward
from rlsys.sandbox.bounded import BoundedCalls, Limit

MAX_LENGTH = 2000
"""Characters of an answer; a longer one scores 0."""


@register_reward("accuracy")
class Accuracy(AnswerReward):
    r"""1 for an answer equal to the dataset's, else 0: numbers, fractions, sets, LaTeX.

    The answer stands after the last `</think>`: in `<answer>` tags, else in the last `\boxed{}`,
    else (`answer_format: any`) it is what math-verify finds, such as "the answer is 4" or the last
    number. Reads the columns `answer`, else `solution`, where GSM8K's `#### 72` is understood. A
    row whose answer cannot be read as mathematics, or is prose, is None: not applicable.
    """

    name = "accuracy"

    def __init__(self, answer_format: AnswerFormat = "any", time_limit_s: float = 3.0):
        """Settings.

        Args:
            answer_format: "any", "tags" for `<answer>` only, "boxed" for `\\boxed{}` only.
            time_limit_s: seconds of CPU time for one comparison. An answer that takes longer,
                such as 9^{9^{9^9}}, scores 0.

        Raises:
            ValueError: math-verify is not installed, or an unknown answer_format.
        """
        super().__init__(answer_format)
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("the reward accuracy needs math-verify: pip install math-verify")
        self._check = BoundedCalls(
            "rlsys.rewards.builtin.math_check:check", cpu_limit_s=time_limit_s
        )
        self._is_readable: dict[str, bool] = {}

    def right(self, value: Any) -> str:
        """The answer as a text, without the `$` around LaTeX.

        Raises:
            ValueError: neither text nor finite number, or empty.
        """
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return repr(value)
        if not isinstance(value, str):
            raise ValueError(
                f"accuracy: an answer must be text or a number, found {value!r}. Correct the "
                "dataset."
            )
        text = value.strip()
        bare = text[1:-1]
        if text[:1] == text[-1:] == "$" and "$" not in bare:
            text = bare.strip()
        if not text.strip("# "):
            raise ValueError(
                f"accuracy: the right answer of a row must not be empty, found {value!r:.200}. "
                "Correct the dataset."
            )
        return text

    def score_answer(self, completion: str, right: str) -> float | None:
        """1.0, 0.0, or None where the row's answer cannot be read."""
        if right not in self._is_readable:
            self._is_readable[right] = self._check(right, None, True) is True
            if not self._is_readable[right]:
                warn_once("accuracy", f"the right answer {right!r:.200} is not mathematics")
        if not self._is_readable[right]:
            return None
        found, marked = self._find(completion)
        if not found or len(found) > MAX_LENGTH:
            return 0.0
        same = self._check(right, found, marked)
        return 0.0 if same is Limit.EXCEEDED else float(same)

    def is_final(self, column: str, text: str) -> bool:
        """`3 apples` and `sqrt(3)`, but not `See Figure 4`."""
        before_number = re.split(r"\d", text, maxsplit=1)[0]
        return not is_prose(text) and len(words_of(before_number)) < 2

    def _find(self, completion: str) -> tuple[str | None, bool]:
        """The answer, and whether it was marked."""
        found = marked_answer(completion, self.answer_format)
        if found is not None or self.answer_format != "any":
            return found, True
        text = after_thinking(completion)
        if text is None or tagged_answers(text) != [] or last_boxed(text) is not None:
            return None, True
        # An answer in prose stands at the end, and math-verify's patterns are slow on long texts.
        return text[-MAX_LENGTH:], False
