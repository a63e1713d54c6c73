"""vLLM's choices of experts: what a completion gets, and what cannot be its choices."""

import numpy as np
import pytest

from rlsys.engines.vllm.routed_experts import experts_of_completion

TOKENS, LAYERS, TOP_K = 23, 4, 2


def choices(num_experts, *, dtype=np.uint16, seed=0):
    """[TOKENS, LAYERS, TOP_K], where layers 0 and 2 have experts, and vLLM leaves zeros else."""
    rng = np.random.default_rng(seed)
    routed = rng.random((TOKENS, LAYERS, num_experts)).argsort(-1)[..., :TOP_K].astype(dtype)
    routed[:, [1, 3]] = 0
    return routed


def taken(routed, num_experts=8, num_tokens=TOKENS):
    return experts_of_completion(
        routed, num_tokens=num_tokens, layers=(0, 2), num_experts=num_experts
    )


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(8, np.uint8), (256, np.uint8), (257, np.int16), (2048, np.int16)]
)
def test_layers_with_experts_in_the_smallest_type(num_experts, dtype):
    routed = choices(num_experts)
    routed[3, 0] = num_experts - 1, 0
    found = taken(routed, num_experts)
    assert found.dtype == dtype
    assert np.array_equal(found, routed[:, [0, 2]])
    assert found.flags.c_contiguous  # so that Ray shares it without a copy


def test_missing_choices_are_an_error():
    with pytest.raises(RuntimeError, match=r"experts of 23 tokens .* vLLM returned none"):
        taken(None)
    with pytest.raises(RuntimeError, match=r"experts of 24 tokens .* returned those of 23"):
        taken(choices(8), num_tokens=24)


def test_a_kernel_that_reports_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="same expert twice"):
        taken(np.zeros((TOKENS, LAYERS, TOP_K), np.uint8))
    half = choices(8)
    half[:, 2] = 0  # in one of the two layers
    with pytest.raises(RuntimeError, match="same expert twice"):
        taken(half)


def test_experts_of_another_model_are_an_error():
    with pytest.raises(RuntimeError, match="does not have"):
        taken(choices(64), num_experts=8)


def test_one_token():
    assert taken(choices(8)[:1], num_tokens=1).shape == (1, 2, TOP_K)
