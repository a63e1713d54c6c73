"""What a slow start says."""

import pytest
from waiting import eventually

from rlsys.actors.start_report import MOST_NAMES, StartReport


def wait_for_line(capsys, *words):
    texts = []

    def has_come():
        texts.append(capsys.readouterr().out)
        return all(word in texts[-1] for word in words)

    eventually(has_come, f"a line with {words}")
    return texts[-1]


def test_a_slow_start_names_who_is_not_ready(capsys):
    with StartReport(first_after_s=0.0, every_s=0.02) as report:
        report.waiting_for(["policy rank 0", "rollout engine 0"])
        wait_for_line(capsys, "waiting for policy rank 0 (0 s), rollout engine 0 (0 s)")
        report.ready("policy rank 0")
        wait_for_line(capsys, "waiting for rollout engine 0 (0 s)\n")
        report.ready("rollout engine 0")
    assert capsys.readouterr().out.splitlines()[-1] == "ready after 0 s"


def test_a_quick_start_says_nothing(capsys):
    with StartReport() as report:
        report.waiting_for(["policy rank 0"])
    assert capsys.readouterr().out == ""


def test_a_start_that_fails_is_not_ready(capsys):
    with pytest.raises(ZeroDivisionError), StartReport(first_after_s=0.0):
        raise ZeroDivisionError
    assert "ready" not in capsys.readouterr().out


def test_a_line_stays_short():
    report = StartReport()
    report.waiting_for([f"policy rank {rank}" for rank in range(64)])
    assert report.line().count("policy rank") == MOST_NAMES
    assert report.line().endswith(f", {64 - MOST_NAMES} more")
