"""What a run is, whatever it trains with."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rlsys.config.dataset_spec import Hub, dataset_of_modelscope, model_of_modelscope
from rlsys.config.field_types import PathText, parse_ports
from rlsys.config.schema.checkpoint import CheckpointConfig
from rlsys.config.schema.data import RowsConfig
from rlsys.config.schema.grpo import GrpoConfig
from rlsys.config.schema.model import ModelConfig
from rlsys.config.schema.policy import PolicyConfig
from rlsys.config.schema.profile import ProfileConfig, ProfiledRole
from rlsys.config.schema.recovery import RecoveryConfig
from rlsys.config.schema.section import Section
from rlsys.config.schema.teacher import TeacherConfig
from rlsys.config.schema.tracking import TrackersConfig, TrackingConfig

if TYPE_CHECKING:
    from rlsys.config.schema.grpo_run import Config

AnyConfig = TypeVar("AnyConfig", bound="RunConfig")


class RunConfig(Section):
    """What a run is, whatever it trains with: `Config` and `SftConfig` add their own sections.

    The properties without a body are what engines and loops ask of every config.
    """

    command: ClassVar[str]
    """The subcommand of `rlsys` that runs it."""
    row_noun: ClassVar[str]
    """What a training row is called."""
    has_rollouts: ClassVar[bool] = False
    """Whether the run samples completions, with vLLM."""
    default_batch_size: ClassVar[str]
    """What policy.global_batch_size is by default."""

    output_dir: PathText = Field(min_length=1)
    """Folder for everything a run writes. If it holds another run, checkpoint.resume or overwrite
    decides."""
    overwrite: bool = False
    """Start from step 0 in an output_dir that holds another run, whose files are moved to
    OUTPUT_DIR/replaced-1 (then replaced-2, ...). With checkpoint.resume: only where there is no
    checkpoint, so a job that is restarted again and again needs both."""
    max_steps: PositiveInt | None = None
    """Steps of the run: in GRPO one rollout, one policy update and one weight sync each, in SFT one
    optimizer step. null: num_train_epochs decides. One of the two must be set. max_steps wins,
    unless only num_train_epochs is on the command line."""
    num_train_epochs: PositiveFloat | None = None
    """Passes over the training rows: max_steps = num_train_epochs x rows / rows per step, rounded
    up, once the data is loaded. Not with data.streaming. Prompts that rollout.dynamic_sample draws
    again do not count."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations on held-out rows; the first is before step 1. null: no
    evaluation."""
    hub: Hub = "hf"
    """Where models and datasets with an id, and not a path, come from: the Hugging Face hub, or
    ModelScope (`pip install 'rlsys[modelscope]'`). `hf::` or `ms::` before one id wins."""
    seed: int = Field(default=42, ge=0, lt=2**31)
    """Seeds data order, sampling and mini-batches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What every role of the run computes on. auto: GPUs if this machine or the Ray cluster has
    any. cpu leaves the GPUs of a host alone."""
    placement_timeout: PositiveFloat | Literal["wait"] | None = 60.0
    """Seconds to wait for GPUs of the Ray cluster that other runs use (on CPU, for CPUs) before
    this run fails. wait or null: wait until they are free. A line every half minute says what is
    missing."""
    max_restarts: NonNegativeInt = 0
    """Times that the run is started again, from its newest checkpoint, after its driver crashed or
    a node was lost; recovery.max_restarts is about single actors. Not after a user's mistake or
    stop, a preemption or a full disk, nor if it failed twice in the same place. 0: never."""
    rendezvous_ports: str | None = None
    """TCP ports at which ranks meet, as in `20000-20099`, for a firewall between hosts: those of
    torch's stores on the hosts of the driver, of policy rank 0 and of reference rank 0. null: any
    free port. NCCL and gloo take their ports from the kernel's range, see docs/cluster.md."""
    data: RowsConfig
    model: ModelConfig
    policy: PolicyConfig = PolicyConfig()
    tracking: TrackersConfig = TrackersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    profile: ProfileConfig = ProfileConfig()

    @field_validator("rendezvous_ports")
    @classmethod
    def _ports_can_be_read(cls, ports: str | None) -> str | None:
        if ports is not None:
            parse_ports(ports)
        return ports

    @property
    def store_ports(self) -> range | None:
        """rendezvous_ports."""
        return None if self.rendezvous_ports is None else parse_ports(self.rendezvous_ports)

    @model_validator(mode="after")
    def _ids_name_their_hub(self) -> Self:
        """With hub: modelscope, write `ms::` before ids: what reads a name needs no config."""
        if self.hub == "modelscope":
            sets = self.data.val_sets.items()
            self._change("model", path=model_of_modelscope(self.model.path))
            self._change(
                "data",
                dataset=list(map(dataset_of_modelscope, self.data.dataset)),
                val_dataset=list(map(dataset_of_modelscope, self.data.val_dataset)),
                val_sets={name: list(map(dataset_of_modelscope, paths)) for name, paths in sets},
            )
        return self

    def _change(self, section: str, **fields: Any) -> None:
        changed = getattr(self, section).model_copy(update=fields)
        object.__setattr__(self, section, changed)  # this object is not yet in use

    @property
    @abstractmethod
    def rows_per_step(self) -> int:
        """Training rows of one step: prompts of GRPO, samples of SFT."""

    @property
    @abstractmethod
    def global_batch_size(self) -> int:
        """Rows of a `TrainBatch` per optimizer step."""

    @property
    def rows_together(self) -> int:
        """Neighbouring rows of a `TrainBatch` that no rank and no micro-batch separates."""
        return 1

    @property
    @abstractmethod
    def optimizer_steps_per_update(self) -> int:
        """Optimizer steps of one step of the run."""

    @property
    @abstractmethod
    def longest_row(self) -> int:
        """Most tokens of a row of a `TrainBatch`."""

    @property
    @abstractmethod
    def longest_row_is(self) -> str:
        """The fields that `longest_row` comes from."""

    @property
    @abstractmethod
    def max_completion_length(self) -> int:
        """Most tokens of a row that are trained on."""

    @property
    @abstractmethod
    def algorithm(self) -> GrpoConfig:
        """The loss and its settings."""

    @property
    def num_labels(self) -> int | None:
        """Outputs of the score head that the run trains; None: it trains a language model."""
        return None

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `rlsys.algo.sampling.Sampling`, by which log-probs are taken."""
        return {}

    @property
    def replays_routing(self) -> bool:
        """Whether the policy sends tokens to the experts that a rollout engine chose."""
        return False

    @property
    def largest_context_parallel_size(self) -> int:
        """Context-parallel ranks of the model that has most."""
        teacher = 1 if self.used_teacher is None else self.used_teacher.context_parallel_size
        return max(self.policy.context_parallel_size, teacher)

    @property
    def completions_tracking(self) -> TrackingConfig | None:
        """How the run records what it samples; None: not at all."""
        return None

    @property
    def used_teacher(self) -> TeacherConfig | None:
        """The section of the model that the policy learns from; None: there is none."""
        return None

    @property
    def teacher_path(self) -> str | None:
        """Folder or hub id of this model."""
        return None if self.used_teacher is None else self.used_teacher.path

    @property
    def sampler(self) -> Config | None:
        """The config that rollout engines read; None without them."""
        return None

    @property
    def divergence(self) -> dict[str, float] | None:
        """Fields of `rlsys.algo.distributions.Divergence`, if the policy learns from a teacher's
        distributions."""
        return None

    @property
    def teacher_top_k(self) -> int:
        """Likeliest tokens that the teacher's distributions are known at; 0: the whole."""
        return 0

    @property
    def reference_changes(self) -> bool:
        """Whether a checkpoint holds the weights of a reference."""
        return False

    @property
    def profiled_roles(self) -> list[ProfiledRole]:
        """The roles that torch's profiler may look into."""
        return ["policy"] if self.used_teacher is None else ["policy", "teacher"]

    @property
    def is_colocated(self) -> bool:
        """Whether rollout engines share the policy's GPUs."""
        return False

    @property
    def policy_shares_gpus(self) -> bool:
        """Whether other models compute on the policy's GPUs while it waits."""
        return self.used_teacher is not None and self.used_teacher.placement == "policy"

    @property
    def loss_plugins(self) -> list[str]:
        """Python files that register losses and advantage estimators."""
        return []

    @property
    def plugins(self) -> list[str]:
        """All Python files, modules and packages that the run loads."""
        return self.data.external_plugins

    @property
    def model_paths(self) -> list[str]:
        """Folders and hub ids of all models that the run reads."""
        return [self.model.path, *([] if self.teacher_path is None else [self.teacher_path])]

    def steps_of_epochs(self, num_rows: int) -> int | None:
        """max_steps for num_train_epochs passes over `num_rows` training rows."""
        if self.num_train_epochs is None:
            return None
        return max(1, math.ceil(round(self.num_train_epochs * num_rows / self.rows_per_step, 9)))

    def with_steps(self, num_rows: int) -> Self:
        """This config with max_steps set, for `num_rows` training rows."""
        if self.max_steps is not None:
            return self
        return self.model_copy(update={"max_steps": self.steps_of_epochs(num_rows)})

    @property
    def num_steps(self) -> int:
        """Steps of the run; only after `with_steps`."""
        assert self.max_steps is not None, "num_train_epochs needs the number of rows"
        return self.max_steps

    def overlaps_grad_reduce(self, *, on_cpu: bool) -> bool:
        """policy.overlap_grad_reduce, decided."""
        if self.policy.overlap_grad_reduce is None:
            return not on_cpu and self.data_parallel_size > 1
        return self.policy.overlap_grad_reduce

    def overlaps_param_gather(self, *, on_cpu: bool) -> bool:
        """policy.overlap_param_gather, decided."""
        if self.policy.overlap_param_gather is None:
            return (
                self.policy.use_distributed_optimizer
                and self.policy.lora is None
                and self.optimizer_steps_per_update > 1
                and self.overlaps_grad_reduce(on_cpu=on_cpu)
            )
        return self.policy.overlap_param_gather

    def may_bridge(self, *, on_cpu: bool) -> bool:
        """Whether mcore-bridge may have the weights; it needs Transformer Engine, so GPUs."""
        return not on_cpu and self.model.bridge != "rlsys"

    def model_dtype(self, *, on_cpu: bool) -> Literal["float32", "bfloat16"]:
        """The weights' type on the device of the run."""
        if self.model.dtype == "auto":
            return "float32" if on_cpu else "bfloat16"
        return self.model.dtype

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the policy."""
        policy = self.policy
        return policy.world_size // (
            policy.tensor_parallel_size
            * policy.pipeline_parallel_size
            * policy.context_parallel_size
        )
