"""megatron-core on the CPU over gloo: "cuda" means the CPU.

torch is patched where megatron-core assumes CUDA:

1. `device="cuda"` and `.cuda()` give CPU tensors;
2. streams, events and synchronisation exist: all work is done when its call returns;
3. the random generator of each device is the CPU's;
4. `tensor.type()` says "torch.cuda.FloatTensor", which optimizers check;
5. `torch.compile` returns functions unchanged: compiling their C++ takes a minute.

and where it is slower on the CPU than it could be: large products in float32 are oneDNN's
(`rlsys.engines.megatron.onednn`), and AdamW is torch's fused one.

megatron-core itself is patched in DistributedOptimizer, whose checkpoints miss the step counter of
torch's AdamW; in collectives, which copy where a rank is alone; in two names of the mixture of
experts: `maybe_move_tensor_to_cpu`, which makes an array only of tensors from a GPU, and
`te_general_gemm`, which needs Transformer Engine; in two names of latent attention; and in
recompute without outputs, which believes that FP8 is there.
Two warnings are avoided, with CUDA_DEVICE_MAX_CONNECTIONS and a log level.

Parallelism, optimizer, clipping and schedules are megatron-core's own; norm and attention are in
`rlsys.engines.megatron.layers`. The patches hold for the whole process, so a policy or reference
actor has a process to itself.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from rlsys.engines.megatron.onednn import use_onednn

CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


class _DoneStream:
    """A CUDA stream or event whose work is always done."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., _DoneStream]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DoneStream)

    def __hash__(self) -> int:
        return 0


def quiet_megatron() -> None:
    """Silence warnings that hide what matters in a user's terminal.

    megatron-core warns at import of packages that a CPU does not have, and torch of how
    megatron-core uses it.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)


@functools.cache
def enable_megatron_on_cpu() -> None:
    """Patch torch for megatron-core; call in runs on CPU, before anything imports megatron."""
    # It orders collectives on GPUs; megatron-core warns if it is missing.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _patch_devices()
    _patch_streams()
    _patch_random_state()
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
    use_onednn()
    _patch_optimizer()
    _patch_collectives()
    _patch_experts()
    _patch_latent_attention()
    _patch_recompute()


def return_free_memory() -> None:
    """Give the system what malloc keeps of freed tensors; does nothing without glibc.

    Tensors of many lengths cut glibc's heap into pieces that fit nothing later. The process grows
    while it uses no more: from 450 to 540 MiB in 1,500 updates of a tiny model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _patch_devices() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return create

    # `with torch.device(...)` looks factories up in a list that its first use makes: make it now,
    # with torch's own functions, which the patched ones call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to  # type: ignore[assignment]
    torch.Tensor.type = type_  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda device: None


def _patch_streams() -> None:
    cuda = torch.cuda
    cuda.synchronize = lambda *_: None
    cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        setattr(cuda, name, type(name, (_DoneStream,), {}))


def _patch_random_state() -> None:
    cuda, generator = torch.cuda, torch.default_generator
    cuda.default_generators = collections.defaultdict(lambda: generator)  # type: ignore[assignment]
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: generator.get_state()  # type: ignore[assignment,misc]
    cuda.set_rng_state = cuda.random.set_rng_state = (  # type: ignore[assignment,misc]
        lambda state, device=None: generator.set_state(state)
    )
    cuda.manual_seed = lambda seed: generator.manual_seed(seed)  # type: ignore[assignment,return-value]
    cuda._lazy_call = lambda function, **_: function()  # type: ignore[attr-defined]
    # Warns that forking the random state moves the CPU's, which is intended here.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _patch_collectives() -> None:
    """A rank without others has its part of the weights and gradients; gloo would copy them."""
    from megatron.core.distributed import param_and_grad_buffer

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(output: torch.Tensor, input: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
            if group.size() == 1 and output.data_ptr() == input.data_ptr():
                return None
            return collective(output, input, group=group, **kwargs)

        return run

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        original = getattr(param_and_grad_buffer, name)
        setattr(param_and_grad_buffer, name, unless_alone(original))


def _patch_experts() -> None:
    """Two places of megatron-core 0.16.

    A collective needs the tokens of each rank as an array, which megatron-core makes only when it
    copies them from a GPU. The router asks whether `te_general_gemm` is None, and without
    Transformer Engine the name does not exist.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    moe_utils.te_general_gemm = None


def _patch_latent_attention() -> None:
    """Two names of megatron-core 0.16.

    It believes that Transformer Engine is there without it. And layers that each tensor-parallel
    rank has whole have to be of a class that it knows.
    """
    from megatron.core.transformer import multi_latent_attention

    from rlsys.engines.megatron.latent import ReplicatedLinear

    multi_latent_attention.HAVE_TE = False
    multi_latent_attention.Linear = ReplicatedLinear


def _patch_recompute() -> None:
    """Modules that are computed again ask Transformer Engine for FP8, unless `fp8` is None."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original = CheckpointWithoutOutput.__init__
    CheckpointWithoutOutput.__init__ = lambda self, fp8=None: original(self, None)


def _patch_optimizer() -> None:
    """Take torch's fused AdamW in place of Apex's, and two places that fail for it.

    Unfused, its dozen ops read and write weights and state each. Its step counter is a tensor per
    parameter, which the checkpoints of megatron-core 0.16's DistributedOptimizer miss.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    adamw: Any = torch.optim.AdamW
    adamw.__init__ = functools.partialmethod(adamw.__init__, fused=True)
    original = DistributedOptimizer.sharded_state_dict

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:  # before the first step, so before every load
                    self.optimizer.state[param] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return original(self, *args, **kwargs)

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state[main_param]
        state["step"] = state["step"].clone()  # loading gave all parameters one counter
        for key, target in {"param": main_param, **state}.items():
            if key != "step":
                target.copy_(tensors[key])

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
