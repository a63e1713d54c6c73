"""Distillation in the engine: transformers' divergence and gradient, however it is cut."""

import math
from functools import partial

import pytest
import torch
from distill_cases import distill_config, learn, loss_of_transformers
from one_rank import one_rank
from patience import PATIENCE_S
from policy_cases import LAYOUTS
from test_sft_policy import SAMPLES
from transformers import AutoModelForCausalLM

from rlsys.actors.teacher import TeacherActors
from rlsys.actors.waiting import get_all
from rlsys.algo.batching import build_sample_batch

STUDENT, TEACHER = "qwen3-tied", "llama-untied"


@pytest.fixture(scope="module")
def process():
    with one_rank() as executor:
        yield executor


@pytest.fixture(scope="module")
def expected(policy_models):
    """The loss and the gradient by transformers in float64; each is computed once."""
    known = {}

    def compute(student=STUDENT, teacher=TEACHER, **distill):
        key = (student, teacher, *sorted(distill.items()))
        if key not in known:
            models = [
                AutoModelForCausalLM.from_pretrained(policy_models[name], dtype=torch.float64)
                for name in (student, teacher)
            ]
            loss = loss_of_transformers(*models, SAMPLES, **distill)
            loss.backward()
            gradient = {name: one.grad for name, one in models[0].named_parameters()}
            known[key] = loss.item(), gradient
        return known[key]

    return compute


def assert_equal(found, expected):
    gradient, metrics = found
    loss, of_transformers = expected
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["num_loss_tokens"] == sum(sample.num_targets for sample in SAMPLES)
    assert gradient.keys() == of_transformers.keys()
    size = norm(of_transformers)
    assert size > 0.01
    differences = {name: gradient[name] - of_transformers[name] for name in gradient}
    assert norm(differences) <= 1e-5 * size


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("distill", "cut"),
    [
        ({}, {}),
        ({}, {"micro_batch_size": 1}),
        ({}, {"max_tokens_per_micro_batch": 64}),
        ({"beta": 0.0}, {}),
        ({"beta": 1.0}, {}),
        ({"beta": 0.2, "temperature": 0.7}, {"micro_batch_size": 8}),
        ({"loss_top_k": 5, "beta": 0.0}, {}),
        ({"loss_top_k": 5, "beta": 0.5}, {"max_tokens_per_micro_batch": 48}),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_transformers(
    process, policy_models, expected, distill, cut
):
    folders = policy_models[STUDENT], policy_models[TEACHER]
    found = process.submit(learn, *folders, distill, cut).result(timeout=300)
    assert_equal(found, expected(**distill))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("student", "teacher"), [("llama-untied", "qwen2-tied"), ("qwen2-untied", "qwen3-tied")]
)
def test_models_of_any_kind_teach_each_other(process, policy_models, expected, student, teacher):
    folders = policy_models[student], policy_models[teacher]
    found = process.submit(learn, *folders, {}, {}).result(timeout=300)
    assert_equal(found, expected(student, teacher))


# --- ranks ---------------------------------------------------------------------------------------


FOUR_RANKS = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.system
@pytest.mark.parametrize(
    ("layout", "ranks", "distill"),
    [
        ("TP 2", {"world_size": 2, "tensor_parallel_size": 2}, {}),
        FOUR_RANKS("DP 2", {"world_size": 2}, {"beta": 0.0}),
        FOUR_RANKS("TP 2", {"world_size": 2, "tensor_parallel_size": 2}, {"loss_top_k": 5}),
        FOUR_RANKS("CP 2", {"world_size": 2, "context_parallel_size": 2}, {"beta": 1.0}),
        FOUR_RANKS("PP 2", {}, {}),
        FOUR_RANKS("TP 2 x DP 2", {"world_size": 2, "tensor_parallel_size": 2}, {}),
    ],
    ids=str,
)
def test_ranks_of_student_and_teacher_change_nothing(
    lab, policy_models, expected, layout, ranks, distill
):
    folders = policy_models[STUDENT], policy_models[TEACHER]
    config = distill_config(*folders, distill, ranks, **LAYOUTS[layout])
    teacher = TeacherActors(config, device="cpu")
    get_all(teacher.async_start(), phase="start", timeout_s=PATIENCE_S)
    batch = build_sample_batch(SAMPLES)
    batch.teacher = teacher.describe_tokens(batch)
    teacher.close()
    gradient = lab.policy(config).call("gradient", batch)[0]
    metrics = lab.policy(config).update(batch).metrics
    assert_equal((gradient, metrics), expected(**distill))


@pytest.mark.system
@pytest.mark.slow
def test_a_student_with_an_adapter_learns_by_its_adapter_alone(lab, policy_models):
    folders = policy_models[STUDENT], policy_models[TEACHER]
    config = distill_config(*folders, {"beta": 0.0}, lora={"rank": 2}, lr=1e-2)
    teacher = TeacherActors(config, device="cpu")
    get_all(teacher.async_start(), phase="start", timeout_s=PATIENCE_S)
    batch = build_sample_batch(SAMPLES)
    batch.teacher = teacher.describe_tokens(batch)
    teacher.close()
    policy = lab.policy(config)
    losses = [policy.update(batch).metrics["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    gradient = policy.call("adapter_gradient", batch)[0]
    assert all("lora_" in name for name in gradient)
