"""The running roles of distillation: the student, which is the policy, and its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

# Imported before all that imports Ray, which reads the environment when it is imported.
import rlsys.actors.ray_env  # noqa: F401  # isort: skip

from rlsys.actors.node_check import check_nodes
from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.start_report import StartReport
from rlsys.actors.teacher import TeacherActors
from rlsys.actors.turns import Turns
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import DistillConfig
from rlsys.config.local_paths import with_absolute_paths
from rlsys.data.samples import SampleData
from rlsys.data.streams.make import make_sample_stream
from rlsys.model.adapters import with_stored_settings
from rlsys.rollout.student import StudentSamples
from rlsys.system import (
    StreamSystem,
    adapter_scaling_of,
    choose_device,
    let_engines_restart,
    let_restart,
    make_restarts,
    say_start,
    start_timeline,
)
from rlsys.tracking import Tracker
from rlsys.types import Device, Sample


@dataclass(slots=True, kw_only=True)
class DistillSystem(StreamSystem[DistillConfig, Sample]):
    """The running roles of distillation."""

    teacher: TeacherActors
    """What the policy learns from."""
    scores_of_teacher: dict[str, dict[str, float]] = field(default_factory=dict)
    """Its metrics of each held-out set."""
    student: StudentSamples | None = None
    """What the student writes itself; None with distill.lmbda 0."""
    publisher: WeightPublisher | None = None
    """Gives rollout engines the student's weights."""
    published: int | None = None
    """Version that the engines hold; None: they have none of this process yet."""

    def publish(self) -> dict[str, float]:
        """Give the engines the student's weights, unless they have them; metrics of that."""
        assert self.publisher is not None
        if self.published == self.policy.policy_version:
            return {}
        metrics = self.publisher.publish()
        self.published = self.policy.policy_version
        return metrics


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
        engines = None
        if config.sampler is not None:
            place = partial(placement.options, "rollout")
            engines = RolloutActors(config.sampler, device=device, place=place)
        groups = [group for group in (engines, policy, teacher) if group is not None]
        for group in groups:
            report.waiting_for(group.actors)
        Turns().start(groups, meanwhile=lambda: None, on_done=report.ready)
        publisher = None
        if engines is not None:
            report.waiting_for(["weight sync to connect"])
            publisher = _publisher(config, device, policy, engines)
    restarts = make_restarts(config)
    if engines is not None and publisher is not None:
        let_engines_restart(engines, publisher, restarts)
    for model in (policy, teacher):
        let_restart(model, restarts, config)
    return DistillSystem(
        config=config,
        device=device,
        policy=policy,
        samples=make_sample_stream(config, data),
        held_out_sets=data.held_out_sets,
        restarts=restarts,
        timeline=start_timeline(config, device, tracker, *groups),
        teacher=teacher,
        student=None if engines is None else StudentSamples(config, engines),
        publisher=publisher,
    )


def _publisher(
    config: DistillConfig, device: Device, policy: PolicyActors, engines: RolloutActors
) -> WeightPublisher:
    assert config.sampler is not None
    return WeightPublisher(
        policy,
        engines,
        config.weight_sync,
        transport=config.weight_sync.transport,
        turns=Turns(),
        adapter_scaling=adapter_scaling_of(config.sampler, device),
    )
