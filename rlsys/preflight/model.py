"""Whether the models of a run are there, complete, and fit the parallel sizes of the config."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from rlsys.config import (
    Config,
    PolicyConfig,
    PreferenceConfig,
    ReferenceConfig,
    ReferencedConfig,
    RunConfig,
    TeacherConfig,
)
from rlsys.config.pipeline_layout import layer_problems, rank_layers
from rlsys.model.adapters import adapter_obstacle, with_stored_settings
from rlsys.model.attention import model_attention_problem
from rlsys.model.engine_options import engine_option_problems
from rlsys.model.families.bridged import DISTRIBUTION, is_bridged
from rlsys.model.folder import find_model_folder, read_json
from rlsys.model.folder_check import folder_problems
from rlsys.model.memory import kv_cache_bytes
from rlsys.model.memory_options import memory_option_problems
from rlsys.model.other_kinds import refuse_other_kind
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.packages import installed_version
from rlsys.preflight.devices import gpu_compute_capability, guess_device, may_bridge
from rlsys.preflight.experts import expert_problems, replay_problems
from rlsys.preflight.tokenizers import reference_token_problems, tokenizer_problems
from rlsys.preflight.trained import trained_problems
from rlsys.problems import Problem

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention on CPU has kernels for."""
CPU_LATENT_DIM = 576
"""Numbers per token in the cache of vLLM's latent attention on CPU: DeepSeek's and Moonlight's."""


def model_problems(config: Config) -> Iterator[Problem]:
    """Problems of the policy's model, the reward models and the reference model."""
    shape, problems = _read_policy(config)
    yield from problems
    if shape is not None:
        yield from replay_problems(config, shape)
        yield from _draft_model(config, shape)
    yield from _engine_problems(config, shape)
    for path in config.reward.model_paths:
        try:
            find_model_folder(path)
        except ValueError as error:
            yield Problem(f"reward.reward_model: {error}", only_here=True)
    yield from _teacher(config, shape)
    yield from _reference(config, shape)


def _engine_problems(config: Config, shape: ModelShape | None) -> Iterator[Problem]:
    """What keeps rollout engines from sampling with the policy's model."""
    if shape is not None:
        yield from _rollout_layout(config, shape)
        yield from _adapter(config, shape)
        yield from _kv_cache(config, shape)
    yield from _engine_options(config)


def taught_model_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of the model that is trained, with engines if it samples, and of its teacher."""
    shape, problems = _read_policy(config)
    yield from problems
    if config.sampler is not None:
        yield from _engine_problems(config.sampler, shape)
    yield from _teacher(config, shape)


def preference_model_problems(config: PreferenceConfig) -> Iterator[Problem]:
    """Problems of the models of preference training."""
    shape, problems = _read_policy(config)
    yield from problems
    yield from _reference(config, shape)


def _reference(config: ReferencedConfig, shape: ModelShape | None) -> Iterator[Problem]:
    """Problems of the reference, given the policy's shape."""
    if not config.has_reference_model:
        return
    reference = shape
    if config.reference.path is not None:
        reference, problems = _read_model(config, "reference.path", config.reference.path)
        yield from problems
    if reference is not None:
        yield from _frozen_layout(config, "reference", config.reference, reference)
    if shape is not None and reference is not None and config.reference.path is not None:
        yield from reference_token_problems(config.model.path, config.reference.path)


def _teacher(config: RunConfig, policy: ModelShape | None) -> Iterator[Problem]:
    section = config.used_teacher
    if section is None or config.teacher_path is None:
        return
    teacher, problems = _read_model(config, "teacher.path", config.teacher_path)
    yield from problems
    if teacher is not None:
        yield from _frozen_layout(config, "teacher", section, teacher)
    if teacher is not None and policy is not None:
        yield from tokenizer_problems(config.model.path, config.teacher_path)


