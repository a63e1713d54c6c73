"""The server behind the page: its address, and the loop that answers."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from rlsys.dashboard.access import Access, is_loopback
from rlsys.dashboard.api import ERRORS, routes
from rlsys.dashboard.runs import Runs
from rlsys.network import LOOPBACK
from rlsys.text import counted

STATIC = Path(__file__).parent / "static"
"""The page: HTML, scripts and styles, built from the folder web."""
TOKEN_BYTES = 24
SECONDS_TO_CLOSE = 1


def build_app(runs: Runs, *, host: str, port: int, token: str | None) -> Starlette:
    """The page and its API as an ASGI application.

    Args:
        runs: what it shows.
        host: where the server listens.
        port: where the server listens.
        token: what a request must show; None asks for nothing.
    """
    return Starlette(
        routes=[
            Mount("/api", routes=routes(runs)),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ],
        middleware=[Middleware(Access, host=host, port=port, token=token)],
        exception_handlers=ERRORS,
    )


def serve(
    places: Sequence[Path],
    *,
    host: str = LOOPBACK,
    port: int = 0,
    with_token: bool = False,
    open_browser: bool = False,
) -> None:
    """Show the runs below `places` until Ctrl-C.

    Args:
        places: folders of runs, or folders with runs below them.
        host: address or name to listen on. Another one than this machine's own asks for a token.
        port: 0 is a free one.
        with_token: ask for a token on any address.
        open_browser: show the page in this machine's browser.

    Raises:
        ValueError: a place holds no run, or the address cannot be had.
    """
    runs = Runs(places)
    found = runs.check()
    listener = listen(host, port)
    port = listener.getsockname()[1]
    token = None
    if with_token or not is_loopback(host):
        token = secrets.token_urlsafe(TOKEN_BYTES)
    app = build_app(runs, host=host, port=port, token=token)
    url = address(host, port, token)
    print(f"{counted(found, 'run')} at {url} (Ctrl-C ends the page, not the run)", flush=True)
    if "SSH_CONNECTION" in os.environ and is_loopback(host):
        there = f"{LOOPBACK}:{port}"
        print(
            f"from your own machine: ssh -N -L {there}:{there} {socket.gethostname()}", flush=True
        )
    # While the user opens the address, the metrics are read: the first answer needs them.
    threading.Thread(target=_read_ahead, args=(runs,), daemon=True).start()
    if open_browser:
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _read_ahead(runs: Runs) -> None:
    for run in runs.all().values():
        with suppress(OSError):  # a folder that is deleted meanwhile
            run.metric_names()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ValueError: the port is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OverflowError:
        raise ValueError(f"--port {port} should be 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port {port} is in use on {host}: choose another, or leave --port out for a "
                "free one"
            ) from None
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror or error}. Use an address of this "
            "machine, and a port that you may open"
        ) from None


def address(host: str, port: int, token: str | None) -> str:
    """What a person opens in a browser."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = not host
    name = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
