"""Secrets that users write into a config: found by their names, and left out of what others see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
_NAME = re.compile(
    r"(.*[_-])?((api|access|private)[_-]?key|secret([_-]?key)?|password|passwd|credentials?"
    r"|(auth|access|api|bearer|hf|hub|refresh)[_-]?token)|token|authorization",
    re.IGNORECASE,
)
"""Names of settings whose values are secrets. `eos_token` is not one, nor `api_key_env`."""
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
"""User and password in an address."""


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of nested values with `***` in the place of secrets.

    Args:
        value: mappings, lists and plain values.
        name: the key that `value` stands under.
    """
    if isinstance(value, dict):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inner, name) for inner in value)
    if isinstance(value, str) and value:
        return HIDDEN if is_secret(name) else without_password(value)
    return value


def is_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret."""
    return _NAME.fullmatch(name) is not None


def without_password(text: str) -> str:
    """A text with `***` for the user and password of each address in it."""
    return _IN_URL.sub(f"{HIDDEN}@", text) if "://" in text else text


def names_of_secrets(values: dict[str, Any], start: str = "") -> Iterator[str]:
    """The dotted names of the secrets in nested mappings, `reward.reward_params.mine.api_key`."""
    for key, value in values.items():
        name = f"{start}{key}"
        if isinstance(value, dict):
            yield from names_of_secrets(value, f"{name}.")
        elif without_secrets(value, str(key)) != value:
            yield name


def values_of_secrets(values: Any, name: str = "") -> list[str]:
    """The texts of all secrets in nested mappings and lists, for leaving them out elsewhere."""
    if isinstance(values, dict):
        return [
            text for key, inner in values.items() for text in values_of_secrets(inner, str(key))
        ]
    if isinstance(values, list | tuple):
        return [text for inner in values for text in values_of_secrets(inner, name)]
    return [values] if isinstance(values, str) and values and is_secret(name) else []
