"""`rlsys data preview` of samples, and of answers to prefer: what is trained on in each row."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rlsys.commands.data_preview_tables import (
    first_of_each_stream,
    print_counts,
    print_histogram,
    spread,
)
from rlsys.data.preferences import PreferenceData
from rlsys.data.samples import SampleData
from rlsys.text import counted
from rlsys.tracking.printable import printable
from rlsys.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlsys.config import PreferenceDataConfig, SftDataConfig

_TRAINED = "green"


def preview_samples(
    config: SftDataConfig,
    data: SampleData,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    num_rows: int,
) -> None:
    """Print what became of the rows, the lengths, and `num_rows` samples with their targets."""
    print_counts(config, data, console)
    samples = first_of_each_stream(data) if config.streaming else data.train
    tokens = sum(len(sample.token_ids) for sample in samples)
    targets = sum(sample.num_targets for sample in samples)
    console.print(
        f"{counted(tokens, 'token')}, {targets:,} of them ({targets / tokens:.0%}) trained on."
    )
    lengths = [length for count in data.counts for length in count.lengths.elements()]
    if config.streaming:
        lengths = [len(sample.token_ids) for sample in samples]
    is_cut = any(count.cut for count in data.counts)
    print_histogram(
        *("Row", lengths, "data.max_length", 1, config.max_length, console),
        outside="cut" if is_cut else "dropped",
    )
    marks = _explained_marks(console)
    for sample in spread(samples, data.train_sizes, num_rows):
        _print_sample(sample, tokenizer, marks, console)
    for notice in data.notices:
        console.print(Text(f"\nNote: {notice}", style="yellow"))


def marked_parts(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a sample in parts, each with whether it is trained on."""
    token_ids = sample.token_ids.tolist()

    def text_until(end: int) -> str:
        decoded: Any = tokenizer.decode(token_ids[:end], skip_special_tokens=False)
        return decoded

    parts, end, length = [], 0, 0
    for is_target, run in groupby(sample.target_mask.tolist()):
        end += len(list(run))
        text = text_until(end)
        parts.append((text[length:], is_target))
        length = len(text)
    return parts


def _explained_marks(console: Console) -> tuple[str, str]:
    """`_marks`, with a line that says what they mean."""
    marks = _marks(console)
    console.print()
    console.print(
        f"Between {marks[0]} and {marks[1]} stands what is trained on."
        if marks[0]
        else Text("This colour shows what is trained on.", style=_TRAINED)
    )
    return marks


def _marks(console: Console) -> tuple[str, str]:
    """What stands around trained parts where colours do not show; empty where they do."""
    if console.color_system is not None:
        return "", ""
    return ("⟦", "⟧") if console.encoding.startswith("utf") else ("[[", "]]")


def preview_preferences(
    config: PreferenceDataConfig,
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    num_rows: int,
) -> None:
    """As `preview_samples`, of the answers that preference training compares."""
    print_counts(config, data, console)
    rows = first_of_each_stream(data) if config.streaming else data.train
    lengths = [max(len(answer.token_ids) for answer in row.answers) for row in rows]
    print_histogram("Longest answer", lengths, "data.max_length", 1, config.max_length, console)
    marks = _explained_marks(console)
    for row in spread(rows, data.train_sizes, num_rows):
        kinds = ("rejected", "chosen") if row.answers[1:] else ("undesirable", "desirable")
        for answer, is_chosen in zip(row.answers, row.is_chosen, strict=True):
            console.print()
            console.print(Text(kinds[is_chosen], style="bold"), end="")
            _print_sample(answer, tokenizer, marks, console)
    for notice in data.notices:
        console.print(Text(f"\nNote: {notice}", style="yellow"))


def _print_sample(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    marks: tuple[str, str],
    console: Console,
) -> None:
    console.print()
    length = counted(len(sample.token_ids), "token")
    targets = f"{sample.num_targets:,} trained on"
    console.print(Text.assemble((sample.sample_id, "bold"), f"  {length}, {targets}"))
    special = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
    pattern = "|".join(map(re.escape, special))
    whole = Text()
    for words, is_target in marked_parts(sample, tokenizer):
        part = Text(printable(words))
        if special:
            part.highlight_regex(pattern, style="bold cyan")
        if is_target:
            part = Text.assemble(marks[0], part, marks[1], style=_TRAINED)
        whole.append_text(part)
    console.print(whole)
