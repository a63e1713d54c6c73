"""Set-up: one clear line if it cannot work, and locks without packages for another torch."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
GPU_LOCK = [
    line
    for line in (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.fixture
def set_up(tmp_path):
    """Run a set-up with a stand-in for Python that refuses what `refuses` matches."""

    def run(refuses, script="setup_cpu.sh"):
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\ncase "$*" in {refuses}) exit 1;; esac\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        venv = str(tmp_path / "venv")
        environment = os.environ | {"PYTHON": str(python), "VENV": venv, "VENV_GPU": venv}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / script)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert not (tmp_path / "venv").exists()
        (line,) = done.stderr.splitlines()  # notes go to stdout
        return line

    return run


def test_an_unsupported_python_is_named_with_its_version(set_up):
    line = set_up("*version_info*")
    assert "Python 3.11 or 3.12 is needed" in line
    assert f"(Python {sys.version.split()[0]})" in line


def test_the_gpu_set_up_asks_for_the_python_that_it_is_pinned_for(set_up):
    line = set_up("*version_info*", "setup_gpu.sh")
    assert "Python 3.12 is needed" in line
    assert "make setup-gpu PYTHON=" in line


def test_a_python_without_venv_says_what_to_install(set_up):
    assert "python3-venv" in set_up("*ensurepip*")


@pytest.mark.parametrize("lock", [LOCK, GPU_LOCK], ids=["cpu", "gpu"])
def test_every_package_is_pinned_once(lock):
    names = [re.fullmatch(r"([a-z0-9.-]+)==[^;\s]+", line).group(1) for line in lock]
    assert len(set(names)) == len(names)


def test_packages_that_are_built_for_another_torch_stay_out():
    for name in ("torchvision", "torchaudio", "torchcodec", "triton"):
        assert not any(line.startswith(f"{name}==") for line in LOCK)


def test_the_lock_agrees_with_the_cpu_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for pin in project["optional-dependencies"]["cpu"]:
        assert any(line == pin or line.startswith(f"{pin}+") for line in LOCK), pin


def test_the_gpu_lock_agrees_with_the_gpu_extra_and_with_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["gpu"]
    pinned = dict(line.split("==") for line in GPU_LOCK)
    for requirement in map(Requirement, wanted):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", ["torch", "transformers", "megatron.core", "ray", "vllm"])
def test_packages_are_compiled_once_and_not_by_each_process(name):
    """Where PYTHONDONTWRITEBYTECODE is set, as in many containers, no import does it for others."""
    assert Path(importlib.util.find_spec(name).cached).exists()
