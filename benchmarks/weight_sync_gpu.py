"""Times weight sync between GPUs, policy to rollout engine, and the floor. Prints JSON.

    python benchmarks/weight_sync_gpu.py                     # Qwen2.5-1.5B's shape, 3.09 GB in bf16
    python benchmarks/weight_sync_gpu.py --policy-tp 2 --engine-tp 2      # on four GPUs
    python benchmarks/weight_sync_gpu.py --policy-tp 2 --engine-shares    # on two
    python benchmarks/weight_sync_gpu.py --policy-tp 2 --engine-tp 2 --engine-shares    # on two
    python benchmarks/weight_sync_gpu.py --engines 2      # which share a GPU, on two as well
    python benchmarks/weight_sync_gpu.py --quantization fp8    # which the engine does, on two
    python benchmarks/weight_sync_gpu.py --lora adapter --shape qwen2.5-7b    # or merged
    python benchmarks/weight_sync_gpu.py --device cpu --shape tiny --repeats 4    # does it work?

A real policy and real engines, with random weights of the shape. Every sync is a whole one:
pause, export from megatron-core's layout, transport, loading, prefix cache, resume. The syncs in
place are also a stress test: the weights change before each of them, every bucket's checksums are
compared, and after each part those of every parameter. In the same run, between the same two
processes: broadcasts of as many bytes and nothing else, and vLLM's own NCCL weight transfer.

If a part fails, the results of the others are kept.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import ray
from machine import describe_machine
from random_model import SHAPES, save_random_model
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from weight_sync_sides import (
    TIMEOUT_S,
    CrossedActor,
    OpenActor,
    OpenRank,
    bare_broadcasts,
    held_slices,
    join_native,
    receive_native,
)

from rlsys.actors import rollout
from rlsys.actors.policy import PolicyActors
from rlsys.actors.ray_session import ray_session
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import get_all
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.algo.batching import build_train_batch
from rlsys.config import Config
from rlsys.types import Prompt, SampleRequest
from rlsys.weight_sync.transport import LOOPBACK, serve_store

START_TIMEOUT_S = 300.0
LORA = {"rank": 8, "alpha": 16}
ADAPTER_SCALING = 2.0


class Placement:
    """Where policy and engines run: a GPU for each, or on two GPUs engines that share the second.

    Not that of policy rank 0: it is the sender, and NCCL takes no two ranks on a GPU.
    """

    def __init__(self, arguments):
        self.engine_gpus = arguments.engine_tp
        self.share = 1 / (arguments.engines + arguments.engine_shares)
        self.shared = None
        if arguments.engine_shares and arguments.engine_tp > 1:
            self.engine_gpus, self.share = 0, 1  # see CrossedActor
            return
        if self.share < 1:
            self.shared = placement_group([{"GPU": 1, "CPU": 0.1}] * 2, strategy="STRICT_PACK")
            assert self.shared.wait(START_TIMEOUT_S), "no two GPUs are free"

    def of_policy(self, rank):
        return self.options(1, bundle=rank)

    def of_engine(self):
        return self.options(self.engine_gpus, bundle=1)

    def options(self, gpus, bundle):
        if self.shared is None:
            return {"num_gpus": gpus, "num_cpus": 0.01}
        strategy = PlacementGroupSchedulingStrategy(
            self.shared, placement_group_bundle_index=bundle
        )
        return {"num_gpus": self.share, "num_cpus": 0.01, "scheduling_strategy": strategy}


class Bench:
    """The two sides, and one method for each part of the results."""

    def __init__(self, folder, arguments):
        self.arguments = arguments
        self.config = make_config(folder, arguments)
        place = Placement(arguments)
        shares_both = arguments.engine_shares and arguments.engine_tp > 1
        rollout.RolloutActor = CrossedActor if shares_both else OpenActor
        # With both GPUs shared, rank 0 can meet no worker of its GPU: once, before shards are.
        self.first_transport = "gloo" if shares_both else None
        self.engines = RolloutActors(
            self.config, device=arguments.device, place=lambda rank: place.of_engine()
        )
        self.policy = PolicyActors(
            self.config, device=arguments.device, place=place.of_policy, rank_class=OpenRank
        )
        self.actor = next(iter(self.engines.actors.values()))
        starting = self.engines.async_start() | self.policy.async_start()
        get_all(starting, phase="start", timeout_s=START_TIMEOUT_S)
        for actor in self.engines.actors.values():
            self.ask(actor.instrument.remote())
        self.metadata = self.policy.weight_metadata()

    def ask(self, reference):
        (result,) = get_all({"engine": reference}, phase="benchmark", timeout_s=TIMEOUT_S)
        return result

    def syncs(self, repeats, settings):
        section = self.config.weight_sync.model_copy(update=settings)
        publisher = WeightPublisher(
            self.policy,
            self.engines,
            section,
            transport=self.first_transport,
            adapter_scaling=ADAPTER_SCALING if self.arguments.lora == "adapter" else None,
        )
        publisher._transport = section.transport
        for _ in range(
            2
        ):  # connects, compiles and proves the plan, then uses it for the first time
            publisher.publish()
        all_metrics, sends, parts = [], [], []
        for _ in range(repeats):
            self.policy.call("change_weights")
            self.policy.policy_version += 1
            all_metrics.append(publisher.publish())
            sends.append(self.policy.call("seconds_of_send")[0])
            parts.append(self.ask(self.actor.seconds_of_parts.remote()))
        seconds = [metrics["weight_sync/seconds"] for metrics in all_metrics]
        transport = [metrics["weight_sync/transport_seconds"] for metrics in all_metrics]
        gigabytes = all_metrics[0]["weight_sync/bytes"] / 1e9
        launched, packed = self.policy.call("seconds_of_packing", "rollout", 5)[0]
        return {
            "syncs": repeats,
            "gigabytes": gigabytes,
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "gb_per_s": gigabytes / statistics.median(seconds),
            "connections": self.policy.call("num_connections", "rollout")[0],
            "transport_s": statistics.median(transport),
            "transport_gb_per_s": statistics.median(
                metrics["weight_sync/transport_gb_per_s"] for metrics in all_metrics
            ),
            "sending_s": statistics.median(sends),
            "packing_alone_s": packed,
            "packing_alone_host_s": launched,
            "engine_s": {
                name: statistics.median(part[name] for part in parts) for name in parts[0]
            },
            **({} if self.arguments.lora else self.equality()),
        }

    def ask_workers(self, method):
        """The answers of all workers of all engines."""
        of_engines = [
            self.ask(actor.ask_workers.remote(method)) for actor in self.engines.actors.values()
        ]
        return [answer for answers in of_engines for answer in answers]

    def equality(self):
        """Whether every slice that a worker of an engine holds is the policy's."""
        in_place = self.ask_workers("loads_in_place")
        if not all(in_place):
            return {"in_place": in_place}
        of_engines = [
            self.ask(actor.on_workers.remote(held_slices)) for actor in self.engines.actors.values()
        ]
        held = [part for workers in of_engines for worker in workers for part in worker]
        ours = self.policy.call("slices_checksums", [part[:4] for part in held])[0]
        differing = [part[0] for part, own in zip(held, ours, strict=True) if part[4] != own]
        return {"in_place": in_place, "slices_compared": len(held), "slices_differing": differing}

    def bare(self, bucket_mb, repeats=10):
        """Broadcasts between rank 0 of the policy and the engine's workers, nothing else."""
        total = sum(meta.nbytes for meta in self.metadata)
        whole, rest = divmod(total, bucket_mb << 20)
        sizes = [bucket_mb << 20] * whole + [rest] * (rest > 0)
        world_size = 1 + self.engines.num_engines * self.engines.workers_per_engine
        store = serve_store(LOOPBACK, TIMEOUT_S)
        arguments = (store.port, world_size, sizes, repeats)
        references = self.policy.async_call("bare", 0, *arguments)
        references["engine"] = self.actor.on_workers_by_rank.remote(bare_broadcasts, *arguments)
        results = get_all(references, phase="bare broadcasts", timeout_s=TIMEOUT_S)
        seconds = statistics.median(results[0][1:])
        return {"median_s": seconds, "gb_per_s": total / 1e9 / seconds, "bucket_mb": bucket_mb}

    def native(self, repeats=5):
        """vLLM's own: its packed NCCL transfer and its loader; without pause and cache reset."""
        world_size = 1 + self.engines.num_engines * self.engines.workers_per_engine
        port = free_port()
        references = self.policy.async_call("join_native", port, world_size)
        references["engine"] = self.actor.on_workers.remote(join_native, port, world_size)
        get_all(references, phase="joining", timeout_s=TIMEOUT_S)
        names = [meta.name for meta in self.metadata]
        dtypes = [meta.dtype for meta in self.metadata]
        shapes = [list(meta.shape) for meta in self.metadata]
        seconds = []
        for _ in range(1 + repeats):
            self.policy.call("change_weights")
            start = time.perf_counter()
            references = self.policy.async_call("send_native")
            references["engine"] = self.actor.on_workers.remote(
                receive_native, names, dtypes, shapes
            )
            get_all(references, phase="vLLM's own transfer", timeout_s=TIMEOUT_S)
            seconds.append(time.perf_counter() - start)
        gigabytes = sum(meta.nbytes for meta in self.metadata) / 1e9
        median = statistics.median(seconds[1:])
        return {"median_s": median, "gb_per_s": gigabytes / median, **self.equality()}

    def logp_difference(self):
        """Mean |log-prob| difference of completions sampled with the synced weights, in nats."""
        prompts = [Prompt(str(i), [], [2 + i, 5, 7 + i], {}) for i in range(8)]
        each = self.config.rollout.num_generations
        requests = [SampleRequest(i, p, each, 1.0, seed=i) for i, p in enumerate(prompts)]
        self.engines.submit(requests)
        groups, deadline = [], time.monotonic() + TIMEOUT_S
        while len(groups) < len(prompts):
            assert time.monotonic() < deadline, "sampling takes too long"
            ray.wait(self.engines.pending_refs(), timeout=5)
            groups += self.engines.collect()
        batch = build_train_batch(groups)
        difference = self.policy.compute_logprobs(batch)[0] - batch.rollout_logprobs
        return difference[batch.completion_mask].abs().mean().item()


