"""Rows to token ids: the one place where prompts are rendered; render_samples has samples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.data.formats import SYSTEM_COLUMNS
from rlsys.data.row import Row
from rlsys.data.turns import called_functions, read_turns
from rlsys.json_text import BadRow
from rlsys.model.chat_template import TEMPLATE_COLUMNS, ChatTemplate
from rlsys.model.raw_text import RawText
from rlsys.types import OPEN_THINK, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSING = re.compile(r"\b(?:None(?! of\b)|nan|NaT)\b|<NA>")
"""What Python prints for a missing value; "None of" is English."""
_UNREAD_VARIABLE = "the chat template does not read the variable {!r}"
NO_TEMPLATE = (
    "the model's tokenizer has no chat template, which a prompt of messages, or with a system "
    "message, takes. Use an instruct model, add a chat_template.jinja to the model's folder, or "
    "train on plain text: rows with a text in the column `prompt`, or data.prompt_template"
)
_OPENS_THINK = (
    "{} ends the prompt with <think>: completions begin inside that tag. format, "
    "accuracy and other rewards of rlsys count it as the completion's"
)


class Renderer:
    """Renders the rows of a run, and notes once each thing that the chat template leaves out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ):
        """Take the variables that the template gets with every row (data.chat_template_kwargs)."""
        self._noticed: dict[str, _Notice] = {}
        self._raw = RawText.of(tokenizer)
        self._template = None
        if tokenizer.chat_template is not None:
            self._template = ChatTemplate(tokenizer, variables)
            for name in self._template.unread(self._template.variables):
                self._notice(_UNREAD_VARIABLE.format(name), "data.chat_template_kwargs")

    @property
    def notices(self) -> list[str]:
        """Differences between the rendered rows and their prompts, each with the first row."""
        return [str(notice) for notice in self._noticed.values()]

    def render(self, rows: Sequence[Row]) -> None:
        """Set the token ids of each row, generation prompt included; or its problem.

        Raises:
            ValueError: the template is not valid Jinja, or is missing where a row needs it.
        """
        self._take_raw([row for row in rows if row.is_raw or self._template is None])
        if self._template is not None:
            self._render([row for row in rows if not row.is_raw], self._template)

    def _take_raw(self, rows: Sequence[Row]) -> None:
        """Set the token ids of rows whose prompt is their text."""
        texts = [self._plain_text(row) for row in rows]
        for row, token_ids in zip(rows, self._raw.tokens(texts), strict=True):
            row.token_ids = token_ids
            row.opens_think = row.text is not None and row.text.rstrip().endswith(OPEN_THINK)

    def _plain_text(self, row: Row) -> str:
        """The text of a row that is taken without a template."""
        if row.needs_template:
            raise ValueError(f"{row.location}: {NO_TEMPLATE}")
        assert row.text is not None
        for column in (*TEMPLATE_COLUMNS, *SYSTEM_COLUMNS):
            if row.columns.get(column):
                what = f"a prompt without a chat template leaves out the column {column!r}"
                self._notice(what, row.location)
        self._look_at_text(row, row.text, "the row or data.prompt_template")
        return row.text

    def _render(self, rows: Sequence[Row], template: ChatTemplate) -> None:
        texts: list[str] = []
        rendered: list[Row] = []
        for row in rows:
            try:
                texts.append(template.text(row.messages, row.tools, row.template_kwargs))
                self._look(row, texts[-1], template)
                rendered.append(row)
            except BadRow as error:
                row.problem = str(error)
        for row, token_ids in zip(rendered, template.tokens(texts), strict=True):
            row.token_ids = token_ids
            row.opens_think = template.opens_think(token_ids)

    # --- what is left out ---

    def _look(self, row: Row, text: str, template: ChatTemplate) -> None:
        """Note what the prompt lacks or adds, and missing values that it prints."""
        where = row.location
        for role in dict.fromkeys(_left_out(row.messages, text)):
            self._notice(
                f"the chat template leaves out or changes the text of a {role} turn", where
            )
        if any(map(called_functions, row.messages)) and not template.shows_calls:
            self._notice("the chat template leaves out the calls of tools", where)
        keys = {key: None for message in row.messages for key in _telling_keys(message)}
        for key in template.unread(keys):
            self._notice(f"the chat template does not read {key!r} of a message", where)
        for name in template.unread(row.template_kwargs):
            self._notice(_UNREAD_VARIABLE.format(name), where)
        if _are_tools_left_out(row, text, template):
            self._notice(
                "the chat template leaves out the tools: the prompt is the same without them", where
            )
        self._look_at_text(row, text, "the chat template")

    def _look_at_text(self, row: Row, text: str, writer: str) -> None:
        where = row.location
        if text.rstrip().endswith(OPEN_THINK):
            self._notice(_OPENS_THINK.format(writer), where)
        found = _MISSING.search(text)
        if found:
            around = text[max(0, found.start() - 40) : found.end() + 20]
            self._notice(
                f"a prompt has the word {found.group()}, as Python prints a missing value",
                f"{where}: {' '.join(around.split())!r}",
            )

    def _notice(self, text: str, first: str) -> None:
        self._noticed.setdefault(text, _Notice(text, first)).count += 1


@dataclass(slots=True)
class _Notice:
    text: str
    first: str
    """The place of the first such row."""
    count: int = 0

    def __str__(self) -> str:
        more = f" and {self.count - 1:,} more" if self.count > 1 else ""
        return f"{self.text} ({self.first}{more})"


def _are_tools_left_out(row: Row, text: str, template: ChatTemplate) -> bool:
    """Whether the prompt is the same without tools. It is not if it has the name of each."""
    if all(f'"{tool["function"]["name"]}"' in text for tool in row.tools or ()):
        return False
    try:
        is_answered = bool(row.targets)
        bare = template.text(row.messages, None, row.template_kwargs, is_answered=is_answered)
        return bare == text
    except BadRow:
        return False


def _telling_keys(message: Message) -> list[str]:
    """Keys that change what a turn says; a tool's answer follows its call, so its id does not."""
    others = {"role", "content", "tool_calls"}
    if message["role"] == "tool":
        others |= {"tool_call_id", "name"}
    return [key for key in message if key not in others]


def _left_out(messages: list[Message], text: str) -> Iterator[str]:
    """Roles of turns whose text the prompt lacks; templates drop the assistant's thoughts."""
    for message in messages:
        words = message["content"].strip()
        if message["role"] == "assistant" or words in text:
            continue
        if json.dumps(words, ensure_ascii=False)[1:-1] not in text:
            yield message["role"]


def render_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the rendered chat template, generation prompt included.

    `template_kwargs` are variables of the template, as in data.chat_template_kwargs.

    Raises:
        ValueError: the messages are malformed, or the template refuses them.
    """
    template = ChatTemplate(tokenizer, template_kwargs)
    return template.tokens([template.text(read_turns(messages))])[0]
