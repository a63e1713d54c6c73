"""Tables of `rlsys data preview` for prompts and samples: datasets, counts, lengths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest

from rich.console import Console
from rich.text import Text

from rlsys.config import RowsConfig
from rlsys.data.load import Loaded, texts_of
from rlsys.data.streams.base import T
from rlsys.text import counted
from rlsys.tracking.columns import GAP, columns, print_lines
from rlsys.types import Preference, Prompt, Sample, ScoredRow

BINS = 12
"""Lines of the histogram, roughly."""
STREAMED_ROWS = 1000
"""Rows of a streamed dataset that the preview reads."""
_DROPPED = "bright_black"


def first_of_each_stream(data: Loaded[T]) -> list[T]:
    """What the first rows of streamed datasets become, each once."""
    found: dict[str, T] = {}
    for stream in data.streams:
        for row in stream.take(STREAMED_ROWS):
            found.setdefault(_id(row), row)
    return list(found.values())


def _id(row: Prompt | Sample | Preference | ScoredRow) -> str:
    if isinstance(row, Prompt):
        return row.prompt_id
    return row.sample_id if isinstance(row, Sample) else row.row_id


def spread(rows: list[T], sizes: list[int], num_rows: int) -> list[T]:
    """The first rows of each dataset, alternating between datasets."""
    remaining = iter(rows)
    parts = [list(islice(remaining, size))[:num_rows] for size in sizes or [len(rows)]]
    ranks = zip_longest(*parts)
    return [row for rank in ranks for row in rank if row is not None][:num_rows]


def print_table(
    console: Console, title: str, headers: Sequence[str], rows: Sequence[list[str]]
) -> None:
    """Print a table whose lines break between words only; numbers have headers in capitals."""
    console.print(Text(title, style="bold"))
    table = [[header.lower() for header in headers], *rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    longest = [max(map(len, " ".join(cells).split())) for cells in zip(*table, strict=True)]
    longest[0] = len(headers[0])  # what does not fit into the first column has a line of its own
    while sum(widths) + GAP * (len(widths) - 1) > console.width and widths != longest:
        spare = [width - least for width, least in zip(widths, longest, strict=True)]
        widths[spare.index(max(spare))] -= 1
    for row in table:
        cells = [
            f"{cell:>{width}}" if header.isupper() else cell
            for header, cell, width in zip(headers, row, widths, strict=True)
        ]
        print_lines(console, columns(cells, widths))


# --- counts --------------------------------------------------------------------------------------


def print_counts(config: RowsConfig, data: Loaded[T], console: Console) -> None:
    """Print what became of the rows of each dataset."""
    weights = config.dataset_weights
    rows = []
    for index, count in enumerate(data.counts):
        purpose = "training" if index < len(config.dataset) else "evaluation"
        if weights and purpose == "training":
            purpose += f" {weights[index] / sum(weights):.0%}"
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in count.dropped.items())
        dropped = f"{dropped}; {count.cut:,} cut" if count.cut else dropped
        formats = ", ".join(count.formats)
        rows.append([count.source, formats, f"{count.rows:,}", f"{count.used:,}", dropped, purpose])
    print_table(console, "Datasets", ("dataset", "format", "ROWS", "USED", "dropped", "for"), rows)
    if config.streaming:
        console.print(
            f"Streamed: this preview read and counted at most {STREAMED_ROWS:,} {data.noun}s a "
            "dataset."
        )
        return
    console.print(
        f"{counted(len(data.train), data.noun)} to train on, {len(data.held_out):,} to evaluate on."
    )
    repeated = len(data.train) - len(texts_of(data.train))
    if repeated:
        console.print(
            f"{repeated:,} of them {'repeats' if repeated == 1 else 'repeat'} an earlier "
            f"{data.noun}; data.deduplicate drops such rows."
        )
    if data.num_validation_in_train:
        console.print(
            f"{data.noun.capitalize()}s to evaluate on that are also in the training data: "
            f"{data.num_validation_in_train:,}.",
            style="red",
        )


# --- lengths -------------------------------------------------------------------------------------


def print_histogram(
    what: str,
    lengths: list[int],
    field: str,
    low: int,
    high: int,
    console: Console,
    outside: str = "dropped",
) -> None:
    """Print how many rows have which number of tokens.

    Args:
        what: has these lengths, "Prompt" for example.
        lengths: tokens of each row.
        field: of the config, the upper limit.
        low: lower limit.
        high: upper limit.
        console: to print to.
        outside: what happens to rows outside of the limits.
    """
    bar = "█" if console.encoding.startswith("utf") else "#"
    console.print()
    console.print(f"{what} lengths in tokens", style="bold")
    console.print(
        f"{min(lengths):,} to {max(lengths):,}, mean {statistics.fmean(lengths):,.1f}, "
        f"median {statistics.median(lengths):,.0f}; {field} is {high:,}"
    )
    bins = list(histogram(lengths))
    label_width = max(len(f"{last:,}") for _, last, _ in bins)
    number_width = max(len(f"{number:,}") for *_, number in bins)
    most = max(number for *_, number in bins)
    space = max(10, min(console.width, 100) - 2 * label_width - number_width - 24)
    for first, last, number in bins:
        length = math.ceil(number / most * space)
        num_outside = sum(first <= n <= last and not low <= n <= high for n in lengths)
        line = f"{first:>{label_width},} - {last:>{label_width},}  {number:>{number_width},} "
        all_outside = num_outside == number > 0
        note = f"  {'' if all_outside else 'partly '}{outside}" if num_outside else ""
        console.print(Text(line + bar * length + note, style=_DROPPED if all_outside else ""))


def histogram(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """First length, last length and count of each of about BINS bins of equal, round width."""
    span = max(lengths) - min(lengths) + 1
    exact = max(1.0, span / BINS)
    power = 10 ** math.floor(math.log10(exact))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= exact)
    start = min(lengths) // width * width
    numbers = [0] * ((max(lengths) - start) // width + 1)
    for length in lengths:
        numbers[(length - start) // width] += 1
    for index, number in enumerate(numbers):
        yield start + index * width, start + (index + 1) * width - 1, number
