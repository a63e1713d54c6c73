"""How busy and how full GPUs are while something runs on them."""

import os
import shutil
import statistics
import subprocess
import threading
import time

SAMPLE_MS = 200


def query(fields):
    """nvidia-smi's command line for the GPUs that this process may see; None: it shows none."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen == "" or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return command + ([f"--id={seen}"] if seen else [])  # it does not read the variable itself


def answers(fields):
    """A line of each GPU, without a CUDA context, which would take memory."""
    if (command := query(fields)) is None:
        return []
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def memory_gib():
    """The memory of each GPU."""
    return [float(mib) / 1024 for mib in answers("memory.total")]


def watched_gpus(device):
    """A context with a GpuWatch; without GPUs one that sees none."""
    command = None if device == "cpu" else query("index,utilization.gpu,memory.used")
    return GpuWatch(command)


class GpuWatch:
    """What nvidia-smi samples of the GPUs that this process may see."""

    def __init__(self, command):
        self._command = command
        self._samples = []

    def __enter__(self):
        if self._command is None:
            return self
        self._process = subprocess.Popen(
            [*self._command, f"--loop-ms={SAMPLE_MS}"], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *error):
        if self._command is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()

    def _read(self):
        for line in self._process.stdout:
            self.note(time.monotonic(), line)

    def note(self, at, line):
        """Keep a line of nvidia-smi: index, percent of busy time, MiB; others are not kept."""
        values = [value.strip() for value in line.split(",")]
        if len(values) == 3 and all(value.isdigit() for value in values):
            self._samples.append((at, *map(int, values)))

    def between(self, since, until):
        """By GPU, between two moments of time.monotonic: idle share, and peak memory in GiB.

        Idle is the share of the time in which no kernel ran. Memory is of all processes.
        """
        idle, peak = {}, {}
        for gpu in sorted({gpu for _, gpu, *_ in self._samples}):
            seen = [(p, m) for at, g, p, m in self._samples if g == gpu and since < at <= until]
            if seen:
                idle[f"GPU {gpu}"] = 1 - statistics.mean(percent for percent, _ in seen) / 100
                peak[f"GPU {gpu}"] = max(mib for _, mib in seen) / 1024
        return {"idle_share_by_nvidia_smi": idle, "peak_gib_by_nvidia_smi": peak}
