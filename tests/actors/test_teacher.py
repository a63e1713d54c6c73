"""The teacher: another model than the policy, asked about the policy's tokens."""

import pytest
import torch
from patience import PATIENCE_S
from policy_cases import padded_logprobs, policy_config, random_batch
from transformers import AutoModelForCausalLM

from rlsys.actors.teacher import TeacherActors
from rlsys.actors.waiting import get_all
from rlsys.config import Config

pytestmark = pytest.mark.system


def taught_config(student, teacher, **section):
    values = policy_config(student).model_dump()
    values["grpo"]["opd_kl_coef"] = 1.0
    values["teacher"] |= {"path": str(teacher), "placement": "own", **section}
    return Config.model_validate(values)


@pytest.mark.parametrize(
    "layout",
    [
        {"world_size": 2, "tensor_parallel_size": 2},
        pytest.param({"world_size": 2}, marks=pytest.mark.slow),
        pytest.param({"world_size": 2, "context_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_its_logprobs_are_those_of_transformers(ray_cluster, policy_models, layout):
    folder = policy_models["llama-untied"]
    teacher = TeacherActors(
        taught_config(policy_models["qwen2-tied"], folder, **layout), device="cpu"
    )
    get_all(teacher.async_start(), phase="start", timeout_s=PATIENCE_S)
    batch = random_batch()
    found, _ = teacher.compute_logprobs(batch)
    teacher.close()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        expected = padded_logprobs(model, batch)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
