"""Turns of a conversation as people write them -> messages as OpenAI and transformers have them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlsys.json_text import BadRow, check_unicode, parse_cell, parsed_or_same
from rlsys.types import Message

ROLES = ("system", "user", "assistant", "tool", "developer")
SYSTEM_ROLES = ("system", "developer")
ONLY_TEXT = "rlsys trains on text alone. Leave such rows out, with a data.preprocessor for example"

_CALLS = "calls"
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",  # LLaMA-Factory
    "tool_response": "tool",  # ms-swift
    "function": "tool",  # OpenAI, before tools
    "function_call": _CALLS,  # LLaMA-Factory
    "tool_call": _CALLS,  # ms-swift
}
"""Names of roles in ShareGPT, LLaMA-Factory, ms-swift and OpenAI's API; `_CALLS` is a turn of the
assistant whose content is the calls."""
_THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)
_OBJECT = re.compile(r"\s*\[?\s*\{")
_TURN_KEY = re.compile(r"""["'](role|from|content|value)["']\s*:""")


def as_turns(words: Any, column: str) -> list[Any]:
    """The turn of a user who says `words`, or the turns that a table's cell holds as text.

    Words that merely begin with a bracket stay words, and so does JSON of something else.

    Raises:
        BadRow: it looks like turns and cannot be read.
    """
    is_object = isinstance(words, str) and _OBJECT.match(words)
    keys = set(_TURN_KEY.findall(words)) if is_object else set()
    if keys & {"role", "from"} and keys & {"content", "value"}:
        turns = parse_cell(words, column)
        turns = [turns] if isinstance(turns, dict) else turns
        if isinstance(turns, list) and all(map(is_turn, turns)):
            return turns
    return user_turn(words)


def user_turn(words: Any) -> list[Any]:
    """The turn of a user who says `words`."""
    return [{"role": "user", "content": words}]


def read_turns(turns: Any) -> list[Message]:
    """Messages without empty system messages, each with a text as `content`.

    A turn that only calls tools becomes a message of the assistant with `tool_calls`; several in a
    row become one. Their arguments are objects where they can be.

    Raises:
        BadRow: not a list of turns, an unknown role, no text, or images.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"expected a list of messages or a prompt, found {turns!r:.80}")
    messages: list[Message] = []
    for name, message in (found for turn in turns for found in _messages_of(turn)):
        if name == _CALLS and messages and messages[-1]["role"] == "assistant":
            earlier = messages[-1]
            if message.get("loss", earlier.get("loss")) != earlier.get("loss"):
                raise BadRow("turns that are one turn of the assistant differ in 'loss'")
            earlier["tool_calls"] = [*earlier.get("tool_calls", []), *message["tool_calls"]]
            earlier["content"] += message["content"]
        elif name not in SYSTEM_ROLES or message["content"].strip():
            messages.append(message)
    return messages


def called_functions(message: Message) -> list[dict[str, Any]]:
    """The name and arguments of each call of a turn."""
    return [call["function"] for call in message.get("tool_calls", [])]


def as_answer(message: Message) -> str | None:
    """The text of a turn of the assistant; without text, JSON of its calls."""
    if message["content"].strip():
        return message["content"]
    calls = called_functions(message)
    return json.dumps(calls, ensure_ascii=False) if calls else None


def is_turn(given: Any) -> bool:
    """Whether it looks like a turn of a conversation."""
    return isinstance(given, dict) and bool({"role", "from"} & given.keys())


def _messages_of(turn: Any) -> list[tuple[str, Message]]:
    """Role name and message of a turn; ms-swift's pair of human and assistant gives two."""
    turn = parsed_or_same(turn)
    if is_turn(turn):
        return [_message(turn)]
    given = turn if isinstance(turn, dict) else {}
    pair = [(key, text) for key, text in given.items() if key in _ROLE_NAMES and text is not None]
    if not pair:
        raise BadRow(_not_a_message(turn))
    return [_message({"role": name, "content": text}) for name, text in pair]


def _message(turn: Mapping[str, Any]) -> tuple[str, Message]:
    name = _role_name(turn)
    role = "assistant" if name == _CALLS else name
    # Absent and null say the same of a message, and tables have null for what is absent.
    kept = {key: v for key, v in turn.items() if v is not None and key not in ("from", "value")}
    content = kept.get("content", turn.get("value"))
    calls = _calls(kept.pop("tool_calls", None) or kept.pop("function_call", None))
    if calls and name != "assistant":
        raise BadRow(f"the {role} message has tool_calls, which only the assistant's may have")
    if name == _CALLS:
        content, calls = _calls_as_content(content)
    if name == "tool" and _is_value(content):
        content = json.dumps(content, ensure_ascii=False)
    may_be_empty = role != "user" if isinstance(content, str) else role in ("tool", *SYSTEM_ROLES)
    content = _as_text(content, may_be_empty=may_be_empty or bool(calls))
    if not isinstance(content, str):
        kind = "no text" if content is None else "no text but a value"
        raise BadRow(f"the {role} message has {kind}: {dict(turn)!r:.80}")
    if not content.isascii():
        check_unicode(content)
    message = kept | {"role": role, "content": content}
    return name, message | {"tool_calls": calls} if calls else message


def _is_value(result: Any) -> bool:
    """Whether a tool's result is neither a text nor a list of parts, which have a type."""
    if isinstance(result, list):
        return not all(isinstance(part, dict) and "type" in part for part in result)
    return result is not None and not isinstance(result, str)


def _as_text(content: Any, *, may_be_empty: bool) -> Any:
    """Content in parts as one text, None for an empty text; any other value as it is."""
    if isinstance(content, list):
        content = _joined_text(content)
    if content is None or (isinstance(content, str) and not content.strip()):
        return "" if may_be_empty else None
    return content


def _role_name(turn: Mapping[str, Any]) -> str:
    key = "from" if turn.get("role") is None else "role"
    given = turn.get(key)
    name = _ROLE_NAMES.get(given) if isinstance(given, str) else None
    if name is None and key == "from":
        raise BadRow(f"a turn is from {given!r:.40}; known are {', '.join(_ROLE_NAMES)}")
    if name is None:
        raise BadRow(_not_a_message(dict(turn)))
    return name


def _not_a_message(turn: Any) -> str:
    return (
        f"a message is {{'role': one of {', '.join(ROLES)}, 'content': text}}, found {turn!r:.80}"
    )


def _joined_text(parts: list[Any]) -> str:
    """The text of content in parts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or "type" not in part:
            raise BadRow(
                f"a part of a message is {{'type': 'text', 'text': ...}}, found {part!r:.80}"
            )
        if part["type"] != "text":
            raise BadRow(f"a message has a part of type {part['type']!r:.40}: {ONLY_TEXT}")
        text = part.get("text")
        if text is not None and not isinstance(text, str):
            raise BadRow(f"a part of a message has no text but a value: {part!r:.80}")
        texts.append(text or "")
    return "".join(texts)


# --- calls of tools ------------------------------------------------------------------------------


def _calls_as_content(content: Any) -> tuple[str, list[dict[str, Any]]]:
    """The thought before the calls, and the calls, of a turn that holds nothing else."""
    thought = _THOUGHT.match(content) if isinstance(content, str) else None
    calls = _calls(content[thought.end() :] if thought else content)
    if not calls:
        raise BadRow(_not_a_call(content))
    return thought.group(1) if thought else "", calls


def _calls(given: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, out of a list, one call, or JSON text of either."""
    parsed = parsed_or_same(given)
    calls = [parsed] if isinstance(parsed, dict) else parsed or []
    if not isinstance(calls, list):
        raise BadRow(_not_a_call(given))
    return [_call(call) for call in calls]


def _call(given: Any) -> dict[str, Any]:
    call = parsed_or_same(given)
    if not isinstance(call, dict) or "function" not in call:
        call = {"function": call}
    function = parsed_or_same(call["function"])
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(_not_a_call(given))
    about = {key: v for key, v in call.items() if v is not None}
    called = {"name": function["name"], "arguments": _arguments(function.get("arguments"))}
    return {"type": "function"} | about | {"function": called}


def _arguments(given: Any) -> Any:
    """An object where it can be: transformers' templates expect one, OpenAI's API has its text."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    parsed = parsed_or_same(given)
    return parsed if isinstance(parsed, dict) else given


def _not_a_call(given: Any) -> str:
    return (
        "a call of a tool is {'name': text, 'arguments': object}, alone or as 'function', or JSON "
        f"text; found {given!r:.80}"
    )
