"""Rollout engines as Ray actors, and the driver's view of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import ObjectRefGenerator

from rlsys.actors.group import ActorFailure, Place, get_all, get_one, inherited_env, on_cpu
from rlsys.config import Config
from rlsys.engines.vllm_settings import rollout_env
from rlsys.types import Prompt, RolloutGroup
from rlsys.weight_sync.plan import TensorMeta

# Loading a large model, and on GPUs compiling it for the first time, takes minutes.
START_TIMEOUT_S = 1800.0


class RolloutActor:
    """One vLLM engine in a process of its own; calls run one after the other."""

    def __init__(self, config: Config, device: Literal["cpu", "cuda"], engine_rank: int):
        start = time.monotonic()
        from rlsys.engines.vllm import VLLMEngine  # takes seconds, and only this process needs it

        self._engine = VLLMEngine(
            config.model.path, config=config, device=device, engine_rank=engine_rank
        )
        self._start_seconds = time.monotonic() - start

    def start_seconds(self) -> float:
        """How long importing vLLM and loading the model took."""
        return self._start_seconds

    @ray.method(num_returns="streaming")
    def generate(self, *args: Any, **kwargs: Any) -> Iterator[RolloutGroup]:
        """See VLLMEngine.generate."""
        yield from self._engine.generate(*args, **kwargs)

    def connect_weight_sync(self, **connection: Any) -> None:
        """See VLLMEngine.connect_weight_sync."""
        self._engine.connect_weight_sync(**connection)

    def start_weight_update(self) -> None:
        """See VLLMEngine.start_weight_update."""
        self._engine.start_weight_update()

    def update_weights(self) -> list[list[int]]:
        """See VLLMEngine.update_weights."""
        return self._engine.update_weights()

    def finish_weight_update(self, policy_version: int) -> int:
        """See VLLMEngine.finish_weight_update."""
        return self._engine.finish_weight_update(policy_version)


@dataclass(slots=True)
class _Work:
    engine: str
    pending: int
    """Groups that its stream has still to yield."""


class RolloutActors:
    """All rollout engines as the driver sees them.

    Creating it starts the actors and returns; `wait_ready` waits for them. Calls made before
    simply queue.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: Literal["cpu", "cuda"],
        place: Place = on_cpu,
        env_vars: Mapping[str, str] | None = None,
    ):
        rollout = config.rollout
        self.num_workers = rollout.num_engines * rollout.tensor_parallel_size
        env_vars = inherited_env() | rollout_env(device) | dict(env_vars or {})
        runtime_env = {"env_vars": env_vars}
        actor_class = ray.remote(RolloutActor)
        self.actors: dict[str, Any] = {
            f"rollout engine {rank}": actor_class.options(
                runtime_env=runtime_env, **place(rank)
            ).remote(config, device, rank)
            for rank in range(rollout.num_engines)
        }
        self._streams: dict[ObjectRefGenerator, _Work] = {}

    def async_start(self) -> dict[str, ray.ObjectRef]:
        """Each engine's reference is ready when the engine is."""
        return self._async_call("start_seconds")

    def wait_ready(self) -> dict[str, float]:
        """Wait until every engine is up: actor name -> seconds that its start took."""
        refs = self.async_start()
        seconds = get_all(refs, phase="start of the rollout engines", timeout_s=START_TIMEOUT_S)
        return dict(zip(refs, seconds, strict=True))

    def submit(
        self, prompts: Sequence[Prompt], *, step: int, num_generations: int, temperature: float
    ) -> None:
        """Start sampling; a prompt's group_id is its position in `prompts`."""
        for rank, (name, actor) in enumerate(self.actors.items()):
            group_ids = range(rank, len(prompts), len(self.actors))
            if not group_ids:
                continue
            stream = actor.generate.remote(
                [prompts[group_id] for group_id in group_ids],
                list(group_ids),
                step=step,
                num_generations=num_generations,
                temperature=temperature,
            )
            self._streams[stream] = _Work(name, pending=len(group_ids))

    @property
    def num_pending(self) -> int:
        """Groups submitted and not collected yet."""
        return sum(work.pending for work in self._streams.values())

    def pending_refs(self) -> list[ObjectRefGenerator]:
        """For `ray.wait`, which takes streams as it takes references: ready when `collect` finds
        something."""
        return list(self._streams)

    def collect(self) -> list[RolloutGroup]:
        """Groups that finished by now, without waiting.

        Raises:
            ActorFailure: an engine raised, died, or lost groups.
        """
        groups = []
        while self._streams:
            streams = list(self._streams)
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0)
            if not ready:
                break
            groups += [self._next_group(stream) for stream in ready]
        return groups

    def _next_group(self, stream: ObjectRefGenerator) -> RolloutGroup:
        work = self._streams.pop(stream)
        ref = next(stream, None)
        if ref is None:
            raise ActorFailure(f"{work.engine} ended its rollout {work.pending} groups early")
        group = get_one(ref, name=work.engine, phase="rollout")
        work.pending -= 1
        if work.pending:
            self._streams[stream] = work
        return group

    def async_connect_weight_sync(
        self, *, metadata: Sequence[TensorMeta], **connection: Any
    ) -> dict[str, ray.ObjectRef]:
        """See WeightPublisher."""
        return self._async_call(
            "connect_weight_sync",
            metadata=list(metadata),
            **connection,
        )

    def async_start_weight_update(self) -> dict[str, ray.ObjectRef]:
        """See WeightPublisher."""
        return self._async_call("start_weight_update")

    def async_update_weights(self) -> dict[str, ray.ObjectRef]:
        """See WeightPublisher."""
        return self._async_call("update_weights")

    def async_finish_weight_update(self, policy_version: int) -> dict[str, ray.ObjectRef]:
        """See WeightPublisher."""
        return self._async_call("finish_weight_update", policy_version)

    def close(self) -> None:
        """Kill the engines; whatever they do is given up."""
        for actor in self.actors.values():
            ray.kill(actor)

    def _async_call(self, method: str, *args: Any, **kwargs: Any) -> dict[str, ray.ObjectRef]:
        return {
            name: getattr(actor, method).remote(*args, **kwargs)
            for name, actor in self.actors.items()
        }
