"""Traces in Chrome's format, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.files import replacing
from rlsys.timeline.spans import DRIVER, Span

CLOCK_MARK = "rlsys clock"
"""An event of each trace of torch, whose time is known."""
Event = dict[str, Any]
ORDER = ("driver", "rollout", "reward", "policy", "reference", "teacher")
"""Roles from top to bottom."""
DEVICES_FROM = 10_000
"""Numbers of processes that stand for GPUs; actors have smaller ones."""


@dataclass(frozen=True, slots=True)
class TorchPart:
    """A trace that torch wrote in the process of an actor."""

    actor: str
    label: str
    """The process among those of the actor; empty if there is one."""
    path: Path
    marked_at: float
    """Unix seconds of its event CLOCK_MARK, on the driver's clock."""


def write_trace(
    path: Path,
    spans: Sequence[Span],
    parts: Sequence[TorchPart] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write one trace, whole or not at all.

    Args:
        path: ends with .json.gz.
        spans: of at least one actor.
        parts: what torch saw; each is read when it is written, so the largest has to fit in memory.
        about: further facts, as values of JSON.
    """
    start = min(span.start for span in spans)
    numbers = _numbers(spans, parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, gzip.open(scratch, "wt", compresslevel=4) as file:
        head = {"displayTimeUnit": "ms", "otherData": {"unix_seconds_at_0": start, **(about or {})}}
        file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        file.write(json.dumps({"ph": "M", "name": "trace", "pid": 0, "args": {}}))
        for event in _events_of_spans(spans, numbers, start):
            file.write(",\n" + json.dumps(event))
        for index, part in enumerate(parts):
            for event in _events_of_torch(part, numbers[part.actor], index, start):
                file.write(",\n" + json.dumps(event))
        file.write("\n]}\n")


def _numbers(spans: Iterable[Span], parts: Iterable[TorchPart]) -> dict[str, int]:
    """The process number of each actor, from 1 in the order in which they are shown."""
    roles = {span.actor: span.role for span in spans}
    names = sorted(roles, key=lambda name: (ORDER.index(roles[name]), name != DRIVER, name))
    names += [part.actor for part in parts if part.actor not in roles]
    return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}


def _named(pid: int, name: str, order: int, threads: Mapping[Any, str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": order}}
    for tid, thread in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}}


def _events_of_spans(
    spans: Sequence[Span], numbers: Mapping[str, int], start: float
) -> Iterator[Event]:
    for actor, number in numbers.items():
        threads = {0: "timeline", 1: "steps"} if actor == DRIVER else {0: "timeline"}
        yield from _named(number, actor, number, threads)
    of_driver: dict[int, list[Span]] = {}
    for span in spans:
        args: Event = {"step": span.step}
        if span.busy is not None:
            args["busy_seconds"] = span.busy
        yield _whole(span.phase, span.role, numbers[span.actor], 0, span, start) | {"args": args}
        if span.actor == DRIVER:
            of_driver.setdefault(span.step, []).append(span)
    for step, parts in of_driver.items():
        whole = Span(
            DRIVER, "driver", "", min(p.start for p in parts), max(p.end for p in parts), step
        )
        yield _whole(f"step {step}", "step", numbers[DRIVER], 1, whole, start)


def _whole(name: str, category: str, pid: int, tid: int, span: Span, start: float) -> Event:
    """An event with a beginning and a duration, in microseconds from the start of the trace."""
    at, duration = (
        round(1e6 * seconds, 3) for seconds in (span.start - start, span.end - span.start)
    )
    return {
        **{"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid},
        **{"ts": at, "dur": duration},
    }


def _events_of_torch(part: TorchPart, number: int, index: int, start: float) -> Iterator[Event]:
    """The events of torch's trace, below the timeline of its actor.

    What torch says of a process or a GPU becomes a process of its own, unless it is the only one of
    the actor.
    """
    with gzip.open(part.path, "rt", encoding="utf-8", errors="replace") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    marks = [event["ts"] for event in events if event.get("name") == CLOCK_MARK and "ts" in event]
    if not marks:
        raise ValueError(f"{part.path} has no event {CLOCK_MARK!r}, by which clocks are compared")
    shift = 1e6 * (part.marked_at - start) - marks[0]
    title = f"{part.actor} {part.label}".strip()
    is_device = {
        event["pid"]
        for event in events
        if event.get("name") == "process_labels" and "GPU" in str(event["args"].get("labels"))
    }
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    pids: dict[Any, int] = {}
    for event in events:
        pid = event.get("pid")
        if event.get("ph") == "M" or not isinstance(pid, int) or "ts" not in event:
            continue  # names are those from above; events without a process are the profiler's own
        if pid not in pids:
            own = not part.label and pid not in is_device
            pids[pid] = number if own else DEVICES_FROM + 100 * index + len(pids)
            name = f"{title} GPU {pid}" if pid in is_device else title
            of_process = {tid: text for (one, tid), text in threads.items() if one == pid}
            yield from list(_named(pids[pid], name, number, of_process))[2 if own else 0 :]
        moved = event | {"pid": pids[pid], "ts": round(event["ts"] + shift, 3)}
        if "id" in event:  # arrows between events: other processes number theirs in the same way
            moved["id"] = f"{index}:{event['id']}"
        yield moved
