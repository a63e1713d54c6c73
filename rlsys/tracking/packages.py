"""Packages of trackers that rlsys does not install by itself."""

from __future__ import annotations

from collections.abc import Iterable

from packaging.requirements import Requirement

from rlsys.packages import installed_version

REQUIREMENTS = {
    "wandb": "wandb>=0.19",
    "mlflow": "mlflow>=3",
    "trackio": "trackio>=0.20",
    "swanlab": "swanlab>=0.8",
}
"""Tracker -> what pip installs for it; pyproject.toml has an extra of the same name for each."""
SMALLER = {"mlflow": "mlflow-skinny"}
"""Tracker -> a distribution that does, too, where the tracker has a server."""


def version_of(tracker: str) -> str | None:
    """The version of a tracker's package; None if it is not installed."""
    names = (Requirement(REQUIREMENTS[tracker]).name, SMALLER.get(tracker))
    return next(filter(None, (installed_version(name) for name in names if name)), None)


def missing_packages(trackers: Iterable[str]) -> str | None:
    """What to install for trackers, in a sentence; None if nothing is missing or too old."""
    missing = []
    for name in (name for name in trackers if name in REQUIREMENTS):
        found = version_of(name)
        if found is None:
            missing.append((name, "is not installed"))
        elif not Requirement(REQUIREMENTS[name]).specifier.contains(found, prereleases=True):
            missing.append((name, f"is {found}, too old"))
    if not missing:
        return None
    names = ", ".join(repr(name) for name, _ in missing)
    states = ", ".join(f"{name} {state}" for name, state in missing)
    wanted = " ".join(f'"{REQUIREMENTS[name]}"' for name, _ in missing)
    return (
        f"tracking.report_to names {names}, but {states}. Install with `pip install {wanted}`, or "
        f"take {names} out of tracking.report_to."
    )
