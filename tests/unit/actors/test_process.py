"""What an actor's process does first, and which variables it is given in the open."""

import ast
import inspect
import subprocess
import textwrap
import time

import psutil
import pytest

from rlsys.actors import policy, reference, reward, rollout  # noqa: F401  they define actors
from rlsys.actors.heartbeat import Alive
from rlsys.actors.process import StoppedProcesses, inherited_env


def below(cls):
    return [cls, *(inner for direct in cls.__subclasses__() for inner in below(direct))]


ACTORS = [cls for cls in below(Alive)[1:] if cls.__module__.startswith("rlsys.")]


@pytest.mark.parametrize("cls", ACTORS, ids=lambda cls: cls.__name__)
def test_an_actor_first_takes_secrets_and_can_then_be_asked_for_stacks(cls):
    """Later, as after its model is loaded, a start that hangs would show nothing."""
    source = textwrap.dedent(inspect.getsource(cls.__init__))
    body = ast.parse(source).body[0].body
    first = ast.unparse(body[1] if ast.get_docstring(ast.parse(source).body[0]) else body[0])
    assert first == "begin_process()" or first.startswith("super().__init__(")


def test_all_roles_are_looked_at():
    names = {cls.__name__ for cls in ACTORS}
    assert {"PolicyRank", "ReferenceRank", "RolloutActor", "ServerActor", "RewardWorker"} <= names


def test_secrets_are_not_among_the_variables_that_ray_writes_to_its_logs(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    env = inherited_env()
    assert env["HF_HOME"] == "/models"
    assert not {"HF_TOKEN", "VLLM_API_KEY"} & env.keys()
    assert "secret" not in str(env)


def test_a_process_counts_as_stopped_at_the_second_look():
    found = StoppedProcesses()
    with subprocess.Popen(["sleep", "60"]) as popen:
        process = psutil.Process(popen.pid)
        try:
            signal_and_wait(process.suspend, process, stopped=True)
            assert found.among([process]) == set()
            assert found.among([process]) == {process}
            signal_and_wait(process.resume, process, stopped=False)
            assert found.among([process]) == set()
            signal_and_wait(process.suspend, process, stopped=True)
            assert found.among([process]) == set(), "it went on in between"
        finally:
            popen.kill()
    assert found.among([process]) == set()


def signal_and_wait(send, process, *, stopped):
    send()
    while (process.status() == psutil.STATUS_STOPPED) != stopped:
        time.sleep(0.01)
