"""Weights from one process to others on the same GPU, by CUDA IPC."""

import json

import pytest
from gpu_cases import DEVICE
from ipc_ranks import NUM_BUCKETS, Rank, check_death, check_updates, connect, expected

pytestmark = pytest.mark.gpu(1)

NUMEL = 1 << 20
LARGE_NUMEL = 100 << 20 if DEVICE == "cuda" else NUMEL  # 2.9 GB in 7 buckets


@pytest.fixture(scope="module", params=["expandable_segments:False", "expandable_segments:True"])
def ranks(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_CUDA_ALLOC_CONF", request.param)
        ranks = [Rank(DEVICE) for _ in range(3)]
        for starting in [rank.start() for rank in ranks]:  # before the variable goes
            starting.result()
    yield ranks
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("slow", [None, "sender", "receiver"])
def test_nobody_reads_too_early_or_overwrites_too_early(ranks, slow, keep):
    """Streams lag behind their hosts by many milliseconds where the test says slow."""
    check_updates(ranks, (1, 2, 3), slow=slow, keep=keep, numel=NUMEL)


def test_connections_follow_each_other_and_large_buckets_are_fast(ranks):
    sender, receiver, _ = ranks
    for version in (1, 2):  # the memory of the first goes when the second takes its place
        store = connect(sender, [receiver], numel=LARGE_NUMEL)
        seconds = []
        for _ in range(3):
            receiving = receiver.receive(version)
            seconds.append(sender.send(version).result())
            assert receiving.result() == expected(version)
    nbytes = 4 * LARGE_NUMEL * NUM_BUCKETS
    speed = {"ipc_bytes": nbytes, "ipc_seconds": min(seconds)}
    print(json.dumps(speed | {"ipc_gb_per_s": nbytes / 1e9 / min(seconds)}))
    del store


def test_the_shared_memory_keeps_nothing_else_from_being_freed(ranks):
    sender, *_ = ranks
    assert sender.reserved_beside_buckets().result() < 64 << 20


def test_a_sender_that_dies_is_a_named_timeout(ranks):
    mortal = Rank(DEVICE)
    check_death(mortal, ranks[1:], timeout_s=10.0, numel=NUMEL)
    mortal.close()
