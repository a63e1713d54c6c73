"""Warnings come on curves that go wrong, once, and never on healthy ones with noise."""

from __future__ import annotations

import json
import math

import pytest
from config_cases import values
from health_curves import BAD, ONSET, evaluation, health_of, run
from hypothesis import given
from hypothesis import strategies as st
from tracking_cases import make_config

from rlsys.config import Config, SftConfig
from rlsys.driver import log
from rlsys.exit_codes import UNHEALTHY, of_error
from rlsys.files import encode_row, read_jsonl
from rlsys.problems import TrainingStopped
from rlsys.run.folder import RunDir
from rlsys.tracking import build_tracker
from rlsys.tracking.health import Health, rules_of
from rlsys.tracking.health.monitor import CALM_STEPS


def observe(health, rows, change=lambda step, row: None):
    """The warnings of a run."""
    found = []
    for step, row in rows:
        change(step, row)
        found += health.observe(step, row)
    return found


@pytest.mark.parametrize("name", BAD)
def test_a_bad_curve_is_a_warning_with_all_that_a_person_needs(name):
    found = observe(health_of(), run(), BAD[name])
    begun = [warning for warning in found if warning.event == "begin"]
    assert [warning.warning for warning in begun] == [name], [w.text for w in begun]
    [warning] = begun
    assert warning.step >= (60 if name == "held_out_stalls" else ONSET)
    assert len(warning.message) > 20
    assert len(warning.look_at) > 20
    if not math.isnan(warning.value):
        assert warning.value != warning.threshold
    at_most_ended_once = [w for w in found if w.event == "end"]
    assert len(at_most_ended_once) <= 1


def test_every_warning_has_a_bad_curve():
    fields = {*Config.model_fields["tracking"].annotation().health.model_dump()}
    assert set(BAD) == fields - {"reference_differs"}  # test_health_ends.py has that one


@given(seed=st.integers(0, 10**6), scale=st.floats(0, 1.0))
def test_noise_of_the_usual_size_is_never_a_warning(seed, scale):
    assert observe(health_of(), run(seed, steps=120, scale=scale)) == []


@given(seed=st.integers(0, 10**6))
def test_a_run_that_stands_still_is_never_a_warning(seed):
    assert observe(health_of(), run(seed, steps=120, learns=False)) == []


def test_a_problem_that_goes_away_is_over_and_may_come_again():
    def change(step, row):
        if "entropy" in row and (50 <= step < 60 or step >= 120):
            row["entropy"] = 0.01

    found = observe(health_of(), run(steps=160), change)
    assert [(w.warning, w.event) for w in found] == [
        ("entropy_collapse", "begin"),
        ("entropy_collapse", "end"),
        ("entropy_collapse", "begin"),
    ]
    begin, end, _ = found
    assert 60 + CALM_STEPS <= end.step <= 65 + CALM_STEPS
    assert f"began at step {begin.step}, is over" in end.message


def test_a_problem_that_flickers_is_said_once():
    def change(step, row):
        if "grad_norm" in row and step >= 50 and step % 10 == 0:
            row["grad_norm"] = 50.0

    assert len(observe(health_of(), run(steps=150), change)) == 1


def test_slower_steps_stay_slow_although_their_median_follows():
    found = observe(health_of(), run(steps=300), BAD["slow_step"])
    assert [w.event for w in found] == ["begin"]
    assert "rollout takes" in found[0].message


def test_short_steps_that_are_slow_for_a_moment_are_not_slow():
    """The machine does other things, too."""

    def change(step, row):
        if "time/step" in row:
            row |= {"time/step": 0.6 if 60 <= step < 75 else 0.2}

    assert observe(health_of(), run(), change) == []


def test_length_that_pays_is_not_an_explosion():
    def change(step, row):
        BAD["length_explosion"](step, row)
        if "reward" in row and step >= ONSET:
            row["reward"] = 1.2 + 0.02 * (step - ONSET)

    assert observe(health_of(), run(), change) == []


def test_rewards_on_another_scale_are_not_perfect():
    def change(step, row):
        if "reward" in row:
            row |= {"rewards/accuracy/mean": 0.995, "rewards/accuracy/std": 0.5}

    assert observe(health_of(), run(), change) == []


def test_sides_that_take_turns_do_not_idle():
    taking_turns = health_of(rollout={"max_staleness": 0})
    assert observe(taking_turns, run(), BAD["idle_engines"]) == []


@pytest.mark.parametrize("name", sorted(set(BAD) - {"mismatch", "empty_step"}))
def test_null_never_warns(name):
    off = False if name in ("no_reward", "empty_step") else None
    health = health_of(tracking={"health": {name: off}})
    assert observe(health, run(), BAD[name]) == []
    assert observe(health_of(tracking={"health": None}), run(), BAD[name]) == []


def test_thresholds_come_from_the_config():
    assert observe(health_of(tracking={"health": {"entropy_collapse": 0.6}}), run()) != []
    strict = health_of(tracking={"health": {"mismatch": 0.001}}, rollout={"max_staleness": 0})

    def on_policy(step, row):
        row["staleness/max"] = 0.0

    assert observe(strict, run(steps=5), on_policy)[0].threshold == 0.001


