"""Chat in the terminal: answers appear token by token."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rlsys.commands.infer import SAMPLING, check_sampling
from rlsys.model.chat_template import ChatTemplate
from rlsys.run.model_source import ModelSource
from rlsys.text import counted
from rlsys.tracking.printable import printable
from rlsys.types import Message

if TYPE_CHECKING:
    from rlsys.engines.vllm.text_engine import TextEngine

PROMPT, CONTINUED = ">>> ", "... "
MANY_LINES = '"""'
"""Begins and ends a message of several lines."""
HELP = f"""\
/clear            forget the conversation
/system [TEXT]    set the system message, and forget the conversation; without TEXT remove it
/set NAME VALUE   change sampling: {", ".join(SAMPLING)}; VALUE default takes the model's own
/show             the system message, the sampling and the length of the conversation
/exit             end (also /bye, /quit, Ctrl-D)
{MANY_LINES}               begins and ends a message of several lines
Ctrl-C            stop an answer"""
_EXITS = ("/exit", "/bye", "/quit")


class Chat:
    """A conversation with a model.

    Args:
        engine: samples the answers.
        system: the system message; None has none.
        sampling: what the user asked for; the rest is the model's own (generation_config.json).
        write: gets each piece of an answer as it comes.
        variables: of the chat template.
    """

    def __init__(
        self,
        engine: TextEngine,
        system: str | None,
        sampling: dict[str, Any],
        write: Callable[[str], None],
        variables: dict[str, Any] | None = None,
    ):
        self._engine = engine
        self._write = write
        self.system = system
        self.asked = dict(sampling)
        has_template = engine.tokenizer.chat_template is not None
        self._template = ChatTemplate(engine.tokenizer, variables) if has_template else None
        self.messages: list[Message] = []
        self.clear()

    @property
    def is_base(self) -> bool:
        """Whether the model has no chat template: it continues texts and has no memory."""
        return self._template is None

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters of the next answer."""
        return self._engine.defaults() | self.asked

    def clear(self) -> None:
        """Forget the conversation, but not the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def num_tokens(self) -> int:
        """Tokens of the conversation so far."""
        if self._template is None or not self.messages:
            return 0
        text = self._template.text(self.messages, is_answered=True)
        return len(self._template.tokens([text])[0])

    def answer(self, text: str) -> str:
        """Write the answer to a message, and remember both.

        Returns:
            a line about it: its tokens, their speed, and whether it was cut.

        Raises:
            ValueError: the conversation does not fit into the model's context, or the template
                refuses it; it is as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        room = self._engine.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt):,} tokens, and the model reads "
                f"{self._engine.max_model_len:,} (--max_model_len): /clear forgets it"
            )
        pieces: list[str] = []
        start, num_tokens, end = time.monotonic(), 0, "stopped"
        stream = self._engine.stream(prompt, self.sampling)
        with contextlib.closing(stream), contextlib.suppress(KeyboardInterrupt):
            for piece in stream:
                pieces.append(piece.text)
                self._write(piece.text)
                num_tokens += piece.num_tokens
                end = piece.finish_reason or end
        answer = "".join(pieces)
        if not self.is_base:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        speed = num_tokens / max(time.monotonic() - start, 1e-9)
        line = f"{counted(num_tokens, 'token')}, {speed:.1f} a second"
        if end == "length":
            full = num_tokens == room
            line += ", cut: the context is full" if full else ", cut at max_tokens"
        return line + (", stopped" if end == "stopped" else "")

    def _prompt(self, messages: list[Message]) -> list[int]:
        if self._template is not None:
            return self._template.tokens([self._template.text(messages)])[0]
        token_ids: Any = self._engine.tokenizer(messages[-1]["content"])["input_ids"]
        return list(token_ids)


def chat(
    engine: TextEngine,
    source: ModelSource,
    system: str | None,
    sampling: dict[str, Any],
    variables: dict[str, Any],
) -> None:
    """Talk on the terminal; with another standard input, answer it as one message.

    Raises:
        ValueError: there is nothing to answer, or a system message for a model that reads none.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # answers may have characters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    conversation = Chat(engine, system, sampling, _write, variables)
    if conversation.is_base:
        if system is not None:
            raise ValueError(
                f"--system: {source.label} has no chat template, so it reads no system message"
            )
        print("note: no chat template: the model continues each text, alone", file=sys.stderr)
    if not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError("standard input is empty: write a message to it, or use a terminal")
        line = conversation.answer(text)
        print(flush=True)
        print(line, file=sys.stderr)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` its line editing and history
    print(f"{source.label}: {_describe(conversation.sampling)}. /help lists commands, /exit ends.")
    for text in _messages():
        if text.startswith("/"):
            if text.split()[0] in _EXITS:
                return
            print(_command(conversation, text))
            continue
        try:
            line = conversation.answer(text)
        except ValueError as error:
            line = str(error)
        print(f"\n\033[2m{line}\033[0m\n", flush=True)


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _messages() -> Iterator[str]:
    """What the user types, until the end of input."""
    while True:
        try:
            text = input(PROMPT)
            if text.lstrip().startswith(MANY_LINES):
                text = text.lstrip().removeprefix(MANY_LINES)
                while MANY_LINES not in text:
                    text += "\n" + input(CONTINUED)
                text = text.partition(MANY_LINES)[0]
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D ends")
            continue
        if text.strip():
            yield text.strip()


def _command(conversation: Chat, text: str) -> str:
    """Do what a line that begins with / asks for; returns what to print."""
    name, _, rest = text.partition(" ")
    if name == "/clear":
        conversation.clear()
        return "forgotten"
    if name == "/system":
        conversation.system = rest.strip() or None
        conversation.clear()
        return "the conversation begins again with it" if rest.strip() else "no system message"
    if name == "/set":
        return _set(conversation, rest.split())
    if name == "/show":
        return (
            f"system: {conversation.system or '-'}\n{_describe(conversation.sampling)}\n"
            f"{counted(len(conversation.messages), 'message')}, "
            f"{counted(conversation.num_tokens(), 'token')}"
        )
    known = HELP if name == "/help" else f"{name} is not a command\n{HELP}"
    return known


def _set(conversation: Chat, words: list[str]) -> str:
    if len(words) != 2 or words[0] not in SAMPLING:
        return f"write /set NAME VALUE, with NAME one of {', '.join(SAMPLING)}"
    name, text = words
    if text == "default":
        conversation.asked.pop(name, None)
        return _describe(conversation.sampling)
    try:
        value = SAMPLING[name](text)
        check_sampling(name, value)
    except ValueError as error:
        return str(error)
    conversation.asked[name] = value
    return _describe(conversation.sampling)


def _describe(sampling: dict[str, Any]) -> str:
    shown = {"temperature": 1.0} | sampling
    return ", ".join(f"{name} {value:g}" for name, value in shown.items())
