"""`rlsys rewards try`: scores completions of a file, without a model and without Ray."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.config import DataConfig, RewardConfig
from rlsys.data.readers import BadRow, read_file
from rlsys.data.rows import parse_row
from rlsys.data.sources import Problems, open_sources
from rlsys.data.spec import is_no_hub_id
from rlsys.registry import did_you_mean
from rlsys.rewards import check_names_and_weights, load_plugins, settings_of
from rlsys.rewards.local import LocalBackend
from rlsys.rewards.pool import RewardPool
from rlsys.rewards.runner import process_settings
from rlsys.tracking.completions import ABOUT_COMPLETION, last_user_message
from rlsys.tracking.printable import printable
from rlsys.types import Completion, Message, Prompt, RolloutGroup
from rlsys.yaml_text import load_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION_KEYS = ("completion", "completions", "text")
EXCERPT = 60
"""Characters of prompt and completion that the table shows."""


@dataclass(frozen=True, slots=True)
class TryOptions:
    """What the command line asks for."""

    names: list[str]
    completions: Path
    dataset: list[str]
    """Where the columns come from; empty: from the file of completions."""
    plugins: list[str]
    params: dict[str, dict[str, Any]]
    timeout_s: float
    limit: int | None
    """Score so many completions; None is all."""
    tokenizer: str | None
    """Of completion_ids; without one, a completion has as many as its row says, or as words."""


def try_rewards(options: TryOptions, console: Console) -> bool:
    """Score the completions in killable processes and print a table.

    Returns:
        whether no function failed on any completion.

    Raises:
        ValueError: a function, its settings or a row that cannot be used.
        RewardCodeError: a class that cannot be instantiated.
    """
    config = _config(options)
    load_plugins(options.plugins)
    check_names_and_weights(options.names, None)
    for name in options.params:
        if name not in options.names:
            raise ValueError(
                f"--params has settings for {name!r}, which is not tried."
                f"{did_you_mean(name, options.names)} Tried: {', '.join(options.names)}"
            )
    for name in options.names:
        settings_of(name, config.params.get(name, {}), {})
    groups = read_groups(options)
    pool = RewardPool(config, LocalBackend(process_settings(config, {})), in_run=False)
    try:
        scored = _score(pool, groups)
    finally:
        pool.close()
    _print_table(scored, options.names, console)
    _print_summary(scored, options.names, pool.seconds, console)
    return not any(reward.failures for group in scored for reward in group.rewards)


def parse_params(text: str) -> dict[str, dict[str, Any]]:
    """What `--params` says: settings by reward function.

    Raises:
        ValueError: it is something else.
    """
    try:
        params = load_yaml(text)
    except yaml.YAMLError as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
        raise ValueError(
            f"--params {text!r} is not YAML: {reason or ' '.join(str(error).split())}"
        ) from None
    if not isinstance(params, dict) or not all(
        isinstance(name, str) and isinstance(settings, dict) for name, settings in params.items()
    ):
        raise ValueError(
            f"--params {text!r} should be settings by reward function, such as "
            "'{format: {SETTING: VALUE}}'"
        )
    return params


def _config(options: TryOptions) -> RewardConfig:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit} should be 1 or more")
    try:
        return RewardConfig(
            reward_funcs=options.names,
            reward_params=options.params,
            external_plugins=options.plugins,
            timeout_s=options.timeout_s,
            on_error="zero",  # so that all are scored
        )
    except ValidationError as error:
        detail = error.errors()[0]
        option = ".".join(map(str, detail["loc"]))
        rule = detail["msg"].replace("Input should", "should")
        raise ValueError(f"--{option} {detail['input']!r} {rule}") from None


def _score(pool: RewardPool, groups: list[RolloutGroup]) -> list[RolloutGroup]:
    for group in groups:
        pool.submit(group)
    scored: list[RolloutGroup] = []
    while pool.num_pending:
        pool.wait(0.2)
        scored += pool.collect()
    return sorted(scored, key=lambda group: group.group_id)


# --- rows ----------------------------------------------------------------------------------------


def read_groups(options: TryOptions) -> list[RolloutGroup]:
    """The completions, grouped by their prompts.

    A row of the file is an object with `completion` or `text` (a text, or messages as TRL has
    them) or `completions` (a list of these). Its prompt and columns are the row's own, or with a
    dataset those of the row that `prompt_id` names, or else of the row at the same place.

    One group are the rows of one `prompt_id`; without it, rows that follow each other and have
    the same prompt and columns. A row without a prompt is a group of its own.

    Raises:
        ValueError: a row that is something else.
    """
    if not options.completions.exists() or options.completions.is_dir():
        kind = "is a folder" if options.completions.is_dir() else "does not exist"
        raise ValueError(f"--completions {options.completions} {kind}; name a JSONL file")
    tokenizer = _tokenizer(options.tokenizer)
    prompts = _prompts(options.dataset)
    places = list(prompts.values())
    found: dict[str, tuple[Prompt, list[Completion]]] = {}
    before: Prompt | None = None
    count = 0
    for raw in read_file(options.completions, max_row_mb=64):
        where = f"{options.completions}, {raw.place}"
        try:
            row = raw.values()
            texts = _texts(row)
            prompt = _prompt_of(row, raw.number, prompts, places, before)
            first, completions = found.setdefault(prompt.prompt_id, (prompt, []))
            _check_same(first, prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        before = prompt if row.get("prompt_id") is None else None
        for text in texts:
            if options.limit is None or count < options.limit:
                completions.append(_completion(text, row, tokenizer))
                count += 1
    if not count:
        raise ValueError(f"{options.completions} holds no completions")
    return [
        RolloutGroup(group_id, prompt, completions)
        for group_id, (prompt, completions) in enumerate(found.values())
        if completions
    ]


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
    row: dict[str, Any],
    number: int,
    prompts: dict[str, Prompt],
    places: list[Prompt],
    before: Prompt | None,
) -> Prompt:
    """`before` is the prompt of the row above, if that has no prompt_id."""
    prompt_id = row.get("prompt_id")
    if not prompts:
        about = {*COMPLETION_KEYS, *ABOUT_COMPLETION}
        rest = {name: value for name, value in row.items() if name not in about}
        messages, columns = _own_prompt(rest)
        prompt = Prompt(
            f"row {number}" if prompt_id is None else str(prompt_id), messages, [], columns
        )
        if prompt_id is None and before and messages and not _differences(before, prompt):
            return before
        return prompt
    if prompt_id is None:
        if number > len(places):
            raise ValueError(
                f"the dataset has only {len(places)} rows. Rows without prompt_id belong to the "
                "dataset's row at the same place"
            )
        return places[number - 1]
    if prompt_id not in prompts:
        raise ValueError(
            f"the dataset has no prompt_id {prompt_id!r}; its first is {next(iter(prompts))!r}"
        )
    return prompts[prompt_id]


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
    parsed = parse_row(values, system=None)
    return parsed.messages, parsed.columns


def _prompts(dataset: list[str]) -> dict[str, Prompt]:
    """The dataset's prompts by id, without their tokens."""
    if not dataset:
        return {}
    problems = Problems()
    prompts: dict[str, Prompt] = {}
    for source in open_sources(DataConfig(dataset=dataset), "train", problems):
        for raw in source.raw_rows():
            try:
                parsed = source.understand(raw)
            except BadRow as error:
                problems.add(f"{source.where(raw)}: {error}")
                continue
            assert parsed is not None, "without a preprocessor every row is kept"
            prompt_id = source.prompt_id(raw)
            prompts[prompt_id] = Prompt(prompt_id, parsed.messages, [], parsed.columns)
    problems.raise_if_any()
    return prompts


