"""The running roles of preference training: the policy, and the reference that it departs from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

# Imported before all that imports Ray, which reads the environment when it is imported.
import rlsys.actors.ray_env  # noqa: F401  # isort: skip
import torch

from rlsys.actors.model_group import ModelActors
from rlsys.actors.node_check import check_nodes
from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors
from rlsys.actors.reference import PolicyBase, Reference, ReferenceActors
from rlsys.actors.start_report import StartReport
from rlsys.actors.turns import Turns
from rlsys.algo.batching import build_sample_batch
from rlsys.algo.preferences import (
    answer_logps,
    build_preference_batch,
    estimated_kl,
    mismatched,
)
from rlsys.config import PreferenceConfig
from rlsys.config.local_paths import with_absolute_paths
from rlsys.data.preferences import PreferenceData
from rlsys.data.streams.make import make_stream
from rlsys.model.adapters import with_stored_settings
from rlsys.system import (
    StreamSystem,
    choose_device,
    let_restart,
    make_restarts,
    say_start,
    start_timeline,
)
from rlsys.text import counted
from rlsys.tracking import Tracker
from rlsys.types import Preference, TrainBatch

T = TypeVar("T")

STEPS_AT_ONCE = 8
"""Rows that travel together where nothing is trained, in steps: fewer trips to the ranks."""


@dataclass(slots=True)
class PreferenceSystem(StreamSystem[PreferenceConfig, Preference]):
    """The running roles of preference training."""

    reference: Reference | None = None
    """What the policy is compared with; None where the loss knows none, or once all is known."""
    known: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    """The reference's log-prob of each answer of a row that is asked for again, by the set
    ("train", or "eval/" and its name) and the id of the row."""

    def compare(self, rows: Sequence[Preference], batch: TrainBatch, *, of: str = "train") -> None:
        """Set the reference's log-probs of the answers, if the loss compares with a model.

        Held-out answers, of a set `of`, are computed once: a reference never changes.
        """
        if not self.config.preference.has_reference:
            return
        keys = [(of, row.row_id) for row in rows]
        if all(key in self.known for key in keys):
            logps = torch.cat([self.known[key] for key in keys])
            missing = len(batch.lengths) - len(logps)  # rows that have no answer
            batch.ref_logps = torch.cat([logps, logps.new_zeros(missing)])
        else:
            assert self.reference is not None, "the log-probs of all rows are known"
            batch.ref_logps = answer_logps(self.reference.compute_logprobs(batch)[0])
            if of != "train":
                self.keep(rows, batch, of=of)

    def keep(self, rows: Sequence[Preference], batch: TrainBatch, *, of: str) -> None:
        """Keep the reference's log-probs of these rows."""
        assert batch.ref_logps is not None
        start = 0
        for row in rows:
            end = start + len(row.answers)
            self.known[of, row.row_id] = batch.ref_logps[start:end]
            start = end

    def estimate_kl(self, rows: Sequence[Preference]) -> torch.Tensor | None:
        """KTO's KL, from answers to other prompts of all these rows; None for other losses."""
        if not self.config.preference.estimates_kl:
            return None
        assert self.reference is not None, "precompute_ref_log_probs is refused"
        ratios = []
        for part in self._cut(mismatched(rows, self.config.data.max_length)):
            batch = build_sample_batch(part, at_least=self.config.most_replicas)
            policy, _ = self.policy.compute_logprobs(batch)
            reference, _ = self.reference.compute_logprobs(batch)
            ratios.append(answer_logps(policy) - answer_logps(reference))
        return estimated_kl(ratios, len(rows))

    def parts(
        self, rows: Sequence[Preference]
    ) -> Iterator[tuple[Sequence[Preference], TrainBatch]]:
        """The rows in parts that travel together, each with a row for every replica."""
        for part in self._cut(rows):
            yield part, build_preference_batch(part, at_least=self.config.most_replicas)

    def _cut(self, rows: Sequence[T]) -> Iterator[Sequence[T]]:
        size = STEPS_AT_ONCE * self.config.rows_per_step
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def precompute(self, data: PreferenceData) -> None:
        """Compute the reference's log-probs of all answers, and end it if it is another model."""
        assert self.reference is not None
        sets = {"train": data.train}
        sets |= {f"eval/{name}": rows for name, rows in data.held_out_sets.items()}
        for name, rows in sets.items():
            for part, batch in self.parts(rows):
                batch.ref_logps = answer_logps(self.reference.compute_logprobs(batch)[0])
                self.keep(part, batch, of=name)
        print(
            f"reference: the log-probs of {counted(len(self.known), 'row')} are computed, and kept",
            flush=True,
        )
        if isinstance(self.reference, ReferenceActors):
            self.reference.close()
        self.reference = None


def start_preference_system(
    config: PreferenceConfig, data: PreferenceData, tracker: Tracker
) -> PreferenceSystem:
    """Start the actors of policy and reference, and wait until all are ready."""
    config = with_stored_settings(with_absolute_paths(config))
    device = choose_device(config)
    placement = Placement(config, device=device)
    check_nodes(config, placement.roles_of_nodes())
    say_start(config, device)
    with StartReport() as report:
        policy = PolicyActors(config, device=device, place=partial(placement.options, "policy"))
        models: list[ModelActors] = [policy]
        reference: Reference | None = PolicyBase(policy) if config.reference_is_base else None
        if config.has_reference_model:
            place = partial(placement.options, "reference")
            reference = ReferenceActors(config, device=device, place=place, policy=policy)
            models.append(reference)
        for model in models:
            report.waiting_for(model.actors)
        Turns().start(models, meanwhile=lambda: None, on_done=report.ready)
    restarts = make_restarts(config)
    system = PreferenceSystem(
        config,
        device,
        policy,
        make_stream(config.data, data, seed=config.seed),
        data.held_out_sets,
        restarts,
        reference=reference,
    )
    if config.preference.precompute_ref_log_probs:
        system.precompute(data)
        models = [policy]
    for model in models:
        let_restart(model, restarts, config)
    system.timeline = start_timeline(config, device, tracker, *models)
    return system
