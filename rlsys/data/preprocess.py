"""Preprocessors: a user's function or class that turns each row into one that rlsys understands.

plugins/word_problems.py is a complete one. `rlsys.data.row_preprocessors` has ms-swift's classes.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlsys.data.readers import BadRow
from rlsys.data.registered import find_registered, registered_datasets, resolve
from rlsys.data.row_preprocessors import Row, RowPreprocessor
from rlsys.data.spec import DatasetSpec, parse_spec
from rlsys.data.tables import without_fill
from rlsys.plugins.load import find_unregistered, load_reference
from rlsys.registry import Registry

Preprocessor = Callable[[Row], Row | None]

NO_PREPROCESSOR = "none"
"""The name, in a list of one for each dataset, that leaves rows as they are."""


class PreprocessorRegistry(Registry[Preprocessor | type[RowPreprocessor]]):
    """Preprocessors by name; `path/to/file.py:name` names one that is not registered."""

    def __getitem__(self, name: str) -> Preprocessor | type[RowPreprocessor]:
        """The function, class or instance.

        Raises:
            ValueError: an unknown name, or a file that cannot be imported.
        """
        if name not in self.data and ":" in name:
            return load_reference(name)
        return super().__getitem__(name)

    def known(self) -> list[str]:
        """What is registered: preprocessors, and datasets by one name of each."""
        return sorted({*super().known(), *(meta.id for meta in registered_datasets)})

    def remedy(self, name: str) -> str:
        """How to name a class or function of a loaded plugin that did not register `name`."""
        found = find_unregistered(name)
        return "" if found is None else f" {found[0]} was loaded; name it as {found[1]!r}."


preprocessors = PreprocessorRegistry("preprocessor")
"""Name -> function, or class derived from `RowPreprocessor`, or an instance of one."""

register_preprocessor = preprocessors.register
"""Decorator form of `preprocessors[name] = value`."""


def keep_row(row: Row) -> Row:
    """The preprocessor that does nothing."""
    return row


@dataclass(frozen=True, slots=True)
class Preparation:
    """What happens to the rows of one dataset between reading and understanding them."""

    each: Preprocessor = keep_row
    """Called with each row."""
    name: str = ""
    """Of the preprocessor; empty: there is none."""
    whole: RowPreprocessor | None = None
    """Has a `prepare_dataset`, which gets all rows before `each` gets one."""

    def prepared(self, rows: list[Row]) -> Iterator[Row]:
        """The rows that `whole` makes of all.

        Raises:
            ValueError: it raised, or the rows do not fit into one table.
        """
        import datasets

        assert self.whole is not None
        names = dict.fromkeys(name for row in rows for name in row)
        who = f"{type(self.whole).__name__}.prepare_dataset"
        try:
            # All names in every row: the library takes the columns of the first one.
            every = [{n: row.get(n) for n in names} for row in rows]
            # Rows whose structs differ become JSON, or all would get the fields of all.
            table = datasets.Dataset.from_list(every, on_mixed_types="use_json")
            made = self.whole.prepare_dataset(table)
            yield from (without_fill(row, made.features) for row in made)
        # User code: whatever it raises is reported with the line of the code.
        except Exception as error:
            raise ValueError(f"{who} raised {_raised(error)}") from error


def open_dataset(text: str, preprocessor: str) -> tuple[DatasetSpec, Preparation]:
    """An entry of `data.dataset`, and the preprocessor that the config or a plugin has for it.

    Raises:
        ValueError: an entry that says nothing, no such preprocessor, or one that cannot be made.
    """
    spec, found, name = parse_spec(text), None, preprocessor
    meta = find_registered(spec.name)
    if meta is not None:
        spec, found = resolve(spec, meta)
    if preprocessor != NO_PREPROCESSOR:
        other = None if preprocessor in preprocessors else find_registered(preprocessor)
        found = preprocessors[preprocessor] if other is None else other.preprocess_func
    elif found is None:
        return spec, Preparation()
    else:
        name = type(found).__name__ if isinstance(found, RowPreprocessor) else found.__name__
    made = _instance(name, found)
    if isinstance(made, RowPreprocessor) and made.prepares_dataset:
        return spec, Preparation(_checked(name, made.preprocess_renamed), name, made)
    return spec, Preparation(_checked(name, made), name)


def read_spec(text: str) -> DatasetSpec:
    """What an entry of `data.dataset` reads, which a plugin may have registered under its name.

    Raises:
        ValueError: as `open_dataset`.
    """
    return open_dataset(text, NO_PREPROCESSOR)[0]


def _instance(name: str, found: Any) -> Preprocessor:
    """A function, or an instance, of what the user registered.

    Raises:
        ValueError: a class that cannot be made without arguments, or nothing that can be called.
    """
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
    return found


def _checked(name: str, function: Preprocessor) -> Preprocessor:
    """`function`; what it raises, or returns that is no row, becomes a `BadRow`."""

    def checked(row: Row) -> Row | None:
        try:
            made: Any = function(row)
        except BadRow:
            raise
        # User code: whatever it raises is reported with the row and the line of the code.
        except Exception as error:
            raise BadRow(f"preprocessor {name!r} raised {_raised(error)}") from error
        if isinstance(made, list) and all(isinstance(row, dict) for row in made):
            if len(made) > 1:
                raise BadRow(
                    f"preprocessor {name!r} returned {len(made)} rows for one, which ms-swift "
                    "takes and rlsys does not: write these rows into a file first"
                )
            made = made[0] if made else None
        if made is not None and not isinstance(made, dict):
            raise BadRow(
                f"preprocessor {name!r} returned {made!r:.80}: return the row as a dictionary, or "
                "None to leave it out"
            )
        return made

    return checked


def _raised(error: Exception) -> str:
    """An exception of user code, and the last line of it that is no library's."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
