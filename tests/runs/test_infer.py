"""`rlsys infer` on a real engine: chat on a terminal, a file of prompts, and vLLM's own server."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from patience import PATIENCE_S
from tiny_models import save_tiny_qwen3

from rlsys.commands.infer_chat import CONTINUED, PROMPT
from rlsys.files import read_jsonl

pytestmark = pytest.mark.system


class Terminal:
    """A process on a pseudo terminal."""

    def __init__(self, command):
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.text = ""

    def type(self, line):
        os.write(self._fd, f"{line}\n".encode())

    def read_until(self, end):
        """What is printed up to `end`, which is left out."""
        deadline = time.monotonic() + PATIENCE_S
        while end not in self.text:
            assert time.monotonic() < deadline, self.text[-3000:]
            if select.select([self._fd], [], [], 1.0)[0]:
                try:
                    self.text += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:  # the process has closed it
                    raise AssertionError(self.text[-3000:]) from None
        found, _, self.text = self.text.partition(end)
        return found.replace("\r\n", "\n")


TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random model whose answers depend on the whole conversation."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    save_tiny_qwen3(folder, tied=False, seed=1)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def session(chat_model, tmp_path_factory):
    """The report of infer_session.py, and what its terminal showed for each line."""
    folder = tmp_path_factory.mktemp("infer")
    script = Path(__file__).with_name("infer_session.py")
    terminal = Terminal([sys.executable, str(script), str(chat_model), str(folder)])
    terminal.read_until("TERMINAL")
    shown = [terminal.read_until(PROMPT)]
    for line in (
        *("/set max_tokens 6", "Which numbers?", "Which numbers?", "/show", "/clear"),
        *("Which numbers?", "/set top_p 2", "/unknown"),
    ):
        terminal.type(line)
        shown.append(terminal.read_until(PROMPT).partition("\n")[2])
    terminal.type('"""two')
    terminal.read_until(CONTINUED)
    terminal.type('lines"""')
    shown.append(terminal.read_until(PROMPT).partition("\n")[2])
    terminal.type("/exit")
    assert terminal.process.wait(PATIENCE_S) == 0
    return json.loads((folder / "report.json").read_text()) | {"shown": shown}


def test_a_file_of_prompts_is_completed_in_its_order(session):
    batch = session["batch"]
    assert batch["codes"] == [0, 0, 0]
    rows = batch["rows"]
    assert [row["prompt_id"] for row in rows] == ["prompts:1", "prompts:2", "prompts:3"]
    assert (rows[0]["id"], rows[1]["solution"]) == (7, "4")
    assert rows[2]["messages"] == [{"role": "user", "content": "Show your work"}]
    for row in rows:
        assert row["finish_reason"] in ("stop", "length")
        assert (row["num_tokens"] == 12) >= (row["finish_reason"] == "length")
        assert row["completion"] or row["num_tokens"] == 1
        assert row["sampling"] == {"seed": 3, "max_tokens": 12}


def test_an_interrupted_file_continues_to_the_same_bytes(session):
    assert session["batch"]["same"]


def test_completions_of_other_sampling_or_prompts_are_not_mixed(session):
    assert session["batch"]["refused"] == [2, 2]


def test_answers_are_streamed_and_remembered(session):
    chat = session["chat"]
    first, second, again = chat["answers"]
    assert len(chat["pieces"]) > 3
    assert "".join(chat["pieces"]) == first + second + again
    assert first == again != second  # /clear forgets, and the history counts
    assert chat["messages"] == 5  # system and two turns
    assert re.match(r"\d+ tokens?, [\d.]+ a second", chat["line"])


def test_an_interrupted_answer_ends_its_sampling(session):
    chat = session["chat"]
    assert chat["stopped"].endswith(", stopped")
    assert not chat["unfinished"]


def test_a_conversation_that_does_not_fit_is_refused_and_kept(session):
    chat = session["chat"]
    assert "tokens, and the model reads 512 (--max_model_len): /clear" in chat["full"]
    assert chat["messages_after_full"] == 3


def test_the_terminal(session):
    head, changed, first, second, show, cleared, again, wrong, unknown, lines = session["shown"]
    assert "seed 5" in head
    assert "/help lists commands" in head
    assert "max_tokens 6" in changed
    answers = [shown.partition("\033[2m")[0] for shown in (first, second, again)]
    assert answers[0] == answers[2] != answers[1]
    assert "system: You count." in show
    assert "5 messages" in show
    assert cleared == "forgotten\n"
    assert "--top_p 2 should be above 0 and at most 1" in wrong
    assert "/unknown is not a command" in unknown
    assert re.search(r"\d tokens?, ", lines)
    assert session["exit"] == 0


@pytest.mark.slow
def test_the_server_answers_and_ends_with_all_its_processes(chat_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rlsys.cli", "infer", str(chat_model), "--serve"]
    command += ["--port", str(port), "--served_model_name", "mine"]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _is_up(url):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["mine", str(chat_model)]
        body = {
            "model": "mine",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 5,
            "temperature": 0,
        }
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S).json()
        assert 1 <= reply["usage"]["completion_tokens"] <= 5
        assert reply["usage"]["prompt_tokens"] == len("[user] hi\n[assistant] ")  # a byte each
        assert f"'mine' at {url}/v1" in log.read_text()
        _evaluate(url, tmp_path, chat_model)
        family = [server.pid, *(p.pid for p in psutil.Process(server.pid).children(recursive=True))]
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        server.wait(PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while any(map(psutil.pid_exists, family)):
        assert time.monotonic() < deadline, family
        time.sleep(0.2)


def _evaluate(url, folder, model):
    """`rlsys eval --server` gets the completions, scores them and counts their tokens."""
    rows = [{"prompt": f"{i} and {i}?"} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output_dir": "unused",
        "max_steps": 1,
        "device": "cpu",
        "data": {"dataset": ["rows.jsonl"], "val_sets": {"sums": "rows.jsonl"}},
        "model": {"path": str(model)},
        "rollout": {"generation_batch_size": 8, "max_completion_length": 10},
        "reward": {"reward_funcs": ["format"]},
        "eval": {"num_generations": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    words = ["eval", "--server", f"{url}/v1", "mine", "config.yaml", "--out", "evaluated"]
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pass@4" in done.stdout
    found = list(read_jsonl(folder / "evaluated/eval_completions.jsonl"))
    assert len(found) == 12
    assert {row["prompt_id"] for row in found} == {f"sums/rows:{i}" for i in (1, 2, 3)}
    assert len({row["text"] for row in found}) > 6  # each has its own seed
    assert all(row["rewards"].keys() == {"format"} for row in found)


def _is_up(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
