"""Measures one policy update on GPUs: seconds, MFU and memory, by setting, without Ray and vLLM.

    python benchmarks/policy_update.py                      # Qwen2.5-1.5B's shape, random weights
    python benchmarks/policy_update.py --variants default keep_logits --profile
    python benchmarks/policy_update.py --shape qwen2.5-3b --memory-limit-gb 80 --reference \
        --variants recompute_selective recompute_full
    python benchmarks/policy_update.py --variants dp2 dp2_no_overlap tp2     # on two GPUs
    python benchmarks/policy_update.py --sft --variants default fp8 offload lora
    python benchmarks/policy_update.py --sft --shape qwen2.5-7b --rows 16 --tokens 2048 \
        --variants tp2 tp2+lora                                              # on two GPUs
    python benchmarks/policy_update.py --device cpu --shape tiny --rows 4 --tokens 64

An update is everything that `MegatronPolicy.update` does with `--rows` rows of `--tokens` tokens:
packing, forward, backward, gradient norm, AdamW; with --sft, the loss of supervised training on
all of their tokens. Names with a + are several settings at once. Each variant has processes of its
own and a time limit; one that fails leaves an "error" in its place.

    MFU = FLOPs of the model / (seconds x GPUs x peak)
    FLOPs a token = 6 x parameters + 12 x layers x heads x head_dim x length / 2
    with LoRA     = 4 x parameters + 6 x parameters of adapters + the same for attention

Parameters count the head, tied or not, and no other embedding; length / 2 because attention is
causal; what recompute adds is not counted; a frozen weight needs no gradient, which is a third of
its products. The peak is 990 TFLOP/s: bfloat16, dense, H100 or H200, of FP8 too. The floor is these
FLOPs at the peak, then the optimizer's bytes at 4.8 TB/s: what it reads and writes once. Peaks of
memory, torch's, stand beside the estimate of `rlsys explain` for the same tensors. Prints JSON;
progress goes to stderr.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import describe_machine
from random_model import SHAPES, save_random_model
from torch.autograd import DeviceType

from rlsys.config import Config
from rlsys.model import policy_memory
from rlsys.model.memory import estimate_memory
from rlsys.model.shape import read_model_shape
from rlsys.types import TrainBatch
from rlsys.weight_sync.transport import serve_store

PEAK_FLOPS = 990e12
BANDWIDTH = 4.8e12
"""Bytes a second of an H200's memory."""
BF16_STATE = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bf16",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}
OFFLOAD = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
VARIANTS = {
    "default": {},
    "keep_logits": {"recompute_logits": False},
    "chunk_2048": {"chunk": 2048},
    "chunk_4096": {"chunk": 4096},
    "keep_logits_chunk_4096": {"recompute_logits": False, "chunk": 4096},
    "unfused_weight_gradients": {"fuse_weight_gradients": False},
    "recompute_selective": {"recompute": "selective"},
    "recompute_full": {"recompute": "full"},
    "recompute_groups": {"recompute": "full", "recompute_num_layers": 4},
    "recompute_block": {
        "recompute": "full",
        "recompute_method": "block",
        "recompute_num_layers": 14,
    },
    "recompute_core_attn": {"recompute": "selective", "recompute_modules": ["core_attn"]},
    "precision_aware": {"use_precision_aware_optimizer": True},
    "bf16_state": BF16_STATE,
    "offload": OFFLOAD,
    "offload_half": OFFLOAD | {"optimizer_offload_fraction": 0.5},
    "offload_overlap": OFFLOAD | {"overlap_cpu_optimizer_d2h_h2d": True},
    "fp8": {"fp8_format": "hybrid"},
    "fp8_delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "fp8_blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "fp8_params": {"fp8_format": "hybrid", "fp8_param_gather": True},
    "lora": {"lora": {"rank": 8, "alpha": 32, "target_modules": "all-linear"}},
    "attention_fused": {"attention_backend": "fused"},
    "attention_flash": {"attention_backend": "flash"},
    "dp2": {"world_size": 2},
    "dp2_no_overlap": {"world_size": 2, "overlap_grad_reduce": False},
    "tp2": {"world_size": 2, "tensor_parallel_size": 2},
    "pp2": {"world_size": 2, "pipeline_parallel_size": 2},
    "cp2": {"world_size": 2, "context_parallel_size": 2},
}
"""Settings of policy.*, and `chunk` (tokens of a chunk of logits) and `fuse_weight_gradients`,
which are no settings. Every data-parallel rank has as many rows as one rank alone."""
KERNELS = {
    "attention": ("fmha", "flash", "attn", "attention", "sdpa"),
    "communication": ("nccl", "c10d"),
    "gemm": ("gemm", "nvjet", "cutlass", "matmul", "addmm", "aten::mm"),
    "optimizer": ("adam", "multi_tensor", "l2norm"),
    "copy and fill": ("memcpy", "memset", "fill", "copy"),
    "compiled": ("triton",),
    "norm and rope": ("norm", "rope"),
}
"""Kinds of kernels by what their names contain, first match; the rest is "other"."""
RANGES = ("_ChunkedLogprobs", "_ChunkedLogprobsBackward", "Optimizer.step")
"""Whose kernels are also summed by who launched them; a name may go on after a #."""


