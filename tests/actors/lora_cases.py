"""Adapters of tiny models, made by PEFT, and what PEFT and transformers compute with them."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from policy_cases import padded_logprobs
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from rlsys.config import LoraConfig as LoraSettings

PREFIX = "base_model.model."


def with_lora(config, lora, sync="adapter"):
    """`config` with an adapter, past the rules of whole configs."""
    policy = config.policy.model_copy(update={"lora": LoraSettings(**lora)})
    weight_sync = config.weight_sync.model_copy(update={"lora": sync})
    return config.model_copy(update={"policy": policy, "weight_sync": weight_sync})


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )


@torch.no_grad()
def save_peft_adapter(model_folder, folder, *, seed=3, **settings):
    """Let PEFT save an adapter of random numbers: B of a new one would be 0."""
    model = get_peft_model(base_model(model_folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=rng)
            parameter += noise if "lora_" not in name else 2 * noise - parameter
    if model.config.tie_word_embeddings and "lm_head" in settings.get("modules_to_save", ()):
        layers = model.base_model.model
        embedding = layers.model.embed_tokens.modules_to_save["default"].weight
        layers.lm_head.modules_to_save["default"].weight.copy_(embedding)
    model.save_pretrained(folder)


def peft_model(model_folder, folder, *, trains=False):
    return PeftModel.from_pretrained(base_model(model_folder), folder, is_trainable=trains)


def sft_loss(model, batch):
    """Mean over completions of the mean over their tokens."""
    mask = batch.completion_mask
    return (-(padded_logprobs(model, batch) * mask).sum(1) / mask.sum(1)).mean()


def peft_gradient(model_folder, folder, batch):
    """Of the tensors of the adapter's file, by name."""
    model = peft_model(model_folder, folder, trains=True)
    sft_loss(model, batch).backward()
    return {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class _WithAdapter(torch.nn.Module):
    """A mixture of experts whose weights are W + scale B A, which autograd differentiates."""

    def __init__(self, model, tensors, scale):
        super().__init__()
        self.model, self.tensors, self.scale = model, tensors, scale

    def _delta(self, module):
        a, b = (self.tensors[f"{PREFIX}{module}.lora_{m}.weight"] for m in "AB")
        return self.scale * b @ a

    def _weights(self):
        for name, weight in self.model.named_parameters():
            module = name.removesuffix(".weight")
            if f"{PREFIX}{module}.lora_A.weight" in self.tensors:
                yield name, weight + self._delta(module)
            elif name.endswith((".gate_up_proj", ".down_proj")):
                prefix, _, fused = name.rpartition(".")
                parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
                yield (
                    name,
                    weight
                    + torch.stack(
                        [
                            torch.cat([self._delta(f"{prefix}.{e}.{part}") for part in parts])
                            for e in range(len(weight))
                        ]
                    ),
                )

    def forward(self, **inputs):
        return functional_call(self.model, dict(self._weights()), kwargs=inputs)


def merged_gradient(model_folder, folder, batch, scale):
    """As `peft_gradient`, through weights with the adapter added: for mixtures of experts."""
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    sft_loss(_WithAdapter(base_model(model_folder), tensors, scale), batch).backward()
    return {name: tensor.grad for name, tensor in tensors.items()}
