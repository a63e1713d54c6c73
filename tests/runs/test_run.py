"""Whole runs through `rlsys grpo`: what they leave behind, and that they can be repeated."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import pytest
import torch
import yaml
from run_cases import NUM_PROMPTS, G, RunProcess, without_clock, write_run_files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys import cli
from rlsys.files import read_jsonl
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).parents[2]

LOG_LINE_KEYS = {
    *("loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std"),
    *(f"rewards/{name}/{part}" for name in ("digits", "format") for part in ("mean", "std")),
    *(f"completions/{name}" for name in ("mean_length", "min_length", "max_length")),
    *("completions/clipped_ratio", "kl", "clip_ratio/low_mean", "clip_ratio/low_min"),
    *("clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean", "epoch"),
    *("global_step/max_steps", "percentage", "elapsed_time", "remaining_time", "memory(GiB)"),
    *("train_speed(iter/s)", "policy_version", "rollout/tokens_per_second"),
    *("update/tokens_per_second", "sampling/logp_difference/mean", "sampling/logp_difference/max"),
    *(f"time/{phase}" for phase in ("rollout", "advantages", "ref_logprobs", "policy_update")),
    *("time/weight_sync", "time/step"),
}
"""What every step's line holds: ms-swift's keys and those that rlsys promises besides."""

EPOCHS = ("--num_train_epochs", "1.6")
"""Of ten prompts, with four a step."""
GROUPS_BEFORE_STEP_2, GROUPS_BEFORE_STEP_3 = 3 + 4, 3 + 4 + 4 + 3
"""Scored by then: an evaluation, one or two steps, another evaluation."""


@pytest.fixture(scope="module")
def start(starter_model, tmp_path_factory):
    """`start(name, *words)` begins a run in its own directory; the same name, in the same one."""
    root = tmp_path_factory.mktemp("runs")
    started = []

    def start(name, *words, **options):
        if not (root / name).exists():
            write_run_files(root / name, starter_model)
        started.append(RunProcess(root / name, *words, **options))
        return started[-1]

    yield start
    for run in started:
        run.end()


@pytest.fixture(scope="module")
def whole(start):
    """A run of four steps that nothing disturbed; the file says so, and the command line too."""
    run = start("whole", "run.yaml", *EPOCHS)
    assert run.wait() == 0, run.log
    return run


@pytest.fixture(scope="module")
def broken(start):
    """The same run, without restarts: its policy is killed in step 3, while rewards compute."""
    words = ("run.yaml", *EPOCHS, "--recovery.max_restarts", "0")
    run = start("broken", *words, hold_after=GROUPS_BEFORE_STEP_3)
    run.wait_until_held()
    run.wait_for(lambda: checkpoint_steps(run.out.checkpoints) == [2])  # which a thread writes
    (policy,) = run.actors("PolicyRank")
    policy.kill()
    run.release()
    run.exit_code = run.wait()
    run.rows_left = list(read_jsonl(run.out.metrics))
    return run


@pytest.fixture(scope="module")
def interrupted(start):
    """The same run, stopped by Ctrl-C in step 2, long before its first checkpoint is due."""
    words = ("run.yaml", *EPOCHS, "--checkpoint.save_steps", "4")
    run = start("interrupted", *words, hold_after=GROUPS_BEFORE_STEP_2 + 1)
    run.wait_until_held()
    with pytest.raises(ValueError, match="another process is running in"), run.out.held():
        pass
    run.interrupt()
    run.exit_code = run.wait()
    run.wait_for_no_process()
    run.lines = run.log.splitlines()
    run.had_ended = run.out.has_ended()
    run.steps_taken = [row["step"] for row in steps(run)]
    run.saved = run.folder / "saved"  # a resumed run replaces it
    shutil.copytree(run.out.checkpoints / "step-1", run.saved)
    with run.out.held():
        pass
    return run


@pytest.fixture(scope="module")
def resumed(interrupted, start):
    """The interrupted run, continued from what it saved."""
    run = start("interrupted", "run.yaml", "--checkpoint.resume", *EPOCHS)
    assert run.wait() == 0, run.log
    return run


def steps(run):
    """Metrics of the training steps, in order."""
    rows = read_jsonl(run.out.metrics)
    return [row for row in rows if "reward" in row]


def evaluations(run):
    """Metrics of the evaluations, in order."""
    return [row for row in read_jsonl(run.out.metrics) if "eval/reward" in row]


# --- what a run leaves behind ---------------------------------------------------------------------


def test_every_actor_is_in_the_table_and_what_it_printed_in_its_log(whole, capsys):
    rows = json.loads(whole.out.actors.read_text())
    assert {row["role"] for row in rows} == {"policy", "reference", "rollout", "reward"}
    for row in rows:
        assert row["name"] == f"{row['role']}-{row['rank']}"
        assert row["restarts"] == 0
        assert row["pid"] is not None
        assert row["memory_gib"] > 0
    console = [line for line in whole.log.splitlines() if re.match(r"step \d", line)]
    assert cli.main(["logs", str(whole.out.path), "--role", "driver"]) == 0
    shown = re.findall(r"driver-0 \S+ \S+ (step \d.*)", capsys.readouterr().out)
    assert shown == console
    (pid,) = [row["pid"] for row in rows if row["role"] == "reward"]
    log = (whole.out.logs / "reward-0.log").read_text()
    assert re.fullmatch(rf"\S+ \S+ --- process {pid} on \S+\n\S+ \S+ digits is ready\n", log)
    assert re.search(rf"\(reward-0 pid={pid}\) digits is ready", whole.log), "the terminal says it"


def test_every_step_has_a_line_with_the_promised_keys(whole):
    assert [row["step"] for row in steps(whole)] == [1, 2, 3, 4]
    for row in steps(whole):
        assert LOG_LINE_KEYS - row.keys() == set()
        assert row["policy_version"] == row["step"]
        assert row["global_step/max_steps"] == f"{row['step']}/4"
        assert row["epoch"] == pytest.approx(row["step"] * NUM_PROMPTS / 10)


def test_every_metric_is_documented(whole):
    text = (REPOSITORY / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    known = [re.sub(r"<\w+>", ".+", re.escape(name)) for name in names]
    documented = re.compile("|".join(known))
    keys = {key for row in read_jsonl(whole.out.metrics) for key in row} - {"step"}
    assert [key for key in sorted(keys) if not documented.fullmatch(key)] == []


def test_the_policy_that_is_trained_is_the_one_that_sampled(whole):
    for row in steps(whole):
        for name in ("ratio/mean", "ratio/min", "ratio/max"):
            assert row[name] == pytest.approx(1.0, abs=1e-6)
        assert {row[key] for key in row if key.startswith("clip_ratio/")} == {0.0}
        assert row["sampling/logp_difference/mean"] < 1e-5  # fp32


def test_the_policy_leaves_the_reference_with_its_first_update(whole):
    first, *later = steps(whole)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(row["kl"] > 1e-6 for row in later)
    assert all(row["grad_norm"] > 0 for row in steps(whole))


def test_held_out_prompts_are_evaluated_before_and_every_two_steps(whole):
    assert [row["step"] for row in evaluations(whole)] == [0, 2, 4]
    completions = list(read_jsonl(whole.out.eval_completions))
    assert [row["step"] for row in completions] == [0] * 3 + [2] * 3 + [4] * 3
    assert [row["policy_versions"] for row in completions] == [[row["step"]] for row in completions]


@pytest.mark.slow
def test_checkpoints_are_evaluated_to_what_the_run_itself_found(whole, capsys, monkeypatch):
    words = ["eval", "out/checkpoints/step-2", "out", "--out", "evaluated"]
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", *words],
        cwd=whole.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "out final - out/checkpoints/step-2" in done.stdout
    monkeypatch.chdir(whole.folder)
    folders = ["evaluated/out-checkpoints-step-2", "evaluated/out-final"]
    in_run = list(read_jsonl(whole.out.eval_completions))
    known = ("prompt_id", "index", "text", "reward", "rewards", "num_tokens", "finish_reason")
    logged = {row["step"]: row["eval/reward"] for row in evaluations(whole)}
    for step, folder in zip((2, 4), folders, strict=True):
        rows = list(read_jsonl(RunDir(Path(folder)).eval_completions))
        own = [row for row in in_run if row["step"] == step]
        found, expected = (
            [{k: row[k] for k in known} for row in sorted(some, key=itemgetter("group_id"))]
            for some in (rows, own)
        )
        assert found == expected
        result = json.loads((Path(folder) / "eval.json").read_text())
        assert result["scores"][""]["reward"]["mean"] == pytest.approx(logged[step])
        assert cli.main(["completions", folder, "--eval"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--compare", *folders]) == 0
    assert "Two-sided paired t-test over prompts" in capsys.readouterr().out
    assert cli.main([*words]) == 2  # an evaluation is never overwritten
    assert "--out evaluated exists already" in capsys.readouterr().err


def test_every_completion_is_on_record_with_its_rewards(whole):
    groups = defaultdict(list)
    for row in read_jsonl(whole.out.completions):
        groups[row["step"], row["group_id"]].append(row)
        assert row["rewards"].keys() == {"digits", "format"}
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))
        assert row["policy_versions"] == [row["step"] - 1]
        assert 1 <= row["num_tokens"] <= 24
        assert row["finish_reason"] == "stop" or row["num_tokens"] == 24
    assert groups.keys() == {(s, p) for s in (1, 2, 3, 4) for p in range(NUM_PROMPTS)}
    for rows in groups.values():
        assert [row["index"] for row in rows] == list(range(G))
        assert sum(row["advantage"] for row in rows) == pytest.approx(0.0, abs=1e-5)
    for row in steps(whole):
        rewards = [c["reward"] for p in range(NUM_PROMPTS) for c in groups[row["step"], p]]
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_completions_can_be_read(whole, capsys):
    assert cli.main(["completions", str(whole.out.path), "--step", "2"]) == 0
    assert capsys.readouterr().out.count("step 2, group") == NUM_PROMPTS


def test_the_final_model_is_a_folder_that_transformers_loads(whole, starter_model):
    model = AutoModelForCausalLM.from_pretrained(whole.out.final, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole.out.final)
    chat = [{"role": "user", "content": "1 + 1?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert model(**ids).logits.isfinite().all()
    before = load_file(starter_model / "model.safetensors")
    after = load_file(whole.out.final / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > len(before) // 2


def test_models_are_kept_during_the_run_and_exported_after_it(whole, tmp_path):
    assert [path.name for path in whole.out.hf.iterdir()] == ["step-3"]
    kept, final = (
        load_file(folder / "model.safetensors")
        for folder in (whole.out.hf / "step-3", whole.out.final)
    )
    assert kept.keys() == final.keys()
    assert any(not torch.equal(kept[name], final[name]) for name in kept)
    for step, expected in (((), final), (("--step", "3"), kept)):
        out = tmp_path / "-".join(["out", *step])
        words = ["export", str(whole.out.path), "--to", "hf", str(out), *step]
        assert cli.main([*words, "--test_convert_precision"]) == 0
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
        assert not (out / "rollouts.json").exists()


def test_the_curve_and_tensorboard_are_there(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert whole.out.reward_curve.read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(whole.out.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4]


def test_the_saved_config_is_accepted_as_it_is(whole, capsys, monkeypatch):
    monkeypatch.chdir(whole.folder)
    saved = str(whole.out.config)
    assert cli.main(["explain", saved, "--output_dir", "elsewhere"]) == 0
    values = yaml.safe_load(whole.out.config.read_text())
    assert values["rollout"]["generation_batch_size"] == NUM_PROMPTS * G
    assert values["grpo"]["epsilon"] == 0.2  # a default, written out


def test_another_run_into_the_same_folder_is_refused_with_the_remedy(whole, capsys, monkeypatch):
    monkeypatch.chdir(whole.folder)
    assert cli.main(["grpo", "run.yaml"]) == 2
    message = capsys.readouterr().err
    assert "holds another run" in message
    assert "--checkpoint.resume" in message
    assert "--output_dir" in message


def test_a_run_on_a_pipe_prints_lines_of_its_own_and_nothing_else(whole):
    log, _, table = whole.log.partition("\nWhere the time went, steps 1 to 4: ")
    assert "change first: " in table
    train, validation, length, saving, environment, first, *lines, last = log.splitlines()
    assert environment.startswith("environment: rlsys ")
    assert saving.startswith(
        "saving: checkpoints every 2 of 4 steps, after the last step, and on Ctrl-C"
    )
    assert train == "data: train.jsonl: 10 of 10 rows used"
    assert validation == "data: validation.jsonl: 3 of 3 rows used"
    assert length == "num_train_epochs 1.6 x 10 prompts / 4 per step = 4 steps"
    assert first == "starting on cpu: policy 1, rollout 1, reference 1, reward 1"
    # The reward function of these runs prints a line, which takes a moment to arrive.
    of_reward = re.compile(r"\(reward-0 pid=\d+\) digits is ready$")
    lines = [line for line in lines if not of_reward.match(line)]
    start = re.compile(r"waiting for |ready after \d+ s$|note: Ray's node died")
    while start.match(lines[0]):  # of a machine that takes longer than ten seconds
        lines.pop(0)
    for line in lines:
        assert re.match(r"(step \d/4|held-out after step \d) \|", line)
    assert last == f"the trained model is in {whole.out.final}"


# --- killed, repeated, resumed --------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_policy_ends_the_run_and_is_named_last(broken):
    assert broken.exit_code == 1
    *_, last = broken.log.splitlines()
    assert last == "policy rank 0 died in policy update"
    assert "not saved: policy rank 0 died in policy finished_version" in broken.log
    step = broken.out.checkpoints.resolve() / "step-2"
    assert f"--checkpoint.resume continues from {step}" in broken.log
    assert "Traceback" not in broken.log
    broken.wait_for_no_process()


@pytest.mark.slow
def test_what_was_written_before_a_kill_is_whole_and_the_same_for_the_same_seed(broken, whole):
    rows = [row for row in read_jsonl(whole.out.metrics) if row["step"] <= 2]
    assert list(map(without_clock, broken.rows_left)) == list(map(without_clock, rows))
    assert len(rows) == 4
    assert broken.out.reward_curve.exists()


def test_a_resumed_run_is_the_run_that_was_never_stopped(resumed, whole):
    assert f"continuing from {resumed.out.checkpoints.resolve() / 'step-1'}" in resumed.log
    for file in ("metrics", "completions", "eval_completions"):
        rows, expected = (
            sorted(map(repr, map(without_clock, read_jsonl(getattr(run.out, file)))))
            for run in (resumed, whole)
        )
        assert rows == expected
    ends = [load_file(run.out.final / "model.safetensors") for run in (resumed, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def same_records(run, whole):
    for file in ("metrics", "completions"):
        ours, theirs = (
            sorted(map(repr, map(without_clock, read_jsonl(getattr(one.out, file)))))
            for one in (run, whole)
        )
        assert ours == theirs
    ends = [load_file(one.out.final / "model.safetensors") for one in (run, whole)]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


@pytest.mark.slow
def test_policy_and_engine_that_take_turns_end_with_the_same_bits(start, whole):
    """Evaluations, checkpoints and models that are kept change turns in the middle of steps."""
    run = start("colocated", "run.yaml", *EPOCHS, "--placement", "colocated")
    assert run.wait() == 0, run.log
    assert "taking turns on the same GPUs" in run.log
    same_records(run, whole)
    assert all(row["colocated/to_policy_seconds"] > 0 for row in steps(run)[1:])


@pytest.mark.slow
def test_a_colocated_run_that_was_interrupted_goes_on_to_the_same_end(start, whole):
    words = ("run.yaml", *EPOCHS, "--placement", "colocated")
    run = start("turns", *words, hold_after=GROUPS_BEFORE_STEP_3 + 1)
    run.wait_until_held()
    run.interrupt()
    assert run.wait() == 130, run.log
    run = start("turns", *words, "--checkpoint.resume")
    assert run.wait() == 0, run.log
    same_records(run, whole)


@pytest.mark.slow
def test_the_policy_of_a_colocated_run_is_saved_when_its_engine_dies(start):
    words = ("run.yaml", *EPOCHS, "--placement", "colocated", "--checkpoint.save_steps", "4")
    words = (*words, "--recovery.max_restarts", "0")
    run = start("dead-engine", *words, hold_after=GROUPS_BEFORE_STEP_2 + 1)
    run.wait_until_held()
    (engine,) = run.actors("RolloutActor")
    engine.kill()
    run.release()
    assert run.wait() == 1, run.log
    assert "rollout engine 0 died" in run.log
    assert "saved step 2" in run.log  # which the policy finished without it
    assert (run.out.checkpoints / "step-2/model.safetensors").exists(), run.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "actor", "role"),
    [
        ("dedicated", "RolloutActor", "rollout"),
        ("colocated", "RolloutActor", "rollout"),
        ("colocated", "PolicyRank", "policy"),
        ("colocated", "ReferenceRank", "reference"),
    ],
)
def test_a_run_whose_actor_dies_goes_on_to_the_same_end(start, whole, placement, actor, role):
    """It dies while engines sample, so where they take turns all others have left the GPUs."""
    words = ("run.yaml", *EPOCHS, "--placement", placement)
    run = start(f"healed-{placement}-{role}", *words, hold_after=GROUPS_BEFORE_STEP_3 + 1)
    run.wait_until_held()
    (process,) = run.actors(actor)
    process.kill()
    run.release()
    assert run.wait() == 0, run.log
    assert re.search(f"note: {role} (engine|rank) 0 works again", run.log)
    same_records(run, whole)
    last = steps(run)[-1]
    assert last[f"fault/{role}_restarts"] == 1
    assert last[f"fault/{role}_seconds_lost"] > 0


def test_ctrl_c_ends_a_run_quietly(interrupted):
    assert interrupted.exit_code == 130
    saved = interrupted.lines.index("saved step 1")
    how_to_go_on, *table, last = interrupted.lines[saved + 1 :]
    assert any(line.startswith("change first: ") for line in table)
    step = interrupted.out.checkpoints.resolve() / "step-1"
    assert how_to_go_on.startswith(f"--checkpoint.resume continues from {step}")
    assert last == "interrupted"
    assert "Traceback" not in "".join(interrupted.lines)
    assert interrupted.had_ended


def test_what_an_interrupted_run_saved_is_a_model_that_transformers_loads(
    interrupted, starter_model
):
    """Its weights are the policy's: the resumed run is exact, and loads no others."""
    assert interrupted.steps_taken == [1]
    assert not interrupted.out.interrupted.exists()
    model = AutoModelForCausalLM.from_pretrained(interrupted.saved, dtype=torch.float32)
    AutoTokenizer.from_pretrained(interrupted.saved)
    state, saved = model.state_dict(), load_file(interrupted.saved / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    before = load_file(starter_model / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in saved.items())


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_quietly(whole, start):
    run = start("hung up", str(whole.out.config), hold_after=GROUPS_BEFORE_STEP_2)
    run.wait_until_held()
    run.interrupt(signal.SIGHUP)
    assert run.wait() == 129
    run.wait_for_no_process()
    assert "Traceback" not in run.log
    assert "saved step 1" in run.log
    assert run.log.splitlines()[-1] == "interrupted by SIGHUP"
    assert run.out.has_ended()


@pytest.mark.slow
def test_a_killed_engine_ends_a_parallel_run_and_is_named_last(start):
    """Two policy ranks, two rollout engines and no reference, which beta = 0 does without.

    The engines get their weights as two on one GPU do, each over its own connection.
    """
    run = start(
        "parallel",
        *("run.yaml", "--grpo.beta", "0", "--policy.world_size", "2", "--rollout.num_engines", "2"),
        *("--rollout.engines_per_gpu", "2", "--recovery.max_restarts", "0"),
        *("--rollout.max_completion_length", "200", "--max_steps", "1000", "--eval_steps", "1000"),
    )
    run.wait_for(lambda: run.out.metrics.exists() and len(steps(run)) == 2)
    assert len(run.actors("PolicyRank")) == len(run.actors("RolloutActor")) == 2
    assert run.actors("ReferenceRank") == []

    def stopped_while_sampling():
        for engine in run.actors("RolloutActor", at="generate"):
            engine.suspend()
            if engine in run.actors("RolloutActor", at="generate"):
                return engine
            engine.resume()

    run.wait_for(stopped_while_sampling).kill()
    assert run.wait() == 1
    *_, last = run.log.splitlines()
    assert re.fullmatch(r"rollout engine [01] died in rollout", last)
    run.wait_for_no_process()
    rows = steps(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(row["ratio/mean"] == pytest.approx(1.0, abs=1e-6) for row in rows)
    # Both engines sample with the weights that were sent, or this would be far from rounding.
    assert all(row["sampling/logp_difference/mean"] < 1e-5 for row in rows)
    assert not any("kl" in row for row in rows)
