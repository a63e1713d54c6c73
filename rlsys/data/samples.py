"""From the datasets of a config to samples of supervised training."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from rlsys.config import SftConfig, SftDataConfig
from rlsys.config.prompt_template import template_columns
from rlsys.data.formats import PROMPT_COLUMNS, TEXT
from rlsys.data.load import Loaded, load
from rlsys.data.render_samples import SampleRenderer, Thinking
from rlsys.data.row import NO_TARGETS, OVER_LENGTH, Row
from rlsys.data.sources import Source
from rlsys.data.targets import LossOn, fill_names, parse_sample, parse_text
from rlsys.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Objective = Literal["sft", "pretrain"]


def long_rows(config: SftDataConfig, objective: Objective) -> str:
    """data.truncation_strategy, decided."""
    if config.truncation_strategy != "auto":
        return config.truncation_strategy
    return "split" if objective == "pretrain" else "delete"


@dataclass(frozen=True, slots=True)
class SampleRules:
    """What is trained on in each row."""

    objective: Objective = "sft"
    """pretrain reads a column `text`, and every token is a target."""
    loss_on: LossOn = "all"
    thinking: Thinking = "train"

    @classmethod
    def of(cls, config: SftConfig) -> SampleRules:
        """The rules of a run."""
        return cls(config.sft.objective, config.sft.loss_on, config.sft.thinking)


@dataclass(slots=True)
class SampleSource(Source[Sample]):
    """One dataset, whose rows become samples."""

    limits: ClassVar[str] = "data.max_length and sft.loss_on"

    config: SftDataConfig
    rules: SampleRules = SampleRules()
    filled: set[str] = field(default_factory=set)
    """The fields model_name and model_author, if a row had their placeholder."""

    @property
    def cuts_rows(self) -> bool:
        """Whether long texts are cut into several samples."""
        return self._long == "split"

    @property
    def readable_columns(self) -> tuple[str, ...]:
        """Columns of which a row needs one."""
        if self.rules.objective == "pretrain":
            return (TEXT, "messages")
        template = self.config.prompt_template
        return PROMPT_COLUMNS if template is None else tuple(template_columns(template))

    @property
    def _long(self) -> str:
        """What happens to rows over data.max_length."""
        return long_rows(self.config, self.rules.objective)

    def read(self, row: Row) -> None:
        """Read the conversation and its targets, or the text."""
        if self.rules.objective == "pretrain":
            parse_text(row)
        else:
            config, loss_on = self.config, self.rules.loss_on
            template = config.prompt_template
            parse_sample(row, system=config.system, loss_on=loss_on, template=template)
            if not row.targets:
                row.dropped = NO_TARGETS
        names = {"model_name": self.config.model_name, "model_author": self.config.model_author}
        self.filled |= fill_names(row, names)

    def limit(self, row: Row) -> None:
        """Drop or cut a rendered row that is too long; drop one without targets."""
        assert row.target_mask is not None
        length, most = len(row.token_ids), self.config.max_length
        if length > most and self._long == "error":
            row.problem = (
                f"has {length:,} tokens, more than data.max_length = {most:,}. Raise it, or set "
                "data.truncation_strategy to delete, left or right"
            )
        elif length > most and self._long == "delete":
            row.dropped = OVER_LENGTH
        elif length > most:
            row.uncut_length = length
        if row.uncut_length and self._long in ("left", "right"):
            kept = slice(-most, None) if self._long == "left" else slice(most)
            row.token_ids, row.target_mask = row.token_ids[kept], row.target_mask[kept]
            row.target_mask[:1] = False
        if row.is_usable and not row.target_mask.any():
            row.dropped = NO_TARGETS

    def make(self, row: Row, copy: int, names: list[str]) -> list[Sample]:
        """The sample of a row, or the pieces of a long text.

        A piece begins with the last token of the piece before it, so that each token is predicted
        once.
        """
        assert row.target_mask is not None
        token_ids = np.asarray(row.token_ids, dtype=np.int32)
        most, sample_id = self.config.max_length, self.row_id(row, copy)
        if len(token_ids) <= most:
            return [Sample(sample_id, token_ids, row.target_mask)]
        pieces: list[Sample] = []
        for start in range(0, len(token_ids) - 1, most - 1):
            mask = row.target_mask[start : start + most].copy()
            mask[0] = False
            piece_id = f"{sample_id}/{len(pieces)}"
            pieces.append(Sample(piece_id, token_ids[start : start + most], mask))
        return pieces

    def nothing_left(self, names: str, lengths: list[int]) -> str:
        """The limit of length, or rows without targets."""
        most, found = self.config.max_length, f"{min(lengths)} to {max(lengths)}"
        if min(lengths) > most:
            return (
                f"every row of {names} is over data.max_length = {most} tokens: the "
                f"{len(lengths)} rows have {found}. Raise it, or cut rows with "
                "data.truncation_strategy."
            )
        return (
            f"no sample of {names} is left: the rows have {found} tokens, data.max_length is "
            f"{most}, and each needs a token to train on (sft.loss_on is {self.rules.loss_on})."
        )


@dataclass(frozen=True, slots=True)
class SampleData(Loaded[Sample]):
    """The samples of a run."""

    noun: ClassVar[str] = "sample"


def load_samples(
    config: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    rules: SampleRules,
    *,
    seed: int,
    vocab_size: int | None = None,
) -> SampleData:
    """Read the datasets, render conversations with exact targets, filter, split.

    `sample_id` is made as `prompt_id` in `load_prompts`; the pieces of a text are "train:17/0" and
    so on.

    Args:
        config: the datasets and what to do with their rows.
        tokenizer: of the model, with its chat template.
        rules: what is trained on in each row.
        seed: of everything that is drawn.
        vocab_size: the number of the model's embeddings; None does not compare.

    Raises:
        ValueError: all problems, up to a number: of datasets, rows, chat template; no sample left.
    """
    renderer = SampleRenderer(
        tokenizer, config.chat_template_kwargs, thinking=rules.thinking, vocab_size=vocab_size
    )
    filled: set[str] = set()
    kind = partial(SampleSource, rules=rules, filled=filled)
    limit = config.max_eval_samples
    data = load(SampleData, kind, config, renderer, seed=seed, limit=limit)
    names = {"model_name": ("{{NAME}}", config.model_name)}
    names["model_author"] = ("{{AUTHOR}}", config.model_author)
    for name, (placeholder, value) in names.items():
        if value and name not in filled and not config.streaming:
            data.notices.append(f"data.{name} is set, and no row has {placeholder}")
    return data
