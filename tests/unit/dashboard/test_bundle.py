"""The page that is committed is the one that its sources give; no npm is needed to tell."""

import hashlib
import json
import re
from pathlib import Path

import pytest

import rlsys

DASHBOARD = Path(rlsys.__file__).parent / "dashboard"
WEB, STATIC = DASHBOARD / "web", DASHBOARD / "static"
BUILT = json.loads((STATIC / "build.json").read_text())
TO_BUILD = "run `make dashboard` and commit rlsys/dashboard/static"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source_hash(web: Path) -> str:
    """What build.mjs records: one hash over names and contents, in the order of the names."""
    files = ["build.mjs", "package-lock.json", "package.json", "tsconfig.json"]
    files += [f"src/{file.name}" for file in (web / "src").iterdir()]
    lines = [f"{name} {sha256((web / name).read_bytes())}\n" for name in sorted(files)]
    return sha256("".join(lines).encode())


def test_the_bundle_is_built_from_these_sources():
    assert source_hash(WEB) == BUILT["sources"], TO_BUILD


def test_the_bundle_was_not_edited():
    found = {f.name: sha256(f.read_bytes()) for f in STATIC.iterdir() if f.name != "build.json"}
    assert found == BUILT["files"], TO_BUILD


def test_versions_are_exact_and_locked():
    package = json.loads((WEB / "package.json").read_text())
    locked = json.loads((WEB / "package-lock.json").read_text())["packages"]
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), f"{name} {version} is not an exact version"
        assert locked[f"node_modules/{name}"]["version"] == version


def test_the_licences_of_what_is_shipped_are_beside_it():
    licences = (STATIC / "LICENSES.txt").read_text()
    for name, version in json.loads((WEB / "package.json").read_text())["dependencies"].items():
        assert f"{name} {version} (MIT)" in licences


@pytest.mark.parametrize("name", ["index.html", "app.css"])
def test_the_page_names_no_other_host(name):
    text = (STATIC / name).read_text()
    assert "//" not in text.replace("</", ""), "an address of another host"
    assert "data:" not in text, "the Content-Security-Policy allows files of this server only"


@pytest.mark.parametrize("file", sorted((WEB / "src").glob("*.ts*")), ids=lambda file: file.name)
def test_sources_write_no_html(file):
    assert not re.search(
        r"innerHTML|insertAdjacentHTML|dangerously|document\.write|\beval\(", file.read_text()
    )
