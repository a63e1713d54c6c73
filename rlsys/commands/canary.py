"""`rlsys doctor --canary CONFIG`: a short run with learning rate 0, in which nothing may change.

A change would not be learning, but damaged weights, log-probs that trainer and engine compute
differently, or a reference that differs from the policy. A reward curve that rises for such a
reason looks like success.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.actors.ray_session import ray_session
from rlsys.config import CheckpointConfig, Config, EvalConfig
from rlsys.interrupts import interruptible
from rlsys.launch import train_system
from rlsys.preflight.before_start import load_data
from rlsys.run.folder import RunDir
from rlsys.saving import make_checkpoints
from rlsys.system import start_system
from rlsys.tracking.base import Metrics, Split, Tracker
from rlsys.tracking.health import Health
from rlsys.tracking.health.rules import MAX_KL_OF_DTYPE
from rlsys.types import RolloutGroup

STEPS = 2
MAX_HELD_OUT = 32
"""Most held-out prompts that are sampled before and after."""
EXACT = 1e-6
"""Largest rounding error of float32 statistics that should be 0."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a learning rate of 0 implies."""

    what: str
    passed: bool
    found: str


def run_canary(config: Config, console: Console) -> bool:
    """Make the run and print the checks; returns whether all passed."""
    config = canary_config(config)
    console.print(f"{STEPS} steps of this config with learning rate 0: nothing may change.")
    recorder = Recorder()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = load_data(config)
        held_out = list(data.held_out or data.train)[:MAX_HELD_OUT]
        if not held_out:
            raise ValueError(
                "the canary samples held-out prompts before and after, and data.streaming holds "
                "none out: give data.val_dataset"
            )
        data = replace(data, validation=held_out, val_sets={})
        stack.enter_context(interruptible())
        stack.enter_context(ray_session())
        system = start_system(config, data, recorder)
        checkpoints = make_checkpoints(system, RunDir(folder))
        train_system(system, recorder, checkpoints, Health(rules=[]))  # `judge` says more
    checks = list(judge(config, recorder, on_cpu=system.device == "cpu"))
    table = Table(box=None, pad_edge=False)
    for column in ("", "with learning rate 0", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = Text("ok", style="green") if check.passed else Text("WRONG", style="bold red")
        table.add_row(mark, check.what, check.found)
    console.print(table)
    return all(check.passed for check in checks)


def canary_config(config: Config) -> Config:
    """`config` with learning rate 0, a few steps, an evaluation around them, nothing kept."""
    return config.model_copy(
        update={
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "eval": EvalConfig(),
            "policy": config.policy.model_copy(update={"lr": 0.0, "min_lr": 0.0}),
            # The checks below say more than that error would.
            "grpo": config.grpo.model_copy(update={"max_logp_difference": None}),
            "checkpoint": CheckpointConfig(save_steps=None),
        }
    )


class Recorder(Tracker):
    """Keeps the metrics of steps and the token ids of held-out completions."""

    def __init__(self) -> None:
        self.steps: list[Metrics] = []
        self.held_out: dict[int, dict[str, list[list[int]]]] = {}
        """Step of the evaluation -> prompt_id -> the tokens of its completions."""

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """See Tracker."""
        if "loss" in metrics:
            self.steps.append(metrics)

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """See Tracker."""
        if split == "eval":
            tokens = [completion.token_ids for completion in group.completions]
            self.held_out.setdefault(step, {})[group.prompt.prompt_id] = tokens

    def close(self) -> None:
        """See Tracker."""


def judge(config: Config, recorder: Recorder, *, on_cpu: bool) -> Iterator[Check]:
    """The checks of a run with learning rate 0.

    On CPU they hold exactly. GPU kernels compute a row differently in batches of other sizes, so a
    few sampled tokens may differ, and with them the rest of their completions.
    """
    dtype = config.model_dtype(on_cpu=on_cpu)
    rounding = EXACT if on_cpu else MAX_KL_OF_DTYPE[dtype]
    for name, expected, tolerance, what in (
        ("kl", 0.0, rounding, "the policy stays its reference: kl is 0"),
        ("ratio/mean", 1.0, rounding, "the policy stays what it was: ratio/mean is 1"),
        ("clip_ratio/region_mean", 0.0, EXACT, "no token is clipped"),
        (
            "sampling/kl",
            0.0,
            MAX_KL_OF_DTYPE[dtype],
            f"trainer and rollout engine agree ({dtype}): sampling/kl is small",
        ),
    ):
        values = [float(metrics[name]) for metrics in recorder.steps if name in metrics]
        if values:
            # nan compares as false: it comes first here, and never passes.
            worst = max(values, key=lambda v: (math.isnan(v), abs(v - expected)))
            passed = abs(worst - expected) <= tolerance
            yield Check(what, passed, f"{worst:.3g} at worst, within {tolerance:g} allowed")
    before, after = (recorder.held_out[step] for step in (0, STEPS))
    same = sum(before[prompt_id] == after[prompt_id] for prompt_id in before)
    passed = same == len(before) if on_cpu else same >= len(before) / 2
    what = "held-out completions are the same before and after"
    yield Check(what, passed, f"{same} of {len(before)} prompts")
