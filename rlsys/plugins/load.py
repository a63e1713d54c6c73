"""Code from elsewhere: the user's Python files, modules and installed packages.

Reward functions most of all; losses, advantage estimators and preprocessors come by files too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from rlsys.plugins.swift_imports import is_swift, swift_imports
from rlsys.plugins.user_files import PREFIX, module_name
from rlsys.problems import Problem
from rlsys.registry import did_you_mean

ENTRY_POINT_GROUP = "rlsys.rewards"
_folders: list[Path] = []
"""Of the plugins so far: files in them can be imported."""


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file once in this process, as a module of `rlsys.plugins.user_files`.

    A plugin can import the files beside it: its folder is appended to sys.path, so that they
    shadow neither the standard library nor installed packages.

    Raises:
        ValueError: a file is missing, raises on import (the message ends with its traceback), or
            imports a file beside it under a name that another plugin's folder has too.
    """
    for path in paths:
        _load(Path(path).expanduser().resolve())


def plugin_problems(field: str, paths: Iterable[str | Path]) -> Iterator[Problem]:
    """Load the plugins of config field `field`; yields a problem for each that cannot be loaded."""
    for path in paths:
        try:
            load_plugins([path])
        except ValueError as error:
            missing = not Path(path).expanduser().exists()
            yield Problem(f"{field}: {error}", only_here=missing)


def load_reference(reference: str) -> Any:
    """What `path/to/file.py:name` or `package.module:name` is.

    Modules are looked for where Python looks, and after that in the working directory.

    Raises:
        ValueError: no such file, module or name, or it raises on import; the message ends with its
            traceback.
    """
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        module = _load(Path(place).expanduser().resolve())
    else:
        module = _import_module(place, reference)
    value = vars(module).get(name)
    if not callable(value):
        functions = [key for key, item in vars(module).items() if callable(item) and key[0] != "_"]
        raise ValueError(
            f"{place!r} has no function or class {name!r}.{did_you_mean(name, functions)}"
        )
    return value


def find_unregistered(name: str) -> tuple[str, str] | None:
    """A loaded plugin that is called `name` or has a function `name`.

    Returns:
        its path, and a reference to that function, in a plugin called `name` to its first.
    """
    for module_of, module in list(sys.modules.items()):
        if not module_of.startswith(PREFIX):
            continue
        assert module.__file__ is not None
        path = module.__file__.removeprefix(f"{os.getcwd()}/")
        own = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", None) == module_of  # imported ones have another
            and callable(value)
            and not key.startswith("_")
        ]
        if name in own:
            return path, f"{path}:{name}"
        if Path(path).stem == name:
            return path, f"{path}:{own[0] if own else 'FUNCTION'}"
    return None


def imports_of_swift() -> list[str]:
    """Of the loaded plugins: they may have registered with ms-swift, where it is installed."""
    files = [m.__file__ for n, m in list(sys.modules.items()) if n.startswith(PREFIX)]
    return [one.describe(f) for f in files if f is not None for one in swift_imports(Path(f))]


@cache
def entry_points() -> dict[str, list[EntryPoint]]:
    """What installed packages offer as reward functions, by name; nothing is imported yet."""
    found: dict[str, list[EntryPoint]] = {}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.value not in {other.value for other in found.get(point.name, [])}:
            found.setdefault(point.name, []).append(point)
    return found


def load_entry_point(name: str) -> Any | None:
    """What an installed package offers under `name`; None when none does.

    Raises:
        ValueError: several packages do, or it cannot be imported.
    """
    points = entry_points().get(name, [])
    if not points:
        return None
    if len(points) > 1:
        raise ValueError(
            f"reward function {name!r} is offered by {' and by '.join(map(describe, points))}. "
            "Uninstall one of them, or name the function itself, as in "
            f"{points[0].value!r}."
        )
    return load_reference(points[0].value)


def describe(point: EntryPoint) -> str:
    """`package.module:name of distribution`."""
    return f"{point.value} of {point.dist.name if point.dist else 'an unknown package'}"


def _import_module(name: str, reference: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing in it shadows an installed package
    try:
        return importlib.import_module(name)
    # Whatever a user's module may raise, sys.exit() included.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(f"{error.name}"):
            raise ValueError(
                f"reward function {reference!r}: there is no module {error.name!r}, neither "
                f"installed nor in the working directory, {os.getcwd()}"
            ) from None
        raise ValueError(
            f"module {name!r} raised when it was imported:\n{_own_traceback(error, None)}"
        ) from None


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"plugin {str(path)!r} is not a file. Relative paths start at the working directory, "
            f"which is {os.getcwd()}."
        )
    if path.suffix != ".py":
        raise ValueError(f"plugin {str(path)!r} is not a Python file: its name must end in .py")
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    if path.parent not in _folders:
        _folders.append(path.parent)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
        importlib.invalidate_caches()
    _check_siblings(path, {path})
    try:
        return importlib.import_module(name)
    # Whatever a user's file may raise, sys.exit() included.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"plugin {str(path)!r} raised when it was imported:\n{_own_traceback(error, path)}"
            f"{_import_remedy(error, path)}"
        ) from None


def _check_siblings(path: Path, seen: set[Path]) -> None:
    """Refuse a plugin that would get another plugin's file under the name of one beside it.

    Raises:
        ValueError: as it says.
    """
    for name in _imported_names(path):
        sibling = next((p for p in _places(path.parent, name) if p.is_file()), None)
        if sibling is None or sibling in seen:
            continue
        loaded = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        others = {place for folder in _folders for place in _places(folder, name)} - {sibling}
        if origin in others and origin.read_bytes() != sibling.read_bytes():
            raise ValueError(
                f"{path} imports {name}, which is {sibling} beside it, but another plugin has "
                f"{origin}, and Python knows one module of a name: rename one of the two files"
            )
        if origin == sibling:
            _check_siblings(sibling, seen | {sibling})


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a module of the folder is."""
    return folder / f"{name}.py", folder / name / "__init__.py"


def _imported_names(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return set()  # its import tells
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    names |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return {name.partition(".")[0] for name in names}


def _import_remedy(error: BaseException, path: Path) -> str:
    """What to write in place of an import that cannot work here; empty for all other errors."""
    if not isinstance(error, ImportError) or error.name is None:
        return ""
    if error.name.startswith(PREFIX.rstrip(".")):
        return "\nA plugin is not part of a package: import the files beside it without the dot."
    if not is_swift(error.name):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    files = dict.fromkeys([Path(frame.filename) for frame in reversed(frames)] + [path])
    for file in files:
        if found := swift_imports(file) if file.parent in _folders else []:
            return "\n" + "\n".join(one.describe(str(file)) for one in found)
    return ""


def _own_traceback(error: BaseException, path: Path | None) -> str:
    """The traceback from the plugin's first line on, without the frames of the import system.

    `path` None: from the first line that is not the import system's.
    """
    frames = error.__traceback__
    while frames is not None and not _is_of(frames.tb_frame.f_code.co_filename, path):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def _is_of(filename: str, path: Path | None) -> bool:
    if path is not None:
        return filename == str(path)
    import_system = ("<frozen importlib", __file__, importlib.__file__)
    return not filename.startswith(import_system)
