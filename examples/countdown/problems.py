"""Countdown problems: combine the numbers with + - * / to make the target.

Every problem is made from a solution, so each can be solved. A hash of the numbers and the target
decides whether a problem is held out, so that no training problem, whatever its seed, is ever one
of evaluation, in whichever order its numbers stand.

    python examples/countdown/problems.py --out data/countdown --train 2000 --validation 256

writes train.jsonl and validation.jsonl with the columns messages, nums and target. With
--solutions 12000 it writes solutions.jsonl too: that many training problems, some of them again,
whose messages end with a solution, for `rlsys sft`.
"""

from __future__ import annotations

import argparse
import hashlib
import operator
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.files import write_jsonl

PROMPT = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use + - * / and "
    "each number can only be used once. Show your work in <think> </think> tags and return the "
    "final equation in <answer> </answer> tags"
)
COLUMNS = ("messages", "nums", "target")
"""What a GRPO data file holds: not the response."""

HELD_OUT_SHARE = 10
"""One problem in this number is held out."""
MAX_MISSES = 20_000
"""Draws in a row without a new problem after which there are taken to be no more."""

_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,  # drawn only where it leaves no remainder
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_ATOM = 3


@dataclass(frozen=True, slots=True)
class _Term:
    """A partial result: its value, how it is written, and how tightly its outermost sign binds."""

    value: int
    text: str
    precedence: int = _ATOM

    def within(self, precedence: int) -> str:
        """The text as an operand that has to bind at least so tightly."""
        return self.text if self.precedence >= precedence else f"({self.text})"


def generate_problems(
    n: int,
    *,
    seed: int,
    numbers: int = 3,
    max_number: int = 20,
    max_target: int = 99,
    operations: str = "+-",
    held_out: bool = False,
    unique: bool = True,
) -> list[dict[str, Any]]:
    """`n` problems, the same for the same arguments.

    Args:
        n: how many.
        seed: seeds the draw; it does not move problems between the two splits.
        numbers: numbers of a problem, 2 to 6, each 1 to `max_number`.
        max_number: largest number.
        max_target: largest target; the smallest is 1.
        operations: the signs that solutions are made of, out of "+-*/". Each intermediate result
            is a positive integer.
        held_out: problems of the held-out split, or of the training split.
        unique: no two problems have the same numbers, in any order, and the same target. False
            draws with repetition, in other orders and with other solutions: for a supervised
            warm start that wants more rows than there are problems.

    Returns:
        Rows with `messages`, `nums`, `target`, and one solution as the `response`, such as
        "<think>6+4=10 12+10=22</think><answer>12+6+4</answer>".

    Raises:
        ValueError: arguments out of range, or more problems than exist.
    """
    _check(n, numbers, max_number, max_target, operations)
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    misses = 0
    while len(rows) < n:
        nums = [rng.randint(1, max_number) for _ in range(numbers)]
        solution = _random_solution(rng, nums, operations)
        misses += 1
        if misses > MAX_MISSES:
            raise ValueError(
                f"found only {len(rows)} of {n} problems with {numbers} numbers up to "
                f"{max_number}, targets up to {max_target} and operations {operations!r} "
                f"({'held-out' if held_out else 'training'} split). Ask for fewer, or widen them."
            )
        if solution is None:
            continue
        result, steps = solution
        key = _key(nums, result.value)
        if result.value > max_target or key in seen or is_held_out(nums, result.value) != held_out:
            continue
        misses = 0
        if unique:
            seen.add(key)
        rows.append(_row(nums, result, steps))
    return rows


def is_held_out(nums: Iterable[int], target: int) -> bool:
    """Whether this problem is for evaluation only; the order of `nums` does not matter."""
    digest = hashlib.sha256(_key(nums, target).encode()).digest()
    return int.from_bytes(digest) % HELD_OUT_SHARE == 0


