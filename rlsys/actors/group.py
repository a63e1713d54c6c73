"""Groups of Ray actors: every role creates, calls and ends its actors in the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from rlsys.actors.heartbeat import Alive, Watched
from rlsys.actors.waiting import get_all
from rlsys.timeline.spans import Role, Timeline
from rlsys.types import Device

if TYPE_CHECKING:
    from rlsys.actors.recovery import Restarts

    Refs = dict[str, ray.ObjectRef]
    """Actor name -> reference, in rank order."""

T = TypeVar("T")

PHASES: dict[str, str] = {
    **dict.fromkeys(("compute_logprobs", "compute_base_logprobs"), "logprobs"),
    **dict.fromkeys(("compute_predictions", "compute_scores"), "predictions"),
    "update": "update",
    **dict.fromkeys(("send_weights", "start_weight_update", "update_weights"), "weight_sync"),
    "connect_weight_sync": "weight_sync",
    **dict.fromkeys(("sleep", "wake", "onload", "offload_weights"), "switch"),
    **dict.fromkeys(("offload_optimizer", "drop_gradients"), "switch"),
    **dict.fromkeys(("save_model", "begin_model", "begin_checkpoint"), "checkpoint"),
    "load_checkpoint": "restart",
}
"""Methods of actors whose calls the timeline shows, and how it calls them."""


CPU_SHARE = 0.01
"""CPUs to request for an actor. Ray only books it: the roles take turns on the same cores."""
START_TIMEOUT_S = 1800.0
"""Time to load models, and on GPUs to compile them for the first time."""


PlaceActor = Callable[[int], dict[str, Any]]
"""The Ray options of an actor, by its rank in its group; see rlsys.actors.placement."""


def on_cpu(rank: int) -> dict[str, Any]:
    """The `PlaceActor` of actors that use no GPU."""
    return {"num_cpus": CPU_SHARE, "num_gpus": 0}


class ActorGroup:
    """The actors of one role: `async_<name>` returns references, the plain name waits.

    Args:
        role: name of the group in messages.
        member: name of an actor in messages, before its rank.
        actor_class: class of the actors, an `Alive`, constructed with `args` and the rank.
        size: number of actors.
        env: environment variables of their processes.
        place: where each actor runs.
        timeout_s: most seconds for a call.
    """

    restarts: Restarts | None = None
    """Asked before an actor is replaced; None: none is replaced."""
    timeline = Timeline()
    """Records what the actors do; this one drops it."""
    timeline_role: Role = "rollout"
    """How it names the role."""
    is_starting = False
    """Whether `actors` are new, and cannot work yet."""

    def __init__(
        self,
        role: str,
        member: str,
        actor_class: type[Alive],
        *args: Any,
        size: int,
        env: dict[str, str],
        place: PlaceActor,
        timeout_s: float,
    ):
        self.role = role
        self.timeout_s = timeout_s
        threads = dict.fromkeys(actor_class.concurrency_groups, 1)
        self._actor_class = ray.remote(concurrency_groups=threads)(actor_class)
        self._args, self._env, self._place = args, env, place
        self._role_word = member.split(" ", 1)[0]
        self._names = [f"{member} {rank}" for rank in range(size)]
        self.actors = {name: self.create(rank) for rank, name in enumerate(self._names)}

    @property
    def ranks(self) -> list[int]:
        """The ranks of `actors`."""
        return [self._names.index(name) for name in self.actors]

    def watched(self) -> list[Watched]:
        """Who has to give signs of life."""
        actors = list(self.actors.items())  # at once: another thread may replace some
        return [Watched(name, actor, self.is_starting) for name, actor in actors]

    def healed(self, phase: str, work: Callable[[], T]) -> T:
        """What `work` returns; a group that can replace actors does it again if they fail in it.

        Args:
            phase: what it does, for messages.
            work: may be done again from its beginning.
        """
        return work()

    def take_in(self, *, timeout_s: float) -> bool:
        """Take in actors that replace others; returns whether `actors` changed meanwhile."""
        return False

    def create(self, rank: int) -> Any:
        """Start an actor for a rank. Assign it to `actors[name]` to replace the old one."""
        options = {"runtime_env": {"env_vars": self._env}, **self._place(rank)}
        name = name_in_ray(self._role_word, rank)
        return self._actor_class.options(name=name, **options).remote(*self._args, rank)

    def async_start(self) -> Refs:
        """Each reference is ready when its actor can work."""
        return self.async_call("start")

    def start(self, timeout_s: float = START_TIMEOUT_S) -> list[Any]:
        """Wait until every actor can work; for tests and benchmarks, a run waits for all roles."""
        return get_all(self.async_start(), phase=f"start of the {self.role}", timeout_s=timeout_s)

    def async_call(self, method: str, *args: Any, **kwargs: Any) -> Refs:
        """Start `method` on every actor."""
        return {
            name: getattr(actor, method).remote(*args, **kwargs)
            for name, actor in self.actors.items()
        }

    def call(self, method: str, *args: Any) -> list[Any]:
        """Run `method` on every actor and return the results in rank order."""
        refs = self.async_call(method, *args)
        return get_all(
            refs,
            phase=f"{self.role} {method}",
            timeout_s=self.timeout_s,
            on_done=self.answers(method),
        )

    def answers(self, method: str) -> Callable[[str], None] | None:
        """What to call with the name of each actor that answers the calls that are made now."""
        phase = PHASES.get(method)
        return None if phase is None else self.timeline.answers(self.timeline_role, phase)

    def close(self) -> None:
        """Kill the actors, whatever they are doing; for tests, a run ends with its Ray session."""
        for actor in self.actors.values():
            ray.kill(actor)


def name_in_ray(role: str, rank: int) -> str:
    """A name that `ray list actors` shows: policy-0, then policy-0-1 for the one that replaces it.

    Names are unique within a job, and Ray keeps jobs apart.
    """
    name = f"{role}-{rank}"
    number = _given_names[name]
    _given_names[name] += 1
    return f"{name}-{number}" if number else name


_given_names: Counter[str] = Counter()


def device_env(device: Device) -> dict[str, str]:
    """Variables that hide the GPUs of a host from the actors of a run on CPU."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
