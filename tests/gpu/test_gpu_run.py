"""`rlsys grpo` on two GPUs as a user starts it: reference on the policy's, sampling ahead."""

import math

import pytest

pytestmark = pytest.mark.gpu(2)


def test_a_short_run_ends_well_and_its_engines_agree(short_run):
    exit_code, log, rows = short_run()
    assert exit_code == 0, log[-4000:]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3
    for row in steps:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(number) for number in numbers), row
        assert row["kl"] >= 0
        assert 0 < row["sampling/logp_difference/mean"] < 0.05  # nats: what bfloat16 explains
        assert row["weight_sync/bytes"] > 0
    assert steps[-1]["policy_version"] == 3
