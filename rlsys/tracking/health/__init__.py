"""Warnings of runs that go wrong in ways that a table of numbers does not show.

    base            what a rule is: History -> Readings
    monitor         Health: each problem is said when it begins, and when it is over
    rules           the rules of a config
    update_rules    policy and engine, entropy, KL, clipping, gradients, time
    reward_rules    rewards, lengths, held-out rows
    rollout_rules   sampling that runs ahead

docs/health.md says what each warning means.
"""

from rlsys.tracking.health.monitor import Health
from rlsys.tracking.health.rules import rules_of

__all__ = ["Health", "rules_of"]
