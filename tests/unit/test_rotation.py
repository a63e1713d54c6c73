import os

from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.files import read_jsonl
from rlsys.rotation import (
    GrowingFile,
    RotatingJsonlWriter,
    older_parts,
    part_path,
    parts,
    truncate_parts_after,
)


def read(file: GrowingFile) -> tuple[bool, list[bytes]]:
    restarted, lines = file.new_lines()
    return restarted, list(lines)


def test_parts_have_names_in_their_order(tmp_path):
    path = tmp_path / "a.jsonl"
    for number in (10, 9, 1000000):
        part_path(path, number).touch()
    (tmp_path / "a.000001.json").touch()
    (tmp_path / "ba.000001.jsonl").touch()
    assert [part.name for part in older_parts(path)] == [
        "a.000009.jsonl",
        "a.000010.jsonl",
        "a.1000000.jsonl",
    ]
    assert older_parts(tmp_path / "no folder" / "a.jsonl") == []


ACTIONS = st.lists(st.sampled_from(["line", "half", "rest", "rotate", "read"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_each_line_is_read_once_across_rotations(tmp_path_factory, actions):
    path = tmp_path_factory.mktemp("run") / "a.jsonl"
    file, written, found, half = GrowingFile(path), [], [], b""
    number = 0
    for action in [*actions, "rest", "read"]:
        with path.open("ab") as target:
            if action in ("line", "rest") or (action == "rotate" and half):
                target.write(b"end\n" if half else b"%d\n" % len(written))
                written.append(half + b"end\n" if half else b"%d\n" % len(written))
                half = b""
            elif action == "half" and not half:
                half = b"half %d " % len(written)
                target.write(half)
        if action == "rotate":
            number += 1
            path.rename(part_path(path, number))
        if action == "read":
            restarted, lines = read(file)
            assert not restarted
            found += lines
    assert found == written


def test_a_file_that_was_cut_back_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n2\n3\n")
    file = GrowingFile(path)
    assert read(file) == (False, [b"1\n", b"2\n", b"3\n"])
    os.truncate(path, 2)
    assert read(file) == (True, [b"1\n"])


def test_a_file_that_was_replaced_is_read_again_even_with_the_same_inode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n2\n")
    file = GrowingFile(path)
    read(file)
    with path.open("r+b") as same:
        same.write(b"7\n8\n9\n")
    assert read(file) == (True, [b"7\n", b"8\n", b"9\n"])


def test_a_file_that_was_deleted_leaves_nothing_and_may_come_back(tmp_path):
    path = tmp_path / "a.jsonl"
    file = GrowingFile(path)
    assert read(file) == (False, [])
    path.write_bytes(b"1\n")
    assert read(file) == (False, [b"1\n"])
    path.unlink()
    assert read(file) == (True, [])
    assert read(file) == (False, [])
    path.write_bytes(b"2\n")
    assert read(file) == (False, [b"2\n"])


MEBIBYTE = "x" * (1 << 20)


def rows_of(path) -> list[list[int]]:
    """The steps in each part."""
    return [[row["step"] for row in read_jsonl(part)] for part in parts(path) if part.exists()]


def test_a_file_that_is_large_enough_becomes_an_older_part(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = RotatingJsonlWriter(path, 2)
    for step in range(5):
        writer.append({"step": step, "text": MEBIBYTE}, {"step": step})
    writer.close()
    assert rows_of(path) == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]]
    writer = RotatingJsonlWriter(path, 1)
    writer.append({"step": 9})
    assert rows_of(path) == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4], [9]]
    truncate_parts_after(path, 2)
    assert rows_of(path) == [[0, 0, 1, 1], [2, 2], []]


def test_without_a_size_nothing_is_rotated(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = RotatingJsonlWriter(path, None)
    for step in range(3):
        writer.append({"step": step, "text": MEBIBYTE})
    assert older_parts(path) == []


def test_a_file_that_was_deleted_begins_again(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = RotatingJsonlWriter(path, 1)
    writer.append({"step": 1})
    path.unlink()
    writer.append({"step": 2})
    assert rows_of(path) == [[2]]


def test_parts_that_a_resumed_run_keeps_are_not_written_again(tmp_path):
    path = tmp_path / "a.jsonl"
    part_path(path, 1).write_text('{"step": 1, "a": 1}\n{"a": 2, "step": 2}\n')
    path.write_text('{"step": 2}\n{"step": 3}\n')
    before = part_path(path, 1).stat()
    truncate_parts_after(path, 2)
    assert rows_of(path) == [[1, 2], [2]]
    assert part_path(path, 1).stat().st_ino == before.st_ino
