"""A policy that goes on from a snapshot of its ranks goes on as if nothing had happened."""

import numpy as np
import pytest
import ray
import torch
from lora_cases import with_lora
from patience import PATIENCE_S
from policy_cases import LAYOUTS, exported, policy_config
from resume_cases import SCHEDULE, update

from rlsys.actors.waiting import get_all
from rlsys.engines.rank_state import RankState, checksums_of

pytestmark = pytest.mark.system


def config_of(folder, **policy):
    """Two optimizer steps an update, in an order that is drawn from the version."""
    return policy_config(folder, max_steps=6, global_batch_size=4, **SCHEDULE, **policy)


def everything(policy):
    """Weights by name and, for each rank, the optimizer's whole state."""
    return exported(policy), policy.call("optimizer_state")


def take(policy):
    """Each rank's state, by its name."""
    version = policy.policy_version
    return {name: actor.take_snapshot.remote(version)[0] for name, actor in policy.actors.items()}


def assert_goes_on(lab, config, read=everything):
    """A new policy that takes a snapshot of another one, and the same steps."""
    policy = lab.policy(config)
    update(policy, [1, 2])
    snapshots = take(policy)
    metrics, state = update(policy, [3, 4]), read(policy)
    again = lab.policy(config)
    restoring = {
        name: actor.restore_snapshot.remote(snapshots[name]) for name, actor in again.actors.items()
    }
    get_all(restoring, phase="restoring", timeout_s=PATIENCE_S)
    assert again.call("finished_version") == [2] * len(again.actors)
    again.policy_version = 2
    assert update(again, [3, 4]) == metrics
    assert_equal(read(again), state)


def assert_equal(found, expected):
    """Nested containers of tensors, to the bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        assert_equal(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


BFLOAT16 = {"dtype": "bfloat16"}
"""As on GPUs, with the optimizer's own copy in float32."""
NOT_DISTRIBUTED = {"use_distributed_optimizer": False}


@pytest.mark.parametrize(
    "options",
    [
        LAYOUTS["one rank"],
        LAYOUTS["one rank"] | NOT_DISTRIBUTED,
        LAYOUTS["one rank"] | BFLOAT16 | NOT_DISTRIBUTED,
        LAYOUTS["DP 2"],
        LAYOUTS["DP 2"] | BFLOAT16,
        LAYOUTS["TP 2"] | BFLOAT16,
        LAYOUTS["PP 2"],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                LAYOUTS["DP 2"] | NOT_DISTRIBUTED | BFLOAT16,
                LAYOUTS["CP 2"],
                LAYOUTS["TP 2 x PP 2"] | BFLOAT16,
                LAYOUTS["PP 2 x DP 2"] | BFLOAT16,
                LAYOUTS["DP 2"] | {"overlap_param_gather": True, "overlap_grad_reduce": True},
                LAYOUTS["DP 2"] | {"freeze_parameters_ratio": 0.5},
            )
        ),
    ],
    ids=str,
)
def test_a_restored_policy_goes_on_as_the_other_one(lab, policy_models, options):
    assert_goes_on(lab, config_of(policy_models["qwen3-tied"], **options))


@pytest.mark.parametrize(
    "layout",
    [
        "one rank",
        pytest.param("TP 2", marks=pytest.mark.slow),
        pytest.param("DP 2", marks=pytest.mark.slow),
        pytest.param("PP 2", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_goes_on_and_its_base_stays_where_it_was(lab, policy_models, layout):
    config = with_lora(
        config_of(policy_models["qwen3-untied"], **LAYOUTS[layout]),
        {"rank": 4, "alpha": 8, "dropout": 0.2, "modules_to_save": ["lm_head"]},
    )

    def read(policy):
        return policy.call("adapters"), policy.call("optimizer_state")

    assert_goes_on(lab, config, read)
    policy = lab.policy(config)
    update(policy, [1])
    size = ray.get(next(iter(take(policy).values()))).num_bytes
    whole = sum(tensor.nbytes for tensor in policy.call("merged")[0].values())
    assert size < 2 * whole, "the base is on disk, and lm_head has moments beside its weights"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"world_size": 2, "expert_model_parallel_size": 2},
        pytest.param(
            {"world_size": 2, "expert_model_parallel_size": 2, "tensor_parallel_size": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_experts_go_on(lab, mixtures, options):
    assert_goes_on(lab, config_of(mixtures[True], moe_aux_loss_coeff=0.01, **options))


def test_a_snapshot_from_before_the_first_step_is_whole(lab, policy_models):
    """The optimizer has no state yet; a policy that goes back to it loses what it has."""
    policy = lab.policy(config_of(policy_models["qwen3-tied"]))
    (snapshot,) = take(policy).values()
    metrics, state = update(policy, [1, 2]), everything(policy)
    policy.call("restore_snapshot", snapshot)
    policy.policy_version = 0
    assert update(policy, [1, 2]) == metrics
    assert_equal(everything(policy), state)


def test_what_updates_do_later_does_not_change_a_snapshot(lab, policy_models):
    policy = lab.policy(config_of(policy_models["qwen3-tied"]))
    update(policy, [1])
    snapshot = ray.get(*take(policy).values())
    update(policy, [2])
    snapshot.check()
    later = ray.get(*take(policy).values())
    assert later.checksums != snapshot.checksums


def test_damage_is_noticed_before_anything_changes():
    memory = [np.arange(7, dtype=np.uint8), np.zeros(3, dtype=np.uint8)]
    state = RankState(3, memory, checksums_of(memory), [], 0)
    state.check()
    memory[1][2] = 1
    with pytest.raises(ValueError, match=r"snapshot of version 3 is damaged: part 1 of 2, 3 bytes"):
        state.check()
