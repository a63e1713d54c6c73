"""Rows for models with a score head, their configs, and what transformers computes of them."""

from __future__ import annotations

import numpy as np
import torch
from patience import PATIENCE_S
from policy_cases import VOCAB_SIZE, LabRank
from transformers import AutoModelForSequenceClassification
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from rlsys.actors.scorer import ScorerRank
from rlsys.config import RewardModelConfig
from rlsys.types import ScoredRow

NUM_LABELS = {
    "preference": 1,
    "single_label_classification": 3,
    "multi_label_classification": 3,
    "regression": 2,
}
CENTER = 0.05


def scorer_config(folder, problem_type="preference", *, output_dir="unused", **policy):
    """A run on 8 rows a step, in micro-batches of 3."""
    section = {"problem_type": problem_type}
    if problem_type == "preference":
        section["center_rewards_coefficient"] = CENTER
    else:
        section["num_labels"] = NUM_LABELS[problem_type]
    return RewardModelConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "max_steps": 8,
            "data": {"dataset": ["unused"], "max_length": 40},
            "model": {"path": str(folder)},
            "reward_model": section,
            # Sharded optimizers leave each rank with the sum of its part of the gradient only.
            "policy": {
                "global_batch_size": 8,
                "micro_batch_size": 3,
                "use_distributed_optimizer": False,
                "timeout_s": PATIENCE_S,
                **policy,
            },
        }
    )


def make_rows(problem_type="preference", seed=0):
    """8 rows of texts of 2 to 40 tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, lengths in enumerate(
        ((40, 3), (4, 5), (17, 40), (9, 2), (31, 30), (12, 12), (25, 7), (6, 19))
    ):
        count = 2 if problem_type == "preference" else 1
        texts = tuple(rng.integers(2, VOCAB_SIZE, n).astype(np.int32) for n in lengths[:count])
        rows.append(ScoredRow(str(number), texts, _label(problem_type, rng)))
    return rows


def _label(problem_type, rng):
    number = NUM_LABELS[problem_type]
    if problem_type == "preference":
        return (float(rng.random()),)
    if problem_type == "single_label_classification":
        return (float(rng.integers(number)),)
    if problem_type == "multi_label_classification":
        return tuple(map(float, rng.integers(2, size=number)))
    return tuple(map(float, rng.normal(size=number)))


def open_classifier(folder, dtype=torch.float32, **options):
    """transformers' model of a folder that a run saved."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, **options)
    return model.eval()


def scores_of_transformers(model, rows):
    """[texts, num_labels], text by text."""
    texts = [torch.from_numpy(text).long() for row in rows for text in row.texts]
    return torch.stack([model(input_ids=text[None]).logits[0] for text in texts])


def loss_of_transformers(model, rows, problem_type):
    """TRL's formula for pairs, transformers' own loss for labels, of a whole step."""
    scores = scores_of_transformers(model, rows)
    labels = torch.tensor([row.label for row in rows], dtype=scores.dtype)
    if problem_type == "preference":
        chosen, rejected = scores[0::2, 0], scores[1::2, 0]
        loss = -torch.nn.functional.logsigmoid(chosen - rejected - labels[:, 0]).mean()
        return loss + CENTER * ((chosen + rejected) ** 2).mean()
    if problem_type == "single_label_classification":
        labels = labels[:, 0].long()
    return ForSequenceClassificationLoss(labels, scores, model.config)


class ScorerLabRank(ScorerRank, LabRank):
    """A rank of a scorer that tests look into."""
