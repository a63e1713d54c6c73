"""The default of a length that the model of a config does not have positions for."""

from __future__ import annotations

from typing import Any

from rlsys.config import PreferenceConfig, RewardModelConfig, SftConfig
from rlsys.config.load import ResolvedConfig
from rlsys.model.folder import find_model_folder
from rlsys.model.shape import read_model_shape


def within_positions(resolved: ResolvedConfig[Any]) -> ResolvedConfig[Any]:
    """`resolved` with a default of data.max_length that is at most the positions of the model.

    TRL and ms-swift lower such a default too. A value that a user wrote stays, and the checks
    refuse it.
    """
    config, name = resolved.config, "data.max_length"
    has_default = isinstance(config, SftConfig | PreferenceConfig | RewardModelConfig)
    if not has_default or resolved.origins[name] != "default":
        return resolved
    try:
        folder = find_model_folder(config.model.path)
        shape = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    except ValueError:  # which the checks report
        return resolved
    default, positions = config.data.max_length, shape.max_position_embeddings
    behind = config.longest_row - default  # the student's completion, in distillation
    if config.longest_row <= positions or positions - behind < 2:
        return resolved
    positions -= behind
    print(
        f"note: {name} is {positions:,}, the positions of {config.model.path}"
        f"{' less rollout.max_completion_length' if behind else ''}, and not its default of "
        f"{default:,}",
        flush=True,
    )
    data = config.data.model_copy(update={"max_length": positions})
    config = config.model_copy(update={"data": data})
    return ResolvedConfig(config, {**resolved.origins, name: "model"})
