"""The completions of a file, grouped by their prompts, for `rlsys rewards try`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config import DataConfig
from rlsys.data.formats import parse_row
from rlsys.data.render import Renderer
from rlsys.data.row import Row
from rlsys.data.sources import Split, open_sources, raise_if_any
from rlsys.data.text_files import read_file
from rlsys.json_text import BadRow
from rlsys.problems import Problem
from rlsys.tracking.completions import ABOUT_COMPLETION
from rlsys.types import Completion, Message, Prompt, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION_KEYS = ("completion", "completions", "text")
_MAX_ROW_MB = 64


@dataclass(frozen=True, slots=True)
class RowSources:
    """Where the prompts and the tokens of completions come from."""

    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    """By prompt_id; empty: the rows have their own."""
    by_place: Sequence[Prompt] = ()
    """The prompts of rows without prompt_id, by the row's place; empty: they have their own."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None: a completion has as many tokens as its row says, or as it has words."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """As of data.chat_template_kwargs."""


def read_groups(path: Path, sources: RowSources, limit: int | None) -> list[RolloutGroup]:
    """The first `limit` completions, grouped by their prompts.

    A row of the file is an object with `completion` or `text` (a text, or messages as TRL has
    them) or `completions` (a list of these). Its prompt and columns are those of the dataset's row
    that `prompt_id` names, or of the row at the same place, or its own.

    One group are the rows of one `prompt_id`; without it, rows that follow each other and have
    the same prompt and columns. A row without a prompt is a group of its own.

    Raises:
        ValueError: a row that is something else.
    """
    found: dict[str, tuple[Prompt, list[Completion]]] = {}
    before: Prompt | None = None
    count = 0
    for raw in read_file(path, max_row_mb=_MAX_ROW_MB):
        try:
            raw.read()
            row = raw.columns
            texts = _texts(row)
            prompt = _prompt_of(row, raw.number, sources, before)
            first, completions = found.setdefault(prompt.prompt_id, (prompt, []))
            _check_same(first, prompt)
        except ValueError as error:
            raise ValueError(f"{path}, {raw.place}: {error}") from None
        before = prompt if row.get("prompt_id") is None else None
        for text in texts:
            if limit is None or count < limit:
                completions.append(_completion(text, row, sources.tokenizer))
                count += 1
    if not count:
        raise ValueError(f"{path} holds no completions")
    return [
        RolloutGroup(group_id, prompt, completions)
        for group_id, (prompt, completions) in enumerate(_rendered(found.values(), sources))
        if completions
    ]


def _rendered(
    groups: Iterable[tuple[Prompt, list[Completion]]], sources: RowSources
) -> Iterator[tuple[Prompt, list[Completion]]]:
    """The groups; a prompt that the chat template can render says whether it opens <think>."""
    if sources.tokenizer is None or sources.tokenizer.chat_template is None:
        yield from groups
        return
    renderer = Renderer(sources.tokenizer, sources.template_kwargs)
    for prompt, completions in groups:
        if completions and prompt.messages and not prompt.token_ids:
            row = Row(1, prompt.prompt_id, prompt.columns | {"messages": prompt.messages})
            parse_row(row, system=None)
            renderer.render([row])
            if not row.problem:
                prompt = replace(prompt, token_ids=row.token_ids, opens_think=row.opens_think)
        yield prompt, completions


def prompt_ids(path: Path) -> set[str]:
    """Those that the rows of a file name.

    Raises:
        ValueError: it is no file.
    """
    if not path.exists() or path.is_dir():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"--completions {path} {kind}; name a JSONL file")
    found = set()
    for raw in read_file(path, max_row_mb=_MAX_ROW_MB):
        try:
            raw.read()
            found.add(raw.columns.get("prompt_id"))
        except BadRow:
            continue  # `read_groups` says so
    return {str(name) for name in found if name is not None}


