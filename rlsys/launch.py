"""A run from its config to its final model: data, folder, system, `driver.train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

# Imported before Ray, which reads the environment when it is imported.
from rlsys.actors.ray_env import check_cluster_answers, wait_for_cluster  # isort: skip
import torch

from rlsys import attempts
from rlsys.actors.logs import kept_logs
from rlsys.actors.ray_metrics import RayMetrics
from rlsys.actors.ray_session import ray_session
from rlsys.actors.reservation import node_cores
from rlsys.actors.silent import save_stacks_in
from rlsys.config import (
    Config,
    DistillConfig,
    PreferenceConfig,
    RewardModelConfig,
    RunConfig,
    SftConfig,
)
from rlsys.config.load import ResolvedConfig, save_config
from rlsys.config.roles import decide_cpu_threads
from rlsys.config.schema import AnyConfig
from rlsys.driver import train, train_distill, train_preference, train_score, train_sft
from rlsys.exit_codes import of_error
from rlsys.files import read_jsonl
from rlsys.interrupts import as_stopped, held_back, interruptible, is_impatient
from rlsys.plugins.load import loaded_files
from rlsys.preflight.before_preference import fit_to_preferences, load_preference_data
from rlsys.preflight.before_reward_model import fit_to_rows, load_score_data
from rlsys.preflight.before_sft import fit_to_samples, load_sample_data
from rlsys.preflight.before_start import fit_to_data, load_data
from rlsys.preflight.run_folder import plan_start
from rlsys.preflight.saving import checkpoint_bytes_of, saving_lines
from rlsys.redact import values_of_secrets
from rlsys.rollout.rollouts import Rollouts
from rlsys.run.checkpoints import Checkpoints
from rlsys.run.folder import RunDir
from rlsys.run.inputs import record_inputs
from rlsys.run.resume import move_aside, resume_notes, set_aside_later, with_threads_of
from rlsys.saving import make_checkpoints, save_final, save_last_step
from rlsys.system import StreamSystem, System, choose_device, start_sft_system, start_system
from rlsys.systems.distill import start_distill_system
from rlsys.systems.preference import start_preference_system
from rlsys.systems.score import start_score_system
from rlsys.text import counted
from rlsys.tracking import Tracker, build_tracker
from rlsys.tracking.base import run_name
from rlsys.tracking.health import Health, rules_of
from rlsys.tracking.numbers import NumbersTracker
from rlsys.tracking.outages import say_line

Data = TypeVar("Data")
AnySystem = TypeVar("AnySystem", bound=System | StreamSystem[Any, Any])


@dataclass(frozen=True, slots=True)
class Method(Generic[AnyConfig, Data, AnySystem]):
    """What is different between methods of training, in the order in which a run calls it."""

    load_data: Callable[[AnyConfig], Data]
    """Reads and checks all rows; raises ValueError for those that cannot be used."""
    fit_to_data: Callable[[AnyConfig, Data], AnyConfig]
    """The config with what only the data decides, such as the number of steps."""
    start: Callable[[AnyConfig, Data, Tracker], AnySystem]
    """Starts the roles on the connected cluster."""
    train: Callable[[AnySystem, Tracker, Checkpoints, Health], None]
    """Trains to the last step."""


def run(resolved: ResolvedConfig[Config]) -> None:
    """Train with GRPO, from the checks of the data to the final model."""
    run_method(resolved.config, Method(load_data, fit_to_data, start_system, train_system))


def run_sft(resolved: ResolvedConfig[SftConfig]) -> None:
    """Supervised training, as `run`."""
    run_method(
        resolved.config, Method(load_sample_data, fit_to_samples, start_sft_system, train_sft)
    )


def run_preference(resolved: ResolvedConfig[PreferenceConfig]) -> None:
    """Preference training, as `run`."""
    method = Method(
        load_preference_data, fit_to_preferences, start_preference_system, train_preference
    )
    run_method(resolved.config, method)


def run_reward_model(resolved: ResolvedConfig[RewardModelConfig]) -> None:
    """Train a score head, as `run`."""
    method = Method(load_score_data, fit_to_rows, start_score_system, train_score)
    run_method(resolved.config, method)


def run_distill(resolved: ResolvedConfig[DistillConfig]) -> None:
    """Distillation, as `run`."""
    method = Method(load_sample_data, fit_to_samples, start_distill_system, train_distill)
    run_method(resolved.config, method)


def run_method(config: AnyConfig, method: Method[AnyConfig, Data, AnySystem]) -> None:
    """Everything about a run that methods have in common."""
    run_dir = RunDir(Path(config.output_dir).resolve())
    # The driver computes little: on a host with 64 cores, waking 64 threads took 0.1 s a step, and
    # the computation takes 2 ms.
    torch.set_num_threads(1)
    attempts.end_with_parent()
    patience_s = config.recovery.wait_for_resources_s if attempts.is_restarted() else 0.0
    wait_for_cluster(check_cluster_answers, patience_s)
    # Before anything starts or is written: most mistakes are in rows.
    data = method.load_data(config)
    config = method.fit_to_data(config, data)
    with run_dir.held(), run_dir.recording_end(), _heeding_signals(config, run_dir):
        config, resume_step = prepare_folder(config, run_dir)
        tracker = build_tracker(config, resumed_from=resume_step)
        with (
            closing(tracker),
            ray_session(logs=run_dir.ray_logs, patience_s=patience_s),
            kept_logs(run_dir.logs, values_of_secrets(config.model_dump()), say_line),
            closing(tracker),  # before the actors end, which takes seconds
            _leaving_at_once(run_dir),
        ):
            save_stacks_in(run_dir.logs)
            tracker.add("Ray's metrics", NumbersTracker(RayMetrics(run_name(config)).set))
            config = fix_cpu_threads(config, run_dir)
            record_inputs(config, run_dir, resume_step, loaded_files())
            system = method.start(config, data, tracker)
            with closing(system.timeline), closing(system.restarts):
                health = make_health(config, run_dir, system, resumed=resume_step is not None)
                _train_and_save(
                    system,
                    lambda checkpoints: method.train(system, tracker, checkpoints, health),
                    run_dir,
                    resume_step,
                )
                if (nothing_learned := health.nothing_learned()) is not None:
                    print(f"warning: {nothing_learned}", flush=True)


def _train_and_save(
    system: System | StreamSystem[Any, Any],
    train: Callable[[Checkpoints], None],
    run_dir: RunDir,
    resume_step: int | None,
) -> None:
    """Train from the start, or from a checkpoint, and save what there is then, however it ends."""
    if resume_step is not None:
        system.load_checkpoint(run_dir.checkpoints / f"step-{resume_step}")
    size = checkpoint_bytes_of(system.config, system.device)
    checkpoints = make_checkpoints(system, run_dir, expected_bytes=size)
    try:
        train(checkpoints)
    except BaseException:
        if not is_impatient():
            save_last_step(system, run_dir, checkpoints, started_from=resume_step or 0)
        raise
    with held_back("the model is saved"):  # without checkpoints it is all that is left
        save_final(system, run_dir, checkpoints)


def prepare_folder(config: AnyConfig, run_dir: RunDir) -> tuple[AnyConfig, int | None]:
    """Move an earlier run aside or say what is continued; save the config.

    Returns:
        the config, with what a run that continues takes from the earlier one, and the step to
        continue from; None starts from step 0.
    """
    start = plan_start(config, read_all=True)
    if start.problem is not None:  # another run came first since the checks
        raise ValueError(start.problem)
    notes: Iterator[str] = iter(())
    if start.resume_step is not None:
        config = with_threads_of(config, run_dir, start.resume_step)
        notes = chain(
            resume_notes(config, run_dir, start.resume_step, start.damaged),
            set_aside_later(run_dir, start.resume_step),
        )
    elif start.moves_aside:
        notes = move_aside(run_dir)
    for note in notes:
        print(note, flush=True)
    save_config(config.model_copy(update={"overwrite": False}), run_dir.config)
    for line in saving_lines(config):
        print(line, flush=True)
    return config, start.resume_step


def fix_cpu_threads(config: AnyConfig, run_dir: RunDir) -> AnyConfig:
    """The config with policy.cpu_threads decided, as the run's config.yaml then has it.

    A run that is continued elsewhere takes the number from there, which may not be what its node
    has: a note says so.
    """
    device, cores = choose_device(config), node_cores()
    decided = decide_cpu_threads(config, device=device, cores=cores)
    threads, ranks = decided.policy.num_cpu_threads, decided.policy.world_size
    if device == "cpu" and threads > 1 and threads * ranks > cores:
        print(
            f"note: policy.cpu_threads {threads} x {counted(ranks, 'rank')} is more than the "
            f"{counted(cores, 'core')} of a node: steps take longer than with fewer threads",
            flush=True,
        )
    if decided is not config:
        save_config(decided.model_copy(update={"overwrite": False}), run_dir.config)
    return decided


def make_health(
    config: RunConfig, run_dir: RunDir, system: System | StreamSystem[Any, Any], *, resumed: bool
) -> Health:
    """What looks at the metrics of a run; a run that continues knows those from before."""
    dtype = config.model_dtype(on_cpu=system.device == "cpu")
    completions = run_dir.completions if config.completions_tracking else None
    rules = rules_of(config, dtype=dtype, completions=completions)
    health = Health(rules, config.tracking.stop_on)
    if resumed and run_dir.metrics.exists():
        health.replay(read_jsonl(run_dir.metrics))
    return health


def train_system(
    system: System, tracker: Tracker, checkpoints: Checkpoints, health: Health
) -> None:
    """Train to the last step, and end what is sampled in the background.

    Raises:
        Exception: what ended the run; a failure in the background before its consequences.
    """
    with ExitStack() as stack:
        stack.push(partial(_end_rollouts, system.rollouts))
        train(system, tracker, checkpoints, health)


def _heeding_signals(config: RunConfig, run_dir: RunDir) -> AbstractContextManager[None]:
    """`interruptible`, as the run's config wants it."""
    notice = config.checkpoint.preemption_file
    return interruptible(
        on_first=run_dir.mark_ended,
        exit_timeout_s=config.checkpoint.exit_timeout_s,
        preemption_file=None if notice is None else Path(notice),
    )


@contextmanager
def _leaving_at_once(run_dir: RunDir) -> Iterator[None]:
    """End this process after the second Ctrl-C: no picture, no wait for actors.

    Rows are in their files as soon as they are logged. Ray ends what it started when this process
    is gone, and the guard of rlsys.leftovers removes the rest.
    """
    try:
        yield
    except BaseException as error:
        if not is_impatient():
            raise
        error = as_stopped(error)
        run_dir.record_end(of_error(error), str(error))
        with suppress(OSError):  # the terminal may have been closed
            print(f"\n{error}", file=sys.stderr, flush=True)
        os._exit(of_error(error))


def _end_rollouts(
    rollouts: Rollouts,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Raise what failed in the background: it is the cause if an error ended the run."""
    if is_impatient():
        return
    failure = rollouts.close()
    if failure is None:
        return
    if isinstance(error, Exception):
        raise failure  # with `error` as its context
    if error is None:
        print(f"note: what was sampled beyond the last step failed: {failure}", flush=True)
