"""Does JSON fit a schema? Runs in the helper process of `json_schema`.

jsonschema is imported here only: reward workers start without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jsonschema
from jsonschema.protocols import Validator
from jsonschema_specifications import REGISTRY as SPECIFICATIONS
from referencing.exceptions import Unresolvable

from rlsys.rewards.builtin.json_schema import NotJSON, read_json


def problem(schema: str) -> str | None:
    """What is wrong with a schema; None when it can be used."""
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict):
            return "it is not an object"
        _validator(schema).check_schema(parsed)
    except jsonschema.SchemaError as error:
        return error.message
    except ValueError as error:
        return str(error)
    known = {value for key, value in _pairs(parsed) if key in ("$id", "id")} | set(SPECIFICATIONS)
    for key, value in _pairs(parsed):
        if key == "$ref" and "://" in str(value) and value.partition("#")[0] not in known:
            return _unresolvable(value)
    return None


def fits(schema: str, completion: str) -> str:
    """ "fits", "json" (it is JSON, and does not fit) or "none".

    Raises:
        ValueError: a `$ref` that cannot be resolved.
    """
    try:
        value = read_json(completion)
    except NotJSON:
        return "none"
    try:
        return "fits" if _validator(schema).is_valid(value) else "json"
    except Unresolvable as error:
        raise ValueError(_unresolvable(error.ref)) from None
    except ArithmeticError:
        # `multipleOf` of an integer too large for a float.
        return "none"


def _unresolvable(reference: str) -> str:
    return (
        f"$ref {reference!r} leads out of the schema, and nothing is ever fetched: put the "
        "definition under $defs"
    )


def _pairs(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object of the schema with its value."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield from ((key, value) for key, value in node.items() if isinstance(value, str))
        if isinstance(node, dict | list):
            stack.extend(node.values() if isinstance(node, dict) else node)


@lru_cache(maxsize=256)
def _validator(schema: str) -> Validator:
    parsed = json.loads(schema)
    # jsonschema opens addresses unless it has a registry.
    cls = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
    return cls(parsed, registry=SPECIFICATIONS)
