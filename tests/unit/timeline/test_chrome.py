"""Chrome traces: what Perfetto needs of each event, and one clock for all actors."""

from __future__ import annotations

import gzip
import json
import time

import pytest
import torch

from rlsys.engines.profiling import CLOCK_MARK as MARK_OF_ENGINES
from rlsys.engines.profiling import TorchTrace
from rlsys.timeline.chrome import CLOCK_MARK, TorchPart, write_trace
from rlsys.timeline.spans import Span

START = 1_796_000_000.0
SPANS = [
    Span("policy rank 0", "policy", "update", START + 5, START + 8, 3),
    Span("driver", "driver", "rollout", START, START + 5, 3),
    Span("reward worker 0", "reward", "countdown", START + 1, START + 4, 3, busy=0.5),
    Span("rollout engine 0", "rollout", "sample", START + 0.25, START + 4, 3),
    Span("driver", "driver", "policy_update", START + 5, START + 8, 3),
]


def read(path) -> dict:
    with gzip.open(path, "rt") as file:
        return json.load(file)


def check_schema(trace: dict) -> None:
    """What the Trace Event Format asks of the events that are written here."""
    assert isinstance(trace["traceEvents"], list)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert isinstance(event["args"], dict)
            continue
        assert event["ts"] == pytest.approx(event["ts"])  # a number, not NaN
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert "tid" in event


def names(trace: dict, kind: str) -> dict:
    """Process (or thread) number -> name."""
    return {
        event["pid"] if kind == "process_name" else (event["pid"], event["tid"]): event["args"][
            "name"
        ]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == kind
    }


def test_each_actor_is_a_process_with_its_spans(tmp_path):
    path = tmp_path / "profile" / "steps-3-3.json.gz"
    write_trace(path, SPANS, about={"clocks": {}})
    trace = read(path)
    check_schema(trace)
    assert trace["otherData"] == {"unix_seconds_at_0": START, "clocks": {}}
    processes = names(trace, "process_name")
    assert list(processes.values()) == [
        *("driver", "rollout engine 0", "reward worker 0", "policy rank 0"),
    ]
    whole = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    found = {(processes[e["pid"]], e["name"]): (e["ts"], e["dur"]) for e in whole}
    assert found == {
        ("driver", "step 3"): (0, 8e6),
        ("driver", "rollout"): (0, 5e6),
        ("driver", "policy_update"): (5e6, 3e6),
        ("rollout engine 0", "sample"): (0.25e6, 3.75e6),
        ("reward worker 0", "countdown"): (1e6, 3e6),
        ("policy rank 0", "update"): (5e6, 3e6),
    }
    (scored,) = [event for event in whole if event["name"] == "countdown"]
    assert scored["args"] == {"step": 3, "busy_seconds": 0.5}


@pytest.fixture
def traced(tmp_path):
    """A real trace of torch, and when its product was computed."""
    trace = TorchTrace(operations=True, memory=False, device="cpu")
    before = time.time()
    torch.randn(200, 200) @ torch.randn(200, 200)
    after = time.time()
    return trace.stop(tmp_path, "policy-0"), before, after


def test_what_torch_saw_is_on_the_clock_of_the_spans(tmp_path, traced):
    found, before, after = traced
    assert found.memory is None
    span = Span("policy rank 0", "policy", "update", before, after, 1)
    part = TorchPart("policy rank 0", found.label, found.trace, found.marked_at)
    write_trace(tmp_path / "t.json.gz", [span], [part])
    trace = read(tmp_path / "t.json.gz")
    check_schema(trace)
    (product,) = [e for e in trace["traceEvents"] if e["name"] == "aten::mm"]
    (update,) = [e for e in trace["traceEvents"] if e["name"] == "update"]
    assert product["pid"] == update["pid"]  # a thread below the actor's timeline
    assert update["ts"] - 1000 <= product["ts"]
    assert product["ts"] + product["dur"] <= update["ts"] + update["dur"] + 1000
    assert names(trace, "thread_name")[product["pid"], product["tid"]] != "timeline"


def test_a_host_whose_clock_is_ahead_is_moved_back(tmp_path, traced):
    found, before, after = traced
    span = Span("policy rank 0", "policy", "update", before, after, 1)
    parts = [
        TorchPart("policy rank 0", label, found.trace, found.marked_at - ahead)
        for label, ahead in (("worker 0", 0.0), ("worker 1", 2.5))
    ]
    write_trace(tmp_path / "t.json.gz", [span], parts)
    trace = read(tmp_path / "t.json.gz")
    first, second = [e for e in trace["traceEvents"] if e["name"] == "aten::mm"]
    assert first["ts"] - second["ts"] == pytest.approx(2.5e6)
    processes = names(trace, "process_name")
    assert [processes[e["pid"]] for e in (first, second)] == [
        *("policy rank 0 worker 0", "policy rank 0 worker 1"),
    ]


def test_a_gpu_is_a_process_of_its_own_and_arrows_of_two_ranks_stay_apart(tmp_path):
    events = [
        {"ph": "M", "name": "process_labels", "pid": 77, "tid": 0, "args": {"labels": "CPU"}},
        {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "args": {"labels": "GPU 0"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": "stream 7"}},
        {"ph": "X", "name": CLOCK_MARK, "pid": 77, "tid": 77, "ts": 100.0, "dur": 1.0},
        {"ph": "X", "name": "gemm", "pid": 0, "tid": 7, "ts": 150.0, "dur": 2.0},
        {"ph": "s", "name": "ac2g", "id": 5, "pid": 77, "tid": 77, "ts": 140.0},
        {"ph": "X", "name": "PyTorch Profiler", "pid": "Spans", "tid": "x", "ts": 90.0, "dur": 9.0},
    ]
    parts = []
    for rank in (0, 1):
        path = tmp_path / f"{rank}.json.gz"
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": events}, file)
        parts.append(TorchPart(f"policy rank {rank}", "", path, START + 1))
    write_trace(tmp_path / "t.json.gz", SPANS, parts)
    trace = read(tmp_path / "t.json.gz")
    check_schema(trace)
    processes = names(trace, "process_name")
    kernels = [e for e in trace["traceEvents"] if e["name"] == "gemm"]
    assert [processes[e["pid"]] for e in kernels] == ["policy rank 0 GPU 0", "policy rank 1 GPU 0"]
    assert [e["ts"] for e in kernels] == [1e6 + 50, 1e6 + 50]
    assert {names(trace, "thread_name")[e["pid"], e["tid"]] for e in kernels} == {"stream 7"}
    assert len({e["id"] for e in trace["traceEvents"] if e["ph"] == "s"}) == 2
    assert not any(e["name"] == "PyTorch Profiler" for e in trace["traceEvents"])


def test_a_trace_without_the_mark_is_refused_and_leaves_no_file(tmp_path):
    path = tmp_path / "0.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": []}, file)
    with pytest.raises(ValueError, match="by which clocks are compared"):
        write_trace(tmp_path / "t.json.gz", SPANS, [TorchPart("policy rank 0", "", path, START)])
    assert not (tmp_path / "t.json.gz").exists()


def test_the_mark_is_the_one_that_ranks_write():
    assert CLOCK_MARK == MARK_OF_ENGINES
