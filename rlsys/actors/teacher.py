"""The teacher: a frozen model with actors of its own, which the policy learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from rlsys.actors.group import PlaceActor, on_cpu
from rlsys.actors.model_group import ModelActors, ModelRank
from rlsys.actors.policy import PolicyActors
from rlsys.algo.teacher_rows import join_rows
from rlsys.config import RunConfig
from rlsys.types import Device, TeacherRows, TrainBatch

if TYPE_CHECKING:
    from rlsys.engines.megatron.reference import MegatronTeacher
    from rlsys.engines.rank_state import RankState


class TeacherRank(ModelRank):
    """One rank of the teacher: no optimizer, no gradients."""

    engine: MegatronTeacher
    config: RunConfig

    def start(self, address: str, port: int) -> None:
        """Build the model."""
        teacher = self.config.used_teacher
        assert teacher is not None
        self.join(
            address,
            port,
            world_size=teacher.world_size,
            tensor_parallel_size=teacher.tensor_parallel_size,
            # Experts are shared as tensor parallelism shares other layers.
            expert_model_parallel_size=teacher.tensor_parallel_size,
            context_parallel_size=teacher.context_parallel_size,
        )
        from rlsys.engines.megatron.reference import MegatronTeacher

        self.engine = MegatronTeacher(self.config, device=self.device)

    def describe_tokens(self, batch: TrainBatch) -> tuple[list[int], TeacherRows] | None:
        """See MegatronTeacher.describe_tokens."""
        return self.engine.describe_tokens(batch)

    def state(self, version: int) -> RankState:
        """It never changes, so no snapshot of it is taken."""
        raise AssertionError("a teacher is built from its folder again")

    def restore_snapshot(self, state: RankState) -> None:
        """See `state`."""
        raise AssertionError("a teacher is built from its folder again")


class TeacherActors(ModelActors):
    """The teacher as the driver sees it."""

    config: RunConfig

    def __init__(
        self,
        config: RunConfig,
        *,
        device: Device,
        place: PlaceActor = on_cpu,
        policy: PolicyActors | None = None,
        rank_class: type[TeacherRank] = TeacherRank,
    ):
        self._policy = policy
        assert config.used_teacher is not None
        super().__init__(
            "teacher",
            rank_class,
            config,
            device=device,
            world_size=config.used_teacher.world_size,
            place=place,
        )

    def describe_tokens(self, batch: TrainBatch) -> TeacherRows:
        """What the divergence needs of each token that is trained on, of all rows."""
        found = self.call_in_turn("describe_tokens", ray.put(batch))
        parts = [part for part in found if part is not None]
        return join_rows(parts, len(batch.lengths))

    @property
    def step(self) -> int:
        """See ModelActors."""
        return 0 if self._policy is None else self._policy.step

    def take_gpus(self) -> None:
        """See ModelActors."""
        self.turns.take_for_policy()

    def go_back(self) -> None:
        """See ModelActors: ranks have the weights of the model's folder, as the ended ones had."""
