"""Optimizer steps that are not finite: nothing of the policy changes, on any rank."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from policy_cases import LAYOUTS, policy_config, random_batch

from rlsys.actors.waiting import ActorFailure

pytestmark = pytest.mark.system

SLOW = partial(pytest.param, marks=pytest.mark.slow)
EXPERTS = {"world_size": 2, "expert_model_parallel_size": 2, "tensor_parallel_size": 1}


def states(policy):
    return policy.call("training_state")


def assert_same(before, after):
    for (tensors, steps), (later, later_steps) in zip(before, after, strict=True):
        assert steps == later_steps
        assert len(tensors) == len(later)
        assert all(torch.equal(a, b) for a, b in zip(tensors, later, strict=True))


def config_of(folder, tmp_path, *, grpo=None, dtype="auto", **policy):
    """A policy whose third step in a row ends the run, and which dumps below tmp_path."""
    config = policy_config(folder, grpo=grpo, dtype=dtype, **{"nonfinite_dumps": 3, **policy})
    return config.model_copy(update={"output_dir": str(tmp_path / "run")})


def poisoned(batch, name, value=torch.nan):
    """The batch with one value of a trained token of row 2."""
    values = getattr(batch, name)
    values = (
        torch.full(batch.input_ids.shape, -6.0) * batch.completion_mask
        if values is None
        else values.clone()
    )
    values[2, 9] = value
    return replace(batch, **{name: values})


@pytest.mark.parametrize(
    ("layout", "name", "value"),
    [
        ("one rank", "advantages", torch.nan),
        ("DP 2", "advantages", torch.inf),
        SLOW("one rank", "rollout_logprobs", torch.nan),
        SLOW("one rank", "old_logprobs", -torch.inf),
        SLOW("TP 2", "ref_logprobs", torch.nan),
        SLOW("PP 2", "ref_logprobs", torch.inf),
        SLOW("CP 2", "old_logprobs", torch.nan),
        SLOW("TP 2 x PP 2", "advantages", torch.nan),
        SLOW("PP 2 x DP 2", "rollout_logprobs", torch.inf),
        SLOW("TP 2 x CP 2", "advantages", torch.nan),
    ],
    ids=str,
)
def test_a_poisoned_batch_is_skipped_and_changes_nothing(
    lab, policy_models, tmp_path, layout, name, value
):
    grpo = {"beta": 0.1} if name == "ref_logprobs" else {}
    config = config_of(policy_models["qwen3-tied"], tmp_path, grpo=grpo, **LAYOUTS[layout])
    batches = [random_batch(seed) for seed in (1, 2, 3)]
    if grpo:
        batches = [poisoned(batch, "ref_logprobs", -5.0) for batch in batches]
    policy = lab.policy(config)
    policy.update(batches[0])
    before = states(policy)
    output = policy.update(poisoned(batches[1], name, value))
    assert output.policy_version == policy.policy_version == 2
    assert output.metrics == {"num_loss_tokens": 0.0, "fault/nonfinite_steps": 1.0}
    assert_same(before, states(policy))
    good = policy.update(batches[2])
    assert "fault/nonfinite_steps" not in good.metrics
    after = states(policy)
    undisturbed = lab.policy(config)
    undisturbed.update(batches[0])
    expected = undisturbed.update(batches[2])
    assert expected.metrics == good.metrics
    assert_same(states(undisturbed), after)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        # The norm of the gradient counts this parameter on the first rank only.
        SLOW("TP 2", "input_layernorm.weight"),
        SLOW("DP 2", "linear_proj.weight"),
        SLOW("PP 2", "linear_fc2.weight"),
        SLOW("CP 2", "linear_fc1.weight"),
        SLOW("TP 2 x DP 2", "q_layernorm.weight"),
    ],
)
@pytest.mark.parametrize("distributed", [True, False])
def test_a_gradient_that_is_damaged_on_one_rank_is_applied_on_none(
    lab, policy_models, tmp_path, layout, name, distributed
):
    config = config_of(
        policy_models["qwen3-tied"],
        tmp_path,
        use_distributed_optimizer=distributed,
        nonfinite_dumps=0,
        **LAYOUTS[layout],
    )
    policy = lab.policy(config)
    policy.update(random_batch(1))
    before = states(policy)
    policy.call("damage", "gradient", name, config.policy.world_size - 1)
    output = policy.update(random_batch(2))
    assert output.metrics["fault/nonfinite_steps"] == 1
    assert_same(before, states(policy))
    policy.call("heal_gradients")
    assert policy.update(random_batch(2)).metrics["grad_norm"] > 0


@pytest.mark.slow
def test_one_of_several_optimizer_steps_is_skipped_and_the_others_are_taken(
    lab, policy_models, tmp_path
):
    config = config_of(policy_models["qwen3-tied"], tmp_path, global_batch_size=4)
    policy = lab.policy(config)
    batch = random_batch()
    batch.old_logprobs = policy.compute_logprobs(batch)[0]
    output = policy.update(poisoned(batch, "advantages"))
    assert output.metrics["fault/nonfinite_steps"] == 1
    assert output.metrics["grad_norm"] > 0
    assert all(value == value for value in output.metrics.values())  # NaN is not itself
    assert states(policy)[0][1][0] == 1  # the scheduler's steps


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_on_two_ranks_decide_alike(lab, mixtures, tmp_path, dtype):
    config = config_of(mixtures[True], tmp_path, dtype=dtype, **EXPERTS)
    policy = lab.policy(config)
    policy.update(random_batch(1))
    before = states(policy)
    assert policy.update(poisoned(random_batch(2), "advantages")).metrics["fault/nonfinite_steps"]
    assert_same(before, states(policy))
    name = "linear_fc2.weight" if dtype == "float32" else "router.weight"
    policy.call("damage", "gradient", name, 1)
    assert policy.update(random_batch(3)).metrics["fault/nonfinite_steps"] == 1
    assert_same(before, states(policy))


def test_too_many_in_a_row_end_the_run_and_one_good_step_starts_over(lab, policy_models, tmp_path):
    config = config_of(policy_models["qwen3-tied"], tmp_path, max_nonfinite_steps=2)
    policy = lab.policy(config)
    bad = poisoned(random_batch(), "advantages")
    policy.update(bad)
    policy.update(random_batch())
    policy.update(bad)
    message = r"(?s)2 optimizer steps in a row were not finite \(policy.max_nonfinite_steps\).*"
    message += (
        r"Not finite: loss, gradient, 1 value of advantages.*rlsys replay .*/run/dumps/step-4"
    )
    with pytest.raises(ActorFailure, match=message):
        policy.update(bad)
    assert sorted(p.name for p in (tmp_path / "run/dumps").iterdir()) == [
        "step-1",
        "step-3",
        "step-4",
    ]


@pytest.mark.slow
def test_no_checkpoint_and_no_model_of_weights_that_are_not_finite(lab, policy_models, tmp_path):
    policy = lab.policy(config_of(policy_models["qwen3-tied"], tmp_path, **LAYOUTS["TP 2"]))
    policy.update(random_batch())
    policy.call("damage", "weight", "linear_fc2.weight", 1)
    (tmp_path / "checkpoint").mkdir()
    message = "checkpoint of version 1 is not written.*linear_fc2.weight"
    with pytest.raises(ActorFailure, match=message):
        policy.save_checkpoint(tmp_path / "checkpoint")
    assert list((tmp_path / "checkpoint").iterdir()) == []
    with pytest.raises(ActorFailure, match="model of version 1 is not written"):
        policy.save_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_megatrons_own_loss_scaling_agrees(lab, policy_models, tmp_path, distributed):
    """A scale that is a power of 2 changes no bit, and megatron-core finds the overflow as well."""
    after = []
    for options in ({}, {"loss_scale": 128.0}):
        config = config_of(
            policy_models["qwen3-tied"],
            tmp_path,
            dtype="bfloat16",
            use_distributed_optimizer=distributed,
            megatron_kwargs=options,
            nonfinite_dumps=0,
        )
        policy = lab.policy(config)
        policy.update(random_batch(1))
        bad = policy.update(poisoned(random_batch(2), "advantages"))
        assert bad.metrics["fault/nonfinite_steps"] == 1
        policy.update(random_batch(3))
        after.append(states(policy))
    assert_same(*after)


@pytest.mark.slow
def test_a_dump_that_cannot_be_written_stops_no_rank(lab, policy_models, tmp_path):
    config = config_of(policy_models["qwen3-tied"], tmp_path, **LAYOUTS["DP 2"])
    (tmp_path / "run").write_text("a file where the folder should be")
    policy = lab.policy(config)
    bad = poisoned(random_batch(), "advantages")
    for _ in range(2):
        assert policy.update(bad).metrics["fault/nonfinite_steps"] == 1
    with pytest.raises(ActorFailure, match=r"Not dumped: .*Not a directory"):
        policy.update(bad)


@pytest.mark.slow
def test_a_run_keeps_its_first_dumps(lab, policy_models, tmp_path):
    config = config_of(
        policy_models["qwen3-tied"], tmp_path, nonfinite_dumps=1, max_nonfinite_steps=2
    )
    policy = lab.policy(config)
    bad = poisoned(random_batch(), "advantages")
    policy.update(bad)
    with pytest.raises(ActorFailure, match=r"Not dumped: policy\.nonfinite_dumps allows 1"):
        policy.update(bad)
    assert [folder.name for folder in (tmp_path / "run/dumps").iterdir()] == ["step-1"]