def main():
    arguments = parse_arguments()
    if arguments.save_model:
        save_random_model(Path(arguments.save_model), arguments.shape, arguments.device)
        return
    if arguments.rank is not None:
        result = measure(arguments)
        if arguments.rank == 0:
            Path(arguments.result).write_text(json.dumps(result))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        if error := run([{}], arguments, ["--save-model", str(model)], timeout_s=300):
            sys.exit(f"no model: {error}")
        for name in arguments.variants:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = run_variant(name, arguments, Path(folder))
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    shown = (
        "shape",
        "sft",
        "rows",
        "tokens",
        "tokens_per_micro_batch",
        "memory_limit_gb",
        "reference",
    )
    settings = {key: vars(arguments)[key] for key in shown}
    report = {"machine": describe_machine(), **settings, "variants": results}
    print(json.dumps(report, indent=2))


def run_variant(name, arguments, folder):
    """The result of one variant: what rank 0 measured, or its error."""
    world_size = settings_of(name).get("world_size", 1)
    store = serve_store("127.0.0.1", arguments.timeout)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(world_size)))).split(",")
    if arguments.device == "cuda" and len(gpus) < world_size:
        return {"error": f"needs {world_size} GPUs"}
    result = folder / f"{name}.json"
    environments = [
        {"CUDA_VISIBLE_DEVICES": gpus[rank] if arguments.device == "cuda" else ""}
        for rank in range(world_size)
    ]
    own = ["--variants", name, "--port", str(store.port), "--result", str(result)]
    own += ["--model", str(folder / "model")]
    error = run(environments, arguments, own, timeout_s=arguments.timeout)
    return {"error": error} if error else json.loads(result.read_text())


def settings_of(name):
    """The settings of a variant, or of several with + between their names."""
    return {key: value for part in name.split("+") for key, value in VARIANTS[part].items()}


def run(environments, arguments, options, *, timeout_s):
    """One process of this script for each environment; returns why it failed, or None."""
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], *options, "--rank", str(rank)],
                env=os.environ | environment,
                stdout=output,
                stderr=output,
            )
            for rank, environment in enumerate(environments)
        ]
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            codes = [process.poll() for process in processes]
            if any(codes) or None not in codes:  # other ranks wait for a rank that failed
                break
            time.sleep(0.2)
        for process in processes:
            process.kill()
            process.wait()
        if any(codes):
            return f"exit codes {codes}{said(output)}"
        return f"took more than {timeout_s:g} s{said(output)}" if None in codes else None


def said(output):
    output.seek(0)
    return ": " + output.read()[-3000:]


def measure(arguments):
    """Run one rank of one variant, in a process of its own."""
    settings = settings_of(arguments.variants[0])
    chunk = settings.pop("chunk", None)
    fuse = settings.pop("fuse_weight_gradients", True)
    config = make_config(arguments, settings)
    policy = make_policy(config, arguments, chunk=chunk, fuse=fuse)
    batch = random_batch(len_of(config), arguments.tokens, policy.hf_config.vocab_size)
    reference_s = reference_seconds(config, batch, policy) if arguments.reference else None
    loss = "sft" if arguments.sft else None
    started = time.perf_counter()
    losses = [update(policy, batch, loss)]
    first_s = time.perf_counter() - started
    reset_peak(policy)
    seconds = []
    for _ in range(arguments.repeats):
        seconds.append(timed(lambda: losses.append(update(policy, batch, loss)), policy))
    logprobs_s = [timed(lambda: policy.compute_logprobs(batch), policy) for _ in range(2)][-1]
    result = summary(config, arguments, policy, statistics.median(seconds)) | {
        "settings": settings_of(arguments.variants[0]),
        "losses": losses,
        "first_update_s": first_s,
        "all_s": seconds,
        "compute_logprobs_s": logprobs_s,
    }
    if reference_s is not None:
        result["reference_logprobs_s"] = reference_s
    if not policy.on_cpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        result["estimate_gib"] = estimated_gib(config, policy)
    if arguments.profile:
        result["profile"] = profile(lambda: policy.update(batch), on_cpu=policy.on_cpu)
    return result


