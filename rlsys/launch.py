"""From a config to a running system: Ray, the actors of every role, then `driver.train`."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

# Imported before Ray, which reads the environment when it is imported.
from rlsys.actors.ray_env import check_cluster_answers  # isort: skip
import ray  # isort: skip
import torch

from rlsys.actors.group import START_TIMEOUT_S, ActorGroup
from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors
from rlsys.actors.ray_session import ray_session
from rlsys.actors.reference import ReferenceActors
from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.start_report import StartReport
from rlsys.actors.waiting import get_all
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config
from rlsys.config.load import ResolvedConfig, save_config
from rlsys.config.local_paths import with_absolute_paths
from rlsys.config.roles import plan_roles
from rlsys.data import PromptData
from rlsys.data.streams.make import make_prompt_stream
from rlsys.driver import train
from rlsys.interrupts import ImpatientInterrupt, held_back, interruptible
from rlsys.plugins.load import load_plugins
from rlsys.preflight.before_start import fit_to_data, load_data
from rlsys.preflight.memory import memory_warnings
from rlsys.preflight.run_folder import plan_start
from rlsys.preflight.saving import saving_lines
from rlsys.rollout.rollouts import Rollouts
from rlsys.run.checkpoints import Checkpoints, checkpoint_steps
from rlsys.run.folder import RunDir
from rlsys.run.resume import move_aside, resume_notes
from rlsys.tracking import Tracker, build_tracker
from rlsys.tracking.sampling_watch import SamplingWatch
from rlsys.types import Device

ROLLOUTS_FILE = "rollouts.json"
REFERENCE_FOLDER = "reference"


def run(resolved: ResolvedConfig) -> None:
    """Train, from the checks of the data to the final model."""
    config = resolved.config
    run_dir = RunDir(Path(config.output_dir).resolve())
    # The driver computes little: on a host with 64 cores, waking 64 threads took 0.1 s a step, and
    # the computation takes 2 ms.
    torch.set_num_threads(1)
    check_cluster_answers()
    with ExitStack() as stack:
        stack.enter_context(run_dir.held())
        stack.enter_context(interruptible(on_first=run_dir.mark_ended))
        data = load_data(config)  # before anything starts: most mistakes are in rows
        config = fit_to_data(config, data)
        resume_step = prepare_folder(config, run_dir)
        tracker = build_tracker(config, resumed_from=resume_step)
        stack.callback(tracker.close)
        stack.enter_context(ray_session())
        stack.callback(tracker.close)  # before the actors end, which takes seconds
        system = start_system(config, data, tracker)
        if resume_step is not None:
            system.load_checkpoint(run_dir.checkpoints / f"step-{resume_step}")
        checkpoints = make_checkpoints(system, run_dir.checkpoints)
        try:
            nothing_learned = train_system(system, tracker, checkpoints)
        except ImpatientInterrupt:
            raise
        except BaseException:
            save_last_step(system, run_dir, checkpoints, started_from=resume_step or 0)
            raise
        with held_back("the model is saved"):  # without checkpoints it is all that is left
            system.policy.save_model(run_dir.final)
            if nothing_learned is not None:
                print(f"warning: {nothing_learned}", flush=True)
            print(f"the trained model is in {run_dir.final}", flush=True)


def prepare_folder(config: Config, run_dir: RunDir) -> int | None:
    """Move an earlier run aside or say what is continued; save the config.

    Returns:
        the step to continue from; None starts from step 0.
    """
    start = plan_start(config)
    if start.problem is not None:  # another run came first since the checks
        raise ValueError(start.problem)
    notes: Iterator[str] = iter(())
    if start.resume_step is not None:
        notes = resume_notes(config, run_dir, start.resume_step)
    elif start.moves_aside:
        notes = move_aside(run_dir)
    for note in notes:
        print(note, flush=True)
    save_config(config.model_copy(update={"overwrite": False}), run_dir.config)
    for line in saving_lines(config):
        print(line, flush=True)
    return start.resume_step


@dataclass(frozen=True, slots=True)
class System:
    """The running roles of one config, as the driver uses them."""

    config: Config
    device: Device
    policy: PolicyActors
    reference: ReferenceActors | None
    rollouts: Rollouts
    publisher: WeightPublisher

    def write_checkpoint(self, folder: Path, step: int) -> None:
        """Write everything that continuing after `step` needs into an empty folder."""
        self.policy.save_checkpoint(folder)
        if self.reference is not None and self.config.reference.sync_steps is not None:
            self.reference.save_model(folder / REFERENCE_FOLDER)  # it has changed
        (folder / ROLLOUTS_FILE).write_text(json.dumps(self.rollouts.state_after(step)))

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
        if self.reference is not None and (folder / REFERENCE_FOLDER).exists():
            self.reference.load_model(folder / REFERENCE_FOLDER)
        self.rollouts.load_state_dict(json.loads((folder / ROLLOUTS_FILE).read_text()))


def start_system(config: Config, data: PromptData, tracker: Tracker) -> System:
    """Start the actors of every role on the connected cluster and wait until all are ready."""
    config = with_absolute_paths(config)
    load_plugins(config.grpo.external_plugins)  # the driver calls the advantage estimator
    prompts = make_prompt_stream(config, data)
    device = choose_device(config)
    placement = Placement(config, device=device)
    num_actors = Counter(role.name for role in plan_roles(config, device=device))
    actors = ", ".join(f"{name} {number}" for name, number in num_actors.items())
    print(f"starting on {device}: {actors}", flush=True)
    for warning in memory_warnings(config, device):
        print(f"note: this may not fit: {warning}", flush=True)
    with StartReport() as report:
        rewards = RewardWorkers(
            config.reward,
            run_values=config.run_values,
            plugins=config.data.external_plugins,
            max_steps=config.num_steps,
            place=partial(placement.options, "reward_model") if device == "cuda" else None,
        )
        engines = RolloutActors(config, device=device, place=partial(placement.options, "rollout"))
        policy = PolicyActors(config, device=device, place=partial(placement.options, "policy"))
        groups: list[ActorGroup] = [engines, policy]
        reference = None
        if config.grpo.beta > 0:
            place = partial(placement.options, "reference")
            reference = ReferenceActors(config, device=device, place=place)
            groups.append(reference)
        for group in groups:
            report.waiting_for(group.actors)
        starting = {name: ref for group in groups for name, ref in group.async_start().items()}
        report.waiting_for(["reward functions"])
        rewards.start()
        report.ready("reward functions")
        get_all(starting, phase="start", timeout_s=START_TIMEOUT_S, on_done=report.ready)
        report.waiting_for(["weight sync to connect"])
        publisher = WeightPublisher(policy, engines, config.weight_sync)
        if reference is not None and config.reference.sync_steps is not None:
            reference.connect_to(policy)
    rollouts = Rollouts(
        config,
        engines=engines,
        rewards=rewards,
        prompts=prompts,
        training=data.train,
        validation=data.validation,
        tracker=tracker,
    )
    return System(config, device, policy, reference, rollouts, publisher)


def choose_device(config: Config) -> Device:
    """The device of the run; "auto" is cuda when the cluster has GPUs."""
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"


def make_checkpoints(system: System, folder: Path) -> Checkpoints:
    """The checkpoints of a run, in `folder`."""
    return Checkpoints(
        folder,
        write=system.write_checkpoint,
        config=system.config.checkpoint,
        last_step=system.config.num_steps,
    )


def train_system(system: System, tracker: Tracker, checkpoints: Checkpoints) -> str | None:
    """Train to the last step, and end what is sampled in the background.

    Returns:
        None, or why the steps taught nothing.

    Raises:
        Exception: what ended the run; a failure in the background before its consequences.
    """
    config = system.config
    watch = SamplingWatch(config, dtype=config.model_dtype(on_cpu=system.device == "cpu"))
    with ExitStack() as stack:
        stack.push(partial(_end_rollouts, system.rollouts))
        train(
            config,
            system.rollouts,
            system.policy,
            system.reference,
            system.publisher,
            tracker,
            checkpoints,
            watch,
        )
    return watch.nothing_learned()


def _end_rollouts(
    rollouts: Rollouts,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Raise what failed in the background: it is the cause if an error ended the run."""
    failure = rollouts.close()
    if failure is None:
        return
    if isinstance(error, Exception):
        raise failure  # with `error` as its context
    if error is None:
        print(f"note: what was sampled beyond the last step failed: {failure}", flush=True)


