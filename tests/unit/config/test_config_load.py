"""From a YAML file and command-line words to a config, or to one error with all problems."""

import os
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from config_cases import values, write_config
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config import Config
from rlsys.config.fields import (
    config_fields,
    config_sections,
    first_sentence,
    optional_sections,
    value_at,
)
from rlsys.config.load import is_saved_config, load_config, save_config
from rlsys.config.local_paths import JOB_COPY
from rlsys.problems import ProblemsError


@pytest.fixture
def problems(tmp_path):
    """The problems of a config with these sections and overrides."""

    def run(*overrides, **sections) -> list[str]:
        with pytest.raises(ProblemsError) as caught:
            load_config(write_config(tmp_path, **sections), overrides)
        assert all(str(p) in str(caught.value) for p in caught.value.problems)
        return [problem.text for problem in caught.value.problems]

    return run


@pytest.fixture
def load(tmp_path):
    def run(*overrides, **sections):
        return load_config(write_config(tmp_path, **sections), overrides)

    return run


# --- wrong input ---------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_a_config_has_a_path(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    data = {"dataset": ["~/a.jsonl#10", "hf::a/b~"], "val_dataset": ["~/b:main:test"]}
    resolved = load(
        "--output_dir=~/runs/a", data=data, model={"path": "~/m"}, reward={"reward_model": ["~/r"]}
    )
    config = resolved.config
    assert config.output_dir == "/home/me/runs/a"
    assert config.model.path == "/home/me/m"
    assert config.reference.path is None
    assert config.data.dataset == ["/home/me/a.jsonl#10", "hf::a/b~"]
    assert config.data.val_dataset == ["/home/me/b:main:test"]
    assert config.reward.names[-1] == "reward_model:/home/me/r"
    assert config.reward.model_paths == ["/home/me/r"]
    params = {"reward_model": {"path": "~/s", "batch_size": 2}}
    reward = load(reward={"reward_funcs": ["reward_model"], "reward_params": params}).config.reward
    assert reward.model_paths == ["/home/me/s"]
    assert reward.params == {"reward_model": {"path": "/home/me/s", "batch_size": 2}}
    assert load(reference={"path": "~/m"}).config.reference.path == "/home/me/m"
    saved = tmp_path / "saved.yaml"
    save_config(config, saved)
    assert "output_dir: /home/me/runs/a" in saved.read_text()
    monkeypatch.setenv("HOME", "/home/you")
    assert load_config(saved).config.output_dir == "/home/me/runs/a"


@pytest.mark.parametrize(
    ("sections", "nearest"),
    [
        ({"rollout": {"num_generation": 8}}, "'rollout.num_generations'"),
        ({"policy": {"learning_rate": 1}}, None),
        ({"num_generations": 8}, "'rollout.num_generations'"),
        ({"grpo": {"lr": 1}}, "'policy.lr'"),
        ({"temprature": 1}, "'rollout.temperature'"),
        ({"roolout": {"top_k": 1}}, "'rollout'"),
    ],
)
def test_an_unknown_key_names_the_nearest_field(problems, sections, nearest):
    (text,) = problems(**sections)
    assert "there is no such" in text
    assert nearest is None or f"Did you mean {nearest}?" in text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("grpo.kl_coef", "grpo.beta"),
        ("policy.learning_rate", "policy.lr"),
        ("learning_rate", "policy.lr"),
        ("rollout.n", "rollout.num_generations"),
        ("actor_rollout_ref.rollout.n", "rollout.num_generations"),
        ("policy.gradient_accumulation_steps", "policy.global_batch_size"),
        ("policy.num_train_epochs", "num_train_epochs"),
        ("grpo.clip_range", "grpo.epsilon"),
        ("data.max_response_length", "rollout.max_completion_length"),
        ("policy.clip_grad", "policy.max_grad_norm"),
        ("data.train_files", "data.dataset"),
        ("rollout.max_new_tokens", "rollout.max_completion_length"),
        ("bf16", "model.dtype"),
        ("policy.gradient_checkpointing", "policy.recompute"),
        ("per-device-train-batch-size", "policy.micro_batch_size"),
        ("rollout.tensor_model_parallel_size", "rollout.tensor_parallel_size"),
    ],
)
def test_a_name_of_another_project_names_the_field_here_and_what_it_counts(problems, name, meant):
    (text,) = problems(f"--{name}", "1")
    assert f"Did you mean {meant!r}? {first_sentence(config_fields()[meant].description)}" in text


