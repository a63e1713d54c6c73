"""Going back to a good state of the policy where its numbers are not finite.

`policy.on_nonfinite: rollback`. The updates since that state are lost, and policy_version stays: it
counts the steps of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlsys.actors.waiting import ActorFailure
from rlsys.engines.step_dump import DUMPS, Fault, Step, write_step
from rlsys.files import replacing_folder, unused_folder
from rlsys.problems import NonFiniteWeights, RunFailed
from rlsys.types import TrainBatch, UpdateOutput

if TYPE_CHECKING:
    from rlsys.actors.policy import PolicyActors

T = TypeVar("T")
MAX_REASON = 2000
"""Most characters of an error that a dump has, its last ones."""


def update_from_good_state(
    policy: PolicyActors, update: Callable[[], UpdateOutput], reason: str
) -> UpdateOutput:
    """The output of an update that is finished, from an earlier state.

    Args:
        policy: too many of its optimizer steps in a row were not finite.
        update: does the last one again.
        reason: what was found, with the path of the dump.

    Raises:
        RunFailed: it is not finite from any state that is left.
    """

    def work() -> UpdateOutput | None:
        output = update()
        return output if output.rolls_back is None else None

    return _from_good_state(policy, work, reason)


def with_finite_weights(policy: PolicyActors, send: Callable[[], T]) -> T:
    """What `send` returns, which sends the policy's weights; from an earlier state if need be.

    Raises:
        ActorFailure: the weights are not finite, and policy.on_nonfinite is not rollback.
        RunFailed: no state with finite weights is left.
    """
    try:
        return send()
    except ActorFailure as failure:
        found = failure.cause
        rolls_back = policy.config.policy.on_nonfinite == "rollback"
        if not rolls_back or not isinstance(found, NonFiniteWeights):
            raise
        return _from_good_state(policy, send, str(found))


def _from_good_state(policy: PolicyActors, work: Callable[[], T | None], reason: str) -> T:
    tried = []
    for name, restore in _earlier_states(policy):
        policy.continue_from(restore)
        if not all(policy.call_in_turn("has_finite_weights")):
            continue
        print(
            f"warning: the policy went back to {name}, and goes on as version "
            f"{policy.policy_version}, because {reason}",
            flush=True,
        )
        tried.append(name)
        if (result := work()) is not None:
            return result
    what = (
        f"the same again from {' and '.join(tried)}"
        if tried
        else (
            "there is neither a snapshot (policy.snapshot_steps) nor a checkpoint "
            "(checkpoint.save_steps) with finite weights to go back to"
        )
    )
    raise RunFailed(f"{reason}\npolicy.on_nonfinite is rollback, and {what}")


def _earlier_states(policy: PolicyActors) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and restoring function of the states to try, newest first."""
    policy.snapshots.settle(timeout_s=policy.timeout_s)
    if (newest := policy.snapshots.newest) is not None:
        yield f"the snapshot of version {newest.version}", partial(policy.restore, newest)
    for _, folder in islice(policy.checkpoints(), 1):
        yield f"the checkpoint {folder}", partial(policy.call, "load_checkpoint", folder)


def dump_update(policy: PolicyActors, batch: TrainBatch, loss: str | None, reason: str) -> str:
    """Dump the batch of an update in which ranks die; returns where it is, or why it is not.

    Nobody can be asked for the weights: the dump names those of the newest checkpoint, or
    model.path.
    """
    config, version = policy.config, policy.policy_version
    saved, weights = max(
        ((step, str(path)) for step, path in policy.checkpoints()), default=(0, None)
    )
    folder = Path(config.output_dir).absolute() / DUMPS / f"step-{version + 1}"
    step = Step(batch, list(range(len(batch.lengths))), loss, version, "1 of 1")
    fault = Fault({}, {}, {}, reason[-MAX_REASON:])
    try:
        folder = unused_folder(folder) if folder.exists() else folder
        with replacing_folder(folder) as partial_folder:
            write_step(partial_folder, step, fault, config, weights=weights, weights_version=saved)
    except OSError as error:
        return f"The batch is not dumped: {error}"
    return f"`rlsys replay {folder}` computes the gradient of this batch again"
