"""This rank's part of a megatron-core GPTModel, from a Hugging Face config."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from transformers import PretrainedConfig

from rlsys.algo.batching import PackedMicroBatch
from rlsys.algo.logprobs import TokenValues, chunked_token_values
from rlsys.algo.penalties import History
from rlsys.algo.sampling import Sampling, VocabSlice
from rlsys.config import PolicyConfig, RunConfig
from rlsys.config.pipeline_layout import parse_layout
from rlsys.engines.megatron.latent import latent_options, set_norm_eps
from rlsys.engines.megatron.options import check_machine, megatron_config
from rlsys.engines.megatron.rope import place_rotary
from rlsys.engines.megatron.routing import choose_in_groups
from rlsys.engines.megatron.score_head import put_score_head
from rlsys.engines.megatron.specs import block_spec
from rlsys.model import policy_memory
from rlsys.model.shape import ModelShape


def transformer_config(
    hf: PretrainedConfig,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    policy: PolicyConfig,
    on_cpu: bool,
    trains: bool = False,
    bridged: bool = False,
) -> TransformerConfig:
    """megatron-core's config of the model, for the parallel layout that is initialised.

    Args:
        trains: it gets an optimizer, so that its weights may be FP8.
        bridged: mcore-bridge describes the model, and builds it.

    Raises:
        ValueError: see `check_machine`.
    """
    check_machine(shape, dtype=dtype, policy=policy, on_cpu=on_cpu, bridged=bridged)
    options = _run_options(shape, dtype=dtype, policy=policy, on_cpu=on_cpu, trains=trains)
    if bridged:
        from rlsys.engines.megatron.bridge import bridged_config

        return bridged_config(hf, options, policy)
    own = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        layernorm_zero_centered_gamma=shape.family.zero_centered_norms,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[shape.family.activation],
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **_attention_options(shape),
        **(_expert_options(shape, policy) if shape.is_moe else {}),
        **options,
    )
    if shape.latent is None:
        return megatron_config(TransformerConfig, own, policy)
    return megatron_config(MLATransformerConfig, own | latent_options(hf, shape), policy)


def _run_options(
    shape: ModelShape, *, dtype: torch.dtype, policy: PolicyConfig, on_cpu: bool, trains: bool
) -> dict[str, Any]:
    """Options of the run and this machine, not of the model."""
    parallel = _parallel_options(policy)
    return dict(
        **parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # every weight is read from the checkpoint
        attention_backend=AttnBackend[policy.attention_backend],
        # Asks for an extension of Apex that nothing here uses: see `fuse_weight_gradients`.
        gradient_accumulation_fusion=False,
        **dict.fromkeys(_CUDA_OPTIONS, not on_cpu),
        # With virtual pipeline, two ranks are each other's next and previous one at once: a batch
        # of sends and receives would give the activations of one to the gradients of the other.
        batch_p2p_comm=not on_cpu and policy.virtual_pipeline_size == 1,
        # megatron-core's fused kernels know silu, and another gelu.
        bias_activation_fusion=not on_cpu and shape.family.activation == "silu",
        **(_expert_parallel(on_cpu=on_cpu) if shape.is_moe else {}),
        **_recompute_options(policy, is_moe=shape.is_moe),
        fp8=policy.fp8_format,
        fp8_recipe=policy.fp8_recipe,
        fp8_param=trains and policy.fp8_param_gather,
    )


_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
_CUDA_OPTIONS = (
    # Fused kernels: on an H200 they take an update of a 1.5B model from 0.24 to 0.31 of the peak
    # FLOPs.
    "apply_rope_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "batch_p2p_sync",
)
"""Options that need CUDA."""


def _attention_options(shape: ModelShape) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "add_qkv_bias": shape.has_qkv_bias,
        "qk_layernorm": shape.has_qk_norm,
        "softmax_scale": shape.softmax_scale,
        "attention_output_gate": shape.family.has_output_gate,
    }
    if shape.has_windows:
        windows = [layer.window for layer in shape.layers]
        (window,) = {window for window in windows if window is not None}
        # megatron-core and Transformer Engine count the tokens left of a query.
        options["window_size"] = (window - 1, 0)
        options["window_attn_skip_freq"] = [int(window is not None) for window in windows]
    return options


def _parallel_options(policy: PolicyConfig) -> dict[str, Any]:
    """The layout that is initialised: the policy's, or the reference's, which has one stage."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    layout = None
    if pp > 1 and policy.pipeline_layout is not None:
        layout = "|".join(parse_layout(policy.pipeline_layout))
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "pipeline_model_parallel_layout": layout,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }


