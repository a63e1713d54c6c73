"""Drafts are counted where vLLM's scheduler reports them, also without its statistics."""

import inspect
from types import SimpleNamespace

from vllm.v1.core.sched.scheduler import Scheduler

from rlsys.engines.vllm.drafts import DraftCounter
from rlsys.types import DraftCounts


def test_what_the_scheduler_reports_of_drafts_is_added_up():
    scheduler = SimpleNamespace(log_stats=False)
    method = Scheduler.make_spec_decoding_stats
    scheduler.make_spec_decoding_stats = method.__get__(scheduler)
    counter = DraftCounter(scheduler)
    for drafted, accepted in ((4, 4), (4, 0), (2, 1), (0, 0)):
        given = {"num_draft_tokens": drafted, "num_accepted_tokens": accepted}
        given |= {"num_invalid_spec_tokens": None, "request_id": "1"}
        assert set(given) < set(inspect.signature(method).parameters)
        assert scheduler.make_spec_decoding_stats(None, **given) is None
    assert counter.counts == DraftCounts(3, 10, 5)
