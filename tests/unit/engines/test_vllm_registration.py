"""rlsys's backend of weight transfer fits vLLM's interface: the installed one's, and 0.26's."""

import inspect

import pytest
import torch
from torch import nn
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rlsys.engines.vllm.weight_backend import BACKEND, BucketWeightTransferEngine

ABSTRACT = {
    "0.26": {
        "init_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
        "receive_weights",
        "trainer_send_weights",
        "shutdown",
    },
    "0.32": {
        "init_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
        "receive_weights",
        "shutdown",
    },
}
"""vLLM -> methods that a backend must have: 0.26 runs on GPUs, 0.32 on CPU."""


@pytest.mark.parametrize("version", ABSTRACT)
def test_every_abstract_method_is_there(version):
    assert ABSTRACT[version] <= set(vars(BucketWeightTransferEngine))
    assert not BucketWeightTransferEngine.__abstractmethods__


def test_the_installed_vllm_asks_for_nothing_else():
    assert WeightTransferEngine.__abstractmethods__ in map(frozenset, ABSTRACT.values())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in vars(WeightTransferEngine).items()
        if inspect.isfunction(method) and name in vars(BucketWeightTransferEngine)
    ],
)
def test_methods_take_what_the_installed_vllm_hands_over(name):
    parameters = inspect.signature(getattr(WeightTransferEngine, name)).parameters
    inspect.signature(getattr(BucketWeightTransferEngine, name)).bind(*parameters)


def test_vllm_makes_the_backend_by_its_name():
    config = WeightTransferConfig(backend=BACKEND)
    vllm_config = type("VllmConfig", (), {"parallel_config": None, "model_config": None})()
    model = nn.Linear(2, 2)
    engine = WeightTransferEngineFactory.create_engine(
        config, vllm_config, torch.device("cpu"), model
    )
    assert isinstance(engine, BucketWeightTransferEngine)
    assert engine.model is model
