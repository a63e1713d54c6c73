"""The checkpoints of a running system, and what is saved of a run that was interrupted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlsys.file_sums import FileSum
from rlsys.interrupts import seconds_to_save
from rlsys.problems import RunFailed
from rlsys.run.best import write_best_model
from rlsys.run.checkpoints import AwaitFiles, Checkpoints, Models
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.system import StreamSystem, System

AnySystem = System | StreamSystem[Any, Any]
"""The running roles of any method."""
WRITER = "checkpoint writer"
"""The thread that waits for the disk, as the timeline has it."""


def make_checkpoints(system: AnySystem, run_dir: RunDir, *, expected_bytes: int = 0) -> Checkpoints:
    """The checkpoints of a run, and the models that it keeps besides.

    Args:
        system: writes them.
        run_dir: the run's folder.
        expected_bytes: of a checkpoint; 0 if that is not known.
    """
    config = system.config.checkpoint

    def write(folder: Path, step: int) -> AwaitFiles:
        await_files = system.begin_checkpoint(folder, step)

        def await_and_record() -> dict[str, FileSum]:
            with system.timeline.doing([WRITER], "driver", "write"):
                return await_files()

        return await_and_record

    return Checkpoints(
        run_dir,
        write=write,
        config=config,
        last_step=system.config.num_steps,
        eval_steps=system.config.eval_steps,
        expected_bytes=expected_bytes,
        models=Models(run_dir.hf, write=system.policy.begin_model, config=config),
    )


def save_final(system: AnySystem, run_dir: RunDir, checkpoints: Checkpoints) -> None:
    """Write the final model, and see the last checkpoint to its end.

    Raises:
        RunFailed: the last checkpoint could not be written; the model is there.
    """
    config = system.config
    best = None
    if config.checkpoint.load_best_model_at_end:
        checkpoints.finish()
        best = write_best_model(run_dir, config.checkpoint)
    if best is None:
        system.policy.save_model(run_dir.final)
    is_adapter = config.policy.lora is not None and config.num_labels is None
    kind = "adapter, a PEFT folder," if is_adapter else "model"
    of_step = "" if best is None else f" of step {best}, the best one,"
    print(f"the trained {kind}{of_step} is in {run_dir.final}", flush=True)
    checkpoints.finish()
    if checkpoints.failure is not None:  # there may be room now, or new ranks in place of dead ones
        with suppress(RunFailed):
            checkpoints.save(config.num_steps)
    if checkpoints.failure is not None:
        raise RunFailed(f"{checkpoints.failure}. The trained {kind} is in {run_dir.final}")


def save_last_step(
    system: AnySystem,
    run_dir: RunDir,
    checkpoints: Checkpoints,
    *,
    started_from: int,
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
    system: AnySystem,
    run_dir: RunDir,
    checkpoints: Checkpoints,
    started_from: int,
) -> Iterator[str]:
    """Save what can be saved; yields what is done."""
    config, policy = system.config, system.policy
    deadline = time.monotonic() + seconds_to_save(config.checkpoint.exit_timeout_s)

    def give_up_at_deadline() -> None:
        for actors in system.models:
            actors.timeout_s = max(0.0, deadline - time.monotonic())
            actors.restarts = None  # what is left of the time would not be enough

    if not checkpoints.finish(deadline - time.monotonic()):
        yield "nothing more saved: a checkpoint was still being written"
        return
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
        checkpoints.save(step, deadline - time.monotonic())
        shutil.rmtree(run_dir.interrupted)  # the checkpoint holds the same
        yield f"saved step {step}"


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may have been closed
        print(line, flush=True)
