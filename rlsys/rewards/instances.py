"""From a registered reward class and its settings to what is called, checked before a run starts.

Settings are the keyword arguments of `reward.reward_params`, completed by what the run knows.
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
_NOT_TEXTS = {"bool": "true or false", "int": "a number", "float": "a number"}
KEYWORD_KINDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class RewardError(ValueError):
    """A reward function could not be made, raised, or returned what is no reward."""


class RewardArgs:
    """What a class written for ms-swift finds in the `args` of its constructor.

    The settings that `reward.reward_params` has for it, as attributes, and `max_completion_length`
    and `model_path` of the run.
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


def settings_of(name: str, params: Params, of_run: Params) -> dict[str, Any]:
    """The keyword arguments for a reward class or function.

    Args:
        name: of a registered reward.
        params: what the user set for it.
        of_run: values of the run by parameter name, for parameters that `params` leaves out.

    Raises:
        ValueError: a parameter that it does not have, or one without a value.
    """
    function = orms[name]
    is_class = isinstance(function, type)
    parameters = parameters_of(function)
    named = [p.name for p in parameters.values() if p.kind in KEYWORD_KINDS]
    settings = {key: of_run[key] for key in named if key in of_run} | dict(params)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if is_class and "args" in named:  # as in ms-swift: it may read anything from there
        shown = RewardArgs(name, dict(of_run) | dict(params))
        kept = {k: v for k, v in settings.items() if takes_any or k in named}
        return {"args": shown} | kept
    unknown = [key for key in params if key not in named and not (is_class and takes_any)]
    if unknown:
        raise ValueError(
            f"reward.reward_params sets {', '.join(unknown)} for {name!r}, which has no such "
            f"parameter.{did_you_mean(unknown[0], named)} It has: {', '.join(named) or 'none'}."
        )
    _check_no_text_for_numbers(name, params, parameters)
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


def _check_no_text_for_numbers(
    name: str, params: Params, parameters: Mapping[str, inspect.Parameter]
) -> None:
    """A text, as YAML 1.2 reads `no`, is true where a function asks whether to do something.

    Raises:
        ValueError: a text for a parameter whose annotation, or default, is true, false or a number.
    """
    for key in params.keys() & parameters.keys():
        kinds = _kind_names(parameters[key])
        wanted = _NOT_TEXTS[kinds[0]] if kinds and _NOT_TEXTS.keys() >= set(kinds) else None
        if wanted is not None and isinstance(params[key], str):
            raise ValueError(
                f"reward.reward_params sets {key} = {params[key]!r} for {name!r}, which is a text, "
                f"and {wanted} is wanted"
            )


def _kind_names(parameter: inspect.Parameter) -> list[str]:
    """Names of the types that a parameter takes besides None, by its annotation or default."""
    kind = parameter.annotation
    if kind is inspect.Parameter.empty:
        kind = type(parameter.default)
    if isinstance(kind, str):
        names = [part.strip() for part in kind.split("|")]
    else:
        union = typing.get_origin(kind) in (typing.Union, types.UnionType)
        members = typing.get_args(kind) if union else (kind,)
        names = [getattr(member, "__name__", "") for member in members]
    return [name for name in names if name not in ("None", "NoneType")]


def parameters_of(function: type[ORM] | RewardFunction) -> Mapping[str, inspect.Parameter]:
    """Of a function, or of the constructor of a class."""
    # ORM's own constructor takes what ms-swift's classes hand on to it, and uses none of it.
    if isinstance(function, type) and "__init__" not in _own_names(function):
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
    # User code: whatever it raises is told with the name of the function.
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "args")
        raise RewardError(
            f"reward function {name!r}: {registered.__name__}({shown}) raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _own_names(cls: type) -> set[str]:
    """What a class and its bases define, those that rlsys and Python gave it left out."""
    return {name for base in cls.__mro__ if base not in (ORM, object) for name in vars(base)}
