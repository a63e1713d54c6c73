"""Who may ask the page, and what a browser may do with the answers."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""The Content-Security-Policy: nothing from elsewhere, no inline script, and not in a frame."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
METHODS = ("GET", "HEAD")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(header: str) -> str:
    """The name or address of a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


class Access:
    """ASGI middleware: methods, the Host header, other sites, the token, and headers of answers.

    A page of another site can make a browser send requests to 127.0.0.1, and with a name that it
    resolves to 127.0.0.1 (DNS rebinding) it could read the answers. Such requests carry that name
    in their Host header. Addresses cannot be rebound, so every address is allowed.

    Args:
        app: what answers the requests that may pass.
        host: where the server listens.
        port: part of the cookie's name, because cookies of a host are shared by its ports.
        token: what a request must show; None asks for nothing.
    """

    def __init__(self, app: ASGIApp, *, host: str, port: int, token: str | None):
        self._app = app
        self._names = {"localhost", host.lower()}
        if not is_loopback(host):
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self._cookie = f"rlsys_dashboard_{port}"
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the reason why not."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": "only GET"})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        request = Request(scope)
        answer = self._refusal(request) or self._after_token(request) or self._app
        return await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in METHODS:
            return refuse(405, f"{request.method} is not allowed: the page only reads", Allow="GET")
        host = host_of(request.headers.get("host", ""))
        if not _is_address(host) and host not in self._names:
            return refuse(
                403,
                f"the Host header names {host!r}. Open the page by the address that "
                "`rlsys dashboard` printed, or by the machine's IP address",
            )
        if request.url.path.startswith("/api") and request.headers.get(
            "sec-fetch-site", "none"
        ) not in ("none", "same-origin"):
            return refuse(403, "another site may not ask")
        return None

    def _after_token(self, request: Request) -> Response | None:
        """What answers instead of the app: a page address with the token becomes a cookie."""
        if self._token is None:
            return None
        given = request.query_params.get("token")
        shown = given if given is not None else request.cookies.get(self._cookie, "")
        if not hmac.compare_digest(shown.encode(), self._token.encode()):
            return refuse(
                401, "the token is missing or wrong: open the address that was printed, as a whole"
            )
        if given is None or request.url.path.startswith("/api"):
            return None
        left = [(k, v) for k, v in parse_qsl(request.url.query) if k != "token"]
        # Not request.url: its host is what the client sent.
        target = "/" + request.url.path.lstrip("/") + (f"?{urlencode(left)}" if left else "")
        answer = RedirectResponse(target, status_code=303)
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
        return answer


def refuse(status: int, text: str, **headers: str) -> JSONResponse:
    """An answer that says what is wrong: {"error": text}."""
    return JSONResponse({"error": text}, status_code=status, headers=headers)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
