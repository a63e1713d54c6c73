"""Which version a token counts for when weights change under it."""

import pytest

from rlsys.engines.vllm.spans import Span, begin_span


@pytest.mark.parametrize(
    ("keeps_kv", "expected"), [(False, [Span(5, 0)]), (True, [Span(3, 0), Span(5, 0)])]
)
def test_what_has_no_token_yet_is_as_old_as_what_its_prompt_is_read_from(keeps_kv, expected):
    spans = [Span(3, 0)]
    begin_span(spans, 4, num_tokens=0, keeps_kv=keeps_kv)
    begin_span(spans, 5, num_tokens=0, keeps_kv=keeps_kv)
    assert spans == expected


@pytest.mark.parametrize("keeps_kv", [False, True])
def test_versions_that_sampled_nothing_in_between_are_left_out(keeps_kv):
    spans = [Span(3, 0)]
    begin_span(spans, 4, num_tokens=6, keeps_kv=keeps_kv)
    begin_span(spans, 5, num_tokens=6, keeps_kv=keeps_kv)
    assert spans == [Span(3, 0), Span(5, 6)]
