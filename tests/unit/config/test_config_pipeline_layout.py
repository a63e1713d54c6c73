"""policy.pipeline_layout: the notation, and stages that do not fit ranks or layers."""

import pytest
from config_cases import values
from pydantic import ValidationError

from rlsys.config import Config
from rlsys.config.pipeline_layout import (
    even_layout,
    layer_problems,
    parse_layout,
    rank_layers,
    stage_layers,
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Et|tmL", "m is a layer of multi-token prediction, which rlsys does not train"),
        ("Ex|tL", "'x' cannot be read"),
        ("Et*9999L", "'*', '9' cannot be read"),
        ("t|tL", "the first stage begins with E"),
        ("Et|t", "the last ends with L"),
        ("Et|EtL", "the first stage begins with E"),
        ("", "the first stage begins with E"),
    ],
)
def test_what_is_not_a_layout_is_refused_by_its_reason(text, says):
    with pytest.raises(ValueError, match=says.replace("*", r"\*")):
        parse_layout(text)
    with pytest.raises(ValidationError, match=r"policy\.pipeline_layout"):
        Config.model_validate(values(policy={"pipeline_layout": text}))


def config(layout, ranks):
    policy = {"world_size": ranks, "pipeline_parallel_size": ranks, "pipeline_layout": layout}
    return Config.model_validate(values(policy=policy))


def test_ranks_take_turns_with_the_stages():
    assert stage_layers(["Et", "ttt", "L"]) == [range(1), range(1, 4), range(4, 4)]
    assert rank_layers(config("Et|tt|t|ttL", 2).policy, 6) == [[0, 3], [1, 2, 4, 5]]
    assert config("Et|tt|t|ttL", 2).policy.virtual_pipeline_size == 2
    assert rank_layers(config(None, 2).policy, 4) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("layout", "ranks", "says"),
    [
        ("Et|t|tL", 2, "has 3 stages, which policy.pipeline_parallel_size = 2 ranks cannot share"),
        ("Et|tL", 1, "set pipeline_parallel_size to 2"),
        ("EttL", 2, r"has 1 stage, .*use 2"),
    ],
)
def test_stages_that_ranks_cannot_share_are_refused(layout, ranks, says):
    with pytest.raises(ValueError, match=says):
        config(layout, ranks)


def test_layers_that_do_not_add_up_are_refused_with_a_layout_that_does():
    (problem,) = layer_problems(config("Et*3|t*3L", 2).policy, 7)
    assert "has 6 layers t, and the model has 7: use Et*4|t*3L" in str(problem)
    (problem,) = layer_problems(config(None, 4).policy, 6)
    assert "4 does not divide the model's 6 layers: use 1 or 2 or 3 or 6, or say" in str(problem)
    assert "policy.pipeline_layout = Et*1|t*2|t*2|t*1L" in str(problem)
    assert list(layer_problems(config("Et*3|t*3L", 2).policy, 6)) == []
    assert list(layer_problems(config(None, 2).policy, 6)) == []


@pytest.mark.parametrize("num_layers", [4, 7, 30])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_layout_that_is_proposed_has_all_layers(num_layers, stages):
    layers = stage_layers(parse_layout(even_layout(num_layers, stages)))
    assert [layer for stage in layers for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in layers]
    assert max(sizes) - min(sizes) <= 1