def with_examples(
    rows: Iterable[dict[str, Any]], examples: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`rows` whose messages begin with `examples`, each a question and its solution as an answer.

    For models that would not find the format by themselves.
    """
    turns: list[dict[str, str]] = []
    for example in examples:
        turns += [*example["messages"], {"role": "assistant", "content": example["response"]}]
    return [row | {"messages": [*turns, *row["messages"]]} for row in rows]


def write_problems(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write the data columns of `rows`, as `write_jsonl` does."""
    return write_jsonl(path, ({name: row[name] for name in COLUMNS} for row in rows))


def write_solutions(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write conversations that end with the solution of each row, for `rlsys sft`."""
    return write_jsonl(
        path,
        (
            {"messages": [*row["messages"], {"role": "assistant", "content": row["response"]}]}
            for row in rows
        ),
    )


def _check(n: int, numbers: int, max_number: int, max_target: int, operations: str) -> None:
    if not 2 <= numbers <= 6:
        raise ValueError(f"numbers must be 2 to 6, not {numbers}")
    if min(n, max_number, max_target) < 1:
        raise ValueError(
            f"n, max_number and max_target must be at least 1, not {n}, {max_number}, {max_target}"
        )
    if not operations or not set(operations) <= set(_OPERATORS):
        raise ValueError(f"operations must be some of '+-*/', not {operations!r}")


def _key(nums: Iterable[int], target: int) -> str:
    return f"{sorted(nums)}|{target}"


def _row(nums: list[int], result: _Term, steps: list[str]) -> dict[str, Any]:
    content = PROMPT.format(nums=nums, target=result.value)
    return {
        "messages": [{"role": "user", "content": content}],
        "nums": nums,
        "target": result.value,
        "response": f"<think>{' '.join(steps)}</think><answer>{result.text}</answer>",
    }


def _random_solution(
    rng: random.Random, nums: list[int], operations: str
) -> tuple[_Term, list[str]] | None:
    """All of `nums` combined two at a time, and the steps; None where a step is not possible."""
    terms = [_Term(number, str(number)) for number in nums]
    steps = []
    while len(terms) > 1:
        left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        if left.value < right.value:
            left, right = right, left
        symbol = rng.choice(operations)
        if symbol == "/" and left.value % right.value:
            return None
        value = _OPERATORS[symbol](left.value, right.value)
        if value < 1:
            return None
        steps.append(f"{left.value}{symbol}{right.value}={value}")
        terms.append(_combine(left, symbol, right, value))
    return terms[0], steps


def _combine(left: _Term, symbol: str, right: _Term, value: int) -> _Term:
    precedence = _PRECEDENCE[symbol]
    # a+(b-c) and a*(b/c) are a+b-c and a*b/c; behind - and / the order of evaluation matters.
    tighter = precedence + (symbol in "-/")
    text = f"{left.within(precedence)}{symbol}{right.within(tighter)}"
    return _Term(value, text, precedence)


def main(argv: list[str] | None = None) -> int:
    """Command line: write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(
        description="Write Countdown problems as train.jsonl and validation.jsonl.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="training problems")
    parser.add_argument("--validation", type=int, default=256, help="held-out problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--numbers", type=int, default=3, help="numbers of a problem, 2 to 6")
    parser.add_argument("--max-number", type=int, default=20, help="largest number")
    parser.add_argument("--max-target", type=int, default=99, help="largest target")
    parser.add_argument("--operations", default="+-", help="signs of the solutions, of +-*/")
    parser.add_argument(
        "--examples", type=int, default=0, help="solved problems that every prompt begins with"
    )
    parser.add_argument(
        "--solutions", type=int, default=0, help="rows with solutions, for `rlsys sft`"
    )
    args = parser.parse_args(argv)
    if args.examples < 0:
        parser.error(f"--examples must be at least 0, not {args.examples}")
    draw = partial(
        generate_problems,
        seed=args.seed,
        numbers=args.numbers,
        max_number=args.max_number,
        max_target=args.max_target,
        operations=args.operations,
    )
    try:
        train = draw(args.train + args.examples)
        examples, train = train[: args.examples], train[args.examples :]
        for name, rows in (("train", train), ("validation", draw(args.validation, held_out=True))):
            path = args.out / f"{name}.jsonl"
            print(f"{path}: {write_problems(path, with_examples(rows, examples))} problems")
        if args.solutions:
            path = args.out / "solutions.jsonl"
            rows = with_examples(draw(args.solutions, unique=False), examples)
            print(f"{path}: {write_solutions(path, rows)} solutions")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
