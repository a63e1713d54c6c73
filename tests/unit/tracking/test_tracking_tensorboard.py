import math

import pytest
from tracking_cases import make_config, make_group

from rlsys.run.folder import RunDir
from rlsys.tracking.completions import STEPS_BETWEEN_TEXTS
from rlsys.tracking.tensorboard import TensorBoardTracker

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(run: RunDir):
    events = accumulators.EventAccumulator(str(run.tensorboard))
    events.Reload()
    return events


def test_numbers_and_now_and_then_a_group_are_there_after_a_resume(tmp_path):
    run = RunDir(tmp_path)
    config = make_config(tmp_path)
    killed = TensorBoardTracker(config, None)
    for step in (1, 2, 3):
        killed.log_metrics(step, {"reward": step, "kl": math.nan, "elapsed_time": "3s"})
    killed.close()
    resumed = TensorBoardTracker(config, 2)
    resumed.log_metrics(3, {"reward": 33})
    for step in (STEPS_BETWEEN_TEXTS, STEPS_BETWEEN_TEXTS + 1):
        group = make_group(["```\n<b>", "b"], [1.0, 0.0])
        resumed.log_completions(step, group, None)
    resumed.close()
    events = read(run)
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(1, 1), (2, 2), (3, 33)]
    assert math.isnan(events.Scalars("kl")[0].value)
    assert "elapsed_time" not in events.Tags()["scalars"]
    texts = {tag.partition("/")[0]: tag for tag in events.Tags()["tensors"]}
    assert set(texts) == {"config", "environment", "completions"}
    assert b'"num_generations": 2' in events.Tensors(texts["config"])[0].tensor_proto.string_val[0]
    (text,) = events.Tensors(texts["completions"])
    assert text.step == STEPS_BETWEEN_TEXTS
    assert b"    ```\n    <b>" in text.tensor_proto.string_val[0]
