"""Memory of one rank of the policy: see `rlsys.model.memory`.

Measured with Transformer Engine on an H200, Qwen2.5-1.5B's shape, micro-batches of 16,384 tokens:
59.3 GiB on one GPU (estimate 59.3), 50.6 on each of two replicas (50.7), 29.7 with TP 2 (29.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlsys.config import LoraConfig, PolicyConfig, RunConfig
from rlsys.config.pipeline_layout import rank_layers
from rlsys.model.families.base import HF_EMBEDDING, HF_OUTPUT
from rlsys.model.freezing import frozen_tensors, num_frozen
from rlsys.model.layer_memory import (
    attention_output,
    layer_numbers,
    mean_layer_numbers,
    mlp_numbers,
)
from rlsys.model.lora import PARAMETERS, adapter_table, plan_lora
from rlsys.model.pipeline import busiest_rank, rank_params
from rlsys.model.shape import ModelShape
from rlsys.types import Device

GIB = 2**30
LOGPROB_CHUNK_TOKENS = 1024
"""Logits are computed for this many tokens at a time: 1024 x 151,936 in bf16 are 0.3 GB."""
Tensor = tuple[str, float, str]
"""Purpose, bytes, and how the bytes are computed, with the numbers; empty: the name says it."""
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def policy_tensors(config: RunConfig, shape: ModelShape, device: Device) -> list[Tensor]:
    """What the largest rank of the policy holds."""
    policy = config.policy
    tp, pp = policy.tensor_parallel_size, policy.pipeline_parallel_size
    ep, cp = policy.expert_model_parallel_size, policy.context_parallel_size
    width = bytes_per_weight(config, device)
    dense, experts = rank_params(shape, rank_layers(policy, shape.num_layers), tp=tp, ep=ep)
    params = dense + experts
    tokens = -(-micro_batch_tokens(config) // cp)
    layout = f"TP {tp}, PP {pp}" + (f", EP {ep}" if shape.is_moe else "")
    rank = f"{params / 1e6:,.1f} M of {shape.num_params / 1e6:,.1f} M parameters ({layout})"
    grads = _DTYPE_BYTES[policy.main_grads_dtype]
    trained = _trained(policy, shape, dense, experts)
    adapters = trained.adapters * width
    text = f"{trained.text} x {grads} bytes ({policy.main_grads_dtype})"
    tensors: list[Tensor] = [
        ("weights", params * width + adapters, f"{rank} x {width} bytes{trained.beside}"),
        ("gradients", (trained.dense + trained.experts) * grads, text),
        ("optimizer", *_optimizer(config, trained, width)),
        ("activations", *_activations(config, shape, tokens, width, device)),
        ("logits", *_logits(config, shape, tokens, width, device)),
    ]
    if policy.fp8_format is not None and not policy.fp8_param_gather:
        head = 0 if shape.tied and pp == 1 else shape.head_params
        ends = (shape.embedding_params + head) / (tp * min(pp, 2))
        text = "weights of layers x 2 bytes: a copy for each direction of a product"
        tensors.insert(1, ("fp8 weights", (params - ends) * 2, text))
    return tensors


def optimizer_bytes(config: RunConfig, shape: ModelShape, device: Device) -> int:
    """Bytes of the optimizer's state on the device of the largest rank."""
    sizes = {purpose: size for purpose, size, _ in policy_tensors(config, shape, device)}
    return math.ceil(sizes["optimizer"])


def changing_bytes(config: RunConfig, shape: ModelShape, device: Device) -> float:
    """Bytes that an update changes on the largest rank: trained weights and optimizer state."""
    policy, width = config.policy, bytes_per_weight(config, device)
    stages = rank_layers(policy, shape.num_layers)
    tp, ep = policy.tensor_parallel_size, policy.expert_model_parallel_size
    trained = _trained(policy, shape, *rank_params(shape, stages, tp=tp, ep=ep))
    state = _state_bytes(policy, width)
    dense_shards, expert_shards = _shards(config)
    own = trained.dense / dense_shards + trained.experts / expert_shards
    weights = (trained.dense + trained.experts) * width
    return weights + own * (state.on_gpu + state.on_host)


