import os
from pathlib import Path

import pytest
from hypothesis import settings

from rlsys.rewards import orms

# Nothing here is judged by how long it took: a busy machine would fail tests at random.
settings.register_profile("rlsys", deadline=None)
# There the same examples in every run: what fails is what the change broke.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "rlsys")


def pytest_collection_modifyitems(items):
    """Deal tests to two processes: tests/actors to one, as they share engines, the rest by file."""
    for item in items:
        folder = Path(item.path).parent.name
        group = folder if folder == "actors" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module", autouse=True)
def forget_plugins():
    """What plugins register in this process is gone after the module that loaded them."""
    registered = dict(orms.data)
    yield
    orms.data.clear()
    orms.data.update(registered)
