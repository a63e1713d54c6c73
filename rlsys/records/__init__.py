"""Reads what runs wrote: metrics, completions, warnings and times, of runs that go on or ended."""

from rlsys.records.completions import CompletionRows, Completions, Query
from rlsys.records.metrics import MetricTable
from rlsys.records.run_record import RunRecord, RunStatus, find_runs, open_run
from rlsys.records.timeline import SpanTable

__all__ = [
    "CompletionRows",
    "Completions",
    "MetricTable",
    "Query",
    "RunRecord",
    "RunStatus",
    "SpanTable",
    "find_runs",
    "open_run",
]