def _recompute_options(policy: PolicyConfig, *, is_moe: bool) -> dict[str, Any]:
    if policy.recompute == "full":
        options: dict[str, Any] = {
            "recompute_method": policy.recompute_method,
            "recompute_num_layers": policy.recompute_num_layers,
        }
    elif policy.recompute == "selective":
        # An MLP with experts is "moe" to megatron-core; a model may have layers of both kinds.
        names: set[str] = {*policy.recompute_modules}
        names |= {"moe"} if is_moe and "mlp" in names else set()
        options = {"recompute_modules": sorted(names)}
    else:
        return {}
    return {"recompute_granularity": policy.recompute, **options}


def _expert_options(shape: ModelShape, policy: PolicyConfig) -> dict[str, Any]:
    """What config.json says of a mixture of experts, but its groups."""
    experts = shape.experts
    return {
        "num_moe_experts": experts.number,
        "moe_layer_freq": [int(layer.has_experts) for layer in shape.layers],
        "moe_ffn_hidden_size": experts.size,
        "moe_shared_expert_intermediate_size": experts.shared_size or None,
        "moe_shared_expert_gate": experts.has_shared_gate,
        "moe_router_topk": experts.per_token,
        "moe_router_score_function": "sigmoid" if experts.has_sigmoid_router else "softmax",
        # A bias for each expert, which balances them in pretraining: here it stays as it is.
        "moe_router_enable_expert_bias": experts.has_sigmoid_router,
        "moe_router_bias_update_rate": 0.0,
        # transformers takes softmax over all experts, then the largest, then normalises if the
        # model says so. Normalised, that is the softmax over the largest logits alone.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_topk_scaling_factor": experts.scaling_factor,
        "moe_router_dtype": policy.moe_router_dtype or shape.family.router_dtype,
    }


def _expert_parallel(*, on_cpu: bool) -> dict[str, Any]:
    """How experts run; no token is dropped."""
    ep = parallel_state.get_expert_model_parallel_world_size()
    # megatron-core 0.16 would not sum their gradients over the tensor-parallel ranks.
    assert ep > 1 or parallel_state.get_tensor_model_parallel_world_size() == 1, "see preflight"
    return {
        "moe_router_load_balancing_type": "none",  # see `ExpertRouting`
        "moe_token_dispatcher_type": "alltoall",
        # All experts of a rank in one kernel, and tokens sorted by another: Transformer Engine's.
        "moe_grouped_gemm": not on_cpu,
        "moe_permute_fusion": not on_cpu,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
    }


def build_model(
    hf: PretrainedConfig,
    shape: ModelShape,
    config: TransformerConfig,
    *,
    longest: int,
    on_cpu: bool,
) -> list[GPTModel]:
    """This rank's GPTModels, without weights: one, or a chunk for each of its virtual stages.

    A score head stands in place of the output head if the shape has labels.

    Args:
        longest: tokens of the longest row of the run.
    """
    chunks = config.virtual_pipeline_model_parallel_size
    stages = [None] if chunks is None else range(chunks)
    build = partial(_build_chunk, hf, shape, config, longest=longest, on_cpu=on_cpu)
    return [build(stage) for stage in stages]


