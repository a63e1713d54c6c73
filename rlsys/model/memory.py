"""How much memory each process of a run needs: an estimate from config.json, before the start.

Weights, gradients and optimizer state are exact to a percent; activations are those of rows of the
greatest length, and a rough guess but for dense layers on GPUs. Measured on CPU with SmolLM2-135M
in fp32: policy 5.2 GiB (estimate 5.2), rollout engine 2.3 (2.2), reference 1.5 (1.6). On an H200,
two engines of 1.5B parameters that share a GPU: 35.0 GiB (35.0).

In the code: tp, pp, ep and cp are the tensor, pipeline, expert and context parallel sizes; `width`
is the bytes of a weight, `params` the weights of a rank, `tokens` the tokens of a forward pass
on a rank. "numbers" are elements of tensors, not bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlsys.config import Config, ReferenceConfig, ReferencedConfig, RunConfig, TeacherConfig
from rlsys.model.adapters import adapter_numbers, slot_rank
from rlsys.model.folder import find_model_folder
from rlsys.model.kv_cache import KVLayers, cache_blocks, kv_layers
from rlsys.model.layer_memory import layer_numbers
from rlsys.model.policy_memory import (
    GIB,
    Tensor,
    bytes_per_weight,
    chunk_logit_bytes,
    micro_batch_tokens,
    policy_tensors,
)
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.model.weight_files import read_header, weight_files
from rlsys.types import Device

_PROCESS_GIB = {
    ("policy", "cpu"): 0.5,
    ("rollout", "cpu"): 0.9,
    ("reference", "cpu"): 0.5,
    # CUDA context, NCCL buffers, workspaces.
    ("policy", "cuda"): 1.5,
    ("rollout", "cuda"): 1.5,
    ("reference", "cuda"): 1.5,
    ("teacher", "cpu"): 0.5,
    ("teacher", "cuda"): 1.5,
    ("reward_model", "cpu"): 0.5,
    ("reward_model", "cuda"): 0.5,  # no collectives
}
"""Main memory (GPU memory on cuda) of a process that has loaded its libraries and no model."""
REWARD_GIB = 0.1
LOGIT_COPIES = 4
"""fp32 tensors of an engine's logits: the logits, and what the sampler computes from them."""
BATCHED_TOKENS: dict[Device, int] = {"cpu": 8192, "cuda": 16384}
"""Prompt tokens of an engine's step: vLLM's default on GPUs; on CPU more gain nothing."""
KV_BLOCK_TOKENS: dict[Device, int] = {"cpu": 128, "cuda": 16}
"""Tokens of a block of the KV cache: vLLM's defaults. CPU kernels need multiples of 32."""
MAX_CPU_KV_GIB = 4
"""The largest KV cache of a rollout engine on CPU, unless rollout.kv_cache_memory_mb is set."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one process of a role, its largest rank."""

    role: str
    gib: dict[str, float]
    """GiB by purpose."""
    formula: dict[str, str]
    """How each was computed, with the numbers."""

    @property
    def total_gib(self) -> float:
        """Sum over purposes."""
        return sum(self.gib.values())

    def plus(self, purpose: str, gib: float, formula: str = "") -> MemoryEstimate:
        """The same process, with something more that it holds."""
        formulas = {purpose: formula} if formula else {}
        return replace(self, gib=self.gib | {purpose: gib}, formula=self.formula | formulas)


def _estimate(role: str, device: Device, tensors: Sequence[Tensor]) -> MemoryEstimate:
    gib = {"process": _PROCESS_GIB[role, device]}
    gib |= {purpose: num_bytes / GIB for purpose, num_bytes, _ in tensors}
    return MemoryEstimate(role, gib, {purpose: text for purpose, _, text in tensors if text})


def estimate_policy(config: RunConfig, shape: ModelShape, *, device: Device) -> MemoryEstimate:
    """The policy's memory in a run without rollout engines, such as supervised training."""
    return _estimate("policy", device, policy_tensors(config, shape, device))


