"""How a policy is spread over GPUs changes no number that it reports."""

import pytest
import torch
from gpu_cases import gpu_config, long_batch
from gpu_lab import train
from policy_cases import LAYOUTS, exported

pytestmark = pytest.mark.gpu(2)

BATCH = long_batch(16, 400)
RELATIVE = {"float32": 1e-4, "bfloat16": 2**-6}
"""Relative bound for loss and gradient norm. Rounding to bfloat16 changes a number by up to 2^-9;
rounding in other places makes gradient norms of these models differ by up to 6e-3."""
NATS = {"float32": 1e-4, "bfloat16": 1e-2}
"""Bound for the mean difference of log-probs."""
NUM_UPDATES = 3
PIPELINES = {
    "uneven PP 2": LAYOUTS["PP 2"] | {"pipeline_layout": "Et|t*3L"},
    "VPP 2 x PP 2": LAYOUTS["PP 2"] | {"pipeline_layout": "Et|t|t|tL"},
}


@pytest.fixture(scope="module")
def trained(lab, gpu_models):
    """(layout, type) -> log-probs at the start, (loss, gradient norm) of every update, weights."""
    known = {}

    def remember(layout, dtype):
        if (layout, dtype) not in known:
            config = gpu_config(
                gpu_models["qwen3-tied", 0],
                dtype=dtype,
                max_tokens_per_micro_batch=1024,
                # With Adam's own, gradients that are nothing but rounding move weights by lr: the
                # norm of the third update then differs by 1.6%, between two runs of one rank too.
                adam_eps=1e-4,
                **(LAYOUTS | PIPELINES)[layout],
            )
            start = None if layout == "one rank" else remember("one rank", dtype)[0]
            policy = lab.policy(config)
            reported = train(policy, BATCH, NUM_UPDATES, start=start)
            known[layout, dtype] = *reported, exported(policy)
        return known[layout, dtype]

    return remember


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("layout", ["TP 2", "DP 2", "PP 2", *PIPELINES])
def test_a_layout_trains_as_one_gpu_does(trained, layout, dtype):
    logprobs, updates, weights = trained(layout, dtype)
    expected_logprobs, expected_updates, expected_weights = trained("one rank", dtype)
    mean = (logprobs - expected_logprobs).abs().sum() / BATCH.completion_mask.sum()
    assert mean < NATS[dtype]
    for update, expected in zip(updates, expected_updates, strict=True):
        assert update == pytest.approx(expected, rel=RELATIVE[dtype])
    assert weights.keys() == expected_weights.keys()
    if dtype == "float32":
        for name, tensor in weights.items():
            # Adam moves an element whose gradient is nearly zero by up to lr, in either direction.
            moved = (tensor - expected_weights[name]).abs()
            assert moved.mean() < 1e-2 * NUM_UPDATES * 1e-4, name
            assert moved.max() <= 2.1 * NUM_UPDATES * 1e-4, name


def test_updates_move_what_is_compared(trained):
    _, updates, weights = trained("one rank", "float32")
    assert len({loss for loss, _ in updates}) == NUM_UPDATES
    assert all(norm > 1e-3 for _, norm in updates)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
