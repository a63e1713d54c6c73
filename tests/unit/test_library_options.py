"""Options of vLLM and megatron-core, read from their source."""

import dataclasses
import json
import subprocess
import sys

import pytest

from rlsys.config.passed_through import MEGATRON, VLLM
from rlsys.library_options import fits, option_problems, options_of


def fields_of(*classes):
    """Names of the fields of dataclasses."""
    names = {field.name for each in classes for field in dataclasses.fields(each)}
    return {name for name in names if not name.startswith("_")}


def test_megatron_cores_options_are_those_of_its_dataclasses():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import MLATransformerConfig

    imported = fields_of(MLATransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    assert set(options_of(*MEGATRON)) == imported


@pytest.mark.slow
def test_vllms_options_are_those_of_its_dataclass():
    """In a process of its own: vLLM changes settings of the one that imports it."""
    code = "import dataclasses, json\nfrom vllm.engine.arg_utils import EngineArgs\n"
    code += "print(json.dumps([field.name for field in dataclasses.fields(EngineArgs)]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = json.loads(run.stdout.splitlines()[-1])
    assert set(options_of(*VLLM)) == {name for name in names if not name.startswith("_")}


def test_a_package_that_is_not_installed_has_no_options_to_check():
    assert options_of("no_such_package", (("a.py", "A"),)) is None
    assert options_of("no_such_package.core", (("a.py", "A"),)) is None


@pytest.mark.parametrize(
    ("annotation", "taken", "refused"),
    [
        ("bool", [True], [1, "true", None]),
        ("int", [3], [True, 3.0, "3"]),
        ("float", [3, 0.5], [True, "0.5"]),
        ("Optional[int]", [None, 3], ["3"]),
        ("int | None", [None, 3], [3.5]),
        ("Union[str, List[str]]", ["a", ["a", "b"]], [1, ["a", 1]]),
        ("Optional[Tuple[int, int]]", [None, [1, 2]], [[1], [1, "a"], 1]),
        ("Literal['a', 'b'] | None", ["a", None], ["c", 1]),
        ("dict[str, int]", [{"a": 1}], ["a", [1]]),
        ("'dict[str, Any] | Unknown'", [{"a": 1}, "anything"], []),
        ("Unknown", [1, "a", None], []),
        ("torch.dtype", ["bfloat16"], ["bf16", 16]),
        ("Optional[Callable]", [None], ["print"]),
    ],
)
def test_values_are_checked_where_the_annotation_says_what_they_are(annotation, taken, refused):
    assert [value for value in taken if not fits(value, annotation)] == []
    assert [value for value in refused if fits(value, annotation)] == []


def test_a_problem_names_the_option_the_nearest_one_or_the_type():
    options = {"moe_router_fusion": "bool", "exp_avg_dtype": "torch.dtype", "timers": "Callable"}
    values = {"moe_router_fusoin": True, "zzz": 1, "exp_avg_dtype": "bf16", "timers": "x"}
    problems = option_problems("policy.megatron_kwargs", values, options, library="megatron.core")
    assert [str(problem) for problem in problems] == [
        "policy.megatron_kwargs: megatron.core here has no option 'moe_router_fusoin': did you "
        "mean moe_router_fusion?",
        "policy.megatron_kwargs: megatron.core here has no option 'zzz': take it out, or correct "
        "it",
        "policy.megatron_kwargs.exp_avg_dtype = 'bf16': megatron.core takes one of float32, "
        "bfloat16, float16, uint8",
        "policy.megatron_kwargs.timers = 'x': megatron.core takes a function, which a config "
        "cannot hold: leave it out",
    ]


def test_megatron_configs_get_the_options_that_they_have():
    import torch

    from rlsys.config import PolicyConfig
    from rlsys.engines.megatron.options import megatron_config

    @dataclasses.dataclass
    class Config:
        own: int
        state_dtype: torch.dtype = torch.float32
        fused: bool = True

    passed = {"state_dtype": "bfloat16", "fused": False, "of_another_class": 1}
    built = megatron_config(Config, {"own": 1, "fused": True}, PolicyConfig(megatron_kwargs=passed))
    assert built == Config(own=1, state_dtype=torch.bfloat16, fused=False)