def _tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    if is_no_hub_id(name) and not Path(name).is_dir():
        raise ValueError(f"--tokenizer {name} should be a model folder or hub id, and is no folder")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--tokenizer {name} cannot be loaded: {reason}") from None


def _completion(
    text: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> Completion:
    if tokenizer is not None:
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = list(range(row.get("num_tokens") or len(text.split())))
    return Completion(ids, [], text, row.get("finish_reason", "stop"), ())


# --- tables --------------------------------------------------------------------------------------


def _print_table(groups: list[RolloutGroup], names: Sequence[str], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=EXCERPT)
    table.add_column("completion", no_wrap=True, overflow="ellipsis", max_width=EXCERPT)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for group in groups:
        asked = last_user_message(group.prompt.messages) if group.prompt.messages else ""
        for index, cells in enumerate(_cells(group, names)):
            first = _excerpt(asked or group.prompt.prompt_id) if index == 0 else ""
            table.add_row(Text(first), Text(_excerpt(group.completions[index].text)), *cells)
    console.print(table)


def _cells(group: RolloutGroup, names: Sequence[str]) -> Iterator[list[Text]]:
    for reward in group.rewards:
        yield [
            Text(reward.failures[name], style="bold red")
            if name in reward.failures
            else Text(_value(reward.by_name[name]))
            for name in names
        ]


def _excerpt(text: str) -> str:
    """On one line, the end of it, where answers stand, when it is long."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= EXCERPT else f"...{line[3 - EXCERPT :]}"


def _value(value: float) -> str:
    return "None" if math.isnan(value) else f"{value:.4g}"


def _print_summary(
    groups: list[RolloutGroup], names: Sequence[str], seconds: dict[str, float], console: Console
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("function")
    for header in ("mean", "std", "None", "failed", "ms a completion"):
        table.add_column(header, justify="right")
    rewards = [reward for group in groups for reward in group.rewards]
    for name in names:
        failures = Counter(r.failures[name] for r in rewards if name in r.failures)
        own = [r.by_name[name] for r in rewards if name not in r.failures]
        values = [value for value in own if not math.isnan(value)]
        failed = ", ".join(f"{count} {kind}" for kind, count in failures.items()) or "0"
        time = f"{1000 * seconds[name] / len(own):.3g}" if own else "-"
        mean = f"{statistics.fmean(values):.4g}" if values else "-"
        std = f"{statistics.stdev(values):.4g}" if len(values) > 1 else "-"
        table.add_row(name, mean, std, str(len(own) - len(values)), failed, time)
    console.print()
    console.print(table)
    for name in dict.fromkeys(name for reward in rewards for name in reward.metrics):
        logged = [reward.metrics[name] for reward in rewards if name in reward.metrics]
        console.print(Text(f"metric {name}: {statistics.fmean(logged):.4g}"))
    for name in dict.fromkeys(name for reward in rewards for name in reward.extra):
        shown = next(reward.extra[name] for reward in rewards if name in reward.extra)
        console.print(Text(f"column {name} of completions.jsonl: {shown!r:.80}, ..."))
