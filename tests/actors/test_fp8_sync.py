"""A weight sync to an engine that quantises: as if it had been started with these weights."""

import pytest
import ray
from greedy_rollouts import ReloadingActor, check_syncs, greedy, reload, start_reloading_engine
from tensor_policy import TensorPolicy
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from rlsys.actors.weight_publisher import WeightPublisher

pytestmark = [pytest.mark.system, pytest.mark.slow]


class Fp8Actor(ReloadingActor):
    """On CPU, where rlsys would not let a run do this."""

    def __init__(self, *args):
        import fp8_workers

        from rlsys.engines.vllm import engine as vllm

        vllm.WORKER_EXTENSION = fp8_workers.WORKER_EXTENSION
        vllm.engine_option_problems = lambda *_, **__: []
        super().__init__(*args)

    async def weight_dtypes(self):
        return await self._call(lambda engine: engine._llm.collective_rpc("weight_dtypes")[0])


def test_an_engine_quantises_what_a_sync_brings_as_at_its_start(
    ray_cluster, rollout_config, tiny_models, tmp_path
):
    folders = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders, start=1):
        save_model(
            AutoModelForCausalLM.from_pretrained(tiny_models[False, seed]).bfloat16(), folder
        )

    def config(folder, quantization="fp8"):
        mine = rollout_config(folder, max_completion_length=32, quantization=quantization)
        model = mine.model.model_copy(update={"dtype": "bfloat16"})
        return mine.model_copy(update={"model": model})

    engines = start_reloading_engine(config(folders[1]), Fp8Actor)
    fresh = greedy(engines)
    dtypes = ray.get(engines.actors["rollout engine 0"].weight_dtypes.remote())
    assert ("weight", "torch.float8_e4m3fn") in dtypes
    assert ("weight_scale", "torch.float32") in dtypes

    reload(engines, config(folders[0]))
    policy = TensorPolicy(folders[0])
    publisher = WeightPublisher(policy, engines, config(folders[0]).weight_sync)
    publisher.publish()
    old = greedy(engines)
    assert old[0] != fresh[0]
    wanted = [(folders[1], fresh), (folders[0], old)]
    check_syncs(policy, publisher, engines, wanted, tolerance=0)

    reload(engines, config(folders[0], quantization=None))
    assert greedy(engines)[1] != old[1]
    policy.close()
    engines.close()
