"""trl/<name>: the same numbers as TRL's own functions."""

import subprocess
import sys

import pytest
import trl.rewards

from rlsys.rewards import orms

NAMES = [name for name in orms if name.startswith("trl/")]


def test_every_reward_function_of_trl_has_a_name():
    theirs = {name for names in trl.rewards._import_structure.values() for name in names}
    assert {name.removeprefix("trl/") for name in NAMES} == theirs


def test_they_score_like_trl():
    texts = [r"<think>a</think> \boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"]
    columns = {"solution": [r"\frac{1}{3}"] * 2, "completion_ids": [[1] * 50, [1] * 90]}
    expected = {
        "trl/accuracy_reward": ({}, [1.0, 0.0]),
        "trl/reasoning_accuracy_reward": ({}, [1.0, 0.0]),
        "trl/think_format_reward": ({}, [1.0, 0.0]),
        "trl/get_cosine_scaled_reward": ({"max_completion_length": 100}, [0.75, -0.512]),
        "trl/get_repetition_penalty_reward": ({}, [-47 / 48, -87 / 88]),
        "trl/get_soft_overlong_punishment": (
            {"max_completion_length": 100, "soft_punish_cache": 20},
            [0.0, -0.5],
        ),
    }
    assert set(expected) == set(NAMES)
    for name, (settings, scores) in expected.items():
        assert orms[name](**settings)(texts, **columns) == pytest.approx(scores, abs=1e-3)


def test_trl_is_imported_only_when_named():
    code = "import rlsys.rewards, sys; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_trl_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.rewards", None)
    with pytest.raises(ValueError, match="needs TRL: pip install trl"):
        orms["trl/think_format_reward"]()
