"""docs/grafana.json is what its script writes, and asks only for metrics that exist."""

import json
import re
import runpy
from pathlib import Path

from rlsys.actors.ray_metrics import gauge_name

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts/grafana_dashboard.py"))
FILE = json.loads((ROOT / "docs/grafana.json").read_text())


def test_the_file_is_up_to_date():
    assert SCRIPT["dashboard"]() == FILE, "run python scripts/grafana_dashboard.py"


def test_every_panel_asks_for_documented_metrics():
    page = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+)", page, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    documented |= {f"eval/{name}" for name in documented}
    gauges = {f"ray_{gauge_name(re.sub('<[^>]+>', 'x_x', name))}" for name in documented}
    patterns = [re.compile(gauge.replace("x_x", r"\w+")) for gauge in gauges]
    asked = {name for name in re.findall(r"ray_rlsys_\w+", json.dumps(FILE)) if "$" not in name}
    assert [name for name in asked if not any(one.fullmatch(name) for one in patterns)] == []
    assert len(asked) > 20


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    cells = [
        (x, y)
        for panel in FILE["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    ids = [panel["id"] for panel in FILE["panels"]]
    assert len(ids) == len(set(ids))


def test_names_in_ray():
    assert gauge_name("memory(GiB)") == "rlsys_memory_gib"
    assert gauge_name("sampling/logp_difference/mean") == "rlsys_sampling_logp_difference_mean"
    assert gauge_name("eval/pass@4") == "rlsys_eval_pass_4"
