"""Layers of Transformer Engine load what `rlsys export --to mcore` wrote, and give it back."""

import subprocess
import sys

import pytest
import torch
from gpu_cases import gpu_config
from policy_cases import LAYOUTS, exported
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu(2)


@pytest.fixture(scope="module")
def mcore(gpu_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "mcore"
    words = [gpu_models["qwen3-untied", 0], "--to", "mcore", out, "--test_convert_precision"]
    command = [sys.executable, "-m", "rlsys.cli", "export", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "precision test passed" in done.stdout
    return out


@pytest.mark.parametrize("layout", ["one rank", "TP 2", "PP 2"])
@pytest.mark.parametrize("strictly", [False, True])
def test_gpu_ranks_hold_the_exported_weights(lab, gpu_models, mcore, layout, strictly):
    """Strictly: with all that the layers look for, as Megatron-LM loads by default."""
    folder = gpu_models["qwen3-untied", 0]
    policy = lab.policy(gpu_config(folder, dtype="float32", **LAYOUTS[layout]))
    policy.call("change_weights", False)
    policy.call("load_mcore", mcore, strictly)
    expected = load_file(folder / "model.safetensors")
    for name, tensor in exported(policy).items():
        assert torch.equal(tensor.cpu(), expected[name]), name
