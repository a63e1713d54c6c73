"""Who gets into the Ray cluster that a run starts: its owner, with the token."""

import http.client
import json
import stat
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


def answer(port, method, path, body=None):
    """The HTTP status that a port gives somebody without a token; None if it speaks no HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_other_users_of_the_host_do_not_reach_its_files(ray_cluster):
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nobody_starts_a_program_without_the_token(ray_cluster):
    assert not _is_let_in("ours", ray.get_runtime_context().gcs_address, None)
    statuses = {
        port: [answer(port, "POST", path, JOB) for path in ("/api/jobs/", "/api/job_agent/jobs/")]
        for port in listening()
    }
    accepted = {port: s for port, s in statuses.items() if any(x and x < 400 for x in s)}
    assert accepted == {}
    # The agent has such a path, and refuses.
    assert any(x in (401, 403) for found in statuses.values() for x in found), statuses
