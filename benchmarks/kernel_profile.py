"""Which kernels take the time of a call, what launched them, and what the GPU waits for."""

import torch
from torch.autograd import DeviceType

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
