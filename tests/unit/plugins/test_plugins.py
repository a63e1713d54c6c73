"""Loading reward functions from the user's own files."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reward_cases import RewardFunctions

from rlsys.rewards import TrainerState, load_plugins, orms
from rlsys.types import Completion, Prompt, RolloutGroup

PLUGINS = Path(__file__).parents[3] / "plugins"

pytestmark = pytest.mark.usefixtures("forget_registrations")


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


@pytest.fixture
def modules(monkeypatch):
    """What tests import and append to sys.path is gone afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_plugin_imports_the_files_beside_it(tmp_path, modules):
    write(tmp_path / "helper_a.py", "from helper_b.deep import value\n")
    write(tmp_path / "helper_b" / "deep.py", "value = 3.0\n")
    write(tmp_path / "json.py", "raise RuntimeError('shadows the standard library')\n")
    write(tmp_path / "yaml.py", "raise RuntimeError('shadows an installed package')\n")
    code = (
        "import json, yaml\nfrom helper_a import value\n"
        "from rlsys.rewards import orms\norms['beside'] = lambda completions: [value]\n"
    )
    load_plugins([write(tmp_path / "plugin.py", code)])
    assert orms["beside"](["a"]) == [3.0]


def test_two_plugins_with_different_files_of_one_name_beside_them_are_an_error(tmp_path, modules):
    for name in "ab":
        write(tmp_path / name / "utils_of_mine.py", f"value = {name!r}\n")
        write(tmp_path / name / "plugin.py", "def f():\n    import utils_of_mine\nf()\n")
    load_plugins([tmp_path / "a" / "plugin.py"])
    with pytest.raises(ValueError, match="rename one of the two files") as caught:
        load_plugins([tmp_path / "b" / "plugin.py"])
    for name in "ab":
        assert str(tmp_path / name / "utils_of_mine.py") in str(caught.value)
    # A copy of the same file does no harm.
    write(tmp_path / "b" / "utils_of_mine.py", "value = 'a'\n")
    load_plugins([tmp_path / "b" / "plugin.py"])


@pytest.mark.parametrize(
    ("statement", "remedies"),
    [
        ("from swift.plugin import ORM, orms", ["from rlsys.rewards import ORM, orms"]),
        (
            "from swift.rewards import ORM as Base, AsyncORM, orms, rm_plugins",
            ["import ORM as Base, AsyncORM, orms", "rlsys has no rm_plugins (reward.reward_model"],
        ),
        (
            "from swift.llm import DatasetMeta, ResponsePreprocessor, register_dataset",
            ["from rlsys.data import DatasetMeta, ResponsePreprocessor, register_dataset"],
        ),
        ("from swift.utils import get_logger", ["Delete the line", "get_logger (logging.getLog"]),
        ("import swift.plugin", ["from rlsys.rewards import ORM, orms"]),
    ],
)
def test_an_import_of_ms_swift_names_the_line_to_write(tmp_path, statement, remedies):
    plugin = write(tmp_path / "from_swift.py", f"import re\n\n{statement}\n")
    with pytest.raises(ValueError, match=r"from_swift\.py, line 3: `") as caught:
        load_plugins([plugin])
    for remedy in remedies:
        assert remedy in str(caught.value)


def test_an_import_of_ms_swift_in_a_file_beside_the_plugin_is_found(tmp_path, modules):
    helper = write(tmp_path / "helper_swift.py", "from swift.plugin import orms\n")
    with pytest.raises(ValueError, match="raised when it was imported") as caught:
        load_plugins([write(tmp_path / "plugin.py", "import helper_swift\n")])
    assert f"{helper}, line 1: `from swift.plugin import orms`" in str(caught.value)


def test_registrations_with_an_installed_ms_swift_are_reported(tmp_path, modules):
    write(tmp_path / "swift" / "plugin.py", "orms = {}\n")
    sys.path.append(str(tmp_path))
    code = "from swift.plugin import orms\ndef f(c): pass\norms['registered_there'] = f\n"
    load_plugins([write(tmp_path / "there.py", code)])
    with pytest.raises(ValueError, match=r"there\.py, line 1: .*does not use what is registered"):
        orms["registered_there"]


