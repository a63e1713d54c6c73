"""Runs what one GPU can show, or two: GPU tests and short benchmarks, in ten minutes.

    python benchmarks/gpu_suite.py --gpus 1 --out gpu_suite
    python benchmarks/gpu_suite.py --gpus 2 --minutes 10 --out gpu_suite
    python benchmarks/gpu_suite.py --gpus 1 --only "policy update" rollout --out gpu_suite
    python benchmarks/gpu_suite.py --gpus 1 --device cpu --out gpu_suite     # does it run?

Each part has a process of its own, a deadline and a log. Tests run side by side where memory
allows: with --gpus 1 those that need one GPU, with --gpus 2 those that need two. What measures
speed has its GPUs for itself, so it comes after the tests. Parts are begun in the order below as
long as the time allows; what is left out is named.

OUT/gpu_suite_N.json has date, commit, versions and GPUs, and of each part its command, exit code,
seconds, what ran beside it, and the counts of its tests or the results of its benchmark. It is
written again after every part. A copy in benchmarks/baselines is what scripts/gpu_tables.py makes
tables of. The exit code is 1 if a part failed, ran out of time or was left
out.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from alone import end_session
from gpu_watch import memory_gib
from machine import describe_machine

from rlsys.files import replacing

REPOSITORY = Path(__file__).parents[1]
TESTS_APART = {
    1: [["families"], ["memory_options"], ["logprobs", "attention", "kernels", "experts"]],
    2: [["weight_sync", "lora_sync", "run"], ["families", "layouts"]],
}
"""By GPUs: files of tests/gpu that have a process of their own; one more process has the others."""
TESTS_ALONE = {1: ["sleep", "ipc"], 2: []}
"""Files in one more process, which fill a GPU or measure it, and share it with nobody."""
TESTS_GIB = 30.0
"""Share of a GPU that a process of tests may take; vLLM wants a fifth of the GPU to be free."""
TESTS_LIMIT = 0.65
"""Share of the time that tests may take."""
FREE_SHARE = 0.05
"""Share of a GPU that stays free."""


@dataclass(frozen=True)
class Part:
    """One process of the suite."""

    command: list[str]
    """Behind the interpreter."""
    needs_s: float
    """It is not begun with less time left."""
    limit_s: float
    gpus: int = 1
    gib: float | None = None
    """What it takes of each of its GPUs; None: it measures speed, and shares them with nobody."""


@dataclass
class Running:
    """A part whose process runs."""

    part: Part
    gpus: list[int]
    process: subprocess.Popen
    end: float
    log: Path
    started: float = field(default_factory=time.monotonic)
    beside: set[str] = field(default_factory=set)


def main():
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = chosen_parts(arguments)
    on_gpus = arguments.device == "cuda"
    suite = Suite(
        parts,
        out=arguments.out,
        gib=memory_gib()[: arguments.gpus] if on_gpus else [0.0] * arguments.gpus,
        seconds=60 * arguments.minutes,
        settings={name: getattr(arguments, name) for name in ("gpus", "minutes", "device")},
    )
    if len(suite.gib) < arguments.gpus:
        sys.exit(f"--gpus {arguments.gpus}: nvidia-smi shows {len(suite.gib)} here")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # ends the parts, too
    suite.run()
    print(json.dumps({name: summary_of(part) for name, part in suite.ran.items()}, indent=2))
    print(json.dumps({"not run": suite.not_run}, indent=2))
    sys.exit(int(bool(suite.not_run) or not all(map(went_well, suite.ran.values()))))


class Suite:
    """Parts that run one after the other, and side by side where `gib` of GPUs allow it."""

    def __init__(self, parts, *, out, gib, seconds, settings):
        self.out, self.gib = out, gib
        self._waiting, self._running = dict(parts), {}
        self.ran, self.not_run = {}, {}
        self._end = time.monotonic() + seconds
        self._settings = {"machine": describe_machine(), **settings}

    def run(self):
        """Run what the time allows."""
        try:
            while self._waiting or self._running:
                self._begin()
                self._finish()
                time.sleep(0.1)
        finally:
            for running in self._running.values():
                end_session(running.process)
            self._write()

    def _begin(self):
        for name, part in list(self._waiting.items()):
            left = self._end - time.monotonic()
            if left < part.needs_s:
                why = f"{max(left, 0):.0f} s were left, and it takes {part.needs_s:g} s"
                self.not_run[name] = why
                del self._waiting[name]
            elif gpus := self._place(part):
                del self._waiting[name]
                self._start(name, part, gpus, min(part.limit_s, left))

    def _place(self, part):
        """Numbers of GPUs that have room for a part, or []."""
        free = [number for number in range(len(self.gib)) if self._has_room(number, part)]
        return free[: part.gpus] if len(free) >= part.gpus else []

    def _has_room(self, gpu, part):
        there = [running.part for running in self._running.values() if gpu in running.gpus]
        if not there:
            return True
        if part.gib is None or any(other.gib is None for other in there):
            return False
        wanted = part.gib + sum(other.gib for other in there)
        return wanted <= (1 - FREE_SHARE) * self.gib[gpu]

    def _start(self, name, part, gpus, limit_s):
        log = self.out / f"{name.replace(' ', '_')}.log"
        command = [text.format(out=self.out.resolve()) for text in part.command]
        with log.open("wb") as errors, log.with_suffix(".out").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=os.environ | environment(gpus, on_gpus=any(self.gib)),
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        running = Running(part, gpus, process, time.monotonic() + limit_s, log)
        for other, its in self._running.items():
            running.beside.add(other)
            its.beside.add(name)
        self._running[name] = running
        print(f"{name}: started on {gpus}", file=sys.stderr, flush=True)

    def _finish(self):
        for name, running in list(self._running.items()):
            code, late = running.process.poll(), time.monotonic() > running.end
            if code is None and not late:
                continue
            del self._running[name]
            end_session(running.process)
            self.ran[name] = report_of(running, code)
            print(f"{name}: {summary_of(self.ran[name])}", file=sys.stderr, flush=True)
            self._write()

    def _write(self):
        unfinished = [*self._running, *self._waiting]
        report = {
            **self._settings,
            "parts": self.ran,
            "not_run": self.not_run | dict.fromkeys(unfinished, "the suite ended before it did"),
        }
        with replacing(self.out / f"gpu_suite_{len(self.gib)}.json") as file:
            file.write_text(json.dumps(report, indent=2) + "\n")


def environment(gpus, *, on_gpus):
    """Variables of a part: the GPUs that it may see; without GPUs its tests run on the CPU."""
    if not on_gpus:
        return {"RLSYS_GPU_TESTS_DEVICE": "cpu"}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = seen.split(",") if seen else list(map(str, range(max(gpus) + 1)))
    return {"CUDA_VISIBLE_DEVICES": ",".join(ids[gpu] for gpu in gpus)}


def report_of(running, code):
    """What the results say of a part that ended with `code`; None: its time was up."""
    report = {
        "command": running.part.command,
        "rc": "time was up" if code is None else code,
        "seconds": round(time.monotonic() - running.started, 1),
        "gpus": running.gpus,
        "beside": sorted(running.beside),
    }
    printed = running.log.with_suffix(".out").read_text(errors="replace")
    tests = running.log.with_suffix(".xml")
    if tests.exists():
        report["tests"] = counts_of(tests)
    elif (results := last_json(printed)) is not None:
        results.pop("machine", None)
        report["results"] = results
        report["problems"] = problems_in(results)
    if code != 0:
        said = running.log.read_text(errors="replace")[-1500:]
        report["said"] = said if said.strip() else printed[-1500:]
    return report


def counts_of(junit_xml):
    """Numbers of tests by outcome, and which failed or were skipped, and why."""
    outcomes = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(junit_xml).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        problems = [child for child in case if child.tag in ("failure", "error", "skipped")]
        if not problems:
            outcomes["passed"] += 1
        for child in problems:
            kind = "skipped" if child.tag == "skipped" else "failed"
            outcomes[kind][name] = (child.get("message") or "")[:300]
    return outcomes


def last_json(printed):
    """The last JSON object that a benchmark printed, if it is whole; None otherwise."""
    start = 0 if printed.startswith("{") else printed.find("\n{") + 1
    try:
        return json.loads(printed[start:])
    except json.JSONDecodeError:
        return None


def problems_in(results):
    """{place: text} of what a benchmark could not measure, though it ended well."""
    found = {}
    for name, value in results.items():
        if name in ("error", "skipped") or (name == "errors" and value):
            found[name] = str(value)[-300:]
        elif isinstance(value, dict):
            found |= {f"{name}: {place}": text for place, text in problems_in(value).items()}
    return found


def summary_of(report):
    """A line about a part."""
    tests, problems = report.get("tests"), report.get("problems")
    text = f"exit code {report['rc']}, {report['seconds']:.0f} s"
    if tests is not None:
        text += f", {tests['passed']} passed, {len(tests['failed'])} failed"
    return text + (f", problems: {problems}" if problems else "")


def went_well(report):
    return report["rc"] == 0 and not report.get("problems")


def chosen_parts(arguments):
    """{name: part} of --only, or all that these GPUs can show."""
    parts = test_parts(arguments) | benchmark_parts(arguments)
    if unknown := [name for name in arguments.only or () if name not in parts]:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(parts)}")
    return {name: parts[name] for name in arguments.only or parts}


def test_parts(arguments):
    """Tests that need exactly --gpus: those that need fewer are in the suite of fewer."""
    alone = TESTS_ALONE[arguments.gpus]
    apart = [
        [f"tests/gpu/test_gpu_{name}.py" for name in group]
        for group in [*TESTS_APART[arguments.gpus], alone]
        if group
    ]
    others = ["tests/gpu", *(f"--ignore={file}" for group in apart for file in group)]
    parts = {}
    for number, files in enumerate([*apart, others], 1):
        gib = None if alone and files is apart[-1] else TESTS_GIB
        name = f"tests {number}"
        command = ["-m", "pytest", *files, "--needs-gpus", str(arguments.gpus)]
        command += ["-m", "gpu", f"--junitxml={{out}}/{name.replace(' ', '_')}.xml"]
        limit_s = TESTS_LIMIT * 60 * arguments.minutes
        parts[name] = Part(command, 60, limit_s, gpus=arguments.gpus, gib=gib)
    return parts


def benchmark_parts(arguments):
    """Benchmarks in their short forms, by what they tell: the first ones most."""
    steps = {"prompts": 32, "completion_length": 512, "steps": 2, "warm_up": 1}
    steps |= {"gpus": arguments.gpus, "timeout_s": 170}
    if arguments.gpus == 1:
        parts = {
            "policy update": (45, {"repeats": 4, "budget-s": 60}),
            "steps": (120, steps | {"staleness": 0}),
            "rollout": (80, {"what": "actor", "num_seqs": 512, "completion_length": 256}),
        }
    else:
        parts = {
            "weight sync": (70, {"repeats": 50, "limit-s": 140}),
            "steps": (110, steps | {"staleness": 1}),
        }
    small = {
        "policy update": {"rows": 4, "tokens": 64},
        "steps": {"prompts": 4, "completion_length": 16},
        "rollout": {"num_seqs": 16, "completion_length": 16},
        "weight sync": {"repeats": 4},
    }
    on_gpus = arguments.device == "cuda"
    made = {}
    for name, (needs_s, options) in parts.items():
        if not on_gpus:
            options = options | small[name] | {"device": "cpu", "shape": "tiny"}
        texts = [text for option, value in options.items() for text in (f"--{option}", str(value))]
        command = [f"benchmarks/{SCRIPTS[name]}", *texts]
        gpus = 1 if name == "policy update" or name == "rollout" else arguments.gpus
        made[name] = Part(command, needs_s if on_gpus else 10, 180, gpus=gpus)
    return made


SCRIPTS = {
    "policy update": "policy_update.py",
    "steps": "grpo_step.py",
    "rollout": "rollout.py",
    "weight sync": "weight_sync_gpu.py",
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, choices=[1, 2], default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of parts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
