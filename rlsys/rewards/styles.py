"""Reward functions written for other projects, called as these call them."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import math
import textwrap
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from rlsys.types import Message

Scores = Sequence[float | None]
Function = Callable[..., Scores | Awaitable[Scores]]

TRL_PREFIX, VERL_PREFIX = "trl/", "verl/"
"""Before a reference: whose style the function has."""


class TrlStyle:
    """A function that gets its arguments as TRL passes them for conversational prompts.

    Its `completions` are message lists, `[{"role": "assistant", "content": text}]`, where rlsys
    and ms-swift pass texts.
    """

    def __init__(self, function: Function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, **columns: Any) -> Scores | Awaitable[Scores]:
        """Call the function."""
        return self.function(**columns)


def as_messages(completions: Sequence[str]) -> list[list[Message]]:
    """Completions as TRL passes them, see `TrlStyle`."""
    return [[{"role": "assistant", "content": text}] for text in completions]


class VerlStyle:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    The right answer is the column `ground_truth`, or `reward_model["ground_truth"]` as in verl's
    Parquet files. What a returned dictionary has besides `score` is logged, numbers as metrics.
    """

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        self.function = function
        own = inspect.signature(function).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in own.values())
        self._names = {p.name for p in own.values() if p.kind in _NAMED}
        self._is_batched = "solution_strs" in self._names
        plural = "s" * self._is_batched
        self._keys = [f"{key}{plural}" for key in ("data_source", "solution_str", "ground_truth")]
        self._keys.append(f"extra_info{plural}")
        empty, named = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
        columns = [inspect.Parameter("completions", named)]
        optional = ("ground_truth", "reward_model", "data_source", "extra_info")
        columns += [inspect.Parameter(name, named, default=None) for name in optional]
        settings = [
            inspect.Parameter(p.name, named, default=p.default)
            for p in own.values()
            if p.kind in _NAMED and p.name not in (*self._keys, *optional)
        ]
        self.settings = tuple(p.name for p in settings)
        rest = inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)
        settings.sort(key=lambda p: p.default is not empty)
        self.__signature__ = inspect.Signature([*columns, *settings, rest])

    def __call__(self, completions: list[str], **columns: Any) -> Scores | Awaitable[Scores]:
        """[G] the scores; logs what else there is."""
        values = self._inputs(completions, columns)
        settings = {name: columns[name] for name in self.settings if name in columns}
        if self._is_batched:
            batch = dict(zip(self._keys, map(list, zip(*values, strict=True)), strict=True))
            results = self._call(batch | settings)
        else:
            rows = [dict(zip(self._keys, row, strict=True)) | settings for row in values]
            results = [self._call(row) for row in rows]
        if inspect.iscoroutinefunction(self.function):
            return self._awaited(results, columns)
        return self._scores(results, columns)

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Refuse a row without a right answer.

        Raises:
            ValueError: as it says.
        """
        if "ground_truth" + "s" * self._is_batched in self._names and _ground_truth(row) is None:
            raise ValueError(
                "there is no column ground_truth, and no reward_model with a ground_truth in it: "
                "rename the column of the right answer, data.columns: {answer: ground_truth}"
            )

    def _inputs(self, completions: list[str], columns: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        of_row = ("ground_truth", "reward_model", "data_source", "extra_info")
        found = []
        for index, text in enumerate(completions):
            row = {name: columns[name][index] for name in of_row if columns.get(name) is not None}
            extra = row.get("extra_info")
            found.append((row.get("data_source"), text, _ground_truth(row), extra or {}))
        return found

    def _call(self, arguments: dict[str, Any]) -> Any:
        known = arguments if self._takes_all else self._names
        return self.function(**{k: v for k, v in arguments.items() if k in known})

    async def _awaited(self, results: Any, columns: Mapping[str, Any]) -> Scores:
        done = await results if self._is_batched else await asyncio.gather(*results)
        return self._scores(list(done), columns)

    def _scores(self, results: Any, columns: Mapping[str, Any]) -> Scores:
        rows = [r if isinstance(r, Mapping) else {"score": r} for r in results]
        names = dict.fromkeys(name for row in rows for name in row if name != "score")
        for name in names:
            values = [row.get(name) for row in rows]
            columns["log_extra"](name, values)
            for value in values:
                if isinstance(value, Real) and math.isfinite(value):
                    columns["log_metric"](name, value)
        missing = next((row for row in rows if "score" not in row), None)
        if missing is not None:
            raise KeyError(f"the dictionary has no 'score', only {', '.join(map(str, missing))}")
        # Some of verl's own return (score, ...).
        scores = [row["score"] for row in rows]
        return [s[0] if isinstance(s, tuple | list) and s else s for s in scores]


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _ground_truth(row: Mapping[str, Any]) -> Any:
    nested = row.get("reward_model")
    if row.get("ground_truth") is None and isinstance(nested, Mapping):
        return nested.get("ground_truth")
    return row.get("ground_truth")


def bare_name(name: str) -> str:
    """A name without the prefix of a style."""
    return name.removeprefix(TRL_PREFIX).removeprefix(VERL_PREFIX)


def in_style(name: str, function: Any) -> Any:
    """A function as its reference's prefix asks for.

    Raises:
        ValueError: it is a class, whose instances neither project would make.
    """
    for prefix, style in ((TRL_PREFIX, TrlStyle), (VERL_PREFIX, VerlStyle)):
        if name.startswith(prefix):
            if isinstance(function, type):
                decorator = "@trl_style, or " * (prefix == TRL_PREFIX)
                raise ValueError(
                    f"{function.__name__} is a class, and what {prefix[:-1]} calls is a function: "
                    f"leave out {decorator}{prefix} before the name"
                )
            return style(function)
    return function


# --- functions without a prefix ------------------------------------------------------------------


@functools.cache
def expects_messages(function: Any) -> bool:
    """Whether a function's own code takes message lists as completions.

    It does if it reads `completion[0]["content"]` of a variable that goes over `completions`.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    loops = [
        (node.target, node.iter)
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)
    ]
    names = {name for target, over in loops for name in _over_completions(target, over)}
    return any(_is_content_of(node, names) for node in ast.walk(tree))


