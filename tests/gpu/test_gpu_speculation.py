"""Speculative decoding on a GPU: completions are sampled from the policy, with its log-probs."""

import json

import pytest
import ray
import torch
from gpu_cases import DEVICE, engine_config, save_gpu_model
from gpu_lab import ReloadingGpuActor
from greedy_rollouts import reload
from sampled_distribution import compare

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.types import Prompt, SampleRequest

pytestmark = pytest.mark.gpu(1)

KIND, G, TEMPERATURE, DRAFTED = "qwen3-tied", 8, 0.3, 3
PROMPTS = [Prompt(f"p{i}", [], [2 + (i * 37 + j) % 250 for j in range(5)] * 8) for i in range(8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and one that drafts for it: the same with a part of its layers."""
    root = tmp_path_factory.mktemp("speculation")
    save_gpu_model(root / "model", KIND)
    save_gpu_model(root / "draft", KIND, num_hidden_layers=1)
    return root / "model", root / "draft"


@pytest.fixture(scope="module")
def reloading(gpus, folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", ReloadingGpuActor)
        reloading = RolloutActors(engine_config(folders[0]), device=DEVICE, place=gpus.on(0))
    reloading.start()
    yield reloading
    reloading.close()


def sample(reloading):
    reloading.submit([SampleRequest(i, p, G, TEMPERATURE, 100 * i) for i, p in enumerate(PROMPTS)])
    groups = []
    while reloading.num_pending:
        assert ray.wait(reloading.pending_refs(), timeout=120)[0]
        groups += reloading.collect()
    return groups


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafts_change_neither_distribution_nor_log_probs(reloading, folders, method):
    model, draft = folders
    speculation = {
        "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3},
        "draft_model": {"model": str(draft)},
    }[method] | {"num_speculative_tokens": DRAFTED}
    found = {}
    for name, chosen in (("plain", None), (method, speculation)):
        reload(reloading, engine_config(model, max_completion_length=96, speculative_config=chosen))
        groups = sample(reloading)
        differences, deviation = compare(
            groups, model, temperature=TEMPERATURE, dtype=torch.bfloat16, on=DEVICE
        )
        counts = reloading.draft_counts()
        found[name] = {
            "tokens": len(differences),
            "logp_difference_mean": differences.mean().item(),
            "standard_deviations": deviation,
            "drafted": counts.num_draft_tokens,
            "accepted": counts.num_accepted_tokens,
        }
    print(json.dumps(found))
    plain, own = found["plain"], found[method]
    assert plain["drafted"] == 0
    assert 0 < own["accepted"] <= own["drafted"]
    assert own["logp_difference_mean"] < 2 * plain["logp_difference_mean"] + 1e-3
    # Rounding in bfloat16 moves distributions a little: wrong ones are tens of deviations away.
    assert abs(own["standard_deviations"]) < 6