def estimate_memory(
    config: Config,
    shape: ModelShape,
    reference_shape: ModelShape,
    teacher_shape: ModelShape | None = None,
    *,
    device: Device,
) -> list[MemoryEstimate]:
    """One estimate for each kind of process that holds a model, besides reward models."""
    width = bytes_per_weight(config, device)
    sync: Tensor = ("weight sync", _weight_sync_bytes(config, shape, width), "")
    estimates = [
        _estimate("policy", device, [*policy_tensors(config, shape, device), sync]),
        _estimate("rollout", device, _rollout(config, shape, device)),
    ]
    if config.has_reference_model:
        estimates.append(estimate_reference(config, reference_shape, device=device))
    if teacher_shape is not None:
        estimates.append(estimate_teacher(config, teacher_shape, device=device))
    return estimates


def estimate_reference(
    config: ReferencedConfig, shape: ModelShape, *, device: Device
) -> MemoryEstimate:
    """The memory of a reference that is a model of its own."""
    return _estimate("reference", device, _frozen(config, config.reference, shape, device))


def estimate_teacher(config: RunConfig, shape: ModelShape, *, device: Device) -> MemoryEstimate:
    """The memory of the teacher."""
    assert config.used_teacher is not None
    return _estimate("teacher", device, _frozen(config, config.used_teacher, shape, device))


def with_head_of_teacher(
    config: RunConfig, policy: MemoryEstimate, teacher: ModelShape, device: Device
) -> MemoryEstimate:
    """The policy's memory with the teacher's output weight, by which its logits are computed."""
    tp, width = config.policy.tensor_parallel_size, bytes_per_weight(config, device)
    width += 4 if config.model.fp32_lm_head and width < 4 else 0  # a float32 copy
    gib = teacher.embedding_params / tp * width / GIB
    text = f"its vocabulary x its hidden size x {width} bytes / TP {tp}"
    return policy.plus("teacher's head", gib, text)


def estimate_reward_model(folder: Path, *, dtype: str, device: Device) -> MemoryEstimate | None:
    """The memory of a reward model, by the headers of its weight files; None if they do not say.

    Args:
        dtype: torch's name of the type that it is loaded in, or "auto" for that of the files.
    """
    import torch

    files = weight_files(folder)
    try:
        shapes = [tensor.shape for file in files for tensor in read_header(file).values()]
    except ValueError:  # reported when the model is loaded
        return None
    numbers = sum(map(math.prod, shapes))
    if not numbers:
        return None
    if dtype == "auto":
        size, text = sum(file.stat().st_size for file in files), "the size of its files"
    elif isinstance(torch_type := getattr(torch, dtype, None), torch.dtype):
        width = torch_type.itemsize
        size, text = numbers * width, f"{numbers / 1e6:,.1f} M parameters x {width} bytes"
    else:
        return None
    return _estimate("reward_model", device, [("weights", size, text)])


# --- sizes that the engines use, too -------------------------------------------------------------


