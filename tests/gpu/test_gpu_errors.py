"""Errors on GPUs say what to do."""

import re

import pytest
from gpu_cases import DEVICE, gpu_config, long_batch
from gpu_lab import update_with_little_memory

from rlsys.actors.waiting import ActorFailure, get_all

pytestmark = pytest.mark.gpu(1)


def test_out_of_memory_in_the_policy_names_the_micro_batch_and_the_knob(lab, gpu_models):
    batch = long_batch(16, 2000)
    policy = lab.policy(
        gpu_config(gpu_models["qwen3-tied", 0], longest=2000, max_tokens_per_micro_batch=32768)
    )
    longest = f"{int(batch.lengths.sum()):,}"
    message = rf"CUDA out of memory.*micro-batches of {longest} tokens: lower policy\.max_tokens"
    with pytest.raises(ActorFailure, match=re.compile(message, re.DOTALL)):
        policy.call("run", update_with_little_memory, batch, 64 * 2**20)


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no KV cache", r"max seq len \(3160\).*larger than the available KV cache"),
        ("no free memory", r"Free memory on device .*Decrease GPU memory utilization"),
    ],
)
def test_an_engine_that_cannot_start_says_why_in_the_last_line(failing_engines, wrong, message):
    if DEVICE == "cpu" and wrong == "no free memory":
        pytest.skip("a CPU engine asks for none")
    with pytest.raises(ActorFailure) as caught:
        get_all(failing_engines[wrong], phase="start", timeout_s=240)
    assert re.search(message, str(caught.value).splitlines()[-1])
