"""The interface and the ports on which processes of several hosts meet."""

import socket
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist
from pydantic import ValidationError

from rlsys.config.field_types import parse_ports
from rlsys.config.schema import Config
from rlsys.network import LOOPBACK, gloo_interfaces, listen
from rlsys.weight_sync.transport import serve_store


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def addresses(interface):
    return [entry.address for entry in psutil.net_if_addrs()[interface]]


def test_gloo_uses_the_interface_through_which_the_others_are(monkeypatch):
    (loopback,) = gloo_interfaces(LOOPBACK)
    assert LOOPBACK in addresses(loopback)
    for name, entries in psutil.net_if_addrs().items():
        own = [entry.address for entry in entries if entry.family == socket.AF_INET]
        for address in own[:1]:
            (found,) = gloo_interfaces(address)
            assert address in addresses(found), name


def test_the_users_choice_of_interfaces_wins(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0,ib1")
    assert gloo_interfaces(LOOPBACK) == ["ib0", "ib1"]


def test_an_address_without_a_route_leaves_the_choice_to_gloo():
    assert gloo_interfaces("no such host.invalid") == []


@pytest.fixture
def ports():
    """Two neighbouring ports, of which somebody has the first."""
    while True:
        with socket.create_server((LOOPBACK, 0)) as taken:
            port = taken.getsockname()[1]
            with socket.socket() as probe:
                free = port < 65535 and probe.connect_ex((LOOPBACK, port + 1)) != 0
            if free:
                yield range(port, port + 2)
                return


def test_ranks_meet_on_a_port_of_the_range_that_is_free(ports):
    store = serve_store(LOOPBACK, 10.0, ports)
    assert store.port == ports[1]
    client = dist.TCPStore(LOOPBACK, ports[1], is_master=False, timeout=timedelta(seconds=10))
    client.set("here", "yes")
    assert store.get("here") == b"yes"
    with pytest.raises(
        ValueError, match=rf"from {ports[0]} to {ports[1]} are in use on {LOOPBACK}"
    ):
        listen(LOOPBACK, ports)


@pytest.mark.parametrize(
    ("text", "ports"),
    [("20000-20099", range(20000, 20100)), ("20000:20001", range(20000, 20002)), ("4000", [4000])],
)
def test_ranges_of_ports(text, ports):
    assert list(parse_ports(text)) == list(ports)


@pytest.mark.parametrize("text", ["80-90", "20001-20000", "20000-70000", "any", ""])
def test_what_is_not_a_range_of_ports_is_refused(text):
    with pytest.raises(ValueError, match="not a range of ports"):
        parse_ports(text)


def test_the_field_names_itself(tmp_path):
    with pytest.raises(ValidationError, match="rendezvous_ports"):
        Config.model_validate({"rendezvous_ports": "x-y"})
