"""Measurements in processes of their own: one that fails or hangs does not disturb the others."""

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

EXIT_S = 20.0
"""For a command to end after its result; what it has to say is known by then."""
STACKS_S = 3.0
"""For a command to print its stacks at its deadline."""
SO_FAR = "so_far"


def run_alone(command, *, timeout_s, env=None, gpus=None):
    """The last line of JSON that a command printed to stdout, or {"error": why it printed none}.

    The command gets a session of its own, and all of it is killed when it is over, takes longer
    than `timeout_s`, or does not end after its result ("hung_after"), as TRL's client of a vLLM
    server sometimes. A Python program whose time is up prints the stacks of its threads first. A
    line with SO_FAR in it is not yet the result; if no other follows, it is what comes back, beside
    the error. `gpus` are the numbers of those that the command may see; its stderr is this one's.
    """
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"} | (env or {})
    if gpus is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = seen.split(",") if seen else [str(number) for number in range(max(gpus) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(ids[number] for number in gpus)
    start = time.monotonic()
    result, end = None, start + timeout_s
    # A file, because a pipe stays open as long as any grandchild lives.
    with tempfile.NamedTemporaryFile("w") as stdout, open(stdout.name) as printed:
        process = subprocess.Popen(command, env=environment, stdout=stdout, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                waited_for = unfinished(result)
                result = last_result(printed) or result
                if waited_for and not unfinished(result):
                    end = min(end, time.monotonic() + EXIT_S)
            code = process.poll()
            if code is None and unfinished(result):
                print_stacks(process)
        finally:
            end_session(process)
        result = last_result(printed) or result
    took = {"process_s": round(time.monotonic() - start, 1)}
    if code:
        return {"error": f"exit code {code}: {command}"} | (result or {}) | took
    if unfinished(result):
        why = "no result printed" if code == 0 else f"not done within {timeout_s:g} s"
        return {"error": f"{why}: {command}"} | (result or {}) | took
    return result | took | ({"hung_after": True} if code is None else {})


def print_stacks(process):
    """Let a Python process print where its threads are, and end."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STACKS_S)


def unfinished(result):
    """Whether the result is missing, or has only the measurements so far."""
    return result is None or SO_FAR in result


@contextlib.contextmanager
def results_only():
    """A function that prints a result, a line of JSON; whatever else is printed goes to stderr."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield lambda result: print(json.dumps(result), file=stdout, flush=True)


def last_result(printed):
    """The last line of JSON that was printed since the last call and is whole, if any."""
    result = None
    while True:
        start = printed.tell()
        line = printed.readline()
        if not line.endswith("\n"):
            printed.seek(start)
            return result
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):  # a line of another program
                result = json.loads(line)


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
