"""TensorBoard: every number as a scalar, and a group as text every ten steps."""

from __future__ import annotations

import json
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.run.folder import RunDir
from rlsys.tracking.base import Metrics, Split, Tracker, register_tracker
from rlsys.tracking.completions import completion_rows, is_shown_as_text
from rlsys.tracking.environment import config_values, environment
from rlsys.types import RolloutGroup


@register_tracker("tensorboard")
class TensorBoardTracker(Tracker):
    """Event files in OUTPUT_DIR/tensorboard."""

    def __init__(self, config: RunConfig, resumed_from: int | None):
        # It imports torch, which `rlsys explain` and the viewers do not need.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            RunDir(Path(config.output_dir)).tensorboard,
            # Hides records of an earlier process, of steps that are taken again.
            purge_step=None if resumed_from is None else resumed_from + 1,
            flush_secs=10,
        )
        texts = {"config": config_values(config), "environment": environment()}
        for name, values in texts.items():
            text = verbatim(json.dumps(values, indent=2, ensure_ascii=False))
            self._writer.add_text(name, text, resumed_from or 0)

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Add a scalar for each number."""
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Add the first group of every tenth step as text."""
        if is_shown_as_text(step, group):
            rows = completion_rows(step, group, advantages)
            blocks = [rows[0]["prompt"]] + [
                f"reward {row['reward']}\n{row['text']}" for row in rows
            ]
            self._writer.add_text(
                f"completions/{split}", "\n\n---\n\n".join(map(verbatim, blocks)), step
            )

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def verbatim(text: str) -> str:
    """`text` as an indented Markdown code block, which nothing in it can end."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
