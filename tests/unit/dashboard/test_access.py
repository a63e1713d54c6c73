"""Who may ask the page: methods, the Host header, other sites, the token."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from rlsys.dashboard.access import Access, host_of, is_loopback


def client(*, host="127.0.0.1", port=8123, token=None, base="http://127.0.0.1:8123"):
    async def socket(websocket):
        await websocket.accept()

    app = Starlette(
        routes=[
            Route("/", lambda request: PlainTextResponse("page")),
            Route("/api/runs", lambda request: PlainTextResponse("runs")),
            WebSocketRoute("/socket", socket),
        ],
        middleware=[Middleware(Access, host=host, port=port, token=token)],
    )
    return TestClient(app, base_url=base, follow_redirects=False)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_reading_is_allowed(method):
    answer = client().request(method, "/")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert client().head("/").status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("127.0.0.1:8123", 200),
        ("localhost:9000", 200),  # an ssh tunnel to another port
        ("LOCALHOST", 200),
        ("[::1]:8123", 200),
        ("10.0.0.7:8123", 200),  # an address cannot be rebound
        ("attacker.example:8123", 403),
        ("127.0.0.1.attacker.example", 403),
        ("localhost.attacker.example:8123", 403),
        ("", 403),
    ],
)
def test_a_name_that_somebody_else_owns_is_refused(header, status):
    assert client().get("/api/runs", headers={"host": header}).status_code == status


def test_a_page_that_listens_elsewhere_has_its_names(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    monkeypatch.setattr("socket.getfqdn", lambda: "node7.cluster.example")
    elsewhere = client(host="10.0.0.7")
    for name, status in (("node7", 200), ("node7.cluster.example:1", 200), ("other", 403)):
        assert elsewhere.get("/", headers={"host": name}).status_code == status


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)],
)
def test_another_site_may_not_ask_the_api(site, status):
    assert client().get("/api/runs", headers={"sec-fetch-site": site}).status_code == status
    assert client().get("/", headers={"sec-fetch-site": site}).status_code == 200  # a link


def test_without_the_token_nothing_is_answered():
    asked = client(token="secret")
    for path in ("/", "/api/runs", "/?token=wrong", "/api/runs?token=", "/?token=sécret"):
        answer = asked.get(path)
        assert answer.status_code == 401
        assert "the address that was printed" in answer.json()["error"]
        assert "secret" not in answer.text


def test_the_token_in_the_address_becomes_a_cookie_and_leaves_the_address():
    asked = client(token="secret")
    answer = asked.get("/?token=secret&run=a%20b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?run=a+b")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert asked.get("/").text == "page"
    assert asked.get("/api/runs").text == "runs"


def test_a_redirect_stays_on_this_host():
    answer = client(token="secret").get("http://127.0.0.1:8123//attacker.example/?token=secret")
    assert answer.headers["location"] == "/attacker.example/"


def test_scripts_may_give_the_token_with_each_request():
    assert client(token="secret").get("/api/runs?token=secret").text == "runs"


def test_two_pages_on_one_host_have_two_cookies():
    first, second = client(token="one", port=1), client(token="two", port=2)
    cookies = [
        answer.headers["set-cookie"].partition("=")[0]
        for answer in (first.get("/?token=one"), second.get("/?token=two"))
    ]
    assert len(set(cookies)) == 2


def test_every_answer_forbids_what_comes_from_elsewhere():
    for path in ("/", "/api/runs", "/nowhere"):
        headers = client().get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in headers


def test_web_sockets_are_refused():
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/socket"):
        pass


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("", False), ("::", False), ("10.0.0.7", False), ("node7", False)),
    ],
)
def test_which_addresses_are_this_machines_own(host, is_local):
    assert is_loopback(host) is is_local


@pytest.mark.parametrize(
    ("header", "host"),
    [("a:1", "a"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("A.b", "a.b"), ("", ""), ("[", "")],
)
def test_the_host_of_a_header(header, host):
    assert host_of(header) == host
