import os

from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.rotation import GrowingFile, older_parts, part_path


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
