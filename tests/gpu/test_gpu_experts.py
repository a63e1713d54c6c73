"""Mixtures of experts on GPUs: grouped kernels, experts shared over two GPUs, weights into vLLM."""

import pytest
import ray
import torch
from gpu_cases import DEVICE, engine_config, gpu_config, long_batch, transformers_logprobs
from gpu_lab import OpenActor, load_weights, train, use_config
from greedy_rollouts import greedy
from policy_cases import exported
from safetensors.torch import load_file
from tiny_models import save_tiny_qwen3_moe

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import get_all
from rlsys.actors.weight_publisher import WeightPublisher

BATCH = long_batch(12, 400)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EP_2 = {"world_size": 2, "expert_model_parallel_size": 2}
LAYOUTS = {"one rank": {}, "EP 2": EP_2, "TP 2 x EP 2": EP_2 | {"tensor_parallel_size": 2}}
RELATIVE = {"float32": 1e-4, "bfloat16": 2**-4}
"""Relative bound for loss and gradient norm: rounding to bfloat16 sends tokens to other experts."""
NUM_UPDATES = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders of two seeds."""
    root = tmp_path_factory.mktemp("gpu-experts")
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4, "num_experts": 16}
    sizes |= {"num_experts_per_tok": 4, "moe_intermediate_size": 128}
    sizes |= {"max_position_embeddings": 4096, "initializer_range": 0.05}
    for seed in (0, 1):
        save_tiny_qwen3_moe(root / str(seed), seed=seed, **sizes)
    return [root / str(seed) for seed in (0, 1)]


def of_transformers(folder, dtype):
    return transformers_logprobs(folder, BATCH, dtype=dtype, experts_implementation="eager")


def mean_difference(a, b):
    return ((a - b).abs().sum() / BATCH.completion_mask.sum()).item()


def config_of(folder, dtype, layout="one rank", **policy):
    options = {"max_tokens_per_micro_batch": 1024} | LAYOUTS[layout] | policy
    return gpu_config(folder, num_completions=len(BATCH.lengths), dtype=dtype, **options)


@pytest.fixture(scope="module")
def trained(lab, folders):
    """(layout, type) -> log-probs at the start, (loss, gradient norm) of every update."""
    known = {}

    def remember(layout, dtype):
        if (layout, dtype) not in known:
            start = None if layout == "one rank" else remember("one rank", dtype)[0]
            policy = lab.policy(config_of(folders[0], dtype, layout))
            known[layout, dtype] = train(policy, BATCH, NUM_UPDATES, start=start)
        return known[layout, dtype]

    return remember


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_is_bit_equal_and_packing_changes_no_logprob(lab, folders, dtype):
    policy = lab.policy(config_of(folders[0], dtype))
    read = load_file(folders[0] / "model.safetensors")
    tensors = exported(policy)
    assert tensors.keys() == read.keys()
    assert all(torch.equal(tensor, read[n].to(DTYPES[dtype])) for n, tensor in tensors.items())
    packed = policy.compute_logprobs(BATCH)[0]
    alone = config_of(folders[0], dtype, max_tokens_per_micro_batch=None, micro_batch_size=1)
    policy.call("run", use_config, alone)
    bound = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    assert mean_difference(packed, policy.compute_logprobs(BATCH)[0]) < bound


@pytest.mark.gpu(1)
def test_logprobs_are_as_exact_as_those_of_transformers(trained, folders):
    exact = of_transformers(folders[0], torch.float32)
    torch.testing.assert_close(trained("one rank", "float32")[0], exact, rtol=0, atol=1e-3)
    rounding = mean_difference(of_transformers(folders[0], torch.bfloat16), exact)
    assert rounding > 1e-5  # or there is nothing to compare with
    assert mean_difference(trained("one rank", "bfloat16")[0], exact) < 1.5 * rounding


@pytest.mark.gpu(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["EP 2", "TP 2 x EP 2"])
def test_experts_on_two_gpus_train_as_those_on_one(trained, layout, dtype):
    logprobs, updates = trained(layout, dtype)
    expected_logprobs, expected_updates = trained("one rank", dtype)
    assert mean_difference(logprobs, expected_logprobs) < {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    assert all(norm > 1e-3 for _, norm in updates)
    assert len({loss for loss, _ in updates}) == NUM_UPDATES
    for update, expected in zip(updates, expected_updates, strict=True):
        assert update == pytest.approx(expected, rel=RELATIVE[dtype])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", ["one rank", "EP 2"])
def test_an_updated_engine_equals_one_that_was_started_with_these_weights(
    lab, folders, engine, layout
):
    config = config_of(folders[0], "auto", layout)
    policy = lab.policy(config)
    section = config.weight_sync.model_copy(update={"bucket_mb": 1, "timeout_s": 60.0})
    publisher = WeightPublisher(policy, engine["actors"], section)
    publisher.publish()  # through vLLM's own loader, and proves the plan
    if DEVICE == "cuda":
        (actor,) = engine["actors"].actors.values()
        assert ray.get(actor.ask_workers.remote("loads_in_place"), timeout=60) == [True]
    with_seed_0 = greedy(engine["actors"])
    assert with_seed_0[0] != engine["fresh"][0]
    for version, seed in enumerate((1, 0), 1):
        policy.call("run", load_weights, folders[seed])
        policy.policy_version = version
        publisher.publish()
        tokens, logprobs, versions = greedy(engine["actors"])
        expected = engine["fresh"] if seed else with_seed_0
        assert tokens == expected[0]
        assert logprobs == pytest.approx(expected[1], abs=1e-4)
        assert versions == {(version,)}


@pytest.fixture(scope="module", autouse=True)
def starting(gpus, folders):
    """A rollout engine with the weights of seed 1, started while the first tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", OpenActor)
        actors = RolloutActors(engine_config(folders[1]), device=DEVICE, place=gpus.on(1))
    yield actors, actors.async_start()
    actors.close()


@pytest.fixture(scope="module")
def engine(starting):
    """The engine, and what it gave before any weight sync."""
    actors, started = starting
    get_all(started, phase="start", timeout_s=300)
    return {"actors": actors, "fresh": greedy(actors)}
