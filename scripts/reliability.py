"""Write the tables of docs/reliability.md from benchmarks/baselines/faults.json and soak.json.

python scripts/reliability.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from page_tables import table, with_tables  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
FAULTS, SOAK = (ROOT / "benchmarks" / "baselines" / name for name in ("faults.json", "soak.json"))
SIGNALS = {"SIGKILL": "killed", "SIGSTOP": "stopped"}


def markdown() -> str:
    """The page with its tables written again."""
    measured = (("faults", FAULTS, fault_rows), ("soak", SOAK, soak_rows))
    tables = {
        name: rows_of(json.loads(file.read_text()))
        for name, file, rows_of in measured
        if file.exists()
    }
    return with_tables(PAGE.read_text(encoding="utf-8"), tables, script="scripts/reliability.py")


def fault_rows(data: dict[str, Any]) -> list[str]:
    """A row for each fault: noticed and recovered after, and what was lost."""
    head = ["process", "in the middle of", "what happened", "noticed", "next step done", "lost"]
    rows = [
        [
            row["role"],
            row["phase"],
            SIGNALS[row["signal"]],
            seconds(row["noticed_s"]),
            seconds(row["recovered_s"]),
            lost(row),
        ]
        for row in data["table"]
    ]
    return [*machine_line(data["machine"]), "", *table(head, rows)]


def soak_rows(data: dict[str, Any]) -> list[str]:
    """What happened in a soak, and how its processes grew."""
    recovered = sorted(row["recovered_s"] for row in data["faults"] if row["recovered_s"])
    same = "nothing differs" if not data["differences"] else f"differs: {data['differences'][0]}"
    text = (
        f"{data['minutes']:g} minutes, {data['steps']:,} steps, {len(data['faults'])} faults; the "
        f"next step was finished after {recovered[0]:.1f} to {recovered[-1]:.1f} s, "
        f"{recovered[len(recovered) // 2]:.1f} s in the middle. Against the run that was left "
        f"alone: {same}."
    )
    rows = [
        [
            row["role"],
            f"{row['steps']:,}",
            " -> ".join(map(str, row["mib"])),
            " -> ".join(map(str, row["handles"])),
            "yes" if row["is_flat"] else "no",
        ]
        for row in data["processes"]
    ]
    head = ["process that grew most", "steps", "own memory, MiB", "file handles", "flat"]
    return [*machine_line(data["machine"]), "", text, "", *table(head, rows)]


def machine_line(machine: dict[str, Any]) -> list[str]:
    """Where and when it was measured."""
    load = machine["load_average_at_start"]
    return [
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, load {load:.1f} at the "
        "start, CPU only."
    ]


def lost(row: dict[str, Any]) -> str:
    """What a fault cost besides seconds."""
    if row["error"] is not None:
        return row["error"]
    return "nothing" if not row["differences"] else f"differs: {row['differences'][0]}"


def seconds(value: float | None) -> str:
    """A cell with seconds."""
    return "-" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
