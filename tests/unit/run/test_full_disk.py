"""A run whose disk becomes full goes on without its records, and its end is recorded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import write_config

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        shutil.which("unshare") is None or subprocess.call(["unshare", "-rm", "true"]) != 0,
        reason="no user namespaces",
    ),
]

PROGRAM = """
import sys
from contextlib import ExitStack
from pathlib import Path
from rlsys.config.load import load_config
from rlsys.exit_codes import of_error
from rlsys.run.folder import RunDir
from rlsys.tracking import build_tracker

config = load_config(sys.argv[1], ["--output_dir", "/mnt/out"]).config
run = RunDir(Path("/mnt/out"))
try:
    with ExitStack() as stack:
        stack.enter_context(run.held())
        stack.enter_context(run.recording_end())
        tracker = build_tracker(config)
        stack.callback(tracker.close)
        for step in range(1000):
            tracker.log_metrics(step, {"reward": 1.0, "loss": 0.0, "text": "x" * 1000})
        (run.path / "model").write_bytes(bytes(2**20))
except OSError as error:
    print(of_error(error), run.status.read_text().strip(), run.state())
"""


def test_trackers_go_on_and_a_model_that_does_not_fit_ends_the_run(tmp_path):
    mount = 'mount -t tmpfs -o size=512k none /mnt && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        [*command, str(write_config(tmp_path))],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1]
    assert last == "74 ended ended", done.stderr
    (note,) = [line for line in done.stdout.splitlines() if "metrics.jsonl does not work" in line]
    assert "No space left on device" in note
    assert re.search(r"note: metrics.jsonl; lost: \d{3} steps", done.stdout), done.stdout
