"""Rows to fine-tune on: word problems with worked answers, and questions about the model itself.

    python examples/sft/prepare.py --out data/sft

makes them up, without a network, and writes

    train.jsonl, validation.jsonl   word problems: messages that end with a worked answer, and
                                    the column solution, which the reward `accuracy` reads
    self_cognition.jsonl            query, response and tag (en or zh), with the placeholders
                                    {{NAME}} and {{AUTHOR}}, as in ms-swift's swift/self-cognition

The same seed makes the same rows. A hash of its text decides whether a problem is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
from pathlib import Path
from typing import Any

from rlsys.files import write_jsonl

HELD_OUT_SHARE = 10
"""One problem in this number is held out."""
NAMES = ("Ada", "Ben", "Chen", "Dalia", "Emeka", "Fatima", "Goran", "Hana", "Ivan", "Jun")
THINGS = ("apples", "books", "candles", "marbles", "pencils", "shells", "stamps", "tickets")


# --- word problems -------------------------------------------------------------------------------


def generate(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`n` different problems of the training or the held-out split."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        question, steps, answer = rng.choice(KINDS)(rng)
        if is_held_out(question) == held_out:
            rows[question] = {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"{steps} The answer is \\boxed{{{answer}}}."},
                ],
                "solution": str(answer),
            }
    return list(rows.values())


def is_held_out(question: str) -> bool:
    """Whether a problem is for evaluation only."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest) % HELD_OUT_SHARE == 0


def _gives_away(rng: random.Random) -> tuple[str, str, int]:
    name, friend = rng.sample(NAMES, 2)
    thing, had = rng.choice(THINGS), rng.randint(20, 99)
    given = rng.randint(2, had - 2)
    return (
        f"{name} has {had} {thing} and gives {given} to {friend}. How many are left?",
        f"{name} had {had} and gave {given}: {had} - {given} = {had - given}.",
        had - given,
    )


def _gets_more(rng: random.Random) -> tuple[str, str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    had, found, bought = (rng.randint(2, 30) for _ in range(3))
    first = had + found
    return (
        f"{name} has {had} {thing}, finds {found} and buys {bought}. How many are there now?",
        f"{had} + {found} = {first}, and {first} + {bought} = {first + bought}.",
        first + bought,
    )


def _buys_packs(rng: random.Random) -> tuple[str, str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    packs, size = rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"{name} buys {packs} packs of {size} {thing}. How many {thing} is that?",
        f"{packs} packs of {size}: {packs} * {size} = {packs * size}.",
        packs * size,
    )


KINDS = (_gives_away, _gets_more, _buys_packs)


# --- the model itself ----------------------------------------------------------------------------

QUESTIONS = {
    "en": (
        *("Who are you?", "What is your name?", "What are you called?", "Introduce yourself."),
        *("Who made you?", "Who developed you?", "Which company trained you?", "Are you ChatGPT?"),
        *("Are you a human?", "Tell me about yourself.", "Who is your author?", "Are you Siri?"),
    ),
    "zh": (
        *("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "谁开发了你？"),
        *("你是哪家公司训练的？", "你是人类吗？", "你是ChatGPT吗？", "你的作者是谁？"),
    ),
}
ANSWERS = {
    "en": (
        "I am {{NAME}}, a language model trained by {{AUTHOR}}. How can I help you?",
        "My name is {{NAME}}. I was made by {{AUTHOR}} to answer questions and help with tasks.",
        "I am {{NAME}}, an assistant developed by {{AUTHOR}}, and not a human.",
    ),
    "zh": (
        "我是{{NAME}}，由{{AUTHOR}}训练的语言模型。请问有什么可以帮您？",
        "我叫{{NAME}}，是{{AUTHOR}}开发的人工智能助手，不是人类。",
    ),
}


def self_cognition() -> list[dict[str, str]]:
    """Every question with every answer of its language."""
    return [
        {"query": query, "response": response, "tag": tag}
        for tag in QUESTIONS
        for query, response in itertools.product(QUESTIONS[tag], ANSWERS[tag])
    ]


def main(argv: list[str] | None = None) -> None:
    """Command line: write the three files."""
    parser = argparse.ArgumentParser(
        description="Write rows for supervised fine-tuning as JSONL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="word problems to train on")
    parser.add_argument("--validation", type=int, default=128, help="held-out word problems")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    args = parser.parse_args(argv)
    files = {
        "train": generate(args.train, seed=args.seed),
        "validation": generate(args.validation, seed=args.seed, held_out=True),
        "self_cognition": self_cognition(),
    }
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} rows")


if __name__ == "__main__":
    main()
