"""Output is whole and readable on a terminal of 80 columns."""

import io
import shutil
from argparse import Namespace

import psutil
import pytest
from config_cases import write_run
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlsys.commands import rewards_list
from rlsys.commands.explain import explain
from rlsys.config.load import load_config
from rlsys.tracking.columns import columns, join_wrapped
from rlsys.tracking.console import TerminalTracker

WIDE = 10_000


@pytest.fixture(autouse=True)
def machine_at_rest(monkeypatch):
    """Freeze the free disk and memory, which change between two calls."""
    disk, memory = shutil.disk_usage("/"), psutil.virtual_memory()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def printed(show, width):
    text = io.StringIO()
    show(Console(file=text, width=width))
    return text.getvalue()


def check(show, width=80):
    """Check that no word is broken or cut, and that only a long word crosses the edge."""
    narrow, wide = printed(show, width), printed(show, WIDE)
    assert set(wide.split()) - set(narrow.split()) == set()
    assert "\u2026" not in narrow
    for line in narrow.splitlines():
        assert len(line) <= width or len(line.split()) <= 2, line


LONG = "a/very/long/folder/that/no/terminal/of/eighty/columns/can/show/in/one/line/of/its/table"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_is_readable_in_80_columns(tmp_path, device, monkeypatch):
    monkeypatch.setattr(
        "rlsys.commands.explain.first_sentence", lambda text: ""
    )  # only where there is room
    path = write_run(
        tmp_path,
        device=device,
        num_train_epochs=2,
        data={"system": "You are a helpful assistant. " * 9, "val_dataset": [LONG]},
        grpo={"beta": 0.1, "loss_type": "gspo"},
        rollout={
            **{"num_engines": 4, "num_generations": 4, "generation_batch_size": 16},
            **{"max_completion_length": 64, "max_staleness": 1, "dynamic_sample": True},
        },
        policy={"world_size": 2},
    )
    check(lambda console: explain(load_config(path), console))


def test_explain_shows_meanings_whole_where_there_is_room(tmp_path):
    resolved = load_config(write_run(tmp_path))
    check(lambda console: explain(resolved, console), width=140)
    assert "Nucleus sampling" in printed(lambda console: explain(resolved, console), 140)


def test_the_list_of_rewards_is_readable_in_80_columns(monkeypatch):
    def show(console):
        monkeypatch.setattr(rewards_list, "make_console", lambda: console)
        rewards_list.main(Namespace(external_plugins=[]))

    check(show)


def test_a_held_out_line_breaks_between_its_numbers():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    tracker = TerminalTracker(400, 4, 0, console)
    names = ["countdown", "format", "repetition_penalty", "soft_overlong", f"reward_model:{LONG}"]
    values = {f"eval/rewards/{name}/mean": 0.123 for name in names}
    tracker.log_metrics(20, {"eval/reward": 1.2} | values | {"eval/completions/mean_length": 300.0})
    tracker.close()
    lines = out.getvalue().splitlines()
    for item in ["held-out after step 20", *(f"{name} 0.123" for name in names), "length 300"]:
        assert any(item in line for line in lines), item


@given(
    st.lists(st.text("ab \n", max_size=30), min_size=3, max_size=3),
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
)
def test_no_word_of_a_row_is_lost_or_runs_into_another(cells, widths):
    lines = columns(cells, widths)
    assert sorted(" ".join(lines).split()) == sorted(" ".join(cells).split())


def test_cells_after_a_word_that_is_too_wide_go_below_it():
    assert columns(("field", "a-long-word and more", "file"), (6, 8, 4)) == [
        "field   a-long-word",
        "        and more  file",
    ]


def test_items_are_joined_as_far_as_they_fit():
    assert join_wrapped(["aa", "bb", "cc"], " | ", 7) == "aa | bb\n    cc"
    assert join_wrapped(["aa"], " | ", 1) == "aa"
