"""`make audit` never calls packages safe that nobody looked up."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit.py"
HOLE = {"id": "CVE-2019-11324", "fix_versions": ["1.24.2"], "aliases": []}
BAD = {"name": "urllib3", "version": "1.24.1", "vulns": [HOLE]}
CLEAN = {"name": "absl-py", "version": "2.5.1", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.fixture
def audit(monkeypatch):
    """Runs the script with what a database says of known holes, and of the pinned packages."""
    spec = importlib.util.spec_from_file_location("audit_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)

    def run(of_known_bad, of_pinned, answers=("osv", "pypi")):
        def answer(requirements, service, folder):
            if service not in answers:
                return []
            return of_known_bad if requirements == module.KNOWN_BAD else of_pinned

        monkeypatch.setattr(module, "audit", answer)
        return module.main()

    return run


@pytest.mark.parametrize("of_known_bad", [[], [UNKNOWN], [CLEAN]])
def test_a_database_without_advisories_is_no_audit(audit, capsys, of_known_bad):
    assert audit(of_known_bad, [CLEAN]) == 0
    out = capsys.readouterr().out
    assert "AUDIT SKIPPED" in out
    assert "looked up" not in out


def test_known_holes_are_named_and_fail(audit, capsys):
    assert audit([BAD], [CLEAN, BAD]) == 1
    out = capsys.readouterr().out
    assert "urllib3 1.24.1: CVE-2019-11324 (mended in 1.24.2)" in out
    assert "cpu.txt: 2 packages looked up in osv" in out


def test_what_was_not_looked_up_is_named(audit, capsys):
    assert audit([BAD], [CLEAN, UNKNOWN], answers=("pypi",)) == 0
    out = capsys.readouterr().out
    assert "NOT AUDITED in gpu.txt: torch" in out
    assert "1 packages looked up in pypi" in out


def test_a_set_that_gets_no_answer_is_not_audited(audit, capsys):
    assert audit([BAD], []) == 0
    assert "NOT AUDITED in cpu.txt: everything" in capsys.readouterr().out
