"""The checkpoints of a running system, and what is saved of a run that was interrupted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress

from rlsys.interrupts import seconds_to_save
from rlsys.run.checkpoints import Checkpoints, Models, checkpoint_steps
from rlsys.run.folder import RunDir
from rlsys.system import SftSystem, System


def make_checkpoints(system: System | SftSystem, run_dir: RunDir) -> Checkpoints:
    """The checkpoints of a run, and the models that it keeps besides."""
    config = system.config.checkpoint
    return Checkpoints(
        run_dir.checkpoints,
        write=system.write_checkpoint,
        config=config,
        last_step=system.config.num_steps,
        models=Models(run_dir.hf, write=system.policy.save_model, config=config),
    )


def save_last_step(
    system: System | SftSystem, run_dir: RunDir, checkpoints: Checkpoints, *, started_from: int
) -> None:
    """Save the last finished step of a run that was interrupted or failed, the weights first.

    Ends within checkpoint.exit_timeout_s, or the time that whoever stops the run gives, and raises
    no Exception. Says what was saved and how to continue.

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
        is_adapter = system.config.policy.lora is not None
        loads = "PEFT loads as an adapter" if is_adapter else "transformers loads as a model"
        _say(f"--checkpoint.resume continues from {newest}, which {loads}")


def _saving_last_step(
    system: System | SftSystem, run_dir: RunDir, checkpoints: Checkpoints, started_from: int
) -> Iterator[str]:
    """Save what can be saved; yields what is done."""
    config, policy = system.config, system.policy
    deadline = time.monotonic() + seconds_to_save(config.checkpoint.exit_timeout_s)

    def give_up_at_deadline() -> None:
        for actors in system.models:
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
    elif reason := system.why_no_checkpoint(step):
        yield f"{weights}; no checkpoint, because {reason}"
    else:
        give_up_at_deadline()
        checkpoints.save(step)
        shutil.rmtree(run_dir.interrupted)  # the checkpoint holds the same
        yield f"saved step {step}"


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may have been closed
        print(line, flush=True)
