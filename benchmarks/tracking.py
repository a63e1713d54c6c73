"""Measures what recording a run costs, in one run of the demo's config on CPU. Prints JSON.

    python benchmarks/tracking.py
    python benchmarks/tracking.py --grpo.beta 0.001          # any options of `rlsys grpo`

Everything that is on by default records in every second step. In the others only the row of
metrics.jsonl is written, which the measurement needs. The seconds of steps differ by more than
recording takes, so its own time is counted, too: what the driver waits for it, and the CPU
seconds of its threads, which a step may have to share a core with. Actors answer a sign of life
every few seconds; that is not in these numbers.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from grpo_step_cpu import COUNTDOWN, prepare
from machine import describe_machine

from rlsys.config.load import load_config
from rlsys.files import read_jsonl
from rlsys.launch import run
from rlsys.run.folder import RunDir
from rlsys.tracking.composite import CompositeTracker

WARM_UP_STEPS = 2
METHODS = ("log_metrics", "log_completions", "log_warning", "log_timeline")
THREADS = ("tracker ", "heartbeats", "ray_print_logs", "timeline")
"""How the names of threads begin that record."""


class Recording:
    """Turns recording on and off by step, and counts what it takes."""

    def __init__(self):
        self.waited_s = 0.0
        self.rows = []
        self._before = {}
        self._inside = threading.local()
        for name in METHODS:
            setattr(CompositeTracker, name, self._timed(getattr(CompositeTracker, name)))

    def _timed(self, method):
        def call(tracker, *args, **kwargs):
            if getattr(self._inside, "yes", False):
                return method(tracker, *args, **kwargs)
            self._inside.yes = True
            start = time.perf_counter()
            try:
                method(tracker, *args, **kwargs)
            finally:
                self.waited_s += time.perf_counter() - start
                self._inside.yes = False
            if method.__name__ == "log_metrics":
                self._end_step(tracker, args[0])

        return call

    def _end_step(self, tracker, step):
        cpu_s = sum(self._cpu_seconds().values())
        self.rows.append(
            {
                "step": step,
                "is_on": not hasattr(tracker, "_all"),
                "waited_s": self.waited_s - self._before.get("waited_s", 0.0),
                "thread_cpu_s": cpu_s - self._before.get("cpu_s", 0.0),
            }
        )
        self._before = {"waited_s": self.waited_s, "cpu_s": cpu_s}
        if step % 2:  # the next one is off
            tracker._all, tracker._parts = tracker._parts, tracker._parts[:1]
        elif hasattr(tracker, "_all"):
            tracker._parts = tracker._all
            del tracker._all

    def _cpu_seconds(self):
        """CPU seconds so far of each thread that records."""
        ids = {t.native_id: t.name for t in threading.enumerate() if t.name.startswith(THREADS)}
        return {
            ids[one.id]: one.user_time + one.system_time
            for one in psutil.Process().threads()
            if one.id in ids
        }


def main():
    machine = describe_machine()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="measured steps")
    arguments, overrides = parser.parse_known_args()
    recording = Recording()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        steps = WARM_UP_STEPS + arguments.steps
        options = prepare(Path(folder), steps, tracker="tensorboard") + overrides
        run(load_config(COUNTDOWN / "demo.yaml", options))
        seconds = {
            row["step"]: row["time/step"]
            for row in read_jsonl(RunDir(Path(folder) / "run").metrics)
        }
    rows = [row for row in recording.rows if row["step"] > WARM_UP_STEPS]
    print(json.dumps({"machine": machine, "options": overrides} | summary(rows, seconds), indent=2))


def summary(rows, seconds):
    on, off = ([row for row in rows if row["is_on"] is kind] for kind in (True, False))
    cost_s = statistics.median(row["waited_s"] + row["thread_cpu_s"] for row in on)
    step_s = statistics.median(seconds[row["step"]] for row in rows)
    return {
        "measured_steps": {"on": len(on), "off": len(off)},
        "median_step_seconds": {
            name: statistics.median(seconds[row["step"]] for row in kind)
            for name, kind in (("on", on), ("off", off))
        },
        "median_seconds_of_recording": {
            "driver waits": statistics.median(row["waited_s"] for row in on),
            "CPU of its threads": statistics.median(row["thread_cpu_s"] for row in on),
            "both, off": statistics.median(row["waited_s"] + row["thread_cpu_s"] for row in off),
        },
        "recording / step": cost_s / step_s,
    }


if __name__ == "__main__":
    main()
