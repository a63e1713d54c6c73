"""Models with layers of linear attention: their shape, their weights, what a sequence keeps."""

import json

import pytest
import torch
import transformers
from config_cases import MODEL_SIZES, config_of_paths, write_model
from safetensors.torch import save_file

from rlsys.model.families.base import WeightRow
from rlsys.model.folder_check import folder_problems
from rlsys.model.layer_memory import layer_numbers, mean_layer_numbers
from rlsys.model.memory import estimate_memory, kv_block_tokens, kv_cache_bytes
from rlsys.model.shape import read_model_shape

LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "partial_rotary_factor": 0.25,
}
HYBRIDS = {
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}


def hybrid(folder, model_type, **values):
    return write_model(folder, model_type=model_type, **HYBRIDS[model_type] | values)


@pytest.mark.parametrize("config_class", ["Qwen3NextConfig", "Qwen3_5TextConfig"])
def test_a_published_size_has_the_parameters_that_transformers_makes(tmp_path, config_class):
    """The defaults of transformers are the sizes of Qwen3-Next-80B-A3B and of Qwen3.5-9B."""
    config = getattr(transformers, config_class)()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    values = {k: v for k, v in config.to_dict().items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = read_model_shape(tmp_path)
    assert shape.num_params == model.num_parameters()
    kinds = ["linear_attention" if layer.is_linear else "full_attention" for layer in shape.layers]
    assert kinds == config.layer_types
    # Published files name the interval instead.
    del values["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"full_attention_interval": 4}))
    assert read_model_shape(tmp_path) == shape


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"linear_num_value_heads": 6}, "linear_num_key_heads = 4 does not divide"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "'sliding_attention'"),
        ({"attn_output_gate": False}, "attn_output_gate = False is not supported"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid' is not supported"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim = 0 should be"),
        ({"linear_conv_bias": True}, "linear_conv_bias = True is not known"),
    ],
)
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_what_changes_the_forward_pass_is_refused_by_name(tmp_path, model_type, values, words):
    folder = hybrid(tmp_path, model_type, **values)
    with pytest.raises(ValueError, match=words):
        read_model_shape(folder)


def test_tensors_that_predict_further_tokens_are_not_missed_by_the_table(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = hybrid(tmp_path, "qwen3_next")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.zeros(2)}, folder / "model.safetensors")
    shape = read_model_shape(folder)
    assert not folder_problems(folder, shape, has_prompts=False)
    save_file(tensors | {"more.fc.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert "more.fc.weight" in folder_problems(folder, shape, has_prompts=False)[0]


def test_parts_of_several_tensors_are_fused_by_key_head_and_come_back():
    """Two tensors, of which the first holds q, k and v: each rank has whole key heads."""
    row = WeightRow(
        ("x",),
        ("qkv", "z"),
        ((16, 2), (8, 2)),
        tp_axis=0,
        query_groups=4,
        part_rows=(4, 4, 8, 8),
    )
    qkv, z = torch.arange(32.0).view(16, 2), torch.arange(100.0, 116.0).view(8, 2)
    parts = row.cut([qkv, z])
    assert [tuple(part.shape) for part in parts] == [part.shape for part in row.parts]
    whole = row.fuse(parts, 1)
    q, k, v = qkv.split((4, 4, 8))
    head = [q[1:2], k[1:2], v[2:4], z[2:4]]
    assert torch.equal(whole[6:12], torch.cat(head))
    for tensor, same in zip((qkv, z), row.join(row.split(whole, 1)), strict=True):
        assert torch.equal(tensor, same)
    ranks = [row.fuse([part.chunk(2)[rank] for part in parts], 2) for rank in range(2)]
    assert torch.equal(torch.cat(ranks), whole)


def test_a_linear_layer_keeps_a_state_of_constant_size(tmp_path):
    shape = read_model_shape(hybrid(tmp_path / "model", "qwen3_5_text"))
    assert [layer.is_linear for layer in shape.layers] == [True, True, True, False]
    heads, dim = MODEL_SIZES["num_key_value_heads"], MODEL_SIZES["head_dim"]
    assert shape.kv_elements_per_token(1) == 2 * heads * dim  # of the only other layer
    state = (2 * 4 * 32 + 8 * 16) * 3 + 8 * 32 * 16
    assert shape.state_elements(1) == state
    assert shape.state_elements(2) == state // 2
    # Blocks of all layers have one size, which holds a state.
    tokens = kv_block_tokens(shape, "cuda")
    assert (tokens - 16) * 2 * heads * dim < state <= tokens * 2 * heads * dim

    def engine(completion):
        config = config_of_paths(
            model={"path": str(tmp_path / "model")},
            rollout={
                "num_generations": 4,
                "generation_batch_size": 16,
                "max_completion_length": completion,
            },
        )
        sizes = [kv_cache_bytes(config, shape, sequences=n, device="cuda") for n in (10, 20)]
        found = {e.role: e for e in estimate_memory(config, shape, shape, device="cuda")}
        return sizes[1] - sizes[0], found["rollout"].formula["KV cache"]

    short, text = engine(16)
    more, _ = engine(16 + tokens)
    # One more block in each group of layers as large as those with keys: linear ones add none.
    assert more - short == 10 * tokens * 2 * heads * dim * 2
    assert f"3 linear layers x {state * 2:,} bytes, a state of constant size" in text


def test_experts_in_one_tensor_are_refused_with_the_code_that_writes_each(tmp_path):
    """Published Qwen3.5 mixtures are so, and what transformers saves of them."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes |= LINEAR | {"shared_expert_intermediate_size": 64, "num_hidden_layers": 2}
    del sizes["partial_rotary_factor"]
    config = transformers.Qwen3_5MoeTextConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path / "each")
    shape = read_model_shape(tmp_path / "each")
    assert not folder_problems(tmp_path / "each", shape, has_prompts=False)
    made.config.save_pretrained(tmp_path / "one")
    save_file(
        {name: tensor.clone() for name, tensor in made.state_dict().items()},
        tmp_path / "one" / "model.safetensors",
        {"format": "pt"},
    )
    (problem,) = folder_problems(tmp_path / "one", shape, has_prompts=False)
    assert "new.load_state_dict(old.state_dict())" in problem

    old = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    new = transformers.AutoModelForCausalLM.from_config(old.config, dtype=old.dtype)
    new.load_state_dict(old.state_dict())
    new.save_pretrained(tmp_path / "new")
    assert not folder_problems(tmp_path / "new", shape, has_prompts=False)


def test_each_layer_keeps_what_its_kind_does(tmp_path):
    def shape(name, kinds):
        return read_model_shape(hybrid(tmp_path / name, "qwen3_5_text", layer_types=kinds))

    linear, full = "linear_attention", "full_attention"
    only = {kind: mean_layer_numbers(shape(kind, [kind] * 4), "cuda") for kind in (linear, full)}
    assert only[linear] != only[full]
    mixed = shape("mixed", [linear, linear, linear, full])
    assert mean_layer_numbers(mixed, "cuda") == (3 * only[linear] + only[full]) // 4
    assert layer_numbers(mixed, "cuda") == max(only.values())
