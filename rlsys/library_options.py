"""The options of other libraries' dataclasses, read from their source: nothing is imported.

Importing vLLM takes many seconds, and a config is checked in the first one.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlsys.problems import Problem

Sources = Sequence[tuple[str, str]]
"""(file below the package's folder, dataclass in it), for each class whose options count."""


@cache
def options_of(package: str, sources: tuple[tuple[str, str], ...]) -> dict[str, str] | None:
    """Name -> annotation of every public field; None where the package is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # its parent
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    found: dict[str, str] = {}
    for file, name in sources:
        for node in ast.parse((root / file).read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                found |= _fields(node)
    return found


def _fields(node: ast.ClassDef) -> dict[str, str]:
    return {
        line.target.id: ast.unparse(line.annotation)
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not line.target.id.startswith("_")
    }


def option_problems(
    field: str, values: Mapping[str, Any], options: Mapping[str, str], *, library: str
) -> list[Problem]:
    """Names that no option has, with the nearest one, and values of a wrong type."""
    problems = []
    for name, value in values.items():
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f": did you mean {near[0]}?" if near else ": take it out, or correct it"
            problems.append(Problem(f"{field}: {library} here has no option {name!r}{hint}"))
        elif not fits(value, options[name]):
            problems.append(
                Problem(f"{field}.{name} = {value!r}: {library} takes {_meaning(options[name])}")
            )
    return problems


def _meaning(annotation: str) -> str:
    if "Callable" in annotation:
        return "a function, which a config cannot hold: leave it out"
    if "torch.dtype" in annotation:
        return f"one of {', '.join(DTYPES)}"
    return annotation


# --- types ---------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16", "uint8")
"""Types of tensors that a config may name."""
_PLAIN = {"bool": bool, "str": str, "int": int, "None": type(None)}
_SEQUENCES = ("list", "List", "tuple", "Tuple", "Sequence", "set", "Set")


def fits(value: Any, annotation: str) -> bool:
    """Whether a value of a config fits an annotation; a type that is not known takes everything."""
    return _fits(value, ast.parse(annotation, mode="eval").body)


def _fits(value: Any, node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as text):
            return fits(value, text)
        case ast.BinOp(left=left, right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id=outer), slice=inner):
            return _fits_generic(value, outer, inner)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id=("dict" | "Dict" | "Mapping")):
            return isinstance(value, dict)
        case ast.Name(id="Callable" | "ContextManager"):
            return False  # a config cannot hold one
        case ast.Name(id=name) if name in _SEQUENCES:
            return isinstance(value, list)
        case ast.Name(id=name) if name in _PLAIN:
            return isinstance(value, _PLAIN[name])
        case ast.Attribute(value=ast.Name(id="torch"), attr="dtype"):
            return value in DTYPES
    return True


def _fits_generic(value: Any, outer: str, inner: ast.expr) -> bool:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if outer == "Optional":
        return value is None or _fits(value, inner)
    if outer == "Union":
        return any(_fits(value, part) for part in parts)
    if outer == "Literal":
        return any(isinstance(part, ast.Constant) and value == part.value for part in parts)
    if outer in ("dict", "Dict", "Mapping"):
        return isinstance(value, dict)
    if outer in ("tuple", "Tuple"):
        return isinstance(value, list) and (
            len(value) == len(parts) and all(map(_fits, value, parts))
        )
    if outer in _SEQUENCES:
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    return outer != "Callable"
