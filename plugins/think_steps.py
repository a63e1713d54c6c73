"""A worked plugin: pays for arithmetic in <think> that is true.

The Countdown reward looks at the answer only, so a model may write anything while it thinks. This
one reads the steps, such as `6+4=10`, and scores the share of them that holds.
"""

import re
from fractions import Fraction

from rlsys.rewards import ORM, register_reward

THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
STEP = re.compile(rf"{NUMBER}\s*([-+*/])\s*{NUMBER}\s*=\s*{NUMBER}")


@register_reward("think_steps")
class ThinkSteps(ORM):
    """Share of true steps in the <think> part; 0 where there is none."""

    def __call__(self, completions: list[str], **columns: list) -> list[float]:
        """[G] numbers between 0 and 1, one for each completion, in order."""
        return [share_of_true_steps(text) for text in completions]


def share_of_true_steps(text: str) -> float:
    """`6+4=10 12+10=23` is 0.5."""
    thought = THOUGHT.search(text)
    steps = STEP.findall(thought.group(1)) if thought else []
    return sum(is_true(*step) for step in steps) / len(steps) if steps else 0.0


def is_true(left: str, symbol: str, right: str, result: str) -> bool:
    """Exact, so that 1/3=0.33 is false and 6/4=1.5 is true. Never eval a model's text."""
    x, y, z = Fraction(left), Fraction(right), Fraction(result)
    # x / y = z without dividing: y may be 0.
    return {"+": x + y == z, "-": x - y == z, "*": x * y == z, "/": y != 0 and x == y * z}[symbol]
