"""Users' files as modules: `rlsys.plugins.user_files.NAME_HASH`.

Modules of a real package can be imported by name in every child process, as pickle does in
`multiprocessing` and `concurrent.futures`. The hash is of the whole path: a file called math.py
shadows nothing, and two folders may have files of the same name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PREFIX = f"{__name__}."
_PATHS = "RLSYS_USER_FILES"
"""Environment variable with the paths of all files so far; child processes inherit it."""


def module_name(path: Path) -> str:
    """Make the file importable; returns its module name.

    Args:
        path: absolute, and exists.
    """
    paths = _paths()
    if str(path) not in paths:
        os.environ[_PATHS] = json.dumps([*paths, str(path)])
    return _name(path)


def _paths() -> list[str]:
    return json.loads(os.environ.get(_PATHS, "[]"))


def _name(path: Path) -> str:
    return f"{PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a file's module, or None."""
        if not name.startswith(PREFIX):
            return None
        found = next((Path(text) for text in _paths() if _name(Path(text)) == name), None)
        return None if found is None else importlib.util.spec_from_file_location(name, found)


sys.meta_path.append(_Finder)
