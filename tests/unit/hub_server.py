"""The few addresses of the Hugging Face hub, and of ModelScope, that a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")

_MODELSCOPE = re.compile(r"/api/v1/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")


@contextmanager
def hub(root: Path, *, gated: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve `root`/models/OWNER/NAME and `root`/datasets/OWNER/NAME; gives the endpoint.

    Args:
        root: folder of the repositories.
        gated: repositories that want somebody to have asked for them.
    """

    class Handler(_Handler):
        pass

    Handler.root, Handler.gated = root, gated
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    gated: tuple[str, ...]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Of the API, or a file."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlparse(self.path)
        path = unquote(address.path)
        if path == "/":
            self._answer(200, b"", "text/html")
        elif match := _MODELSCOPE.fullmatch(path):
            query = {name: value[0] for name, value in parse_qs(address.query).items()}
            self._modelscope(match["kind"], match["repo"], match["rest"] or "", query)
        elif match := _API.fullmatch(path):
            self._api(match["kind"], match["repo"], match["rest"] or "", body)
        elif match := _FILE.fullmatch(path):
            self._file(match["kind"] or "models/", match["repo"], match["path"])
        else:
            self._error(404, "EntryNotFound", "not here")

    do_HEAD = do_POST = do_GET

    def _folder(self, kind: str, repo: str) -> Path | None:
        """Of a repository; the refusal is sent where there is none."""
        folder = self.root / kind / repo
        if repo in self.gated:
            self._error(403, "GatedRepo", f"Access to {repo} is restricted: ask for it.")
        elif folder.is_dir():
            return folder
        else:
            self._error(401, "RepoNotFound", "Repository not found")  # as the hub has it
        return None

    def _api(self, kind: str, repo: str, rest: str, body: bytes) -> None:
        folder = self._folder(kind, repo)
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": name} for name in names]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._json(info | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})
        elif rest.startswith("/tree/"):
            below = rest.partition(f"/tree/{COMMIT}")[2].strip("/")
            listed = [(n, p) for n, p in zip(names, files, strict=True) if n.startswith(below)]
            if below and not listed:
                self._error(404, "EntryNotFound", f"{below} does not exist")
            else:
                self._json([_entry(name, path) for name, path in listed])
        elif rest.startswith("/paths-info/"):
            text = body.decode()
            wanted = json.loads(text)["paths"] if text[:1] == "{" else parse_qs(text)["paths"]
            found = [w for w in ([wanted] if isinstance(wanted, str) else wanted) if w in names]
            self._json([_entry(name, folder / name) for name in found])
        else:
            self._error(404, "EntryNotFound", rest)

    def _modelscope(self, kind: str, repo: str, rest: str, query: dict[str, str]) -> None:
        folder = self.root / kind / repo
        if not folder.is_dir():
            self._json({"Code": 10010205001, "Message": "record not found", "Success": False}, 404)
        elif rest in ("/repo/files", "/repo/tree"):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            self._data({"Files": [_modelscope_entry(folder, path) for path in files]})
        elif rest == "/repo" and (folder / query["FilePath"]).is_file():
            content = (folder / query["FilePath"]).read_bytes()
            self._answer(200, content, "application/octet-stream")
        else:
            self._json({"Code": 404, "Message": f"no {rest}", "Success": False}, 404)

    def _data(self, data: object) -> None:
        self._json({"Code": 200, "Data": data, "Message": "", "Success": True})

    def _file(self, kind: str, repo: str, name: str) -> None:
        folder = self._folder(kind.strip("/"), repo)
        if folder is None:
            return
        path = folder / name
        if path.is_file():
            self._answer(200, path.read_bytes(), "application/octet-stream", _etag(path))
        else:
            self._error(404, "EntryNotFound", f"{name} does not exist")

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        text = json.dumps({"error": message}).encode()
        self._answer(status, text, "application/json", headers=headers)

    def _answer(
        self,
        status: int,
        content: bytes,
        kind: str,
        etag: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag is not None:
            self.send_header("ETag", f'"{etag}"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, path: Path) -> dict[str, object]:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}


def _modelscope_entry(folder: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = {"Type": "blob", "Path": name, "Name": path.name, "Size": path.stat().st_size}
    return entry | {"Sha256": digest, "Revision": COMMIT, "CommittedDate": 0}


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
