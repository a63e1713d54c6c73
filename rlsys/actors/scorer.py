"""The policy of `rlsys reward-model`: ranks of a model with a score head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray
import torch

from rlsys.actors.group import PlaceActor, on_cpu
from rlsys.actors.policy import PolicyActors, PolicyRank
from rlsys.config import RewardModelConfig
from rlsys.types import Device, TrainBatch

if TYPE_CHECKING:
    from rlsys.engines.megatron.scorer import MegatronScorer


class ScorerRank(PolicyRank):
    """One rank of the model."""

    engine: MegatronScorer
    config: RewardModelConfig

    def build(self) -> MegatronScorer:
        """See PolicyRank."""
        from rlsys.engines.megatron.scorer import MegatronScorer

        return MegatronScorer(self.config, device=self.device)

    def compute_scores(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """See MegatronScorer.compute_scores."""
        return self.engine.compute_scores(batch)


class ScorerActors(PolicyActors):
    """The model as the driver sees it."""

    def __init__(
        self,
        config: RewardModelConfig,
        *,
        device: Device,
        place: PlaceActor = on_cpu,
        rank_class: type[ScorerRank] = ScorerRank,
    ):
        super().__init__(config, device=device, place=place, rank_class=rank_class)
        self._num_labels = config.num_labels

    def compute_scores(self, batch: TrainBatch) -> torch.Tensor:
        """[N, num_labels] float32 scores of whole rows; each data-parallel rank computes some."""
        scores = torch.zeros(len(batch.lengths), self._num_labels)
        for result in self.call_in_turn("compute_scores", ray.put(batch)):
            if result is not None:
                rows, of_rows = result
                scores[rows] = of_rows
        return scores
