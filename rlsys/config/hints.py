"""What an unknown name in a config may mean: another project's name, or a misspelt one of ours.

A wrong hint changes what is trained, so a name that is not clearly one of them gets none.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Sequence

from rlsys.config.elsewhere import Counterpart, counterparts, normal, show_defaults
from rlsys.config.fields import config_fields, config_sections, first_sentence, optional_sections
from rlsys.config.method import hint_of_method
from rlsys.config.schema import Config, RunConfig

LEAST_LIKE = 0.8
"""Similarity of each word of a misspelt name to the right one: lrr is lr, and max is not min."""
_SURE_OF_PROJECT = 3
"""Names of one project in a config that show that its user comes from there."""


def is_of_elsewhere(name: str, schema: type[RunConfig] = Config) -> bool:
    """Whether a name with its sections is another project's."""
    return bool(_rows_of_path(name, schema))


def _rows_of_path(name: str, schema: type[RunConfig]) -> list[Counterpart]:
    """The lines of a name with sections, such as `rollout.n` for `actor_rollout_ref.rollout.n`."""
    path = normal(name)
    if "." not in path:
        return []
    return [
        row
        for row in counterparts(schema)
        for theirs in map(normal, row.names)
        if theirs == path or theirs.endswith(f".{path}") or path.startswith(f"{theirs}.")
    ]


# --- one name ------------------------------------------------------------------------------------


def hint(name: str, project: str | None = None, schema: type[RunConfig] = Config) -> str:
    """What to write instead of a name that no field has; empty unless that is clear.

    Args:
        name: as the user wrote it.
        project: the project of the whole command, whose meaning of the name then counts.
        schema: the class of the config.
    """
    fields = config_fields(schema)
    known = [*fields, *([] if "." in name else config_sections(schema))]
    rows = _rows_of_path(name, schema)
    own = [] if rows else [field for field in known if _bare(field) == _bare(name)]
    rows = rows or [row for row in counterparts(schema) if _bare(name) in map(_bare, row.names)]
    there = [row for row in rows if row.project == project]
    rows = there or rows
    if rows and not any(row.fields for row in rows) and (there or not own):
        return f" {rows[0].says()}"
    if own:  # the same word may be something else in another project
        rows = [row for row in rows if set(row.fields) <= set(own)]
    found = dict.fromkeys(field for row in rows for field in row.fields)
    meant = _in_section(name, own or list(found) or _nearest(name, known))
    if not meant:
        return hint_of_method(name, schema) or _fields_beside(name, schema)
    text = f" Did you mean {' or '.join(map(repr, meant))}?"
    if any(row.fields for row in rows):  # another project may count something else
        for field in meant:
            label = f"{field}: " if len(meant) > 1 else ""
            text += f" {label}{first_sentence(fields[field].description)}"
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note and set(row.fields) <= set(meant):
            notes.setdefault(row.note if row.fields else row.says(), []).append(row.project)
    return text + "".join(f" {', '.join(names)}: {note}" for note, names in notes.items())


def _fields_beside(name: str, schema: type[RunConfig]) -> str:
    """The fields of a section inside of a section, which has few; empty for other names."""
    section = normal(name).rpartition(".")[0]
    kind = optional_sections(schema).get(section)
    return "" if kind is None else f" {section} has {', '.join(kind.model_fields)}."


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The fields that `name` misspells; often none."""
    near = {field: _likeness(_bare(name), _bare(field)) for field in known}
    best = max(near.values())
    return _in_section(name, [field for field in known if near[field] == best]) if best else []


def _likeness(name: str, known: str) -> float:
    """Similarity from 0 to 1, word by word: long words in common would hide a short one."""
    if name.replace("_", "") == known.replace("_", ""):
        return 1.0
    words, others = name.split("_"), known.split("_")
    if len(words) != len(others):
        return 0.0
    pairs = zip(words, others, strict=True)
    likeness = [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]
    return sum(likeness) / len(words) if min(likeness) >= LEAST_LIKE else 0.0


def _in_section(name: str, fields: list[str]) -> list[str]:
    """The fields of `name`'s section; without one, fields of `eval` only if no other is there."""
    section = name.rpartition(".")[0]
    own = [field for field in fields if section and field.rpartition(".")[0] == section]
    return own or [field for field in fields if not field.startswith("eval.")] or fields


def _bare(name: str) -> str:
    return normal(name).rpartition(".")[2]


# --- all names of a config -----------------------------------------------------------------------


def likely_project(names: Collection[str], schema: type[RunConfig] = Config) -> str | None:
    """The project of a user who gave these unknown names."""
    given = set(map(normal, names))
    rows = [(row.project, theirs) for row in counterparts(schema) for theirs in row.names]
    matches = Counter(project for project, theirs in rows if normal(theirs) in given)
    project, count = max(matches.items(), key=lambda item: item[1], default=("", 0))
    return project if count >= _SURE_OF_PROJECT else None


def coming_from(
    project: str,
    names: Collection[str],
    fields_given: Collection[str],
    schema: type[RunConfig] = Config,
) -> str:
    """The defaults of a project that differ, for what its user did not give.

    Args:
        project: where the user comes from.
        names: that no field has.
        fields_given: fields that were set by their own names.
        schema: the class of the config.
    """
    given = set(map(normal, names))
    rows = [row for row in counterparts(schema) if row.project == project]
    meant = {field for row in rows if given & set(map(normal, row.names)) for field in row.fields}
    set_here = meant | set(fields_given)
    inside = tuple(f"{section}." for section in optional_sections(schema))
    unused = tuple(start for start in inside if not any(n.startswith(start) for n in set_here))
    differ: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        is_unused = any(field.startswith(unused) for field in row.fields)
        if not (row.same_default or is_unused or set(row.fields) & set_here):
            differ.setdefault(row.fields, []).append(row.default)
    defaults = "".join(
        f"\n  {', '.join(fields)} {show_defaults(fields, schema)} "
        f"({' or '.join(dict.fromkeys(theirs))} there)"
        for fields, theirs in differ.items()
    )
    return (
        f"These are names of {project}: docs/migration.md has all. Defaults that differ there, of "
        f"what was not given:{defaults}"
    )
