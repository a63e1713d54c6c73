"""The running roles of `rlsys reward-model`: the ranks of a model with a score head."""

from __future__ import annotations

from functools import partial

# Imported before all that imports Ray, which reads the environment when it is imported.
import rlsys.actors.ray_env  # noqa: F401  # isort: skip

from rlsys.actors.node_check import check_nodes
from rlsys.actors.placement import Placement
from rlsys.actors.scorer import ScorerActors
from rlsys.actors.start_report import StartReport
from rlsys.actors.turns import Turns
from rlsys.config import RewardModelConfig
from rlsys.config.local_paths import with_absolute_paths
from rlsys.data.scored import ScoreData
from rlsys.data.streams.make import make_stream
from rlsys.system import (
    StreamSystem,
    choose_device,
    let_restart,
    make_restarts,
    say_start,
    start_timeline,
)
from rlsys.tracking import Tracker
from rlsys.types import ScoredRow


class ScoreSystem(StreamSystem[RewardModelConfig, ScoredRow]):
    """The running roles of training a score head."""

    policy: ScorerActors


def start_score_system(config: RewardModelConfig, data: ScoreData, tracker: Tracker) -> ScoreSystem:
    """Start the model's actors on the connected cluster and wait until all are ready."""
    config = with_absolute_paths(config)
    device = choose_device(config)
    placement = Placement(config, device=device)
    check_nodes(config, placement.roles_of_nodes())
    say_start(config, device)
    with StartReport() as report:
        policy = ScorerActors(config, device=device, place=partial(placement.options, "policy"))
        report.waiting_for(policy.actors)
        Turns().start([policy], meanwhile=lambda: None, on_done=report.ready)
    restarts = make_restarts(config)
    let_restart(policy, restarts, config)
    timeline = start_timeline(config, device, tracker, policy)
    rows = make_stream(config.data, data, seed=config.seed)
    return ScoreSystem(config, device, policy, rows, data.held_out_sets, restarts, timeline)
