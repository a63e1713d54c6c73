"""Rewards for structured output: is it JSON of the right form, and does it say the right thing?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rlsys.rewards.answers import after_thinking
from rlsys.rewards.base import ORM, register_reward
from rlsys.sandbox.bounded import BoundedCalls

MAX_LENGTH = 100_000
"""Characters of JSON; what is longer scores 0."""
MAX_CHECKED = 1000
"""Different schemas of a dataset that are checked before a run, at some milliseconds each."""

_NO_SCHEMA = (
    "json_schema needs a schema: reward.reward_params: {json_schema: {schema: ...}}, or a dataset "
    "column 'schema'"
)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)


class NotJSON(ValueError):
    """The text is not one JSON value."""


@register_reward("json_schema")
class JSONSchema(ORM):
    """1 for one JSON value that fits a JSON schema, `valid_json` for other JSON, else 0.

    The JSON is all that follows the last `</think>`, or stands in its only ``` block. Duplicate
    keys, NaN, Infinity and text around it are not JSON. Schemas are of any draft that `jsonschema`
    knows; a `$ref` to an address is refused, nothing is ever fetched. Validation has a limit on
    CPU time, as a schema may hold regular expressions.
    """

    max_reward = 1.0
    reads_think_tags = True

    def __init__(
        self,
        schema: dict[str, Any] | None = None,
        valid_json: float = 0.0,
        time_limit_s: float = 2.0,
    ):
        """Settings.

        Args:
            schema: the JSON schema; None reads the column `schema`, an object or its JSON text.
            valid_json: value of JSON that does not fit, 0 to below 1.
            time_limit_s: seconds of CPU time for one completion; one that takes longer scores 0.

        Raises:
            ValueError: not a JSON schema, or `valid_json` out of range.
        """
        super().__init__()
        if not 0 <= valid_json < 1:
            raise ValueError(f"json_schema: valid_json must be 0 to below 1, not {valid_json}")
        self.valid_json = valid_json
        self._problem = BoundedCalls("rlsys.rewards.builtin.json_check:problem", cpu_limit_s=10.0)
        self._checked: set[str] = set()
        self._schema = None if schema is None else self._text(schema)
        self._fits = BoundedCalls("rlsys.rewards.builtin.json_check:fits", cpu_limit_s=time_limit_s)

    def __call__(
        self, completions: list[str], schema: list[Any] | None = None, **columns: Any
    ) -> list[float]:
        """[G] 1.0, `valid_json` or 0.0.

        Raises:
            ValueError: no schema, or not a JSON schema.
        """
        if self._schema is None and schema is None:
            raise ValueError(_NO_SCHEMA)
        texts = (
            [self._schema] * len(completions)
            if self._schema is not None
            else [self._text(one) for one in schema or []]
        )
        values = {"fits": 1.0, "json": self.valid_json}
        return [
            values.get(self._fits(text, completion), 0.0)
            for text, completion in zip(texts, completions, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: a JSON schema; after `MAX_CHECKED` different ones any JSON object passes."""
        if self._schema is None and "schema" not in row:
            raise ValueError(_NO_SCHEMA)
        if self._schema is not None:
            return
        if len(self._checked) < MAX_CHECKED:
            self._text(row["schema"])
        elif not isinstance(_object_of(row["schema"]), dict):
            raise ValueError(f"json_schema: not a JSON object: {row['schema']!r:.200}")

    def example(self, row: Mapping[str, Any]) -> str | None:
        """See ORM: a value that fits the schema; None where the first guess does not."""
        text = self._schema or self._text(row["schema"])
        schema = json.loads(text)
        guess = json.dumps(instance_of(schema, schema), ensure_ascii=False)
        return guess if self._fits(text, guess) == "fits" else None

    def _text(self, schema: Any) -> str:
        """The schema as JSON, checked once."""
        text = schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True)
        if text not in self._checked:
            problem = self._problem(text)
            if problem is not None:
                raise ValueError(f"json_schema: not a usable JSON schema: {problem}: {text[:200]}")
            self._checked.add(text)
        return text


@register_reward("json_match")
class JSONMatch(ORM):
    """Share of the fields of the dataset's object that the completion's JSON object has right.

    A field that the dataset's object does not have makes it 0, so that a model cannot try several
    names. Reads the column `expected`, an object or its JSON text, and finds the completion's JSON
    as `json_schema` does.
    """

    max_reward = 1.0
    reads_think_tags = True

    def __init__(self, all_or_nothing: bool = False):
        """Settings: `all_or_nothing` scores 1 where all fields are right, else 0."""
        super().__init__()
        self.all_or_nothing = all_or_nothing

    def __call__(self, completions: list[str], expected: list[Any], **columns: Any) -> list[float]:
        """[G] between 0 and 1.

        Raises:
            ValueError: a row whose `expected` is not an object with fields.
        """
        return [
            self._score(completion, _expected(row))
            for completion, row in zip(completions, expected, strict=True)
        ]

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> None:
        """See ORM: `expected` must be an object with fields."""
        _expected(row["expected"])

    @staticmethod
    def gold(row: Mapping[str, Any]) -> str:
        """See ORM."""
        return json.dumps(_expected(row["expected"]), ensure_ascii=False)

    def _score(self, completion: str, expected: dict[str, Any]) -> float:
        try:
            found = read_json(completion)
        except NotJSON:
            return 0.0
        if not isinstance(found, dict) or not found.keys() <= expected.keys():
            return 0.0
        right = sum(name in found and same(found[name], expected[name]) for name in expected)
        return float(right == len(expected)) if self.all_or_nothing else right / len(expected)


def read_json(completion: str) -> Any:
    """The one JSON value of a completion.

    Raises:
        NotJSON: none, or several.
    """
    text = after_thinking(completion)
    if text is None or len(text) > MAX_LENGTH:
        raise NotJSON("unfinished thinking, or too long")
    fenced = _FENCE.findall(text)
    if len(fenced) > 1:
        raise NotJSON("several blocks")
    try:
        return json.loads(
            fenced[0] if fenced else text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    # RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise NotJSON(str(error)) from None


def instance_of(schema: Any, root: Any, depth: int = 20) -> Any:
    """A small value that fits most JSON schemas; the caller checks it."""
    if not isinstance(schema, dict) or not depth:
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target = root
        for key in reference[2:].split("/"):
            target = target.get(key, {}) if isinstance(target, dict) else {}
        return instance_of(target, root, depth - 1)
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "examples"):
        if schema.get(key):
            return schema[key][0]
    if "default" in schema:
        return schema["default"]
    parts = [part for key in ("allOf", "anyOf", "oneOf") for part in schema.get(key, [])[:1]]
    if parts:
        rest = {key: value for key, value in schema.items() if key[3:] != "Of"}
        return instance_of(parts[0] | rest, root, depth - 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties", {})
        names = schema.get("required", [])
        return {name: instance_of(properties.get(name, {}), root, depth - 1) for name in names}
    if kind == "array":
        item = instance_of(schema.get("items", {}), root, depth - 1)
        return [item] * schema.get("minItems", 0)
    if kind == "string":
        return "a" * schema.get("minLength", 0)
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("maximum", schema.get("exclusiveMinimum", -1) + 1))
    return True if kind == "boolean" else None


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, and neither is true."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def _object_of(cell: Any) -> Any:
    """A cell of the dataset, its JSON text read; None if the text is not JSON."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return None


def _expected(row: Any) -> dict[str, Any]:
    row = _object_of(row)
    if not isinstance(row, dict) or not row:
        raise ValueError(
            "json_match: column 'expected' must be an object with fields, or its JSON text, found "
            f"{row!r}. Correct the dataset."
        )
    return row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise NotJSON("a key twice")
    return dict(pairs)


def _refuse_constant(name: str) -> float:
    raise NotJSON(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise NotJSON("a number beyond all")
    return value
