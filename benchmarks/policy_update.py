"""Measures one policy update on GPUs: seconds, MFU and memory, by setting, without Ray and vLLM.

    python benchmarks/policy_update.py                      # Qwen2.5-1.5B's shape, random weights
    python benchmarks/policy_update.py --variants default keep_logits --profile
    python benchmarks/policy_update.py --shape qwen2.5-3b --memory-limit-gb 80 --reference \
        --variants recompute_selective recompute_full
    python benchmarks/policy_update.py --variants dp2 dp2_no_overlap tp2     # on two GPUs
    python benchmarks/policy_update.py --sft --variants default fp8 offload lora
    python benchmarks/policy_update.py --sft --shape qwen2.5-7b --rows 16 --tokens 2048 \
        --variants tp2 tp2+lora                                              # on two GPUs
    python benchmarks/policy_update.py --variants one_gpu --budget-s 470 --out update.json
    python benchmarks/policy_update.py --device cpu --shape tiny --rows 4 --tokens 64

An update is everything that `MegatronPolicy.update` does with `--rows` rows of `--tokens` tokens:
packing, forward, backward, gradient norm, AdamW; with --sft, the loss of supervised training on
all of their tokens. Names with a + are several settings at once, and some are of the model or the
rows instead of --shape, --rows and --tokens; one_gpu stands for all that one H200 shows of these.
On CPU such models are tiny and such rows 1/64 as long. Each variant has processes of its own and
a time limit; one that fails leaves an "error" in its place, one without time "skipped".

    MFU = FLOPs of the model / (seconds x GPUs x peak)
    FLOPs a token = 6 x parameters + 12 x layers x heads x head_dim x length / 2
    with LoRA     = 4 x parameters + 6 x parameters of adapters + the same for attention

Parameters count the head, tied or not, and no other embedding; of experts, those that a token goes
to; length / 2 because attention is causal; what recompute adds is not counted; a frozen weight
needs no gradient, which is a third of its products. The peak is 990 TFLOP/s: bfloat16,
dense, H100 or H200, of FP8 too. The floor is these FLOPs at the peak, then the optimizer's bytes at
4.8 TB/s: what it reads and writes once. Peaks of memory, torch's, stand beside the estimate of
`rlsys explain` for the same tensors. Prints JSON; progress goes to stderr.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

import torch
from kernel_profile import profile
from machine import describe_machine
from random_model import SHAPES, save_random_model

from rlsys.config import Config
from rlsys.files import replacing
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
    "rows_4k": {"rows": 16, "tokens": 4096},
    "rows_16k": {"rows": 4, "tokens": 16384},
    "rows_32k": {"rows": 2, "tokens": 32768, "tokens_per_micro_batch": 32768},
    "7b": {"shape": "qwen2.5-7b", "rows": 16, "tokens": 2048},
    "micro_8k": {"tokens_per_micro_batch": 8192},
    "moe": {"shape": "qwen3-30b-a3b-8-layers"},
    "dense_as_moe": {"shape": "qwen3-a3b-dense-8-layers"},
    "dp2": {"world_size": 2},
    "dp2_no_overlap": {"world_size": 2, "overlap_grad_reduce": False},
    "tp2": {"world_size": 2, "tensor_parallel_size": 2},
    "pp2": {"world_size": 2, "pipeline_parallel_size": 2},
    "cp2": {"world_size": 2, "context_parallel_size": 2},
}
"""Settings of policy.*, and BENCHMARK's, which are none. Every data-parallel rank has as many rows
as one rank alone."""
BENCHMARK = (
    "shape",
    "rows",
    "tokens",
    "tokens_per_micro_batch",
    "chunk",
    "fuse_weight_gradients",
)
"""What a variant changes: the model, the batch, tokens of a chunk of logits, or a choice that
runs do not have."""
GROUPS = {
    "one_gpu": [
        "rows_4k",
        "rows_16k",
        "rows_32k",
        "7b+micro_8k+bf16_state",
        "moe+rows_4k",
        "dense_as_moe+rows_4k",
        "7b+micro_8k+bf16_state+fp8_params",
        "7b+lora",
        "rows_32k+recompute_selective",
        "rows_4k+fp8_blockwise",
        "rows_32k+fp8_blockwise",
        "7b+lora+fp8_blockwise",
    ]
}
"""Names of --variants that stand for several, by what they tell: the first ones most."""
CPU_SHRINKS = 64
LEAST_S = 25.0
"""A variant is not begun with less time than this."""


def main():
    arguments = parse_arguments()
    if arguments.save_models:
        for shape in {asked(name, arguments).shape for name in arguments.variants}:
            folder = Path(arguments.save_models) / shape
            save_random_model(folder, shape, arguments.device)
        return
    if arguments.rank is not None:
        result = measure(arguments)
        if arguments.rank == 0:
            Path(arguments.result).write_text(json.dumps(result))
        return
    end = time.monotonic() + arguments.budget_s
    shown = ("sft", "memory_limit_gb", "reference", "repeats")
    settings = {key: vars(arguments)[key] for key in shown}
    results = {}
    report = {"machine": describe_machine(), **settings, "variants": results}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        # The processes of a variant import everything while the one before is measured.
        coming = stack.enter_context(Ranks(arguments.variants[0], arguments, folder))
        with Processes([{}], ["--save-models", str(folder), "--rank", "0"]) as saving:
            if error := saving.wait(300):
                sys.exit(f"no model: {error}")
        for name, following in zip_longest(arguments.variants, arguments.variants[1:]):
            ranks = coming
            if following is not None:
                coming = stack.enter_context(Ranks(following, arguments, folder))
            with ranks:
                results[name] = ranks.measure(end - time.monotonic())
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
            if arguments.out:
                with replacing(Path(arguments.out)) as file:
                    file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


class Processes:
    """Processes of this script with its own arguments and some more, one per environment."""

    def __init__(self, environments, options):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self.all = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], *options, "--rank", str(rank)],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
            )
            for rank, environment in enumerate(environments)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.all:
            process.kill()
            process.wait()
            process.stdin.close()
        self._output.close()

    def wait(self, timeout_s):
        """None once all have ended well, or why not."""
        end = time.monotonic() + timeout_s
        while True:
            codes = [process.poll() for process in self.all]
            if any(codes):  # other ranks wait for a rank that failed
                return f"exit codes {codes}: {self._said()}"
            if None not in codes:
                return None
            if time.monotonic() > end:
                return f"took more than {timeout_s:g} s: {self._said()}"
            time.sleep(0.2)

    def _said(self):
        self._output.seek(0)
        return self._output.read()[-3000:]


class Ranks(Processes):
    """The ranks of a variant, which import what they need and then wait for `measure`."""

    def __init__(self, name, arguments, folder):
        self._timeout_s, self._result = arguments.timeout, folder / f"{name}.json"
        world_size = settings_of(name).get("world_size", 1)
        on_gpus = arguments.device == "cuda"
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(world_size))))
        gpus = seen.split(",") if on_gpus else [""] * world_size
        self._lacks = world_size if len(gpus) < world_size else None
        self._store = serve_store("127.0.0.1", arguments.budget_s)
        options = ["--variants", name, "--port", str(self._store.port)]
        options += ["--result", str(self._result), "--model", str(folder)]
        ranks = [] if self._lacks else gpus[:world_size]
        super().__init__([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ranks], options)

    def measure(self, time_left_s):
        """What rank 0 measured, or why there is nothing."""
        if self._lacks:
            return {"error": f"needs {self._lacks} GPUs"}
        if time_left_s < LEAST_S:
            return {"skipped": "the time was up: see --budget-s"}
        for process in self.all:
            with contextlib.suppress(BrokenPipeError):  # its exit code says why
                process.stdin.write(b"go\n")
                process.stdin.flush()
        error = self.wait(min(self._timeout_s, time_left_s))
        return {"error": error} if error else json.loads(self._result.read_text())


def settings_of(name):
    """The settings of a variant, or of several with + between their names."""
    return {key: value for part in name.split("+") for key, value in VARIANTS[part].items()}


def asked(name, arguments):
    """The arguments of a variant: its own shape and rows, if it names them.

    On CPU those are small, so that all variants can be tried there.
    """
    own = {key: value for key, value in settings_of(name).items() if key in BENCHMARK}
    if arguments.device == "cpu":
        for key in ("tokens", "tokens_per_micro_batch"):
            if key in own:
                own[key] //= CPU_SHRINKS
        if "shape" in own:
            own["shape"] = "tiny-moe" if SHAPES[own["shape"]].experts else "tiny"
    return argparse.Namespace(**vars(arguments) | own)


def measure(arguments):
    """Run one rank of one variant, in a process of its own."""
    import_engine(arguments)  # which takes seconds
    if not sys.stdin.readline():
        sys.exit("nobody waits for this measurement")
    (name,) = arguments.variants
    settings, arguments = settings_of(name), asked(name, arguments)
    arguments.model = str(Path(arguments.model) / arguments.shape)
    config = make_config(
        arguments, {key: value for key, value in settings.items() if key not in BENCHMARK}
    )
    policy = make_policy(config, arguments)
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
        "settings": settings,
        **{key: getattr(arguments, key) for key in BENCHMARK[:4]},
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


def import_engine(arguments):
    """Import megatron-core and all that the policy needs, without a use of the GPU."""
    from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu

    if arguments.device == "cpu":
        enable_megatron_on_cpu()
    from rlsys.engines.megatron import policy  # noqa: F401


def make_policy(config, arguments):
    if arguments.memory_limit_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.memory_limit_gb * 1e9 / total)
    from rlsys.engines.megatron import parallel as parallel_layout
    from rlsys.engines.megatron import policy as megatron

    policy, timeout_s = config.policy, float(arguments.timeout)
    torch.set_num_threads(policy.num_cpu_threads)  # as a run's ranks do
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
    if arguments.chunk is not None:
        policy_memory.LOGPROB_CHUNK_TOKENS = arguments.chunk
    if not arguments.fuse_weight_gradients:
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
                "num_generations": 2,
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
    tokens = len_of(config) * arguments.tokens
    gpus = config.policy.world_size
    # Of this rank; with TP and PP every rank has as many, nearly.
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    adapters = None
    if config.policy.lora is not None:
        adapters = trained * config.policy.tensor_parallel_size
        adapters *= config.policy.pipeline_parallel_size
    shape = read_model_shape(Path(arguments.model))
    flops = tokens * flops_per_token(shape, arguments.tokens, adapters=adapters)
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


def flops_per_token(shape, length, *, adapters=None):
    """Forward and backward, of rows of `length` tokens: the formula at the top of this file.

    Args:
        adapters: parameters of LoRA, next to weights that are frozen; None trains the weights.
    """
    dense, experts = shape.layer_params(shape.layers)
    if shape.is_moe:
        experts *= shape.experts.per_token / shape.experts.number
    active = shape.embedding_params + dense + experts + shape.hidden_size
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * length / 2
    if adapters is None:
        return 6 * active + attention
    return 4 * active + 6 * adapters + attention


def variant(name):
    """`name`, if each of its parts is there."""
    unknown = [part for part in name.split("+") if part not in VARIANTS]
    if unknown and name not in GROUPS:
        known = ", ".join((*VARIANTS, *GROUPS))
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {known}")
    return name


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        default=["default"],
        help="names of VARIANTS, several at once with + between them; one_gpu: what one GPU shows",
    )
    parser.add_argument("--sft", action="store_true", help="the loss of supervised training")
    parser.add_argument("--rows", type=int, default=32, help="of each data-parallel rank")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5, help="updates, after the first")
    parser.add_argument("--memory-limit-gb", type=float, help="of a GPU, in 10^9 bytes")
    parser.add_argument("--reference", action="store_true", help="share the GPU with a reference")
    parser.add_argument("--profile", action="store_true", help="which kernels take the time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of a variant")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="of all; names what it left")
    parser.add_argument("--out", help="file that also gets the results, after every variant")
    parser.set_defaults(chunk=None, fuse_weight_gradients=True)
    for internal in ("--save-models", "--model", "--result"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    for internal in ("--rank", "--port"):
        parser.add_argument(internal, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.variants = [name for each in arguments.variants for name in GROUPS.get(each, [each])]
    return arguments


if __name__ == "__main__":
    main()
