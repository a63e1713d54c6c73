"""Functions of a process that is a scorer of one rank, without Ray."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from one_rank import start


def scores_and_gradient(config, rows, folder):
    """Scores of the rows, the gradient of a step on them by Hugging Face's names, its metrics.

    The model as it is before the step is saved in `folder`.
    """
    start()
    import torch

    from rlsys.algo.scores import build_score_batch
    from rlsys.engines.megatron.scorer import MegatronScorer

    scorer = MegatronScorer(config, device="cpu")
    batch = build_score_batch(rows)
    indices, of_rows = scorer.compute_scores(batch)
    scores = torch.empty_like(of_rows).index_copy(0, torch.tensor(indices), of_rows)
    scorer.save_model(Path(folder))
    scorer.optimizer.step = lambda: (True, 0.0, None)
    metrics = scorer.update(batch).metrics
    weights = scorer.weights if scorer.adapters is None else scorer.adapters.weights
    return scores, gradient_of(weights), metrics


def gradient_of(weights):
    """Name in the saved files -> gradient."""
    from policy_cases import gradients_of

    gradients = copy(weights)
    gradients._parameters = gradients_of(weights)
    return {name: tensor.clone() for name, tensor in gradients.export()}


def trained(config, rows, folder, *, steps, resume_after=None):
    """Train on the same rows; save the model in `folder`. Returns the metrics of each step.

    Args:
        resume_after: a checkpoint is saved after this step, which another engine goes on from.
    """
    start()
    from rlsys.algo.scores import build_score_batch
    from rlsys.engines.megatron.scorer import MegatronScorer

    folder = Path(folder)
    scorer, batch, found = MegatronScorer(config, device="cpu"), build_score_batch(rows), []
    for step in range(1, steps + 1):
        found.append(scorer.update(batch).metrics)
        if step == resume_after:
            checkpoint = folder / "checkpoint"
            checkpoint.mkdir(parents=True)
            scorer.begin_checkpoint(checkpoint)
            while scorer.writer.sums(checkpoint) is None:
                pass
            scorer = MegatronScorer(config, device="cpu")
            scorer.load_checkpoint(checkpoint)
    scorer.save_model(folder / "final")
    return found
