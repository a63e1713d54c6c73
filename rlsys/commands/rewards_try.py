"""`rlsys rewards try`: scores completions of a file, without a model and without Ray."""

from __future__ import annotations

import argparse
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
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rlsys.commands.console import make_console
from rlsys.commands.rewards_try_rows import RowSources, group_rows, prompts_of, read_rows
from rlsys.commands.rewards_try_run import TriedRun, find_run
from rlsys.config import DataConfig, RewardConfig
from rlsys.config.dataset_spec import is_local_path
from rlsys.config.yaml_text import load_yaml
from rlsys.data.preprocess import preprocessors
from rlsys.plugins.load import load_plugins
from rlsys.registry import did_you_mean
from rlsys.rewards import check_functions, settings_of
from rlsys.rewards.pool.scorer import GroupScorer, local_scorer
from rlsys.text import counted
from rlsys.tracking.completions import last_user_message
from rlsys.tracking.printable import printable
from rlsys.types import OPEN_THINK, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXCERPT = 60
"""Characters of prompt and completion that the table shows, where there is space."""
LEAST_TEXT = len("completion")
"""The fewest; with less space the columns are headed by numbers."""


@dataclass(frozen=True, slots=True)
class TryOptions:
    """What the command line asks for."""

    names: list[str]
    """Reward functions; empty: the functions of the run that wrote the completions."""
    completions: Path
    dataset: list[str]
    """Source of the columns; empty: the run's data, or the file of completions."""
    preprocessor: str | None
    """For the rows of `dataset`; None: the run's, if it has one for all rows."""
    plugins: list[str]
    params: dict[str, dict[str, Any]]
    timeout_s: float | None
    """None: the run's, or the default."""
    limit: int | None
    """Number of completions that are scored; None is all."""
    tokenizer: str | None
    """For completion_ids; None: the run's, or the number of tokens in the row."""


def main(args: argparse.Namespace) -> bool:
    """Try reward functions; returns whether none failed."""
    given = ("names", "completions", "dataset", "preprocessor", "timeout_s", "limit", "tokenizer")
    options = TryOptions(
        **{name: getattr(args, name) for name in given},
        plugins=args.external_plugins,
        params=_parse_params(args.params),
    )
    return _try_rewards(options, make_console())


def _try_rewards(options: TryOptions, console: Console) -> bool:
    """Score the completions in the processes of a run and print a table.

    If a run wrote the file, its saved config says what the command line does not.

    Returns:
        whether no function failed on any completion.

    Raises:
        ValueError: a function, its settings or a row that cannot be used.
        RewardCodeError: a class that cannot be instantiated.
    """
    rows = read_rows(options.completions)
    run = find_run(options.completions)
    config = _config(options, run)
    load_plugins(config.external_plugins)
    names = config.reward_funcs
    for name in options.params:
        if name not in names:
            raise ValueError(
                f"--params has settings for {name!r}, which is not tried."
                f"{did_you_mean(name, names)} Tried: {', '.join(names)}"
            )
    check_functions(config)
    known = {} if run is None else run.config.run_values
    template_kwargs = {} if run is None else run.config.data.chat_template_kwargs
    for name in names:
        settings_of(name, config.params.get(name, {}), known)
    ids = {str(i) for row in rows if (i := row.columns.get("prompt_id")) is not None}
    sources = _sources(options, run, ids)
    groups = group_rows(rows, sources, options.limit, template_kwargs)
    if not groups:
        raise ValueError(f"{options.completions} holds no completions")
    if run is not None:
        _print_run(run, console)
    if options.dataset:
        _print_prompt_hint(options.dataset, sources, console)
    if sources.tokenizer is None:
        _print_think_hint(groups, console)
    scorer = local_scorer(config, known, in_run=False)
    try:
        scored = _score(scorer, groups)
    finally:
        scorer.close()
    _print_table(scored, names, console)
    _print_summary(scored, names, scorer.seconds, console)
    return not any(reward.failures for group in scored for reward in group.rewards)


