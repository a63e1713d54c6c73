"""What became of the rows of a dataset, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rlsys.data.row import Row


@dataclass(slots=True)
class SourceCounts:
    """How many rows of one dataset are used or dropped."""

    source: str
    """The entry of the config."""
    preprocessor: str = ""
    """Its name in the config, or in the plugin that registered the dataset."""
    rows: int = 0
    """Rows that were read, or taken by `#ROWS`, copies included."""
    formats: Counter[str] = field(default_factory=Counter)
    """Rows by format."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that are not used, by the reason in `Row.dropped`."""
    cut: int = 0
    """Rows that are shortened, or cut into several samples."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Rendered rows by their number of tokens, before the limits."""

    @property
    def used(self) -> int:
        """Rows that became prompts or samples, before any are held out."""
        return self.rows - self.dropped.total()

    def add(self, row: Row) -> None:
        """Count a row that went through all stages without a problem."""
        self.rows += 1
        if row.format:
            self.formats[row.format] += 1
        if row.token_ids:
            self.lengths[row.uncut_length or len(row.token_ids)] += 1
        if row.uncut_length and not row.dropped:
            self.cut += 1
        if row.dropped:
            self.dropped[row.dropped] += 1

    def __str__(self) -> str:
        through = f" through {self.preprocessor}" if self.preprocessor else ""
        text = f"{self.source}{through}: {self.used:,} of {self.rows:,} rows used"
        dropped = [f"{count:,} {reason}" for reason, count in self.dropped.items()]
        text += f"; dropped: {', '.join(dropped)}" if dropped else ""
        return text + (f"; {self.cut:,} cut at data.max_length" if self.cut else "")
