"""Write docs/grafana.json, a dashboard of runs for Grafana, from the table of panels below.

python scripts/grafana_dashboard.py
"""

import json
from pathlib import Path

from rlsys.actors.ray_metrics import gauge_name

PATH = Path(__file__).parents[1] / "docs/grafana.json"

PANELS = {
    "Is it learning?": [
        ("Reward", "none", ["reward", "eval/reward"]),
        ("Groups of equal rewards", "percentunit", ["frac_reward_zero_std"]),
        ("Length of completions", "none", ["completions/mean_length", "completions/max_length"]),
        ("Completions cut off", "percentunit", ["completions/clipped_ratio"]),
    ],
    "Is the update sound?": [
        ("Entropy", "none", ["entropy"]),
        ("KL from the reference", "none", ["kl"]),
        ("Gradient norm", "none", ["grad_norm"]),
        ("Loss", "none", ["loss", "eval/loss"]),
    ],
    "Do trainer and rollout engine agree?": [
        ("Difference of log-probs, nats", "none", ["sampling/logp_difference/mean"]),
        ("KL from the rollout engine", "none", ["sampling/kl"]),
    ],
    "Where does the time go?": [
        ("Seconds of a step", "s", ["time/step"]),
        ("Phases", "s", ["time/rollout", "time/policy_update", "time/weight_sync"]),
        ("Tokens a second", "none", ["rollout/tokens_per_second", "update/tokens_per_second"]),
        ("Memory of the policy, GiB", "none", ["memory(GiB)"]),
    ],
    "Is everything alive?": [
        ("Step", "none", ["policy_version"]),
        ("Restarts", "none", ["fault/rollout_restarts", "fault/policy_restarts"]),
    ],
}
"""Row -> panels: title, Grafana's unit, metrics of rlsys."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 12, 8
"""Of a panel; a row of Grafana is 24 wide."""


def dashboard() -> dict[str, object]:
    """The whole file."""
    panels: list[dict[str, object]] = []
    y = 0
    for row, members in PANELS.items():
        panels.append({"type": "row", "title": row, "gridPos": _place(0, y, 2 * WIDTH, 1)})
        y += 1
        for number, (title, unit, metrics) in enumerate(members):
            place = _place(WIDTH * (number % 2), y + HEIGHT * (number // 2), WIDTH, HEIGHT)
            panels.append(_panel(title, unit, metrics, place))
        y += HEIGHT * -(-len(members) // 2)
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "title": "rlsys",
        "uid": "rlsys",
        "tags": ["rlsys"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source_variable(), _run_variable()]},
        "panels": panels,
    }


def _panel(title: str, unit: str, metrics: list[str], place: dict[str, int]) -> dict[str, object]:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": f'ray_{gauge_name(metric)}{{run=~"$run"}}',
                "legendFormat": f"{{{{run}}}} {metric}",
                "datasource": SOURCE,
            }
            for number, metric in enumerate(metrics)
        ],
    }


def _source_variable() -> dict[str, object]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _run_variable() -> dict[str, object]:
    query = f"label_values(ray_{gauge_name('policy_version')}, run)"
    return {
        "name": "run",
        "type": "query",
        "label": "Run",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "runs"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


if __name__ == "__main__":
    PATH.write_text(json.dumps(dashboard(), indent=1) + "\n")
