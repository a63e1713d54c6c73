"""What docs/security.md says of the code, looked for in all files of rlsys."""

import ast
import re
from pathlib import Path

import pytest

import rlsys

PACKAGE = Path(rlsys.__file__).parent
PAGE = PACKAGE.parent / "docs" / "security.md"

RUNS_CODE = re.compile(
    r"(builtins\.)?(eval|exec)|os\.(system|popen)|(.*\.)?(unsafe_load|full_load|read_pickle)"
    r"|(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve|_pickle)\.(load|loads|open|Unpickler)"
)
"""Calls that run what they are given."""
ALLOWED = {
    "sandbox/process/sandbox_server.py": {"exec"},  # the program, in its sandbox
    "sandbox/process/sandbox_calls.py": {"exec"},  # its tests, in another one
}
"""File -> those that it may contain."""


def problems(source: str) -> list[str]:
    """Calls that could run code from a file, or open a service to everybody."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            found.append(f"listens everywhere: {node.value}")
        if not isinstance(node, ast.Call):
            continue
        name, text = ast.unparse(node.func), ast.unparse(node)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if RUNS_CODE.fullmatch(name):
            found.append(name)
        elif name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{text}: without weights_only=True")
        elif name.startswith("yaml.load") and "Loader" not in text:
            found.append(f"{text}: without a safe loader")
        elif given.get("allow_pickle", "False") != "False":
            found.append(f"{text}: allows pickles")
        elif given.get("shell", "False") != "False":
            found.append(f"{text}: runs a shell")
        elif given.get("trust_remote_code", "False") != "False":
            found.append(f"{text}: runs code of a model folder")
        elif re.search(r"\bAuto\w+\.from_pretrained$", name):
            if given.get("trust_remote_code") != "False":
                found.append(f"{text}: without trust_remote_code=False")
            if "AutoModel" in name and given.get("use_safetensors") != "True":
                found.append(f"{text}: without use_safetensors=True")
    return found


def test_nothing_runs_code_that_comes_from_a_file():
    found = {
        file: [problem for problem in problems(path.read_text()) if problem not in allowed]
        for path in sorted(PACKAGE.rglob("*.py"))
        for file in [str(path.relative_to(PACKAGE))]
        for allowed in [ALLOWED.get(file, set())]
    }
    assert {file: problems for file, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True, timeout=1)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=trust)",
        "transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
        "server.bind(('0.0.0.0', 80))",
    ],
)
def test_the_check_finds_them(source):
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=_Loader)",
        "json.load(file)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
    ],
)
def test_the_check_passes_others(source):
    assert problems(source) == []


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE.read_text()))
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (PACKAGE.parent / name).is_file()] == []
