"""Routers of experts: they replay the rollout engine's choices, are balanced and are counted.

megatron-core's router chooses the experts of each token. Here it gets three things more:

- **Replay** (R3, arXiv:2510.11370): a token goes to the experts that the rollout engine chose. Only
  the choice is replayed. Probabilities are the policy's own, so gradients reach the router.
- **Losses** that balance experts and keep logits small, see `rlsys.algo.experts`. megatron-core has
  them too, but it averages over micro-batches, however many tokens each has, and takes a packed
  micro-batch for one sequence.
- **Counts** of the tokens that each expert gets.

megatron-core's own replay, RouterReplay, is set for all layers at once. That does not fit pipeline
schedules with recompute, where the forward pass of one micro-batch runs between the two of another.
So each layer here knows which pass is which.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from rlsys.algo.batching import PackedMicroBatch
from rlsys.algo.experts import Groups, load_balancing_loss, load_metrics, z_loss
from rlsys.algo.segments import Segments
from rlsys.config import PolicyConfig
from rlsys.model.families.experts import Experts
from rlsys.types import TrainBatch

STATISTICS = ("aux_loss", "z_loss", "routed", "changed_experts", "changed_tokens")
"""Sums of a layer beside its counts of tokens."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The optimizer step that is being computed."""

    num_tokens: int
    num_rows: int
    undo_averaging: float
    """Factor of a loss that is a sum over micro-batches and data-parallel ranks."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a micro-batch that this rank routes."""

    is_token: Tensor
    """[T] bool, tokens that count."""
    is_routed: Tensor
    """[T] bool, tokens with choices to replay."""
    experts: Tensor | None
    """[T, layers of this rank, top_k]"""
    groups: Groups | None
    """Within which experts are balanced; None where nothing is trained, or balanced."""


