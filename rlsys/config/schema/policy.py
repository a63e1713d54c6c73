"""The megatron-core trainer: the section `policy`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from rlsys.config.field_types import Regex
from rlsys.config.pipeline_layout import parse_layout
from rlsys.config.schema.lora import LoraConfig
from rlsys.config.schema.section import NonEmptyText, Section


class PolicyConfig(Section):
    """The megatron-core trainer."""

    world_size: PositiveInt = 1
    """Ranks, each in an actor and process of its own, with a GPU of its own on GPUs."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer; above 1, sequence parallelism is on."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the layers among them."""
    pipeline_layout: str | None = None
    """Layers of each pipeline stage, in megatron-core's notation: `Et*3|t*5|t*4L` has 3, 5 and 4
    layers, the first with the embedding E, the last with the loss L. Twice as many stages as
    pipeline_parallel_size, or more, are virtual pipeline: rank r has the stages r, r + PP, ..., and
    each rank's micro-batches are filled up to a multiple of PP. null: equally many layers for each
    rank. The reference has one stage."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of each layer in a mixture of experts: tensor-parallel ranks
    first, then context-parallel, then data-parallel ones. Must be above 1 where
    tensor_parallel_size is."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence, where its activations do not fit on one GPU.
    Sequences are padded to a multiple of twice this."""
    global_batch_size: PositiveInt | None = None
    """Completions per optimizer step; null: generation_batch_size, so one optimizer step per
    rollout."""
    micro_batch_size: PositiveInt = 8
    """Completions per forward pass of a data-parallel rank, of the reference too."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens per forward pass of such a rank, in place of micro_batch_size; null counts
    completions."""
    lr: NonNegativeFloat = 1e-6
    """Peak learning rate of AdamW; 0 trains nothing, see `rlsys doctor --canary`."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from `lr` to `min_lr` over the optimizer steps after warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    warmup_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of all optimizer steps in which the learning rate rises linearly from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay; biases and norms are exempt."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of AdamW's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the global gradient norm to this."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    use_precision_aware_optimizer: bool = False
    """Let Transformer Engine's AdamW hold its state in the types of the next four fields, and as
    float32 weights only the 16 bits that bfloat16 weights lack: 10 bytes a parameter instead of 12
    without any of the four. Needs GPUs, bfloat16 and use_distributed_optimizer."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the optimizer's copy of the weights."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are added up over micro-batches and ranks."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Type of AdamW's first moment."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Type of AdamW's second moment."""
    optimizer_cpu_offload: bool = False
    """Hold optimizer_offload_fraction of the optimizer's state in host memory, and update those
    weights on the host's CPU. With use_precision_aware_optimizer, whose types stay fp32."""
    optimizer_offload_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the parameters whose state is in host memory."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: copy gradients and weights of one parameter while another one is
    updated."""
    overlap_grad_reduce: bool | None = None
    """Sum gradients over data-parallel ranks during the backward pass of the last micro-batch.
    null: on GPUs with several such ranks."""
    overlap_param_gather: bool | None = None
    """With use_distributed_optimizer: gather each part of the weights when the next forward pass
    needs it. After the last optimizer step of a rollout all are gathered at once, for the weight
    sync. null: where overlap_grad_reduce is on and a rollout has several optimizer steps, but
    not with policy.lora, whose adapters are small and are gathered at once."""
    attention_backend: Literal["auto", "fused", "flash", "unfused"] = "auto"
    """Attention kernels on GPUs of policy and reference, by Transformer Engine's names: fused is
    cuDNN's, flash needs flash-attn, flash-attn-3 or flash-attn-4, unfused is plain matrix products,
    slow and large. auto lets Transformer Engine choose, and takes torch's attention for heads of
    more than 128 numbers, for which cuDNN's gradients are wrong. The CPU has one kind only."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them (megatron-core's
    recompute_granularity). selective: recompute_modules of every layer. full: whole layers, all but
    their inputs, for a third more time."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Layers for recompute: full. uniform: all, in groups of recompute_num_layers. block: the first
    recompute_num_layers of each pipeline stage, the others keep what they computed."""
    recompute_num_layers: PositiveInt = 1
    """Layers of a group with uniform, whose input alone is kept: more keep fewer inputs, and in
    the backward pass all activations of a group. Layers of each stage with block."""
    recompute_modules: list[
        Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]
    ] = Field(default=["mlp"], min_length=1)
    """Modules for recompute: selective. mlp: about two thirds of a layer's activations, for a
    quarter more time; experts, too. moe: experts only, and not the MLP of dense layers. moe_act:
    only the activation function of experts, on GPUs. shared_experts: the MLP that every token of a
    mixture goes through. layernorm: norms that are modules of their own, as before experts; on
    GPUs, norms of dense layers are a part of the linear layer. mla_up_proj: latent attention's
    projections up. core_attn: saves little where attention is fused, nothing where it is linear."""
    recompute_logits: bool = True
    """Compute logits again in the backward pass, all but those of a micro-batch's last 1,024
    tokens. false keeps them, tokens x vocabulary / tensor_parallel_size numbers, and saves a few
    percent of the time."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of all layers in FP8, of policy and reference, on GPUs of compute capability
    8.9 (Ada), 9.0 (Hopper) or higher. e4m3: in the backward pass too. hybrid: gradients in e5m2,
    which has more range. null: in the model's type."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 tensors are scaled. tensorwise: by their largest value. delayed: by that of the
    micro-batch before, which is megatron-core's default; the first update of a run, or after a
    resume, computes its gradients twice more, to learn them. blockwise: by that of 128 numbers, or
    128 x 128 weights, from compute capability 9.0. mxfp8: of 32 numbers, from 10.0 (Blackwell)."""
    fp8_param_gather: bool = False
    """Hold the layers' weights in FP8 only, beside the optimizer's float32, and gather them as
    such. Weight sync, checkpoints and exports get what they stand for, in the model's type. Needs
    use_distributed_optimizer, and is not there for mxfp8."""
    megatron_kwargs: dict[str, Any] = {}
    """More options of megatron-core's TransformerConfig, OptimizerConfig and
    DistributedDataParallelConfig, by their names: `{moe_router_fusion: true}`. An option that
    several of them have goes to each. Those of TransformerConfig are the reference's too, so that
    both models compute alike. Types are written as float32 or bfloat16. The memory estimate does
    not know them."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the loss that balances the experts of a mixture of experts, summed over layers; 0
    is off. Its value is 1 in a layer whose experts get equally many tokens."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss"] = "aux_loss"
    """Tokens among which that loss balances experts: all of a micro-batch (aux_loss), or of each
    row, prompt and completion (seq_aux_loss), which does not depend on how rows are packed."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the router's z loss, which keeps its logits small, summed over layers; 0 is
    off."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Type in which routers compute their logits, of the reference too; null is fp32 for
    GLM-4.5 and DeepSeek's models, else the model's, as in transformers."""
    cpu_threads: PositiveInt | Literal["auto"] = "auto"
    """Threads of each policy and reference rank on CPU. auto: the cores of its node, divided by the
    ranks there; 1 where engines sample meanwhile (rollout.max_staleness above 0), and on GPUs.
    config.yaml of the run keeps the number, and a resumed run takes it from there: another one
    would round differently. Small models are faster with 1."""
    lora: LoraConfig | None = None
    """Train adapters in place of the model's weights; null trains the weights."""
    freeze_parameters: list[NonEmptyText] = []
    """Starts of Hugging Face's names of tensors that are not trained: `[model.embed_tokens,
    model.layers.0.]`."""
    freeze_parameters_regex: Regex | None = None
    """Regex in the names of tensors that are not trained."""
    freeze_parameters_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of all parameters that is not trained, from the embedding up."""
    trainable_parameters: list[NonEmptyText] = []
    """Starts of names of tensors that are trained although one of the former freezes them."""
    trainable_parameters_regex: Regex | None = None
    """The same as a regex in names."""
    on_nonfinite: Literal["skip", "rollback", "raise"] = "skip"
    """What follows when an optimizer step's loss, log-probs or gradient have a NaN or an infinity.
    Such a step is never applied, and its batch is dumped, see `rlsys replay`. skip: training goes
    on with the next step, and ends after max_nonfinite_steps in a row. rollback: after that many
    in a row, or where weights are not finite, weights and optimizer go back to the newest snapshot,
    else to the newest checkpoint; the batch is tried again before the run ends. raise: the run ends
    at once."""
    max_nonfinite_steps: PositiveInt = 3
    """Optimizer steps in a row that on_nonfinite may skip."""
    nonfinite_dumps: NonNegativeInt = 3
    """Most dumps of such steps that are kept in output_dir/dumps, each with the weights in the
    model's type. 0 dumps nothing."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds that one phase of the policy or of the reference may take."""
    snapshot_steps: NonNegativeInt | Literal["auto"] = "auto"
    """Steps between two copies of weights and optimizer state in the memory of Ray's object store,
    from which ranks that died or hang go on, as the section `recovery` says. Steps since then are
    done again with the batches that the driver holds. auto: every step, or fewer if making the
    copies and waiting for them takes more than 2% of the time; none where two do not fit. 0: ranks
    go back to the newest checkpoint."""
    heartbeat_s: PositiveFloat | None = 30.0
    """Seconds without a sign of life after which a rank of policy or reference is killed, as with
    rollout.heartbeat_s. null: off."""

    @field_validator("pipeline_layout")
    @classmethod
    def _layout_can_be_read(cls, layout: str | None) -> str | None:
        if layout is not None:
            parse_layout(layout)
        return layout

    @property
    def freezes(self) -> bool:
        """Whether some of the model's parameters are not trained, without adapters."""
        return bool(
            self.freeze_parameters or self.freeze_parameters_regex or self.freeze_parameters_ratio
        )

    @property
    def num_cpu_threads(self) -> int:
        """cpu_threads, decided; auto counts as 1 before `decide_cpu_threads`."""
        return 1 if self.cpu_threads == "auto" else self.cpu_threads

    @property
    def virtual_pipeline_size(self) -> int:
        """Chunks of layers on each pipeline rank."""
        if self.pipeline_layout is None:
            return 1
        return len(parse_layout(self.pipeline_layout)) // self.pipeline_parallel_size
