"""Code from elsewhere: the user's Python files, modules and installed packages.

Reward functions most of all; losses, advantage estimators and preprocessors come by files too.
"""

from __future__ import annotations

import hashlib
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

from rlsys.registry import did_you_mean

ENTRY_POINT_GROUP = "rlsys.rewards"
_MODULE_PREFIX = "rlsys_plugin_"


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file once in this process.

    A plugin's module has a name of its own that depends on the whole path, so that a plugin
    called math.py shadows nothing, and two plugins of one name in two folders get along.

    Raises:
        ValueError: a file is missing or raises on import; the message ends with its traceback.
    """
    for path in paths:
        _load(Path(path).expanduser().resolve())


def plugin_problems(field: str, paths: Iterable[str | Path]) -> Iterator[tuple[str, bool]]:
    """As `load_plugins`, but everything that is wrong, and all else is loaded.

    Yields:
        what is wrong with a path of config field `field`, and whether that file is missing, which
        it may be on this machine only.
    """
    for path in paths:
        try:
            load_plugins([path])
        except ValueError as error:
            yield f"{field}: {error}", not Path(path).expanduser().exists()


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
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(_MODULE_PREFIX):
            continue
        assert module.__file__ is not None
        path = module.__file__.removeprefix(f"{os.getcwd()}/")
        own = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", None) == module_name  # imported ones have another
            and callable(value)
            and not key.startswith("_")
        ]
        if name in own:
            return path, f"{path}:{name}"
        if Path(path).stem == name:
            return path, f"{path}:{own[0] if own else 'FUNCTION'}"
    return None


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
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"{_MODULE_PREFIX}{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ValueError(
            f"plugin {str(path)!r} is not a file. Relative paths start at the working directory, "
            f"which is {os.getcwd()}."
        )
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin {str(path)!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as dataclasses and pickle look a class's module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    # Whatever a user's file may raise, sys.exit() included.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(
            f"plugin {str(path)!r} raised when it was imported:\n{_own_traceback(error, path)}"
        ) from None
    return module


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
