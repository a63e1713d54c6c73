"""A whole run that runs ahead, stopped and resumed: nothing too stale, nothing trained twice.

The same where an engine is killed, with one engine and with two.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from run_cases import NUM_PROMPTS, G, RunProcess, write_run_files

from rlsys.files import read_jsonl

pytestmark = [pytest.mark.system, pytest.mark.slow]

MAX_STALENESS = 1
NUM_ROWS = 100
WORDS = (
    *("run.yaml", "--grpo.beta", "0", "--data.shuffle", "false"),
    *("--rollout.max_staleness", str(MAX_STALENESS), "--rollout.dynamic_sample", "true"),
)


@pytest.fixture(scope="module", params=[None, 1, 2], ids=["whole", "one engine", "two engines"])
def rows(request, starter_model, tmp_path_factory):
    """Rows of metrics, completions and filtered completions of six steps in two lives.

    With a number of engines as parameter, one of them is killed in the first life.
    """
    folder = tmp_path_factory.mktemp("ahead")
    write_run_files(folder, starter_model)
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"train {i}"}) + "\n" for i in range(NUM_ROWS))
    )
    for max_steps, more in ((4, ()), (6, ("--checkpoint.resume",))):
        engines = ("--rollout.num_engines", str(request.param or 1))
        run = RunProcess(folder, *WORDS, *engines, "--max_steps", str(max_steps), *more)
        if request.param and not more:
            run.wait_for(lambda run=run: '"step": 1' in read_text(run.out.metrics))
            run.actors("RolloutActor")[0].kill()
        assert run.wait() == 0, run.log
        assert ("Restarting it" in run.log) == bool(request.param) or more, run.log
        run.wait_for_no_process()
    splits = ("train", "filtered")
    completions = [[*read_rows(run.out.completions_of(split))] for split in splits]
    return list(read_jsonl(run.out.metrics)), *completions


def read_text(path):
    return path.read_text() if path.exists() else ""


def read_rows(path):
    return read_jsonl(path) if path.exists() else []


def test_nothing_is_staler_than_allowed_and_something_is_stale(rows):
    metrics, completions, _ = rows
    staleness = [row["step"] - 1 - row["policy_versions"][0] for row in completions]
    assert set(staleness) == {0, MAX_STALENESS}
    steps = [row for row in metrics if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        of_step = [
            s for s, c in zip(staleness, completions, strict=True) if c["step"] == row["step"]
        ]
        assert row["staleness/max"] == max(of_step)
        assert row["staleness/mean"] == pytest.approx(sum(of_step) / len(of_step))
        assert len(of_step) == NUM_PROMPTS * G


def test_spans_begin_at_the_first_token_and_follow_each_other(rows):
    _, completions, _ = rows
    for row in completions:
        versions, starts = row["policy_versions"], row["version_starts"]
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        assert starts[-1] < row["num_tokens"]
        assert versions == list(range(versions[0], versions[0] + len(versions)))


def test_no_prompt_is_used_twice_and_none_is_passed_over(rows):
    _, completions, filtered = rows
    uses = Counter(row["prompt_id"] for row in [*completions, *filtered])
    assert set(uses.values()) == {G}
    numbers = sorted(int(prompt_id.split(":")[1]) for prompt_id in uses)
    # What is not trained on yet at the end was taken last, but for a straggler or two.
    assert numbers[-1] <= len(numbers) + MAX_STALENESS * NUM_PROMPTS


def test_evaluations_are_of_the_version_of_their_step(rows, tmp_path):
    metrics, _, _ = rows
    assert [row["step"] for row in metrics if "eval/reward" in row] == [0, 2, 4, 6]
