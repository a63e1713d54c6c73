"""Options that save memory and do not fit each other are refused, each by name."""

import pytest
from config_cases import values
from test_config_rules import problems

from rlsys.config import Config

AWARE = {"use_precision_aware_optimizer": True}
OFFLOAD = AWARE | {"optimizer_cpu_offload": True}
FP8 = {"fp8_format": "hybrid"}


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm"]},
        AWARE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "main_grads_dtype": "bf16"},
        OFFLOAD | {"optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True},
        OFFLOAD | FP8,
        FP8 | {"fp8_param_gather": True, "fp8_recipe": "blockwise"},
        AWARE | FP8 | {"fp8_param_gather": True},
    ],
    ids=str,
)
def test_options_that_fit_are_accepted(policy):
    assert problems(policy=policy) == []
    # A run's saved config names all defaults, and is read again.
    saved = Config.model_validate(values(policy=policy)).model_dump(mode="json")
    assert (
        Config.model_validate(saved).policy == Config.model_validate(values(policy=policy)).policy
    )


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"recompute_num_layers": 2}, ["policy.recompute_num_layers", "full"]),
        ({"recompute": "selective", "recompute_method": "block"}, ["recompute_method", "full"]),
        ({"recompute_modules": ["moe"]}, ["policy.recompute_modules", "selective"]),
        ({"exp_avg_dtype": "bf16"}, ["policy.exp_avg_dtype = bf16", "use_precision_aware"]),
        (AWARE | {"use_distributed_optimizer": False}, ["use_distributed_optimizer is false"]),
        ({"optimizer_offload_fraction": 0.5}, ["optimizer_offload_fraction", "cpu_offload"]),
        ({"optimizer_cpu_offload": True}, ["needs policy.use_precision_aware_optimizer"]),
        (OFFLOAD | {"exp_avg_dtype": "bf16"}, ["exp_avg_dtype = bf16 has no effect"]),
        ({"fp8_recipe": "delayed"}, ["policy.fp8_recipe", "policy.fp8_format"]),
        ({"fp8_param_gather": True}, ["policy.fp8_param_gather", "policy.fp8_format"]),
        (FP8 | {"fp8_recipe": "mxfp8", "fp8_param_gather": True}, ["mxfp8 is not there"]),
        (
            FP8 | {"fp8_param_gather": True, "use_distributed_optimizer": False},
            ["use_distributed_optimizer is false"],
        ),
        (FP8 | OFFLOAD | {"fp8_param_gather": True}, ["optimizer_cpu_offload"]),
        (
            FP8 | AWARE | {"fp8_param_gather": True, "fp8_recipe": "delayed"},
            ["fp8_recipe = delayed", "tensorwise"],
        ),
        (
            FP8
            | {"fp8_recipe": "delayed", "recompute": "selective"}
            | {"recompute_modules": ["mlp", "layernorm"]},
            ["layernorm", "delayed"],
        ),
        ({"megatron_kwargs": {"fp8": "hybrid"}}, ["policy.fp8_format"]),
        ({"megatron_kwargs": {"exp_avg_dtype": "bfloat16"}}, ["policy.exp_avg_dtype"]),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_by_name(policy, words):
    (text,) = problems(policy=policy)
    for word in words:
        assert word in text


def test_adapters_are_beside_weights_in_the_models_type():
    found = problems(policy=FP8 | {"fp8_param_gather": True, "lora": {}})
    assert any("fp8_param_gather with policy.lora is not there" in text for text in found)


def test_a_run_does_not_continue_with_an_offloaded_optimizer():
    with pytest.raises(ValueError, match="would start from wrong weights"):
        Config.model_validate(values(policy=OFFLOAD, checkpoint={"resume": True}))
    Config.model_validate(values(policy=OFFLOAD))
    Config.model_validate(values(checkpoint={"resume": True}))
