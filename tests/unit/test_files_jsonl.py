import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.files import (
    JsonlWriter,
    decode_row,
    encode_row,
    read_jsonl,
    replacing,
    truncate_after,
    write_jsonl,
)
from rlsys.tracking.jsonl import JsonlTracker


def write(path: Path, *rows: dict) -> None:
    writer = JsonlWriter(path)
    writer.append(*rows)
    writer.close()


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_a_kill_at_any_byte_loses_no_row_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "text": "é\n"}, {"step": 2, "reward": 0.5}, {"step": 3, "text": "x"}]
    lines = [encode_row(row) for row in rows]
    whole = b"".join(lines)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        write(path, {"step": 4})
        # A row that lacks nothing but its newline is whole.
        ends = [sum(map(len, lines[: n + 1])) - 1 for n in range(len(lines))]
        survivors = [row for row, end in zip(rows, ends, strict=True) if cut >= end]
        assert list(read_jsonl(path)) == [*survivors, {"step": 4}], cut


def test_a_long_last_line_is_found_across_blocks(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(encode_row({"step": 1}) + b'{"step": 2, "text": "' + b"a" * 200_000)
    write(path, {"step": 3})
    assert [row["step"] for row in read_jsonl(path)] == [1, 3]


def test_a_killed_writer_leaves_every_row_it_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from pathlib import Path; from rlsys.files import JsonlWriter\n"
        "writer = JsonlWriter(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n"
        "    writer.append({'step': step}); print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    appended = [int(process.stdout.readline()) for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    appended += [int(line) for line in process.stdout]
    process.wait()
    write(path)
    assert {row["step"] for row in read_jsonl(path)} >= set(appended)


def test_nan_and_infinity_become_null_everywhere(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log_metrics(1, {"loss": float("nan"), "kl": float("inf"), "reward": 1.0})
    tracker.close()
    write(path, {"rewards": {"countdown": float("-inf")}, "advantages": [float("nan"), 1.5]})
    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=strict) for line in lines] == [
        {"step": 1, "loss": None, "kl": None, "reward": 1.0},
        {"rewards": {"countdown": None}, "advantages": [None, 1.5]},
    ]


# Two halves of a surrogate pair that stand alone in Python are one character in JSON.
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_stays_on_its_line_and_comes_back(text):
    line = encode_row({"text": text})
    assert line.count(b"\n") == 1
    assert line.decode("utf-8")
    assert decode_row(line) == {"text": text}


def test_half_a_surrogate_pair_is_written_as_valid_utf8():
    line = encode_row({"text": "\ud800\\"})
    assert line == b'{"text": "\\ud800\\\\"}\n'
    assert decode_row(line) == {"text": "\ud800\\"}


def test_numpy_scalars_are_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    assert decode_row(encode_row({"reward": numpy.float32(0.5)})) == {"reward": 0.5}


def test_readers_skip_and_report_lines_that_are_not_rows(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[3]\n\xff\xfe\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "line 2 is not a JSON object, skipped",
        "line 3 is not a JSON object, skipped",
        "line 5 is not a JSON object, skipped",
    ]


@given(st.lists(st.integers(0, 9)), st.integers(0, 9))
def test_truncation_keeps_the_steps_up_to_the_checkpoint_in_order(tmp_path_factory, steps, last):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, *({"step": step, "line": line} for line, step in enumerate(steps)))
    dropped = truncate_after(path, last)
    kept = [(row["step"], row["line"]) for row in read_jsonl(path)]
    assert kept == [(step, line) for line, step in enumerate(steps) if step <= last]
    assert dropped == len(steps) - len(kept)


def test_truncation_drops_half_a_line_and_leaves_a_missing_file_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 3) == 0
    assert not path.exists()
    path.write_bytes(b'{"step": 1}\n{"step": 2, "rew')
    assert truncate_after(path, 3) == 1
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_failure_while_replacing_leaves_the_old_file_and_no_scratch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as scratch:
            scratch.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "data" / "train.jsonl"

    def rows():
        yield {"prompt": "é"}
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        write_jsonl(path, rows())
    assert list(path.parent.iterdir()) == []
    assert write_jsonl(path, [{"prompt": "é"}, {"prompt": "b"}]) == 2
    assert [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()] == [
        "é",
        "b",
    ]
    assert list(path.parent.iterdir()) == [path]
