"""The error of a full GPU says where it happened and what to change."""

import traceback

import pytest
import torch

from rlsys.engines.out_of_memory import out_of_memory_explained


def fill(message):
    raise RuntimeError(message)


def test_the_remedy_follows_the_error_and_its_place_is_kept():
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\nThe GPU.*x: halve") as e,
        out_of_memory_explained("x: halve it"),
    ):
        fill("CUDA out of memory")
    assert "in fill" in "".join(traceback.format_exception(e.value))


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), out_of_memory_explained("x: y"):
        fill("shapes differ")
