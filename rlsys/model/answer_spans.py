"""Where the answers of a rendered conversation begin and end, to the character.

A template that marks what the assistant writes (`{% generation %}`) says it itself. For any other
template the conversation is rendered twice: as it is, and with a word in place of each answer. The
word shows where the turn of the assistant begins, behind the generation prompt, and where the text
that ends it stands. What both texts have in common is outside of the answers, so what is left of
the first text is the answers. Whatever contradicts this is an error: no span is guessed.

Example, with the template of Qwen2.5; the span is between the brackets:
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    [Hello!<|im_end|>]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlsys.json_text import BadRow
from rlsys.model.chat_template import ChatTemplate
from rlsys.types import Message

Span = tuple[int, int]
"""First character, and the one behind the last."""
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of messages that hold the thinking apart from the answer."""
_USER, _NEXT_USER = "qzUserzq", "qzNextzq"
_THOUGHT = re.compile(r"\s*(?:<think>)?((?!<think>).)*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template writes around the answer of a turn."""

    header: str
    """What every turn of the assistant and the generation prompt begin with; may be empty."""
    prompt: str
    """The generation prompt."""
    insertions: tuple[str, ...]
    """What may stand between header and answer, such as empty thinking."""
    end: str
    """What ends a turn, such as `<|im_end|>`; without the line break behind it."""


@dataclass(frozen=True, slots=True)
class _Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]


