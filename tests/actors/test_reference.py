"""The reference model: a copy of what it was given, and after a sync a mix with the policy."""

import pytest
import torch
from patience import PATIENCE_S
from policy_cases import LAYOUTS, exported, policy_config, random_batch
from safetensors.torch import load_file

from rlsys.actors.reference import ReferenceActors
from rlsys.actors.waiting import get_all

pytestmark = pytest.mark.system


def start(config):
    reference = ReferenceActors(config, device="cpu")
    get_all(reference.async_start(), phase="start", timeout_s=PATIENCE_S)
    return reference


def saved(reference, folder):
    reference.save_model(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen2-tied", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_synced_reference_is_the_mix_that_was_asked_for(
    lab, policy_models, tiny_models, tmp_path, name
):
    layout = LAYOUTS["TP 2"]
    if name == "experts":
        folder, layout = tiny_models["experts", 1], layout | {"expert_model_parallel_size": 2}
    else:
        folder = policy_models[name]
    config = policy_config(folder, grpo={"beta": 0.1}, **layout)
    section = {"world_size": 2, "tensor_parallel_size": 2, "sync_steps": 1, "mixup_alpha": 0.25}
    section = config.reference.model_copy(update=section)
    config = config.model_copy(update={"reference": section})
    policy = lab.policy(config)
    reference = start(config)
    batch = random_batch()
    before = saved(reference, tmp_path / "before")
    assert torch.allclose(policy.compute_logprobs(batch)[0], reference.compute_logprobs(batch)[0])

    reference.connect_to(policy)
    policy.update(batch)
    reference.sync()
    after = saved(reference, tmp_path / "after")
    trained = exported(policy)
    assert after.keys() == trained.keys()
    for name, tensor in after.items():
        mix = 0.75 * before[name] + 0.25 * trained[name]
        torch.testing.assert_close(tensor, mix, atol=1e-6, rtol=1e-6, msg=name)
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])

    # As a resumed run does with what its checkpoint holds.
    mixed_logprobs = reference.compute_logprobs(batch)[0]
    reference.load_state(tmp_path / "before")
    assert not torch.allclose(reference.compute_logprobs(batch)[0], mixed_logprobs)
    reference.load_state(tmp_path / "after")
    assert torch.equal(reference.compute_logprobs(batch)[0], mixed_logprobs)
    reference.close()