def prompts_of(
    config: DataConfig,
    split: Split = "train",
    wanted: set[str] | None = None,
    *,
    need_prompt: bool = True,
) -> dict[str, Prompt]:
    """The dataset's prompts by id, without their tokens.

    Args:
        config: the datasets and what to do with their rows.
        split: which of them.
        wanted: ids to look for; None takes all.
        need_prompt: whether a row without a prompt is an error; else its `messages` are empty.

    Raises:
        ValueError: a dataset or a row that cannot be used.
    """
    problems: list[Problem] = []
    prompts: dict[str, Prompt] = {}
    for source in open_sources(config, split, problems):
        for row in source.rows():
            prompt_id = source.prompt_id(row)
            if wanted is not None and prompt_id not in wanted:
                if wanted <= prompts.keys():
                    break
                continue
            source.parse(row, need_prompt=need_prompt)
            if row.problem:
                problems.append(Problem(f"{row.place}: {row.problem}"))
            elif not row.dropped:
                prompts[prompt_id] = row.to_prompt(prompt_id, list(row.columns))
    raise_if_any(problems)
    return prompts


def _texts(row: dict[str, Any]) -> list[str]:
    key = next((key for key in COMPLETION_KEYS if key in row), None)
    if key is None:
        raise ValueError(
            f"expected one of {', '.join(COMPLETION_KEYS)}, found {', '.join(row) or 'nothing'}"
        )
    given = row[key] if key == "completions" else [row[key]]
    if isinstance(given, str) or not isinstance(given, list):
        raise ValueError(f"completions should be a list of texts, not {given!r:.80}")
    return [_text(value) for value in given]


def _text(value: Any) -> str:
    """A text, also out of messages."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise ValueError(f"a completion should be a text, not {value!r:.80}")
    return value


def _prompt_of(
    row: dict[str, Any], number: int, sources: RowSources, before: Prompt | None
) -> Prompt:
    """`before` is the prompt of the row above, if that has no prompt_id."""
    prompt_id = row.get("prompt_id")
    if prompt_id is not None and sources.prompts:
        if prompt_id not in sources.prompts:
            raise ValueError(
                f"the dataset has no prompt_id {prompt_id!r}; its first is "
                f"{next(iter(sources.prompts))!r}"
            )
        return sources.prompts[prompt_id]
    if prompt_id is None and sources.by_place:
        if number > len(sources.by_place):
            raise ValueError(
                f"the dataset has only {len(sources.by_place)} rows. Rows without prompt_id belong "
                "to the dataset's row at the same place"
            )
        return sources.by_place[number - 1]
    about = {*COMPLETION_KEYS, *ABOUT_COMPLETION, *row.get("extra_columns", ())}
    messages, columns = _own_prompt({name: v for name, v in row.items() if name not in about})
    prompt = Prompt(f"row {number}" if prompt_id is None else str(prompt_id), messages, [], columns)
    if prompt_id is None and before and messages and not _differences(before, prompt):
        return before
    return prompt


def _check_same(first: Prompt, second: Prompt) -> None:
    """Whether rows of one prompt_id agree: all are scored with the columns of the first.

    Raises:
        ValueError: they do not.
    """
    if differing := _differences(first, second):
        raise ValueError(
            f"prompt_id {second.prompt_id!r} stood in an earlier row with another "
            f"{', '.join(differing)}. Give each prompt an id of its own, or leave prompt_id out"
        )


def _differences(first: Prompt, second: Prompt) -> list[str]:
    """The columns in which two prompts differ, `prompt` for their messages."""
    earlier, later = ({"prompt": p.messages} | p.columns for p in (first, second))
    return [
        name
        for name in earlier | later
        # As text, because NaN is not equal to itself.
        if repr(earlier.get(name)) != repr(later.get(name))
    ]


def _own_prompt(values: dict[str, Any]) -> tuple[list[Message], dict[str, Any]]:
    if not {"prompt", "messages"} & set(values):
        return [], values
    row = Row(1, "", values)
    parse_row(row, system=None)
    return row.messages, row.columns


def _completion(
    text: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> Completion:
    reason, num_tokens = row.get("finish_reason", "stop"), row.get("num_tokens")
    if tokenizer is None:
        return Completion(list(range(num_tokens or len(text.split()))), [], text, reason, ())
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    # The token that ended it is not in the text.
    if reason == "stop" and num_tokens == len(ids) + 1 and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Completion(ids, [], text, reason, ())
