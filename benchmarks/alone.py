"""Measurements in processes of their own: one that fails or hangs leaves the others alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil


def run_alone(command, *, timeout_s, env=None, gpus=None):
    """What a command printed last to stdout, a line of JSON; or {"error": why there is none}.

    The command gets a session of its own, and all of it is killed when it is over or takes longer
    than `timeout_s`. `gpus` are the numbers of those that it may see; its stderr is this one's.
    """
    environment = os.environ | (env or {})
    if gpus is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = seen.split(",") if seen else [str(number) for number in range(max(gpus) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(ids[number] for number in gpus)
    start = time.monotonic()
    # A file: a pipe is open for as long as any grandchild lives.
    with tempfile.TemporaryFile("w+") as stdout:
        process = subprocess.Popen(command, env=environment, stdout=stdout, start_new_session=True)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not done within {timeout_s:g} s: {command}"}
        finally:
            end_session(process)
        stdout.seek(0)
        lines = [line for line in stdout if line.startswith("{")]
    seconds = round(time.monotonic() - start, 1)
    if process.returncode or not lines:
        return {"error": f"exit code {process.returncode}: {command}", "process_s": seconds}
    return json.loads(lines[-1]) | {"process_s": seconds}


def end_session(process):
    """Kill a process that was started with start_new_session, and what it started.

    Its children may have sessions of their own, where one measurement alone starts others.
    """
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def run_on_gpus(jobs, *, num_gpus):
    """{name: result of job(gpu)} of all `jobs`, in order, each on one of `num_gpus` of its own."""
    waiting, results = list(jobs.items()), {}
    lock = threading.Lock()

    def work(gpu):
        while True:
            with lock:
                if not waiting:
                    return
                name, job = waiting.pop(0)
            print(f"{name}: started on GPU {gpu}", file=sys.stderr, flush=True)
            results[name] = job(gpu)
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in range(num_gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: results[name] for name in jobs}
