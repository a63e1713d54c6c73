"""A missing cluster is an error at once: Ray would try for minutes and print nothing."""

import socket

import pytest

from rlsys.actors import ray_env
from rlsys.actors.ray_env import check_cluster_answers, unused_choice_of_gpus


@pytest.fixture
def port():
    """Nothing listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}"])
def test_an_address_where_nothing_listens_is_an_error_that_names_it(monkeypatch, port, form):
    monkeypatch.setenv("RAY_ADDRESS", form.format(port))
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS={form.format(port)}: no Ray cluster"):
        check_cluster_answers()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", "head", ":6379", "head:port"])
def test_a_malformed_address_is_an_error_too(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match="no Ray cluster answers there"):
        check_cluster_answers()


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_addresses_of_other_servers_of_a_cluster_name_the_one_to_use(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=10\.0\.0\.1:6379.*`ray job submit`"):
        check_cluster_answers()


@pytest.mark.parametrize("address", [None, "", "auto", "local"])
def test_what_ray_looks_up_by_itself_is_left_to_it(monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    check_cluster_answers()


def test_a_place_where_something_listens_is_let_through(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        check_cluster_answers()


@pytest.mark.parametrize(
    ("address", "chosen", "noted"),
    [
        ("10.0.0.1:6379", "2,3", True),
        (None, "2,3", False),
        ("local", "2,3", False),
        ("10.0.0.1:6379", "", False),
    ],
)
def test_gpus_chosen_here_for_a_running_cluster_are_noted(monkeypatch, address, chosen, noted):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    note = unused_choice_of_gpus()
    assert (note is not None) == noted
    assert note is None or (chosen in note and address in note)


def test_a_cluster_that_comes_back_is_waited_for_and_the_wait_is_said(monkeypatch, capsys):
    monkeypatch.setattr(ray_env, "_ASK_EVERY_S", 0.0)
    answers = [ValueError("no Ray cluster answers there"), ValueError("still none"), None]

    def connect():
        if (answer := answers.pop(0)) is not None:
            raise answer

    ray_env.wait_for_cluster(connect, patience_s=600)
    assert answers == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "waiting for the Ray cluster, up to 600 s (recovery.wait_for_resources_s)"
    )


def test_a_first_attempt_does_not_wait():
    def connect():
        raise ValueError("no Ray cluster answers there")

    with pytest.raises(ValueError, match="no Ray cluster answers"):
        ray_env.wait_for_cluster(connect, patience_s=0)
