"""LoRA adapters beside the base in vLLM: they come by weight sync, and the base stays as it is."""

from itertools import pairwise

import pytest
import ray
import torch
from greedy_rollouts import PROMPTS, UnpackedActor, greedy, reload, start_reloading_engine
from lora_cases import with_lora
from peft import PeftModel
from policy_cases import LAYOUTS, policy_config, random_batch
from tensor_policy import TensorPolicy, load_tensors
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import ActorFailure
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import LoraConfig
from rlsys.model.adapters import slot_numbers, slot_rank
from rlsys.model.shape import read_model_shape

pytestmark = pytest.mark.system

LORA = {"rank": 4, "alpha": 6.0}
SCALING = 1.5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(folder, seed, *, rank=LORA["rank"], targets=TARGETS):
    """lora_A and lora_B of each linear layer, under PEFT's names."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_tensors(folder).items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            size_out, size_in = weight.shape
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, size_in, generator=rng) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size_out, rank, generator=rng) * 0.2
    return tensors


def save_merged(folder, adapter, into):
    """The model with base + scaling B A as its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, a in adapter.items():
        if ".lora_A." in name:
            b = adapter[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(module).weight.data += SCALING * b @ a
    save_model(model, into)


class AdapterActor(UnpackedActor):
    """Says what its workers hold: the base weights, and the place for an adapter."""

    async def ask(self, method):
        return await self._call(lambda engine: engine._llm.collective_rpc(method))


def lora_config(config, sync="adapter"):
    return with_lora(config, LORA, sync)


def ask(engines, method):
    (actor,) = engines.actors.values()
    return ray.get(actor.ask.remote(method))


def base_checksums(engines):
    return ask(engines, "base_checksums")


@pytest.fixture(scope="module")
def engines(ray_cluster, rollout_config):
    engines = start_reloading_engine(rollout_config(), AdapterActor)
    yield engines
    engines.close()


def test_an_adapter_gives_what_merged_weights_give_and_leaves_the_base(
    engines, rollout_config, tiny_models, tmp_path
):
    folder = tiny_models[True, 1]
    adapters = [
        random_adapter(folder, 1),
        random_adapter(folder, 2),
        random_adapter(folder, 3, targets=("q_proj", "down_proj")),  # the others must be forgotten
    ]
    expected = []
    for number, adapter in enumerate(adapters):
        save_merged(folder, adapter, tmp_path / str(number))
        reload(engines, rollout_config(tmp_path / str(number)))
        expected.append(greedy(engines))
    tokens = [result[0] for result in expected]
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]
    reload(engines, lora_config(rollout_config(folder)))
    policy = TensorPolicy(folder)
    before = base_checksums(engines)
    of_base = sum(tensor.nbytes for tensor in load_tensors(folder).values())
    publisher = None
    for version, number in enumerate((0, 1, 0, 2), 1):
        policy.set_adapter(adapters[number])
        policy.policy_version = version
        connects = publisher is None or number == 2  # other tensors need another connection
        if connects:
            publisher = WeightPublisher(
                policy, engines, rollout_config().weight_sync, adapter_scaling=SCALING
            )
        if version > 1:  # a sleeping engine keeps the base
            engines.call("sleep")
        sent = publisher.publish()["weight_sync/bytes"]
        engines.call("wake")
        tokens, logprobs, versions = greedy(engines)
        assert versions == {(version,)}
        assert tokens == expected[number][0]
        assert logprobs == pytest.approx(expected[number][1], abs=1e-5)
        of_adapter = sum(tensor.nbytes for tensor in adapters[number].values())
        assert sent == of_adapter + connects * of_base
    engines.call("sleep")
    engines.call("wake")  # and so the adapter
    assert greedy(engines)[0] == tokens
    assert base_checksums(engines) == before

    # An engine that replaces this one has other weights until it gets base and adapter.
    reload(engines, lora_config(rollout_config(tiny_models[True, 2])))
    assert base_checksums(engines) != before
    publisher.connect()
    assert publisher.publish()["weight_sync/bytes"] == of_adapter + of_base
    assert base_checksums(engines) == before
    tokens, logprobs, _ = greedy(engines)
    assert tokens == expected[number][0]
    assert logprobs == pytest.approx(expected[number][1], abs=1e-5)
    policy.close()


