"""The timeline, the end table and a profile of a whole run that samples ahead."""

from __future__ import annotations

import gzip
import json
from itertools import groupby, pairwise

import pytest
from run_cases import RunProcess, write_run_files

from rlsys.files import read_jsonl
from rlsys.records import open_run
from rlsys.timeline.shares import time_shares
from rlsys.timeline.spans import DRIVER, span_of

pytestmark = [pytest.mark.system, pytest.mark.slow]

PROFILE = ("--profile.steps", "2:3", "--profile.torch", "policy,reference,rollout")
AHEAD = ("--max_steps", "5", "--rollout.max_staleness", "1")


@pytest.fixture(scope="module")
def run(starter_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("timeline")
    write_run_files(folder, starter_model)
    process = RunProcess(folder, "run.yaml", *AHEAD, *PROFILE)
    try:
        assert process.wait() == 0, process.log
        yield process
    finally:
        process.end()


@pytest.fixture(scope="module")
def spans(run):
    found = [span_of(row) for row in open_run(run.out.path).timeline()]
    assert None not in found
    return found


def lanes(spans):
    """The spans of each actor, in order."""
    by_actor = sorted(spans, key=lambda span: (span.actor, span.start))
    return {name: list(lane) for name, lane in groupby(by_actor, key=lambda span: span.actor)}


def test_the_phases_cover_the_wall_time_of_every_step(spans):
    driver = lanes(spans)[DRIVER]
    begins = {step: min(s.start for s in driver if s.step == step) for step in range(1, 6)}
    for step in range(1, 5):  # from the beginning of one to that of the next
        wall = begins[step + 1] - begins[step]
        covered = sum(span.seconds for span in driver if span.step == step)
        assert 0.95 * wall <= covered <= 1.001 * wall


def test_no_span_is_negative_or_overlaps_another_of_its_actor(spans):
    for lane in lanes(spans).values():
        assert all(span.start < span.end for span in lane)
        assert all(first.end <= second.start for first, second in pairwise(lane))
        assert [span.step for span in lane] == sorted(span.step for span in lane)


def test_every_actor_has_its_work_in_every_step(spans):
    found = lanes(spans)
    expected = {
        "policy rank 0": {"update", "weight_sync"},
        "reference rank 0": {"logprobs"},
        "rollout engine 0": {"sample", "weight_sync"},
        "reward worker 0": {"digits", "format"},
    }
    for name, phases in expected.items():
        for step in range(1, 5):  # nothing is left to sample in the last one
            assert phases <= {span.phase for span in found[name] if span.step == step}, name


def test_calls_lie_within_the_phases_of_the_driver_that_made_them(spans):
    phases = {"update": "policy_update", "logprobs": "ref_logprobs"}
    for span in spans:
        if span.phase in phases:
            assert any(
                one.start <= span.start and span.end <= one.end
                for one in lanes(spans)[DRIVER]
                if one.phase == phases[span.phase]
            )


def test_seconds_are_those_of_metrics_jsonl(run, spans):
    times = {row["step"]: row for row in read_jsonl(run.out.metrics) if "time/step" in row}
    for step, row in times.items():
        for phase in ("rollout", "ref_logprobs", "policy_update", "weight_sync"):
            own = [s for s in spans if s.actor == DRIVER and s.step == step and s.phase == phase]
            assert sum(s.seconds for s in own) == pytest.approx(row[f"time/{phase}"], abs=1e-3)


def test_the_table_at_the_end_is_computed_from_these_spans(run, spans):
    text = run.out.summary.read_text()
    assert text in run.log
    assert text.startswith("Where the time went, steps 1 to 5: ")
    shares = time_shares(spans)
    assert sum(shares.limits.values()) == pytest.approx(shares.seconds)
    assert f"limited by: {shares.limited_by}, " in text
    assert "change first: " in text


def test_the_profile_shows_operations_of_torch_within_the_spans_of_their_actors(run):
    (path,) = run.out.profile.iterdir()
    assert path.name == "steps-2-3.json.gz"
    assert f"profile: steps 2 to 3 in {path.relative_to(run.folder)}" in run.log
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    whole = [event for event in events if event["ph"] == "X"]
    for actor in ("policy rank 0", "reference rank 0", "rollout engine 0"):
        of_actor = [event for event in whole if named[event["pid"]] == actor]
        work = sorted((e["ts"], e["ts"] + e["dur"]) for e in of_actor if e["tid"] == 0)
        operations = [event["ts"] for event in of_actor if event.get("cat") == "cpu_op"]
        inside = [any(start <= ts <= end for start, end in work) for ts in operations]
        assert len(operations) > 1000, actor
        assert sum(inside) > 0.95 * len(inside), actor  # an engine is also asked to start tracing
