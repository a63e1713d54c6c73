"""The settings of vLLM; no engine is started."""

from pathlib import Path

import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator

from rlsys.config import Config, LoraConfig
from rlsys.config.passed_through import VLLM_DEFAULTS, VLLM_FIELDS, VLLM_FIXED, VLLM_REFUSED
from rlsys.engines.vllm.settings import (
    engine_arguments,
    refusal,
    rollout_env,
    sampling_arguments,
)
from rlsys.model.families import FAMILIES
from rlsys.model.families.base import LayerShape
from rlsys.model.shape import ModelShape
from rlsys.model.stop_tokens import StopRules
from rlsys.types import Prompt, SampleRequest

SHAPE = ModelShape(
    family=FAMILIES["qwen3"],
    vocab_size=399,
    hidden_size=128,
    intermediate_size=384,
    num_layers=3,
    layers=(LayerShape(),) * 3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    tied=True,
    max_position_embeddings=512,
)


COLOCATED = {"placement": "colocated"}


def config(*, max_prompt_length=64, **rollout):
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1,
            "data": {"dataset": ["unused"], "max_prompt_length": max_prompt_length},
            "model": {"path": "unused"},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {"generation_batch_size": 8, "max_completion_length": 64, **rollout},
        }
    )


def cpu_kv_cache_bytes(settings):
    arguments = engine_arguments(settings, SHAPE, device="cpu", engine_rank=0)
    return arguments["kv_cache_memory_bytes"]


def test_the_cpu_cache_holds_every_sequence_at_full_length():
    # 256 sequences of one 128-token block and vLLM's own; 2 * 3 layers * 2 heads * 32 * 4 bytes.
    assert cpu_kv_cache_bytes(config()) == 257 * 128 * 1536
    # 129 tokens need a second block.
    assert cpu_kv_cache_bytes(config(max_prompt_length=65)) == 513 * 128 * 1536


def test_ranks_share_the_kv_heads_down_to_one_each():
    # 2 KV heads: 1 of each of 2 ranks, and of each of 4.
    for tp in (2, 4):
        halved = cpu_kv_cache_bytes(config(tensor_parallel_size=tp))
        assert halved == 257 * 128 * 1536 // 2


def test_the_cpu_cache_stops_at_4_gib():
    large = config(max_prompt_length=20000, max_num_seqs=1024)
    assert cpu_kv_cache_bytes(large) == 4 * 2**30


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_of_the_config_reach_vllm(device):
    arguments = engine_arguments(
        config(kv_cache_memory_mb=7, max_num_seqs=5, gpu_memory_utilization=0.5),
        SHAPE,
        device=device,
        engine_rank=3,
    )
    assert arguments["kv_cache_memory_bytes"] == 7 * 2**20
    assert arguments["max_num_seqs"] == 5
    assert arguments["gpu_memory_utilization"] == 0.5
    assert arguments["max_model_len"] == 128
    assert arguments["dtype"] == {"cpu": "float32", "cuda": "bfloat16"}[device]
    assert arguments["seed"] == config().seed + 3


def test_the_engine_has_an_fp32_head_if_the_policy_has():
    def overrides(fp32):
        settings = config()
        model = settings.model.model_copy(update={"fp32_lm_head": fp32})
        settings = settings.model_copy(update={"model": model})
        return engine_arguments(settings, SHAPE, device="cuda", engine_rank=0)["hf_overrides"]

    assert overrides(True)["head_dtype"] == "float32"
    assert "head_dtype" not in overrides(False)


def test_the_engine_builds_the_language_model_whatever_config_json_leaves_out():
    arguments = engine_arguments(config(), SHAPE, device="cpu", engine_rank=0)
    assert arguments["hf_overrides"] == {"architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(("skip", "looks_for"), [("auto", True), (False, True), (True, False)])
def test_stop_texts_may_hold_special_tokens_that_rewards_see(skip, looks_for):
    rollout = config(skip_special_tokens=skip, top_p=0.9, top_k=7).rollout
    stops = StopRules([2], [5], ["</answer>\n"], keeps_stop=False)
    request = SampleRequest(3, Prompt("p", [], [1]), num_generations=4, temperature=0.5, seed=9)
    arguments = sampling_arguments(rollout, stops, request)
    assert arguments["skip_special_tokens"] is not looks_for
    assert (arguments["stop"], arguments["detokenize"]) == (["</answer>\n"], True)
    assert arguments["stop_token_ids"] == [2, 5]
    sampling = {name: arguments[name] for name in ("n", "temperature", "top_p", "top_k", "seed")}
    assert sampling == {"n": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 9}


def passed(device, **options):
    """The names of vLLM's arguments that rlsys sets."""
    settings = config(max_num_seqs=1024, stop=["x"], **options)
    settings = settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"fp32_lm_head": True}),
            "policy": settings.policy.model_copy(update={"lora": LoraConfig(rank=33)}),
        }
    )
    return engine_arguments(settings, SHAPE, device=device, engine_rank=0)


