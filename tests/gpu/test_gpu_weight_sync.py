"""Weights over NCCL, from a real policy to real engines: never others than the policy's."""

import time
from dataclasses import replace

import pytest
import ray
import torch
from gpu_cases import DEVICE, gpu_config, long_batch, transformers_logprobs
from gpu_lab import (
    exported_checksums,
    keep_gpu_busy,
    load_weights,
    negate_weights,
    stall_in_bucket,
)
from greedy_rollouts import PROMPTS, greedy
from policy_cases import LAYOUTS

from rlsys.actors.waiting import ActorFailure, PhaseTimeout
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.algo.batching import build_train_batch
from rlsys.types import SampleRequest

pytestmark = pytest.mark.gpu(2)

NUM_SYNCS, NUM_LOADS, NUM_UPDATES = (200, 10, 30) if DEVICE == "cuda" else (6, 1, 2)
BATCH = long_batch(16, 400)


@pytest.fixture(scope="module")
def connect(lab, gpu_models):
    """A policy of seed 0, connected to an engine: (policy, publisher, load)."""

    def connect(engine, layout="one rank", policy_options=None, **settings):
        config = gpu_config(gpu_models[engine.kind, 0], **LAYOUTS[layout], **(policy_options or {}))
        policy = lab.policy(config)
        section = config.weight_sync.model_copy(
            update={"bucket_mb": 1, "timeout_s": 60.0, **settings}
        )
        publisher = WeightPublisher(policy, engine.actors, section)

        def load(seed):
            policy.call("run", load_weights, gpu_models[engine.kind, seed])
            policy.policy_version += 1
            publisher.publish()

        return policy, publisher, load

    return connect


def assert_samples_as(engine, expected, *, version=None):
    tokens, logprobs, versions = greedy(engine.actors)
    assert tokens == expected[0]
    assert logprobs == pytest.approx(expected[1], abs=1e-4)
    assert version is None or versions == {(version,)}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tied", "one rank"),
        ("tied", "TP 2"),
        ("untied", "one rank"),
        ("untied", "PP 2"),
        ("shared GPU", "one rank"),
        pytest.param("two GPUs", "one rank", marks=pytest.mark.gpu(4)),
        pytest.param("two GPUs", "TP 2", marks=pytest.mark.gpu(4)),
    ],
)
def test_an_updated_engine_equals_one_that_was_started_with_these_weights(
    engines, connect, name, layout
):
    engine = engines(name)
    _, publisher, load = connect(engine, layout)
    publisher.publish()  # through vLLM's own loader, and proves the plan
    if DEVICE == "cuda":
        assert set(engine.ask_workers("loads_in_place")) == {True}
    with_seed_0 = greedy(engine.actors)
    assert with_seed_0[0] != engine.fresh[0]
    load(seed=1)  # in place from now on
    assert_samples_as(engine, engine.fresh, version=1)
    load(seed=0)
    assert_samples_as(engine, with_seed_0, version=2)


@pytest.mark.parametrize("layout", ["TP 2", "DP 2"])
def test_each_worker_of_an_engine_gets_its_shard_from_another_policy_rank(engines, connect, layout):
    engine = engines("crossed")
    # At first rank 0 sends to all, of which one is on its own GPU.
    policy, publisher, load = connect(engine, layout, transport="gloo")
    publisher._transport = "auto"
    publisher.publish()
    senders = [[sends for sends, _, _ in links] for links in policy.call("sent_to_engines")]
    assert senders == [[True, False], [False, True]]
    with_seed_0 = greedy(engine.actors)
    assert with_seed_0[0] != engine.fresh[0]
    for version in range(1, 2 * NUM_LOADS, 2):
        load(seed=1)
        assert_samples_as(engine, engine.fresh, version=version)
        load(seed=0)
        assert_samples_as(engine, with_seed_0, version=version + 1)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_vllms_own_loader_gives_the_same_weights(engines, connect, name):
    engine = engines(name)
    _, publisher, load = connect(engine, in_place=False)
    publisher.publish()
    for _ in range(NUM_LOADS):
        load(seed=0)
        load(seed=1)
    assert engine.ask_workers("loads_in_place") == [False]
    assert_samples_as(engine, engine.fresh)


def held_by(engine):
    """Name -> checksum of every tensor, as the engine has it."""
    return ray.get(engine.actor.held_checksums.remote(), timeout=60)


@pytest.mark.parametrize(
    ("name", "layout"), [("tied", "one rank"), ("untied", "one rank"), ("untied", "TP 2")]
)
def test_no_sync_sends_weights_of_before_or_half_of_them(engines, connect, name, layout):
    """200 syncs, each right after a change that the GPU has not got to yet, while others streams
    are busy and the engine is sampling; then every parameter is looked at."""
    engine = engines(name)
    policy, publisher, _ = connect(engine, layout)
    publisher.publish()
    expected = []
    for _ in range(2):
        expected.append(policy.call("run", exported_checksums)[0])
        policy.call("run", negate_weights)
    assert expected[0] != expected[1]
    next_id = 1000
    for sync in range(1, NUM_SYNCS + 1):
        if engine.actors.num_pending < 8:
            requests = [
                SampleRequest(next_id + i, prompt, 4, 1.0, i) for i, prompt in enumerate(PROMPTS)
            ]
            engine.actors.submit(requests)
            next_id += len(requests)
        policy.call("run", negate_weights)
        policy.policy_version += 1
        publisher.publish()
        assert held_by(engine) == expected[sync % 2], f"sync {sync}"
        engine.actors.collect()
    engine.actors.abort(range(1000, next_id))


