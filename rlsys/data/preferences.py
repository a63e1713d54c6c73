"""From the datasets of a config to the answers that preference training compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rlsys.config import PreferenceDataConfig
from rlsys.data.formats import PROMPT_COLUMNS
from rlsys.data.load import Loaded, load
from rlsys.data.preference_rows import (
    CHOSEN,
    REJECTED_ANSWERS,
    lacks_label,
    lacks_pair,
    parse_labelled,
    parse_pair,
)
from rlsys.data.render_samples import SampleRenderer
from rlsys.data.row import NO_TARGETS, OVER_LENGTH, Row
from rlsys.data.sources import Source
from rlsys.problems import Problem
from rlsys.types import Preference, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceRenderer(SampleRenderer):
    """Renders the rows of preference training: each answer behind its prompt."""

    def render(self, rows: Sequence[Row]) -> None:
        """Set token ids and target mask of each row and its rejected one, or the row's problem.

        Raises:
            ValueError: as SampleRenderer.render.
        """
        others = [row.rejected for row in rows if row.rejected is not None]
        super().render([*rows, *others])
        for row in rows:
            if row.rejected is not None and row.rejected.problem and not row.problem:
                row.problem = f"the rejected answer: {row.rejected.problem}"


@dataclass(slots=True)
class PreferenceSource(Source[Preference]):
    """One dataset, whose rows become pairs of answers, or single answers with a label."""

    limits: ClassVar[str] = "data.max_length"

    config: PreferenceDataConfig
    is_paired: bool = True

    @property
    def readable_columns(self) -> tuple[str, ...]:
        """Columns of which a row needs one."""
        return (CHOSEN, *REJECTED_ANSWERS) if self.is_paired else PROMPT_COLUMNS

    def columns_problem(self) -> Problem | None:
        """What the columns lack in every row; None if the preprocessor may add it."""
        if self.preprocessor is not None or not self.columns:
            return None
        names = self.config.columns
        found = [names.get(name, name) for name in self.columns]
        problem = lacks_pair(found) if self.is_paired else lacks_label(found)
        return None if problem is None else Problem(f"dataset {self.spec.text!r} {problem}")

    def read(self, row: Row) -> None:
        """Read the conversations of a row."""
        parse = parse_pair if self.is_paired else parse_labelled
        parse(row, system=self.config.system)

    def limit(self, row: Row) -> None:
        """Drop a rendered row with an answer that is too long, or without a token to train on."""
        answers = [row] if row.rejected is None else [row, row.rejected]
        length, most = max(len(answer.token_ids) for answer in answers), self.config.max_length
        if length > most and self.config.truncation_strategy == "error":
            row.problem = (
                f"has an answer of {length:,} tokens with its prompt, more than data.max_length = "
                f"{most:,}. Raise it, or set data.truncation_strategy to delete"
            )
        elif length > most:
            row.dropped = OVER_LENGTH
        elif not all(_targets(answer).any() for answer in answers):
            row.dropped = NO_TARGETS
        elif row.rejected is not None and row.token_ids == row.rejected.token_ids:
            row.problem = (
                "the chosen and the rejected answer become the same tokens, so there is nothing "
                "to prefer. Leave the row out"
            )

    def make(self, row: Row, copy: int, names: list[str]) -> list[Preference]:
        """The answers of a row."""
        row_id = self.row_id(row, copy)
        if row.rejected is None:
            assert row.label is not None
            return [Preference(row_id, (_sample(row, row_id),), (row.label,))]
        chosen = _sample(row, f"{row_id}/chosen")
        rejected = _sample(row.rejected, f"{row_id}/rejected")
        return [Preference(row_id, (chosen, rejected), (True, False))]

    def nothing_left(self, names: str, lengths: list[int]) -> str:
        """The limit of length, or rows without targets."""
        most, which = self.config.max_length, "chosen answers" if self.is_paired else "answers"
        return (
            f"no row of {names} is left: with their prompts the {which} have {min(lengths)} to "
            f"{max(lengths)} tokens, and a row is dropped with an answer over data.max_length = "
            f"{most} tokens, or without a token to train on. Raise it"
        )


def _targets(row: Row) -> np.ndarray:
    assert row.target_mask is not None
    return row.target_mask


def _sample(row: Row, sample_id: str) -> Sample:
    return Sample(sample_id, np.asarray(row.token_ids, dtype=np.int32), _targets(row))


@dataclass(frozen=True, slots=True)
class PreferenceData(Loaded[Preference]):
    """The answers of a run."""

    noun: ClassVar[str] = "row"


def load_preferences(
    config: PreferenceDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_paired: bool,
    seed: int,
    vocab_size: int | None = None,
) -> PreferenceData:
    """Read the datasets, render each answer behind its prompt with exact targets, filter, split.

    `row_id` is made as `prompt_id` in `load_prompts`.

    Args:
        config: the datasets and what to do with their rows.
        tokenizer: of the model, with its chat template.
        is_paired: whether rows have two answers, or one with a label.
        seed: of everything that is drawn.
        vocab_size: the number of the model's embeddings; None does not compare.

    Raises:
        ValueError: all problems, up to a number: of datasets, rows, chat template; no row left.
    """
    renderer = PreferenceRenderer(tokenizer, config.chat_template_kwargs, vocab_size=vocab_size)
    kind = partial(PreferenceSource, is_paired=is_paired)
    limit = config.max_eval_samples
    return load(PreferenceData, kind, config, renderer, seed=seed, limit=limit)
