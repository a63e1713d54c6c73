"""`rlsys explain` of a run whose roles take turns on the same GPUs."""

from unittest import mock

import pytest
from config_cases import write_run
from test_explain import printed

from rlsys.commands import explain, explain_colocated

pytestmark = pytest.mark.processes


def printed_for(path, *, gpu_gib, host_gib=1000.0):
    with (
        mock.patch.object(explain, "gpu_memory_gib", return_value=gpu_gib),
        mock.patch.object(explain_colocated, "host_memory_gib", return_value=host_gib),
    ):
        return printed(path, "--device", "cuda")[1]


def test_each_phase_is_shown_with_who_holds_what(tmp_path):
    path = write_run(tmp_path, placement="colocated", grpo={"beta": 0.1})
    text = printed_for(path, gpu_gib=80.0)
    for phase in ("rollout, ", "reference, ", "update, ", "weight sync, ", "host, "):
        assert phase in text
    assert "the policy's weights stay on this GPU while engines sample" in text
    assert "may not fit" not in text
    assert "whose size is not known here" in printed_for(path, gpu_gib=None)
    path = write_run(tmp_path, placement="dedicated")
    assert "In turns" not in printed_for(path, gpu_gib=80.0)


def test_what_does_not_fit_is_named_with_its_phase(tmp_path):
    path = write_run(tmp_path, placement="colocated")
    text = " ".join(printed_for(path, gpu_gib=2.0, host_gib=0.0).split())
    assert "in the phase weight sync a GPU holds about" in text
    assert "of pinned host memory are needed" in text
