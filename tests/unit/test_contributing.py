"""docs/contributing.md: every file and name of its table exists, and its examples work."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from algo_cases import make_batch, make_groups, padded_batch
from config_cases import write_run
from data_cases import word_tokenizer, write_jsonl

from rlsys.algo.advantages import advantage_estimators, compute_advantages
from rlsys.algo.batching import pack
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.weighting import loss_weights
from rlsys.config import Config
from rlsys.config.load import load_config
from rlsys.data import load_prompts, preprocessors
from rlsys.preflight.checks import check_run
from rlsys.rewards import orms
from rlsys.tracking import build_tracker, trackers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/contributing.md").read_text()
COLUMNS = ("like", "and", "through", "plugin")
ROWS = {
    what: dict(zip(COLUMNS, map(re.compile(r"`([^`]+)`").findall, cells), strict=True))
    for what, *cells in re.findall(
        r"^\| (?:an? )(.+?) \|(.+?)\|(.*?)\|(.+?)\|(.*?)\|$", PAGE, re.MULTILINE
    )
}
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.+?)```", PAGE, re.DOTALL))


def named(path: str):
    """The object of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_everything_that_can_be_added_has_a_row():
    expected = """
        reward, loss, loss that differs from another by settings, loss of pairs of answers,
        advantage estimator,
        metric of a loss, tracker, preprocessor of rows, row format, kind of data file,
        weight transport, model family, check before a run, config field, command
    """
    assert list(ROWS) == re.split(r",\s+", expected.strip())


@pytest.mark.parametrize("what", ROWS)
def test_the_files_of_a_row_exist_and_have_what_it_names(what):
    row = ROWS[what]
    files = [ROOT / name for name in row["like"] + row["and"]]
    assert 1 <= len(row["like"]) <= len(files) <= 3
    (through,) = row["through"]
    assert named(through) is not None
    assert any(through.rpartition(".")[2] in file.read_text() for file in files)
    for option in row["plugin"]:
        section, field = option.removeprefix("--").split(".")
        assert field in Config.model_fields[section].annotation.model_fields


def test_every_kind_of_plugin_has_an_example():
    kinds = {what.rpartition(" ")[2] for what, row in ROWS.items() if row["plugin"]}
    assert {*kinds - {"rows"}, "preprocessor"} == set(EXAMPLES)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config of a run that uses all examples, each from a plugin of its kind."""
    for registry in (orms, losses, advantage_estimators, trackers, preprocessors):
        monkeypatch.setattr(registry, "data", dict(registry.data))
    options = {"reward": "reward", "loss": "grpo", "estimator": "grpo", "preprocessor": "data"}
    plugins = {"reward": [], "grpo": [], "data": []}
    for kind, source in EXAMPLES.items():
        (tmp_path / f"a_{kind}.py").write_text(source)
        plugins[options.get(kind, "reward")].append(str(tmp_path / f"a_{kind}.py"))
    names = {
        "reward": {"reward_funcs": ["short"]},
        "grpo": {"loss_type": "squared", "advantage_estimator": "raw"},
        "data": {"preprocessor": "sums"},
    }
    sections = {name: {**names[name], "external_plugins": plugins[name]} for name in names}
    path = write_run(tmp_path, **sections, tracking={"report_to": ["lines"]})
    write_jsonl(tmp_path / "train.jsonl", [{"a": a, "b": 2} for a in range(1, 21)])
    return load_config(path).config


def test_the_examples_are_registered_and_used(config, monkeypatch):
    monkeypatch.setattr("rlsys.preflight.machine.visible_gpus", lambda: 0)
    assert [problem.text for problem in check_run(config)] == []

    assert orms["short"](["yes", "no" * 51]) == [1.0, 0.0]

    data = load_prompts(config.data, word_tokenizer(), seed=0)
    assert len(data.train) == 20
    assert {prompt.columns["solution"] for prompt in data.train} == {str(n) for n in range(3, 23)}

    groups = make_groups([[2, 3], [1, 4]])
    advantages = compute_advantages(groups, padded_batch(groups), config.grpo, None)
    totals = [reward.total for group in groups for reward in group.rewards]
    assert advantages.max(dim=1).values.tolist() == pytest.approx(totals)

    batch = make_batch([[2, 3], [1, 4]])
    aggregation, longest = "token_mean", config.rollout.max_completion_length
    weights = loss_weights(
        batch.completion_mask, aggregation=aggregation, max_completion_length=longest
    )
    packed = pack(batch, range(4), weights, multiple_of=1)
    logprobs = packed.rollout_logprobs.clone().requires_grad_()
    loss, _ = losses["squared"](LossInput.from_packed(packed, logprobs), config.grpo)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -packed.weights * packed.advantages.square())

    Path(config.output_dir).mkdir()  # as `launch` does
    tracker = build_tracker(config)
    tracker.log_metrics(1, {"reward": 0.5})
    tracker.close()
    assert (Path(config.output_dir) / "lines.txt").read_text() == "1 0.5\n"
    assert math.isfinite(loss.item())
