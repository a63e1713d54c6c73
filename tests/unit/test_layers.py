"""The layers: what may import what."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import rlsys

PACKAGE = Path(rlsys.__file__).parent

LAYERS = {
    "cli": "base, config, launch, commands",
    "commands": "everything below",
    "dashboard": "base, timeline, records",
    "launch": "everything below",
    "saving": "base, config, run, system",
    "driver": "base, config, algo, run, tracking, system, systems",
    "systems": "everything below",
    "system": "everything below",
    "rollout": "base, config, algo, rewards, tracking, data, actors",
    "preflight": "base, config, plugins, algo, model, run, rewards, tracking, data",
    "actors": "base, config, plugins, timeline, algo, model, weight_sync, rewards, engines",
    "data": "base, config, plugins, model",
    "records": "base, config, timeline, run, tracking",
    "tracking": "base, config, timeline, algo, run",
    "engines": "base, config, algo, model, weight_sync",
    "rewards": "base, config, plugins, sandbox, timeline, model",
    "run": "base, config, model",
    "weight_sync": "base, config",
    "model": "base, config",
    "algo": "base, config",
    "sandbox": "base",
    "timeline": "base",
    "plugins": "base",
    "config": "base",
    "base": "nothing",
}
"""What each folder of rlsys may import, from top to bottom: only folders below its own row.

"base" is every file at the top of rlsys/ that has no row here. Imports in functions and under
TYPE_CHECKING count. docs/architecture.md draws this table.
"""

HEAVY = {
    "ray": {"actors", "system", "systems", "commands", "preflight"},
    "vllm": {"engines"},
    "megatron": {"engines"},
}
"""Packages that only these folders may import."""


def allowed(folder: str) -> frozenset[str]:
    """The layers that a folder may import."""
    row = LAYERS[folder]
    if row == "everything below":
        return frozenset(list(LAYERS)[list(LAYERS).index(folder) + 1 :])
    return frozenset(() if row == "nothing" else row.split(", "))


def layer(name: str) -> str:
    """The layer of a folder or file at the top of rlsys/."""
    is_base = (PACKAGE / f"{name}.py").exists() or name == "rlsys"
    return "base" if is_base and name not in LAYERS else name


def imports(source: str) -> set[str]:
    """What a file imports anywhere in it: a layer of rlsys, or one of the HEAVY packages."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "rlsys has no relative imports"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            top, _, rest = module.partition(".")
            if top == "rlsys":
                found.add(layer(rest.partition(".")[0] or "rlsys"))
            elif top in HEAVY:
                found.add(top)
    return found


def forbidden(folder: str, imported: set[str]) -> set[str]:
    """The imports that a folder may not have."""
    heavy = {package for package, folders in HEAVY.items() if folder in folders}
    return imported - allowed(folder) - heavy - {folder}


def test_each_layer_imports_layers_below_it_only():
    order = list(LAYERS)
    for index, folder in enumerate(order):
        assert allowed(folder) <= set(order[index + 1 :]), folder


def test_each_folder_imports_only_what_its_row_allows():
    found = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        folder = layer("rlsys" if name == "__init__" else name)
        assert folder in LAYERS, f"rlsys/{name}/ needs a row in LAYERS"
        for module in forbidden(folder, imports(file.read_text())):
            found[f"{folder} -> {module}"].append(str(file.relative_to(PACKAGE)))
    broken = [f"{edge} in {', '.join(files)}" for edge, files in sorted(found.items())]
    assert not broken, "\n".join(["LAYERS does not allow these imports:", *broken])


@pytest.mark.parametrize(
    ("folder", "source", "found"),
    [
        ("config", "import rlsys.algo.kl", {"algo"}),
        ("config", "def load():\n    from rlsys.data import rows", {"data"}),
        ("base", "if TYPE_CHECKING:\n    from rlsys.config import Config", {"config"}),
        ("driver", "import ray", {"ray"}),
        ("rollout", "from rlsys import launch, types", {"launch"}),
        ("launch", "from rlsys.cli import main", {"cli"}),
        ("data", "from rlsys.data.row import Row\nfrom rlsys.config import Config", set()),
    ],
)
def test_the_check_finds_forbidden_imports(folder, source, found):
    assert forbidden(folder, imports(source)) == found


@cache
def height(folder: str) -> int:
    """The line of a layer in the drawing, from 0 at the bottom."""
    return 1 + max(map(height, allowed(folder)), default=-1)


def section_of_the_docs() -> str:
    page = (PACKAGE.parent / "docs/architecture.md").read_text()
    return page.partition("\n## Layers\n")[2].partition("\n## ")[0]


def test_the_drawing_in_the_docs_is_the_table():
    drawing = re.findall(r"^ {4}(.+)$", section_of_the_docs(), re.MULTILINE)
    drawn = {folder: line for line, text in enumerate(reversed(drawing)) for folder in text.split()}
    assert drawn == {folder: height(folder) for folder in LAYERS}


def test_the_folders_in_the_docs_have_the_imports_of_the_table():
    rows = re.findall(r"^\| `(\w+).*` \|.*\| (.*) \|$", section_of_the_docs(), re.MULTILINE)
    assert rows == list(LAYERS.items())


def sentence(folder: str) -> str:
    """The first paragraph of the docstring of a folder or file."""
    file = PACKAGE / f"{folder}.py"
    source = (file if file.exists() else PACKAGE / folder / "__init__.py").read_text()
    return ast.get_docstring(ast.parse(source)).partition("\n\n")[0].replace("\n", " ")


def test_the_sentences_in_the_docs_are_the_docstrings():
    rows = re.findall(r"^\| `(\w+).*?` \| (.*) \| .* \|$", section_of_the_docs(), re.MULTILINE)
    expected = {name: sentence(name) for name in LAYERS if name != "base"}
    assert {name: text for name, text in rows if name != "base"} == expected


IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(" ".join({name.split(".")[0] for name in sys.modules} & set(sys.argv[2:])))
"""


def imported(package: str, *candidates: str) -> list[str]:
    """Which of `candidates` a fresh process has loaded after importing all of `package`."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package, *candidates],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        (
            "rlsys.rewards",
            ["torch", "numpy", "ray", "vllm", "megatron", "datasets"],
        ),
        ("rlsys.algo", ["ray", "vllm", "megatron"]),
    ],
)
def test_a_layer_stays_light(package, forbidden):
    # Both load fractions: the check can fail.
    assert imported(package, "fractions", *forbidden) == ["fractions"]


@pytest.mark.parametrize("package", ["actors", "engines", "weight_sync"])
def test_the_device_is_handed_down_and_nobody_looks_for_gpus(package):
    """With `device: cpu` on a host with GPUs, code that looks for GPUs itself would take one."""
    looks = re.compile(r"cuda\.(is_available|device_count)|visible_gpus|guess_device")
    folder = Path(rlsys.__file__).parent / package
    found = [file.name for file in sorted(folder.rglob("*.py")) if looks.search(file.read_text())]
    assert found == []
