"""Which engine gets which request."""

from hypothesis import given
from hypothesis import strategies as st

from rlsys.actors.rollout import deal
from rlsys.types import Prompt, SampleRequest

LOADS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9), min_size=1)


def requests(number):
    prompt = Prompt("p", [], [1])
    return [SampleRequest(ticket, prompt, 2, 1.0, ticket) for ticket in range(number)]


@given(LOADS, st.integers(0, 30))
def test_every_request_goes_to_one_engine_and_loads_become_even(loads, number):
    before = dict(loads)
    shares = deal(requests(number), loads)
    assert sorted(r.ticket for share in shares.values() for r in share) == list(range(number))
    assert loads == {name: before[name] + len(shares.get(name, [])) for name in before}
    for name, share in shares.items():
        assert share
        assert loads[name] <= min(loads.values()) + 1


def test_the_first_of_several_engines_comes_first():
    shares = deal(requests(5), {"a": 0, "b": 0})
    assert {name: [one.ticket for one in share] for name, share in shares.items()} == {
        "a": [0, 2, 4],
        "b": [1, 3],
    }
