"""Times the answers of `rlsys dashboard` on a run of 100,000 steps and 1,000,000 completions.

python benchmarks/dashboard.py
python benchmarks/dashboard.py --completions 100000 --steps 10000 --folder runs/large
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from machine import describe_machine

from rlsys.files import JsonlWriter, encode_row
from rlsys.run.folder import ENDED, RunDir

GROUP = 8
"""Completions of a prompt."""
WORDS = (
    *("we", "try", "add", "the", "numbers", "and", "get", "so"),
    *("then", "multiply", "by", "first", "second", "equals", "left", "over"),
)
CHARTS = (
    *("reward", "eval/reward", "completions/mean_length", "kl", "sampling/logp_difference/mean"),
    *("entropy", "time/step", "rollout/tokens_per_second"),
)
"""What the overview asks for together."""
PHASES = {
    "rollout 0": ("rollout", "rollout", 0.0, 5.5),
    "rollout 1": ("rollout", "rollout", 0.0, 5.0),
    "reward 0": ("reward", "countdown", 5.0, 5.7),
    "policy 0": ("policy", "update", 5.7, 9.2),
    "policy 1": ("policy", "update", 5.7, 9.1),
}
"""Actor -> role, phase, and when in a step of ten seconds it works."""
REPEATS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="made once and used again; default: temporary")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDir(options.folder or Path(scratch) / "run")
        if not run.metrics.exists():
            write_run(run, options.steps, options.completions)
        sizes = {path.name: mib(path) for path in sorted(run.path.glob("*.jsonl"))}
        before = {"without cache": {}, "with cache": {}}
        for path in run.cache.glob("*"):
            path.unlink()
        for case in before:
            before[case] = measure(run.path, options.steps)
    result = {"steps": options.steps, "completions": options.completions, "mib": sizes}
    print(json.dumps({"machine": machine} | result | before, indent=2))


def write_run(run, steps, completions):
    """Files as a run writes them, with numbers that are made up."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.write_text("grpo:\n  beta: 0.0\n")
    drawing = random.Random(0)
    metrics = JsonlWriter(run.metrics)
    timeline = JsonlWriter(run.timeline)
    more = {f"metric/{number}": 0.0 for number in range(40)}
    for step in range(1, steps + 1):
        row = {name: drawing.random() for name in (*CHARTS, *more) if not name.startswith("eval/")}
        metrics.append({"step": step, **row, "time/step": 10.0, "elapsed_time": "1h 2m 3s"})
        if step % 100 == 0:
            metrics.append({"step": step, "eval/reward": drawing.random()})
        start = 1.79e9 + 10 * step
        spans = [
            ("driver", "driver", "rollout", 0.0, 5.7),
            ("driver", "driver", "update", 5.7, 9.3),
        ]
        spans += [(actor, *rest) for actor, rest in PHASES.items()]
        timeline.append(
            *(
                dict(actor=a, role=r, phase=p, start=start + b, end=start + e, step=step)
                for a, r, p, b, e in spans
            )
        )
    with run.completions.open("wb") as file:
        for number in range(completions):
            file.write(encode_row(completion(number, steps, completions, drawing)))
    for writer in (metrics, timeline):
        writer.close()
    run.write_status(ENDED)


def completion(number, steps, completions, drawing):
    group, index = divmod(number, GROUP)
    right, wellformed = drawing.random() < 0.4, drawing.random() < 0.9
    text = " ".join(drawing.choices(WORDS, k=drawing.randint(20, 180)))
    return {
        "step": 1 + number * steps // completions,
        "group_id": group,
        "index": index,
        "group_size": GROUP,
        "prompt_id": f"countdown-{group % 2000}",
        "reward": float(right + wellformed),
        "rewards": {"countdown": float(right), "format": float(wellformed)},
        "failures": {},
        "advantage": drawing.uniform(-2, 2),
        "num_tokens": len(text) // 4,
        "finish_reason": "stop",
        "policy_versions": [0],
        "version_starts": [0],
        "prompt": f"Make {group % 100} from [3, 5, 7, {group % 2000}].",
        "text": f"<think>{text}</think><answer>{group % 2000} + 3</answer>",
    }


def measure(run, steps):
    """Seconds of answers of a new process: the first, and the median of repeated ones."""
    with dashboard(run) as (process, client):
        name = client.get("/api/runs").json()[0]["id"]
        base = f"/api/runs/{name}"
        asked = {
            "runs": "/api/runs",
            "page": "/",
            "metric_names": f"{base}/metric_names",
            "metrics: overview": f"{base}/metrics?names={','.join(CHARTS)}",
            "metrics: newest": f"{base}/metrics?names={','.join(CHARTS)}&after={steps - 2}",
            "timeline: newest": f"{base}/timeline",
            "timeline: whole run": f"{base}/timeline?from=0&points=4000",
            "health": f"{base}/health",
            "completions: newest": f"{base}/completions?limit=100",
            "completions: condition, sorted": f"{base}/completions?limit=100"
            "&where=countdown = 0 and format = 1&sort=num_tokens",
            "completions: text": f"{base}/completions?limit=100&grep=add add add add",
            "completions: page 5,000": f"{base}/completions?limit=100&offset=500000",
            "history": f"{base}/history?prompt=countdown-7",
        }
        waits = []
        with watched(client, waits):
            answers = {what: timed(process, client, path) for what, path in asked.items()}
        row = client.get(f"{base}/completions?limit=1").json()["rows"][0]["id"]
        answers["completion"] = timed(process, client, f"{base}/completion/{row}")
        return {
            "answers": answers,
            "page_while_others_wait": {"max_s": round(max(waits), 4), "requests": len(waits)},
            "memory_gib": round(process.memory_info().rss / 2**30, 2),
        }


@contextmanager
def dashboard(run):
    command = [sys.executable, "-m", "rlsys.cli", "dashboard", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://[^/]+", process.stdout.readline())[0]
        try:
            with httpx.Client(base_url=url, timeout=600) as client:
                yield psutil.Process(process.pid), client
        finally:
            process.terminate()


def timed(process, client, path):
    """Seconds on the clock, and CPU seconds of the server, which depend less on other programs."""
    seconds, cpu = [], []
    for _ in range(1 + REPEATS):
        before, start = sum(process.cpu_times()[:2]), time.perf_counter()
        answer = client.get(path)
        seconds.append(time.perf_counter() - start)
        cpu.append(sum(process.cpu_times()[:2]) - before)
        assert answer.status_code == 200, answer.text
    return {
        "first_s": round(seconds[0], 4),
        "repeated_s": round(statistics.median(seconds[1:]), 4),
        "first_cpu_s": round(cpu[0], 2),
        "repeated_cpu_s": round(statistics.mean(cpu[1:]), 3),
        "kib": round(len(answer.content) / 1024, 1),
    }


@contextmanager
def watched(client, waits):
    """Ask for the page's smallest file all the time: it waits where the event loop does."""
    ended = threading.Event()

    def ask():
        while not ended.wait(0.05):
            start = time.perf_counter()
            client.get("/icon.svg")
            waits.append(time.perf_counter() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def mib(path):
    return round(path.stat().st_size / 2**20, 1)


if __name__ == "__main__":
    main()
