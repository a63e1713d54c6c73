"""A server as an engine: what is sent, what comes back, and what is tried again."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from config_cases import values
from data_cases import word_tokenizer

from rlsys.config import Config
from rlsys.engines import chat_server
from rlsys.engines.chat_server import Server, ServerEngine, find_server, request_body
from rlsys.types import Prompt, SampleRequest

pytestmark = pytest.mark.processes


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.reply(*self.server.answer(body))

    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models, server.bodies = ["a"], []
    server.answer = lambda body: (200, completion("a b"))
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def completion(text, reason="stop", **message):
    return {"choices": [{"message": {"content": text} | message, "finish_reason": reason}]}


@pytest.fixture
def engine(server, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_server, "FIRST_PAUSE_S", 0.0)
    word_tokenizer().save_pretrained(tmp_path)
    config = Config.model_validate(values(model={"path": str(tmp_path)}))
    return ServerEngine(Server(server.url, "a"), config)


def request(ticket=1, n=2, **columns):
    prompt = Prompt("p1", [{"role": "user", "content": "a"}], [1], columns)
    return SampleRequest(ticket, prompt, n, 0.5, 7, top_p=0.9)


def finish(engine):
    groups = []
    while engine.has_work:
        groups += engine.step()
    return groups


def test_each_completion_is_a_request_with_a_seed_of_its_own(engine, server):
    engine.add([request(3)])
    [group] = finish(engine)
    assert (group.ticket, [c.text for c in group.completions]) == (3, ["a b", "a b"])
    assert [c.finish_reason for c in group.completions] == ["stop", "stop"]
    assert [len(c.token_ids) for c in group.completions] == [2, 2]
    assert sorted(body["seed"] for body in server.bodies) == [7, 8]
    for body in server.bodies:
        assert body["messages"] == [{"role": "user", "content": "a"}]
        assert (body["temperature"], body["top_p"], body["model"]) == (0.5, 0.9, "a")
        assert "top_k" not in body  # OpenAI does not know it


def test_what_only_some_servers_know_is_sent_only_if_it_is_asked_for():
    config = Config.model_validate(values(rollout={"top_k": 5}))
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = request_body(config, "a", request(tools=tools), 0)
    assert (body["top_k"], body["tools"]) == (5, tools)
    assert not {"min_p", "repetition_penalty", "presence_penalty"} & set(body)
    own = {"min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": -0.5}
    body = request_body(Config.model_validate(values(rollout=own)), "a", request(), 0)
    assert {name: body[name] for name in own} == own


def test_thoughts_that_the_server_took_out_are_put_back(engine, server):
    server.answer = lambda body: (200, completion("b", "length", reasoning_content="a"))
    engine.add([request(n=1)])
    [group] = finish(engine)
    assert group.completions[0].text == "<think>a</think>b"
    assert group.completions[0].finish_reason == "length"


def test_a_busy_server_is_asked_again(engine, server):
    server.answer = lambda body: (200, completion("a")) if len(server.bodies) > 2 else (503, {})
    engine.add([request(n=1)])
    assert len(finish(engine)) == 1
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "no"}), "refused a request, status 400"),
        ((500, {}), "failed 6 times, the last time with status 500"),
        ((200, completion(None, "tool_calls")), "ended a completion with 'tool_calls'"),
    ],
)
def test_what_cannot_be_scored_is_an_error(engine, server, answer, message):
    server.answer = lambda body: answer
    engine.add([request(n=1)])
    with pytest.raises(RuntimeError, match=message):
        finish(engine)


def test_groups_that_are_given_up_are_forgotten(engine):
    engine.add([request(1), request(2)])
    engine.abort([1, 9])
    assert [group.ticket for group in finish(engine)] == [2]


def test_the_only_model_need_not_be_named(server):
    assert find_server(server.url + "/", None) == Server(server.url, "a")
    server.models = ["a", "b"]
    assert find_server(server.url, "b").model == "b"
    with pytest.raises(ValueError, match="name one of its models: a, b"):
        find_server(server.url, None)
    with pytest.raises(ValueError, match="does not serve 'c': a, b"):
        find_server(server.url, "c")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense"])
def test_a_server_that_is_not_there(url):
    with pytest.raises(ValueError, match=r"does not answer as an OpenAI-compatible server"):
        find_server(url, None)
