"""Workers of an engine on CPU that multiply with the parameters themselves, as on GPUs.

vLLM imports this in every process that holds a part of the model, before it loads the model.
"""

from vllm import _custom_ops

from rlsys.engines.vllm.weight_backend import WeightSyncWorkerExtension

WORKER_EXTENSION = "unpacked_workers.UnpackedWorker"

_custom_ops._supports_onednn = False


class UnpackedWorker(WeightSyncWorkerExtension):
    """A usual worker; importing this module makes the difference."""
