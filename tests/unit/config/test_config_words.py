"""Command lines as people type them: what is understood, and what says how to write it."""

from operator import attrgetter

import pytest
from config_cases import write_config

from rlsys.config.fields import config_fields, nested
from rlsys.config.load import load_config, save_config
from rlsys.problems import ProblemsError

COUNTDOWN = {"reward_funcs": ["countdown"], "reward_params": {"countdown": {"a": 1}}}


@pytest.fixture
def load(tmp_path):
    def run(*words, **sections):
        return load_config(write_config(tmp_path, **sections), words).config

    return run


@pytest.fixture
def problems(tmp_path):
    def run(*words, **sections) -> list[str]:
        with pytest.raises(ProblemsError) as caught:
            load_config(write_config(tmp_path, **sections), words)
        return [problem.text for problem in caught.value.problems]

    return run


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--reward.reward_funcs", "[a,b]"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_funcs", "[a,", "b]"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_funcs", "['a', \"b\"]"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_funcs", "a,b"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_funcs", "a,", "b"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_funcs=a,b"], "reward.reward_funcs", ["a", "b"]),
        (["reward.reward_funcs=[a,b]"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_funcs", "a", "b", "policy.lr=1"], "reward.reward_funcs", ["a", "b"]),
        (["--reward.reward_weights", "0.5,1e-1"], "reward.reward_weights", [0.5, 0.1]),
        (["--data.dataset", "a.jsonl,b.jsonl"], "data.dataset", ["a.jsonl", "b.jsonl"]),
        (["--tracking.report_to", "none"], "tracking.report_to", []),
        (["--tracking.report_to", "[]"], "tracking.report_to", []),
        (["--tracking.report_to", "wandb"], "tracking.report_to", ["wandb"]),
        (["policy.lr=1e-6"], "policy.lr", 1e-6),
        (["+policy.lr=1e-6"], "policy.lr", 1e-6),
        (["++policy.lr=1e-6"], "policy.lr", 1e-6),
        (["max_steps=7"], "max_steps", 7),
        (["--max_steps", "3", "policy.lr=1e-6"], "policy.lr", 1e-6),
        (["--policy.max-grad-norm", "2"], "policy.max_grad_norm", 2.0),
        (["--max-steps", "1e3"], "max_steps", 1000),
        (["--max_steps", "1_000"], "max_steps", 1000),
        (["--checkpoint.resume", "True"], "checkpoint.resume", True),
        (["--checkpoint.resume=False"], "checkpoint.resume", False),
        (["--checkpoint.resume", "policy.lr=1e-6"], "checkpoint.resume", True),
        (["--checkpoint.resume", "policy.lr=1e-6"], "policy.lr", 1e-6),
        (["--data.shuffle", "no"], "data.shuffle", False),
        (["--data.shuffle", "0"], "data.shuffle", False),
        (["--data.system", "policy.lr=1"], "data.system", "policy.lr=1"),
        (["--data.system", "x=1, y=2"], "data.system", "x=1, y=2"),
        (["--data.system", "-be brief"], "data.system", "-be brief"),
        (["--data.system", "none"], "data.system", None),
        (["--tracking.run_name", "1e-3"], "tracking.run_name", "1e-3"),
        (["--tracking.run_name", "no"], "tracking.run_name", "no"),
    ],
)
def test_what_is_understood(load, words, name, value):
    section, _, field = name.rpartition(".")
    config = load(*words, reward={"reward_weights": None})
    found = getattr(getattr(config, section) if section else config, field)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--reward.reward_params", "{countdown: {b: 1e-3, on: no}}"], {"b": 0.001, "on": "no"}),
        (["--reward.reward_params", "{countdown:", "{b:", "1e-3}}"], {"b": 0.001}),
        (["--reward.reward_params", '{"countdown": {"b": 1e-3}}'], {"b": 0.001}),
        (["--reward.reward_params.countdown.b", "1e-3"], {"a": 1, "b": 0.001}),
        (["reward.reward_params.countdown.a=[1e-3, no]"], {"a": [0.001, "no"]}),
        (["--reward.reward_params.countdown", "{b: 2}"], {"b": 2}),
    ],
)
def test_settings_of_a_reward_are_read_as_yaml_at_every_depth(load, words, value):
    assert load(*words, reward=COUNTDOWN).reward.reward_params == {"countdown": value}


def test_settings_of_a_reward_are_saved_as_they_are(tmp_path):
    settings = {"a": {1: 0.5, "1e-3": [1e-3, "no", "12:30", "1e-3"]}, "on": None, "b": True}
    path = write_config(tmp_path, reward={"reward_params": {"countdown": settings}})
    config = load_config(path).config
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml").config
    assert again.reward.reward_params == config.reward.reward_params == {"countdown": settings}