def test_a_relative_import_says_what_to_write(tmp_path):
    plugin = write(tmp_path / "relative.py", "from .helper import f\n")
    with pytest.raises(ValueError, match="import the files beside it without the dot"):
        load_plugins([plugin])


def test_a_plugin_called_math_shadows_nothing(tmp_path, modules):
    plugin = write(tmp_path / "math.py", "import math\nassert math.pi > 3\n")
    other = write(tmp_path / "b" / "math.py", "from rlsys.rewards import orms\norms['b'] = abs\n")
    before = list(sys.path)
    load_plugins([plugin, other])
    assert sys.modules["math"] is math
    assert sys.path == [*before, str(plugin.parent), str(other.parent)]
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
    [name] = [
        name for name in sys.modules if name.startswith("rlsys.plugins.user_files.with_dataclass_")
    ]
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
    text = "from rlsys.rewards import orms\ndef f(c): return 0\norms['corrected'] = f\n"
    plugin = write(tmp_path / "corrected.py", text + "1 / 0\n")
    for _ in range(2):  # what it registered before it failed is in nobody's way
        with pytest.raises(ValueError, match="ZeroDivisionError"):
            load_plugins([plugin])
    write(plugin, text)
    load_plugins([plugin])
    assert orms["corrected"]("a") == 0


def test_two_plugins_that_claim_a_name_are_both_named_with_their_lines(tmp_path):
    text = "from rlsys.rewards import register_reward\n\n@register_reward('taken')\ndef f(c): 0\n"
    first, second = (write(tmp_path / name / "mine.py", text) for name in "ab")
    load_plugins([first])
    with pytest.raises(ValueError, match="registered twice") as caught:
        load_plugins([second])
    assert f"by {first}:3 and by {second}:3" in str(caught.value)


def test_a_file_written_for_ms_swift_runs_with_its_import_line_changed(tmp_path):
    plugin = write(
        tmp_path / "plugin.py",
        "import re\n"
        "from typing import List\n"
        "from rlsys.rewards import ORM, AsyncORM, orms  # was: from swift.rewards import ...\n"
        "class Boxed(ORM):\n"
        "    @staticmethod\n"
        "    def answer(text: str) -> str:\n"
        "        return re.findall(r'boxed{(.*?)}', text)[-1:]\n"
        "    def __call__(self, completions, solution, **kwargs) -> List[float]:\n"
        "        pairs = zip(completions, solution)\n"
        "        return [float(self.answer(c) == self.answer(s)) for c, s in pairs]\n"
        "class Late(ORM):\n"
        "    def __init__(self, args=None, **kwargs):\n"
        "        super().__init__(args, **kwargs)\n"
        "    def __call__(self, completions, **kwargs) -> List[float]:\n"
        "        state = kwargs.get('trainer_state')\n"
        "        ids = kwargs.get('response_token_ids')\n"
        "        return [state.global_step / state.max_steps + len(i) for i in ids]\n"
        "class Judge(AsyncORM):\n"
        "    async def __call__(self, completions, **kwargs) -> List[float]:\n"
        "        return [0.5] * len(completions)\n"
        "orms['external_boxed'] = Boxed\n"
        "orms['external_late'] = Late\n"
        "orms['external_judge'] = Judge\n",
    )
    load_plugins([plugin])
    names = ["external_boxed", "external_late", "external_judge"]
    prompt = Prompt("p", [], [], {"solution": "boxed{4}"})
    completions = [Completion([1, 2], [], text, "stop", (0,)) for text in ("boxed{4}", "4")]
    group = RolloutGroup(0, prompt, completions)
    rewards = RewardFunctions(names).score(group, TrainerState(1, 4))
    assert [tuple(reward.by_name.values()) for reward in rewards] == [
        (1.0, 2.25, 0.5),
        (0.0, 2.25, 0.5),
    ]


