"""Asks an OpenAI-compatible server: equal requests once, with retries and a cache of replies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.redact import without_password

if TYPE_CHECKING:
    import httpx

MAX_WAIT_S = 30.0
"""Longest pause before a request is tried again, whatever the server asks for."""
MAX_CACHED = 100_000
"""Replies kept in memory."""
_TRY_AGAIN = {408, 409, 425, 429}


class ChatServer:
    """A server of chat completions."""

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str,
        max_concurrency: int,
        timeout_s: float,
        max_retries: int,
        retry_wait_s: float,
        cache_dir: Path | None,
    ):
        """`key_variable` is the variable with the API key; for the others see `Judge`.

        Raises:
            ValueError: a setting out of range.
        """
        if max_concurrency < 1 or max_retries < 0:
            raise ValueError(
                "judge: max_concurrency must be at least 1 and max_retries at least 0, not "
                f"{max_concurrency} and {max_retries}"
            )
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self._shown = without_password(self.url)
        self._key_variable = key_variable
        self._max_concurrency = max_concurrency
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._retry_wait_s = retry_wait_s
        self._cache = _Cache(cache_dir)
        self._connected: tuple[Any, httpx.AsyncClient, asyncio.Semaphore] | None = None
        self._in_flight: dict[str, _Request] = {}

    async def reply(self, body: dict[str, Any]) -> str:
        """The text of the reply to a request.

        A request that was sent when its callers are cancelled is finished and cached; a request
        that waits is not sent.

        Raises:
            RuntimeError: the server refused, or failed `max_retries` times more.
        """
        key = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        # Equal completions of a group ask once.
        request = self._in_flight.get(key)
        if request is None or request.task.get_loop() is not asyncio.get_running_loop():
            request = self._in_flight[key] = _Request(body)
            request.task = asyncio.create_task(self._ask_and_cache(key, request))
            request.task.add_done_callback(_forget_failure)
        request.num_waiting += 1
        try:
            # Not `shield`: newer Pythons then report failures that nobody waits for.
            await asyncio.wait([request.task])
        finally:
            request.num_waiting -= 1
        return request.task.result()

    async def _ask_and_cache(self, key: str, request: _Request) -> str:
        try:
            reply = await self._ask(request)
            self._cache.put(key, reply)
            return reply
        finally:
            # Not in a callback, which runs later: nobody may join a request that has ended.
            self._in_flight.pop(key, None)

    async def _ask(self, request: _Request) -> str:
        import httpx  # here, as most runs have no judge

        client, semaphore = self._client()
        problem = ""
        for attempt in range(self._max_retries + 1):
            wait = self._retry_wait_s * 2**attempt * random.uniform(0.5, 1.5)
            try:
                async with semaphore:
                    if not request.num_waiting:
                        raise asyncio.CancelledError
                    response = await client.post(self.url, json=request.body)
                if response.is_success:
                    return _content(response)
                problem = f"status {response.status_code}: {response.text[:300]}"
                if response.status_code not in _TRY_AGAIN and response.status_code < 500:
                    raise RuntimeError(f"judge: {self._shown} refused, {problem}")
                wait = max(wait, _retry_after(response))
            except (httpx.TransportError, _NoCompletion) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self._max_retries:
                await asyncio.sleep(min(wait, MAX_WAIT_S))
        raise RuntimeError(
            f"judge: {self._shown} failed {self._max_retries + 1} times, the last time with "
            f"{problem}"
        )

    def _client(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The connections of this event loop; another loop cannot use them."""
        import httpx

        loop = asyncio.get_running_loop()
        if self._connected is None or self._connected[0] is not loop:
            key = os.environ.get(self._key_variable)
            client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=self._timeout_s,
                limits=httpx.Limits(max_connections=self._max_concurrency),
            )
            self._connected = loop, client, asyncio.Semaphore(self._max_concurrency)
        return self._connected[1:]


@dataclass(eq=False, slots=True)
class _Request:
    """A request under way, shared by all callers that ask the same."""

    body: dict[str, Any]
    num_waiting: int = 0
    """Callers that were not cancelled. Without any it is not sent, or sent again."""
    task: asyncio.Task[str] = field(init=False)


def _forget_failure(task: asyncio.Task[str]) -> None:
    """Keep asyncio from reporting a failure whose callers were all cancelled."""
    if not task.cancelled():
        task.exception()


class _NoCompletion(ValueError):
    """Status 200 without a chat completion: a proxy's page, half a body."""


def _content(response: httpx.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _NoCompletion(response.text[:200]) from None
    return content if isinstance(content, str) else ""


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; dates count as 0."""
    text = response.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else 0.0


class _Cache:
    """Replies by key, in memory and in a folder; several processes may share the folder."""

    def __init__(self, folder: Path | None):
        self._memory: OrderedDict[str, str] = OrderedDict()
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> str | None:
        if key not in self._memory and self._folder is not None:
            # A file of another version or another program counts as missing.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                reply = json.loads(self._path(key).read_text())["reply"]
                if isinstance(reply, str):
                    self._memory[key] = reply
        return self._memory.get(key)

    def put(self, key: str, reply: str) -> None:
        self._memory[key] = reply
        if len(self._memory) > MAX_CACHED:
            self._memory.popitem(last=False)
        if self._folder is None:
            return
        self._path(key).parent.mkdir(exist_ok=True)
        # The file appears whole or not at all.
        with tempfile.NamedTemporaryFile("w", dir=self._path(key).parent, delete=False) as file:
            json.dump({"reply": reply}, file)
        os.replace(file.name, self._path(key))

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"
