"""Whether the data of a config can be used, judged by files and first rows within a second.

`rlsys.data.load` checks every row when the run starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config import Config, DataConfig, RowsConfig
from rlsys.data.json_files import is_json_lines
from rlsys.data.preprocess import read_spec
from rlsys.data.render import NO_TEMPLATE
from rlsys.data.sources import PromptSource, Source, SourceKind, Split, open_set, open_sources
from rlsys.data.streams.streamed import CHECKED_ROWS
from rlsys.model.shape import read_model_shape
from rlsys.model.tokenizer_files import chat_template, num_token_ids, resize_remedy
from rlsys.plugins.load import load_what_loads, plugin_problems
from rlsys.problems import Problem
from rlsys.text import counted
from rlsys.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_ROWS = 20
"""Rows of each text file that are checked."""
MOST_ROWS = 50_000
"""Most rows of a text file that are read to find a column."""
_SHOWN = 3
_PROMPTS_SHOWN = 5
"""Prompts with the same mistake that an error names."""
_COUNTABLE_BYTES = 200 * 2**20
"""JSONL files up to this size are read to count their rows."""


def data_file_problems(config: Config) -> Iterator[Problem]:
    """Problems of data plugins, dataset entries, files and their first rows; too few rows."""
    # One file may have rewards and preprocessors; preflight/rewards.py reports its problems.
    load_what_loads(config.reward.external_plugins)
    no_template = lacks_template(Path(config.model.path))
    yield from source_problems(config.data, no_template, PromptSource)
    rows = count_rows(config.data)
    if rows is not None and 0 < rows < config.num_prompts:
        yield Problem(
            f"data.dataset has {counted(rows, 'row')} to train on, and a step needs "
            f"{config.num_prompts} prompts (rollout.generation_batch_size / "
            "rollout.num_generations): give more data, or lower generation_batch_size"
        )


def lacks_template(folder: Path) -> bool:
    """Whether a model's folder has no chat template; what is not a model has another problem."""
    return (folder / "config.json").is_file() and not chat_template(folder)


def source_problems(
    config: RowsConfig, no_template: bool, kind: SourceKind[Any]
) -> Iterator[Problem]:
    """Problems of plugins, dataset entries, files and their first rows."""
    not_loaded = list(plugin_problems("data.external_plugins", config.external_plugins))
    yield from not_loaded
    opened: dict[str, Callable[[list[Problem]], list[Source[Any]]]] = {
        "data.dataset": partial(open_sources, kind, config, "train"),
        "data.val_dataset": partial(open_sources, kind, config, "validation"),
        **{
            f"data.val_sets.{name}": partial(open_set, kind, config, name)
            for name in config.val_sets
        },
    }
    for field, open_datasets in opened.items():
        described: list[Problem] = []
        sources = open_datasets(described)
        for problem in described:
            hint = " (a plugin above could not be loaded)" if not_loaded else ""
            yield Problem(f"{field}: {problem}{hint}", only_here=bool(not_loaded))
        for source in sources:
            for problem in _check_source(source, no_template):
                yield replace(problem, text=f"{field}: {problem.text}")


def count_rows(config: RowsConfig) -> int | None:
    """Training rows, before the length limit; None if counting takes long."""
    total = 0
    for text in config.dataset:
        try:
            spec = read_spec(text)
        except ValueError:
            return None
        if spec.num_rows is not None and not config.streaming:
            total += spec.num_rows
            continue
        rows = _rows_in_file(spec.path)
        if rows is None:
            return None
        total += min(rows, spec.num_rows or rows)
    return round(total * (1 - config.split_dataset_ratio))