@dataclass(frozen=True)
class _StateBytes:
    """Bytes of the optimizer's state for each parameter."""

    on_gpu: float
    on_host: float
    text: str


def _state_bytes(policy: PolicyConfig, width: int) -> _StateBytes:
    if policy.optimizer_cpu_offload:
        share = policy.optimizer_offload_fraction
        text = f"{1 - share:.0%} x 12 bytes (AdamW's moments, fp32 copy)"
        # Moments and weights in float32, and the gradient that was copied there.
        return _StateBytes(12 * (1 - share), 16 * share, text)
    if not policy.use_precision_aware_optimizer:
        state, copy = (8, "") if width == 4 else (12, ", fp32 copy")
        return _StateBytes(state, 0, f"{state} bytes (AdamW's moments{copy})")
    copied = _DTYPE_BYTES[policy.main_params_dtype]
    of_copy = f"{policy.main_params_dtype} copy"
    is_fp8 = policy.fp8_format is not None and policy.fp8_recipe != "delayed"
    if copied == 4 and not is_fp8:
        copied, of_copy = 2, "16 bits that bf16 weights lack of fp32"
    first, second = _DTYPE_BYTES[policy.exp_avg_dtype], _DTYPE_BYTES[policy.exp_avg_sq_dtype]
    total = first + second + copied
    text = f"{total} bytes (moments in {policy.exp_avg_dtype} and {policy.exp_avg_sq_dtype}, "
    return _StateBytes(total, 0, f"{text}{of_copy})")


@dataclass(frozen=True)
class _Trained:
    """Parameters of a rank that have gradients and optimizer state."""

    dense: float
    experts: float
    adapters: float = 0.0
    """Those of them that are beside the model's."""
    text: str = "parameters"

    @property
    def beside(self) -> str:
        return f", and {self.adapters / 1e6:,.1f} M of adapters" if self.adapters else ""


def _trained(policy: PolicyConfig, shape: ModelShape, dense: int, experts: int) -> _Trained:
    if policy.lora is not None:
        return _trained_adapters(policy, policy.lora, shape)
    if not policy.freezes:
        return _Trained(dense, experts)
    share = 1 - num_frozen(policy, shape) / shape.num_params
    text = f"parameters x {share:.1%} that are trained"
    return _Trained(dense * share, experts * share, text=text)


def _trained_adapters(policy: PolicyConfig, lora: LoraConfig, shape: ModelShape) -> _Trained:
    """Adapters, and modules that are trained whole, of the rank with the most layers."""
    tp, ep = policy.tensor_parallel_size, policy.expert_model_parallel_size
    layers = max(map(len, rank_layers(policy, shape.num_layers))) / shape.num_layers
    dense = experts = whole = 0.0
    for row in adapter_table(shape, plan_lora(lora, shape)):
        size = row.num_params / (1 if row.tp_axis is None else tp)
        if row.experts:
            experts += row.num_params / ep * layers
        elif row.names[0].startswith(PARAMETERS):
            dense += size * layers
        else:
            whole += size
    found = (dense + experts + whole) / 1e6
    text = f"{found:,.1f} M parameters of adapters" + (" and whole modules" if whole else "")
    # While the base computes, whole modules have a copy of their trained values.
    return _Trained(dense + whole, experts, dense + experts + whole, text)


def _shards(config: RunConfig) -> tuple[int, int]:
    """Ranks that share the optimizer's state of a parameter, and of one of an expert."""
    policy = config.policy
    if not policy.use_distributed_optimizer:
        return 1, 1
    stages = policy.pipeline_parallel_size * policy.expert_model_parallel_size
    return config.data_parallel_size * policy.context_parallel_size, policy.world_size // stages


