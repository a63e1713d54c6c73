"""Runs on a Ray cluster of two nodes, which have other working directories and other files."""

import json
import shutil
import time

import psutil
import pytest
import torch
import yaml
from run_cases import POLL_S, RunProcess, run_config, without_clock, write_run_files
from safetensors.torch import load_file
from two_nodes import TwoNodes, can_hide_folders

from rlsys.files import read_jsonl

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(not can_hide_folders(), reason="`unshare -rm` is not allowed here"),
]

PORTS = range(21000, 21100)
"""Ports of all runs here; the kernel gives others ports from further up."""
REWARD = """
from rlsys.rewards import register_reward
from shares_of_digits import share


@register_reward("digits")
def digits(completions, **columns):
    return [share(text) for text in completions]
"""
HELPER = """
def share(text):
    return sum(c.isdigit() for c in text) / max(len(text), 1)
"""


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """A project that the second node does not see."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, hidden):
    cluster = TwoNodes(tmp_path_factory.mktemp("cluster"), hidden)
    yield cluster
    cluster.stop()


def make_project(folder, model):
    """Model, data, a folder of plugins and output, all named relative to the project's folder."""
    write_run_files(folder, model)
    shutil.copytree(model, folder / "models/starter")
    (folder / "plugins").mkdir()
    (folder / "plugins/digits.py").write_text(REWARD)
    (folder / "plugins/shares_of_digits.py").write_text(HELPER)
    (folder / "digits.py").unlink()
    config = run_config(model)
    config["model"]["path"] = "models/starter"
    config["reward"]["external_plugins"] = ["plugins/digits.py"]
    config["reward"]["num_workers"] = 2
    config["max_steps"] = 2
    config["checkpoint"] = {"save_steps": 2}
    config["rendezvous_ports"] = f"{PORTS[0]}-{PORTS[-1]}"
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def start(cluster):
    """Start `rlsys grpo` in a folder."""
    runs = []

    def run(folder, *words):
        runs.append(RunProcess(folder, "run.yaml", *words, environment=cluster.env))
        return runs[-1]

    yield run
    for one in runs:
        one.end()


def test_two_runs_side_by_side_spread_over_both_nodes(cluster, start, tmp_path, starter_model):
    """Room is left for 2 actors on the head and 4 on the other node: one of the runs is split."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        make_project(folder, starter_model)
    with cluster.holding(cpus=(0.975, 0.955)):
        runs = [start(folder) for folder in folders]
        where: dict[str, set[str]] = {"head": set(), "second": set()}
        listening = [set() for _ in runs]
        while any(run.popen.poll() is None for run in runs):
            for run, ports in zip(runs, listening, strict=True):
                ports |= run.listening_ports()
            for node, classes in cluster.actors().items():
                where[node] |= classes
            time.sleep(10 * POLL_S)
        for run in runs:
            assert run.wait() == 0, run.log
    assert all(ports.intersection(PORTS) for ports in listening)
    models = {"PolicyRank", "ReferenceRank", "RolloutActor"}
    assert models & where["head"]
    assert models & where["second"]
    assert "RewardWorker" in where["head"] & where["second"]
    one, other = (run.out for run in runs)
    for out in (one, other):
        assert [row["step"] for row in read_jsonl(out.metrics)] == [0, 1, 2, 2]
        assert (out.checkpoints / "step-2").is_dir()
        assert not list(out.path.glob(".rlsys-shared-*"))
    for file in ("metrics", "completions", "eval_completions"):
        rows, expected = (
            sorted(map(repr, map(without_clock, read_jsonl(getattr(out, file)))))
            for out in (one, other)
        )
        assert rows == expected
    weights, expected = (load_file(out.final / "model.safetensors") for out in (one, other))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_a_node_does_not_see_is_named_before_actors_start(
    cluster, start, hidden, starter_model
):
    make_project(hidden, starter_model)
    with cluster.holding(cpus=(0.985, 0.975)):  # 3 actors fit on no node
        run = start(hidden)
        assert run.wait() == 2, run.log
    lines = [line for line in run.log.splitlines() if "does not see" in line]
    for field, path in (
        ("model.path", "models/starter"),
        ("reward.external_plugins", "plugins/digits.py"),
        ("reward.external_plugins", "plugins/shares_of_digits.py"),
    ):
        (line,) = [line for line in lines if f"does not see {hidden / path} ({field}, " in line]
        assert "(127.0.0.2)" in line
    assert "starting on cpu" not in run.log
    assert "Traceback" not in run.log


RANKS = """
from pathlib import Path
import json, os, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from run_cases import run_config
from rlsys.actors.policy import PolicyActors, PolicyRank
from rlsys.actors.ray_session import ray_session
from rlsys.config import Config