def _parse_params(text: str) -> dict[str, dict[str, Any]]:
    """Settings by reward function, from `--params`.

    Raises:
        ValueError: another form.
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


def _config(options: TryOptions, run: TriedRun | None) -> RewardConfig:
    if options.preprocessor is not None and not options.dataset:
        raise ValueError("--preprocessor is for the rows of --dataset, which is not given")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit} should be 1 or more")
    names = options.names or ([] if run is None else run.config.reward.reward_funcs)
    if not names:
        raise ValueError(
            "name the reward functions to try, as in `rlsys rewards try format --completions "
            f"{options.completions}`"
        )
    params = {} if run is None else run.params(names)
    plugins = [*([] if run is None else run.plugins()), *options.plugins]
    limits: dict[str, Any] = {}
    if run is not None:
        limits = {name: getattr(run.config.reward, name) for name in ("timeout_s", "max_memory_mb")}
    if options.timeout_s is not None:
        limits["timeout_s"] = options.timeout_s
    try:
        return RewardConfig(
            reward_funcs=names,
            reward_params={
                name: params.get(name, {}) | options.params.get(name, {})
                for name in params | options.params
            },
            external_plugins=list(dict.fromkeys(plugins)),
            on_error="zero",  # so that all completions are scored
            **limits,
        )
    except ValidationError as error:
        detail = error.errors()[0]
        option = ".".join(map(str, detail["loc"]))
        rule = detail["msg"].replace("Input should", "should")
        raise ValueError(f"--{option} {detail['input']!r} {rule}") from None


def _sources(options: TryOptions, run: TriedRun | None, ids: set[str]) -> RowSources:
    """The prompts and the tokenizer that the command line names, or else the run's.

    `ids` are the prompt ids in the file of completions.
    """
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    if run is not None and tokenizer is None:
        tokenizer = run.tokenizer()
    if options.dataset:
        data = DataConfig(dataset=options.dataset)
        if run is not None:  # the rows may need what the run did with them
            own = run.config.data
            some = own.preprocessor if len(own.preprocessor) == 1 else []
            data = data.model_copy(update={"columns": own.columns, "preprocessor": some})
        if options.preprocessor is not None:
            data = data.model_copy(update={"preprocessor": [options.preprocessor]})
        prompts = prompts_of(data, need_prompt=False)
        return RowSources(prompts, list(prompts.values()), tokenizer)
    if run is None or not ids:
        return RowSources(tokenizer=tokenizer)
    return run.sources(options.completions, ids, tokenizer)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if is_local_path(name) and not Path(name).is_dir():
        raise ValueError(f"--tokenizer {name} should be a hub id or a model folder that exists")
    from transformers import AutoTokenizer

    from rlsys.model.folder import tokenizer_source

    try:
        return AutoTokenizer.from_pretrained(tokenizer_source(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--tokenizer {name} cannot be loaded: {reason}") from None


def _print_run(run: TriedRun, console: Console) -> None:
    console.print(Text(f"from {run.path}:"))
    for line in run.used:
        console.print(Text(f"  {line}", style="dim"))
    for line in run.missing:
        console.print(Text(f"  not used: {line}", style="yellow"))
    console.print()


def _print_prompt_hint(dataset: list[str], sources: RowSources, console: Console) -> None:
    count = sum(not prompt.messages for prompt in sources.by_place)
    if count:
        known = ", ".join(preprocessors.known())
        line = (
            f"{count:,} of {len(sources.by_place):,} rows of {', '.join(dataset)} have no prompt: "
            "the functions get their columns alone. If a preprocessor makes prompts and columns of "
            f"them, name it with --preprocessor{f' (known: {known})' if known else ''}"
        )
        console.print(Text(line, style="yellow"))


def _print_think_hint(groups: list[RolloutGroup], console: Console) -> None:
    """Only a chat template shows whether prompts open `<think>`."""
    texts = [completion.text for group in groups for completion in group.completions]
    count = sum("</think>" in text and OPEN_THINK not in text for text in texts)
    if count:
        line = (
            f"</think> without <think> in {count:,} of {counted(len(texts), 'completion')}. If "
            "their prompts open it, name the model's folder or hub id with --tokenizer: format "
            "then counts it"
        )
        console.print(Text(line, style="yellow"))


def _score(scorer: GroupScorer, groups: list[RolloutGroup]) -> list[RolloutGroup]:
    for group in groups:
        scorer.submit(group)
    scored: list[RolloutGroup] = []
    while scorer.num_pending:
        scorer.wait(0.2)
        scored += scorer.collect()
    return sorted(scored, key=lambda group: group.ticket)


# --- tables --------------------------------------------------------------------------------------


def _print_table(groups: list[RolloutGroup], names: Sequence[str], console: Console) -> None:
    """Print every score whole; prompts and completions share the rest of the width."""
    rows = [cells for group in groups for cells in _cells(group, names)]
    heads, space = list(names), _text_width(names, rows, console)
    if space < LEAST_TEXT:
        heads = [str(number) for number in range(1, len(names) + 1)]
        space = max(LEAST_TEXT, _text_width(heads, rows, console))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("prompt", "completion"):
        table.add_column(title, no_wrap=True, overflow="ellipsis", max_width=space)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    scores = iter(rows)
    for group in groups:
        asked = last_user_message(group.prompt.messages) if group.prompt.messages else ""
        first = _excerpt(asked or group.prompt.prompt_id, space)
        for completion in group.completions:
            table.add_row(Text(first), Text(_excerpt(completion.text, space)), *next(scores))
            first = ""
    _print_whole(table, console)
    if heads != list(names):
        console.print()
        for head, name in zip(heads, names, strict=True):
            console.print(Text(f"{head}: {name}"), soft_wrap=True)


def _text_width(heads: Sequence[str], rows: list[list[Text]], console: Console) -> int:
    """Characters left for a prompt and for a completion when all scores are whole."""
    columns = zip(map(Text, heads), *rows, strict=True)
    scores = sum(2 + max(cell.cell_len for cell in cells) for cells in columns)
    return min(EXCERPT, (console.width - scores) // 2 - 1)


def _print_whole(table: Table, console: Console) -> None:
    """Print a table that is never narrowed: the lines of a wider one go over the console's end."""
    table.width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.print(table, crop=False)


