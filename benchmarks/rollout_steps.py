"""Shows where a decode step's time goes in the actor's engine, and what vLLM's settings change.

`python benchmarks/rollout.py --what profile --variants ...` runs this. For one variant it measures:

- waves: tokens a second of the engine alone, without Ray. `graphs` counts steps by how the model
  ran: FULL or PIECEWISE CUDA graphs, or NONE, kernel by kernel.
- floor: milliseconds of a step of 8, 32, 128, 512 and 1,024 sequences, as many as fit, next to what
  it has to read over the bandwidth of a copy (rollout_floor.py), and the ratio.
- step_ms: milliseconds of a step as it is, without seeds, without log-probs.
- cpu_ms: the same step by what the engine's one thread does, `wait for the GPU` included; what is
  left of `vLLM` after its parts is bookkeeping between them. `rlsys` is what VLLMEngine adds.
- gpu_ms: kernels of a step by kind, and `busy`, the time in which any of them ran.
- functions: Python functions by their own time, in ms a step (cProfile makes all of it slower).
"""

import cProfile
import dataclasses
import gc
import os
import pstats
import re
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rollout_floor import bandwidth, beside_floor

from rlsys.model.shape import read_model_shape


@dataclass(frozen=True)
class Variant:
    """One way to start the engine."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of vllm.LLM, on top of those of a run."""
    env: dict[str, str] = field(default_factory=dict)
    collect_garbage: bool = True
    quantization: str | None = None
    """rollout.quantization."""


