"""Whether this machine has the packages, kernels and GPUs of a run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from rlsys.config import Config, RunConfig
from rlsys.config.passed_through import megatron_option_problems, vllm_option_problems
from rlsys.config.roles import decide_placement, describe_gpu_demand, fewer_gpus, plan_roles
from rlsys.config.rules_profile import NO_GPU_MEMORY
from rlsys.model.attention import attention_problem
from rlsys.model.modelscope import REMEDY
from rlsys.preflight.devices import device_of_packages, guess_device, visible_gpus
from rlsys.problems import Problem
from rlsys.tracking import mlflow, swanlab, trackers, wandb
from rlsys.tracking.packages import missing_packages

TRACKER_CHECKS = {
    "wandb": wandb.key_problem,
    "mlflow": mlflow.storage_problem,
    "swanlab": swanlab.key_problem,
}
"""Tracker -> why its package cannot record a run, by the section `tracking`."""


def package_problems(config: RunConfig) -> Iterator[Problem]:
    """Packages that are missing, or built for another device than the run's."""
    engines = ("vllm", "megatron") if config.sampler is not None else ("megatron",)
    for module in ("torch", "ray", *engines, "transformers"):
        if importlib.util.find_spec(module) is None:
            yield Problem(
                f"{module} is not installed; `rlsys doctor` says how to get it", only_here=True
            )
    if config.hub == "modelscope" and importlib.util.find_spec("modelscope") is None:
        yield Problem(f"hub: modelscope needs a package that is missing: {REMEDY}", only_here=True)
    device, built_for = guess_device(config), device_of_packages()
    # The hosts of a running Ray cluster may have other packages.
    if os.environ.get("RAY_ADDRESS") or config.sampler is None or built_for in (None, device):
        return
    if built_for == "cpu":
        yield Problem(
            "the run is on GPUs and the installed vLLM is built for the CPU: install the GPU "
            "packages (docs/gpu.md), or run on the CPU with --device cpu",
            only_here=True,
        )
    else:
        yield Problem(
            "the run is on the CPU and the installed vLLM is built for GPUs: use --device cuda, or "
            "install the CPU packages with `make setup` in an environment of their own",
            only_here=True,
        )


def tracker_problems(config: RunConfig) -> Iterator[Problem]:
    """Trackers that nobody registered, whose package is not installed, or that cannot log in."""
    for name in config.tracking.report_to:
        try:
            trackers[name]
        except ValueError as error:
            yield Problem(f"tracking.report_to: {error}")
    names = config.tracking.report_to
    if missing := missing_packages(names):
        yield Problem(missing, only_here=True)
        return
    for name, check in TRACKER_CHECKS.items():
        if name in names and (problem := check(config.tracking)):
            yield Problem(problem, only_here=True)


def option_problems(config: Config) -> Iterator[Problem]:
    """Options passed through that the installed vLLM and megatron-core do not take."""
    yield from vllm_option_problems(config)
    yield from megatron_option_problems(config)
    if config.rollout.engine_kwargs.get("enable_chunked_prefill") and guess_device(config) == "cpu":
        yield Problem(
            "rollout.engine_kwargs: enable_chunked_prefill cannot be true on the CPU, because vLLM "
            "cannot take back what a request draws from its generator there: leave it out"
        )


def attention_problems(config: RunConfig) -> Iterator[Problem]:
    """Attention kernels that the run's device does not have."""
    device = guess_device(config)
    if device == "cpu" and config.device == "auto":
        return  # the Ray cluster may have GPUs; the engines check again
    problem = attention_problem(
        config.policy.attention_backend,
        context_parallel_size=config.largest_context_parallel_size,
        device=device,
        dtype=config.model_dtype(on_cpu=device == "cpu"),
    )
    if problem is not None:
        yield problem


def gpu_problems(config: RunConfig) -> Iterator[Problem]:
    """Too few GPUs, if the run starts a Ray cluster of its own on this machine."""
    if os.environ.get("RAY_ADDRESS"):
        return
    if guess_device(config) == "cpu":
        if config.profile.memory and config.device == "auto":
            yield Problem(NO_GPU_MEMORY, only_here=True)
        return
    available = visible_gpus()
    config = decide_placement(config, device="cuda", num_gpus=available)
    roles = plan_roles(config, device="cuda")
    if sum(role.gpus for role in roles) > available:
        demand, remedy = describe_gpu_demand(roles), fewer_gpus(config, roles, available)
        yield Problem(f"{demand}, and this machine shows {available}: {remedy}", only_here=True)
