"""A small run whose processes are killed or stopped in the middle of what they do.

Nothing in rlsys knows of these faults. A process is in a phase if Ray says so: it writes an actor's
class and running method where `ps` shows a command line. So the harness waits until the process is
in a method, stops it, and looks again: a stopped process does not leave.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import yaml
from run_cases import RunProcess, run_config, title, without_clock, write_run_files

from rlsys.files import read_jsonl

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
HEARTBEAT_S = 3.0
"""After so long a stopped process counts as dead here; a run's own default is longer."""
LOOK_S = 0.0005
MAX_STEPS = 40
"""Steps of a run: enough for its last fault on a busy machine, which misses some moments."""
LOADING_S = 1.5
"""An actor that is so old is loading its model, which takes 3 s or more."""
EXIT_S = 30.0
"""Most seconds until a process that is killed has gone."""
OF_MAX_STEPS = ("global_step/max_steps", "percentage")
"""Metrics that depend on how many steps there are to be."""
ROLES = {
    "engine": "RolloutActor",
    "policy": "PolicyRank",
    "reference": "ReferenceRank",
    "reward": "RewardWorker",
}
"""Role -> class of its actors."""
NOTICED = re.compile(
    r"^note: .*(failed in|is killed)|^rlsys: restart \d+ of \d+, from ", re.MULTILINE
)
"""How a run says that it has noticed a fault."""

FALTERING_LOSS = '''
"""The loss of GRPO; one call gives a NaN, the first one of the fifth update."""

from pathlib import Path

from rlsys.algo.losses import losses, register_loss

CALLS = Path("calls")


@register_loss("faltering")
def faltering(inputs, config):
    with CALLS.open("a") as file:
        file.write(".")
    loss, metrics = losses["grpo"](inputs, config)
    return (loss * float("nan") if CALLS.stat().st_size == 9 else loss), metrics
'''


@dataclass(frozen=True)
class Fault:
    """A signal to a process while an actor is in a method."""

    role: str
    """Whose process gets the signal."""
    phase: str
    """As in docs/reliability.md."""
    signal: signal.Signals
    method: str
    """What defines the phase: a method of an actor, and of the process itself without `of`. Empty:
    any, even `__init__`."""
    of: str = ""
    """The role whose method it is, where the process itself is idle."""
    after: Fault | None = None
    """A fault that comes first, in whose recovery this one comes."""
    said: str = ""
    """What the run has said before."""
    delay_s: float = 0.0
    """Seconds that the process has been in the phase."""

    def __str__(self) -> str:
        return f"{self.role}, {self.phase}, {self.signal.name}"


@dataclass(frozen=True)
class Scenario:
    """A run and the faults that happen to it, one after the other."""

    faults: tuple[Fault, ...]
    sections: Mapping[str, Any] = field(default_factory=dict)
    """What its config has besides; the run that is left alone has it too."""
    words: tuple[str, ...] = ()
    """Further words of its command line, which must not change what it computes."""


SIGNALS = (KILL, STOP)
SAMPLING, UPDATING = Fault("engine", "", KILL, "generate"), Fault("policy", "", KILL, "update")
TABLE = {
    "engine": Scenario(
        (
            *(Fault("engine", "sampling", s, "generate") for s in SIGNALS),
            *(Fault("engine", "weight sync", s, "update_weights") for s in SIGNALS),
            *(Fault("engine", "idle, policy updates", s, "update", of="policy") for s in SIGNALS),
            Fault("engine", "the sync that it joins in", STOP, "update_weights", after=SAMPLING),
            Fault("engine", "start of its successor", STOP, "", after=SAMPLING, delay_s=LOADING_S),
        )
    ),
    "policy": Scenario(
        (
            *(Fault("policy", "update", s, "update") for s in SIGNALS),
            *(Fault("policy", "weight sync", s, "send_weights") for s in SIGNALS),
            *(Fault("policy", "snapshot", s, "take_snapshot") for s in SIGNALS),
            *(Fault("policy", "idle, engines sample", s, "generate", of="engine") for s in SIGNALS),
            Fault("policy", "checkpoint", KILL, "begin_checkpoint"),
            Fault("policy", "start of its successor", STOP, "", after=UPDATING, delay_s=LOADING_S),
        )
    ),
    "policy after a rollback": Scenario(
        (Fault("policy", "sync after a rollback", KILL, "send_weights", said="went back to"),),
        {
            "grpo": {"loss_type": "faltering", "external_plugins": ["faltering.py"]},
            "policy": {
                "on_nonfinite": "rollback",
                "max_nonfinite_steps": 1,
                "snapshot_steps": 3,  # so it goes back to a state that is older than a step
            },
        },
    ),
    "reference": Scenario(
        (
            *(Fault("reference", "log-probs", s, "compute_logprobs") for s in SIGNALS),
            *(Fault("reference", "idle, engines sample", s, "generate", "engine") for s in SIGNALS),
        )
    ),
    "one of two reference ranks": Scenario(
        tuple(Fault("reference", "log-probs, 2 ranks", s, "compute_logprobs") for s in SIGNALS),
        {"reference": {"world_size": 2, "tensor_parallel_size": 2, "placement": "own"}},
    ),
    "reward": Scenario(
        (
            *(Fault("reward", "scoring", s, "score") for s in SIGNALS),
            *(Fault("reward", "idle, engines sample", s, "generate", of="engine") for s in SIGNALS),
        )
    ),
    "driver": Scenario(
        (
            Fault("driver", "engines sample", KILL, "generate", of="engine"),
            Fault("driver", "policy updates", KILL, "update", of="policy"),
        ),
        words=("--max_restarts", "5"),
    ),
}
"""Name -> a run. Faults of a role are in one run where they can be."""


