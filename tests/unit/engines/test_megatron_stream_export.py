"""Buckets that are filled from a stream of whole tensors."""

import pytest
import torch

from rlsys.engines.megatron.stream_export import StreamExport
from rlsys.weight_sync.connection import Connection, whole_tensors
from rlsys.weight_sync.plan import TensorMeta, TensorSlice

SHAPES = {"a": (8, 4), "b": (6,), "c": (2, 3), "d": (5,)}
TENSORS = {name: torch.randn(shape) for name, shape in SHAPES.items()}
METAS = [TensorMeta(name, "float32", shape) for name, shape in SHAPES.items()]
A, B, _, D = METAS
CUT = (
    TensorSlice(A, (2, 0), (3, 4)),
    TensorSlice(A, (5, 1), (3, 2)),  # of the tensor before
    TensorSlice(B, (4,), (2,)),
    TensorSlice.whole(D),  # and none of c
)


class Stream:
    """Counts how far it was read."""

    def __init__(self):
        self.given = []

    def __call__(self):
        for name, tensor in TENSORS.items():
            self.given.append(name)
            yield name, tensor


@pytest.mark.parametrize("slices", [whole_tensors(METAS), CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("bucket_bytes", [1, 64, 10_000])
def test_every_slice_is_in_its_bucket_and_the_stream_is_read_to_its_end(slices, bucket_bytes):
    connection = Connection(
        slices, 0, "gloo", "", 0, 2, bucket_bytes, verify=True, in_place=True, timeout_s=1.0
    )
    stream = Stream()
    export = StreamExport(stream, connection)
    for _ in range(2):  # two updates
        stream.given.clear()
        found = {}
        for bucket in connection.buckets():
            buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            export.fill(bucket, buffer)
            found |= dict(bucket.views(buffer))
        assert stream.given == list(SHAPES)
        expected = {
            piece.meta.name: piece.within(
                TENSORS[piece.tensor.name], TensorSlice.whole(piece.tensor)
            )
            for piece in slices
        }
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_other_ranks_read_the_stream_to_its_end():
    stream = Stream()
    connection = Connection(
        whole_tensors(METAS), 0, "gloo", "", 0, 2, 64, verify=True, in_place=True, timeout_s=1.0
    )
    StreamExport(stream, connection).contribute()
    assert stream.given == list(SHAPES)
