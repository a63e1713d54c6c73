"""Loading the user's Python files, which register reward functions when imported."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file once in this process.

    A plugin's module has a name of its own that depends on the whole path, so that a plugin
    called math.py shadows nothing, and two plugins of one name in two folders get along.

    Raises:
        ValueError: a file is missing or raises on import; the message ends with its traceback.
    """
    for path in paths:
        _load(Path(path).expanduser().resolve())


def _load(path: Path) -> None:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"rlsys_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise ValueError(
            f"plugin {str(path)!r} is not a file. Relative paths in reward.external_plugins start "
            "at the working directory."
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


def _own_traceback(error: BaseException, path: Path) -> str:
    """The traceback from the plugin's first line on, without the frames of the import system."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != str(path):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
