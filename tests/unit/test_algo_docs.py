"""docs/algorithm.md quotes the code, docs/metrics.md explains every metric: both stay true."""

import re
from pathlib import Path

import pytest
import torch
from algo_cases import make_batch, make_groups

from rlsys.algo.batching import loss_weights, pack
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.metrics import (
    MetricSums,
    combine_optimizer_steps,
    evaluation_metrics,
    rollout_metrics,
)
from rlsys.config import GrpoConfig

REPOSITORY = Path(__file__).parents[2]


def quotes() -> list[tuple[str, str]]:
    """(file, line) of every line of Python in docs/algorithm.md."""
    text = (REPOSITORY / "docs/algorithm.md").read_text()
    found, path = [], ""
    for part in re.finditer(r"`(rlsys/[\w/]+\.py)`|```python\n(.*?)```", text, re.DOTALL):
        if part[1]:
            path = part[1]
        else:
            found += [(path, line) for line in part[2].splitlines()]
    return found


@pytest.mark.parametrize(("path", "line"), quotes())
def test_quoted_lines_are_in_the_code(path, line):
    code = [code_line.strip() for code_line in (REPOSITORY / path).read_text().splitlines()]
    assert line in code


def test_the_document_quotes_every_module_of_the_mathematics():
    assert {Path(path).stem for path, _ in quotes()} == {
        "advantages",
        "batching",
        "kl",
        "logprobs",
        "losses",
    }


def update_metrics() -> dict[str, float]:
    batch = make_batch([[3, 2]])
    weights = loss_weights(batch.completion_mask, loss_type="grpo", max_completion_length=3)
    packed = pack(batch, [0, 1], weights)
    logprobs = packed.rollout_logprobs.clone().requires_grad_()
    inputs = LossInput.from_packed(packed, logprobs, torch.ones_like(logprobs))
    sums = MetricSums()
    sums.add(losses["grpo"](inputs, GrpoConfig(beta=0.1))[1])
    return combine_optimizer_steps([sums.means()])


def test_every_metric_is_explained():
    groups = make_groups([[3, 2]])
    metrics = {**rollout_metrics(groups, make_batch([[3, 2]])), **update_metrics()}
    text = (REPOSITORY / "docs/metrics.md").read_text()
    explained = {
        key
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for key in re.findall(r"`([^`]+)`", row)
    }
    pairs = (r"^rewards/correlation/\w+/\w+", "rewards/correlation/<a>/<b>")
    keys = {re.sub(*pairs, key) for key in metrics}
    keys = {re.sub(r"^rewards/(?!correlation/)\w+/", "rewards/<name>/", key) for key in keys}
    assert keys <= explained, keys - explained
    assert set(evaluation_metrics(groups)) <= set(metrics)
