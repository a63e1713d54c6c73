import csv
import io
import json
import math
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console
from tracking_cases import make_config, make_group

from rlsys.cli import main
from rlsys.commands.completions_follow import Tail
from rlsys.commands.completions_print import print_group
from rlsys.config.load import save_config
from rlsys.files import read_jsonl, truncate_after
from rlsys.rotation import part_path
from rlsys.run.folder import ENDED, RUNNING, RunDir
from rlsys.tracking.completions import completion_rows, last_user_message
from rlsys.tracking.jsonl import CompletionsTracker
from rlsys.tracking.printable import printable
from rlsys.types import RewardOutput

pytestmark = pytest.mark.processes


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def log(run: RunDir, step: int, group_id: int, texts=("a", "b"), rewards=(1.0, 0.0), **kwargs):
    tracker = CompletionsTracker(run)
    group = make_group(list(texts), list(rewards), group_id=group_id)
    tracker.log_completions(step, group, None, **kwargs)
    tracker.close()


def shown(capsys, run: RunDir, **options) -> str:
    """What `rlsys completions` prints.

    Raises:
        ValueError: the error of the command.
    """
    words = ["completions", str(run.path)]
    for name, value in options.items():
        if name == "split":
            words += [] if value == "train" else [f"--{value}"]
        elif value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    status = main(words)
    captured = capsys.readouterr()
    if status:
        raise ValueError(captured.err)
    return captured.out


def headings(text: str) -> list[str]:
    return re.findall(r"^step \d+, group \d+", text, flags=re.MULTILINE)


def test_a_row_describes_one_completion(run):
    tracker = CompletionsTracker(run)
    tracker.log_completions(7, make_group(["four", "no"], [1.0, 0.0], group_id=3), [0.7, -0.7])
    tracker.close()
    row, other = read_jsonl(run.completions)
    assert row == {
        "step": 7,
        "group_id": 3,
        "index": 0,
        "group_size": 2,
        "prompt_id": "countdown-3",
        "reward": 1.0,
        "rewards": {"countdown": 1.0},
        "failures": {},
        "advantage": 0.7,
        "num_tokens": 4,
        "finish_reason": "stop",
        "policy_versions": [3],
        "version_starts": [0],
        "prompt": "Make 25 from 5, 7 and 2.",
        "text": "four",
    }
    assert (other["index"], other["advantage"]) == (1, -0.7)


def test_unscored_groups_and_unknown_advantages_are_null():
    rows = completion_rows(1, make_group(["a", "b"]), None)
    assert [(row["reward"], row["rewards"], row["advantage"]) for row in rows] == [
        (None, {}, None),
        (None, {}, None),
    ]


def test_a_failed_reward_function_is_shown_with_what_happened(run, capsys):
    group = make_group(["a", "b"], [1.0, 0.0])
    dropped = RewardOutput(math.nan, {"countdown": math.nan}, {"countdown": "timeout"})
    tracker = CompletionsTracker(run)
    tracker.log_completions(1, replace(group, rewards=[group.rewards[0], dropped]), None)
    tracker.close()
    rows = list(read_jsonl(run.completions))
    assert [row["failures"] for row in rows] == [{}, {"countdown": "timeout"}]
    assert [row["reward"] for row in rows] == [1.0, None]
    assert "#1  reward -  countdown - timeout" in shown(capsys, run)


def test_held_out_groups_have_a_file_of_their_own(run, capsys):
    log(run, 0, 0, texts=("held out", "b"), split="eval")
    log(run, 1, 0, texts=("trained on", "b"))
    assert "held out" not in run.completions.read_text()
    assert "held out" in shown(capsys, run, split="eval")


def test_the_prompt_is_the_last_user_message():
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "how?"}]
    assert last_user_message([{"role": "user", "content": parts}]) == "Look:\nhow?"
    assert last_user_message([{"role": "system", "content": "Begin."}]) == "Begin."
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?"), ("assistant", "<")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert last_user_message(messages) == "And 2 + 2?"


