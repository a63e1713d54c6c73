"""Whether a teacher and a reference read token ids as the policy does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlsys.model.folder import find_model_folder
from rlsys.model.folder_check import unreadable
from rlsys.model.shape import read_model_shape
from rlsys.model.tokenizer_files import has_tokenizer, resize_remedy, token_ids
from rlsys.problems import Problem
from rlsys.text import counted

SHOWN = 3
"""Tokens that an error names."""


def tokenizer_problems(policy: str, teacher: str) -> Iterator[Problem]:
    """The problems of a teacher whose token ids mean something else, or that lacks some.

    The files of a hub model are not here yet: `check_tokenizers` looks at them later. Those of the
    policy are problems of model.path.

    Args:
        policy, teacher: folders or hub ids of two models whose config.json can be read.
    """
    own, theirs = (find_model_folder(path) for path in (policy, teacher))
    is_hub_model = theirs != Path(teacher)
    if not has_tokenizer(own) or (is_hub_model and not has_tokenizer(theirs)):
        return
    try:
        found = [tokenizer_difference(own, theirs)]
    except ValueError:
        found = [*unreadable(theirs)]
    for text in found:
        if text is not None:
            yield Problem(f"teacher.path: {text}", only_here=True)


def reference_token_problems(policy: str, reference: str) -> Iterator[Problem]:
    """The problem of a reference whose token ids mean something else.

    It needs no tokenizer of its own, and may know fewer added tokens than the policy.

    Args:
        policy, reference: folders or hub ids of two models whose config.json can be read.
    """
    folders = [find_model_folder(path) for path in (policy, reference)]
    own, theirs = (read_model_shape(folder, may_bridge=True).vocab_size for folder in folders)
    if own != theirs:
        yield Problem(
            f"reference.path has a vocabulary of {theirs} tokens and model.path one of {own}: the "
            "reference model must have the same tokenizer"
        )
        return
    try:
        tokens, others = (token_ids(folder) for folder in folders)
    except ValueError:
        return  # a problem of model.path, or of a tokenizer that nothing reads
    differing = [token for token in tokens.keys() & others.keys() if tokens[token] != others[token]]
    if differing:
        first = min(differing, key=tokens.__getitem__)
        yield Problem(
            f"reference.path = {reference} has another tokenizer than model.path = {policy}: "
            f"{counted(len(differing), 'token')} of both differ ({first!r} is {others[first]} for "
            f"the reference and {tokens[first]} for the policy). Use a model with the policy's",
            only_here=True,
        )


def check_tokenizers(policy: Path, teacher: Path) -> None:
    """Refuse a teacher that does not know the policy's tokens.

    Args:
        policy, teacher: whole model folders.

    Raises:
        ValueError: what `tokenizer_difference` says.
    """
    if text := tokenizer_difference(policy, teacher):
        raise ValueError(f"teacher.path: {text}")


def tokenizer_difference(policy: Path, teacher: Path) -> str | None:
    """Why a teacher cannot judge the policy's tokens; None if it knows all by the same ids.

    Its chat template does not matter, so a base model may teach.

    Raises:
        ValueError: a file of a tokenizer cannot be read.
    """
    if not has_tokenizer(teacher):
        return (
            f"{teacher} holds no tokenizer, so nothing says whether its token ids are those of "
            f"model.path = {policy}: if they are, copy the tokenizer's files from there"
        )
    own, theirs = token_ids(policy), token_ids(teacher)
    differing = {
        token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)
    }
    if not differing:
        return _missing_embeddings(policy, teacher, own)
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


def _missing_embeddings(policy: Path, teacher: Path, tokens: dict[str, int]) -> str | None:
    """What the policy reads or samples, and the teacher has no embedding for."""
    own, theirs = (read_model_shape(f, may_bridge=True).vocab_size for f in (policy, teacher))
    used = min(own, max(tokens.values(), default=-1) + 1)
    if theirs >= used:
        return None
    return (
        f"{teacher} has embeddings for {theirs:,} tokens (vocab_size in config.json), and the "
        f"policy reads and samples {used:,}. {resize_remedy(used)}"
    )


def _ids_of(token: str, *tables: dict[str, int]) -> list[int]:
    return [table[token] for table in tables if token in table]


def _id_text(table: dict[str, int], token: str) -> str:
    return str(table[token]) if token in table else "missing"