def _over_completions(target: ast.expr, over: ast.expr) -> list[str]:
    """The variables of a loop that take the values of `completions`."""
    if isinstance(over, ast.Name) and over.id == "completions" and isinstance(target, ast.Name):
        return [target.id]
    if not isinstance(over, ast.Call) or not isinstance(target, ast.Tuple):
        return []
    called = over.func.id if isinstance(over.func, ast.Name) else ""
    if called == "enumerate":
        return _over_completions(target.elts[1], over.args[0])
    if called != "zip":
        return []
    pairs = zip(target.elts, over.args, strict=False)
    return [name for one, values in pairs for name in _over_completions(one, values)]


def _is_content_of(node: ast.AST, names: Collection[str]) -> bool:
    """Whether it is `NAME[0]["content"]`, or the same of `completions[...]` or by `.get`."""
    match node:
        case ast.Subscript(value=turn, slice=ast.Constant("content")):
            pass
        case ast.Call(ast.Attribute(turn, "get"), [ast.Constant("content"), *_]):
            pass
        case _:
            return False
    if not (isinstance(turn, ast.Subscript) and _constant(turn.slice) in (0, -1)):
        return False
    given = turn.value
    if isinstance(given, ast.Subscript):
        return isinstance(given.value, ast.Name) and given.value.id == "completions"
    return isinstance(given, ast.Name) and given.id in names


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def foreign_remedy(name: str, missing: Collection[str]) -> str:
    """What to write when a function asks for another project's arguments; empty for others."""
    if {"solution_str", "solution_strs"} & set(missing):
        return f"It has verl's signature: name it {VERL_PREFIX}{name}"
    if {"queries", "labels"} <= set(missing):
        return (
            "It has OpenRLHF's signature: write def f(completions, solution, **columns), where "
            "completions are texts without the prompt and solution is a column"
        )
    if {"sample", "samples"} & set(missing):
        return (
            "It has slime's signature: write def f(completions, solution, **columns), which gets "
            "the texts and columns of a group and returns one number for each"
        )
    if "environments" in missing:
        return "environments are TRL's for tools, which rlsys does not have"
    return ""
