"""The teacher of on-policy distillation: what it needs, and when it is there."""

import pytest
from config_cases import values
from test_config_rules import problems

from rlsys.config import Config
from rlsys.config.roles import plan_roles

OPD = {"opd_kl_coef": 1.0}
TEACHER = {"path": "org/teacher"}


def config(**sections):
    return Config.model_validate(values(**sections))


def test_a_teacher_has_actors_of_its_own_and_shares_the_gpus_of_the_policy():
    taught = config(grpo=OPD, teacher=TEACHER)
    (role,) = (role for role in plan_roles(taught, device="cuda") if role.name == "teacher")
    assert role.shares_gpu_of == ("policy", 0)
    assert taught.policy_shares_gpus
    assert "org/teacher" in taught.model_paths
    own = config(grpo=OPD, teacher=TEACHER | {"placement": "own", "world_size": 2})
    roles = [role for role in plan_roles(own, device="cuda") if role.name == "teacher"]
    assert [role.gpus for role in roles] == [1, 1]
    assert all(role.name != "teacher" for role in plan_roles(config(), device="cuda"))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"grpo": OPD}, "grpo.opd_kl_coef = 1 needs a teacher: set teacher.path"),
        ({"teacher": TEACHER}, "teacher.path = org/teacher changes nothing"),
        ({"teacher": {"placement": "own"}}, "teacher.placement = own changes nothing"),
        (
            {"grpo": OPD, "teacher": TEACHER | {"world_size": 64, "placement": "own"}},
            "makes 64 replicas, and a step has 16 rows for them (rollout.generation_batch_size)",
        ),
        (
            {"grpo": OPD, "teacher": TEACHER | {"world_size": 2}},
            "teacher.world_size = 2 is more than the policy's ranks",
        ),
        (
            {"grpo": OPD, "teacher": TEACHER | {"tensor_parallel_size": 2, "placement": "own"}},
            "teacher.world_size = 1 is not a multiple",
        ),
        (
            {
                "grpo": OPD,
                "teacher": TEACHER,
                "rollout": {"dynamic_sample": True},
            },
            "the teacher says something of every token",
        ),
    ],
)
def test_what_does_not_fit_a_teacher_is_refused(sections, words):
    (text,) = problems(**sections)
    assert words in text


def test_without_a_teacher_some_reward_has_to_count():
    nothing = {"reward_weights": [0.0, 0.0]}
    (text,) = problems(reward=nothing)
    assert "nothing to learn from" in text
    assert problems(reward=nothing, grpo=OPD, teacher=TEACHER) == []


def test_the_policy_that_moved_since_it_sampled_is_asked_again():
    assert not config(grpo=OPD, teacher=TEACHER).recompute_old_logprobs
    stale = {"max_staleness": 1}
    assert config(grpo=OPD, teacher=TEACHER, rollout=stale).recompute_old_logprobs
    assert not config(rollout=stale).recompute_old_logprobs


def test_without_reward_functions_the_error_says_how_a_teacher_alone_teaches():
    (text,) = problems(reward={"reward_funcs": []}, grpo=OPD, teacher=TEACHER)
    assert "With weight 0 in reward.reward_weights the teacher alone is learned from" in text
    (text,) = problems(reward={"reward_funcs": []})
    assert "teacher" not in text
