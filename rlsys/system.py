"""The running roles of one config: how they start, and their checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic

# Imported before all that imports Ray, which reads the environment when it is imported.
import rlsys.actors.ray_env  # noqa: F401  # isort: skip

from rlsys.actors.group import START_TIMEOUT_S, ActorGroup
from rlsys.actors.model_group import ModelActors
from rlsys.actors.node_check import check_nodes
from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors
from rlsys.actors.profile import Profiler
from rlsys.actors.recovery import Restarts
from rlsys.actors.reference import (
    REFERENCE_FOLDER,
    PolicyBase,
    Reference,
    ReferenceActors,
)
from rlsys.actors.reservation import cluster_gpus
from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.start_report import StartReport
from rlsys.actors.teacher import TeacherActors
from rlsys.actors.turns import SharedTurns, Turns
from rlsys.actors.waiting import get_all
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config, RunConfig, SftConfig
from rlsys.config.local_paths import with_absolute_paths
from rlsys.config.roles import decide_placement, plan_roles
from rlsys.config.schema import AnyConfig
from rlsys.data import PromptData
from rlsys.data.samples import SampleData
from rlsys.data.streams.base import Stream, T
from rlsys.data.streams.make import make_prompt_stream, make_sample_stream
from rlsys.model.adapters import syncs_adapter, with_stored_settings
from rlsys.model.folder import find_model_folder
from rlsys.model.lora import plan_lora
from rlsys.model.shape import read_model_shape
from rlsys.model.weight_files import DATA_FILE, ROLLOUTS_FILE
from rlsys.plugins.load import load_plugins
from rlsys.preflight.memory import memory_warnings
from rlsys.rollout.rollouts import Rollouts
from rlsys.run.checkpoints import AwaitFiles, checkpoint_steps
from rlsys.run.folder import RunDir
from rlsys.run.manifest import checkpoint_problem
from rlsys.timeline.spans import Timeline
from rlsys.tracking import Tracker
from rlsys.types import Device, Sample


@dataclass(frozen=True, slots=True)
class System:
    """The running roles of one config, as the driver uses them."""

    config: Config
    device: Device
    policy: PolicyActors
    """The trained model."""
    reference: Reference | None
    """What the KL term measures from; None when beta = 0."""
    teacher: TeacherActors | None
    """What the policy is distilled from; None when opd_kl_coef = 0."""
    rollouts: Rollouts
    """Prompts in, scored groups out; may sample ahead of the policy."""
    publisher: WeightPublisher
    """Gives every rollout engine the policy's weights."""
    restarts: Restarts
    """Of all roles; watches their actors too."""
    timeline: Timeline = field(default_factory=Timeline)
    """What each actor does when."""

    def begin_checkpoint(self, folder: Path, step: int) -> AwaitFiles:
        """Start writing everything that continuing after `step` needs into an empty folder."""
        (folder / ROLLOUTS_FILE).write_text(json.dumps(self.rollouts.state_after(step)))
        of_policy = self.policy.begin_checkpoint(folder)
        if self.reference is None:
            return of_policy
        of_reference = self.reference.begin_state(folder / REFERENCE_FOLDER)
        return lambda: {
            **of_policy(),
            **{f"{REFERENCE_FOLDER}/{name}": sums for name, sums in of_reference().items()},
        }

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: an older rlsys wrote it, without the state of the data.
        """
        if not (folder / ROLLOUTS_FILE).exists():
            raise ValueError(
                f"{folder} has no {ROLLOUTS_FILE}, so it was written by an older rlsys and does "
                "not say where in the data the run was. Start a new run from its weights: set "
                "model.path to the model of that run, and another output_dir."
            )
        self.policy.load_checkpoint(folder)
        if self.reference is not None:
            self.reference.load_state(folder / REFERENCE_FOLDER)
        self.rollouts.load_state_dict(json.loads((folder / ROLLOUTS_FILE).read_text()))

    @property
    def models(self) -> list[ModelActors]:
        """The models that save themselves."""
        reference = self.reference
        return [self.policy, reference] if isinstance(reference, ReferenceActors) else [self.policy]

    def why_no_checkpoint(self, step: int) -> str | None:
        """Why the state after `step`, the policy's last, cannot be continued from."""
        if self.reference is None or not self.config.syncs_reference(step):
            return None
        if self.reference.synced_after == step:
            return None
        return "the reference was not synced after this step"


