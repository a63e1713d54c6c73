"""From the datasets of a config to texts with what their scores are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rlsys.config import ScoreDataConfig
from rlsys.config.prompt_template import template_columns
from rlsys.data.formats import PROMPT_COLUMNS, TEXT
from rlsys.data.load import Loaded, load
from rlsys.data.preference_rows import CHOSEN, REJECTED_ANSWERS, lacks_pair
from rlsys.data.render_samples import SampleRenderer
from rlsys.data.row import OVER_LENGTH, Row
from rlsys.data.scored_rows import (
    PAIRS,
    ScoreRules,
    lacks_label,
    parse_labelled_text,
    parse_pair_with_margin,
)
from rlsys.data.sources import Source
from rlsys.json_text import BadRow
from rlsys.model.chat_template import TEMPLATE_COLUMNS
from rlsys.problems import Problem
from rlsys.types import ScoredRow

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from transformers import PreTrainedTokenizerBase

SAME = "whose answers are the same once cut"
EMPTY = "with fewer than two tokens that are not padding once cut"


class ScoreRenderer(SampleRenderer):
    """Renders conversations as a reward model of GRPO does, and texts as the tokenizer does.

    The score of a text stands at its last token that does not pad rows (`pad_token_id`): what is
    behind it is left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any] | None = None,
        *,
        pad_token_id: int | None,
        vocab_size: int | None = None,
    ):
        """Take the variables of the template, the pad token, and the number of embeddings."""
        super().__init__(tokenizer, variables, vocab_size=vocab_size)
        self._pad = pad_token_id

    def render(self, rows: Sequence[Row]) -> None:
        """Set token ids of each row and its rejected one, or the row's problem.

        Raises:
            ValueError: the template is not valid Jinja, or is missing where a row needs it.
        """
        for row in rows:
            for name in row.columns:
                if name not in TEMPLATE_COLUMNS:
                    self._notice(f"the column {name!r} is not read", row.location)
        texts: list[str] = []
        rendered: list[Row] = []
        for row in rows:
            for one in answers(row):
                try:
                    texts.append(self._text(one, is_pair=row.rejected is not None))
                except BadRow as error:
                    row.problem = str(error)
                else:
                    rendered.append(one)
        options = {"add_special_tokens": False, "verbose": False}
        encoded = self._tokenizer(texts, **options)["input_ids"] if texts else []
        for one, token_ids in zip(rendered, encoded, strict=True):
            one.token_ids = self._without_padding(one, token_ids)
        for row in rows:
            if row.is_usable:
                self._check(row)

    def _text(self, row: Row, *, is_pair: bool) -> str:
        """The text of a conversation or a plain text, with the special tokens around it."""
        if not row.is_raw and self._template is not None:
            text = self._template.text(
                row.messages, row.tools, row.template_kwargs, is_answered=True
            )
            self._look(row, text, self._template)
            return text
        before = "".join(self._tokens_of(self._raw.before))
        after = "".join(self._tokens_of(self._raw.after))
        text = self._plain_text(row) + (row.completion or "")
        text = text if text.startswith(before) else before + text
        # TRL ends plain texts of pairs with EOS; other texts are as the tokenizer has them.
        end = self._eos() if is_pair else after
        return text if text.endswith(end) else text + end

    def _without_padding(self, row: Row, token_ids: list[int]) -> list[int]:
        kept = without_padding(token_ids, self._pad)
        if len(kept) < len(token_ids):
            token: Any = self._tokenizer.convert_ids_to_tokens(token_ids[-1])
            self._notice(
                f"texts end with {token!r}, which also pads rows, so classifiers of transformers "
                "take the score at the token before it, and so does the run",
                row.location,
            )
        return kept

    def _check(self, row: Row) -> None:
        """Give a row a problem whose texts have no score, or no difference."""
        try:
            for one in answers(row):
                self._check_vocabulary(one)
        except BadRow as error:
            row.problem = str(error)
            return
        if any(len(one.token_ids) < 2 for one in answers(row)):
            row.problem = "has a text of fewer than two tokens: leave the row out"
        elif row.rejected is not None and row.token_ids == row.rejected.token_ids:
            row.problem = (
                "the chosen and the rejected answer become the same tokens, so there is nothing "
                "to prefer. Leave the row out"
            )


