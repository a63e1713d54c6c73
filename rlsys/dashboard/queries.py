"""What may be asked: the parameters of each address of the API, with their bounds."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MAX_POINTS = 20_000
MAX_ROWS = 1_000
"""Completions of one answer."""
MAX_TEXT = 1 << 20
"""Bytes of a log in one answer."""

Split = Literal["train", "eval", "filtered"]
"""Kinds of completions: trained on, held out, left out by dynamic sampling."""
Asked = TypeVar("Asked", bound="Query")
Names = Annotated[
    list[str],
    BeforeValidator(lambda text: [name for name in text.split(",") if name]),
]
"""Names with commas between them."""


class Query(BaseModel):
    """The parameters of one address. Others are refused, so that a typo does not pass silently."""

    model_config = ConfigDict(extra="forbid")


class NoQuery(Query):
    """Nothing may be asked."""


class MetricsQuery(Query):
    """Of `metrics`."""

    names: Names
    after: int | None = None
    """Only later steps."""
    before: int | None = None
    """Only this step and earlier ones."""
    points: Annotated[int, Field(ge=2, le=MAX_POINTS)] = 2000


class ConfigQuery(Query):
    """Of `config`."""

    runs: Names


class CompletionsQuery(Query):
    """Of `completions`."""

    where: str | None = None
    """A condition in SQL over the columns: `reward > 0 AND num_tokens < 100`."""
    grep: str | None = None
    sort: str | None = None
    descending: bool = True
    from_step: int | None = None
    to_step: int | None = None
    """Inclusive."""
    split: Split = "train"
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 100


class CompletionQuery(Query):
    """Of `completion`."""

    split: Split = "train"


class HistoryQuery(CompletionQuery):
    """Of `history`."""

    prompt: str
    """A `prompt_id`."""
    limit: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 400


class TimelineQuery(Query):
    """Of `timeline`: a range of time, or of steps; without one the newest steps."""

    start: Annotated[float | None, Field(alias="from")] = None
    """Unix seconds."""
    end: Annotated[float | None, Field(alias="to")] = None
    from_step: int | None = None
    to_step: int | None = None
    points: Annotated[int, Field(ge=1, le=MAX_POINTS)] = 2000
    """The most spans of one answer."""

    @model_validator(mode="after")
    def _one_kind_of_range(self) -> Self:
        by_time = self.start is not None or self.end is not None
        if by_time and (self.from_step is not None or self.to_step is not None):
            raise ValueError("give from and to, or from_step and to_step")
        return self


class LogsQuery(Query):
    """Of `logs`: without a name, which logs there are."""

    name: str | None = None
    offset: Annotated[int | None, Field(ge=0)] = None
    """The first byte; without it, the end of the log."""


def parse(kind: type[Asked], parameters: dict[str, str]) -> Asked:
    """The parameters of an address, checked.

    Raises:
        ValueError: one is unknown, missing or out of its bounds; the text names all of them.
    """
    try:
        return kind.model_validate(parameters)
    except ValidationError as error:
        allowed = sorted(field.alias or name for name, field in kind.model_fields.items())
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'parameters'}: {_text(e['msg'])}"
            for e in error.errors()
        ]
        raise ValueError(
            f"{'; '.join(problems)}. Parameters: {', '.join(allowed) or 'none'}"
        ) from None


def _text(message: str) -> str:
    return message.replace("Extra inputs are not permitted", "unknown").removeprefix(
        "Value error, "
    )
