"""What is set for NCCL and CUDA where a run is started reaches actors on any node."""

import psutil
import pytest
from patience import PATIENCE_S
from policy_cases import policy_config

from rlsys.actors.process import inherited_env
from rlsys.actors.reference import ReferenceActors
from rlsys.actors.reward import RewardWorkers
from rlsys.actors.waiting import get_all
from rlsys.config import RewardConfig

pytestmark = pytest.mark.system


def environments(class_name):
    """Of every process of an actor class, as the process was started."""
    processes = psutil.Process().children(recursive=True)
    return [p.environ() for p in processes if p.cmdline()[:1] == [f"ray::{class_name}"]]


@pytest.mark.slow
def test_a_variable_for_nccl_reaches_every_actor(engines, lab, policy_models, variable):
    config = policy_config(policy_models["qwen2-tied"], grpo={"beta": 0.1})
    lab.policy(config)
    reference = ReferenceActors(config, device="cpu")
    rewards = RewardWorkers(RewardConfig(reward_funcs=["format"]), run_values={})
    name, value = variable
    try:
        rewards.start()
        get_all(reference.async_start(), phase="start", timeout_s=PATIENCE_S)
        for role in ("RolloutActor", "LabRank", "ReferenceRank", "RewardWorker"):
            found = environments(role)
            assert found, role
            assert [env.get(name) for env in found] == [value] * len(found), role
    finally:
        reference.close()
        rewards.close()


def test_what_is_true_on_one_host_only_stays_there(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("HOME_OF_SOMETHING", "else")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.1")  # of the driver's host
    env = inherited_env()
    assert env["CUDA_LAUNCH_BLOCKING"] == "1"
    assert env["GLOO_SOCKET_IFNAME"] == "eth1"
    assert not {"CUDA_VISIBLE_DEVICES", "HOME_OF_SOMETHING", "VLLM_HOST_IP"} & env.keys()
