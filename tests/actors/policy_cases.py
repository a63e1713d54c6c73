"""Policies of a few kilobytes, on processes that become one policy after the other."""

from __future__ import annotations

import gc
from copy import copy
from dataclasses import replace
from unittest import mock

import ray
import torch
from patience import PATIENCE_S
from tiny_models import save_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlsys.actors.group import on_cpu
from rlsys.actors.policy import PolicyActors
from rlsys.actors.waiting import get_all
from rlsys.commands.replay import ReplayRank
from rlsys.config import Config
from rlsys.types import TrainBatch
from rlsys.weight_sync.connection import Connection, whole_tensors

TEMPERATURE = 0.8
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that a few tokens tell scaled frequencies from plain ones.
    "original_max_position_embeddings": 16,
}
MODELS = {
    # Four heads of 16 are not the hidden size of 48.
    "llama-tied": (LlamaConfig, {"head_dim": 16, "rope_parameters": LLAMA_3_ROPE}),
    "llama-untied": (LlamaConfig, {}),
    "qwen2-tied": (Qwen2Config, {}),
    "qwen2-untied": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 16}),
    "qwen3-untied": (Qwen3Config, {"head_dim": 8}),
}
"""Every architecture, with tied and untied embeddings."""
LAYOUTS = {
    "one rank": {},
    "TP 2": {"world_size": 2, "tensor_parallel_size": 2},
    "PP 2": {"world_size": 2, "pipeline_parallel_size": 2},
    "DP 2": {"world_size": 2},
    "CP 2": {"world_size": 2, "context_parallel_size": 2},
    "TP 2 x CP 2": {"world_size": 4, "tensor_parallel_size": 2, "context_parallel_size": 2},
    "PP 2 x CP 2": {"world_size": 4, "pipeline_parallel_size": 2, "context_parallel_size": 2},
    "CP 2 x DP 2": {"world_size": 4, "context_parallel_size": 2},
    "TP 2 x PP 2": {"world_size": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "TP 2 x DP 2": {"world_size": 4, "tensor_parallel_size": 2},
    "PP 2 x DP 2": {"world_size": 4, "pipeline_parallel_size": 2},
}

VOCAB_SIZE = 509
"""A prime: tensor-parallel ranks fill it up."""


@torch.no_grad()
def save_policy_model(folder, name, num_layers=2):
    """Write a random fp32 model, in which norms and biases matter too."""
    config_class, options = MODELS[name]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=name.endswith("-tied"),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.15, generator=rng)
        if "norm" in name:
            parameter += 1.0
    save_model(model, folder)


def policy_config(folder, *, grpo=None, max_steps=8, dtype="auto", **policy):
    """A policy that updates on 8 completions, in micro-batches of 3."""
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": max_steps,
            "data": {"dataset": ["unused"], "max_prompt_length": 8},
            "model": {"path": str(folder), "dtype": dtype},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {
                "num_generations": 4,
                "generation_batch_size": 8,
                "max_completion_length": 24,
                "temperature": TEMPERATURE,
            },
            "grpo": grpo or {},
            "policy": {
                "micro_batch_size": 3,
                "lr": 1e-3,
                "timeout_s": PATIENCE_S,
                "nonfinite_dumps": 0,
                **policy,
            },
        }
    )


def random_batch(seed=0):
    """8 rows of 2 to 8 prompt and 1 to 24 completion tokens; advantages of both signs."""
    rng = torch.Generator().manual_seed(seed)
    prompts_N = torch.tensor([2, 8, 3, 5, 2, 7, 4, 6])
    completions_N = torch.tensor([24, 1, 13, 6, 20, 9, 3, 16])
    lengths_N = prompts_N + completions_N
    positions_S = torch.arange(int(lengths_N.max()))
    shape = (len(lengths_N), len(positions_S))
    valid_NS = positions_S < lengths_N[:, None]
    mask_NS = valid_NS & (positions_S >= prompts_N[:, None])
    ids_NS = torch.randint(2, VOCAB_SIZE, shape, generator=rng)
    return TrainBatch(
        input_ids=ids_NS.masked_fill(~valid_NS, 0),
        lengths=lengths_N,
        completion_mask=mask_NS,
        advantages=torch.tensor([1.2, -0.7, -1.1, 0.6, 0.9, -1.3, 0.0, 0.4])[:, None] * mask_NS,
        rollout_logprobs=(-6.0 + torch.randn(shape, generator=rng)) * mask_NS,
    )


def padded_logprobs(model, batch, *, temperature=TEMPERATURE):
    """[N, S] by plain transformers, one padded forward pass; 0 where masked."""
    attention_mask = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    logits = model(input_ids=batch.input_ids, attention_mask=attention_mask.long()).logits
    log_softmax = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)
    logprobs = log_softmax.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(logprobs, (1, 0)) * batch.completion_mask