def test_a_name_with_two_meanings_names_both_with_what_they_count(problems):
    (text,) = problems("--train_batch_size", "64")
    assert "'rollout.generation_batch_size' or 'policy.global_batch_size'? " in text
    assert "policy.global_batch_size: Completions per optimizer step" in text
    assert "rollout.generation_batch_size: N, completions sampled per step" in text


@pytest.mark.parametrize(
    "name",
    [
        *("rollout.min_completion_length", "policy.max_lr"),
        *("data.prompt_format", "rollout.swap_space", "policy.", "", "x"),
    ],
)
def test_a_name_that_is_not_clearly_a_field_gets_no_hint(problems, name):
    (text,) = problems(f"--{name}", "1")
    assert text == f"--{name}: there is no such field."


def test_a_misspelt_name_in_several_sections_is_that_of_its_own(problems):
    (text,) = problems("--reward.timout_s", "1")
    assert "Did you mean 'reward.timeout_s'?" in text
    (text,) = problems("--numgenerations", "1")
    assert "Did you mean 'rollout.num_generations'?" in text


def test_a_name_that_several_sections_have_names_them_all(problems):
    (text,) = problems("--tensor_parallel_size", "2")
    for section in ("rollout", "policy", "reference"):
        assert f"'{section}.tensor_parallel_size'" in text


def test_one_error_has_problems_of_file_command_line_and_rules(problems):
    found = problems(
        "--policy.learn_rate",
        "1",
        "--policy.min_lr",
        "tiny",
        rollout={"generation_batch_size": 30, "num_generations": 4, "temperature": -1},
        polcy={},
    )
    for words in (
        ["--policy.learn_rate"],
        ["policy.min_lr = 'tiny' (command line)", "valid number"],
        ["rollout.temperature = -1", "greater than 0"],
        ["polcy", "policy"],
        ["generation_batch_size = 30", "28 or 32"],
    ):
        assert any(all(word in text for word in words) for text in found), (words, found)
    assert len(found) == 5


def test_a_wrong_field_hides_no_rule_but_those_it_is_part_of(problems):
    found = problems(
        rollout={"generation_batch_size": "many", "num_generations": 7},
        reward={"reward_weights": [1.0]},
    )
    assert any("rollout.generation_batch_size = 'many'" in text for text in found)
    assert any("reward_weights has 1 value for" in text for text in found)
    assert len(found) == 2


def test_a_wrong_field_hides_the_algorithms_rules_too_where_they_read_it(problems):
    """The number that stands in for it would make up optimizer steps."""
    (text,) = problems(
        rollout={"generation_batch_size": "many", "num_generations": 2},
        policy={"global_batch_size": 4},
        grpo={"loss_type": "reinforce"},
    )
    assert "rollout.generation_batch_size = 'many'" in text


def test_everything_required_is_named_when_the_file_is_all_but_empty(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ProblemsError) as caught:
        load_config(path)
    missing = {text.partition(":")[0] for text in map(str, caught.value.problems)}
    required = {name for name, info in config_fields().items() if info.is_required()}
    assert missing == required | {"max_steps", "reward.reward_funcs"}  # or other fields


def test_one_generation_is_refused_with_the_reason(problems):
    (text,) = problems(rollout={"num_generations": 1})
    assert "rollout.num_generations = 1" in text
    assert "greater than or equal to 2" in text
    assert "group" in text


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("rollout", "num_generations", 2.5),
        ("rollout", "num_generations", True),
        ("rollout", "temperature", float("nan")),
        ("policy", "lr", [1e-5]),
        ("policy", "lr", None),
        ("data", "dataset", []),
        ("data", "shuffle", "perhaps"),
        ("model", "path", 7),
        ("model", "path", ""),
        ("model", "path", {"folder": "x"}),
        ("grpo", "kl_estimator", "k4"),
    ],
)
def test_a_wrong_type_names_field_and_value(problems, section, field, value):
    (text,) = problems(**{section: {field: value}})
    assert text.startswith(f"{section}.{field} = {value!r}: ")


def test_a_section_that_is_not_a_mapping(problems):
    (text,) = problems(policy="fast")
    assert "policy" in text
    assert "'fast'" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "section"),
        ("- a\n- b\n", "section"),
        ("data: [unclosed", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ProblemsError, match=words):
        load_config(path)


