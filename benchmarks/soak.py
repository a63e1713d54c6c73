"""A small real run on CPU that is killed and stopped at random, against the same run left alone.

    python benchmarks/soak.py --minutes 30            # faults at random; prints JSON
    python benchmarks/soak.py --table                 # each fault of tests/faults once

Every few dozen steps a process of a random role is killed or stopped in a random phase. After
`--minutes` the run is interrupted, and an undisturbed run takes as many steps. Metrics but clocks,
completions and weights have to be equal to the bit, and the memory and file handles of every
process flat: see MOST_MIB and MOST_HANDLES. scripts/reliability.py writes docs/reliability.md from
the JSON files of both in benchmarks/baselines.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from machine import describe_machine

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/faults", "tests/actors")]
sys.path.insert(0, str(ROOT / "examples" / "countdown"))

from fault_runs import (  # noqa: E402
    ROLES,
    TABLE,
    Fault,
    FaultRun,
    Scenario,
    differences,
    write_fault_run,
)
from run_cases import title  # noqa: E402
from starter_model import write_starter_model  # noqa: E402

MOST_MIB = 64
"""Growth of a process's own memory (USS) that counts as flat: what glibc's malloc keeps of freed
tensors, see docs/reliability.md."""
MOST_HANDLES = 24
"""Growth of a process's file handles that counts as flat."""
MOST_HANDLES_OF = {"_private/log_monitor.py": 200}
"""Ray's log monitor has as many logs of dead processes open before it closes any."""
WARM_UP_STEPS = 20
WINDOW_STEPS = 60
"""Steps at either end of a process's life, whose minima are compared: malloc keeps memory of freed
tensors, and a policy gives it back every 50 updates, see docs/reliability.md."""
LOOK_S = 2.0
ENDLESS = 10**6
CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
"""Steps must not depend on how many there are to be."""


class Look(NamedTuple):
    """What a process has."""

    age: int
    """Steps since it was there first."""
    mib: float
    """Its own memory."""
    handles: int