def padded_entropies(model, batch, *, temperature=TEMPERATURE):
    """[N, S] as `padded_logprobs`: entropies of the distributions that tokens were predicted by."""
    attention_mask = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    logits = model(input_ids=batch.input_ids, attention_mask=attention_mask.long()).logits
    log_softmax = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    return torch.nn.functional.pad(entropies, (1, 0)) * batch.completion_mask


def unconnected(slices, *, bucket_bytes, sender=0):
    """What is sent, and no receiver."""
    return Connection(slices, sender, "gloo", "", 0, 1, bucket_bytes, True, True, 1.0)


class LabRank(ReplayRank):
    """A rank that tests look into."""

    def become(self, config):
        """Forget model and process group: `start` makes another policy of this process."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        engine = vars(self).pop("engine", None)
        for planned in ("export", "links"):  # which hold process groups, too
            vars(self).pop(planned, None)
        if engine is not None:
            # Its gradient hooks keep it alive, and it the process groups with 50 threads.
            for chunk in engine.ddp:
                vars(chunk).clear()
            del engine
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
            gc.collect()
        self.config = config

    def own_options(self):
        """The names of megatron-core's options that rlsys sets, for a policy like this one."""
        from rlsys.engines.megatron import build, optimizer, options

        names = []

        def recorded(cls, own, section):
            names.extend(own)
            return options.megatron_config(cls, own, section)

        with (
            mock.patch.object(build, "megatron_config", recorded),
            mock.patch.object(optimizer, "megatron_config", recorded),
        ):
            self.build_again()
        return names

    def options(self, names):
        """Their values in the configs that megatron-core has, of policy and reference."""
        from rlsys.engines.megatron.reference import MegatronReference

        engine = self.engine
        reference = MegatronReference(self.config, device=self.device)
        configs = {
            "transformer": engine.transformer_config,
            "reference": reference.transformer_config,
            "optimizer": engine.optimizer.config,
            "ddp": engine.ddp[0].ddp_config,
        }
        return {
            role: {name: getattr(config, name) for name in names if hasattr(config, name)}
            for role, config in configs.items()
        }

    def num_buckets(self):
        return len(self.engine.ddp[0].bucket_groups)

    def exported(self):
        """Hugging Face name -> tensor, on rank 0; every rank takes part."""
        return self._export(self.engine.weights)

    def change_weights(self, move):
        """Where they are, or in new memory."""
        for parameter in self.engine.model.parameters():
            changed = 3 * parameter.data + 1
            if move:
                parameter.data = changed
            else:
                parameter.data.copy_(changed)

    def plan_buckets(self, bucket_bytes, slices=None, sender=0, content="weights"):
        slices = slices or whole_tensors(self.engine.weights.metadata())
        connection = unconnected(slices, bucket_bytes=bucket_bytes, sender=sender)
        connection = replace(connection, content=content)
        self.buckets, self.sender = connection.buckets(), sender
        self.export = self.engine.export_to(connection)
        largest = max(bucket.nbytes for bucket in self.buckets)
        self.memory = torch.zeros(2, largest, dtype=torch.uint8)

    def in_buckets(self):
        """The same as `exported`, on the sender, through the buckets of `plan_buckets`."""
        if self.rank != self.sender:
            self.export.contribute()
            return None
        tensors = {}
        for bucket in self.buckets:
            buffer = self.memory[bucket.index % 2, : bucket.nbytes]
            self.export.fill(bucket, buffer)
            tensors |= {name: view.clone() for name, view in bucket.views(buffer)}
        return tensors

    def randomize_adapters(self, seed, size=0.1):
        """Adapters as if they had been trained: a new one adds nothing."""
        rng = torch.Generator().manual_seed(seed)
        weights = self.engine.adapters.weights
        for name, whole in weights.export():
            value = size * torch.randn(whole.shape, generator=rng)
            row = next(row for row in weights.table if name in row.hf_names)
            parameter, (rank, size_of_tp) = weights.own_parameter(row), weights.slice_of(row)
            if parameter is not None:
                parts = [value]
                if row.tp_axis is not None:
                    parts = [part.chunk(size_of_tp, row.tp_axis)[rank] for part in row.cut(parts)]
                parameter.data.copy_(row.fuse(parts, size_of_tp))

    def exported_adapter(self):
        """The same as `exported`, of the adapter."""
        return self._export(self.engine.adapters.weights)

    def load_folder(self, folder):
        self.engine.weights.load(folder)

    def load_mcore(self, folder, strictly=False):
        """As rlsys reads such folders, or as Megatron-LM does, which looks for more in them."""
        from megatron.core import dist_checkpointing

        from rlsys.engines.megatron.mcore_folder import load_mcore_folder

        engine = self.engine
        if strictly:
            state = {"model": engine.weights.sharded_state()}
            loaded = dist_checkpointing.load(state, str(folder / "release"))
            engine.model[0].load_state_dict(loaded["model"])
        else:
            load_mcore_folder(folder, engine.model[0], engine.weights)

    def sent_to_engines(self):
        """For each connection: whether this rank sends, what is sent, and whose help that takes."""
        return [
            (
                link.sender is not None,
                [meta.name for bucket in link.export._buckets for meta in bucket.tensors],
                {owner for parcels in link.export._parcels for owner in parcels},
            )
            for link in self.links["rollout"]
        ]

    def gradient(self, batch, loss=None):
        """The gradient of one optimizer step, which is not taken, in the form of `exported`."""
        optimizer = self.engine.optimizer
        optimizer.step = lambda: (True, 0.0, None)
        self.engine.update(batch, loss=loss)
        del optimizer.step
        gradients = copy(self.engine.weights)
        gradients._parameters = gradients_of(self.engine.weights)
        return self._export(gradients)

    def adapter_gradient(self, batch, loss=None):
        """The same of the adapter's tensors, by PEFT's names."""
        weights = self.engine.weights
        self.engine.weights = self.engine.adapters.weights
        gradient = self.gradient(batch, loss)
        self.engine.weights = weights
        return gradient

    def adapters(self):
        """PEFT's name -> tensor, on rank 0; every rank takes part."""
        return self._export(self.engine.adapters.weights)

    def merged(self):
        """As `exported`, with the adapters."""
        return self._export(self.engine.adapters.merged)

    def base_logprobs(self, batch):
        return self.engine.compute_logprobs(batch, adapter=False)

    def trained(self):
        """Number of this rank's trained parameters, elements in gradient buffers and of states."""
        engine = self.engine
        buffers = [b for chunk in engine.ddp for b in chunk.buffers + chunk.expert_parallel_buffers]
        optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
        return (
            sum(p.numel() for p in engine.model.parameters() if p.requires_grad),
            sum(buffer.numel_unpadded for buffer in buffers),
            sum(
                state["exp_avg"].numel()
                for one in optimizers
                if one.optimizer is not None
                for state in one.optimizer.state.values()
            ),
        )

    def move_on_cpu(self):
        """Let `offload_...` move what it moves on GPUs, to small slabs of this host's memory."""
        from rlsys.model import host_memory

        host_memory.SLAB_BYTES = 2**13  # so that most storages are cut
        self.engine.offload.moves = True

    def send_to_nobody(self):
        self.links["nobody"] = []
        self.send_weights(1, to="nobody")

    def held_bytes(self):
        """Bytes of the memory of weights, gradients and optimizer's state that are in place."""
        from rlsys.engines.megatron import offload as module

        offload, optimizer = self.engine.offload, self.engine.optimizer
        kinds = (offload._weight_tensors(), offload._gradient_tensors())
        return [
            sum(
                storage.nbytes()
                for storage in module._storages(tensors, torch.device("cpu")).values()
            )
            for tensors in (*kinds, module._state_tensors(optimizer))
        ]

    def optimizer_state(self):
        """For each parameter of the optimizer: it, and its state by name."""
        from rlsys.engines.megatron.offload import inner_optimizers

        return [
            {"parameter": parameter.detach().clone()}
            | {
                name: value.clone()
                for name, value in one.state[parameter].items()
                if torch.is_tensor(value)
            }
            for one in inner_optimizers(self.engine.optimizer)
            for group in one.param_groups
            for parameter in group["params"]
        ]

    def training_state(self):
        """All that an optimizer step changes on this rank."""
        engine = self.engine
        steps = [group.get("step") for group in engine.optimizer.param_groups]
        tensors = [parameter.detach().cpu().clone() for parameter in engine.model.parameters()]
        tensors += [value.cpu() for state in self.optimizer_state() for value in state.values()]
        return tensors, [engine.scheduler.num_steps, *map(str, steps)]

    def damage(self, what, name, rank):
        """Put a NaN into a parameter of one rank, or from now on into its gradients."""
        if rank != self.rank:
            return
        engine = self.engine
        parameters = dict(engine.model.named_parameters())
        parameter = next(p for own, p in parameters.items() if own.endswith(name))
        if what == "weight":
            parameter.data.view(-1)[0] = torch.nan
            return
        compute = engine._compute_gradients

        def damaged(*args):
            outputs = compute(*args)
            parameter.main_grad.view(-1)[0] = torch.nan
            return outputs

        engine._compute_gradients = damaged

    def heal_gradients(self):
        vars(self.engine).pop("_compute_gradients", None)

    def router_logits(self, batch):
        """Inputs, weight and logits of the first layer's router, in its last forward pass."""
        from megatron.core.transformer.moe.router import TopKRouter

        modules = self.engine.model.modules()
        router = next(module for module in modules if isinstance(module, TopKRouter))
        seen = []
        with mock.patch.object(router, "gating", side_effect=router.gating) as gating:
            route = router.routing
            router.routing = lambda logits, **options: (seen.append(logits), route(logits))[1]
            self.engine.compute_logprobs(batch)
            router.routing = route
        return gating.call_args.args[0], router.weight.data, seen[-1]

    def run_out_of_memory(self, batch, at):
        """Fail like a GPU that is too small for one part of the work."""
        from rlsys.engines.megatron import model as megatron_logprobs
        from rlsys.engines.megatron import policy as megatron
        from rlsys.engines.megatron import reference as megatron_reference

        engine = self.engine
        reference = megatron_reference.MegatronReference(self.config, device=self.device)

        def connect():
            slices = whole_tensors(self.weight_metadata())
            self.connect_weight_sync([unconnected(slices, bucket_bytes=1 << 20)], to="nobody")

        place, name, work = {
            "weights": (megatron_logprobs, "build_model", self.build_again),
            "gradients": (megatron, "DistributedDataParallel", self.build_again),
            "optimizer": (megatron, "build_optimizer", self.build_again),
            "update": (engine.model[0], "forward", lambda: engine.update(batch)),
            "optimizer's step": (engine.optimizer, "step", lambda: engine.update(batch)),
            "log-probs": (engine.model[0], "forward", lambda: engine.compute_logprobs(batch)),
            "reference": (reference.model[0], "forward", lambda: reference.compute_logprobs(batch)),
            "buckets": (megatron_logprobs, "BucketExport", connect),
        }[at]
        full = torch.OutOfMemoryError("CUDA out of memory.")
        with mock.patch.object(place, name, side_effect=full):
            work()

    def build_again(self):
        from rlsys.engines.megatron.policy import MegatronPolicy

        MegatronPolicy(self.config, device=self.device)

    def _export(self, weights):
        tensors = {name: tensor.clone() for name, tensor in weights.export()}
        return tensors if self.rank == 0 else None


