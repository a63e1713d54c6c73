"""The loop: who is called when, with what, and what is logged."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch
from algo_cases import make_groups
from tracking_cases import make_config

from rlsys.actors.recovery import Restarts
from rlsys.driver import train
from rlsys.interrupts import interruptible
from rlsys.timeline.spans import Timeline
from rlsys.tracking.base import Tracker
from rlsys.tracking.health import Health, rules_of
from rlsys.types import UpdateOutput

ROLLOUT_KEYS = {
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/correct/mean",
    "rewards/correct/std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "epoch",
    "policy_version",
    "rollout/tokens_per_second",
    "update/tokens_per_second",
    "time/rollout",
    "time/advantages",
    "time/policy_update",
    "time/weight_sync",
    "time/step",
}
"""What the driver knows besides the metrics of the update and of the weight sync."""


class System:
    """Every role of a run in this process; `calls` is what was asked of them, in order."""

    def __init__(self, *, policy_version: int = 0, fails_at: int | None = None):
        self.calls: list[tuple] = []
        self.policy_version = policy_version
        self.published: int | None = None
        self.batches = []
        self.logged: list[tuple[int, dict]] = []
        self.watched: list[tuple[int, bool]] = []
        self._fails_at = fails_at

    # rollouts
    def next_batch(self, step):
        self.calls.append(("sample", step, f"with version {self.published}"))
        return make_groups([[3, 5], [4, 2]], seed=step)

    def evaluate(self, step):
        self.calls.append(("evaluate", step, f"with version {self.published}"))
        return {"eval/reward": float(step)}

    def metrics(self):
        return {"epoch": self.policy_version / 10, "staleness/max": 0.0}

    # policy
    def compute_logprobs(self, batch):
        self.calls.append(("old_logprobs",))
        return torch.full((2, *batch.input_ids.shape), -1.0).unbind()

    def update(self, batch):
        self.calls.append(("update",))
        if self.policy_version + 1 == self._fails_at:
            raise RuntimeError("out of memory")
        self.batches.append(batch)
        self.policy_version += 1
        return UpdateOutput(self.policy_version, {"loss": 0.5, "grad_norm": 2.0})

    def peak_memory_gib(self):
        return 71.5

    # weight sync, checkpoints
    def publish(self):
        self.published = self.policy_version
        self.calls.append(("publish", self.published))
        return {"weight_sync/bytes": 7.0}

    def after_step(self, step):
        self.calls.append(("checkpoint", step))


class Reference:
    def __init__(self, calls):
        self._calls = calls

    def compute_logprobs(self, batch):
        self._calls.append(("ref_logprobs",))
        return torch.full((2, *batch.input_ids.shape), -2.0).unbind()

    def sync(self):
        self._calls.append(("sync",))


class Teacher:
    def __init__(self, calls):
        self._calls = calls

    def compute_logprobs(self, batch):
        self._calls.append(("teacher_logprobs",))
        return torch.full((2, *batch.input_ids.shape), -3.0).unbind()


class Log(Tracker):
    def __init__(self, system):
        self._system = system

    def log_metrics(self, step, metrics):
        self._system.calls.append(("log", step))
        self._system.logged.append((step, dict(metrics)))

    def close(self):
        raise AssertionError("trackers are closed by whoever built them")


class Seen(Health):
    """Keeps the steps whose metrics it sees, by whether they are those of an evaluation."""

    def __init__(self, system, config):
        super().__init__(rules_of(config, dtype="float32"))
        self._system = system

    def observe(self, step, metrics):
        self._system.watched.append((step, "eval/reward" in metrics))
        return super().observe(step, metrics)


@pytest.fixture
def run(tmp_path):
    """Train to max_steps: `run(system, max_steps=2, **sections of the config)`."""

    def run(system, *, with_reference=False, **fields):
        config = make_config(tmp_path, **fields)
        reference = Reference(system.calls) if with_reference else None
        grpo = fields.get("grpo", {})
        roles = SimpleNamespace(
            config=config,
            rollouts=system,
            policy=system,
            reference=reference,
            teacher=Teacher(system.calls) if grpo.get("opd_kl_coef") else None,
            publisher=system,
            restarts=Restarts(config.recovery),
            timeline=Timeline(),
        )
        train(roles, Log(system), system, Seen(system, config))
        return system

    return run


def step_calls(step):
    """What an on-policy step without reference consists of."""
    return [
        ("sample", step, f"with version {step - 1}"),
        ("update",),
        ("publish", step),
        ("log", step),
        ("checkpoint", step),
    ]


def test_weights_are_published_before_the_first_rollout_and_after_every_update(run):
    system = run(System(), max_steps=3)
    assert system.calls == [("publish", 0), *step_calls(1), *step_calls(2), *step_calls(3)]


def test_evaluations_come_before_the_first_step_and_every_eval_steps(run):
    system = run(System(), max_steps=5, eval_steps=2, data=held_out())
    evaluations = [call for call in system.calls if call[0] == "evaluate"]
    assert evaluations == [("evaluate", s, f"with version {s}") for s in (0, 2, 4)]
    assert [step for step, metrics in system.logged if "eval/reward" in metrics] == [0, 2, 4]
    assert [step for step, is_evaluation in system.watched if is_evaluation] == [0, 2, 4]
    assert [step for step, is_evaluation in system.watched if not is_evaluation] == [1, 2, 3, 4, 5]
    assert system.calls[:2] == [("publish", 0), ("evaluate", 0, "with version 0")]


def test_an_evaluation_is_on_record_before_the_checkpoint_of_its_step(run):
    """A run that resumes from the checkpoint keeps the rows up to its step, and adds later ones."""
    system = run(System(), max_steps=1, eval_steps=1, data=held_out())
    assert system.calls[-2:] == [("log", 1), ("checkpoint", 1)]
    assert system.calls.count(("log", 1)) == 2


def held_out():
    return {"dataset": ["train.jsonl"], "val_dataset": ["validation.jsonl"]}


def test_a_resumed_policy_goes_on_with_its_next_step_and_is_not_evaluated_again(run):
    system = run(System(policy_version=3), max_steps=4, eval_steps=3, data=held_out())
    assert system.calls == [("publish", 3), *step_calls(4)]


def test_a_run_that_has_all_its_steps_takes_no_more(run):
    assert run(System(policy_version=4), max_steps=4).calls == [("publish", 4)]


def test_one_optimizer_step_a_rollout_needs_no_old_logprobs(run):
    (batch,) = run(System(), max_steps=1).batches
    assert batch.old_logprobs is None
    assert batch.ref_logprobs is None


@pytest.mark.parametrize(
    "fields", [{"grpo": {"num_iterations": 2}}, {"policy": {"global_batch_size": 2}}]
)
def test_more_optimizer_steps_a_rollout_start_from_old_logprobs(run, fields):
    system = run(System(), max_steps=1, **fields)
    assert [call[0] for call in system.calls[1:4]] == ["sample", "old_logprobs", "update"]
    batch = system.batches[0]
    assert torch.equal(batch.old_logprobs, -1.0 * batch.completion_mask)
    assert "time/old_logprobs" in system.logged[0][1]


def test_the_reference_sees_the_batch_before_the_policy_does(run):
    system = run(System(), max_steps=1, with_reference=True, grpo={"beta": 0.1})
    assert [call[0] for call in system.calls[1:4]] == ["sample", "ref_logprobs", "update"]
    batch = system.batches[0]
    assert torch.equal(batch.ref_logprobs, -2.0 * batch.completion_mask)
    assert "time/ref_logprobs" in system.logged[0][1]


def test_the_teacher_judges_each_token_that_the_policy_sampled(run):
    fields = {"grpo": {"opd_kl_coef": 0.5}, "teacher": {"path": "org/teacher"}}
    plain, taught = run(System(), max_steps=1), run(System(), max_steps=1, **fields)
    assert [call[0] for call in taught.calls[1:4]] == ["sample", "teacher_logprobs", "update"]
    (batch,), (without,) = taught.batches, plain.batches
    mask = batch.completion_mask
    better = 0.5 * (-3.0 - batch.rollout_logprobs) * mask
    torch.testing.assert_close(batch.advantages, without.advantages + better)
    metrics = taught.logged[0][1]
    assert metrics["opd_reverse_kl"] == pytest.approx((batch.rollout_logprobs[mask] + 3).mean())
    assert "time/teacher_logprobs" in metrics


def test_the_reference_follows_the_policy_every_sync_steps(run):
    fields = {"grpo": {"beta": 0.1}, "reference": {"sync_steps": 2}}
    system = run(System(), max_steps=5, with_reference=True, **fields)
    around = [call for call in system.calls if call[0] in ("publish", "sync", "checkpoint")]
    assert around[:2] == [("publish", 0), ("publish", 1)]
    assert around[3:6] == [("publish", 2), ("sync",), ("checkpoint", 2)]
    assert around.count(("sync",)) == 2


def test_the_batch_holds_the_groups_of_its_step_with_their_advantages(run):
    system = run(System(), max_steps=2)
    for step, batch in enumerate(system.batches, start=1):
        groups = make_groups([[3, 5], [4, 2]], seed=step)
        lengths = [
            len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions
        ]
        assert batch.lengths.tolist() == lengths
        rewards = torch.tensor([[r.total for r in g.rewards] for g in groups])
        better = torch.sign(rewards - rewards.mean(dim=1, keepdim=True)).reshape(-1)
        last = batch.advantages[torch.arange(len(lengths)), batch.lengths - 1]
        assert torch.equal(torch.sign(last), better)
    assert not torch.equal(*(batch.input_ids[:, :6] for batch in system.batches))


def test_every_step_logs_what_all_roles_report(run):
    system = run(System(), max_steps=2)
    assert [step for step, _ in system.logged] == [1, 2]
    for step, metrics in system.logged:
        assert metrics.keys() >= ROLLOUT_KEYS
        assert metrics["policy_version"] == step
        assert metrics["memory(GiB)"] == 71.5
        assert metrics["epoch"] == step / 10
        assert (metrics["loss"], metrics["grad_norm"]) == (0.5, 2.0)
        assert metrics["weight_sync/bytes"] == 7.0
        assert metrics["rollout/tokens_per_second"] == pytest.approx(14 / metrics["time/rollout"])
        phases = sum(metrics[f"time/{name}"] for name in ("rollout", "advantages", "policy_update"))
        assert 0 < phases <= metrics["time/step"]


def test_what_runs_ahead_is_sampled_during_the_whole_step(run):
    rollout = {"generation_batch_size": 4, "num_generations": 2, "max_staleness": 1}
    system = run(System(), max_steps=1, rollout=rollout)
    ((_, metrics),) = system.logged
    assert metrics["rollout/tokens_per_second"] < 14 / metrics["time/rollout"]


def test_a_failed_update_is_neither_published_nor_logged_nor_kept(run):
    system = System(fails_at=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(system, max_steps=3)
    assert system.calls[-2:] == [("sample", 2, "with version 1"), ("update",)]


def test_throughput_counts_what_was_sampled_not_what_is_trained_on(run):
    """make_groups marks the longest completion of each group as cut: 9 of 14 tokens."""
    system = run(System(), max_steps=1, grpo={"mask_truncated_completions": True})
    assert system.batches[0].completion_mask.sum() == 5
    metrics = system.logged[0][1]
    assert metrics["rollout/tokens_per_second"] == pytest.approx(14 / metrics["time/rollout"])


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_throughput_of_the_update_counts_every_pass(run, num_iterations):
    system = run(System(), max_steps=1, grpo={"num_iterations": num_iterations})
    tokens = num_iterations * system.batches[0].lengths.sum().item()
    metrics = system.logged[0][1]
    seconds = metrics["time/policy_update"]
    assert metrics["update/tokens_per_second"] == pytest.approx(tokens / seconds)


def test_rollout_logprobs_may_take_the_place_of_old_ones(run):
    (batch,) = run(
        System(), max_steps=1, grpo={"old_logprobs": "rollout", "num_iterations": 2}
    ).batches
    assert torch.equal(batch.old_logprobs, batch.rollout_logprobs)


def test_an_interruption_in_an_update_is_heard_when_the_step_is_on_record(run):
    """Or what is saved then would be half a step, or one that metrics.jsonl does not have."""
    system = System()
    update = system.update

    def interrupted_update(batch):
        signal.raise_signal(signal.SIGINT)
        return update(batch)

    system.update = interrupted_update
    with interruptible(), pytest.raises(KeyboardInterrupt):
        run(system)
    assert system.calls[1:] == step_calls(1)[:-1]
