import sys

import pytest

from rlsys.model.folder import hub_answers


@pytest.fixture
def offline(monkeypatch):
    """No Hugging Face hub, whatever this machine can reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Two test processes share two cores: more threads would wait for each other in a loop."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
