"""`rlsys dashboard` as a user starts it: addresses, ports, errors, and how it ends."""

import re
import signal
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from run_folders import write_run_folder

import rlsys
from rlsys import cli
from rlsys.dashboard.server import STATIC, address, listen

ROOT = Path(rlsys.__file__).parent.parent


@contextmanager
def dashboard(*words):
    """The process, and the address that it prints."""
    command = [sys.executable, "-m", "rlsys.cli", "dashboard", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)
        yield process, re.search(r"http://\S+", line)[0], line
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run_folder(tmp_path_factory.mktemp("runs") / "a", 3)


@pytest.mark.processes
def test_two_pages_at_once_show_the_same_run_and_ctrl_c_ends_one(run):
    with dashboard(run.path) as (first, url, line), dashboard(run.path.parent) as (_, other, _):
        assert line.startswith("1 run at http://127.0.0.1:")
        assert url != other
        with httpx.Client(timeout=60) as client:
            runs = client.get(f"{url}api/runs").json()
            assert runs == client.get(f"{other}api/runs").json()
            assert '<div id="app">' in client.get(url).text
            metrics = client.get(f"{url}api/runs/{runs[0]['id']}/metrics?names=reward").json()
            assert metrics["step"] == [1, 2, 3]
            first.send_signal(signal.SIGINT)
            assert first.wait(60) == 0
            assert first.stderr.read() == ""
            assert client.get(f"{other}api/runs").status_code == 200


@pytest.mark.processes
def test_a_long_query_keeps_nobody_waiting(run):
    where = "(SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b) > reward"
    with dashboard(run.path) as (process, url, _), httpx.Client(base_url=url, timeout=60) as client:
        name = client.get("/api/runs").json()[0]["id"]
        with ThreadPoolExecutor(1) as pool:
            path = f"/api/runs/{name}/completions"
            asked = url.rstrip("/") + path
            long = pool.submit(httpx.get, asked, params={"where": where}, timeout=60)
            for _ in range(5):
                assert client.get("/icon.svg").status_code == 200
            assert client.get(f"{path}?limit=1").json()["total"] == 24
            assert not long.done()
            process.kill()


@pytest.mark.processes
def test_the_address_with_its_token_opens_the_page_and_nothing_else_does(run):
    with dashboard(run.path, "--token") as (_, url, _):
        bare = url.partition("?")[0]
        with httpx.Client(timeout=60, follow_redirects=True) as client:
            assert client.get(f"{bare}api/runs").status_code == 401
            opened = client.get(url)
            assert opened.status_code == 200
            assert "token" not in str(opened.url)
            assert len(client.get(f"{bare}api/runs").json()) == 1


def test_a_page_that_others_reach_asks_for_a_token(run, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: served.append(self))
    own = socket.gethostbyname(socket.gethostname())
    host = own if own != "127.0.0.1" else ""
    assert cli.main(["dashboard", str(run.path), "--host", host]) == 0
    assert re.search(r"/\?token=[\w-]{32}", capsys.readouterr().out)
    assert cli.main(["dashboard", str(run.path)]) == 0
    assert "token" not in capsys.readouterr().out
    assert len(served) == 2


def test_from_an_ssh_session_the_tunnel_is_shown(run, monkeypatch, capsys):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    cli.main(["dashboard", str(run.path)])
    tunnel = capsys.readouterr().out.splitlines()[1]
    assert re.search(r"ssh -N -L (127\.0\.0\.1:\d+):\1 \S+$", tunnel)


def test_a_port_in_use_is_an_error_that_says_so(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["dashboard", str(run.path), "--port", str(port)]) == 2
    assert f"--port {port} is in use on 127.0.0.1: choose another" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "99999999"])
def test_a_port_that_cannot_be(run, port, capsys):
    assert cli.main(["dashboard", str(run.path), f"--port={port}"]) == 2
    assert f"--port {port} should be 0 to 65535" in capsys.readouterr().err


def test_an_address_of_another_machine(run, capsys):
    assert cli.main(["dashboard", str(run.path), "--host", "192.0.2.1"]) == 2
    assert "--host 192.0.2.1" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for place, text in (
        (tmp_path, "is not the output directory of a run"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "notes.txt", "is not the output directory of a run"),
    ):
        assert cli.main(["dashboard", str(run.path), str(place)]) == 2
        error = capsys.readouterr().err
        assert f"rlsys dashboard: {place} {text}" in error


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/"),
        ("::1", "http://[::1]:80/"),
        ("::", f"http://{socket.gethostname()}:80/"),
        ("", f"http://{socket.gethostname()}:80/"),
    ],
)
def test_the_address_that_is_printed(host, url):
    assert address(host, 80, None) == url
    assert address(host, 80, "t") == f"{url}?token=t"


def test_a_free_port_is_taken_and_connections_wait_from_then_on():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass


@pytest.mark.processes
def test_the_wheel_holds_the_page(tmp_path):
    """As setuptools builds it, from a copy: building writes beside the sources."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "rlsys").symlink_to(ROOT / "rlsys")
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"rlsys/dashboard/static/{path.name}" for path in STATIC.iterdir()}
    assert "rlsys/dashboard/static/index.html" in wanted
    assert wanted <= held
    assert not [name for name in held if "/web/" in name]
