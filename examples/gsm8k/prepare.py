"""Word problems of arithmetic, with the answer in the column solution.

    python examples/gsm8k/prepare.py --out data/gsm8k                 # GSM8K, from the hub
    python examples/gsm8k/prepare.py --out data/gsm8k --generate      # made up here, no network

Both write train.jsonl and validation.jsonl with the columns messages and solution. GSM8K's own
test split is the validation split. The made-up problems are the same for the same seed, and a
hash of the text decides which are held out.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlsys.files import write_jsonl

DATASET = "openai/gsm8k"
INSTRUCTION = "Think step by step, then give the final answer as a number in \\boxed{}."
HELD_OUT_SHARE = 10
"""One made-up problem in this number is held out."""

NAMES = ("Ada", "Ben", "Chen", "Dalia", "Emeka", "Fatima", "Goran", "Hana", "Ivan", "Jun")
THINGS = ("apples", "books", "candles", "marbles", "pencils", "shells", "stamps", "tickets")


def as_row(question: str, solution: str) -> dict:
    """One line of the data file."""
    content = f"{question}\n\n{INSTRUCTION}"
    return {"messages": [{"role": "user", "content": content}], "solution": solution}


def generate(n: int, *, seed: int, held_out: bool = False) -> list[dict]:
    """`n` different made-up problems of the training or the held-out split."""
    rng = random.Random(seed)
    rows: dict[str, dict] = {}
    while len(rows) < n:
        question, answer = rng.choice(TEMPLATES)(rng)
        if is_held_out(question) == held_out:
            rows[question] = as_row(question, str(answer))
    return list(rows.values())


def is_held_out(question: str) -> bool:
    """Whether a made-up problem is for evaluation only."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest) % HELD_OUT_SHARE == 0


def _buys_and_gives(rng: random.Random) -> tuple[str, int]:
    name, friend = rng.sample(NAMES, 2)
    thing, packs, size = rng.choice(THINGS), rng.randint(2, 12), rng.randint(3, 15)
    given = rng.randint(1, packs * size - 1)
    return (
        f"{name} buys {packs} packs of {size} {thing} each and gives {given} of the {thing} to "
        f"{friend}. How many {thing} does {name} have left?"
    ), packs * size - given


def _shares(rng: random.Random) -> tuple[str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, more = rng.randint(2, 9), rng.randint(2, 20), rng.randint(1, 30)
    return (
        f"{name} has {friends * each} {thing}, shares them equally among {friends} friends, and "
        f"then gives the first friend {more} more. How many {thing} does the first friend have?"
    ), each + more


def _earns(rng: random.Random) -> tuple[str, int]:
    name, hours, wage = rng.choice(NAMES), rng.randint(3, 9), rng.randint(9, 30)
    days, rent = rng.randint(2, 6), rng.randint(5, 50)
    return (
        f"{name} works {hours} hours a day for {days} days at ${wage} an hour and pays ${rent} "
        "for travel altogether. How many dollars are left?"
    ), hours * days * wage - rent


def _walks(rng: random.Random) -> tuple[str, int]:
    name, speed, hours = rng.choice(NAMES), rng.randint(3, 7), rng.randint(2, 6)
    half = rng.randint(1, 10)
    return (
        f"{name} walks {speed} km an hour for {hours} hours, then turns round and walks back "
        f"{half} km. How many kilometres has {name} walked in total?"
    ), speed * hours + half


def _ages(rng: random.Random) -> tuple[str, int]:
    older, younger = rng.sample(NAMES, 2)
    age, times, years = rng.randint(3, 15), rng.randint(2, 4), rng.randint(2, 20)
    return (
        f"{older} is {times} times as old as {younger}, who is {age}. How old will {older} be in "
        f"{years} years?"
    ), age * times + years


TEMPLATES = (_buys_and_gives, _shares, _earns, _walks, _ages)


def download(split: str) -> Iterator[dict]:
    """GSM8K's rows; the reward reads the number after its #### by itself."""
    import datasets  # only here, as it takes seconds to import

    for row in datasets.load_dataset(DATASET, "main", split=split):
        yield as_row(row["question"], row["answer"])


def main(argv: list[str] | None = None) -> None:
    """Command line: write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(description="Write word problems as JSONL.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--generate", action="store_true", help="make problems up, without network")
    parser.add_argument("--train", type=int, default=4000, help="made-up training problems")
    parser.add_argument("--validation", type=int, default=256, help="made-up held-out problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the made-up problems")
    args = parser.parse_args(argv)
    splits: dict[str, Iterable[dict]]
    if args.generate:
        splits = {
            "train": generate(args.train, seed=args.seed),
            "validation": generate(args.validation, seed=args.seed, held_out=True),
        }
    else:
        splits = {"train": download("train"), "validation": download("test")}
    for name, rows in splits.items():
        path = args.out / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} problems")


if __name__ == "__main__":
    main()
