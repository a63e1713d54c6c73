import json
import os
from dataclasses import replace

import pytest
from tracking_cases import make_group

from rlsys.files import read_jsonl
from rlsys.records import index
from rlsys.records.completions import Completions, Query
from rlsys.rotation import part_path
from rlsys.run.folder import RunDir
from rlsys.tracking.jsonl import CompletionsTracker
from rlsys.types import RewardOutput


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def log(run: RunDir, step: int, group_id: int, rewards: list[RewardOutput], texts=None):
    tracker = CompletionsTracker(run)
    group = make_group(texts or ["a" * (i + 1) for i in range(len(rewards))], group_id=group_id)
    advantages = [float(i) for i in range(len(rewards))]
    tracker.log_completions(step, replace(group, rewards=rewards), advantages)
    tracker.close()


def reward(countdown: float, form: float, **extra) -> RewardOutput:
    by_name = {"countdown": countdown, "format": form}
    return RewardOutput(countdown + form, by_name, extra=extra)


def log_steps(run: RunDir, *steps: int) -> None:
    for step in steps:
        log(run, step, step * 2, [reward(0, 1), reward(1, 1)])
        log(run, step, step * 2 + 1, [reward(0, 0), reward(1, 0)])


def ids(completions: Completions, **query) -> list[str]:
    return [row["id"] for row in completions.query(Query(**query)).rows]


def test_rows_are_what_the_file_holds(run):
    log_steps(run, 1, 2)
    found = Completions(run, "train").query(Query(descending=False))
    assert found.total == 8
    written = list(read_jsonl(run.completions))
    assert [{name: row[name] for name in written[0]} for row in found.rows] == written


@pytest.mark.parametrize("piece_bytes", [1, 500, 1 << 20])
def test_conditions_over_rewards_steps_and_texts(run, monkeypatch, piece_bytes):
    monkeypatch.setattr(index, "PIECE_BYTES", piece_bytes)
    log_steps(run, 1, 2, 3)
    completions = Completions(run, "train")
    assert ids(completions, where="countdown = 0 and format = 1", descending=False) == [
        *("1-2-0", "2-4-0", "3-6-0")
    ]
    assert ids(completions, steps=(2, 2), where="Reward > 1") == ["2-4-1"]
    assert ids(completions, steps=(None, 1), grep="aa", descending=False) == ["1-2-1", "1-3-1"]
    assert ids(completions, sort="length", limit=2) == ["1-2-1", "1-3-1"]
    assert ids(completions, sort="reward", descending=False, limit=1, offset=1) == ["2-5-0"]
    assert ids(completions, limit=3) == ["3-7-1", "3-7-0", "3-6-1"]
    found = completions.query(Query(where="step in (1, 3)", columns=["text", "countdown"], limit=1))
    assert (found.columns, found.total) == (["text", "countdown"], 8)
    assert found.rows == [{"text": "aa", "countdown": 1.0}]


def test_columns_that_rewards_log_have_their_types(run):
    log(run, 1, 0, [reward(0, 1, score=1, note="x", flag=True, deep={"a": [1]})])
    log(run, 2, 1, [reward(0, 1, score=2.5, note=None, late=3), reward(1, 1)])
    completions = Completions(run, "train")
    assert ids(completions, where="score > 1.5") == ["2-1-0"]
    assert ids(completions, where="note = 'x' and flag") == ["1-0-0"]
    assert ids(completions, where="late = 3") == ["2-1-0"]
    assert completions.query(Query(where="step = 1")).rows[0]["deep"] == {"a": [1]}
    assert {"score", "note", "flag", "deep", "late"} <= set(completions.columns())


def test_a_column_that_only_later_rows_have_is_found(run, monkeypatch):
    log_steps(run, *range(1, 60))
    log(run, 60, 0, [reward(0, 1, score=7)])
    assert ids(Completions(run, "train"), where="score = 7") == ["60-0-0"]


def test_columns_whose_names_sql_cannot_tell_apart(run):
    extra = {"Text": 1, "score": 1.0, "SCORE": 2.0, "row": 3, "part": 4, "__part": 5}
    log(run, 1, 0, [reward(0, 1, **extra), reward(1, 1)])
    with run.completions.open("a") as file:  # damaged: a name that is not a text
        row = json.loads(run.completions.read_text().splitlines()[0])
        file.write(json.dumps(row | {"index": 1, "extra_columns": [None, "score"]}) + "\n")
    completions = Completions(run, "train")
    assert ids(completions, where="row = 3 and part = 4 and text = 'a'", descending=False) == [
        *("1-0-0", "1-0-1")
    ]


def test_reward_functions_with_names_of_columns_or_of_files(run):
    by_name = {"text": 1.0, "Step": 2.0, "a.py:f g": 3.0, "quo\"te'": 4.0}
    log(run, 1, 0, [RewardOutput(10.0, by_name)])
    completions = Completions(run, "train")
    assert ids(completions, where='"a.py:f g" = 3 and "quo""te\'" = 4 and text = \'a\'') == [
        "1-0-0"
    ]
    assert ids(completions, where="rewards['Step'] = 2 and step = 1") == ["1-0-0"]


@pytest.mark.parametrize(
    "where",
    [
        "nope = 1",
        "reward =",
        "reward = 1; select 2",
        "true) union select 1 --",
        "reward, step",
        "text",
        "reward = (select count(*) from read_text('/etc/passwd'))",
        "reward = (select count(*) from '/etc/passwd')",
        "(select count(*) from glob('/*')) > 0",
        "query is null",
        "select 1",
        "sum(reward) > 1",
    ],
)
def test_a_wrong_condition_is_one_error_with_the_columns(run, where):
    log_steps(run, 1)
    with pytest.raises(ValueError, match=r"cannot search with .* Columns are step, ") as raised:
        Completions(run, "train").query(Query(where=where))
    assert "countdown" in str(raised.value)
    assert "root:" not in str(raised.value)