def update(policy, batch, loss):
    """The loss of an update, on the rank that has it."""
    output = policy.update(batch, loss=loss)
    return None if output is None else output.metrics["loss"]


def estimated_gib(config, policy):
    """What `rlsys explain` says, by purpose, but for the process and weight sync, and in all."""
    shape = read_model_shape(policy.folder)
    estimate = estimate_memory(config, shape, shape, device="cuda")[0].gib
    parts = {name: gib for name, gib in estimate.items() if name not in ("process", "weight sync")}
    return parts | {"all": sum(parts.values())}


def make_policy(config, arguments, *, chunk, fuse):
    from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu

    if arguments.device == "cpu":
        enable_megatron_on_cpu()
    if arguments.memory_limit_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.memory_limit_gb * 1e9 / total)
    from rlsys.engines.megatron import parallel as parallel_layout
    from rlsys.engines.megatron import policy as megatron

    policy, timeout_s = config.policy, float(arguments.timeout)
    torch.set_num_threads(policy.cpu_threads)  # as a run's ranks do
    store = torch.distributed.TCPStore("127.0.0.1", arguments.port, is_master=False)
    layout = parallel_layout.ParallelLayout(
        rank=arguments.rank,
        world_size=policy.world_size,
        tensor_parallel_size=policy.tensor_parallel_size,
        pipeline_parallel_size=policy.pipeline_parallel_size,
        expert_model_parallel_size=policy.expert_model_parallel_size,
        context_parallel_size=policy.context_parallel_size,
        timeout_s=timeout_s,
    )
    parallel_layout.initialize_parallel(layout, store, device=arguments.device, seed=0)
    if chunk is not None:
        policy_memory.LOGPROB_CHUNK_TOKENS = chunk
    if not fuse:
        megatron.fuse_weight_gradients = lambda model: None
    return megatron.MegatronPolicy(config, device=arguments.device)


def make_config(arguments, settings):
    policy = {"max_tokens_per_micro_batch": arguments.tokens_per_micro_batch, **settings}
    parts = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
    replicas = policy.get("world_size", 1) // math.prod(policy.get(part, 1) for part in parts)
    prompt = arguments.tokens // 8
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 100,
            "device": arguments.device,
            "data": {"dataset": ["unused"], "max_prompt_length": prompt},
            "model": {"path": arguments.model},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {
                "num_generations": 4,
                "generation_batch_size": arguments.rows * replicas,
                "max_completion_length": arguments.tokens - prompt,
            },
            "grpo": {"beta": 0.01 if arguments.reference else 0.0},
            "policy": policy,
        }
    )


def len_of(config):
    return config.rollout.generation_batch_size


