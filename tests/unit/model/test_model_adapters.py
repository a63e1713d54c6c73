"""Which models' adapters vLLM samples with, and which are merged."""

import pytest
from config_cases import EXPERTS, values, write_model

from rlsys.config import Config
from rlsys.model.adapter_folder import CONFIG_FILE
from rlsys.model.adapters import (
    adapter_obstacle,
    describe_adapter_sync,
    syncs_adapter,
    with_stored_settings,
)
from rlsys.model.shape import read_model_shape


def config(lora=None, sync="auto", **sections):
    return Config.model_validate(
        values(policy={"lora": lora or {}}, weight_sync={"lora": sync}, **sections)
    )


@pytest.fixture
def shape(tmp_path):
    return read_model_shape(write_model(tmp_path / "dense"))


def test_auto_is_the_adapter_on_gpus_and_merged_on_cpu(shape):
    assert syncs_adapter(config(), shape, "cuda")
    assert not syncs_adapter(config(), shape, "cpu")
    assert syncs_adapter(config(sync="adapter"), shape, "cpu")
    assert not syncs_adapter(config(sync="merged"), shape, "cuda")
    assert not syncs_adapter(Config.model_validate(values()), shape, "cuda")
    assert "adapter alone" in describe_adapter_sync(config(), shape, "cuda")
    assert "token by token" in describe_adapter_sync(config(), shape, "cpu")


@pytest.mark.parametrize(
    ("lora", "sizes", "word"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save has lm_head"),
        ({"rank": 600}, {}, "rank is 600"),
        ({}, EXPERTS, "experts"),
    ],
)
def test_what_vllm_cannot_do_is_merged(tmp_path, lora, sizes, word):
    shape = read_model_shape(write_model(tmp_path / "model", **sizes))
    assert word in adapter_obstacle(config(lora), shape, "cuda")
    assert not syncs_adapter(config(lora), shape, "cuda")
    assert word in describe_adapter_sync(config(lora), shape, "cuda")


def test_kernels_of_gpus_do_not_compute_adapters_in_float32(tmp_path, shape):
    mine = config(model={"path": "m", "dtype": "float32"})
    assert "model.dtype is float32" in adapter_obstacle(mine, shape, "cuda")
    assert adapter_obstacle(mine, shape, "cpu") is None


def test_a_stored_adapter_brings_its_own_rank(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(
        '{"peft_type": "LORA", "r": 48, "lora_alpha": 6, "lora_dropout": 0.5, '
        '"target_modules": ["q_proj"]}'
    )
    stored = with_stored_settings(config({"path": str(tmp_path)})).policy.lora
    assert (stored.rank, stored.alpha, stored.dropout) == (48, 6, 0.5)
    # As plan_lora, which SFT and the checks ask.
    without = with_stored_settings(config({"path": str(tmp_path), "dropout": 0.0})).policy.lora
    assert (without.rank, without.dropout) == (48, 0.0)