@pytest.mark.parametrize("tied", [True, False])
def test_the_estimate_has_the_place_that_vllm_makes(engines, rollout_config, tiny_models, tied):
    folder = tiny_models[tied, 1]
    reload(engines, lora_config(rollout_config(folder)))
    expected = slot_numbers(read_model_shape(folder), slot_rank(LoraConfig(**LORA)), 1)
    assert ask(engines, "slot_numbers") == [expected]


def test_an_engine_without_its_adapter_samples_nothing(engines, rollout_config, tiny_models):
    reload(engines, lora_config(rollout_config(tiny_models[True, 1])))
    with pytest.raises(ActorFailure, match="which no weight sync brought"):
        greedy(engines)


def test_tensors_that_vllm_would_ignore_are_an_error(engines, rollout_config, tiny_models):
    folder = tiny_models[True, 1]
    reload(engines, lora_config(rollout_config(folder)))
    policy = TensorPolicy(folder)
    tensors = random_adapter(folder, 1)
    policy.set_adapter({name.replace("up_proj", "top_proj"): t for name, t in tensors.items()})
    config = rollout_config().weight_sync
    publisher = WeightPublisher(policy, engines, config, adapter_scaling=SCALING)
    with pytest.raises(ActorFailure, match=r"no adapter for 2 modules.*top_proj.*to merged"):
        publisher.publish()
    policy.close()


@pytest.mark.parametrize("lora", ["adapter", "merged"])
@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP 2", marks=pytest.mark.slow)])
def test_engines_sample_what_peft_computes_with_the_policys_adapter(
    lab, engines, rollout_config, tiny_models, tmp_path, lora, layout
):
    folder = tiny_models[False, 1]
    config = lora_config(rollout_config(folder), lora)
    reload(engines, config)
    policy = lab.policy(lora_config(policy_config(folder, lr=1e-2, **LAYOUTS[layout]), lora))
    scaling = SCALING if lora == "adapter" else None
    publisher = WeightPublisher(policy, engines, config.weight_sync, adapter_scaling=scaling)
    seen = []
    for step in range(3):  # first without a change, which B = 0 makes none
        if step:
            policy.update(random_batch(step))
        publisher.publish()
        tokens, logprobs, versions = greedy(engines)
        assert versions == {(step,)}
        policy.save_model(tmp_path / str(step))
        assert_greedy_of_peft(folder, tmp_path / str(step), tokens, logprobs)
        seen.append(logprobs)
    assert all(new != pytest.approx(old, abs=1e-3) for old, new in pairwise(seen))


@torch.no_grad()
def assert_greedy_of_peft(folder, adapter, tokens, logprobs):
    """PEFT computes in float64, so that only the engine's rounding counts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, adapter).eval()
    given = iter(logprobs)
    for prompt, completion in zip(PROMPTS, tokens, strict=True):
        row = torch.tensor([prompt.token_ids + completion])
        predicted = torch.log_softmax(model(row).logits[0, len(prompt.token_ids) - 1 : -1], -1)
        chosen = predicted.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        assert [next(given) for _ in completion] == pytest.approx(chosen.tolist(), abs=1e-5)
        # Greedy, but for tokens of which rounding decides.
        assert (predicted.max(-1).values - chosen).max() < 1e-5


@pytest.mark.slow  # starts an engine of two workers
def test_each_worker_of_an_engine_cuts_the_adapter(
    ray_cluster, rollout_config, tiny_models, engines
):
    folder = tiny_models[True, 1]
    config = lora_config(rollout_config(folder))
    policy = TensorPolicy(folder)
    policy.set_adapter(random_adapter(folder, 1))
    reload(engines, config)
    WeightPublisher(policy, engines, config.weight_sync, adapter_scaling=SCALING).publish()
    tokens, logprobs, _ = greedy(engines)
    pair = RolloutActors(lora_config(rollout_config(folder, tensor_parallel_size=2)), device="cpu")
    WeightPublisher(policy, pair, config.weight_sync, adapter_scaling=SCALING).publish()
    of_pair = greedy(pair)
    pair.close()
    policy.close()
    assert of_pair[0] == tokens
    assert of_pair[1] == pytest.approx(logprobs, abs=2e-5)  # sums in another order
