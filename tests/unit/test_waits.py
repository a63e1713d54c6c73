"""Every wait in rlsys has a deadline, or stands here with the reason why it needs none."""

import ast
from pathlib import Path

import pytest

import rlsys

PACKAGE = Path(rlsys.__file__).parent

TIMEOUTS = {
    "ray.get": "timeout",
    "ray.wait": "timeout",
    "subprocess.run": "timeout",
    "subprocess.call": "timeout",
    "subprocess.check_call": "timeout",
    "subprocess.check_output": "timeout",
    "communicate": "timeout",
    "socket.create_connection": 2,
    "select.select": 4,
    "urlopen": "timeout",
    "httpx.Client": "timeout",
    "httpx.AsyncClient": "timeout",
    "httpx.get": "timeout",
    "httpx.post": "timeout",
    "requests.get": "timeout",
    "requests.post": "timeout",
    "asyncio.wait": "timeout",
    "as_completed": "timeout",
    "concurrent.futures.wait": "timeout",
    "collective_rpc": "timeout",
    "recv": "never",
    "dist.TCPStore": "timeout",
    "dist.init_process_group": "timeout",
    "dist.new_group": "timeout",
    "initialize_model_parallel": "distributed_timeout_minutes",
    "wrap_future": "never",
    "recv_fds": "never",
    "sigwait": "never",
}
"""Functions by the end of their dotted name, and what bounds them: a keyword, or this many
positional arguments; "never" if nothing does. Collectives have the deadline of their group."""
BARE_METHODS = frozenset(
    ["accept", "acquire", "get", "join", "readline", "result", "shutdown", "synchronize", "wait"]
)
"""Methods that wait for ever when they are called without arguments."""
NON_BLOCKING = {"flock": "LOCK_NB", "waitpid": "WNOHANG"}
"""Functions that wait unless this flag is among their arguments."""

ACTOR = "in an actor: the driver waits for its answer with a deadline, and kills or leaves it"
GPU = "for work that is on the GPU already; NCCL's watchdog and the driver's deadline end a hang"
SERVER = "a process or thread that waits for work; it ends with the process that sends the work"
DEAD = "for a process that was sent SIGKILL or has ended"
EXCEPTIONS = {
    "actors/model_group.py": {"restart.wait()": "it sleeps for recovery.backoff_s"},
    "actors/ray_session.py": {"ray.shutdown()": "Ray kills its processes after a time of its own"},
    "actors/reward.py": {"asyncio.wrap_future(": "the scorer kills a worker that is overdue"},
    "actors/rollout_actor.py": {
        "asyncio.wrap_future(": ACTOR,
        "self._pauses.acquire()": ACTOR,
        "ended.get()": ACTOR,
    },
    "commands/grpo_restarts.py": {"self._driver.wait()": "the driver is the run, however long"},
    "engines/loop.py": {"self._commands.get()": SERVER},
    "engines/megatron/export.py": {"work.wait()": "the deadline of its process group"},
    "engines/megatron/offload.py": {
        "self._copied.synchronize()": GPU,
        "self._state.wait()": "it makes the GPU wait, not the host",
        "copy.wait()": "it makes the GPU wait, not the host",
    },
    "engines/vllm/engine.py": {"self._llm.collective_rpc(": ACTOR},
    "engines/vllm/sleeping.py": {"torch.cuda.synchronize()": GPU},
    "engines/vllm/weight_backend.py": {"torch.accelerator.synchronize()": GPU},
    "records/index.py": {"file.readline()": "a file on disk"},
    "rotation.py": {"file.readline()": "a file on disk"},
    "rewards/builtin/chat_server.py": {
        "asyncio.wait([request.task])": "reward.timeout_s cancels the function that calls it",
        "request.task.result()": "the task is done",
    },
    "rewards/pool/process.py": {"self._outbox.get()": SERVER, "self._pipe.recv()": SERVER},
    "rewards/pool/serve.py": {"pipe.recv()": SERVER, "arrived.get()": SERVER},
    "sandbox/process/sandbox_calls.py": {
        "lines.readline()": "the helper process kills a program that is overdue"
    },
    "sandbox/process/sandbox_restrict.py": {
        "os.waitpid(pid, 0)": "the probe makes ten calls; START_S bounds the start"
    },
    "sandbox/process/sandbox_server.py": {
        "os.waitpid(pid, 0)": DEAD,
        "socket.recv_fds(": SERVER,
        "control.recv(16)": "select has found it readable",
        "thread.join()": "in a program, which is killed when it is overdue",
    },
    "sandbox/sandbox.py": {"self._control.recv(4096)": "the socket has a timeout"},
    "weight_sync/ipc.py": {"torch.cuda.current_stream(self.device).synchronize()": GPU},
    "weight_sync/nccl.py": {"torch.cuda.synchronize()": GPU},
    "weight_sync/sender.py": {"self._end.synchronize()": GPU},
}
"""File -> how a call begins -> why it cannot hang a run."""


