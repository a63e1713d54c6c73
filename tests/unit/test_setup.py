"""Set-up: clear words where it cannot work, and a lock that cannot bring in the known trap."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()


@pytest.fixture
def set_up(tmp_path):
    """Run the set-up with a stand-in for Python that refuses what `refuses` matches."""

    def run(refuses):
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\ncase "$*" in {refuses}) exit 1;; esac\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python), "VENV": str(tmp_path / "venv")}
        script = ROOT / "scripts" / "setup_cpu.sh"
        done = subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert not (tmp_path / "venv").exists()
        (line,) = done.stderr.splitlines()
        return line

    return run


def test_an_unsupported_python_is_named_with_its_version(set_up):
    line = set_up("*version_info*")
    assert "Python 3.11 or 3.12 is needed" in line
    assert f"(Python {sys.version.split()[0]})" in line


def test_a_python_without_venv_says_what_to_install(set_up):
    assert "python3-venv" in set_up("*ensurepip*")


def test_every_package_is_pinned_once():
    names = [re.fullmatch(r"([a-z0-9.-]+)==[^;\s]+", line).group(1) for line in LOCK]
    assert len(set(names)) == len(names)


def test_packages_that_are_built_for_another_torch_stay_out():
    for name in ("torchvision", "torchaudio", "torchcodec", "triton"):
        assert not any(line.startswith(f"{name}==") for line in LOCK)


def test_the_lock_agrees_with_the_cpu_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for pin in project["optional-dependencies"]["cpu"]:
        assert any(line == pin or line.startswith(f"{pin}+") for line in LOCK), pin
