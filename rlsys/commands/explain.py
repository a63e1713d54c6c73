"""`rlsys explain`: what a config means, in numbers; starts only reward functions."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsys.commands.console import make_console
from rlsys.commands.explain_distill import DISTILL_PARTS
from rlsys.commands.explain_experts import describe_experts
from rlsys.commands.explain_grpo import GRPO_PARTS
from rlsys.commands.explain_options import describe_pipeline
from rlsys.commands.explain_parts import Parts
from rlsys.commands.explain_preference import PREFERENCE_PARTS
from rlsys.commands.explain_reward_model import REWARD_MODEL_PARTS
from rlsys.commands.explain_sft import SFT_PARTS
from rlsys.config import (
    Config,
    DistillConfig,
    PreferenceConfig,
    RewardModelConfig,
    RunConfig,
    SftConfig,
)
from rlsys.config.fields import (
    config_fields,
    first_sentence,
    show_value,
    value_at,
)
from rlsys.config.load import Origin, ResolvedConfig, load_config_as
from rlsys.config.method import schema_of
from rlsys.config.pipeline_layout import fits_layout
from rlsys.config.roles import Role, decide_cpu_threads, decide_placement, plan_roles
from rlsys.cores import usable_cores
from rlsys.data.preprocess import read_spec
from rlsys.model.adapters import with_stored_settings
from rlsys.model.families.bridged import is_bridged
from rlsys.model.folder import find_model_folder
from rlsys.model.memory import REWARD_GIB, MemoryEstimate
from rlsys.model.shape import ModelShape, read_model_config, read_model_shape
from rlsys.model.snapshot_memory import snapshot_text, snapshot_warning
from rlsys.preflight.data import count_rows
from rlsys.preflight.devices import (
    gpu_memory_gib,
    guess_device,
    host_memory_gib,
    visible_gpus,
)
from rlsys.preflight.model import recompute_note
from rlsys.preflight.positions import within_positions
from rlsys.preflight.saving import describe_saving, disk_use, disk_warning
from rlsys.preflight.trained import trained_summary
from rlsys.problems import Problem
from rlsys.redact import without_secrets
from rlsys.text import counted
from rlsys.tracking.columns import GAP, columns, print_lines, print_pairs, print_wrapped
from rlsys.types import Device

_VALUE = 32
"""Columns for a value; a longer value continues on the next line."""
_MIN_MEANING = 40
"""Fewest columns for the meanings of fields; a narrower terminal does not show them."""
_ORIGIN_STYLES = {"default": "dim", "command line": "bold green"}


PARTS: dict[type[RunConfig], Parts[Any]] = {
    Config: GRPO_PARTS,
    SftConfig: SFT_PARTS,
    PreferenceConfig: PREFERENCE_PARTS,
    RewardModelConfig: REWARD_MODEL_PARTS,
    DistillConfig: DISTILL_PARTS,
}
"""What is different between methods."""


def main(args: argparse.Namespace) -> bool:
    """Explain a config; returns whether it could run."""
    schema = schema_of(args.config, args.overrides)
    resolved = load_config_as(schema, args.config, args.overrides)
    return explain(within_positions(resolved), make_console())


def explain(resolved: ResolvedConfig[Any], console: Console) -> bool:
    """Print all sections: config, method, batches, actors, saving, memory and problems.

    Returns:
        Whether the config could run. A problem of this machine alone, such as a missing file, is
        shown and does not count.
    """
    parts = PARTS[type(resolved.config)]
    device = guess_device(resolved.config)

    def place(config: RunConfig) -> RunConfig:
        config = decide_placement(config, device=device, num_gpus=visible_gpus())
        return decide_cpu_threads(config, device=device, cores=usable_cores())

    problems = parts.problems(place(resolved.config))
    resolved = _with_adapter(resolved)
    config = place(resolved.config)
    _print_config(resolved, console)
    for title, pairs in parts.method(config):
        if pairs:
            print_pairs(console, title, pairs)
    actors = [*_describe_actors(config, parts, device), *describe_pipeline(config.policy)]
    print_pairs(console, f"Actors on {device}", actors)
    try:
        folder = find_model_folder(config.model.path)
        shape = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    except ValueError:  # one of the problems, which are printed last
        print_pairs(console, "Saved", describe_saving(config, None))
        console.print("\nModel config not available here: memory not estimated, nor disk")
    else:
        _print_model(config, parts, shape, device, console)
    _print_problems(problems, config, parts, console)
    return all(problem.only_here for problem in problems)


def _with_adapter(resolved: ResolvedConfig[Any]) -> ResolvedConfig[Any]:
    """With the settings of the adapter in policy.lora.path, as a run has them."""
    try:
        config: RunConfig = with_stored_settings(resolved.config)
    except ValueError:  # one of the problems, which are printed last
        return resolved
    lora = config.policy.lora
    if lora is None or lora.path is None:
        return resolved
    stored: dict[str, Origin] = {f"policy.lora.{name}": "adapter" for name in lora.model_fields_set}
    return ResolvedConfig(config, stored | resolved.origins)


def _print_model(
    config: RunConfig, parts: Parts[Any], shape: ModelShape, device: Device, console: Console
) -> None:
    """What depends on the model: its parts, what is saved, and the memory."""
    model_config = read_model_config(find_model_folder(config.model.path))
    if experts := describe_experts(config, shape, model_config):
        print_pairs(console, "Experts", [*experts, *parts.experts(config, shape)])
    rows = count_rows(config.data)
    config = config if rows is None else config.with_steps(rows)
    model = [*_describe_model(config, shape), *parts.weights(config, shape, device)]
    print_pairs(console, "Model", model)
    _print_saved(config, shape, device, console)
    if fits_layout(config.policy, shape.num_layers):
        _print_memory(config, parts, shape, device, console)
    else:
        console.print("\nMemory not estimated: policy.pipeline_layout is for another model")


def _print_config(resolved: ResolvedConfig[Any], console: Console) -> None:
    """Each field with its value and origin, and on a wide terminal its meaning."""
    schema: type[RunConfig] = type(resolved.config)
    fields = config_fields(schema)
    widths = [2 + max(len(name.rpartition(".")[2]) for name in fields), _VALUE, len("command line")]
    head = ["field", "value", "from"]
    room = console.width - sum(widths) - len(widths) * GAP
    if room >= _MIN_MEANING:
        widths, head = [*widths, room], [*head, "meaning"]
    else:
        widths[1] += max(0, room + GAP)
    print_lines(console, ["Config: docs/config.md has the meaning of every field"], "italic")
    print_lines(console, columns(head, widths), "bold")
    values = without_secrets(resolved.config.model_dump())
    heading = ""
    for name, info in fields.items():
        section, _, field = name.rpartition(".")
        if name not in resolved.origins:  # of an optional section
            continue
        if section != heading:
            print_lines(console, [section], "bold")
            heading = section
        origin = resolved.origins[name]
        indent = "  " if section else ""
        cells = (
            indent + field,
            show_value(value_at(values, name)),
            origin,
            first_sentence(info.description),
        )
        print_lines(console, columns(cells[: len(widths)], widths), _ORIGIN_STYLES.get(origin, ""))


def _describe_actors(config: RunConfig, parts: Parts[Any], device: Device) -> list[tuple[str, str]]:
    """(role x number of actors, what each of them gets)."""
    roles = plan_roles(config, device=device)
    counts = Counter(role.name for role in roles)
    pairs = [(f"{name} x {count}", _describe_role(name, roles)) for name, count in counts.items()]
    pairs += parts.absent_actors(config)
    gpus, threads = sum(role.gpus for role in roles), sum(role.cpu_threads for role in roles)
    if device == "cuda":
        total = f"{counted(gpus, 'GPU')}; this machine shows {visible_gpus()}"
    else:
        total = f"{counted(threads, 'thread')}, not all busy at once"
    return [*pairs, ("in all", total)]


def _describe_role(name: str, roles: list[Role]) -> str:
    actors = [role for role in roles if role.name == name]
    first = actors[0]
    if first.shares_gpu_of and name == "reward_model":
        return "a GPU of the policy's, and memory there (reward.reward_model_placement)"
    if first.shares_gpu_of and name == "rollout":
        return "the policy's GPUs, taking turns with its ranks (placement: colocated)"
    if first.shares_gpu_of:
        return (
            f"the GPU of the {first.shares_gpu_of[0]} rank of the same number, its weights in host "
            f"memory meanwhile ({name}.placement)"
        )
    if not first.gpus:
        return f"CPU, {counted(first.cpu_threads, 'thread')} each"
    start = sum(role.gpus for role in roles[: roles.index(first)])
    last = start + sum(role.gpus for role in actors) - 1
    sharers = sum(role.shares_gpu_of == (name, first.rank) for role in actors)
    each = f"{1 + sharers} share a GPU" if sharers else f"{first.gpus} GPU each"
    return f"{each}: number {start}" + (f" to {last}" if last > start else "")


def _describe_model(config: RunConfig, shape: ModelShape) -> list[tuple[str, str]]:
    """(part, description): what the model is, and what reads and writes its weights."""
    pairs = [("architecture", f"{shape.family.architecture}, {shape.num_params / 1e6:,.1f} M")]
    if is_bridged(config, shape):
        text = (
            "through mcore-bridge, which also reads config.json: rlsys does not check its keys. "
            "Sizes are estimates"
        )
        if config.has_rollouts:
            text += ", and the first step's logp_difference says whether policy and rollout engine "
            text += "compute the same model"
    else:
        text = "by rlsys's own table, each key of config.json checked"
    pairs.append(("weights", text))
    if (trained := trained_summary(config, shape)) is not None:
        pairs.append(("trained", trained))
    note = recompute_note(config.policy, shape)
    return pairs if note is None else [*pairs, ("recompute", note)]


def _print_saved(config: RunConfig, shape: ModelShape, device: Device, console: Console) -> None:
    """What the run saves, and the disk that it needs."""
    use = disk_use(config, shape, device=device)
    print_pairs(console, "Saved", describe_saving(config, use))
    if (warning := disk_warning(config, use)) is not None:
        print_wrapped(console, warning, style="bold red")


def _print_memory(
    config: RunConfig, parts: Parts[Any], shape: ModelShape, device: Device, console: Console
) -> None:
    """Memory of each role by purpose, the formulas, and whether it fits on this machine."""
    try:
        estimates, unknown = parts.memory(config, shape, device)
    except ValueError:  # one of the problems, which are printed last
        console.print("\nMemory not estimated, because of a problem below")
        return
    counts = Counter[str](role.name for role in plan_roles(config, device=device))
    console.print()
    kind = "GPU" if device == "cuda" else "main"
    print_lines(console, [f"Estimate of {kind} memory, in GiB a process"], "italic")
    console.print(_memory_table(estimates, counts))
    notes = [
        f"{estimate.role} {purpose} = {formula}"
        for estimate in estimates
        for purpose, formula in estimate.formula.items()
    ]
    notes += [f"not in the estimate: {', '.join(unknown)}"] if unknown else []
    notes += [snapshots] if (snapshots := snapshot_text(config, shape, device)) else []
    for note in notes:
        print_wrapped(console, note, indent="  ", style="dim")
    if warning := snapshot_warning(config, shape, device, host_memory_gib()):
        print_wrapped(console, f"That may not fit: {warning}", style="bold red")
    if device == "cpu":
        _print_total(parts, estimates, counts, console)
    else:
        _print_cards(config, parts, shape, estimates, console)


def _memory_table(estimates: list[MemoryEstimate], counts: Counter[str]) -> Table:
    table = Table("", box=None, pad_edge=False)
    for estimate in estimates:
        table.add_column(f"{estimate.role} x {counts[estimate.role]}", justify="right")
    for purpose in dict.fromkeys(purpose for e in estimates for purpose in e.gib):
        sizes = [e.gib.get(purpose) for e in estimates]
        table.add_row(purpose, *("" if size is None else _gib(size) for size in sizes))
    table.add_row("sum", *(f"{estimate.total_gib:.2f}" for estimate in estimates))
    return table


def _gib(size: float) -> str:
    return f"{size:.2f}" if size >= 0.005 else "<0.01"


def _print_cards(
    config: RunConfig,
    parts: Parts[Any],
    shape: ModelShape,
    estimates: list[MemoryEstimate],
    console: Console,
) -> None:
    """What does not fit the GPUs of this machine, and who holds what in turns on them."""
    gpu_gib = gpu_memory_gib()
    phases, warnings = parts.phases(config, shape, estimates, gpu_gib)
    if phases:
        print_pairs(console, "In turns on a shared GPU: estimate of each phase", phases)
    if gpu_gib is None:
        console.print("No GPU is visible here to compare the estimate with")
    else:
        console.print(f"The smallest GPU here has {gpu_gib:.1f} GiB")
        warnings = [*parts.warnings(config, estimates, gpu_gib), *warnings]
    for warning in warnings:
        print_wrapped(console, f"That may not fit: {warning}", style="bold red")


def _print_total(
    parts: Parts[Any], estimates: list[MemoryEstimate], counts: Counter[str], console: Console
) -> None:
    import psutil

    total = sum(e.total_gib * counts[e.role] for e in estimates) + REWARD_GIB * counts["reward"]
    available = psutil.virtual_memory().available / 2**30
    console.print(f"All processes: {total:.1f} GiB; this machine has {available:.1f} GiB free")
    if total > available:
        print_wrapped(
            console,
            f"That may not fit: lower {parts.to_fit}, or set policy.recompute to full",
            style="bold red",
        )


def _print_problems(
    problems: list[Problem], config: RunConfig, parts: Parts[Any], console: Console
) -> None:
    wrong = [problem for problem in problems if not problem.only_here]
    missing = [problem for problem in problems if problem.only_here]
    for title, some in (("Problems", wrong), ("Not ready on this machine", missing)):
        if some:
            console.print(f"\n{title}", style="bold red")
            for problem in some:
                print_wrapped(console, f"  - {problem}")
    if problems:
        return
    console.print("\nReady to run.", style="bold green")
    console.print(
        f"{parts.looked_at} A run reads all rows, as `rlsys data preview` does.",
        style="dim",
    )
    specs = map(read_spec, config.data.all_datasets)
    elsewhere = dict.fromkeys(spec.name for spec in specs if not spec.is_local)
    if elsewhere:
        names = ", ".join(elsewhere)
        text = f"Not on this machine, so not looked at: {names}. A run asks the hub."
        print_wrapped(console, text, style="dim")
