"""A Ray cluster of two nodes on this host: other working directories, and other files if wanted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from patience import PATIENCE_S
from run_cases import POLL_S

SECOND = "127.0.0.2"
"""Address of the second node; on Linux all of 127.0.0.0/8 is this host."""
_HOLD = """
import sys, time
import ray
from ray.util.placement_group import placement_group
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
nodes = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
head = next(id for address, id in nodes.items() if address != "127.0.0.2")
bundles, selectors = [], []
for node, cpus, gpus in ((head, *sys.argv[1:3]), (nodes["127.0.0.2"], *sys.argv[3:5])):
    bundles.append({k: float(v) for k, v in (("CPU", cpus), ("GPU", gpus)) if float(v)})
    selectors.append({"ray.io/node-id": node})
held = [(b, s) for b, s in zip(bundles, selectors) if b]
group = placement_group([b for b, _ in held], bundle_label_selector=[s for _, s in held])
assert group.wait(60), "not free"
print("held", flush=True)
sys.stdin.read()
"""
"""A driver that reserves a part of each node until its stdin is closed."""


class TwoNodes:
    """A head, and a node that does not see `hidden`: it has an empty folder there.

    Each has a CPU, or those of `cpus`, and four GPUs, which nothing but Ray's bookkeeping believes
    in.
    """

    def __init__(self, folder: Path, hidden: Path, cpus: tuple[int, int] = (1, 1)):
        self._temp_dir = Path(tempfile.mkdtemp(prefix="rlsys-"))  # sockets: their paths are short
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        ports = _free_ports(4)
        self.address = f"{_own_address()}:{ports[0]}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {"PATH": path, "HOME": str(folder), "RAY_ADDRESS": self.address}
        common = ["--num-gpus=4", f"--object-store-memory={100 * 2**20}"]
        common += ["--block", "--disable-usage-stats"]
        self._head = [
            *("ray", "start", "--head", f"--port={ports[0]}", "--include-dashboard=false"),
            *(f"--dashboard-agent-listen-port={ports[1]}", f"--temp-dir={self._temp_dir}"),
            *(f"--ray-client-server-port={ports[2]}", f"--num-cpus={cpus[0]}", *common),
        ]
        self._start("head", self._head)
        start = shlex.join(
            [
                *("ray", "start", f"--address={self.address}", f"--node-ip-address={SECOND}"),
                *(f"--dashboard-agent-listen-port={ports[3]}", f"--num-cpus={cpus[1]}", *common),
            ]
        )
        hide = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {start}"
        self._second = ["unshare", "-rm", "sh", "-c", hide]
        self._start("second", self._second)

    def kill_second(self) -> None:
        """The second node vanishes, with everything that runs there."""
        _kill(self._processes.pop())

    def kill_both(self) -> None:
        """Nothing is left of the cluster."""
        while self._processes:
            _kill(self._processes.pop())

    def start_head(self) -> None:
        """Start a head under the same address."""
        self._start("another-head", self._head)

    def start_second(self) -> None:
        """Another node takes its place."""
        self._start("another", self._second)

    def _start(self, name: str, command: list[str]) -> None:
        """Start a node in a working directory of its own, and wait for it."""
        place = self._folder / name
        place.mkdir()
        log = place / "log.txt"
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=place, env=env, stdout=out, stderr=out, start_new_session=True
            )
        self._processes.append(process)
        for _ in range(int(PATIENCE_S / POLL_S)):
            assert process.poll() is None, log.read_text()
            if "Ray runtime started" in log.read_text():
                return
            time.sleep(POLL_S)
        raise AssertionError(log.read_text())

    def driver(self, program: str, *words: str) -> Any:
        """What a Python program, a driver of the cluster, prints last, as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=self._folder,
            env={**self.env, "PYTHONPATH": str(Path(__file__).parents[1] / "actors")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    @contextmanager
    def holding(self, *, cpus: tuple[float, float] = (0, 0), gpus: tuple[int, int] = (0, 0)):
        """Another program has reserved these on the head and on the second node."""
        words = [str(amount) for node in zip(cpus, gpus, strict=True) for amount in node]
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, *words],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "held\n"
            yield
        finally:
            holder.stdin.close()
            holder.wait()

    def actors(self) -> dict[str, set[str]]:
        """Node, head or second -> classes of the actors that live there."""
        return {
            node: {found for found in map(_actor_class, _below(process)) if found}
            for node, process in zip(("head", "second"), self._processes, strict=True)
        }

    def stop(self) -> None:
        """End both nodes and everything below them, and nothing else: not `ray stop`."""
        for process in reversed(self._processes):
            below = list(_below(process))
            process.terminate()
            _, alive = psutil.wait_procs(below, timeout=20)
            for one in alive:
                one.kill()
            process.wait()
        shutil.rmtree(self._temp_dir, ignore_errors=True)


def can_hide_folders() -> bool:
    """Whether this system lets its users hide a folder from processes that they start."""
    return shutil.which("unshare") is not None and not subprocess.call(
        ["unshare", "-rm", "true"], stderr=subprocess.DEVNULL
    )


def _kill(node: subprocess.Popen[bytes]) -> None:
    for process in [*_below(node), psutil.Process(node.pid)]:
        process.kill()
    node.wait()


def _below(process: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    try:
        yield from psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _actor_class(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return ""
    title = words[0] if words else ""
    return title.removeprefix("ray::").partition(".")[0] if title.startswith("ray::") else ""


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _own_address() -> str:
    """An address of this host that is not the second node's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # asks for the route; nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
