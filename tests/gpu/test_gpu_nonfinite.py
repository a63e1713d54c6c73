"""Steps that are not finite on GPUs: nothing changes, and the kernel of checksums finds NaNs."""

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, gpu_config, long_batch

from rlsys.weight_sync.checksum import FiniteChecksums, checksum
from rlsys.weight_sync.plan import DTYPES, TensorMeta, plan_buckets

pytestmark = pytest.mark.gpu(1)

BATCH = long_batch(16, 400)
ELEMENTS = 3 * 2**19 + 5
"""Several whole chunks and a part of one, in each type."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_poisoned_batch_changes_nothing(lab, gpu_models, dtype, value):
    config = gpu_config(gpu_models["qwen3-tied", 0], dtype=dtype, nonfinite_dumps=0)
    policy = lab.policy(config)
    policy.update(BATCH)
    ((before, steps),) = policy.call("training_state")
    poisoned = replace(BATCH, advantages=BATCH.advantages.clone())
    row, token = BATCH.completion_mask.nonzero()[5].tolist()
    poisoned.advantages[row, token] = value
    assert policy.update(poisoned).metrics["fault/nonfinite_steps"] == 1
    ((after, later_steps),) = policy.call("training_state")
    assert steps == later_steps
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert policy.update(BATCH).metrics["grad_norm"] > 0


def sums_on_device(_rank, dtype, place, value):
    """Names that are found, and whether the checksum is that of the CPU."""
    metadata = [TensorMeta(name, dtype, (ELEMENTS,)) for name in "abc"]
    (bucket,) = plan_buckets(metadata, 1 << 30)
    data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for _, view in bucket.views(data):
        view.copy_(torch.linspace(-60000, 60000, ELEMENTS))
    if place is not None:
        dict(bucket.views(data))["b"][place] = value
    sums = FiniteChecksums([bucket])
    number = sums.add(bucket, data.to(DEVICE))
    return sums.nonfinite(), bool(number.cpu() == checksum(data))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("place", [None, 2**18, 2**18 + 1, ELEMENTS - 1])
def test_the_pass_of_the_checksum_finds_one_number(lab, gpu_models, dtype, place):
    policy = lab.policy(gpu_config(gpu_models["qwen3-tied", 0]))
    for value in (torch.nan, -torch.inf):
        ((names, is_equal),) = policy.call("run", sums_on_device, dtype, place, value)
        assert is_equal
        assert ("b" in names) == (place is not None)
        if dtype == "float32":  # else the number may share a chunk of 1 MiB with the end of a
            assert "a" not in names