class AnswerSpans:
    """Finds the answers in the conversations that a chat template writes."""

    def __init__(self, template: ChatTemplate, special_tokens: Sequence[str]):
        """Take the added tokens of the tokenizer, one of which usually ends a turn."""
        self._template = template
        self._special = [token for token in special_tokens if token.strip()]
        self._frames: dict[str, _Frame] = {}

    def find(
        self,
        messages: list[Message],
        turns: Sequence[int],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the span of each of `turns`, which ends a turn included.

        Args:
            messages: of the conversation.
            turns: indices of messages of the assistant, ascending.
            tools: schemas of functions.
            variables: of the template.

        Raises:
            BadRow: the template refuses the conversation, or its spans are not certain.
        """
        talk = _Conversation(messages, tools, variables or {})
        text = self._text(talk)
        if self._template.has_marks(tools):
            return text, self._marked(talk, turns, text)
        frame = self._frame(talk.variables)
        found = self._together(talk, list(turns), text, frame)
        if found is None:
            found = [self._alone(talk, turn, text, frame) for turn in turns]
        spans = [self._without_prompt(text, span, frame) for span in found]
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                raise _inexact("two turns of the assistant overlap in the text")
        for turn, (start, end) in zip(turns, spans, strict=True):
            _check_says(messages[turn], text[start:end])
        return text, spans

    def _text(self, talk: _Conversation) -> str:
        return self._template.text(talk.messages, talk.tools, talk.variables, is_answered=True)

    # --- marks of the template ---

    def _marked(self, talk: _Conversation, turns: Sequence[int], text: str) -> list[Span]:
        """The template's own spans of `turns`."""
        spans: list[Span] = []
        for start, end in self._template.marked_spans(talk.messages, talk.tools, talk.variables):
            if spans and spans[-1][1] == start:
                spans[-1] = spans[-1][0], end
            elif start < end:
                spans.append((start, end))
        answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise BadRow(
                f"the chat template marks {len(spans)} parts with {{% generation %}} in a "
                f"conversation with {len(answers)} turns of the assistant, so the loss cannot be "
                "placed exactly. Correct the template: one block for each turn"
            )
        by_turn = dict(zip(answers, spans, strict=True))
        for turn in turns:
            start, end = by_turn[turn]
            behind = text[end:].lstrip()
            cut = next((token for token in self._special if behind.startswith(token)), None)
            if cut is not None and not text[start:end].rstrip().endswith(tuple(self._special)):
                raise BadRow(
                    f"the chat template leaves {cut!r} behind the {{% generation %}} block, so the "
                    "model would not learn to end its turn. Move {% endgeneration %} behind it"
                )
            _check_says(talk.messages[turn], text[start:end])
        return [by_turn[turn] for turn in turns]

    # --- other templates ---

    def _together(
        self, talk: _Conversation, turns: list[int], text: str, frame: _Frame
    ) -> list[Span] | None:
        """The spans from one rendering with a word for each answer; None if it leaves a doubt."""
        parts = self._fixed_parts(talk, turns, frame)
        if not text.startswith(parts[0]) or not text.endswith(parts[-1]):
            return None
        spans, start = [], len(parts[0])
        last = len(text) - len(parts[-1])
        for part in parts[1:-1]:
            end = text.find(part, start, last)
            if end < 0 or text.find(part, end + 1, last) >= 0:
                return None
            spans.append((start, end + len(frame.end)))
            start = end + len(part)
        return [*spans, (start, last + len(frame.end))] if start <= last else None

    def _alone(self, talk: _Conversation, turn: int, text: str, frame: _Frame) -> Span:
        """The span of one turn, all others as they are."""
        before, behind = self._fixed_parts(talk, [turn], frame)
        start, end = len(before), len(text) - len(behind)
        if not text.startswith(before) or not text.endswith(behind) or start > end:
            raise _inexact("what is around an answer depends on the answer")
        return start, end + len(frame.end)

    def _fixed_parts(self, talk: _Conversation, turns: list[int], frame: _Frame) -> list[str]:
        """The texts around the answers: up to the first, between two, behind the last.

        Each but the first begins with what ends the turn before it.
        """
        words = {turn: f"qzAnswer{turn}zq" for turn in turns}
        other = _with_words(talk, words)
        text = self._text(other)
        # Some templates write either the calls or the text of a turn.
        hidden = [t for t in turns if words[t] not in text and "tool_calls" in talk.messages[t]]
        if hidden:
            other = _with_words(talk, words, hidden)
            text = self._text(other)
        parts, cut = [], 0
        for turn in turns:
            if text.count(words[turn]) != 1:
                raise _inexact("an answer does not stand in it exactly once")
            place = text.index(words[turn])
            start = self._start(other, turn, text, place, frame)
            if start < cut:
                raise _inexact("a turn of the assistant begins inside an earlier one")
            parts.append(text[cut:start])
            cut = self._end(other, turn, text, place + len(words[turn]), frame)
        return [*parts, text[cut:]]

    def _start(self, talk: _Conversation, turn: int, text: str, place: int, frame: _Frame) -> int:
        """Where the turn begins whose answer stands at `place`: behind its header."""
        if frame.header:
            start = text.rfind(frame.header, 0, place) + len(frame.header)
            if start >= len(frame.header) and text[start:place] in frame.insertions:
                return start
        prompt = self._template.text(talk.messages[:turn], talk.tools, talk.variables)
        if text.startswith(prompt) and len(prompt) <= place:
            return len(prompt)
        # The prompt's end, from the last message on, where a template writes tools elsewhere.
        asked = talk.messages[turn - 1]["content"].strip() if turn else ""
        tail = prompt[prompt.rfind(asked) :] if asked in prompt else ""
        for insertion in frame.insertions:
            start = place - len(insertion)
            if tail and text[:place].endswith(insertion) and text[:start].endswith(tail):
                return start
        if "tool_calls" in talk.messages[turn]:  # a turn with a text begins at the same place
            word = f"qzAnswer{turn}zq"
            said = [*talk.messages]
            said[turn] = {"role": "assistant", "content": word}
            other = _Conversation(said, talk.tools, talk.variables)
            plain = self._text(other)
            if plain.count(word) == 1:
                start = self._start(other, turn, plain, plain.index(word), frame)
                if start <= place and plain[:start] == text[:start]:
                    return start
        raise _inexact("the text before an answer is another one than its prompt")

    def _end(self, talk: _Conversation, turn: int, text: str, place: int, frame: _Frame) -> int:
        """Where the text stands that ends the turn whose answer ends at `place`."""
        calls = talk.messages[turn].get("tool_calls")
        if not calls:
            if not text.startswith(frame.end, place):
                raise _inexact(f"an answer is not followed by {frame.end!r}, which ends others")
            return place
        if frame.end in json.dumps(calls, ensure_ascii=False):
            raise BadRow(f"a call of a tool has the text {frame.end!r}, which ends a turn")
        end = text.find(frame.end, place)
        behind = end + len(frame.end)
        if turn + 1 < len(talk.messages):
            # What ends this turn stands before anything of the next message.
            answered = [*talk.messages]
            answered[turn + 1] = answered[turn + 1] | {"content": _NEXT_USER}
            other = self._text(_Conversation(answered, talk.tools, talk.variables))
            end = end if other[:behind] == text[:behind] else -1
        if end < 0:
            raise _inexact(f"a turn with calls of tools does not end with {frame.end!r}")
        return end

    def _without_prompt(self, text: str, span: Span, frame: _Frame) -> Span:
        """The span without the rest of the generation prompt, `<think>` for example."""
        start, end = span
        rest = frame.prompt[len(frame.header) :]
        return (start + len(rest) if rest and text.startswith(rest, start) else start), end

    def _frame(self, variables: Mapping[str, Any]) -> _Frame:
        """What the template writes around answers, by conversations of rlsys' own."""
        key = json.dumps(variables, sort_keys=True, default=repr)
        if key not in self._frames:
            self._frames[key] = self._make_frame(variables)
        return self._frames[key]

    def _make_frame(self, variables: Mapping[str, Any]) -> _Frame:
        def written(messages: list[Message], *, is_answered: bool = True) -> str:
            return self._template.text(messages, None, variables, is_answered=is_answered)

        user, answer = {"role": "user", "content": _USER}, "qzAnswerzq"
        turns = [user, {"role": "assistant", "content": answer}]
        more = [{"role": "user", "content": _NEXT_USER}, {"role": "assistant", "content": "qzBzq"}]
        prompt = written([user], is_answered=False)
        # Some templates end a conversation with EOS, also one without an answer.
        asked = _common_start(written([user]), prompt)
        short, long = written(turns), written([*turns, *more])
        if any(not text.startswith(asked) or text.count(answer) != 1 for text in (short, long)):
            raise _inexact("an answer changes the text before it")
        before = [text[len(asked) : text.index(answer)] for text in (short, long)]
        header = _common_start(prompt[len(asked) :], *before)
        insertions = tuple(sorted({text[len(header) :] for text in before}, key=len, reverse=True))
        behind = [text[text.index(answer) + len(answer) :] for text in (short, long)]
        last, earlier = (self._first_special(text) for text in behind)
        if not last and not earlier:
            last = earlier = _common_start(*behind).rstrip()
            if behind[0][len(last) :].lstrip() != "":
                last = ""
        if last and earlier and last != earlier:
            raise _inexact(f"{last!r} ends the last turn, and {earlier!r} an earlier one")
        if not last or not earlier:
            raise BadRow(
                "the chat template writes nothing that ends a turn of the assistant, so the model "
                "would not learn to stop. Write EOS behind each turn, or mark what is trained "
                "with {% generation %} blocks"
            )
        return _Frame(header, prompt[len(asked) :], insertions, last)

    def _first_special(self, text: str) -> str:
        """`text` up to its first special token; empty without one."""
        ends = [text.index(token) + len(token) for token in self._special if token in text]
        return text[: min(ends)] if ends else ""


def _with_words(
    talk: _Conversation, words: Mapping[int, str], calls: Sequence[int] = ()
) -> _Conversation:
    """The conversation with a word in place of some turns' answers, and without their thinking.

    In the turns `calls` the word is the name of the function that is called first.
    """
    messages = list(talk.messages)
    for turn, word in words.items():
        message = {k: v for k, v in messages[turn].items() if k not in THINKING_KEYS}
        if turn in calls:
            first, *others = message["tool_calls"]
            first = first | {"function": first["function"] | {"name": word}}
            messages[turn] = message | {"content": "", "tool_calls": [first, *others]}
        else:
            messages[turn] = message | {"content": word}
    return _Conversation(messages, talk.tools, talk.variables)


def _common_start(*texts: str) -> str:
    """The longest text that all `texts` begin with."""
    first, last = min(texts), max(texts)  # all others are between them
    length = next((i for i, sign in enumerate(first) if last[i : i + 1] != sign), len(first))
    return first[:length]


def _check_says(message: Message, text: str) -> None:
    """Refuse a turn whose text is not what the message says; thinking may be left out."""
    for call in message.get("tool_calls", []):
        if call["function"]["name"] not in text:
            raise BadRow(
                "the chat template leaves out the calls of tools of an assistant turn, "
                f"{call['function']['name']!r}: the model would not learn them"
            )
    said = message["content"]
    thought = _THOUGHT.match(said)
    for words in re.split(r"</?think>", said[thought.end() :] if thought else said):
        if words.strip() not in text:
            raise BadRow(
                "the chat template leaves out or changes the text of an assistant turn, "
                f"{' '.join(words.split())!r:.60}: the model would learn something else"
            )


def _inexact(why: str) -> BadRow:
    return BadRow(
        f"the chat template does not show exactly what the assistant writes: {why}. Mark it in the "
        "template with {% generation %} and {% endgeneration %}, as transformers knows it"
    )
