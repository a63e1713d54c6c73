"""How much memory each process of a run needs: an estimate from config.json, before the start.

Weights, gradients and optimizer state are exact to a percent; activations are a rough guess for
rows of the greatest length. Measured on CPU with SmolLM2-135M in fp32: policy 5.2 GiB (estimate
5.2), rollout engine 2.3 (2.2), reference 1.5 (1.6). On an H200, two
engines of 1.5B parameters that share a GPU: 35.0 GiB (35.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlsys.config import Config
from rlsys.model.shape import ModelShape
from rlsys.types import Device

GIB = 2**30
_PROCESS_GIB = {
    ("policy", "cpu"): 0.5,
    ("rollout", "cpu"): 0.9,
    ("reference", "cpu"): 0.5,
    # CUDA context, NCCL buffers, workspaces.
    ("policy", "cuda"): 1.5,
    ("rollout", "cuda"): 1.5,
    ("reference", "cuda"): 1.5,
    ("reward_model", "cpu"): 0.5,
    ("reward_model", "cuda"): 0.5,  # no collectives
}
"""A process with its libraries loaded and no model; on cuda what it takes of the GPU."""
REWARD_GIB = 0.1
LOGPROB_CHUNK_TOKENS = 1024
"""Logits are computed for this many tokens at a time: 1024 x 151,936 in bf16 are 0.3 GB."""
LOGIT_COPIES = 4
"""Of an engine's logits in fp32: themselves, and what the sampler makes of them."""
BATCHED_TOKENS: dict[Device, int] = {"cpu": 8192, "cuda": 16384}
"""Prompt tokens of one step of an engine: on CPU larger gains nothing, on GPUs vLLM's default."""
KV_BLOCK_TOKENS: dict[Device, int] = {"cpu": 128, "cuda": 16}
"""Tokens of a block of the KV cache: vLLM's defaults. CPU kernels need multiples of 32."""
MAX_CPU_KV_GIB = 4
"""The largest KV cache of a rollout engine on CPU, unless rollout.kv_cache_memory_mb says."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one process of a role, of its largest rank."""

    role: str
    gib: dict[str, float]
    """GiB by purpose."""
    formula: dict[str, str] = field(default_factory=dict)
    """How each was computed, with the numbers."""

    @property
    def total_gib(self) -> float:
        """Sum over purposes."""
        return sum(self.gib.values())


def estimate_memory(
    config: Config, shape: ModelShape, reference_shape: ModelShape, *, device: Device
) -> list[MemoryEstimate]:
    """One estimate for each kind of process that holds a model."""
    estimates = [
        _policy(config, shape, device=device),
        _rollout(config, shape, device=device),
    ]
    if config.grpo.beta > 0:
        estimates.append(_reference(config, reference_shape, device=device))
    return estimates


def card_warnings(
    config: Config, estimates: Sequence[MemoryEstimate], card_gib: float
) -> list[str]:
    """Where what shares a GPU is estimated to need more memory than the GPU has.

    Args:
        config: of the run, on GPUs.
        estimates: of all roles that hold a model.
        card_gib: memory of a GPU.
    """
    by_role = {estimate.role: estimate for estimate in estimates}
    warnings = []
    needed, sharers = _policy_card_gib(config, by_role)
    if needed > card_gib:
        warnings.append(
            f"a GPU of the policy{sharers} needs about {needed:.1f} GiB and has {card_gib:.1f}: "
            "raise policy.tensor_parallel_size or policy.pipeline_parallel_size"
            + (", or policy.world_size" if config.policy.use_distributed_optimizer else "")
            + ", lower policy.max_tokens_per_micro_batch or policy.micro_batch_size, or set "
            "policy.recompute to full"
        )
    rollout = by_role["rollout"]
    # Beside the cache, whose size vLLM fits to the GPU.
    fixed = rollout.total_gib - rollout.gib["KV cache"]
    share = config.rollout.gpu_memory_utilization * card_gib / config.rollout.engines_per_gpu
    if config.rollout.kv_cache_memory_mb is not None:
        fixed, share = rollout.total_gib, card_gib / config.rollout.engines_per_gpu
    if fixed > share:
        warnings.append(
            f"a rollout engine needs about {fixed:.1f} GiB of a GPU beside its KV cache and may "
            f"take {share:.1f}: raise rollout.tensor_parallel_size, lower rollout.engines_per_gpu "
            "or rollout.max_num_seqs"
            if config.rollout.kv_cache_memory_mb is None
            else f"a rollout engine needs about {fixed:.1f} GiB and its share of a GPU is "
            f"{share:.1f}: lower rollout.kv_cache_memory_mb or rollout.engines_per_gpu, or raise "
            "rollout.tensor_parallel_size"
        )
    reference = by_role.get("reference")
    if (
        reference is not None
        and config.reference.placement == "own"
        and reference.total_gib > card_gib
    ):
        warnings.append(
            f"a GPU of the reference needs about {reference.total_gib:.1f} GiB and has "
            f"{card_gib:.1f}: raise reference.tensor_parallel_size"
        )
    return warnings


