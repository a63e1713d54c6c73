"""Write the tables of benchmarks/RESULTS.md and docs/gpu.md from benchmarks/baselines/*.json.

python scripts/gpu_tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASELINES = ROOT / "benchmarks" / "baselines"
sys.path.insert(0, str(ROOT / "scripts"))

from page_tables import table, with_tables  # noqa: E402

RESULTS = "benchmarks/RESULTS.md"
PAGES = {
    RESULTS: ("runs", "suites", "weight syncs", "rollouts", "updates", "steps"),
    "docs/gpu.md": ("measured steps", "measured updates"),
}
"""The tables of each page."""


@dataclass(frozen=True)
class Run:
    """What a benchmark printed on GPUs."""

    file: str
    machine: dict[str, Any]
    data: dict[str, Any]

    @property
    def date(self) -> str:
        """Its date, with a link to the file, for a page in benchmarks/."""
        return f"[{self.machine['date']}](baselines/{self.file})"


def markdown() -> dict[str, str]:
    """The pages by path, with their tables written again."""
    runs = sorted(read_runs(BASELINES), key=lambda run: (run.machine["date"], run.file))
    pages = {}
    for path, names in PAGES.items():
        tables = {name: TABLES[name](runs) for name in names}
        page = (ROOT / path).read_text(encoding="utf-8")
        pages[path] = with_tables(page, tables, script="scripts/gpu_tables.py")
    return pages


def read_runs(folder: Path) -> Iterator[Run]:
    """The results on GPUs in a folder; the parts of a suite are runs of their own."""
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text())
        machine = data.get("machine", {})
        if not machine.get("gpus"):
            continue
        yield Run(file.name, machine, data)
        for part in data.get("parts", {}).values():
            if "results" in part:
                yield Run(file.name, machine, part["results"])


def runs_table(runs: list[Run]) -> list[str]:
    """Each file with the versions that it was measured with."""
    rows = {}
    for run in runs:
        machine, gpus = run.machine, run.machine["gpus"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        cells = [f"[{run.file}](baselines/{run.file})", machine["date"]]
        cells += [machine.get("commit", "not recorded")]
        rows[run.file] = [*cells, f"{len(gpus)} {gpus[0]}", f"{machine['cores']}", versions]
    head = ["file", "date", "commit", "GPUs seen", "CPU cores", "versions"]
    return table(head, list(rows.values()))


def suites_table(runs: list[Run]) -> list[str]:
    """Parts of benchmarks/gpu_suite.py, and what was left out."""
    rows = []
    for run in runs:
        for name, part in run.data.get("parts", {}).items():
            tests = part.get("tests")
            found = "" if tests is None else f"{tests['passed']} passed"
            for kind in ("failed", "skipped"):
                named = list(tests[kind]) if tests else []
                found += f", {len(named)} {kind}" if named else ""
                found += f" ({', '.join(named)})" if named and kind == "failed" else ""
            found += "; ".join(f"{k}: {v}" for k, v in (part.get("problems") or {}).items())
            took = f"{part['seconds']:.0f} s, exit code {part['rc']}"
            beside = ", ".join(part["beside"]) or "nothing"
            rows.append([run.date, f"{run.data['gpus']}", name, took, beside, found])
        for name, why in run.data.get("not_run", {}).items():
            rows.append([run.date, f"{run.data['gpus']}", name, "not run", "", why])
    head = ["date", "GPUs", "part", "took", "beside", "found"]
    return table(head, rows) if rows else ["It was not run on GPUs yet."]


def syncs_table(runs: list[Run]) -> list[str]:
    """Medians of whole weight syncs by way, one run a line."""
    ways = {
        "in place, verified": "in_place",
        "not verified": "in_place_without_checksums",
        "buckets of 64 MiB": "in_place_buckets_of_64_mb",
        "512 MiB": "in_place_buckets_of_512_mb",
        "1,024 MiB": "in_place_buckets_of_1024_mb",
        "through vLLM's loader": "vllm_loader",
        "vLLM's own NCCL engine": "vllm_nccl_engine",
        "bare broadcast": "bare_broadcast",
    }
    rows = []
    for run in runs:
        data = run.data
        if "arguments" not in data or "in_place" not in data:
            continue
        asked = data["arguments"]
        layout = f"TP {asked['policy_tp']} to TP {asked['engine_tp']}"
        engines = asked.get("engines", 1)
        layout += f", {engines} engines on a GPU" if engines > 1 else ""
        layout += ", shared GPUs" if asked.get("engine_shares") else ""
        medians = [data.get(key, {}).get("median_s") for key in ways.values()]
        whole = data["in_place"]
        first = f"**{whole['median_s']:.4f} s** ({whole['gb_per_s']:.0f} GB/s, "
        first += f"{whole['min_s']:.4f} to {whole['max_s']:.4f}, {whole['syncs']} syncs; "
        first += f"transport alone {whole['transport_gb_per_s']:.0f} GB/s)"
        others = ["" if seconds is None else f"{seconds:.4f} s" for seconds in medians[1:]]
        rows.append([run.date, asked["shape"], layout, first, *others])
    return table(["date", "shape", "policy to engine", *ways], rows)


def rollouts_table(runs: list[Run]) -> list[str]:
    """Completion tokens per second of each wave."""
    rows = []
    for run in runs:
        actor = run.data.get("actor", {})
        for wave in [name for name in actor if "wave of" in name]:
            speeds = [
                run.data.get(side, {}).get(wave, {}).get("tokens_per_second")
                for side in ("actor", "bare", "bare_in_process")
            ]
            ratios = ["" if other is None else f"{speeds[0] / other:.2f}" for other in speeds[1:]]
            own, bare, in_process = ["" if x is None else thousands(x) for x in speeds]
            sequences = f"{int(wave.rpartition(' ')[2]):,}"
            if wave.startswith("varied"):
                sequences += " of different lengths, half of them at once"
            cells = [run.date, run.data["shape"], sequences]
            rows.append([*cells, own, bare, ratios[0], in_process, ratios[1]])
    head = [
        "date",
        "shape",
        "sequences at once",
        "rollout actor",
        "bare `vllm.LLM`",
        "actor / bare",
    ]
    return table([*head, "bare, engine in its process, as the actor has it", "actor / that"], rows)


def updates(runs: list[Run]) -> Iterator[tuple[Run, str, dict[str, Any]]]:
    """(run, variant, result) of each measured policy update."""
    for run in runs:
        for name, result in run.data.get("variants", {}).items():
            if "mfu" in result:
                asked = {key: run.data.get(key) for key in ("shape", "rows", "tokens")}
                yield run, name, asked | result


def update_cells(name: str, result: dict[str, Any]) -> list[str]:
    """What both tables of updates show."""
    estimate = result.get("estimate_gib", {}).get("all")
    rows = f"{result['rows']} x {result['tokens']:,}"
    cells = [result["shape"], f"`{name}`", rows, f"{result['seconds']:.3f}"]
    cells += [thousands(result["tokens_per_s"]), f"{result['mfu']:.3f}"]
    return [*cells, f"{result['peak_gib']:.1f}", "" if estimate is None else f"{estimate:.1f}"]


UPDATE_HEAD = ["shape", "variant", "rows x tokens", "seconds", "tokens/s", "MFU", "peak, GiB"]
UPDATE_HEAD += ["estimate, GiB"]


def updates_table(runs: list[Run]) -> list[str]:
    """Every measured policy update."""
    rows = []
    for run, name, result in updates(runs):
        method = "SFT" if run.data.get("sft") else "GRPO"
        rows.append([run.date, method, *update_cells(name, result)])
    return table(["date", "loss", *UPDATE_HEAD], rows)


def measured_updates_table(runs: list[Run]) -> list[str]:
    """The newest measurement of each update on one GPU, for users."""
    newest = {}
    for _, name, result in updates(runs):
        if result["settings"].get("world_size", 1) == 1:
            newest[result["shape"], name, result["tokens"]] = update_cells(name, result)
    return table(UPDATE_HEAD, list(newest.values()))


@dataclass(frozen=True)
class Steps:
    """Whole steps of one system."""

    run: Run
    system: str
    work: str
    """Shape, prompts x completions x tokens."""
    gpus: int
    options: str
    result: dict[str, Any]


def steps(runs: list[Run]) -> Iterator[Steps]:
    """What grpo_step.py and compare_trl.py measured."""
    for run in runs:
        asked = run.data.get("settings", run.data)
        for name, result in run.data.items():
            if not isinstance(result, dict) or "step_s" not in result:
                continue
            given = asked.get("rlsys_options", asked.get("options", ""))
            words = given if isinstance(given, list) else given.split()
            pairs = dict(zip(words[::2], words[1::2], strict=False))
            own = [f"`{k.removeprefix('--')} {v}`" for k, v in pairs.items() if "." in k]
            is_trl = name == "trl"
            ahead = name in ("max_staleness 1", "rlsys_ahead")
            own = [] if is_trl else own + ["`rollout.max_staleness 1`"] * ahead
            work = f"{asked['shape']}, {asked['prompts']} x {asked['generations']} x "
            work += f"{asked['completion_length']:,}"
            system = f"TRL {run.machine['versions'].get('trl', '1.16.0')}" if is_trl else "rlsys"
            yield Steps(run, system, work, asked.get("gpus", 2), ", ".join(own), result)


def step_cells(found: Steps) -> list[str]:
    """What both tables of steps show."""
    result, phases = found.result, found.result.get("phases_s", {})
    names = ("rollout", "policy_update", "weight_sync")
    seconds = [f"{phases[name]:.2f}" if name in phases else "" for name in names]
    cells = [found.work, f"{found.gpus}", found.options, f"{result['step_s']:.2f}", *seconds]
    return [*cells, thousands(result["completion_tokens_per_second"])]


STEP_HEAD = ["shape, prompts x completions x tokens", "GPUs", "options", "seconds a step"]
STEP_HEAD += ["rollout", "update", "weight sync", "completion tokens/s"]


def steps_table(runs: list[Run]) -> list[str]:
    """Every measured whole step, with peers."""
    rows = []
    for found in steps(runs):
        result = found.result
        idle = result.get("idle_share_by_nvidia_smi", {}).values()
        peak = result.get("peak_gib_by_nvidia_smi", {}).values()
        alone = result.get("step over sum of phases alone")
        cells = [" / ".join(f"{share:.0%}" for share in idle if share < 1)]
        cells += [" / ".join(f"{gib:.1f}" for gib in peak)]
        cells += ["" if alone is None else f"{alone:.2f}"]
        rows.append([found.run.date, found.system, *step_cells(found), *cells])
    head = ["date", "system", *STEP_HEAD, "GPUs idle", "peak, GiB", "step / phases alone"]
    return table(head, rows)


def measured_steps_table(runs: list[Run]) -> list[str]:
    """The newest measurement of each whole step of rlsys, for users."""
    newest = {}
    for found in steps(runs):
        if found.system == "rlsys":
            newest[found.work, found.gpus, found.options] = step_cells(found)
    return table(STEP_HEAD, list(newest.values()))


def thousands(number: float) -> str:
    """Tokens a second."""
    return f"{number / 1000:.1f}k"


TABLES = {
    "runs": runs_table,
    "suites": suites_table,
    "weight syncs": syncs_table,
    "rollouts": rollouts_table,
    "updates": updates_table,
    "steps": steps_table,
    "measured steps": measured_steps_table,
    "measured updates": measured_updates_table,
}


if __name__ == "__main__":
    for path, page in markdown().items():
        (ROOT / path).write_text(page, encoding="utf-8")
