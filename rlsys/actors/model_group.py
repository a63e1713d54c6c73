"""Ranks that share one megatron-core model: what the policy and the reference have in common."""

from __future__ import annotations

import logging
import warnings
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from rlsys.actors.group import (
    ActorFailure,
    PhaseTimeout,
    Place,
    device_env,
    get_all,
    inherited_env,
)
from rlsys.config import Config
from rlsys.types import Device, TrainBatch
from rlsys.weight_sync.transport import serve_store


class ModelRank:
    """Base of the actors that hold one rank of a model; each has a process to itself."""

    def __init__(self, config: Config, device: Device, rank: int):
        self.config = config
        self.device: Device = device
        self.rank = rank

    def rendezvous(self) -> tuple[str, int]:
        """Serve the store at which the ranks meet; returns its address and port.

        Its port is taken from here on: one that is only found free is often not any more, seconds
        later, when megatron-core has been imported.
        """
        address = ray.util.get_node_ip_address()
        self.store = serve_store(address, self.config.policy.timeout_s)
        return address, self.store.port

    def join(self, address: str, port: int, **sizes: int) -> None:
        """Become a megatron-core rank; the first thing that imports megatron.

        Args:
            address, port: of the store of `rendezvous`.
            sizes: those of `ParallelLayout`.
        """
        from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu

        # What megatron-core says at import about packages that a CPU does not have, and torch about
        # megatron-core's use of it: in a user's terminal it hides what matters.
        warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
        logging.getLogger("megatron").setLevel(logging.ERROR)
        torch.set_num_threads(self.config.policy.cpu_threads)
        if self.device == "cpu":
            enable_megatron_on_cpu()
        from rlsys.engines.megatron.parallel import ParallelLayout, initialize_parallel

        timeout_s = self.config.policy.timeout_s
        if self.rank != 0:
            self.store = dist.TCPStore(
                address, port, is_master=False, timeout=timedelta(seconds=timeout_s)
            )
        layout = ParallelLayout(rank=self.rank, timeout_s=timeout_s, **sizes)
        initialize_parallel(layout, self.store, device=self.device, seed=self.config.seed)


class ModelActors:
    """Driver-side group of ranks: `async_<name>` returns references, everything else waits.

    Args:
        rank_class: a ModelRank; one actor of it is created for each rank.
        device: of the run, as the launcher chose it.
        role: "policy" or "reference", as errors name it.
        place: where each actor runs.
    """

    def __init__(
        self,
        rank_class: type[ModelRank],
        config: Config,
        *,
        device: Device,
        role: str,
        world_size: int,
        place: Place,
    ):
        self.role = role
        self.timeout_s = config.policy.timeout_s
        self.may_be_stuck = False
        """Whether a rank did not answer, or failed where others may wait for it in a collective."""
        runtime_env = {"env_vars": process_env(config.policy.cpu_threads, device)}
        actor_class = ray.remote(rank_class)
        self.actors: dict[str, Any] = {
            f"{role} rank {rank}": actor_class.options(
                runtime_env=runtime_env, **place(rank)
            ).remote(config, device, rank)
            for rank in range(world_size)
        }

    def async_start(self) -> dict[str, ray.ObjectRef]:
        """Tell the ranks where to meet; each is ready when its model is built."""
        name, actor = next(iter(self.actors.items()))
        first = {name: actor.rendezvous.remote()}
        phase = f"start of the {self.role}"
        address, port = get_all(first, phase=phase, timeout_s=self.timeout_s)[0]
        return self.async_call("start", address, port)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Run `method` on every rank and wait: results in rank order."""
        refs = self.async_call(method, *args)
        try:
            return get_all(refs, phase=f"{self.role} {method}", timeout_s=self.timeout_s)
        except PhaseTimeout:
            self.may_be_stuck = True
            raise
        except ActorFailure:
            self.may_be_stuck |= len(self.actors) > 1
            raise

    def async_call(self, method: str, *args: Any, **kwargs: Any) -> dict[str, ray.ObjectRef]:
        """Start `method` on every rank: actor name -> reference, in rank order."""
        return {
            name: getattr(actor, method).remote(*args, **kwargs)
            for name, actor in self.actors.items()
        }

    def compute_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs, and entropies of the predictions: two [N, S] float32 in nats, 0 where masked.

        Both are of the distribution that completions are sampled from.
        """
        logprobs, entropies = (torch.zeros(batch.input_ids.shape) for _ in range(2))
        for result in self.call("compute_logprobs", ray.put(batch)):
            if result is not None:  # of a rank that reports its rows
                rows, values = result
                logprobs[rows], entropies[rows] = values
        return logprobs, entropies

    def close(self) -> None:
        """Kill the ranks; whatever they do is given up."""
        for actor in self.actors.values():
            ray.kill(actor)


def process_env(threads: int, device: Device) -> dict[str, str]:
    """Environment of an actor process that computes on `threads` CPU threads."""
    return (
        inherited_env()
        | device_env(device)
        | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns of every host name without an entry
        }
    )
