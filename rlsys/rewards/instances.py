"""From a registered reward class and its settings to what is called, checked before a run starts.

Settings are the keyword arguments of `reward.reward_params`, completed by values of the run.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from rlsys.registry import did_you_mean
from rlsys.rewards.base import ORM, RewardFunction, orms

Params = Mapping[str, Any]
KEYWORD_KINDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NOT_TEXTS = {"bool": "true or false", "int": "a number", "float": "a number"}


class RewardError(ValueError):
    """A reward function could not be instantiated or called, raised, or returned no rewards."""


class RewardArgs:
    """The `args` that a class written for ms-swift finds in its constructor.

    Its attributes are the settings that `reward.reward_params` has for the class, and
    `max_completion_length` and `model_path` of the run.
    """

    def __init__(self, name: str, values: Params):
        self.__dict__.update(values)
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked for by copy and pickle
            raise AttributeError(attribute)
        raise AttributeError(
            f"args has no {attribute!r}: set it with reward.reward_params, "
            f"{{{self._name}: {{{attribute}: VALUE}}}}"
        )


def settings_of(name: str, params: Params, run_values: Params) -> dict[str, Any]:
    """The keyword arguments for a reward class or function.

    Args:
        name: a registered reward.
        params: the user's settings for it.
        run_values: values of the run by parameter name, for parameters that `params` leaves out.

    Raises:
        ValueError: an unknown setting, a required one without a value, or a text for a number.
    """
    function = orms[name]
    is_class = isinstance(function, type)
    parameters = parameters_of(function)
    known = [p.name for p in parameters.values() if p.kind in KEYWORD_KINDS]
    settings = {key: run_values[key] for key in known if key in run_values} | dict(params)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if is_class and "args" in known:  # as in ms-swift: it may read anything from there
        kept = {k: v for k, v in settings.items() if takes_any or k in known}
        return {"args": RewardArgs(name, dict(run_values) | dict(params))} | kept
    unknown = [key for key in params if key not in known and not (is_class and takes_any)]
    if unknown:
        raise ValueError(
            f"reward.reward_params sets {', '.join(unknown)} for {name!r}, which has no such "
            f"parameter.{did_you_mean(unknown[0], known)} It has: {', '.join(known) or 'none'}."
        )
    for key in params.keys() & parameters.keys():
        wanted = _wanted_instead_of_text(parameters[key])
        if wanted is not None and isinstance(params[key], str):
            raise ValueError(
                f"reward.reward_params sets {key} = {params[key]!r} for {name!r}, which is a text, "
                f"and {wanted} is wanted"
            )
    missing = [
        p.name
        for p in parameters.values()
        if is_class and p.kind in KEYWORD_KINDS and p.default is p.empty and p.name not in settings
    ]
    if missing:
        raise ValueError(
            f"reward function {name!r} needs {', '.join(missing)}: set it with "
            f"reward.reward_params, {{{name}: {{{missing[0]}: VALUE}}}}"
        )
    return settings


def _wanted_instead_of_text(parameter: inspect.Parameter) -> str | None:
    """What a parameter wants instead of a text, by annotation or default; else None.

    YAML 1.2 reads `no` as a text, which is true where a function expects a bool.
    """
    kind = parameter.annotation
    if kind is inspect.Parameter.empty:
        kind = type(parameter.default)
    if isinstance(kind, str):
        kinds = [part.strip() for part in kind.split("|")]
    else:
        is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
        members = typing.get_args(kind) if is_union else (kind,)
        kinds = [getattr(member, "__name__", "") for member in members]
    kinds = [one for one in kinds if one not in ("None", "NoneType")]
    return _NOT_TEXTS[kinds[0]] if kinds and _NOT_TEXTS.keys() >= set(kinds) else None


def parameters_of(function: type[ORM] | RewardFunction) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, or of the constructor of a class."""
    # ORM's own constructor takes what ms-swift's classes pass to it, and ignores it.
    if isinstance(function, type):
        constructor = inspect.getattr_static(function, "__init__")
        if constructor in (ORM.__init__, object.__init__):
            return {}
    return inspect.signature(function).parameters


def instantiate(name: str, settings: Params) -> RewardFunction:
    """What is called for `name`: an instance of its class, or its function.

    Raises:
        RewardError: the class raised; its exception is the cause.
    """
    registered = orms[name]
    if not isinstance(registered, type):
        return registered
    try:
        return registered(**settings)
    except Exception as error:  # user code may raise anything
        shown = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "args")
        raise RewardError(
            f"reward function {name!r}: {registered.__name__}({shown}) raised "
            f"{type(error).__name__}: {error}"
        ) from error
