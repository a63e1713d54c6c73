"""The default of a length that the model of a config does not have positions for."""

from __future__ import annotations

from typing import Any

from rlsys.config import SftConfig
from rlsys.config.load import ResolvedConfig
from rlsys.model.folder import find_model_folder
from rlsys.model.shape import read_model_shape


def within_positions(resolved: ResolvedConfig[Any]) -> ResolvedConfig[Any]:
    """`resolved` with a default of data.max_length that is at most the positions of the model.

    TRL and ms-swift lower such a default too. A value that a user wrote stays, and the checks
    refuse it.
    """
    config, name = resolved.config, "data.max_length"
    if not isinstance(config, SftConfig) or resolved.origins[name] != "default":
        return resolved
    try:
        shape = read_model_shape(find_model_folder(config.model.path), may_bridge=True)
    except ValueError:  # which the checks report
        return resolved
    default, positions = config.data.max_length, shape.max_position_embeddings
    if default <= positions:
        return resolved
    print(
        f"note: {name} is {positions:,}, the positions of {config.model.path}, and not its default "
        f"of {default:,}",
        flush=True,
    )
    data = config.data.model_copy(update={"max_length": positions})
    config = config.model_copy(update={"data": data})
    return ResolvedConfig(config, {**resolved.origins, name: "model"})
