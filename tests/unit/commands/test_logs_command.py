"""`rlsys logs`: lines of all actors in order, chosen ones, and new ones as they come."""

import threading
import time

import pytest

from rlsys import cli, log_files
from rlsys.commands.logs import show_logs
from rlsys.log_files import LogFile
from rlsys.run.folder import ENDED, RUNNING, RunDir


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.touch()
    return run


@pytest.fixture
def write(run, monkeypatch):
    seconds = iter(range(10, 60))

    def write(name, *lines):
        monkeypatch.setattr(
            log_files.time, "strftime", lambda _: f"2026-01-01 00:00:{next(seconds)}"
        )
        file = LogFile(run.logs / f"{name}.log")
        file.write(lines)
        file.close()

    return write


def shown(capsys):
    return [line.split(" 2026-01-01 00:00:") for line in capsys.readouterr().out.splitlines()]


def test_lines_of_all_actors_are_in_the_order_of_time(run, write, capsys):
    write("policy-0", "a")
    write("rollout-10", "b")
    write("policy-0", "c")
    assert cli.main(["logs", str(run.path)]) == 0
    assert shown(capsys) == [
        ["policy-0  ", "10 a"],
        ["rollout-10", "11 b"],
        ["policy-0  ", "12 c"],
    ]


def test_role_rank_and_number_of_lines_choose(run, write, capsys, monkeypatch):
    monkeypatch.setattr(log_files, "MOST_BYTES", 40)
    for number in range(4):
        write("policy-0", f"a{number}")
        write("policy-1", f"b{number}")
        write("driver-0", f"c{number}")
    words = ["logs", str(run.path), "--role", "policy"]
    assert cli.main([*words, "--rank", "1", "--lines", "2"]) == 0
    assert [line[-2:] for _, line in shown(capsys)] == ["b2", "b3"]
    assert cli.main([*words, "--lines", "3"]) == 0
    assert [line[-2:] for _, line in shown(capsys)] == ["b2", "a3", "b3"]


def test_control_characters_are_shown_and_not_obeyed(run, write, capsys):
    write("reward-0", "\x1b]0;title\x07")
    show_logs(run.path)
    assert "\\x1b]0;title\\x07" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--role", "reference"], "logs of other actors: policy-0"),
        (["--lines", "-1"], "--lines -1 should be 0 or more"),
    ],
)
def test_nothing_to_show_says_why(run, write, capsys, words, problem):
    write("policy-0", "a")
    assert cli.main(["logs", str(run.path), *words]) == 2
    assert problem in capsys.readouterr().err


def test_folders_without_logs_say_what_they_are(run, tmp_path, capsys):
    assert cli.main(["logs", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["logs", str(run.path)]) == 2
    assert "no logs of actors" in capsys.readouterr().err


def test_follow_shows_new_lines_of_new_actors_until_the_run_ends(run, write, capsys):
    write("policy-0", "old", "newer")
    with run.held():
        run.write_status(RUNNING)
        thread = threading.Thread(
            target=show_logs, args=(run.path,), kwargs={"follow": True, "lines": 1}
        )
        thread.start()
        texts, deadline = "", time.monotonic() + 60
        while "newer" not in texts and time.monotonic() < deadline:
            time.sleep(0.05)
            texts += capsys.readouterr().out
        write("policy-0", "of the same")
        write("rollout-0", "of another")
        run.write_status(ENDED)
    thread.join(60)
    assert not thread.is_alive()
    texts += capsys.readouterr().out
    assert "old" not in texts.replace("newer", "")
    assert [word in texts for word in ("newer", "of the same", "of another")] == [True] * 3
