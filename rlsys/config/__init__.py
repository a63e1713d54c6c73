"""What a run is: the schema of a config, how it is loaded, and the rules between its fields."""

from rlsys.config.schema import (
    REWARD_MODEL_PREFIX,
    CheckpointConfig,
    Config,
    DataConfig,
    GrpoConfig,
    ModelConfig,
    PolicyConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TrackingConfig,
    WeightSyncConfig,
)

__all__ = [
    "REWARD_MODEL_PREFIX",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GrpoConfig",
    "ModelConfig",
    "PolicyConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "TrackingConfig",
    "WeightSyncConfig",
]
