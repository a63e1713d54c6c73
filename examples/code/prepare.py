"""Small programming tasks with their tests in the column tests.

    python examples/code/prepare.py --out data/code                # MBPP, from the hub
    python examples/code/prepare.py --out data/code --generate     # made up here, no network

Both write train.jsonl and validation.jsonl with the columns messages and tests (JSON text). The
made-up tasks are functions with parameters drawn at random; their tests are what the reference
function below gives. MBPP's tests are its asserts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.files import write_jsonl

DATASET = "google-research-datasets/mbpp"
INSTRUCTION = "Put the program into one ```python block."
HELD_OUT_SHARE = 10
"""One made-up task in this number is held out."""
NUM_TESTS = 6

WORDS = ("level", "a", "banana", "Grass", "xyzzy", "", "Mississippi", "no lemon no melon", "Aa bB")


@dataclass(frozen=True, slots=True)
class Task:
    """A made-up task: its text, the name of the function, and how to solve it."""

    text: str
    name: str
    solve: Callable[..., Any]
    draw: Callable[[random.Random], list[Any]]


def _numbers(rng: random.Random) -> list[Any]:
    return [[rng.randint(-20, 50) for _ in range(rng.randint(0, 8))]]


def _word(rng: random.Random) -> list[Any]:
    return [rng.choice(WORDS) + rng.choice(("", "s", " and more"))]


def make_task(rng: random.Random) -> Task:
    """A task of a random kind with random constants."""
    k, low, high = rng.randint(2, 9), rng.randint(-5, 9), rng.randint(10, 40)
    letter = rng.choice("aenos")
    return rng.choice(
        (
            Task(
                f"sum_multiples(numbers) returns the sum of the numbers divisible by {k}",
                "sum_multiples",
                lambda numbers: sum(n for n in numbers if n % k == 0),
                _numbers,
            ),
            Task(
                f"count_between(numbers) returns how many numbers are at least {low} and at most "
                f"{high}",
                "count_between",
                lambda numbers: sum(low <= n <= high for n in numbers),
                _numbers,
            ),
            Task(
                f"clip(numbers) returns the list with every number below {low} replaced by {low} "
                f"and every number above {high} by {high}",
                "clip",
                lambda numbers: [min(max(n, low), high) for n in numbers],
                _numbers,
            ),
            Task(
                f"rotate(numbers) returns the list rotated to the left by {k} places",
                "rotate",
                lambda numbers: (
                    numbers[k % len(numbers) :] + numbers[: k % len(numbers)] if numbers else []
                ),
                _numbers,
            ),
            Task(
                f"count_letter(text) returns how often the letter {letter!r} occurs in the text, "
                "in lower or upper case",
                "count_letter",
                lambda text: text.lower().count(letter),
                _word,
            ),
            Task(
                f"every(text) returns the text without every {k}-th character: the characters "
                f"number {k}, {2 * k} and so on, counted from 1, are left out",
                "every",
                lambda text: "".join(c for i, c in enumerate(text, 1) if i % k),
                _word,
            ),
            Task(
                f"power_mod(n) returns {k} to the power of n, modulo {high + 50}",
                "power_mod",
                lambda n: pow(k, n, high + 50),
                lambda rng: [rng.randint(0, 200)],
            ),
        )
    )


def generate(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`n` different made-up tasks of the training or the held-out split."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(rows) < n:
        task = make_task(rng)
        misses += 1
        if misses > 20_000:
            raise SystemExit(f"there are only {len(rows)} different tasks; ask for fewer")
        if is_held_out(task.text) == held_out and task.text not in rows:
            rows[task.text] = _as_row(task, rng)
            misses = 0
    return list(rows.values())


def _as_row(task: Task, rng: random.Random) -> dict[str, Any]:
    inputs, outputs = _examples(task, rng)
    tests = {
        "fn_name": task.name,
        "inputs": inputs,
        # In lists of one, as APPS and TACO have results.
        "outputs": [[output] for output in outputs],
    }
    content = f"Write a Python function so that {task.text}. {INSTRUCTION}"
    return {
        "messages": [{"role": "user", "content": content}],
        "tests": json.dumps(tests),
    }


def _examples(task: Task, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Arguments and results, of which no single one is right too often."""
    while True:
        inputs = [task.draw(rng) for _ in range(NUM_TESTS)]
        outputs = [task.solve(*args) for args in inputs]
        texts = [json.dumps(output) for output in outputs]
        if max(map(texts.count, texts)) <= NUM_TESTS // 2:
            return inputs, outputs


def is_held_out(text: str) -> bool:
    """Whether a made-up task is for evaluation only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()) % HELD_OUT_SHARE == 0


def download(split: str) -> list[dict[str, Any]]:
    """MBPP's checked tasks. The first test is shown, as the name of the function is only there."""
    import datasets  # only here, as it takes seconds to import

    rows = []
    for row in datasets.load_dataset(DATASET, "sanitized", split=split):
        imports = "".join(f"{line}\n" for line in row["test_imports"])
        shown = row["test_list"][0]
        content = f"{row['prompt']}\nYour code has to pass this test:\n{shown}\n{INSTRUCTION}"
        rows.append(
            {
                "messages": [{"role": "user", "content": content}],
                "tests": json.dumps([imports + test for test in row["test_list"]]),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Command line: write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(description="Write programming tasks as JSONL.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--generate", action="store_true", help="make tasks up, without network")
    parser.add_argument("--train", type=int, default=1000, help="made-up training tasks")
    parser.add_argument("--validation", type=int, default=64, help="made-up held-out tasks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the made-up tasks")
    args = parser.parse_args(argv)
    if args.generate:
        splits = {
            "train": generate(args.train, seed=args.seed),
            "validation": generate(args.validation, seed=args.seed, held_out=True),
        }
    else:
        splits = {"train": download("train"), "validation": download("validation")}
    for name, rows in splits.items():
        path = args.out / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} tasks")


if __name__ == "__main__":
    main()
