"""`rlsys data preview` of rows for a score head: texts, labels and margins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rlsys.commands.data_preview_tables import (
    first_of_each_stream,
    print_counts,
    print_histogram,
    spread,
)
from rlsys.data.scored import ScoreData
from rlsys.text import counted
from rlsys.tracking.printable import printable
from rlsys.types import ScoredRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlsys.config import RewardModelConfig


def preview_scored(
    config: RewardModelConfig,
    data: ScoreData,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    num_rows: int,
) -> None:
    """Print what became of the rows, their lengths, and some with labels."""
    print_counts(config.data, data, console)
    rows = first_of_each_stream(data) if config.data.streaming else data.train
    lengths = [max(map(len, row.texts)) for row in rows]
    most = config.data.max_length
    print_histogram("Longest text", lengths, "data.max_length", 1, most, console)
    words = ("chosen", "rejected") if config.has_pairs else ("text",)
    for row in spread(rows, data.train_sizes, num_rows):
        console.print()
        console.print(Text.assemble((row.row_id, "bold"), f"  {_label(config, row)}"))
        for word, text in zip(words, row.texts, strict=True):
            decoded: Any = tokenizer.decode(text.tolist(), skip_special_tokens=False)
            console.print(Text(f"{word}, {counted(len(text), 'token')}", style="bold"))
            console.print(Text(printable(decoded)))
    for notice in data.notices:
        console.print(Text(f"\nNote: {notice}", style="yellow"))


def _label(config: RewardModelConfig, row: ScoredRow) -> str:
    section = config.reward_model
    if config.has_pairs:
        return f"margin {row.label[0]:g}" if row.label[0] else ""
    if section.problem_type == "regression":
        return f"label {', '.join(f'{number:g}' for number in row.label)}"
    classes = [int(row.label[0])]
    if section.problem_type == "multi_label_classification":
        classes = [number for number, is_there in enumerate(row.label) if is_there]
    names = [section.label_names[n] if section.label_names else str(n) for n in classes]
    return f"label {', '.join(names) or 'none'}"
