"""What no gradient trains of a model with DeepSeek-V3's experts: it leaves as it came."""

import pytest
import torch
from family_models import save_family_model
from policy_cases import exported, policy_config, random_batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlsys.model.folder_check import folder_problems, model_notes
from rlsys.model.shape import read_model_shape

pytestmark = pytest.mark.system

BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture
def folder(tmp_path):
    """A GLM-4.5 with a fifth layer, which predicts a further token, in a file of its own."""
    save_family_model(tmp_path / "model", "glm4_moe", num_nextn_predict_layers=1)
    mtp = {
        "model.layers.4.eh_proj.weight": torch.randn(64, 128, dtype=torch.bfloat16),
        f"model.layers.4.{BIAS}": torch.randn(8),
    }
    save_file(mtp, tmp_path / "model" / "mtp.safetensors")
    return tmp_path / "model"


def test_biases_and_layers_that_are_not_trained_leave_as_they_came(lab, folder, tmp_path):
    shape = read_model_shape(folder)
    assert folder_problems(folder, shape, has_prompts=False) == []
    notes = " ".join(model_notes(folder))
    assert "layers from 4 on" in notes
    assert "e_score_correction_bias" in notes

    policy = lab.policy(policy_config(folder))
    before = exported(policy)
    policy.update(random_batch(), loss="sft")
    policy.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not torch.equal(
        saved["model.layers.1.mlp.gate.weight"], before["model.layers.1.mlp.gate.weight"]
    )
    biases = [name for name in before if name.endswith(BIAS)]
    assert len(biases) == 3
    assert all(torch.equal(saved[name], before[name]) for name in biases)
    untrained = load_file(folder / "mtp.safetensors")
    assert saved.keys() == before.keys() | untrained.keys()
    for name, tensor in untrained.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not loading["missing_keys"]


def test_biases_stay_in_fp32_where_weights_are_in_bf16(lab, folder):
    """In bf16 they would tie scores that are close, and policy and engine choose others."""
    policy = lab.policy(policy_config(folder, dtype="bfloat16"))
    stored = load_file(folder / "model.safetensors")
    for meta in policy.weight_metadata():
        assert meta.dtype == ("float32" if meta.name.endswith(BIAS) else "bfloat16")
    for name, tensor in exported(policy).items():
        if name.endswith(BIAS):
            assert torch.equal(tensor, stored[name])