@dataclass
class Outcome:
    """What a run made of a fault, in seconds since the signal."""

    fault: Fault
    step: int | None = None
    """None: the run ended first."""
    noticed_s: float | None = None
    """Until the line about it."""
    recovered_s: float | None = None
    """Until the step was finished."""
    error: str | None = None
    """What went wrong with it."""

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        fault = {"role": self.fault.role, "phase": self.fault.phase}
        fault["signal"] = self.fault.signal.name
        return fault | {name: value for name, value in asdict(self).items() if name != "fault"}


def write_fault_run(folder: Path, model: Path, **sections: dict[str, Any] | Any) -> None:
    """The files of a run with every role, without clocks that a restart could move."""
    write_run_files(folder, model)
    (folder / "faltering.py").write_text(FALTERING_LOSS)
    config = run_config(model)
    config |= {"max_steps": MAX_STEPS, "eval_steps": None}
    config["checkpoint"] = {"save_steps": 8, "save_hf_steps": None}
    config["rollout"] |= {"heartbeat_s": HEARTBEAT_S}
    config["policy"] |= {"heartbeat_s": HEARTBEAT_S}
    config["reward"] |= {"heartbeat_s": HEARTBEAT_S}
    config["recovery"] = {"max_restarts": 1000, "backoff_s": 0.0}
    for name, values in sections.items():
        config[name] = (config.get(name) or {}) | values if isinstance(values, dict) else values
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def write_fault_sft_run(folder: Path, model: Path) -> None:
    """The files of supervised training, whose only process besides the driver is the policy."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": f"{n} + {n}", "completion": f"It is {n}."}) for n in range(16)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    config = {
        "output_dir": "out",
        "max_steps": 30,
        "seed": 1,
        "device": "cpu",
        "data": {"dataset": ["train.jsonl"], "max_length": 64},
        "model": {"path": str(model)},
        "policy": {"global_batch_size": 4, "lr": 1e-3, "heartbeat_s": HEARTBEAT_S},
        "checkpoint": {"save_steps": None},
        "tracking": {"report_to": "none"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


class FaultRun(RunProcess):
    """A run to which faults happen."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self._victims: set[psutil.Process] = set()
        """Processes that got a signal; on a busy machine a stopped one lives on for a while."""

    def finished_steps(self) -> int:
        """Steps whose metrics are written."""
        if not self.out.metrics.exists():
            return 0
        return self.out.metrics.read_bytes().count(b"\n")

    def meet(self, fault: Fault) -> Outcome:
        """`hit` and `watch`; what goes wrong is the outcome's error."""
        outcome = Outcome(fault)
        try:
            self.hit(outcome)
            self.watch(outcome)
        except AssertionError:
            lines = [line for line in self.log.splitlines() if line.strip()]
            when = "before" if outcome.step is None else "after"
            outcome.error = f"{when} the fault: {lines[-1]}"
            if self.popen.poll() is None:
                outcome.error = f"{when} the fault nothing happened"
        else:
            if outcome.noticed_s is None:
                outcome.error = "not noticed"
        return outcome

    def hit(self, outcome: Outcome) -> None:
        """Send the signal of a fault as soon as its phase is there; fails if the run ends first."""
        fault = outcome.fault
        if fault.after is not None:
            self.hit(Outcome(fault.after))
        if fault.said:
            self.wait_for(lambda: fault.said in self.log)
        in_method = f"ray::{ROLES[fault.of or fault.role]}.{fault.method}".rstrip(".")
        for watched in self._coming_and_going(in_method):
            with suppress(psutil.NoSuchProcess):
                time.sleep(fault.delay_s)
                watched.suspend()
                if not is_in(watched, in_method):  # it was over meanwhile
                    watched.resume()
                    continue
                victim = watched
                if fault.of:
                    victim = self._process_of(fault.role)
                    victim.suspend()
                    watched.resume()
                self._victims.add(victim)
                outcome.step = self.finished_steps() + 1
                self._sent_at, self._seen_log = time.monotonic(), len(self.log)
                if fault.signal is not STOP:
                    victim.send_signal(fault.signal)
                    victim.wait(EXIT_S)  # `ps` shows its method until then
                return
        raise AssertionError(f"the run ended before {fault}\n{self.log}")

    def _process_of(self, role: str) -> psutil.Process:
        if role == "driver":  # of `max_restarts`: the child of the process that was started
            children = psutil.Process(self.popen.pid).children()
            return next(child for child in children if "rlsys.cli" in title(child))
        found = self.wait_for(lambda: set(self.actors(ROLES[role])) - self._victims)
        return next(iter(found))

    def _coming_and_going(self, in_method: str) -> Iterator[psutil.Process]:
        actor = in_method.partition(".")[0]
        while self.popen.poll() is None:
            running = self.processes() - self._victims
            watched = [process for process in running if title(process).startswith(actor)]
            looked = time.monotonic()
            while watched and time.monotonic() - looked < 1:  # then look for new actors
                for process in watched:
                    if is_in(process, in_method):
                        yield process
                time.sleep(LOOK_S)

    def watch(self, outcome: Outcome) -> None:
        """Wait until the run has said something of a fault, and finished the step after that.

        A process that is idle may be missed by later steps only.
        """

        def is_noticed() -> bool:
            has_ended = self.popen.poll() is not None
            return has_ended or NOTICED.search(self.log, self._seen_log) is not None

        self.wait_for(is_noticed)
        if NOTICED.search(self.log, self._seen_log):
            outcome.noticed_s = time.monotonic() - self._sent_at
        assert outcome.step is not None
        step = max(outcome.step, self.finished_steps() + 1)
        self.wait_for(lambda: self.finished_steps() >= step)
        outcome.recovered_s = time.monotonic() - self._sent_at

    def results(self, *, newest_only: bool = False) -> dict[str, Any]:
        """Everything that must not depend on faults: metrics but timings, texts, weights.

        With `newest_only`, of the weights those of the newest checkpoint: a run that was
        interrupted has no final model, and other checkpoints at other steps.
        """
        rows = [without_faults(row) for row in read_jsonl(self.out.metrics)]
        if newest_only:
            rows = [{n: row[n] for n in row if n not in OF_MAX_STEPS} for row in rows]
        places = [*self.out.path.glob("checkpoints/step-*"), self.out.final]
        if newest_only:
            places = [max(places[:-1], key=lambda place: int(place.name.partition("-")[2]))]
        weights = {
            str(path.relative_to(self.out.path)): hashlib.sha256(path.read_bytes()).hexdigest()
            for place in places
            for path in sorted(place.rglob("*.safetensors"))
        }
        assert weights
        return {
            "metrics": rows,
            # Groups stand in the file as they finished, which is a matter of time.
            "completions": sorted(
                read_jsonl(self.out.completions) if self.out.completions.exists() else (),
                key=lambda row: (row["step"], row["group_id"], row["index"]),
            ),
            "weights": weights,
        }


def is_in(process: psutil.Process, method: str) -> bool:
    """Whether an actor's process runs a method now, as in ray::PolicyRank.update."""
    return re.match(rf"{re.escape(method)}(\W|$)", title(process)) is not None


def without_faults(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without clocks and without what counts faults."""
    kept = without_clock(dict(row))
    return {name: value for name, value in kept.items() if not name.startswith("fault/")}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The first differences between what two runs left."""
    found = []
    for ours, theirs in zip_longest(one["metrics"], other["metrics"], fillvalue={}):
        names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        step = (ours or theirs)["step"]
        found += [f"step {step}, {n}: {ours.get(n)} and {theirs.get(n)}" for n in names]
    if one["completions"] != other["completions"]:
        pairs = zip(one["completions"], other["completions"], strict=False)
        first = next((row for row, twin in pairs if row != twin), {})
        found.append(f"completions, first in step {first.get('step')}")
    if one["weights"] != other["weights"]:
        found.append(f"weights: {sorted(one['weights'])} and {sorted(other['weights'])}")
    return found[:20]
