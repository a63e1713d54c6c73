"""Write the tables of docs/reliability.md from JSON files in benchmarks/baselines.

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
BASELINES = ROOT / "benchmarks" / "baselines"
SIGNALS = {"SIGKILL": "killed", "SIGSTOP": "stopped"}


def markdown() -> str:
    """The page with its tables written again."""
    measured = {
        "faults": fault_rows,
        "soak": soak_rows,
        "reliability_cost": cost_rows,
    }
    tables = {
        name: rows_of(json.loads(file.read_text()))
        for name, rows_of in measured.items()
        if (file := BASELINES / f"{name}.json").exists()
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
    lines = [*machine_line(data["machine"]), "", text, "", *growth(data["processes"]), ""]
    lines += ["The run that was left alone:", "", *growth(data["processes_alone"]), ""]
    return [*lines, *soak_faults(data["faults"])]


def growth(processes: list[dict[str, Any]]) -> list[str]:
    """How the process of each role that grew most did."""
    head = ["process that grew most", "steps", "own memory, MiB", "file handles", "flat"]
    rows = [
        [
            row["role"],
            f"{row['steps']:,}",
            " -> ".join(map(str, row["mib"])),
            " -> ".join(map(str, row["handles"])),
            "yes" if row["is_flat"] else "no",
        ]
        for row in processes
    ]
    return table(head, rows)


def soak_faults(faults: list[dict[str, Any]]) -> list[str]:
    """How often each fault came in a soak, and the medians of its seconds."""
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in faults:
        kinds.setdefault((row["role"], row["phase"], SIGNALS[row["signal"]]), []).append(row)
    head = ["process", "in the middle of", "what happened", "times", "noticed", "next step done"]
    rows = [
        [
            *kind,
            str(len(found)),
            *(middle([row[name] for row in found]) for name in ("noticed_s", "recovered_s")),
        ]
        for kind, found in sorted(kinds.items())
    ]
    return table(head, rows)


def middle(values: list[float | None]) -> str:
    """A cell with the median of seconds."""
    known = sorted(value for value in values if value is not None)
    return seconds(known[len(known) // 2] if known else None)


def cost_rows(data: dict[str, Any]) -> list[str]:
    """What a step takes with everything on and with everything off."""
    rows = []
    for name, label in (("cpu_seconds", "CPU seconds"), ("seconds", "seconds on the clock")):
        step, cost = data[f"{name}_a_step"], data[f"{name}_cost_percent"]
        low, high = cost["interval_of_90_percent"]
        rows.append(
            [
                label,
                f"{step['on']:.2f}",
                f"{step['off']:.2f}",
                f"{cost['all']:+.1f}%",
                f"{low:+.1f}% to {high:+.1f}%",
            ]
        )
    text = (
        f"{data['measured_pairs']} pairs of blocks of {data['steps']} steps; what was switched: "
        f"{', '.join(data['parts'])}; a checkpoint every {data['save_steps']} steps where it is on."
    )
    head = ["a step of the demo", "all on", "all off", "cost", "90% interval"]
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
