"""What a run is: the schema of a config, how it is loaded, and the rules between its fields."""

from rlsys.config.distill import DistillConfig as DistillConfig
from rlsys.config.preference import PreferenceAlgorithm as PreferenceAlgorithm
from rlsys.config.preference import PreferenceConfig as PreferenceConfig
from rlsys.config.preference import PreferenceDataConfig as PreferenceDataConfig
from rlsys.config.preference import PreferenceSection as PreferenceSection
from rlsys.config.reward_model import RewardModelConfig as RewardModelConfig
from rlsys.config.reward_model import ScoreDataConfig as ScoreDataConfig
from rlsys.config.schema import REWARD_MODEL_PREFIX as REWARD_MODEL_PREFIX
from rlsys.config.schema import CheckpointConfig as CheckpointConfig
from rlsys.config.schema import ColocatedConfig as ColocatedConfig
from rlsys.config.schema import Config as Config
from rlsys.config.schema import DataConfig as DataConfig
from rlsys.config.schema import EvalConfig as EvalConfig
from rlsys.config.schema import GrpoConfig as GrpoConfig
from rlsys.config.schema import LoraConfig as LoraConfig
from rlsys.config.schema import ModelConfig as ModelConfig
from rlsys.config.schema import PolicyConfig as PolicyConfig
from rlsys.config.schema import ReferenceConfig as ReferenceConfig
from rlsys.config.schema import RewardConfig as RewardConfig
from rlsys.config.schema import RolloutConfig as RolloutConfig
from rlsys.config.schema import RowsConfig as RowsConfig
from rlsys.config.schema import RunConfig as RunConfig
from rlsys.config.schema import Section as Section
from rlsys.config.schema import TeacherConfig as TeacherConfig
from rlsys.config.schema import TrackingConfig as TrackingConfig
from rlsys.config.schema import WeightSyncConfig as WeightSyncConfig
from rlsys.config.sft import SftConfig as SftConfig
from rlsys.config.sft_data import SftDataConfig as SftDataConfig

ReferencedConfig = Config | PreferenceConfig
"""The configs of runs that may have a reference."""
