"""What the page asks: `/api/...`, GET only, JSON.

Every function here runs in a thread, because it reads files: the event loop only passes answers on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlsys.dashboard.access import refuse
from rlsys.dashboard.decimation import rows_to_show
from rlsys.dashboard.differences import config_differences
from rlsys.dashboard.logs import log_names, read_log
from rlsys.dashboard.queries import (
    Asked,
    CompletionQuery,
    CompletionsQuery,
    ConfigQuery,
    HistoryQuery,
    LogsQuery,
    MetricsQuery,
    NoQuery,
    Query,
    Split,
    TimelineQuery,
    parse,
)
from rlsys.dashboard.runs import Runs, UnknownRun
from rlsys.dashboard.timeline import timeline
from rlsys.files import finite
from rlsys.records import CompletionRows, RunRecord
from rlsys.records import Query as CompletionFilter

QUERY_LIMIT_S = 20.0
"""Seconds after which a query of completions is given up."""
QUERIES_AT_ONCE = 2
"""Queries of completions; more wait, so that visitors cannot take all memory of a run's machine."""
SHOWN_TEXT = 500
"""Letters of a prompt or completion in a list; `completion` has the whole text."""


class Answer(Response):
    """JSON; NaN and infinities are null."""

    media_type = "application/json"

    def __init__(self, value: Any):
        # Half a surrogate pair has no UTF-8 form; this writes JSON's own \\udXXX.
        text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False)
        content = text.encode("utf-8", "backslashreplace")
        super().__init__(content, headers={"Cache-Control": "no-store"})


def routes(runs: Runs) -> list[Route]:
    """The addresses below /api."""

    def of_run(path: str, kind: type[Query], answer: Callable[..., Any]) -> Route:
        def endpoint(request: Request) -> Answer:
            query = _parsed(kind, request)
            names = dict(request.path_params)
            return Answer(answer(runs.get(names.pop("run")), query, **names))

        return Route(f"/runs/{{run}}/{path}", endpoint, methods=["GET"])

    def all_runs(request: Request) -> Answer:
        _parsed(NoQuery, request)
        return Answer([_summary(name, runs.name(name), run) for name, run in runs.all().items()])

    def config(request: Request) -> Answer:
        names = _parsed(ConfigQuery, request).runs
        configs = {name: runs.get(name).config for name in names}
        return Answer(config_differences({n: c for n, c in configs.items() if c}))

    return [
        Route("/runs", all_runs, methods=["GET"]),
        Route("/config", config, methods=["GET"]),
        of_run("metric_names", NoQuery, lambda run, query: run.metric_names()),
        of_run("metrics", MetricsQuery, _metrics),
        of_run("completions", CompletionsQuery, _completions),
        of_run("completion/{row}", CompletionQuery, _completion),
        of_run("history", HistoryQuery, _history),
        of_run("timeline", TimelineQuery, timeline),
        of_run("health", NoQuery, _health),
        of_run("logs", LogsQuery, _logs),
    ]


def _parsed(kind: type[Asked], request: Request) -> Asked:
    parameters = dict(request.query_params)
    parameters.pop("token", None)  # asked for in access.py
    return parse(kind, parameters)


def _summary(name: str, shown: str, run: RunRecord) -> dict[str, Any]:
    status = run.status
    best = status.best_eval
    return {
        "id": name,
        "name": shown,
        "path": str(run.path),
        "method": status.method,
        "status": status.state or "unknown",
        "step": status.step,
        "steps": status.steps,
        "started": status.started,
        "updated": status.updated,
        "best_eval": best and best.value,
        "best_eval_metric": best and best.metric,
        "best_eval_step": best and best.step,
        "seconds": status.seconds,
        "exit_code": status.exit_code,
        "reason": status.reason,
    }


def _metrics(run: RunRecord, query: MetricsQuery) -> dict[str, Any]:
    table = run.metrics(query.names, query.after)
    last = int(table.steps[-1]) if len(table.steps) else None
    stop = len(table.steps)
    if query.before is not None:
        stop = int(np.searchsorted(table.steps, query.before, side="right"))
    columns = {name: values[:stop] for name, values in table.columns.items()}
    rows = rows_to_show(list(columns.values()), query.points)
    return {
        "step": table.steps[:stop][rows].tolist(),
        "columns": {name: values[rows].tolist() for name, values in columns.items()},
        "last_step": last,
    }


def _completions(run: RunRecord, query: CompletionsQuery) -> dict[str, Any]:
    found = _searched(
        run,
        query.split,
        CompletionFilter(
            where=query.where,
            grep=query.grep,
            steps=(query.from_step, query.to_step),
            sort=query.sort,
            descending=query.descending,
            offset=query.offset,
            limit=query.limit,
        ),
    )
    rows = [{name: _shortened(value) for name, value in row.items()} for row in found.rows]
    return {"columns": found.columns, "rows": rows, "total": found.total}


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > SHOWN_TEXT:
        return value[:SHOWN_TEXT] + "…"
    return value


def _completion(run: RunRecord, query: CompletionQuery, row: str) -> dict[str, Any]:
    own, *siblings = run.completions(query.split).group(row)
    tokens = run.tokens(row) if query.split == "train" else None
    return {"row": own, "siblings": siblings, "tokens": tokens and asdict(tokens)}


def _history(run: RunRecord, query: HistoryQuery) -> dict[str, Any]:
    prompt = query.prompt.replace("'", "''")
    found = _searched(
        run,
        query.split,
        CompletionFilter(
            where=f"prompt_id = '{prompt}'", sort="step", descending=False, limit=query.limit
        ),
    )
    return {"columns": found.columns, "rows": found.rows, "total": found.total}


_searches = threading.BoundedSemaphore(QUERIES_AT_ONCE)


def _searched(run: RunRecord, split: Split, query: CompletionFilter) -> CompletionRows:
    if not _searches.acquire(timeout=QUERY_LIMIT_S):
        raise HTTPException(503, f"{QUERIES_AT_ONCE} other queries are running: ask again later")
    try:
        return run.completions(split).query(query, timeout_s=QUERY_LIMIT_S)
    finally:
        _searches.release()


def _health(run: RunRecord, query: NoQuery) -> dict[str, Any]:
    return {"warnings": run.warnings(), "actors": run.actors(), "now": time.time()}


def _logs(run: RunRecord, query: LogsQuery) -> dict[str, Any]:
    if query.name is None:
        return {"names": log_names(run.run.logs)}
    return read_log(run.run.logs, query.name, query.offset)


# --- errors --------------------------------------------------------------------------------------


def _bad_request(_: Request, error: Exception) -> Response:
    return refuse(400, str(error))


def _not_found(_: Request, error: Exception) -> Response:
    return refuse(404, str(error))


def _changed_meanwhile(_: Request, error: Exception) -> Response:
    return refuse(409, f"the files of the run changed while they were read: {error}")


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = "nothing has this address" if error.status_code == 404 else error.detail
    return refuse(error.status_code, text, **dict(error.headers or {}))


def _failed(_: Request, error: Exception) -> Response:
    return refuse(500, f"{type(error).__name__}: {error}. The terminal has the traceback")


ERRORS: dict[Any, Callable[[Request, Exception], Response]] = {
    UnknownRun: _not_found,
    ValueError: _bad_request,
    OSError: _changed_meanwhile,
    HTTPException: _http_error,
    Exception: _failed,
}
"""Error -> its answer: {"error": text}."""
