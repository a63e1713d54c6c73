"""Models, batches and configs for GPUs: small, in sizes that every GPU kernel takes."""

from __future__ import annotations

import os

import torch
from policy_cases import LLAMA_3_ROPE
from tiny_models import save_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlsys.config import Config
from rlsys.types import TrainBatch

DEVICE = os.environ.get("RLSYS_GPU_TESTS_DEVICE", "cuda")
"""With "cpu" the tests' own code can be tried where there is no GPU."""
VOCAB_SIZE = 512
KINDS = {
    "llama-untied": (LlamaConfig, {"rope_parameters": LLAMA_3_ROPE}),
    "qwen2-tied": (Qwen2Config, {}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 128}),
    "qwen3-untied": (Qwen3Config, {"head_dim": 64}),
}


@torch.no_grad()
def save_gpu_model(folder, kind, *, seed=0, **sizes):
    """Write a random fp32 model of 4 layers, hidden 256, in which norms and biases matter too."""
    config_class, options = KINDS[kind]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        **{
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            **options,
            **sizes,
        },
        tie_word_embeddings=kind.endswith("-tied"),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(model, folder)
    # One stop token of 512, so that completions of a random model are long.
    GenerationConfig(pad_token_id=0, eos_token_id=1).save_pretrained(folder)


def gpu_config(folder, *, num_completions=16, longest=800, dtype="auto", beta=0.0, **policy):
    """A policy that takes a batch of rows of `longest` tokens at most in one optimizer step."""
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 100,
            "data": {"dataset": ["unused"], "max_prompt_length": 16},
            "model": {"path": str(folder), "dtype": dtype},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {
                "num_generations": 4,
                "generation_batch_size": num_completions,
                "max_completion_length": longest - 16,
            },
            "grpo": {"loss_type": "dapo", "beta": beta},
            "policy": {"lr": 1e-4, "timeout_s": 120.0, **policy},
        }
    )


def engine_config(folder, **rollout):
    """A rollout engine that takes little of a GPU."""
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1,
            "data": {"dataset": ["unused"], "max_prompt_length": 160},
            "model": {"path": str(folder)},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {
                "num_generations": 4,
                "generation_batch_size": 32,
                "max_completion_length": 512,
                "max_num_seqs": 64,
                "kv_cache_memory_mb": 256,
                "gpu_memory_utilization": 0.2,
                **rollout,
            },
            "weight_sync": {"bucket_mb": 1, "timeout_s": 60.0},
        }
    )


def long_batch(num_rows, longest, *, seed=0):
    """Rows of 20 to `longest` tokens, the first 10 of which are the prompt."""
    rng = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(20, longest + 1, (num_rows,), generator=rng)
    ids_NS = torch.randint(2, VOCAB_SIZE, (num_rows, longest), generator=rng)
    positions_S = torch.arange(longest)
    valid_NS = positions_S < lengths_N[:, None]
    mask_NS = valid_NS & (positions_S >= 10)
    return TrainBatch(
        input_ids=ids_NS.masked_fill(~valid_NS, 0),
        lengths=lengths_N,
        completion_mask=mask_NS,
        advantages=torch.randn(num_rows, 1, generator=rng) * mask_NS,
        rollout_logprobs=torch.zeros(num_rows, longest),
    )


@torch.no_grad()
def transformers_logprobs(folder, batch, *, dtype, attention="sdpa", **options):
    """[N, S] by plain transformers, one sequence at a time; 0 where masked."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, **options
    )
    model.to(DEVICE)
    logprobs = torch.zeros(batch.input_ids.shape)
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :length].to(DEVICE)
        log_softmax = model(ids).logits[0, :-1].float().log_softmax(-1)
        logprobs[row, 1:length] = log_softmax.gather(-1, ids[0, 1:, None])[:, 0].cpu()
    return logprobs * batch.completion_mask
