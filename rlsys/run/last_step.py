"""What a run that is interrupted or fails still saves: its last finished step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress

from rlsys.actors.policy import PolicyActors
from rlsys.actors.reference import ReferenceActors
from rlsys.config import Config
from rlsys.rollout.rollouts import Rollouts
from rlsys.run.checkpoints import Checkpoints, checkpoint_steps
from rlsys.run.folder import RunDir


def save_last_step(
    config: Config,
    run_dir: RunDir,
    checkpoints: Checkpoints,
    policy: PolicyActors,
    reference: ReferenceActors | None,
    rollouts: Rollouts,
    *,
    started_from: int,
) -> None:
    """Save the last finished step within checkpoint.exit_timeout_s, the weights first, and say what
    was saved and how to go on.

    Args:
        config: of the run.
        run_dir: of the run.
        checkpoints: of the run.
        policy: which has to answer.
        reference: None where there is none.
        rollouts: know where in the data the run was.
        started_from: the policy's version at the start of this process.
    """
    deadline = time.monotonic() + config.checkpoint.exit_timeout_s

    def give_up_at_deadline() -> None:
        for actors in (policy, reference):
            if actors is not None:
                actors.timeout_s = max(0.0, deadline - time.monotonic())

    def save() -> Iterator[str]:
        give_up_at_deadline()
        step = policy.finished_version()
        if step is None:
            yield "nothing saved: the policy is in the middle of an update"
        elif step == started_from:
            yield "nothing to save: no step was finished since the start"
        elif step in checkpoint_steps(run_dir.checkpoints):
            yield f"step {step}, the last one, was saved already"
        else:
            yield f"saving step {step}; Ctrl-C again ends without it"
            policy.save_model(run_dir.interrupted)
            if config.checkpoint.save_steps is None:
                yield (
                    f"saved the weights of step {step} in {run_dir.interrupted}; another run, in "
                    "another folder, can start from them with --model.path"
                )
            elif _is_behind(config, reference, step):
                yield (
                    f"saved the weights of step {step} in {run_dir.interrupted}; no checkpoint, "
                    "for the reference has not followed yet"
                )
            else:
                give_up_at_deadline()
                checkpoints.save(step, rollouts.state_after(step))
                shutil.rmtree(run_dir.interrupted)  # the checkpoint holds the same
                yield f"saved step {step}"

    try:
        for line in save():
            _say(line)
    except Exception as error:  # whatever it is, why the run ended matters more
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        _say(f"not saved: {reason[0]}")
        if run_dir.interrupted.exists():
            _say(f"the weights are in {run_dir.interrupted}")
    steps = checkpoint_steps(run_dir.checkpoints)
    if steps:
        newest = run_dir.checkpoints / f"step-{steps[-1]}"
        _say(f"--checkpoint.resume continues from {newest}, which transformers loads as a model")


def _is_behind(config: Config, reference: ReferenceActors | None, step: int) -> bool:
    """Whether the reference should have taken weights after `step` and has not."""
    if reference is None or not config.refreshes_reference(step):
        return False
    return reference.refreshed_after != step


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may have been closed
        print(line, flush=True)
