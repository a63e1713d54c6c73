"""From dataset rows to prompts ready to sample from.

A row holds `messages` (chat turns that end with the user's) or `prompt` (a text, or such turns as
TRL has them). Its other columns travel with the prompt to the reward functions, unchanged.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from rlsys.config import DataConfig
from rlsys.rewards import OWN_COLUMNS
from rlsys.types import Message, Prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
MAX_PROBLEMS_SHOWN = 5
"""Bad rows that one error lists."""
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class PromptData:
    """The prompts of a run."""

    train: list[Prompt]
    """In the order of the files."""
    validation: list[Prompt]
    """Held out, at most max_eval_prompts; empty when nothing is evaluated."""
    num_dropped: int
    """Rows left out of either because their prompt is over max_prompt_length."""


@dataclass(frozen=True, slots=True)
class _Row:
    source: str
    """The dataset as it stands in the config."""
    number: int
    """From 1, the line of a JSONL file without blank lines."""
    prompt_id: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"


def load_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PromptData:
    """Read the datasets, render the chat template once, drop what is too long, split.

    `prompt_id` is the name of the file (or of the hub's dataset) and the row counted from 1, as
    in "train:17".

    Raises:
        ValueError: a dataset that is not there, cannot be read, has neither `messages` nor
            `prompt`, or whose rows are not what they should be (several are listed at once); a
            tokenizer without chat template; no prompt short enough.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so messages cannot "
            "be rendered. Take an instruct model, or save a chat_template with the tokenizer."
        )
    train, num_dropped = _prompts(config.dataset, "train", config, tokenizer)
    if config.val_dataset:
        validation, more_dropped = _prompts(config.val_dataset, "validation", config, tokenizer)
        num_dropped += more_dropped
        if _texts(validation) <= _texts(train):
            raise ValueError(
                f"every prompt of data.val_dataset ({', '.join(config.val_dataset)}) is in the "
                "training data too. Leave val_dataset empty and set split_dataset_ratio."
            )
    else:
        train, validation = split_prompts(train, config.split_dataset_ratio, seed=seed)
    return PromptData(train, validation[: config.max_eval_prompts], num_dropped)


def split_prompts(
    prompts: list[Prompt], ratio: float, *, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """`prompts` as (train, validation), each in the order given; validation holds `ratio` of them.

    Rows with the same rendered prompt stay together, so nothing that is evaluated was trained on.

    Raises:
        ValueError: one of the two would be empty.
    """
    if ratio == 0.0:
        return prompts, []
    wanted = max(1, round(ratio * len(prompts)))
    texts = Counter(tuple(prompt.token_ids) for prompt in prompts)
    order = list(texts)
    random.Random(seed).shuffle(order)
    held_out: set[tuple[int, ...]] = set()
    num_held_out = 0
    while num_held_out < wanted and order:
        text = order.pop()
        held_out.add(text)
        num_held_out += texts[text]
    if not order:
        raise ValueError(
            f"data.split_dataset_ratio = {ratio} leaves nothing to train on: {len(prompts)} rows "
            f"hold {len(texts)} different prompts. Give more rows or a val_dataset."
        )
    return (
        [prompt for prompt in prompts if tuple(prompt.token_ids) not in held_out],
        [prompt for prompt in prompts if tuple(prompt.token_ids) in held_out],
    )


def _texts(prompts: list[Prompt]) -> set[tuple[int, ...]]:
    return {tuple(prompt.token_ids) for prompt in prompts}


def _prompts(
    sources: list[str], split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], int]:
    """The prompts of `sources` that are short enough, and how many are not."""
    prompts: list[Prompt] = []
    problems: list[str] = []
    lengths: list[int] = []
    for row in _rows(sources, split):
        try:
            prompt = _render(row, config.system, tokenizer)
        except ValueError as error:
            problems.append(f"  {row}: {error}")
            if len(problems) > MAX_PROBLEMS_SHOWN:
                problems[-1] = "  ... and maybe more"
                break
            continue
        lengths.append(len(prompt.token_ids))
        if lengths[-1] <= config.max_prompt_length:
            prompts.append(prompt)
    if problems:
        raise ValueError("\n".join(["some rows of the data cannot be used:", *problems]))
    if not prompts:
        raise ValueError(
            f"every prompt of {', '.join(sources)} is over data.max_prompt_length = "
            f"{config.max_prompt_length} tokens: the {len(lengths)} rows have {min(lengths)} to "
            f"{max(lengths)}. Raise it."
        )
    return prompts, len(lengths) - len(prompts)


