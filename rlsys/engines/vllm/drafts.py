"""How many drafted tokens vLLM keeps, counted where its scheduler counts them."""

from __future__ import annotations

from typing import Any

from rlsys.types import DraftCounts


class DraftCounter:
    """Counts what the scheduler of an engine in this process reports of each draft.

    vLLM (0.26 and 0.32) keeps these numbers only with all its other statistics, whose Python for
    each sequence and step would slow sampling.
    """

    def __init__(self, scheduler: Any):
        self.counts = DraftCounts(0, 0, 0)
        """All drafts so far."""
        self._vllm = scheduler.make_spec_decoding_stats
        scheduler.make_spec_decoding_stats = self._count

    def _count(
        self, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        if num_draft_tokens:
            self.counts += DraftCounts(1, num_draft_tokens, num_accepted_tokens)
        return self._vllm(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)
