"""A run whose disk becomes full has ended, with the exit code of that, whatever else fails."""

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
        for step in range(10_000):
            tracker.log_metrics(step, {"reward": 1.0, "loss": 0.0, "text": "x" * 1000})
except OSError as error:
    print(of_error(error), run.status.read_text().strip(), run.state())
"""


def test_the_status_is_ended_on_a_full_disk(tmp_path):
    mount = 'mount -t tmpfs -o size=512k none /mnt && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        [*command, str(write_config(tmp_path))],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["74 ended ended"], done.stderr
