"""YAML as users mean it: numbers are numbers at every depth, words are words."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlsys.commands.rewards_try import _parse_params
from rlsys.config.yaml_text import dump_yaml, load_yaml, read_scalar

VALUES = {
    "1e-3": 0.001,
    "1E5": 1e5,
    "1e3": 1000.0,
    "-1.5e+2": -150.0,
    ".5": 0.5,
    "5.": 5.0,
    "+7": 7,
    "0o17": 15,
    "0x1F": 31,
    "017": 17,
    "08": 8,
    "1_000": 1000,
    "-10_000_000": -10_000_000,
    "true": True,
    "False": False,
    "~": None,
    "null": None,
    "": None,
    "no": "no",
    "on": "on",
    "Yes": "Yes",
    "OFF": "OFF",
    "y": "y",
    "12:30": "12:30",
    "1:30:00": "1:30:00",
    "2024-01-01": "2024-01-01",
    "2024-01-01T10:00:00Z": "2024-01-01T10:00:00Z",
    "none": "none",
    "1_0": "1_0",
    "0b11": "0b11",
    "1e": "1e",
    "=": "=",
    "1.2.3": "1.2.3",
    "'1e-3'": "1e-3",
    '"true"': "true",
}


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_a_value_is_what_it_looks_like_at_every_depth(text, value):
    found = load_yaml(f"a: {{b: [{text or '~'}]}}\nc: {text}\n")
    for one in (found["a"]["b"][0], found["c"]):
        assert (type(one), one) == (type(value), value)
    if text[:1] not in ("'", '"'):
        word = read_scalar(text)
        assert (type(word), word) == (type(value), value)


def test_infinity_and_nan():
    assert load_yaml("[.inf, -.INF, .NaN]")[:2] == [math.inf, -math.inf]
    assert math.isnan(read_scalar(".nan"))


def test_words_are_keys_too():
    assert load_yaml("{on: 1, no: 2, 1e-3: 3, true: 4}") == {"on": 1, "no": 2, 0.001: 3, True: 4}


def test_anchors_and_merge_keys_work():
    text = "base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n"
    assert load_yaml(text)["mine"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    "text",
    [
        "!!int 12:30",
        "!!bool perhaps",
        "!!timestamp 2024-01-01",
        "!!python/object/apply:os.getcwd []",
        "!!binary aGk=",
        "a: 1\n---\nb: 2",
        "{a: 1, a: 2}",
        "[1, 2",
        "&a [*a]",
        "&a {<<: *a}",
        "[" * 60 + "]" * 60,
        "a0: &a0 [1, 2, 3]\n"
        + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)),
    ],
)
def test_what_it_cannot_read_is_a_yaml_error(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_keys_that_are_given_twice_can_be_collected():
    repeated = []
    assert load_yaml("{a: 1, a: 2}", repeated) == {"a": 2}
    assert repeated == ["a: is given twice, in lines 1 and 1: keep one of them"]


_texts = st.text(max_size=8) | st.sampled_from([text for text in VALUES if "'" not in text])
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | _texts
    | st.just("a\x85")
)


@given(
    st.recursive(
        _scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_scalars, inner, max_size=3),
        max_leaves=6,
    )
)
def test_what_is_written_is_read_back_by_yaml_1_1_and_1_2(value):
    text = dump_yaml(value)
    assert load_yaml(text) == value
    assert yaml.safe_load(text) == value


def test_settings_of_rewards_try_are_read_the_same_way():
    found = _parse_params("{thr: {threshold: 1e-3, on: no, at: [12:30, 1e2]}}")
    assert found == {"thr": {"threshold": 0.001, "on": "no", "at": ["12:30", 100.0]}}
