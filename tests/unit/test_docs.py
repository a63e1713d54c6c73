"""What the documentation points at exists: links, files, names in code, and pages."""

import json
import re
import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        "docs/*.md",
        "docs/zh/*.md",
        "plugins/*.md",
        "benchmarks/*.md",
        "examples/*/*.md",
    )
    for page in REPOSITORY.glob(pattern)
)
CODE_SPAN = re.compile(r"`([^`\n]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_name_headings_that_exist(page):
    links = re.findall(r"\]\(([^)\s]*\.md)?#([^)\s]+)\)", page.read_text())
    assert [
        (file, anchor)
        for file, anchor in links
        if not file.startswith("http")
        and anchor not in anchors(page.parent / file if file else page)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page):
    in_repository = re.compile(r"(?:rlsys|tests|scripts|examples|benchmarks|docs)/[\w./-]+\.\w+")
    named = set(in_repository.findall(re.sub(r"https?://\S+", "", page.read_text())))
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize(("page", "at_least"), [("architecture", 30), ("internals", 40)])
def test_names_of_code_in_the_docs_are_in_the_code(page, at_least):
    sources = "\n".join(path.read_text() for path in REPOSITORY.glob("rlsys/**/*.py"))
    words = set(re.findall(r"\w+", sources))
    spans = CODE_SPAN.findall((REPOSITORY / f"docs/{page}.md").read_text())
    names = {
        word
        for span in spans
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span) and not span.endswith((".py", ".json"))
        for word in span.partition("(")[0].split(".")
    }
    assert len(names) > at_least
    assert sorted(names - words) == []


def test_the_files_of_one_step_hold_what_the_page_names():
    page = (REPOSITORY / "docs/architecture.md").read_text()
    section = page.partition("\n## One step, file by file\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(rlsys/.+?)` \| (.+) \|$", section, re.MULTILINE)
    files = [file for file, _ in rows]
    assert len(files) == len(set(files)) == 30
    further = re.findall(r"`(rlsys/.+?)`", section.rpartition("|\n")[2])
    assert len(further) == len(set(further) - set(files)) == 17
    assert [file for file in further if not (REPOSITORY / file).exists()] == []
    for file, text in rows:
        words = set(re.findall(r"\w+", (REPOSITORY / file).read_text()))
        named = {word for span in CODE_SPAN.findall(text) for word in span.split(".")}
        assert named <= words, file


def test_the_index_has_every_page_once():
    index = (REPOSITORY / "docs/index.md").read_text()
    pages = re.findall(r"^\| \[.+?\]\(([\w.]+)\) \|", index, re.MULTILINE)
    assert sorted([*pages, "index.md"]) == sorted(
        page.name for page in REPOSITORY.glob("docs/*.md")
    )


def test_the_tables_of_models_are_those_of_the_tests():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "models_table.py"))
    page = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == script["markdown"](), "run: python scripts/models_table.py"


def test_the_tables_of_results_are_those_of_the_raw_results():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "gpu_tables.py"))
    for path, page in script["markdown"]().items():
        written = (REPOSITORY / path).read_text(encoding="utf-8")
        assert written == page, f"{path}: run python scripts/gpu_tables.py"


def test_the_tables_of_faults_are_those_of_the_raw_results():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "reliability.py"))
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert page == script["markdown"](), "run: python scripts/reliability.py"


def test_what_a_fault_cost_is_in_the_tables():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "reliability.py"))
    machine = {"date": "2026-12-01", "cpu": "C", "cores": 2, "load_average_at_start": 0.5}
    row = {"role": "engine", "phase": "sampling", "signal": "SIGSTOP", "step": 3}
    row |= {"noticed_s": 3.24, "recovered_s": None, "differences": ["weights"], "error": None}
    (line,) = script["fault_rows"]({"machine": machine, "table": [row]})[4:]
    assert line == "| engine | sampling | stopped | 3.2 s | - | differs: weights |"
    (line,) = script["fault_rows"]({"machine": machine, "table": [row | {"error": "it died"}]})[4:]
    assert line.endswith("| it died |")
    grew = {"role": "policy", "steps": 90, "mib": [400, 470], "handles": [9, 9], "is_flat": False}
    soak = {"minutes": 5, "steps": 100, "differences": [], "processes": [grew]}
    soak["processes_alone"] = [grew | {"steps": 99}]
    soak |= {"machine": machine, "faults": [row | {"recovered_s": s} for s in (1.0, 2.0, 9.0)]}
    lines = script["soak_rows"](soak)
    assert "3 faults" in lines[2]
    assert "nothing differs" in lines[2]
    assert lines[6] == "| policy | 90 | 400 -> 470 | 9 -> 9 | no |"
    assert "| policy | 99 | 400 -> 470 | 9 -> 9 | no |" in lines
    assert lines[-1] == "| engine | sampling | stopped | 3 | 3.2 s | 2.0 s |"
    cost = {"all": 1.25, "interval_of_90_percent": [-0.5, 2.0]}
    data = {f"{name}_cost_percent": cost for name in ("seconds", "cpu_seconds")}
    data |= {f"{name}_a_step": {"on": 3.1, "off": 3.0} for name in ("seconds", "cpu_seconds")}
    data |= {"machine": machine, "measured_pairs": 6, "steps": 4, "parts": ["a"], "save_steps": 3}
    last = script["cost_rows"](data)[-1]
    assert last == "| seconds on the clock | 3.10 | 3.00 | +1.2% | -0.5% to +2.0% |"


def test_a_suite_is_in_the_tables_of_results(tmp_path):
    script = runpy.run_path(str(REPOSITORY / "scripts" / "gpu_tables.py"))
    step = {"step_s": 10.0, "phases_s": {"rollout": 4.0}, "completion_tokens_per_second": 13100.0}
    step |= {"peak_gib_by_nvidia_smi": {"GPU 0": 70.5}, "step over sum of phases alone": 1.12}
    part = {"rc": 0, "seconds": 9.0, "beside": [], "problems": {"rollout: error": "no room"}}
    part["results"] = {"shape": "tiny", "prompts": 4, "generations": 8, "completion_length": 16}
    part["results"] |= {"gpus": 1, "options": [], "max_staleness 0": step}
    tests = {"rc": 1, "seconds": 60.4, "beside": ["tests 2"]}
    tests["tests"] = {"passed": 7, "failed": {"test_x::test_y": "wrong"}, "skipped": {"a": "b"}}
    machine = {"date": "2026-12-01", "gpus": ["H200"], "versions": {}, "cores": 16}
    suite = {"machine": machine, "gpus": 1, "parts": {"steps": part, "tests 1": tests}}
    suite["not_run"] = {"rollout": "3 s were left"}
    (tmp_path / "gpu_suite_1.json").write_text(json.dumps(suite))
    (tmp_path / "on_cpu.json").write_text(json.dumps({"machine": {"gpus": []}, "variants": {}}))
    runs = list(script["read_runs"](tmp_path))
    parts = "\n".join(script["suites_table"](runs))
    assert "| steps | 9 s, exit code 0 | nothing | rollout: error: no room |" in parts
    assert "| 60 s, exit code 1 | tests 2 | 7 passed, 1 failed (test_x::test_y), 1 skipped" in parts
    assert "| rollout | not run |  | 3 s were left |" in parts
    (line,) = script["steps_table"](runs)[2:]
    assert "| rlsys | tiny, 4 x 8 x 16 | 1 |  | 10.00 | 4.00 |" in line
    assert line.endswith("| 13.1k |  | 70.5 | 1.12 |")
