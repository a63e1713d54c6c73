"""The completions of a file, grouped by their prompts, for `rlsys rewards try`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config import DataConfig
from rlsys.data.formats import parse_row
from rlsys.data.render import Renderer
from rlsys.data.row import Row
from rlsys.data.sources import PromptSource, Split, open_sources, raise_if_any
from rlsys.data.text_files import read_file
from rlsys.problems import Problem
from rlsys.rotation import parts
from rlsys.tracking.completions import ABOUT_COMPLETION, is_count
from rlsys.types import Completion, Prompt, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION_KEYS = ("completion", "completions", "text")
MAX_TOKENS = 10**7
"""No model writes a longer completion."""
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


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of completions, and of its older parts before them.

    Raises:
        ValueError: it is not a file, or a row is not a JSON object.
    """
    if not path.exists() or path.is_dir():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"--completions {path} {kind}; name a JSONL file")
    rows = []
    for part in parts(path):
        for row in read_file(part, max_row_mb=_MAX_ROW_MB):
            row.location = f"{part}, {row.location}"
            rows.append(row)
    for row in rows:
        try:
            row.read()
        except ValueError as error:
            raise ValueError(f"{row.location}: {error}") from None
    return rows


def group_rows(
    rows: Sequence[Row],
    sources: RowSources,
    limit: int | None,
    template_kwargs: Mapping[str, Any],
) -> list[RolloutGroup]:
    """The first `limit` completions, grouped by their prompts.

    A row has a `completion` or `text` (a text, or messages as TRL has them) or `completions` (a
    list of these). Its prompt and columns come from the dataset's row that `prompt_id` names,
    or the row in the same position, or itself.

    Rows of one `prompt_id` are a group; without it, rows that follow each other and have the same
    prompt and columns. A row without a prompt is a group of its own.

    Raises:
        ValueError: a row that is something else.
    """
    found: dict[str, tuple[Prompt, list[Completion]]] = {}
    before: Prompt | None = None
    left = sys.maxsize if limit is None else limit
    for row in rows:
        try:
            texts = _texts(row.columns)
            prompt = _prompt_of(row.columns, row.number, sources, before)
            first, completions = found.setdefault(prompt.prompt_id, (prompt, []))
            if differing := _differences(first, prompt):
                raise ValueError(
                    f"prompt_id {prompt.prompt_id!r} stood in an earlier row with another "
                    f"{', '.join(differing)}. Give each prompt an id of its own, or leave "
                    "prompt_id out"
                )
            completions += [_completion(t, row.columns, sources.tokenizer) for t in texts[:left]]
        except ValueError as error:
            raise ValueError(f"{row.location}: {error}") from None
        before = prompt if row.columns.get("prompt_id") is None else None
        left -= len(texts[:left])
    groups = [(prompt, completions) for prompt, completions in found.values() if completions]
    if sources.tokenizer is not None and sources.tokenizer.chat_template is not None:
        renderer = Renderer(sources.tokenizer, template_kwargs)
        groups = [(_rendered(prompt, renderer), completions) for prompt, completions in groups]
    return [RolloutGroup(i, prompt, completions) for i, (prompt, completions) in enumerate(groups)]


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
        split: which datasets.
        wanted: ids to look for; None takes all.
        need_prompt: whether a row without a prompt is an error; else its `messages` are empty.

    Raises:
        ValueError: a dataset or a row that cannot be used.
    """
    problems: list[Problem] = []
    prompts: dict[str, Prompt] = {}
    for source in open_sources(PromptSource, config, split, problems):
        for row in source.rows():
            prompt_id = source.row_id(row)
            if wanted is not None and prompt_id not in wanted:
                if wanted <= prompts.keys():
                    break
                continue
            source.parse(row, need_prompt=need_prompt)
            if row.problem:
                problems.append(Problem(f"{row.location}: {row.problem}"))
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
    if not isinstance(given, list):
        raise ValueError(f"completions should be a list of texts, not {given!r:.80}")
    texts = [v[-1].get("content") if _are_messages(v) else v for v in given]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a completion should be a text, not {text!r:.80}")
    return texts


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[-1], dict)


def _prompt_of(
    row: dict[str, Any], number: int, sources: RowSources, before: Prompt | None
) -> Prompt:
    """`before` is the prompt of the row above, if that has no prompt_id."""
    prompt_id = row.get("prompt_id")
    if prompt_id is not None and not isinstance(prompt_id, str | int):
        raise ValueError(f"prompt_id should be a text, not {prompt_id!r:.80}")
    if prompt_id is not None and sources.prompts:
        if str(prompt_id) not in sources.prompts:
            raise ValueError(
                f"the dataset has no prompt_id {prompt_id!r}; its first is "
                f"{next(iter(sources.prompts))!r}"
            )
        return sources.prompts[str(prompt_id)]
    if prompt_id is None and sources.by_place:
        if number > len(sources.by_place):
            raise ValueError(
                f"the dataset has only {len(sources.by_place)} rows. Rows without prompt_id belong "
                "to the dataset's row at the same place"
            )
        return sources.by_place[number - 1]
    extra = row.get("extra_columns") or []
    if not isinstance(extra, list) or not all(isinstance(name, str) for name in extra):
        raise ValueError(f"extra_columns should be a list of names, not {extra!r:.80}")
    about = {*COMPLETION_KEYS, *ABOUT_COMPLETION, *extra}
    own = Row(number, "", {name: value for name, value in row.items() if name not in about})
    if {"prompt", "messages"} & set(own.columns):
        parse_row(own, system=None)
    name = f"row {number}" if prompt_id is None else str(prompt_id)
    prompt = Prompt(name, own.messages, [], own.columns)
    if prompt_id is None and before and prompt.messages and not _differences(before, prompt):
        return before
    return prompt


def _differences(first: Prompt, second: Prompt) -> list[str]:
    """The columns in which two prompts differ, `prompt` for their messages."""
    earlier, later = ({"prompt": p.messages} | p.columns for p in (first, second))
    # Compared as text, because NaN is not equal to itself.
    return [n for n in earlier | later if repr(earlier.get(n)) != repr(later.get(n))]


def _rendered(prompt: Prompt, renderer: Renderer) -> Prompt:
    """The prompt with its tokens, which show whether it opens <think>, if it can be rendered."""
    if not prompt.messages or prompt.token_ids:
        return prompt
    row = Row(1, prompt.prompt_id, prompt.columns | {"messages": prompt.messages})
    parse_row(row, system=None)
    renderer.render([row])
    if row.problem:
        return prompt
    return replace(prompt, token_ids=row.token_ids, opens_think=row.opens_think)


def _completion(
    text: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> Completion:
    reason, num_tokens = row.get("finish_reason", "stop"), row.get("num_tokens")
    if num_tokens is not None and not (is_count(num_tokens) and num_tokens <= MAX_TOKENS):
        raise ValueError(f"num_tokens should be a number of tokens, not {num_tokens!r:.40}")
    if tokenizer is None:
        return Completion(list(range(num_tokens or len(text.split()))), [], text, reason, ())
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    # The text lacks the token that ended it.
    if reason == "stop" and num_tokens == len(ids) + 1 and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Completion(ids, [], text, reason, ())
