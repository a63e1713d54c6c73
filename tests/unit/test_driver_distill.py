"""The loop of distillation: who is asked what, in steps on given rows and on own completions."""

from types import SimpleNamespace

import pytest
import torch
from config_cases import write_distill_run
from test_driver_sft import Log, Policy, samples

from rlsys.actors.recovery import Restarts
from rlsys.config import DistillConfig
from rlsys.config.load import load_config_as
from rlsys.data.samples import SampleData
from rlsys.data.streams.make import make_sample_stream
from rlsys.driver import train_distill
from rlsys.rollout.student import prompt_of
from rlsys.systems.distill import DistillSystem
from rlsys.tracking.health import Health
from rlsys.types import Completion, RolloutGroup, TeacherRows


class Student(Policy):
    """Notes each batch, whose teacher it needs."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.batches = calls, []

    def update(self, batch):
        assert isinstance(batch.teacher, TeacherRows)
        self.calls.append("update")
        self.batches.append(batch)
        return super().update(batch)


class Teacher:
    def __init__(self, calls):
        self.calls = calls

    def describe_tokens(self, batch):
        self.calls.append("teacher")
        return TeacherRows()

    def compute_predictions(self, batch):
        self.calls.append("evaluate teacher")
        likely = torch.where(batch.completion_mask, -0.1, 0.0)
        return likely, batch.completion_mask.float()


class Engines:
    """What the student writes: two tokens 7, at every second step."""

    def __init__(self, calls):
        self.calls = calls

    def has_step(self, step):
        return step % 2 == 0

    def sample(self, step, rows):
        self.calls.append("sample")
        done = Completion([7, 7], [-1.0, -1.0], "", "stop", (0,))
        return [RolloutGroup(n, prompt_of(row), [done]) for n, row in enumerate(rows)]


@pytest.fixture
def run(tmp_path):
    path = write_distill_run(tmp_path)

    def run(*words, samples_itself=True):
        config = load_config_as(DistillConfig, path, words).config
        data = SampleData(samples(8), samples(3), [8])
        calls = []
        publisher = SimpleNamespace(publish=lambda: calls.append("publish") or {"sync": 1.0})
        system = DistillSystem(
            config=config,
            device="cpu",
            policy=Student(calls),
            samples=make_sample_stream(config, data),
            held_out_sets=data.held_out_sets,
            restarts=Restarts(config.recovery),
            teacher=Teacher(calls),
            student=Engines(calls) if samples_itself else None,
            publisher=publisher if samples_itself else None,
        )
        log = Log()
        checkpoints = SimpleNamespace(after_step=lambda step: calls.append(step))
        train_distill(system, log, checkpoints, Health([]))
        return SimpleNamespace(calls=calls, log=log, policy=system.policy)

    return run


def test_given_rows_need_no_engine(run):
    found = run("--max_steps", "2", "--distill.lmbda", "0", samples_itself=False)
    assert found.calls == ["teacher", "update", 1, "teacher", "update", 2]
    assert [row["on_policy"] for _, row in found.log.rows] == [0.0, 0.0]


def test_engines_get_weights_where_the_student_samples(run):
    found = run("--max_steps", "4")
    given, own = ["teacher", "update"], ["publish", "sample", "teacher", "update"]
    assert found.calls == [*given, 1, *own, 2, *given, 3, *own, 4]
    rows = [row for _, row in found.log.rows]
    assert [row["on_policy"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    assert [row.get("completions/mean_length") for row in rows] == [None, 2.0, None, 2.0]
    batch = found.policy.batches[1]
    assert batch.completion_mask.sum() == 2 * 4
    assert set(batch.input_ids[batch.completion_mask].tolist()) == {7}


def test_no_batch_of_given_rows_is_made_where_the_student_samples(run, monkeypatch):
    monkeypatch.setattr(Engines, "has_step", lambda self, step: True)
    monkeypatch.delattr("rlsys.driver.build_sample_batch")
    assert len(run("--max_steps", "2").policy.batches) == 2


def test_the_teacher_is_evaluated_once(run):
    found = run("--max_steps", "4", "--eval_steps", "2", "--data.split_dataset_ratio", "0.1")
    assert found.calls.count("evaluate teacher") == 1
    evaluated = [row for _, row in found.log.rows if "eval/loss" in row]
    assert [row["eval/loss"] for row in evaluated] == pytest.approx([0.5] * 3)
    assert [row["eval/teacher/loss"] for row in evaluated] == pytest.approx([0.1] * 3)
    assert [row["eval/teacher/mean_token_accuracy"] for row in evaluated] == [1.0] * 3
