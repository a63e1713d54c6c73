"""Texts to turn into JSON, with the schema and the right object of each.

    python examples/json_schema/prepare.py --out data/json_schema              # from the hub
    python examples/json_schema/prepare.py --out data/json_schema --generate   # made up here

Both write train.jsonl and validation.jsonl with the columns messages, schema and expected, the
last two as JSON texts. From the hub it is NousResearch/json-mode-eval, 100 rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from rlsys.files import write_jsonl

DATASET = "NousResearch/json-mode-eval"
INSTRUCTION = "Answer with one JSON object that fits the schema, and with nothing else."
HELD_OUT_SHARE = 10
"""One text in this number is held out."""

NAMES = ("Ada Okafor", "Ben Müller", "Chen Wei", "Dalia Haddad", "Emeka Obi", "Hana Sato")
CITIES = ("Lagos", "Köln", "Chengdu", "Beirut", "Osaka", "Lima", "Oslo")
ITEMS = ("lamp", "chair", "desk", "kettle", "rug", "mirror", "shelf")


def as_row(text: str, schema: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """One line of the data file."""
    content = f"{text}\n\nSchema: {json.dumps(schema)}\n\n{INSTRUCTION}"
    return {
        "messages": [{"role": "user", "content": content}],
        "schema": json.dumps(schema),
        "expected": json.dumps(expected, ensure_ascii=False),
    }


def object_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """A schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
PERSON = object_schema(name=TEXT, age=COUNT, city=TEXT)
ORDER = object_schema(
    customer=TEXT,
    lines={"type": "array", "items": object_schema(item=TEXT, quantity=COUNT), "minItems": 1},
    express={"type": "boolean"},
)
MEETING = object_schema(
    organizer=TEXT,
    weekday={"enum": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]},
    hour={"type": "integer", "minimum": 0, "maximum": 23},
    guests={"type": "array", "items": TEXT},
)


def _person(rng: random.Random) -> dict[str, Any]:
    name, age, city = rng.choice(NAMES), rng.randint(18, 90), rng.choice(CITIES)
    text = rng.choice(
        (
            f"{name}, who turned {age} last week, lives in {city}.",
            f"Living in {city} for years now, {name} is {age} years old.",
        )
    )
    return as_row(text, PERSON, {"name": name, "age": age, "city": city})


def _order(rng: random.Random) -> dict[str, Any]:
    name, express = rng.choice(NAMES), rng.random() < 0.5
    lines = [
        {"item": item, "quantity": rng.randint(1, 9)}
        for item in rng.sample(ITEMS, rng.randint(1, 3))
    ]
    wanted = " and ".join(f"{line['quantity']} of the {line['item']}" for line in lines)
    speed = "as fast as it can be had" if express else "there is no hurry"
    text = f"{name} writes: please send me {wanted}; {speed}."
    return as_row(text, ORDER, {"customer": name, "lines": lines, "express": express})


def _meeting(rng: random.Random) -> dict[str, Any]:
    organizer, *guests = rng.sample(NAMES, rng.randint(2, 4))
    weekday, hour = rng.choice(MEETING["properties"]["weekday"]["enum"]), rng.randint(8, 17)
    clock = f"{hour}:00" if hour < 13 else f"{hour - 12} p.m."
    text = f"{organizer} meets {', '.join(guests)} on {weekday} at {clock}."
    expected = {"organizer": organizer, "weekday": weekday, "hour": hour, "guests": guests}
    return as_row(text, MEETING, expected)


def generate(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`n` different made-up texts of the training or the held-out split."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        row = rng.choice((_person, _order, _meeting))(rng)
        content = row["messages"][0]["content"]
        if is_held_out(content) == held_out:
            rows[content] = row
    return list(rows.values())


def download() -> list[dict[str, Any]]:
    """The rows of json-mode-eval: chat messages, a schema, and the right object."""
    import datasets  # only here, as it takes seconds to import

    return [
        {
            "messages": row["prompt"],
            "schema": row["schema"],
            "expected": row["completion"],
        }
        for row in datasets.load_dataset(DATASET, split="train")
    ]


def is_held_out(content: str) -> bool:
    """Whether a text is for evaluation only."""
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest) % HELD_OUT_SHARE == 0


def main(argv: list[str] | None = None) -> None:
    """Command line: write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(description="Write texts to turn into JSON as JSONL.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--generate", action="store_true", help="make texts up, without network")
    parser.add_argument("--train", type=int, default=2000, help="made-up training texts")
    parser.add_argument("--validation", type=int, default=128, help="made-up held-out texts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the made-up texts")
    args = parser.parse_args(argv)
    if args.generate:
        train = generate(args.train, seed=args.seed)
        validation = generate(args.validation, seed=args.seed, held_out=True)
    else:
        rows = download()
        held_out = [is_held_out(row["messages"][-1]["content"]) for row in rows]
        train = [row for row, held in zip(rows, held_out, strict=True) if not held]
        validation = [row for row, held in zip(rows, held_out, strict=True) if held]
    for name, rows in (("train", train), ("validation", validation)):
        path = args.out / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} texts")


if __name__ == "__main__":
    main()