def _build_chunk(
    hf: PretrainedConfig,
    shape: ModelShape,
    config: TransformerConfig,
    vp_stage: int | None,
    *,
    longest: int,
    on_cpu: bool,
) -> GPTModel:
    tp = config.tensor_model_parallel_size
    place = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = GPTModel(
        config,
        block_spec(config, shape, vp_stage=vp_stage, on_cpu=on_cpu),
        # Filled up so that every rank has as many rows; see `MegatronWeights`.
        vocab_size=-(-hf.vocab_size // tp) * tp,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=hf.tie_word_embeddings and shape.num_labels is None,
        position_embedding_type="rope",
    )
    if shape.family.scaled_embeddings and model.pre_process:
        # In bfloat16 the factor is rounded before the product is.
        scale = torch.tensor(hf.hidden_size**0.5, dtype=config.params_dtype).item()
        model.embedding.register_forward_hook(lambda module, args, embedded: embedded * scale)
    place_rotary(model, hf, shape, longest=longest)
    if shape.latent is not None:
        set_norm_eps(model)
    if shape.experts.groups > 1:
        choose_in_groups(model, shape.experts)
    if shape.num_labels is not None and model.post_process:
        put_score_head(model, shape.num_labels)
    return model


def end_at_hidden_states(model: GPTModel) -> None:
    """Let the last stage return hidden states, from which log-probs are taken chunk by chunk.

    The logits of a whole micro-batch would be the largest tensor of the step.
    """
    model.output_layer.forward = lambda hidden, **_: (hidden, None)


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients to the fp32 `main_grad` as they compute.

    megatron-core's own switch, gradient_accumulation_fusion, wants an extension of Apex for the
    output layer, which log-probs do not go through; its DistributedDataParallel sees in
    `grad_added_to_main_grad` what is added already.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            own = module.named_parameters(recurse=False)
            module.fuse_wgrad_accumulation = all(
                weight.requires_grad for name, weight in own if name.startswith("weight")
            )


class LogprobHead:
    """Log-probs from the last stage's hidden states; correct under vocabulary parallelism.

    Args:
        model: the last pipeline stage.
        config: of the run; says in which type logits are computed, and whether twice.
        sampling: what completions are sampled from.
    """

    def __init__(self, model: GPTModel, config: RunConfig, sampling: Sampling):
        self._model, self._sampling = model, sampling
        self._recompute_logits = config.policy.recompute_logits
        self._in_fp32 = config.model.fp32_lm_head
        group = parallel_state.get_tensor_model_parallel_group()
        self.slice_size = model.vocab_size // group.size()
        """Token ids of this rank's slice, with those that fill it up."""
        start = group.rank() * self.slice_size
        self.vocab = VocabSlice(start, group if group.size() > 1 else None)

    def __call__(
        self, hidden: torch.Tensor, micro_batch: PackedMicroBatch, positions: torch.Tensor
    ) -> TokenValues:
        """[1, T / sp, H] hidden states of T positions -> [T] log-probs and what goes with them.

        sp is the sequence-parallel size; under context parallelism the positions are this rank's.
        """
        history = History.of(micro_batch, positions) if self._sampling.penalizes else None
        return self._logprobs(hidden, micro_batch.targets[positions], history)

    def states_and_weight(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] hidden states of all positions, and this rank's slice of the output weight."""
        model = self._model
        hidden = hidden.squeeze(0)
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        else:
            weight = model.output_layer.weight
        if self._in_fp32:
            hidden, weight = hidden.float(), weight.float()
        return hidden, weight

    def _logprobs(
        self, hidden: torch.Tensor, targets: torch.Tensor, history: History | None
    ) -> TokenValues:
        return chunked_token_values(
            *self.states_and_weight(hidden),
            targets,
            sampling=self._sampling,
            vocab=self.vocab,
            chunk_size=policy_memory.LOGPROB_CHUNK_TOKENS,
            recompute=self._recompute_logits,
            history=history,
        )

    def warm_up(self, *, trains: bool, entropy_bonus: bool) -> None:
        """Compile the kernels of log-probs, on a GPU; every tensor-parallel rank calls.

        It takes some seconds, which are free while the other actors of a run start.

        Args:
            trains: compile the kernels of gradients, too.
            entropy_bonus: entropies have a gradient.
        """
        config = self._model.config
        sequence_parallel = config.tensor_model_parallel_size if config.sequence_parallel else 1
        # A whole chunk, and one of another length: then the kernels are made for any length.
        tokens = policy_memory.LOGPROB_CHUNK_TOKENS * 3 // 2
        hidden = torch.zeros(
            1,
            tokens // sequence_parallel,
            config.hidden_size,
            dtype=config.params_dtype,
            device="cuda",
            requires_grad=trains,
        )
        targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        history = None
        if self._sampling.penalizes:
            history = History(targets, targets.bool(), targets, targets)
        with torch.set_grad_enabled(trains):
            logprobs, entropy, *_ = self._logprobs(hidden, targets, history)
        if trains:
            loss = (logprobs + entropy if entropy_bonus else logprobs).sum()
            # Differentiate only by the hidden states, so that no weight gets a gradient.
            torch.autograd.grad(loss, hidden)
