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
"""Prefixes of a name that say whose style the function has."""


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
        own = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in own)
        self._parameters = {p.name for p in own if p.kind in _KEYWORD_KINDS}
        self._is_batched = "solution_strs" in self._parameters
        plural = "s" * self._is_batched
        arguments = ("data_source", "solution_str", "ground_truth", "extra_info")
        self._keys = [f"{argument}{plural}" for argument in arguments]
        keyword = inspect.Parameter.KEYWORD_ONLY
        settings = [
            inspect.Parameter(p.name, keyword, default=p.default)
            for p in own
            if p.name in self._parameters and p.name not in (*self._keys, *_VERL_COLUMNS)
        ]
        self.settings = tuple(p.name for p in settings)
        columns = [inspect.Parameter("completions", keyword)]
        columns += [inspect.Parameter(name, keyword, default=None) for name in _VERL_COLUMNS]
        rest = inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)
        self.__signature__ = inspect.Signature([*columns, *settings, rest])

    def __call__(self, completions: list[str], **columns: Any) -> Scores | Awaitable[Scores]:
        """[G] the scores; logs the rest."""
        values = [
            (row.get("data_source"), text, _ground_truth(row), row.get("extra_info") or {})
            for text, row in zip(completions, _rows(columns, len(completions)), strict=True)
        ]
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
            ValueError: the row has none.
        """
        if "ground_truth" + "s" * self._is_batched in self._parameters and (
            _ground_truth(row) is None
        ):
            raise ValueError(
                "the row has no column ground_truth, nor a reward_model with a ground_truth: "
                "rename the column of the right answer, data.columns: {answer: ground_truth}"
            )

    def _call(self, arguments: dict[str, Any]) -> Any:
        known = arguments if self._takes_all else self._parameters
        return self.function(**{k: v for k, v in arguments.items() if k in known})

    async def _awaited(self, results: Any, columns: Mapping[str, Any]) -> Scores:
        done = await results if self._is_batched else await asyncio.gather(*results)
        return self._scores(list(done), columns)

    def _scores(self, results: Any, columns: Mapping[str, Any]) -> Scores:
        rows = [r if isinstance(r, Mapping) else {"score": r} for r in results]
        for key in dict.fromkeys(key for row in rows for key in row if key != "score"):
            values = [row.get(key) for row in rows]
            columns["log_extra"](key, values)
            for value in values:
                if isinstance(value, Real) and math.isfinite(value):
                    columns["log_metric"](key, value)
        missing = next((row for row in rows if "score" not in row), None)
        if missing is not None:
            raise KeyError(f"the dictionary has no 'score', only {', '.join(map(str, missing))}")
        # Some functions of verl return (score, ...).
        scores = [row["score"] for row in rows]
        return [s[0] if isinstance(s, tuple | list) and s else s for s in scores]


_VERL_COLUMNS = ("ground_truth", "reward_model", "data_source", "extra_info")
_KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _rows(columns: Mapping[str, Any], num_rows: int) -> list[dict[str, Any]]:
    given = {name: columns[name] for name in _VERL_COLUMNS if columns.get(name) is not None}
    return [{name: values[index] for name, values in given.items()} for index in range(num_rows)]


def _ground_truth(row: Mapping[str, Any]) -> Any:
    nested = row.get("reward_model")
    if row.get("ground_truth") is None and isinstance(nested, Mapping):
        return nested.get("ground_truth")
    return row.get("ground_truth")


def bare_name(name: str) -> str:
    """A name without the prefix of a style."""
    return name.removeprefix(TRL_PREFIX).removeprefix(VERL_PREFIX)


def in_style(name: str, function: Any) -> Any:
    """Wrap a function in the style that its name's prefix says.

    Raises:
        ValueError: it is a class, whose instances neither project would make.
    """
    for prefix, style in ((TRL_PREFIX, TrlStyle), (VERL_PREFIX, VerlStyle)):
        if name.startswith(prefix):
            if isinstance(function, type):
                decorator = "@trl_style, or " * (prefix == TRL_PREFIX)
                raise ValueError(
                    f"{function.__name__} is a class, and {prefix[:-1]} calls functions: "
                    f"leave out {decorator}{prefix} before the name"
                )
            return style(function)
    return function


@functools.cache
def expects_messages(function: Any) -> bool:
    """Whether a function's code reads `completion[0]["content"]` in a loop over `completions`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    loops = [
        (node.target, node.iter)
        for node in ast.walk(tree)
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)
    ]
    variables = {name for target, over in loops for name in _over_completions(target, over)}
    return any(_is_content_of(node, variables) for node in ast.walk(tree))


def _over_completions(target: ast.expr, over: ast.expr) -> list[str]:
    """The variables of a loop that iterate over `completions`."""
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


def _is_content_of(node: ast.AST, variables: Collection[str]) -> bool:
    """Whether it is the content of a variable's or of `completions[...]`'s first or last turn."""
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
    return isinstance(given, ast.Name) and given.id in variables


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def foreign_remedy(name: str, missing: Collection[str]) -> str:
    """What to change in a function that has another project's parameters; empty for others."""
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
