"""A policy that is saved in the middle of its updates, and one that goes on from there."""

from __future__ import annotations

from policy_cases import exported, random_batch

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.1}


def update(policy, versions):
    """Metrics of the updates to `versions`, each on a batch of its own."""
    metrics = []
    for version in versions:
        batch = random_batch(seed=version)
        batch.old_logprobs = policy.compute_logprobs(batch)[0]
        output = policy.update(batch)
        assert output.policy_version == policy.policy_version == version
        metrics.append(output.metrics)
    return metrics


def run_and_save(lab, config, folder, *, read=exported):
    """A checkpoint after 2 updates; metrics of 2 more, and what `read` says of the policy then."""
    policy = lab.policy(config)
    update(policy, [1, 2])
    folder.mkdir()
    policy.save_checkpoint(folder)
    return update(policy, [3, 4]), read(policy)


def resume(lab, config, folder, *, read=exported):
    """The same of a policy that continues from the checkpoint."""
    policy = lab.policy(config)
    policy.load_checkpoint(folder)
    assert policy.policy_version == 2
    return update(policy, [3, 4]), read(policy)
