"""The README's lines on Ray jobs, in shells without a variable that they do not set."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from run_cases import (
    PATIENCE_S,
    POLL_S,
    RunProcess,
    hold,
    is_alive,
    title,
    without_clock,
    write_run_files,
)
from safetensors.torch import load_file

from rlsys.files import read_jsonl
from rlsys.run.folder import RunDir

pytestmark = pytest.mark.system

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
RUN = ["rlsys", "grpo", "run.yaml", "--grpo.beta", "0"]  # a process less to wait for


class Cluster:
    """A head node that other Ray sessions on this machine neither see nor disturb.

    It is started by the lines of the README, in a shell that has set nothing else.
    """

    def __init__(self, folder: Path):
        self.temp_dir = Path(tempfile.mkdtemp(prefix="rlsys-"))  # sockets: their paths are short
        dashboard, self.port, agent, client = free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text(secrets.token_hex(32))  # of an earlier Ray
        self.env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder)}
        options = {
            "temp-dir": self.temp_dir,
            "port": self.port,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "num-cpus": 2,
            "object-store-memory": 200 * 2**20,
        }
        words = " ".join(f"--{name}={value}" for name, value in options.items())
        *self.preparation, start, submit = readme_lines()
        assert start == "ray start --head"
        assert submit.startswith("ray job submit --working-dir . -- rlsys grpo ")
        self._log = folder / "cluster.txt"
        with self._log.open("wb") as log:
            self._head = subprocess.Popen(
                self.shell(f"exec {start} --block --disable-usage-stats {words}"),
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(lambda: "Ray runtime started" in self._log.read_text() or self._head.poll())
        assert self._head.poll() is None, self._log.read_text()

    def shell(self, line: str) -> list[str]:
        """A shell that runs `line` after what the README has a user type in each."""
        return ["bash", "-ec", "\n".join([*self.preparation, line])]

    def actors(self) -> list[str]:
        """Class and method of every actor of a run."""
        processes = psutil.Process(self._head.pid).children(recursive=True)
        titles = [title(process) for process in processes if is_alive(process)]
        return [t for t in titles if t.startswith(("ray::Policy", "ray::Ro", "ray::Re"))]

    def job(self, folder: Path, action: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, run in `folder`."""
        return subprocess.run(
            self.shell(shlex.join(["ray", "job", action, "--address", self.url, *words])),
            cwd=folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )

    def working_copy(self, file: str) -> Path | None:
        """A file of the one job that has it in its copy of the working directory."""
        found = list(self.temp_dir.glob(f"session_2*/runtime_resources/working_dir_files/*/{file}"))
        assert len(found) <= 1
        return found[0] if found else None

    def driver_log(self, job: str) -> str:
        """What `ray job logs` shows, without asking the cluster."""
        path = self.temp_dir / "session_latest" / "logs" / f"job-driver-{job}.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        """End the head node and everything below it, and nothing else: not `ray stop`."""
        processes = psutil.Process(self._head.pid).children(recursive=True)
        self._head.send_signal(signal.SIGTERM)
        self._head.wait()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def readme_lines() -> list[str]:
    """What the README has users type for a job."""
    section = (REPOSITORY / "README.md").read_text().partition("## In a Ray job")[2]
    lines = re.findall(r"^    (.+)", section, re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(condition, explain=lambda: ""):
    for _ in range(int(PATIENCE_S / POLL_S)):
        if value := condition():
            return value
        time.sleep(POLL_S)
    raise AssertionError(f"waited {PATIENCE_S:g} s in vain\n{explain()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def folder(tmp_path, starter_model):
    """A project: what its .gitignore names is not sent to the cluster."""
    write_run_files(tmp_path, starter_model)
    (tmp_path / ".gitignore").write_text("out/\n")
    return tmp_path


def test_a_job_runs_from_relative_paths_and_shows_its_log(cluster, folder):
    """Plugin, data and output are named relative to the working directory that was sent."""
    (folder / "out").mkdir()
    (folder / "out" / "metrics.jsonl").write_text("{}\n")  # an earlier run, which stays here
    words = [*RUN, "--max_steps", "1", "--eval_steps", "1"]
    done = cluster.job(
        folder, "submit", "--working-dir", ".", "--submission-id", "first", "--", *words
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = cluster.job(folder, "logs", "first").stdout
    assert "\nstep 1/1 | reward" in log
    assert "\nheld-out after step 1 | reward" in log
    metrics = cluster.working_copy("out/metrics.jsonl")
    assert f"note: {metrics.parent} is in this Ray job's copy" in log
    assert [row["step"] for row in read_jsonl(metrics)] == [0, 1, 1]
    assert (metrics.parent / "final" / "model.safetensors").is_file()
    wait_for(lambda: not cluster.actors())


def test_only_those_with_the_token_are_let_in(cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.url}/api/jobs/")


def test_a_run_joins_the_cluster_of_ray_address_by_itself(cluster, folder):
    """In a shell that does not even export RAY_AUTH_MODE."""
    program = "import ray; from rlsys.actors.ray_session import ray_session\n"
    program += "with ray_session(): print(ray.cluster_resources()['CPU'])"
    done = subprocess.run(
        ["python", "-c", program],
        cwd=folder,
        env={**cluster.env, "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "2.0\n"


def test_a_run_that_cannot_work_is_a_failed_job(cluster, folder):
    """Its log says what the copy of the working directory lacks, and why."""
    words = [*RUN, "--reward.external_plugins", "nowhere.py", "--data.dataset", "out/train.jsonl"]
    done = cluster.job(
        folder, "submit", "--working-dir", ".", "--submission-id", "second", "--", *words
    )
    assert done.returncode != 0
    assert "exit code 2" in done.stdout + done.stderr
    log = cluster.job(folder, "logs", "second").stdout
    assert "nowhere.py' is not a file" in log
    assert "out/train.jsonl: not in this job's copy of the working directory" in log
    assert "FAILED" in cluster.job(folder, "status", "second").stdout.upper()


def test_stopping_a_job_ends_all_its_actors(cluster, folder):
    """This one runs in the folder itself, with data that a copy would lack."""
    hold(folder, after=3)
    (folder / "out").mkdir()
    (folder / "train.jsonl").rename(folder / "out/train.jsonl")
    in_place = ["env", "-C", str(folder), *RUN, "--data.dataset", "out/train.jsonl"]
    words = ["--no-wait", "--submission-id", "third", "--", *in_place, "--output_dir", "kept"]
    assert cluster.job(folder, "submit", *words).returncode == 0
    wait_for((folder / "held").exists, lambda: cluster.driver_log("third"))
    assert len(cluster.actors()) == 3
    done = cluster.job(folder, "stop", "third")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: not cluster.actors())
    assert "STOPPED" in cluster.job(folder, "status", "third").stdout.upper()
    assert (folder / "kept" / "status").read_text() == "ended\n"
    log = cluster.driver_log("third")
    assert log.splitlines()[-1] == "interrupted by SIGTERM"
    assert "Traceback" not in log
    assert "*** SIGTERM" not in log  # which Ray would show with a C++ stack


@pytest.mark.slow
def test_a_stopped_job_is_resumed_by_a_new_one_while_another_run_shares_the_cluster(
    cluster, folder
):
    """The other run comes from a shell with nothing but RAY_ADDRESS. Nobody disturbs it, so the job
    has to end as it does: same metrics, same completions, same weights."""
    job, other = (RunDir(folder.resolve() / "out" / name) for name in ("job", "other"))
    patience = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}'  # as docs/saving.md has it

    def submit(name, *words):
        options = ["--no-wait", "--working-dir", ".", "--runtime-env-json", patience]
        command = [*RUN, "--output_dir", str(job.path), *words]
        done = cluster.job(folder, "submit", *options, "--submission-id", name, "--", *command)
        assert done.returncode == 0, done.stdout + done.stderr

    in_step_2 = 3 + 4 + 1  # groups that are scored by then: an evaluation, a step, and one more
    hold(folder, after=in_step_2)
    submit("stopped")
    run = RunProcess(
        folder,
        *(*RUN[2:], "--output_dir", "out/other"),
        hold_after=in_step_2,
        environment={**cluster.env, "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
    )
    try:
        run.wait_until_held()
        wait_for(lambda: cluster.working_copy("held"), lambda: cluster.driver_log("stopped"))
        assert len(cluster.actors()) == 6
        assert cluster.job(folder, "stop", "stopped").returncode == 0
        wait_for(lambda: len(cluster.actors()) == 3)
        saved = f"{job.checkpoints / 'step-1'}"
        log = cluster.driver_log("stopped")
        assert f"\nsaved step 1\n--checkpoint.resume continues from {saved}" in log
        recorded = job.metrics.read_text()
        assert [row["step"] for row in read_jsonl(job.metrics)] == [0, 1]
        (folder / "hold_after").unlink()
        submit("resumed", "--checkpoint.resume")
        wait_for(lambda: len(cluster.actors()) == 6, lambda: cluster.driver_log("resumed"))
        run.release()
        assert run.wait() == 0, run.log
    finally:
        run.end()
    log = cluster.job(folder, "logs", "--follow", "resumed").stdout
    assert f"\ncontinuing from {saved}\n" in log
    assert "changed since then" not in log
    assert f"\nthe trained model is in {job.final}\n" in log
    assert "SUCCEEDED" in cluster.job(folder, "status", "resumed").stdout.upper()
    assert job.metrics.read_text().startswith(recorded)
    for file in ("metrics", "completions", "eval_completions"):
        rows, expected = (
            sorted(map(repr, map(without_clock, read_jsonl(getattr(out, file)))))
            for out in (job, other)
        )
        assert rows == expected
    weights, expected = (load_file(out.final / "model.safetensors") for out in (job, other))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    wait_for(lambda: not cluster.actors())
