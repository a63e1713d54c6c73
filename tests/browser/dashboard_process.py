"""`rlsys dashboard` and runs that it shows, as processes of their own."""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RLSYS = str(Path(sys.executable).parent / "rlsys")


class Dashboard:
    """`rlsys dashboard` as a process of its own, which can be stopped and started again."""

    def __init__(self, *places: Path, port: int = 0):
        self.process = subprocess.Popen(
            [RLSYS, "dashboard", *map(str, places), "--port", str(port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the dashboard did not say its address: {line!r}"
        self.url = found[0]
        self.port = int(re.search(r":(\d+)/", self.url)[1])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def write_run(folder: Path, steps: int, seconds: float = 0, seed: int = 0) -> subprocess.Popen:
    """A run written by a process of its own."""
    words = [str(folder), str(steps), str(seconds), str(seed)]
    return subprocess.Popen([sys.executable, str(HERE / "live_run.py"), *words])
