"""The config of `rlsys grpo`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from rlsys.config.algorithm import COVARIANCE_LOSSES
from rlsys.config.dataset_spec import model_of_modelscope
from rlsys.config.gates import Gate, parse_gate
from rlsys.config.rules import cross_field_problems
from rlsys.config.schema.data import DataConfig
from rlsys.config.schema.evaluation import EvalConfig
from rlsys.config.schema.grpo import GrpoConfig
from rlsys.config.schema.profile import ProfiledRole
from rlsys.config.schema.reference import ReferenceConfig
from rlsys.config.schema.reward import RewardConfig
from rlsys.config.schema.rollout import RolloutConfig
from rlsys.config.schema.run import RunConfig
from rlsys.config.schema.section import Section
from rlsys.config.schema.teacher import TeacherConfig
from rlsys.config.schema.tracking import TrackingConfig
from rlsys.config.schema.weight_sync import WeightSyncConfig
from rlsys.problems import ProblemsError


class ColocatedConfig(Section):
    """What moves to host memory while rollout engines have the GPUs that they share."""

    offload_optimizer: bool = True
    """Keep the optimizer's state in pinned host memory while engines sample (ms-swift's
    offload_optimizer): 12 bytes a parameter, unless policy's dtypes say otherwise."""
    offload_weights: bool | Literal["auto"] = "auto"
    """Keep the policy's weights there too (ms-swift's offload_model). auto: where they are more
    than a tenth of the GPU."""


