"""Tokens of real Ray heads, and a node of Ray that dies while it starts."""

import base64
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from waiting import eventually

from rlsys.actors import ray_session as session
from rlsys.actors.ray_session import RayStartError, agree_on_token
from rlsys.interrupts import interruptible
from rlsys.run.folder import RUNNING, RunDir

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def no_guard(monkeypatch):
    """Nothing is started here that a guard would have to remove but a folder."""
    monkeypatch.setattr(session.leftovers, "guard", lambda: None)


@pytest.fixture(autouse=True)
def fresh_shell(monkeypatch, tmp_path):
    """A home folder, and none of the variables that choose how Ray authenticates."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # restores what the code under test sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    session.AuthenticationTokenLoader.instance().reset_cache()
    yield
    monkeypatch.undo()
    session.RayConfig.initialize("")
    session.AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="module", params=["with a token", "open"])
def head(request, tmp_path_factory):
    """Whether it asks for a token, and the address, of the server of a cluster."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    asks = request.param == "with a token"
    folder = tmp_path_factory.mktemp("head")
    words = {
        "log_dir": folder,
        "session-dir": folder,
        "session-name": "test",
        "config_list": base64.b64encode(b"{}").decode(),
        "gcs_server_port": port,
        "node-ip-address": "127.0.0.1",
        "node-id": "ab" * 28,
        "metrics-agent-port": 0,
    }
    server = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
    process = subprocess.Popen(
        [server, *(f"--{name}={value}" for name, value in words.items())],
        env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} if asks else {},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(60)
    yield asks, f"127.0.0.1:{port}"
    process.kill()
    process.wait()


def write_token(home, token):
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)


def test_the_token_at_home_is_used_where_a_cluster_asks_for_one(head, tmp_path, capsys):
    """Also where another cluster left it: a client in token mode cannot use an open cluster."""
    asks, address = head
    write_token(tmp_path, TOKEN)
    agree_on_token(address, address)
    assert os.environ["RAY_AUTH_MODE"] == ("token" if asks else "disabled")
    assert ("asks for no token" in capsys.readouterr().out) == (not asks)


def test_a_missing_token_is_an_error_where_a_cluster_asks_for_one(head):
    asks, address = head
    if not asks:
        return agree_on_token(address, address)
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS={address}: .*you have none: copy"):
        agree_on_token(address, address)


@pytest.mark.parametrize("source", ["RAY_AUTH_TOKEN", "~/.ray/auth_token"])
def test_a_refused_token_is_named_by_where_it_came_from(head, tmp_path, monkeypatch, source):
    asks, address = head
    if not asks:
        return
    write_token(tmp_path, "f" * 64)
    if source == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(source, "e" * 64)
    with pytest.raises(ValueError, match=f"refuses the token of {source}: use that of"):
        agree_on_token(address, address)


def test_what_the_user_set_is_not_overruled(head, tmp_path, monkeypatch):
    asks, address = head
    write_token(tmp_path, TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled" if asks else "token")
    text = "RAY_AUTH_MODE=disabled keeps from it" if asks else "started without authentication"
    with pytest.raises(ValueError, match=text):
        agree_on_token(address, address)


def test_another_server_is_not_taken_for_an_open_cluster():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match="does not answer as the head of a Ray cluster"):
            agree_on_token(address, address)
        server.shutdown()
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("has_token", [True, False])
def test_a_cluster_of_ones_own_leaves_no_token_behind(tmp_path, monkeypatch, has_token):
    """With one at home, `ray start` would ask `ray job submit` for it, which does not send it."""
    seen = {}

    def init(address, **options):
        seen["token"] = os.environ.get("RAY_AUTH_TOKEN")
        assert address == "local"

    if has_token:
        write_token(tmp_path, TOKEN)
    monkeypatch.setattr(ray, "init", init)
    with session.ray_session():
        pass
    assert (seen["token"] is None) == has_token
    assert (tmp_path / ".ray").exists() == has_token
    assert os.environ.get("RAY_AUTH_MODE") is None  # Ray's default for its own clusters: token


class Starts:
    """`ray.init` as far as its processes go: a server, and a node that dies or lives."""

    def __init__(self, monkeypatch, folder, *, fatal):
        self.raylet = folder / "raylet"
        shutil.copy("/bin/sleep", self.raylet)
        self.fatal = fatal
        self.attempts = 0
        self.servers = []
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(session.services, "get_node", self.get_node)

    def init(self, address, **options):
        self.attempts += 1
        self.servers.append(psutil.Popen(["sleep", "600"]))
        self.node = psutil.Popen([self.raylet, "600"])
        eventually(lambda: self.node.name() == "raylet", "the node's exec")
        self.asked = 0
        session.services.get_node("address", "id")

    def get_node(self, address, node_id):
        self.asked += 1
        if self.asked == 2:
            if self.attempts > self.fatal:
                return {}
            self.node.kill()  # dead, and a zombie, as nobody has waited for it
            eventually(lambda: self.node.status() == psutil.STATUS_ZOMBIE, "the node ends")
        raise RuntimeError("node is not there")


def test_a_node_that_dies_while_it_starts_is_noticed_and_started_again(
    tmp_path, monkeypatch, capsys
):
    starts = Starts(monkeypatch, tmp_path, fatal=1)
    try:
        with session.ray_session():
            assert starts.attempts == 2
            assert starts.asked == 2  # not before its time was over, but at once
            assert [process.is_running() for process in starts.servers] == [False, True]
    finally:
        starts.servers[-1].kill()
        starts.node.kill()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: Ray's node died 0 s after its start")


def test_a_node_that_always_dies_is_an_error(tmp_path, monkeypatch):
    starts = Starts(monkeypatch, tmp_path, fatal=9)
    message = rf"3 times in a row\. Its logs are in {tmp_path}/rlsys-\w+/ray/session_latest/logs$"
    with pytest.raises(RayStartError, match=message), session.ray_session():
        pass
    assert not any(process.is_running() for process in starts.servers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_way_to_stop_a_run_writes_its_status_first(tmp_path, number):
    """`ray job stop` sends SIGTERM, and kills three seconds later."""
    run = RunDir(tmp_path)
    before = signal.getsignal(number)
    with run.held(), interruptible(on_first=run.mark_ended):
        run.write_status(RUNNING)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert run.has_ended()
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with interruptible(on_first=RunDir(tmp_path).mark_ended):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
