"""Whether a teacher reads token ids as the policy does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlsys.model.folder import find_model_folder
from rlsys.model.tokenizer_files import has_tokenizer, token_ids
from rlsys.problems import Problem
from rlsys.text import counted

SHOWN = 3
"""Tokens that an error names."""


def tokenizer_problems(policy: str, teacher: str) -> Iterator[Problem]:
    """The problem of a teacher whose token ids mean something else.

    Folders without a tokenizer are another problem, or a hub model's, whose files are not here yet:
    `check_tokenizers` looks at them later.

    Args:
        policy, teacher: folders or hub ids of two models whose config.json can be read.
    """
    folders = [find_model_folder(path) for path in (policy, teacher)]
    if not all(map(has_tokenizer, folders)):
        return
    if text := tokenizer_difference(*folders):
        yield Problem(f"teacher.path: {text}", only_here=True)


def check_tokenizers(policy: Path, teacher: Path) -> None:
    """Refuse a teacher with another tokenizer.

    Args:
        policy, teacher: whole model folders.

    Raises:
        ValueError: names tokens that differ.
    """
    if text := tokenizer_difference(policy, teacher):
        raise ValueError(f"teacher.path: {text}")


def tokenizer_difference(policy: Path, teacher: Path) -> str | None:
    """What differs between the token ids of two folders; None if all tokens have equal ids."""
    own, theirs = token_ids(policy), token_ids(teacher)
    differing = {
        token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)
    }
    if not differing:
        return None
    # By the smallest id, so that the message is the same every time.
    first = sorted(differing, key=lambda token: (min(_ids_of(token, own, theirs)), token))[:SHOWN]
    shown = ", ".join(
        f"{token!r} is {_id_text(theirs, token)} for the teacher and {_id_text(own, token)} for "
        "the policy"
        for token in first
    )
    return (
        f"{teacher} has another tokenizer than model.path = {policy}: "
        f"{counted(len(differing), 'token')} differ ({shown}). A teacher predicts the policy's "
        "token ids: use a model with the same tokenizer"
    )


def _ids_of(token: str, *tables: dict[str, int]) -> list[int]:
    return [table[token] for table in tables if token in table]


def _id_text(table: dict[str, int], token: str) -> str:
    return str(table[token]) if token in table else "missing"
