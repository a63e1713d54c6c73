"""Write the tables of docs/models.md from the lists of models that the tests go through.

python scripts/models_table.py
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT / "tests" / "actors"), str(ROOT / "scripts")]

from family_models import (  # noqa: E402
    GPU_RUN,
    MODELS,
    NOT_ON_GPUS,
    NOT_TESTED,
    THROUGH_THE_LOADER,
)
from page_tables import table, with_tables  # noqa: E402

from rlsys.model import families  # noqa: E402
from rlsys.model.families import FAMILIES  # noqa: E402


def markdown() -> str:
    """The page in docs, with its tables written again."""
    return with_tables(
        TARGET.read_text(encoding="utf-8"),
        {"families": _families(), "rope": _rope()},
        script="scripts/models_table.py",
    )


def _families() -> list[str]:
    head = [
        "family",
        "`model_type`",
        "variants",
        "experts",
        "exact",
        "synced engine",
        "in place",
        "GPUs",
    ]
    rows: list[list[str]] = []
    notes: list[str] = []
    for model_type in FAMILIES:
        names = [name for name in MODELS if name.partition("-")[0] == model_type]
        variants = ", ".join(name.partition("-")[2] for name in names if "-" in name)
        rows.append(
            [
                _summary(model_type),
                f"`{model_type}`",
                variants,
                "EP 2" if any("num_experts_per_tok" in MODELS[n][1] for n in names) else "",
                _tested(names, ("one rank", "TP 2", "PP 2"), notes),
                _tested(names, ("engine",), notes),
                _in_place(names),
                _on_gpus(names, notes),
            ]
        )
    lines = [*table(head, rows), f"\nGPUs: {GPU_RUN}."]
    return lines + [f"\n{number + 1}. {note}" for number, note in enumerate(notes)]


def _summary(model_type: str) -> str:
    """What the docstring of the family's file begins with."""
    for module in pkgutil.iter_modules(families.__path__, f"{families.__name__}."):
        loaded = importlib.import_module(module.name)
        own = [value for value in vars(loaded).values() if value is FAMILIES[model_type]]
        if own and module.name.rpartition(".")[2] != "base":
            return (loaded.__doc__ or "").splitlines()[0].partition(":")[0].rstrip(".")
    raise AssertionError(f"no file has {model_type}")


def _tested(names: list[str], tests: tuple[str, ...], notes: list[str]) -> str:
    """ "yes", or which of the tests some models are not in, and why."""
    missing = {(n, t): why for (n, t), why in NOT_TESTED.items() if n in names and t in tests}
    return _answer({f"{name}, {test}": why for (name, test), why in missing.items()}, notes)


def _on_gpus(names: list[str], notes: list[str]) -> str:
    return _answer({name: why for name, why in NOT_ON_GPUS.items() if name in names}, notes)


def _in_place(names: list[str]) -> str:
    if not THROUGH_THE_LOADER.issuperset(names):
        return "yes"
    return "not tested" if NOT_ON_GPUS.keys() & names else "on GPUs"


def _answer(missing: dict[str, str], notes: list[str]) -> str:
    if not missing:
        return "yes"
    notes += [f"Not {what}: {why}." for what, why in missing.items()]
    numbers = range(len(notes) - len(missing) + 1, len(notes) + 1)
    return f"but ({', '.join(map(str, numbers))})"


def _rope() -> list[str]:
    """Which families have which rotary embeddings."""
    kinds = dict.fromkeys(kind for family in FAMILIES.values() for kind in family.rope_types)
    exact = {"dynamic": "up to `max_position_embeddings`", "longrope": "see below"}
    rows: list[list[str]] = []
    for kind in kinds:
        having = [name for name, family in FAMILIES.items() if kind in family.rope_types]
        models = [name for name in MODELS if kind in _rope_types(name)]
        tested = "all" if kind == "default" else ", ".join(models)
        rows.append([f"`{kind}`", ", ".join(having), tested, exact.get(kind, "yes")])
    return table(["`rope_type`", "families", "tested with", "exact"], rows)


def _rope_types(name: str) -> set[str]:
    """The kinds of rotary embeddings that a model of the tests has, but for the plain one."""
    rope = MODELS[name][1].get("rope_parameters", {})
    entries = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    return {entry.get("rope_type", "default") for entry in entries}


if __name__ == "__main__":
    TARGET.write_text(markdown(), encoding="utf-8")
