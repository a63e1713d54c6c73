"""Where metrics and completions go: the section `tracking`."""

from __future__ import annotations

from pydantic import field_validator

from rlsys.config.field_types import PathText
from rlsys.config.schema.section import Section


class TrackersConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    report_to: list[str] = ["tensorboard"]
    """More trackers by name: tensorboard, wandb (which needs `pip install wandb`); none or [] for
    no more."""
    run_name: PathText | None = None
    """Name of the run in trackers; null is the name of output_dir."""
    wandb_project: PathText = "rlsys"
    """Project of the run in wandb."""

    @field_validator("report_to")
    @classmethod
    def _none_is_none(cls, names: list[str]) -> list[str]:
        return [] if names == ["none"] else names


class TrackingConfig(TrackersConfig):
    """Where metrics and completions go, besides metrics.jsonl and completions.jsonl."""

    log_completions: bool = True
    """Append every completion to completions.jsonl when its group gets its place in a batch."""
