"""Who gets into the Ray cluster that a run starts: its owner, with the token."""

import getpass
import http.client
import json
import stat
import tempfile
from pathlib import Path

import psutil
import pytest
import ray

from rlsys.actors.ray_session import _is_let_in

pytestmark = [pytest.mark.system, pytest.mark.slow]

JOB = json.dumps({"entrypoint": "true", "submission_id": "not-by-me"})


def listening():
    """The TCP ports of Ray's processes of this run."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = {
        c.laddr.port for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"
    }
    assert len(found) >= 4
    return sorted(found)


def starts_a_job(port, path):
    """Whether a port starts a program for somebody without a token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST", path, JOB, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status < 400 and b"not-by-me" in answer.read()
    except (OSError, http.client.HTTPException):  # it speaks another language
        return False
    finally:
        connection.close()


def test_other_users_of_the_host_do_not_reach_its_files(ray_cluster):
    ray.get(ray.remote(lambda: 0).remote(), timeout=60)  # a worker opens its folders to everybody
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    (closed,) = (path for path in folder.parents if path.parent == Path(tempfile.gettempdir()))
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert closed.owner() == getpass.getuser()


def test_nobody_starts_a_program_without_the_token(ray_cluster):
    assert not _is_let_in("ours", ray.get_runtime_context().gcs_address, None)
    paths = ("/api/jobs/", "/api/job_agent/jobs/")
    assert not [(port, path) for port in listening() for path in paths if starts_a_job(port, path)]