class ExpertRouting:
    """The routers of one rank's layers.

    Args:
        chunks: the parts of the model that this rank holds.
        layers: numbers of the model's layers that have experts, counted from 0.
        policy: losses and their weights.
        replays: whether batches come with choices to replay, and those are used.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        layers: Sequence[int],
        policy: PolicyConfig,
        *,
        replays: bool,
    ):
        routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
        self.policy, self._replays = policy, replays
        self._columns = [layers.index(router.layer_number - 1) for router in routers]
        config = chunks[0].config
        self._shape = (len(layers), config.num_moe_experts + len(STATISTICS))
        self._top_k = config.moe_router_topk
        self._drops_tokens = config.moe_expert_capacity_factor is not None
        self.step: _Step | None = None
        self.tokens: _Tokens
        """The tokens of the micro-batch whose forward pass runs."""
        self._layers = [_RoutedLayer(router, self, i) for i, router in enumerate(routers)]
        self._sp_size = self._sp_rank = 0
        if config.sequence_parallel:
            self._sp_size = parallel_state.get_tensor_model_parallel_world_size()
            self._sp_rank = parallel_state.get_tensor_model_parallel_rank()

    def own_layers(self, batch: TrainBatch) -> TrainBatch:
        """The batch with the choices of this rank's layers only; with none if nothing is replayed.

        Raises:
            ValueError: there is nothing to replay.
        """
        if not self._replays:
            return replace(batch, routed_experts=None)
        if batch.routed_experts is None:
            raise ValueError("rollout.router_replay is on, and the batch has no routed_experts")
        if not self._columns:  # a pipeline stage of dense layers
            return replace(batch, routed_experts=None)
        first, last = self._columns[0], self._columns[-1]
        columns: Any = self._columns
        if columns == list(range(first, last + 1)):
            columns = slice(first, last + 1)  # of which numpy makes no copy
        return replace(batch, routed_experts=[row[:, columns] for row in batch.routed_experts])

    def begin_step(self, *, num_tokens: int, num_rows: int, undo_averaging: float) -> None:
        """Forget the statistics of the optimizer step before."""
        self.step = _Step(num_tokens, num_rows, undo_averaging)
        for layer in self._layers:
            layer.reset()

    def begin_micro_batch(self, micro_batch: PackedMicroBatch, own: Tensor) -> None:
        """Prepare for the forward pass of a micro-batch.

        Args:
            micro_batch: whole, on this rank's device.
            own: positions of this rank's tokens under context parallelism.
        """
        if self._sp_size:
            own = own.chunk(self._sp_size)[self._sp_rank]
        groups = None
        if self.step is not None and self.policy.moe_aux_loss_coeff > 0:
            segments = Segments.from_cu_seqlens(micro_batch.cu_seqlens, len(micro_batch.input_ids))
            groups = Groups.of_micro_batch(
                segments.ids_T,
                micro_batch.is_token,
                segments.num_sequences,
                self.policy.moe_router_load_balancing_type,
                step_tokens=self.step.num_tokens,
                step_rows=self.step.num_rows,
            )
            groups = groups.at(own)
        experts = micro_batch.routed_experts
        self.tokens = _Tokens(
            micro_batch.is_token[own],
            micro_batch.is_routed[own],
            None if experts is None else experts[own],
            groups,
        )

    def metrics(self) -> dict[str, float]:
        """The metrics of the optimizer step, over all ranks of the policy, which all call this."""
        assert self.step is not None
        device = self.tokens.is_token.device
        sums = torch.zeros(self._shape, dtype=torch.float64, device=device)
        for column, layer in zip(self._columns, self._layers, strict=True):
            sums[column] = layer.sums
        dist.all_reduce(sums)
        counts, statistics = sums[:, : -len(STATISTICS)], sums[:, -len(STATISTICS) :]
        choices = self.step.num_tokens * self._top_k
        # Every token goes to top_k experts, unless policy.megatron_kwargs has experts drop tokens.
        assert self._drops_tokens or (counts.sum(1) == choices).all(), (counts.sum(1), choices)
        self.step = None
        of_layer = dict(zip(STATISTICS, statistics.unbind(1), strict=True))
        metrics = load_metrics(counts)
        if self.policy.moe_aux_loss_coeff > 0:
            metrics["moe/aux_loss"] = of_layer["aux_loss"].mean().item()
        if self.policy.moe_z_loss_coeff > 0:
            metrics["moe/z_loss"] = of_layer["z_loss"].mean().item()
        if self._replays:
            routed = of_layer["routed"].sum()
            for name in ("changed_experts", "changed_tokens"):
                metrics[f"router_replay/{name}"] = (of_layer[name].sum() / routed).item()
        return metrics


class ChoiceInGroups:
    """What megatron-core's router asks for the experts of each token where they are in groups.

    A group is scored by its best experts: in DeepSeek-V2 (arXiv:2405.04434, section 2.1.2) by one,
    in DeepSeek-V3 by two. megatron-core's own rule depends on the number of experts per token.
    """

    def __init__(self, experts: Experts):
        self._experts = experts

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """[T, E] scores -> [T, K] scores and numbers of a token's experts, as in RouterReplay."""
        experts = self._experts
        grouped = scores.unflatten(1, (experts.groups, -1))
        of_group = grouped.topk(experts.best_of_group, dim=-1).values.sum(-1)
        best = of_group.topk(experts.chosen_groups, dim=-1).indices
        is_best = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        allowed = grouped.masked_fill(~is_best[:, :, None], -torch.inf).flatten(1)
        own = default_compute_topk(allowed, topk)[1]
        return scores.gather(1, own), own


