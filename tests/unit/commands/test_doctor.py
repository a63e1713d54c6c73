"""`rlsys doctor` finds packages that are installed and cannot be imported."""

import io

import pytest
from rich.console import Console

from rlsys.commands import doctor
from rlsys.commands.doctor import Finding, check_imports, examine
from rlsys.packages import installed_version

pytestmark = pytest.mark.processes


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write modules that the child process can import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(**modules):
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code)

    return write


def test_an_import_that_fails_is_found_and_does_not_hide_others(packages):
    packages(
        good_package="x = 1; print('a package may talk')",
        bad_package="raise RuntimeError('operator torchvision::nms does not exist')",
        wrapper="try:\n    import bad_package\nexcept RuntimeError as e:\n"
        "    raise ImportError('check your requirements') from e",
    )
    imports = {
        "wrapped": ("wrapper", "x"),
        "nothing": ("no_package_of_this_name", "x"),
        "old": ("good_package", "newer_name"),
        "good": ("good_package", "x"),
    }
    found = {finding.subject: finding for finding in check_imports(imports)}
    assert {subject: f.level for subject, f in found.items()} == {
        "wrapped": "broken",
        "nothing": "broken",
        "old": "broken",
        "good": "ok",
    }
    assert "torchvision::nms" in found["wrapped"].detail  # the cause, not the wrapping
    assert "no_package_of_this_name" in found["nothing"].detail
    assert all(f.remedy for f in found.values() if f.level == "broken")


def test_a_package_that_ends_the_process_is_named(packages):
    packages(
        good="x = 1", crash="import os, sys; sys.stderr.write('illegal instruction'); os._exit(3)"
    )
    first, second = check_imports({"good": ("good", "x"), "crash": ("crash", "x"), "b": ("b", "x")})
    assert (first.level, second.level, second.subject) == ("ok", "broken", "crash")
    assert "exit code 3" in second.detail
    assert "illegal instruction" in second.detail


def test_a_torchvision_for_another_torch_is_the_remedy(packages, tmp_path, monkeypatch):
    info = tmp_path / "torchvision-0.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "visible_gpus", lambda: 0)
    packages(model="raise RuntimeError('operator torchvision::nms does not exist')")
    (finding,) = check_imports({"model": ("model", "x")})
    assert "pip uninstall torchvision" in finding.remedy


def test_installed_version():
    assert installed_version("rlsys")
    assert installed_version("no-package-of-this-name") is None


@pytest.mark.parametrize(("level", "works"), [("ok", True), ("note", True), ("broken", False)])
def test_one_broken_thing_means_that_a_run_cannot_work(monkeypatch, level, works):
    def findings():
        yield Finding(level, "something", "as it is", "do this")

    for part in ("_machine", "_packages", "check_imports", "_ray"):
        monkeypatch.setattr(doctor, part, findings)
    text = io.StringIO()
    assert examine(Console(file=text, width=100)) == works
    assert "do this" in text.getvalue()
    assert ("cannot work" in text.getvalue()) != works
