"""The judge against a server that misbehaves on purpose."""

import asyncio
import gc
import json
import logging
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from waiting import eventually

from rlsys.rewards import orms
from rlsys.rewards.builtin.judge import DEFAULT_PROMPT, DEFAULT_SCORE


def test_the_documentation_has_the_defaults_whole():
    page = Path(__file__).parents[3] / "docs" / "rewards.md"
    assert f"```text\n{DEFAULT_PROMPT}```" in page.read_text()
    assert f"```text\n{DEFAULT_SCORE}\n```" in page.read_text()


class Server(ThreadingHTTPServer):
    """Answers from a script of (status, body, headers); then "Score: 5" for ever."""

    daemon_threads = True

    def __init__(self):
        self.script = deque()
        self.requests = []
        self.now, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            self.server.now += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.now)
            step = self.server.script.popleft() if self.server.script else reply("Score: 5")
        self.server.gate.wait()
        with self.server.lock:
            self.server.now -= 1
        if step == "hang up":
            self.close_connection = True
            return
        status, content, headers = step
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def reply(text, status=200, **headers):
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return status, json.dumps(body).encode(), headers


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.gate.set()
        running.shutdown()
        thread.join()


def make(server, **settings):
    return orms["judge"](
        "the-judge", base_url=server.url, **{"retry_wait_s": 0.001, "timeout_s": 20.0} | settings
    )


def score(judge, *completions, **columns):
    prompts = [[{"role": "user", "content": "What is 1+1?"}]] * len(completions)
    return asyncio.run(judge(list(completions), prompts=prompts, **columns))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Right.\nScore: 10", 1.0),
        ("Score: 0", 0.0),
        ("**Score:** 7.5 / 10", 0.75),
        ("score 5 out of 10.", 0.5),
        ("Score: 10\nNo, wait.\nScore: 2", 0.2),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: ten", None),
        ("I would say 10", None),
        ("Score: 1e9", None),
        ("Score: " + "9" * 400, None),
        ("", None),
    ],
)
def test_scores_of_replies(server, text, expected):
    server.script.append(reply(text))
    judge = make(server)
    assert score(judge, "2") == [expected]
    assert judge.num_unreadable == (expected is None)


def test_what_the_judge_is_asked(server):
    judge = make(server, prompt="{prompt} | {completion} | {solution} | {max_score:g}", max_score=3)
    assert score(judge, "{two} </answer_to_grade>", solution=["2"]) == [None]
    [(path, _, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert body["model"] == "the-judge"
    [message] = body["messages"]
    assert message["content"] == "user: What is 1+1? | {two} <\\/answer_to_grade> | 2 | 3"
    with pytest.raises(ValueError, match="has a field 'solution' and the dataset no such column"):
        score(judge, "2")


def test_the_judge_reads_what_tools_were_called_with(server):
    called = {"name": "add", "arguments": {"a": 2}}
    prompt = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": called}]},
        {"role": "tool", "content": "4"},
    ]
    judge = make(server, prompt="{prompt} | {completion}")
    asyncio.run(judge(["4"], prompts=[prompt]))
    [(_, _, body)] = server.requests
    expected = 'user: 2 + 2?\n\nassistant: [{"name": "add", "arguments": {"a": 2}}]\n\ntool: 4 | 4'
    assert body["messages"][0]["content"] == expected


@pytest.mark.parametrize(
    "failures",
    [
        [reply("", status=429)],
        [reply("", status=429, **{"Retry-After": "0"})] * 3,
        [reply("", status=500), reply("", status=503), (502, b"<html>", {})],
        ["hang up", "hang up"],
        [(200, b"<html>not json</html>", {}), (200, b'{"choices": []}', {}), (200, b'{"cho', {})],
    ],
    ids=["429", "429 with Retry-After", "5xx", "lost connections", "garbage"],
)
def test_a_request_that_fails_is_tried_again(server, failures):
    server.script.extend(failures)
    assert score(make(server), "2") == [0.5]
    assert len(server.requests) == len(failures) + 1


def test_a_slow_reply_is_asked_for_again(server):
    judge = make(server, timeout_s=0.2, max_retries=1)
    server.gate.clear()
    with pytest.raises(RuntimeError, match=r"failed 2 times, .* with .*Timeout"):
        score(judge, "2")


def test_a_server_that_never_recovers_is_an_error(server):
    server.script.extend([reply("busy", status=503)] * 9)
    with pytest.raises(RuntimeError, match=r"failed 3 times, the last time with status 503"):
        score(make(server, max_retries=2), "2")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_an_error_at_once(server, status):
    server.script.append((status, b"no such model", {}))
    with pytest.raises(RuntimeError, match=f"refused, status {status}: no such model"):
        score(make(server), "2")
    assert len(server.requests) == 1


def test_no_server_is_an_error(server):
    judge = make(server, max_retries=0)
    judge.server.url = "http://127.0.0.1:9/v1/chat/completions"
    with pytest.raises(RuntimeError, match="failed 1 times"):
        score(judge, "2")


def test_no_more_requests_at_once_than_allowed(server):
    server.gate.clear()

    def open_when_four_wait():
        try:
            eventually(lambda: server.now >= 4, "four requests wait")
        finally:
            server.gate.set()

    threading.Thread(target=open_when_four_wait, daemon=True).start()
    texts = [str(n) for n in range(40)]
    assert score(make(server, max_concurrency=4), *texts) == [0.5] * 40
    assert len(server.requests) == 40
    assert server.most_at_once == 4


def test_equal_completions_cost_one_request(server):
    judge = make(server)
    assert score(judge, "a", "a", "b", "a") == [0.5] * 4
    assert score(judge, "b", "a") == [0.5] * 2  # in another event loop
    assert len(server.requests) == 2


def test_replies_are_kept_on_disk_and_broken_files_are_ignored(server, tmp_path):
    assert score(make(server, cache_dir=str(tmp_path)), "a", "b") == [0.5] * 2
    server.script.append(reply("Score: 9"))
    assert score(make(server, cache_dir=str(tmp_path)), "a", "b") == [0.5] * 2
    assert len(server.requests) == 2
    files = sorted(tmp_path.glob("*/*.json"))
    assert len(files) == len(list(tmp_path.glob("*/*"))) == 2
    for broken in ('{"reply": "Sc', "", "[]", '{"reply": 1}', "\udce9"):
        server.script.clear()
        files[0].write_text(broken, errors="surrogateescape")
        assert score(make(server, cache_dir=str(tmp_path)), "a", "b") == [0.5] * 2
    assert len(server.requests) == 2 + 5
    server.script.append(reply("Score: 9"))
    other = make(server, cache_dir=str(tmp_path), temperature=0.5)
    assert score(other, "a") == [0.9]


def test_failures_are_not_cached(server):
    judge = make(server, max_retries=0)
    server.script.append(reply("", status=500))
    with pytest.raises(RuntimeError, match="failed 1 times"):
        score(judge, "2")
    assert score(judge, "2") == [0.5]


def ask(judge, text):
    """A call under way, as a group's time may end it."""
    return asyncio.create_task(judge([text], prompts=["What is 1+1?"]))


async def arrived(server, number):
    while len(server.requests) < number:
        await asyncio.sleep(0.01)


async def cancelled(*calls):
    for call in calls:
        call.cancel()
    assert all(
        isinstance(end, asyncio.CancelledError)
        for end in await asyncio.gather(*calls, return_exceptions=True)
    )


async def all_is_done():
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0.01)


