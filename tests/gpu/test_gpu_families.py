"""Every model family on GPUs: its models of the CPU tests, with Transformer Engine and NCCL."""

import pytest
import ray
import torch
from family_models import MODELS, NOT_ON_GPUS, save_family_model
from gpu_cases import DEVICE, engine_config, gpu_config, long_batch, transformers_logprobs
from gpu_lab import ReloadingGpuActor, exported_checksums
from greedy_rollouts import PROMPTS, greedy, reload
from policy_cases import exported
from safetensors.torch import load_file

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher

BATCH = long_batch(12, 60)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FAMILIES = [name for name in MODELS if "-" not in name and name not in NOT_ON_GPUS]
GPU_SIZES = {"deepseek": {"qk_nope_head_dim": 128, "v_head_dim": 128}}
"""Family -> sizes without which vLLM has no kernels on GPUs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by name, each made when a test asks for it."""
    root = tmp_path_factory.mktemp("families")

    def folder(name):
        if not (root / name).exists():
            save_family_model(root / name, name, **GPU_SIZES.get(name.partition("_")[0], {}))
        return root / name

    return folder


def mean_difference(a, b, batch):
    return ((a - b).abs().sum() / batch.completion_mask.sum()).item()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_logprobs_are_those_of_transformers(lab, folders, name):
    folder = folders(name)
    theirs = {
        dtype: transformers_logprobs(folder, BATCH, dtype=DTYPES[dtype], attention="eager")
        for dtype in DTYPES
    }
    rounding = mean_difference(theirs["bfloat16"], theirs["float32"], BATCH)
    assert 1e-4 < rounding < 0.5  # or there is nothing to compare with
    saved = load_file(folder / "model.safetensors")
    for dtype in DTYPES:
        config = gpu_config(folder, num_completions=len(BATCH.lengths), longest=60, dtype=dtype)
        policy = lab.policy(config)
        tensors = exported(policy)
        assert tensors.keys() == saved.keys()
        for key, tensor in tensors.items():
            # Biases of sigmoid routers, and decays of linear attention, are float32 in every model.
            in_float32 = key.endswith(("correction_bias", "A_log"))
            own_type = torch.float32 if in_float32 else DTYPES[dtype]
            assert torch.equal(tensor, saved[key].to(own_type)), key
        ours = policy.compute_logprobs(BATCH)[0]
        if dtype == "float32":
            torch.testing.assert_close(ours, theirs[dtype], rtol=0, atol=1e-4)
        else:
            assert mean_difference(ours, theirs["float32"], BATCH) < 1.5 * rounding


@pytest.fixture(scope="module")
def engine(gpus, folders):
    """An engine that becomes one model after the other, without compiling any."""
    options = {"max_completion_length": 64, "engine_kwargs": {"enforce_eager": True}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", ReloadingGpuActor)
        actors = RolloutActors(
            # vLLM makes the group of experts' ranks once for a process, if the model has experts.
            engine_config(folders("qwen3_moe"), **options),
            device=DEVICE,
            place=gpus.on(1),
        )
    actors.start()

    def become(name):
        reload(actors, engine_config(folders(name), **options))
        return actors

    yield become
    actors.close()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_synced_engine_holds_the_weights_and_samples_as_transformers_does(
    lab, engine, folders, tmp_path, name
):
    actors = engine(name)
    config = engine_config(folders(name))
    policy = lab.policy(gpu_config(folders(name), num_completions=16, longest=60))
    publisher = WeightPublisher(policy, actors, config.weight_sync)
    for seed in range(2):  # through vLLM's loader, then in place
        policy.update(long_batch(16, 60, seed=seed), loss="sft")
        publisher.publish()
    (actor,) = actors.actors.values()
    if DEVICE == "cuda":
        assert ray.get(actor.ask_workers.remote("loads_in_place")) == [True]
        held = ray.get(actor.held_checksums.remote(), timeout=60)
        assert held.keys() == policy.call("run", exported_checksums)[0].keys()
    tokens, logprobs, _ = greedy(actors)

    policy.save_model(tmp_path / "updated")
    sampled = [prompt.token_ids + ids for prompt, ids in zip(PROMPTS, tokens, strict=True)]
    longest = max(map(len, sampled))
    ids = torch.zeros(len(sampled), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, token_ids) in enumerate(zip(PROMPTS, sampled, strict=True)):
        ids[row, : len(token_ids)] = torch.tensor(token_ids)
        mask[row, len(prompt.token_ids) : len(token_ids)] = True
    batch = long_batch(len(sampled), longest)
    batch.input_ids, batch.completion_mask = ids, mask
    batch.lengths = torch.tensor([len(token_ids) for token_ids in sampled])
    exact, rough = (
        transformers_logprobs(tmp_path / "updated", batch, dtype=dtype, attention="eager")
        for dtype in (torch.float32, torch.bfloat16)
    )
    engines = torch.zeros_like(exact)
    engines[mask] = torch.tensor(logprobs)
    rounding = mean_difference(rough, exact, batch)
    assert mean_difference(engines, exact, batch) < 2 * rounding
