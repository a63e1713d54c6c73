"""Low-rank adapters (LoRA, arXiv:2106.09685) of a model: which tensors have one, and their names.

A linear layer with the weight W [out, in] and an adapter A [r, in], B [out, r] computes
`W x + scale B A x`. Each Hugging Face tensor has an adapter of its own, even where megatron-core
fuses several into one parameter. So the names and shapes are PEFT's, and the mathematics too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.model.adapter_folder import adapter_settings, adapter_tensors
from rlsys.model.families.base import (
    EMBEDDING,
    HF_EMBEDDING,
    HF_OUTPUT,
    OUTPUT,
    WeightRow,
    weight_table,
)
from rlsys.model.folder_check import some
from rlsys.patterns import find

if TYPE_CHECKING:
    from rlsys.config import LoraConfig
    from rlsys.model.shape import ModelShape

PARAMETERS = "adapters."
"""Start of the names of adapters' parameters on a rank; what follows is Hugging Face's name."""
PEFT = "base_model.model."
"""Start of the names of tensors in PEFT's files."""
ALL_LINEAR = "all-linear"
_ENDS = (HF_EMBEDDING.removesuffix(".weight"), HF_OUTPUT.removesuffix(".weight"))
"""Modules that are one tensor where embeddings are tied."""
_LINEAR = re.compile(r".*\.(linear_\w+|\w+_proj\w*)\.weight\d*")
"""Parameters of linear layers. Others, such as routers, are no layers of their own there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan:
    """The adapters of one model, all choices made."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    init: str
    target_modules: list[str] | str
    """As in adapter_config.json: the last parts of modules' names, or a regex of whole names."""
    modules_to_save: list[str]
    targets: tuple[str, ...]
    """Modules with an adapter, by Hugging Face's names, in the model's order."""
    saved: tuple[str, ...]
    """Tensors that are trained whole, by Hugging Face's names, in the model's order."""
    folder: Path | None
    """Where the first adapter comes from; None: it starts new."""

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def linear_modules(shape: ModelShape) -> list[str]:
    """Names of the modules that can have an adapter, in the model's order."""
    return [
        name.removesuffix(".weight")
        for row in weight_table(shape)
        if _is_linear(row)
        for name in row.hf_names
    ]


def plan_lora(lora: LoraConfig, shape: ModelShape) -> LoraPlan:
    """What policy.lora means for a model.

    The settings of the adapter in policy.lora.path fill what the config leaves out.

    Raises:
        ValueError: a target or a module to save matches nothing, or that adapter is of another
            kind, rank, or model.
    """
    values: dict[str, Any] = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "rslora": lora.rslora,
        "target_modules": lora.target_modules,
        "modules_to_save": lora.modules_to_save,
    }
    folder = None if lora.path is None else Path(lora.path)
    if folder is not None:
        stored = adapter_settings(folder)
        if shape.num_labels is not None and "score" not in stored["modules_to_save"]:
            raise ValueError(
                f"policy.lora.path: the adapter in {folder} is one of a language model, without a "
                f"score head. Merge it (`rlsys export {folder} --merge --to hf FOLDER`), set "
                "model.path to the result, and leave policy.lora.path out"
            )
        _refuse_other_settings(lora, stored, folder)
        if "target_modules" in lora.model_fields_set:
            _refuse_other_targets(lora, stored["target_modules"], folder, shape)
        values |= stored
    targets = _match_targets(values["target_modules"], shape)
    saved = _match_saved(values["modules_to_save"], shape)
    if both := [target for target in targets if f"{target}.weight" in saved]:
        raise ValueError(
            f"policy.lora: {some(both)} would have an adapter and be trained whole: leave it out "
            "of target_modules or of modules_to_save"
        )
    names = values["target_modules"]
    if names == ALL_LINEAR:
        names = sorted({target.rpartition(".")[2] for target in targets})
    plan = LoraPlan(
        rank=values["rank"],
        alpha=values["alpha"],
        dropout=lora.dropout if "dropout" in lora.model_fields_set else values["dropout"],
        rslora=values["rslora"],
        init=lora.init,
        target_modules=names,
        modules_to_save=values["modules_to_save"],
        targets=tuple(targets),
        saved=tuple(saved),
        folder=folder,
    )
    if folder is not None:
        _check_tensors(folder, plan, shape)
    return plan


