"""The `rlsys` command as a process: exit codes, where messages go, and what is not imported."""

import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from config_cases import write_run

from rlsys import cli
from rlsys.commands import rewards_list
from rlsys.commands.grpo import in_another_folder

pytestmark = pytest.mark.processes


def rlsys(*words, python=("-m", "rlsys.cli")):
    return subprocess.run(
        [sys.executable, *python, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["grpo", "--help"], ["grpo", "x.yaml", "--help"]])
def test_help_exits_0(words):
    done = rlsys(*words)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: rlsys")


def test_the_version_is_shown():
    done = rlsys("--version")
    assert (done.returncode, done.stdout) == (0, f"rlsys {version('rlsys')}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grpo"], "rlsys grpo: error: CONFIG, a YAML file, is missing, as in"),
        (["explain", "--policy.lr", "3"], "CONFIG, a YAML file, should stand before --policy.lr"),
        (["data", "preview", "--rows", "3"], "CONFIG, a YAML file, is missing, as in"),
    ],
)
def test_a_missing_config_gets_an_example(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    error = capsys.readouterr().err
    assert message in error
    command = " ".join(word for word in words if word.isalpha())
    assert f"  rlsys {command} examples/countdown/demo.yaml --policy.lr 1e-5\n" in error
    assert "overrides" not in error


def test_options_of_the_preview_may_stand_before_the_config(tmp_path, capsys):
    assert cli.main(["data", "preview", "--rows", "3", str(tmp_path / "nowhere.yaml")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_wrong_config_is_one_message_on_stderr_without_traceback(tmp_path):
    done = rlsys("grpo", write_run(tmp_path), "--policy.lrr", "1", "--rollout.temperature", "-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "has 2 problems" in done.stderr
    assert "Did you mean 'policy.lr'?" in done.stderr


def test_what_preflight_finds_is_reported_the_same_way(tmp_path):
    done = rlsys(
        "grpo", write_run(tmp_path), "--model.path", "./nowhere", "--data.dataset", "n.jsonl"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "has 2 problems" in done.stderr


def test_the_exit_code_of_explain_says_whether_the_config_can_run(tmp_path):
    path = write_run(tmp_path)
    assert cli.main(["explain", str(path)]) == 0
    assert cli.main(["explain", str(path), "--reward.reward_funcs", "nothing"]) == 1
    assert cli.main(["explain", str(path), "--nothing", "1"]) == 2


def test_help_errors_and_explain_import_none_of_the_heavy_packages(tmp_path):
    heavy = ("torch", "ray", "vllm", "megatron", "transformers", "datasets")
    script = (
        "import sys; from rlsys.cli import main; main(sys.argv[1:]);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = rlsys("explain", write_run(tmp_path), python=("-c", script))
    assert done.stdout.endswith("[]\n")


def test_a_users_mistake_is_a_message_and_a_librarys_error_a_traceback(capsys, monkeypatch):
    def users_mistake(args):
        from rlsys.rewards import orms

        return orms["nothing"]

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewards_list, "main", users_mistake)
    assert cli.main(["rewards", "list"]) == 2
    assert "unknown reward function 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr(rewards_list, "main", lambda args: int("x"))  # raised outside of rlsys
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["rewards", "list"])
    monkeypatch.setattr(rewards_list, "main", interrupted)
    assert cli.main(["rewards", "list"]) == 130


def test_a_full_disk_is_a_message(capsys, monkeypatch):
    def fills_the_disk(args):
        Path("/dev/full").write_text("x")

    monkeypatch.setattr(rewards_list, "main", fills_the_disk)
    assert cli.main(["rewards", "list"]) == 74
    assert capsys.readouterr().err == "\nrlsys rewards list: No space left on device: free some\n"


@pytest.mark.parametrize(
    "given",
    [["--output_dir", "a"], ["--output-dir", "a"], ["--output-dir=a"], ["+output_dir=a"], []],
)
def test_the_command_for_another_folder_names_it_once(given):
    others = ["--tracking.run_name", "output_dir", "--seed", "1"]
    said = in_another_folder("grpo", "c.yaml", [*given, *others], Path("nowhere/a"))
    command = shlex.split(said.splitlines()[1])
    assert command == ["rlsys", "grpo", "c.yaml", *others, "--output_dir", "nowhere/a-2"]


def test_a_canary_takes_an_output_dir_and_says_that_it_has_no_effect(tmp_path, capsys):
    words = ["--output_dir", "runs/c", "--model.path", "./nowhere"]
    assert cli.main(["doctor", "--canary", str(write_run(tmp_path)), *words]) == 2
    out, error = capsys.readouterr()
    assert "--output_dir runs/c has no effect: a canary run keeps nothing" in out
    assert "output_dir" not in error
