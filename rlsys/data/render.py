"""Rows to token ids: the one place where the chat template is applied."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from rlsys.data.json_text import BadRow
from rlsys.data.row import Row
from rlsys.data.turns import called_functions, read_tools, read_turns
from rlsys.types import OPEN_THINK, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISSING = re.compile(r"\b(?:None(?! of\b)|nan|NaT)\b|<NA>")
"""What Python prints for a missing value; "None of" is English."""
_TAIL = 10
"""Last tokens of a prompt that are enough to show `<think>` and white space behind it."""
_UNREAD_VARIABLE = "the chat template does not read the variable {!r}"
_OPENS_THINK = (
    "the chat template ends the prompt with <think>: completions begin inside that tag. format, "
    "accuracy and other rewards of rlsys count it as the completion's"
)
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
    """The chat template of a run.

    `notices` names what the template leaves out of rows, each thing once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ):
        """Take the variables that the template gets with every row (data.chat_template_kwargs).

        Raises:
            ValueError: the tokenizer has no chat template, or one that is not valid Jinja.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so messages "
                "cannot be rendered. Take an instruct model, or save a chat_template with the "
                "tokenizer."
            )
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        self._noticed: dict[str, _Notice] = {}
        self._tails: dict[tuple[int, ...], bool] = {}
        for name in self._unread(self._variables):
            self._notice(_UNREAD_VARIABLE.format(name), "data.chat_template_kwargs")

    @property
    def notices(self) -> list[str]:
        """What the rendered rows have and their prompts lack, or the other way round."""
        return [str(notice) for notice in self._noticed.values()]

    def render(self, rows: Sequence[Row]) -> None:
        """Set the token ids of each row, generation prompt included; or its problem."""
        texts: list[str] = []
        rendered: list[Row] = []
        for row in rows:
            try:
                texts.append(self._text(row))
                self._look(row, texts[-1])
                rendered.append(row)
            except BadRow as error:
                row.problem = str(error)
        for row, token_ids in zip(rendered, self._tokens(texts), strict=True):
            row.token_ids = token_ids
            row.opens_think = self._opens_think(token_ids)

    def render_answered(self, messages: list[Message], tools: Any) -> list[int]:
        """Token ids of a conversation that ends with an answer, for a reward model.

        Args:
            messages: as `read_turns` returns them.
            tools: the column of that name, None without one.

        Raises:
            BadRow: the template refuses the messages.
        """
        row = Row(1, "", messages=messages, tools=read_tools(tools))
        return self._tokens([self._text(row, is_answered=True)])[0]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # The only place that tokenises prompts: templates write BOS themselves, and the tokenizer
        # would add another. Not verbose, or it warns of prompts over the model's length, which the
        # limits of the config drop.
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {}
        return encoded.get("input_ids", [])

    def _opens_think(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends with `<think>`, which the templates of several models write."""
        tail = tuple(token_ids[-_TAIL:])
        if tail not in self._tails:
            text: Any = self._tokenizer.decode(list(tail), skip_special_tokens=False)
            self._tails[tail] = text.rstrip().endswith(OPEN_THINK)
        return self._tails[tail]

    def _text(self, row: Row, *, is_answered: bool = False) -> str:
        messages = row.messages
        if any("tool_calls" in message for message in messages):
            messages = [self._calling[0].apply(message) for message in messages]
        return self._apply(messages, row.tools, row.template_kwargs, is_answered=is_answered)

    def _apply(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        is_answered: bool = False,
    ) -> str:
        """The text of the prompt, or of a conversation that ends with an answer.

        Raises:
            BadRow: the template refuses the messages.
        """
        given = self._variables | dict(variables)
        if tools is not None:
            given["tools"] = tools
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

    # --- what templates differ in ---

    @cached_property
    def _source(self) -> str:
        template: Any = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def _unread(self, names: Iterable[str]) -> list[str]:
        """The `names` that do not occur in the template."""
        return [n for n in names if not re.search(rf"\b{re.escape(n)}\b", self._source)]

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
    def _calling(self) -> tuple[_Form, bool]:
        """The form in which the template wants calls of tools, and whether it shows calls at all.

        Templates want arguments as an object or as its JSON text, and "" or None as the content of
        a turn without text. The first form that shows the arguments is taken.
        """
        forms = [_Form(as_text, empty) for empty in ("", None) for as_text in (False, True)]
        schema = {"name": "other", "description": "", "parameters": {"type": "object"}}
        for form in forms:
            turns = [_PROBE[0], form.apply(_PROBE[1]), _PROBE[2]]
            try:
                text = self._apply(turns, [{"type": "function", "function": schema}], {})
            except BadRow:
                continue
            # Not as Python prints an object, where JSON is meant.
            if "rlsys_value" in text and "'key': 'rlsys_value'" not in text:
                return form, True
        return forms[0], False

    # --- what is left out ---

    def _look(self, row: Row, text: str) -> None:
        """Note what the prompt lacks or adds, and missing values that it prints."""
        where = row.place
        if text.rstrip().endswith(OPEN_THINK):
            self._notice(_OPENS_THINK, where)
        for role in dict.fromkeys(_left_out(row.messages, text)):
            self._notice(
                f"the chat template leaves out or changes the text of a {role} turn", where
            )
        if any(map(called_functions, row.messages)) and not self._calling[1]:
            self._notice("the chat template leaves out the calls of tools", where)
        keys = {key: None for message in row.messages for key in _telling_keys(message)}
        for key in self._unread(keys):
            self._notice(f"the chat template does not read {key!r} of a message", where)
        for name in self._unread(row.template_kwargs):
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
        """Whether the prompt is the same without tools, which can only be if their names lack."""
        if all(f'"{tool["function"]["name"]}"' in text for tool in row.tools or ()):
            return False
        try:
            return self._text(replace(row, tools=None)) == text
        except BadRow:
            return False

    def _notice(self, text: str, first: str) -> None:
        self._noticed.setdefault(text, _Notice(text, first)).count += 1


@dataclass(slots=True)
class _Notice:
    text: str
    first: str
    """The place of the first row with it."""
    count: int = 0

    def __str__(self) -> str:
        more = f" and {self.count - 1:,} more" if self.count > 1 else ""
        return f"{self.text} ({self.first}{more})"


@dataclass(frozen=True, slots=True)
class _Form:
    """A form of turns that call tools."""

    arguments_as_text: bool
    empty: str | None
    """The content of a turn without text."""

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
    row = Row(1, "", messages=read_turns(messages))
    ChatTemplate(tokenizer, template_kwargs).render([row])
    if row.problem:
        raise ValueError(row.problem)
    return row.token_ids