VARIANTS = {
    "default": Variant(),
    "v1_runner": Variant(env={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "v2_runner": Variant(env={"VLLM_USE_V2_MODEL_RUNNER": "1"}),
    "no_async_scheduling": Variant({"async_scheduling": False}),
    "no_prefix_caching": Variant({"enable_prefix_caching": False}),
    "blocks_of_64": Variant({"block_size": 64}),
    "blocks_of_128": Variant({"block_size": 128}),
    "graphs_for_mixed_steps": Variant({"max_cudagraph_capture_size": 2048}),
    "graphs_of_512": Variant({"max_cudagraph_capture_size": 512}),
    "decode_graphs_only": Variant({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}),
    "no_gc": Variant(collect_garbage=False),
    "fp8": Variant(quantization="fp8"),
}
WARM_UP_STEPS = 20
FLOOR_SEQUENCES = (8, 32, 128, 512, 1024)
"""Those of them that fit are measured."""
PARTS = ("waves", "floor", "step_ms", "cpu_ms", "gpu_ms", "functions")
VARIED = 5_000_000
"""From this ticket on, completions differ in length."""
VARIED_LENGTHS = (0.25, 0.5, 0.75, 1.0)
"""How many of the longest are listed."""
KINDS = {
    "sampling": r"gumbel|ArgMax|exponential|multinomial|top_?k_?top_?p|distribution",
    "log-probs": r"log_softmax|softmax|_ranks|count_greater|gatherTopK|topk",
    "attention": r"flash|fmha|attn|attention|reshape_and_cache|varlen",
    "matrix products": r"gemm|cutlass|nvjet|cublas|splitK|wgmma",
    "copies": r"Memcpy|Memset",
}
"""Kinds of kernels, by the first expression that matches the name."""
TOP = 25


class GivenLengths:
    """Sampling parameters of requests whose completions have the lengths of `length_of`.

    Made where the engine runs, before it samples.
    """

    def __init__(self, longest):
        from rlsys.engines.vllm import engine as engines

        self.logprobs = True
        """Whether log-probs are asked for."""
        self._longest, self._usual = longest, engines.sampling_arguments
        engines.sampling_arguments = self._arguments

    def _arguments(self, rollout, stops, request):
        found = self._usual(rollout, stops, request)
        found["max_tokens"] = length_of(request.ticket, self._longest)
        return found if self.logprobs else found | {"logprobs": None}


def length_of(ticket, longest):
    """Numbers of tokens of the completions of a group, equal on both sides of a comparison."""
    if ticket < VARIED:
        return longest
    return int(longest * VARIED_LENGTHS[ticket % 4]) - ticket // 4 % 8


def profile(config, variant, *, device, waves, requests, steps, parts):
    """Measure `parts` of the list above for one variant; rollout.py has `waves` and `requests`."""
    chosen = VARIANTS[variant]
    os.environ.update(chosen.env)
    from rlsys.engines.vllm import engine as engines

    usual = engines.engine_arguments
    engines.engine_arguments = lambda *args, **kwargs: usual(*args, **kwargs) | chosen.arguments
    lengths = GivenLengths(config.rollout.max_completion_length)
    # Before the engine takes the memory.
    bytes_per_s = bandwidth(device) if "floor" in parts else None
    rollout = config.rollout.model_copy(update={"quantization": chosen.quantization})
    config = config.model_copy(update={"rollout": rollout})
    start = time.perf_counter()
    engine = engines.VLLMEngine(config.model.path, config=config, device=device, engine_rank=0)
    result = {"start_s": time.perf_counter() - start} | describe(engine)
    if not chosen.collect_garbage:
        gc.disable()
    graphs = count_graphs(engine)
    num_seqs = min(512, config.rollout.max_num_seqs)
    measures = {
        "waves": lambda: waves(lambda asked: finish(engine, asked), graphs),
        "floor": lambda: floors(engine, requests, steps, config, device, bytes_per_s),
        "step_ms": lambda: step_milliseconds(engine, requests(num_seqs, 101), steps, lengths),
        "cpu_ms": lambda: cpu_budget(engine, requests(num_seqs, 102), steps),
        "gpu_ms": lambda: gpu_budget(engine, requests(num_seqs, 103), steps),
        "functions": lambda: functions(engine, requests(num_seqs, 104), steps),
    }
    for name in parts:
        if name == "gpu_ms" and device == "cpu":
            continue
        try:
            result[name] = measures[name]()
        except Exception as error:  # keep the measurements so far
            result[name] = {"error": repr(error)}
            engine.abort(list(engine._running))
        print(f"{variant}: {name}: {result[name]}", file=sys.stderr, flush=True)
    return result


def describe(engine):
    settings = engine._llm.llm_engine.vllm_config
    return {
        "settings": {
            "v2_model_runner": settings.use_v2_model_runner,
            "async_scheduling": settings.scheduler_config.async_scheduling,
            "max_num_batched_tokens": settings.scheduler_config.max_num_batched_tokens,
            "enable_prefix_caching": settings.cache_config.enable_prefix_caching,
            "block_size": settings.cache_config.block_size,
            "cudagraph_mode": str(settings.compilation_config.cudagraph_mode),
            "largest_graph": settings.compilation_config.max_cudagraph_capture_size,
        }
    }


def finish(engine, requests):
    engine.add(requests)
    groups = []
    while engine.has_work:
        groups += engine.step()
    return [completion.token_ids for group in groups for completion in group.completions]


def count_graphs(engine):
    """Steps by how the model runs, counted from now on."""
    modes = Counter()
    runner = worker_of(engine).model_runner
    if engine._llm.llm_engine.vllm_config.use_v2_model_runner:
        dispatcher = runner.cudagraph_manager
    else:
        dispatcher = runner.cudagraph_dispatcher
    dispatch = dispatcher.dispatch

    def counted(*args, **kwargs):
        chosen = dispatch(*args, **kwargs)
        mode = chosen[0] if isinstance(chosen, tuple) else chosen.cg_mode
        modes[str(mode).rpartition(".")[2]] += 1
        return chosen

    dispatcher.dispatch = counted
    return modes


def worker_of(engine):
    core = engine._llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker


def warm_up_steps():
    return WARM_UP_STEPS if torch.cuda.is_available() else 2


@contextmanager
def decoding(engine, requests):
    """Whether all of `requests` are past their prompts, and none is at its end."""
    engine.add(requests)
    try:
        for _ in range(warm_up_steps()):
            engine.step()
        yield
    finally:
        engine.abort([request.ticket for request in requests])
        for _ in range(engine._steps_in_flight):
            engine._llm.llm_engine.step()


def milliseconds(engine, steps):
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return 1e3 * (time.perf_counter() - start) / steps


def floors(engine, requests, steps, config, device, bytes_per_s):
    """Decode steps of FLOOR_SEQUENCES next to their floors."""
    shape = read_model_shape(Path(config.model.path))
    found = {"bandwidth_gb_per_s": bytes_per_s / 1e9}
    for number, sequences in enumerate(FLOOR_SEQUENCES):
        if sequences > config.rollout.max_num_seqs:
            continue
        asked = requests(sequences, 110 + number)
        with decoding(engine, asked):
            step_ms = milliseconds(engine, steps)
        context = len(asked[0].prompt.token_ids) + warm_up_steps() + steps / 2
        found[str(sequences)] = beside_floor(
            config,
            shape,
            device=device,
            sequences=sequences,
            context=context,
            step_ms=step_ms,
            bytes_per_s=bytes_per_s,
        )
    return found


def step_milliseconds(engine, requests, steps, lengths):
    result = {}
    with decoding(engine, requests):
        result["as a run does"] = milliseconds(engine, steps)
    unseeded = [dataclasses.replace(request, seed=None) for request in requests]
    with decoding(engine, unseeded):
        result["without seeds"] = milliseconds(engine, steps)
    lengths.logprobs = False
    with decoding(engine, requests):
        result["without log-probs"] = milliseconds(engine, steps)
    lengths.logprobs = True
    return result


def cpu_budget(engine, requests, steps):
    seconds = defaultdict(float)
    llm = engine._llm.llm_engine
    core = llm.engine_core.engine_core
    watched = [
        (core.scheduler, "schedule", "schedule"),
        (core.model_executor, "execute_model", "prepare and launch the model"),
        (core.model_executor, "sample_tokens", "launch the sampler"),
        (core.scheduler, "update_from_output", "update_from_output"),
        (llm.output_processor, "process_outputs", "process_outputs"),
        (llm, "step", "vLLM"),
    ]
    if torch.cuda.is_available():
        watched.append((torch.cuda.Event, "synchronize", "wait for the GPU"))
    with decoding(engine, requests):
        undo = [watch(owner, name, seconds, label) for owner, name, label in watched]
        whole = milliseconds(engine, steps)
        for put_back in undo:
            put_back()
    parts = {label: 1e3 * spent / steps for label, spent in seconds.items()}
    inside = sum(value for label, value in parts.items() if label != "vLLM")
    return parts | {
        "between vLLM's parts": parts["vLLM"] - inside,
        "rlsys": whole - parts["vLLM"],
        "step": whole,
    }


def watch(owner, name, seconds, label):
    """Add up the time in a method; returns what undoes that."""
    method = getattr(owner, name)
    own = name in vars(owner)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[label] += time.perf_counter() - start

    setattr(owner, name, timed)
    return (lambda: setattr(owner, name, method)) if own else (lambda: delattr(owner, name))


def gpu_budget(engine, requests, steps):
    with decoding(engine, requests):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kinds, names = defaultdict(float), defaultdict(float)
    for name, start, end in kernels:
        kinds[kind_of(name)] += (end - start) / 1e3 / steps
        names[name[:90]] += (end - start) / 1e3 / steps
    first, last = min(k[1] for k in kernels), max(k[2] for k in kernels)
    return {
        "by kind": dict(kinds),
        "busy": busy((start, end) for _, start, end in kernels) / 1e3 / steps,
        "from first to last": (last - first) / 1e3 / steps,
        "kernels a step": len(kernels) / steps,
        "kernels": dict(sorted(names.items(), key=lambda item: -item[1])[:TOP]),
    }


def kind_of(name):
    for kind, expression in KINDS.items():
        if re.search(expression, name, re.IGNORECASE):
            return kind
    return "other"


def busy(spans):
    """Microseconds in which any of `spans` was going on."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def functions(engine, requests, steps):
    profiler = cProfile.Profile()
    with decoding(engine, requests):
        profiler.enable()
        for _ in range(steps):
            engine.step()
        profiler.disable()
    rows = [
        (f"{os.path.basename(file)}:{line}({name})", 1e3 * own / steps, calls / steps)
        for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items()
    ]
    rows.sort(key=lambda row: -row[1])
    return {name: {"ms": own, "calls": calls} for name, own, calls in rows[:TOP]}
