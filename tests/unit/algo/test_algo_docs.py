"""docs/algorithm.md quotes the code, docs/metrics.md explains every metric: both stay true."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from algo_cases import make_batch, make_groups
from config_cases import values

from rlsys.algo.advantages import advantage_estimators
from rlsys.algo.batching import pack
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.rollout_metrics import evaluation_metrics, rollout_metrics
from rlsys.algo.update_metrics import MetricSums, combine_optimizer_steps
from rlsys.algo.weighting import loss_weights
from rlsys.config import Config, GrpoConfig
from rlsys.config.algorithm import RolloutCorrection, RolloutRejection

REPOSITORY = Path(__file__).parents[3]


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
    quoted = {path for path, _ in quotes()}
    mathematics = {
        "advantages",
        "batching",
        "experts",
        "kl",
        "logprobs",
        "weighting",
        "losses/base",
        "losses/clipped",
        "losses/correction",
        "losses/others",
    }
    assert quoted - {"rlsys/engines/megatron/build.py"} == {
        f"rlsys/algo/{name}.py" for name in mathematics
    }


def test_the_document_has_a_row_for_every_loss_and_estimator():
    text = (REPOSITORY / "docs/algorithm.md").read_text()
    for name in {*losses, *advantage_estimators}:
        assert f"`{name}`" in text, name


def test_the_document_explains_every_rejection_and_correction():
    text = (REPOSITORY / "docs/algorithm.md").read_text()
    for names in (RolloutCorrection, RolloutRejection):
        for name in get_args(names):
            assert re.search(rf"`(rollout_(is|rs): )?{name}`", text), name


RECIPES = re.findall(
    r"^### ([^\n]+)\n.*?```yaml\n(.*?)```",
    (REPOSITORY / "docs/algorithm.md").read_text().partition("## Recipes")[2],
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes_are_configs_that_run(name, text):
    Config.model_validate(values(**yaml.safe_load(text)))


def test_there_are_recipes():
    assert len(RECIPES) > 9


def update_metrics() -> dict[str, float]:
    """Metrics of every loss, with all options that add metrics."""
    batch = make_batch([[3, 2]])
    weights = loss_weights(batch.completion_mask, aggregation="token_mean", max_completion_length=3)
    packed = pack(batch, [0, 1], weights)
    logprobs = packed.rollout_logprobs.clone().requires_grad_()
    packed = replace(packed, high_covariance=packed.loss_mask)
    inputs = LossInput.from_packed(packed, logprobs, torch.ones_like(logprobs))
    metrics = {}
    for name in losses:
        sums = MetricSums()
        config = GrpoConfig(
            beta=0.1, rollout_is="token", rollout_rs="token", loss_type=name, epsilon_low=0.2
        )
        sums.add(losses[name](inputs, config)[1])
        metrics |= combine_optimizer_steps([sums.means()])
    return metrics


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