def test_completions_of_a_group_stand_under_their_prompt_best_first(run, capsys):
    log(run, 1, 0, texts=("worst", "best", "middle"), rewards=(0.0, 2.0, 1.0))
    text = shown(capsys, run)
    assert text.count("Make 25") == 1
    assert re.findall("worst|best|middle", text) == ["best", "middle", "worst"]
    assert "reward 1 ± 1" in text
    assert "#1  reward 2  countdown 2" in text


def test_a_group_without_differences_is_pointed_out(run, capsys):
    log(run, 1, 0, rewards=(1.0, 1.0))
    log(run, 1, 1, texts=("alone",), rewards=(1.0,))  # held-out prompts have one completion
    text = shown(capsys, run)
    assert text.count("all alike") == 1
    assert "reward 1 ± 0, all alike, so nothing to learn from" in text


def test_a_completion_cannot_control_the_terminal_or_the_markup(run, capsys):
    evil = "\x1b[2J\x1b]0;owned\x07 [red]bold[/red] [/] :smile: \r\x9b1m \u202egnp.exe \ud800"
    log(run, 1, 0, texts=(evil, "b"))
    text = shown(capsys, run)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    text = " ".join(text.split())
    assert r"\x1b[2J\x1b]0;owned\x07 [red]bold[/red] [/] :smile:" in text
    assert r"\x9b1m \u202egnp.exe \ud800" in text


def test_text_of_any_language_is_shown_as_it_is(run, capsys):
    log(run, 1, 0, texts=("答案是 25 😀 می‌خواهم", "b"))
    assert "答案是 25 😀 می‌خواهم" in shown(capsys, run)


def test_printable_keeps_lines_and_shows_tabs_as_spaces():
    assert printable("a\n\tb\r\nc\rd") == "a\n    b\nc\\rd"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_the_width(width):
    rows = completion_rows(123, make_group(["word " * 99, "x" * 999], [0.1, 0.25]), [0.7, -0.7])
    out = io.StringIO()
    print_group(Console(file=out, width=width), rows)
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert out.getvalue().count("x") == 999


def test_colours_are_for_terminals_only(run, capsys, monkeypatch):
    rows = completion_rows(1, make_group(["a", "b"], [1.0, 0.0]), None)
    out = io.StringIO()
    print_group(Console(file=out, force_terminal=True, width=80), rows)
    assert "\x1b[" in out.getvalue()
    log(run, 1, 0)
    assert "\x1b" not in shown(capsys, run)


def test_step_and_limit_choose_the_newest_groups(run, capsys):
    for step in (1, 2):
        for group_id in (0, 1, 2):
            log(run, step, group_id)
    assert headings(shown(capsys, run)) == [
        f"step {s}, group {g}" for s in (1, 2) for g in range(3)
    ]
    assert headings(shown(capsys, run, step=1)) == [f"step 1, group {g}" for g in range(3)]
    assert headings(shown(capsys, run, limit=2)) == ["step 2, group 1", "step 2, group 2"]
    assert headings(shown(capsys, run, step=1, limit=1)) == ["step 1, group 2"]
    for limit, follow, least in ((-1, False, 1), (0, False, 1), (-1, True, 0)):
        with pytest.raises(ValueError, match=f"--limit {limit} should be {least} or more"):
            shown(capsys, run, limit=limit, follow=follow)


def save_run_config(run: RunDir, **values) -> None:
    run.path.mkdir(exist_ok=True)
    rollout = {"generation_batch_size": 4, "num_generations": 2} | values.pop("rollout", {})
    save_config(make_config(run.path, rollout=rollout, **values), run.config)


def test_a_missing_file_is_explained_by_what_the_run_does(run, capsys):
    def reason(split="train"):
        with pytest.raises(ValueError, match="jsonl does not exist: ") as raised:
            shown(capsys, run, split=split)
        return str(raised.value)

    assert f"there is no folder {run.path}" in reason()
    run.path.mkdir()
    assert "is not the output directory of a run" in reason()
    save_run_config(run, rollout={"dynamic_sample": True})
    run.write_status(RUNNING)
    assert "no group has finished yet: --follow waits for it" in reason()
    assert "no filtered group has finished yet" in reason("filtered")
    assert "eval_steps is not set" in reason("eval")
    save_run_config(run)
    assert "only rollout.dynamic_sample filters groups, and it is off" in reason("filtered")
    run.write_status(ENDED)
    assert "the run ended before its first group" in reason()
    save_run_config(run, tracking={"log_completions": False})
    assert "tracking.log_completions is off" in reason()
    run.config.write_text("data: {}\nsft: {}\n")
    assert "it is a run of `rlsys sft`, which samples nothing" in reason()