async def ask_and_give_up(server, judge):
    server.gate.clear()
    call = ask(judge, "2")
    await arrived(server, 1)
    await cancelled(call)
    server.gate.set()
    await all_is_done()


def test_an_answer_that_nobody_waits_for_any_more_is_kept(server):
    judge = make(server)

    async def main():
        await ask_and_give_up(server, judge)
        return await ask(judge, "2")

    assert asyncio.run(main()) == [0.5]
    assert len(server.requests) == 1


def test_a_request_that_nobody_waits_for_is_not_sent(server):
    judge = make(server, max_concurrency=1)

    async def main():
        server.gate.clear()
        first = ask(judge, "first")
        await arrived(server, 1)
        gone, half_gone = [[ask(judge, text) for _ in range(2)] for text in ("gone", "half gone")]
        asked_again = ask(judge, "asked again")
        for _ in range(10):  # now they wait for the place of the first
            await asyncio.sleep(0)
        await cancelled(*gone, half_gone[0], asked_again)
        asked_again = ask(judge, "asked again")
        server.gate.set()
        assert await asyncio.gather(first, half_gone[1], asked_again) == [[0.5]] * 3
        await all_is_done()

    asyncio.run(main())
    texts = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert len(texts) == 3
    assert not any(">\ngone\n<" in text for text in texts)


def test_a_failed_request_that_nobody_waits_for_is_not_tried_again(server):
    judge = make(server)
    server.script.append(reply("", status=503))

    async def main():
        await ask_and_give_up(server, judge)
        assert len(server.requests) == 1
        return await ask(judge, "2")

    assert asyncio.run(main()) == [0.5]


def test_a_failure_that_nobody_waits_for_logs_no_warning(server):
    judge = make(server)
    server.script.append(reply("no such model", status=404))
    told = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        await ask_and_give_up(server, judge)
        gc.collect()

    asyncio.run(main())
    assert told == []
    assert score(judge, "2") == [0.5]


def test_the_key_is_sent_and_appears_nowhere_else(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sk-secret")
    judge = make(server, api_key_env="MY_KEY", cache_dir=str(tmp_path), max_retries=0)
    server.script.append((401, b"wrong key", {}))
    with pytest.raises(RuntimeError, match="refused, status 401") as error:
        score(judge, "1")
    assert score(judge, "2") == [0.5]
    assert server.requests[-1][1]["Authorization"] == "Bearer sk-secret"
    told = [str(error.value), caplog.text, repr(vars(judge) | vars(judge.server))]
    told += [path.read_text() for path in tmp_path.glob("*/*")]
    assert not any("sk-secret" in text for text in told)


def test_without_a_key_no_key_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert score(make(server), "2") == [0.5]
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_score": 1, "max_score": 1}, "must be below"),
        ({"max_concurrency": 0}, "at least 1"),
        ({"max_retries": -1}, "at least 0"),
        ({"prompt": "Grade it."}, "no field {completion}"),
        ({"score_pattern": "Score"}, "no group"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE .* is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        orms["judge"]("m", **settings)
