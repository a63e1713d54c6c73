"""The tokens of a completion that a run recorded with `tracking.completion_tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlsys.run.folder import RunDir
from rlsys.tracking.tokens import tokens_path


@dataclass(frozen=True, slots=True)
class CompletionTokens:
    """The T tokens of one completion."""

    ids: list[int]
    """[T]"""
    text: list[str] | None
    """[T] each token alone; half a character is U+FFFD. None without the model's tokenizer."""
    rollout_logprobs: list[float]
    """[T] nats, under the distribution that it was sampled from."""
    logprobs: list[float] | None
    """[T] nats, the policy's own before the update; None where the run did not compute them."""
    advantages: list[float]
    """[T] as the loss used them."""


def read_tokens(
    run: RunDir, config: dict[str, Any], step: int, group_id: int, index: int
) -> CompletionTokens | None:
    """The tokens of one training completion; None if they were not recorded.

    Args:
        run: the folder.
        config: of the run, for its model's tokenizer.
        step: of the completion.
        group_id: its group in the step.
        index: its place in the group.
    """
    from pyarrow import ArrowException, parquet

    path = tokens_path(run, step)
    try:
        chosen = [("group_id", "=", group_id), ("index", "=", index)]
        rows = parquet.read_table(path, filters=chosen).to_pylist()
    except (OSError, ArrowException):
        return None
    if not rows:
        return None
    row = rows[0]
    model = config.get("model")
    own = model.get("path") if isinstance(model, dict) else None
    folders = [Path(own)] if isinstance(own, str) else []
    return CompletionTokens(
        ids=row["token_ids"],
        text=_texts(row["token_ids"], (*folders, run.final)),
        rollout_logprobs=row["rollout_logprobs"],
        logprobs=row.get("logprobs"),
        advantages=row["advantages"],
    )


def _texts(ids: list[int], folders: tuple[Path, ...]) -> list[str] | None:
    for folder in folders:
        tokenizer = _tokenizer(folder / "tokenizer.json")
        if tokenizer is not None:
            return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return None


@cache
def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else None
    except Exception:  # the library raises nothing more precise
        return None
