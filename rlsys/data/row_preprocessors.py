"""ms-swift's preprocessor classes, for one row at a time.

Before `preprocess(row)` the base class renames columns in any case, as ms-swift does: first by its
`columns`, then by the names that the class knows (question -> query, answer -> response, ...).
Where two columns of a row would get one name, both keep theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

from rlsys.data.formats import SYSTEM_COLUMNS
from rlsys.json_text import BadRow, parse_cell

Columns = dict[str, Any]
"""A row: column -> value."""

_MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
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
        """Take ms-swift's settings.

        Args:
            columns: new names of columns, applied before all others.
            dataset_sample: refused; `#ROWS` behind the dataset does the same.
            random_state: seed of `self.random_state`, or a numpy RandomState.
            traceback_limit: without effect; rlsys reports all rows that raise in one error.

        Raises:
            ValueError: dataset_sample is given.
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
        """A numpy RandomState, which ms-swift's classes have too."""
        import numpy as np

        if isinstance(self._random_seed, np.random.RandomState):
            return self._random_seed
        return np.random.RandomState(self._random_seed)

    def __call__(self, row: Columns) -> Columns | None:
        """Rename columns, then `preprocess`; a column `solution` survives both."""
        return self.preprocess_renamed(self.rename(row))

    def rename(self, row: Columns) -> Columns:
        """The row with the column names that `preprocess` expects."""
        kept = {_KEPT_SOLUTION: row["solution"]} if "solution" in row else {}
        return _renamed(_renamed(row, self.origin_columns), self.columns) | kept

    def preprocess_renamed(self, row: Columns) -> Columns | None:
        """Call `preprocess` on a row that `rename` returned."""
        solution = {key: row.pop(key) for key in (_KEPT_SOLUTION,) if key in row}
        made = self.preprocess(row)
        if solution and isinstance(made, dict):
            made.setdefault("solution", solution[_KEPT_SOLUTION])
        return made

    def preprocess(self, row: Columns) -> Columns | None:
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
    """Question and answer -> `messages`, after `system` and `history`."""

    def __init__(self, *, columns: Mapping[str, str] | None = None, **settings: Any):
        super().__init__(columns=columns, **settings)
        self.columns |= dict.fromkeys(SYSTEM_COLUMNS, "system") | dict.fromkeys(_QUERY, "query")
        self.columns |= dict.fromkeys(_RESPONSE, "response")

    def preprocess(self, row: Columns) -> Columns | None:
        """The row with `messages` in place of query, response, history and system."""
        response = row.pop("response", None)
        if isinstance(response, list | tuple):
            response = response[0] if response else None
        history = parse_cell(row.pop("history", None), "history") or []
        query, system = row.pop("query", None), row.pop("system", None)
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in [*history, (query, response if isinstance(response, str) else None)]:
            messages += [] if asked is None else [{"role": "user", "content": asked}]
            messages += [] if answered is None else [{"role": "assistant", "content": answered}]
        row["messages"] = messages
        if response is not None and not isinstance(response, str):
            row.setdefault("solution", response)  # a number, say, which is not a turn
        return row


class AlpacaPreprocessor(ResponsePreprocessor):
    """`instruction`, `input` and `output` -> `messages`."""

    @classmethod
    def concat_inst_input(cls, instruction: str | None, input_: str | None) -> str:
        """The question: `instruction`, and `input` below it."""
        return "\n".join(part for part in (instruction, input_) if part)

    def preprocess(self, row: Columns) -> Columns | None:
        """The row with `messages`."""
        instruction, text = row.pop("instruction", None), row.pop("input", None)
        output = row.pop("output", None)
        if output is not None:
            row["response"] = output
        if instruction or text:
            row["query"] = self.concat_inst_input(instruction, text)
        return super().preprocess(row)


def default_repair_messages(messages: Any) -> Any:
    """Messages out of a text that Python or JSON wrote; other messages as they are."""
    return parse_cell(messages, "messages")


class MessagesPreprocessor(RowPreprocessor):
    """Turns with other keys and roles -> `messages` of role, content."""

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
        """Take ms-swift's settings; None for a key or role means the usual ones.

        Raises:
            ValueError: another message_format.
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
        self.columns |= dict.fromkeys((*SYSTEM_COLUMNS, system_role), "system")

    def preprocess(self, row: Columns) -> Columns | None:
        """The row with `messages` of role and content; None for a row without messages."""
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

    def _turns(self, message: Columns) -> list[Columns]:
        """A message's turn, or two if it pairs question and answer."""
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

    def __call__(self, row: Columns) -> Columns | None:
        """The row that the chosen class makes."""
        row = _renamed(row, self.origin_columns)
        if {"messages", "conversation", "conversations"} & row.keys():
            return self._messages(row)
        return (self._alpaca if {"instruction", "input"} <= row.keys() else self._response)(row)


_KEPT_SOLUTION = "__#solution"
"""The name under which `solution` survives renaming; no dataset has such a column."""


def _renamed(row: Columns, names: Mapping[str, str]) -> Columns:
    by_lower = {name.lower(): name for name in row}
    found = {by_lower[k.lower()]: new for k, new in names.items() if k.lower() in by_lower}
    count = Counter(found.values())
    renames = {name: new for name, new in found.items() if count[new] == 1 and name != new}
    taken = next((new for new in renames.values() if new in row and new not in renames), None)
    if taken is not None:
        raise BadRow(f"a preprocessor renames a column to {taken!r}, which the row has already")
    return {renames.get(name, name): value for name, value in row.items()}


def _taken(message: Columns, keys: list[str]) -> Any:
    """Remove the first of `keys` that a message has; returns its value."""
    key = next((key for key in keys if key in message), None)
    return None if key is None else message.pop(key)
