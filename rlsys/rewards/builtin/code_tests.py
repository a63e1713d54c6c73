"""Tests of programs in the forms that data sets have, read into three kinds.

The expected results, which a program must not see, stay in these objects.
"""

from __future__ import annotations

import ast
import builtins
import json
from dataclasses import dataclass
from typing import Any

_INPUTS = ("input", "inputs", "stdin", "args")
_OUTPUTS = ("output", "outputs", "stdout", "expected", "expected_output")
_TEXT_TYPES = ("stdin", "stdin_stdout", "stdio")
_CALL_TYPES = ("functional", "function_call", "function", "call")


@dataclass(frozen=True, slots=True)
class StdioTest:
    """The program reads `stdin` and has to write `stdout`."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class CallTest:
    """`name(*args)`, or `Solution().name(*args)`, has to return one of `expected`."""

    name: str
    args: list[Any]
    expected: list[Any]


@dataclass(frozen=True, slots=True)
class AssertTest:
    """Python that raises if the program is wrong; its undefined names are the program's."""

    code: str


Test = StdioTest | CallTest | AssertTest


def read_tests(row: Any, entry_point: str | None = None) -> list[Test]:
    """The tests of a dataset row.

    Args:
        row: a list of tests, an object, or the JSON text of either, or Python code. Tests are
            `{"input": ..., "output": ...}` with standard input and output or, with `fn_name`,
            arguments and result; or Python code with asserts. An object is `{"inputs": [...],
            "outputs": [...], "fn_name": ...}` of APPS and TACO, or holds the list under
            `test_cases` or `tests`, as `verification_info` does.
        entry_point: the function that HumanEval's `check(candidate)` is called with.

    Raises:
        ValueError: another form, or no tests.
    """
    if isinstance(row, str):
        row = _from_json(row)
    tests = _of_row(row, entry_point, None)
    if not tests:
        raise ValueError(f"code: a row has no tests: {str(row)[:200]!r}. Correct the dataset.")
    return tests


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _of_row(row: Any, entry_point: str | None, name: str | None) -> list[Test]:
    if isinstance(row, str):
        return [_asserts(row, entry_point)]
    if isinstance(row, list | tuple):
        return [_one(test, entry_point, name) for test in row]
    if not isinstance(row, dict):
        raise _unknown(row)
    name = row.get("fn_name") or row.get("func_name") or name
    for key in ("test_cases", "tests"):
        if row.get(key) is not None:
            return _of_row(row[key], entry_point, name)
    if isinstance(row.get("inputs"), list) and isinstance(row.get("outputs"), list):
        if len(row["inputs"]) != len(row["outputs"]):
            raise ValueError(
                f"code: {len(row['inputs'])} inputs but {len(row['outputs'])} outputs in a row: "
                f"{str(row)[:200]!r}. Correct the dataset."
            )
        pairs = zip(row["inputs"], row["outputs"], strict=True)
        return [_pair(given, wanted, name, row) for given, wanted in pairs]
    return [_one(row, entry_point, name)]


def _one(test: Any, entry_point: str | None, name: str | None) -> Test:
    if isinstance(test, str):
        return _asserts(test, entry_point)
    if not isinstance(test, dict) or not any(key in test for key in _OUTPUTS):
        raise _unknown(test)
    # Arrow gives every object of a column the keys of all others, with None.
    given = next((test[key] for key in _INPUTS if test.get(key) is not None), None)
    wanted = next((test[key] for key in _OUTPUTS if test.get(key) is not None), None)
    name = test.get("fn_name") or test.get("func_name") or name
    return _pair(given, wanted, name, test)


def _pair(given: Any, wanted: Any, name: str | None, test: dict[str, Any]) -> Test:
    kind = test.get("type") or test.get("testtype")
    if name and kind not in _TEXT_TYPES:
        return _call(name, given, wanted, test)
    if kind in _CALL_TYPES:
        raise ValueError(f"code: a test of a function has no fn_name: {str(test)[:200]!r}")
    if wanted is None:
        raise ValueError(
            "code: a test has no expected output, which a program that does nothing would pass: "
            f"{str(test)[:200]!r}. Correct the dataset."
        )
    return StdioTest(_text(given), _text(wanted))


def _call(name: str, given: Any, wanted: Any, test: dict[str, Any]) -> CallTest:
    try:
        if isinstance(given, str):  # one argument a line, as LiveCodeBench has it
            given = [json.loads(line) for line in given.splitlines() if line.strip()]
            wanted = _from_json(wanted) if isinstance(wanted, str) else wanted
        args = given if isinstance(given, list) else [given]
        json.dumps(args)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"code: arguments that are not JSON ({error}) in a row: {str(test)[:200]!r}. "
            "Correct the dataset."
        ) from None
    # APPS and TACO wrap a result in a list.
    unwrapped = [wanted[0]] if isinstance(wanted, list) and len(wanted) == 1 else []
    return CallTest(name, args, [wanted, *unwrapped])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(map(str, value)) + "\n"
    return str(value)


def _asserts(code: str, entry_point: str | None) -> AssertTest:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"code: a test is not Python code: {error}: {code[:200]!r}") from None
    defines_check = any(
        isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body
    )
    if defines_check:
        if entry_point is None:
            raise ValueError(
                "code: tests with check(candidate) need a dataset column 'entry_point'"
            )
        code = f"{code}\ncheck({entry_point})\n"
    elif not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError(f"code: a test without an assert always passes: {code[:200]!r}")
    elif not _free_names(tree):
        raise ValueError(
            f"code: a test that uses no name of the program does not test it: {code[:200]!r}. "
            "Builtins and names that the test defines or imports are not the program's."
        )
    return AssertTest(code)


def _free_names(tree: ast.Module) -> set[str]:
    """Names that the test reads and that neither Python nor the test itself defines."""
    used, own = set(), set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                own.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.alias(name=name, asname=asname):
                own.add(asname or name.partition(".")[0])
    return used - own


def _unknown(test: Any) -> ValueError:
    return ValueError(
        f"code: not a test: {str(test)[:200]!r}. A test is an object with input and output (and "
        "fn_name, to call a function), or Python code with asserts."
    )