def test_the_tables_of_passed_through_are_what_rlsys_sets():
    in_engine = {"model", "weight_transfer_config", "worker_extension_cls"}  # `_start_llm`
    names = {*passed("cpu"), *passed("cuda", kv_cache_memory_mb=7, router_replay=True), *in_engine}
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    more = config(speculative_config=drafts, quantization="fp8").model_copy(update=COLOCATED)
    names |= {*engine_arguments(more, SHAPE, device="cuda", engine_rank=0)}
    assert names == {*VLLM_FIELDS, *VLLM_FIXED, *VLLM_DEFAULTS}
    assert not names & set(VLLM_REFUSED)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_engines_that_take_turns_on_a_gpu_can_give_their_memory_back(device):
    alone = engine_arguments(config(), SHAPE, device=device, engine_rank=0)
    shared = config().model_copy(update=COLOCATED)
    shares = engine_arguments(shared, SHAPE, device=device, engine_rank=0)
    assert shares == alone | ({"enable_sleep_mode": True} if device == "cuda" else {})


def test_engine_kwargs_reach_vllm_and_win_over_defaults():
    own = {"enable_prefix_caching": False, "enforce_eager": False}
    plain, changed = passed("cpu"), passed("cpu", engine_kwargs=own)
    assert changed == plain | own
    assert plain["enforce_eager"]


def test_an_engine_refuses_what_its_own_vllm_does_not_have():
    with pytest.raises(ValueError, match=r"no option 'enforce_eagr': did you mean enforce_eager\?"):
        passed("cpu", engine_kwargs={"enforce_eagr": True})


def test_graphs_cover_decode_steps_with_their_drafts():
    def largest(drafted, **options):
        drafts = {"method": "ngram", "num_speculative_tokens": drafted} if drafted else None
        mine = config(speculative_config=drafts, **options)
        arguments = engine_arguments(mine, SHAPE, device="cuda", engine_rank=0)
        return arguments.get("max_cudagraph_capture_size"), arguments.get("speculative_config")

    assert largest(0, max_num_seqs=512) == (None, None)
    assert largest(0, max_num_seqs=513) == (513, None)
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    assert largest(3, max_num_seqs=256) == (1024, drafts)
    assert largest(3, max_num_seqs=128) == (None, drafts)


def test_gpus_size_their_own_cache():
    arguments = engine_arguments(config(), SHAPE, device="cuda", engine_rank=0)
    assert "kv_cache_memory_bytes" not in arguments


def test_the_cache_on_a_shared_gpu_fits_all_sequences_or_the_space_left():
    def arguments(gpu_gib, **rollout):
        sharing = {"num_generations": 4, "num_engines": 2, "engines_per_gpu": 2, "max_num_seqs": 64}
        shared = config(**sharing | rollout)
        return engine_arguments(
            shared, SHAPE, device="cuda", engine_rank=1, gpu_bytes=int(gpu_gib * 2**30)
        )

    # 64 sequences of 8 blocks, and vLLM's own; 16 tokens of 2 * 3 layers * 2 heads * 32 * 2 bytes.
    full = arguments(80)
    assert full["kv_cache_memory_bytes"] == (64 * 8 + 1) * 16 * 768
    assert full["gpu_memory_utilization"] == 0.85 / 2
    # 129 tokens need a ninth block.
    longer = arguments(80, max_prompt_length=65)
    assert longer["kv_cache_memory_bytes"] == (64 * 9 + 1) * 16 * 768
    with pytest.raises(ValueError, match=r"engines_per_gpu = 2 .* one full sequence needs"):
        arguments(7)
    assert arguments(80, kv_cache_memory_mb=7)["kv_cache_memory_bytes"] == 7 * 2**20
    # What is missing is taken from the cache, down to what the config says.
    taken = 2 * SHAPE.num_params + 3 * 256 * 2**20 + 4 * 4 * 64 * SHAPE.vocab_size + 3 * 2**30
    gpu_gib = (taken + 2**20) / (0.85 / 2) / 2**30
    scarce = arguments(gpu_gib)["kv_cache_memory_bytes"]
    assert 9 * 16 * 768 <= scarce < full["kv_cache_memory_bytes"]
    assert scarce == pytest.approx(2**20, abs=2)
    with pytest.raises(ValueError, match=r"kv_cache_memory_mb = 700 needs 0\.7"):
        arguments(gpu_gib, kv_cache_memory_mb=700)
    # More logits, or a smaller share: less for the cache.
    for settings in ({"max_num_seqs": 1024}, {"gpu_memory_utilization": 0.8}):
        with pytest.raises(ValueError, match="one full sequence"):
            arguments(gpu_gib, **settings)


def test_the_users_log_level_wins(monkeypatch):
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert rollout_env("cpu")["VLLM_LOGGING_LEVEL"] == "ERROR"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert rollout_env("cpu")["VLLM_LOGGING_LEVEL"] == "DEBUG"


class SettingsOfVLLM(BaseModel):
    """vLLM refuses a field by its bounds, or the settings as a whole; this class does both."""

    max_num_seqs: int = Field(default=1, ge=1)
    block_size: int = Field(default=1, ge=1)
    architecture: str = "known"

    @model_validator(mode="after")
    def _architecture_is_known(self):
        if self.architecture != "known":
            raise ValueError(f"Model architectures ['{self.architecture}'] are not\n\nsupported.")
        return self


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({"architecture": "Foo"}, "Model architectures ['Foo'] are not supported."),
        (
            {"max_num_seqs": 0, "block_size": -1},
            "max_num_seqs = 0: Input should be greater than or equal to 1; "
            "block_size = -1: Input should be greater than or equal to 1",
        ),
    ],
)
def test_a_refusal_of_vllm_names_the_model_and_the_setting(settings, reasons):
    with pytest.raises(ValidationError) as caught:
        SettingsOfVLLM(**settings)
    assert refusal(Path("models/a"), caught.value) == (
        f"vLLM does not accept the model models/a with these settings: {reasons}"
    )
