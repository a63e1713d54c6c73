"""Everything about a run that can be checked before Ray starts.

A run that would fail in its third minute, in some actor, fails here in its first second, with all
its problems in one message. Nothing here imports torch (unless a plugin registers a loss), ray or
vLLM.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Generator, Iterator
from pathlib import Path

from rlsys.config import Config, PolicyConfig
from rlsys.config.local_paths import left_out_of_job_copy, named_paths
from rlsys.config.roles import describe_gpu_demand, fewer_gpus, plan_roles
from rlsys.data.reward_columns import column_problems_of_run, column_use, column_uses
from rlsys.data.spec import is_no_hub_id
from rlsys.model.attention import missing_attention, unsupported_attention
from rlsys.model.folder_check import folder_problems
from rlsys.model.memory import kv_cache_bytes, longest_row
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.preflight.data import check_data, count_rows, known_columns
from rlsys.preflight.devices import device_of_packages, guess_device, visible_gpus
from rlsys.preflight.hub import hub_answers
from rlsys.problems import Problem
from rlsys.rewards import check_call, plugin_problems
from rlsys.run.checkpoints import checkpoint_steps
from rlsys.run.folder import RunDir
from rlsys.run.resume import holds_run
from rlsys.text import counted
from rlsys.tracking import trackers

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention on CPU has kernels for."""


def check_run(config: Config) -> list[Problem]:
    """All problems of a run that can be seen from this machine without starting it."""
    problems = [
        *_packages(config),
        *_models(config),
        *_attention(config),
        *_gpus(config),
        *_datasets(config),
        *_rewards(config),
        *_algorithm(config),
        *output_dir_problems(config),
    ]
    left_out = left_out_of_job_copy(config) if problems else []
    if left_out:
        problems.append(
            Problem(
                f"{', '.join(left_out)}: not in this job's copy of the working directory, from "
                "which Ray leaves out what .gitignore and .rayignore name. Run in the folder "
                'itself, `ray job submit -- env -C "$PWD" rlsys grpo ...`, where the cluster has '
                "it under the same path, or give absolute paths; RAY_RUNTIME_ENV_IGNORE_GITIGNORE="
                "1 for `ray job submit` sends them, up to 512 MiB",
                only_here=True,
            )
        )
    return problems


def find_model_folder(path: str) -> Path:
    """The folder that holds config.json of a model folder or hub id, downloading only that file.

    Raises:
        ValueError: neither a folder here nor a readable hub model.
    """
    if Path(path).is_dir():
        return Path(path)
    if is_no_hub_id(path):
        raise ValueError(f"there is no model folder {path!r} on this machine")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        config = hf_hub_download(path, "config.json", local_files_only=not hub_answers())
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if hub_answers() else "the hub does not answer"
        if isinstance(error, GatedRepoError):
            reason = "it is gated: ask for access on its page, and set HF_TOKEN to your token"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has none of this name, or your token (HF_TOKEN) may not read it"
        raise ValueError(
            f"{path!r} is neither a folder on this machine nor a hub model that can be read from "
            f"here ({reason})"
        ) from None
    return Path(config).parent


def _packages(config: Config) -> Iterator[Problem]:
    for module in ("torch", "ray", "vllm", "megatron", "transformers"):
        if importlib.util.find_spec(module) is None:
            yield Problem(
                f"{module} is not installed; `rlsys doctor` says how to get it", only_here=True
            )
    yield from _packages_fit_device(config)
    for name in config.tracking.report_to:
        try:
            trackers[name]
        except ValueError as error:
            yield Problem(f"tracking.report_to: {error}")
    wandb = importlib.util.find_spec("wandb")
    # A folder wandb/ with old logs is found too, but has no origin.
    if "wandb" in config.tracking.report_to and (wandb is None or wandb.origin is None):
        yield Problem(
            "tracking.report_to asks for wandb, which is not installed: `pip install "
            "wandb`, or leave it out",
            only_here=True,
        )


def _packages_fit_device(config: Config) -> Iterator[Problem]:
    """The hosts of a running Ray cluster may have other packages, so this looks at local runs."""
    device, built_for = guess_device(config), device_of_packages()
    if os.environ.get("RAY_ADDRESS") or built_for in (None, device):
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