@dataclass(slots=True)
class ScoreSource(Source[ScoredRow]):
    """One dataset, whose rows become pairs of texts, or texts with labels."""

    limits: ClassVar[str] = "data.max_length"

    config: ScoreDataConfig
    rules: ScoreRules = PAIRS
    pad_token_id: int | None = None

    @property
    def readable_columns(self) -> tuple[str, ...]:
        """Columns of which a row needs one."""
        if self.rules.has_pairs:
            return (CHOSEN, *REJECTED_ANSWERS)
        template = self.config.prompt_template
        return (TEXT, *PROMPT_COLUMNS) if template is None else tuple(template_columns(template))

    def columns_problem(self) -> Problem | None:
        """What the columns lack in every row; None if the preprocessor may add it."""
        if self.preprocessor is not None or not self.columns:
            return None
        names = self.config.columns
        found = [names.get(name, name) for name in self.columns]
        template = self.config.prompt_template
        text = lacks_pair(found) if self.rules.has_pairs else lacks_label(found, template)
        return None if text is None else Problem(f"dataset {self.spec.text!r} {text}")

    def read(self, row: Row) -> None:
        """Read the conversations or texts of a row, and its label or margin."""
        config = self.config
        if self.rules.has_pairs:
            parse_pair_with_margin(row, system=config.system)
        else:
            template = config.prompt_template
            parse_labelled_text(row, self.rules, system=config.system, template=template)

    def limit(self, row: Row) -> None:
        """Drop or cut a rendered row with a text that is too long."""
        lengths, most = [len(one.token_ids) for one in answers(row)], self.config.max_length
        if max(lengths) <= most:
            return
        strategy = self.config.truncation_strategy
        if strategy == "error":
            row.problem = (
                f"has {max(lengths):,} tokens, more than data.max_length = {most:,}. Raise it, or "
                "set data.truncation_strategy to delete, left or right"
            )
            return
        row.uncut_length = max(lengths)
        if strategy == "delete":
            row.dropped = OVER_LENGTH
            return
        kept = slice(-most, None) if strategy == "left" else slice(most)
        for one in answers(row):
            one.token_ids = without_padding(one.token_ids[kept], self.pad_token_id)
        if any(len(one.token_ids) < 2 for one in answers(row)):
            row.dropped = EMPTY
        elif row.rejected is not None and row.token_ids == row.rejected.token_ids:
            row.dropped = SAME

    def make(self, row: Row, copy: int, names: list[str]) -> list[ScoredRow]:
        """The texts of a row."""
        texts = tuple(np.asarray(one.token_ids, dtype=np.int32) for one in answers(row))
        return [ScoredRow(self.row_id(row, copy), texts, row.labels)]

    def nothing_left(self, names: str, lengths: list[int]) -> str:
        """The limit of length."""
        return (
            f"no row of {names} is left: they have {min(lengths)} to {max(lengths)} tokens, and "
            f"data.max_length is {self.config.max_length}. Raise it, or cut rows with "
            "data.truncation_strategy."
        )


def answers(row: Row) -> Iterator[Row]:
    """The row with the chosen conversation, or the only one, and the rejected one."""
    yield row
    if row.rejected is not None:
        yield row.rejected


def without_padding(token_ids: list[int], pad_token_id: int | None) -> list[int]:
    """The tokens up to the one that has the score: the last one that does not pad rows."""
    size = len(token_ids)
    while size and token_ids[size - 1] == pad_token_id:
        size -= 1
    return token_ids[:size]


@dataclass(frozen=True, slots=True)
class ScoreData(Loaded[ScoredRow]):
    """The rows of a run."""

    noun: ClassVar[str] = "row"


def load_scored(
    config: ScoreDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    rules: ScoreRules,
    *,
    seed: int,
    pad_token_id: int | None,
    vocab_size: int | None = None,
) -> ScoreData:
    """Read the datasets, render texts, filter, split. `row_id` is as `prompt_id`.

    Args:
        config: the datasets and what to do with their rows.
        tokenizer: of the model, with its chat template.
        rules: what is learned of each row.
        seed: of everything that is drawn.
        pad_token_id: what pads rows of the saved model.
        vocab_size: the number of the model's embeddings; None does not compare.

    Raises:
        ValueError: all problems, up to a number: of datasets, rows, chat template; no row left.
    """
    renderer = ScoreRenderer(
        tokenizer, config.chat_template_kwargs, pad_token_id=pad_token_id, vocab_size=vocab_size
    )
    kind = partial(ScoreSource, rules=rules, pad_token_id=pad_token_id)
    limit = config.max_eval_samples
    return load(ScoreData, kind, config, renderer, seed=seed, limit=limit)
