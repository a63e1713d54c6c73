"""`rlsys export --test_convert_precision`: logits of the source and of what was written.

Both sides are computed in float32 on CPU, so that what differs is the weights: Hugging Face folders
by transformers, megatron-core's by megatron-core. A narrower type rounds weights. How much that
explains is measured, by rounding the source's weights, and the rest has to be float32's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from rlsys.commands.console import make_console
from rlsys.commands.export_formats import whole_model
from rlsys.text import counted

if TYPE_CHECKING:
    from rlsys.commands.export import Export

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Natalia sold 48 clips in April and half as many in May. Altogether she sold 48 + 24 = 72.",
    "水在零度结冰，在一百度沸腾。",  # noqa: RUF001
)
MAX_TOKENS = 512
"""Tokens of each prompt that are compared."""
MEAN_BOUND, MAX_BOUND, MIN_EQUAL_ARGMAX = 1e-4, 1e-2, 0.99
"""What float32 explains: mean and largest difference, in standard deviations of the logits, and the
share of tokens with the same argmax."""
LOGITS = "logits"

Values = dict[str, torch.Tensor]
"""Place in the model -> [T, size] of the tokens of all prompts, in float32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How two sides differ at one place of the model."""

    mean: float
    max: float
    scale: float
    """Standard deviation of the first side's values."""
    equal_argmax: float
    """Share of tokens for which both sides have their largest value at the same index."""

    @classmethod
    def between(cls, one: torch.Tensor, other: torch.Tensor) -> Difference:
        """The difference of two [T, size]."""
        gaps = (one - other).abs()
        same = (one.argmax(-1) == other.argmax(-1)).float().mean()
        return cls(gaps.mean().item(), gaps.max().item(), one.std().item(), same.item())

    @property
    def is_explained(self) -> bool:
        """Whether computing in float32 explains it, which it never does for NaN."""
        return (
            self.mean <= MEAN_BOUND * self.scale
            and self.max <= MAX_BOUND * self.scale
            and self.equal_argmax >= MIN_EQUAL_ARGMAX
        )


def compare(export: Export, prompts: list[list[int]], *, per_layer: bool) -> bool:
    """Print how both sides differ; whether the type of the new weights explains it."""
    adapter = None if export.adapter is None else export.adapter.folder
    source = _values(
        export.folder, prompts, is_mcore=export.is_mcore, per_layer=per_layer, adapter=adapter
    )
    written = _values(export.out, prompts, is_mcore=export.to == "mcore", per_layer=per_layer)
    differences = {place: Difference.between(source[place], written[place]) for place in source}
    rest, name = differences[LOGITS], str(export.main_dtype).removeprefix("torch.")
    if export.rounds:
        rounded = _values(
            export.folder,
            prompts,
            is_mcore=export.is_mcore,
            rounded_to=export.main_dtype,
            adapter=adapter,
        )
        rest = Difference.between(rounded[LOGITS], written[LOGITS])
    tokens = counted(sum(map(len, prompts)), "token")
    _print_table(f"source and {export.out} on {tokens}, in float32", differences)
    if export.rounds:
        print(
            f"rounding to {name} explains this up to a mean difference of {rest.mean:.2e} and a "
            f"largest one of {rest.max:.2e}, with equal argmax for {rest.equal_argmax:.2%}"
        )
    print(
        f"precision test {'passed' if rest.is_explained else 'FAILED'}: allowed are a mean "
        f"difference of {MEAN_BOUND * rest.scale:.2e}, a largest one of "
        f"{MAX_BOUND * rest.scale:.2e}, and {1 - MIN_EQUAL_ARGMAX:.0%} of the tokens with another "
        f"argmax{', beside rounding' if export.rounds else ''}"
    )
    return rest.is_explained


