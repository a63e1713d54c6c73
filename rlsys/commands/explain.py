"""`rlsys explain`: what a config means, in numbers, before anything is started."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlsys.commands.console import make_console
from rlsys.commands.explain_algorithm import describe_algorithm
from rlsys.config import Config
from rlsys.config.fields import config_fields, first_sentence, show_value
from rlsys.config.load import ResolvedConfig, load_config
from rlsys.config.roles import Role, plan_roles
from rlsys.data.preprocess import read_spec
from rlsys.model.folder import find_model_folder
from rlsys.model.memory import (
    REWARD_GIB,
    MemoryEstimate,
    estimate_memory,
    estimate_reward_model,
    longest_row,
    micro_batch_tokens,
)
from rlsys.model.shape import read_model_shape
from rlsys.preflight.checks import check_run
from rlsys.preflight.data import FIRST_ROWS, count_rows
from rlsys.preflight.devices import gpu_memory_gib, guess_device, visible_gpus
from rlsys.preflight.memory import card_warnings
from rlsys.preflight.rewards import reward_start_problem
from rlsys.preflight.saving import describe_saving, disk_use, disk_warning
from rlsys.problems import Problem
from rlsys.text import counted
from rlsys.tracking.columns import GAP, columns, print_lines, print_pairs, print_wrapped
from rlsys.types import Device

_VALUE = 32
"""Columns for a value; a longer one goes on below."""
_LEAST_MEANING = 40
"""Columns for the meaning of a field, if it is shown."""
_ORIGIN_STYLES = {"default": "dim", "file": "", "command line": "bold green"}


def main(args: argparse.Namespace) -> bool:
    """Explain a config; returns whether it could run."""
    return explain(load_config(args.config, args.overrides), make_console())


def explain(resolved: ResolvedConfig, console: Console) -> bool:
    """Print the config, its batch arithmetic, devices, memory and problems.

    Returns:
        whether the config could run: problems of this machine alone (a file that is not here)
        are shown and do not count.
    """
    config = resolved.config
    problems = check_run(config)
    if not problems and (stopped := reward_start_problem(config)) is not None:
        problems = [Problem(f"reward.reward_funcs: {stopped}")]
    _print_config(resolved, console)
    print_pairs(console, "Algorithm", describe_algorithm(config))
    print_pairs(console, "Batches", batch_arithmetic(config))
    _print_roles(config, console)
    _print_saved_and_memory(config, console)
    _print_problems(problems, config, console)
    return all(problem.only_here for problem in problems)


def batch_arithmetic(config: Config) -> list[tuple[str, str]]:
    """(quantity, how it comes about) for every number that follows from the batch sizes."""
    rollout, policy = config.rollout, config.policy
    completions, steps = rollout.generation_batch_size, config.optimizer_steps_per_rollout
    prompts, per_step = config.num_prompts, config.global_batch_size
    per_rank = per_step // config.data_parallel_size
    if policy.max_tokens_per_micro_batch is None:
        size = min(policy.micro_batch_size, per_rank)
        count = math.ceil(per_rank / size)
        micro = f"{count} of {'up to ' if per_rank % size else ''}{counted(size, 'completion')}, "
    else:
        micro = "as many completions as fit, "
    return [
        (
            "prompts a step (P)",
            f"{prompts} = generation_batch_size {completions} / num_generations "
            f"{rollout.num_generations}",
        ),
        ("completions a step (N)", f"{completions} = P {prompts} x G {rollout.num_generations}"),
        *_running_ahead(config),
        (
            "completions an engine",
            f"{completions / rollout.num_engines:g} = {completions} / num_engines "
            f"{rollout.num_engines}, {rollout.max_num_seqs} at once",
        ),
        (
            "optimizer steps a rollout",
            f"{steps} = {completions} / global_batch_size {per_step} x num_iterations "
            f"{config.grpo.num_iterations}",
        ),
        (
            "completions an optimizer step",
            f"{per_step} = policy.global_batch_size"
            + (" (generation_batch_size)" if policy.global_batch_size is None else ""),
        ),
        (
            "  of these, a rank has",
            f"{per_rank} = {per_step} / {config.data_parallel_size} data-parallel ranks "
            f"(world_size {policy.world_size} / (TP {policy.tensor_parallel_size} x PP "
            f"{policy.pipeline_parallel_size} x CP {policy.context_parallel_size}))",
        ),
        ("  in micro-batches", f"{micro}at most {micro_batch_tokens(config):,} tokens each"),
        (
            "tokens a row, at most",
            f"{longest_row(config):,} = max_prompt_length {config.data.max_prompt_length:,} + "
            f"max_completion_length {rollout.max_completion_length:,}",
        ),
        (
            "tokens a step, at most",
            f"{completions * rollout.max_completion_length:,} sampled, "
            f"{completions * longest_row(config):,} trained on",
        ),
        *_length(config),
    ]


def _length(config: Config) -> Iterator[tuple[str, str]]:
    """Steps and epochs of the run, which may depend on the number of rows."""
    rows = count_rows(config.data)
    prompts = config.num_prompts
    by_epochs = None if rows is None else config.steps_of_epochs(rows)
    if config.num_train_epochs is not None:
        num_rows = "rows, not counted yet" if rows is None else counted(rows, "row")
        result = "" if by_epochs is None else f" = {counted(by_epochs, 'step')}"
        goes_first = (
            "" if config.max_steps is None else f"; max_steps {config.max_steps} goes first"
        )
        yield (
            "num_train_epochs",
            f"{config.num_train_epochs:g} x {num_rows} (less those over max_prompt_length) / P "
            f"{prompts}{result}{goes_first}",
        )
    num_steps = config.max_steps or by_epochs
    if num_steps is None:
        yield "the whole run", "known when the rows are counted, at the start of the run"
        return
    optimizer_steps = num_steps * config.optimizer_steps_per_rollout
    warmup = math.ceil(config.policy.warmup_ratio * optimizer_steps)
    drawn = num_steps * prompts
    yield (
        "the whole run",
        f"{counted(num_steps, 'step')}: {counted(drawn, 'prompt')}, "
        f"{counted(num_steps * config.rollout.generation_batch_size, 'completion')}, "
        f"{counted(optimizer_steps, 'optimizer step')} ({warmup:,} of them warm-up)",
    )
    yield from _evaluations(config, num_steps)
    yield "epochs", "unknown: rows not counted" if rows is None else _epochs(drawn, rows)


def _evaluations(config: Config, num_steps: int) -> Iterator[tuple[str, str]]:
    every = config.eval_steps
    if every is not None:
        number = num_steps // every
        after = (
            f"after every {every:,} of {num_steps:,} steps"
            if number
            else (f"not again: eval_steps {every:,} is more than the {counted(num_steps, 'step')}")
        )
        yield "evaluations", f"{1 + number:,}: before the first step, and {after}"


def _running_ahead(config: Config) -> Iterator[tuple[str, str]]:
    rollout, prompts, ahead = config.rollout, config.num_prompts, config.num_prompts_ahead
    if ahead:
        rest = "go on" if rollout.max_staleness else "are given up and begun again"
        yield (
            "prompts in flight, at most",
            f"{prompts + ahead} = P {prompts} + {ahead} that {rest} when the first {prompts} are "
            f"done; no token is more than max_staleness {rollout.max_staleness} weight versions "
            "old",
        )
    if rollout.dynamic_sample:
        times = rollout.max_resample_times
        yield (
            "prompts resampled a step",
            f"up to {times * prompts} = max_resample_times {times} x P {prompts}, in place of "
            "groups whose rewards are all equal",
        )


def _epochs(drawn: int, rows: int) -> str:
    return (
        f"{drawn / rows:.2f} = {counted(drawn, 'prompt')} / {counted(rows, 'row')}"
        if rows
        else "no rows"
    )


def _print_config(resolved: ResolvedConfig, console: Console) -> None:
    """Each field with its value and origin, and its meaning where the terminal is wide."""
    fields = config_fields()
    widths = [2 + max(len(name.rpartition(".")[2]) for name in fields), _VALUE, len("command line")]
    head = ["field", "value", "from"]
    room = console.width - sum(widths) - len(widths) * GAP
    if room >= _LEAST_MEANING:
        widths, head = [*widths, room], [*head, "meaning"]
    else:
        widths[1] += max(0, room + GAP)
    print_lines(console, ["Config: docs/config.md has the meaning of every field"], "italic")
    print_lines(console, columns(head, widths), "bold")
    values = resolved.config.model_dump()
    heading = ""
    for name, info in fields.items():
        section, _, field = name.rpartition(".")
        if section != heading:
            print_lines(console, [section], "bold")
            heading = section
        value = (values[section] if section else values)[field]
        origin = resolved.origins[name]
        indent = "  " if section else ""
        cells = (indent + field, show_value(value), origin, first_sentence(info.description))
        print_lines(console, columns(cells[: len(widths)], widths), _ORIGIN_STYLES[origin])


def _print_roles(config: Config, console: Console) -> None:
    device = guess_device(config)
    roles = plan_roles(config, device=device)
    pairs = [(f"{name} x {count}", _role_text(name, roles)) for name, count in _counts(roles)]
    if config.grpo.beta == 0:
        pairs.append(("reference x 0", "grpo.beta is 0"))
    gpus, threads = sum(role.gpus for role in roles), sum(role.cpu_threads for role in roles)
    if device == "cuda":
        pairs.append(("in all", f"{counted(gpus, 'GPU')}; this machine shows {visible_gpus()}"))
    else:
        pairs.append(("in all", f"{counted(threads, 'thread')}, not all busy at once"))
    print_pairs(console, f"Actors on {device}", pairs)


def _counts(roles: list[Role]) -> list[tuple[str, int]]:
    return list(Counter(role.name for role in roles).items())


def _role_text(name: str, roles: list[Role]) -> str:
    role = next(role for role in roles if role.name == name)
    if role.name == "reward_model" and role.shares_gpu_of:
        return "a GPU of the policy's, and memory there (reward.reward_model_placement)"
    if role.shares_gpu_of:
        return (
            f"the GPU of the {role.shares_gpu_of[0]} rank of the same number, its weights in host "
            f"memory meanwhile ({name}.placement)"
        )
    if role.gpus:
        first = sum(r.gpus for r in roles[: roles.index(role)])
        last = first + sum(r.gpus for r in roles if r.name == name) - 1
        of_its_kind = [other for other in roles if other.name == name]
        sharers = sum(other.shares_gpu_of == (name, role.rank) for other in of_its_kind)
        each = f"{1 + sharers} share a GPU" if sharers else f"{role.gpus} GPU each"
        return f"{each}: number {first}" + (f" to {last}" if last > first else "")
    return f"CPU, {counted(role.cpu_threads, 'thread')} each"


def _print_saved_and_memory(config: Config, console: Console) -> None:
    device = guess_device(config)
    try:
        shape = read_model_shape(find_model_folder(config.model.path))
        reference = shape
        if config.grpo.beta > 0:
            reference = read_model_shape(find_model_folder(config.reference_path))
    except ValueError:  # one of the problems, which are printed last
        print_pairs(console, "Saved", describe_saving(config, None))
        console.print("\nModel config not available here: memory not estimated, nor disk")
        return
    rows = count_rows(config.data)
    config = config if rows is None else config.with_steps(rows)
    use = disk_use(config, shape, device=device)
    print_pairs(console, "Saved", describe_saving(config, use))
    warning = disk_warning(config, use)
    if warning is not None:
        print_wrapped(console, warning, style="bold red")
    estimates = estimate_memory(config, shape, reference, device=device)
    of_rewards, unknown = _reward_model_memory(config, device)
    estimates += of_rewards
    counts = dict(_counts(plan_roles(config, device=device)))
    purposes = list(dict.fromkeys(purpose for e in estimates for purpose in e.gib))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for estimate in estimates:
        table.add_column(f"{estimate.role} x {counts[estimate.role]}", justify="right")
    for purpose in purposes:
        table.add_row(
            purpose, *(_gib(e.gib[purpose]) if purpose in e.gib else "" for e in estimates)
        )
    table.add_row("sum", *(f"{estimate.total_gib:.2f}" for estimate in estimates))
    console.print()
    kind = "GPU" if device == "cuda" else "main"
    print_lines(console, [f"Estimate of {kind} memory, in GiB a process"], "italic")
    console.print(table)
    for estimate in estimates:
        for purpose, formula in estimate.formula.items():
            text = f"{estimate.role} {purpose} = {formula}"
            print_wrapped(console, text, indent="  ", style="dim")
    if unknown:
        text = f"not in the estimate: {', '.join(unknown)}"
        print_wrapped(console, text, indent="  ", style="dim")
    if device == "cpu":
        _print_total(estimates, counts, console)
    else:
        _print_cards(config, estimates, console)


def _reward_model_memory(config: Config, device: Device) -> tuple[list[MemoryEstimate], list[str]]:
    """Of the largest reward model, if any, and those whose weights are not on this machine."""
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


def _gib(size: float) -> str:
    return f"{size:.2f}" if size >= 0.005 else "<0.01"


def _print_cards(config: Config, estimates: list[MemoryEstimate], console: Console) -> None:
    card_gib = gpu_memory_gib()
    if card_gib is None:
        console.print("No GPU is visible here, so the estimate is compared with none")
        return
    console.print(f"The smallest GPU here has {card_gib:.1f} GiB")
    for warning in card_warnings(config, estimates, card_gib):
        print_wrapped(console, f"That may not fit: {warning}", style="bold red")


def _print_total(estimates: list[MemoryEstimate], counts: dict[str, int], console: Console) -> None:
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
    if not problems:
        console.print("\nReady to run.", style="bold green")
        console.print(
            f"The reward functions were started, and the first {FIRST_ROWS} rows of each text file "
            "read. A run reads all rows, as `rlsys data preview` does.",
            style="dim",
        )
        specs = map(read_spec, (*config.data.dataset, *config.data.val_dataset))
        elsewhere = [spec.name for spec in specs if not spec.is_local]
        if elsewhere:
            names = ", ".join(dict.fromkeys(elsewhere))
            text = f"Not on this machine, so not looked at: {names}. A run asks the hub."
            print_wrapped(console, text, style="dim")