# --- models --------------------------------------------------------------------------------------


def _models(config: Config) -> Iterator[Problem]:
    shape = yield from _one_model(config, "model.path", config.model.path)
    if shape is not None:
        yield from _policy_fits(config, shape)
        yield from _rollout_fits(config, shape)
        yield from _kv_cache_fits(config, shape)
    for path in config.reward.model_paths:
        try:
            find_model_folder(path)
        except ValueError as error:
            yield Problem(f"reward.reward_model: {error}", only_here=True)
    if config.grpo.beta == 0:
        return
    reference = shape
    if config.reference.path is not None:
        reference = yield from _one_model(config, "reference.path", config.reference.path)
    if reference is not None:
        tp = config.reference.tensor_parallel_size
        yield from _tensor_parallel("reference.tensor_parallel_size", tp, reference)
        if reference.is_moe and reference.num_experts % tp:
            yield Problem(
                f"reference.tensor_parallel_size = {tp}, over which experts are shared too, does "
                f"not divide the model's {reference.num_experts} experts"
            )
    if shape is not None and reference is not None and reference.vocab_size != shape.vocab_size:
        yield Problem(
            f"reference.path has a vocabulary of {reference.vocab_size} tokens and model.path one "
            f"of {shape.vocab_size}: the reference model must have the same tokenizer"
        )


def _one_model(
    config: Config, field: str, path: str
) -> Generator[Problem, None, ModelShape | None]:
    """The problems of one model; returns its shape where config.json can be read."""
    try:
        folder = find_model_folder(path)
    except ValueError as error:
        yield Problem(f"{field}: {error}", only_here=True)
        return None
    try:
        shape = read_model_shape(folder)
    except ValueError as error:
        for line in str(error).splitlines():
            yield Problem(f"{field}: {line}")
        return None
    if folder == Path(path):  # of a hub model only config.json is here yet
        for text in folder_problems(folder, shape, has_prompts=field == "model.path"):
            yield Problem(f"{field}: {text}", only_here=True)
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    if longest > shape.max_position_embeddings:
        yield Problem(
            f"data.max_prompt_length {config.data.max_prompt_length} + "
            f"rollout.max_completion_length {config.rollout.max_completion_length} = {longest} "
            f"tokens, but {field} {path} has positions for {shape.max_position_embeddings}: "
            f"lower one by {longest - shape.max_position_embeddings}"
        )
    return shape


def _policy_fits(config: Config, shape: ModelShape) -> Iterator[Problem]:
    policy = config.policy
    yield from _tensor_parallel("policy.tensor_parallel_size", policy.tensor_parallel_size, shape)
    if shape.num_layers % policy.pipeline_parallel_size:
        yield Problem(
            f"policy.pipeline_parallel_size = {policy.pipeline_parallel_size} does not divide the "
            f"model's {shape.num_layers} layers: use {_divisors(shape.num_layers)}"
        )
    yield from _experts_fit(policy, shape)


def _experts_fit(policy: PolicyConfig, shape: ModelShape) -> Iterator[Problem]:
    ep, tp = policy.expert_model_parallel_size, policy.tensor_parallel_size
    setting = f"policy.expert_model_parallel_size = {ep}"
    if not shape.is_moe:
        if ep > 1:
            yield Problem(
                f"{setting}, but the model has no experts to share ({shape.model_type} is dense): "
                "leave it out"
            )
        return
    if shape.num_experts % ep:
        yield Problem(
            f"{setting} does not divide the model's {shape.num_experts} experts: use "
            f"{_divisors(shape.num_experts)}"
        )
    if ep == 1 and tp > 1:
        yield Problem(
            f"policy.tensor_parallel_size = {tp} does not cut the experts of {shape.model_type}, "
            f"and with {setting} no rank has all tokens of an expert: set "
            f"policy.expert_model_parallel_size to {tp}"
        )


