"""Losses of scores: those of TRL and transformers on the same tensors, however a step is split."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from trl import RewardTrainer

from rlsys.algo.scores import build_score_batch, named, score_loss, score_metrics
from rlsys.algo.update_metrics import MetricSums
from rlsys.config.reward_model import RewardModelSection
from rlsys.types import ScoredRow

NUM_PAIRS = 6


def section(problem_type="preference", **fields):
    return RewardModelSection(problem_type=problem_type, **fields)


def pairs(seed=0, *, with_margin):
    """[2 P, 1] rewards, of which each rejected one follows the chosen one, and margins."""
    rng = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(2 * NUM_PAIRS, 1, generator=rng)).requires_grad_()
    margins = torch.rand(NUM_PAIRS, 1, generator=rng) * with_margin
    return scores, margins.repeat_interleave(2, dim=0)


def loss_of_trl(scores, margins, center, *, with_margin):
    """TRL's own code: loss and metrics. It wants all chosen answers before all rejected ones."""

    def same(values):
        return values

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    logits = torch.cat([scores[0::2], scores[1::2]])
    inputs = {"attention_mask": torch.ones(2 * NUM_PAIRS, 5)}
    if with_margin:
        inputs["margin"] = margins[0::2, 0]
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("center", [None, 0.0, 0.01, 0.5])
@pytest.mark.parametrize("with_margin", [True, False])
def test_pairs_have_the_loss_gradient_and_metrics_of_trl(center, with_margin):
    scores, margins = pairs(with_margin=with_margin)
    expected, metrics = loss_of_trl(scores, margins, center, with_margin=with_margin)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    weights = torch.full((len(scores),), 1 / len(scores))
    of_run = section(center_rewards_coefficient=center)
    loss, statistics = score_loss(scores, margins, weights, of_run)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=0)
    sums = MetricSums()
    sums.add(statistics)
    found = named(sums.means(), of_run)
    assert found.pop("loss") == pytest.approx(expected.item(), abs=1e-6)
    assert found.pop("num_pairs") == NUM_PAIRS
    del metrics["num_tokens"]
    assert found == pytest.approx(metrics, abs=1e-6)


def labels_of(problem_type, rows, num_labels):
    rng = torch.Generator().manual_seed(1)
    if problem_type == "single_label_classification":
        return torch.randint(num_labels, (rows, 1), generator=rng).float()
    if problem_type == "multi_label_classification":
        return torch.randint(2, (rows, num_labels), generator=rng).float()
    return torch.randn(rows, num_labels, generator=rng)


@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [
        ("single_label_classification", 4),
        ("multi_label_classification", 3),
        ("regression", 1),
        ("regression", 2),
    ],
)
def test_labels_have_the_loss_of_transformers(problem_type, num_labels):
    scores = torch.randn(7, num_labels, generator=torch.Generator().manual_seed(0))
    labels = labels_of(problem_type, 7, num_labels)
    config = SimpleNamespace(problem_type=problem_type, num_labels=num_labels)
    is_class = problem_type == "single_label_classification"
    expected = ForSequenceClassificationLoss(
        labels[:, 0].long() if is_class else labels, scores, config
    )
    weights = torch.full((7,), 1 / 7)
    loss, _ = score_loss(scores, labels, weights, section(problem_type, num_labels=num_labels))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    "problem_type", ["preference", "single_label_classification", "multi_label_classification"]
)
def test_loss_and_metrics_do_not_depend_on_the_split(problem_type):
    of_run = section(problem_type, num_labels=3 if problem_type != "preference" else None)
    is_pair = problem_type == "preference"
    scores, labels = pairs(with_margin=True)
    if not is_pair:
        scores = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
        labels = labels_of(problem_type, 12, 3)
    weights = torch.full((12,), 1 / 12)
    whole, _ = score_loss(scores, labels, weights, of_run)
    sums, total = MetricSums(), 0.0
    for rows in (slice(0, 2), slice(2, 8), slice(8, 8), slice(8, 12)):
        part, statistics = score_loss(scores[rows], labels[rows], weights[rows], of_run)
        total += part
        sums.add(statistics)
    assert total.item() == pytest.approx(whole.item(), abs=1e-6)
    expected = score_metrics([(scores.detach(), labels)], of_run)
    assert named(sums.means(), of_run) == pytest.approx(expected, abs=1e-6)


def test_accuracies_of_labels():
    scores = torch.tensor([[2.0, -1.0], [0.5, 0.1], [-3.0, 1.0]])
    classes = torch.tensor([[0.0], [1.0], [1.0]])
    found = score_metrics([(scores, classes)], section("single_label_classification"))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["num_rows"] == 3
    flags = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    found = score_metrics([(scores, flags)], section("multi_label_classification"))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["label_accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    found = score_metrics([(scores[:, :1], torch.zeros(3, 1))], section("regression"))
    assert found["mae"] == pytest.approx(5.5 / 3)


def test_a_batch_has_the_loss_at_last_tokens_and_fills_up_with_nothing():
    texts = [np.arange(2, 2 + length, dtype=np.int32) for length in (3, 5)]
    batch = build_score_batch([ScoredRow("a:1", tuple(texts), (0.5,))], at_least=2)
    assert batch.lengths.tolist() == [3, 5, 1, 1]
    assert batch.completion_mask.nonzero().tolist() == [[0, 2], [1, 4]]
    assert batch.labels.tolist() == [[0.5], [0.5], [0.0], [0.0]]
    assert batch.input_ids[1].tolist() == [2, 3, 4, 5, 6]
