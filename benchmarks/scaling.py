"""Seconds of a weight sync and of a step from 1 to 1,024 GPUs: computed, not run. Prints JSON.

    python benchmarks/scaling.py                                    # Qwen2.5-1.5B, fixed batch
    python benchmarks/scaling.py --shape qwen2.5-7b --prompts 1024 --length 4096 --network-gb-s 25

docs/scaling.md has the formulas, what they were calibrated with, how far they are from what else
was measured, and what they assume beyond one host. It needs no GPU, and no model.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace

from random_model import SHAPES


@dataclass(frozen=True)
class Model:
    """What of a dense model decides time."""

    products: float
    """Weights that multiply each token: layers and head, without the other embedding."""
    weights: float
    """Weights that a sync sends: tied embeddings once."""
    layers: int
    attention_width: int
    """heads x head_dim."""
    kv_width: int
    """KV heads x head_dim."""


@dataclass(frozen=True)
class Hardware:
    """Rates of one GPU and of what connects GPUs; those of H200s in one host were measured."""

    peak_flops: float = 990e12
    """bfloat16, dense, a second."""
    memory_bytes: float = 4.8e12
    """Bytes a second of a GPU's memory."""
    nvlink_bytes: float = 339e9
    """Bytes a second of a broadcast between GPUs of a host; measured."""
    network_bytes: float = 50e9
    """Bytes a second of a GPU's own network card: 400 Gbit/s. Assumed."""
    host_bytes: float = 10e9
    """Bytes a second at which Ray copies objects between hosts. Assumed."""
    pcie_bytes: float = 50e9
    """Bytes a second between a GPU and pinned host memory. Assumed."""
    gpus_of_host: int = 8


@dataclass(frozen=True)
class Python:
    """Seconds that vLLM's Python takes of a decode step of b sequences: fixed + each x b."""

    fixed: float
    each: float


@dataclass(frozen=True)
class Job:
    """One step of GRPO, with one optimizer step and no reference."""

    prompts: int = 128
    generations: int = 8
    prompt_tokens: int = 32
    length: int = 1024
    """Tokens of every completion."""
    optimizer_steps: int = 1

    @property
    def completions(self) -> int:
        return self.prompts * self.generations

    @property
    def row(self) -> int:
        return self.prompt_tokens + self.length


FAST, SLOW = Python(1.6e-3, 6.3e-6), Python(2.7e-3, 16e-6)
"""The two hosts in benchmarks/RESULTS.md: B and A."""
UPDATE_EFFICIENCY = 0.546
"""Share of the peak that an update reaches beside OPTIMIZER_SECONDS."""
OPTIMIZER_SECONDS = 5.2e-11
"""Seconds for each weight of a rank, once in an optimizer step."""
DECODE_EFFICIENCY, KV_EFFICIENCY = 0.6, 0.7
"""Share of peak FLOPs of matrix products, and of bandwidth of attention, in a decode step."""
NOT_HIDDEN = 0.5
"""Share of the other engines' GPU time on a shared GPU that an engine waits for."""
SYNC_SECONDS = 4.3e-3
"""What a weight sync takes whatever its size: Ray's calls, pause, checks, the last bucket."""
BUCKET_BYTES = 256 * 2**20
HOP_SECONDS = 10e-6
"""For a chunk of a broadcast to pass a GPU. Assumed."""
CALL_SECONDS = 2e-4
"""For the driver to call one actor and take its answer. Assumed."""
DRIVER_SECONDS = 20e-6
"""For each completion of 1,024 tokens, between rollout and update."""
BATCH_BYTES = 17
"""A token of a TrainBatch: id 8, mask 1, advantage 4, log-prob 4."""
OPTIMIZER_BYTES = 12
"""What a colocated policy moves to host memory and back, for each weight."""