@dataclass(slots=True)
class StreamSystem(Generic[AnyConfig, T]):
    """The running roles of a method that trains on what its data has, as its loop uses them."""

    config: AnyConfig
    device: Device
    policy: PolicyActors
    """The trained model."""
    samples: Stream[T]
    """What it is trained on, step by step."""
    held_out_sets: dict[str, list[T]]
    """What it is evaluated on, by the name of the set; data.val_dataset is ""."""
    restarts: Restarts
    """Of the policy's ranks; watches them too."""
    timeline: Timeline = field(default_factory=Timeline)
    """What each of them does when."""
    num_tokens: int = 0
    """Tokens trained on so far, prompts included, as TRL counts them."""
    _samples_state: dict[str, Any] = field(default_factory=dict)
    """Of `samples`, after the last finished step."""

    @property
    def models(self) -> list[ModelActors]:
        """The models that save themselves."""
        return [self.policy]

    def why_no_checkpoint(self, step: int) -> str | None:
        """A step that is finished can always be continued from."""

    def finish_step(self, num_tokens: int) -> None:
        """Note that the policy was trained on all that was taken, `num_tokens` more tokens.

        A run that ends between two steps may have taken samples that it was not trained on; its
        checkpoint gives them again.
        """
        self.num_tokens += num_tokens
        self._samples_state = self.samples.state_dict()

    def begin_checkpoint(self, folder: Path, step: int) -> AwaitFiles:
        """Start writing everything that continuing after `step` needs into an empty folder."""
        state = {"samples": self._samples_state, "num_tokens": self.num_tokens}
        (folder / DATA_FILE).write_text(json.dumps(state))
        return self.policy.begin_checkpoint(folder)

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: another method of training wrote it.
        """
        if not (folder / DATA_FILE).exists():
            raise ValueError(
                f"{folder} has no {DATA_FILE}, so `rlsys {self.config.command}` did not write it. "
                "Start a new run from its weights: set model.path to it, and another output_dir."
            )
        self.policy.load_checkpoint(folder)
        state = json.loads((folder / DATA_FILE).read_text())
        self._samples_state = state["samples"]
        self.samples.load_state_dict(self._samples_state)
        self.num_tokens = state["num_tokens"]


class SftSystem(StreamSystem[SftConfig, Sample]):
    """The running roles of supervised training."""


def start_system(config: Config, data: PromptData, tracker: Tracker) -> System:
    """Start the actors of every role on the connected cluster and wait until all are ready."""
    config = with_stored_settings(with_absolute_paths(config))
    load_plugins(config.grpo.external_plugins)  # the driver calls the advantage estimator
    prompts = make_prompt_stream(config, data)
    device = choose_device(config)
    config = decide_placement(config, device=device, num_gpus=cluster_gpus())
    placement = Placement(config, device=device)
    check_nodes(config, placement.roles_of_nodes())
    say_start(config, device)
    with StartReport() as report:
        rewards = _reward_workers(config, device, placement)
        engines = RolloutActors(config, device=device, place=partial(placement.options, "rollout"))
        policy = PolicyActors(config, device=device, place=partial(placement.options, "policy"))
        reference = _reference_actors(config, device, placement, policy)
        teacher = _teacher_actors(config, device, placement, policy)
        frozen = (reference, teacher)
        others = [group for group in frozen if isinstance(group, ModelActors)]
        for group in (engines, policy, *others):
            report.waiting_for(group.actors)

        def start_rewards() -> None:
            report.waiting_for(["reward functions"])
            rewards.start()
            report.ready("reward functions")

        turns = Turns()
        if config.is_colocated:
            turns = SharedTurns(config.colocated, engines, policy, *others)
        turns.start([engines, policy, *others], meanwhile=start_rewards, on_done=report.ready)
        report.waiting_for(["weight sync to connect"])
        publisher = WeightPublisher(
            policy,
            engines,
            config.weight_sync,
            transport=_transport(config, device),
            turns=turns,
            adapter_scaling=adapter_scaling_of(config, device),
        )
        if isinstance(reference, ReferenceActors) and config.reference.sync_steps is not None:
            reference.connect_to(policy)
    restarts = make_restarts(config)
    let_engines_restart(engines, publisher, restarts)
    restarts.heartbeats.watch(rewards, config.reward.heartbeat_s)
    for model in (policy, *others):
        let_restart(model, restarts, config)
    timeline = start_timeline(config, device, tracker, engines, rewards, policy, *others)
    rollouts = Rollouts(
        config,
        engines=engines,
        rewards=rewards,
        prompts=prompts,
        training=data.train,
        held_out=data.held_out_sets,
        tracker=tracker,
    )
    return System(
        config, device, policy, reference, teacher, rollouts, publisher, restarts, timeline
    )


def _reference_actors(
    config: Config, device: Device, placement: Placement, policy: PolicyActors
) -> Reference | None:
    if config.reference_is_base:
        return PolicyBase(policy)
    if not config.has_reference_model:
        return None
    place = partial(placement.options, "reference")
    return ReferenceActors(config, device=device, place=place, policy=policy)


def _teacher_actors(
    config: Config, device: Device, placement: Placement, policy: PolicyActors
) -> TeacherActors | None:
    if config.used_teacher is None:
        return None
    place = partial(placement.options, "teacher")
    return TeacherActors(config, device=device, place=place, policy=policy)


def _reward_workers(config: Config, device: Device, placement: Placement) -> RewardWorkers:
    return RewardWorkers(
        config.reward,
        run_values=config.run_values,
        plugins=config.data.external_plugins,
        max_steps=config.num_steps,
        place=partial(placement.options, "reward_model") if device == "cuda" else None,
        place_worker=placement.reward_options,
    )


def _transport(config: Config, device: Device) -> str:
    """weight_sync.transport, decided as far as it depends on who shares GPUs."""
    on_shared_gpus = config.is_colocated and device == "cuda"
    chosen = config.weight_sync.transport
    return "ipc" if chosen == "auto" and on_shared_gpus else chosen


def adapter_scaling_of(config: Config, device: Device) -> float | None:
    """Factor of B A in the policy's LoRA adapter, if engines sample with it."""
    if config.policy.lora is None:
        return None
    shape = read_model_shape(find_model_folder(config.model.path), may_bridge=True)
    if not syncs_adapter(config, shape, device):
        return None
    return plan_lora(config.policy.lora, shape).scale


