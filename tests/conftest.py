import os
import signal

import pytest
from hypothesis import settings

from rlsys.data import preprocessors
from rlsys.rewards import orms

# No test depends on time: on a busy machine it would fail at random.
settings.register_profile("rlsys", deadline=None)
# CI draws the same examples in every run, so only a change can break a test.
settings.register_profile("ci", deadline=None, derandomize=True)
# `make test-fast`: a tenth of the examples.
settings.register_profile("fast", deadline=None, max_examples=10)
settings.load_profile("ci" if "CI" in os.environ else "rlsys")


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist all tests run in this process
def pytest_xdist_make_scheduler(config, log):
    """Deal tests to processes by file, and all of tests/actors, which share a cluster, to one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/actors" if file.startswith("tests/actors/") else file

    return ByCluster(config, log)


@pytest.fixture(scope="session", autouse=True)
def hear_stop_signals():
    """Undo what `&` and nohup do, which ignore the signals that some tests send."""
    for stop, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(stop) is signal.SIG_IGN:
            signal.signal(stop, default)


def _restored_registries():
    kinds = (orms, preprocessors)
    registered = [dict(kind.data) for kind in kinds]
    yield
    for kind, before in zip(kinds, registered, strict=True):
        kind.data.clear()
        kind.data.update(before)


@pytest.fixture(scope="module", autouse=True)
def forget_plugins():
    """Undo what plugins registered, after each module of tests."""
    yield from _restored_registries()


@pytest.fixture
def forget_registrations():
    """Undo what a test registered, for modules whose tests register the same names."""
    yield from _restored_registries()
