"""From a config to a running system: Ray, the actors of every role, then `driver.train`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

# Before Ray is imported, which reads some of the environment then.
from rlsys.text import counted

from rlsys.actors.ray_env import check_cluster_answers  # isort: skip
import ray  # isort: skip
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsys.actors.group import START_TIMEOUT_S
from rlsys.actors.model_group import ModelActors
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
from rlsys.config.local_paths import is_in_job_copy, with_absolute_paths
from rlsys.config.roles import plan_roles
from rlsys.data import PromptData, load_checked_prompts
from rlsys.data.sources import raise_if_any
from rlsys.data.streams.make import make_prompt_stream
from rlsys.driver import train
from rlsys.interrupts import ImpatientInterrupt, held_back, interruptible
from rlsys.model.detokenize import Detokenizer
from rlsys.model.folder import find_model_folder, resolve_model_path
from rlsys.model.folder_check import check_model_folder, model_notes
from rlsys.model.memory import estimate_memory
from rlsys.model.shape import read_model_shape
from rlsys.model.stop_tokens import read_stop_rules
from rlsys.preflight.data import check_prompt_tokens
from rlsys.preflight.devices import gpu_memory_gib, guess_device
from rlsys.preflight.hub import use_cache_without_hub
from rlsys.preflight.memory import card_warnings
from rlsys.preflight.rewards import reachable_rewards
from rlsys.preflight.run_folder import output_dir_problems
from rlsys.preflight.saving import describe_saving, disk_use, disk_warning
from rlsys.rewards import load_plugins
from rlsys.rewards.columns import column_problems_of_run, unread_columns
from rlsys.rewards.reachable import GOLD_REMEDY, look_at_rows
from rlsys.rollout.rollouts import Rollouts
from rlsys.run.checkpoints import (
    REFERENCE_FOLDER,
    Checkpoints,
    checkpoint_steps,
    load_rollouts_state,
)
from rlsys.run.folder import RunDir
from rlsys.run.last_step import save_last_step
from rlsys.run.resume import move_aside, resume_notes
from rlsys.tracking import Tracker, build_tracker
from rlsys.tracking.sampling_watch import SamplingWatch
from rlsys.types import Device


@dataclass(frozen=True, slots=True)
class System:
    """The running roles of one config, as the driver uses them."""

    policy: PolicyActors
    reference: ReferenceActors | None
    rollouts: Rollouts
    publisher: WeightPublisher


def run(resolved: ResolvedConfig) -> None:
    """Train, from the checks of the data to the final model."""
    config = resolved.config
    run_dir = RunDir(Path(config.output_dir).resolve())
    # What the driver computes is small: on a host with 64 cores, to wake as many threads took
    # 0.1 s a step, to compute it takes 2 ms.
    torch.set_num_threads(1)
    check_cluster_answers()
    with ExitStack() as stack:
        stack.enter_context(run_dir.held())
        stack.enter_context(interruptible(on_first=run_dir.mark_ended))
        data = load_data(config)  # before anything starts: rows are where most mistakes are
        for note in step_notes(config, len(data.train)):
            print(note, flush=True)
        config = without_impossible_checkpoints(config.with_steps(len(data.train)), data)
        for problem in output_dir_problems(config):  # of a run that was faster than this one
            raise ValueError(problem.text)
        steps = checkpoint_steps(run_dir.checkpoints)
        resume_step = steps[-1] if config.checkpoint.resume and steps else None
        if resume_step is not None:
            for note in resume_notes(config, run_dir, resume_step):
                print(note, flush=True)
        elif config.overwrite:
            for note in move_aside(run_dir):
                print(note, flush=True)
        save_config(config.model_copy(update={"overwrite": False}), run_dir.config)
        for line in saving_lines(config):
            print(line, flush=True)
        if is_in_job_copy(run_dir.path):
            print(
                f"note: {run_dir.path} is in this Ray job's copy of the working directory, which "
                "Ray may delete after the job. Give an absolute --output_dir to keep what the run "
                "writes.",
                flush=True,
            )
        tracker = build_tracker(config, resumed_from=resume_step)
        stack.callback(tracker.close)
        stack.enter_context(ray_session())
        stack.callback(tracker.close)  # before the actors end, which takes seconds
        system = start_system(config, data, tracker)
        if resume_step is not None:
            checkpoint = run_dir.checkpoints / f"step-{resume_step}"
            system.policy.load_checkpoint(checkpoint)
            if system.reference is not None and (checkpoint / REFERENCE_FOLDER).exists():
                system.reference.load_model(checkpoint / REFERENCE_FOLDER)
            system.rollouts.load_state_dict(load_rollouts_state(checkpoint))
        checkpoints = make_checkpoints(config, system, run_dir.checkpoints)
        try:
            nothing_learned = train_system(config, system, tracker, checkpoints)
        except ImpatientInterrupt:
            raise
        except BaseException:
            save_last_step(
                config,
                run_dir,
                checkpoints,
                system.policy,
                system.reference,
                system.rollouts,
                started_from=resume_step or 0,
            )
            raise
        with held_back("the model is saved"):  # where there is no checkpoint, it is all there is
            system.policy.save_model(run_dir.final)
            if nothing_learned is not None:
                print(f"warning: {nothing_learned}", flush=True)
            print(f"the trained model is in {run_dir.final}", flush=True)


def train_system(
    config: Config, system: System, tracker: Tracker, checkpoints: Checkpoints
) -> str | None:
    """Train to the last step, and end what is sampled in the background.

    Returns:
        why the steps taught nothing; None if they did.

    Raises:
        Exception: whatever ended the run; a failure in the background before what came of it.
    """
    on_cpu = choose_device(config) == "cpu"
    watch = SamplingWatch(config, dtype=config.model_dtype(on_cpu=on_cpu))
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


def make_checkpoints(config: Config, system: System, folder: Path) -> Checkpoints:
    """What writes the checkpoints of a run into `folder`."""
    return Checkpoints(
        folder,
        policy=system.policy,
        reference=system.reference if config.reference.sync_steps else None,
        rollouts=system.rollouts,
        config=config.checkpoint,
        last_step=config.num_steps,
    )


def _end_rollouts(
    rollouts: Rollouts,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Tell what failed beside the driver: it is why a run ended that did not end by itself."""
    unheard = rollouts.close()
    if unheard is None:
        return
    if isinstance(error, Exception):
        raise unheard  # with `error` as its context
    if error is None:
        print(f"note: what was sampled beyond the last step failed: {unheard}", flush=True)


