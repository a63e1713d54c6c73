"""Conversations and texts to token ids with their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlsys.data.render import Renderer
from rlsys.data.row import Row
from rlsys.data.target_mask import target_mask, without_thinking
from rlsys.json_text import BadRow
from rlsys.model.answer_spans import THINKING_KEYS, AnswerSpans, Span
from rlsys.model.chat_template import TEMPLATE_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

Thinking = Literal["train", "ignore", "ignore_empty"]
"""Whether the thinking before an answer is trained on, left out, or left out where it is empty."""


class SampleRenderer(Renderer):
    """Renders the rows of supervised training, and notes what the chat template leaves out."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any] | None = None,
        *,
        thinking: Thinking = "train",
        vocab_size: int | None = None,
    ):
        """Take the variables of the template, and the number of the model's embeddings.

        Raises:
            ValueError: the tokenizer does not say which characters a token has, or lacks EOS.
        """
        super().__init__(tokenizer, variables)
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} is a slow one, which does not say "
                "which characters a token has. Save it with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._vocab_size = vocab_size
        self._spans = None
        if self._template is not None:
            self._spans = AnswerSpans(self._template, list(tokenizer.get_added_vocab()))

    def render(self, rows: Sequence[Row]) -> None:
        """Set token ids and target mask of each row, or its problem.

        Raises:
            ValueError: the template is not valid Jinja, or is missing where a row needs it.
        """
        texts: list[str] = []
        spans: list[list[Span]] = []
        rendered: list[Row] = []
        for row in rows:
            is_plain = row.is_raw or self._template is None
            try:
                text, found = self._plain(row) if is_plain else self._conversation(row)
            except BadRow as error:
                row.problem = str(error)
                continue
            for name in row.columns:
                if name not in TEMPLATE_COLUMNS:
                    self._notice(f"the column {name!r} is not read", row.location)
            if self._thinking != "train":
                only_empty = self._thinking == "ignore_empty"
                found = [without_thinking(text, span, only_empty=only_empty) for span in found]
            texts.append(text)
            spans.append(found)
            rendered.append(row)
        self._set_tokens(rendered, texts, spans)

    def _plain(self, row: Row) -> tuple[str, list[Span]]:
        """The text of a row without a template, with EOS, and the span of its targets."""
        before, eos = "".join(self._tokens_of(self._raw.before)), self._eos()
        text = self._plain_text(row)
        text = text if text.startswith(before) else before + text
        whole = text if row.completion is None else text + row.completion
        if not whole.endswith(eos):
            whole += eos
        return whole, [(0 if row.completion is None else len(text), len(whole))]

    def _conversation(self, row: Row) -> tuple[str, list[Span]]:
        """The rendered conversation, and the spans of its targets."""
        assert self._spans is not None
        assert self._template is not None
        text, spans = self._spans.find(row.messages, row.targets, row.tools, row.template_kwargs)
        self._look(row, text, self._template)
        for turn, (start, end) in zip(row.targets, spans, strict=True):
            self._look_at_thinking(row, turn, text[start:end])
        if row.messages[-1]["role"] != "assistant":
            role = row.messages[-1]["role"]
            self._notice(
                f"a conversation ends with a turn of {role!r}, not trained on", row.location
            )
        return text, spans

    def _set_tokens(self, rows: list[Row], texts: list[str], spans: list[list[Span]]) -> None:
        if not rows:
            return
        options = {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": True}
        encoded = self._tokenizer(texts, **options)
        for index, row in enumerate(rows):
            row.token_ids = encoded["input_ids"][index]
            offsets = encoded["offset_mapping"][index]
            try:
                row.target_mask = target_mask(
                    self._tokenizer, texts[index], row.token_ids, offsets, spans[index]
                )
                self._check_vocabulary(row)
            except BadRow as error:
                row.problem = str(error)
                continue
            row.target_mask[:1] = False  # nothing predicts the first token

    def _check_vocabulary(self, row: Row) -> None:
        size = self._vocab_size
        if size is None or len(self._tokenizer) <= size or not row.token_ids:
            return
        largest = max(row.token_ids)
        if largest >= size:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise BadRow(
                f"has the token {token!r} of id {largest}, and the model has embeddings for "
                f"{size:,} tokens (vocab_size in its config.json). Resize the model's embeddings, "
                "or use the tokenizer that belongs to the model"
            )

    def _eos(self) -> str:
        eos = self._tokenizer.eos_token
        if not isinstance(eos, str):
            raise ValueError(
                f"the tokenizer of {self._tokenizer.name_or_path!r} has no EOS token, which ends "
                "plain texts: set eos_token in its tokenizer_config.json"
            )
        return eos

    def _tokens_of(self, token_ids: list[int]) -> list[str]:
        tokens: Any = self._tokenizer.convert_ids_to_tokens(token_ids)
        return tokens

    def _look_at_thinking(self, row: Row, turn: int, text: str) -> None:
        """Note thinking that the template leaves out of an answer that is trained on."""
        message = row.messages[turn]
        thoughts = [message[key] for key in THINKING_KEYS if message.get(key)]
        if "</think>" in message["content"]:
            thoughts.append(message["content"].partition("</think>")[0].rpartition("<think>")[2])
        if any(thought.strip() and thought.strip() not in text for thought in thoughts):
            what = "the chat template leaves out the thinking of a turn that is trained on"
            self._notice(f"{what}: the model learns the answer without it", row.location)
