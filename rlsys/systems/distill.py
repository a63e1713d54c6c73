"""The running roles of distillation: the student, which is the policy, and its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

# Imported before all that imports Ray, which reads the environment when it is imported.
import rlsys.actors.ray_env  # noqa: F401  # isort: skip

from rlsys.actors.node_check import check_nodes
from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors
from rlsys.actors.start_report import StartReport
from rlsys.actors.teacher import TeacherActors
from rlsys.actors.turns import Turns
from rlsys.config import DistillConfig
from rlsys.config.local_paths import with_absolute_paths
from rlsys.data.samples import SampleData
from rlsys.data.streams.make import make_sample_stream
from rlsys.model.adapters import with_stored_settings
from rlsys.system import (
    StreamSystem,
    choose_device,
    let_restart,
    make_restarts,
    say_start,
    start_timeline,
)
from rlsys.tracking import Tracker
from rlsys.types import Sample


@dataclass(slots=True, kw_only=True)
class DistillSystem(StreamSystem[DistillConfig, Sample]):
    """The running roles of distillation."""

    teacher: TeacherActors
    """What the policy learns from."""
    scores_of_teacher: dict[str, dict[str, float]] = field(default_factory=dict)
    """Its metrics of each held-out set."""


def start_distill_system(
    config: DistillConfig, data: SampleData, tracker: Tracker
) -> DistillSystem:
    """Start the actors of policy and teacher, and wait until all are ready."""
    config = with_stored_settings(with_absolute_paths(config))
    device = choose_device(config)
    placement = Placement(config, device=device)
    check_nodes(config, placement.roles_of_nodes())
    say_start(config, device)
    with StartReport() as report:
        policy = PolicyActors(config, device=device, place=partial(placement.options, "policy"))
        teacher = TeacherActors(
            config, device=device, place=partial(placement.options, "teacher"), policy=policy
        )
        models = (policy, teacher)
        for model in models:
            report.waiting_for(model.actors)
        Turns().start(models, meanwhile=lambda: None, on_done=report.ready)
    restarts = make_restarts(config)
    for model in models:
        let_restart(model, restarts, config)
    return DistillSystem(
        config=config,
        device=device,
        policy=policy,
        samples=make_sample_stream(config, data),
        held_out_sets=data.held_out_sets,
        restarts=restarts,
        timeline=start_timeline(config, device, tracker, *models),
        teacher=teacher,
    )
