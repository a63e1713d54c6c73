"""Regular expressions of users end in time, and mean what they mean in `re`."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys import patterns
from rlsys.model.freezing import _matched
from rlsys.model.lora import matches
from rlsys.model.stored_adapter import _matching
from rlsys.patterns import find

EXPLODES = r"(a|a)*(a|b)*(a|a)+$"
NAME = "a" * 60 + "!"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_S", 0.2)


@pytest.mark.parametrize("mode", ["search", "fullmatch", "findall"])
def test_an_expression_that_would_take_years_is_an_error(mode):
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s for the text 'aaa"):
        find(mode, EXPLODES, NAME)


@pytest.mark.parametrize(
    "use",
    [
        lambda: _matched("freeze_parameters", [], EXPLODES, [NAME]),
        lambda: matches(EXPLODES, NAME),
        lambda: _matching({EXPLODES: 3}, NAME, 1),
    ],
    ids=["policy.freeze_parameters_regex", "policy.lora", "rank_pattern of an adapter"],
)
def test_every_expression_over_names_is_bounded(use):
    with pytest.raises(ValueError, match="write it without a repetition inside a repetition"):
        use()


USUAL = [
    r"layers\.(\d+)\.mlp", r"^model\.", r".*\.(q|k|v)_proj", r"(?i)SCORE: *(\d+(?:\.\d+)?)",
    r"\[\[(\d+)\]\]", r"(?<=\.)[a-z]+$", r"[^.]+", r"a{2,3}|b", r"(?P<n>\w)(?P=n)",
]  # fmt: skip
NAMES = st.text(st.sampled_from("abq.vk_proj0123[] MSCORE:layersmlp"), max_size=40)


@given(st.sampled_from(USUAL), NAMES)
def test_they_mean_what_they_mean_in_re(pattern, text):
    assert bool(find("search", pattern, text)) == bool(re.search(pattern, text))
    assert bool(find("fullmatch", pattern, text)) == bool(re.fullmatch(pattern, text))
    assert find("findall", pattern, text) == re.findall(pattern, text)