def _attention(config: Config) -> Iterator[Problem]:
    device = guess_device(config)
    if device == "cpu" and config.device == "auto":
        return  # the Ray cluster may have GPUs; the engines ask again
    policy, dtype = config.policy, config.model_dtype(on_cpu=device == "cpu")
    unsupported = unsupported_attention(
        policy,
        context_parallel_size=config.largest_context_parallel_size,
        device=device,
        dtype=dtype,
    )
    if unsupported is not None:
        yield Problem(unsupported)
    elif device == "cuda":
        missing = missing_attention(policy.attention_backend)
        if missing is not None:
            yield Problem(missing, only_here=True)


def _gpus(config: Config) -> Iterator[Problem]:
    """Whether this machine has enough of them, where the run starts a cluster of its own here."""
    if guess_device(config) == "cpu" or os.environ.get("RAY_ADDRESS"):
        return
    roles, there_are = plan_roles(config, device="cuda"), visible_gpus()
    if sum(role.gpus for role in roles) > there_are:
        demand, remedy = describe_gpu_demand(roles), fewer_gpus(roles, there_are)
        yield Problem(f"{demand}, and this machine shows {there_are}: {remedy}", only_here=True)


def _rollout_fits(config: Config, shape: ModelShape) -> Iterator[Problem]:
    tp = config.rollout.tensor_parallel_size
    # vLLM replicates KV heads and pads the vocabulary, so fewer numbers have to divide.
    intermediate = shape.moe_intermediate_size if shape.is_moe else shape.intermediate_size
    if shape.num_heads % tp or intermediate % tp:
        fitting = math.gcd(shape.num_heads, intermediate)
        yield Problem(
            f"rollout.tensor_parallel_size = {tp} does not divide the model's {shape.num_heads} "
            f"attention heads and intermediate size {intermediate}: use "
            f"{_divisors(fitting)}"
        )
    kv_heads = shape.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        yield Problem(
            f"rollout.tensor_parallel_size = {tp} neither divides the model's {kv_heads} KV heads "
            f"nor is a multiple of them: use {_divisors(kv_heads)}"
        )
    if guess_device(config) == "cpu" and shape.head_dim not in CPU_HEAD_DIMS:
        yield Problem(
            f"the model's heads have {shape.head_dim} dimensions, and vLLM on CPU has attention "
            f"for {', '.join(map(str, CPU_HEAD_DIMS))}: use another model"
        )


def _kv_cache_fits(config: Config, shape: ModelShape) -> Iterator[Problem]:
    """Whether one sequence fits: vLLM asks it too, when it has loaded the model."""
    size, device = config.rollout.kv_cache_memory_mb, guess_device(config)
    if size is None:
        return
    if config.device == "auto" and os.environ.get("RAY_ADDRESS"):
        device = "cuda"  # which the cluster may have; on a CPU a token takes more
    needed = kv_cache_bytes(config, shape, sequences=1, device=device)
    if size * 2**20 < needed:
        yield Problem(
            f"rollout.kv_cache_memory_mb = {size} does not hold one sequence of "
            f"data.max_prompt_length {config.data.max_prompt_length} + "
            f"rollout.max_completion_length {config.rollout.max_completion_length} = "
            f"{longest_row(config)} tokens, which takes {needed / 2**20:,.1f} MiB: set it to at "
            f"least {-(-needed // 2**20)}, or leave it out"
        )


def _tensor_parallel(field: str, tp: int, shape: ModelShape) -> Iterator[Problem]:
    sizes = {
        "attention heads": shape.num_heads,
        "KV heads": shape.num_kv_heads,
        "intermediate size": shape.intermediate_size,
    }
    if shape.is_moe:
        del sizes["intermediate size"]  # experts are shared, not cut
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    if wrong:
        yield Problem(
            f"{field} = {tp} does not divide the model's {', '.join(wrong)}: use "
            f"{_divisors(math.gcd(*sizes.values()))}"
        )


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)


# --- data, rewards, output -----------------------------------------------------------------------


