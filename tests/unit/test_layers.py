"""The layers: what may import what."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlsys

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
    assert imported(package, *forbidden) == []


def test_the_check_above_can_fail():
    assert imported("rlsys.rewards", "fractions", "ray") == ["fractions"]


@pytest.mark.parametrize("package", ["actors", "engines", "weight_sync"])
def test_the_device_is_handed_down_and_nobody_looks_for_gpus(package):
    """With `device: cpu` on a host with GPUs, whoever looks for himself would take one."""
    looks = re.compile(r"cuda\.(is_available|device_count)|visible_gpus|guess_device")
    folder = Path(rlsys.__file__).parent / package
    found = [file.name for file in sorted(folder.glob("*.py")) if looks.search(file.read_text())]
    assert found == []