def model_of(name: str) -> Model:
    """The model of a shape in benchmarks/random_model.py; dense ones only."""
    shape = SHAPES[name]
    assert not shape.experts, "a mixture of experts sends tokens between GPUs, which is not here"
    head_dim = shape.head_dim or shape.hidden // shape.heads
    width, kv = shape.heads * head_dim, shape.kv_heads * head_dim
    layer = shape.hidden * (2 * width + 2 * kv + 3 * shape.ffn)
    head = shape.hidden * shape.vocabulary
    products = shape.layers * layer + head
    return Model(products, products + (0 if shape.tied else head), shape.layers, width, kv)


def update_seconds(
    model: Model, job: Job, hardware: Hardware, *, replicas: int, tensor_parallel: int = 1
) -> float:
    """All optimizer steps on one rollout."""
    tokens = job.completions * job.row
    attention = 12 * model.layers * model.attention_width * job.row / 2
    flops = tokens * (6 * model.products + attention)
    ranks = replicas * tensor_parallel
    compute = flops / (ranks * hardware.peak_flops * UPDATE_EFFICIENCY)
    each_step = OPTIMIZER_SECONDS * model.weights / tensor_parallel
    # Gradients are reduced in float32 (4 bytes), weights gathered in bfloat16 (2).
    link = _link(ranks, hardware)
    each_step += 6 * model.weights / tensor_parallel * (replicas - 1) / replicas / link
    # Sequence parallelism gathers and scatters activations (2 bytes) twice in each direction.
    passed = 16 * tokens / replicas * model.attention_width * model.layers
    exchange = passed * (tensor_parallel - 1) / tensor_parallel / hardware.nvlink_bytes
    return compute + job.optimizer_steps * each_step + exchange


def rollout_seconds(
    model: Model,
    job: Job,
    hardware: Hardware,
    python: Python,
    *,
    gpus: int,
    engines_per_gpu: int = 1,
    tensor_parallel: int = 1,
) -> float:
    """All completions, of equal length, dealt to engines that run all of their share at once."""
    engines = gpus // tensor_parallel * engines_per_gpu
    sequences = math.ceil(job.completions / engines)
    context = job.prompt_tokens + job.length / 2
    rate = DECODE_EFFICIENCY * hardware.peak_flops
    products = max(
        2 * model.products / hardware.memory_bytes, 2 * model.products * sequences / rate
    )
    cache = 4 * model.layers * model.kv_width * sequences * context
    gpu = (products + cache / (KV_EFFICIENCY * hardware.memory_bytes)) / tensor_parallel
    gpu *= 1 + NOT_HIDDEN * (engines_per_gpu - 1)
    return job.length * (python.fixed + python.each * sequences + gpu)


def sync_seconds(
    model: Model,
    hardware: Hardware,
    *,
    engines: int,
    gpus: int,
    engines_per_gpu: int = 1,
    tensor_parallel: int = 1,
) -> float:
    """From the last optimizer step until every engine has the weights.

    Each tensor-parallel worker is in a connection of its own and gets its shard; engines that share
    a GPU get the weights one after the other.
    """
    sent = 2 * model.weights / tensor_parallel
    receivers = engines // engines_per_gpu
    hops = math.ceil(sent / BUCKET_BYTES) * (receivers - 1) * HOP_SECONDS
    transfer = engines_per_gpu * (sent / _link(gpus, hardware) + hops)
    return SYNC_SECONDS + transfer + CALL_SECONDS * (engines - 1)


def driver_seconds(job: Job, hardware: Hardware, *, policy_hosts: int) -> float:
    """Between rollout and update: advantages, and the batch, of which each host gets a copy."""
    tokens = job.completions * job.row
    copies = BATCH_BYTES * tokens * (policy_hosts - 1) / hardware.host_bytes
    return DRIVER_SECONDS * job.completions * job.length / 1024 + copies