class Config(RunConfig):
    """One GRPO run."""

    command: ClassVar[str] = "grpo"
    row_noun: ClassVar[str] = "prompt"
    has_rollouts: ClassVar[bool] = True
    default_batch_size: ClassVar[str] = "rollout.generation_batch_size"

    placement: Literal["auto", "dedicated", "colocated"] = "auto"
    """GPUs of policy and rollout engines. dedicated: their own, so both can work at the same time.
    colocated: engine i shares the GPU of policy rank i, and they take turns: one GPU is enough.
    auto: colocated where dedicated needs more GPUs than there are. On CPU auto is dedicated."""
    colocated: ColocatedConfig = ColocatedConfig()
    data: DataConfig
    tracking: TrackingConfig = TrackingConfig()
    rollout: RolloutConfig
    reward: RewardConfig
    grpo: GrpoConfig = GrpoConfig()
    reference: ReferenceConfig = ReferenceConfig()
    teacher: TeacherConfig = TeacherConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _further_ids_name_their_hub(self) -> Self:
        if self.hub == "modelscope":
            reward = self.reward
            params = {
                name: own | {"path": model_of_modelscope(own["path"])}
                for name, own in reward.params.items()
                if name in reward.models and isinstance(own.get("path"), str)
            }
            self._change("reward", reward_params=reward.reward_params | params)
            if self.reference.path is not None:
                self._change("reference", path=model_of_modelscope(self.reference.path))
            if self.teacher.path is not None:
                self._change("teacher", path=model_of_modelscope(self.teacher.path))
            if (draft := self.rollout.draft_model) is not None:
                changed = self.rollout.speculation | {"model": model_of_modelscope(draft)}
                self._change("rollout", speculative_config=changed)
        return self

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = cross_field_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def profiled_roles(self) -> list[ProfiledRole]:
        """See RunConfig."""
        reference: list[ProfiledRole] = ["reference"] if self.has_reference_model else []
        return [*super().profiled_roles, *reference, "rollout"]

    @property
    def is_colocated(self) -> bool:
        """Whether engines share the policy's GPUs; only after `decide_placement`."""
        return self.placement == "colocated"

    @property
    def num_prompts(self) -> int:
        """P, prompts per step."""
        return self.rollout.generation_batch_size // self.rollout.num_generations

    @property
    def rows_per_step(self) -> int:
        """Prompts per step."""
        return self.num_prompts

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt and completion that the config allows."""
        return self.data.max_prompt_length + self.rollout.max_completion_length

    @property
    def longest_row_is(self) -> str:
        """Both fields, with their values."""
        prompt = self.data.shown("max_prompt_length")
        completion = self.rollout.shown("max_completion_length")
        return f"data.max_prompt_length {prompt} + rollout.max_completion_length {completion}"

    @property
    def max_completion_length(self) -> int:
        """rollout.max_completion_length."""
        return self.rollout.max_completion_length

    @property
    def sampling(self) -> dict[str, Any]:
        """How completions are sampled: log-probs of policy and reference are taken the same way."""
        rollout = self.rollout
        main = {"temperature": rollout.temperature, "top_k": rollout.top_k, "top_p": rollout.top_p}
        return main | rollout.min_p_and_penalties

    @property
    def replays_routing(self) -> bool:
        """rollout.router_replay."""
        return self.rollout.router_replay

    @property
    def loss_plugins(self) -> list[str]:
        """grpo.external_plugins."""
        return self.grpo.external_plugins

    @property
    def plugins(self) -> list[str]:
        """All Python files, modules and packages that the run loads."""
        return [*super().plugins, *self.reward.external_plugins, *self.grpo.external_plugins]

    @property
    def model_paths(self) -> list[str]:
        """Policy, teacher, reference, reward models, and the model that drafts."""
        draft = [] if self.rollout.draft_model is None else [self.rollout.draft_model]
        return [*super().model_paths, self.reference_path, *self.reward.model_paths, *draft]

    @property
    def num_prompts_ahead(self) -> int:
        """x, prompts sampled beyond the next batch."""
        if self.rollout.oversample_prompts is not None:
            return self.rollout.oversample_prompts
        return self.rollout.max_staleness * self.num_prompts

    @property
    def global_batch_size(self) -> int:
        """Completions per optimizer step."""
        return self.policy.global_batch_size or self.rollout.generation_batch_size

    @property
    def optimizer_steps_per_update(self) -> int:
        """Optimizer steps between two weight syncs."""
        per_pass = self.rollout.generation_batch_size // self.global_batch_size
        return per_pass * self.grpo.num_iterations

    @property
    def recompute_old_logprobs(self) -> bool:
        """Whether the policy's log-probs before the update need a forward pass.

        They do when the policy moves within one rollout, when the KL is part of the reward, when
        entropies or covariances choose tokens, when a teacher is compared with a policy that has
        moved since it sampled, and when the update computes with dropout, which engines do not
        sample with.
        """
        grpo, lora = self.grpo, self.policy.lora
        if grpo.old_logprobs == "auto":
            needed = (grpo.kl_in_reward and grpo.beta > 0) or grpo.top_entropy_quantile < 1
            needed = needed or grpo.loss_type in COVARIANCE_LOSSES
            needed = needed or (grpo.opd_kl_coef > 0 and self.rollout.max_staleness > 0)
            needed = needed or (lora is not None and lora.dropout > 0)
            return needed or self.optimizer_steps_per_update > 1
        return grpo.old_logprobs == "recompute"

    @property
    def algorithm(self) -> GrpoConfig:
        """`grpo` with what depends on other sections decided."""
        rollout_is = self.grpo.rollout_is
        if rollout_is == "auto":
            # With the engine's own log-probs as old_logprobs, the ratio corrects already.
            quantised = self.rollout.quantization and self.grpo.old_logprobs != "rollout"
            rollout_is = "token" if self.rollout.max_staleness or quantised else "none"
        return self.grpo.model_copy(update={"rollout_is": rollout_is})

    @property
    def eval_correct(self) -> Gate:
        """eval.correct, decided."""
        if self.eval.correct is not None:
            return parse_gate(self.eval.correct)
        names = self.reward.names
        return Gate(next((name for name in names if "accuracy" in name), names[0]))

    @property
    def eval_ks(self) -> list[int]:
        """eval.pass_at_k, decided: ascending."""
        n = self.eval.num_generations
        powers = [2**i for i in range(n.bit_length()) if 2**i < n]
        return sorted(set(self.eval.pass_at_k)) or [*powers, n]

    @property
    def run_values(self) -> dict[str, Any]:
        """Values for reward parameters with these names that reward.reward_params leaves out."""
        return {
            "max_completion_length": self.rollout.max_completion_length,
            "model_path": self.model.path,
        }

    @property
    def largest_context_parallel_size(self) -> int:
        """Context-parallel ranks of the policy, or of the reference or teacher if one has more."""
        reference = self.reference.context_parallel_size if self.has_reference_model else 1
        return max(super().largest_context_parallel_size, reference)

    @property
    def policy_shares_gpus(self) -> bool:
        """Whether other models compute on the policy's GPUs while it waits."""
        return (
            self.is_colocated
            or (self.has_reference_model and self.reference.placement == "policy")
            or super().policy_shares_gpus
            or (bool(self.reward.models) and self.reward.reward_model_placement == "policy")
        )

    @property
    def completions_tracking(self) -> TrackingConfig | None:
        """The section `tracking`, if completions are recorded."""
        return self.tracking if self.tracking.log_completions else None

    @property
    def reference_changes(self) -> bool:
        """Whether the reference takes weights from the policy."""
        return self.grpo.beta > 0 and self.reference.sync_steps is not None

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy with its LoRA adapter off."""
        return self.grpo.beta > 0 and self.policy.lora is not None and self.reference.path is None

    @property
    def has_reference_model(self) -> bool:
        """Whether the run has a reference that is a model of its own."""
        return self.grpo.beta > 0 and not self.reference_is_base

    @property
    def sampler(self) -> Config | None:
        """See RunConfig."""
        return self

    @property
    def used_teacher(self) -> TeacherConfig | None:
        """The section `teacher`, with on-policy distillation."""
        return self.teacher if self.grpo.opd_kl_coef > 0 else None

    @property
    def reference_path(self) -> str:
        """Model folder or hub id of the reference."""
        return self.reference.path or self.model.path

    def syncs_reference(self, step: int) -> bool:
        """Whether the reference takes the policy's weights after `step`."""
        return self.reference.sync_steps is not None and step % self.reference.sync_steps == 0
