"""The loop of preference training: who is asked what, and what a checkpoint continues with."""

import json

import numpy as np
import pytest
import torch
from config_cases import write_preference_run
from test_driver_sft import Log
from test_driver_sft import Policy as SftPolicy

from rlsys.actors.recovery import Restarts
from rlsys.config import PreferenceConfig
from rlsys.config.load import load_config_as
from rlsys.data.preferences import PreferenceData
from rlsys.data.streams.make import make_stream
from rlsys.driver import evaluate_preference, train_preference
from rlsys.run.folder import RunDir
from rlsys.saving import make_checkpoints, save_last_step
from rlsys.systems.preference import PreferenceSystem
from rlsys.tracking.health import Health
from rlsys.types import Preference, Sample

NUM_ROWS = 10


class Policy(SftPolicy):
    """Notes the batches that it is trained on; the log-prob of a token is -1 and falls by 0.1."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def update(self, batch):
        self.batches.append(batch)
        return super().update(batch)

    def compute_logprobs(self, batch):
        logprob = -1 - 0.1 * self.policy_version
        return torch.where(batch.completion_mask, logprob, 0.0), None


class Reference:
    """The log-prob of a token is -1; notes the rows that it is asked for."""

    def __init__(self):
        self.asked = []

    def compute_logprobs(self, batch):
        self.asked.append(len(batch.lengths))
        return torch.where(batch.completion_mask, -1.0, 0.0), None


def rows(number, *, is_paired=True):
    def answer(n, length):
        ids = np.full(2 + length, n, dtype=np.int32)
        return Sample(f"{n}", ids, np.arange(len(ids)) >= 2)

    if is_paired:
        return [
            Preference(f"r{n}", (answer(n, 1 + n % 3), answer(n, 2)), (True, False))
            for n in range(number)
        ]
    return [Preference(f"r{n}", (answer(n, 1 + n % 3),), (n % 2 == 0,)) for n in range(number)]


@pytest.fixture
def start(tmp_path):
    """A run that starts: `start(section, *words)` returns its system, log and checkpoints."""

    def start(section, *words):
        path = write_preference_run(
            tmp_path, preference=section, checkpoint={"save_steps": 100}, policy={"lr": 1e-3}
        )
        config = load_config_as(PreferenceConfig, path, words).config
        is_paired = config.preference.is_paired
        made, held_out = (rows(n, is_paired=is_paired) for n in (NUM_ROWS, 3))
        data = PreferenceData(made, held_out, [NUM_ROWS])
        reference = Reference() if config.preference.has_reference else None
        system = PreferenceSystem(
            config,
            "cpu",
            Policy(),
            make_stream(config.data, data, seed=config.seed),
            data.held_out_sets,
            Restarts(config.recovery),
            reference=reference,
        )
        return system, data, Log(), RunDir(tmp_path / "run")

    return start


EVALUATED = ("--max_steps", "3", "--eval_steps", "2", "--data.split_dataset_ratio", "0.1")


def test_each_step_is_compared_and_held_out_rows_once(start):
    system, _, log, run = start({}, *EVALUATED)
    checkpoints = make_checkpoints(system, run)
    train_preference(system, log, checkpoints, Health([]))
    assert system.reference.asked == [6, 8, 8, 8]  # three held-out pairs, then four pairs a step
    for batch in system.policy.batches:
        assert batch.ref_logps.tolist() == (-1.0 * batch.completion_mask.sum(dim=1)).tolist()
    evaluated = [row for _, row in log.rows if "eval/loss" in row]
    assert [row["eval/rewards/margins"] for row in evaluated] == pytest.approx([0, 0.0], abs=1e-6)
    assert evaluated[0]["eval/loss"] == pytest.approx(np.log(2))
    assert evaluated[1]["eval/rewards/chosen"] == pytest.approx(-0.1 * 0.2 * 2)  # of two tokens
    trained = [row for _, row in log.rows if "num_tokens" in row]
    assert [row["epoch"] for row in trained] == pytest.approx([0.4, 0.8, 1.2])


def test_precomputed_log_probs_leave_the_reference(start, capsys):
    system, data, log, run = start({"precompute_ref_log_probs": True}, *EVALUATED)
    system.precompute(data)
    assert system.reference is None
    assert "the log-probs of 13 rows are computed, and kept" in capsys.readouterr().out
    train_preference(system, log, make_checkpoints(system, run), Health([]))
    for batch in system.policy.batches:
        assert batch.ref_logps.tolist() == (-1.0 * batch.completion_mask.sum(dim=1)).tolist()


def test_losses_without_a_reference_ask_none(start):
    system, _, log, run = start({"loss_type": "simpo"}, *EVALUATED)
    train_preference(system, log, make_checkpoints(system, run), Health([]))
    assert all(batch.ref_logps is None for batch in system.policy.batches)
    assert not any("time/ref_logprobs" in row for _, row in log.rows)


def test_ktos_kl_is_of_mismatched_answers_before_the_update(start):
    system, _, log, run = start({"loss_type": "kto"}, "--max_steps", "2")
    system.policy.compute_logprobs = lambda batch: (
        torch.where(batch.completion_mask, -0.5, 0.0),
        None,
    )
    train_preference(system, log, make_checkpoints(system, run), Health([]))
    assert system.reference.asked == [4, 4] * 2
    for batch, (_, row) in zip(system.policy.batches, log.rows, strict=True):
        tokens = batch.completion_mask.sum().item() / 4  # the same answers behind other prompts
        assert batch.kl.item() == pytest.approx(0.5 * tokens)
        assert row["kl"] == pytest.approx(0.5 * tokens)


@pytest.mark.parametrize("steps_at_once", [1, 8])
def test_ktos_kl_of_held_out_rows_is_of_all_of_them_however_they_are_cut(
    start, monkeypatch, steps_at_once
):
    monkeypatch.setattr("rlsys.systems.preference.STEPS_AT_ONCE", steps_at_once)
    system, *_ = start({"loss_type": "kto"}, *EVALUATED)
    held_out = rows(5, is_paired=False)  # a part of 4 and one of 1, or all together
    system.held_out_sets = {"": held_out}

    def compute_logprobs(batch):
        logprobs = -0.5 - 0.05 * batch.input_ids[:, :1] - 0.01 * batch.input_ids
        return torch.where(batch.completion_mask, logprobs, 0.0), None

    system.policy.compute_logprobs = compute_logprobs
    metrics = evaluate_preference(system)
    tokens = [row.answers[0].num_targets for row in held_out]
    ratios = [tokens[n - 1] * (0.5 - 0.05 * n - 0.01 * ((n - 1) % 5)) for n in range(5)]
    assert metrics["eval/kl"] == pytest.approx(np.mean(ratios))
    distances = [tokens[n] * (0.5 - 0.06 * n) - np.mean(ratios) for n in range(5)]
    losses = [
        1 / (1 + np.exp(0.1 * d * (1 if n % 2 == 0 else -1))) for n, d in enumerate(distances)
    ]
    assert metrics["eval/loss"] == pytest.approx(np.mean(losses))


def test_kto_without_a_reference_estimates_no_kl(start):
    words = ("--max_steps", "2", "--policy.global_batch_size", "1")
    system, _, log, run = start({"loss_type": "kto", "reference_free": True}, *words)
    train_preference(system, log, make_checkpoints(system, run), Health([]))
    assert all(batch.kl is None for batch in system.policy.batches)
    assert not any("kl" in row for _, row in log.rows)


def test_every_replica_of_the_reference_has_a_row_of_the_last_part(start):
    words = ("--reference.world_size", "3", "--reference.placement", "own")
    system, *_ = start({}, *words)
    assert [len(batch.lengths) for _, batch in system.parts(rows(33))] == [64, 6]


def test_a_run_that_ended_goes_on_with_the_rows_that_it_was_not_trained_on(start):
    whole, _, log, run = start({}, "--max_steps", "6")
    train_preference(whole, log, make_checkpoints(whole, run), Health([]))
    first, _, log, run = start({}, "--max_steps", "6")
    checkpoints = make_checkpoints(first, run)
    first.policy.fails_at = 4
    with pytest.raises(RuntimeError):
        train_preference(first, log, checkpoints, Health([]))
    save_last_step(first, run, checkpoints, started_from=0)
    folder = run.checkpoints / "step-3"
    assert json.loads((folder / "data.json").read_text())["samples"]["num_taken"] == 12
    second, _, log, run = start({}, "--max_steps", "6")
    second.load_checkpoint(folder)
    train_preference(second, log, make_checkpoints(second, run), Health([]))
    assert first.policy.seen + second.policy.seen == whole.policy.seen
