"""The API on folders that the writers of real runs made."""

import json
import os
import shutil
import threading
import time

import pytest
from run_folders import HTML, PHASES, PROMPTS, START, RunWriter, write_run_folder
from starlette.testclient import TestClient

from rlsys.dashboard import api
from rlsys.dashboard.runs import LOOK_EVERY_S, Runs
from rlsys.dashboard.server import build_app


class Page:
    """What a browser sees of `rlsys dashboard PLACES`."""

    def __init__(self, *places):
        self.now = 0.0
        self.runs = Runs(places, clock=lambda: self.now)
        app = build_app(self.runs, host="127.0.0.1", port=1, token=None)
        self.client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)

    def get(self, path, status=200, /, **query):
        answer = self.client.get(f"/api/{path}", params=query)
        assert answer.status_code == status, answer.text
        return answer.json()

    def of(self, run, path, status=200, /, **query):
        return self.get(f"runs/{self.id(run)}/{path}", status, **query)

    def id(self, name):
        return next(run["id"] for run in self.get("runs") if run["name"] == name)

    def later(self):
        self.now += LOOK_EVERY_S


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run_folder(folder / "a", 30)
    write_run_folder(folder / "b", 12, seed=1, policy={"lr": 3e-6})
    return folder


@pytest.fixture(scope="module")
def page(parent):
    return Page(parent)


def test_runs_are_listed_with_what_a_person_asks_first(page):
    first, second = page.get("runs")
    assert [first["name"], second["name"]] == ["a", "b"]
    assert (first["method"], first["status"], first["step"]) == ("grpo", "ended", 30)
    assert first["seconds"] == pytest.approx(300)
    assert first["best_eval_metric"] == "eval/reward"
    assert first["best_eval_step"] in (10, 20, 30)
    assert first["exit_code"] == 0


def test_metrics_have_nulls_for_nan_and_all_steps_when_they_are_few(page):
    table = page.of("a", "metrics", names="reward,sampling/kl,eval/reward")
    assert table["step"] == list(range(1, 31))
    assert table["last_step"] == 30
    assert table["columns"]["sampling/kl"][2] is None
    held_out = [i for i, v in enumerate(table["columns"]["eval/reward"]) if v is not None]
    assert [table["step"][i] for i in held_out] == [10, 20, 30]


def test_metrics_between_two_steps(page):
    assert page.of("a", "metrics", names="loss", after=28)["step"] == [29, 30]
    some = page.of("a", "metrics", names="loss", after=3, before=6)
    assert (some["step"], some["last_step"]) == ([4, 5, 6], 30)
    none = page.of("a", "metrics", names="loss", after=30)
    assert none == {"step": [], "columns": {"loss": []}, "last_step": None}


def test_few_points_keep_the_spike(page):
    table = page.of("a", "metrics", names="grad_norm", points=6)
    assert len(table["step"]) <= 6
    assert table["columns"]["grad_norm"][table["step"].index(7)] == 40.0


def test_names_of_metrics(page):
    names = page.of("a", "metric_names")
    assert {"reward", "eval/reward", "time/step"} <= set(names)
    assert "remaining_time" not in names


def test_config_differences(page):
    ids = [run["id"] for run in page.get("runs")]
    answer = page.get("config", runs=",".join(ids))
    assert answer["differences"] == {"policy.lr": {ids[0]: 1e-6, ids[1]: 3e-6}}
    assert answer["common"]["rollout.num_generations"] == 4
    assert "output_dir" not in answer["common"]


def test_secrets_of_a_config_are_hidden(tmp_path):
    params = {"judge": {"api_key": "sk-very-secret", "url": "http://me:pass@host/"}}
    write_run_folder(tmp_path / "r", 1, reward={"reward_funcs": ["judge"], "reward_params": params})
    page = Page(tmp_path)
    text = json.dumps(page.get("config", runs=page.id("r")))
    assert "sk-very-secret" not in text
    assert "me:pass" not in text


