"""Which tensors have an adapter, PEFT's names of them, and adapters that do not fit."""

import json
from itertools import pairwise

import pytest
import torch
from config_cases import EXPERTS, write_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlsys.config import LoraConfig
from rlsys.model.adapter_folder import write_adapter_config
from rlsys.model.families.base import weight_table
from rlsys.model.lora import adapter_table, count_trained, linear_modules, matches, plan_lora
from rlsys.model.shape import read_model_shape

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def shape(tmp_path):
    write_model(tmp_path / "model")
    return read_model_shape(tmp_path / "model")


@pytest.fixture
def mixture(tmp_path):
    write_model(tmp_path / "mixture", **EXPERTS)
    return read_model_shape(tmp_path / "mixture")


def plan(shape, **lora):
    return plan_lora(LoraConfig(**lora), shape)


def save_adapter(folder, shape, changed=None, **lora):
    """An adapter of zeros; `changed` replaces tensors by name, None leaves one out."""
    folder.mkdir()
    made = plan(shape, **lora)
    write_adapter_config(folder, made, "model")
    tensors = {
        name: torch.zeros(size)
        for row in adapter_table(shape, made)
        for name, size in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    tensors |= changed or {}
    save_file(
        {n: t for n, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors"
    )
    return folder


def test_all_linear_is_every_linear_layer_and_neither_head_nor_router(shape, mixture):
    for model in (shape, mixture):
        made = plan(model)
        assert list(made.targets) == linear_modules(model)
        assert made.target_modules == LINEAR
    assert not any(name.endswith((".gate", "lm_head", "embed_tokens")) for name in made.targets)
    assert sum(".experts." in name for name in made.targets) == 4 * 8 * 3


def test_names_and_shapes_are_pefts(shape):
    table = adapter_table(shape, plan(shape, rank=2, target_modules=["v_proj", "o_proj"]))
    sizes = {
        name: size for row in table for name, size in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    prefix = "base_model.model.model.layers.3.self_attn"
    assert sizes[f"{prefix}.v_proj.lora_A.weight"] == (2, 64)
    assert sizes[f"{prefix}.v_proj.lora_B.weight"] == (128, 2)
    assert sizes[f"{prefix}.o_proj.lora_A.weight"] == (2, 256)
    assert sizes[f"{prefix}.o_proj.lora_B.weight"] == (64, 2)
    assert len(sizes) == 4 * 2 * 2
    cut = {name.split(".", 4)[-1]: row.tp_axis for row in table for name in row.hf_names}
    assert cut["3.self_attn.v_proj.lora_A.weight"] is None
    assert cut["3.self_attn.v_proj.lora_B.weight"] == 0
    assert cut["3.self_attn.o_proj.lora_A.weight"] == 1
    assert cut["3.self_attn.o_proj.lora_B.weight"] is None


def test_rows_of_experts_follow_each_other(mixture):
    rows = [row.experts for row in adapter_table(mixture, plan(mixture)) if row.experts]
    assert len(rows) == 4 * 3 * 2 * 8
    assert sum(a != b for a, b in pairwise(rows)) == 4 * 3 * 2 - 1


@given(st.integers(1, 64), st.sampled_from([[name] for name in LINEAR]))
def test_trained_parameters_are_those_of_both_matrices(shape_of_session, rank, names):
    table = adapter_table(shape_of_session, plan(shape_of_session, rank=rank, target_modules=names))
    expected = sum(
        rank * sum(size)
        for row in weight_table(shape_of_session)
        for name, size in zip(row.hf_names, row.hf_shapes, strict=True)
        if name.endswith(f"{names[0]}.weight")
    )
    assert count_trained(table) == expected


@pytest.fixture(scope="module")
def shape_of_session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder)
    return read_model_shape(folder)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["layers.0.self_attn.q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["proj"], "model.layers.0.self_attn.q_proj", False),
        (r".*layers\.1.*q_proj", "model.layers.1.self_attn.q_proj", True),
        (r"layers\.1.*q_proj", "model.layers.1.self_attn.q_proj", False),
    ],
)
def test_targets_match_as_in_peft(pattern, module, expected):
    assert matches(pattern, module) is expected


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_prj"]}, ["q_prj matches nothing", ", ".join(LINEAR)]),
        ({"target_modules": r"layers\.0.*"}, ["matches nothing", "regex of whole names"]),
        ({"target_modules": ["lm_head"]}, [": lm_head cannot have an adapter", "modules_to_save"]),
        ({"modules_to_save": ["heads"]}, ["heads matches nothing", "embed_tokens", "norm"]),
        ({"modules_to_save": ["embed_tokens"]}, ["one tensor", "embed_tokens and lm_head"]),
        ({"modules_to_save": ["o_proj"]}, ["would have an adapter and be trained whole"]),
        (
            {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]},
            ["q_proj.weight cannot be trained alone", "k_proj", "name all of them"],
        ),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(shape, lora, words):
    with pytest.raises(ValueError, match="policy") as error:
        plan(shape, **lora)
    assert all(word in str(error.value) for word in words)


