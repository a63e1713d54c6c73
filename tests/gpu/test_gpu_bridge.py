"""Families that rlsys's weight table lacks, through mcore-bridge.

The policy is transformers' model, and a synced engine samples from it.
"""

from importlib.util import find_spec

import pytest
import ray
import torch
from gpu_cases import DEVICE, engine_config, gpu_config, long_batch, transformers_logprobs
from gpu_lab import OpenActor
from greedy_rollouts import greedy
from policy_cases import LAYOUTS, exported
from safetensors.torch import load_file
from tiny_models import SIZES, save_model
from transformers import AutoModelForCausalLM, Glm4Config, OlmoeConfig

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.model.families import FAMILIES

# It patches transformers when it is imported, which only processes of the policy may do.
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" or find_spec("mcore_bridge") is None,
    reason="needs mcore-bridge and Transformer Engine",
)
BATCH = long_batch(12, 400)
SHAPE = SIZES | {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4}
SHAPE |= {"max_position_embeddings": 4096, "initializer_range": 0.05}
MODELS = {
    "glm4": (Glm4Config, {"attention_bias": True}),
    "olmoe": (OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 2}),
}
EP_2 = {"expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(name, seed) -> model folder."""
    root = tmp_path_factory.mktemp("bridged")
    for name, (config_class, options) in MODELS.items():
        for seed in (0, 1):
            _save(root / f"{name}-{seed}", config_class(**SHAPE | options), seed)
    return {(name, seed): root / f"{name}-{seed}" for name in MODELS for seed in (0, 1)}


@torch.no_grad()
def _save(folder, config, seed):
    torch.manual_seed(seed)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter += 0.2 * torch.randn_like(parameter)
    save_model(model, folder)


def make_policy(lab, folder, layout="one rank", dtype="float32"):
    options = LAYOUTS[layout] | (EP_2 if layout == "TP 2" and "olmoe" in str(folder) else {})
    return lab.policy(
        gpu_config(folder, num_completions=len(BATCH.lengths), dtype=dtype, **options)
    )


def test_the_table_lacks_these_families():
    assert not MODELS.keys() & FAMILIES.keys()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", ["one rank", "TP 2"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_logprobs_are_those_of_transformers(lab, folders, name, layout):
    folder = folders[name, 0]
    policy = make_policy(lab, folder, layout)
    read, tensors = load_file(folder / "model.safetensors"), exported(policy)
    assert tensors.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in tensors.items())
    torch.testing.assert_close(
        policy.compute_logprobs(BATCH)[0],
        transformers_logprobs(folder, BATCH, dtype=torch.float32),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", MODELS)
def test_an_updated_policy_is_what_its_engine_samples_from(lab, folders, name, gpus, monkeypatch):
    monkeypatch.setattr(rollout, "RolloutActor", OpenActor)
    config = engine_config(folders[name, 1])
    engine = RolloutActors(config, device=DEVICE, place=gpus.on(1))
    engine.start()
    before = greedy(engine)
    policy = make_policy(lab, folders[name, 1], dtype="bfloat16")
    publisher = WeightPublisher(policy, engine, config.weight_sync)
    publisher.publish()  # through vLLM's own loader
    assert greedy(engine)[0] == before[0]
    for _ in range(3):
        policy.update(BATCH, loss="sft")
    publisher.publish()
    synced = greedy(engine)
    assert synced[0] != before[0]
    (actor,) = engine.actors.values()
    held = ray.get(actor.parameter_checksums.remote())
    engine.close()

    policy.save_model(folders[name, 1].with_name(f"{name}-updated"))
    fresh = RolloutActors(
        engine_config(folders[name, 1].with_name(f"{name}-updated")),
        device=DEVICE,
        place=gpus.on(1),
    )
    fresh.start()
    (actor,) = fresh.actors.values()
    # Not its completions: vLLM's kernels for experts add in another order each time.
    assert ray.get(actor.parameter_checksums.remote()) == held
    fresh.close()
