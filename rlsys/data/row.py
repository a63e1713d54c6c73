"""A row of a dataset, on its way from a file to a prompt or a sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlsys.json_text import BadRow, parse_json
from rlsys.types import Message, Prompt

if TYPE_CHECKING:
    import numpy as np

LEFT_OUT = "left out by the preprocessor"
TOO_LONG = "over data.max_prompt_length"
TOO_SHORT = "under data.min_prompt_length"
DUPLICATE = "duplicates"
OVER_LENGTH = "over data.max_length"
NO_TARGETS = "without a token to train on"


@dataclass(slots=True)
class Row:
    """One row. Each stage fills in more: reading, preprocessing, parsing, rendering.

    A row with a `problem` or a reason in `dropped` takes no part in later stages.
    """

    number: int
    """From 1; blank lines do not count."""
    location: str
    """ "line 7" of a text file, "row 7" of another; `Source.rows` writes the dataset before it."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All columns; after `parse_row` everything but the prompt, and `solution`."""
    line: bytes = b""
    """JSON that `read` turns into columns; empty where a file does not have rows as JSON lines."""
    problem: str = ""
    """Why the row cannot be used; empty if it can."""
    dropped: str = ""
    """LEFT_OUT, TOO_LONG, TOO_SHORT or DUPLICATE if the row is left out; empty if it is not."""

    format: str = ""
    """The row format. It and the next five are set by `parse_row`."""
    text: str | None = None
    """The prompt if it is one text, which a model without chat template gets as it is."""
    is_raw: bool = False
    """Whether `text` is the prompt even if the model has a chat template."""
    messages: list[Message] = field(default_factory=list)
    """The prompt, which ends with a turn of the user or of a tool."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of functions for the chat template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, before those that the config sets."""

    targets: list[int] = field(default_factory=list)
    """For supervised training, the indices of the messages to train on. `messages` then is the
    whole conversation. It and the next one are set by `parse_sample`."""
    completion: str | None = None
    """For supervised training, the text to train on after `text`."""

    rejected: Row | None = None
    """For preference training, the conversation with the rejected answer; this row has the chosen
    one. It and the next one are set by `parse_pair` and `parse_labelled`."""
    label: bool | None = None
    """For preference training on single answers, whether this one is desirable."""
    labels: tuple[float, ...] = ()
    """For a score head, what the scores of the row are compared with, see `ScoredRow.label`."""

    token_ids: list[int] = field(default_factory=list)
    """The rendered prompt or conversation. It and the next two are set by rendering."""
    target_mask: np.ndarray | None = None
    """[T] bool, for supervised training: True on the tokens to train on."""
    uncut_length: int = 0
    """The number of tokens of a row that is cut; 0 for others."""
    opens_think: bool = False
    """Whether the prompt ends with `<think>`."""

    @property
    def is_usable(self) -> bool:
        """Whether nothing is wrong with the row so far, and nothing leaves it out."""
        return not self.problem and not self.dropped

    @property
    def all_token_ids(self) -> list[int]:
        """The token ids, also of a rejected answer."""
        return self.token_ids + ([] if self.rejected is None else self.rejected.token_ids)

    @property
    def needs_template(self) -> bool:
        """Whether a parsed row is more than plain text, and takes a chat template."""
        turns = 1 if self.completion is None else 2
        return not self.is_raw and (self.text is None or len(self.messages) > turns)

    def read(self) -> None:
        """Parse the line of JSON, if there is one.

        Raises:
            BadRow: the line is not a JSON object, or the file's reader found a problem.
        """
        if self.problem:
            raise BadRow(self.problem)
        if self.line:
            self.columns, self.line = json_object(self.line), b""

    def to_prompt(self, prompt_id: str, names: list[str]) -> Prompt:
        """The prompt with the columns `names`, None where this row does not have one."""
        columns = {name: self.columns.get(name) for name in names}
        return Prompt(prompt_id, self.messages, self.token_ids, columns, self.opens_think)


def json_object(line: bytes) -> dict[str, Any]:
    """The columns of a row that is a line of JSON.

    Raises:
        BadRow: the line holds another value.
    """
    # Without the line's end: an error there would count as one of the next line.
    value = parse_json(line.rstrip(b"\r\n"))
    if not isinstance(value, dict):
        raise BadRow(not_an_object(value))
    return value


def not_an_object(value: Any) -> str:
    """The problem of a row that is another JSON value."""
    return f"expected a JSON object, found {value!r:.80}"