def read_prompts(folder: Path, given: str | None) -> list[list[int]]:
    """Token ids of the prompts to compare on.

    Args:
        folder: has the tokenizer.
        given: a text, or a file with one prompt a line or JSONL; None takes `PROMPTS`.

    Raises:
        ValueError: the file cannot be read, or a prompt has a token without an embedding.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts: list[Any] = list(PROMPTS) if given is None else list(_texts(given))
    prompts = []
    for text in texts:
        if isinstance(text, list):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=True)["input_ids"][:MAX_TOKENS])
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"--prompts {given}: it holds no prompt with a token")
    return prompts


def _texts(given: str) -> Iterator[Any]:
    """Texts, and lists of messages."""
    place = Path(given).expanduser()
    if not place.is_file():
        if place.suffix in (".txt", ".jsonl"):
            raise ValueError(f"--prompts {given}: the file does not exist")
        yield given
        return
    for number, line in enumerate(place.read_text("utf-8").splitlines(), start=1):
        if place.suffix != ".jsonl":
            yield line
            continue
        try:
            row = json.loads(line)
            yield row["messages"] if "messages" in row else row["prompt"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"--prompts {given}: line {number} is not a JSON object with prompt or messages"
            ) from None


@torch.no_grad()
def _values(
    folder: Path,
    prompts: list[list[int]],
    *,
    is_mcore: bool,
    per_layer: bool = False,
    rounded_to: torch.dtype | None = None,
    adapter: Path | None = None,
) -> Values:
    """Logits, and hidden states if `per_layer`, of a folder's model in float32.

    Args:
        rounded_to: a type to round the weights to first.
        adapter: a LoRA adapter, which PEFT computes beside the weights, or merges into them before
            they are rounded.
    """
    disable_progress_bar()
    with ExitStack() as stack:
        if is_mcore:
            from rlsys.engines.megatron.mcore_folder import logits

            longest = max(map(len, prompts))
            model, _ = stack.enter_context(whole_model(folder, torch.float32, longest=longest))
            places = {
                "embedding": model.embedding,
                **{f"layer {i}": layer for i, layer in enumerate(model.decoder.layers)},
                "final norm": model.decoder.final_layernorm,
            }
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            ).eval()
            places = {
                "embedding": model.model.embed_tokens,
                **{f"layer {i}": layer for i, layer in enumerate(model.model.layers)},
                "final norm": model.model.norm,
            }

            if adapter is not None:
                model = _with_adapter(model, adapter, merged=rounded_to is not None)

            def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
                return model(input_ids=ids[None], use_cache=False).logits[0]

        for parameter in model.parameters() if rounded_to is not None else ():
            parameter.copy_(parameter.to(rounded_to))
        parts: dict[str, list[torch.Tensor]] = {LOGITS: []}
        for place, module in places.items() if per_layer else ():
            parts[place] = []
            handle = module.register_forward_hook(_keep(parts[place]))
            stack.callback(handle.remove)
        for prompt in prompts:
            parts[LOGITS].append(logits(model, torch.tensor(prompt)).float())
    return {place: torch.cat(tensors) for place, tensors in parts.items()}


def _with_adapter(model: Any, adapter: Path, *, merged: bool) -> Any:
    """PEFT's model of a base and an adapter."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, adapter).eval()
    return wrapped.merge_and_unload() if merged else wrapped


def _keep(into: list[torch.Tensor]) -> Any:
    def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        into.append(hidden.reshape(-1, hidden.shape[-1]).float().clone())

    return hook


def _print_table(title: str, differences: dict[str, Difference]) -> None:
    table = Table("", "mean |diff|", "max |diff|", "std", "equal argmax", title=title)
    for place, one in sorted(differences.items(), key=lambda entry: entry[0] == LOGITS):
        argmax = f"{one.equal_argmax:.2%}" if place == LOGITS else ""
        table.add_row(place, f"{one.mean:.2e}", f"{one.max:.2e}", f"{one.scale:.3g}", argmax)
    make_console().print(table)
