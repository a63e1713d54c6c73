"""What a run continues from: the section `checkpoint`."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from rlsys.config.field_types import PathText
from rlsys.config.schema.section import Section

AUTO_SAVES = 20
"""A run that is killed loses 1/20 of its steps at most."""


class CheckpointConfig(Section):
    """What a run continues from. Every checkpoint, OUTPUT_DIR/checkpoints/step-N, is a model
    folder that transformers and vLLM load, and holds the optimizer's state besides. The final model
    is always written to OUTPUT_DIR/final."""

    save_steps: PositiveInt | Literal["auto"] | None = "auto"
    """Steps between two checkpoints; the last step is saved too. auto: 5% of max_steps, or more
    where saving would take over a tenth of the time. null: no checkpoints."""
    save_total_limit: PositiveInt = 2
    """Checkpoints to keep, the newest ones; while one is written there is one more."""
    exit_timeout_s: PositiveFloat = 600.0
    """Seconds that a run may take to end after Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 or a failure: it
    finishes an update that has begun and saves the last finished step, its weights in
    OUTPUT_DIR/interrupted, then a checkpoint unless save_steps is null. Less where the caller gives
    less: RAY_JOB_STOP_WAIT_TIME_S of `ray job stop`, or what preemption_file says. A second Ctrl-C
    ends it at once."""
    preemption_file: PathText | None = None
    """A file whose appearance says that this machine is about to be taken away, as agents of cloud
    spot machines write it: the run saves and ends with exit code 75, as after SIGUSR1. If it holds
    a number, these are the seconds that are left. The driver looks every second."""
    save_hf_steps: PositiveInt | None = None
    """Steps between two Hugging Face folders without optimizer, OUTPUT_DIR/hf/step-N: models to
    evaluate or serve later, a fraction of a checkpoint's size. null: none."""
    save_hf_total_limit: PositiveInt | None = None
    """Folders of save_hf_steps to keep, the newest ones; null: all."""
    resume: bool = False
    """Continue the run in output_dir from its newest checkpoint."""

    def interval(self, max_steps: int) -> int | None:
        """Steps between two checkpoints; None writes none."""
        if self.save_steps == "auto":
            return max(1, max_steps // AUTO_SAVES)
        return self.save_steps
