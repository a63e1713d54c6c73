"""Whether the adapters of a run, or what it freezes, fit its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.model.adapter_folder import CONFIG_FILE
from rlsys.model.families.bridged import is_bridged
from rlsys.model.folder import read_json
from rlsys.model.freezing import frozen_tensors, num_frozen, trained_text
from rlsys.model.lora import adapter_table, count_trained, plan_lora
from rlsys.model.shape import ModelShape
from rlsys.problems import Problem
from rlsys.text import counted


def trained_problems(config: RunConfig, shape: ModelShape) -> Iterator[Problem]:
    """Adapters or patterns that do not fit the model."""
    policy = config.policy
    if policy.lora is None and not policy.freezes:
        return
    if is_bridged(config, shape):
        yield Problem(
            f"policy.{'lora' if policy.lora is not None else 'freeze_parameters'} is for the "
            f"models that rlsys builds itself, and mcore-bridge builds {shape.model_type}: train "
            "all parameters, or another model"
        )
        return
    try:
        if policy.lora is not None:
            plan_lora(policy.lora, shape)
        else:
            frozen_tensors(policy, shape)
    except ValueError as error:
        yield Problem(str(error), only_here=policy.lora is not None and bool(policy.lora.path))


def base_note(config: RunConfig, folder: Path) -> str | None:
    """What to know of an adapter in policy.lora.path that names another base than the run's model.

    Shapes may agree by chance: those of a base and its instruct model do.

    Args:
        config: of the run.
        folder: of the run's model.
    """
    lora = config.policy.lora
    if lora is None or lora.path is None:
        return None
    base = read_json(Path(lora.path) / CONFIG_FILE).get("base_model_name_or_path")
    if not base or base == config.model.path or Path(base).resolve() == folder.resolve():
        return None
    return (
        f"the adapter in {lora.path} was trained on {base} (base_model_name_or_path in its "
        f"{CONFIG_FILE}), and model.path is {config.model.path}: it fits if that has the same "
        "weights"
    )


def _trains_a_part(config: RunConfig, shape: ModelShape) -> bool:
    """Whether the run has adapters or frozen parameters, and they fit the model."""
    policy = config.policy
    return (policy.lora is not None or policy.freezes) and not any(trained_problems(config, shape))


def num_saved(config: RunConfig, shape: ModelShape) -> tuple[int, int]:
    """Numbers in a model folder that the run saves, and trained parameters.

    A folder of an adapter has the adapter alone; frozen parameters are saved and not trained.
    """
    policy, whole = config.policy, shape.num_params
    if not _trains_a_part(config, shape):
        return whole, whole
    if policy.lora is None:
        return whole, whole - num_frozen(policy, shape)
    trained = count_trained(adapter_table(shape, plan_lora(policy.lora, shape)))
    return trained, trained


def trained_summary(config: RunConfig, shape: ModelShape) -> str | None:
    """How many parameters are trained, and where; None if all are, or the config has problems."""
    if not _trains_a_part(config, shape):
        return None
    lora, (_, trained) = config.policy.lora, num_saved(config, shape)
    text = trained_text(trained, shape.num_params)
    if lora is None:
        return text
    plan = plan_lora(lora, shape)
    names = ", ".join(sorted({target.rpartition(".")[2] for target in plan.targets}))
    whole = f"; whole: {', '.join(plan.modules_to_save)}" if plan.saved else ""
    return f"{text}, in {counted(len(plan.targets), 'adapter')} of {names}{whole}"