def _datasets(config: Config) -> Iterator[Problem]:
    # One file may have rewards and preprocessors; `_rewards` reports what is wrong with these.
    list(plugin_problems("", config.reward.external_plugins))
    yield from check_data(config.data)
    rows = count_rows(config.data)
    if rows is not None and 0 < rows < config.num_prompts:
        yield Problem(
            f"data.dataset has {counted(rows, 'row')} to train on, and a step needs "
            f"{config.num_prompts} prompts (rollout.generation_batch_size / "
            "rollout.num_generations): give more data, or lower generation_batch_size"
        )


def _rewards(config: Config) -> Iterator[Problem]:
    problems = list(_reward_functions(config))
    yield from problems or _reward_columns(config)


def _reward_functions(config: Config) -> Iterator[Problem]:
    complete = True
    for problem in plugin_problems("reward.external_plugins", config.reward.external_plugins):
        complete = False
        yield problem
    for name in config.reward.names:
        params, of_run = config.reward.params.get(name, {}), config.known_to_rewards
        try:
            # Columns that are missing are told below, with those that there are.
            check_call(name, params, of_run, column_use(name, params, of_run).needed)
        except ValueError as error:
            hint = "" if complete else " (a plugin above could not be loaded)"
            yield Problem(f"reward.reward_funcs: {error}{hint}", only_here=not complete)


def _reward_columns(config: Config) -> Iterator[Problem]:
    """Columns that do not fit the reward functions, where a look at the rows tells."""
    wanted = {column for use in column_uses(config).values() for column in use.needed}
    train = known_columns(config.data, "train", wanted)
    held_out = known_columns(config.data, "validation", wanted)
    for text in column_problems_of_run(config, train, held_out):
        yield Problem(f"reward.reward_funcs: {text}")


def _algorithm(config: Config) -> Iterator[Problem]:
    """Names that a plugin registers; the built-in ones are checked with the config."""
    grpo, complete = config.grpo, True
    if not grpo.external_plugins:
        return
    from rlsys.algo.advantages import advantage_estimators
    from rlsys.algo.losses import losses

    for problem in plugin_problems("grpo.external_plugins", grpo.external_plugins):
        complete = False
        yield problem
    try:
        losses[grpo.loss_type]
        advantage_estimators[grpo.advantage_estimator]
    except ValueError as error:
        yield Problem(f"grpo: {error}", only_here=not complete)


def output_dir_problems(config: Config) -> Iterator[Problem]:
    """Whether the run's folder can be written to without harm to another run's results."""
    run = RunDir(Path(config.output_dir))
    obstacle = run.obstacle()
    if obstacle is not None:
        yield Problem(
            f"output_dir: {run.path} {obstacle}: choose another one with --output_dir",
            only_here=True,
        )
        return
    steps = checkpoint_steps(run.checkpoints)
    if config.checkpoint.resume and steps:
        # A run that was killed right before its end has its last checkpoint, but no model.
        if config.max_steps is not None and (
            steps[-1] > config.max_steps or (steps[-1] == config.max_steps and run.final.exists())
        ):
            yield Problem(
                f"checkpoint.resume: {run.checkpoints} has step {steps[-1]}, after which max_steps "
                f"= {config.max_steps} leaves nothing to do: raise --max_steps, start over with "
                "--overwrite alone, or choose another folder with --output_dir",
                only_here=True,
            )
    elif config.overwrite:
        needed = [path for path in named_paths(config) if run.holds(Path(path))]
        if needed:
            yield Problem(
                f"overwrite: moves aside {', '.join(needed)}, which this run reads: choose another "
                "folder with --output_dir",
                only_here=True,
            )
    elif config.checkpoint.resume:
        remedy = "add --overwrite to start from step 0"
        if not holds_run(run):
            remedy = f"leave checkpoint.resume out, or {remedy}"
        yield Problem(
            f"checkpoint.resume: {run.checkpoints} holds no checkpoint to continue from; {remedy}",
            only_here=True,
        )
    elif holds_run(run):
        found, remedy = "without a checkpoint", ""
        if steps:
            found, remedy = f"up to step {steps[-1]}", "continue it with --checkpoint.resume, "
        yield Problem(
            f"output_dir: {run.path} holds another run, {found}: {remedy}start from step 0 with "
            "--overwrite, which moves its files aside, or choose another folder with --output_dir",
            only_here=True,
        )
