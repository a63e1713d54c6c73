"""A worked plugin: pays for arithmetic in <think> that is true.

The Countdown reward looks at the answer only, so a model may write anything while it thinks. This
one reads the steps, such as `6+4=10`, and scores the share of them that holds.
"""

import asyncio
import re
from fractions import Fraction

from rlsys.rewards import ORM, register_reward

THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
STEP = re.compile(rf"{NUMBER}\s*([-+*/])\s*{NUMBER}\s*=\s*{NUMBER}")


@register_reward("think_steps")
class ThinkSteps(ORM):
    """Share of true steps in the <think> part."""

    def __init__(self, without_thought: float = 0.0):
        """Settings, which a run gives as reward.reward_params: {think_steps: {...}}.

        Args:
            without_thought: the score without a <think> part.
        """
        self.without_thought = without_thought

    def __call__(self, completions: list[str], **columns: list) -> list[float]:
        """[G] numbers, one for each completion, in order."""
        return [self.score(text) for text in completions]

    def score(self, text: str) -> float:
        """`<think>6+4=10 12+10=23</think>` is 0.5."""
        thought = THOUGHT.search(text)
        return share_of_true_steps(thought[1]) if thought else self.without_thought


@register_reward("first_number")
async def first_number(
    completions: list[str], nums: list[list[int]], **columns: list
) -> list[float | None]:
    """1 for a thought that begins with a number of the problem; None without a thought."""
    return await asyncio.gather(*map(ask_about_first_number, completions, nums))


async def ask_about_first_number(text: str, nums: list[int]) -> float | None:
    """Stands for a question to a server: nothing else waits while this one does."""
    await asyncio.sleep(0.01)
    thought = THOUGHT.search(text)
    if thought is None:
        return None  # does not apply: left out of the completion's total
    number = re.match(r"\s*(\d{1,9})\b", thought[1])
    return float(number is not None and int(number[1]) in nums)


def share_of_true_steps(thought: str) -> float:
    """`6+4=10 12+10=23` is 0.5; 0 without steps."""
    steps = STEP.findall(thought)
    return sum(is_true(*step) for step in steps) / len(steps) if steps else 0.0


def is_true(left: str, symbol: str, right: str, result: str) -> bool:
    """Exact, so that 1/3=0.33 is false and 6/4=1.5 is true. Never eval a model's text."""
    x, y, z = Fraction(left), Fraction(right), Fraction(result)
    # x / y = z without dividing: y may be 0.
    return {"+": x + y == z, "-": x - y == z, "*": x * y == z, "/": y != 0 and x == y * z}[symbol]