def _draft_model(config: Config, shape: ModelShape) -> Iterator[Problem]:
    path, field = config.rollout.draft_model, "rollout.speculative_config"
    if path is None:
        return
    try:
        folder = find_model_folder(path)
    except ValueError as error:
        yield Problem(f"{field}: {error}", only_here=True)
        return
    size = read_json(folder / "config.json").get("vocab_size", shape.vocab_size)
    if size != shape.vocab_size and not config.rollout.speculation.get("use_heterogeneous_vocab"):
        yield Problem(
            f"{field}: model {path} has a vocabulary of {size} tokens and model.path one of "
            f"{shape.vocab_size}: use a model with the same tokenizer, or set "
            "use_heterogeneous_vocab to true"
        )


def policy_model_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of the model that is trained."""
    yield from _read_policy(config)[1]


def _read_policy(config: RunConfig) -> tuple[ModelShape | None, list[Problem]]:
    shape, problems = _read_model(config, "model.path", config.model.path)
    if shape is not None:
        problems += _policy_layout(config, shape)
        problems += _memory_options(config, shape)
        problems += trained_problems(config, shape)
        problems += expert_problems(config, shape)
    return shape, problems


def _read_model(
    config: RunConfig, field: str, path: str
) -> tuple[ModelShape | None, list[Problem]]:
    """The shape of the model that `field` names, if its config.json can be used; its problems."""
    try:
        folder = find_model_folder(path)
    except ValueError as error:
        return None, [Problem(f"{field}: {error}", only_here=True)]
    try:
        refuse_other_kind(folder)
        shape = read_model_shape(
            folder, may_bridge=may_bridge(config), num_labels=config.num_labels
        )
    except ValueError as error:
        return None, [Problem(f"{field}: {line}") for line in str(error).splitlines()]
    problems = list(_bridge(config, field, shape))
    if folder == Path(path):  # only config.json of a hub model is here yet
        problems += [
            Problem(f"{field}: {text}", only_here=True)
            for text in folder_problems(folder, shape, has_prompts=field == "model.path")
        ]
    longest, positions = config.longest_row, shape.max_position_embeddings
    if longest > positions:
        problems.append(
            Problem(
                f"{config.longest_row_is} = {longest} tokens, but {field} {path} has positions for "
                f"{positions}: make that {positions} or fewer"
            )
        )
    return shape, problems


def recompute_note(policy: PolicyConfig, shape: ModelShape) -> str | None:
    """What policy.recompute_modules does not do in this model; None if it does all that it says."""
    linear = sum(layer.is_linear for layer in shape.layers)
    if policy.recompute != "selective" or "core_attn" not in policy.recompute_modules or not linear:
        return None
    return (
        f"policy.recompute_modules: core_attn does nothing in the {linear} of {shape.num_layers} "
        "layers that have linear attention; mlp and policy.recompute = full work in all"
    )


def _bridge(config: RunConfig, field: str, shape: ModelShape) -> Iterator[Problem]:
    """Whether mcore-bridge can have the model, if model.bridge or its model_type leaves it that."""
    if not is_bridged(config, shape):
        return
    if not may_bridge(config):
        yield Problem(
            "model.bridge = mcore_bridge needs GPUs, where Transformer Engine runs: set it to auto"
        )
    elif installed_version(DISTRIBUTION) is None and not os.environ.get("RAY_ADDRESS"):
        yield Problem(
            f"{field}: model_type {shape.model_type!r} is left to {DISTRIBUTION}, which is not "
            "installed: `pip install 'rlsys[bridge]'`",
            only_here=True,
        )
    if config.reference_changes:
        yield Problem(
            f"{field}: reference.sync_steps mixes weights tensor by tensor, and {DISTRIBUTION}, "
            f"which has the weights of {shape.model_type}, cannot: leave it out"
        )
    if config.policy.fp8_param_gather:
        yield Problem(
            f"{field}: policy.fp8_param_gather is for rlsys's own models, and {DISTRIBUTION} "
            f"builds {shape.model_type}: leave it out"
        )
    if config.policy.pipeline_layout is not None:
        yield Problem(
            f"{field}: policy.pipeline_layout places the layers of rlsys's own models, and "
            f"{DISTRIBUTION} builds {shape.model_type}: leave it out"
        )


def _policy_layout(config: RunConfig, shape: ModelShape) -> Iterator[Problem]:
    policy = config.policy
    yield from _attention(config, policy.context_parallel_size, shape)
    tp, ep = policy.tensor_parallel_size, policy.expert_model_parallel_size
    yield from _megatron_tensor_parallel("policy.tensor_parallel_size", tp, shape)
    problems = list(layer_problems(policy, shape.num_layers))
    yield from problems
    if not problems:
        yield from _stages_without_experts(policy, shape)
    setting = f"policy.expert_model_parallel_size = {ep}"
    if not shape.is_moe:
        if ep > 1:
            yield Problem(
                f"{setting}, but the model has no experts to share ({shape.model_type} is dense): "
                "leave it out"
            )
    elif shape.experts.number % ep:
        yield Problem(
            f"{setting} does not divide the model's {shape.experts.number} experts: use "
            f"{_divisors(shape.experts.number)}"
        )
    elif ep == 1 and tp > 1:
        yield Problem(
            f"policy.tensor_parallel_size = {tp} does not cut the experts of {shape.model_type}, "
            f"and with {setting} no rank has all tokens of an expert: set "
            f"policy.expert_model_parallel_size to {tp}"
        )


def _engine_options(config: Config) -> Iterator[Problem]:
    device, on_cluster = guess_device(config), bool(os.environ.get("RAY_ADDRESS"))
    if device == "cpu" and config.device == "auto" and on_cluster:
        return  # the Ray cluster may have GPUs; the engine checks again
    known = device == "cuda" and not on_cluster and config.rollout.quantization is not None
    capability = gpu_compute_capability() if known else None
    yield from engine_option_problems(config, device=device, capability=capability)


def _memory_options(config: RunConfig, shape: ModelShape) -> Iterator[Problem]:
    device = guess_device(config)
    if device == "cpu" and config.device == "auto" and os.environ.get("RAY_ADDRESS"):
        return  # the Ray cluster may have GPUs; the engine checks again
    elsewhere = device == "cpu" or os.environ.get("RAY_ADDRESS")
    yield from memory_option_problems(
        config.policy,
        shape,
        device=device,
        dtype=config.model_dtype(on_cpu=device == "cpu"),
        capability=None if elsewhere else gpu_compute_capability(),
    )


def _stages_without_experts(policy: PolicyConfig, shape: ModelShape) -> Iterator[Problem]:
    """Their ranks would not take part where others sum the norm of the experts' gradient."""
    if not shape.is_moe:
        return
    for layers in rank_layers(policy, shape.num_layers):
        if not any(shape.layers[layer].has_experts for layer in layers):
            which = f"layers {', '.join(map(str, layers))}" if layers else "no layers"
            yield Problem(
                f"policy.pipeline_parallel_size = {policy.pipeline_parallel_size} makes a pipeline "
                f"rank with {which}, none of which has experts, which megatron-core cannot train "
                "beside ranks with experts: use fewer stages, or give it one with experts by "
                "policy.pipeline_layout"
            )