def test_a_yaml_error_is_one_line_with_its_place(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("policy:\n  lr: 1e-5\ndata:\n  dataset: [a\nmodel: b\n")
    with pytest.raises(ProblemsError) as caught:
        load_config(path)
    (text,) = map(str, caught.value.problems)
    assert text == (
        "run.yaml, line 5, column 6: it is not valid YAML: expected ',' or ']', but got ':'"
    )


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ProblemsError, match=r"nowhere\.yaml.*\n.*no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_folder_is_not_called_a_missing_file(tmp_path):
    with pytest.raises(ProblemsError, match=r"it is a folder; name a YAML file$"):
        load_config(tmp_path)
    path = write_config(tmp_path)
    with pytest.raises(ProblemsError, match=f"it is a folder; name a YAML file, such as {path}"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("latin-1", "line 2 is not a text in UTF-8: byte 15 is 0xf6; convert the file to UTF-8"),
        ("utf-16", "line 1 is not a text in UTF-8: byte 1 is 0xff (it looks like UTF-16); convert"),
        ("utf-16-le", "line 2 is not a text in UTF-8: byte 30 is 0xf6"),
    ],
)
def test_a_file_that_is_not_utf8_is_named_with_line_and_byte(tmp_path, encoding, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"# first line\noutput_dir: gr\xf6\xdfe\n".decode("latin-1").encode(encoding))
    with pytest.raises(ProblemsError) as caught:
        load_config(path)
    (text,) = map(str, caught.value.problems)
    assert words in text


def test_a_character_that_yaml_forbids_gives_no_traceback(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: a\x00b\n")
    with pytest.raises(ProblemsError, match="it is not valid YAML: "):
        load_config(path)


def test_a_key_given_twice_is_an_error_with_both_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("policy:\n  lr: 1e-5\n  lr: 1e-6\n" + yaml.safe_dump(values()))
    with pytest.raises(ProblemsError, match="lr: is given twice, in lines 2 and 3"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--policy.lr"], "needs a value"),
        (["--policy.lr="], "--policy.lr: needs a value. Peak learning rate"),
        (["--eval_steps", ""], "--eval_steps: needs a value"),
        (["--policy.lr", "1", "2"], "takes one value"),
        (["--policy.lr", "1", "--policy.lr", "2"], "given 2 times"),
        (["3"], "expected --section.field"),
        (["--policy", "3"], "is a section"),
        (["--checkpoint.resume", "perhaps"], "valid boolean"),
        (["--policy.lr=1e-5x"], "valid number"),
    ],
)
def test_command_lines_that_make_no_sense(problems, overrides, words):
    (text,) = problems(*overrides)
    assert words in text


@pytest.mark.parametrize("value", ["1h", -1, [1]])
@pytest.mark.parametrize("name", ["placement_timeout", "checkpoint.save_steps"])
def test_a_field_of_several_types_is_wrong_once(problems, name, value):
    """With all that it may be; pydantic has an error for each type."""
    section, _, field = name.rpartition(".")
    (text,) = problems(**({section: {field: value}} if section else {field: value}))
    assert text.startswith(f"{name} = {value!r}: should be ")
    assert ", or '" in text


@given(
    st.lists(
        st.sampled_from([f"--{name}" for name in config_fields()])
        | st.sampled_from(["1", "0.5", "null", "true", "x", "", "--", "--=", "--a.b.c", "[1]"])
        | st.text(max_size=5),
        max_size=6,
    )
)
def test_no_command_line_fails_in_another_way(tmp_path_factory, words):
    path = write_config(tmp_path_factory.mktemp("config"))
    with suppress(ProblemsError):
        assert load_config(path, words).config.data.dataset


_yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@given(st.sampled_from([*config_fields(), *config_sections(), "x", "data.x"]), _yaml_values)
def test_no_value_in_the_file_fails_in_another_way(tmp_path_factory, name, value):
    section, _, field = name.rpartition(".")
    changed = {section: {field: value}} if section else {field: value}
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump({**values(), **changed}))
    with suppress(ProblemsError):
        assert load_config(path).config.max_steps > 0


