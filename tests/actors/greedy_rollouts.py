"""Greedy completions of a rollout engine: equal weights give equal completions."""

from __future__ import annotations

import gc

import pytest
import ray
from patience import PATIENCE_S

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActor, RolloutActors
from rlsys.actors.waiting import get_all
from rlsys.types import Prompt, SampleRequest

# Longer than a KV block (128 tokens), so that the prefix cache holds them.
PROMPTS = [
    Prompt(str(i), [], [2 + (i * 37 + j * (i + 3)) % 250 for j in range(140)]) for i in range(8)
]


def greedy(engines):
    """Token ids, log-probs and versions of every prompt's greedy completion."""
    engines.submit([SampleRequest(i, prompt, 1, 0.0, i) for i, prompt in enumerate(PROMPTS)])
    groups = {}
    while engines.num_pending:
        ray.wait(engines.pending_refs(), timeout=PATIENCE_S)
        groups |= {group.ticket: group for group in engines.collect()}
    completions = [groups[i].completions[0] for i in range(len(PROMPTS))]
    return (
        [completion.token_ids for completion in completions],
        [logprob for completion in completions for logprob in completion.rollout_logprobs],
        {completion.policy_versions for completion in completions},
    )


def check_syncs(policy, publisher, engines, wanted, *, tolerance):
    """After each weight sync the engine gives what another gave that began with these weights.

    Args:
        wanted: (model folder, what `greedy` returned of the other engine), one after the other.
        tolerance: of log-probs, in nats; 0 wants them equal.
    """
    for version, (folder, expected) in enumerate(wanted, start=1):
        policy.set_weights(folder)
        publisher.publish()
        tokens, logprobs, versions = greedy(engines)
        assert tokens == expected[0]
        assert logprobs == pytest.approx(expected[1], rel=0, abs=tolerance)
        assert versions == {(version,)}


class ReloadingActor(RolloutActor):
    """Starts one engine after the other in a process: importing vLLM takes longer than that."""

    def reload(self, config):
        self._loop.close()
        gc.collect()
        self.__init__(config, "cpu", 0)
        self._loop.built.result(PATIENCE_S)


class UnpackedActor(ReloadingActor):
    """vLLM then multiplies with the parameters themselves, as on GPUs."""

    def __init__(self, *args):
        import unpacked_workers

        from rlsys.engines.vllm import engine as vllm

        vllm.WORKER_EXTENSION = unpacked_workers.WORKER_EXTENSION
        super().__init__(*args)

    async def loads_in_place(self):
        return await self._call(lambda engine: engine.ask_workers("loads_in_place"))


def start_reloading_engine(config, actor_class=ReloadingActor):
    """A RolloutActors of one engine, for `reload`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", actor_class)
        engines = RolloutActors(config, device="cpu")
    engines.start()
    return engines


def reload(engines, config):
    """Replace the engine by one that starts from config.model.path."""
    refs = {name: actor.reload.remote(config) for name, actor in engines.actors.items()}
    get_all(refs, phase="reload", timeout_s=PATIENCE_S)
