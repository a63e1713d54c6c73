"""HF in, HF out: what the policy writes is what it read, bit by bit, and transformers loads it."""

import json
import random

import pytest
import torch
from policy_cases import LAYOUTS, MODELS, VOCAB_SIZE, exported, policy_config, random_batch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlsys.weight_sync.connection import whole_tensors
from rlsys.weight_sync.plan import TensorSlice

pytestmark = pytest.mark.system


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "layout",
    ["one rank", "TP 2", "PP 2", pytest.param("TP 2 x PP 2", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(lab, policy_models, tmp_path, name, layout):
    policy = lab.policy(policy_config(policy_models[name], **LAYOUTS[layout]))
    policy.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert_equal(saved, load_file(policy_models[name] / "model.safetensors"))
    assert ("lm_head.weight" in saved) == name.endswith("-untied")


def test_weight_sync_sends_what_is_saved(lab, policy_models, tmp_path):
    policy = lab.policy(policy_config(policy_models["qwen3-untied"], **LAYOUTS["TP 2 x PP 2"]))
    policy.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    announced = {meta.name: (meta.dtype, meta.shape) for meta in policy.weight_metadata()}
    assert announced == {name: ("float32", tuple(tensor.shape)) for name, tensor in saved.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2-tied", "one rank"),
        ("qwen2-untied", "TP 2 x PP 2"),
        pytest.param("llama-tied", "PP 2 x DP 2", marks=pytest.mark.slow),
        pytest.param("qwen3-untied", "TP 2 x DP 2", marks=pytest.mark.slow),
    ],
)
def test_buckets_hold_what_one_by_one_export_gives(lab, policy_models, name, layout):
    policy = lab.policy(policy_config(policy_models[name], **LAYOUTS[layout]))
    policy.call("plan_buckets", 20_000)  # most tensors travel with others, the largest alone
    loaded = load_file(policy_models[name] / "model.safetensors")
    assert_equal(policy.call("in_buckets")[0], loaded)
    for move in (False, True, False):  # as an optimizer step does, and as nothing should
        policy.call("change_weights", move)
        tensors = policy.call("in_buckets")[0]
        assert_equal(tensors, exported(policy))
        loaded = {name: 3 * tensor + 1 for name, tensor in loaded.items()}
        assert_equal(tensors, loaded)


def random_boxes(metadata, seed):
    """One or two slices of each tensor: some are the whole tensor, none overlap."""
    rng = random.Random(seed)
    boxes = []
    for meta in metadata:
        axis = rng.randrange(len(meta.shape))
        cut = rng.randrange(meta.shape[axis])
        ranges = [(0, cut), (cut, meta.shape[axis])][rng.randrange(2) :]
        for start, stop in ranges:
            if start < stop:
                starts, shape = [0] * len(meta.shape), list(meta.shape)
                starts[axis], shape[axis] = start, stop - start
                boxes.append(TensorSlice(meta, tuple(starts), tuple(shape)))
    return tuple(boxes)


@pytest.mark.parametrize(
    ("name", "layout", "sender"),
    [
        ("qwen2-tied", "one rank", 0),
        ("qwen3-untied", "TP 2", 1),
        ("qwen2-untied", "TP 2 x PP 2", 1),
        pytest.param("llama-tied", "TP 2 x DP 2", 3, marks=pytest.mark.slow),
    ],
)
def test_any_rank_sends_any_part_of_the_tensors(lab, policy_models, name, layout, sender):
    policy = lab.policy(policy_config(policy_models[name], **LAYOUTS[layout]))
    metadata = policy.weight_metadata()
    for seed in range(3):
        whole = exported(policy)
        slices = random_boxes(metadata, seed)
        policy.call("plan_buckets", 20_000, slices, sender)
        tensors = policy.call("in_buckets")[sender]
        expected = {
            piece.meta.name: piece.within(whole[piece.tensor.name], TensorSlice.whole(piece.tensor))
            for piece in slices
        }
        assert_equal(tensors, expected)
        policy.call("change_weights", False)
        changed = {name: 3 * tensor + 1 for name, tensor in expected.items()}
        assert_equal(policy.call("in_buckets")[sender], changed)


@pytest.mark.parametrize(("layout", "sender"), [("TP 2 x PP 2", 1), ("one rank", 0)])
def test_buckets_have_the_adapter_merged_the_base_or_the_adapter_alone(
    lab, policy_models, layout, sender
):
    lora = {"rank": 3, "alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    config = policy_config(policy_models["qwen3-untied"], lora=lora, **LAYOUTS[layout])
    policy = lab.policy(config)
    base = exported(policy)
    slices = random_boxes(policy.weight_metadata(), seed=1)

    def sent(slices, content):
        policy.call("plan_buckets", 20_000, slices, sender, content)
        return policy.call("in_buckets")[sender]

    def cut(whole):
        return {
            piece.meta.name: piece.within(whole[piece.tensor.name], TensorSlice.whole(piece.tensor))
            for piece in slices
        }

    assert_equal(sent(slices, "weights"), cut(base))  # B starts as 0
    for seed in (1, 2):
        policy.call("randomize_adapters", seed)
        adapter = policy.call("exported_adapter")[0]
        assert_equal(sent(whole_tensors(policy.adapter_metadata()), "adapter"), adapter)
        merged = dict(base)
        for name, a in adapter.items():
            if ".lora_A." in name:
                weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                merged[weight] = base[weight] + 5 / 3 * adapter[name.replace("_A.", "_B.")] @ a
        torch.testing.assert_close(sent(slices, "weights"), cut(merged), atol=1e-6, rtol=1e-6)
        assert_equal(sent(slices, "base"), cut(base))
    assert_equal(exported(policy), base)


def test_transformers_loads_a_trained_model_with_its_tokenizer(lab, policy_models, tmp_path):
    source = policy_models["qwen3-tied"]
    policy = lab.policy(policy_config(source))
    policy.update(random_batch())
    policy.save_model(tmp_path / "saved")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values())
    assert model.dtype == torch.float32
    moved = (
        model.state_dict()["model.norm.weight"]
        != load_file(source / "model.safetensors")["model.norm.weight"]
    )
    assert moved.any()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == VOCAB_SIZE
    for loaded in (source, tmp_path / "saved"):
        assert len(GenerationConfig.from_pretrained(loaded).eos_token_id) > 1


def test_a_bfloat16_model_is_read_from_shards_and_written_as_bfloat16(lab, policy_models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy_models["llama-untied"], dtype="bfloat16")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config = policy_config(tmp_path / "sharded", dtype="bfloat16", **LAYOUTS["TP 2"])
    policy = lab.policy(config)
    policy.save_model(tmp_path / "saved")
    assert_equal(load_file(tmp_path / "saved" / "model.safetensors"), dict(model.state_dict()))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_of_another_model_are_refused(lab, policy_models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy_models["llama-untied"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(Exception, match=r"gate_proj.*weights and config\.json are"):
        lab.policy(policy_config(tmp_path))
