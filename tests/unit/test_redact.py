"""Secrets in a config: who sees them."""

import stat
import sys
from types import SimpleNamespace

import pytest
from config_cases import write_config
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.load import load_config, save_config
from rlsys.preflight.saving import describe_saving
from rlsys.redact import is_secret, names_of_secrets, without_password, without_secrets
from rlsys.tracking.wandb import WandbTracker

SECRETS = [
    "api_key", "apikey", "API_KEY", "openai_api_key", "HF_TOKEN", "hub_token", "token", "password",
    "client_secret", "aws_secret_access_key", "access_token", "Authorization", "X-Api-Key",
]  # fmt: skip
ORDINARY = [
    "api_key_env", "eos_token", "stop_token_ids", "max_tokens", "tokens", "token_veto_threshold",
    "secretary", "passwords_of_rows", "chat_template", "key",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_hidden_by_its_name(name):
    written = {"reward_params": {"mine": {name: "sk-123", "model": "m"}}}
    shown = without_secrets(written)
    assert shown == {"reward_params": {"mine": {name: "***", "model": "m"}}}
    assert list(names_of_secrets(written)) == [f"reward_params.mine.{name}"]
    assert is_secret(name)


@pytest.mark.parametrize("name", ORDINARY)
def test_other_settings_are_not(name):
    assert without_secrets({name: "<eos>"}) == {name: "<eos>"}
    assert not list(names_of_secrets({name: "<eos>"}))


def test_nothing_is_hidden_where_there_is_no_value():
    written = {"token": "", "password": None, "api_key": 3}
    assert without_secrets(written) == written


def test_secrets_in_lists_and_addresses_are_hidden():
    written = {"api_key": ["a", "b"], "servers": ["https://me:pw@host/v1", "http://host:80/a@b"]}
    shown = without_secrets(written)
    assert shown == {"api_key": ["***", "***"],
                     "servers": ["https://***@host/v1", "http://host:80/a@b"]}  # fmt: skip
    assert list(names_of_secrets(written)) == ["api_key", "servers"]
    assert without_password("ftp://u:p@h and http://x@y") == "ftp://***@h and http://***@y"


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), nested))
def test_only_texts_change_and_a_second_time_nothing_does(written):
    shown = without_secrets(written)
    assert without_secrets(shown) == shown
    assert shown.keys() == written.keys()
    for key, value in written.items():
        if not isinstance(value, str | list | dict):
            assert shown[key] == value


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("params", "is_private"),
    [
        ({"length": {"api_key": "sk-1"}}, True),
        ({"length": {"url": "http://me:pw@host"}}, True),
        ({"length": {"api_key_env": "MY_KEY"}}, False),
    ],
)
def test_the_config_of_a_run_with_secrets_is_for_its_owner(tmp_path, params, is_private):
    reward = {"reward_funcs": ["length"], "reward_params": params}
    config = load_config(write_config(tmp_path, reward=reward)).config
    place = tmp_path / "config.yaml"
    place.write_text("older, and readable by all")
    save_config(config, place)
    others = stat.S_IRWXG | stat.S_IRWXO
    assert bool(mode(place) & others) is not is_private
    assert load_config(place).config.reward.reward_params == params  # it runs again


def test_a_tracker_on_the_web_gets_no_secrets(tmp_path, monkeypatch):
    given_to_wandb = {}
    module = SimpleNamespace(
        init=lambda **kwargs: given_to_wandb.update(kwargs), Settings=lambda **kwargs: kwargs
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    reward = {"reward_funcs": ["length"], "reward_params": {"length": {"api_key": "sk-1"}}}
    config = load_config(write_config(tmp_path, reward=reward)).config
    WandbTracker(config, resumed_from=None)
    assert "sk-1" not in str(given_to_wandb)
    assert given_to_wandb["config"]["reward"]["reward_params"] == {"length": {"api_key": "***"}}
    assert given_to_wandb["config"]["max_steps"] == config.max_steps
    assert given_to_wandb["settings"] == {"x_disable_meta": True}, "it would send the command line"


def test_the_start_of_a_run_names_secrets_and_does_not_show_them(tmp_path):
    reward = {"reward_funcs": ["length"], "reward_params": {"length": {"api_key": "sk-1"}}}
    config = load_config(write_config(tmp_path, reward=reward)).config
    pairs = dict(describe_saving(config, None))
    assert pairs["secrets"].startswith("reward.reward_params.length.api_key: in ")
    assert "sk-1" not in str(pairs)
