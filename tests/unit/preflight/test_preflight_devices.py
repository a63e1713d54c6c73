"""Devices of this machine, asked without torch."""

import pytest

from rlsys.preflight import devices
from rlsys.preflight.devices import gpu_compute_capability, gpu_memory_gib, host_memory_gib


def test_the_memory_of_gpus_is_the_drivers(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 143771; echo 81559\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpu_memory_gib() == pytest.approx(79.6, abs=0.1)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_memory_gib() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_memory_gib() is None


def test_the_least_capable_gpu_counts(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 10.0; echo 9.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpu_compute_capability() == (9, 0)
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert gpu_compute_capability() is None


def test_the_memory_of_a_host_is_what_its_container_allows(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "_CONTAINER_LIMITS", (limit,))
    whole = host_memory_gib()
    limit.write_text("max\n")
    assert host_memory_gib() == whole > 0.1
    limit.write_text(f"{2**26}\n")
    assert host_memory_gib() == 2**26 / 2**30