def test_a_number_in_a_file_is_a_number_at_every_depth(tmp_path):
    path = write_config(tmp_path)
    path.write_text(
        path.read_text()
        + "  reward_params:\n    countdown: {threshold: 1e-3, on: no, day: 2024-01-01}\n"
        + "grpo: {epsilon: 1e-1}\n"
    )
    config = load_config(path).config
    settings = {"threshold": 0.001, "on": "no", "day": "2024-01-01"}
    assert config.reward.reward_params == {"countdown": settings}
    assert config.grpo.epsilon == 0.1


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("tracking: {report_to: none}", "tracking.report_to", []),
        ("tracking: {report_to: wandb}", "tracking.report_to", ["wandb"]),
        ("data: {dataset: a.jsonl, shuffle: no}", "data.dataset", ["a.jsonl"]),
        ("data: {dataset: [a.jsonl], shuffle: off}", "data.shuffle", False),
        ("data: {dataset: [a.jsonl], system: None}", "data.system", None),
        ("reward: {reward_funcs: countdown}", "reward.reward_funcs", ["countdown"]),
        ("reward: {reward_funcs: 'countdown, format'}", "reward.reward_funcs", None),
        ("policy.lr: 1e-7", "policy.lr", 1e-7),
    ],
)
def test_what_a_file_may_say(tmp_path, text, name, value):
    path = write_config(tmp_path)
    kept = [section for section in ("data", "reward") if not text.startswith(section)]
    lines = path.read_text().splitlines()
    sections = ("data:", "reward:")
    blocks, keep = [], True
    for line in lines:
        if not line.startswith(" "):
            keep = line not in sections or line[:-1] in kept
        blocks += [line] if keep else []
    path.write_text("\n".join([*blocks, text]) + "\n")
    section, _, field = name.rpartition(".")
    found = getattr(getattr(load_config(path).config, section), field)
    assert found == (["countdown", "format"] if value is None and "funcs" in text else value)


def test_a_field_with_a_point_and_in_its_section_is_given_twice(problems):
    (text,) = problems(policy={"lr": 1}, **{"policy.lr": 2})
    assert text == "policy.lr: is given under policy: too: keep one of them"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--no-data.shuffle"],
            "--no-data.shuffle: there is no such field. Write --data.shuffle f",
        ),
        (
            ["--data.no-shuffle"],
            "--data.no-shuffle: there is no such field. Write --data.shuffle f",
        ),
        (["-policy.lr", "3"], "-policy.lr: write it with two dashes: --policy.lr"),
        (["trainer.total_epochs=3"], "trainer.total_epochs: there is no such field. Did you mean"),
        (["--policy.lr", "1", "--policy.lr=2"], "--policy.lr: is given 2 times"),
        (["--policy.max-grad-norm", "1", "policy.max_grad_norm=2"], "is given 2 times"),
        (["--reward.reward_params.countdown.a"], "needs a value"),
        (
            ["--data.chat_template_kwargs", "{enable_thinking: no}"],
            "enable_thinking: no is a text, write true or false",
        ),
        (["policy.lr"], "policy.lr: write --policy.lr VALUE"),
        (["~policy.lr"], "expected --section.field before it"),
        (["--rollout.top_k", "yes"], "rollout.top_k = 'yes' (command line): should be a valid int"),
    ],
)
def test_what_should_be_written_in_another_way(problems, words, says):
    (text,) = problems(*words)
    assert says in text


# --- optional sections ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "rank", "targets"),
    [
        (["--policy.lora.rank", "4"], 4, "all-linear"),
        (["--policy.lora", "{rank: 4}"], 4, "all-linear"),
        (["--policy.lora.target_modules", "q_proj", "v_proj"], 2, ["q_proj", "v_proj"]),
        (["--policy.lora.target_modules", "q_proj,v_proj"], 2, ["q_proj", "v_proj"]),
        (["--policy.lora.target_modules", r".*\.q_proj"], 2, r".*\.q_proj"),
    ],
)
def test_fields_of_an_optional_section(load, words, rank, targets):
    lora = load(*words, policy={"lora": {"rank": 2}}).policy.lora
    assert (lora.rank, lora.target_modules) == (rank, targets)


def test_an_option_makes_an_optional_section_and_null_leaves_it_out(load):
    assert load().policy.lora is None
    assert load("--policy.lora.rank", "4").policy.lora.rank == 4
    assert load("--policy.lora.rank", "4", policy={"lora": None}).policy.lora.rank == 4
    assert load("--policy.lora", "null", policy={"lora": {"rank": 4}}).policy.lora is None


