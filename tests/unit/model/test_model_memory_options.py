"""Options that a device, a type or a model does not have are refused, and what to do is said."""

import pytest
from config_cases import EXPERTS, write_model

from rlsys.config import PolicyConfig
from rlsys.model.memory_options import fp8_multiple, memory_option_problems
from rlsys.model.shape import read_model_shape

FP8 = {"fp8_format": "hybrid"}
HOPPER = (9, 0)
SELECTIVE = {"recompute": "selective"}


def texts(tmp_path, policy, *, device="cuda", dtype="bfloat16", capability=HOPPER, **sizes):
    shape = read_model_shape(write_model(tmp_path / "model", **sizes))
    found = memory_option_problems(
        PolicyConfig(**policy), shape, device=device, dtype=dtype, capability=capability
    )
    return [problem.text for problem in found]


@pytest.mark.parametrize(
    ("recipe", "capability", "words"),
    [
        ("tensorwise", (8, 0), ["8.0 have no FP8", "leave policy.fp8_format out"]),
        ("delayed", (8, 9), None),
        ("blockwise", (8, 9), ["begins at 9.0", "tensorwise or delayed"]),
        ("blockwise", HOPPER, None),
        ("mxfp8", HOPPER, ["fp8_recipe mxfp8", "10.0", "tensorwise or delayed or blockwise"]),
        ("mxfp8", (10, 0), None),
        ("mxfp8", (12, 0), ["mxfp8", "12.0", "tensorwise"]),
        ("mxfp8", None, None),  # the GPUs are those of another machine
    ],
)
def test_a_recipe_that_the_gpu_lacks_is_refused(tmp_path, recipe, capability, words):
    found = texts(tmp_path, FP8 | {"fp8_recipe": recipe}, capability=capability)
    assert bool(found) == bool(words)
    assert all(word in found[0] for word in words or ())


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (FP8, "fp8_format"),
        ({"use_precision_aware_optimizer": True}, "use_precision_aware_optimizer"),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload"),
    ],
)
def test_what_needs_a_gpu_and_bfloat16_says_so(tmp_path, policy, name):
    (on_cpu,) = texts(tmp_path, policy, device="cpu", dtype="float32", capability=None)
    assert f"policy.{name}" in on_cpu
    assert "on the CPU" in on_cpu
    (narrow,) = texts(tmp_path, policy, dtype="float32")
    assert f"policy.{name}" in narrow
    assert "set model.dtype to bfloat16" in narrow
    assert texts(tmp_path, policy) == []


@pytest.mark.parametrize(
    ("policy", "sizes", "words"),
    [
        (SELECTIVE | {"recompute_modules": ["moe"]}, {}, ["moe matches nothing", "no experts"]),
        (SELECTIVE | {"recompute_modules": ["shared_experts"]}, EXPERTS, ["no shared experts"]),
        (SELECTIVE | {"recompute_modules": ["mla_up_proj"]}, {}, ["no latent attention"]),
        (SELECTIVE | {"recompute_modules": ["moe", "moe_act"]}, EXPERTS, ["moe_act too"]),
        ({"recompute": "full", "recompute_num_layers": 3}, {}, ["does not divide", "stage, 4"]),
        (
            {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 5},
            {},
            ["more than the 4 layers"],
        ),
        (FP8, {"intermediate_size": 120}, ["multiples of 16", "intermediate size / TP is 120"]),
        (
            FP8 | {"tensor_parallel_size": 2, "fp8_recipe": "mxfp8"},
            {"intermediate_size": 96},
            ["multiples of 32", "intermediate size / TP is 48"],
        ),
    ],
    ids=str,
)
def test_what_the_model_does_not_have_is_refused(tmp_path, policy, sizes, words):
    (text,) = texts(tmp_path, policy, capability=None, **sizes)
    for word in words:
        assert word in text


def test_only_gpus_compute_the_activation_of_experts_in_one_kernel(tmp_path):
    policy = SELECTIVE | {"recompute_modules": ["moe_act"]}
    assert texts(tmp_path, policy, **EXPERTS) == []
    (text,) = texts(tmp_path, policy, device="cpu", dtype="float32", **EXPERTS)
    assert "use moe" in text


def test_tokens_are_filled_up_for_fp8_only():
    assert fp8_multiple(PolicyConfig()) == 1
    assert fp8_multiple(PolicyConfig(**FP8)) == 16
    assert fp8_multiple(PolicyConfig(**FP8, fp8_recipe="mxfp8")) == 32