def _frozen_layout(
    config: RunConfig, name: str, section: ReferenceConfig | TeacherConfig, shape: ModelShape
) -> Iterator[Problem]:
    yield from _attention(config, section.context_parallel_size, shape)
    tp = section.tensor_parallel_size
    yield from _megatron_tensor_parallel(f"{name}.tensor_parallel_size", tp, shape)
    if shape.is_moe and shape.experts.number % tp:
        yield Problem(
            f"{name}.tensor_parallel_size = {tp}, over which experts are shared too, does "
            f"not divide the model's {shape.experts.number} experts"
        )


def _adapter(config: Config, shape: ModelShape) -> Iterator[Problem]:
    """Whether vLLM can sample with the policy's adapter, if the config asks for that."""
    if config.policy.lora is None or config.weight_sync.lora != "adapter":
        return
    try:
        config = with_stored_settings(config)
    except ValueError:  # `trained_problems` reports it
        return
    obstacle = adapter_obstacle(config, shape, guess_device(config))
    if obstacle is not None:
        yield Problem(f"weight_sync.lora = adapter, but {obstacle}: set weight_sync.lora to merged")


def _attention(
    config: RunConfig, context_parallel_size: int, shape: ModelShape
) -> Iterator[Problem]:
    problem = model_attention_problem(
        shape,
        backend=config.policy.attention_backend,
        context_parallel_size=context_parallel_size,
        device=guess_device(config),
        bridged=is_bridged(config, shape),
    )
    if problem is not None:
        yield problem