def test_an_error_about_nothing_to_show_says_which_steps_exist(run, capsys):
    CompletionsTracker(run).close()
    with pytest.raises(ValueError, match="holds no group: it is empty so far"):
        shown(capsys, run)
    log(run, 3, 0)
    log(run, 5, 0)
    with pytest.raises(ValueError, match="holds no group of step 9: it has steps 3 to 5"):
        shown(capsys, run, step=9)


def test_a_group_cut_short_by_a_kill_is_shown_with_what_is_left(run, capsys):
    log(run, 1, 0, texts=("kept", "lost"))
    whole = run.completions.read_bytes()
    run.completions.write_bytes(whole[:-20])
    log(run, 1, 1)
    text = shown(capsys, run)
    assert headings(text) == ["step 1, group 0", "step 1, group 1"]
    assert "only 1 of 2 completions on record" in text
    assert "kept" in text
    assert "lost" not in text


class Following:
    """A process with `--follow`, whose output can be read up to a text."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.text = ""

    def read_until(self, wanted: str) -> None:
        assert self.process.stdout is not None
        while wanted not in self.text:
            line = self.process.stdout.readline()
            assert line, f"ended before {wanted!r}: {self.text}"
            self.text += line


@contextmanager
def following(run_dir: Path):
    program = (
        "import sys; from pathlib import Path\n"
        "from rlsys.cli import main\n"
        "sys.exit(main(['completions', sys.argv[1], '--follow']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that a shell started in the background ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    guard = threading.Timer(60, process.kill)  # a follower that misses its group fails, not hangs
    guard.start()
    try:
        yield Following(process)
    finally:
        guard.cancel()
        process.kill()
        process.wait()


@contextmanager
def killed_later(run: RunDir):
    """A process that runs in the folder; yields the function that kills it."""
    program = (
        "import sys, time; from pathlib import Path; from rlsys.run.folder import RUNNING, RunDir\n"
        "run = RunDir(Path(sys.argv[1]))\n"
        "with run.held():\n"
        "    run.write_status(RUNNING); print(flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.kill
    finally:
        process.kill()
        process.wait()


def test_follow_sees_what_another_process_appends_until_the_run_ends(run):
    with following(run.path) as viewer:
        viewer.read_until("waiting for")  # nothing is there yet
        run.write_status(RUNNING)
        log(run, 1, 0)
        viewer.read_until("step 1, group 0")
        log(run, 1, 1)
        viewer.read_until("step 1, group 1")
        log(run, 2, 0)
        run.write_status(ENDED)
        assert viewer.process.wait() == 0
        viewer.read_until("the run has ended")
    assert headings(viewer.text) == ["step 1, group 0", "step 1, group 1", "step 2, group 0"]


def test_following_ends_with_a_run_that_was_killed(run):
    log(run, 1, 0)
    with killed_later(run) as kill, following(run.path) as viewer:
        viewer.read_until("step 1, group 0")
        log(run, 2, 0)
        viewer.read_until("step 2, group 0")
        kill()
        assert viewer.process.wait() == 0
        viewer.read_until("the run was killed")
    with following(run.path) as viewer:  # and does not wait for a dead one
        assert viewer.process.wait() == 0


@pytest.mark.parametrize("earlier", [ENDED, RUNNING])
def test_following_waits_for_a_run_after_an_attempt_that_failed(run, earlier):
    with run.held():
        run.write_status(earlier)
    CompletionsTracker(run).close()
    with following(run.path) as viewer:
        viewer.read_until("an earlier attempt")
        with run.held():
            run.write_status(RUNNING)
            log(run, 1, 0)
            viewer.read_until("step 1, group 0")
            run.write_status(ENDED)
        assert viewer.process.wait() == 0
        viewer.read_until("the run has ended")


def test_following_completions_that_a_run_never_writes_is_an_error(run, capsys):
    save_run_config(run)
    run.write_status(RUNNING)
    with pytest.raises(ValueError, match=r"nothing to wait for: only rollout\.dynamic_sample"):
        shown(capsys, run, follow=True, split="filtered")


def test_following_continues_where_a_resumed_run_continues(run):
    tail = Tail(run.completions)
    assert list(tail.rows()) == []  # nothing is there yet
    for step in (1, 2, 3):
        log(run, step, 0)
    assert [row["step"] for row in tail.rows()] == [1, 1, 2, 2, 3, 3]
    with run.completions.open("ab") as file:
        file.write(b'{"step": 4, "text": "killed here')
    assert list(tail.rows()) == []
    truncate_after(run.completions, 2)  # the run continues from step 2
    assert list(tail.rows()) == []
    log(run, 3, 1)
    assert [(row["step"], row["group_id"]) for row in tail.rows()] == [(3, 1), (3, 1)]
    assert list(tail.rows()) == []


def test_a_file_replaced_by_a_longer_one_is_not_read_from_its_middle(run, caplog):
    log(run, 1, 0)
    log(run, 2, 0)
    tail = Tail(run.completions)
    assert len(list(tail.rows())) == 4
    truncate_after(run.completions, 1)
    log(run, 2, 0, texts=("longer " * 9, "b"))
    assert list(tail.rows()) == []
    log(run, 2, 1)
    assert [row["group_id"] for row in tail.rows()] == [1, 1]
    assert caplog.records == []


def test_half_a_line_is_read_when_it_is_whole(run):
    log(run, 1, 0)
    whole = run.completions.read_bytes()
    run.completions.write_bytes(whole[:-9])
    tail = Tail(run.completions)
    assert [row["index"] for row in tail.rows()] == [0]
    with run.completions.open("ab") as file:
        file.write(whole[-9:])
    assert [row["index"] for row in tail.rows()] == [1]


def test_ctrl_c_ends_following_without_a_traceback(run):
    log(run, 1, 0)
    with following(run.path) as viewer:
        viewer.read_until("step 1, group 0")
        viewer.process.send_signal(signal.SIGINT)
        assert viewer.process.wait() == 0
        assert viewer.process.stdout is not None
        assert "Traceback" not in viewer.text + viewer.process.stdout.read()


def test_following_begins_with_the_newest_groups(run):
    for step in range(1, 9):
        log(run, step, 0)
    run.write_status(ENDED)
    with following(run.path) as viewer:
        viewer.read_until("the run has ended")
    assert headings(viewer.text) == [f"step {step}, group 0" for step in (6, 7, 8)]


def test_a_pipe_that_closes_early_ends_the_viewer_silently(run):
    for step in range(1, 60):
        log(run, step, 0, texts=("x" * 4000, "y" * 4000))
    program = (
        "import sys; from pathlib import Path\n"
        "from rlsys.cli import main\n"
        "sys.exit(main(['completions', sys.argv[1]]))\n"
    )
    viewer = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert viewer.stdout is not None
    assert viewer.stderr is not None
    assert viewer.stdout.readline().startswith("step 1, group 0")
    viewer.stdout.close()
    assert viewer.stderr.read() == ""
    viewer.wait(timeout=300)  # after its last output


def test_a_completion_of_several_versions_shows_where_each_begins(run, capsys):
    group = make_group(["four"], [1.0])
    (completion,) = group.completions
    completion = replace(completion, policy_versions=(3, 4), version_starts=(0, 2))
    tracker = CompletionsTracker(run)
    tracker.log_completions(7, replace(group, completions=[completion]), None)
    tracker.close()
    assert "policy 3, 4 from token 2" in shown(capsys, run)
    assert next(iter(read_jsonl(run.completions)))["version_starts"] == [0, 2]


def test_filtered_groups_have_a_file_of_their_own(run, capsys):
    log(run, 1, 0, texts=("nothing new", "b"), split="filtered")
    log(run, 1, 0, texts=("trained on", "b"))
    assert "nothing new" not in run.completions.read_text()
    assert "nothing new" in shown(capsys, run, split="filtered")


def search_run(run: RunDir) -> None:
    """Steps 1 to 3, with two groups each."""
    for step in (1, 2, 3):
        tracker = CompletionsTracker(run)
        for group_id, texts in ((0, ["a", "bb"]), (1, ["ccc", "dddd, so"])):
            group = make_group(texts, [0.0, 1.0], group_id=group_id)
            tracker.log_completions(step, group, [-1.0, float(step)])
        tracker.close()


def test_searched_completions_stand_in_their_order_under_their_groups(run, capsys):
    search_run(run)
    text = shown(capsys, run, where="countdown = 1", sort="length", step="1:2")
    assert headings(text) == [f"step {s}, group {g}" for g in (1, 0) for s in (1, 2)]
    assert text.count("1 of 2 completions\n") == 4
    assert "ccc" not in text
    assert headings(shown(capsys, run, grep="d, s", limit=2)) == [
        *("step 2, group 1", "step 3, group 1")
    ]
    text = shown(capsys, run, sort="advantage", limit=1, ascending=True)
    assert re.findall(r"#\d  reward \d", text) == ["#0  reward 0"]
    assert headings(shown(capsys, run, step="2:", limit=1)) == ["step 3, group 1"]


def test_columns_alone_stand_below_each_other(run, capsys):
    search_run(run)
    text = shown(capsys, run, sort="advantage", limit=1, columns="step,text,rewards")
    assert text == 'step     3\ntext     bb\nrewards  {"countdown": 1.0}\n\n'


def test_json_and_csv_have_all_rows_in_recorded_order(run, capfd, tmp_path):
    search_run(run)
    written = list(read_jsonl(run.completions))
    rows = [json.loads(line) for line in shown(capfd, run, format="json").splitlines()]
    assert [{name: row[name] for name in written[0]} for row in rows] == written
    shown(capfd, run, format="csv", out=tmp_path / "found.csv", where="reward = 1", limit=2)
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["text"]) for row in rows] == [("3", "bb"), ("3", "dddd, so")]
    assert json.loads(rows[0]["rewards"]) == {"countdown": 1.0}


def test_parquet_is_what_was_asked_for(run, capfd, tmp_path):
    search_run(run)
    path = tmp_path / "found.parquet"
    shown(capfd, run, format="parquet", out=path, sort="reward", columns="id,countdown")
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == ["id", "countdown"]
    assert table["countdown"].to_pylist() == [1.0] * 6 + [0.0] * 6


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"where": "nope = 1"}, r'column "nope" not found.*Columns are step, .*countdown'),
        ({"where": "step = 1; drop table x"}, "more than one statement"),
        ({"sort": "nope"}, r"'nope' is not a column\. Columns are step"),
        ({"step": "2:x"}, "--step 2:x should be a step, or first and last step such as 10:20"),
        ({"step": "7:9"}, "holds no group of steps 7:9: it has steps 1 to 3"),
        ({"grep": "zzz"}, "holds no completion that fits: it has steps 1 to 3"),
        ({"out": "x.csv"}, "--out FILE goes with --format"),
        ({"out": "/nowhere/x.csv", "format": "csv"}, "--out /nowhere/x.csv cannot be written"),
        ({"follow": True, "where": "true", "sort": "reward"}, "go with --where, --sort"),
    ],
)
def test_a_wrong_search_is_one_clear_error(run, capfd, options, problem):
    search_run(run)
    with pytest.raises(ValueError, match=problem):
        shown(capfd, run, **options)


def test_rotated_files_are_one_record(run, capsys):
    search_run(run)
    run.completions.rename(part_path(run.completions, 1))
    assert len(headings(shown(capsys, run))) == 6
    search_run(run)
    assert len(headings(shown(capsys, run))) == 12
    tail = Tail(run.completions)
    assert len(list(tail.rows())) == 24
    run.completions.rename(part_path(run.completions, 2))
    search_run(run)
    assert len(list(tail.rows())) == 12
    assert len(list(Tail(run.completions, last_bytes=1).rows())) == 0