def adapter_table(shape: ModelShape, plan: LoraPlan) -> list[WeightRow]:
    """A row for each tensor of an adapter folder, as `weight_table` has them for the model's.

    B is cut where the output of the layer is, A where its input is; the other one is whole on each
    tensor-parallel rank. Tensors that are trained whole have the parameters of the model.
    """
    targets, saved = set(plan.targets), set(plan.saved)
    rows: list[WeightRow] = []
    for _, group in groupby(weight_table(shape), lambda row: row.experts or row.names):
        same = list(group)
        for index, name in enumerate(same[0].hf_names):
            if name.removesuffix(".weight") in targets:
                rows += [_matrix(row, index, "lora_A", plan.rank) for row in same]
                rows += [_matrix(row, index, "lora_B", plan.rank) for row in same]
        rows += [_in_peft(row) for row in same if set(row.hf_names) <= saved]
    if shape.tied and HF_EMBEDDING in saved:
        embedding = (shape.vocab_size, shape.hidden_size)
        rows.append(WeightRow((OUTPUT, EMBEDDING), (PEFT + HF_OUTPUT,), (embedding,), tp_axis=0))
    return rows


def count_trained(table: Iterable[WeightRow]) -> int:
    """Parameters in the rows of an adapter's table, each once."""
    return sum({row.names[-1:]: row.num_params for row in table}.values())


def parameter_name(module: str, matrix: str) -> str:
    """The name of a parameter of an adapter."""
    return f"{PARAMETERS}{module}.{matrix}.weight"


def _is_linear(row: WeightRow) -> bool:
    return all(len(shape) == 2 for shape in row.hf_shapes) and bool(_LINEAR.fullmatch(row.names[0]))


def _matrix(row: WeightRow, index: int, matrix: str, rank: int) -> WeightRow:
    """The row of A or B of one tensor of `row`."""
    name, (size_out, size_in) = row.hf_names[index], row.hf_shapes[index]
    module = name.removesuffix(".weight")
    parts = tuple(part.shape[0] for part in row.parts if part.hf_name == name)
    is_input = matrix == "lora_A"
    cut = 1 if is_input else 0
    return WeightRow(
        (parameter_name(module, matrix),),
        (f"{PEFT}{module}.{matrix}.weight",),
        ((rank, size_in) if is_input else (size_out, rank),),
        tp_axis=row.tp_axis if row.tp_axis == cut else None,
        part_rows=() if is_input or len(parts) == 1 else parts,
        experts=row.experts and f"{row.experts}.{module.rpartition('.')[2]}.{matrix}",
    )


def _in_peft(row: WeightRow) -> WeightRow:
    return replace(row, hf_names=tuple(PEFT + name for name in row.hf_names))


def matches(pattern: list[str] | str, module: str) -> bool:
    """PEFT's rule: a list has whole names or their last parts, a text is a regex of whole names."""
    if isinstance(pattern, str):
        return pattern == ALL_LINEAR or find("fullmatch", pattern, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in pattern)


def _match_targets(pattern: list[str] | str, shape: ModelShape) -> list[str]:
    there = linear_modules(shape)
    found = [module for module in there if matches(pattern, module)]
    missing = pattern if isinstance(pattern, str) and not found else None
    if isinstance(pattern, list):
        unmatched = [name for name in pattern if not any(matches([name], m) for m in there)]
        missing = some(unmatched) if unmatched else None
    if missing is not None:
        whole = sorted({module.rpartition(".")[2] for module in there})
        others = some(_other_modules(pattern, shape, set(there)))
        matched = "" if others == missing else f"({others}) "
        raise ValueError(
            f"policy.lora.target_modules: {missing} "
            + (
                f"{matched}cannot have an adapter: name it in policy.lora.modules_to_save, "
                "which trains it whole. "
                if others
                else "matches nothing. "
            )
            + f"Linear layers of this model: {', '.join(whole)}. Write a list of these, "
            f"{ALL_LINEAR}, or a regex of whole names such as {there[0]}"
        )
    _refuse_single_experts(set(found), shape)
    return found


def _refuse_single_experts(found: set[str], shape: ModelShape) -> None:
    """A rank computes the adapters of all its experts together."""
    for _, group in groupby(weight_table(shape), lambda row: row.experts or row.names):
        for modules in zip(*(row.hf_names for row in group), strict=True):
            own = {name.removesuffix(".weight") for name in modules}
            if found & own and not own <= found:
                raise ValueError(
                    f"policy.lora.target_modules names {some(sorted(found & own))}, and not the "
                    f"same of the layer's other {len(own - found)} experts: name all or none"
                )


