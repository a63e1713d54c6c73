"""Memory of snapshots: what updates change, twice, of every rank."""

import pytest
from config_cases import write_config, write_model

from rlsys.config.load import load_config
from rlsys.model.memory import GIB
from rlsys.model.shape import read_model_shape
from rlsys.model.snapshot_memory import snapshot_gib, snapshot_text, snapshot_warning

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "head_dim": 64,
}
MEASURED_GIB = 1.5033
"""A snapshot of that model in float32, on one rank."""


def case(tmp_path, **sections):
    folder = tmp_path / "model"
    if not folder.exists():
        write_model(folder, **SMOLLM2_135M)
    return load_config(write_config(tmp_path, **sections)).config, read_model_shape(folder)


def test_it_is_what_was_measured_twice(tmp_path):
    config, shape = case(tmp_path)
    assert snapshot_gib(config, shape, "cpu") == pytest.approx(2 * MEASURED_GIB, rel=1e-3)
    in_bfloat16 = 2 * 14 / 12 * MEASURED_GIB  # 2 bytes, and 12 of the optimizer
    assert snapshot_gib(config, shape, "cuda") == pytest.approx(in_bfloat16, rel=1e-3)


def test_replicas_have_all_weights_and_share_the_optimizer(tmp_path):
    config, shape = case(tmp_path, policy={"world_size": 2})
    each = shape.num_params * (4 + 8 / 2)
    assert snapshot_gib(config, shape, "cpu") == pytest.approx(2 * 2 * each / GIB, rel=1e-3)


def test_an_adapter_is_all_that_changes(tmp_path):
    lora = {"rank": 4, "target_modules": ["q_proj"]}
    config, shape = case(tmp_path, policy={"lora": lora})
    adapter = 30 * 4 * (576 + 576)
    assert snapshot_gib(config, shape, "cpu") == pytest.approx(2 * adapter * 12 / GIB)


@pytest.mark.parametrize(
    "sections", [{"policy": {"snapshot_steps": 0}}, {"recovery": {"max_restarts": 0}}]
)
def test_none_are_counted_where_none_are_taken(tmp_path, sections):
    config, shape = case(tmp_path, **sections)
    assert snapshot_gib(config, shape, "cpu") == 0
    assert snapshot_text(config, shape, "cpu") is None
    assert snapshot_warning(config, shape, "cpu", host_gib=0.0) is None


def test_a_host_whose_object_store_is_too_small_is_named(tmp_path):
    config, shape = case(tmp_path)
    assert "2 x 1 ranks x 1.50 GiB" in snapshot_text(config, shape, "cpu")
    assert snapshot_warning(config, shape, "cpu", host_gib=10.1) is None
    warning = snapshot_warning(config, shape, "cpu", host_gib=9.9)
    assert "need 3.0 GiB" in warning
    assert "none are taken" in warning
    config, shape = case(tmp_path, policy={"snapshot_steps": 5})
    assert "Ray moves them to disk" in snapshot_warning(config, shape, "cpu", host_gib=9.9)