def _render(row: _Row, system: str | None, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    messages = _messages(row.values)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    token_ids = render_prompt(messages, tokenizer)
    used = "messages" if row.values.get("messages") is not None else "prompt"
    columns = {k: value for k, value in row.values.items() if k not in (used, "messages")}
    return Prompt(row.prompt_id, messages, token_ids, columns)


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the rendered chat template, generation prompt included.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        # Tokenised here and only here: templates write BOS themselves, a second pass through the
        # tokenizer would add another.
        token_ids: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
    return token_ids


def _messages(values: dict[str, Any]) -> list[Message]:
    """The chat turns of a row, checked."""
    given = values.get("messages")
    if given is None:
        given = values.get("prompt")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError(f"expected a list of messages or a prompt, found {given!r:.80}")
    messages: list[Message] = []
    for turn in given:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise ValueError(
                f"a message is {{'role': one of {', '.join(ROLES)}, 'content': text}}, "
                f"found {turn!r:.80}"
            )
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            raise ValueError(f"the {turn['role']} message has no text: {turn!r:.80}")
        # Parquet gives every message the keys of all, None where it has none.
        messages.append({key: value for key, value in turn.items() if value is not None})
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"the messages end with a turn of {messages[-1]['role']!r}; they must end with the "
            "user's, which the model is to answer. Move an answer to a column of its own"
        )
    return messages


def _rows(sources: list[str], split: str) -> Iterator[_Row]:
    if len(set(sources)) != len(sources):
        raise ValueError(f"a dataset is listed twice: {', '.join(sources)}")
    stems = [Path(source).stem for source in sources]
    for source, stem in zip(sources, stems, strict=True):
        # Two files of one name are told apart by their whole path.
        prefix = stem if stems.count(stem) == 1 else source
        values = _read(source, split)
        columns = _columns(source, values)
        for number, row in enumerate(values, start=1):
            complete = {name: row.get(name) for name in columns}
            yield _Row(source, number, f"{prefix}:{number}", complete)


def _columns(source: str, rows: list[dict[str, Any]] | Dataset) -> list[str]:
    """The columns of a dataset: all that any row has, as a reward sees None where it has none."""
    if isinstance(rows, list):
        columns = list(dict.fromkeys(name for row in rows for name in row))
    else:
        columns = rows.column_names
    found = f"It has the columns: {', '.join(columns) or 'none'}."
    if not len(rows):
        raise ValueError(f"dataset {source!r} has no rows.")
    if not {"messages", "prompt"} & set(columns):
        raise ValueError(f"dataset {source!r} has neither 'messages' nor 'prompt'. {found}")
    reserved = sorted(set(columns) & set(OWN_COLUMNS) - {"messages"})
    if reserved:
        raise ValueError(
            f"dataset {source!r} has the column {reserved[0]!r}, a name under which reward "
            f"functions get something else. Rename it. {found}"
        )
    return columns


def _read(source: str, split: str) -> list[dict[str, Any]] | Dataset:
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix in FILE_SUFFIXES or path.is_absolute() or source.startswith((".", "~")):
            raise ValueError(
                f"dataset {source!r} does not exist (looked for {path.resolve()}). Relative paths "
                "start at the working directory."
            )
        return _read_hub(source, split)
    if path.is_dir():
        return _read_hub(str(path), split)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in FILE_SUFFIXES:
        return _read_json(path)
    raise ValueError(f"dataset {source!r} must be a file in {', '.join(FILE_SUFFIXES)}")


def _read_json(path: Path) -> list[dict[str, Any]]:
    """JSON Lines, or one JSON list of rows.

    Not through `datasets`, whose JSON reader turns a text such as "2024-01-31" into a datetime and
    an integer among floats into a float, and cannot name the line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = _parse(text, str(path))
    else:
        rows = [
            _parse(line, f"{path}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, found {row!r:.80}")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _read_parquet(path: Path) -> Dataset:
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a Parquet file: {error.__cause__ or error}") from error


def _read_hub(source: str, split: str) -> Dataset:
    """A split of a dataset of the Hugging Face hub, or of a folder laid out like one."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        splits = datasets.load_dataset(source)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"dataset {source!r} is no file here, and could not be loaded as a dataset of the "
            f"Hugging Face hub: {error}"
        ) from error
    wanted = ["train"] if split == "train" else ["validation", "test", "train"]
    for name in wanted:
        if name in splits:
            return splits[name]
    raise ValueError(f"dataset {source!r} has no split {wanted[0]!r}, only {', '.join(splits)}")
