"""TRL's preference trainers as an oracle, on tensors, without a trainer; ours on the same ones."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from rlsys.algo.losses import compute_loss
from rlsys.algo.preferences import as_loss_input
from rlsys.algo.update_metrics import MetricSums
from rlsys.config import PreferenceAlgorithm, PreferenceSection
from rlsys.types import TrainBatch

VOCAB = 7


def algorithm(**section):
    return PreferenceAlgorithm(
        loss_type="preference",
        loss_aggregation="seq_mean_token_sum",
        preference=PreferenceSection(**section),
    )


def tensors(prompts=(2, 1, 3, 2), seed=0):
    """Four chosen and four rejected answers of 1 to 8 tokens behind their prompts: [8, S]."""
    rng = torch.Generator().manual_seed(seed)
    answers = torch.tensor([8, 3, 1, 5, 2, 6, 4, 7])
    prompts = torch.tensor([*prompts, *prompts])
    lengths = prompts + answers
    positions = torch.arange(int(lengths.max()))
    valid = positions < lengths[:, None]
    mask = valid & (positions >= prompts[:, None])
    ids = torch.randint(0, VOCAB, valid.shape, generator=rng) * valid
    logits = torch.randn(*valid.shape, VOCAB, generator=rng, dtype=torch.float64)
    noise = torch.randn(len(ids), generator=rng, dtype=torch.float64)
    labels = torch.tensor([True] * 4 + [False] * 4)
    case = SimpleNamespace(ids=ids, valid=valid, mask=mask, logits=logits, labels=labels)
    with torch.no_grad():
        case.ref = logps(case, logits).sum(1) + 1.5 * noise
    return case


def logps(case, logits):
    """[8, S] log-probs of the answers' tokens, 0 elsewhere."""
    own = logits[:, :-1].log_softmax(-1).gather(-1, case.ids[:, 1:, None]).squeeze(-1)
    return pad(own, (1, 0)) * case.mask


def run_ours(case, config, *, kl=None):
    """Loss, gradient of the logits, and metrics; rows are interleaved unless they are unpaired."""
    logits = case.logits.clone().requires_grad_()
    half = len(case.ids) // 2
    order = torch.arange(len(case.ids))
    if config.preference.is_paired:
        order = torch.stack([order[:half], order[half:]], 1).flatten()
    chosen = (case.mask & case.labels[:, None])[order]
    batch = TrainBatch(
        input_ids=case.ids[order],
        lengths=case.valid.sum(1)[order],
        completion_mask=case.mask[order],
        advantages=chosen / chosen.sum(),
        rollout_logprobs=torch.zeros(case.mask.shape),
        is_chosen=case.labels[order],
        ref_logps=case.ref[order] if config.preference.has_reference else None,
        kl=kl,
    )
    inputs = as_loss_input(batch, logps(case, logits)[order], len(order))
    loss, statistics = compute_loss(inputs, config)
    (gradient,) = torch.autograd.grad(loss, logits)
    sums = MetricSums()
    sums.add(statistics)
    return loss.item(), gradient, sums.means()


def _accelerator():
    def same(values):
        return values

    return SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)


def _outputs(case, logits):
    shape = case.mask.shape
    return SimpleNamespace(
        log_probs=logps(case, logits)[:, 1:],
        entropy=torch.zeros(shape)[:, 1:],
        mean_logits=torch.zeros(shape)[:, 1:],
        is_top1=torch.zeros(shape, dtype=torch.bool)[:, 1:],
    )


def _metrics(trainer):
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def run_dpo(trl, case, section, *, loss_types, weights):
    """DPOTrainer's loss."""
    logits = case.logits.clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=section.f_divergence_type,
        f_alpha_divergence_coef=section.f_alpha_divergence_coef,
        beta=section.scale,
        label_smoothing=section.label_smoothing,
        loss_types=loss_types,
        loss_weights=weights,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    ref = case.ref if section.has_reference else torch.zeros_like(case.ref)
    half = len(case.ids) // 2
    inputs = {
        "input_ids": case.ids,
        "attention_mask": case.valid.long(),
        "completion_mask": case.mask.long(),
        "ref_chosen_logps": ref[:half],
        "ref_rejected_logps": ref[half:],
    }
    loss = trl._compute_loss(trainer, lambda **_: _outputs(case, logits), inputs, False)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient, _metrics(trainer)


def run_without_reference(trl, case, **settings):
    """The loss of CPOTrainer or ORPOTrainer, with their own forward pass."""
    logits = case.logits.clone().requires_grad_()
    half = len(case.ids) // 2
    batch = {
        "concatenated_input_ids": case.ids,
        "concatenated_attention_mask": case.valid.long(),
        "concatenated_labels": case.ids.masked_fill(~case.mask, -100),
    }
    trainer = SimpleNamespace(
        accelerator=_accelerator(),
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        aux_loss_enabled=False,
        concatenated_inputs=lambda *_, **__: batch,
        get_batch_logps=trl.get_batch_logps,
        **settings,
    )
    for name in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
        if hasattr(trl, name):
            setattr(trainer, name, getattr(trl, name).__get__(trainer))
    chosen = {"chosen_labels": case.ids[:half]}
    loss, metrics = trl.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=logits), chosen
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient, metrics


def run_kto(trl, case, section, *, kl_ratios):
    """KTOTrainer's loss; `kl_ratios` are the log ratios of mismatched answers."""
    logits = case.logits.clone().requires_grad_()
    ref = case.ref if section.has_reference else torch.zeros_like(case.ref)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=section.loss_type == "kto",
        loss_type=section.loss_type,
        beta=section.scale,
        desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight,
        _compute_kl_logps=lambda *_: kl_ratios,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": case.ids,
        "attention_mask": case.valid.long(),
        "completion_mask": case.mask.long(),
        "label": case.labels,
        "ref_logps": ref,
        "ref_KL_logps": torch.zeros_like(kl_ratios),
    }
    loss = trl._compute_loss(trainer, lambda **_: _outputs(case, logits), inputs, False)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient, _metrics(trainer)
