"""A policy that sends the tensors of model folders: the sending side without a trainer."""

from dataclasses import replace

import ray
import torch
from safetensors.torch import load_file

from rlsys.config import Config, PolicyConfig
from rlsys.weight_sync.gloo import GlooTransport
from rlsys.weight_sync.plan import TensorMeta, TensorSlice
from rlsys.weight_sync.sender import WeightSender
from rlsys.weight_sync.transport import transports


@transports.register("damaging gloo")
class BitFlippingTransport(GlooTransport):
    """Damages every bucket that starts with tensor data on its way."""

    def broadcast(self, buffer, *, what):
        if "bucket" not in what:
            return super().broadcast(buffer, what=what)
        damaged = buffer.clone()
        damaged[9] ^= 4
        return super().broadcast(damaged, what=what)


class SenderActor:
    """Rank 0 of the weight sync group."""

    def __init__(self, folder, transport):
        self.transport = transport
        self.tensors = load_tensors(folder)
        self.adapter = {}

    def weight_metadata(self):
        return metadata(self.tensors)

    def adapter_metadata(self):
        return metadata(self.adapter)

    def set_adapter(self, tensors):
        self.adapter = tensors

    def connect_weight_sync(self, connections, to):
        self.sends_adapter = connections[0].content == "adapter"
        self.slices = {piece.meta.name: piece for c in connections for piece in c.slices}
        self.senders = []  # ends the earlier connections, in which receivers may still wait
        self.senders = [
            WeightSender(replace(connection, transport=self.transport), torch.device("cpu"))
            for connection in connections
        ]

    def set_weights(self, folder):
        self.tensors = load_tensors(folder)

    def drop(self, name):
        del self.tensors[name]

    def send_weights(self, version, to):
        return sum(sender.send(self.fill, version) for sender in self.senders)

    def fill(self, bucket, buffer):
        tensors = self.adapter if self.sends_adapter else self.tensors
        for name, target in bucket.views(buffer):
            piece = self.slices[name]
            target.copy_(piece.within(tensors[piece.tensor.name], TensorSlice.whole(piece.tensor)))

    def send_nothing(self, version, to):
        return 0.0


class TensorPolicy:
    """The driver's side: what WeightPublisher asks of a policy."""

    def __init__(self, folder, *, transport="gloo"):
        self.actor = ray.remote(SenderActor).options(num_cpus=0.01).remote(folder, transport)
        self.config = Config.model_construct(policy=PolicyConfig())
        self.policy_version = 0
        self.sends = True
        self.publishers = []

    def set_weights(self, folder):
        ray.get(self.actor.set_weights.remote(folder))
        self.policy_version += 1

    def set_adapter(self, tensors):
        ray.get(self.actor.set_adapter.remote(tensors))
        self.policy_version += 1

    def drop(self, name):
        ray.get(self.actor.drop.remote(name))

    def weight_metadata(self):
        return ray.get(self.actor.weight_metadata.remote())

    def adapter_metadata(self):
        return ray.get(self.actor.adapter_metadata.remote())

    def async_call(self, method, *args, to):
        if method == "send_weights" and not self.sends:
            method = "send_nothing"
        return {"policy rank 0": getattr(self.actor, method).remote(*args, to)}

    def answers(self, method):
        """No timeline wants to hear when it answers."""

    def healed(self, phase, work):
        return work()

    def close(self):
        ray.kill(self.actor)


def metadata(tensors):
    return [
        TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def load_tensors(folder):
    """The state of a model folder as a policy exports it: a tied head is not a tensor."""
    return load_file(folder / "model.safetensors")
