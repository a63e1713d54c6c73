"""Families that vLLM on CPU runs in bfloat16 only: a synced engine has the policy's weights."""

import pytest
import torch
from family_models import NOT_TESTED, save_family_model, transformers_model
from greedy_rollouts import PROMPTS, greedy, reload, start_reloading_engine
from policy_cases import policy_config

from rlsys.actors.weight_publisher import WeightPublisher

pytestmark = [pytest.mark.system, pytest.mark.slow]

NAMES = [name for name, test in NOT_TESTED if test == "engine"]


def predicted(folder, tokens):
    """transformers' log-probs, in fp32, of the completions."""
    model, found = transformers_model(folder), []
    for prompt, completion in zip(PROMPTS, tokens, strict=True):
        row = torch.tensor([prompt.token_ids + completion])
        with torch.no_grad():
            logits = model(row).logits[0, len(prompt.token_ids) - 1 : -1]
        found += logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).flatten()
    return torch.stack(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_synced_engine_has_the_weights_of_the_policy(
    lab, ray_cluster, rollout_config, tiny_models, tmp_path, name
):
    folders = [tmp_path / "old", tmp_path / "new"]
    for seed, folder in enumerate(folders):
        save_family_model(folder, name, seed=seed)

    def in_bfloat16(config):
        model = config.model.model_copy(update={"dtype": "bfloat16"})
        return config.model_copy(update={"model": model})

    engine = start_reloading_engine(rollout_config(tiny_models[True, 1]))
    try:
        config = in_bfloat16(rollout_config(folders[0]))
        reload(engine, config)
        policy = lab.policy(policy_config(folders[1], dtype="bfloat16"))
        WeightPublisher(policy, engine, config.weight_sync).publish()
        tokens, logprobs, _ = greedy(engine)
    finally:
        engine.close()
    old, new = (
        (torch.tensor(logprobs) - predicted(folder, tokens)).abs().mean() for folder in folders
    )
    assert new < 0.25
    assert old > 4 * new
