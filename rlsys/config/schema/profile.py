"""Traces of a few steps: the section `profile`."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator

from rlsys.config.schema.section import Section

ProfiledRole = Literal["policy", "reference", "teacher", "rollout"]


class ProfileConfig(Section):
    """A trace of a few steps, of all actors on one clock, for ui.perfetto.dev."""

    steps: str | None = None
    """The steps to trace, the first and the last as in `5:7`, or one. The trace is in
    output_dir/profile when the last one has ended, or the run. null: none."""
    torch: list[ProfiledRole] = []
    """Roles whose actors add what torch's profiler sees, operations and GPU kernels: policy,
    reference, teacher, rollout. These steps take longer then, and the file is large: trace one or
    two."""
    memory: bool = False
    """Write what PyTorch allocated on each GPU during these steps, for pytorch.org/memory_viz. Only
    on GPUs."""

    @field_validator("steps", mode="before")
    @classmethod
    def _one_step_is_a_text(cls, steps: Any) -> Any:
        return str(steps) if type(steps) is int else steps

    @field_validator("steps")
    @classmethod
    def _steps_can_be_read(cls, steps: str | None) -> str | None:
        if steps is not None:
            _parse(steps)
        return steps

    @property
    def traced(self) -> range:
        """The steps; empty if none is traced."""
        return range(0) if self.steps is None else _parse(self.steps)


def _parse(steps: str) -> range:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"is {steps!r}: write the first and the last step, both from 1, as in 5:7, or one step"
        )
    return range(first, last + 1)
