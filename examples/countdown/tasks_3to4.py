"""Countdown with 3 to 4 numbers, in the columns that ms-swift's users know: nums and response.

    python examples/countdown/tasks_3to4.py --out data/countdown_3to4              # from the hub
    python examples/countdown/tasks_3to4.py --out data/countdown_3to4 --generate   # made up here

From the hub it is Jiayi-Pan/Countdown-Tasks-3to4. Made-up problems are half of 3 and half of 4
numbers up to 99, with targets of 10 to 99. `response` is the target; a hash of numbers and target
decides which problems are held out, as in problems.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from problems import PROMPT, generate_problems, is_held_out

from rlsys.files import write_jsonl

DATASET = "Jiayi-Pan/Countdown-Tasks-3to4"
MIN_TARGET = 10


def as_row(nums: list[int], target: int) -> dict[str, Any]:
    """One line of the data file."""
    content = PROMPT.format(nums=nums, target=target)
    return {
        "messages": [{"role": "user", "content": content}],
        "nums": nums,
        "response": str(target),
    }


def generate(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`n` different problems, half of them with 3 numbers, in random order."""
    rows: list[dict[str, Any]] = []
    for numbers, wanted in ((3, n // 2), (4, n - n // 2)):
        # Some have targets below 10 and are left out.
        drawn = generate_problems(
            2 * wanted + 20,
            seed=seed,
            numbers=numbers,
            max_number=99,
            operations="+-*/",
            held_out=held_out,
        )
        kept = [as_row(row["nums"], row["target"]) for row in drawn if row["target"] >= MIN_TARGET]
        if len(kept) < wanted:
            raise ValueError(f"only {len(kept)} of {wanted} problems with {numbers} numbers found")
        rows += kept[:wanted]
    random.Random(seed).shuffle(rows)
    return rows


def download(train: int, validation: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The data set's rows, each with its split, until there are enough."""
    import datasets  # only here, as it takes seconds to import

    left = {"train": train, "validation": validation}
    for row in datasets.load_dataset(DATASET, split="train", streaming=True):
        split = "validation" if is_held_out(row["nums"], row["target"]) else "train"
        if left[split]:
            left[split] -= 1
            yield split, as_row(row["nums"], row["target"])
        if not any(left.values()):
            return


def main(argv: list[str] | None = None) -> None:
    """Command line: write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(description="Write Countdown problems of 3 to 4 numbers.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--generate", action="store_true", help="make problems up, no network")
    parser.add_argument("--train", type=int, default=25_000, help="training problems")
    parser.add_argument("--validation", type=int, default=256, help="held-out problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the made-up problems")
    args = parser.parse_args(argv)
    if args.generate:
        splits = {
            "train": generate(args.train, seed=args.seed),
            "validation": generate(args.validation, seed=args.seed, held_out=True),
        }
    else:
        splits = {"train": [], "validation": []}
        for split, row in download(args.train, args.validation):
            splits[split].append(row)
    for name, rows in splits.items():
        path = args.out / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} problems")


if __name__ == "__main__":
    main()