def step(
    model: Model,
    job: Job,
    hardware: Hardware,
    python: Python,
    *,
    policy_gpus: int,
    rollout_gpus: int,
    engines_per_gpu: int = 1,
    tensor_parallel: int = 1,
) -> dict[str, float]:
    """Seconds of the phases of a step; no `rollout_gpus` is a colocated run."""
    all_gpus = policy_gpus + rollout_gpus
    sampling = rollout_gpus or policy_gpus
    engines = {"engines_per_gpu": engines_per_gpu, "tensor_parallel": tensor_parallel}
    replicas = max(1, policy_gpus // tensor_parallel)
    phases = {
        "rollout": rollout_seconds(model, job, hardware, python, gpus=sampling, **engines),
        "driver": driver_seconds(
            job, hardware, policy_hosts=math.ceil(policy_gpus / hardware.gpus_of_host)
        ),
        "update": update_seconds(
            model, job, hardware, replicas=replicas, tensor_parallel=tensor_parallel
        ),
        "weight_sync": sync_seconds(
            model,
            hardware,
            engines=sampling // tensor_parallel * engines_per_gpu,
            gpus=all_gpus,
            **engines,
        ),
    }
    if not rollout_gpus:
        moved = 2 * OPTIMIZER_BYTES * model.weights / policy_gpus
        phases["switching"] = moved / hardware.pcie_bytes
    sync = sum(phases.values())
    hidden = min(phases["rollout"], phases["update"]) if rollout_gpus else 0.0
    return phases | {"step": sync, "step_with_max_staleness_1": sync - hidden}


def best_split(model: Model, job: Job, hardware: Hardware, python: Python, gpus: int, tp: int):
    """The step with the fastest split of the GPUs, in powers of two, run ahead by a step."""
    splits = [(gpus, 0)]
    splits += [(policy, gpus - policy) for policy in _powers(gpus - tp) if policy >= tp]
    found = [
        {"policy_gpus": policy, "rollout_gpus": rollout}
        | step(
            model,
            job,
            hardware,
            python,
            policy_gpus=policy,
            rollout_gpus=rollout,
            tensor_parallel=tp,
        )
        for policy, rollout in splits
        if policy % tp == rollout % tp == 0
    ]
    return min(found, key=lambda row: row["step_with_max_staleness_1"])


def _powers(most: int) -> list[int]:
    return [2**i for i in range(11) if 2**i <= most]


def _link(gpus: int, hardware: Hardware) -> float:
    """Bytes a second of the slowest link of a ring over that many GPUs."""
    return hardware.nvlink_bytes if gpus <= hardware.gpus_of_host else hardware.network_bytes


H200 = Hardware()
LONG, SHORT = Job(), Job(prompts=64, length=512)
ROWS = Job(prompts=4, prompt_tokens=0)
"""32 rows of 1,024 tokens."""


def comparison() -> list[dict]:
    """What was measured (benchmarks/RESULTS.md, baselines) beside what the formulas say."""
    small, medium, large = map(model_of, ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"))
    return [
        *measured_updates(small, medium, large),
        *measured_waves(small),
        *measured_rollouts(small, medium),
        *measured_syncs(small, medium),
        *measured_steps(small),
    ]


def compared(name, measured, computed, calibrated=False) -> dict:
    """A row; `calibrated`: the formulas have a constant from this measurement."""
    return {
        "what": name,
        "measured_s": measured,
        "computed_s": round(computed, 4),
        "error": round(computed / measured - 1, 3),
        "calibrated_with": calibrated,
    }


def measured_updates(small, medium, large) -> list[dict]:
    def update(model, job, replicas=1, **sizes):
        return update_seconds(model, job, H200, replicas=replicas, **sizes)

    of_7b = Job(prompts=2, prompt_tokens=0, length=2048)
    whole, half = update(small, LONG), update(small, SHORT)
    replicas_s, eight = round(65536 / 94300, 3), replace(ROWS, prompts=8)
    name = "update, 1.5B, 2 replicas, 64 rows of 1,024"
    of_two = update(small, ROWS, tensor_parallel=2)
    return [
        compared("update, 1.5B, 32 rows of 1,024", 0.658, update(small, ROWS), True),
        compared("update, 1.5B, 1,024 rows of 1,056", 19.14, whole, True),
        compared("update, 1.5B, 512 rows of 544", 4.95, half),
        compared(name, replicas_s, update(small, eight, replicas=2)),
        compared("update, 3B with recompute", 42.9, update(medium, LONG)),
        compared(
            "update, 7B, TP 2, 16 rows of 2,048", 1.477, update(large, of_7b, tensor_parallel=2)
        ),
        compared("update, 1.5B, TP 2, 32 rows of 1,024", 0.567, of_two),
    ]


def measured_waves(small) -> list[dict]:
    """Completions of 512 tokens that all decode at once, by host, number and tokens a second."""
    rates = [
        *((FAST, "B", *row) for row in ((128, 36.8e3), (512, 53.6e3), (1024, 61.4e3))),
        *((SLOW, "A", *row) for row in ((128, 21.9e3), (512, 39.4e3), (1024, 36.9e3))),
    ]
    rows = []
    for host, letter, sequences, rate in rates:
        job = Job(prompts=sequences // 8, prompt_tokens=128, length=512)
        computed = rollout_seconds(small, job, H200, host, gpus=1)
        name, measured = f"wave of {sequences}, host {letter}", round(sequences * 512 / rate, 2)
        rows.append(compared(name, measured, computed, calibrated=True))
    return rows


def measured_rollouts(small, medium) -> list[dict]:
    def rollout(model, job):
        return rollout_seconds(model, job, H200, SLOW, gpus=1, engines_per_gpu=2)

    return [
        compared("rollout, 1.5B, 2 engines", 17.8, rollout(small, LONG)),
        compared("the same, 512 of 512", 4.64, rollout(small, SHORT)),
        compared("rollout, 3B, 2 engines", 25.6, rollout(medium, LONG)),
    ]


def measured_syncs(small, medium) -> list[dict]:
    def sync(model, **engines):
        return sync_seconds(model, H200, gpus=2, **engines)

    two = {"engines": 2, "engines_per_gpu": 2}
    earlier = "sync, 3B, 2 engines on a GPU, an earlier version"
    return [
        compared("sync, 1.5B", 0.0134, sync(small, engines=1), True),
        compared("sync, 1.5B, 2 engines on a GPU", 0.0225, sync(small, **two), True),
        compared(earlier, 0.067, sync(medium, **two)),
    ]


def measured_steps(small) -> list[dict]:
    gpus = {"policy_gpus": 1, "rollout_gpus": 1, "engines_per_gpu": 2}
    computed = step(small, LONG, H200, SLOW, **gpus)
    return [
        compared("step, 1.5B, 128 x 8 x 1,024", 37.0, computed["step"]),
        compared("the same with max_staleness 1", 19.9, computed["step_with_max_staleness_1"]),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=sorted(SHAPES))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a completion")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of both sides")
    parser.add_argument("--network-gb-s", type=float, default=50.0, help="of a GPU's network card")
    parser.add_argument("--grow", action="store_true", help="prompts for each 2 GPUs, not in all")
    options = parser.parse_args()
    model, hardware = model_of(options.shape), Hardware(network_bytes=options.network_gb_s * 1e9)
    steps = []
    for gpus in [n for n in _powers(1024) if n >= options.tp]:
        prompts = options.prompts * max(1, gpus // 2) if options.grow else options.prompts
        job = Job(prompts=prompts, length=options.length)
        row = best_split(model, job, hardware, FAST, gpus, options.tp)
        tokens = job.completions * job.length / row["step_with_max_staleness_1"]
        rounded = {name: round(value, 4) for name, value in row.items()}
        steps.append({"gpus": gpus, "completions": job.completions} | rounded)
        steps[-1]["completion_tokens_per_second"] = round(tokens)
    result = {
        "shape": options.shape,
        "model": asdict(model),
        "hardware": asdict(hardware),
        "computed": steps,
        "compared_with_measurements": comparison(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
