"""The sources of the page: types, pure parts, and that a build gives the committed bundle."""

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

import rlsys

pytestmark = pytest.mark.slow

DASHBOARD = Path(rlsys.__file__).parent / "dashboard"
WEB, STATIC = DASHBOARD / "web", DASHBOARD / "static"
MISSING = (
    "the sources of the page are not checked: `npm --prefix rlsys/dashboard/web ci` installs what "
    "that needs"
)


@pytest.fixture(scope="module", autouse=True)
def packages():
    """What `npm ci` installs."""
    if shutil.which("npm") is None or not (WEB / "node_modules" / "esbuild").is_dir():
        warnings.warn(MISSING, stacklevel=1)
        pytest.skip(MISSING)


def run(*words: str) -> None:
    done = subprocess.run(words, cwd=WEB, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["check", "test"])
def test_types_and_pure_parts(script):
    run("npm", "run", "--silent", script)


def test_a_build_gives_the_committed_bundle(tmp_path):
    run("node", "build.mjs", str(tmp_path / "static"))
    built = {file.name: file.read_bytes() for file in (tmp_path / "static").iterdir()}
    assert built == {file.name: file.read_bytes() for file in STATIC.iterdir()}
