"""Look for known holes in the pinned packages: `make audit`.

pip-audit compares requirements/*.txt with a database of advisories. It says "No known
vulnerabilities found" also where no database answered, or one without advisories, such as that of a
mirror. So this first asks about a package that has known holes, and counts what was looked up.

Exit code: 1 if a package has known holes, else 0, also where no database was reached.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("osv", "pypi")
KNOWN_BAD = "urllib3==1.24.1"
"""CVE-2019-11324 and others."""
TIMEOUT_S = 900


def audit(requirements: str, service: str, folder: Path) -> list[dict[str, Any]]:
    """What pip-audit found out about each pinned package; nothing if the database is not there."""
    asked, answer = folder / "asked.txt", folder / "answer.json"
    # Databases know 2.13.0 and not 2.13.0+cpu, which is built from the same source.
    asked.write_text(re.sub(r"\+\w+$", "", requirements, flags=re.MULTILINE))
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(asked), "--no-deps",
               "--disable-pip", "--vulnerability-service", service, "--timeout", "10",
               "--format", "json", "--output", str(answer),
               "--progress-spinner", "off"]  # fmt: skip
    try:
        subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return []
    return json.loads(answer.read_text())["dependencies"] if answer.exists() else []


def holes(found: list[dict[str, Any]]) -> list[str]:
    """A line for each package with known holes."""
    return [
        f"{package['name']} {package['version']}: "
        + ", ".join(
            f"{hole['id']} (mended in {', '.join(hole['fix_versions']) or 'no version'})"
            for hole in package["vulns"]
        )
        for package in found
        if package.get("vulns")
    ]


def loud(text: str) -> None:
    """Print in a frame."""
    line = "!" * 88
    print(f"{line}\n{text}\n{line}", flush=True)


def main() -> int:
    """Audit all pinned sets with the first database that answers."""
    if importlib.util.find_spec("pip_audit") is None:
        loud("AUDIT SKIPPED: pip-audit could not be installed. `make audit` does it where pip can.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        service = next((name for name in SERVICES if holes(audit(KNOWN_BAD, name, place))), None)
        if service is None:
            loud(
                "AUDIT SKIPPED: no database of advisories answers here, as none knows the holes of "
                f"{KNOWN_BAD}.\nNothing is known about the pinned packages. Run `make audit` where "
                "api.osv.dev or pypi.org can be reached."
            )
            return 0
        status = 0
        for file in sorted((ROOT / "requirements").glob("*.txt")):
            found = audit(file.read_text(), service, place)
            unknown = sorted(package["name"] for package in found if "skip_reason" in package)
            lines = holes(found)
            print(f"{file.name}: {len(found) - len(unknown)} packages looked up in {service}")
            if unknown or not found:
                loud(f"NOT AUDITED in {file.name}: {', '.join(unknown) or 'everything'}")
            if lines:
                status = 1
                loud(f"KNOWN HOLES in {file.name}:\n" + "\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