class Growth:
    """Memory and file handles of every process of a run, read while it runs."""

    def __init__(self, run: FaultRun):
        self._run = run
        self._began: dict[psutil.Process, int] = {}
        self._seen: dict[tuple[str, psutil.Process], list[Look]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Growth:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            step = self._run.finished_steps()
            driver = psutil.Process(self._run.popen.pid)
            for process in (driver, *self._run.processes()):
                role = "driver" if process == driver else kind_of(process)
                if role is None:
                    continue
                try:
                    used = process.memory_full_info().uss / 2**20, process.num_fds()
                except psutil.Error:  # it was killed
                    continue
                age = step - self._began.setdefault(process, step)
                self._seen[role, process].append(Look(age, *used))

    def rows(self) -> list[dict[str, Any]]:
        """The process of each role that grew most."""
        worst: dict[str, dict[str, Any]] = {}
        for (role, _), seen in self._seen.items():
            warm = [look for look in seen if look.age >= WARM_UP_STEPS]
            if len(warm) < 2:
                continue
            row = grown(role, warm)
            if role not in worst or badness(row) > badness(worst[role]):
                worst[role] = row
        order = ["driver", *ROLES]
        return [worst[role] for role in sorted(worst, key=lambda role: (role not in order, role))]


def grown(role: str, looks: list[Look]) -> dict[str, Any]:
    """A row of `Growth.rows`: the least memory and handles of the first and of the last steps."""
    oldest = looks[-1].age
    window = min(WINDOW_STEPS, (oldest - WARM_UP_STEPS) // 2)
    first = [look for look in looks if look.age <= looks[0].age + window]
    last = [look for look in looks if look.age >= oldest - window]
    mib = [min(look.mib for look in part) for part in (first, last)]
    handles = [min(look.handles for look in part) for part in (first, last)]
    most_handles = MOST_HANDLES_OF.get(role, MOST_HANDLES)
    return {
        "role": role,
        "steps": oldest - looks[0].age,
        "mib": [round(one) for one in mib],
        "handles": handles,
        "is_flat": mib[1] - mib[0] <= MOST_MIB and handles[1] - handles[0] <= most_handles,
    }


def badness(row: dict[str, Any]) -> tuple[bool, int]:
    """Rows of processes that are not flat come last, then those that grew most."""
    return not row["is_flat"], row["mib"][1] - row["mib"][0]


def kind_of(process: psutil.Process) -> str | None:
    """What a process of a run is; None if that is not known."""
    words = title(process).split()
    if not words:
        return None
    if words[0].startswith("ray::"):
        actor = words[0].removeprefix("ray::").partition(".")[0].partition("(")[0]
        return {name: role for role, name in ROLES.items()}.get(actor)
    if "rlsys.rewards.pool.serve" in " ".join(words):
        return "reward functions"
    for word in words[:6]:
        if word.endswith(".py"):
            return f"{Path(word).parent.name}/{Path(word).name}"
    name = Path(words[0]).name
    return name if name in ("raylet", "gcs_server") else None


def soak(folder: Path, model: Path, minutes: float, every: int, seed: int) -> dict[str, object]:
    """Random faults for some minutes, then the same number of steps without."""
    drawing, faults = random.Random(seed), faults_of_one_run()
    saving = {"save_steps": 50, "save_hf_steps": None}
    sections = {"policy": CONSTANT, "checkpoint": saving, "max_steps": ENDLESS}
    write_fault_run(folder / "disturbed", model, **sections)
    run = FaultRun(folder / "disturbed", "run.yaml")
    outcomes = []
    try:
        run.wait_for(lambda: run.finished_steps() > 0)
        end = time.monotonic() + 60 * minutes
        with Growth(run) as growth:
            while time.monotonic() < end:
                at = run.finished_steps() + drawing.randint(every // 2, every + every // 2)
                run.wait_for(lambda at=at: run.finished_steps() >= at)
                outcomes.append(run.meet(drawing.choice(faults)))
                print(json.dumps(outcomes[-1].as_row()), file=sys.stderr, flush=True)
                if run.popen.poll() is not None:
                    raise RuntimeError(run.log)
        run.popen.terminate()
        run.wait()
        steps = run.finished_steps()
        write_fault_run(folder / "undisturbed", model, **sections | {"max_steps": steps})
        alone = FaultRun(folder / "undisturbed", "run.yaml")
        with Growth(alone) as growth_alone:
            code = alone.popen.wait()  # it takes as long as it takes
        if code != 0:
            raise RuntimeError(alone.log)
        found = differences(run.results(newest_only=True), alone.results(newest_only=True))
    finally:
        run.end()
    return {
        "minutes": minutes,
        "seed": seed,
        "steps": steps,
        "faults": [outcome.as_row() for outcome in outcomes],
        "differences": found,
        "processes": growth.rows(),
        "processes_alone": growth_alone.rows(),
    }


def faults_of_one_run() -> list[Fault]:
    """The faults of the table that need no config and no words of their own."""
    plain = [one.faults for one in TABLE.values() if not (one.sections or one.words)]
    return list(chain.from_iterable(plain))


def table(folder: Path, model: Path, names: list[str]) -> dict[str, object]:
    """Every fault of the named runs, each run against the same one left alone."""
    alone: dict[str, dict[str, object]] = {}
    rows = []
    for name in names:
        scenario = TABLE[name]
        key = json.dumps(scenario.sections)
        if key not in alone:
            alone[key] = results_alone(folder / f"undisturbed-{len(alone)}", model, scenario)
        write_fault_run(folder / name, model, **scenario.sections)
        run = FaultRun(folder / name, "run.yaml", *scenario.words)
        try:
            outcomes = [run.meet(fault) for fault in scenario.faults]
            found = ["the run ended"]
            if run.wait() == 0:
                found = differences(run.results(), alone[key])
        finally:
            run.end()
        rows += [outcome.as_row() | {"differences": found} for outcome in outcomes]
        if found or any(outcome.error for outcome in outcomes):
            print(run.log, file=sys.stderr)
        print(json.dumps(rows[-len(outcomes) :]), file=sys.stderr, flush=True)
    return {"table": rows}


def results_alone(folder: Path, model: Path, scenario: Scenario) -> dict[str, object]:
    """What the run of a scenario leaves without its faults."""
    write_fault_run(folder, model, **scenario.sections)
    run = FaultRun(folder, "run.yaml")
    if run.wait() != 0:
        raise RuntimeError(run.log)
    return run.results()


def problems(found: dict[str, object]) -> list[object]:
    """What is not as it has to be: faults that were not noticed, differences, growth."""
    rows = [*found.get("table", ()), *found.get("faults", ())]
    processes = [*found.get("processes", ()), *found.get("processes_alone", ())]
    growing = [row for row in processes if not row["is_flat"]]
    differing = [row for row in rows if row["error"] or row.get("differences")]
    return [*differing, *growing, *found.get("differences", ())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=int, default=36, help="steps between faults, about")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--table", nargs="*", choices=TABLE, help="each fault once, of these runs")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = Path(folder) / "model"
        write_starter_model(model, seed=0)
        if options.table is not None:
            found = table(Path(folder), model, options.table or list(TABLE))
        else:
            found = soak(Path(folder), model, options.minutes, options.every, options.seed)
    print(json.dumps({"machine": machine} | found, indent=1))
    if wrong := problems(found):
        sys.exit("\n".join(map(str, wrong)))


if __name__ == "__main__":
    main()
