"""One rank of a model with a score head: reward models, classifiers and regression."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlsys.algo.batching import PackedMicroBatch
from rlsys.algo.finite import PREFIX as NONFINITE
from rlsys.algo.scores import named, score_loss
from rlsys.config import GrpoConfig, RewardModelConfig
from rlsys.engines.megatron.hf_folder import save_model_folder
from rlsys.engines.megatron.model import Head, Loss, MegatronModel, ModelWriter
from rlsys.engines.megatron.packed import last_tokens
from rlsys.engines.megatron.policy import MegatronPolicy
from rlsys.engines.megatron.score_head import ScoreHead, Scores, initialize_score
from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.model.classifier import classifier_config, pad_token_id
from rlsys.model.families.base import SCORE
from rlsys.types import Device, TrainBatch, UpdateOutput


class MegatronScorer(MegatronPolicy):
    """The model with its score head and optimizer: updated from labelled rows."""

    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig, *, device: Device):
        super().__init__(config, device=device)
        self.saves_adapter = False
        section = config.reward_model
        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.config_changes = classifier_config(
            self.folder,
            self.shape,
            pad_token_id=pad_token_id(tokenizer),
            label_names=section.label_names,
            problem_type=None if config.has_pairs else section.problem_type,
        )

    def _load_weights(self) -> None:
        """Read the model; a score head that its folder lacks begins with random values."""
        assert isinstance(self.weights, MegatronWeights), "see preflight"
        for weight in self.weights.parameters_named(SCORE):
            std = self.hf_config.to_dict().get("initializer_range", 0.02)
            initialize_score(weight, std=std, seed=self.config.seed)
        self.weights.load(self.folder, may_lack=[SCORE])

    def _make_head(self, *, trains: bool) -> Head:
        return ScoreHead(self.model[-1], in_fp32=self.config.model.fp32_lm_head)

    def _loss(
        self, of_tokens: Any, micro_batch: PackedMicroBatch, batch: TrainBatch, _: GrpoConfig
    ) -> Loss:
        assert batch.labels is not None
        scores_BL, ends_B = _scores(of_tokens, micro_batch)
        labels_BL = batch.labels[list(micro_batch.rows)].to(scores_BL)
        # A row weighs at its last token, which packed fields have at the position before.
        weights_B = micro_batch.weights[ends_B - 1]
        section = self.config.reward_model
        loss, statistics = score_loss(scores_BL, labels_BL, weights_B, section)
        if not micro_batch.rows:  # which only fills up a schedule; each weight has a gradient
            loss = loss + 0.0 * of_tokens.scores.sum()
        statistics |= {
            NONFINITE + "loss": ~loss.detach().isfinite(),
            NONFINITE + "scores": (~scores_BL.detach().isfinite()).sum(),
        }
        return loss, statistics

    def update(self, batch: TrainBatch, *, loss: str | None = None) -> UpdateOutput | None:
        """See MegatronPolicy.update; metrics have TRL's names."""
        output = super().update(batch, loss=loss)
        if output is None:
            return None
        metrics = named(output.metrics, self.config.reward_model)
        return UpdateOutput(output.policy_version, metrics, rolls_back=output.rolls_back)

    @torch.no_grad()
    def compute_scores(self, batch: TrainBatch) -> tuple[list[int], torch.Tensor] | None:
        """Scores of this data-parallel rank's share of the rows.

        Returns:
            (row indices, [len(rows), num_labels] float32), or None on ranks that do not report.
        """
        self.offload.check("compute_scores")
        shards = self._shard(range(len(batch.lengths)), batch)
        packed, row_lists = self._pack(batch, shards, torch.zeros(batch.input_ids.shape))

        def collect(of_tokens: Any, micro_batch: PackedMicroBatch) -> Loss:
            scores_BL, _ = _scores(of_tokens, micro_batch)
            return scores_BL.new_zeros(()), {"scores": scores_BL}

        outputs = self._forward_only(packed, collect)
        if not self.reports:
            return None
        scores = torch.cat([output["scores"].cpu() for output in outputs])
        return [row for rows in row_lists for row in rows], scores

    def write_model(self, folder: Path, write: ModelWriter = save_model_folder) -> None:
        """Write a folder of transformers' classifier, with adapters merged into its weights.

        So a reward model is one folder, which AutoModelForSequenceClassification opens.
        """
        assert write is save_model_folder, "a classifier has no other form"
        changed = partial(save_model_folder, changes=self.config_changes)
        MegatronModel.save_model(self, folder, changed)


def _scores(of_tokens: Scores, micro_batch: PackedMicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] scores of a micro-batch's rows, and [B] the positions of their last tokens."""
    ends_B = last_tokens(micro_batch)
    return of_tokens.scores[ends_B], ends_B
