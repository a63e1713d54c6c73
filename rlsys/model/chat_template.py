"""A model's chat template: messages and tools -> text -> token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from rlsys.json_text import BadRow, parse_cell, parsed_or_same
from rlsys.types import OPEN_THINK, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of a row for the chat template, as in TRL and ms-swift; rewards get them too."""
_TAIL = 10
"""Last tokens of a prompt that are enough to show `<think>` and white space behind it."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Message] = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call00001",  # Mistral's templates ask for nine signs
                "type": "function",
                "function": {"name": "get", "arguments": {"key": "rlsys_value"}},
            }
        ],
    },
    {"role": "tool", "name": "get", "tool_call_id": "call00001", "content": "1"},
]
"""A conversation that calls a tool."""


class ChatTemplate:
    """The chat template of a tokenizer, with what templates differ in."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ):
        """Take the variables that the template always gets (data.chat_template_kwargs).

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so messages "
                "cannot be rendered. Take an instruct model, or save a chat_template with the "
                "tokenizer."
            )
        self._tokenizer = tokenizer
        self.variables = dict(variables or {})
        self._tails: dict[tuple[int, ...], bool] = {}

    def text(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        is_answered: bool = False,
    ) -> str:
        """The text of a prompt, or of a conversation that ends with an answer.

        Args:
            messages: with arguments of calls as objects where possible.
            tools: schemas of functions in OpenAI's form.
            variables: of the template; they override the constructor's.
            is_answered: whether to leave out the generation prompt.

        Raises:
            BadRow: the template refuses the messages.
            ValueError: the template is not valid Jinja.
        """
        given = self.variables | dict(variables or {})
        return self._write(self._in_form(messages), given, tools, is_answered=is_answered)

    def marked_spans(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[tuple[int, int]]:
        """First and last + 1 character of each `{% generation %}` block of a conversation.

        The characters are those of `text`, which raises what this would raise.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[self._with_known_roles(self._in_form(messages))],
            tools=tools,
            chat_template=self._tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
            **(self.variables | dict(variables or {})),
        )
        return list(spans[0])

    def has_marks(self, tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether the template marks what the assistant writes with `{% generation %}` blocks."""
        return _MARK.search(self._tokenizer.get_chat_template(tools=tools)) is not None

    def _in_form(self, messages: list[Message]) -> list[Message]:
        if any("tool_calls" in message for message in messages):
            return [self._calling[0].apply(message) for message in messages]
        return messages

    def _write(
        self,
        messages: list[Message],
        given: dict[str, Any],
        tools: list[dict[str, Any]] | None,
        *,
        is_answered: bool = False,
    ) -> str:
        if tools is not None:
            given = given | {"tools": tools}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    self._with_known_roles(messages),
                    **given,
                    add_generation_prompt=not is_answered,
                    tokenize=False,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} is not valid Jinja: "
                f"{error.message} in its line {error.lineno}"
            ) from error
        # A template is a program of the model's authors, and raises whatever Python does.
        except Exception as error:
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            words = " ".join(str(error).split())
            raise BadRow(f"the chat template refuses it: {kind}{words}") from error

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """The token ids of texts that the template wrote.

        Templates write BOS themselves, and the tokenizer would add another. It is not verbose, or
        it would warn of prompts over the model's length, which the limits of the config drop.
        """
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {}
        return encoded.get("input_ids", [])

    def answered_tokens(self, messages: list[Message], tools: Any) -> list[int]:
        """Token ids of a conversation that ends with an answer; `tools` is the column of a row.

        Raises:
            BadRow: as `text` and `read_tools`.
        """
        return self.tokens([self.text(messages, read_tools(tools), is_answered=True)])[0]

    def opens_think(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends with `<think>`, which the templates of several models write."""
        tail = tuple(token_ids[-_TAIL:])
        if tail not in self._tails:
            text: Any = self._tokenizer.decode(list(tail), skip_special_tokens=False)
            self._tails[tail] = text.rstrip().endswith(OPEN_THINK)
        return self._tails[tail]

    def unread(self, names: Iterable[str]) -> list[str]:
        """The `names` that do not occur in the template."""
        return [n for n in names if not re.search(rf"\b{re.escape(n)}\b", self._source)]

    @property
    def shows_calls(self) -> bool:
        """Whether prompts show the calls of tools."""
        return self._calling[1]

    @cached_property
    def _source(self) -> str:
        template: Any = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def _with_known_roles(self, messages: list[Message]) -> list[Message]:
        """Make developer messages system messages in templates that do not know them."""
        if not any(message["role"] == "developer" for message in messages):
            return messages
        if re.search(r"""["']developer["']""", self._source):
            return messages
        known: list[Message] = []
        for message in messages:
            if message["role"] != "developer":
                known.append(message)
            elif known and known[-1]["role"] == "system":
                both = f"{known[-1]['content']}\n\n{message['content']}"
                known[-1] = known[-1] | {"content": both}
            else:
                known.append(message | {"role": "system"})
        return known

    @cached_property
    def _calling(self) -> tuple[_CallForm, bool]:
        """The first form of calls that the template shows, and whether it shows any."""
        forms = [_CallForm(as_text, empty) for empty in ("", None) for as_text in (False, True)]
        schema = {"name": "other", "description": "", "parameters": {"type": "object"}}
        for form in forms:
            turns = [form.apply(message) for message in _PROBE]
            try:
                tools = [{"type": "function", "function": schema}]
                text = self._write(turns, self.variables, tools)
            except BadRow:
                continue
            # Not as Python prints an object, where JSON is meant.
            if "rlsys_value" in text and "'key': 'rlsys_value'" not in text:
                return form, True
        return forms[0], False


@dataclass(frozen=True, slots=True)
class _CallForm:
    """A form of turns that call tools: templates want arguments as an object or as its JSON text,
    and "" or None as the content of a turn without text."""

    arguments_as_text: bool
    empty: str | None

    def apply(self, message: Message) -> Message:
        """The message in this form."""
        if "tool_calls" not in message:
            return message
        calls = message["tool_calls"]
        if self.arguments_as_text:
            calls = [call | {"function": _with_text(call["function"])} for call in calls]
        return message | {"content": message["content"] or self.empty, "tool_calls": calls}


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        return function
    return function | {"arguments": json.dumps(arguments, ensure_ascii=False)}


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """The schemas of functions in a column `tools`, in OpenAI's form; None for an empty column.

    The column may be a list, one schema, or JSON text of them. Functions without OpenAI's wrapper,
    as LLaMA-Factory has them, get it.

    Raises:
        BadRow: the column is something else.
    """
    given = parse_cell(given, "tools")
    if not given:
        return None
    tools = [given] if isinstance(given, dict) else given
    if not isinstance(tools, list):
        raise BadRow(_not_tools(given))
    return [_tool(tool) for tool in tools]


def _tool(given: Any) -> dict[str, Any]:
    tool = parsed_or_same(given)
    function = tool.get("function") if isinstance(tool, dict) else None
    if isinstance(tool, dict) and not isinstance(function, dict):
        function = {key: value for key, value in tool.items() if key != "type"}
        tool = {"type": "function", "function": function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(_not_tools(given))
    return tool


def _not_tools(given: Any) -> str:
    return (
        "the column 'tools' should hold schemas of functions, [{'type': 'function', 'function': "
        f"{{'name': ...}}}}] or JSON text, and has {given!r:.80}. If it is for rewards only, "
        "rename it with data.columns: {tools: dataset_tools}"
    )
