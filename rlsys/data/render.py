"""Rows to token ids: the one place where prompts are rendered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.data.row import Row
from rlsys.data.turns import called_functions, read_turns
from rlsys.json_text import BadRow
from rlsys.model.chat_template import ChatTemplate
from rlsys.types import OPEN_THINK, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSING = re.compile(r"\b(?:None(?! of\b)|nan|NaT)\b|<NA>")
"""What Python prints for a missing value; "None of" is English."""
_UNREAD_VARIABLE = "the chat template does not read the variable {!r}"
_OPENS_THINK = (
    "the chat template ends the prompt with <think>: completions begin inside that tag. format, "
    "accuracy and other rewards of rlsys count it as the completion's"
)


class Renderer:
    """Renders the rows of a run, and notes once each thing that the chat template leaves out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ):
        """Take the variables that the template gets with every row (data.chat_template_kwargs).

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        self._template = ChatTemplate(tokenizer, variables)
        self._noticed: dict[str, _Notice] = {}
        for name in self._template.unread(self._template.variables):
            self._notice(_UNREAD_VARIABLE.format(name), "data.chat_template_kwargs")

    @property
    def notices(self) -> list[str]:
        """Differences between the rendered rows and their prompts, each with the first row."""
        return [str(notice) for notice in self._noticed.values()]

    def render(self, rows: Sequence[Row]) -> None:
        """Set the token ids of each row, generation prompt included; or its problem.

        Raises:
            ValueError: the template is not valid Jinja.
        """
        texts: list[str] = []
        rendered: list[Row] = []
        for row in rows:
            try:
                texts.append(self._text(row, row.tools))
                self._look(row, texts[-1])
                rendered.append(row)
            except BadRow as error:
                row.problem = str(error)
        for row, token_ids in zip(rendered, self._template.tokens(texts), strict=True):
            row.token_ids = token_ids
            row.opens_think = self._template.opens_think(token_ids)

    def _text(self, row: Row, tools: list[dict[str, Any]] | None) -> str:
        return self._template.text(row.messages, tools, row.template_kwargs)

    # --- what is left out ---

    def _look(self, row: Row, text: str) -> None:
        """Note what the prompt lacks or adds, and missing values that it prints."""
        where = row.location
        if text.rstrip().endswith(OPEN_THINK):
            self._notice(_OPENS_THINK, where)
        for role in dict.fromkeys(_left_out(row.messages, text)):
            self._notice(
                f"the chat template leaves out or changes the text of a {role} turn", where
            )
        if any(map(called_functions, row.messages)) and not self._template.shows_calls:
            self._notice("the chat template leaves out the calls of tools", where)
        keys = {key: None for message in row.messages for key in _telling_keys(message)}
        for key in self._template.unread(keys):
            self._notice(f"the chat template does not read {key!r} of a message", where)
        for name in self._template.unread(row.template_kwargs):
            self._notice(_UNREAD_VARIABLE.format(name), where)
        if self._are_tools_left_out(row, text):
            self._notice(
                "the chat template leaves out the tools: the prompt is the same without them", where
            )
        found = _MISSING.search(text)
        if found:
            around = text[max(0, found.start() - 40) : found.end() + 20]
            self._notice(
                f"a prompt has the word {found.group()}, as Python prints a missing value",
                f"{where}: {' '.join(around.split())!r}",
            )

    def _are_tools_left_out(self, row: Row, text: str) -> bool:
        """Whether the prompt is the same without tools. It is not if it has the name of each."""
        if all(f'"{tool["function"]["name"]}"' in text for tool in row.tools or ()):
            return False
        try:
            return self._text(row, None) == text
        except BadRow:
            return False

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