def _other_modules(pattern: list[str] | str, shape: ModelShape, linear: set[str]) -> list[str]:
    """Modules without an adapter that the pattern names, such as the output layer."""
    names = [*(name for row in weight_table(shape) for name in row.hf_names), HF_OUTPUT]
    modules = [name.removesuffix(".weight") for name in names]
    return [m for m in modules if m not in linear and matches(pattern, m)]


def _match_saved(names: list[str], shape: ModelShape) -> list[str]:
    """Tensors of modules_to_save, by PEFT's rule: names are ends of modules' names."""
    rows = weight_table(shape)
    if shape.tied and len({m for m in _ENDS for n in names if m.endswith(n)}) == 1:
        raise ValueError(
            f"policy.lora.modules_to_save = {names}: embedding and output head of this model are "
            "one tensor, so name both, embed_tokens and lm_head"
        )
    found = []
    for row in rows:
        own = [name for name in row.hf_names if _module(name).endswith(tuple(names))]
        if 0 < len(own) < len(row.hf_names):
            raise ValueError(
                f"policy.lora.modules_to_save: {some(own)} cannot be trained alone, because "
                f"megatron-core has {some(row.hf_names)} in one parameter: name all of them"
            )
        found += own
    modules = [_module(name) for row in rows for name in row.hf_names]
    modules += ["lm_head"] if shape.tied else []
    for name in names:
        if not any(module.endswith(name) for module in modules):
            there = sorted({module.rpartition(".")[2] for module in modules})
            raise ValueError(
                f"policy.lora.modules_to_save: {name} matches nothing. There is {', '.join(there)}"
            )
    return found


def _module(tensor: str) -> str:
    """The module of a tensor."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


_SETTINGS = ("rank", "alpha", "dropout", "rslora", "target_modules", "modules_to_save")
"""Fields of LoraConfig that an adapter folder has, too."""


def _refuse_other_settings(lora: LoraConfig, stored: dict[str, object], folder: Path) -> None:
    """Refuse what the config says explicitly, and the adapter has otherwise.

    Raises:
        ValueError: names all of it.
    """
    if "init" in lora.model_fields_set:
        raise ValueError(
            f"policy.lora.init = {lora.init} says how new adapters start, and policy.lora.path = "
            f"{folder} has this one's numbers: leave one of them out"
        )
    given = lora.model_fields_set & {"rank", "alpha", "rslora", "modules_to_save"}
    own = lora.model_dump() | {"modules_to_save": sorted(lora.modules_to_save)}
    differ = [name for name in _SETTINGS if name in given and own[name] != stored[name]]
    if differ:
        texts = [f"{name} = {stored[name]}, not {getattr(lora, name)}" for name in differ]
        raise ValueError(
            f"policy.lora.path: the adapter in {folder} has {', '.join(texts)}. Leave "
            f"{', '.join(f'policy.lora.{name}' for name in differ)} out of the config, which then "
            "takes the adapter's, or start without policy.lora.path"
        )


def _refuse_other_targets(
    lora: LoraConfig, stored: list[str] | str, folder: Path, shape: ModelShape
) -> None:
    """Refuse targets in the config that are other modules than the adapter's.

    Raises:
        ValueError: names both.
    """
    if _match_targets(lora.target_modules, shape) != _match_targets(stored, shape):
        raise ValueError(
            f"policy.lora.path: the adapter in {folder} has target_modules = {stored}, and the "
            f"config {lora.target_modules}, which are other layers. Leave "
            "policy.lora.target_modules out of the config, which then takes the adapter's"
        )


def _check_tensors(folder: Path, plan: LoraPlan, shape: ModelShape) -> None:
    """Refuse the tensors of another model, or of other targets, than the plan's.

    Raises:
        ValueError: says which.
    """
    stored = adapter_tensors(folder)
    wanted = {
        name: shape_of
        for row in adapter_table(shape, plan)
        for name, shape_of in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    problems = list(_differences(stored, wanted))
    if problems:
        raise ValueError(
            f"policy.lora.path: the adapter in {folder} does not fit the model: "
            f"{'; '.join(problems)}. Use an adapter of this base model"
        )


def _differences(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> Iterator[str]:
    if missing := sorted(wanted.keys() - stored.keys()):
        yield f"it lacks {some(missing)}"
    if unknown := sorted(stored.keys() - wanted.keys()):
        yield f"it has {some(unknown)}, which the model or the targets do not have"
    for name in sorted(stored.keys() & wanted.keys()):
        if stored[name] != wanted[name]:
            yield f"{name} is {list(stored[name])}, and should be {list(wanted[name])}"
            return
