"""The nested run configuration: every field with its unit, default and rule.

A config is a YAML file. Each file of this folder has one of its sections; `run.py` and
`grpo_run.py` have what holds them. The command line overrides fields as `--section.field value`.
Unknown keys are errors. Derived values are properties, never flags.
"""

from rlsys.config.field_types import REWARD_MODEL_PREFIX as REWARD_MODEL_PREFIX
from rlsys.config.schema.checkpoint import AUTO_SAVES as AUTO_SAVES
from rlsys.config.schema.checkpoint import CheckpointConfig as CheckpointConfig
from rlsys.config.schema.data import DataConfig as DataConfig
from rlsys.config.schema.data import RowsConfig as RowsConfig
from rlsys.config.schema.evaluation import EvalConfig as EvalConfig
from rlsys.config.schema.grpo import GrpoConfig as GrpoConfig
from rlsys.config.schema.grpo_run import ColocatedConfig as ColocatedConfig
from rlsys.config.schema.grpo_run import Config as Config
from rlsys.config.schema.lora import LoraConfig as LoraConfig
from rlsys.config.schema.model import ModelConfig as ModelConfig
from rlsys.config.schema.policy import PolicyConfig as PolicyConfig
from rlsys.config.schema.profile import ProfileConfig as ProfileConfig
from rlsys.config.schema.recovery import RecoveryConfig as RecoveryConfig
from rlsys.config.schema.reference import ReferenceConfig as ReferenceConfig
from rlsys.config.schema.reward import RewardConfig as RewardConfig
from rlsys.config.schema.rollout import RolloutConfig as RolloutConfig
from rlsys.config.schema.run import AnyConfig as AnyConfig
from rlsys.config.schema.run import RunConfig as RunConfig
from rlsys.config.schema.section import NonEmptyText as NonEmptyText
from rlsys.config.schema.section import Section as Section
from rlsys.config.schema.teacher import TeacherConfig as TeacherConfig
from rlsys.config.schema.tracking import TrackersConfig as TrackersConfig
from rlsys.config.schema.tracking import TrackingConfig as TrackingConfig
from rlsys.config.schema.weight_sync import WeightSyncConfig as WeightSyncConfig
