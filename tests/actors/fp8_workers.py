"""Workers of an engine on CPU that multiply FP8 weights with plain torch.

vLLM's own FP8 kernels on CPU need AMX. All else is vLLM's: which layers are quantised, by which
scale, when they are loaded, and how they are loaded again. vLLM imports this in every process that
holds a part of the model, before it loads the model.
"""

import torch
from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
)
from vllm.platforms.interface import PlatformEnum

from rlsys.engines.vllm.weight_backend import WeightSyncWorkerExtension

WORKER_EXTENSION = "fp8_workers.Fp8Worker"


class TorchFp8Kernel(FP8ScaledMMLinearKernel):
    """Weights in FP8, the product in float32."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def apply_weights(self, layer, x, bias=None):
        weight = layer.weight.float() * layer.weight_scale  # [in, out]
        product = x.float() @ weight
        return (product if bias is None else product + bias.float()).to(x.dtype)

    def apply_scaled_mm(self, **_):
        raise AssertionError("apply_weights does it all")


def scaled_fp8_quant(weight, scale):
    """What `vllm._custom_ops.scaled_fp8_quant` does with a scale that is given."""
    return (weight.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU] = [TorchFp8Kernel]
_custom_ops.scaled_fp8_quant = scaled_fp8_quant


class Fp8Worker(WeightSyncWorkerExtension):
    """A usual worker; importing this module makes the difference."""

    def weight_dtypes(self):
        """The types that the model's weights are held in, by the last word of their names."""
        parameters = self.model_runner.get_model().named_parameters()
        return {(name.rpartition(".")[2], str(parameter.dtype)) for name, parameter in parameters}
