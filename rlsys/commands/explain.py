"""`rlsys explain`: what a config means, in numbers; starts only reward functions."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlsys.commands.console import make_console
from rlsys.commands.explain_algorithm import describe_algorithm
from rlsys.commands.explain_batches import batch_arithmetic
from rlsys.commands.explain_experts import describe_experts
from rlsys.commands.explain_options import (
    describe_passed_through,
    describe_pipeline,
    describe_sampling,
)
from rlsys.config import Config
from rlsys.config.fields import (
    config_fields,
    first_sentence,
    show_value,
    value_at,
)
from rlsys.config.load import ResolvedConfig, load_config
from rlsys.config.pipeline_layout import fits_layout
from rlsys.config.roles import Role, plan_roles
from rlsys.data.preprocess import read_spec
from rlsys.model.adapters import describe_adapter_sync
from rlsys.model.families.bridged import is_bridged
from rlsys.model.folder import find_model_folder
from rlsys.model.memory import (
    REWARD_GIB,
    MemoryEstimate,
    estimate_memory,
    estimate_reward_model,
)
from rlsys.model.shape import ModelShape, read_model_config, read_model_shape
from rlsys.preflight.checks import check_run
from rlsys.preflight.data import FIRST_ROWS, count_rows
from rlsys.preflight.devices import gpu_memory_gib, guess_device, visible_gpus
from rlsys.preflight.memory import gpu_warnings
from rlsys.preflight.model import recompute_note
from rlsys.preflight.rewards import reward_start_problem
from rlsys.preflight.saving import describe_saving, disk_use, disk_warning
from rlsys.preflight.trained import trained_summary
from rlsys.problems import Problem
from rlsys.text import counted
from rlsys.tracking.columns import GAP, columns, print_lines, print_pairs, print_wrapped
from rlsys.types import Device

_VALUE = 32
"""Columns for a value; a longer value continues on the next line."""
_MIN_MEANING = 40
"""Fewest columns for the meanings of fields; a narrower terminal does not show them."""
_ORIGIN_STYLES = {"default": "dim", "file": "", "command line": "bold green"}


def main(args: argparse.Namespace) -> bool:
    """Explain a config; returns whether it could run."""
    return explain(load_config(args.config, args.overrides), make_console())


def explain(resolved: ResolvedConfig, console: Console) -> bool:
    """Print all sections: config, algorithm, batches, actors, saving, memory and problems.

    Returns:
        Whether the config could run. A problem of this machine alone, such as a missing file, is
        shown and does not count.
    """
    config, device = resolved.config, guess_device(resolved.config)
    problems = _find_problems(config)
    _print_config(resolved, console)
    print_pairs(console, "Algorithm", describe_algorithm(config))
    print_pairs(console, "Sampling", describe_sampling(config.rollout))
    if passed := describe_passed_through(config):
        print_pairs(console, "Passed through, and not in the memory estimate", passed)
    print_pairs(console, "Batches", batch_arithmetic(config))
    actors = [*_describe_actors(config, device), *describe_pipeline(config.policy)]
    print_pairs(console, f"Actors on {device}", actors)
    shapes = _read_shapes(config)
    if shapes is None:
        print_pairs(console, "Saved", describe_saving(config, None))
        console.print("\nModel config not available here: memory not estimated, nor disk")
    else:
        experts = describe_experts(
            config, shapes[0], read_model_config(find_model_folder(config.model.path))
        )
        if experts:
            print_pairs(console, "Experts", experts)
        rows = count_rows(config.data)
        counted_config = config if rows is None else config.with_steps(rows)
        print_pairs(console, "Model", _describe_model(config, shapes[0], device))
        _print_saved(counted_config, shapes[0], device, console)
        if fits_layout(config.policy, shapes[0].num_layers):
            _print_memory(counted_config, shapes, device, console)
        else:
            console.print("\nMemory not estimated: policy.pipeline_layout is for another model")
    _print_problems(problems, config, console)
    return all(problem.only_here for problem in problems)


def _find_problems(config: Config) -> list[Problem]:
    problems = check_run(config)
    if not problems and (stopped := reward_start_problem(config)) is not None:
        problems = [Problem(f"reward.reward_funcs: {stopped}")]
    return problems


def _print_config(resolved: ResolvedConfig, console: Console) -> None:
    """Each field with its value and origin, and on a wide terminal its meaning."""
    fields = config_fields()
    widths = [2 + max(len(name.rpartition(".")[2]) for name in fields), _VALUE, len("command line")]
    head = ["field", "value", "from"]
    room = console.width - sum(widths) - len(widths) * GAP
    if room >= _MIN_MEANING:
        widths, head = [*widths, room], [*head, "meaning"]
    else:
        widths[1] += max(0, room + GAP)
    print_lines(console, ["Config: docs/config.md has the meaning of every field"], "italic")
    print_lines(console, columns(head, widths), "bold")
    values = resolved.config.model_dump()
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
        print_lines(console, columns(cells[: len(widths)], widths), _ORIGIN_STYLES[origin])


def _describe_actors(config: Config, device: Device) -> list[tuple[str, str]]:
    """(role x number of actors, what each of them gets)."""
    roles = plan_roles(config, device=device)
    counts = Counter(role.name for role in roles)
    pairs = [(f"{name} x {count}", _describe_role(name, roles)) for name, count in counts.items()]
    if config.grpo.beta == 0:
        pairs.append(("reference x 0", "grpo.beta is 0"))
    elif config.reference_is_base:
        pairs.append(("reference x 0", "it is the policy with its adapter off (policy.lora)"))
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


def _read_shapes(config: Config) -> tuple[ModelShape, ModelShape] | None:
    """The models of policy and reference; None if a config.json is not on this machine."""
    try:
        shape = read_model_shape(find_model_folder(config.model.path), may_bridge=True)
        if not config.has_reference_model:
            return shape, shape
        return shape, read_model_shape(find_model_folder(config.reference_path), may_bridge=True)
    except ValueError:  # one of the problems, which are printed last
        return None


def _describe_model(config: Config, shape: ModelShape, device: Device) -> list[tuple[str, str]]:
    """(part, description): what the model is, and what reads and writes its weights."""
    pairs = [("architecture", f"{shape.family.architecture}, {shape.num_params / 1e6:,.1f} M")]
    if is_bridged(config, shape):
        text = (
            "through mcore-bridge, which also reads config.json: rlsys does not check its keys. "
            "Sizes are estimates, and the first step's logp_difference says whether policy "
            "and rollout engine compute the same model"
        )
    else:
        text = "by rlsys's own table, each key of config.json checked"
    pairs.append(("weights", text))
    if (trained := trained_summary(config, shape)) is not None:
        pairs.append(("trained", trained))
    if config.policy.lora is not None:
        pairs.append(("rollout engines", describe_adapter_sync(config, shape, device)))
    note = recompute_note(config.policy, shape)
    return pairs if note is None else [*pairs, ("recompute", note)]


def _print_saved(config: Config, shape: ModelShape, device: Device, console: Console) -> None:
    """What the run saves, and the disk that it needs."""
    use = disk_use(config, shape, device=device)
    print_pairs(console, "Saved", describe_saving(config, use))
    if (warning := disk_warning(config, use)) is not None:
        print_wrapped(console, warning, style="bold red")


def _print_memory(
    config: Config, shapes: tuple[ModelShape, ModelShape], device: Device, console: Console
) -> None:
    """Memory of each role by purpose, the formulas, and whether it fits on this machine."""
    of_rewards, unknown = _reward_model_memory(config, device)
    estimates = [*estimate_memory(config, *shapes, device=device), *of_rewards]
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
    for note in notes:
        print_wrapped(console, note, indent="  ", style="dim")
    if device == "cpu":
        _print_total(estimates, counts, console)
    else:
        _print_cards(config, estimates, console)


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


def _reward_model_memory(config: Config, device: Device) -> tuple[list[MemoryEstimate], list[str]]:
    """The estimate of the largest reward model, and the models whose weights are not here."""
    known, unknown = [], []
    for name in config.reward.models:
        settings = config.reward.params.get(name, {})
        estimate = None
        if "path" in settings:
            dtype = settings.get("dtype", "auto")
            estimate = estimate_reward_model(Path(settings["path"]), dtype=dtype, device=device)
        if estimate is None:
            unknown.append(name)
        else:
            known.append(estimate)
    return sorted(known, key=lambda estimate: -estimate.total_gib)[:1], unknown


def _print_cards(config: Config, estimates: list[MemoryEstimate], console: Console) -> None:
    gpu_gib = gpu_memory_gib()
    if gpu_gib is None:
        console.print("No GPU is visible here to compare the estimate with")
        return
    console.print(f"The smallest GPU here has {gpu_gib:.1f} GiB")
    for warning in gpu_warnings(config, estimates, gpu_gib):
        print_wrapped(console, f"That may not fit: {warning}", style="bold red")


def _print_total(estimates: list[MemoryEstimate], counts: Counter[str], console: Console) -> None:
    import psutil

    total = sum(e.total_gib * counts[e.role] for e in estimates) + REWARD_GIB * counts["reward"]
    available = psutil.virtual_memory().available / 2**30
    console.print(f"All processes: {total:.1f} GiB; this machine has {available:.1f} GiB free")
    if total > available:
        print_wrapped(
            console,
            "That may not fit: lower policy.micro_batch_size or rollout.max_num_seqs, or set "
            "policy.recompute to full",
            style="bold red",
        )


def _print_problems(problems: list[Problem], config: Config, console: Console) -> None:
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
        f"The reward functions were started, and the first {FIRST_ROWS} rows of each text file "
        "read. A run reads all rows, as `rlsys data preview` does.",
        style="dim",
    )
    specs = map(read_spec, config.data.all_datasets)
    elsewhere = dict.fromkeys(spec.name for spec in specs if not spec.is_local)
    if elsewhere:
        names = ", ".join(elsewhere)
        text = f"Not on this machine, so not looked at: {names}. A run asks the hub."
        print_wrapped(console, text, style="dim")
