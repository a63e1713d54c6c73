"""The columns of completions in DuckDB, whichever version of rlsys wrote the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

STORED = {
    "step": "BIGINT",
    "group_id": "BIGINT",
    "index": "BIGINT",
    "group_size": "BIGINT",
    "prompt_id": "VARCHAR",
    "reward": "DOUBLE",
    "rewards": "MAP(VARCHAR, DOUBLE)",
    "failures": "MAP(VARCHAR, VARCHAR)",
    "advantage": "DOUBLE",
    "num_tokens": "BIGINT",
    "finish_reason": "VARCHAR",
    "policy_versions": "BIGINT[]",
    "version_starts": "BIGINT[]",
    "prompt": "VARCHAR",
    "text": "VARCHAR",
    "extra_columns": "VARCHAR[]",
}
"""Column of a row -> type in DuckDB."""
LACKING = {
    "rewards": "MAP {}",
    "failures": "MAP {}",
    "policy_versions": "[]",
    "version_starts": "[]",
    "extra_columns": "[]",
}
"""Column -> what stands for it in rows that lack it."""
DERIVED = {
    "id": "concat(step, '-', group_id, '-', index)",
    "length": "num_tokens",
}
"""Further names that queries may use -> expression. An id names one completion of a split for good,
also after files were rotated."""
PLACE = ("__part", "__row")
"""Columns that together are the order in which completions were recorded."""
_TYPES = {
    frozenset({"DOUBLE", "BIGINT", "UBIGINT"}): "DOUBLE",
    frozenset({"VARCHAR"}): "VARCHAR",
    frozenset({"BOOLEAN"}): "BOOLEAN",
}
"""What json_type may say about the values of a column -> type of the column."""


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text_literal(value: str) -> str:
    """A text as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def stored_columns(further: Iterable[str]) -> str:
    """What read_json is asked for: STORED, and columns of unknown types as texts of JSON."""
    types = STORED | dict.fromkeys(further, "JSON")
    return "{" + ", ".join(f"{text_literal(n)}: '{kind}'" for n, kind in types.items()) + "}"


def view_columns(
    reward_names: Iterable[str], further: Mapping[str, Iterable[str]]
) -> dict[str, str]:
    """Column that a query may name -> its expression over the stored columns.

    A reward function has a column of its name, but where a column of the row has that name already;
    names are compared without case, as SQL does.

    Args:
        reward_names: the keys of `rewards` in any row.
        further: column beside STORED -> what json_type says about its values.
    """
    columns = {name: quoted(name) for name in STORED} | DERIVED
    for name, kinds in further.items():
        known = frozenset(kinds) - {"NULL"}
        kind = next((kind for of, kind in _TYPES.items() if known <= of), "JSON")
        text = f"json_extract_string({quoted(name)}, '$')"
        cast = f"{quoted(name)}::JSON" if kind == "JSON" else f"TRY_CAST({text} AS {kind})"
        _add(columns, name, cast)
    for name in reward_names:
        _add(columns, name, f"rewards[{text_literal(name)}]")
    return columns


def _add(columns: dict[str, str], name: str, expression: str) -> None:
    if name.lower() not in {known.lower() for known in (*columns, *PLACE)}:
        columns[name] = expression
