"""Dumps of optimizer steps: what is written is what is read, and nothing else is read."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from config_cases import write_run

from rlsys.algo.batching import build_sample_batch
from rlsys.commands.replay import about, replay_config, report
from rlsys.config.load import load_config
from rlsys.engines.step_dump import STEP, Fault, Step, read_step, write_step
from rlsys.types import Sample, TeacherRows, TrainBatch


def make_batch(rows=3, tokens=5):
    shape = (rows, tokens)
    return TrainBatch(
        input_ids=torch.arange(rows * tokens).view(shape),
        lengths=torch.tensor([5, 3, 4]),
        completion_mask=torch.arange(tokens).expand(shape) > 1,
        advantages=torch.full(shape, torch.nan),
        rollout_logprobs=torch.randn(shape),
        ref_logprobs=torch.randn(shape),
        kept=torch.tensor([True, False, True]),
        routed_experts=[np.full((n, 2, 2), n, dtype=np.uint8) for n in (4, 2, 3)],
    )


def test_what_a_teacher_said_of_each_token_is_read_again(tmp_path, config):
    batch = make_batch()
    batch.teacher = TeacherRows(
        hidden=[np.full((n, 4), n, dtype=np.int16) for n in (3, 3, 3)],
        top_ids=[],
        top_logprobs=[],
    )
    read = read_step(written(tmp_path, config, batch)).step.batch
    for one, other in zip(read.teacher.hidden, batch.teacher.hidden, strict=True):
        assert one.dtype == np.int16
        assert np.array_equal(one, other)
    assert read.teacher.top_ids == []


@pytest.fixture
def config(tmp_path):
    return load_config(write_run(tmp_path)).config


def written(tmp_path, config, batch, **changes):
    folder = tmp_path / "dump"
    folder.mkdir()
    step = replace(Step(batch, [2, 0], None, 4, "2 of 4"), **changes)
    metrics = {"loss": torch.nan, "grad_norm": torch.inf, "entropy": 0.5}
    fault = Fault({"loss": 1, "advantages": 7}, metrics, {3: ["a.weight", "b.weight"]})
    write_step(folder, step, fault, config, weights=None, weights_version=4)
    return folder


def assert_equal(one, other):
    for field in fields(TrainBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if torch.is_tensor(a):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(99), b.nan_to_num(99))
        elif isinstance(a, list):
            assert all(
                np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
            )
        else:
            assert a is b is None


def test_a_step_is_read_as_it_was_written(tmp_path, config):
    batch = make_batch()
    dump = read_step(written(tmp_path, config, batch))
    assert_equal(batch, dump.step.batch)
    assert replace(dump.step, batch=batch) == Step(batch, [2, 0], None, 4, "2 of 4")
    assert (dump.weights, dump.method) == (None, "grpo")
    assert dump.fault.found == {"loss": 1, "advantages": 7}
    assert dump.fault.metrics == {"loss": None, "grad_norm": None, "entropy": 0.5}
    note = "note: in the run, these weights of rank 3 were not finite: a.weight and 1 more"
    assert list(about(dump))[-1] == note
    assert dump.packages["torch"] == torch.__version__
    again = replay_config(dump, ["--policy.micro_batch_size", "1"])
    assert again.policy.micro_batch_size == 1
    assert again.model.path == str(tmp_path / "model")
    with pytest.raises(ValueError, match="micro_batch_sise"):
        replay_config(dump, ["--policy.micro_batch_sise", "1"])


def test_tensors_that_share_memory_are_written_too(tmp_path, config):
    """Batches of supervised training have one number for all advantages and log-probs."""
    samples = [Sample(str(n), np.arange(n + 2), np.arange(n + 2) > 0) for n in range(3)]
    batch = build_sample_batch(samples)
    assert_equal(batch, read_step(written(tmp_path, config, batch)).step.batch)


def test_what_is_not_a_dump_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match=r"not a dump of a step.*no step\.json.*below dumps/"):
        read_step(tmp_path)
    folder = written(tmp_path, config, make_batch())
    stored = json.loads((folder / STEP).read_text())
    (folder / STEP).write_text(json.dumps(stored | {"format": 2}))
    with pytest.raises(ValueError, match="has the format 2, and this rlsys reads 1"):
        read_step(folder)
    (folder / STEP).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_step(folder)


def test_the_report_names_entries_of_the_rows_of_the_step_only():
    batch = make_batch()
    batch.advantages[:] = 0.0
    batch.advantages[1, 3] = torch.nan  # row 1 is not in the step, token 1 of row 2 not trained
    batch.advantages[2, 1] = torch.nan
    batch.ref_logprobs[2, 4] = -torch.inf
    lines = list(report(Step(batch, [2, 0], None, 4, "2 of 4"), []))
    assert lines == [
        "batch          ref_logprobs of row 2, token 4: -inf",
        "First: batch, ref_logprobs of row 2, token 4: -inf",
    ]
    assert list(report(Step(make_batch(), [], None, 0, "1 of 1"), [])) == []