def choose_in_groups(model: torch.nn.Module, experts: Experts) -> None:
    """Let the routers of a model choose from the best groups of its experts."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.router_replay = ChoiceInGroups(experts)


class _RoutedLayer:
    """The router of one layer, and what megatron-core's router asks in place of a RouterReplay."""

    def __init__(self, router: TopKRouter, owner: ExpertRouting, index: int):
        self._router, self._owner, self._index = router, owner, index
        self._route: Callable[[Tensor], tuple[Tensor, Tensor]] = router.routing
        self._in_groups: ChoiceInGroups | None = router.router_replay
        router.routing, router.router_replay = self.routing, self
        self._waiting: deque[_Tokens] = deque()
        """Micro-batches whose second forward pass, before their backward pass, is still to come."""
        self._tokens: _Tokens
        self.reset()

    def reset(self) -> None:
        """Forget all sums, and passes that an error ended."""
        self._waiting.clear()
        size = self._router.config.num_moe_experts + len(STATISTICS)
        self.sums = torch.zeros(size, dtype=torch.float64, device=self._router.weight.device)
        """[E + statistics]"""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, 1, E] logits -> [T, E] probabilities and choices, as TopKRouter.routing."""
        assert padding_mask is None
        trains = self._router.training and self._owner.step is not None
        self._tokens = self._owner.tokens
        if trains and not torch.is_grad_enabled():
            self._waiting.append(self._tokens)
        elif trains and self._waiting:
            # Backward passes have the order of the forward passes.
            self._tokens = self._waiting.popleft()
        assert len(self._tokens.is_token) == len(logits)
        if not (trains and torch.is_grad_enabled()):
            return self._route(logits)
        logits = self._with_z_loss(logits)
        probs, chosen = self._route(logits)
        self.sums[: -len(STATISTICS)] += (chosen & self._tokens.is_token[:, None]).sum(0)
        return self._with_aux_loss(probs, chosen, logits), chosen

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """[T, E] scores -> [T, K] scores and numbers of a token's experts, as in RouterReplay."""
        tokens = self._tokens
        if self._in_groups is None:
            values, own = default_compute_topk(scores, topk)
        else:
            values, own = self._in_groups.get_replay_topk(
                scores, topk, default_compute_topk=default_compute_topk
            )
        if tokens.experts is None:
            return values, own
        replayed = tokens.experts[:, self._index].long()
        chosen = torch.where(tokens.is_routed[:, None], replayed, own)
        if torch.is_grad_enabled():
            counted = tokens.is_routed & tokens.is_token
            changed = (chosen[:, :, None] != own[:, None, :]).all(-1) & counted[:, None]
            self._add("routed", counted.sum())
            self._add("changed_experts", changed.sum() / topk)
            self._add("changed_tokens", changed.any(-1).sum())
        return scores.gather(1, chosen), chosen

    def _with_z_loss(self, logits: Tensor) -> Tensor:
        coefficient, step = self._owner.policy.moe_z_loss_coeff, self._owner.step
        if coefficient == 0:
            return logits
        assert step is not None
        loss = z_loss(logits.flatten(0, 1), self._tokens.is_token, step_tokens=step.num_tokens)
        self._add("z_loss", loss)
        return MoEAuxLossAutoScaler.apply(logits, loss * coefficient * step.undo_averaging)

    def _with_aux_loss(self, probs: Tensor, chosen: Tensor, logits: Tensor) -> Tensor:
        groups, step, router = self._tokens.groups, self._owner.step, self._router
        if groups is None:
            return probs
        assert step is not None
        _, scores = compute_routing_scores_for_aux_loss(
            logits.flatten(0, 1), router.topk, router.score_function
        )
        counts = groups.counts(chosen)
        sharing = parallel_state.get_tensor_and_context_parallel_group()
        if sharing.size() > 1:
            dist.all_reduce(counts, group=sharing)
        loss = load_balancing_loss(scores, counts, groups, top_k=router.topk)
        self._add("aux_loss", loss)
        weight = self._owner.policy.moe_aux_loss_coeff * step.undo_averaging
        return MoEAuxLossAutoScaler.apply(probs, loss * weight)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[STATISTICS.index(name) - len(STATISTICS)] += value.detach()
