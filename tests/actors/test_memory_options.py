"""Recompute on the real engine: it changes no gradient, and really keeps less."""

import pytest
from family_models import save_family_model
from one_rank import gradient_and_kept, one_rank

pytestmark = pytest.mark.system

FULL = {"recompute": "full"}
MODULES = {
    "llama": (["mlp"], ["core_attn"], ["layernorm"]),
    "qwen2_moe": (["moe"], ["shared_experts"], ["layernorm", "shared_experts"]),
    "deepseek_v3": (["mla_up_proj"], ["layernorm"]),
}
"""Lists of recompute_modules by family."""


@pytest.fixture(scope="module")
def rank():
    with one_rank() as executor:
        yield lambda *args: executor.submit(gradient_and_kept, *args).result(timeout=120)


@pytest.mark.parametrize("family", MODULES)
def test_recompute_keeps_less_and_changes_no_gradient(rank, tmp_path, family):
    save_family_model(tmp_path, family)
    gradients, kept = rank(tmp_path, {})
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for options in (
        FULL,
        FULL | {"recompute_num_layers": 2},
        FULL | {"recompute_method": "block"},
        *({"recompute": "selective", "recompute_modules": names} for names in MODULES[family]),
    ):
        again, fewer = rank(tmp_path, options)
        assert fewer < kept, options
        for name, gradient in gradients.items():
            difference = (again[name] - gradient).norm()
            assert difference <= 1e-5 * gradient.norm() + 1e-9, (options, name)