# --- right input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (["--policy.lr", "1e-5"], "policy.lr", 1e-5),
        (["--policy.lr=1e-5"], "policy.lr", 1e-5),
        (["--max_steps", "3"], "max_steps", 3),
        (["--reward.reward_funcs", "b", "a"], "reward.reward_funcs", ["b", "a"]),
        (["--reward.reward_funcs", "a"], "reward.reward_funcs", ["a"]),
        (["--reward.reward_weights", "1", "-0.5"], "reward.reward_weights", [1.0, -0.5]),
        (["--reward.external_plugins"], "reward.external_plugins", []),
        (["--reward.external_plugins", "[]"], "reward.external_plugins", []),
        (["--checkpoint.resume"], "checkpoint.resume", True),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--data.system", "null"], "data.system", None),
        (["--data.system", "Be brief = good"], "data.system", "Be brief = good"),
        (["--data.system=a=b"], "data.system", "a=b"),
        (["--grpo.scale_rewards", "none"], "grpo.scale_rewards", "none"),
        (["--policy.recompute", "none"], "policy.recompute", "none"),
        (["--model.path", "123"], "model.path", "123"),
        (["--policy.global_batch_size", "null"], "policy.global_batch_size", None),
    ],
)
def test_overrides(load, overrides, name, value):
    resolved = load(*overrides, policy={"global_batch_size": 8}, data={"system": "old"})
    section, _, field = name.rpartition(".")
    owner = getattr(resolved.config, section) if section else resolved.config
    assert getattr(owner, field) == value
    assert resolved.origins[name] == "command line"


def test_numbers_without_a_point_are_numbers_in_the_file_too(tmp_path):
    path = write_config(tmp_path)
    path.write_text(path.read_text() + "policy:\n  lr: 1e-5\n")
    assert load_config(path).config.policy.lr == 1e-5


def test_origins_cover_every_field(load):
    resolved = load("--policy.lr", "1e-5", grpo={})
    null = [n for n in optional_sections() if value_at(resolved.config.model_dump(), n) is None]
    given = set(optional_sections()) - set(null)
    inside = tuple(f"{section}." for section in null)
    named = [n for n in config_fields() if n not in given and not n.startswith(inside)]
    assert list(resolved.origins) == named
    assert resolved.origins["policy.lr"] == "command line"
    assert resolved.origins["model.path"] == "file"
    assert resolved.origins["grpo.beta"] == "default"
    origins = load("--policy.lora.rank", "3").origins
    assert (origins["policy.lora.rank"], origins["policy.lora.alpha"]) == (
        "command line",
        "default",
    )
    assert "policy.lora" not in origins


def test_an_empty_section_means_its_defaults(tmp_path):
    path = write_config(tmp_path)
    path.write_text(path.read_text() + "grpo:\n")
    assert load_config(path).config.grpo.epsilon == 0.2


@given(
    lr=st.floats(min_value=1e-12, max_value=1.0),
    system=st.none() | st.text(max_size=20),
    weights=st.none() | st.lists(st.floats(0.1, 5), min_size=2, max_size=2),
)
def test_the_saved_config_is_read_back_to_an_equal_one(tmp_path_factory, lr, system, weights):
    folder = tmp_path_factory.mktemp("config")
    path = write_config(
        folder,
        policy={"lr": lr},
        data={"system": system},
        reward={"reward_weights": weights},
        model={"path": "models/größe: 1 # a"},
    )
    config = load_config(path).config
    save_config(config, folder / "config.yaml")
    again = load_config(folder / "config.yaml")
    assert again.config == config
    assert set(again.origins.values()) == {"file"}


@pytest.mark.parametrize("resumed", [False, True])
def test_the_command_in_a_saved_config_runs_it_in_a_folder_that_is_free(tmp_path, resumed):
    run = tmp_path / "my run"
    run.mkdir()
    (tmp_path / "my run-2").mkdir()
    path = write_config(tmp_path, output_dir=str(run))
    config = load_config(path, ["--checkpoint.resume"] if resumed else []).config
    save_config(config, run / "config.yaml")
    assert is_saved_config(run / "config.yaml")
    first, second, *_ = (run / "config.yaml").read_text().splitlines()
    assert first.endswith("To run it again:")
    cd, place, also, program, command, path, *words = shlex.split(second.removeprefix("#"))
    assert (cd, place, also, program, command) == ("cd", os.getcwd(), "&&", "rlsys", "grpo")
    again = load_config(path, words).config
    assert again.output_dir == str(tmp_path / "my run-3")
    assert not again.checkpoint.resume  # there is nothing to continue from
    same = {"output_dir": config.output_dir, "checkpoint": config.checkpoint}
    assert again.model_copy(update=same) == config
    # Of an earlier version.
    (run / "config.yaml").write_text(f"{first}\n#   rlsys grpo THIS_FILE\n")
    assert is_saved_config(run / "config.yaml")


