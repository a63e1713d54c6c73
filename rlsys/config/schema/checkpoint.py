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
    """Checkpoints to keep, the newest ones; while one is written there is one more. The best one
    and those of save_retain_interval are kept besides."""
    save_retain_interval: PositiveInt | None = None
    """Checkpoints of every step that this divides are kept for good, and written also where
    save_steps would not. null: none."""
    metric_for_best_model: str | None = None
    """Metric by which a checkpoint is the best one, as metrics.jsonl names it, such as eval/loss,
    eval/reward or reward; eval_loss means eval/loss. The best checkpoint is kept. null: none is the
    best."""
    greater_is_better: bool | None = None
    """Whether the best checkpoint has the largest value of metric_for_best_model. null: unless its
    name ends with loss, perplexity or mae."""
    load_best_model_at_end: bool = False
    """Make OUTPUT_DIR/final the model of the best checkpoint, not of the last step."""
    async_save: bool = True
    """Copy a checkpoint to host memory, and write it while the run goes on. The hosts of the policy
    need memory for one checkpoint. false: every step with a checkpoint waits for the disk."""
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
    resume: bool | PositiveInt | Literal["newest", "best"] = False
    """Continue the run in output_dir: true or newest from its newest checkpoint that is whole, best
    from the best one by metric_for_best_model, a number from the checkpoint of that step. Later
    checkpoints are moved to OUTPUT_DIR/replaced-1."""

    def interval(self, max_steps: int, eval_steps: int | None = None) -> int | None:
        """Steps between two checkpoints; None writes none.

        Where the best one is found by an evaluation, `auto` saves after evaluations.
        """
        if self.save_steps == "auto":
            steps = max(1, max_steps // AUTO_SAVES)
            evaluates = eval_steps is not None and (self.best_metric or "").startswith("eval/")
            return -(-steps // eval_steps) * eval_steps if evaluates and eval_steps else steps
        return self.save_steps

    @property
    def best_metric(self) -> str | None:
        """metric_for_best_model as metrics.jsonl names it."""
        name = self.metric_for_best_model
        is_of_transformers = name is not None and name.startswith("eval_")
        return name.replace("_", "/", 1) if name is not None and is_of_transformers else name

    @property
    def best_is_greatest(self) -> bool:
        """greater_is_better, or what the name of the metric says."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not (self.best_metric or "").endswith(("loss", "perplexity", "mae"))
