"""A running OpenAI-compatible server as an engine: prompts in, groups out, without weights."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from transformers import AutoTokenizer

from rlsys.config import Config
from rlsys.model.folder import resolve_model_path
from rlsys.redact import without_password
from rlsys.types import (
    OPEN_THINK,
    Completion,
    FinishReason,
    Prompt,
    RolloutGroup,
    SampleRequest,
)

KEY_VARIABLE = "OPENAI_API_KEY"
ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 6, 1.0, 30.0
_TRY_AGAIN = {408, 409, 425, 429}
_STEP_S = 0.05


@dataclass(frozen=True, slots=True)
class Server:
    """Where a model is served."""

    url: str
    """Base URL, such as http://127.0.0.1:8000/v1."""
    model: str
    """The name that requests ask for."""


def find_server(url: str, model: str | None) -> Server:
    """The server at `url`, with its only model where none is named.

    Raises:
        ValueError: it does not answer, or does not have the model.
    """
    base = url.rstrip("/")
    try:
        with _client(10.0) as client:
            reply = client.get(f"{base}/models")
            reply.raise_for_status()
            names = [str(entry["id"]) for entry in reply.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--server {url}: {base}/models does not answer as an OpenAI-compatible server does "
            f"({error}). Give its base URL, usually with /v1, and its key in {KEY_VARIABLE}"
        ) from None
    if model is None and len(names) == 1:
        return Server(base, names[0])
    if model not in names:
        wanted = "name one of its models" if model is None else f"it does not serve {model!r}"
        raise ValueError(f"--server {url}: {wanted}: {', '.join(names)}")
    return Server(base, model)


@dataclass(slots=True)
class _Running:
    request: SampleRequest
    replies: list[Future[Completion]] = field(default_factory=list)


class ServerEngine:
    """Asks a server for completions; has the members of an engine that `EngineLoop` uses.

    The server writes the prompt with its own chat template. The tokenizer of model.path makes
    token ids of the text, so lengths may differ a little from the server's.

    Args:
        server: where to ask.
        config: of the evaluation.
    """

    def __init__(self, server: Server, config: Config):
        self._server = server
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(
            resolve_model_path(config.model.path), trust_remote_code=False
        )
        self._client = _client(config.rollout.timeout_s)
        self._threads = ThreadPoolExecutor(config.rollout.max_num_seqs, "server request")
        self._running: dict[int, _Running] = {}

    @property
    def has_work(self) -> bool:
        """Whether completions are on their way."""
        return bool(self._running)

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Send requests, at most rollout.max_num_seqs at a time."""
        for request in requests:
            replies = [
                self._threads.submit(self._ask, request, index)
                for index in range(request.num_generations)
            ]
            self._running[request.ticket] = _Running(request, replies)

    def step(self) -> list[RolloutGroup]:
        """The groups that are finished, after a moment's wait.

        Raises:
            RuntimeError: the server refused a request, or failed several times.
        """
        open_replies = [r for run in self._running.values() for r in run.replies if not r.done()]
        if open_replies:
            wait(open_replies, timeout=_STEP_S)
        done = [t for t, run in self._running.items() if all(r.done() for r in run.replies)]
        groups = []
        for ticket in done:
            run = self._running.pop(ticket)
            completions = [reply.result(timeout=0) for reply in run.replies]  # all are done
            groups.append(RolloutGroup(ticket, run.request.prompt, completions))
        return groups

    def abort(self, tickets: Iterable[int]) -> None:
        """Give up groups; requests that were not sent are not."""
        for ticket in tickets:
            running = self._running.pop(ticket, None)
            for reply in running.replies if running is not None else ():
                reply.cancel()

    def _ask(self, request: SampleRequest, index: int) -> Completion:
        url, problem = f"{self._server.url}/chat/completions", ""
        body = request_body(self._config, self._server.model, request, index)
        for attempt in range(ATTEMPTS):
            try:
                response = self._client.post(url, json=body)
                if response.is_success:
                    return self._completion(request.prompt, response.json())
                problem = f"status {response.status_code}: {response.text[:300]}"
                if response.status_code not in _TRY_AGAIN and response.status_code < 500:
                    raise RuntimeError(f"{without_password(url)} refused a request, {problem}")
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < ATTEMPTS - 1:
                time.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
        shown = without_password(url)
        raise RuntimeError(f"{shown} failed {ATTEMPTS} times, the last time with {problem}")

    def _completion(self, prompt: Prompt, reply: dict[str, Any]) -> Completion:
        choice = reply["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise RuntimeError(
                f"{without_password(self._server.url)} ended a completion with {reason!r}"
            )
        text = message.get("content") or ""
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        if thoughts:  # the server took them out of the text
            opened = "" if prompt.opens_think else OPEN_THINK
            text = f"{opened}{thoughts}</think>{text}"
        encoded: Any = self._tokenizer(text, add_special_tokens=False, verbose=False)
        token_ids = list(encoded["input_ids"])
        unknown = [math.nan] * len(token_ids)
        return Completion(token_ids, unknown, text, cast(FinishReason, reason), (0,))


def request_body(config: Config, model: str, request: SampleRequest, index: int) -> dict[str, Any]:
    """The JSON of the request for completion `index`; only what differs from the API's defaults."""
    rollout, prompt = config.rollout, request.prompt
    body: dict[str, Any] = {
        "model": model,
        "messages": prompt.messages,
        "temperature": request.temperature,
        "max_tokens": rollout.max_completion_length,
        "top_p": rollout.top_p if request.top_p is None else request.top_p,
    }
    top_k = rollout.top_k if request.top_k is None else request.top_k
    repetition = rollout.repetition_penalty
    variables = config.data.chat_template_kwargs | (
        prompt.columns.get("chat_template_kwargs") or {}
    )
    optional = {
        # vLLM and SGLang know top_k, min_p and repetition_penalty, OpenAI does not.
        "top_k": top_k,
        **rollout.min_p_and_penalties,
        "repetition_penalty": 0 if repetition == 1 else repetition,
        "seed": None if request.seed is None else request.seed + index,
        "stop": rollout.stop,
        "tools": prompt.columns.get("tools"),
        "chat_template_kwargs": variables,
    }
    return body | {name: value for name, value in optional.items() if value}


def _client(timeout_s: float) -> httpx.Client:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(headers=headers, timeout=timeout_s, limits=limits)
