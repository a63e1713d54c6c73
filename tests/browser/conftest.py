"""A real browser on a real `rlsys dashboard`, over files that the trackers of runs write."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_process import Dashboard, write_run
from waiting import eventually

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = (
    "the page is not tested in a browser: `make test-browser` installs Playwright, and "
    "`apt-get install chromium` a browser"
)


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if sync_playwright is None or CHROMIUM is None:
        warnings.warn(MISSING, stacklevel=1)
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """A folder with two seeds of a run that ended, and a run that goes on."""
    parent = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert write_run(parent / f"seed{seed}", 60, seed=seed).wait() == 0
    (parent / "seed0" / "warnings.jsonl").write_text(
        "".join(json.dumps({**WARNING, "step": s, "event": e}) + "\n" for s, e in EVENTS)
    )
    (parent / "seed0" / "actors.json").write_text(json.dumps([ACTOR]))
    live = write_run(parent / "live", 0, seconds=0.4)
    eventually((parent / "live" / "metrics.jsonl").exists, "the first step")
    yield parent
    live.terminate()
    live.wait()


@pytest.fixture(scope="module")
def dashboard(runs, browser) -> Iterator[Dashboard]:
    """The page over those runs."""
    dashboard = Dashboard(runs)
    yield dashboard
    dashboard.stop()


EVENTS = ((12, "begin"), (30, "end"))
WARNING = {
    "time": 1700000000.0,
    "warning": "entropy_collapse",
    "metric": "entropy",
    "value": 0.02,
    "threshold": 0.1,
    "message": "The entropy fell <b>fast</b>.",
    "look_at": "rlsys completions RUN --step 12",
}
ACTOR = {
    "role": "policy",
    "rank": 0,
    "name": "policy rank 0",
    "pid": 4321,
    "node": "node-a",
    "gpu": None,
    "memory_gib": 1.5,
    "gpu_memory_gib": None,
    "restarts": 2,
    "started": 1700000000.0,
    "last_heartbeat": 1700000100.0,
    "alive": True,
}
