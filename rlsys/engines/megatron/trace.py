"""Where an optimizer step first has a NaN or an infinity: the search of `rlsys replay`.

An operation passes on what is not finite, forwards to all that depends on it, and backwards to all
that it depends on. So the first place in the order of computation is the cause, or beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rlsys.algo.losses import LossInput, compute_loss
from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.engines.step_dump import Step

if TYPE_CHECKING:
    from rlsys.algo.batching import PackedMicroBatch
    from rlsys.config import GrpoConfig
    from rlsys.engines.megatron.policy import MegatronPolicy

PHASES = ("weights", "forward pass", "log-probs", "loss", "backward pass", "gradient")
"""In the order of computation."""
MAX_NAMES = 5
"""Most places that a finding names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The first place of one phase, on one rank, that is not finite."""

    phase: str
    """One of PHASES."""
    order: tuple[int, ...]
    """Compares places of a phase on different ranks."""
    where: str
    """Layer, parameter, row and tokens."""
    rank: int

    def key(self) -> tuple[Any, ...]:
        """Sorts findings of all ranks."""
        return (PHASES.index(self.phase), self.order, self.rank)


class StepTrace:
    """Looks at all that a rank computes in one optimizer step.

    Args:
        policy: this rank's.
    """

    def __init__(self, policy: MegatronPolicy):
        self._policy = policy
        self._names = _parameter_names(policy)
        self._first: dict[str, Finding] = {}
        self._now: _Pass
        self._seen = 0

    def run(self, step: Step) -> tuple[list[Finding], dict[str, int]]:
        """Compute the gradient of a step.

        Returns:
            this rank's first finding of each phase, and what is not finite on any rank, see
            `find_nonfinite`.
        """
        chunks = self._policy.model
        parameters = [both for chunk in chunks for both in chunk.named_parameters()]
        bad = [name for name, p in parameters if not p.detach().isfinite().all()]
        self._note("weights", self._named(bad))
        self._policy.trace = self
        try:
            with self._watching_modules():
                _, _, found = self._policy.step_gradients(step)
        finally:
            self._policy.trace = None
        bad = [
            name
            for name, p in parameters
            if p.requires_grad and not p.main_grad.isfinite().all()  # type: ignore[attr-defined]
        ]
        self._note("gradient", self._named(bad))
        return list(self._first.values()), found

    def begin(self, micro_batch: PackedMicroBatch, own: torch.Tensor) -> None:
        """A forward pass follows; `own` are the positions of this rank's tokens."""
        number = self._now.number + 1 if hasattr(self, "_now") else 0
        self._now = _Pass(number, micro_batch, own)

    def at_loss(self, inputs: LossInput, loss: torch.Tensor, algorithm: GrpoConfig) -> None:
        """The last stage has the loss of the micro-batch that `begin` got last."""
        now = self._now
        bad_T = ~inputs.logprobs.detach().isfinite() & inputs.mask
        self._note("log-probs", now.rows_and_tokens(bad_T) if bad_T.any() else "")
        if not loss.detach().isfinite():
            self._note("loss", now.rows_of_loss(inputs, algorithm))

        def look(grad_T: torch.Tensor) -> None:
            if not (finite_T := grad_T.isfinite()).all():
                where = now.rows_and_tokens(~finite_T)
                self._note("backward pass", f"the loss by log-probs: {where}", now)

        if inputs.logprobs.requires_grad:
            inputs.logprobs.register_hook(look)

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        handles = []
        for chunk in self._policy.model:
            for name, module in chunk.named_modules():
                handles.append(module.register_forward_hook(self._hook(name or "model")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def look(module: torch.nn.Module, _: Any, output: Any) -> None:
            for tensor in _tensors(output):
                self._look_at(name, tensor)

        return look

    def _look_at(self, name: str, tensor: torch.Tensor) -> None:
        now = self._now

        def look(values: torch.Tensor, phase: str) -> None:
            if not (finite := values.detach().isfinite()).all():
                self._note(phase, f"output of {name}: {now.tokens_of(~finite)}", now)

        look(tensor, "forward pass")
        if tensor.requires_grad:
            tensor.register_hook(partial(look, phase="backward pass"))

    def _note(self, phase: str, where: str, of: _Pass | None = None) -> None:
        self._seen += 1
        if not where or phase in self._first:
            return
        stage = parallel_state.get_pipeline_model_parallel_rank()
        stage = -stage if phase == "backward pass" else stage
        order = (of.number if of is not None else 0, stage, self._seen)
        self._first[phase] = Finding(phase, order, where, dist.get_rank())

    def _named(self, names: list[str]) -> str:
        return _some([self._names.get(name, name) for name in names])


@dataclass(frozen=True, slots=True)
class _Pass:
    """The forward pass of a micro-batch through a chunk of the model, and its backward pass."""

    number: int
    """Forward passes of this rank before it."""
    packed: PackedMicroBatch
    own: torch.Tensor
    """Positions of this rank's tokens."""

    def rows_of_loss(self, inputs: LossInput, algorithm: GrpoConfig) -> str:
        """The rows whose own loss is not finite."""
        texts = []
        for row, start, end in self._sequences():
            own_T = torch.zeros_like(inputs.mask)
            own_T[start:end] = inputs.mask[start:end]
            with torch.no_grad():
                value, _ = compute_loss(replace(inputs, mask=own_T), algorithm)
            if not value.isfinite():
                texts.append(f"row {row}: {value.item():g}")
        return _some(texts) or "of the rows together, not of any alone"

    def tokens_of(self, bad: torch.Tensor) -> str:
        """Rows and tokens of a tensor, where an axis of it is this rank's tokens."""
        own, size = self.own, parallel_state.get_tensor_model_parallel_world_size()
        if bad.ndim > 1 and len(bad) == 1:
            bad = bad[0]  # [1, T, ...]
        if size > 1 and bad.ndim and len(bad) * size == len(own):  # sequence parallelism
            own = own.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        if bad.ndim == 0 or len(bad) != len(own):
            return f"{int(bad.sum()):,} of {bad.numel():,} values"
        whole_T = torch.zeros_like(self.packed.loss_mask)
        whole_T[own] = bad.flatten(1).any(1) if bad.ndim > 1 else bad
        return self.rows_and_tokens(whole_T, shift=0)

    def rows_and_tokens(self, bad_T: torch.Tensor, *, shift: int = 1) -> str:
        """[T] bool -> "row 2, tokens 9, 10". A prediction is of the token after it: `shift` 1."""
        texts = []
        for row, start, end in self._sequences():
            tokens = (bad_T[start:end].nonzero().flatten() + shift).tolist()
            if tokens:
                word = "token" if len(tokens) == 1 else "tokens"
                texts.append(f"row {row}, {word} {_some(list(map(str, tokens)))}")
        return _some(texts, "; ") or "filling that no row has"

    def _sequences(self) -> Iterator[tuple[int, int, int]]:
        """Row, start and end of each sequence; the filling is left out."""
        starts = self.packed.cu_seqlens.tolist()
        yield from zip(self.packed.rows, starts, starts[1:], strict=False)


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() else []
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _parameter_names(policy: MegatronPolicy) -> dict[str, str]:
    """megatron-core's name of a parameter -> Hugging Face's, of what it consists of."""
    weights = policy.weights
    if not isinstance(weights, MegatronWeights):
        return {}
    by_id = {}
    for row in weights.table:
        parameter = weights.own_parameter(row)
        if parameter is not None:
            by_id[id(parameter)] = ", ".join(row.hf_names)
    return {
        name: f"{name} ({by_id[id(parameter)]})"
        for chunk in policy.model
        for name, parameter in chunk.named_parameters()
        if id(parameter) in by_id
    }


def _some(names: list[str], between: str = ", ") -> str:
    """The first few, and how many more."""
    more = len(names) - MAX_NAMES
    return between.join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")