def start_system(config: Config, data: PromptData, tracker: Tracker) -> System:
    """Start the actors of every role on the connected cluster and wait until all are ready."""
    config = with_absolute_paths(config)
    prompts = make_prompt_stream(config, data)
    device = choose_device(config)
    placement = Placement(config, device=device)
    num_actors = Counter(role.name for role in plan_roles(config, device=device))
    actors = ", ".join(f"{name} {number}" for name, number in num_actors.items())
    print(f"starting on {device}: {actors}", flush=True)
    for warning in memory_warnings(config, device):
        print(f"note: this may not fit: {warning}", flush=True)
    with StartReport() as report:
        report.waiting_for(["reward functions"])
        rewards = RewardWorkers(
            config.reward,
            known=config.known_to_rewards,
            plugins=config.data.external_plugins,
            max_steps=config.num_steps,
            place=partial(placement.options, "reward_model") if device == "cuda" else None,
        )
        report.ready("reward functions")
        engines = RolloutActors(config, device=device, place=partial(placement.options, "rollout"))
        policy = PolicyActors(config, device=device, place=partial(placement.options, "policy"))
        reference = None
        if config.grpo.beta > 0:
            reference = ReferenceActors(
                config, device=device, place=partial(placement.options, "reference")
            )
        groups: list[RolloutActors | ModelActors] = [engines, policy]
        groups += [] if reference is None else [reference]
        for group in groups:
            report.waiting_for(group.actors)
        starting = {name: ref for group in groups for name, ref in group.async_start().items()}
        get_all(starting, phase="start", timeout_s=START_TIMEOUT_S, on_done=report.ready)
        rollouts = Rollouts(
            config,
            engines=engines,
            rewards=rewards,
            prompts=prompts,
            training=data.train,
            validation=data.validation,
            tracker=tracker,
        )
        report.waiting_for(["weight sync to connect"])
        publisher = WeightPublisher(policy, engines, config.weight_sync)
        if reference is not None and config.reference.sync_steps is not None:
            reference.follow(policy)
    return System(policy, reference, rollouts, publisher)


def memory_warnings(config: Config, device: Device) -> list[str]:
    """Where a GPU of this machine is too small; those of a running cluster are not seen here."""
    card_gib = gpu_memory_gib() if device == "cuda" and "RAY_ADDRESS" not in os.environ else None
    if card_gib is None:
        return []
    policy, reference = (
        read_model_shape(find_model_folder(path))
        for path in (
            config.model.path,
            config.reference_path if config.grpo.beta else config.model.path,
        )
    )
    return card_warnings(
        config, estimate_memory(config, policy, reference, device=device), card_gib
    )