def test_completions_are_filtered_sorted_and_paged(page):
    everything = page.of("a", "completions", limit=1)
    assert everything["total"] == 30 * 8
    assert len(everything["rows"]) == 1
    assert everything["rows"][0]["step"] == 30
    good = page.of("a", "completions", where="countdown = 1 and format = 1", limit=1000)
    assert 0 < good["total"] < 240
    assert {row["reward"] for row in good["rows"]} == {2.0}
    some = page.of("a", "completions", from_step=3, to_step=4, sort="num_tokens", descending=False)
    assert {row["step"] for row in some["rows"]} == {3, 4}
    lengths = [row["num_tokens"] for row in some["rows"]]
    assert lengths == sorted(lengths)
    second = page.of("a", "completions", from_step=3, to_step=4, offset=8, limit=8)
    first = page.of("a", "completions", from_step=3, to_step=4, limit=8)
    assert not {r["id"] for r in first["rows"]} & {r["id"] for r in second["rows"]}
    assert page.of("a", "completions", grep="Größe 数字 🧮")["total"] == 239
    assert page.of("a", "completions", split="eval")["total"] == 12
    assert page.of("a", "completions", split="filtered")["total"] == 0


def test_html_stays_the_text_that_it_is(page):
    row = page.of("a", "completions", grep="<script>")["rows"][0]
    assert row["text"] == HTML
    answer = page.client.get(f"/api/runs/{page.id('a')}/completions?grep=<script>")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_completion_has_its_siblings_and_its_prompt_a_history(page):
    row = page.of("a", "completions", limit=1)["rows"][0]
    whole = page.of("a", f"completion/{row['id']}")
    assert whole["row"]["id"] == row["id"]
    assert len(whole["siblings"]) == 3
    assert {(s["step"], s["group_id"]) for s in whole["siblings"]} == {
        (row["step"], row["group_id"])
    }
    history = page.of("a", "history", prompt=row["prompt_id"])["rows"]
    steps = [other["step"] for other in history]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2
    assert set(range(30 % (PROMPTS // 2), 31, PROMPTS // 2)) - {0} == set(steps)
    assert {other["prompt_id"] for other in history} == {row["prompt_id"]}


def test_long_texts_are_cut_in_lists_and_whole_in_a_completion(tmp_path):
    writer = RunWriter(tmp_path / "r")
    group = writer._group(0)
    group.completions[0] = type(group.completions[0])(
        token_ids=[1],
        rollout_logprobs=[-1.0],
        text="long " * 1000,
        finish_reason="stop",
        policy_versions=(0,),
    )
    writer._completions.log_completions(1, group, None)
    writer.end()
    page = Page(tmp_path)
    row = page.of("r", "completions", grep="long long")["rows"][0]
    assert len(row["text"]) == 501
    assert page.of("r", f"completion/{row['id']}")["row"]["text"] == "long " * 1000


def test_health_has_warnings_actors_and_the_servers_clock(page):
    health = page.of("a", "health")
    assert health["warnings"][0]["warning"] == "entropy_collapse"
    assert {actor["role"] for actor in health["actors"]} == {
        "driver",
        "rollout",
        "reward",
        "reference",
        "policy",
    }
    assert abs(health["now"] - time.time()) < 60


def test_the_timeline_is_that_of_the_newest_steps_at_first(page):
    answer = page.of("a", "timeline")
    assert answer["actors"] == [
        *("driver", "rollout 0", "rollout 1", "reward 0"),
        *("reference 0", "policy 0", "policy 1"),
    ]
    assert answer["steps"] == [26, 30]
    assert {span["step"] for span in answer["spans"]} == set(range(26, 31))
    assert (answer["start"], answer["end"]) == (START, START + 300)
    assert answer["shares"] == pytest.approx({**PHASES, "other": 0})
    assert answer["limited_by"] == "sampling"
    assert answer["limits"]["policy_update"] == pytest.approx(0.27)
    assert answer["idle"]["policy 0"] == pytest.approx(1 - 0.27 - 0.05)


def test_the_timeline_of_a_time_and_of_steps(page):
    by_time = page.of("a", "timeline", **{"from": START + 11, "to": START + 12})
    assert by_time["steps"] == [2, 2]
    assert {span["phase"] for span in by_time["spans"]} == {"rollout"}
    by_steps = page.of("a", "timeline", from_step=2, to_step=3)
    assert by_steps["steps"] == [2, 3]
    assert page.of("a", "timeline", to_step=3)["steps"] == [1, 3]
    error = page.of("a", "timeline", 400, **{"from": 1, "from_step": 1})["error"]
    assert "from and to, or from_step and to_step" in error
    whole = page.of("a", "timeline", **{"from": 0, "points": 50})
    assert len(whole["spans"]) <= 50
    assert whole["num_spans"] == 30 * 14


def test_logs_are_read_piece_by_piece(page, parent):
    names = page.of("a", "logs")["names"]
    assert "policy-0.log" in names
    log = page.of("a", "logs", name="policy-0.log")
    assert log["text"].splitlines()[-1] == "step 30 is done"
    assert log["next"] == log["size"]
    rest = page.of("a", "logs", name="policy-0.log", offset=log["next"])
    assert (rest["text"], rest["next"]) == ("", log["size"])
    start = page.of("a", "logs", name="policy-0.log", offset=0)
    assert start["text"] == (parent / "a/logs/policy-0.log").read_text()


# --- runs that change while they are shown ------------------------------------------------------


def test_a_run_that_goes_on_is_followed_by_reading_what_is_new(tmp_path):
    writer = RunWriter(tmp_path / "live")
    writer.steps(3)
    page = Page(tmp_path)
    with writer.run.held():
        assert page.get("runs")[0]["status"] == "running"
        for step in range(4, 7):
            writer.take_step()
            assert page.of("live", "metrics", names="reward", after=step - 1)["step"] == [step]
            assert page.of("live", "completions", from_step=step)["total"] == 8
            assert page.of("live", "health")["actors"]
    assert page.get("runs")[0]["status"] == "killed"


def test_runs_appear_and_disappear(tmp_path):
    write_run_folder(tmp_path / "one", 1)
    page = Page(tmp_path)
    gone = page.id("one")
    write_run_folder(tmp_path / "two", 1, seed=1)
    page.later()
    assert [run["name"] for run in page.get("runs")] == ["one", "two"]
    shutil.rmtree(tmp_path / "one")
    # Asked before the folders are looked at again: empty, or an error that says why.
    answer = page.client.get(f"/api/runs/{gone}/metrics?names=reward")
    assert answer.status_code in (200, 404, 409)
    page.later()
    assert [run["name"] for run in page.get("runs")] == ["two"]
    assert "deleted" in page.get(f"runs/{gone}/metrics", 404, names="reward")["error"]


def test_files_that_shrink_are_read_again(tmp_path):
    run = write_run_folder(tmp_path / "r", 20)
    page = Page(tmp_path)
    assert page.of("r", "metrics", names="reward")["last_step"] == 20
    assert page.of("r", "completions")["total"] == 160
    for path, lines in ((run.metrics, 5), (run.completions, 16)):
        kept = b"".join(path.read_bytes().splitlines(keepends=True)[:lines])
        path.write_bytes(kept)
    (run.logs / "policy-0.log").write_text("short\n")
    assert page.of("r", "metrics", names="reward")["last_step"] == 5
    assert page.of("r", "completions")["total"] == 16
    log = page.of("r", "logs", name="policy-0.log", offset=10_000)
    assert (log["text"], log["size"], log["next"]) == ("", 6, 6)


def test_files_that_are_deleted_are_empty(tmp_path):
    run = write_run_folder(tmp_path / "r", 5)
    page = Page(tmp_path)
    page.of("r", "completions")
    for path in (run.completions, run.config, run.warnings, run.actors, run.timeline):
        path.unlink()
    shutil.rmtree(run.logs)
    assert page.of("r", "completions")["total"] == 0
    assert page.of("r", "health")["actors"] == []
    assert page.of("r", "logs") == {"names": []}
    assert page.get("config", runs=page.id("r")) == {"differences": {}, "common": {}}
    assert "no log" in page.of("r", "logs", 400, name="policy-0.log")["error"]


def test_a_run_of_an_older_version_shows_what_it_has(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    row = {"step": 1, "group_id": 0, "index": 0, "group_size": 1, "prompt_id": "p"}
    row |= {"reward": 1.0, "rewards": {"x": 1.0}, "advantage": 0.0, "num_tokens": 3}
    row |= {"finish_reason": "stop", "policy_versions": [0], "prompt": "q", "text": "t"}
    (old / "completions.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 2, "gro')
    (old / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n{"step": 2, "rew')
    page = Page(old)
    run = page.get("runs")[0]
    assert (run["name"], run["method"], run["status"], run["step"]) == ("old", None, "unknown", 1)
    assert page.of("old", "completions", where="x = 1")["total"] == 1
    assert page.of("old", "metrics", names="reward,nothing")["columns"]["nothing"] == [None]
    assert page.of("old", "health")["warnings"] == []
    assert page.of("old", "logs")["names"] == []
    times = page.of("old", "timeline")
    assert (times["spans"], times["actors"], times["shares"]) == ([], [], {})


def test_damaged_files_do_not_hide_the_rest(tmp_path):
    run = write_run_folder(tmp_path / "r", 2)
    run.config.write_text("a: [")
    run.actors.write_text("[{")
    run.warnings.write_bytes(b"\xff\xfe\n")
    page = Page(tmp_path)
    assert page.get("runs")[0]["step"] == 2
    health = page.of("r", "health")
    assert (health["warnings"], health["actors"]) == ([], [])
    run.timeline.write_text('{"actor": 1}\n[]\n{"start": "x", "end": 1}\n')
    assert page.of("r", "timeline")["spans"] == []


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    for parent in ("x", "y"):
        write_run_folder(tmp_path / parent / "seed-0", 1)
    page = Page(tmp_path / "x", tmp_path / "y/seed-0", tmp_path / "y")
    assert [run["name"] for run in page.get("runs")] == ["x/seed-0", "y/seed-0"]


def test_ids_stay_when_the_page_is_started_again(parent):
    first, second = ([run["id"] for run in Page(parent).get("runs")] for _ in range(2))
    assert first == second
    assert [run["id"] for run in Page(parent / "a").get("runs")] == first[:1]


# --- what may not be asked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "query", "words"),
    [
        ("metrics", {}, ["names"]),
        ("metrics", {"names": "a", "points": "1"}, ["points", "2"]),
        ("metrics", {"names": "a", "afer": "1"}, ["afer: unknown", "after, before, names"]),
        ("completions", {"limit": "100000"}, ["limit", "1000"]),
        ("completions", {"limit": "x"}, ["limit"]),
        ("completions", {"split": "test"}, ["split", "'train'"]),
        ("completions", {"sort": "nothing"}, ["'nothing' is not a column", "reward"]),
        ("completions", {"where": "rewrd = 1"}, ["rewrd", "Columns are"]),
        ("completion/12", {}, ["'12' is not an id"]),
        ("completion/1-2-9", {}, ["no completion has the id"]),
        ("logs", {"name": "nothing.log"}, ["no log 'nothing.log'"]),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(page, path, query, words):
    error = page.of("a", path, 400, **query)["error"]
    for word in words:
        assert word in error


def test_unknown_addresses_and_runs(page):
    assert page.get("nothing", 404)["error"] == "nothing has this address"
    assert "no run 'x'" in page.get("runs/x/health", 404)["error"]
    assert "no run 'x'" in page.get("config", 404, runs="x")["error"]


SQL = [
    "true; DROP VIEW completions",
    "reward = 1; ATTACH 'x.db'",
    "reward > 0 UNION SELECT 1",
    "1 = 1) OR (SELECT count(*) FROM read_text('/etc/passwd')) > 0 --",
    "exists (SELECT * FROM read_text('/etc/passwd'))",
    "exists (SELECT * FROM read_csv('/etc/passwd'))",
    "exists (SELECT * FROM '/etc/passwd')",
    "exists (SELECT * FROM glob('/etc/*'))",
    "getenv('HOME') = '/root'",
    "(SELECT count(*) FROM duckdb_secrets()) >= 0 AND exists (FROM read_blob('/etc/hostname'))",
    "COPY completions TO '/tmp/stolen.csv'",
    "exists (SELECT * FROM read_json('http://127.0.0.1:1/x'))",
]


@pytest.mark.parametrize("where", SQL)
def test_a_condition_is_one_expression_over_the_completions(page, where):
    assert "error" in page.of("a", "completions", 400, where=where)


def test_a_condition_cannot_read_another_file_of_the_run(page, parent):
    config = parent / "a" / "config.yaml"
    answer = page.of("a", "completions", 400, where=f"exists (FROM read_text('{config}'))")
    assert "output_dir" not in answer["error"].replace(str(config), "")


def test_a_prompt_with_quotes_is_a_prompt(page):
    assert page.of("a", "history", prompt="x' OR '1'='1")["total"] == 0


def test_a_long_query_is_given_up(page, monkeypatch):
    monkeypatch.setattr("rlsys.dashboard.api.QUERY_LIMIT_S", 0.3)
    endless = "(SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b) > reward"
    assert "given up after 0.3 s" in page.of("a", "completions", 400, where=endless)["error"]


def test_queries_do_not_take_a_machine_for_themselves(page, monkeypatch):
    monkeypatch.setattr("rlsys.dashboard.api._searches", threading.BoundedSemaphore(1))
    with api._searches, monkeypatch.context() as short:
        short.setattr("rlsys.dashboard.api.QUERY_LIMIT_S", 0.1)
        assert "other queries" in page.of("a", "completions", 503)["error"]
        assert page.of("a", "metrics", names="reward")["last_step"] == 30
    assert page.of("a", "completions")["total"] == 240


NAMES = [
    "../config.yaml",
    "../../b/logs/policy-0.log",
    "/etc/passwd",
    "",
    ".",
    "a\0b",
    "link",
    "pipe",
]


@pytest.mark.parametrize("name", NAMES)
def test_only_logs_of_the_run_are_served(tmp_path, name):
    run = write_run_folder(tmp_path / "r", 1)
    (run.logs / "link").symlink_to("/etc/passwd")
    os.mkfifo(run.logs / "pipe")
    assert "error" in Page(tmp_path).of("r", "logs", 400, name=name)


@pytest.mark.parametrize(
    "path",
    ["/../access.py", "/%2e%2e/access.py", "/..%2faccess.py", "//etc/passwd", "/static/../api.py"],
)
def test_only_files_of_the_page_are_served(page, path):
    answer = page.client.get(path)
    assert answer.status_code in (403, 404)
    assert "import" not in answer.text


def test_the_page_itself(page):
    answer = page.client.get("/")
    assert answer.status_code == 200
    assert '<div id="app">' in answer.text
    assert page.client.get("/app.js").headers["content-type"].startswith("text/javascript")


def test_nothing_is_written_into_the_folders_but_the_cache(tmp_path):
    write_run_folder(tmp_path / "r", 3)

    def contents():
        return {
            path: path.read_bytes()
            for path in tmp_path.rglob("*")
            if path.is_file() and ".cache" not in path.parts
        }

    before = contents()
    page = Page(tmp_path)
    for path in ("metric_names", "completions", "health", "logs"):
        page.of("r", path)
    assert contents() == before
