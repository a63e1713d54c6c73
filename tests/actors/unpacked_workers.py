"""Workers of an engine on CPU that multiply with the parameters themselves, as on GPUs.

vLLM imports this in every process that holds a part of the model, before it loads the model.
"""

from vllm import _custom_ops

from rlsys.engines.vllm.adapters import without_adapters
from rlsys.engines.vllm.in_place import content_checksum
from rlsys.engines.vllm.latent import loaded_parameters
from rlsys.engines.vllm.weight_backend import WeightSyncWorkerExtension
from rlsys.weight_sync.checksum import as_numbers

WORKER_EXTENSION = "unpacked_workers.UnpackedWorker"

_custom_ops._supports_onednn = False


class UnpackedWorker(WeightSyncWorkerExtension):
    """A usual worker; importing this module makes the difference."""

    def base_checksums(self):
        """Checksum of each weight, without the adapter's."""
        model = self.model_runner.get_model()
        with without_adapters(model):
            parameters = dict(loaded_parameters(model))
        sums = [content_checksum(parameter.detach()) for parameter in parameters.values()]
        return dict(zip(parameters, as_numbers(sums), strict=True))

    def slot_numbers(self):
        """Elements of what vLLM made for an adapter."""
        manager = self.model_runner.get_model().lora_manager
        tensors = [
            stacked if isinstance(stacked, tuple) else (stacked,)
            for layer in manager.modules.values()
            for stacked in (layer.lora_a_stacked, layer.lora_b_stacked)
        ]
        return sum(tensor.numel() for some in tensors for tensor in some)