class PolicyLab:
    """Processes that become one policy after the other: starting them takes seconds, a policy not.

    Each new policy ends the one before it.
    """

    def __init__(self, max_ranks, *, device="cpu", rank_class=LabRank, place=on_cpu):
        self._max_ranks, self._device = max_ranks, device
        self._rank_class, self._place = rank_class, place
        self._policy = None
        self._actors = {}

    def policy(self, config):
        """A policy at version 0, from the weights of config.model.path."""
        if self._policy is None:
            self._start_processes(config)
        self._policy.policy_version = 0
        self._policy.config = config
        # Every rank, since NCCL ends a group only when all its ranks do.
        self._policy.actors = self._actors
        self._policy.call("become", config)
        self._policy.actors = dict(list(self._actors.items())[: config.policy.world_size])
        get_all(self._policy.async_start(), phase="start", timeout_s=PATIENCE_S)
        return self._policy

    def close(self):
        for actor in self._actors.values():
            ray.kill(actor)
        self._policy, self._actors = None, {}

    def _start_processes(self, config):
        section = config.policy.model_copy(update={"world_size": self._max_ranks})
        largest = config.model_copy(update={"policy": section})
        self._policy = PolicyActors(
            largest, device=self._device, rank_class=self._rank_class, place=self._place
        )
        self._actors = self._policy.actors


def gradients_of(weights):
    """Parameter name -> its gradient; zeros for what no gradient trains."""
    return {
        name: getattr(tensor, "main_grad", torch.zeros_like(tensor))
        for name, tensor in weights._parameters.items()
    }


def exported(policy):
    """Hugging Face name -> tensor."""
    return policy.call("exported")[0]


def off_policy_batch(logprobs_NS, seed=0):
    """`random_batch` with old, reference and rollout log-probs around the policy's own.

    So far around that some ratios are clipped on either side.
    """
    batch = random_batch(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    for name, spread in (("old_logprobs", 0.2), ("ref_logprobs", 0.4), ("rollout_logprobs", 0.2)):
        noise_NS = spread * torch.randn(logprobs_NS.shape, generator=rng)
        setattr(batch, name, (logprobs_NS + noise_NS) * batch.completion_mask)
    return batch
