"""Small real runs as a user starts them: their files, their process, and everything below it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from patience import PATIENCE_S

from rlsys.run.folder import RunDir

NUM_PROMPTS, G = 4, 4
POLL_S = 0.1

CLOCK = re.compile(
    r"^time/|^idle/|^fault/|^colocated/|tokens_per_second$|^weight_sync/(seconds|mb_per_s|transport_.*)$|_time$|memory|train_speed"
)
"""Metrics that depend on how fast the machine was."""

PLUGIN = '''
"""A reward that an untrained model earns now and then, and that stops time when asked to."""

import time
from pathlib import Path

from rlsys.rewards import ORM, register_reward

HOLD_AFTER = Path("hold_after")  # number of groups


@register_reward("digits")
class Digits(ORM):
    """Share of characters that are digits."""

    def __init__(self):
        self.num_scored = 0
        print("digits is ready", flush=True)

    def __call__(self, completions, **columns):
        if HOLD_AFTER.exists() and self.num_scored == int(HOLD_AFTER.read_text()):
            Path("held").touch()
            while not Path("released").exists():
                time.sleep(0.05)
        self.num_scored += 1
        return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
'''


def write_starter(folder: Path) -> None:
    """Write the untrained starter model of examples/countdown, chat template and all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "examples/countdown"))
        from starter_model import write_starter_model

        write_starter_model(folder, seed=0)


@pytest.fixture(scope="session")
def starter_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained starter model of examples/countdown, chat template and all."""
    folder = tmp_path_factory.mktemp("models") / "starter"
    write_starter(folder)
    return folder


def write_run_files(folder: Path, model: Path) -> None:
    """A working directory: plugin, data, and run.yaml, which names them by relative paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.py").write_text(PLUGIN)
    for split, size in (("train", 10), ("validation", 3)):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{split} {i}"}) + "\n" for i in range(size))
        )
    (folder / "run.yaml").write_text(yaml.safe_dump(run_config(model)))


def run_config(model: Path) -> dict[str, Any]:
    """Four on-policy steps with everything that a run may have."""
    return {
        "output_dir": "out",
        "max_steps": 4,
        "eval_steps": 2,
        "seed": 1,
        "device": "cpu",
        "data": {
            "dataset": ["train.jsonl"],
            "val_dataset": ["validation.jsonl"],
            "max_prompt_length": 40,
        },
        "model": {"path": str(model)},
        "rollout": {
            "num_generations": G,
            "generation_batch_size": NUM_PROMPTS * G,
            "max_completion_length": 24,
            "max_num_seqs": NUM_PROMPTS * G,
        },
        "reward": {
            "reward_funcs": ["digits", "format"],
            "external_plugins": ["digits.py"],
            "timeout_s": 2 * PATIENCE_S,  # a reward that is held is not to be taken for a hang
        },
        "grpo": {"beta": 0.05},
        "policy": {
            "cpu_threads": 1,  # several such runs share the cores
            "micro_batch_size": 8,
            "lr": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.25,
        },
        "checkpoint": {"save_steps": 2, "save_hf_steps": 3},
    }


def hold(folder: Path, after: int | None) -> None:
    """Have the reward function of the next run stop time after this many groups; None: never."""
    for name in ("held", "released", "hold_after"):
        (folder / name).unlink(missing_ok=True)
    if after is not None:
        (folder / "hold_after").write_text(str(after))


def own_environment() -> dict[str, str]:
    """This process's, for a run that starts a cluster of its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


class RunProcess:
    """`rlsys grpo`, or another command, in a session of its own, as a terminal starts it.

    Its output goes to a file.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        hold_after: int | None = None,
        environment: Mapping[str, str] | None = None,
        subcommand: str = "grpo",
        prefix: Sequence[str] = (),
    ):
        self.folder = folder
        hold(folder, hold_after)
        self.out = RunDir(folder / "out")
        self._seen: set[psutil.Process] = set()
        self._log = folder / "log.txt"
        command = [*prefix, sys.executable, "-m", "rlsys.cli", subcommand, *words]
        if environment is None:
            environment = own_environment()
        with self._log.open("ab") as log:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_the_terminal,
            )
        self._root = psutil.Process(self.popen.pid)

    @property
    def log(self) -> str:
        """Everything that it printed so far, to both streams."""
        return self._log.read_text()

    def processes(self) -> set[psutil.Process]:
        """Every process that it or its children started and that still runs."""
        if self._root.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen.update(self._root.children(recursive=True))
        seen = list(self._seen)  # at once: another thread may ask, too
        return {process for process in seen if is_alive(process)}

    def actors(self, class_name: str, *, at: str = "") -> list[psutil.Process]:
        """Its Ray actors of a class, those that are running method `at` when that is given."""
        wanted = f"ray::{class_name}" + (f".{at}" if at else "")
        return [process for process in self.processes() if title(process).startswith(wanted)]

    def listening_ports(self) -> set[int]:
        """TCP ports on which the driver listens now."""
        try:
            found = self._root.net_connections("tcp")
        except psutil.NoSuchProcess:
            return set()
        return {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN}

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """The first true value of `condition`; the log if the run ends before that."""
        for _ in range(int(PATIENCE_S / POLL_S)):
            if value := condition():
                return value
            assert self.popen.poll() is None, self.log
            time.sleep(POLL_S)
        raise AssertionError(f"waited {PATIENCE_S:g} s in vain\n{self.log}")

    def wait_until_held(self) -> None:
        """Wait for the reward function to stop time."""
        self.wait_for((self.folder / "held").exists)

    def release(self) -> None:
        """Let the reward function go on."""
        (self.folder / "released").touch()

    def interrupt(self, by: signal.Signals = signal.SIGINT) -> None:
        """What Ctrl-C does, SIGINT, or a closed terminal: to every process of the foreground
        process group."""
        os.killpg(self.popen.pid, by)

    def wait(self) -> int:
        """The exit code."""
        for _ in range(int(PATIENCE_S / (5 * POLL_S))):
            if self.popen.poll() is not None:
                return self.popen.returncode
            self.processes()  # `wait_for_no_process` looks for them later
            time.sleep(5 * POLL_S)
        raise AssertionError(f"the run did not end in {PATIENCE_S:g} s\n{self.log}")

    def wait_for_no_process(self) -> None:
        """Wait until nothing that the run started is alive."""
        psutil.wait_procs(self._seen, timeout=PATIENCE_S)
        assert self.processes() == set()

    def end(self) -> None:
        """Kill what is left, when a test has failed."""
        left = self.processes()
        for process in {self._root, *left}:
            if is_alive(process):
                process.kill()


def _heed_the_terminal() -> None:
    """Shells have what they start in the background, tests too, ignore Ctrl-C, and nohup SIGHUP."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_DFL)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> str:
    """What `ps` shows; Ray puts the class and the running method of an actor there."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without what depends on how fast the machine was."""
    return {name: value for name, value in row.items() if not CLOCK.search(name)}
