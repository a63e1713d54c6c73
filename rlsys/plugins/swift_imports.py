"""What to write instead of an `import` of ms-swift in a plugin."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

_HOMES = {
    **dict.fromkeys(("ORM", "AsyncORM", "orms"), "rlsys.rewards"),
    **dict.fromkeys(
        (
            *("RowPreprocessor", "ResponsePreprocessor", "AlpacaPreprocessor", "SubsetDataset"),
            *("MessagesPreprocessor", "AutoPreprocessor", "DatasetMeta", "register_dataset"),
        ),
        "rlsys.data",
    ),
}
"""Names that exist in rlsys, with their modules."""
_MODEL = "reward.reward_model: [MODEL] loads a reward model"
_TURNS = "rlsys samples one turn for each prompt"
_INSTEAD = {
    "get_logger": "logging.getLogger(__name__) does the same",
    "rm_plugins": _MODEL,
    "DefaultRMPlugin": _MODEL,
    "prms": "derive the class from ORM, which scores a completion as a whole",
    "PRM": "derive the class from ORM, which scores a completion as a whole",
    "multi_turns": _TURNS,
    "MultiTurnScheduler": _TURNS,
}


@dataclass(frozen=True, slots=True)
class SwiftImport:
    """One import statement."""

    line: int
    statement: str
    remedy: str
    """The lines to write instead, and the names that do not exist in rlsys."""

    def describe(self, path: str) -> str:
        """An error for users."""
        return (
            f"{path}, line {self.line}: `{self.statement}` imports from ms-swift, and rlsys does "
            f"not use what is registered there. {self.remedy}"
        )


def is_swift(module: str | None) -> bool:
    """Whether a module is ms-swift's."""
    return module is not None and module.partition(".")[0] == "swift"


def swift_imports(path: Path) -> list[SwiftImport]:
    """The statements of a file that import from ms-swift; none if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and is_swift(node.module):
            names = [alias.name for alias in node.names]
            lines = _lines(node.names)
        elif isinstance(node, ast.Import) and any(is_swift(alias.name) for alias in node.names):
            names, lines = [], ["from rlsys.rewards import ORM, orms"]
        else:
            continue
        found.append(SwiftImport(node.lineno, ast.unparse(node), _remedy(names, lines)))
    return sorted(found, key=lambda one: one.line)


def _lines(names: list[ast.alias]) -> list[str]:
    by_home: dict[str, list[str]] = {}
    for alias in names:
        if alias.name in _HOMES:
            by_home.setdefault(_HOMES[alias.name], []).append(ast.unparse(alias))
    return [f"from {home} import {', '.join(some)}" for home, some in by_home.items()]


def _remedy(names: list[str], lines: list[str]) -> str:
    missing = [name for name in names if name not in _HOMES]
    parts = [f"Write instead:\n    {chr(10).join(lines).replace(chr(10), chr(10) + '    ')}"]
    if not lines:
        parts = ["Delete the line and what needs it."]
    if missing:
        hints = [f"{name} ({_INSTEAD[name]})" for name in missing if name in _INSTEAD]
        hints += [name for name in missing if name not in _INSTEAD]
        start = "\nrlsys has no " if lines else " rlsys has no "
        parts.append(f"{start}{', '.join(hints)}.")
    return "".join(parts)
