"""Which GPUs the actors of a run get, by Ray's bookkeeping alone: no GPU is needed for that."""

import pytest
import ray

from rlsys.actors import placement, reservation
from rlsys.actors.placement import Placement
from rlsys.actors.start_report import where

pytestmark = pytest.mark.system


class Seeing:
    def gpus(self):
        return [str(gpu) for gpu in ray.get_gpu_ids()]


@pytest.fixture
def place(ray_cluster, rollout_config, monkeypatch):
    """Place a run on the cluster's three GPUs: (role, rank) -> the GPUs that its actor sees."""
    actors, groups = [], []
    monkeypatch.setattr(reservation, "FIRST_LOOK_S", 0.5)

    def run(
        wanted,
        *,
        policy=(),
        reference=(),
        reward=(),
        beta=0.1,
        timeout=60.0,
        device="cuda",
        shares="dedicated",
        **rollout,
    ):
        config = rollout_config(**rollout)
        config = config.model_copy(
            update={
                "placement": shares,
                "placement_timeout": timeout,
                "policy": config.policy.model_copy(update=dict(policy)),
                "reward": config.reward.model_copy(update=dict(reward)),
                "reference": config.reference.model_copy(update=dict(reference)),
                "grpo": config.grpo.model_copy(update={"beta": beta}),
            }
        )
        plan = Placement(config, device=device)
        groups.append(plan._group)
        for who in wanted:
            actors.append(ray.remote(Seeing).options(**plan.options(*who)).remote())
        seen = ray.get([actor.gpus.remote() for actor in actors[-len(wanted) :]], timeout=60)
        return dict(zip(wanted, seen, strict=True))

    run.groups = groups
    yield run
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        ray.util.remove_placement_group(group)


def test_the_reference_shares_the_gpu_of_the_policy_rank(place):
    seen = place(
        [("policy", 0), ("policy", 1), ("reference", 0), ("reference", 1), ("rollout", 0)],
        policy={"world_size": 2},
        reference={"world_size": 2},
    )
    assert seen["reference", 0] == seen["policy", 0]
    assert seen["reference", 1] == seen["policy", 1]
    apart = seen["policy", 0] + seen["policy", 1] + seen["rollout", 0]
    assert len(set(apart)) == 3


def test_reward_models_share_the_policys_gpus_beside_the_reference(place):
    models = [("reward_model", rank) for rank in range(3)]
    seen = place(
        [("policy", 0), ("policy", 1), ("reference", 0), ("rollout", 0), *models],
        policy={"world_size": 2},
        reward={"reward_model": ["A", "B", "C"]},
    )
    assert [seen[model] for model in models] == [seen["policy", rank] for rank in (0, 1, 0)]


def test_a_reward_model_on_a_gpu_of_its_own(place):
    own = {"reward_model": ["A"], "reward_model_placement": "own"}
    seen = place([("policy", 0), ("rollout", 0), ("reward_model", 0)], reward=own)
    assert len({gpu for gpus in seen.values() for gpu in gpus}) == 3


def test_an_engine_sees_all_its_gpus_and_nobody_elses(place):
    seen = place([("policy", 0), ("rollout", 0)], tensor_parallel_size=2)
    assert len(seen["rollout", 0]) == 2
    assert not set(seen["rollout", 0]) & set(seen["policy", 0])


def test_two_engines_share_a_gpu(place):
    seen = place(
        [("policy", 0), *(("rollout", rank) for rank in range(4))], num_engines=4, engines_per_gpu=2
    )
    engines = [seen["rollout", rank] for rank in range(4)]
    assert engines[0] == engines[1] != engines[2] == engines[3]
    assert len({*engines[0], *engines[2], *seen["policy", 0]}) == 3


def test_colocated_engines_are_on_the_gpus_of_the_policys_ranks(place):
    ranks = [(role, rank) for role in ("policy", "rollout") for rank in range(2)]
    seen = place(
        [*ranks, ("reference", 0)],
        policy={"world_size": 2},
        num_engines=2,
        shares="colocated",
    )
    assert seen["rollout", 0] == seen["policy", 0] == seen["reference", 0]
    assert seen["rollout", 1] == seen["policy", 1] != seen["policy", 0]


def test_a_reference_of_its_own(place):
    seen = place([("policy", 0), ("reference", 0), ("rollout", 0)], reference={"placement": "own"})
    assert len({gpu for gpus in seen.values() for gpu in gpus}) == 3


def test_more_gpus_than_there_are_names_both_numbers_and_who_asks(place):
    message = r"needs 4 GPUs \(policy 2, rollout 2\), and the Ray cluster has 3"
    with pytest.raises(ValueError, match=message):
        place([], policy={"world_size": 2}, num_engines=2)


def test_gpus_in_use_by_others_are_not_waited_for_without_end(place, capsys):
    place([("policy", 0), ("rollout", 0)])
    message = (
        r"could not place .*needs 2 GPUs.*Free GPUs: \S+ 1 of 3; .*placement_timeout wait longer"
    )
    with pytest.raises(ValueError, match=message):
        place([("policy", 0), ("rollout", 0)], timeout=2.0)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("waiting for GPUs, up to 2 s (placement_timeout): the run needs 2 GPUs")


def test_cpus_in_use_by_others_are_not_waited_for_without_end(place, capsys, monkeypatch):
    """A run on CPU would else wait for its actors, and blame their constructors in the end."""
    place([("policy", 0), ("rollout", 0)], device="cpu")
    monkeypatch.setattr(placement, "CPU_SHARE", 50.0)
    with pytest.raises(ValueError, match=r"could not place .*needs 100 CPUs\. Free.*wait longer"):
        place([], device="cpu", timeout=2.0, beta=0.0)
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("waiting for CPUs, up to 2 s (placement_timeout): the run needs 100 CPU")


@pytest.mark.parametrize("timeout", ["wait", None])
def test_a_run_may_wait_until_another_has_ended(place, capsys, monkeypatch, timeout):
    free = reservation._free

    def other_run_ends():
        """When the waiting one has looked once."""
        text = free()
        ray.util.remove_placement_group(place.groups[0])
        return text

    place([])
    monkeypatch.setattr(reservation, "_free", other_run_ends)
    place([("policy", 0), ("rollout", 0)], timeout=timeout)
    assert "for as long as it takes" in capsys.readouterr().out


def test_an_actor_without_a_place_is_distinguished_from_a_slow_one(ray_cluster):
    slow, homeless = (ray.remote(Seeing).options(num_cpus=n).remote() for n in (0, 99))
    ray.get(slow.gpus.remote())
    assert where(slow) == []  # the cluster has one host
    assert where(homeless)[0].startswith("Ray has not placed it: ")