def _optimizer(config: RunConfig, trained: _Trained, width: int) -> tuple[float, str]:
    state = _state_bytes(config.policy, width)
    shards, expert_shards = _shards(config)
    text = f"{trained.text} x {state.text} / {shards}" + (" ranks" if shards > 1 else "")
    text += f", of experts / {expert_shards}" if trained.experts else ""
    own = trained.dense / shards + trained.experts / expert_shards
    if state.on_host:
        text += f"; {own * state.on_host / GIB:.2f} GiB of host memory"
    return own * state.on_gpu, text


def _activations(
    config: RunConfig, shape: ModelShape, tokens: int, width: int, device: Device
) -> tuple[float, str]:
    """What forward passes keep for their backward passes."""
    policy = config.policy
    layers, in_flight = busiest_rank(policy, shape)
    # What is computed again may be the largest layer; what is kept is of layers of all kinds.
    numbers = (layer_numbers if policy.recompute == "full" else mean_layer_numbers)(shape, device)
    per_layer = _layer_bytes(policy, shape, numbers, width)
    whole = f"{per_layer:,.0f}"
    if policy.recompute == "full" and policy.recompute_method == "uniform":
        group = policy.recompute_num_layers
        kept = layers / group * shape.hidden_size * width + group * per_layer
        text = f"{layers / group:g} inputs of layers + {group} x {whole}"
    elif policy.recompute == "full":
        again = min(policy.recompute_num_layers, layers)
        kept = again * shape.hidden_size * width + (layers - again + 1) * per_layer
        text = f"{again} inputs of layers + {layers - again + 1} x {whole}"
    elif policy.recompute == "selective":
        again = sum(_module_numbers(name, shape, device) for name in set(policy.recompute_modules))
        # What a layer computes again exists for one layer at a time, in its backward pass.
        again *= width
        kept = layers * (per_layer - again) + again
        text = f"{layers} layers x {per_layer - again:,.0f} + {again:,.0f} of one layer"
    else:
        kept, text = layers * per_layer, f"{layers} layers x {whole}"
    num_bytes = tokens * kept * in_flight / policy.tensor_parallel_size
    batches = f"{in_flight:g} micro-batches in flight" if in_flight > 1 else "1 micro-batch"
    return num_bytes, f"{tokens:,} tokens x ({text} bytes) x {batches} / TP"


def _layer_bytes(policy: PolicyConfig, shape: ModelShape, numbers: int, width: int) -> float:
    """Bytes that a layer keeps of each token, which are `numbers` without FP8."""
    num_bytes = float(numbers * width)
    if policy.fp8_format is None or shape.is_moe or policy.lora is not None:
        return num_bytes  # adapters multiply the same inputs, and not in FP8
    # Inputs of products are kept in FP8. Attention and norms keep their own in the model's type.
    num_bytes -= (2 * shape.hidden_size + shape.intermediate_size) * (width - 1)
    return num_bytes + attention_output(shape)


def _module_numbers(name: str, shape: ModelShape, device: Device) -> int:
    """Numbers of each token that a layer does not keep if it computes module `name` again."""
    hidden, mlp = shape.hidden_size, mlp_numbers(shape)
    act = shape.experts.per_token * shape.experts.size
    # With experts the norm is a module of its own, and its output an input of the MLP.
    has_own_norm = shape.is_moe or device == "cpu"
    return {
        "mlp": mlp if shape.is_moe else hidden + mlp,
        "moe": mlp,
        "moe_act": act,
        "shared_experts": 3 * shape.experts.shared_size,
        "layernorm": hidden * (2 if device == "cpu" else int(has_own_norm)),
        "mla_up_proj": 2 * (2 * shape.num_heads * shape.head_dim + attention_output(shape)),
        # Fused attention keeps its output, which the next product keeps anyway.
        "core_attn": 0 if shape.linear is not None or device == "cuda" else attention_output(shape),
    }[name]


