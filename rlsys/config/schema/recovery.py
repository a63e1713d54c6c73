"""What a run does about actors that died: the section `recovery`."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from rlsys.config.schema.section import Section


class RecoveryConfig(Section):
    """How often a run replaces actors that died or hang, and goes on."""

    max_restarts: NonNegativeInt = 10
    """Restarts of each role (policy, reference, rollout engines) within window_hours; one more
    failure ends the run. So does a second failure in the same place: same role, phase, step and
    reason. 0: the first failure ends the run."""
    window_hours: PositiveFloat = 1.0
    """Hours that max_restarts counts."""
    backoff_s: NonNegativeFloat = 5.0
    """Seconds to wait before the second restart of a role within window_hours, and twice as long
    before each further one, at most a minute. The first comes at once."""
    wait_for_resources_s: NonNegativeFloat = 600.0
    """Seconds that a run which is started again (top level max_restarts) waits for the Ray cluster
    of RAY_ADDRESS and for lost GPUs or CPUs to come back. A line every half minute says what is
    missing. placement_timeout holds if it is longer."""
