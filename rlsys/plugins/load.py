"""Imports of user code: Python files, modules and installed packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
"""Folders of the plugins so far, whose files can be imported."""


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file once in this process, as a module of `rlsys.plugins.user_files`.

    A plugin can import the files beside it: its folder comes last in sys.path, so that they shadow
    neither the standard library nor installed packages.

    Raises:
        ValueError: a file is missing, raises on import (the message ends with its traceback), or
            imports a file beside it whose name another plugin's folder has too.
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


def load_what_loads(paths: Iterable[str | Path]) -> None:
    """Load plugins for what they register, and skip those that `plugin_problems` would report."""
    for path in paths:
        with suppress(ValueError):
            load_plugins([path])


def load_reference(reference: str) -> Any:
    """The function or class `path/to/file.py:name` or `package.module:name`.

    Modules may also stand in the working directory.

    Raises:
        ValueError: no such file, module or name, or it raises on import.
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
        its path, and a reference to that function, or to the first one of a plugin called `name`.
    """
    for path, module in _loaded():
        path = path.removeprefix(f"{os.getcwd()}/")
        own = [
            key
            for key, value in vars(module).items()
            # Imported functions have another module.
            if getattr(value, "__module__", None) == module.__name__
            and callable(value)
            and not key.startswith("_")
        ]
        if name in own:
            return path, f"{path}:{name}"
        if Path(path).stem == name:
            return path, f"{path}:{own[0] if own else 'FUNCTION'}"
    return None


def files_beside_plugins() -> dict[Path, list[Path]]:
    """Folders of loaded plugins -> imported files in them, and in packages there."""
    found: dict[Path, list[Path]] = {folder: [] for folder in _folders}
    files = {name: getattr(m, "__file__", None) for name, m in list(sys.modules.items())}
    for name, file in files.items():
        top = name.partition(".")[0]
        origin = Path(files.get(top) or "")
        for folder in found:
            if file is not None and origin in _places(folder, top):
                found[folder].append(Path(file))
    return found


def loaded_files() -> list[Path]:
    """The files of all loaded plugins, and those beside them that they import."""
    beside = [file for files in files_beside_plugins().values() for file in files]
    return [*(Path(path) for path, _ in _loaded()), *beside]


def imports_of_swift() -> list[str]:
    """Imports of ms-swift in loaded plugins, which then may have registered there."""
    return [one.describe(path) for path, _ in _loaded() for one in swift_imports(Path(path))]


def _loaded() -> list[tuple[str, ModuleType]]:
    """Paths and modules of the loaded plugins."""
    plugins = [module for name, module in list(sys.modules.items()) if name.startswith(PREFIX)]
    return [(str(module.__file__), module) for module in plugins]


@cache
def entry_points() -> dict[str, list[EntryPoint]]:
    """The reward functions of installed packages, by name, not imported yet."""
    found: dict[str, list[EntryPoint]] = {}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.value not in {other.value for other in found.get(point.name, [])}:
            found.setdefault(point.name, []).append(point)
    return found


def load_entry_point(name: str) -> Any | None:
    """The reward function `name` of an installed package; None if no package has it.

    Raises:
        ValueError: several packages have it, or it cannot be imported.
    """
    points = entry_points().get(name, [])
    if not points:
        return None
    if len(points) > 1:
        raise ValueError(
            f"reward function {name!r} is offered by {' and by '.join(map(describe, points))}. "
            f"Uninstall one of them, or name the function itself, as in {points[0].value!r}."
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
    except (Exception, SystemExit) as error:  # user code may raise anything
        if isinstance(error, ModuleNotFoundError) and name.startswith(f"{error.name}"):
            raise ValueError(
                f"reward function {reference!r}: module {error.name!r} is neither "
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
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ValueError(
            f"plugin {str(path)!r} raised when it was imported:\n{_own_traceback(error, path)}"
            f"{_import_remedy(error, path)}"
        ) from None


def _check_siblings(path: Path, seen: set[Path]) -> None:
    """Raise ValueError if a plugin imports a file beside it and would get another plugin's."""
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
    """The files that module `name` of a folder may have."""
    return folder / f"{name}.py", folder / name / "__init__.py"


def _imported_names(path: Path) -> set[str]:
    """The top-level modules that a file imports absolutely; empty if it does not parse."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return set()  # the import of the file raises
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    names |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return {name.partition(".")[0] for name in names}


def _import_remedy(error: BaseException, path: Path) -> str:
    """What to write instead of an import that cannot work here; empty for other errors."""
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
    """The traceback without the frames of the import system: from the plugin's first line on, or
    for a module, whose `path` is None, from the first line outside the import system."""
    import_system = ("<frozen importlib", __file__, importlib.__file__)
    frames = error.__traceback__
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if file == str(path) or (path is None and not file.startswith(import_system)):
            break
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
