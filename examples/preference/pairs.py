"""Pairs to prefer one of: word problems, answered in one sentence or beside the point.

    python examples/preference/pairs.py --out data/preference

makes them up, without a network, and writes

    train.jsonl, validation.jsonl                 prompt, chosen and rejected
    train_labels.jsonl, validation_labels.jsonl   the same answers with a label, for kto

The chosen answer computes and ends. A rejected one hedges, rambles, or answers another question.
The problems are those of examples/sft; a hash of its text decides whether a problem is held out.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "sft"))
from prepare import generate

from rlsys.files import write_jsonl

REJECTED = (
    "That is an interesting question. There are many ways to think about it, and it depends on "
    "what you have in mind.",
    "I am not sure. You could try to count them, or ask somebody who knows.",
    "As a language model I have no things of my own, but I can tell you that counting is useful.",
    "First, let us think about what numbers are. Numbers are used in many places, such as shops.",
)


def pairs(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`n` different problems of a split, each with two answers."""
    rng = random.Random(seed)
    rows = []
    for row in generate(n, seed=seed, held_out=held_out):
        question, answer = row["messages"]
        rows.append(
            {
                "prompt": question["content"],
                "chosen": answer["content"],
                "rejected": rng.choice(REJECTED),
            }
        )
    return rows


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each answer by itself."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=240, help="training pairs")
    parser.add_argument("--validation", type=int, default=32, help="held-out pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", args.train), ("validation", args.validation)):
        rows = pairs(number, seed=args.seed, held_out=split == "validation")
        write_jsonl(args.out / f"{split}.jsonl", rows)
        write_jsonl(args.out / f"{split}_labels.jsonl", labelled(rows))
        print(f"{args.out}: {split} has {number} pairs, and {2 * number} answers with a label")


if __name__ == "__main__":
    main()