def is_unbounded(call: ast.Call) -> bool:
    """Whether a call may wait for ever."""
    name = ast.unparse(call.func)
    keywords = {keyword.arg for keyword in call.keywords}
    for function, bound in TIMEOUTS.items():
        if name == function or name.endswith(f".{function}"):
            enough = isinstance(bound, int) and len(call.args) >= bound
            return not (enough or "timeout" in keywords or bound in keywords)
    method = name.rpartition(".")[2]
    if method in NON_BLOCKING:
        return NON_BLOCKING[method] not in ast.unparse(call)
    if not isinstance(call.func, ast.Attribute):
        return False
    return method in BARE_METHODS and not call.args and not call.keywords


def unbounded(source: str) -> list[str]:
    """The calls of a file that may wait for ever."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if is_unbounded(call)]


FOUND = {
    str(file.relative_to(PACKAGE)): calls
    for file in sorted(PACKAGE.rglob("*.py"))
    if (calls := unbounded(file.read_text()))
}


def test_every_wait_has_a_deadline_or_a_reason():
    unexplained = [
        f"rlsys/{file}: {call}"
        for file, calls in FOUND.items()
        for call in calls
        if not call.startswith(tuple(EXCEPTIONS.get(file, ())))
    ]
    assert not unexplained, "\n".join(
        ["These may wait for ever: give them a deadline, or EXCEPTIONS a reason:", *unexplained]
    )


def test_every_exception_is_needed():
    unused = [
        (file, beginning)
        for file, reasons in EXCEPTIONS.items()
        for beginning in reasons
        if not any(call.startswith(beginning) for call in FOUND.get(file, []))
    ]
    assert unused == []


@pytest.mark.parametrize(
    "source",
    [
        "ray.get(ref)",
        "ray.wait(refs, num_returns=2)",
        "thread.join()",
        "queue.get()",
        "future.result()",
        "process.wait()",
        "process.communicate(data)",
        "subprocess.run(command, check=True)",
        "socket.create_connection((host, port))",
        "select.select(readers, [], [])",
        "urllib.request.urlopen(url)",
        "httpx.Client(headers=headers)",
        "connection.recv(4096)",
        "lock.acquire()",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "os.waitpid(pid, 0)",
        "dist.init_process_group('gloo', store=store)",
        "dist.new_group(ranks)",
        "dist.TCPStore(host, port)",
        "async def f():\n    await asyncio.wrap_future(call)",
    ],
)
def test_the_check_finds_waits_without_a_deadline(source):
    assert len(unbounded(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "ray.get(ref, timeout=1)",
        "thread.join(1.0)",
        "', '.join(names)",
        "queue.get(timeout=3)",
        "values.get(key)",
        "future.result(timeout=0)",
        "process.wait(5)",
        "socket.create_connection((host, port), 5.0)",
        "select.select(readers, [], [], 5.0)",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "os.waitpid(pid, os.WNOHANG)",
        "dist.init_process_group('gloo', store=store, timeout=timeout)",
    ],
)
def test_the_check_passes_waits_with_one(source):
    assert unbounded(source) == []
