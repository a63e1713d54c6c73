"""A student of a third of its teacher's size learns from it, on the engine, in one process."""

import importlib.util
import sys
from pathlib import Path

import pytest
from distill_cases import learn_parity
from one_rank import one_rank

EXAMPLE = Path(__file__).parents[2] / "examples/distillation"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two untrained models, as the example prepares them."""
    folder = tmp_path_factory.mktemp("distill-data")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        spec = importlib.util.spec_from_file_location("prepare_distill", EXAMPLE / "prepare.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main(["--out", str(folder), "--rows", "10", "--validation", "5"])
    return folder


@pytest.mark.slow
@pytest.mark.processes
def test_students_become_as_good_as_their_teacher(data, tmp_path):
    """On held-out questions, within 5% of the teacher's accuracy, by each way to compare."""
    with one_rank() as process:
        scores = process.submit(learn_parity, data, tmp_path, 120).result(timeout=900)
    (teacher_loss, teacher_score), (_, untrained) = scores.pop("teacher"), scores.pop("untrained")
    assert teacher_loss < 0.05, scores
    assert untrained < 0.5 * teacher_score
    assert len(scores) == 3
    for how, (loss, score) in scores.items():
        assert score >= 0.95 * teacher_score, (how, scores)
        assert loss < 0.1, (how, scores)