def save_last_step(
    system: System, run_dir: RunDir, checkpoints: Checkpoints, *, started_from: int
) -> None:
    """Save the last finished step of a run that was interrupted or failed, the weights first.

    Ends within checkpoint.exit_timeout_s and raises no Exception. Says what was saved and how to
    continue.

    Args:
        system: its policy has to answer.
        run_dir: the run's folder.
        checkpoints: the run's checkpoints.
        started_from: the policy's version at the start of this process.
    """
    try:
        for line in _saving_last_step(system, run_dir, checkpoints, started_from):
            _say(line)
    except Exception as error:  # why the run ended matters more
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        _say(f"not saved: {reason[0]}")
        if run_dir.interrupted.exists():
            _say(f"the weights are in {run_dir.interrupted}")
    steps = checkpoint_steps(run_dir.checkpoints)
    if steps:
        newest = run_dir.checkpoints / f"step-{steps[-1]}"
        _say(f"--checkpoint.resume continues from {newest}, which transformers loads as a model")


def _saving_last_step(
    system: System, run_dir: RunDir, checkpoints: Checkpoints, started_from: int
) -> Iterator[str]:
    """Save what can be saved; yields what is done."""
    config, policy, reference = system.config, system.policy, system.reference
    deadline = time.monotonic() + config.checkpoint.exit_timeout_s

    def give_up_at_deadline() -> None:
        for actors in (policy, reference):
            if actors is not None:
                actors.timeout_s = max(0.0, deadline - time.monotonic())

    give_up_at_deadline()
    step = policy.finished_version()
    if step is None:
        yield "nothing saved: the policy is in the middle of an update"
        return
    if step == started_from:
        yield "nothing to save: no step was finished since the start"
        return
    if step in checkpoint_steps(run_dir.checkpoints):
        yield f"step {step}, the last one, was saved already"
        return
    yield f"saving step {step}; Ctrl-C again ends without it"
    policy.save_model(run_dir.interrupted)
    weights = f"saved the weights of step {step} in {run_dir.interrupted}"
    if config.checkpoint.save_steps is None:
        yield (f"{weights}; another run, in another folder, can start from them with --model.path")
    elif reference is not None and config.syncs_reference(step) and reference.synced_after != step:
        yield f"{weights}; no checkpoint, because the reference was not synced after this step"
    else:
        give_up_at_deadline()
        checkpoints.save(step)
        shutil.rmtree(run_dir.interrupted)  # the checkpoint holds the same
        yield f"saved step {step}"


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may have been closed
        print(line, flush=True)
