"""Host memory of the policy's snapshots: see `rlsys.actors.snapshots`."""

from __future__ import annotations

from rlsys.config import RunConfig
from rlsys.model.policy_memory import changing_bytes
from rlsys.model.shape import ModelShape
from rlsys.types import Device

RAY_SHARE = 0.3
"""Share of a node's memory that Ray takes for its object store, unless it is started otherwise."""
GIB = 2**30


def takes_snapshots(config: RunConfig) -> bool:
    """Whether a run keeps snapshots of its policy."""
    return config.recovery.max_restarts > 0 and config.policy.snapshot_steps != 0


def snapshot_gib(config: RunConfig, shape: ModelShape, device: Device) -> float:
    """GiB of host memory of all ranks' snapshots: the newest, and the one that is being taken."""
    if not takes_snapshots(config):
        return 0.0
    return 2 * config.policy.world_size * changing_bytes(config, shape, device) / GIB


def snapshot_text(config: RunConfig, shape: ModelShape, device: Device) -> str | None:
    """How that is computed; None if none are taken."""
    if not takes_snapshots(config):
        return None
    rank = changing_bytes(config, shape, device) / GIB
    return (
        f"snapshots = 2 x {config.policy.world_size} ranks x {rank:.2f} GiB (trained weights, "
        f"optimizer) = {snapshot_gib(config, shape, device):.2f} GiB of host memory, in Ray's "
        "object store (policy.snapshot_steps)"
    )


def snapshot_warning(
    config: RunConfig, shape: ModelShape, device: Device, host_gib: float
) -> str | None:
    """What happens if snapshots do not fit in the object store of a host of this size."""
    needed, room = snapshot_gib(config, shape, device), RAY_SHARE * host_gib
    if needed <= room:
        return None
    becomes = (
        "none are taken" if config.policy.snapshot_steps == "auto" else "Ray moves them to disk"
    )
    return (
        f"snapshots need {needed:.1f} GiB of Ray's object store, of which a host of this size has "
        f"{room:.1f} by default: {becomes} then. Start Ray with a larger --object-store-memory, "
        "use more nodes, or set policy.snapshot_steps to 0"
    )