def _cells(group: RolloutGroup, names: Sequence[str]) -> Iterator[list[Text]]:
    for reward in group.rewards:
        yield [
            Text(reward.failures[name], style="bold red")
            if name in reward.failures
            else Text(_value(reward.by_name[name]))
            for name in names
        ]


def _excerpt(text: str, space: int) -> str:
    """One line: the end of a long text, where answers stand."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= space else f"...{line[3 - space :]}"


def _value(value: float) -> str:
    return "None" if math.isnan(value) else f"{value:.4g}"


def _print_summary(
    groups: list[RolloutGroup], names: Sequence[str], seconds: dict[str, float], console: Console
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("function", no_wrap=True)
    for header in ("mean", "std", "None", "failed", "ms per completion"):
        table.add_column(header, justify="right", no_wrap=True)
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
    _print_whole(table, console)
    for name in dict.fromkeys(name for reward in rewards for name in reward.metrics):
        logged = [reward.metrics[name] for reward in rewards if name in reward.metrics]
        console.print(Text(f"metric {name}: {statistics.fmean(logged):.4g}"))
    for name in dict.fromkeys(name for reward in rewards for name in reward.extra):
        shown = next(reward.extra[name] for reward in rewards if name in reward.extra)
        console.print(Text(f"column {name} of completions.jsonl: {shown!r:.80}, ..."))