def check_prompts(config: Config, data: PromptData) -> None:
    """Refuse data of which one step would hold some prompts twice, or without a reward's columns.

    Raises:
        ValueError: fewer prompts than a step needs; a column that a reward function needs and no
            row has, or of streamed rows that no checkpoint can hold.
    """
    ahead = config.num_prompts_ahead
    if not config.data.streaming and len(data.train) < config.num_prompts + ahead:
        needed, remedy = "", "lower generation_batch_size"
        if ahead:
            needed = f" and {ahead} ahead of it (rollout.oversample_prompts, max_staleness)"
            remedy += ", oversample_prompts or max_staleness"
        raise ValueError(
            f"a step needs {counted(config.num_prompts, 'prompt')} "
            f"(rollout.generation_batch_size / rollout.num_generations){needed}, but the training "
            f"data has {len(data.train)}. Give more data or {remedy}."
        )
    if ahead and isinstance(config.checkpoint.save_steps, int) and data.unsaveable:
        raise ValueError("\n".join(data.unsaveable))
    load_plugins(config.reward.external_plugins)
    held_out = {column: None for prompt in data.validation for column in prompt.columns}
    problems = column_problems_of_run(config, data.columns, held_out if data.validation else None)
    if problems:
        raise ValueError("\n".join(problems))


def check_right_answers(
    config: Config, data: PromptData, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Warn of rows whose right answer a reward function cannot use, or no completion could give.

    Raises:
        ValueError: a function that scores every completion can use that of no row.
    """
    streamed = [prompt for stream in data.streams for prompt in stream.first_prompts]
    prompts = [*data.train, *streamed, *data.validation]
    useless = []
    for finding in look_at_rows(reachable_rewards(config, tokenizer), prompts):
        if finding.kills_reward and finding.name in config.reward.names_that_check_rows:
            useless.append(finding.text)
        else:
            print(f"warning: {finding.text}; `rlsys data preview` shows them", flush=True)
    if useless:
        raise ValueError("\n".join(f"{text}. {GOLD_REMEDY}" for text in useless))


def load_data(config: Config) -> PromptData:
    """The prompts of a run, with the chat template of its model."""
    use_cache_without_hub(config)
    folder = resolve_model_path(config.model.path)
    if folder != Path(config.model.path):  # it came from the hub: preflight saw its config only
        check_model_folder(folder, has_prompts=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_checked_prompts(config, tokenizer)
    check_prompt_tokens(folder, tokenizer, [*data.train, *data.validation])
    stops = read_stop_rules(folder, tokenizer, config.rollout)
    for text in model_notes(folder):
        print(f"note: {text}", flush=True)
    for line in data.summary():
        print(line, flush=True)
    check_prompts(config, data)
    note = Detokenizer(tokenizer, config.rollout.skip_special_tokens, stops.eos_token_ids).note()
    if note is not None:
        print(f"note: {note}", flush=True)
    held_out = [column for prompt in data.validation[:1] for column in prompt.columns]
    unread = unread_columns(config, dict.fromkeys([*data.columns, *held_out]))
    if unread is not None:
        print(f"data: {unread}", flush=True)
    raise_if_any(data.refused)
    check_right_answers(config, data, tokenizer)
    return data


def step_notes(config: Config, num_rows: int) -> Iterator[str]:
    """What num_train_epochs comes to, or that it has no effect."""
    steps = config.steps_of_epochs(num_rows)
    if steps is None or steps == config.max_steps:
        return
    epochs = (
        f"num_train_epochs {config.num_train_epochs:g} x {counted(num_rows, 'prompt')} / "
        f"{config.num_prompts} a step = {counted(steps, 'step')}"
    )
    if config.max_steps is None:
        yield epochs
    else:
        yield f"note: max_steps = {config.max_steps} goes before {epochs}"


def without_impossible_checkpoints(config: Config, data: PromptData) -> Config:
    """`save_steps: auto` is no reason to refuse data that a checkpoint cannot hold."""
    if not config.num_prompts_ahead or config.checkpoint.save_steps is None or not data.unsaveable:
        return config
    print("note: no checkpoints are written:\n" + "\n".join(data.unsaveable), flush=True)
    checkpoint = config.checkpoint.model_copy(update={"save_steps": None})
    return config.model_copy(update={"checkpoint": checkpoint})


def saving_lines(config: Config) -> Iterator[str]:
    """What the run saves, how often, where, and how much disk that takes."""
    shape = read_model_shape(resolve_model_path(config.model.path))
    use = disk_use(config, shape, device=guess_device(config))
    yield "saving: " + "; ".join(f"{what} {text}" for what, text in describe_saving(config, use))
    warning = disk_warning(config, use)
    if warning is not None:
        yield f"warning: {warning}"


def choose_device(config: Config) -> Device:
    """The device of the run; "auto" is cuda when the cluster has GPUs."""
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
