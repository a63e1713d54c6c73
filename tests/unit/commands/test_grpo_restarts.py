"""`max_restarts`: which ends of a driver are followed by another start, and from what."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from config_cases import write_config, write_run

from rlsys import attempts
from rlsys.commands import grpo_restarts
from rlsys.commands.grpo import watches
from rlsys.config.load import load_config

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
plan = json.loads(Path("plan.json").read_text())
number = int(os.environ["RLSYS_ATTEMPT"])
with open("attempts", "a") as file:
    print(number, os.environ.get("RLSYS_CONTINUES", "-"), file=file)
from rlsys.run.folder import RunDir
run = RunDir(Path("run"))
run.path.mkdir(exist_ok=True)
how, step = plan[number - 1]
if step is not None:
    run.config.write_text(f"# {number}")
    (run.checkpoints / f"step-{step}").mkdir(parents=True, exist_ok=True)
    with run.metrics.open("a") as file:
        print(json.dumps({"step": step}), file=file)
if how == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Path("waits").touch()
    time.sleep(600)
if isinstance(how, str):
    os.kill(os.getpid(), getattr(signal, how))
code, reason = how
if reason:
    run.record_end(code, reason)
sys.exit(code)
"""
"""Ends as plan.json says: [exit code and reason, or a signal], and the step that it reached."""

DIED = [1, "policy rank 0 died in policy update"]


@pytest.fixture
def supervise(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo_restarts, "DRIVER", [sys.executable, str(tmp_path / "driver.py")])
    (tmp_path / "driver.py").write_text(DRIVER)
    before = {number: signal.getsignal(number) for number in grpo_restarts.STOP_SIGNALS}

    def supervise(plan, *, max_restarts=3):
        Path("plan.json").write_text(json.dumps(plan))
        overrides = ["--output_dir", "run", "--recovery.backoff_s", "0"]
        overrides += ["--max_restarts", str(max_restarts)]
        config = load_config(write_config(tmp_path), overrides).config
        code = grpo_restarts.run_attempts(config, "config.yaml", overrides)
        seen = Path("attempts").read_text().splitlines() if Path("attempts").exists() else []
        return code, seen, capfd.readouterr().err

    yield supervise
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("code", [0, 2, 74, 75, 129, 130, 143])
def test_these_ends_are_final(supervise, code):
    assert supervise([[[code, "said"], 1]]) == (code, ["1 -"], "")


def test_a_crash_is_followed_by_a_start_from_the_newest_checkpoint(supervise):
    code, seen, said = supervise([[DIED, 3], ["SIGKILL", 5], [[0, "done"], 8]])
    assert (code, seen) == (0, ["1 -", "2 1", "3 1"])
    assert said.splitlines()[1::2] == [
        "rlsys: restart 1 of 3, from run/checkpoints/step-3, in 0 s: policy rank 0 died in policy "
        "update (after step 3)",
        "rlsys: restart 2 of 3, from run/checkpoints/step-5, in 0 s: the driver was killed by "
        "SIGKILL (after step 5)",
    ]


def test_a_driver_that_did_not_begin_is_not_continued_from_an_older_run(supervise, tmp_path):
    """With --overwrite the folder may still hold the older run's checkpoints."""
    (tmp_path / "run/checkpoints/step-9").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("# older")
    _, seen, said = supervise([["SIGSEGV", None], [[0, "done"], 1]])
    assert seen == ["1 -", "2 -"]
    assert "restart 1 of 3, from its start" in said


def test_the_limit_holds(supervise):
    code, seen, said = supervise([[DIED, 1], [DIED, 2], [DIED, 3]], max_restarts=1)
    assert (code, len(seen)) == (1, 2)
    assert "max_restarts allows 1 restart. The last failure: policy rank 0 died" in said


def test_the_same_failure_at_the_same_step_ends_the_run(supervise):
    code, seen, said = supervise([[DIED, 1], [DIED, 2], [DIED, 2], [[0, ""], 3]])
    assert (code, len(seen)) == (1, 3)
    assert said.splitlines()[-1] == (
        "rlsys: not started again: it failed in the same place twice: policy rank 0 died in policy "
        "update (after step 2)"
    )


def test_a_reason_of_an_earlier_attempt_is_not_taken_for_this_ones(supervise):
    _, seen, said = supervise([[DIED, 2], ["SIGKILL", 2], [[0, ""], 3]])
    assert len(seen) == 3
    assert "the driver was killed by SIGKILL" in said


def test_a_stop_signal_goes_to_the_driver_and_nothing_is_started_again(supervise):
    def stop():
        while not Path("waits").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    code, seen, _ = supervise([["wait", 1], [[0, ""], 2]])
    assert (code, seen) == (143, ["1 -"])


def test_only_the_parent_watches(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path), ["--max_restarts", "2"]).config
    assert watches(config)
    monkeypatch.setenv(attempts.NUMBER, "1")
    assert not watches(config)


@pytest.mark.processes
def test_a_driver_ends_when_its_parent_is_killed(tmp_path):
    """SIGTERM reaches it, so it saves first."""
    child = "from rlsys import attempts; import signal, time; attempts.end_with_parent()\n"
    child += "print('ready', flush=True)\ntry: time.sleep(600)\nfinally: print('never')"
    parent = "import os, subprocess, sys\n"
    parent += "os.environ['RLSYS_ATTEMPT'] = '1'\n"
    parent += f"subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.communicate()[0] == ""  # the child has closed its stdout: it is gone


KILLS_THE_FIRST = """
import os, signal
if os.environ.get("RLSYS_ATTEMPT") == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
def test_the_command_starts_a_killed_driver_again_and_waits_for_its_cluster(tmp_path):
    """The second attempt finds no cluster, and waits for it as long as the config says."""
    (tmp_path / "plugin.py").write_text(KILLS_THE_FIRST)
    words = [
        "--max_restarts",
        "2",
        "--recovery.backoff_s",
        "0",
        "--output_dir",
        str(tmp_path / "a"),
    ]
    words += ["--recovery.wait_for_resources_s", "1"]
    words += ["--reward.external_plugins", str(tmp_path / "plugin.py")]
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", "grpo", str(write_run(tmp_path)), *words],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "restart 1 of 2, from its start, in 0 s: the driver was killed by SIGKILL" in done.stderr
    assert "waiting for the Ray cluster, up to 1 s" in done.stdout
    assert "restart 2" not in done.stderr