def test_one_expert_of_a_layer_has_no_adapter_alone(mixture):
    with pytest.raises(ValueError, match="other 7 experts"):
        plan(mixture, target_modules=r".*experts\.3\.up_proj")


def test_an_adapters_own_settings_are_taken_over(shape, tmp_path):
    folder = save_adapter(tmp_path / "a", shape, rank=3, alpha=5, target_modules=["q_proj"])
    made = plan(shape, path=str(folder))
    assert (made.rank, made.alpha, made.target_modules) == (3, 5, ["q_proj"])
    assert len(made.targets) == 4


def test_a_saved_config_leaves_the_adapters_settings_to_it(shape, tmp_path):
    folder = save_adapter(tmp_path / "a", shape, rank=3, modules_to_save=["norm"])
    first = LoraConfig(path=str(folder), dropout=0.1)
    again = LoraConfig(**first.model_dump())
    assert again == first
    assert plan_lora(again, shape) == plan_lora(first, shape)
    assert LoraConfig().model_dump()["rank"] == 8


def test_modules_to_save_in_another_order_are_the_adapters(shape, tmp_path):
    saved = ["norm", "embed_tokens", "lm_head"]
    folder = save_adapter(tmp_path / "a", shape, modules_to_save=saved)
    assert (
        plan(shape, path=str(folder), modules_to_save=saved).saved
        == plan(shape, modules_to_save=saved).saved
    )


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, ["rank = 3, not 8", "Leave policy.lora.rank out"]),
        ({"rank": 3, "alpha": 16}, ["alpha = 5.0, not 16.0"]),
        ({"init": "gaussian"}, ["lora.init = gaussian", "leave one of them out"]),
        ({"target_modules": ["v_proj"]}, ["target_modules"]),
    ],
)
def test_settings_that_the_adapter_has_otherwise_are_refused(shape, tmp_path, lora, words):
    folder = save_adapter(tmp_path / "a", shape, rank=3, alpha=5, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="policy") as error:
        plan(shape, path=str(folder), **lora)
    assert all(word in str(error.value) for word in words)


def test_a_score_head_does_not_start_from_an_adapter_without_one(shape, tmp_path):
    folder = save_adapter(tmp_path / "adapter", shape)
    scorer = read_model_shape(tmp_path / "model", num_labels=1)
    with pytest.raises(ValueError, match=r"without a score head\. Merge it \(`rlsys export"):
        plan(scorer, path=str(folder), modules_to_save=["score"])


def test_an_adapter_of_another_model_is_refused(shape, tmp_path):
    write_model(tmp_path / "wide", hidden_size=128)
    folder = save_adapter(tmp_path / "a", read_model_shape(tmp_path / "wide"), rank=3)
    with pytest.raises(
        ValueError, match=r"does not fit the model: .* is \[128, 3\], and should be \[64, 3\]"
    ):
        plan(shape, path=str(folder))


def test_an_adapter_with_other_tensors_is_refused(shape, tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changed = {name: None, "more": torch.zeros(1)}
    folder = save_adapter(tmp_path / "a", shape, changed, rank=3)
    with pytest.raises(ValueError, match=r"it lacks .*q_proj.lora_A.*; it has more, which"):
        plan(shape, path=str(folder))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": None}, "lacks r"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ],
)
def test_other_kinds_of_adapters_are_refused(shape, tmp_path, values, words):
    folder = save_adapter(tmp_path / "a", shape)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ValueError, match=words):
        plan(shape, path=str(folder))


def test_a_folder_without_an_adapter_is_refused(shape, tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config"):
        plan(shape, path=str(tmp_path))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_inits_that_change_the_base_are_refused_by_name(init):
    with pytest.raises(ValueError, match=f"{init} is not supported"):
        LoraConfig(init=init)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (r".*\.0\..*_proj", r".*\.0\..*_proj"),
        (["all-linear"], "all-linear"),
    ],
)
def test_target_modules_from_a_command_line(text, expected):
    assert LoraConfig(target_modules=text).target_modules == expected