def kv_block_tokens(shape: ModelShape, device: Device, tensor_parallel_size: int = 1) -> int:
    """Tokens of a block of the KV cache; vLLM's latent attention on CPU has one size.

    Blocks of all layers have one size, so that a block holds the state of a linear layer.
    """
    if shape.latent is not None:
        return 16
    tokens = KV_BLOCK_TOKENS[device]
    if shape.linear is None or not shape.num_kv_layers:
        return tokens
    per_token = shape.kv_elements_per_token(tensor_parallel_size) // shape.num_kv_layers
    return tokens * -(-shape.state_elements(tensor_parallel_size) // (per_token * tokens))


def kv_cache_bytes(config: Config, shape: ModelShape, *, sequences: int, device: Device) -> int:
    """Bytes of an engine rank's KV cache for `sequences` sequences of the greatest length.

    Some attention kernels of GPUs take larger blocks than KV_BLOCK_TOKENS, and then more memory.
    """
    return sum(
        _kv_cache_of_model(config, one, sequences=sequences, device=device)
        for one in _engine_models(config, shape)
    )


def _engine_models(config: Config, shape: ModelShape) -> list[ModelShape]:
    draft = draft_shape(config)
    return [shape] if draft is None else [shape, draft]


def _kv_cache_of_model(config: Config, shape: ModelShape, *, sequences: int, device: Device) -> int:
    tp = config.rollout.tensor_parallel_size
    block_tokens = kv_block_tokens(shape, device, tp)
    blocks = cache_blocks(
        _kv_layers(config, shape),
        row=config.longest_row,
        sequences=sequences,
        block_tokens=block_tokens,
    )
    elements = shape.kv_elements_per_token(tp) // shape.num_kv_layers
    return blocks * block_tokens * elements * bytes_per_weight(config, device)


def _kv_layers(config: Config, shape: ModelShape) -> list[KVLayers]:
    return kv_layers(shape, row=config.longest_row, prompt=config.data.max_prompt_length)


def engine_weight_bytes(config: Config, shape: ModelShape, device: Device) -> tuple[float, str]:
    """Bytes of the weights on an engine's rank, and where they come from.

    rollout.quantization leaves embeddings and the output layer as they are; norms and routers,
    which it leaves too, are too small to count.
    """
    tp, width = config.rollout.tensor_parallel_size, bytes_per_weight(config, device)
    if config.rollout.quantization is None:
        return shape.num_params / tp * width, f"parameters x {width} bytes / TP {tp}"
    kept = shape.embedding_params * (1 if shape.tied else 2)
    text = f"parameters x 1 byte (rollout.quantization), embeddings x {width} / TP {tp}"
    return (shape.num_params - kept + kept * width) / tp, text


def sampler_logit_bytes(config: Config, shape: ModelShape) -> int:
    """Bytes of the logits in an engine's step, with what the sampler computes from them."""
    return LOGIT_COPIES * 4 * config.rollout.max_num_seqs * shape.vocab_size


def sync_bucket_bytes(config: Config, shape: ModelShape, width: int) -> int:
    """Bytes of one send or receive buffer: bucket_mb, or the largest tensor if larger."""
    return max(config.weight_sync.bucket_mb * 2**20, shape.embedding_params * width)


# --- rollout engines and the reference -----------------------------------------------------------


def _rollout(config: Config, shape: ModelShape, device: Device) -> list[Tensor]:
    rollout = config.rollout
    tp, width = rollout.tensor_parallel_size, bytes_per_weight(config, device)
    prompts = min(BATCHED_TOKENS[device], rollout.max_num_seqs * config.data.max_prompt_length)
    numbers = layer_numbers(shape, device)
    return [
        ("weights", *engine_weight_bytes(config, shape, device)),
        *_adapter(config, shape, device, width),
        *_draft(config, device),
        ("KV cache", *_kv_cache(config, shape, device)),
        (
            "activations",
            prompts * numbers * width / tp,
            f"{prompts:,} prompt tokens per step x {numbers:,} numbers of one layer "
            f"x {width} bytes / TP",
        ),
        (
            "logits",
            sampler_logit_bytes(config, shape),
            f"max_num_seqs {rollout.max_num_seqs} x vocabulary {shape.vocab_size:,} x 4 bytes x "
            f"{LOGIT_COPIES} copies",
        ),
        (
            "weight sync",
            _weight_sync_bytes(config, shape, width),
            "2 x weight_sync.bucket_mb, or the embedding if it is larger, at most the weights. The "
            "policy holds as much.",
        ),
    ]


def _adapter(config: Config, shape: ModelShape, device: Device, width: int) -> Iterator[Tensor]:
    if numbers := adapter_numbers(config, shape, device):
        lora = config.policy.lora
        assert lora is not None
        text = f"A and B of rank {slot_rank(lora)} in every linear layer, embedding and head, "
        yield "adapter", numbers * width, f"({text}and two adapters that come) x {width} bytes"


def draft_shape(config: Config) -> ModelShape | None:
    """The model that drafts tokens for an engine; None without one, or if rlsys does not know it.

    Raises:
        ValueError: its folder is not here.
    """
    if config.rollout.draft_model is None:
        return None
    folder = find_model_folder(config.rollout.draft_model)
    try:
        return read_model_shape(folder)
    except ValueError:  # vLLM may know it
        return None


def _draft(config: Config, device: Device) -> list[Tensor]:
    shape, width = draft_shape(config), bytes_per_weight(config, device)
    if shape is None:
        return []
    tp = config.rollout.speculation.get(
        "draft_tensor_parallel_size", config.rollout.tensor_parallel_size
    )
    text = f"{shape.num_params / 1e6:,.0f} M parameters x {width} bytes / TP {tp}"
    return [("draft model", shape.num_params / tp * width, text)]


def _kv_cache(config: Config, shape: ModelShape, device: Device) -> tuple[float, str]:
    rollout = config.rollout
    if rollout.kv_cache_memory_mb is not None:
        return rollout.kv_cache_memory_mb * 2**20, "rollout.kv_cache_memory_mb"
    sequence_bytes, sequence = _sequence_bytes(config, shape, device)
    all_sequences = rollout.max_num_seqs * sequence_bytes
    text = f"max_num_seqs {rollout.max_num_seqs} x {sequence}"
    if device == "cpu":
        limit = MAX_CPU_KV_GIB * GIB
        return min(all_sequences, limit), f"{text}, {MAX_CPU_KV_GIB:g} GiB at most"
    share = f"{rollout.gpu_memory_utilization:.0%} of"
    if rollout.engines_per_gpu > 1:
        text += f"; less where {share} a GPU / {rollout.engines_per_gpu} engines has no room for it"
        return all_sequences, text
    per_engine = -(-config.num_prompts // rollout.num_engines) * rollout.num_generations
    sequences = min(rollout.max_num_seqs, per_engine)
    return (
        sequences * sequence_bytes,
        f"{sequences} sequences x {sequence} for none to wait; vLLM takes {share} its GPU in all",
    )


def _sequence_bytes(config: Config, shape: ModelShape, device: Device) -> tuple[float, str]:
    """Bytes of the longest sequence in an engine rank's KV cache, and where they come from."""
    total, texts = 0.0, []
    for one in _engine_models(config, shape):
        own, own_texts = _sequence_bytes_of_model(config, one, device)
        total += own
        texts += [text + ("" if one is shape else " of the draft model") for text in own_texts]
    return total, f"({' + '.join(texts)})" if len(texts) > 1 else texts[0]


def _sequence_bytes_of_model(
    config: Config, shape: ModelShape, device: Device
) -> tuple[float, list[str]]:
    tp, width = config.rollout.tensor_parallel_size, bytes_per_weight(config, device)
    elements = shape.kv_elements_per_token(tp) / shape.num_kv_layers
    total, texts = 0.0, []
    for kind in _kv_layers(config, shape):
        if kind.is_linear:
            state = shape.state_elements(tp) * width
            total += kind.layers * state
            texts.append(
                f"{kind.layers} linear layers x {state:,} bytes, a state of constant size instead "
                "of a KV cache"
            )
            continue
        token_bytes = kind.layers * elements * width
        total += kind.tokens * token_bytes
        of_windows = " of windowed layers" if kind.has_window else ""
        texts.append(f"{kind.tokens:,} tokens x {token_bytes:,.0f} bytes{of_windows}")
    return total, texts


def _frozen(
    config: RunConfig,
    section: ReferenceConfig | TeacherConfig,
    shape: ModelShape,
    device: Device,
) -> list[Tensor]:
    tp, width = section.tensor_parallel_size, bytes_per_weight(config, device)
    tokens = -(-micro_batch_tokens(config) // section.context_parallel_size)
    return [
        ("weights", shape.num_params / tp * width, f"parameters x {width} bytes / TP {tp}"),
        (
            "activations",
            tokens * layer_numbers(shape, device) * width / tp,
            "one layer: nothing is kept for a backward pass",
        ),
        ("logits", chunk_logit_bytes(config, shape, tokens, tp, device), ""),
    ]


def _weight_sync_bytes(config: Config, shape: ModelShape, width: int) -> float:
    """Two buckets: one that is packed or loaded, and one on its way."""
    return min(2 * sync_bucket_bytes(config, shape, width), shape.num_params * width)
