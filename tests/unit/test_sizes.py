"""The sizes of files and functions: what an engineer can read in one sitting."""

import ast
from pathlib import Path

import rlsys

PACKAGE = Path(rlsys.__file__).parent

LIMITS = {"file": 400, "function": 60}
"""Lines, docstrings included."""


def too_long(name: str, source: str) -> list[str]:
    """The file and its functions that have more lines than LIMITS."""
    sizes = [("file", name, len(source.splitlines()))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            sizes.append(("function", f"{name}: {node.name}", lines))
    return [
        f"{what} has {lines} lines, over {LIMITS[kind]}: split it"
        for kind, what, lines in sizes
        if lines > LIMITS[kind]
    ]


def test_files_and_functions_are_short():
    files = sorted(PACKAGE.rglob("*.py"))
    found = [text for f in files for text in too_long(str(f.relative_to(PACKAGE)), f.read_text())]
    assert not found, "\n".join(found)


def test_the_check_finds_what_is_too_long():
    def function(lines: int) -> str:
        return "class C:\n    async def run(self):\n" + "        pass\n" * (lines - 1)

    assert too_long("a.py", function(60)) == []
    assert too_long("a.py", function(61)) == ["a.py: run has 61 lines, over 60: split it"]
    assert too_long("a.py", "x = 1\n" * 400) == []
    assert too_long("a.py", "x = 1\n" * 401) == ["a.py has 401 lines, over 400: split it"]
