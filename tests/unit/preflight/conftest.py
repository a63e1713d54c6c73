import pytest
from config_cases import write_run

from rlsys.config.load import load_config
from rlsys.preflight.checks import check_run


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many this machine shows; many, unless a test says otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def show(number):
        monkeypatch.setattr("rlsys.preflight.machine.visible_gpus", lambda: number)

    monkeypatch.setattr("rlsys.preflight.machine.device_of_packages", lambda: None)
    show(64)
    return show


@pytest.fixture
def problems(tmp_path, gpus):
    def run(*overrides, **sections):
        return check_run(load_config(write_run(tmp_path, **sections), overrides).config)

    return run