model, folder = sys.argv[1:]
values = run_config(model)
values["policy"] |= {"world_size": 2, "tensor_parallel_size": 2}

class Rank(PolicyRank):
    def interface(self):
        return os.environ["GLOO_SOCKET_IFNAME"]

with ray_session():
    nodes = sorted(((n["NodeManagerAddress"], n["NodeID"]) for n in ray.nodes()), reverse=True)
    policy = PolicyActors(
        Config.model_validate(values),
        device="cpu",
        place=lambda rank: {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(nodes[rank][1], soft=False),
        },
        rank_class=Rank,
    )
    policy.start()
    policy.save_model(Path(folder))
    print(json.dumps(policy.call("interface")))
"""


def test_ranks_on_two_nodes_meet_on_the_interface_that_leads_to_the_others(
    cluster, tmp_path, starter_model
):
    """Not on that of the host's own name, which is often a loopback address. Here the ranks share
    every layer, although a run would never place them so."""
    interfaces = cluster.driver(RANKS, str(starter_model), str(tmp_path / "saved"))
    assert len(interfaces) == 2
    for name in interfaces:
        found = [entry.address for entry in psutil.net_if_addrs()[name]]
        assert cluster.address.partition(":")[0] in found  # the head's, where rank 0 is
    saved, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", starter_model)
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)


PLACE = """
import json, sys
import ray
from config_of_placement import config_of
from rlsys.actors.placement import Placement
from rlsys.actors.ray_session import ray_session

sizes = json.loads(sys.argv[1])
with ray_session():
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    try:
        placement = Placement(config_of(**sizes), device="cuda")
    except ValueError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps([[*who, addresses[node]] for who, node in placement._nodes.items()]))
"""


def place(cluster, **sizes):
    """(role, rank) -> address of its node, or the error."""
    placed = cluster.driver(PLACE, json.dumps(sizes))
    return placed if isinstance(placed, str) else {(r, i): node for r, i, node in placed}


def test_a_tensor_parallel_group_stays_on_one_node(cluster):
    """Ray's own packing fills a node with ranks 0, 1 and 2 and puts rank 3 on the other one."""
    with cluster.holding(gpus=(1, 1)):
        placed = place(cluster, world_size=4, tensor_parallel_size=2, num_engines=2)
    assert placed["policy", 0] == placed["policy", 1]
    assert placed["policy", 2] == placed["policy", 3]
    assert placed["policy", 0] != placed["policy", 2]
    for held in ((1, 0), (0, 1)):
        with cluster.holding(gpus=held):
            placed = place(cluster, world_size=4, tensor_parallel_size=4, num_engines=3)
        nodes = {placed["policy", rank] for rank in range(4)}
        engines = {placed["rollout", rank] for rank in range(3)}
        assert len(nodes) == len(engines) == 1
        assert nodes != engines
        assert ("127.0.0.2" in nodes) == (held == (1, 0))


def test_two_groups_and_engines_of_two_gpus_fill_both_nodes(cluster):
    sizes = {"world_size": 4, "tensor_parallel_size": 2, "num_engines": 2, "engine_size": 2}
    placed = place(cluster, **sizes)
    assert placed["policy", 0] == placed["policy", 1]
    assert placed["policy", 2] == placed["policy", 3]
    assert sorted(list(placed.values()).count(node) for node in set(placed.values())) == [2, 4]


def test_a_group_that_is_wider_than_every_node_is_refused_by_name(cluster):
    text = place(cluster, world_size=6, tensor_parallel_size=6, num_engines=1)
    assert "the 6 of a policy group (policy.tensor_parallel_size) must be on one host" in text
    assert "The hosts of the Ray cluster have 4, 4 GPUs" in text


def test_a_group_waits_until_enough_is_free_on_one_node(cluster):
    with cluster.holding(gpus=(1, 1)):
        text = place(
            cluster, world_size=4, tensor_parallel_size=4, num_engines=2, placement_timeout=3
        )
    assert text.startswith("Ray could not place the run within 3 s: the run needs 6 GPUs (policy 4")
    assert "the 4 of a policy group (policy.tensor_parallel_size) must be on one host" in text
