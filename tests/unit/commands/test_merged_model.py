"""The cache of merged models keeps those that were used last, and none is lost that is in use."""

import os
import subprocess
import sys

import pytest
from config_cases import write_model
from test_export_adapter import save_base, write_adapter

from rlsys.commands import merged_model
from rlsys.commands.merged_model import KEPT, with_merged_adapter
from rlsys.run.model_source import find_model

HOLDER = """
import sys
from rlsys.commands.merged_model import with_merged_adapter
from rlsys.run.model_source import find_model
print(with_merged_adapter(find_model(sys.argv[1])).folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "rlsys" / "merged"
    end_of_command()


@pytest.fixture
def adapters(tmp_path):
    """More adapters of one model than are kept."""
    base = save_base(tmp_path / "base")
    return [write_adapter(base, tmp_path / f"a{n}", lora_alpha=n) for n in range(1, KEPT + 3)]


def end_of_command():
    """What the end of a process does to its locks."""
    for file in merged_model._in_use:
        file.close()
    merged_model._in_use.clear()


def use(adapter, at):
    """Use an adapter in a command of its own, `at` seconds; returns the name of its folder."""
    folder = with_merged_adapter(find_model(str(adapter))).folder
    end_of_command()
    os.utime(folder, (at, at))
    return folder.name


def kept(cache):
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_the_models_that_were_not_used_for_longest_go(cache, adapters, capsys):
    names = [use(adapter, at) for at, adapter in enumerate(adapters[:KEPT])]
    assert kept(cache) == set(names)
    use(adapters[0], KEPT)  # again
    assert "removed" not in capsys.readouterr().err
    newest = use(adapters[KEPT], KEPT + 1)
    assert kept(cache) == {names[0], *names[2:], newest}
    text = capsys.readouterr().err
    assert f"removed {cache / names[1]}, " in text
    assert f"and {KEPT} are kept" in text


def test_a_model_that_another_command_uses_stays(cache, adapters):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(adapters[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    held = holder.stdout.readline().strip().rpartition("/")[2]
    os.utime(cache / held, (0, 0))
    names = [use(adapter, at) for at, adapter in enumerate(adapters[1:], start=1)]
    assert kept(cache) == {held, *names[-KEPT + 1 :]}
    holder.communicate("")
    use(adapters[1], KEPT + 5)
    assert held not in kept(cache)


def test_all_models_of_one_command_stay(cache, adapters):
    folders = [with_merged_adapter(find_model(str(adapter))).folder for adapter in adapters]
    assert kept(cache) == {folder.name for folder in folders}


def test_a_full_disk_costs_more_models_but_not_those_in_use(cache, adapters, monkeypatch, capsys):
    name = use(adapters[0], 1)
    in_use = with_merged_adapter(find_model(str(adapters[1]))).folder.name
    monkeypatch.setattr(merged_model, "free_bytes", lambda place: 10 if name in kept(cache) else 9)
    with pytest.raises(ValueError, match=r"has 0\.0 MiB free, and the merged model takes"):
        with_merged_adapter(find_model(str(adapters[2])))
    assert kept(cache) == {in_use}
    assert "the disk has no room for another one" in capsys.readouterr().err


def test_what_a_killed_command_left_is_removed(cache, adapters):
    write_model(cache / "a9-abc.partial")
    use(adapters[0], 1)
    assert len(kept(cache)) == 1
