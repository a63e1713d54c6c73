"""The settings that vLLM is started with, on CPU and on GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlsys.config import Config, RolloutConfig
from rlsys.config.passed_through import vllm_option_problems
from rlsys.engines.vllm.routed_experts import OPTION as RETURN_EXPERTS
from rlsys.model.adapters import adapter_numbers, slot_rank, syncs_adapter
from rlsys.model.memory import (
    BATCHED_TOKENS,
    GIB,
    MAX_CPU_KV_GIB,
    bytes_per_weight,
    engine_weight_bytes,
    kv_block_tokens,
    kv_cache_bytes,
    sampler_logit_bytes,
    sync_bucket_bytes,
)
from rlsys.model.shape import ModelShape
from rlsys.problems import ProblemsError
from rlsys.types import Device, SampleRequest

if TYPE_CHECKING:
    from rlsys.model.stop_tokens import StopRules

# vLLM captures CUDA graphs for steps of at most this many tokens by default: one of each sequence,
# and those that were drafted for it. A larger decode step would run kernel by kernel, at half the
# tokens per second.
GRAPH_TOKENS = 512
# rollout.quantization -> vLLM's name of it. Its own "fp8" is for checkpoints in FP8 (from 0.32).
QUANTIZATION = {"fp8": "fp8_per_tensor", "fp8_per_block": "fp8_per_block"}
# Memory of an engine on a shared GPU for CUDA context and graphs, and activations of prompts.
SHARED_GPU_RESERVE_BYTES = 3 * 2**30
# A bucket that is being loaded, the next one, and in the first update the tensors that wait for the
# rest of their layer.
SYNC_BUCKETS = 3


def rollout_env(device: Device) -> dict[str, str]:
    """Environment of a rollout engine's process, to be set before its first import."""
    env = {
        # The engine runs in the actor's own process: one import of vLLM instead of two, and an
        # error at start-up is the engine's own instead of "see root cause above".
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
        # Warnings about vLLM's own use of torch hide what matters to a user.
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Progress bars with many lines in a log; a warning for each host name without an entry.
        "TQDM_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if device == "cpu":
        return env | {
            # The policy and other engines share the cores, so no process is bound to one.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # vLLM compiles small functions even in eager mode: half a minute of C++ compiling.
            "TORCHDYNAMO_DISABLE": "1",
            # Warnings that nobody can act on: no Triton, memory bound to the only NUMA node.
            "TORCH_LOGS": "-torch._library",
        }
    return env | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def engine_arguments(
    config: Config,
    shape: ModelShape,
    *,
    device: Device,
    engine_rank: int,
    gpu_bytes: int | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, except model and weight transfer.

    Args:
        gpu_bytes: memory of the engine's GPU; needed only if engines share it.

    Raises:
        ValueError: engines that share a GPU do not fit, or this host's vLLM does not have an
            option of rollout.engine_kwargs.
    """
    rollout = config.rollout
    tensor_parallel_size = rollout.tensor_parallel_size
    arguments: dict[str, Any] = {
        "dtype": config.model_dtype(on_cpu=device == "cpu"),
        "max_model_len": config.longest_row,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        # Without this vLLM uses Ray if it runs in an actor.
        "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else "uni",
        "gpu_memory_utilization": rollout.gpu_memory_utilization / rollout.engines_per_gpu,
        # Log-probs of the sampling distribution, after temperature, top_k and top_p.
        "logprobs_mode": "processed_logprobs",
        # Sampling parameters come from the config, stop tokens from `read_stop_rules`.
        "generation_config": "vllm",
        # vLLM decodes tokens only to find stop texts, which costs time for every token.
        "skip_tokenizer_init": not config.rollout.stop,
        "seed": config.seed + engine_rank,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Without this a config.json that lacks architectures gives a model without output head.
        "hf_overrides": {"architectures": [shape.family.architecture]},
    }
    if rollout.router_replay:
        arguments[RETURN_EXPERTS] = True
    if syncs_adapter(config, shape, device):
        arguments |= _adapter_arguments(config)
    if config.model.fp32_lm_head:
        arguments["hf_overrides"]["head_dtype"] = "float32"
    if rollout.quantization is not None:
        arguments["quantization"] = QUANTIZATION[rollout.quantization]
    if rollout.speculative_config is not None:
        arguments["speculative_config"] = rollout.speculation
    cache_bytes = _kv_cache_bytes(config, shape, device, gpu_bytes)
    if cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = cache_bytes
    if device == "cpu":
        arguments |= cpu_arguments(config.longest_row, shape, tensor_parallel_size)
    else:
        arguments |= _gpu_arguments(config)
    if problems := vllm_option_problems(config):  # this host may have another vLLM
        raise ProblemsError("rollout.engine_kwargs", problems)
    return arguments | rollout.engine_kwargs


def _gpu_arguments(config: Config) -> dict[str, Any]:
    """Arguments of engines on GPUs only."""
    arguments: dict[str, Any] = {}
    rollout = config.rollout
    decoded = rollout.max_num_seqs * (1 + rollout.speculation.get("num_speculative_tokens", 0))
    if decoded > GRAPH_TOKENS:
        arguments["max_cudagraph_capture_size"] = decoded
    if config.is_colocated:
        # The engine starts before the policy, on a GPU that it has for itself, and takes its share
        # of the whole GPU. It gives that back before the policy starts.
        arguments["enable_sleep_mode"] = True
    return arguments


def _adapter_arguments(config: Config) -> dict[str, Any]:
    """A slot for one adapter."""
    assert config.policy.lora is not None
    rank = slot_rank(config.policy.lora)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


def cpu_arguments(
    longest: int, shape: ModelShape | None, tensor_parallel_size: int
) -> dict[str, Any]:
    """Arguments of every vLLM engine on CPU.

    Args:
        longest: tokens of the longest sequence.
        shape: of the model; None if rlsys does not know it, then vLLM's defaults hold.
        tensor_parallel_size: of the engine.
    """
    arguments: dict[str, Any] = {
        "enforce_eager": True,
        # With chunked prompts a request draws one number per chunk from its own generator, and
        # vLLM takes the draws back in a way that CPU generators do not support.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(BATCHED_TOKENS["cpu"], longest),
    }
    if shape is not None:
        arguments["block_size"] = kv_block_tokens(shape, "cpu", tensor_parallel_size)
        if shape.linear is not None:
            # To cache the states of prompts, vLLM has to read them in chunks.
            arguments["enable_prefix_caching"] = False
    return arguments


def sampling_arguments(
    rollout: RolloutConfig, stops: StopRules, request: SampleRequest
) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for the completions of a request."""
    return {
        "n": request.num_generations,
        "temperature": request.temperature,
        "top_p": rollout.top_p if request.top_p is None else request.top_p,
        "top_k": rollout.top_k if request.top_k is None else request.top_k,
        **rollout.min_p_and_penalties,
        "max_tokens": rollout.max_completion_length,
        "stop_token_ids": stops.token_ids,
        "stop": stops.texts,
        "seed": request.seed,
        "logprobs": 0,  # only the sampled token's
        "detokenize": bool(stops.texts),  # vLLM finds stop texts in the decoded text
        # A stop text may contain special tokens, such as "</answer>" of some tokenizers.
        "skip_special_tokens": rollout.skip_special_tokens is True,
    }


def _kv_cache_bytes(
    config: Config, shape: ModelShape, device: Device, gpu_bytes: int | None
) -> int | None:
    """KV cache of each of an engine's ranks; None if vLLM measures what is free on its GPU.

    It is rollout.kv_cache_memory_mb if set. Else an engine on CPU or on a shared GPU gets room for
    max_num_seqs full sequences, on CPU at most MAX_CPU_KV_GIB.
    """
    rollout = config.rollout
    if rollout.kv_cache_memory_mb is not None:
        wanted = rollout.kv_cache_memory_mb * 2**20
    elif device == "cuda" and rollout.engines_per_gpu == 1:
        return None
    else:
        wanted = kv_cache_bytes(config, shape, sequences=rollout.max_num_seqs, device=device)
        wanted = min(wanted, MAX_CPU_KV_GIB * GIB) if device == "cpu" else wanted
    if device == "cuda" and rollout.engines_per_gpu > 1:
        assert gpu_bytes is not None
        return _fit_to_shared_gpu(wanted, config, shape, gpu_bytes)
    return wanted


def _fit_to_shared_gpu(wanted: int, config: Config, shape: ModelShape, gpu_bytes: int) -> int:
    """`wanted` bytes of KV cache, or less if the engine's share of its GPU has no room for them.

    vLLM itself would measure what is free while other engines take memory and return it.

    Raises:
        ValueError: one sequence does not fit, or the size in the config does not.
    """
    rollout, width = config.rollout, bytes_per_weight(config, "cuda")
    share = int(rollout.gpu_memory_utilization * gpu_bytes / rollout.engines_per_gpu)
    bucket = sync_bucket_bytes(config, shape, width)
    logits = sampler_logit_bytes(config, shape)
    weights, _ = engine_weight_bytes(config, shape, "cuda")
    held = weights + width * adapter_numbers(config, shape, "cuda")
    taken = held + SYNC_BUCKETS * bucket + logits + SHARED_GPU_RESERVE_BYTES
    least, what = kv_cache_bytes(config, shape, sequences=1, device="cuda"), "one full sequence"
    if rollout.kv_cache_memory_mb is not None:
        least, what = wanted, f"rollout.kv_cache_memory_mb = {rollout.kv_cache_memory_mb}"
    if share - taken < least:
        raise ValueError(
            f"rollout.engines_per_gpu = {rollout.engines_per_gpu} leaves each engine "
            f"{share / 2**30:.1f} GiB of its GPU (rollout.gpu_memory_utilization = "
            f"{rollout.gpu_memory_utilization:g} of {gpu_bytes / 2**30:.1f}), of which weights, "
            f"weight sync, logits, graphs and activations take {taken / 2**30:.1f}: {what} needs "
            f"{least / 2**30:.1f} and does not fit into the rest. Lower engines_per_gpu"
        )
    return min(int(share - taken), wanted)


def refusal(folder: Path, error: ValidationError) -> str:
    """One line that says why vLLM does not accept a model or its settings.

    vLLM checks both in the same objects: an architecture that it does not support, or a
    max_model_len beyond the model's positions.
    """
    reasons = []
    for problem in error.errors():
        reason = problem["msg"].removeprefix("Value error, ")
        setting = ".".join(map(str, problem["loc"]))
        reasons.append(f"{setting} = {problem['input']!r}: {reason}" if setting else reason)
    text = " ".join("; ".join(reasons).split())
    return f"vLLM does not accept the model {folder} with these settings: {text}"