def start_sft_system(config: SftConfig, data: SampleData, tracker: Tracker) -> SftSystem:
    """Start the policy's actors on the connected cluster and wait until all are ready."""
    config = with_absolute_paths(config)
    device = choose_device(config)
    placement = Placement(config, device=device)
    check_nodes(config, placement.roles_of_nodes())
    say_start(config, device)
    with StartReport() as report:
        policy = PolicyActors(config, device=device, place=partial(placement.options, "policy"))
        report.waiting_for(policy.actors)
        get_all(
            policy.async_start(), phase="start", timeout_s=START_TIMEOUT_S, on_done=report.ready
        )
    restarts = make_restarts(config)
    let_restart(policy, restarts, config)
    timeline = start_timeline(config, device, tracker, policy)
    samples = make_sample_stream(config, data)
    return SftSystem(config, device, policy, samples, data.held_out_sets, restarts, timeline)


def start_timeline(
    config: RunConfig, device: Device, tracker: Tracker, *roles: ActorGroup | RewardWorkers
) -> Timeline:
    """Record from here on what the actors of these roles do."""
    tracker.begin(config, device)
    timeline = Timeline(tracker.log_timeline)
    for role in roles:
        role.timeline = timeline
    groups = {role.timeline_role: role for role in roles if isinstance(role, ActorGroup)}
    Profiler(config, device, groups, timeline, RunDir(Path(config.output_dir)).profile)
    return timeline


def let_engines_restart(
    engines: RolloutActors, publisher: WeightPublisher, restarts: Restarts
) -> None:
    """Have engines that fail replaced, or say why they are not."""
    if restarts.enabled and engines.why_no_restart is not None:
        print(f"note: rollout engines that fail end the run: {engines.why_no_restart}", flush=True)
    engines.publisher = publisher
    restarts.watch(engines, engines.config.rollout.heartbeat_s)


def make_restarts(config: RunConfig) -> Restarts:
    """What starts actors again, as far as the config allows."""
    return Restarts(config.recovery, table=RunDir(Path(config.output_dir)).actors)


def let_restart(model: ModelActors, restarts: Restarts, config: RunConfig) -> None:
    """Have ranks that fail replaced, and let them go back to the run's checkpoints."""
    folder = RunDir(Path(config.output_dir)).checkpoints

    def newest_first() -> Iterator[tuple[int, Path]]:
        for step in reversed(checkpoint_steps(folder)):
            if checkpoint_problem(folder / f"step-{step}", read_all=True) is None:
                yield step, folder / f"step-{step}"

    model.checkpoints = newest_first
    restarts.watch(model, config.policy.heartbeat_s)


def say_start(config: RunConfig, device: Device) -> None:
    """Print which actors start, and what may not fit."""
    num_actors = Counter(role.name for role in plan_roles(config, device=device))
    actors = ", ".join(f"{name} {number}" for name, number in num_actors.items())
    sharing = ", taking turns on the same GPUs" if config.is_colocated else ""
    print(f"starting on {device}: {actors}{sharing}", flush=True)
    for warning in memory_warnings(config, device):
        print(f"note: this may not fit: {warning}", flush=True)


def choose_device(config: RunConfig) -> Device:
    """The device of the run; "auto" is cuda when the cluster has GPUs."""
    if config.device != "auto":
        return config.device
    return "cuda" if cluster_gpus() else "cpu"
