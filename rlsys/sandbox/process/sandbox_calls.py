"""Calls between a program and its tests, which run in two sandboxes: JSON lines.

The program answers with `serve_calls`; the tests, or the reward itself, ask. Only plain values
cross, so that no method of the program's objects runs where the verdict is made.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import types
from collections.abc import Callable
from typing import Any

Ask = Callable[[dict[str, Any]], dict[str, Any]]


def _encode(value: Any, objects: list[Any] | None = None) -> Any:
    """A plain value as JSON; another object as its number in `objects`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [_encode(item, objects) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, objects), _encode(v, objects)] for k, v in value.items()]}
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, _Remote):
        return {"object": value._number}
    if objects is None:
        if hasattr(value, "__iter__"):  # an iterator, range or dict view as an argument
            return {"list": [_encode(item) for item in value]}
        raise TypeError(f"a {type(value).__name__} cannot be passed to the solution")
    objects.append(value)
    return {"object": len(objects) - 1}


def _decode(value: Any, remote: Callable[[int], Any]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)([_decode(item, remote) for item in content])
    if kind == "dict":
        return {_decode(k, remote): _decode(v, remote) for k, v in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    return remote(content)


def serve_calls(names: dict[str, Any], requests: int, replies: int) -> None:
    """Answer calls of a program's functions, in its own process, until the pipe closes."""
    objects: list[Any] = []
    with os.fdopen(requests) as lines, os.fdopen(replies, "w") as answers:
        for line in lines:
            try:
                reply = _answer(names, objects, json.loads(line))
            except Exception as error:
                reply = {"raised": type(error).__name__, "message": str(error)[:1000]}
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


def _answer(names: dict[str, Any], objects: list[Any], request: dict[str, Any]) -> dict[str, Any]:
    if "name" in request:
        target = names.get(request["name"])
        if target is None and "Solution" in names:  # as LeetCode has it
            target = getattr(names["Solution"](), request["name"])
        if target is None:
            raise NameError(request["name"])
    else:
        target = objects[request["object"]]
    for attribute in request["attributes"]:
        target = getattr(target, attribute)
    if "args" not in request:
        return {"value": _encode(target, objects)}
    args = [_decode(value, objects.__getitem__) for value in request["args"]]
    kwargs = {key: _decode(v, objects.__getitem__) for key, v in request["kwargs"].items()}
    value = target(*args, **kwargs)
    if isinstance(value, types.GeneratorType | map | filter | zip | range):
        value = list(value)
    return {"value": _encode(value, objects), "args": [_encode(arg, objects) for arg in args]}


class _Remote:
    """A function or object of the program, as the tests see it from their process."""

    def __init__(self, ask: Ask, target: dict[str, Any], attributes: tuple[str, ...] = ()):
        self._ask, self._target, self._attributes = ask, target, attributes
        self._number = target.get("object")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._ask({**self._target, "attributes": [*self._attributes, name]})["value"]
        if isinstance(value, dict) and "object" in value:
            return _Remote(self._ask, self._target, (*self._attributes, name))
        return _decode(value, lambda number: _Remote(self._ask, {"object": number}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it in the program's process."""
        reply = self._ask(
            {
                **self._target,
                "attributes": list(self._attributes),
                "args": [_encode(arg) for arg in args],
                "kwargs": {key: _encode(value) for key, value in kwargs.items()},
            }
        )

        def remote(number: int) -> _Remote:
            return _Remote(self._ask, {"object": number})

        # Repeat here what the function did to its arguments.
        for arg, changed in zip(args, reply["args"], strict=False):
            _update(arg, _decode(changed, remote))
        return _decode(reply["value"], remote)


def _update(arg: Any, changed: Any) -> None:
    if type(arg) is not type(changed) or arg == changed:
        return
    if isinstance(arg, list):
        arg[:] = changed
    elif isinstance(arg, set | dict):
        arg.clear()
        arg.update(changed)


def run_asserts(text: str, replies: int, requests: int) -> None:
    """Run the tests in their process; names that they do not define are the program's.

    The last line is `{"passed": true}`, `{"passed": false}` or `{"broken": reason}`. Broken tests
    cannot run with any program: an import of theirs fails, or they raise, other than by an assert,
    before they ask the program for anything. What they raise later may come from a wrong value,
    such as None that is indexed.
    """
    lines, out = os.fdopen(replies), os.fdopen(requests, "w")
    has_asked = False
    raised_by_program: list[Exception] = []

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal has_asked
        has_asked = True
        out.write(json.dumps(request) + "\n")
        out.flush()
        reply = json.loads(lines.readline())
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), Exception)
            is_exception = isinstance(kind, type) and issubclass(kind, Exception)
            raised_by_program.append((kind if is_exception else Exception)(reply["message"]))
            raise raised_by_program[-1]
        return reply

    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    loaded = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    names: dict[str, Any] = {"__name__": "tests"}
    names |= {name: _Remote(ask, {"name": name}) for name in loaded if not hasattr(builtins, name)}
    verdict: dict[str, Any] = {"passed": True}
    try:
        exec(compile(tree, "tests.py", "exec"), names)
    except BaseException as error:
        verdict = {"passed": False}
        own_import = isinstance(error, ImportError) and error not in raised_by_program
        if own_import or not (has_asked or isinstance(error, AssertionError)):
            verdict = {"broken": f"{type(error).__name__}: {error}"[:1000]}
    out.write(json.dumps(verdict) + "\n")
    out.flush()
