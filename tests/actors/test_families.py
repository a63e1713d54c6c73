"""Each model family: weights, log-probs, gradient, a synced engine are those of transformers."""

import math

import pytest
import ray
import torch
import transformers
from family_models import (
    IN_BFLOAT16,
    MODELS,
    NOT_TESTED,
    THROUGH_THE_LOADER,
    WITHOUT,
    gradient_by_name,
    save_family_model,
    transformers_model,
)
from greedy_rollouts import PROMPTS, UnpackedActor, greedy, reload, start_reloading_engine
from policy_cases import LAYOUTS, exported, padded_logprobs, policy_config, random_batch
from safetensors.torch import load_file

from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.model.families import FAMILIES
from rlsys.model.shape import read_model_shape

pytestmark = pytest.mark.system


def cases(*tests):
    """(model, test) of all models: slow, but on one rank, or skipped with what NOT_TESTED says."""
    found = []
    for name in MODELS:
        for test in tests:
            marks = [] if test == "one rank" else [pytest.mark.slow]
            if (name, test) in NOT_TESTED:
                marks.append(pytest.mark.skip(reason=NOT_TESTED[name, test]))
            found.append(pytest.param(name, test, id=f"{name}-{test}", marks=marks))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by name, each made when a test asks for it."""
    root = tmp_path_factory.mktemp("families")

    def folder(name):
        if not (root / name).exists():
            save_family_model(root / name, name)
        return root / name

    return folder


def layout_of(name, layout):
    """The settings of a layout; experts are shared by the ranks that cut the rest."""
    has_experts = "num_experts_per_tok" in MODELS[name][1]
    experts = {"expert_model_parallel_size": 2} if layout == "TP 2" and has_experts else {}
    return LAYOUTS[layout] | experts


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


def test_every_family_has_a_model_here():
    types = {getattr(transformers, config_class).model_type for config_class, _ in MODELS.values()}
    assert types == FAMILIES.keys()


@pytest.mark.parametrize("name", WITHOUT)
def test_rows_of_the_tests_feel_each_feature(folders, tmp_path, name):
    save_family_model(tmp_path, name, **WITHOUT[name])
    batch, models = random_batch(), map(transformers_model, (folders(name), tmp_path))
    with torch.no_grad():
        having, lacking = (padded_logprobs(model, batch) for model in models)
    assert (having - lacking).abs().max() > 1e-2


# Positions under context parallelism: in what scales queries by them, windows, linear and latent
# attention.
CONTEXT = [
    pytest.param(name, "CP 2", id=f"{name}-CP 2", marks=pytest.mark.slow)
    for name in ("ministral3", "mistral-window", "gemma3_text", "qwen3_next", "deepseek_v3")
]


@pytest.mark.parametrize(("name", "layout"), cases("one rank", "TP 2", "PP 2") + CONTEXT)
def test_weights_logprobs_and_gradient_are_those_of_transformers(
    lab, folders, tmp_path, name, layout
):
    folder, batch = folders(name), random_batch()
    # Sharded optimizers leave each rank with the sum of its own part of the gradient only.
    options = layout_of(name, layout) | {"use_distributed_optimizer": False}
    policy = lab.policy(policy_config(folder, **options))

    saved, tensors = load_file(folder / "model.safetensors"), exported(policy)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())
    policy.call("plan_buckets", 1 << 14)
    in_buckets = policy.call("in_buckets")[0]
    assert in_buckets.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in in_buckets.items())
    announced = {meta.name: meta.shape for meta in policy.weight_metadata()}
    assert announced == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape = read_model_shape(folder)
    assert shape.num_params == sum(tensor.numel() for tensor in saved.values())

    model = transformers_model(folder)
    expected = padded_logprobs(model, batch)
    torch.testing.assert_close(
        policy.compute_logprobs(batch)[0], expected.detach(), rtol=0, atol=1e-5
    )
    mask = batch.completion_mask
    (-(expected * mask).sum(1) / mask.sum(1)).mean().backward()
    expected = gradient_by_name(model, tmp_path / "gradient")
    gradient = policy.call("gradient", batch, "sft")[0]
    assert gradient.keys() == expected.keys()
    assert norm(expected) > 0.1
    differences = {key: gradient[key] - expected[key] for key in expected}
    assert norm(differences) <= 1e-5 * norm(expected)
    for key, difference in differences.items():
        assert difference.norm() <= 1e-4 * expected[key].norm() + 1e-7, key


@pytest.fixture(scope="module")
def engine(ray_cluster, rollout_config, tiny_models):
    engine = start_reloading_engine(rollout_config(tiny_models[True, 1]), UnpackedActor)
    yield engine
    engine.close()


@pytest.mark.parametrize(("name", "_"), cases("engine"))
def test_a_synced_engine_samples_what_transformers_does(
    lab, engine, rollout_config, folders, tmp_path, name, _
):
    config = rollout_config(folders(name))
    reload(engine, config)
    policy = lab.policy(policy_config(folders(name)))
    publisher = WeightPublisher(policy, engine, config.weight_sync)
    for seed in range(2):  # through vLLM's loader, then in place where it only copies
        policy.update(random_batch(seed), loss="sft")
        publisher.publish()
    (actor,) = engine.actors.values()
    assert ray.get(actor.loads_in_place.remote()) == [name not in THROUGH_THE_LOADER]
    tokens, logprobs, _ = greedy(engine)

    policy.save_model(tmp_path / "updated")
    model = transformers_model(tmp_path / "updated")
    given = iter(logprobs)
    for prompt, completion in zip(PROMPTS, tokens, strict=True):
        row = torch.tensor([prompt.token_ids + completion])
        with torch.no_grad():
            predicted = torch.log_softmax(model(row).logits[0, len(prompt.token_ids) - 1 : -1], -1)
        chosen = predicted.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        assert [next(given) for _ in completion] == pytest.approx(chosen.tolist(), abs=1e-5)
        # Greedy, but for tokens of which rounding decides.
        assert (predicted.max(-1).values - chosen).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_a_synced_engine_in_bfloat16_is_a_fresh_one(lab, engine, rollout_config, tmp_path, name):
    def in_bfloat16(folder):
        config = rollout_config(folder)
        return config.model_copy(
            update={"model": config.model.model_copy(update={"dtype": "bfloat16"})}
        )

    folder = tmp_path / "model"  # with the only size of heads that vLLM's kernels for CPU have
    save_family_model(folder, name, linear_key_head_dim=128, linear_value_head_dim=128)
    config = in_bfloat16(folder)
    reload(engine, config)
    policy = lab.policy(policy_config(folder, dtype="bfloat16"))
    publisher = WeightPublisher(policy, engine, config.weight_sync)
    before = greedy(engine)[0]
    for seed in range(2):
        policy.update(random_batch(seed), loss="sft")
        publisher.publish()  # which compares checksums
    tokens, logprobs, _ = greedy(engine)
    assert tokens != before

    policy.save_model(tmp_path / "updated")
    reload(engine, in_bfloat16(tmp_path / "updated"))
    fresh_tokens, fresh_logprobs, _ = greedy(engine)
    assert tokens == fresh_tokens
    assert logprobs == fresh_logprobs

    model = transformers_model(tmp_path / "updated")
    given = iter(logprobs)
    differences = []
    for prompt, completion in zip(PROMPTS, tokens, strict=True):
        row = torch.tensor([prompt.token_ids + completion])
        with torch.no_grad():
            predicted = torch.log_softmax(model(row).logits[0, len(prompt.token_ids) - 1 : -1], -1)
        chosen = predicted.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        differences += [abs(next(given) - expected) for expected in chosen.tolist()]
    assert sum(differences) / len(differences) < 0.05
