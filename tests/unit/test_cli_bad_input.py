"""Mistakes of users: one message, an exit code, and nothing is started or written.

Every case runs through `rlsys grpo`, all of them in one process of their own, in which nothing else
has imported Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from bad_input_cases import write_cases

pytestmark = pytest.mark.processes
HEAVY = ("torch", "ray", "vllm", "megatron", "transformers", "datasets")

RUNNER = """
import contextlib, io, json, os, sys
from pathlib import Path
from rlsys import cli


def files():
    found = (path for path in Path().rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.stat().st_size for path in found if path.is_file()}


cases, heavy = json.load(sys.stdin)
results, before = {}, files()
for name, case in cases.items():
    out, err = io.StringIO(), io.StringIO()
    os.environ.update([case["env"]] if case["env"] else [])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(["grpo", *case["words"]])
        except BaseException as error:
            code = repr(error)
    os.environ.pop("RAY_ADDRESS", None)
    imported = [module for module in heavy if module in sys.modules]
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": imported}
    results[name]["written"] = sorted(files().items() ^ before.items())
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("bad-input"))


@pytest.fixture(scope="module")
def results(cases):
    early_first = sorted(cases, key=lambda name: cases[name].is_late)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([{name: asdict(cases[name]) for name in early_first}, HEAVY]),
        cwd=cases.folder,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def wrong(case, result):
    """What is not as it should be about the result of a case."""
    if result["code"] != 2:
        yield f"exit code {result['code']}"
    if result["written"]:
        yield f"wrote {result['written']}"
    yield from (f"does not say {words!r}" for words in case.says if words not in result["err"])
    own = result["err"].replace("rlsys/registry.py", "")  # where a plugin registers
    if ("Traceback" in own) != case.has_traceback or "rlsys/" in own:
        yield "whose traceback is it?"
    heading, *problems = result["err"].splitlines() or [""]
    if not case.is_late:
        if result["out"] or result["heavy"]:
            yield f"printed {result['out']!r}, imported {result['heavy']}"
        if not heading.endswith("has 1 problem:") or not "".join(problems[:1]).startswith("  - "):
            yield "is not one problem"
        if problems[1:2] == ["In another folder:"]:
            problems = problems[:1]
        if not all(line.startswith("    ") for line in problems[1:]):  # of the same problem
            yield "has more than one problem"


def test_every_mistake_is_one_message_and_nothing_is_written(cases, results):
    found = {name: list(wrong(cases[name], result)) for name, result in results.items()}
    texts = [f"{n}: {', '.join(w)}\n{results[n]['err']}" for n, w in found.items() if w]
    assert texts == [], "\n".join(texts)
    assert len(results) == len(cases) >= 60