def test_a_saved_config_runs_from_any_folder_with_its_relative_paths(tmp_path, monkeypatch):
    """As a shell does it; a Ray job's copy is gone by then, so the command does not name it."""
    work, copy = tmp_path / "my work", tmp_path / JOB_COPY / "a"
    for folder in (work, copy):
        folder.mkdir(parents=True)
        path = write_config(folder, output_dir="runs/a", data={"dataset": ["train.jsonl"]})
        monkeypatch.chdir(folder)
        config = load_config(path).config
        save_config(config, Path("config.yaml"))
        monkeypatch.chdir(tmp_path)
        first, second, *_ = (folder / "config.yaml").read_text().splitlines()
        assert load_config(folder / "config.yaml").config == config
        command = shlex.split(second.removeprefix("#"))
        if folder is copy:
            assert first.endswith("in the folder that the Ray job was submitted from:")
            assert command[0] == "rlsys"
        else:
            assert command[:3] == ["cd", str(work), "&&"]
            assert command[5] == str(work / "config.yaml")


def test_settings_of_rewards_come_from_the_file_and_the_command_line(tmp_path):
    given = {"reward_funcs": ["countdown"], "reward_params": {"countdown": {"a": 1}}}
    path = write_config(tmp_path, reward=given)
    assert load_config(path).config.reward.reward_params == {"countdown": {"a": 1}}
    resolved = load_config(path, ["--reward.reward_params", "{countdown: {b: [2, x]}}"])
    assert resolved.config.reward.reward_params == {"countdown": {"b": [2, "x"]}}
    with pytest.raises(ProblemsError, match=r"reward\.reward_params\[countdown\] = 3"):
        load_config(path, ["--reward.reward_params", "{countdown: 3}"])
    with pytest.raises(ProblemsError, match=r"reward\.reward_params = '{'"):
        load_config(path, ["--reward.reward_params", "{"])
    with pytest.raises(
        ProblemsError, match=r"settings for format, which reward\.reward_funcs does"
    ):
        load_config(path, ["--reward.reward_params", "{format: {}}"])


# --- the length of a run -------------------------------------------------------------------------


@given(rows=st.integers(1, 10**6), epochs=st.floats(0.01, 20), prompts=st.integers(1, 512))
def test_epochs_are_turned_into_the_fewest_steps_that_take_all_prompts(rows, epochs, prompts):
    rollout = {"num_generations": 2, "generation_batch_size": 2 * prompts}
    config = Config.model_validate(
        values(max_steps=None, num_train_epochs=epochs, rollout=rollout)
    ).with_steps(rows)
    assert config.num_steps * prompts >= epochs * rows * (1 - 1e-9)
    assert config.num_steps == 1 or (config.num_steps - 1) * prompts < epochs * rows


def test_epochs_come_out_even():
    for epochs, rows, steps in (
        (1, 16, 4),
        (3, 49500, 37125),
        (0.1, 120, 3),
        (1, 17, 5),
        (2, 1, 1),
    ):
        config = Config.model_validate(values(max_steps=None, num_train_epochs=epochs))
        assert config.num_prompts == 4
        assert config.with_steps(rows).num_steps == steps


def test_max_steps_goes_first_and_the_command_line_before_the_file(load):
    assert load(num_train_epochs=2).config.with_steps(40).num_steps == 10
    assert load("--max_steps", "3", num_train_epochs=2).config.with_steps(40).num_steps == 3
    resolved = load("--num_train_epochs", "2")  # and max_steps in the file
    assert resolved.config.with_steps(40).num_steps == 20
    assert resolved.origins["max_steps"] == "default"
    assert resolved.origins["num_train_epochs"] == "command line"


def test_a_saved_run_of_epochs_runs_again_with_the_same_steps(load, tmp_path):
    config = load(max_steps=None, num_train_epochs=2).config.with_steps(40)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml").config
    assert again == config
    assert again.with_steps(1000).num_steps == 20
    more = load_config(tmp_path / "saved.yaml", ["--num_train_epochs", "3"]).config
    assert more.with_steps(40).num_steps == 30


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"max_steps": None}, "max_steps: is missing, and so is num_train_epochs"),
        (
            {"max_steps": None, "num_train_epochs": 2, "data": {"streaming": True}},
            "num_train_epochs = 2 needs the number of rows, which data.streaming does not know",
        ),
        ({"max_steps": None, "num_train_epochs": 0}, "num_train_epochs = 0: should be greater"),
        ({"max_steps": -1}, "max_steps = -1: should be greater than 0"),
    ],
)
def test_a_run_needs_a_length(problems, sections, says):
    (text,) = problems(**sections)
    assert says in text


def test_the_length_of_a_run_is_missed_beside_other_mistakes(problems):
    found = problems(max_steps=None, policy={"lr": "much"})
    assert any("max_steps: is missing" in text for text in found)
    assert len(found) == 2
