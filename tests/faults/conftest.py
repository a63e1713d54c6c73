"""Runs to which faults happen, and the same run without any."""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "actors")]  # its runs and processes

from fault_runs import FaultRun, write_fault_run  # noqa: E402
from run_cases import starter_model  # noqa: E402, F401  # a fixture


@pytest.fixture(scope="session")
def start(starter_model, tmp_path_factory):  # noqa: F811
    """`start(name, *words, **sections)` begins a run in a folder of its own."""
    root = tmp_path_factory.mktemp("faults")
    started = []

    def start(name, *words, **sections):
        write_fault_run(root / name, starter_model, **sections)
        started.append(FaultRun(root / name, "run.yaml", *words))
        return started[-1]

    yield start
    for run in started:
        run.end()


@pytest.fixture(scope="session")
def undisturbed(start):
    """`undisturbed(sections)`: what a run with these sections leaves if nothing happens to it."""
    found = {}

    def results(sections):
        key = json.dumps(sections)
        if key not in found:
            run = start(f"undisturbed-{len(found)}", **sections)
            assert run.wait() == 0, run.log
            assert "fault/" not in run.out.metrics.read_text() or "went back to" in run.log
            found[key] = run.results()
        return found[key]

    return results