def random_batch(rows, tokens, vocabulary):
    """Rows of the same length, of which one eighth is the prompt."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(tokens).expand(rows, tokens) >= tokens // 8
    return TrainBatch(
        input_ids=torch.randint(2, vocabulary, (rows, tokens), generator=rng),
        lengths=torch.full((rows,), tokens),
        completion_mask=mask,
        advantages=torch.randn(rows, 1, generator=rng) * mask,
        rollout_logprobs=-1.0 * mask,
    )


def reference_seconds(config, batch, policy):
    """Seconds of ref_logprobs, with the copy of the weights to the GPU and back.

    The batch gets other numbers: they take the same time in an update, and every rank knows them.
    """
    from rlsys.engines.megatron.reference import MegatronReference

    reference = MegatronReference(config, device=config.device)
    batch.ref_logprobs = batch.rollout_logprobs
    return [timed(lambda: reference.compute_logprobs(batch), policy) for _ in range(2)][-1]


def timed(function, policy):
    """Seconds of a call, until the GPU is done."""
    started = time.perf_counter()
    function()
    if not policy.on_cpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def reset_peak(policy):
    if not policy.on_cpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def summary(config, arguments, policy, seconds):
    shape = read_model_shape(Path(arguments.model))
    params = shape.num_params - (0 if shape.tied else shape.embedding_params)
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * arguments.tokens / 2
    tokens = len_of(config) * arguments.tokens
    gpus = config.policy.world_size
    # Of this rank; with TP and PP every rank has as many, nearly.
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    by_token = 6 * params
    if getattr(config.policy, "lora", None):
        shards = config.policy.tensor_parallel_size * config.policy.pipeline_parallel_size
        by_token = 4 * params + 6 * trained * shards
    flops = tokens * (by_token + attention)
    # Gradient, two moments and the fp32 copy are read, all but the gradient written, and weights.
    optimizer_bytes = trained * (4 * 4 + 3 * 4 + 2)
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops_per_gpu": flops / seconds / gpus / 1e12,
        "mfu": flops / seconds / gpus / PEAK_FLOPS,
        "floor_s": {
            "compute": flops / gpus / PEAK_FLOPS,
            "optimizer": optimizer_bytes / BANDWIDTH,
        },
    }


def profile(function, *, on_cpu):
    """Milliseconds of one call by kind of kernel, by who launched them, and of the longest."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        if not on_cpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    if on_cpu:
        kernels = [(event.key, event.self_cpu_time_total, event.count) for event in events]
        ranges = [(event.key, event.cpu_time_total) for event in events]
    else:
        kernels = [
            (event.key, event.self_device_time_total, event.count)
            for event in events
            if runs_on_gpu(event)
        ]
        ranges = [
            (event.key, event.device_time_total)
            for event in events
            if event.device_type == DeviceType.CPU
        ]
    waits = {} if on_cpu else gpu_waits(profiler.events())
    by_kind = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, microseconds, _ in kernels:
        by_kind[kind_of(name)] += microseconds / 1e3
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:40]
    return {
        "all_ms": sum(by_kind.values()),
        **waits,
        "by_kind_ms": by_kind,
        "by_range_ms": {
            wanted: sum(time for name, time in ranges if name.partition("#")[0] == wanted) / 1e3
            for wanted in RANGES
        },
        "longest": [
            {"ms": time / 1e3, "calls": count, "kind": kind_of(name), "name": name[:160]}
            for name, time, count in longest
        ],
    }


def runs_on_gpu(event):
    """Whether an event of the profiler is a kernel, copy or fill.

    The profiler also shows ranges of the host, such as Optimizer.step, over their kernels. Names do
    not tell the two apart: the host's call of a Triton kernel has the name of the kernel.
    """
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def gpu_waits(events):
    """Seconds from the first kernel to the end of the last in which any ran, and the longest waits.

    A wait names what ran before and after it, and what the host did in its middle, from the
    outermost function that the profiler knows to the innermost. That is its cause only if the
    host had no kernels in the queue: where it is ahead, it may be in a much later function.
    """

    def spans(wanted):
        return sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in events
            if wanted(event)
        )

    host = spans(lambda event: event.device_type == DeviceType.CPU)
    kernels = spans(runs_on_gpu)
    busy, waits = 0.0, []
    start, end, before = kernels[0]
    began = start
    for next_start, next_end, name in kernels:
        if next_start > end:
            waits.append((next_start - end, end, before, name))
            busy += end - start
            start, end, before = next_start, next_end, name
        elif next_end > end:
            end, before = next_end, name
    busy += end - start
    waits.sort(reverse=True)
    return {
        "span_ms": (end - began) / 1e3,
        "busy_ms": busy / 1e3,
        "waits_over_1_ms": sum(wait > 1e3 for wait, *_ in waits),
        "longest_waits": [
            {
                "ms": wait / 1e3,
                "at_ms": (since - began) / 1e3,
                "after": before[:80],
                "until": until[:80],
                "host": [
                    name[:60] for begin, finish, name in host if begin <= since + wait / 2 < finish
                ],
            }
            for wait, since, before, until in waits[:12]
        ],
    }


def kind_of(name):
    lower = name.lower()
    return next(
        (kind for kind, parts in KERNELS.items() if any(p in lower for p in parts)), "other"
    )


def variant(name):
    """`name`, if each of its parts is there."""
    if unknown := [part for part in name.split("+") if part not in VARIANTS]:
        known = ", ".join(VARIANTS)
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {known}")
    return name


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--variants", nargs="+", type=variant, default=["default"])
    parser.add_argument("--sft", action="store_true", help="the loss of supervised training")
    parser.add_argument("--rows", type=int, default=32, help="of each data-parallel rank")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5, help="updates, after the first")
    parser.add_argument("--memory-limit-gb", type=float, help="of a GPU, in 10^9 bytes")
    parser.add_argument("--reference", action="store_true", help="share the GPU with a reference")
    parser.add_argument("--profile", action="store_true", help="which kernels take the time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of a variant")
    for internal in ("--save-model", "--model", "--result"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    for internal in ("--rank", "--port"):
        parser.add_argument(internal, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