def parts_of(bench, arguments):
    """What is measured, by name, the most important first; vLLM's own last, as it may hang."""
    repeats, few = arguments.repeats, max(2, arguments.repeats // 10)
    parts = {
        "in_place": lambda: bench.syncs(repeats, {}),
        "mean_logp_difference": bench.logp_difference,
        "vllm_loader": lambda: bench.syncs(5, {"in_place": False}),
        "in_place_without_checksums": lambda: bench.syncs(few, {"verify": False}),
    }
    # No parameter of the engine is as it is sent, or only a merged one: log-probs are compared.
    if (name := "quantised" if arguments.quantization else arguments.lora) is not None:
        return {
            name: lambda: bench.syncs(few, {}),
            "mean_logp_difference": bench.logp_difference,
        }
    usual = bench.config.weight_sync.bucket_mb
    for mb in (64, 512, 1024):
        parts[f"in_place_buckets_of_{mb}_mb"] = partial(bench.syncs, few, {"bucket_mb": mb})
    parts["bare_broadcast"] = lambda: bench.bare(usual)
    if arguments.engines > 1 or bench.first_transport:
        # One group, which nobody on the GPU of another can be in.
        del parts["bare_broadcast"]
    if bench.first_transport:  # that is all that goes without it
        del parts["vllm_loader"]
    elif arguments.device == "cuda":
        parts["vllm_nccl_engine"] = bench.native
    return parts


def main():
    arguments = parse_arguments()
    results = {"machine": describe_machine(), "arguments": vars(arguments), "errors": {}}
    # On CPU these GPUs are Ray's bookkeeping and nothing else.
    gpus = arguments.policy_tp + arguments.engine_tp if arguments.device == "cpu" else None
    cluster = ray_session(num_gpus=gpus, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder, cluster:
            signal.signal(signal.SIGALRM, partial(out_of_time, results, folder))
            signal.alarm(arguments.limit_s)
            measure(Path(folder), arguments, results)
    except (Exception, KeyboardInterrupt) as error:  # print the measurements so far
        results["errors"]["benchmark"] = tell(error)
    signal.alarm(0)
    show(results)


def measure(folder, arguments, results):
    device = arguments.device
    save = ray.remote(num_gpus=1, max_calls=1)(save_random_model)
    get_all(
        {"writer": save.remote(folder, arguments.shape, device)},
        phase="writing a model",
        timeout_s=START_TIMEOUT_S,
    )
    progress("the model is written")
    bench = Bench(folder, arguments)
    progress("policy and engine are up")
    for name, part in parts_of(bench, arguments).items():
        try:
            results[name] = part()
            progress(f"{name}: {json.dumps(results[name])}")
        except Exception as error:  # the other parts may still work
            results["errors"][name] = tell(error)
            progress(f"{name}: {results['errors'][name]}")


def out_of_time(results, folder, *_):
    """End the process at once: Ray would take an exception for its own."""
    results["errors"]["benchmark"] = "out of time: missing parts were not begun or not finished"
    show(results)
    shutil.rmtree(folder, ignore_errors=True)  # an engine may be reading it
    os._exit(1)


def show(results):
    print(json.dumps(results, indent=2), flush=True)


def tell(error):
    return f"{type(error).__name__}: {str(error)[-1500:]}"


def progress(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def free_port():
    store = serve_store(LOOPBACK, TIMEOUT_S)
    return store.port


def make_config(folder, arguments):
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1000,
            "data": {"dataset": ["unused"], "max_prompt_length": 64},
            "model": {"path": str(folder)},
            "reward": {"reward_funcs": ["format"]},
            "policy": {
                "world_size": arguments.policy_tp,
                "tensor_parallel_size": arguments.policy_tp,
                "lora": LORA if arguments.lora else None,
            },
            "rollout": {
                "generation_batch_size": 64,
                "max_completion_length": 64,
                "max_num_seqs": 64,
                "kv_cache_memory_mb": 1024,
                "tensor_parallel_size": arguments.engine_tp,
                "num_engines": arguments.engines,
                "engines_per_gpu": arguments.engines,
                "quantization": arguments.quantization,
            },
            "weight_sync": {"timeout_s": TIMEOUT_S, "lora": arguments.lora or "auto"},
        }
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=int, default=200, help="syncs in place")
    parser.add_argument("--policy-tp", type=int, default=1, help="GPUs of the policy")
    parser.add_argument("--engine-tp", type=int, default=1, help="GPUs of the engine")
    parser.add_argument("--engines", type=int, default=1, help="on one GPU, that they share")
    parser.add_argument(
        "--engine-shares", action="store_true", help="the policy's GPUs: --policy-tp 2"
    )
    parser.add_argument("--quantization", choices=["fp8", "fp8_per_block"], help="of the engine")
    parser.add_argument("--lora", choices=["adapter", "merged"], help="how engines get adapters")
    parser.add_argument("--limit-s", type=int, default=480, help="of the whole benchmark, seconds")
    arguments = parser.parse_args()
    if arguments.engine_shares and (arguments.policy_tp != 2 or arguments.engine_tp > 2):
        parser.error("--engine-shares is for --policy-tp 2 and --engine-tp 1 or 2")
    if arguments.engines > 1 and (arguments.policy_tp, arguments.engine_tp) != (1, 1):
        parser.error("--engines is for --policy-tp 1 --engine-tp 1")
    return arguments


if __name__ == "__main__":
    main()
