"""Which bytes a sleeping worker keeps; tests/gpu/test_gpu_sleep.py has real memory."""

from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.vllm import sleeping
from rlsys.engines.vllm.sleeping import KeptMemory, Region, without

LARGE = 8
REGIONS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=6).map(
    lambda pairs: [Region(start, start + size) for start, size in pairs]
)


def numbers(regions):
    return [number for start, end in regions for number in range(start, end)]


@given(allocated=st.lists(st.integers(1, 20), max_size=5), weights=REGIONS)
def test_every_byte_is_kept_but_those_of_large_weights(allocated, weights):
    starts = [25 * index for index in range(len(allocated))]
    regions = [Region(s, s + size) for s, size in zip(starts, allocated, strict=True)]
    gone = set(numbers([r for r in weights if r.end - r.start >= LARGE]))
    kept = without(regions, weights, large=LARGE)
    assert numbers(kept) == [n for n in numbers(regions) if n not in gone]
    assert all(start < end for start, end in kept)


def test_memory_comes_back_by_kind_and_once(monkeypatch):
    """The memory of a "GPU" that is a bytearray here."""
    size, large = sleeping.SMALL_ALLOCATION_BYTES, sleeping.LARGE_WEIGHT_BYTES
    allocated = {
        "weights": [Region(0, large + 10)],
        "kv_cache": [Region(large + 10, large + 20), Region(large + 20, large + 21 + size)],
    }
    gpu = bytearray(b"a" * (large + 21 + size))
    hosts = {}

    class Host:
        def __init__(self, region):
            self.content = bytes(gpu[region.start : region.end])
            hosts[id(self)] = self

        def data_ptr(self):
            return id(self)

        def numel(self):
            return len(self.content)

    def copy_bytes(target, source, nbytes):
        gpu[target : target + nbytes] = hosts[source].content

    monkeypatch.setattr(sleeping, "_allocated_regions", lambda: allocated)
    monkeypatch.setattr(sleeping, "_copy_to_host", Host)
    monkeypatch.setattr(sleeping, "_copy_bytes", copy_bytes)
    monkeypatch.setattr(sleeping, "_region", lambda region: region)
    kept = KeptMemory([Region(5, large + 5)])
    gpu[:] = b"x" * len(gpu)
    kept.restore("weights")
    assert gpu[: large + 12] == b"a" * 5 + b"x" * large + b"a" * 5 + b"xx"
    kept.restore("kv_cache")
    assert gpu[large + 10 :] == b"a" * 10 + b"x" * (size + 1)
    gpu[:] = b"y" * len(gpu)
    kept.restore("weights")
    assert set(gpu) == set(b"y")
