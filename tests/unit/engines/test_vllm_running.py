"""Which version a token counts for when weights change while it is sampled."""

import pytest

from rlsys.engines.vllm.running import RunningGroup, Span
from rlsys.types import Prompt


@pytest.fixture
def group():
    return RunningGroup(Prompt("p", [], [1]), version=3)


@pytest.mark.parametrize(
    ("keeps_kv", "expected"), [(False, [Span(5, 0)]), (True, [Span(3, 0), Span(5, 0)])]
)
def test_a_completion_without_tokens_is_as_old_as_the_cache_of_its_prompt(
    group, keeps_kv, expected
):
    group.begin_version(1, 4, num_tokens=0, keeps_kv=keeps_kv)
    group.begin_version(1, 5, num_tokens=0, keeps_kv=keeps_kv)
    assert group.spans(1) == expected
    assert group.spans(0) == [Span(3, 0)]


@pytest.mark.parametrize("keeps_kv", [False, True])
def test_versions_that_sampled_nothing_in_between_are_left_out(group, keeps_kv):
    group.begin_version(0, 4, num_tokens=6, keeps_kv=keeps_kv)
    group.begin_version(0, 5, num_tokens=6, keeps_kv=keeps_kv)
    assert group.spans(0) == [Span(3, 0), Span(5, 6)]


@pytest.mark.parametrize("keeps_kv", [False, True])
def test_a_weight_sync_that_is_done_again_begins_nothing(group, keeps_kv):
    for num_tokens in (6, 6, 8):
        group.begin_version(0, 4, num_tokens=num_tokens, keeps_kv=keeps_kv)
    assert group.spans(0) == [Span(3, 0), Span(4, 6)]
