"""Where metrics and completions go: the section `tracking`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from rlsys.config.field_types import PathText
from rlsys.config.schema.health import HealthConfig, RunHealthConfig, SftHealthConfig
from rlsys.config.schema.section import Section


class TrackersConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    report_to: list[str] = ["tensorboard"]
    """More trackers by name, several at once: tensorboard; wandb, mlflow, trackio, swanlab (each
    after `pip install NAME`); none or [] for no more. None of them can stop a run or slow it."""
    run_name: PathText | None = None
    """Name of the run in trackers; null is the name of output_dir."""
    project: PathText = "rlsys"
    """Project of the run in wandb, trackio and SwanLab, experiment in MLflow."""
    wandb_project: PathText | None = None
    """Project in wandb, if it is another one; null is `project`."""
    wandb_entity: PathText | None = None
    """User or team in wandb; null reads WANDB_ENTITY, or else is the user's own."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes to OUTPUT_DIR/wandb, for `wandb sync`; null reads WANDB_MODE, or else is
    online."""
    mlflow_tracking_uri: str | None = None
    """Server or database of MLflow, http://HOST:PORT or sqlite:///FILE; null reads
    MLFLOW_TRACKING_URI, or else is mlflow.db in the working directory."""
    trackio_space_id: PathText | None = None
    """Hugging Face Space that trackio sends to, USER/NAME; null reads TRACKIO_SPACE_ID, or else
    keeps the run on this machine."""
    swanlab_mode: Literal["online", "offline", "local", "disabled"] | None = None
    """offline writes to OUTPUT_DIR/swanlog, for `swanlab sync`; null reads SWANLAB_MODE, or else
    is online."""
    swanlab_workspace: PathText | None = None
    """Workspace in SwanLab; null is the user's own."""
    close_timeout_s: float = Field(default=30.0, gt=0)
    """Most seconds that the end of a run waits for these trackers to write what is pending."""
    stop_on: list[str] = []
    """Warnings of tracking.health at which the run saves a checkpoint and ends with exit code 3, as
    in [entropy_collapse, kl_runaway]."""
    health: RunHealthConfig | None = RunHealthConfig()
    """When the run warns; null: never."""

    @field_validator("report_to")
    @classmethod
    def _none_is_none(cls, names: list[str]) -> list[str]:
        return [] if names == ["none"] else names

    @model_validator(mode="after")
    def _stops_on_what_is_given(self) -> Self:
        known = [] if self.health is None else [n for n, v in self.health if v not in (None, False)]
        for name in self.stop_on:
            if name not in known:
                raise ValueError(
                    f"tracking.stop_on names {name!r}, and the run never gives such a warning. "
                    f"Those of this config: {', '.join(known) or 'none, tracking.health is null'}"
                )
        return self


class SftTrackingConfig(TrackersConfig):
    """Where metrics go, besides metrics.jsonl."""

    health: SftHealthConfig | None = SftHealthConfig()
    """When the run warns; null: never."""


class TrackingConfig(TrackersConfig):
    """Where metrics and completions go, besides metrics.jsonl and completions.jsonl."""

    log_completions: bool = True
    """Append every completion to completions.jsonl when its group gets its place in a batch."""
    completions_max_mb: PositiveInt | None = 256
    """Mebibytes after which completions.jsonl is renamed to completions.000001.jsonl, then 000002
    and so on, and begins again; files of held-out and filtered completions likewise. null:
    never."""
    completion_tokens: bool = False
    """Keep the tokens of training completions in OUTPUT_DIR/tokens, a Parquet file a step: ids,
    log-probs as sampled and, where the run computes them, the policy's own, and advantages. The
    dashboard colours them. About 8 bytes a token."""
    health: HealthConfig | None = HealthConfig()
    """When the run warns; null: never."""
