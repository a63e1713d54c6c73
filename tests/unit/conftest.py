import pytest

from rlsys.model.folder import hub_answers


@pytest.fixture
def offline(monkeypatch):
    """No Hugging Face hub, whatever this machine can reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()
