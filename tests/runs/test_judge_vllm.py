"""The judge against a real vLLM server of chat completions."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from patience import PATIENCE_S

from rlsys.rewards import orms

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture(scope="module")
def judge_url(starter_model, tmp_path_factory):
    """Base URL of a vLLM server with the starter model under the name `judge`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(starter_model), "--served-model-name", "judge", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        for _ in range(int(PATIENCE_S / 0.5)):
            if answers(f"http://127.0.0.1:{port}/health"):
                break
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        else:
            raise AssertionError(f"the server does not answer\n{log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_a_real_server_judges(judge_url, tmp_path):
    judge = orms["judge"](
        "judge",
        base_url=judge_url,
        prompt="{prompt}{completion}",
        score_pattern=r"(\d)",  # the model is untrained and writes anything
        max_tokens=8,
        cache_dir=str(tmp_path),
    )
    completions = ["1+2", "3+4", "1+2", "5"]
    scores = asyncio.run(judge(completions, prompts=["What?"] * 4))
    assert scores[0] == scores[2]
    assert all(score is None or 0 <= score <= 1 for score in scores)
    assert judge.num_unreadable == scores.count(None)
    assert len(list(tmp_path.glob("*/*.json"))) == 3


def test_a_model_that_it_does_not_have_is_an_error(judge_url):
    judge = orms["judge"]("nobody", base_url=judge_url)
    with pytest.raises(RuntimeError, match=r"refused, status 404.*nobody"):
        asyncio.run(judge(["1"], prompts=["What?"]))