@pytest.mark.parametrize("layout", ["DP 2", "TP 2"])
def test_what_is_sent_right_after_an_update_is_what_the_update_settles_on(
    lab, engines, connect, gpu_models, layout
):
    """Of two replicas each has new weights in its own part only, and gathers the other's on a
    stream of its own, in buckets: a copy that does not wait for that sends weights of the step
    before. `weight_sync.verify` would not see it, as both sides hash what was copied."""
    engine = engines("untied")
    overlapping = {
        "global_batch_size": 8,
        "overlap_grad_reduce": True,
        "megatron_kwargs": {"bucket_size": 200_000},
    }
    options = overlapping | {"overlap_param_gather": True} if layout == "DP 2" else {}
    policy, publisher, _ = connect(engine, layout, options)
    publisher.publish()
    batch = replace(BATCH, old_logprobs=policy.compute_logprobs(BATCH)[0])
    before = held_by(engine)
    for update in range(NUM_UPDATES):
        policy.call("run", keep_gpu_busy)
        policy.update(batch)
        publisher.publish()
        held = held_by(engine)
        for settled in policy.call("run", exported_checksums):  # of one rank, and of the other
            assert held == settled, f"update {update}"
        assert held != before
        before = held


@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
def test_completions_in_flight_keep_the_versions_of_their_tokens(
    engines, connect, gpu_models, in_flight_kv
):
    engine = engines("untied")
    _, publisher, load = connect(engine)
    publisher.publish()
    ray.get(engine.actor.set_in_flight_kv.remote(in_flight_kv), timeout=60)
    requests = [SampleRequest(i, prompt, 4, 1.0, i) for i, prompt in enumerate(PROMPTS)]
    engine.actors.submit(requests)
    deadline = time.monotonic() + 60
    while ray.get(engine.actor.least_tokens.remote(), timeout=60) < 16:
        assert time.monotonic() < deadline
    load(seed=1)
    later = SampleRequest(len(PROMPTS), PROMPTS[0], 4, 1.0, 0)
    engine.actors.submit([later])
    groups = {}
    while engine.actors.num_pending:
        assert ray.wait(engine.actors.pending_refs(), timeout=60)[0]
        groups |= {group.ticket: group for group in engine.actors.collect()}
    ray.get(engine.actor.set_in_flight_kv.remote("recompute"), timeout=60)

    batch = build_train_batch([groups[i] for i in sorted(groups)])
    errors = [
        (batch.rollout_logprobs - transformers_logprobs(folder, batch, dtype=torch.bfloat16)).abs()
        for folder in (gpu_models[engine.kind, seed] for seed in (0, 1))
    ]
    completions = [c for i in sorted(groups) for c in groups[i].completions]
    of_old, of_new = [], []
    for row, completion in enumerate(completions):
        prompt_length = int(batch.lengths[row]) - len(completion.token_ids)
        if completion.policy_versions == (0, 1):
            change = prompt_length + completion.version_starts[1]
            of_old.append(torch.stack([e[row, prompt_length:change] for e in errors]))
            if in_flight_kv == "recompute":
                of_new.append(torch.stack([e[row, change : batch.lengths[row]] for e in errors]))
        else:
            version = 1 if row // 4 == len(PROMPTS) else 0
            assert completion.policy_versions == (version,)
            own = torch.stack([e[row, prompt_length : batch.lengths[row]] for e in errors])
            (of_new if version else of_old).append(own)
    assert len(of_old) > len(completions) // 2
    for parts, version in ((of_old, 0), (of_new, 1)):
        by_weights = torch.cat(parts, dim=1).mean(dim=1)  # seed 0, seed 1
        assert by_weights[version] < 0.02, by_weights
        assert by_weights[1 - version] > 0.1, by_weights


def test_an_engine_that_does_not_come_is_named_and_costs_nobody_its_process(lost_engine, connect):
    engine = lost_engine()
    _, publisher, _ = connect(engine, timeout_s=8.0)
    publisher.publish()
    engine.actor.do_nothing.remote(13.0)
    message = r"(?s)without rank 1.*policy rank 0 failed in weight sync|pausing.* rollout engine 0"
    with pytest.raises((ActorFailure, PhaseTimeout), match=message):
        publisher.publish()
    _, publisher, load = connect(engine)
    publisher.publish()
    load(seed=1)
    assert_samples_as(engine, engine.fresh)


def test_a_policy_that_gets_stuck_in_the_middle_of_a_sync_is_a_failure_with_a_deadline(
    lost_engine, connect
):
    """On a GPU torch ends the engine's process later, as nothing else ends its wait."""
    policy, publisher, _ = connect(lost_engine(), timeout_s=8.0)
    publisher.publish()
    policy.call("run", stall_in_bucket, 1, 20.0)
    with pytest.raises((ActorFailure, PhaseTimeout), match="weight sync, transfer"):
        publisher.publish()
