"""An actor on another host: its stacks are fetched, and it gets the secrets of the driver."""

import subprocess
import sys

import pytest
from two_nodes import SECOND, TwoNodes, can_hide_folders

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(not can_hide_folders(), reason="`unshare -rm` is not allowed here"),
]

DRIVER = """
import os, sys, time
from pathlib import Path

from rlsys.actors import silent
from rlsys.actors.group import ActorGroup
from rlsys.actors.heartbeat import Alive
from rlsys.actors.process import begin_process, inherited_env
from rlsys.actors.ray_session import ray_session
from rlsys.actors.waiting import PhaseTimeout
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Rank(Alive):
    def __init__(self, rank):
        begin_process()

    def token(self):
        return os.environ.get("HF_TOKEN")

    def loops_for_ever(self):
        time.sleep(3600)


def place(rank):
    second = next(n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == sys.argv[1])
    there = NodeAffinitySchedulingStrategy(second, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": there}


os.environ["HF_TOKEN"] = "hf_a_secret_of_the_driver"
with ray_session():
    silent.save_stacks_in(Path("logs"))
    env = inherited_env()
    group = ActorGroup("policy", "rank", Rank, size=1, env=env, place=place, timeout_s=60)
    assert group.call("token") == [os.environ["HF_TOKEN"]]
    group.timeout_s = 1.0
    try:
        group.call("loops_for_ever")
    except PhaseTimeout as error:
        print(error)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    hidden = tmp_path_factory.mktemp("hidden")
    cluster = TwoNodes(tmp_path_factory.mktemp("cluster"), hidden)
    yield cluster
    cluster.stop()


def test_an_actor_of_another_host_shows_its_stacks_and_knows_the_secrets(cluster, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "driver.py", SECOND],
        cwd=tmp_path,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: its stacks are in logs/stacks-rank-0-1.txt\n" in done.stdout
    assert "in loops_for_ever" in (tmp_path / "logs/stacks-rank-0-1.txt").read_text()
    logs = [path for path in cluster._temp_dir.rglob("*.log") if path.is_file()]
    assert any("runtime_env" in path.name for path in logs)
    leaks = [p.name for p in logs if b"a_secret_of_the_driver" in p.read_bytes()]
    assert leaks == []
