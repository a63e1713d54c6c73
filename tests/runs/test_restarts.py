"""`--max_restarts`: a driver that is killed, or loses a node, goes on to the same end by itself."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
import torch
from run_cases import RunProcess, is_alive, title, without_clock, write_run_files
from safetensors.torch import load_file
from two_nodes import TwoNodes, can_hide_folders

from rlsys.files import read_jsonl

pytestmark = [pytest.mark.system, pytest.mark.slow]

WORDS = (
    *("run.yaml", "--max_steps", "3", "--grpo.beta", "0", "--eval_steps", "null"),
    *("--checkpoint.save_steps", "1", "--checkpoint.save_hf_steps", "null"),
    *("--recovery.backoff_s", "0"),
)
IN_STEP_2 = 4 + 1
"""Groups that are scored by then."""


@pytest.fixture(scope="module")
def start(starter_model, tmp_path_factory):
    """`start(name, *words)` begins a run in its own directory."""
    root = tmp_path_factory.mktemp("runs")
    started = []

    def start(name, *words, **options):
        write_run_files(root / name, starter_model)
        started.append(RunProcess(root / name, *WORDS, *words, **options))
        return started[-1]

    yield start
    for run in started:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(start):
    run = start("undisturbed")
    assert run.wait() == 0, run.log
    return run


def same_end(run, undisturbed):
    """Metrics but for the clock, completions and final weights, bit for bit."""
    for file in ("metrics", "completions"):
        rows, expected = (
            sorted(map(repr, map(without_clock, read_jsonl(getattr(one.out, file)))))
            for one in (run, undisturbed)
        )
        assert rows == expected
    weights, expected = (
        load_file(one.out.final / "model.safetensors") for one in (run, undisturbed)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def driver_of(run):
    """The process that the parent watches."""
    return run.wait_for(
        lambda: [p for p in psutil.Process(run.popen.pid).children() if "rlsys.cli" in title(p)]
    )[0]


def go_on(run):
    """Let the reward functions of this and later attempts go on."""
    (run.folder / "hold_after").unlink()
    run.release()


def test_a_killed_driver_is_started_again_and_comes_to_the_same_end(start, undisturbed):
    run = start("killed", "--max_restarts", "1", hold_after=IN_STEP_2)
    run.wait_until_held()
    run.wait_for((run.out.checkpoints / "step-1").is_dir)
    driver_of(run).kill()
    go_on(run)
    assert run.wait() == 0, run.log
    (line,) = [text for text in run.log.splitlines() if text.startswith("rlsys: restart")]
    step = run.out.checkpoints / "step-1"
    assert line.startswith(f"rlsys: restart 1 of 1, from {Path('out/checkpoints/step-1')}, in 0 s:")
    assert "killed by SIGKILL (after step 1)" in line
    assert f"continuing from {step.resolve()}" in run.log
    run.wait_for_no_process()
    same_end(run, undisturbed)


def test_ctrl_c_of_a_watched_run_is_one_stop(start):
    run = start("stopped", "--max_restarts", "1", hold_after=IN_STEP_2)
    run.wait_until_held()
    run.interrupt(signal.SIGINT)
    assert run.wait() == 130, run.log
    run.wait_for_no_process()
    assert run.log.count("interrupted") == 1
    assert "saved step 1" in run.log or "step 1, the last one, was saved already" in run.log
    assert "restart" not in run.log


@pytest.mark.skipif(not can_hide_folders(), reason="no user namespaces")
def test_a_lost_node_is_waited_for(start, undisturbed, tmp_path):
    """The head has no CPU for actors, so all of them are on a node that is killed; another one
    joins later."""
    nothing = tmp_path / "hidden"
    nothing.mkdir()
    nodes = TwoNodes(tmp_path, nothing, cpus=(0, 1))
    try:
        # Without replacing actors, so that the driver ends.
        words = ("--max_restarts", "1", "--recovery.max_restarts", "0")
        run = start("lost", *words, hold_after=IN_STEP_2, environment=dict(nodes.env))
        run.wait_until_held()
        run.wait_for((run.out.checkpoints / "step-1").is_dir)
        nodes.kill_second()
        go_on(run)
        run.wait_for(lambda: "waiting for CPUs" in run.log)
        assert "recovery.wait_for_resources_s" in run.log
        nodes.start_second()
        assert run.wait() == 0, run.log
        assert "rlsys: restart 1 of 1, from out/checkpoints/step-1" in run.log
        same_end(run, undisturbed)
        assert not [each for each in run.processes() if is_alive(each)]
    finally:
        nodes.stop()


@pytest.mark.skipif(not can_hide_folders(), reason="no user namespaces")
def test_a_head_that_comes_back_finds_the_run(start, undisturbed, tmp_path):
    """Ray itself forgets everything: the driver starts again, with actors of its own."""
    nothing = tmp_path / "hidden"
    nothing.mkdir()
    nodes = TwoNodes(tmp_path, nothing, cpus=(1, 0))
    try:
        environment = dict(nodes.env)
        run = start(
            "headless", "--max_restarts", "1", hold_after=IN_STEP_2, environment=environment
        )
        run.wait_until_held()
        run.wait_for((run.out.checkpoints / "step-1").is_dir)
        nodes.kill_both()
        go_on(run)
        run.wait_for(lambda: "waiting for the Ray cluster" in run.log)
        nodes.start_head()
        assert run.wait() == 0, run.log
        assert "rlsys: restart 1 of 1, from out/checkpoints/step-1" in run.log
        same_end(run, undisturbed)
        assert not [each for each in run.processes() if is_alive(each)]
    finally:
        nodes.stop()
