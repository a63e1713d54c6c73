"""The loop of supervised training: what it logs, and what a checkpoint of it continues with."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from config_cases import write_sft_run

from rlsys.actors.recovery import Restarts
from rlsys.config import SftConfig
from rlsys.config.load import load_config_as
from rlsys.data.samples import SampleData
from rlsys.data.streams.make import make_sample_stream
from rlsys.driver import train_sft
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.saving import make_checkpoints, save_last_step
from rlsys.system import SftSystem
from rlsys.tracking.base import Tracker
from rlsys.tracking.health import Health
from rlsys.types import Sample, UpdateOutput

NUM_SAMPLES = 11


class Policy:
    """Notes which samples it is trained on: the first token of each."""

    timeout_s = 1000.0

    def __init__(self):
        self.policy_version, self.seen, self.fails_at = 0, [], None

    def update(self, batch):
        if self.policy_version + 1 == self.fails_at:
            raise RuntimeError("out of memory")
        self.seen += batch.input_ids[:, 0].tolist()
        self.policy_version += 1
        return UpdateOutput(self.policy_version, {"loss": 0.5})

    def compute_predictions(self, batch):
        """Every second token is the likeliest."""
        is_odd = torch.arange(batch.input_ids.shape[1]) % 2 == 1
        return torch.where(batch.completion_mask, -0.5, 0.0), is_odd * batch.completion_mask

    def finished_version(self):
        return self.policy_version

    def peak_memory_gib(self):
        return 1.0

    def save_model(self, folder):
        folder.mkdir(parents=True)

    def begin_model(self, folder):
        raise AssertionError("no models are kept")

    def begin_checkpoint(self, folder):
        (folder / "version").write_text(str(self.policy_version))
        return dict

    def load_checkpoint(self, folder):
        self.policy_version = int((folder / "version").read_text())


class Log(Tracker):
    def __init__(self):
        self.rows = []

    def log_metrics(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self):
        raise AssertionError("trackers are closed by whoever built them")


def samples(number):
    masks = [np.arange(2 + n % 5) > 0 for n in range(number)]
    return [
        Sample(f"r{n}", np.full(len(mask), n, dtype=np.int32), mask) for n, mask in enumerate(masks)
    ]


@pytest.fixture
def start(tmp_path):
    """A run that starts: `start(*words)` returns its system, log and checkpoints."""
    path = write_sft_run(tmp_path, checkpoint={"save_steps": 100})

    def start(*words):
        config = load_config_as(SftConfig, path, [*words, "--policy.global_batch_size", "4"]).config
        data = SampleData(samples(NUM_SAMPLES), samples(3), [NUM_SAMPLES])
        stream = make_sample_stream(config, data)
        system = SftSystem(
            config, "cpu", Policy(), stream, data.held_out_sets, Restarts(config.recovery)
        )
        run = RunDir(tmp_path / "run")
        return SimpleNamespace(
            system=system, log=Log(), run=run, checkpoints=make_checkpoints(system, run)
        )

    return start


def test_epoch_tokens_and_the_held_out_loss_are_logged(start):
    run = start("--max_steps", "3", "--eval_steps", "2", "--data.split_dataset_ratio", "0.1")
    train_sft(run.system, run.log, run.checkpoints, Health([]))
    run.checkpoints.finish()
    steps = [(step, "eval/loss" in row) for step, row in run.log.rows]
    assert steps == [(0, True), (1, False), (2, False), (2, True), (3, False)]
    tokens = np.cumsum([2 + n % 5 for n in run.system.policy.seen])[3::4].tolist()
    trained = [row for _, row in run.log.rows if "num_tokens" in row]
    assert [row["num_tokens"] for row in trained] == tokens
    assert [row["epoch"] for row in trained] == pytest.approx([4 / 11, 8 / 11, 12 / 11])
    assert run.log.rows[0][1] == pytest.approx(
        {
            "eval/loss": 0.5,
            "eval/perplexity": np.exp(0.5),
            "eval/mean_token_accuracy": 4 / 6,
            "eval/num_loss_tokens": 6,
        }
    )


@pytest.mark.parametrize("group", ["false", "true"])
@pytest.mark.parametrize("ends", ["in the update", "in the data"])
def test_a_run_that_ended_goes_on_with_the_samples_that_it_was_not_trained_on(start, group, ends):
    words = ("--max_steps", "9", "--sft.group_by_length", group)
    whole = start(*words)
    train_sft(whole.system, whole.log, whole.checkpoints, Health([]))
    whole.checkpoints.finish()
    first = start(*words, "--output_dir", "other")
    if ends == "in the update":
        first.system.policy.fails_at = 5
    else:
        take = first.system.samples.take

        def interrupted(n):
            found = take(n)
            if first.system.policy.policy_version == 4:
                raise KeyboardInterrupt
            return found

        first.system.samples.take = interrupted
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        train_sft(first.system, first.log, first.checkpoints, Health([]))
    save_last_step(first.system, first.run, first.checkpoints, started_from=0)
    assert 4 in checkpoint_steps(first.run.checkpoints)
    folder = first.run.checkpoints / "step-4"
    assert json.loads((folder / "data.json").read_text())["samples"]["num_taken"] == 16
    second = start(*words)
    second.system.load_checkpoint(folder)
    train_sft(second.system, second.log, second.checkpoints, Health([]))
    assert first.system.policy.seen + second.system.policy.seen == whole.system.policy.seen
    assert second.log.rows[-1][1]["num_tokens"] == whole.log.rows[-1][1]["num_tokens"]
