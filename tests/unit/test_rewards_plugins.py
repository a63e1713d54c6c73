"""Loading reward functions from the user's own files."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.rewards import load_plugins, orms

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture(autouse=True)
def _forget_registrations():
    before = dict(orms.data)
    yield
    orms.data.clear()
    orms.data.update(before)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_plugin_registers_in_both_ways(tmp_path):
    plugin = write(
        tmp_path / "mine.py",
        "from rlsys.rewards import ORM, orms, register_reward\n"
        "class Length(ORM):\n"
        "    def __init__(self, args=None, **kwargs):\n"
        "        super().__init__(args, **kwargs)\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [float(len(text)) for text in completions]\n"
        "orms['length'] = Length\n"
        "@register_reward('one')\n"
        "def one(completions, **columns):\n"
        "    return [1.0 for _ in completions]\n",
    )
    load_plugins([plugin])
    assert orms["length"]()(["abc"]) == [3.0]
    assert orms["one"](["abc"]) == [1.0]


def test_loading_again_does_nothing(tmp_path, monkeypatch):
    plugin = write(
        tmp_path / "again.py", "from rlsys.rewards import orms\norms['again'] = lambda: 0\n"
    )
    load_plugins([plugin])
    monkeypatch.chdir(tmp_path)
    load_plugins(["again.py", str(plugin), "./again.py"])
    assert "again" in orms


def test_a_plugin_called_math_shadows_nothing(tmp_path):
    plugin = write(tmp_path / "math.py", "import math\nassert math.pi > 3\n")
    other = write(tmp_path / "b" / "math.py", "from rlsys.rewards import orms\norms['b'] = abs\n")
    before = list(sys.path)
    load_plugins([plugin, other])
    assert sys.modules["math"] is math
    assert sys.path == before
    assert orms["b"] is abs


def test_classes_know_their_module(tmp_path):
    # dataclasses and pickle look a class's module up in sys.modules while the file still runs.
    plugin = write(
        tmp_path / "with_dataclass.py",
        "from __future__ import annotations\n"
        "import pickle\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class State:\n"
        "    n: int = 0\n"
        "assert pickle.loads(pickle.dumps(State(3))) == State(3)\n",
    )
    load_plugins([plugin])
    [name] = [name for name in sys.modules if name.startswith("rlsys_plugin_with_dataclass_")]
    assert sys.modules[name].State().n == 0


def test_a_missing_plugin_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no_such\.py' is not a file.*working directory"):
        load_plugins([tmp_path / "no_such.py"])


def test_a_plugin_must_be_a_python_file(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.py"):
        load_plugins([write(tmp_path / "plugin.txt", "")])


@pytest.mark.parametrize(
    ("text", "last_line"),
    [
        ("x = 1\nimport not_installed\n", "ModuleNotFoundError: No module named 'not_installed'"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye"),
        (
            "from rlsys.rewards import orms\norms['format'] = len\n",
            "ValueError: reward function 'format' is registered twice",
        ),
    ],
)
def test_a_plugin_that_raises_shows_its_own_traceback(tmp_path, text, last_line):
    plugin = write(tmp_path / "broken.py", text)
    with pytest.raises(ValueError, match="broken") as caught:
        load_plugins([plugin])
    message = str(caught.value)
    assert message.splitlines()[-1].startswith(last_line)
    assert f'File "{plugin}", line' in message
    assert "importlib" not in message


def test_a_corrected_plugin_loads(tmp_path):
    plugin = write(tmp_path / "corrected.py", "1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_plugins([plugin])
    write(plugin, "from rlsys.rewards import orms\norms['corrected'] = abs  # 1 / 0\n")
    load_plugins([plugin])
    assert orms["corrected"] is abs


def test_the_worked_plugin_pays_for_true_steps():
    load_plugins([PLUGINS / "think_steps.py"])
    reward = orms["think_steps"]()
    assert reward(
        [
            "<think>6+4=10 12+10=22</think><answer>12+6+4</answer>",
            "<think>6 + 4 = 10, then 12 + 10 = 23</think>",
            "<think>6/4=1.5 or 6/3=2</think>",
            "<think>I know it: 22.</think>",
            "6+4=10",
            "<think>1/0=1</think>",
            "<think>6+4=10",
        ]
    ) == [1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_example_in_the_readme_runs():
    _, *blocks = (PLUGINS / "README.md").read_text().split("```python\n")
    program = "\n".join(block.split("```")[0] for block in blocks)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PLUGINS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1.0, 0.5]\n"