def test_problems_of_an_optional_section_name_its_fields(problems):
    texts = problems(
        "--policy.lora.rnk", "4", policy={"lora": {"alpha": -1, "foo": 2}, "lr": "fast"}
    )
    starts = ["--policy.lora.rnk: there is", "policy.lr = 'fast'", "policy.lora.alpha = -1"]
    starts.append("policy.lora.foo: there is no such field. policy.lora has rank, alpha, dropout,")
    for start in starts:
        assert any(text.startswith(start) for text in texts), start
    assert "Did you mean 'policy.lora.rank'?" in texts[0]
    (text,) = problems("--policy.lora", "8")
    section = "a section with fields below it, such as policy.lora.rank, or null"
    assert text == f"policy.lora: should be {section}, not 8"


# --- variables -----------------------------------------------------------------------------------


PATHS = {
    "output_dir": ("$BASE/x", "/base/x"),
    "checkpoint.preemption_file": ("$BASE/notice", "/base/notice"),
    "model.path": ("${BASE}/x", "/base/x"),
    "policy.lora.path": ("$BASE/x", "/base/x"),
    "reference.path": ("$BASE", "/base"),
    "teacher.path": ("$BASE", "/base"),
    "data.dataset": (["~/a", "$BASE/a.jsonl#10"], ["/home/me/a", "/base/a.jsonl#10"]),
    "data.val_dataset": (["$BASE/a:s:test"], ["/base/a:s:test"]),
    "data.external_plugins": (["$BASE/p.py"], ["/base/p.py"]),
    "reward.external_plugins": (["$BASE/p.py"], ["/base/p.py"]),
    "grpo.external_plugins": (["$BASE/p.py"], ["/base/p.py"]),
    "reward.reward_model": (["$BASE/r"], ["/base/r"]),
    "tracking.run_name": ("run-$BASE", "run-/base"),
}


def test_the_paths_of_the_config_are_all_in_these_tests():
    ends = ("path", "dir", "file", "folder", "plugins", "dataset")
    assert {name for name in config_fields() if name.endswith(ends)} <= set(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_variables_are_replaced_in_every_path(load, monkeypatch, name):
    monkeypatch.setenv("BASE", "/base")
    monkeypatch.setenv("HOME", "/home/me")
    written, expanded = PATHS[name]
    uses = {"grpo.opd_kl_coef": 1.0} if name == "teacher.path" else {}
    config = load(**nested({name: written, **uses}))
    assert attrgetter(name)(config) == expanded


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("$NOT_SET_HERE/x", "NOT_SET_HERE is not set: `export NOT_SET_HERE=...` first"),
        ("${NOT_SET_HERE}/x", "NOT_SET_HERE is not set"),
        ("${oc.env:HOME}/x", "write ${HOME} instead of ${oc.env:HOME}"),
        ("${oc.env:HOME,/tmp}/x", "write ${HOME} instead of"),
        ("${model.path}", "${model.path} is not the name of an environment variable"),
        ("${now:%Y}", "${now:%Y} is not the name"),
        ("${HOME:-/tmp}", "${HOME:-/tmp} is not the name"),
        ("run-$(date +%F)", "$(date +%F) is a command, which is not run"),
        ("run-`date`", "`date` is a command"),
        ("s3://bucket/x", "s3:// is not read or written: download or mount it"),
        ("~nobody-of-this-name/x", "no user 'nobody-of-this-name'"),
    ],
)
def test_what_cannot_be_replaced_is_refused(problems, name, written, says):
    value = [written] if isinstance(PATHS[name][0], list) else written
    text = next(text for text in problems(**nested({name: value})) if name in text)
    assert says in text


def test_paths_in_settings_of_rewards_are_replaced_and_patterns_are_not(load, monkeypatch):
    monkeypatch.setenv("BASE", "/base")
    settings = {"path": "$BASE/m", "words_file": "~/w", "pattern": r"^\d+$BASE", "n": 1}
    reward = {"reward_funcs": ["countdown"], "reward_params": {"countdown": settings}}
    monkeypatch.setenv("HOME", "/h")
    found = load(reward=reward).reward.reward_params["countdown"]
    assert found == {"path": "/base/m", "words_file": "/h/w", "pattern": r"^\d+$BASE", "n": 1}


def test_a_reward_model_has_one_name_in_settings_gates_and_weights(load, monkeypatch):
    monkeypatch.setenv("BASE", "/base")
    reward = {
        "reward_funcs": ["format"],
        "reward_model": ["$BASE/r"],
        "reward_params": {"reward_model:$BASE/r": {"batch_size": 2}},
        "gate": {"reward_model:${BASE}/r": "format"},
    }
    found = load(reward=reward).reward
    assert found.names == ["format", "reward_model:/base/r"]
    assert found.gate == {"reward_model:/base/r": "format"}
    settings = {"path": "/base/r", "batch_size": 2}
    assert found.params["reward_model:/base/r"] == settings
