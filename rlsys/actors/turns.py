"""Policy and rollout engines that share GPUs take turns; with GPUs of their own nobody waits.

With `placement: colocated` one side computes while the other sleeps. Whoever is about to compute
takes its turn first, so no caller has to know whose turn it is:

- The policy's turn: engines stop sampling and free their KV cache and weights, then the policy
  takes back what it had moved to host memory. Models that share the policy's GPUs, such as the
  reference, take the same turn.
- The engines' turn begins with a weight sync, since sleeping engines have no weights. The policy's
  optimizer leaves the GPU, engines get memory for weights, the weights arrive, the policy's weights
  leave too (see `colocated.offload_weights`), and engines get memory for their KV cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from rlsys.actors.group import START_TIMEOUT_S
from rlsys.actors.waiting import ActorDeath, ActorFailure, get_all

if TYPE_CHECKING:
    from rlsys.actors.group import ActorGroup
    from rlsys.actors.model_group import ModelActors
    from rlsys.actors.policy import PolicyActors
    from rlsys.actors.rollout import RolloutActors
    from rlsys.config import ColocatedConfig


class Turns:
    """Turns of roles that have GPUs of their own: everyone may always compute."""

    sync: Callable[[], object]
    """WeightPublisher.publish of policy and engines; it is within `for_weight_sync`."""

    def start(
        self,
        groups: Sequence[ActorGroup],
        *,
        meanwhile: Callable[[], None],
        on_done: Callable[[str], None],
    ) -> None:
        """Wait until the actors of `groups` can work.

        Args:
            groups: roles that run a model.
            meanwhile: something else to start, called once while actors start.
            on_done: called with the name of each actor when it is ready.
        """
        refs = {name: ref for group in groups for name, ref in group.async_start().items()}
        meanwhile()
        get_all(refs, phase="start", timeout_s=START_TIMEOUT_S, on_done=on_done)

    def take_for_policy(self) -> None:
        """Return when the policy, and what shares its GPUs, can compute."""

    def free_for_policy(self) -> None:
        """As `take_for_policy`, for a policy whose ranks have ended and are about to start."""

    def take_for_rollouts(self) -> None:
        """Return when engines can sample with the policy's weights."""

    @contextmanager
    def for_weight_sync(self) -> Iterator[None]:
        """Policy and engines both have weights on the GPUs; afterwards it is the engines' turn."""
        yield

    def metrics(self) -> dict[str, float]:
        """Seconds that changes of turns took since the last call."""
        return {}


class SharedTurns(Turns):
    """Turns of a policy and the engines on its GPUs.

    All of them call this object before they compute.

    Args:
        config: what leaves the GPUs while engines sample, besides gradients.
        engines, policy: take turns.
        others: further models on the policy's GPUs.
    """

    def __init__(
        self,
        config: ColocatedConfig,
        engines: RolloutActors,
        policy: PolicyActors,
        *others: ModelActors,
    ):
        self._config = config
        self._policy, self._engines = policy, engines
        engines.turns = policy.turns = self
        for model in others:
            model.turns = self
        self._turn: Literal["policy", "changing", "rollouts"] = "changing"
        self._seconds = dict.fromkeys(("policy", "rollouts"), 0.0)

    def start(
        self,
        groups: Sequence[ActorGroup],
        *,
        meanwhile: Callable[[], None],
        on_done: Callable[[str], None],
    ) -> None:
        """See Turns. Engines start first: vLLM measures what is free, and nobody may change that.

        It is the policy's turn afterwards.
        """
        others = [group for group in groups if group is not self._engines]
        super().start([self._engines], meanwhile=meanwhile, on_done=on_done)
        self._engines.call("sleep")
        super().start(others, meanwhile=lambda: None, on_done=on_done)
        self._turn = "policy"

    def take_for_policy(self) -> None:
        """See Turns.

        Raises:
            ActorFailure: an engine could not free its memory; all of them are ended then, so that
                the policy can still be saved.
        """
        if self._turn == "policy":
            return
        with self._timed("policy"):
            self._end_rollouts()
            # Also the reference asks for the turn, which cannot restart the policy's ranks.
            self._policy.healed("onload", self._onload)

    def _onload(self) -> None:
        if self._turn != "policy":  # ranks that were started again are there already
            self._policy.call("onload")
            self._turn = "policy"

    def free_for_policy(self) -> None:
        """See Turns. New ranks have everything on their GPUs."""
        if self._turn != "policy":
            self._end_rollouts()
            self._turn = "policy"

    def _end_rollouts(self) -> None:
        self._turn = "changing"
        try:
            get_all(
                self._engines.async_call("sleep"),
                phase="leaving the GPUs to the policy",
                on_done=self._engines.answers("sleep"),
                # Of a run that was interrupted, the policy has to be saved within its deadline.
                timeout_s=min(self._engines.timeout_s, self._policy.timeout_s),
            )
        except ActorDeath:
            pass  # its memory is free; the next weight sync says who died
        except ActorFailure:
            self._engines.close()
            raise

    def take_for_rollouts(self) -> None:
        """See Turns."""
        if self._turn != "rollouts":
            self.sync()

    @contextmanager
    def for_weight_sync(self) -> Iterator[None]:
        """See Turns."""
        self.take_for_policy()
        self._turn = "changing"
        with self._timed("rollouts"):
            optimizer_leaves = self._config.offload_optimizer
            self._policy.call("offload_optimizer" if optimizer_leaves else "drop_gradients")
        yield
        with self._timed("rollouts"):
            self._policy.call("offload_weights")  # each rank decides for its GPU
            self._engines.call("wake")
        self._turn = "rollouts"

    def metrics(self) -> dict[str, float]:
        """See Turns."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return {f"colocated/to_{name}_seconds": value for name, value in seconds.items()}

    @contextmanager
    def _timed(self, turn: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[turn] += time.monotonic() - start