def _policy_card_gib(config: Config, by_role: Mapping[str, MemoryEstimate]) -> tuple[float, str]:
    """GiB on a GPU of the policy, and in words who shares it."""
    policy = by_role["policy"]
    at_work = policy.gib["activations"] + policy.gib["logits"]
    kept, sharers = policy.total_gib - at_work, []
    reference = by_role.get("reference")
    if reference is not None and config.reference.placement == "policy":
        # The two take turns; what a process itself takes stays.
        kept += reference.gib["process"]
        at_work = max(at_work, reference.total_gib - reference.gib["process"])
        sharers.append("the reference")
    reward_model = by_role.get("reward_model")
    if reward_model is not None and config.reward.reward_model_placement == "policy":
        kept += reward_model.total_gib * -(-len(config.reward.models) // config.policy.world_size)
        sharers.append("reward models")
    return kept + at_work, f", shared with {' and '.join(sharers)}," if sharers else ""


def estimate_reward_model(folder: Path, *, dtype: str, device: Device) -> MemoryEstimate | None:
    """Of a reward model, from the headers of its weight files; None where they tell nothing.

    Args:
        dtype: torch's name of the type that it is loaded in, or "auto" for that of the files.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    numbers = 0
    try:
        for file in files:
            with safe_open(file, framework="pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.offset_keys()]
                numbers += sum(map(math.prod, shapes))
    except SafetensorError:  # which is told when the model is loaded
        return None
    if not numbers:
        return None
    if dtype == "auto":
        size, text = sum(file.stat().st_size for file in files), "what its files hold"
    elif isinstance(torch_type := getattr(torch, dtype, None), torch.dtype):
        width = torch_type.itemsize
        size, text = numbers * width, f"{numbers / 1e6:,.1f} M parameters x {width} bytes"
    else:
        return None
    gib = {"process": _PROCESS_GIB["reward_model", device], "weights": size / GIB}
    return MemoryEstimate("reward_model", gib, {"weights": text})


def longest_row(config: Config) -> int:
    """Tokens of the longest prompt and completion that the config allows."""
    return config.data.max_prompt_length + config.rollout.max_completion_length


def micro_batch_tokens(config: Config) -> int:
    """Most tokens of a policy forward pass."""
    per_rank = config.global_batch_size // config.data_parallel_size
    if config.policy.max_tokens_per_micro_batch is not None:
        return min(config.policy.max_tokens_per_micro_batch, per_rank * longest_row(config))
    return min(config.policy.micro_batch_size, per_rank) * longest_row(config)


def rank_params(shape: ModelShape, *, tp: int, pp: int) -> int:
    """Parameters of the largest pipeline stage's rank; the last stage has a head of its own.

    Experts are not among them, see `rank_expert_params`.
    """
    layers = (shape.layer_params - shape.expert_params) * (shape.num_layers // pp)
    ends = 1 if shape.tied or pp > 1 else 2
    return (layers + ends * shape.embedding_params) // tp


def rank_expert_params(shape: ModelShape, *, ep: int, pp: int) -> int:
    """Parameters of the experts of a rank: whole ones."""
    return shape.expert_params // ep * (shape.num_layers // pp)


def _policy(config: Config, shape: ModelShape, *, device: Device) -> MemoryEstimate:
    policy = config.policy
    tp, pp = policy.tensor_parallel_size, policy.pipeline_parallel_size
    ep = policy.expert_model_parallel_size
    dense, experts = rank_params(shape, tp=tp, pp=pp), rank_expert_params(shape, ep=ep, pp=pp)
    params = dense + experts
    width = bytes_per_weight(config, device)
    cp = policy.context_parallel_size
    shards = expert_shards = 1
    if policy.use_distributed_optimizer:
        shards, expert_shards = config.data_parallel_size * cp, policy.world_size // (pp * ep)
    # AdamW's two moments; bf16 weights also have a master copy in fp32.
    state = 8 if width == 4 else 12
    tokens = -(-micro_batch_tokens(config) // cp)
    layers = shape.num_layers // pp
    per_layer = _activation_elements(shape)
    again = _recomputed_elements(config, shape)
    if policy.recompute == "full":
        elements, kept = layers * shape.hidden_size + per_layer, "each layer's input + one layer"
    else:
        # What one layer computes again is there once, in its backward pass.
        elements, kept = layers * (per_layer - again) + again, f"{layers} layers x {per_layer:,}"
        if again:
            kept = f"{layers} layers x {per_layer - again:,} + {again:,} of one layer"
    # The first stage holds the micro-batches of all stages behind it.
    activations = tokens * elements * width * pp / tp
    logits = _logit_bytes(shape, tokens, tp)
    logits_text = (
        f"{min(tokens, LOGPROB_CHUNK_TOKENS):,} tokens at a time x vocabulary "
        f"{shape.vocab_size:,} / TP x 4 bytes x 3 copies"
    )
    # The output weight's gradient, summed over chunks in fp32, and in the weight's own type.
    of_head, logit_width = (4 if width == 4 else 6), width
    copied = ""
    if config.model.fp32_lm_head and width < 4:
        of_head, logit_width, copied = of_head + 4, 4, " and its fp32 copy"
    logits += shape.embedding_params / tp * of_head
    logits_text += f", and the head's gradient{copied}, vocabulary / TP x hidden x {of_head} bytes"
    if not policy.recompute_logits:
        logits += tokens * shape.vocab_size / tp * logit_width
        logits_text += f", and {tokens:,} tokens kept x vocabulary / TP x {logit_width} bytes"
    return MemoryEstimate(
        "policy",
        {
            "process": _PROCESS_GIB["policy", device],
            "weights": params * width / GIB,
            "gradients": params * 4 / GIB,
            "optimizer": (dense / shards + experts / expert_shards) * state / GIB,
            "activations": activations / GIB,
            "logits": logits / GIB,
            "weight sync": _weight_sync_gib(config, shape, width),
        },
        {
            "parameters a rank": f"{params / 1e6:,.1f} M of {shape.num_params / 1e6:,.1f} M "
            f"(TP {tp}, PP {pp}" + (f", EP {ep})" if shape.is_moe else ")"),
            "weights": f"parameters x {width} bytes",
            "gradients": "parameters x 4 bytes (fp32)",
            "optimizer": f"parameters x {state} bytes (AdamW's moments"
            + (", fp32 copy" if state == 12 else "")
            + f") / {shards}"
            + (" ranks" if shards > 1 else "")
            + (f", of experts / {expert_shards}" if shape.is_moe else ""),
            "activations": f"{tokens:,} tokens x ({kept} numbers) x {width} bytes x PP / TP",
            "logits": logits_text,
        },
    )


def _recomputed_elements(config: Config, shape: ModelShape) -> int:
    """Of `_activation_elements`, what policy.recompute = selective computes again."""
    if config.policy.recompute != "selective":
        return 0
    of_module = {
        # The norm's output, which is the MLP's first input, and what is inside.
        "mlp": shape.hidden_size + _mlp_elements(shape),
        "core_attn": shape.num_heads * shape.head_dim,  # its output
    }
    return sum(of_module[module] for module in set(config.policy.recompute_modules))


def _rollout(config: Config, shape: ModelShape, *, device: Device) -> MemoryEstimate:
    rollout = config.rollout
    tp, width = rollout.tensor_parallel_size, bytes_per_weight(config, device)
    per_engine = -(-config.num_prompts // rollout.num_engines) * rollout.num_generations
    sequences = min(rollout.max_num_seqs, per_engine)
    token_bytes = shape.kv_elements_per_token(tp) * width
    if rollout.kv_cache_memory_mb is not None:
        kv_gib, kv_text = rollout.kv_cache_memory_mb / 1024, "rollout.kv_cache_memory_mb"
    elif device == "cpu" or rollout.engines_per_gpu > 1:
        kv_gib = rollout.max_num_seqs * longest_row(config) * token_bytes / GIB
        kv_text = (
            f"max_num_seqs {rollout.max_num_seqs} x {longest_row(config):,} tokens x "
            f"{token_bytes:,.0f} bytes"
        )
        if device == "cpu":
            kv_gib = min(kv_gib, MAX_CPU_KV_GIB)
            kv_text += f", {MAX_CPU_KV_GIB:g} GiB at most"
        else:
            kv_text += (
                f"; less where {rollout.gpu_memory_utilization:.0%} of a GPU / "
                f"{rollout.engines_per_gpu} engines has no room for it"
            )
    else:
        kv_gib = sequences * longest_row(config) * token_bytes / GIB
        kv_text = (
            f"{sequences} sequences x {longest_row(config):,} tokens x {token_bytes:,.0f} bytes "
            f"for none to wait; vLLM takes {rollout.gpu_memory_utilization:.0%} of its GPU in all"
        )
    params = shape.num_params / tp
    prompts = min(BATCHED_TOKENS[device], rollout.max_num_seqs * config.data.max_prompt_length)
    # The residual stream and its norm, q, k, v and what attention makes of them, and the MLP.
    activations = prompts * _activation_elements(shape) * width / tp
    return MemoryEstimate(
        "rollout",
        {
            "process": _PROCESS_GIB["rollout", device],
            "weights": params * width / GIB,
            "KV cache": kv_gib,
            "activations": activations / GIB,
            "logits": sampler_logit_bytes(config, shape) / GIB,
            # A bucket that is being loaded, and the next one; the policy has two as well.
            "weight sync": _weight_sync_gib(config, shape, width),
        },
        {
            "weights": f"parameters x {width} bytes / TP {tp}",
            "KV cache": kv_text,
            "activations": f"{prompts:,} prompt tokens a step x {_activation_elements(shape):,} "
            f"numbers of one layer x {width} bytes / TP",
            "logits": f"max_num_seqs {rollout.max_num_seqs} x vocabulary {shape.vocab_size:,} x 4 "
            f"bytes x {LOGIT_COPIES} copies",
            "weight sync": "2 x weight_sync.bucket_mb, or the embedding if it is larger, at most "
            "the weights; so in the policy",
        },
    )


def _reference(config: Config, shape: ModelShape, *, device: Device) -> MemoryEstimate:
    tp, width = config.reference.tensor_parallel_size, bytes_per_weight(config, device)
    tokens = -(-micro_batch_tokens(config) // config.reference.context_parallel_size)
    return MemoryEstimate(
        "reference",
        {
            "process": _PROCESS_GIB["reference", device],
            "weights": shape.num_params / tp * width / GIB,
            "activations": tokens * _activation_elements(shape) * width / tp / GIB,
            "logits": _logit_bytes(shape, tokens, tp) / GIB,
        },
        {
            "weights": f"parameters x {width} bytes / TP {tp}",
            "activations": "one layer: nothing is kept for a backward pass",
        },
    )


def kv_cache_bytes(config: Config, shape: ModelShape, *, sequences: int, device: Device) -> int:
    """Bytes of an engine rank's KV cache for `sequences` sequences of the greatest length.

    Some attention kernels of GPUs take larger blocks than KV_BLOCK_TOKENS, and then more memory.
    """
    block_tokens = KV_BLOCK_TOKENS[device]
    blocks_per_sequence = -(-longest_row(config) // block_tokens)
    blocks = sequences * blocks_per_sequence + 1  # vLLM keeps one for itself
    elements = shape.kv_elements_per_token(config.rollout.tensor_parallel_size)
    return blocks * block_tokens * elements * bytes_per_weight(config, device)


def sampler_logit_bytes(config: Config, shape: ModelShape) -> int:
    """Logits of a step of an engine, and what the sampler makes of them."""
    return LOGIT_COPIES * 4 * config.rollout.max_num_seqs * shape.vocab_size


def sync_bucket_bytes(config: Config, shape: ModelShape, width: int) -> int:
    """Of a bucket's buffer on either side: a tensor that is larger than a bucket is sent alone."""
    return max(config.weight_sync.bucket_mb * 2**20, shape.embedding_params * width)


def _weight_sync_gib(config: Config, shape: ModelShape, width: int) -> float:
    buffers = 2 * sync_bucket_bytes(config, shape, width)
    return min(buffers, shape.num_params * width) / GIB


def bytes_per_weight(config: Config, device: Device) -> int:
    """Of the type that policy, reference and engines hold weights in, and engines their cache."""
    return 4 if config.model_dtype(on_cpu=device == "cpu") == "float32" else 2


def _activation_elements(shape: ModelShape) -> int:
    """Numbers that a layer keeps of each token for its backward pass, with a fused attention."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # Both norms' inputs and outputs; q, k, v before and after the rotation; the attention's output.
    return 4 * shape.hidden_size + 2 * (q + 2 * kv) + q + _mlp_elements(shape)


def _mlp_elements(shape: ModelShape) -> int:
    if not shape.is_moe:
        return 3 * shape.intermediate_size  # gate, up and their product
    # The same of each expert of the token, with its copy of the input and its output; the router's.
    expert = 2 * shape.hidden_size + 3 * shape.moe_intermediate_size
    return shape.num_experts_per_tok * expert + 2 * shape.num_experts


def _logit_bytes(shape: ModelShape, tokens: int, tp: int) -> float:
    # fp32 logits, their exponentials and the gradient, chunk by chunk.
    return 3 * 4 * min(tokens, LOGPROB_CHUNK_TOKENS) * shape.vocab_size / tp
