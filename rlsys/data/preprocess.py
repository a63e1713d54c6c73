"""Preprocessors: a user's function or class that turns each row into one that rlsys understands.

plugins/word_problems.py is a complete one. `rlsys.data.row_preprocessors` has ms-swift's classes.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlsys.config.dataset_spec import DatasetSpec, parse_spec
from rlsys.data.registered import find_registered, registered_datasets, resolve
from rlsys.data.row_preprocessors import Columns, RowPreprocessor
from rlsys.data.tables import without_fill
from rlsys.json_text import BadRow
from rlsys.plugins.load import find_unregistered, load_reference
from rlsys.registry import Registry

RowFunction = Callable[[Columns], Columns | None]

NO_PREPROCESSOR = "none"
"""The name, in a list of one for each dataset, that leaves rows as they are."""


class PreprocessorRegistry(Registry[RowFunction | type[RowPreprocessor]]):
    """Preprocessors by name; `path/to/file.py:name` names one that is not registered."""

    def __getitem__(self, name: str) -> RowFunction | type[RowPreprocessor]:
        """The function, class or instance; ValueError if it is unknown or cannot be imported."""
        if name not in self.data and ":" in name:
            return load_reference(name)
        return super().__getitem__(name)

    def known(self) -> list[str]:
        """The registered preprocessors, and one name of each registered dataset."""
        return sorted({*super().known(), *(meta.names[0] for meta in registered_datasets)})

    def remedy(self, name: str) -> str:
        """How to name a class or function of a loaded plugin that did not register `name`."""
        found = find_unregistered(name)
        return "" if found is None else f" {found[0]} was loaded; name it as {found[1]!r}."


preprocessors = PreprocessorRegistry("preprocessor")
"""Name -> function, or class derived from `RowPreprocessor`, or an instance of one."""

register_preprocessor = preprocessors.register
"""Decorator form of `preprocessors[name] = value`."""


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """The preprocessor of one dataset; mistakes of its code name it and the line."""

    name: str
    function: Any
    """A function of a row, or an instance of `RowPreprocessor`."""

    @property
    def takes_dataset(self) -> bool:
        """Whether `prepare_dataset` needs all rows before `preprocess` gets one."""
        return isinstance(self.function, RowPreprocessor) and self.function.prepares_dataset

    def apply(self, columns: Columns) -> Columns | None:
        """The row to train on, None to leave it out; `prepare` comes before if `takes_dataset`.

        Raises:
            BadRow: the function raised, or returned something else than a row.
        """
        call = self.function.preprocess_renamed if self.takes_dataset else self.function
        try:
            made: Any = call(columns)
        except BadRow:
            raise
        # User code: whatever it raises is reported with the row and the line of the code.
        except Exception as error:
            raise BadRow(f"preprocessor {self.name!r} raised {_raised(error)}") from error
        if isinstance(made, list) and all(isinstance(row, dict) for row in made):
            if len(made) > 1:
                raise BadRow(
                    f"preprocessor {self.name!r} returned {len(made)} rows for one, which ms-swift "
                    "takes and rlsys does not: write these rows into a file first"
                )
            made = made[0] if made else None
        if made is not None and not isinstance(made, dict):
            raise BadRow(
                f"preprocessor {self.name!r} returned {made!r:.80}: return the row as a "
                "dictionary, or None to leave it out"
            )
        return made

    def prepare(self, rows: list[Columns]) -> Iterator[Columns]:
        """The rows that `prepare_dataset` makes of all rows, which `rename` has renamed.

        Raises:
            ValueError: it raised, or the rows do not fit into one table.
        """
        import datasets

        names = dict.fromkeys(name for row in rows for name in row)
        try:
            # All names in every row: the library takes the columns of the first one.
            every = [{n: row.get(n) for n in names} for row in rows]
            # Rows whose structs differ become JSON, or all would get the fields of all.
            table = datasets.Dataset.from_list(every, on_mixed_types="use_json")
            made = self.function.prepare_dataset(table)
            yield from (without_fill(row, made.features) for row in made)
        # User code: whatever it raises is reported with the line of the code.
        except Exception as error:
            who = f"{type(self.function).__name__}.prepare_dataset"
            raise ValueError(f"{who} raised {_raised(error)}") from error


def open_dataset(text: str, name: str) -> tuple[DatasetSpec, Preprocessor | None]:
    """An entry of `data.dataset`, and its preprocessor: `name` in the config, or its plugin's own.

    Raises:
        ValueError: a malformed entry, an unknown preprocessor, or one that cannot be made.
    """
    spec, found = parse_spec(text), None
    meta = find_registered(spec.name)
    if meta is not None:
        spec, found = resolve(spec, meta)
    if name != NO_PREPROCESSOR:
        other = None if name in preprocessors else find_registered(name)
        found = preprocessors[name] if other is None else other.preprocess_func
    elif found is None:
        return spec, None
    else:
        name = type(found).__name__ if isinstance(found, RowPreprocessor) else found.__name__
    if isinstance(found, type):
        try:
            found = found()
        # User code: whatever it raises is reported with its name.
        except Exception as error:
            raise ValueError(f"preprocessor {name!r}: {name}() raised {_raised(error)}") from error
    if not callable(found):
        raise ValueError(
            f"preprocessor {name!r} is {found!r:.80}, which cannot be called: derive its class "
            "from RowPreprocessor, or write a function of a row"
        )
    return spec, Preprocessor(name, found)


def read_spec(text: str) -> DatasetSpec:
    """Where the rows of an entry of `data.dataset` are; a plugin may have registered its name.

    Raises:
        ValueError: as `open_dataset`.
    """
    return open_dataset(text, NO_PREPROCESSOR)[0]


def _raised(error: Exception) -> str:
    """An exception of user code, with the last line that is not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