def _rollout_layout(config: Config, shape: ModelShape) -> Iterator[Problem]:
    tp = config.rollout.tensor_parallel_size
    # vLLM replicates KV heads, and cuts each expert.
    experts = {"experts' intermediate size": shape.experts.size} if shape.is_moe else {}
    yield from _tensor_parallel("rollout.tensor_parallel_size", tp, shape, experts)
    kv_heads = shape.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        yield Problem(
            f"rollout.tensor_parallel_size = {tp} neither divides the model's {kv_heads} KV heads "
            f"nor is a multiple of them: use {_divisors(kv_heads)}"
        )
    if guess_device(config) != "cpu":
        return
    if shape.linear is not None and config.model_dtype(on_cpu=True) != "bfloat16":
        yield Problem(
            f"{shape.model_type} has linear attention, which vLLM on CPU computes in bfloat16 "
            "only, and the model would be float32: set model.dtype to bfloat16"
        )
    if shape.latent is not None:
        if shape.latent.cached != CPU_LATENT_DIM:
            yield Problem(
                f"the model's kv_lora_rank + qk_rope_head_dim is {shape.latent.cached}, and vLLM "
                f"on CPU has latent attention for {CPU_LATENT_DIM}: use another model"
            )
    elif shape.head_dim not in CPU_HEAD_DIMS:
        yield Problem(
            f"the model's heads have {shape.head_dim} dimensions, and vLLM on CPU has attention "
            f"for {', '.join(map(str, CPU_HEAD_DIMS))}: use another model"
        )


def _kv_cache(config: Config, shape: ModelShape) -> Iterator[Problem]:
    """Whether one sequence fits: vLLM checks it too, after it has loaded the model."""
    size, device = config.rollout.kv_cache_memory_mb, guess_device(config)
    if size is None:
        return
    if config.device == "auto" and os.environ.get("RAY_ADDRESS"):
        device = "cuda"  # which the cluster may have; on a CPU a token takes more
    needed = kv_cache_bytes(config, shape, sequences=1, device=device)
    if size * 2**20 < needed:
        yield Problem(
            f"rollout.kv_cache_memory_mb = {size} does not hold one sequence of "
            f"{config.longest_row_is} = {config.longest_row} tokens, which takes "
            f"{needed / 2**20:,.1f} MiB: set it to at least {-(-needed // 2**20)}, or leave it out"
        )


def _megatron_tensor_parallel(field: str, tp: int, shape: ModelShape) -> Iterator[Problem]:
    """megatron-core cuts KV heads; ranks share experts whole."""
    yield from _tensor_parallel(field, tp, shape, {"KV heads": shape.num_kv_heads})


def _tensor_parallel(
    field: str, tp: int, shape: ModelShape, more: dict[str, int]
) -> Iterator[Problem]:
    """Sizes of the model that `tp` ranks have to divide; `more` are the engine's own."""
    sizes = {"attention heads": shape.num_heads, **more}
    if shape.has_dense_mlp:
        sizes["intermediate size"] = shape.intermediate_size
    if shape.experts.shared_size:
        sizes["shared expert's intermediate size"] = shape.experts.shared_size
    if shape.linear is not None:
        sizes["key heads of linear attention"] = shape.linear.key_heads
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    if wrong:
        yield Problem(
            f"{field} = {tp} does not divide the model's {', '.join(wrong)}: use "
            f"{_divisors(math.gcd(*sizes.values()))}"
        )


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
