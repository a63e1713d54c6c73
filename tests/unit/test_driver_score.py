"""The loop of a score head: what it logs, and what a checkpoint of it continues with."""

import numpy as np
import pytest
from config_cases import write_reward_model_run
from test_driver_sft import Log
from test_driver_sft import Policy as SftPolicy

from rlsys.actors.recovery import Restarts
from rlsys.config import RewardModelConfig
from rlsys.config.load import load_config_as
from rlsys.data.scored import ScoreData
from rlsys.data.streams.make import make_stream
from rlsys.driver import train_score
from rlsys.run.folder import RunDir
from rlsys.saving import make_checkpoints
from rlsys.systems.score import ScoreSystem
from rlsys.tracking.health import Health
from rlsys.types import ScoredRow


class Policy(SftPolicy):
    """The score of a text is its first token; the metrics of a step are those of the engine."""

    def compute_scores(self, batch):
        return batch.input_ids[:, :1].float()


def rows(number):
    """Pairs of which the chosen text begins with a larger token, but for the first."""
    made = []
    for n in range(number):
        first = (3, 9) if n == 0 else (9, 3)
        texts = tuple(np.full(4, token, dtype=np.int32) for token in first)
        made.append(ScoredRow(f"a:{n}", texts, (0.0,)))
    return made


@pytest.fixture
def system(tmp_path):
    path = write_reward_model_run(tmp_path)
    words = ["--max_steps", "3", "--eval_steps", "3", "--data.split_dataset_ratio", "0.1"]
    config = load_config_as(RewardModelConfig, path, words).config
    data = ScoreData(rows(10), rows(5), [10])
    stream = make_stream(config.data, data, seed=0)
    restarts = Restarts(config.recovery, table=tmp_path / "actors.jsonl")
    return ScoreSystem(config, "cpu", Policy(), stream, data.held_out_sets, restarts)


def test_steps_and_held_out_pairs_are_logged(system, tmp_path):
    log, run_dir = Log(), RunDir(tmp_path / "run")
    checkpoints = make_checkpoints(system, run_dir)
    train_score(system, log, checkpoints, Health([], []))
    checkpoints.finish()
    by_step = {}
    for step, metrics in log.rows:
        by_step[step] = by_step.get(step, {}) | metrics
    assert by_step[0]["eval/accuracy"] == pytest.approx(0.8)
    assert by_step[0]["eval/margin"] == pytest.approx((4 * 6 - 6) / 5)
    assert by_step[0]["eval/num_pairs"] == 5
    assert (by_step[0]["eval/min_reward"], by_step[0]["eval/max_reward"]) == (3.0, 9.0)
    assert by_step[2]["num_tokens"] == 2 * 4 * 2 * 4
    assert by_step[3]["epoch"] == pytest.approx(1.2)
    assert "eval/loss" in by_step[3]
    assert len(system.policy.seen) == 3 * 4 * 2  # two texts of four pairs, three times
