"""Types of config fields that pydantic does not have: paths, names of rewards, lists as texts."""

from __future__ import annotations

import os
import re
import types
import typing
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OMEGACONF_VARIABLE = re.compile(r"oc\.env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:,.*)?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COMMAND = re.compile(r"\$\([^)]*\)?|`[^`]*`")
_HOLDS_PATH = re.compile(r"(.*_)?(path|file|folder|dir|directory)")
"""Reward settings with these names are paths. Others may be patterns, where $ is the end."""
REWARD_MODEL_PREFIX = "reward_model:"
"""Prefix that makes the path of a model the name of a reward function."""


def parse_ports(text: str) -> range:
    """The TCP ports of "20000-20099", or of "20000".

    Raises:
        ValueError: it is not a range of ports.
    """
    found = re.fullmatch(r"(\d{1,5})(?:\s*[-:]\s*(\d{1,5}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1024 <= first <= last <= 65535:
        raise ValueError(f"{text!r} is not a range of ports from 1024 to 65535: write 20000-20099")
    return range(first, last + 1)


def expand_path(text: str) -> str:
    """The path with `~` at its beginning, `$NAME` and `${NAME}` replaced, as a shell would.

    Raises:
        ValueError: a variable is not set, `${...}` does not hold a name, or the text is a URL, a
            command, or the home folder of an unknown user.
    """
    url, command = _URL.match(text), _COMMAND.search(text)
    if url:
        raise ValueError(
            f"{url[0]} is not read or written: download or mount it, and write the path on this "
            "machine"
        )
    if command:
        raise ValueError(f"{command[0]} is a command, which is not run: write what it prints")
    path = os.path.expanduser(_VARIABLE.sub(_value_of, text))
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"this machine has no user {user[1:]!r}: write the path, or ./{user}")
    return path


def _value_of(found: re.Match[str]) -> str:
    name = found["bare"] or found["braced"]
    if not _NAME.fullmatch(name):
        omegaconf = _OMEGACONF_VARIABLE.fullmatch(name)
        if omegaconf:
            raise ValueError(f"write ${{{omegaconf['name']}}} instead of {found[0]}")
        raise ValueError(
            f"{found[0]} is not the name of an environment variable, and nothing else is replaced: "
            "write ${NAME}, or the value"
        )
    if name not in os.environ:
        raise ValueError(
            f"the environment variable {name} is not set: `export {name}=...` first, or write its "
            "value"
        )
    return os.environ[name]


def _expand_reward_name(text: str) -> str:
    """Expand the path in the name of a reward model; other names may hold variables too."""
    if not text.startswith(REWARD_MODEL_PREFIX):
        return expand_path(text)
    return REWARD_MODEL_PREFIX + expand_path(text.removeprefix(REWARD_MODEL_PREFIX))


def _expand_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Expand the settings of a reward function that are paths by their name."""
    return {
        key: expand_path(value) if isinstance(value, str) and _HOLDS_PATH.fullmatch(key) else value
        for key, value in settings.items()
    }


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, a hub id, or a name made from one: variables and `~` are replaced."""
RewardName = Annotated[str, AfterValidator(_expand_reward_name)]
"""The name of a reward function, or `reward_model:PATH`."""
RewardSettings = Annotated[dict[str, Any], AfterValidator(_expand_settings)]
"""Settings of one reward function."""


def check_regex(pattern: str) -> str:
    """The text, which is a regular expression.

    Raises:
        ValueError: it is not one.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"is not a regular expression: {error}. Write a backslash before a sign that stands "
            "for itself"
        ) from None
    return pattern


Regex = Annotated[str, AfterValidator(check_regex)]
"""A regular expression of Python's `re`."""


def split_list(text: str) -> list[str]:
    """`a,b` as a list: its parts, or the one path that has a comma in its name."""
    if "," not in text or os.path.exists(os.path.expandvars(os.path.expanduser(text))):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def kinds_of(info: FieldInfo) -> set[Any]:
    """The types that a field takes: {list, NoneType} for `list[float] | None`."""
    union = typing.get_origin(info.annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(info.annotation) if union else (info.annotation,)
    return {_plain(member) for member in members}


def _plain(kind: Any) -> Any:
    """`list` for `list[str]`, `int` for `PositiveInt`."""
    origin = typing.get_origin(kind)
    return _plain(typing.get_args(kind)[0]) if origin is Annotated else origin or kind