def test_a_condition_cannot_see_variables_of_this_process(run):
    import pyarrow

    secret = pyarrow.table({"a": [1]})  # noqa: F841
    log_steps(run, 1)
    with pytest.raises(ValueError, match="cannot search"):
        Completions(run, "train").query(Query(where="(select count(*) from secret) = 1"))


def test_unknown_columns_are_named(run):
    log_steps(run, 1)
    completions = Completions(run, "train")
    for query in (Query(sort="nope"), Query(columns=["step", "nope"])):
        with pytest.raises(
            ValueError, match=r"'nope' is not a column\. Columns are step, group_id"
        ):
            completions.query(query)


def test_a_query_that_takes_too_long_is_given_up(run):
    log_steps(run, 1)
    slow = "(select count(*) from range(100000000000) as a(b) where b % 7 = reward) > 0"
    with pytest.raises(ValueError, match=r"given up after 0\.3 s"):
        Completions(run, "train").query(Query(where=slow), timeout_s=0.3)


def test_no_file_is_no_rows(run):
    found = Completions(run, "train").query(Query())
    assert (found.rows, found.total) == ([], 0)
    assert "id" in found.columns


def test_new_rows_are_found_and_rotated_files_followed(run, monkeypatch):
    completions = Completions(run, "train")
    log_steps(run, 1)
    assert len(ids(completions)) == 4
    log_steps(run, 2)
    assert len(ids(completions)) == 8
    run.completions.rename(part_path(run.completions, 1))
    assert len(ids(completions)) == 8
    log_steps(run, 3)
    assert ids(completions, sort="step", limit=1) == ["3-6-0"]
    assert len(ids(completions)) == len(ids(Completions(run, "train"))) == 12
    assert len(list(run.cache.iterdir())) == 1
    assert run.cache.stat().st_mode & 0o777 == 0o700


def test_a_torn_line_is_read_when_it_is_whole(run):
    log_steps(run, 1)
    whole = run.completions.read_bytes()
    run.completions.write_bytes(whole[:-9])
    completions = Completions(run, "train")
    assert len(ids(completions)) == 3
    with run.completions.open("ab") as file:
        file.write(whole[-9:])
    assert len(ids(completions)) == 4


def test_lines_that_are_not_completions_are_skipped_and_counted(run, caplog):
    log_steps(run, 1)
    with run.completions.open("ab") as file:
        file.write(b'{"step": 2}\nnot json\n[]\n\xff\xfe\n')
    log_steps(run, 3)
    assert len(ids(Completions(run, "train"))) == 8
    assert "skipped lines (4), the first: it has no 'group_id'" in caplog.text


def test_half_surrogates_are_texts(run):
    log(run, 1, 0, [reward(0, 1), reward(1, 1)], texts=["good", "bad \ud800 \x00 end"])
    found = Completions(run, "train").query(Query(descending=False)).rows
    assert [row["text"] for row in found] == ["good", "bad \\ud800 \x00 end"]


def test_rows_of_older_versions_lack_columns(run):
    log_steps(run, 1)
    rows = [json.loads(line) for line in run.completions.open()]
    for row in rows:
        del row["failures"], row["version_starts"]
    run.completions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Completions(run, "train").query(Query()).rows
    assert [(row["failures"], row["version_starts"]) for row in found] == [({}, [])] * 4


@pytest.mark.parametrize("how", ["in place", "replaced", "deleted", "shrunk"])
def test_a_cache_of_other_contents_is_not_used(run, how):
    log_steps(run, 1, 2)
    path = part_path(run.completions, 1)
    run.completions.rename(path)
    seen = Completions(run, "train")
    assert len(ids(seen, where="countdown = 1")) == 4
    text = path.read_text().replace('"countdown": 1', '"countdown": 7')
    if how == "in place":
        with path.open("r+") as file:
            file.write(text)
        os.utime(path, ns=(1, 1))
    elif how == "replaced":
        path.unlink()
        path.write_text(text)
    elif how == "deleted":
        path.unlink()
    else:
        os.truncate(path, text.index("\n", len(text) // 2 - 20) + 1)
    for completions in (seen, Completions(run, "train")):
        if how in ("in place", "replaced"):
            assert len(ids(completions, where="countdown = 7")) == 4
            assert ids(completions, where="countdown = 1") == []
        else:
            assert len(ids(completions)) == (0 if how == "deleted" else 4)


def test_a_damaged_cache_is_made_again(run):
    log_steps(run, 1)
    run.completions.rename(part_path(run.completions, 1))
    assert len(ids(Completions(run, "train"))) == 4
    (stored,) = run.cache.iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    assert len(ids(Completions(run, "train"))) == 4


def test_a_cache_that_cannot_be_written_costs_memory_only(run, caplog):
    log_steps(run, 1)
    run.completions.rename(part_path(run.completions, 1))
    run.cache.write_text("in the way")
    completions = Completions(run, "train")
    assert len(ids(completions)) == len(ids(completions)) == 4
    assert caplog.text.count("not kept as Parquet") == 1


def test_a_completion_comes_with_its_group(run):
    log_steps(run, 1, 2)
    completions = Completions(run, "train")
    assert [row["id"] for row in completions.group("2-4-1")] == ["2-4-1", "2-4-0"]
    with pytest.raises(ValueError, match="no completion has the id '9-9-9'"):
        completions.group("9-9-9")
    with pytest.raises(ValueError, match="'x' is not an id of a completion"):
        completions.group("x")