def test_a_reference_names_a_function_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own" / "math.py", "def short(completions, **kwargs):\n    return [1.0]\n")
    reference = "own/math.py:short"
    assert orms[reference](["a"]) == [1.0]
    assert orms[reference] is orms[reference]
    assert orms[str(tmp_path / reference)] is orms[reference]
    with pytest.raises(ValueError, match=r"no function or class 'shrot'. Did you mean 'short'"):
        orms["own/math.py:shrot"]
    with pytest.raises(ValueError, match=r"own/none\.py' is not a file"):
        orms["own/none.py:short"]


def test_a_plugin_that_registers_nothing_says_how_to_name_its_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os\nfrom rlsys.rewards import ORM\n_x = 1\n"
    write(tmp_path / "noreg.py", code + "def pays(completions, **kwargs):\n    return [1.0]\n")
    load_plugins(["noreg.py"])
    for name in ("noreg", "pays"):
        with pytest.raises(ValueError, match=f"unknown reward function '{name}'") as caught:
            orms[name]
        assert f"noreg.py was loaded, but registered no reward {name!r}" in str(caught.value)
        assert "name that as noreg.py:pays (path:function)" in str(caught.value)
    with pytest.raises(ValueError, match=r"Known: [^:]*\. For one of your own, name"):
        orms["nothing"]
    assert orms["noreg.py:pays"](["a"]) == [1.0]
    del orms.data["noreg.py:pays"]


def test_a_reference_names_a_function_of_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(
        tmp_path / "package_of_mine" / "rewards.py", "def f(completions, **kw):\n    return [2]\n"
    )
    write(tmp_path / "json.py", "raise RuntimeError('shadows the standard library')\n")
    write(tmp_path / "broken_module.py", "import json\n1 / 0\n")
    assert orms["package_of_mine.rewards:f"](["a"]) == [2]
    with pytest.raises(ValueError, match=r"module 'nowhere' is neither installed nor"):
        orms["nowhere.at.all:f"]
    with pytest.raises(ValueError, match=r"(?s)raised when it was imported.*ZeroDivis") as caught:
        orms["broken_module:f"]
    assert "importlib" not in str(caught.value)


def test_trl_before_a_reference_passes_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "trained.py",
        "def f(prompts, completions, completion_ids, **kwargs):\n"
        "    return [float(len(messages[0]['content'])) for messages in completions]\n",
    )
    group = RolloutGroup(0, Prompt("p", [], []), [Completion([1], [], "four", "stop", (0,))])
    [reward] = RewardFunctions(["trl/trained.py:f"]).score(group)
    assert reward.total == 4.0


def test_installed_packages_offer_rewards_by_entry_points(tmp_path):
    def install(distribution: str, module: str) -> None:
        write(tmp_path / f"{module}.py", "def f(completions, **kwargs):\n    return [3.0]\n")
        info = tmp_path / f"{distribution}-1.0.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = f"[rlsys.rewards]\nshared = {module}:f\n{module} = {module}:f\n"
        write(info / "entry_points.txt", lines + f"format = {module}:f\n" * (module == "one"))

    install("dist_one", "one")
    install("dist_two", "two")
    program = (
        "from rlsys.rewards import orms\n"
        "print(orms['one'](['a']))\n"
        "for name in ('shared', 'format'):\n"
        "    try:\n"
        "        orms[name]\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    path = f"{tmp_path}{os.pathsep}{PLUGINS.parent}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, shared, taken = done.stdout.splitlines()
    assert loaded == "[3.0]"
    assert "'shared' is offered by " in shared
    assert "one:f of dist_one" in shared
    assert "two:f of dist_two" in shared
    assert "'format' is registered twice: by " in taken
    assert f"{tmp_path / 'one.py'}:1" in taken


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
    # A setting, None and a function that waits, in the same test because a file is loaded once.
    prompt = Prompt("p", [], [], {"nums": [6, 4]})
    texts = ("<think>6+4=10", "<think>6+4=10</think>", "<think> 7-3=4</think>")
    completions = [Completion([1], [], text, "stop", (0,)) for text in texts]
    names, params = ["think_steps", "first_number"], {"think_steps": {"without_thought": -1}}
    rewards = RewardFunctions(names, params=params).score(RolloutGroup(0, prompt, completions))
    assert [reward.total for reward in rewards] == [-1.0, 2.0, 1.0]
    assert math.isnan(rewards[0].by_name["first_number"])


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
