"""A policy that leaves its GPU: no bit changes, its memory is free, and how long each way takes."""

import hashlib
import json
import time
from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, gpu_config, long_batch, save_gpu_model
from gpu_lab import GpuRank
from policy_cases import exported
from tiny_models import save_tiny_qwen3_moe

from rlsys.actors.policy import PolicyActors

pytestmark = pytest.mark.gpu(1)

ROWS, LONGEST = 8, 200
BATCH = long_batch(ROWS, LONGEST)
PRECISION_AWARE = {"use_precision_aware_optimizer": True}
HALF_ON_CPU = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
FP8_PARAMETERS = {"fp8_format": "hybrid", "fp8_param_gather": True}
KINDS = {
    "bfloat16": {},
    "whole optimizer": {"use_distributed_optimizer": False},
    "LoRA": {"lora": {"rank": 8, "modules_to_save": ["embed_tokens"]}},
    "frozen": {"freeze_parameters": ["model.layers.0.", "model.embed_tokens"]},
    "experts": {},
}
TRANSFORMER_ENGINE = {
    "precision aware": PRECISION_AWARE | {"exp_avg_dtype": "bf16"},
    "moments in fp8": PRECISION_AWARE | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8"},
    "half on CPU": PRECISION_AWARE | HALF_ON_CPU,
    "fp8": {"fp8_format": "hybrid"},
    "fp8, delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "fp8 parameters": FP8_PARAMETERS,
    "fp8 parameters, blockwise": FP8_PARAMETERS | {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
}
if DEVICE == "cuda":
    KINDS |= TRANSFORMER_ENGINE
INEXACT = {"experts"}
"""Kinds of which two runs on a GPU may differ in the last bits, for the order of sums."""
MIB = 2**20
MAY_STAY_MIB = 220
"""Allocated by a policy that is away, 212 MiB here: what stands for a gradient where Transformer
Engine adds to `main_grad` itself, one for each shape of weights (116), cuBLAS's workspace (32) and
chunks of log-probs (64). In torch's allocator without its fragments."""
MAY_STAY_RESERVED_MIB = 260


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu-offload")
    save_gpu_model(root / "dense", "qwen3-untied", num_hidden_layers=2)
    sizes = {"hidden_size": 256, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 128, "max_position_embeddings": 4096}
    save_tiny_qwen3_moe(root / "experts", seed=0, **sizes)
    return {"dense": root / "dense", "experts": root / "experts"}


def config_of(folder, **options):
    return gpu_config(
        folder,
        num_completions=ROWS,
        longest=LONGEST,
        dtype="bfloat16",
        max_tokens_per_micro_batch=4 * LONGEST,
        **options,
    )


def held(rank):
    """Digests of the memory of all weights and all the optimizer's state."""
    from rlsys.engines.megatron.offload import _state_tensors, _storages

    offload, device = rank.engine.offload, rank.engine.offload._device
    tensors = [*offload._weight_tensors(), *_state_tensors(rank.engine.optimizer)]
    data = torch.empty(0, dtype=torch.uint8, device=device)
    return [
        hashlib.sha256(data.set_(storage).cpu().numpy().tobytes()).hexdigest()
        for storage in _storages(tensors, device).values()
    ]


def spoil_free_memory(rank):
    """Leave other numbers where the policy was: what is not brought back would be seen."""
    if DEVICE == "cuda":
        free, _ = torch.cuda.mem_get_info()
        garbage = torch.empty(min(free // 2, 8 * 2**30), dtype=torch.uint8, device="cuda")
        garbage.fill_(0xAB)
        torch.cuda.synchronize()
        del garbage
        torch.cuda.empty_cache()


def leave_and_return(policy):
    """Do what a colocated run does between two turns of the policy; returns what it sends."""
    policy.call("offload_optimizer")
    weights = exported(policy)
    policy.call("offload_weights")
    policy.call("run", spoil_free_memory)
    policy.call("onload")
    return weights


def run(policy, between):
    """Log-probs and metrics of two updates, and the weights; `between` is called between calls."""
    seen = []
    for _ in range(2):
        logprobs = policy.compute_logprobs(BATCH)[0]
        between(policy)
        output = policy.update(replace(BATCH, old_logprobs=logprobs))
        seen.append((logprobs, output.metrics))
        between(policy)
    return seen, exported(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_the_gpu_changes_no_bit(lab, folders, tmp_path, kind):
    config = config_of(folders["experts" if kind == "experts" else "dense"], **KINDS[kind])
    stayed, weights = run(lab.policy(config), lambda policy: None)
    policy = lab.policy(config)
    if DEVICE == "cpu":
        policy.call("move_on_cpu")
    found, found_weights = run(policy, leave_and_return)
    if kind not in INEXACT:
        for (logprobs, metrics), (expected, expected_metrics) in zip(found, stayed, strict=True):
            assert torch.equal(logprobs, expected)
            assert metrics == expected_metrics
        different = [
            n for n, tensor in weights.items() if not torch.equal(tensor, found_weights[n])
        ]
        assert not different
    before = policy.call("run", held)
    leave_and_return(policy)
    (tmp_path / "checkpoint").mkdir()
    policy.save_checkpoint(tmp_path / "checkpoint")  # waits for the state that is on its way
    assert policy.call("run", held) == before


def pinned_gb_per_s(to_host):
    """GB/s of one gibibyte between pinned memory and the GPU: the floor of what follows."""
    on_gpu = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    on_host = torch.zeros(2**30, dtype=torch.uint8, pin_memory=True)
    target, source = (on_host, on_gpu) if to_host else (on_gpu, on_host)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.monotonic()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 2**30 / 1e9 / (time.monotonic() - start)


def measure(rank):
    """Seconds, GB/s and the memory that stays, at the second of two absences."""
    offload = rank.engine.offload
    rates = [pinned_gb_per_s(to_host) for to_host in (True, False)]
    torch.cuda.empty_cache()
    for name in ("first", "usual"):
        torch.cuda.synchronize()
        times = [time.monotonic()]
        offload.offload_optimizer()
        times.append(time.monotonic())
        offload.offload_weights()
        times.append(time.monotonic())
        stays = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        largest = largest_allocations()
        moved = sum(
            size for copy in (offload._state, offload._weights) for _, size in copy._storages
        )
        offload.onload()
        times.append(time.monotonic())
        torch.cuda.synchronize()
        times.append(time.monotonic())
        if name == "first":
            first = times[2] - times[0]
    return {
        "moved_gb": moved / 1e9,
        "first_out_s": first,
        "out_begun_s": times[1] - times[0],
        "out_s": times[2] - times[0],
        "out_gb_per_s": moved / 1e9 / (times[2] - times[0]),
        "back_begun_s": times[3] - times[2],
        "back_s": times[4] - times[2],
        "back_gb_per_s": moved / 1e9 / (times[4] - times[2]),
        "floor_gb_per_s": {"out": rates[0], "back": rates[1]},
        "allocated_mib": stays[0] / MIB,
        "reserved_mib": stays[1] / MIB,
        "largest_mib": largest,
    }


def largest_allocations():
    """MiB of the ten largest tensors on the GPU, and workspaces of libraries."""
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    sizes = [block["size"] for block in blocks if block["state"] == "active_allocated"]
    return [round(size / MIB, 1) for size in sorted(sizes)[:-11:-1]]


@pytest.mark.skipif(DEVICE == "cpu", reason="measures GPU memory")
def test_the_memory_of_a_policy_that_left_is_free(gpus, tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    save_gpu_model(tmp_path / "model", "qwen3-untied", **sizes)
    # Processes that had another policy before keep some of its memory.
    policy = PolicyActors(
        config_of(tmp_path / "model"),
        device="cuda",
        place=gpus.rank_by_rank,
        rank_class=GpuRank,
    )
    policy.start()
    policy.update(BATCH, loss="sft")  # makes the optimizer's state
    (found,) = policy.call("run", measure)
    policy.update(BATCH, loss="sft")
    policy.close()
    print(json.dumps({name: _rounded(value) for name, value in found.items()}))
    assert found["moved_gb"] > 5.0  # 0.47 B parameters x 14 bytes
    assert found["allocated_mib"] < MAY_STAY_MIB
    assert found["reserved_mib"] < MAY_STAY_RESERVED_MIB


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value