def test_a_resumed_run_knows_what_was_before_and_does_not_say_it_again():
    rows = [(step, dict(row)) for step, row in run()]
    for step, row in rows:
        BAD["entropy_collapse"](step, row)
    before = [json.loads(encode_row({"step": s} | row)) for s, row in rows if s <= 150]
    resumed = health_of()
    resumed.replay(before)
    later = [(step, row) for step, row in rows if step > 150]
    assert observe(resumed, later) == []
    assert [w.warning for w in observe(health_of(), rows)] == ["entropy_collapse"]


@given(cut=st.integers(1, 199))
def test_a_resume_changes_no_warning(cut):
    rows = [(step, dict(row)) for step, row in run()]
    for step, row in rows:
        BAD["slow_step"](step, row)
    whole = [(w.step, w.text) for w in observe(health_of(), rows)]
    first, second = health_of(), health_of()
    found = observe(first, [(s, r) for s, r in rows if s <= cut])
    second.replay(json.loads(encode_row({"step": s} | r)) for s, r in rows if s <= cut)
    found += observe(second, [(s, r) for s, r in rows if s > cut])
    assert [(w.step, w.text) for w in found] == whole


def test_stop_on_ends_the_run_after_the_warning_is_on_record(tmp_path):
    tracking = {"stop_on": ["entropy_collapse"], "report_to": []}
    config = make_config(tmp_path / "run", tracking=tracking)
    tracker = build_tracker(config)
    health = Health(rules_of(config, dtype="bfloat16"), config.tracking.stop_on)

    def train():
        for step, row in run():
            BAD["entropy_collapse"](step, row)
            log(tracker, health, step, row)

    with pytest.raises(TrainingStopped, match=r"tracking\.stop_on names entropy_collapse") as ended:
        train()
    tracker.close()
    assert of_error(ended.value) == UNHEALTHY
    [row] = read_jsonl(RunDir(tmp_path / "run").warnings)
    assert row["warning"] == "entropy_collapse"
    assert row["event"] == "begin"
    assert row["value"] < row["threshold"]
    assert row["metric"] == "entropy"
    assert set(row) == {
        *("time", "step", "warning", "metric", "value", "threshold", "message", "look_at"),
        "event",
    }


def test_a_resume_drops_warnings_of_steps_that_are_taken_again(tmp_path):
    config = make_config(tmp_path / "run", tracking={"report_to": []})
    health = Health(rules_of(config, dtype="bfloat16"))
    tracker = build_tracker(config)
    for step, row in run():
        BAD["entropy_collapse"](step, row)
        log(tracker, health, step, row)
    tracker.close()
    [row] = read_jsonl(RunDir(tmp_path / "run").warnings)
    build_tracker(config, resumed_from=row["step"]).close()
    assert len(list(read_jsonl(RunDir(tmp_path / "run").warnings))) == 1
    build_tracker(config, resumed_from=row["step"] - 1).close()
    assert list(read_jsonl(RunDir(tmp_path / "run").warnings)) == []


@pytest.mark.parametrize(
    ("tracking", "words"),
    [
        ({"stop_on": ["entropy_colapse"]}, "names 'entropy_colapse'"),
        ({"stop_on": ["overfitting"]}, "names 'overfitting'"),
        ({"stop_on": ["kl_runaway"], "health": {"kl_runaway": None}}, "names 'kl_runaway'"),
        ({"stop_on": ["kl_runaway"], "health": None}, "tracking.health is null"),
    ],
)
def test_stop_on_names_warnings_that_the_run_gives(tracking, words):
    with pytest.raises(ValueError, match=words):
        Config.model_validate(values(tracking=tracking))


# --- supervised training -------------------------------------------------------------------------


def supervised(held_out):
    """A run of `rlsys sft` with these held-out losses, one every ten steps."""
    config = SftConfig.model_validate(
        {
            "output_dir": "run",
            "max_steps": 100,
            "data": {"dataset": ["train.jsonl"]},
            "model": {"path": "model"},
        }
    )
    health, found = Health(rules_of(config, dtype="bfloat16"), config.tracking.stop_on), []
    for number, loss in enumerate(held_out):
        for step in range(10 * number - 9, 10 * number + 1):
            if step > 0:
                row = {"loss": 2.0 * 0.98**step, "grad_norm": 1.0, "time/step": 1.0}
                found += health.observe(step, row)
        found += health.observe(10 * number, {"eval/loss": loss, "eval/perplexity": math.exp(loss)})
    return found


def test_a_held_out_loss_that_rises_is_overfitting():
    [warning] = supervised([2.0, 1.6, 1.5, 1.55, 1.6, 1.7, 1.8])
    assert (warning.warning, warning.metric, warning.step) == ("overfitting", "eval/loss", 40)
    assert "was 1.5 after step 20" in warning.message


@pytest.mark.parametrize(
    "losses", [[2.0, 1.6, 1.5, 1.45, 1.42, 1.4], [2.0, 1.5, 1.51, 1.5, 1.52, 1.5], [1.5, 1.6, 1.4]]
)
def test_a_held_out_loss_that_falls_or_stays_is_not(losses):
    assert supervised(losses) == []


def test_an_evaluation_alone_is_nothing_to_warn_of():
    assert observe(health_of(), [(0, evaluation(0.5))]) == []
