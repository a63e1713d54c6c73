"""Does the completion's Python pass the tests? Run in a sandbox, judged outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rlsys.rewards.answers import after_thinking
from rlsys.rewards.base import ORM, register_reward
from rlsys.rewards.builtin.code_tests import AssertTest, CallTest, StdioTest, Test, read_tests
from rlsys.sandbox.sandbox import (
    Limits,
    OutOfTime,
    Sandbox,
    SandboxEnded,
    SandboxUnavailable,
)

MAX_PROGRAM = 100_000
"""Characters of a program; what is longer scores 0."""

_COLUMNS = ("tests", "verification_info", "input_output", "test_list", "test")
_NO_TESTS = f"code needs a dataset column {_COLUMNS[0]!r} (or {', '.join(_COLUMNS[1:])})"
_FENCE = re.compile(r" {0,3}(`{3,})([^`]*)")
_PYTHON = re.compile(r"(?:python|py)[\d.]*", re.IGNORECASE)


@register_reward("code")
class Code(ORM):
    """Share of the tests that the completion's Python program passes, 0 to 1.

    The program is the last ``` block after the last `</think>` that names Python or no language.
    The first column that the dataset has of `tests`, `verification_info`, `input_output`,
    `test_list` and `test` holds the tests; `code_tests.read_tests` reads their forms.

    Every test runs the program from a fresh state in a sandbox: no network, no files but Python's
    standard library to read, no new processes, limits on CPU time, memory and output. Expected
    results never enter it. On a host without such a sandbox the reward refuses to start.
    """

    reads_think_tags = True
    columns = _COLUMNS
    """Dataset columns that may hold the tests; the first that is there counts."""

    def __init__(
        self,
        time_limit_s: float = 5.0,
        memory_mib: int = 512,
        output_kib: int = 1024,
        max_tests: int | None = None,
        all_or_nothing: bool = False,
        allow_unsandboxed: bool = False,
    ):
        """Settings.

        Args:
            time_limit_s: seconds of CPU time for one test; a program that only waits gets 5 s and
                four times as much. Once a test has run out of time, the program's other tests fail
                without being run.
            memory_mib: address space of the program.
            output_kib: what it may print or return in one test.
            max_tests: number of a row's tests that are run, the first ones; None is all.
            all_or_nothing: 1 where all tests pass, else 0; stops at the first that fails.
            allow_unsandboxed: run programs even on a host that cannot restrict them: they can
                then read and delete what this process can, and use the network.

        Raises:
            ValueError: a limit out of range, or a host that cannot restrict programs.
        """
        super().__init__()
        if not (0 < time_limit_s <= 600 and memory_mib >= 64 and output_kib >= 1):
            raise ValueError(
                "code: time_limit_s must be above 0 and at most 600, memory_mib at least 64 and "
                f"output_kib at least 1, not {time_limit_s}, {memory_mib} and {output_kib}"
            )
        if max_tests is not None and max_tests < 1:
            raise ValueError(f"code: max_tests must be at least 1, not {max_tests}")
        self.max_tests = max_tests
        self.all_or_nothing = all_or_nothing
        limits = Limits(time_limit_s, memory_mib, output_kib)
        try:
            # Asserts run beside the program, not in its process: two sandboxes.
            self._sandbox, self._judge = Sandbox(limits), Sandbox(limits)
        except SandboxUnavailable as error:
            if not allow_unsandboxed:
                raise ValueError(
                    f"code: {error}. A completion could then read files and use the network. Run "
                    "on x86_64 Linux with seccomp, or accept it: "
                    "reward.reward_params: {code: {allow_unsandboxed: true}}"
                ) from None
            self._sandbox = Sandbox(limits, restricted=False)
            self._judge = Sandbox(limits, restricted=False)

    def __call__(
        self,
        completions: list[str],
        tests: list[Any] | None = None,
        verification_info: list[Any] | None = None,
        input_output: list[Any] | None = None,
        test_list: list[Any] | None = None,
        test: list[Any] | None = None,
        entry_point: list[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """[G] between 0 and 1.

        Raises:
            ValueError: no column with tests, or a row whose tests cannot be read or cannot run.
        """
        given = (tests, verification_info, input_output, test_list, test)
        rows = next((column for column in given if column is not None), None)
        if rows is None:
            raise ValueError(_NO_TESTS)
        names: list[Any] = entry_point or [None] * len(completions)
        return [
            self._score(completion, read_tests(row, name)[: self.max_tests])
            for completion, row, name in zip(completions, rows, names, strict=True)
        ]

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> None:
        """See ORM: the tests must be readable, and test something; they are not run."""
        column = next((name for name in _COLUMNS if name in row), None)
        if column is None:
            raise ValueError(_NO_TESTS)
        read_tests(row[column], row.get("entry_point"))

    def _score(self, completion: str, tests: list[Test]) -> float:
        program = find_program(completion)
        if program is None:
            return 0.0
        passed = 0
        try:
            for test in tests:
                if self._passes(program, test):
                    passed += 1
                elif self.all_or_nothing:
                    return 0.0
        except OutOfTime:
            pass  # the other tests fail too: a program that hangs costs its time once
        return 0.0 if self.all_or_nothing and passed < len(tests) else passed / len(tests)

    def _passes(self, program: str, test: Test) -> bool:
        try:
            match test:
                case StdioTest():
                    done = self._sandbox.run(program, test.stdin)
                    if done.out_of_time:
                        raise OutOfTime
                    return (
                        done.exit_code == 0
                        and done.within_limits
                        and _same_text(done.output.decode(errors="replace"), test.stdout)
                    )
                case CallTest():
                    return self._returns(program, test)
                case AssertTest():
                    return self._holds(program, test)
        except OutOfTime:
            raise
        except SandboxEnded:
            return False

    def _returns(self, program: str, test: CallTest) -> bool:
        args = [_tagged(arg) for arg in test.args]
        request = {"name": test.name, "attributes": [], "args": args, "kwargs": {}}
        with self._sandbox.talk(program, "calls") as running:
            answer = running.ask(json.dumps(request))
        # The program may answer anything: no JSON, 5,000 digits, deep brackets, huge integers.
        try:
            reply = json.loads(answer)
            if not isinstance(reply, dict) or "value" not in reply:
                return False
            value = _plain(reply["value"])
            return any(_same_value(value, expected) for expected in test.expected)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return False

    def _holds(self, program: str, test: AssertTest) -> bool:
        """Run the test's code in one sandbox and the program in another, and pass calls on.

        Raises:
            ValueError: the test cannot run with any program.
        """
        with (
            self._sandbox.talk(program, "calls") as running,
            self._judge.talk(test.code, "asserts") as judge,
        ):
            while True:
                line = judge.next_line()
                message = json.loads(line)
                if "broken" in message:
                    raise ValueError(
                        f"code: a test cannot run: {message['broken']}, in {test.code[:200]!r}. "
                        "The sandbox has Python's standard library only; correct the dataset."
                    )
                if "passed" in message:
                    return bool(message["passed"])
                judge.send(running.ask(line))


def find_program(completion: str) -> str | None:
    """The last whole ``` block after the thinking that names Python or no language.

    Fences are lines of their own, as in Markdown, and pair up: one that ends a block of another
    language does not begin a block.
    """
    program: str | None = None
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in (after_thinking(completion) or "").split("\n"):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            opened, lines = fence, []
        elif fence and len(fence[1]) >= len(opened[1]) and not fence[2].strip():
            language = re.split(r"[\s:,{]", opened[2].strip())[0]
            if not language or _PYTHON.fullmatch(language):
                program = "\n".join(lines)
            opened = None
        else:
            lines.append(line)
    return program if program is not None and len(program) <= MAX_PROGRAM else None


def _same_text(output: str, expected: str) -> bool:
    """Whether all lines are equal, white space at line ends aside and decimals within 1e-6."""
    mine, theirs = (text.strip().splitlines() for text in (output, expected))
    return len(mine) == len(theirs) and all(map(_same_line, mine, theirs))


def _same_line(line: str, expected: str) -> bool:
    if line.rstrip() == expected.rstrip():
        return True
    mine, theirs = line.split(), expected.split()
    return len(mine) == len(theirs) and all(map(_same_word, mine, theirs))


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not re.fullmatch(r"[+-]?\d{1,30}\.\d{1,30}", expected):
        return False
    if not re.fullmatch(r"[+-]?\d{1,30}(\.\d{1,30})?(e[+-]?\d{1,3})?", word):
        return False
    return math.isclose(float(word), float(expected), rel_tol=1e-6, abs_tol=1e-6)


def _same_value(value: Any, expected: Any) -> bool:
    """Equality of JSON values: True is not 1, floats are equal within 1e-6."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        # JSON has texts as keys.
        mine, theirs = ({str(k): v for k, v in one.items()} for one in (value, expected))
        return mine.keys() == theirs.keys() and all(_same_value(mine[k], theirs[k]) for k in mine)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    return type(value) is type(expected) and value == expected


def _tagged(value: Any) -> Any:
    """A JSON value in the sandbox's protocol."""
    if isinstance(value, list | tuple):
        return {"list": [_tagged(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[key, _tagged(item)] for key, item in value.items()]}
    return value


def _plain(value: Any) -> Any:
    """The reverse of `_tagged`; tuples become lists, as in expected values; sets are refused."""
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("not of the protocol")
        return value
    ((kind, content),) = value.items()
    if kind in ("list", "tuple"):
        return [_plain(item) for item in content]
    if kind == "dict":
        return {_plain(key): _plain(item) for key, item in content}
    raise ValueError(f"a {kind} is not a plain value")