def _rows_in_file(path: Path) -> int | None:
    """Rows of a Parquet or JSONL file; None for other files."""
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError):
            return None
    if path.suffix != ".jsonl" or path.stat().st_size > _COUNTABLE_BYTES:
        return None
    if not is_json_lines(path):
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def known_columns(config: DataConfig, split: Split, wanted: Collection[str]) -> list[str] | None:
    """The columns that prompts of `split` carry to the rewards, read until `wanted` are found.

    Rows of a dataset may have different columns, and a column of any row counts. Prompts are not
    measured, so the columns of prompts that are too long count too.

    Returns:
        None if the answer takes too long or is not known: without datasets, for a dataset that is
        not a text file or has more than `MOST_ROWS` rows, and for rows with a problem.
    """
    problems: list[Problem] = []
    columns: dict[str, None] = {}
    sources = open_sources(PromptSource, config, split, problems)
    if problems or not sources:
        return None
    for source in sources:
        if not _add_columns(source, columns, set(wanted)):
            return None
    return list(columns)


def _add_columns(source: Source[Prompt], columns: dict[str, None], wanted: set[str]) -> bool:
    """Add a dataset's columns until `columns` has all `wanted`; False if they are unknown."""
    if not source.is_text_file:
        return False
    # A streaming run decides by its first rows too.
    streamed = source.config.streaming and source.split == "train"
    found = False
    try:
        for number, row in enumerate(islice(source.rows(), CHECKED_ROWS if streamed else None)):
            source.parse(row)
            if number == MOST_ROWS or row.problem:
                return False
            if row.dropped:
                continue
            found = True
            columns.update(dict.fromkeys(row.columns))
            if columns.keys() >= wanted:
                break
    except ValueError:  # a file that cannot be used
        return False
    return found


def _check_source(source: Source[Any], no_template: bool) -> Iterator[Problem]:
    problem = source.file_problem()
    path = source.spec.path
    if problem is not None:
        yield Problem(problem, only_here=not path.exists())
    elif source.is_text_file:
        yield from _check_first_rows(source, no_template)
    elif source.spec.is_local and path.suffix == ".parquet" and path.is_file():
        yield from _check_parquet(source)


def _check_first_rows(source: Source[Any], no_template: bool) -> Iterator[Problem]:
    good, bad = source.first_rows(FIRST_ROWS)
    needing = [row for row in good if no_template and row.needs_template]
    if needing:
        yield Problem(f"{needing[0].location}: {NO_TEMPLATE}")
    yield from bad[:_SHOWN]
    if len(bad) > _SHOWN:
        yield Problem(
            f"{source.spec.name}: {counted(len(bad) - _SHOWN, 'more problem')} in the first rows"
        )


def _check_parquet(source: Source[Any]) -> Iterator[Problem]:
    """Check the columns' names: to read rows takes `datasets`, and a second to import it."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(source.spec.path).names
    except (pyarrow.ArrowException, OSError) as error:
        yield Problem(f"{source.spec.path} is not a Parquet file: {error}")
        return
    source.columns.update(dict.fromkeys(names))
    problem = source.columns_problem()
    if problem is not None:
        yield problem


def check_prompt_tokens(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]
) -> None:
    """Refuse prompts with a token that the model in `folder` has no embedding for.

    Raises:
        ValueError: names prompts, a token, both sizes and the remedy.
    """
    size, known = read_model_shape(folder, may_bridge=True).vocab_size, num_token_ids(folder)
    if known is not None and known <= size:
        return
    wrong = [prompt for prompt in prompts if max(prompt.token_ids) >= size]
    if not wrong:
        return
    rows = ", ".join(prompt.prompt_id for prompt in wrong[:_PROMPTS_SHOWN])
    rows += f" and {len(wrong) - _PROMPTS_SHOWN} more" if len(wrong) > _PROMPTS_SHOWN else ""
    token_id = max(wrong[0].token_ids)
    raise ValueError(
        f"the prompt of {rows} holds the token {tokenizer.convert_ids_to_tokens(token_id)!r} of id "
        f"{token_id}, the tokenizer of {folder} has {len(tokenizer):,} tokens and its model "
        f"embeddings for {size:,} (vocab_size in config.json). {resize_remedy(len(tokenizer))}"
    )
