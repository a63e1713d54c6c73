"""Which node each group of GPUs gets, on a cluster where others may have some."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.actors.reservation import choose_nodes


@pytest.mark.parametrize(
    ("sizes", "free", "chosen"),
    [
        # A policy with TP 4 and three engines; another run has a GPU of the first host.
        ([4, 1, 1, 1], {"a": 3, "b": 4}, ["b", "a", "a", "a"]),
        # Filled one after the other, the first host would get one group and a quarter.
        ([4, 4], {"a": 5, "b": 8}, ["b", "b"]),
        ([4, 4], {"a": 4, "b": 4}, ["a", "b"]),
        # All on one host, on the one that leaves least over.
        ([2, 1], {"a": 8, "b": 3, "c": 4}, ["b", "b"]),
        ([1, 1, 2], {"a": 1, "b": 3}, ["b", "a", "b"]),
        ([4, 2], {"a": 3, "b": 3}, None),
        ([1], {}, None),
        ([], {}, []),
    ],
)
def test_groups_stay_whole_on_few_nodes(sizes, free, chosen):
    assert choose_nodes(sizes, free) == chosen


@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), max_size=6),
    st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_a_way_is_found_if_there_is_one(sizes, rooms):
    free = {str(i): room for i, room in enumerate(rooms)}
    chosen = choose_nodes(sizes, free)
    assert (chosen is not None) == _fits(sorted(sizes, reverse=True), rooms)
    if chosen is not None:
        for node, room in free.items():
            assert sum(s for s, n in zip(sizes, chosen, strict=True) if n == node) <= room


def _fits(sizes, rooms):
    """By trying every node for every group."""
    return not sizes or any(
        room >= sizes[0] and _fits(sizes[1:], [*rooms[:i], room - sizes[0], *rooms[i + 1 :]])
        for i, room in enumerate(rooms)
    )