def _logits(
    config: RunConfig, shape: ModelShape, tokens: int, width: int, device: Device
) -> tuple[float, str]:
    if shape.num_labels is not None:
        return _score_bytes(config, shape, tokens, width)
    tp = config.policy.tensor_parallel_size
    copies, logit_width = _logit_copies(config), _logit_width(config, device)
    num_bytes = chunk_logit_bytes(config, shape, tokens, tp, device)
    text = (
        f"{min(tokens, LOGPROB_CHUNK_TOKENS):,} tokens at a time x vocabulary "
        f"{shape.vocab_size:,} / TP x {logit_width} bytes x {copies} copies"
    )
    # The output weight's gradient: summed over chunks in fp32, and in the weight's own type.
    head, kept_width = (
        (4 if width == 4 else 6) if _head_is_trained(config.policy, shape) else 0,
        width,
    )
    parts = ["its gradient"] if head else []
    if config.model.fp32_lm_head and width < 4:
        head, kept_width = head + 4, 4
        parts.append("an fp32 copy")
    num_bytes += shape.embedding_params / tp * head
    if parts:
        text += f", and of the head {' and '.join(parts)}, vocabulary / TP x hidden x {head} bytes"
    if not config.policy.recompute_logits:
        num_bytes += tokens * shape.vocab_size / tp * kept_width
        text += f", and {tokens:,} tokens kept x vocabulary / TP x {kept_width} bytes"
    return num_bytes, text


def _score_bytes(
    config: RunConfig, shape: ModelShape, tokens: int, width: int
) -> tuple[float, str]:
    """Of what a score head reads, which is far more than the scores."""
    copies = width + (4 if config.model.fp32_lm_head and width < 4 else 0)
    text = f"{tokens:,} tokens x hidden x {copies} bytes x 2, states before the score head"
    return 2 * tokens * shape.hidden_size * copies, f"{text} and their gradient"


def _head_is_trained(policy: PolicyConfig, shape: ModelShape) -> bool:
    name = HF_EMBEDDING if shape.tied else HF_OUTPUT
    if policy.lora is not None:
        return name in plan_lora(policy.lora, shape).saved
    return name not in frozen_tensors(policy, shape)


# --- sizes that the reference and the engines have, too -------------------------------------------


def micro_batch_tokens(config: RunConfig) -> int:
    """Most tokens of a policy forward pass."""
    per_rank = config.global_batch_size // config.data_parallel_size
    if config.policy.max_tokens_per_micro_batch is not None:
        return min(config.policy.max_tokens_per_micro_batch, per_rank * config.longest_row)
    rows = config.policy.micro_batch_size * config.rows_together
    return min(rows, per_rank) * config.longest_row


def bytes_per_weight(config: RunConfig, device: Device) -> int:
    """Bytes of a weight in policy, reference and engines, and of a number in the KV cache."""
    return 4 if config.model_dtype(on_cpu=device == "cpu") == "float32" else 2


def chunk_logit_bytes(
    config: RunConfig, shape: ModelShape, tokens: int, tp: int, device: Device
) -> float:
    """Bytes of the logits of one chunk, with what is computed from them."""
    numbers = min(tokens, LOGPROB_CHUNK_TOKENS) * shape.vocab_size / tp
    return _logit_copies(config) * _logit_width(config, device) * numbers


def _logit_copies(config: RunConfig) -> int:
    """Tensors as large as a chunk's logits: logits, exponentials, gradient, and penalties."""
    sampling = config.sampling
    counts = 2 if sampling.get("presence_penalty") or sampling.get("frequency_penalty") else 0
    return 3 + (sampling.get("repetition_penalty", 1.0) != 1.0) + counts


def _logit_width(config: RunConfig, device: Device) -> int:
    """Bytes of a number in these tensors: GPUs compute float32 within a kernel."""
    if device == "cpu" or config.model.fp32_lm_head:
        return 4
    return bytes_per_weight(config, device)
