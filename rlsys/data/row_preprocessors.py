"""ms-swift's preprocessor classes, for one row at a time.

Before `preprocess(row)` the base class renames columns, as ms-swift does: first those of `columns`,
then the names that the class knows (question -> query, answer -> response, ...), whatever their
case. Where two columns of a row would get one name, both keep theirs.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

from rlsys.data.readers import BadRow

Row = dict[str, Any]

_MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
_SYSTEM = ("system", "system_prompt")
_QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)


class RowPreprocessor:
    """Base class: an instance is called with each row, and calls `preprocess`.

    Example:
        @register_preprocessor("countdown")
        class Countdown(RowPreprocessor):
            def preprocess(self, row):
                row["query"] = f"Make {row['target']} out of {row['nums']}."
                return super().preprocess(row)
    """

    def __init__(
        self,
        *,
        columns: Mapping[str, str] | None = None,
        dataset_sample: int | None = None,
        random_state: Any = 42,
        traceback_limit: int = 10,
    ):
        """Settings, as ms-swift names them.

        Args:
            columns: new names of columns, before all others.
            dataset_sample: refused; `#ROWS` behind the dataset does the same.
            random_state: seed of `self.random_state`, or a numpy RandomState.
            traceback_limit: without effect: a row that raises ends the run, in one error for all.

        Raises:
            ValueError: dataset_sample.
        """
        if dataset_sample is not None:
            raise ValueError(
                f"dataset_sample = {dataset_sample} is not supported: write #{dataset_sample} "
                "behind the dataset in data.dataset"
            )
        self.origin_columns = dict(columns or {})
        self.columns = {**self.origin_columns, **_MEDIA}
        self._random_seed = random_state

    @cached_property
    def random_state(self) -> Any:
        """numpy's RandomState, as ms-swift's classes have it."""
        import numpy as np

        if isinstance(self._random_seed, np.random.RandomState):
            return self._random_seed
        return np.random.RandomState(self._random_seed)

    def __call__(self, row: Row) -> Row | None:
        """Rename columns, then `preprocess`; a column `solution` outlives both."""
        return self.preprocess_renamed(self.rename(row))

    def rename(self, row: Row) -> Row:
        """The row as `preprocess` expects it."""
        kept = {_KEPT_SOLUTION: row["solution"]} if "solution" in row else {}
        return _renamed(_renamed(row, self.origin_columns), self.columns) | kept

    def preprocess_renamed(self, row: Row) -> Row | None:
        """`preprocess` on a row that `rename` returned."""
        solution = {key: row.pop(key) for key in (_KEPT_SOLUTION,) if key in row}
        made = self.preprocess(row)
        if solution and isinstance(made, dict):
            made.setdefault("solution", solution[_KEPT_SOLUTION])
        return made

    def preprocess(self, row: Row) -> Row | None:
        """The row to train on; None leaves it out, which is counted."""
        return row

    def prepare_dataset(self, dataset: Any) -> Any:
        """Change the `datasets.Dataset` of all renamed rows, before `preprocess` gets each."""
        return dataset

    @property
    def prepares_dataset(self) -> bool:
        """Whether a subclass has its own `prepare_dataset`, which needs all rows at once."""
        return type(self).prepare_dataset is not RowPreprocessor.prepare_dataset


class ResponsePreprocessor(RowPreprocessor):
    """Question and answer -> `messages`; `history` and `system` go before them."""

    def __init__(self, *, columns: Mapping[str, str] | None = None, **settings: Any):
        super().__init__(columns=columns, **settings)
        self.columns |= dict.fromkeys(_SYSTEM, "system") | dict.fromkeys(_QUERY, "query")
        self.columns |= dict.fromkeys(_RESPONSE, "response")

    def preprocess(self, row: Row) -> Row | None:
        """The row with `messages` in place of query, response, history and system."""
        response = row.pop("response", None)
        if isinstance(response, list | tuple):
            response = response[0] if response else None
        history = row.pop("history", None) or []
        if isinstance(history, str):
            history = _literal(history, "history")
        query, system = row.pop("query", None), row.pop("system", None)
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in [*history, (query, response if isinstance(response, str) else None)]:
            messages += [] if asked is None else [{"role": "user", "content": asked}]
            messages += [] if answered is None else [{"role": "assistant", "content": answered}]
        row["messages"] = messages
        if response is not None and not isinstance(response, str):
            row.setdefault("solution", response)  # a number, say, which is no turn
        return row


class AlpacaPreprocessor(ResponsePreprocessor):
    """`instruction`, `input` and `output` -> `messages`."""

    @classmethod
    def concat_inst_input(cls, instruction: str | None, input_: str | None) -> str:
        """The question: `input` below `instruction`."""
        return "\n".join(part for part in (instruction, input_) if part)

    def preprocess(self, row: Row) -> Row | None:
        """The row with `messages`."""
        instruction, text = row.pop("instruction", None), row.pop("input", None)
        output = row.pop("output", None)
        if output is not None:
            row["response"] = output
        if instruction or text:
            row["query"] = self.concat_inst_input(instruction, text)
        return super().preprocess(row)


def default_repair_messages(messages: Any) -> Any:
    """Messages that stand in a text, as Python or JSON writes them."""
    return _literal(messages, "messages") if isinstance(messages, str) else messages


class MessagesPreprocessor(RowPreprocessor):
    """Conversations in other words -> `messages` of role and content."""

    def __init__(
        self,
        *,
        role_key: str | None = None,
        content_key: str | None = None,
        user_role: str | None = None,
        assistant_role: str | None = None,
        system_role: str = "system",
        columns: Mapping[str, str] | None = None,
        repair_messages: Callable[[Any], Any] = default_repair_messages,
        inner_key: str | None = None,
        message_format: Literal["auto", "swift", "openai"] = "auto",
        **settings: Any,
    ):
        """Settings, as ms-swift names them; None of a key or role stands for the usual ones.

        Raises:
            ValueError: message_format anthropic.
        """
        super().__init__(columns=columns, **settings)
        if message_format not in ("auto", "swift", "openai"):
            raise ValueError(
                f"message_format = {message_format!r} is not supported: auto, swift and openai are"
            )
        self.role_keys = ["role", "from"] if role_key is None else [role_key]
        self.content_keys = ["content", "value"] if content_key is None else [content_key]
        self.user_roles = ["user", "human"] if user_role is None else [user_role]
        self.assistant_roles = (
            ["assistant", "gpt", "bot"] if assistant_role is None else [assistant_role]
        )
        self.system_role = system_role
        self.repair_messages = repair_messages
        self.inner_key = inner_key
        self.columns |= dict.fromkeys(("messages", "conversation", "conversations"), "messages")
        self.columns |= dict.fromkeys((*_SYSTEM, system_role), "system")

    def preprocess(self, row: Row) -> Row | None:
        """The row with `messages` in the usual words; None where there are none."""
        messages = row["messages"]
        if self.inner_key is not None:
            messages = messages[self.inner_key]
        messages = self.repair_messages(messages)
        if not messages or isinstance(messages, str):
            return None
        turns = [turn for message in messages for turn in self._turns(dict(message))]
        system = row.pop("system", None)
        if system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        row["messages"] = turns
        return row

    def _turns(self, message: Row) -> list[Row]:
        """One turn, or the two of a message that pairs question and answer."""
        role = _taken(message, self.role_keys)
        if role is None:
            pairs = (("user", self.user_roles), ("assistant", self.assistant_roles))
            found = [(standard, _taken(message, names)) for standard, names in pairs]
            return [{"role": r, "content": text} for r, text in found if text is not None]
        content = _taken(message, self.content_keys)
        roles = dict.fromkeys(self.user_roles, "user")
        roles |= dict.fromkeys(self.assistant_roles, "assistant") | {self.system_role: "system"}
        return [{"role": roles.get(role, role), "content": content, **message}]


class AutoPreprocessor(RowPreprocessor):
    """The class above that fits the columns of a row."""

    def __init__(self, *, columns: Mapping[str, str] | None = None, **settings: Any):
        super().__init__(columns=columns)
        self._messages = MessagesPreprocessor(**settings)
        self._alpaca = AlpacaPreprocessor(**settings)
        self._response = ResponsePreprocessor(**settings)

    def __call__(self, row: Row) -> Row | None:
        """What the chosen class makes of the row."""
        row = _renamed(row, self.origin_columns)
        if {"messages", "conversation", "conversations"} & row.keys():
            return self._messages(row)
        return (self._alpaca if {"instruction", "input"} <= row.keys() else self._response)(row)


_KEPT_SOLUTION = "__#solution"
"""Under which `solution` outlives renaming; no column of a dataset has this name."""


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    by_lower = {name.lower(): name for name in row}
    found = {by_lower[k.lower()]: new for k, new in names.items() if k.lower() in by_lower}
    count = Counter(found.values())
    renames = {name: new for name, new in found.items() if count[new] == 1 and name != new}
    taken = next((new for new in renames.values() if new in row and new not in renames), None)
    if taken is not None:
        raise BadRow(f"a preprocessor renames a column to {taken!r}, which the row has already")
    return {renames.get(name, name): value for name, value in row.items()}


def _taken(message: Row, keys: list[str]) -> Any:
    """The value of the first of `keys` that a message has, taken out of it."""
    key = next((key for key in keys if key in message), None)
    return None if key is None else message.pop(key)


def _literal(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadRow(f"the column {column!r} is a text that is no list: {text!r:.80}") from None
